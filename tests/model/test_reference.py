"""What the policy is compared with: adapter off, a copy, a model of its own, with adapters, in 4 or 8 bits."""

from __future__ import annotations

import pytest
import torch

from luthier.adapters.lora import Config
from luthier.core.errors import ConfigError
from luthier.core.types import Encoded, Path
from luthier.data.layout import collate
from luthier.model.adapt import AdapterConfig, adapt
from luthier.model.load import load_model
from luthier.model.policy import PolicySetup
from luthier.model.reference import AdapterOff, FrozenModel, ReferenceConfig, make_reference
from luthier.model.source import ModelConfig
from tests.conftest import build_model

ITEMS = [(Encoded((Path([9, 8, 7, 11, 12], [0.0, 0, 1, 1, 1]), Path([9, 8, 20, 21], [0.0, 0, 1, 1]))), "a")]
BATCH = collate(ITEMS, layout="shared", pad_id=3)


def plain(model) -> list[float]:
    """log-probs from one forward pass per answer."""
    found = []
    for path in ITEMS[0][0].paths:
        logps = model(input_ids=torch.tensor([path.ids])).logits[0].log_softmax(-1)
        found += [logps[i - 1, path.ids[i]].item() for i in range(1, len(path.ids)) if path.weights[i]]
    return found


@pytest.fixture(scope="module")
def keys(tmp_path_factory) -> ModelConfig:
    """A model whose rows are as long as a block of 4-bit weights."""
    folder = tmp_path_factory.mktemp("model")
    build_model("llama", hidden_size=64, intermediate_size=128).save_pretrained(folder)
    return ModelConfig(model_name_or_path=str(folder))


def lora(keys: ModelConfig):
    model = adapt(load_model(keys), AdapterConfig(), Config(), model_config=keys, trainable=True)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(3))
    return model


def ask(setup: PolicySetup, keys: ModelConfig, **reference) -> tuple[object, list[float]]:
    made = make_reference(ReferenceConfig(**reference), setup, keys, dtype=torch.float32)
    found = made.logps(BATCH)
    assert not found.requires_grad
    return made, found.tolist()


def test_an_adapter_is_switched_off_and_on_again(keys):
    model = lora(keys)
    setup = PolicySetup(model)
    made, found = ask(setup, keys)
    assert isinstance(made, AdapterOff)
    assert found == pytest.approx(plain(load_model(keys)), abs=1e-5)
    with torch.no_grad():
        assert setup.bind().logps(BATCH).tolist() != pytest.approx(found, abs=1e-3)


def test_a_copy_stays_what_the_policy_was(keys):
    model = load_model(keys)
    setup = PolicySetup(model)
    made, before = ask(setup, keys)
    assert isinstance(made, FrozenModel)
    with torch.no_grad():
        model.lm_head.weight.add_(torch.randn_like(model.lm_head.weight))
    assert made.logps(BATCH).tolist() == before == pytest.approx(plain(load_model(keys)), abs=1e-5)


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_a_model_of_its_own_with_an_adapter(keys, tmp_path, bits):
    if bits:
        pytest.importorskip("bitsandbytes")
    adapted = lora(keys).eval()
    adapted.save_pretrained(tmp_path)
    setup = PolicySetup(load_model(keys))
    own = {"ref_model": keys.model_name_or_path, "ref_model_quantization_bit": bits}
    made, found = ask(setup, keys, **own, ref_model_adapters=str(tmp_path))
    right, base = torch.tensor(plain(adapted)), torch.tensor(plain(load_model(keys)))
    error, effect = (torch.tensor(found) - right).abs().max(), (base - right).abs().max()
    # Quantised weights are off by a few per cent; a lost adapter would be off by all of its effect.
    assert error < (0.3 * effect if bits else 1e-5)
    if bits:
        kinds = {type(module).__name__ for module in made.own.model.modules()}
        assert any(str(bits) in kind for kind in kinds), "nothing was quantised"


def test_keys_that_need_another(keys, tmp_path):
    setup = PolicySetup(load_model(keys))
    for key, value in (("ref_model_adapters", "x"), ("ref_model_quantization_bit", 4)):
        with pytest.raises(ConfigError, match=f"{key} needs ref_model"):
            ask(setup, keys, **{key: value})
