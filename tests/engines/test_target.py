"""A model with a cache says what it says without one, whatever was taken back before."""

from __future__ import annotations

import random

import pytest
import torch
import transformers
from tests.drafters.test_drafters import KINDS, lively

from luthier.core.errors import ModelError
from luthier.engines.target import Cached, Target

WINDOW = 7


@pytest.mark.parametrize("kind", KINDS)
def test_any_walk_through_texts_equals_the_plain_pass(kind):
    """Texts far longer than the window of the sliding layers, growing, changing course, shrinking to nothing."""
    model, rng = lively(kind), random.Random(kind)
    target, text = Target(model), [rng.randrange(6, 400) for _ in range(30)]
    for _ in range(12):
        cut = rng.choice([len(text), len(text), len(text) - 3, len(text) // 2, 0])
        text = [*text[:cut], *(rng.randrange(6, 400) for _ in range(rng.randint(1, 9)))]
        draft = [rng.randrange(6, 400) for _ in range(rng.randint(0, 6))]
        found = target.verify(text, draft)
        with torch.no_grad():
            out = model(torch.tensor([[*text, *draft]]), use_cache=False, output_hidden_states=True)
        torch.testing.assert_close(found.logits, out.logits[0, len(text) - 1 :])
        torch.testing.assert_close(found.hidden, out.hidden_states[-1][0, len(text) :])


def test_only_new_tokens_are_computed():
    target, ids = Target(lively()), list(range(20, 40))
    target.verify(ids, [50, 51, 52])
    assert (target.passes, target.computed) == (1, 23)
    target.verify([*ids, 50, 60], [61, 62])
    assert (target.passes, target.computed) == (2, 26), "60, 61 and 62; 51 and 52 were taken back"
    target.verify([*ids, 50, 60], [61])
    assert target.computed == 28, "what is read again is computed again"


def test_a_pass_that_breaks_off_leaves_nothing_behind():
    class Stop(Exception):
        pass

    def stop(module, given):
        raise Stop

    model = lively()
    target, ids = Target(model), list(range(20, 40))
    target.verify(ids, [])
    handle = model.model.layers[1].register_forward_pre_hook(stop)
    with pytest.raises(Stop):
        target.verify([*ids, 7], [8])
    handle.remove()
    torch.testing.assert_close(target.verify([*ids, 9], [8]).logits, Target(model).verify([*ids, 9], [8]).logits)


def test_no_hook_stays_on_the_model():
    model = lively()
    Target(model).verify([1, 2, 3], [4])
    assert not model.lm_head._forward_pre_hooks


def test_a_model_with_a_recurrent_state_is_refused():
    config = transformers.MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, state_size=4)
    with pytest.raises(ModelError, match="MambaForCausalLM .*cannot take back"):
        Target(transformers.MambaForCausalLM(config).eval())


def test_layers_of_another_kind_are_refused_by_name():
    model = lively("qwen3")
    model.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(ModelError, match="layers of the kind linear_attention"):
        Target(model)


def test_a_model_whose_cache_lies_is_refused():
    model = lively()

    def forget(module, given, named):
        return given, named | {"past_key_values": transformers.DynamicCache()}

    # As with remote code that keeps no cache: every pass begins anew, and nothing raises.
    model.register_forward_pre_hook(forget, with_kwargs=True)
    with pytest.raises(ModelError, match="says something else when part of a text is cached"):
        Cached(model)
