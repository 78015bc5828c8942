"""The policy's log-probs against the model's own logits."""

from __future__ import annotations

import pytest
import torch
import transformers

from luthier.core.types import Encoded, Path
from luthier.data.layout import collate
from luthier.model import policy as policy_module
from luthier.model.policy import PolicySetup
from tests.conftest import TINY, build_model

ITEMS = [
    (Encoded((Path([9, 8, 7, 11, 12, 13], [0.0, 0, 1, 1, 0.5, 1]), Path([9, 8, 20, 21], [0.0, 0, 1, 1]))), "a"),
    (Encoded((Path([30, 31, 32, 33, 34], [0.0, 1, 1, 1, 1]),)), "b"),
]


def own_logps(model) -> list[float]:
    """log-probs of the supervised tokens, from the model's own forward pass over each path."""
    found = []
    for encoded, _ in ITEMS:
        for path in encoded.paths:
            logps = model(input_ids=torch.tensor([path.ids]), use_cache=False).logits[0].log_softmax(-1)
            found += [logps[i - 1, path.ids[i]].item() for i in range(1, len(path.ids)) if path.weights[i]]
    return found


def special(kind: str):
    """Families that change their logits after the head."""
    common = TINY | {"num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 3}
    torch.manual_seed(1)
    configs = {
        "gemma2": lambda: transformers.Gemma2Config(
            **common, head_dim=8, final_logit_softcapping=0.5, query_pre_attn_scalar=8
        ),
        "cohere": lambda: transformers.CohereConfig(**common, logit_scale=3.0),
        "granite": lambda: transformers.GraniteConfig(**common, logits_scaling=0.1),
    }
    config = configs[kind]()
    eager = {"attn_implementation": "eager"} if kind == "gemma2" else {}
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, **eager).eval()


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
@pytest.mark.parametrize("kind", ["gemma2", "cohere", "granite"])
def test_families_that_shape_their_logits(kind, layout):
    model = special(kind)
    expected = own_logps(model)
    batch = collate(ITEMS, layout=layout, pad_id=3)
    found = PolicySetup(model).bind().logps(batch)
    assert found.tolist() == pytest.approx(expected, abs=1e-5)


def test_logits_come_in_chunks_with_the_same_gradients(monkeypatch):
    reference = build_model("llama", dtype=torch.float64)
    whole = PolicySetup(reference)
    batch = collate(ITEMS, layout="shared", pad_id=3)
    batch.mean(whole.bind().nll(batch), over="token").backward()
    monkeypatch.setattr(policy_module, "CHUNK_ELEMENTS", 400 * 2)
    model = build_model("llama", dtype=torch.float64)
    setup = PolicySetup(model)
    rows = []
    model.lm_head.register_forward_hook(lambda head, args, output: rows.append(output.shape[:-1].numel()))
    batch.mean(setup.bind().nll(batch), over="token").backward()
    assert max(rows) == 2, "never more than a chunk of logits"
    for (name, p), q in zip(model.named_parameters(), reference.parameters()):
        assert torch.allclose(p.grad, q.grad, atol=1e-12), name


def test_only_supervised_positions_reach_the_head():
    model = build_model("llama")
    setup = PolicySetup(model)
    rows = []
    model.lm_head.register_forward_hook(lambda head, args, output: rows.append(output.shape[:-1].numel()))
    batch = collate(ITEMS, layout="shared", pad_id=3)
    setup.bind().logps(batch)
    assert rows == [1, len(batch.target)], "one position for the model's own logits, then the supervised ones"


def test_one_forward_pass_however_many_questions():
    model = build_model("llama")
    passes = []
    model.model.register_forward_hook(lambda *_: passes.append(1))
    policy = PolicySetup(model).bind()
    batch = collate(ITEMS, layout="padded", pad_id=3)
    policy.nll(batch), policy.hits(batch), policy.logps(batch)
    assert passes == [1]


def test_label_smoothing_is_transformers():
    from transformers.trainer_pt_utils import LabelSmoother

    model = build_model("llama", dtype=torch.float64).eval()
    encoded = Encoded((Path([30, 31, 32, 33, 34], [0.0, 0.0, 1, 1, 1]),))
    ids = torch.tensor([encoded.paths[0].ids])
    labels = ids.clone()
    labels[0, :2] = -100
    with torch.no_grad():
        expected = LabelSmoother(epsilon=0.1)(model(input_ids=ids), labels, shift_labels=True).item()
    setup = PolicySetup(model, label_smoothing=0.1)
    batch = collate([(encoded, "")], layout="packed", pad_id=3)
    assert batch.mean(setup.bind().nll(batch), over="token").item() == pytest.approx(expected, abs=1e-7)


def test_half_precision_logits_are_reduced_in_float32():
    model = build_model("llama", dtype=torch.bfloat16).eval()
    batch = collate(ITEMS, layout="padded", pad_id=3)
    assert PolicySetup(model).bind().logps(batch).dtype == torch.float32


def test_gradient_checkpointing_changes_nothing():
    found = []
    for checkpointing in (False, True):
        model = build_model("llama", dtype=torch.float64).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        setup = PolicySetup(model, backend="segments")
        batch = collate(ITEMS, layout="shared", pad_id=3)
        batch.mean(setup.bind().nll(batch), over="token").backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_generation_still_works_under_the_registered_name(tokenizer):
    plain, tapped = build_model("llama").eval(), build_model("llama").eval()
    PolicySetup(tapped)
    ids = torch.tensor([[9, 10, 11]])
    mask = torch.ones_like(ids)
    settings = {"max_new_tokens": 6, "do_sample": False, "attention_mask": mask}
    assert plain.generate(ids, **settings).tolist() == tapped.generate(ids, **settings).tolist()


def test_the_implementation_name_is_not_saved(tmp_path):
    model = build_model("llama")
    PolicySetup(model)
    model.save_pretrained(tmp_path)
    assert "luthier" not in (tmp_path / "config.json").read_text()


def test_flex_attention_agrees_forward_on_cpu():
    """Its backward pass needs a GPU; the mask is the same."""
    model = build_model("qwen3", hidden_size=64, head_dim=16).eval()
    batch = collate(ITEMS, layout="shared", pad_id=3)
    with torch.no_grad():
        dense = PolicySetup(model, backend="dense").bind().logps(batch)
        flex = PolicySetup(model, backend="flex").bind().logps(batch)
    assert torch.allclose(dense, flex, atol=1e-5)


def test_dropout_can_be_switched_off_everywhere():
    from luthier.model.reference import without_dropout

    model = build_model("gpt2", attn_pdrop=0.5, embd_pdrop=0.5, resid_pdrop=0.5).train()
    llama = build_model("llama", attention_dropout=0.5).train()
    for subject in (model, llama):
        ids = torch.arange(7, 40)[None]
        first = subject(input_ids=ids).logits
        assert not torch.equal(first, subject(input_ids=ids).logits)
        assert without_dropout(subject) > 0
        assert torch.equal(subject(input_ids=ids).logits, subject(input_ids=ids).logits)
