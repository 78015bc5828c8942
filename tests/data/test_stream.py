"""Streams: every row once an epoch, any chunk by itself, bad rows counted, nothing read ahead of its time."""

from __future__ import annotations

import json
from collections import Counter

import datasets
import pytest
import torch

from luthier.core.errors import CheckpointError, ConfigError, DataError
from luthier.data.encode import prepare
from luthier.data.hub import HubStream
from luthier.data.renderer import make_renderer
from luthier.data.source import DataConfig
from luthier.data.template import TemplateConfig
from luthier.objectives.kto import Kto
from luthier.objectives.sft import Sft
from luthier.train.streaming import StreamLoader
from tests.conftest import build_tokenizer


def write(folder, name, count, **more):
    file = folder / f"{name}.jsonl"
    rows = [{"instruction": f"{name} {n}", "output": " hello" * (1 + n % 5)} | more for n in range(count)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def stream_of(*files, stage=None, cutoff_len=64, capacity=None, shuffle=True, seed=3, **keys):
    config = DataConfig(
        dataset=list(files), streaming=True, **{"preprocessing_batch_size": 7, "buffer_size": 12, **keys}
    )
    renderer = make_renderer(TemplateConfig(template="default"), build_tokenizer())
    prepared = prepare(config, stage or Sft(), renderer, cutoff_len=cutoff_len, seed=seed)
    return prepared, prepared.stream.laid_out(capacity, shuffle=shuffle)


def places(stream, chunks):
    """`file:row` of every example, in order."""
    return [name.rpartition("/")[2] for c in range(chunks) for bundle in stream.make(c).bundles for _, name in bundle]


def test_every_row_once_an_epoch_in_a_new_order(tmp_path):
    _, stream = stream_of(write(tmp_path, "a", 35))
    first, second = places(stream, 5), places(stream, 10)[35:]
    assert sorted(first) == sorted(second) == sorted(f"a.jsonl:{n}" for n in range(1, 36))
    assert first != second and first != sorted(first)
    for block in range(0, 35, 12):  # rows stay among the rows they are shuffled with
        assert {int(p.split(":")[1]) for p in first[block : block + 12]} == set(range(block + 1, min(block + 13, 36)))


def test_without_shuffling_rows_come_as_they_are(tmp_path):
    _, stream = stream_of(write(tmp_path, "a", 10), shuffle=False)
    assert places(stream, 2) == [f"a.jsonl:{1 + n % 10}" for n in range(14)]


def test_sets_are_mixed_as_they_are_without_streaming(tmp_path):
    files = write(tmp_path, "a", 6), write(tmp_path, "b", 3)
    _, stream = stream_of(*files, shuffle=False, mix_strategy="interleave_under", preprocessing_batch_size=6)
    assert places(stream, 1) == ["a.jsonl:1", "b.jsonl:1", "a.jsonl:2", "b.jsonl:2", "a.jsonl:3", "b.jsonl:3"]
    _, stream = stream_of({"path": files[0], "weight": 2}, files[1], shuffle=False, preprocessing_batch_size=15)
    assert Counter(p[0] for p in places(stream, 1)) == {"a": 12, "b": 3}


def test_rows_held_out_are_never_trained(tmp_path):
    prepared, stream = stream_of(write(tmp_path, "a", 20), val_size=6)
    held = {name for _, name in prepared.eval[""]}
    assert len(held) == 6 and stream.epoch == 14
    assert not {name.rpartition("/")[2] for name in held} & set(places(stream, 8))


def test_packed_bundles_fit(tmp_path):
    _, stream = stream_of(write(tmp_path, "a", 21), capacity=64)
    bundles = stream.make(0).bundles
    assert sorted(places(stream, 3)) == sorted(f"a.jsonl:{n}" for n in range(1, 22))
    assert len(bundles) < 7 and all(sum(len(e.paths[0].ids) for e, _ in bundle) <= 64 for bundle in bundles)


def loader_of(stream, rank=0, world=1, **keys):
    return StreamLoader(
        stream,
        lambda bundles: [n.rpartition("/")[2] for b in bundles for _, n in b],
        batch_size=3,
        rank=rank,
        world=world,
        **keys,
    )


def taken(loader, count):
    return [batch for _, batch in zip(range(count), loader)]


def test_any_number_of_workers_gives_the_same_micro_batches(tmp_path):
    _, stream = stream_of(write(tmp_path, "a", 50))
    alone = taken(loader_of(stream), 30)
    assert taken(loader_of(stream, workers=2), 30) == alone
    assert [name for batch in alone for name in batch] == places(stream, 13)[:90]


def test_a_loader_goes_on_at_the_exact_row(tmp_path):
    _, stream = stream_of(write(tmp_path, "a", 50), capacity=64)
    whole = taken(loader_of(stream), 20)
    for stop in (1, 2, 7, 13):
        first = loader_of(stream)
        assert taken(first, stop) == whole[:stop]
        again = loader_of(stream, workers=stop % 2)
        again.go_on(list(first.place), 1)
        assert taken(again, 20 - stop) == whole[stop:]
    with pytest.raises(CheckpointError, match="go on with 2 processes"):
        loader_of(stream).go_on([1, 2], 2)


def test_ranks_take_turns_and_share_the_rows(tmp_path):
    _, stream = stream_of(write(tmp_path, "a", 42))
    seen = [name for rank in (0, 1) for batch in taken(loader_of(stream, rank, 2), 7) for name in batch]
    assert sorted(seen) == sorted(f"a.jsonl:{n}" for n in range(1, 43))


def test_bad_rows_are_said_and_counted_and_too_many_stop_the_run(tmp_path, caplog):
    file = write(tmp_path, "a", 30)
    lines = open(file).read().splitlines()
    lines[4] = json.dumps({"instruction": 5, "output": "x"})
    open(file, "w").write("\n".join(lines))
    _, stream = stream_of(file)
    loader = loader_of(stream, max_bad_rows=0.2)
    taken(loader, 8)
    assert loader.tallies[0].bad_rows == 1 and loader.tallies[0].rows == 28
    with pytest.raises(DataError, match=r"a\.jsonl:5"):
        taken(loader_of(stream, max_bad_rows=0.01), 9)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"val_size": 0.1}, "wants a number of rows"),
        ({"max_samples": 4}, "max_samples has no meaning"),
        ({"tokenized_path": "x"}, "tokenized_path keeps data"),
        ({"buffer_size": 0}, "buffer_size: 0 must be 1 or more"),
        ({"stage": Kto()}, "stage kto needs the whole data set"),
        ({"val_size": 30}, "would hold out every row"),
    ],
)
def test_what_does_not_go_together(keys, message, tmp_path):
    file = write(tmp_path, "a", 30, kto_tag=True)
    entry = {"path": file, "columns": {"prompt": "instruction", "response": "output", "kto_tag": "kto_tag"}}
    with pytest.raises((ConfigError, DataError), match=message):
        stream_of(entry if "stage" in keys else file, **keys)


class Counting:
    """A data set of the hub that counts what is read of it."""

    def __init__(self, count):
        self.read = 0
        self.data = datasets.Dataset.from_list([{"n": n} for n in range(count)]).to_iterable_dataset()

    def skip(self, count):
        for row in self.data.skip(count):
            self.read += 1
            yield row


def test_a_hub_stream_reads_each_row_once_and_holds_two_blocks():
    source = Counting(100)
    stream = HubStream("org/name", source, 100, reach=20)
    generator = torch.Generator().manual_seed(0)
    for block in range(0, 100, 20):
        order = (torch.randperm(20, generator=generator) + block).tolist()
        for at in range(0, 20, 5):
            assert [row["n"] for row in stream.take(order[at : at + 5])] == order[at : at + 5]
        assert len(stream._held) <= 40
    assert source.read == 100
    assert [row["n"] for row in stream.take([3, 1])] == [3, 1], "and begins anew for an earlier row"


def test_a_hub_stream_that_ends_too_soon_says_so():
    with pytest.raises(DataError, match="ended after 4 rows, and 9 were announced"):
        HubStream("org/name", Counting(4), 9, reach=20).take([8])
