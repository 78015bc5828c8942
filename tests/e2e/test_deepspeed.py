"""Two processes under DeepSpeed learn what one plain process learns, lose nothing to kill -9 and save a whole model.

`make deepspeed` installs DeepSpeed beside the suite's own packages and runs this; without DeepSpeed it is left out.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file

from luthier.core import manifest
from luthier.fit import fit
from luthier.model.parts import hint
from luthier.run import resolve
from luthier.train.trainer import Trainer
from tests.conftest import save_lively_model
from tests.e2e import killing

os.environ.setdefault("DS_ACCELERATOR", "cpu")
pytest.importorskip("deepspeed")
# On a CPU DeepSpeed compiles a sum over shared memory that training never asks for, for minutes; a process that is
# killed meanwhile leaves a lock that the next one waits for. It looks into this table first.
importlib.import_module("deepspeed.ops").__compatible_ops__["deepspeed_shm_comm"] = False
pytestmark = pytest.mark.e2e
FILES = Path(__file__).resolve().parents[2] / "examples" / "deepspeed"


@pytest.fixture(scope="module")
def base(model_folder, tmp_path_factory):
    """Keys of a run whose rows have uneven token counts, in a folder whose name has a blank."""
    folder = tmp_path_factory.mktemp("zero") / "a folder"
    folder.mkdir()
    save_lively_model(model_folder, folder / "model")
    rows = [
        {"instruction": f"Say {n}", "chosen": f"{n} " * (n * 7 % 13 + 1), "rejected": "no " * (n % 5 + 1)}
        for n in range(22)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}
    sets = {"pairs": {"file_name": "pairs.jsonl", "ranking": True, "columns": columns}}
    sets["rows"] = {"file_name": "pairs.jsonl", "columns": {"prompt": "instruction", "response": "chosen"}}
    (folder / "dataset_info.json").write_text(json.dumps(sets))
    for name in ("ds_z2_config.json", "ds_z3_config.json"):
        shutil.copy(FILES / name, folder)
    text = (FILES / "ds_z3_config.json").read_text()
    (folder / "scattered.json").write_text(text.replace('model_save": true', 'model_save": false'))
    keys = {"model_name_or_path": folder / "model", "template": "chatml", "dataset_dir": folder, "cutoff_len": 128}
    keys |= {"data_cache_dir": folder / "cache", "per_device_train_batch_size": 1, "gradient_accumulation_steps": 3}
    keys |= {"learning_rate": 1e-2, "lr_scheduler_type": "cosine", "max_steps": 4, "logging_steps": 1}
    return {key: str(value) if isinstance(value, Path) else value for key, value in keys.items()} | {"save_steps": 2}


def _two(keys, *, dies: tuple | None = None) -> list[int]:
    """Two processes; dies: (owner, name, n): each that gets to the n-th call is killed there."""
    run = resolve(keys)

    def work(rank):
        with pytest.MonkeyPatch.context() as patch:
            if dies is not None:
                owner, name, nth = dies
                real, calls = getattr(owner, name), []

                def call(*args, **kwargs):
                    calls.append(name)
                    if len(calls) == nth:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return real(*args, **kwargs)

                patch.setattr(owner, name, call)
            fit(run)

    return killing.in_ranks(work)


def _learnt(folder: str) -> tuple[list[float], dict]:
    lines = [json.loads(line) for line in (Path(folder) / "trainer_log.jsonl").read_text().splitlines()]
    numbers = [line[name] for line in lines for name in ("loss", "grad_norm")]
    return numbers, {k: v for file in Path(folder).glob("*.safetensors") for k, v in load_file(file).items()}


CASES = {
    "ds_z2_config": {"stage": "sft", "dataset": "rows", "finetuning_type": "full"},
    "ds_z3_config": {"stage": "rm", "dataset": "pairs", "finetuning_type": "lora"},
    "scattered": {"stage": "dpo", "dataset": "pairs", "finetuning_type": "full"},
}


@pytest.mark.parametrize("name", CASES)
def test_two_processes_learn_what_one_learns(name, base, tmp_path):
    keys = base | CASES[name]
    sharded = keys | {"deepspeed": str(Path(base["dataset_dir"]) / f"{name}.json"), "output_dir": str(tmp_path / "two")}
    alone = keys | {"gradient_accumulation_steps": 6, "output_dir": str(tmp_path / "one")}
    assert killing.in_child(lambda: fit(resolve(alone))) == 0
    assert _two(sharded) == [0, 0]
    (one, weights), (two, others) = _learnt(alone["output_dir"]), _learnt(sharded["output_dir"])
    assert len(one) == 8 and two == pytest.approx(one, abs=5e-6)
    # With a frozen bias of the head, which transformers would lose.
    assert weights.keys() == others.keys()
    for key, value in weights.items():
        # Where a gradient is nothing but rounding, AdamW makes steps of its sign.
        assert (value - others[key]).abs().max() < 2e-4, key
    if name == "scattered":
        checkpoint = Path(sharded["output_dir"]) / "checkpoint-4"
        assert not list(checkpoint.glob("*.safetensors")) and "zero_to_fp32.py" in hint(checkpoint)
        assert (checkpoint / "config.json").is_file() and manifest.damage(checkpoint) is None


def test_killed_twice_it_ends_where_the_straight_run_ends(base, tmp_path):
    keys = base | CASES["ds_z3_config"] | {"lora_dropout": 0.1}
    keys |= {"deepspeed": str(Path(base["dataset_dir"]) / "ds_z3_config.json")}
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    assert _two(keys | {"output_dir": str(straight)}) == [0, 0]
    again = keys | {"output_dir": str(broken)}
    assert _two(again, dies=(Trainer, "training_step", 8)) == [-signal.SIGKILL] * 2
    assert [path.name for path in broken.glob("checkpoint-*")] == ["checkpoint-2"]
    # Rank 0 in the middle of writing a checkpoint; the other is told by the connection that ends.
    assert _two(again, dies=(manifest, "seal", 1)) == [-signal.SIGKILL, 1]
    assert [path.name for path in broken.glob("checkpoint-*")] == ["checkpoint-2"]
    assert _two(again) == [0, 0]
    assert killing.differing(killing.left_behind(straight), killing.left_behind(broken)) == []
