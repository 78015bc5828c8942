"""`luthier expand CONFIG --blocks N`: a deeper model whose new layers do nothing yet (Llama-Pro, Wu et al. 2024, arXiv
2401.02415).

The layers are cut into N equal runs, and each run's last layer is put behind it once more, with the projections that
write into the residual stream set to zero: the copy adds nothing, and the model says what it said. Training with
`use_llama_pro: true` and `freeze_trainable_layers: N` then moves the copies alone.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from luthier.commands import parse_command
from luthier.core.errors import ConfigError, ModelError
from luthier.core.log import get_logger, quiet_libraries
from luthier.export import EXACT, ExportConfig, aside, logits_of, probe_tokens, save_whole, target_folder
from luthier.model.load import load_model
from luthier.model.modules import layers
from luthier.model.quantise import quantised
from luthier.model.source import ModelConfig, refuse_scratch, sees
from luthier.model.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedModel

log = get_logger("expand")

WRITES = re.compile(r"(^|[._])(o_proj|out_proj|down_proj|c_proj|dense|dense_4h_to_h|fc2|w2|wo)($|\.)")
"""Weights of a layer whose products are added to the residual stream, by the names that architectures give them."""

BY_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers")
"""What a configuration says of each layer."""


def main(argv: Sequence[str]) -> int:
    """`luthier expand CONFIG --blocks N export_dir=DIR [key=value ...]`."""
    from luthier.run import resolve

    quiet_libraries()
    command = parse_command(argv, "expand")
    run = resolve(command.config, command.overrides, verb="export")
    run.announce(log)
    if run.adapter.adapter_name_or_path:
        raise ConfigError("adapter_name_or_path: merge the adapter first (luthier export), and expand the result.")
    folder = expand(run.model, run.export, command.flags["blocks"])
    log.info(
        "Saved %s. To train the new blocks alone: use_llama_pro: true, freeze_trainable_layers: %d and "
        "finetuning_type: freeze or lora.",
        folder,
        command.flags["blocks"],
    )
    return 0


def expand(model_config: ModelConfig, config: ExportConfig, blocks: int) -> Path:
    """Save the model with `blocks` more layers into `export_dir`, once it is found to say what it said.

    Raises ConfigError where the layers cannot be cut into so many runs, ModelError where the new layers are not idle.
    """
    target = target_folder(config)
    refuse_scratch(model_config)
    tokenizer = load_tokenizer(model_config)
    model = load_model(model_config, tokenizer=tokenizer)
    if sees(model.config):
        raise ModelError("model_name_or_path: the layers of a model that reads images cannot be copied yet.")
    if quantised(model):
        raise ModelError("model_name_or_path: the layers of a quantised model cannot be copied. Name the full model.")
    probes = probe_tokens(len(tokenizer))
    wanted = logits_of(model, probes)
    deeper = deepen(model, blocks)
    difference = float((logits_of(deeper, probes) - wanted).abs().max())
    if not difference <= EXACT * max(1.0, float(wanted.abs().max())):
        raise ModelError(
            f"The new layers of {type(model).__name__} are not idle: logits differ by {difference:.2g}. Nothing was "
            "saved."
        )
    with aside(target) as folder:
        save_whole(deeper, tokenizer, folder, config)
    return target


def deepen(model: PreTrainedModel, blocks: int) -> PreTrainedModel:
    """The model with an idle copy behind the last layer of each of `blocks` equal runs of layers."""
    from transformers import AutoModelForCausalLM

    stack, modules = layers(model)
    if blocks < 1 or len(modules) % blocks:
        able = [str(n) for n in range(1, len(modules) + 1) if len(modules) % n == 0]
        raise ConfigError(
            f"--blocks {blocks}: the {len(modules)} layers cannot be cut into {blocks} equal runs. Possible are "
            f"{', '.join(able)}."
        )
    step = len(modules) // blocks
    sources = [index for run in range(blocks) for index in (*range(run * step, (run + 1) * step), (run + 1) * step - 1)]
    settings = _settings(model.config, sources)
    deeper = AutoModelForCausalLM.from_config(settings, dtype=model.dtype).eval()
    state = model.state_dict()
    new = {name: tensor for name, tensor in state.items() if not name.startswith(f"{stack}.")}
    for index, source in enumerate(sources):
        idle = index and sources[index - 1] == source
        for name, tensor in state.items():
            if name.startswith(f"{stack}.{source}."):
                inner = name.removeprefix(f"{stack}.{source}.")
                new[f"{stack}.{index}.{inner}"] = _idle(inner, tensor) if idle else tensor
    deeper.load_state_dict(new)
    deeper.generation_config = copy.deepcopy(model.generation_config)
    return deeper


def _idle(name: str, tensor: Tensor) -> Tensor:
    return tensor.new_zeros(tensor.shape) if WRITES.search(name) else tensor


def _settings(config: Any, sources: Sequence[int]) -> Any:
    """The configuration of the deeper model; what is said layer by layer is said of the copies too."""
    settings = copy.deepcopy(config)
    text = settings.get_text_config()
    count = text.num_hidden_layers
    for name in BY_LAYER:
        value = vars(text).get(name)
        if isinstance(value, list) and len(value) == count:
            setattr(text, name, [value[source] for source in sources])
    text.num_hidden_layers = len(sources)
    return settings
