"""Rounds in one token tree against the plain way: one row a round, built and run here from the files alone."""

from __future__ import annotations

import json
import random

import pytest
import torch
import torch.nn.functional as F

from luthier.data.bare import Bare
from luthier.data.encode import prepare
from luthier.data.layout import collate
from luthier.data.source import DataConfig
from luthier.model import heads
from luthier.model.policy import PolicySetup
from luthier.objectives.accept_head import SCORE, AcceptHead, AcceptHeadConfig
from tests.conftest import build_model, build_tokenizer
from tests.exact.conftest import gradients, in_double

ARCHITECTURES = ("llama", "mistral", "qwen3", "gemma3")
LAYOUTS = ("sep", "hybrid", "judge")
TEXTS = {
    "a": ("What is the capital of France?", " The capital of France is Paris, hello world. goodbye"),
    "b": ("小提琴制造者叫什么 🎻?", " 她叫 luthier 👩‍🔧, 每天雕刻琴头 🎻🎻 by hand."),
}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request):
    return in_double(build_model(request.param, dtype=torch.float64)).eval()


def some_rounds(seed: int, count: int) -> list[dict]:
    """Rounds that leave their context at any character, with drafts of 1 to 5 tokens and some without a mismatch."""
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        name = rng.choice(sorted(TEXTS))
        whole = "USER: {}\nASSISTANT:{}".format(*TEXTS[name])
        draft = [rng.randrange(7, 400) for _ in range(rng.randint(1, 5))]
        verifier = [*draft, rng.randrange(7, 400)] if rng.random() < 0.5 else list(draft)
        wrong = sorted(rng.sample(range(len(draft)), rng.randint(0, len(draft))))
        for i in wrong:
            verifier[i] = 7 + (draft[i] - 6) % 393
        scores = [rng.choice(["0", "4", "10", 7, 2.5]) for _ in wrong]
        rows.append(
            {
                "idx": number,
                "req_id": name,
                "context_len": rng.randint(1, len(whole)),
                "spd_round_draft_ids": draft,
                "spd_round_verifier_ids": verifier,
                "mismatch_index": wrong,
                "mismatch_score": scores,
            }
        )
    return rows


def write(folder, rows) -> str:
    contexts = [{"req_id": name, "user_text": u, "assistant_text": a} for name, (u, a) in TEXTS.items()]
    for file, content in (("train.jsonl", rows), ("context.jsonl", contexts)):
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    return str(folder / "train.jsonl")


def encoded(folder, rows, layout, **keys):
    """What training would lay out: every tree of the set, and the tokenizer."""
    tokenizer = build_tokenizer()
    objective = AcceptHead(AcceptHeadConfig(accept_layout=layout, **keys))
    data = DataConfig(dataset=[{"path": write(folder, rows), "format": "accept_head"}], data_cache_dir=str(folder))
    prepared = prepare(data, objective, Bare(tokenizer), cutoff_len=512, seed=0)
    return objective, [prepared.train[i] for i in range(len(prepared.train))], tokenizer, prepared.report


def plain_rows(rows, tokenizer, layout):
    """(ids, {index: target}, length of the context) of every round, straight from the rows."""
    for row in rows:
        user, assistant = TEXTS[row["req_id"]]
        text = ("USER: " + user + "\nASSISTANT:" + assistant)[: row["context_len"]]
        context = tokenizer(text, add_special_tokens=False)["input_ids"]
        draft, verifier = row["spd_round_draft_ids"], row["spd_round_verifier_ids"]
        sep = [] if layout == "judge" else [tokenizer.eos_token_id]
        ids = context + sep + draft + ([] if layout == "judge" else sep + verifier)
        first = len(context) + len(sep)
        labels = {first + i: float(s) / 10 for i, s in zip(row["mismatch_index"], row["mismatch_score"])}
        yield ids, labels, len(context)


def both_ways(model, length: int, context: int):
    """The masks of the hybrid layout, one loop per pair: behind the context all tokens see one another."""
    config = model.config

    def mask(window):
        sees = torch.zeros(length, length, dtype=torch.bool)
        for q in range(length):
            for k in range(length):
                visible = k <= q or (q >= context and k >= context)
                sees[q, k] = visible and (window is None or q - k < window)
        return sees[None, None]

    kinds = getattr(config, "layer_types", None)
    if config.model_type in ("qwen3", "gemma3_text"):
        windows = {"full_attention": None, "sliding_attention": config.sliding_window}
        return {kind: mask(windows[kind]) for kind in set(kinds)}
    return mask(getattr(config, "sliding_window", None))


def plain_loss(model, head, rows, tokenizer, layout):
    """BCE with logits over the scored positions of all rounds, one forward pass a round."""
    model.set_attn_implementation("sdpa")
    total, count = 0.0, 0
    for ids, labels, context in plain_rows(rows, tokenizer, layout):
        if not labels:
            continue
        given = {}
        if layout == "hybrid":
            positions = torch.arange(len(ids))[None]
            given = {"attention_mask": both_ways(model, len(ids), context), "position_ids": positions}
        hidden = model.model(input_ids=torch.tensor([ids]), use_cache=False, **given).last_hidden_state[0]
        at = sorted(labels)
        targets = torch.tensor([labels[i] for i in at], dtype=torch.float64)
        total = total + F.binary_cross_entropy_with_logits(head(hidden[at])[:, 0], targets, reduction="sum")
        count += len(at)
    return total / count


