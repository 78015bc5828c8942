"""Families whose attention is more than causal or sliding: rows that share or pack them would be silently wrong."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

from luthier.core.errors import ModelError
from luthier.core.types import Encoded, Path
from luthier.data.layout import collate
from luthier.engines._trees import Trees
from luthier.model.policy import PolicySetup
from luthier.train.rows import lay_out
from luthier.train.sampler import Bundles
from tests.conftest import TINY

SMALL = TINY | {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 3}
PROMPT = list(range(20, 32))
PATHS = (Path([*PROMPT, 40, 41], [0.0] * 12 + [1.0, 1.0]), Path([*PROMPT, 50, 51, 52], [0.0] * 12 + [1.0] * 3))


def lively(config, **how):
    """A model whose attention matters: random weights far from zero."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, **how).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.2)
    return model


def llama4(**changes):
    """Layers that see their own chunk of the row alone."""
    own = {"attention_chunk_size": 6, "num_local_experts": 2, "intermediate_size_mlp": 48} | changes
    return lively(transformers.Llama4TextConfig(**SMALL | own))


def doge():
    """Layers that write into the mask which tokens are worth seeing."""
    return lively(transformers.DogeConfig(**SMALL | {"keep_window_size": 4}))


def deepseek():
    """Layers that see the tokens an indexer chooses, by code of their own for each implementation that they know."""
    ranks = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    index = {"index_topk": 4, "index_n_heads": 2, "index_head_dim": 16, "first_k_dense_replace": 2}
    changes = ranks | index | {"num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1}
    settings = {name: value for name, value in (SMALL | changes).items() if name != "head_dim"}
    return lively(transformers.DeepseekV32Config(**settings))


def logps(model, path: Path) -> list[float]:
    """Of the supervised tokens, by the model's own forward pass over one path."""
    with torch.no_grad():
        found = model(input_ids=torch.tensor([path.ids]), use_cache=False).logits[0].log_softmax(-1)
    return [found[i - 1, path.ids[i]].item() for i in range(1, len(path.ids)) if path.weights[i]]


@pytest.mark.parametrize("build", [llama4, doge, deepseek])
@pytest.mark.parametrize("layout", ["packed", "shared"])
def test_rows_that_are_not_padded_are_refused_however_short(build, layout):
    model = build()
    assert model.config._attn_implementation == "sdpa", "Luthier's own attention takes the place of this one"
    short = Encoded((Path([9, 8], [0.0, 1.0]), Path([9, 7], [0.0, 1.0])))
    with pytest.raises(ModelError, match="layers of the kind (chunked|indexed)_attention|a mask of its own"):
        PolicySetup(model).bind().logps(collate([(short, "")], layout=layout, pad_id=3))


@pytest.mark.parametrize("build", [llama4, doge, deepseek])
def test_padded_rows_are_what_the_model_computes_alone(build):
    model = build()
    expected = [logps(model, path) for path in PATHS]
    policy = PolicySetup(model).bind()
    # Each by itself: which of two equal tokens DeepSeek's indexer takes may depend on the padding, here as elsewhere.
    found = [policy.logps(collate([(Encoded((path,)), "")], layout="padded", pad_id=3)).tolist() for path in PATHS]
    assert [pytest.approx(one, abs=1e-4) for one in expected] == found


class Examples(list):
    """Encoded examples with the figures that the planner asks for."""

    def __init__(self, *paths: tuple[Path, ...]):
        super().__init__((Encoded(several), f"row {nth}") for nth, several in enumerate(paths))
        self.answers = np.array([len(several) for several in paths])
        self.longest = np.array([max(len(path.ids) for path in several) for several in paths])
        self.path_tokens = self.tree_tokens = np.array([sum(len(path.ids) for path in several) for several in paths])


def gpt_neo():
    """Layers with a window counted along the row, not along the answer."""
    kinds = [[["global", "local"], 1]]
    sizes = {"vocab_size": 400, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": 6}
    return lively(transformers.GPTNeoConfig(**sizes, attention_types=kinds))


def mpt():
    """A bias by distance along the row."""
    return lively(transformers.MptConfig(vocab_size=400, d_model=32, n_layers=2, n_heads=4, max_seq_len=64))


SHORT = (Path([9, 8], [0.0, 1.0]), Path([9, 7], [0.0, 1.0]))
ALONE = (Path([9, 8, 7, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23], [0.0] + [1.0] * 15),)


@pytest.mark.parametrize(("build", "rows"), [(gpt_neo, [SHORT, PATHS]), (mpt, [ALONE, PATHS])])
def test_what_the_first_rows_do_not_show_the_longest_and_the_fullest_do(build, rows):
    found = lay_out(Bundles(Examples(*rows)), PolicySetup(build()), wish="shared", batch_size=1, pad_id=3)
    assert found.layout == "padded"
    first = lay_out(Bundles(Examples(rows[0])), PolicySetup(build()), wish="shared", batch_size=1, pad_id=3)
    assert first.layout == "shared", "the first row alone shows nothing"


def test_without_rows_there_is_nothing_to_look_at():
    assert lay_out(Bundles(Examples()), PolicySetup(mpt()), wish="shared", batch_size=1, pad_id=3).layout == "shared"


@pytest.mark.parametrize("together", [True, False])
def test_scoring_looks_at_longer_answers_too(together):
    trees = Trees(PolicySetup(gpt_neo()), pad_id=3)
    items = [Encoded(SHORT), Encoded(PATHS)]
    asked = [items] if together else [items[:1], items[1:]]
    layouts = [batch.layout for part in asked for batch in trees.batches(part, 1)]
    assert layouts == (["padded", "padded"] if together else ["shared", "padded"])
