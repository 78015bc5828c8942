"""Rows per second and peak memory of encoding: generated conversations, by the number of processes, cold and cached.

    python benchmarks/encoding.py                   # 100,000 rows
    python benchmarks/encoding.py --rows 10000      # for a quick look

Rows are conversations of one to four turns, about 150 tokens, in the demo's tokenizer. `cold` encodes them, `cached`
prepares the same rows again with other flags that change no token. `streamed` makes the chunks that training would
ask for, without training. Every measurement runs in a process of its own, so that its peak memory is its own; memory is
what preparing added to the interpreter with its libraries, over all processes.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import tempfile
import time
from pathlib import Path

from layouts import ROOT
from workers import keep, measure

WAYS = ("cold", "cached", "streamed")


def generate(file: Path, rows: int) -> None:
    """Conversations of made-up words, the same every time."""
    rng = random.Random(0)
    syllables = ["ta", "lo", "ri", "ven", "mo", "sha", "ku", "del", "pi", "orn"]

    def words(count: int) -> str:
        return " ".join("".join(rng.choices(syllables, k=rng.randint(1, 3))) for _ in range(count))

    with file.open("w", encoding="utf-8") as out:
        for _ in range(rows):
            turns = []
            for _ in range(rng.randint(1, 4)):
                turns.append({"from": "human", "value": words(rng.randint(3, 15))})
                turns.append({"from": "gpt", "value": words(rng.randint(5, 35))})
            out.write(json.dumps({"conversations": turns}) + "\n")


def worker(options: argparse.Namespace) -> None:
    """Measure one way and print the figures as JSON."""
    from luthier.core.log import quiet_libraries
    from luthier.data.encode import prepare
    from luthier.data.renderer import make_renderer
    from luthier.data.source import DataConfig
    from luthier.data.template import TemplateConfig
    from luthier.model.source import ModelConfig
    from luthier.model.tokenizer import load_tokenizer
    from luthier.objectives.sft import Sft

    quiet_libraries()
    config = DataConfig(
        dataset=str(options.file),
        data_cache_dir=str(options.file.parent / f"cache-{options.workers}"),
        preprocessing_num_workers=options.workers,
        # Other flags that change no token: the second run is not the first one's twin.
        preprocessing_batch_size=900 if options.worker == "cached" else 1000,
        streaming=options.worker == "streamed",
    )
    tokenizer = load_tokenizer(ModelConfig(model_name_or_path=str(options.model)))
    renderer = make_renderer(TemplateConfig(template="qwen"), tokenizer)
    before = _peak()
    start = time.perf_counter()
    prepared = prepare(config, Sft(), renderer, cutoff_len=2048, seed=0)
    if prepared.stream is not None:
        rows = sum(len(prepared.stream.make(chunk).bundles) for chunk in range(-(-prepared.stream.epoch // 1000)))
    else:
        rows = len(prepared.train)
    seconds = time.perf_counter() - start
    print(json.dumps({"rows": rows, "seconds": seconds, "added_bytes": _peak() - before}))


def _peak() -> int:
    """Peak memory of this process and of the largest of its children, in bytes."""
    return 1024 * sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def main() -> None:
    """Print a table; --json FILE keeps the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--processes", type=int, nargs="+", default=(1, 2))
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "smollm2-135m", help="whose tokenizer")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options)
        return
    from rich.console import Console
    from rich.table import Table

    found: dict[str, dict] = {}
    table = Table(title=f"Encoding {options.rows:,} conversations")
    for column in ("processes", "way", "rows/s", "seconds", "memory added, MiB"):
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        generate(file, options.rows)
        for workers in options.processes:
            for way in WAYS if workers == 1 else WAYS[:2]:
                seen = found[f"{way}, {workers} processes"] = measure(
                    __file__, options, ("model",), worker=way, file=file, workers=workers
                )
                speed, added = seen["rows"] / seen["seconds"], seen["added_bytes"] / 2**20
                table.add_row(str(workers), way, f"{speed:,.0f}", f"{seen['seconds']:.2f}", f"{added:,.0f}")
    Console().print(table)
    if options.json:
        keep(options.json, __file__, found)


if __name__ == "__main__":
    main()