@pytest.mark.parametrize("layout", LAYOUTS)
def test_trees_equal_one_row_a_round(model, layout, tmp_path):
    rows = some_rounds(seed=LAYOUTS.index(layout), count=14)
    objective, items, tokenizer, _ = encoded(tmp_path, rows, layout)
    head = heads.attach(model, "accept", seed=5)
    torch.nn.init.normal_(head.fc2.weight)  # judgements far from 1/2
    expected = plain_loss(model, head, rows, tokenizer, layout)
    expected_gradients = gradients(model, expected)
    for way, backend in (("shared", "dense"), ("shared", "segments"), ("packed", "segments"), ("padded", "dense")):
        setup = PolicySetup(model, head=head, backend=backend)
        batch = collate(items, layout=way, pad_id=3, columns=[SCORE])
        loss, _ = objective.loss(setup.bind(), batch)
        found = gradients(model, loss)
        setup.close()
        assert loss.item() == pytest.approx(expected.item(), abs=1e-9), (way, backend)
        for name, gradient in expected_gradients.items():
            assert torch.allclose(found[name], gradient, atol=1e-9, rtol=0), (way, backend, name)


def test_sharing_computes_far_fewer_tokens(tmp_path):
    rows = [row | {"req_id": "a"} for row in some_rounds(3, 40) if row["mismatch_index"]]
    _, items, _, report = encoded(tmp_path, rows, "sep")
    batch = collate(items, layout="shared", pad_id=3, columns=[SCORE])
    assert report.total.tokens == batch.tokens < batch.unshared / 2 == report.total.path_tokens / 2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_hybrid_sees_the_verifier(layout, tmp_path):
    """Other verifier tokens change no judgement of sep and judge, and every one of hybrid."""
    rows = [row for row in some_rounds(4, 8) if row["mismatch_index"]]
    others = [
        row | {"spd_round_verifier_ids": [(v + 5) % 390 + 7 for v in row["spd_round_verifier_ids"]]} for row in rows
    ]
    for row, other in zip(rows, others):
        for i in row["mismatch_index"]:
            if other["spd_round_verifier_ids"][i] == row["spd_round_draft_ids"][i]:
                other["spd_round_verifier_ids"][i] += 1
    model = build_model("llama", dtype=torch.float64).eval()
    head = heads.attach(model, "accept", seed=5)
    said = []
    for number, chosen in enumerate((rows, others)):
        folder = tmp_path / str(number)
        folder.mkdir()
        _, items, _, _ = encoded(folder, chosen, layout)
        setup = PolicySetup(model, head=head)
        said.append(setup.bind().verdict_at_tokens(collate(items, layout="shared", pad_id=3, columns=[SCORE]))[:, 0])
        setup.close()
    same = (said[0] - said[1]).abs() < 1e-12
    assert not same.any() if layout == "hybrid" else same.all()


def test_every_path_spells_its_own_tokenisation(tmp_path):
    """Cut at any character, also inside emoji: a path is exactly what tokenising the cut text alone gives."""
    rng = random.Random(8)
    rows = some_rounds(9, 1400)
    for row in rows:
        row["context_len"] = rng.randint(1, len("USER: {}\nASSISTANT:{}".format(*TEXTS[row["req_id"]])))
    rows = [row for row in rows if row["mismatch_index"]]
    _, items, tokenizer, _ = encoded(tmp_path, rows, "sep")
    found = {}
    for item, _ in items:
        for told, path in zip(item.extra["rounds"], item.paths):
            found[told["row"]] = path
    for number, (ids, labels, _) in enumerate(plain_rows(rows, tokenizer, "sep"), 1):
        path = found[number]
        assert path.ids == ids[: max(labels) + 1]
        assert {i: v for i, v in enumerate(path.columns[SCORE]) if v == v} == labels  # 0.4 stays 0.4


@pytest.mark.parametrize("keys", [{"accept_rounds_per_tree": 3}, {"accept_tree_tokens": 60}, {}])
def test_however_requests_are_cut_the_step_is_the_same(keys, tmp_path):
    rows = some_rounds(12, 20)
    objective, items, _, _ = encoded(tmp_path, rows, "sep", **keys)
    model = in_double(build_model("llama", dtype=torch.float64)).eval()
    head = heads.attach(model, "accept", seed=5)
    expected = gradients(model, plain_loss(model, head, rows, build_tokenizer(), "sep"))
    setup = PolicySetup(model, head=head)
    batches = [collate([item], layout="shared", pad_id=3, columns=[SCORE]) for item in items]
    units = sum(batch.units()["token"] for batch in batches)
    assert all(len(item.paths) <= keys.get("accept_rounds_per_tree", 99) for item, _ in items)
    assert (
        all(batch.tokens <= 60 or len(item.paths) == 1 for batch, (item, _) in zip(batches, items))
        or "accept_tree_tokens" not in keys
    )
    loss = sum(objective.loss(setup.bind(), batch.with_totals({"token": units}))[0] for batch in batches)
    found = gradients(model, loss)
    assert all(torch.allclose(found[name], expected[name], atol=1e-9, rtol=0) for name in expected)
