"""Which parts of a model that reads images are trained, by finetuning_type and by the three keys."""

from __future__ import annotations

import copy

import pytest

from luthier.core.errors import ConfigError
from luthier.core.registry import find
from luthier.model.adapt import AdapterConfig, adapt
from luthier.model.modality import part_of
from luthier.model.source import ModelConfig

PREFIXES = {
    "llava": {"vision": ("model.vision_tower.",), "projector": ("model.multi_modal_projector.",)},
    "idefics3": {"vision": ("model.vision_model.",), "projector": ("model.connector.",)},
    "qwen2_vl": {"vision": ("model.visual.",), "projector": ("model.visual.merger.",)},
    "qwen2_5_vl": {"vision": ("model.visual.",), "projector": ("model.visual.merger.",)},
    "qwen3_vl": {
        "vision": ("model.visual.",),
        "projector": ("model.visual.merger.", "model.visual.deepstack_merger_list."),
    },
}
"""Written down from the architectures; what is left is the language model."""


@pytest.fixture
def family(request):
    return request.param, copy.deepcopy(request.getfixturevalue(request.param).model)


def expected(name, weight):
    prefixes = PREFIXES[name]
    return next((part for part in ("projector", "vision") if weight.startswith(prefixes[part])), "language")


def adapted(model, kind="full", **keys):
    own = {name: keys.pop(name) for name in list(keys) if not name.startswith("freeze_")}
    own |= {name: keys.pop(name) for name in list(keys) if name.startswith("freeze_trainable")}
    config = AdapterConfig(finetuning_type=kind, **keys)
    base = ModelConfig(model_name_or_path="x")
    return adapt(model, config, find("adapters", kind).Config(**own), model_config=base, trainable=True)


def trained(model):
    return {name for name, weight in model.named_parameters() if weight.requires_grad}


@pytest.mark.parametrize("family", list(PREFIXES), indirect=True)
def test_parts_of_each_architecture(family):
    name, model = family
    part = part_of(model)
    assert {weight: part(weight) for weight, _ in model.named_parameters()} == {
        weight: expected(name, weight) for weight, _ in model.named_parameters()
    }


@pytest.mark.parametrize("family", list(PREFIXES), indirect=True)
@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        ({}, {"language"}),
        ({"freeze_vision_tower": False}, {"language", "vision"}),
        ({"freeze_multi_modal_projector": False, "freeze_language_model": True}, {"projector"}),
        ({"freeze_vision_tower": False, "freeze_multi_modal_projector": False}, {"language", "vision", "projector"}),
    ],
)
def test_full_trains_what_does_not_stand_still(family, keys, parts):
    name, model = family
    wanted = {weight for weight, _ in model.named_parameters() if expected(name, weight) in parts}
    assert trained(adapted(model, **keys)) == wanted


@pytest.mark.parametrize("family", list(PREFIXES), indirect=True)
@pytest.mark.parametrize("target", ["all", "q_proj,v_proj"])
@pytest.mark.parametrize("vision", [True, False])
def test_lora_stands_on_the_language_model_unless_told_otherwise(family, target, vision):
    name, model = family
    if name.startswith("qwen") and target != "all":
        vision = True  # what sees has its queries and values in one weight
    found = trained(adapted(model, "lora", lora_target=target, freeze_vision_tower=vision))
    bare = {weight.removeprefix("base_model.model.") for weight in found}
    assert {expected(name, weight) for weight in bare} == ({"language"} if vision else {"language", "vision"})
    assert {weight.split(".")[-4] for weight in bare} >= {"q_proj", "v_proj"}
    assert not any("lm_head" in weight for weight in bare)


@pytest.mark.parametrize("family", ["llava"], indirect=True)
def test_freeze_counts_the_layers_of_the_language_model(family):
    """CLIP has two layers here as well, and comes first."""
    found = trained(adapted(family[1], "freeze", freeze_trainable_layers=1))
    assert found and all(weight.startswith("model.language_model.layers.1.") for weight in found)


@pytest.mark.parametrize("family", ["llava"], indirect=True)
def test_all_parts_still_is_refused(family):
    with pytest.raises(ConfigError, match="nothing is left to train: .*freeze_language_model: true"):
        adapted(family[1], freeze_language_model=True)


@pytest.mark.parametrize("family", ["llava"], indirect=True)
def test_lora_on_a_part_that_stands_still_is_refused(family):
    with pytest.raises(ConfigError, match="lora_target: all that it names stands still: freeze_vision_tower: true"):
        adapted(family[1], "lora", lora_target="fc1")
