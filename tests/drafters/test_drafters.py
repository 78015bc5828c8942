"""Who drafts what: each drafter against the plain forward pass of the model it drafts with."""

from __future__ import annotations

import pytest
import torch

from luthier.core.errors import ConfigError, ModelError
from luthier.drafters._greedy import Greedy
from luthier.drafters.early_exit import first_layers
from luthier.drafters.prompt_lookup import PromptLookup
from luthier.engines.drafting import SpeculateConfig, make_drafter
from luthier.engines.target import Cached, Target
from luthier.model.source import ModelConfig
from tests.conftest import build_model, build_tokenizer

KINDS = ("llama", "mistral", "qwen3", "gemma3", "gpt2")


def lively(kind="llama", seed=0, **changes):
    """A model whose logits are far apart, in float64."""
    model = build_model(kind, dtype=torch.float64, seed=seed, **changes).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def greedy(model, ids, count):
    """The plain way: (tokens, logits [count, V]), all computed anew for each."""
    ids, rows = list(ids), []
    for _ in range(count):
        with torch.no_grad():
            rows.append(model(torch.tensor([ids]), use_cache=False).logits[0, -1])
        ids.append(int(rows[-1].argmax()))
    return ids[len(ids) - count :], torch.stack(rows)


@pytest.mark.parametrize(
    ("text", "count", "drafted"),
    [
        ([1, 2, 3, 9, 8, 1, 2, 3], 2, [9, 8]),
        ([1, 2, 3, 9, 8, 1, 2, 3], 9, [9, 8, 1, 2, 3]),
        ([7, 3, 4, 4, 4, 5, 3], 3, [4, 4, 4]),  # only the last token was there before
        ([1, 2, 5, 6, 1, 2, 7, 8, 1, 2], 2, [7, 8]),  # the latest place
        ([1, 2, 5, 6, 4, 1, 2, 7, 1, 2], 4, [5, 6, 4, 1]),  # the latest place that brings enough
        ([6, 2, 3, 5, 9, 9, 9, 3, 1, 2, 3], 1, [5]),  # two tokens before one
        ([4, 4], 3, [4]),
        ([4, 5], 3, []),
        ([4], 3, []),
    ],
)
def test_prompt_lookup(text, count, drafted):
    found = PromptLookup(3).propose(text, count)
    assert (found.ids, found.logits) == (drafted, None)


def test_prompt_lookup_wants_its_fewest_tokens():
    assert PromptLookup(3, 2).propose([5, 3, 4, 6, 3], 3).ids == []
    assert PromptLookup(3, 2).propose([5, 3, 4, 5, 3], 1).ids == [4]


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_layers_draft_as_a_model_of_those_layers_would(kind):
    model, ids = lively(kind), list(range(20, 39))
    drafter = Greedy(Cached(first_layers(model, 1)), 400)
    # What the first layer alone says, read from the whole model: norm and output head on its state.
    with torch.no_grad():
        state = model(torch.tensor([ids]), use_cache=False, output_hidden_states=True).hidden_states[1]
        norm = model.transformer.ln_f if kind == "gpt2" else model.model.norm
        expected = model.lm_head(norm(state))[0, -1]
    found = drafter.propose(ids, 1)
    torch.testing.assert_close(found.logits[0], expected)
    assert found.ids == [int(expected.argmax())]


def test_the_first_layers_are_the_models_own():
    model = lively()
    shallow = first_layers(model, 1)
    mine = {id(parameter) for parameter in model.parameters()}
    assert all(id(parameter) in mine for parameter in shallow.parameters())
    assert (model.config.num_hidden_layers, len(model.model.layers)) == (2, 2)


def test_the_first_layers_say_what_they_are():
    model = lively("qwen3")
    assert first_layers(model, 1).config.layer_types == ["full_attention"]
    assert model.config.layer_types == ["full_attention", "sliding_attention"]


@pytest.mark.parametrize("count", [0, 2, 7])
def test_a_wrong_number_of_layers_is_refused(count):
    with pytest.raises(ConfigError, match=f"draft_layers: {count} .*2 layers"):
        first_layers(lively(), count)


def test_an_adapter_is_off_in_the_first_layers_where_it_is_off_in_the_target():
    import peft

    model, plain, ids = lively(), lively(), list(range(30, 50))
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    target = Target(adapted.eval(), within=adapted.disable_adapter)
    drafter = make_drafter(SpeculateConfig(draft="early_exit", draft_layers=1), target, None, None)
    expected = Greedy(Cached(first_layers(plain, 1)), 400).propose(ids, 4)
    found = drafter.propose(ids, 4)
    assert found.ids == expected.ids
    torch.testing.assert_close(found.logits, expected.logits)
    torch.testing.assert_close(target.verify(ids, [7]).logits, Target(plain).verify(ids, [7]).logits)


def test_a_drafter_goes_on_from_what_was_kept():
    model = lively("mistral")
    drafter, ids = Greedy(Cached(model), 400), list(range(40, 60))
    for text in (ids, [*ids, 11, 12], [*ids, 11, 13, 14], ids[:5], [*ids[:5], 99, *ids]):
        tokens, logits = greedy(model, text, 4)
        found = drafter.propose(text, 4)
        assert found.ids == tokens
        torch.testing.assert_close(found.logits, logits)
    before = drafter.model.computed
    drafter.propose([*ids[:5], 99, *ids, 3], 2)
    assert drafter.model.computed - before == 2, "the new token and the first drafted one"


@pytest.mark.parametrize("rows", [380, 416])
def test_a_draft_model_with_another_number_of_rows(rows):
    found = Greedy(Cached(lively(vocab_size=rows)), 400).propose(list(range(20, 30)), 6)
    assert found.logits.shape == (6, 400)
    assert max(found.ids) < 400
    assert bool((found.logits[:, rows:] == float("-inf")).all())


def test_a_draft_model_comes_from_its_folder(tmp_path):
    small, target = lively(seed=4, num_hidden_layers=1).float(), Target(lively())
    small.save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    keys = SpeculateConfig(draft="draft_model", draft_model=str(tmp_path))
    drafter = make_drafter(keys, target, build_tokenizer(), ModelConfig(model_name_or_path="elsewhere"))
    assert drafter.propose(range(20, 30), 5).ids == greedy(small.double(), range(20, 30), 5)[0]
    with pytest.raises(ModelError, match="another tokenizer"):
        make_drafter(keys, target, build_tokenizer(300), ModelConfig(model_name_or_path="elsewhere"))


@pytest.mark.parametrize(
    ("keys", "complaint"),
    [
        ({"draft": "prompt_lokup"}, "Did you mean 'prompt_lookup'"),
        ({"draft": "draft_model"}, "needs draft_model"),
        ({"draft": "early_exit"}, "needs draft_layers"),
        ({"draft_tokens": 0}, "draft_tokens: 0"),
        ({"draft_layers": 0}, "draft_layers: 0"),
        ({"lookup_ngram": 1, "lookup_min_ngram": 2}, "lookup_ngram: 1"),
    ],
)
def test_keys_that_cannot_work(keys, complaint):
    with pytest.raises(ConfigError, match=complaint):
        SpeculateConfig(**keys)


def test_nobody_drafts_unless_asked():
    with pytest.raises(ConfigError, match="draft is not set.*early_exit"):
        make_drafter(SpeculateConfig(), Target(lively()), None, None)
