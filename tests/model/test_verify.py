"""The first-batch check: it passes what is exact, and catches what is not."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
import transformers

from luthier.core.errors import TrainingError
from luthier.core.types import Encoded, Path
from luthier.data.layout import collate
from luthier.model.policy import PolicySetup
from luthier.model.verify import TOLERANCE, verify
from luthier.train.rows import lay_out
from luthier.train.sampler import Bundles
from tests.conftest import build_model

ITEMS = [
    (Encoded((Path([9, 8, 7, 11, 12, 13], [0.0, 0, 1, 1, 1, 1]), Path([9, 8, 20, 21], [0.0, 0, 1, 1]))), "a:1"),
    (Encoded((Path([30, 31, 32, 33, 34], [0.0, 1, 1, 1, 1]),)), "a:2"),
]


class Examples(list):
    """A list with the figures that the planner asks for."""

    tree_tokens = np.array([8, 5])
    path_tokens = np.array([10, 5])
    longest = np.array([6, 5])
    answers = np.array([2, 1])


def mamba():
    """A state-space model: it has no attention mask to honour."""
    config = transformers.MambaConfig(vocab_size=400, hidden_size=32, num_hidden_layers=2, state_size=4, pad_token_id=3)
    torch.manual_seed(0)
    return transformers.MambaForCausalLM(config).eval()


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3", "gemma3", "gpt2"])
@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
def test_exact_layouts_hold(kind, layout):
    model = build_model(kind)
    verdict = verify(PolicySetup(model), collate(ITEMS, layout=layout, pad_id=3))
    assert verdict.holds and verdict.difference < 1e-4
    assert verdict.compared == 10


def test_a_trained_embedding_in_float32_over_16_bit_layers():
    model = build_model("llama").to(torch.bfloat16)
    model.get_input_embeddings().float()
    verdict = verify(PolicySetup(model), collate(ITEMS, layout="shared", pad_id=3))
    assert verdict.holds and verdict.compared == 10
    assert verdict.tolerance == TOLERANCE[torch.bfloat16]


def test_a_lost_mask_is_seen(monkeypatch):
    from luthier.model import attention

    model = build_model("llama")
    setup = PolicySetup(model)
    unmasked = lambda plan, q, k, v, *_: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)  # noqa: E731
    monkeypatch.setitem(attention.BACKENDS, "dense", unmasked)
    assert not verify(setup, collate(ITEMS, layout="shared", pad_id=3)).holds


def test_state_space_models_fall_back_to_padded_rows_loudly(caplog):
    setup = PolicySetup(mamba())
    with caplog.at_level(logging.WARNING, logger="luthier"):
        logging.getLogger("luthier").propagate = True
        rows = lay_out(Bundles(Examples(ITEMS)), setup, wish="shared", batch_size=2, pad_id=3)
    assert rows.layout == rows.collator.options["layout"] == "padded"
    assert "Falling back to padded" in caplog.text


def test_the_check_looks_at_the_first_row_with_something_to_compare():
    nothing = (Encoded((), extra={"rounds": []}), "a:0")
    items = Examples([nothing, nothing, *ITEMS])
    items.answers, items.longest = np.array([0, 0, 2, 1]), np.array([0, 0, 6, 5])
    assert lay_out(Bundles(items), PolicySetup(mamba()), wish="shared", batch_size=1, pad_id=3).layout == "padded"
    assert lay_out(Bundles(items), PolicySetup(build_model("llama")), wish="shared", batch_size=1, pad_id=3).layout == (
        "shared"
    )


def test_logits_changed_after_the_head_in_an_unknown_way_stop_the_run():
    model = build_model("llama")
    forward = model.forward

    def louder(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits = out.logits * 5
        return out

    model.forward = louder
    with pytest.raises(TrainingError, match="other log-probs"):
        lay_out(Bundles(Examples(ITEMS)), PolicySetup(model), wish="auto", batch_size=2, pad_id=3)
