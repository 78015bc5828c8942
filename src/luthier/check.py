"""`luthier check`: does this configuration hold water? Data, template and memory, without loading weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from luthier import resolved
from luthier.commands import parse_command
from luthier.core import log as logging
from luthier.core.config import read
from luthier.core.errors import ConfigError
from luthier.run import Run, resolve

if TYPE_CHECKING:
    from torch import nn

log = logging.get_logger("check")

# Bytes of activations per token, layer and hidden unit of a transformer block that keeps them for the backward pass
# (attention and gated MLP, without the T x T scores that SDPA does not store), in units of the element size.
ACTIVATIONS_PER_UNIT = 18
CHECKPOINTED_PER_UNIT = 1


@dataclass(frozen=True)
class Memory:
    """An estimate of what training needs on one device, in bytes."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in vars(self).items())
        return f"about {self.total / 2**30:.2f} GiB ({parts})"


def estimate(
    model: nn.Module,
    *,
    tokens: int,
    element: int,
    checkpointing: bool,
    optimizer_states: int = 2,
    bits: int | None = None,
) -> Memory:
    """What a micro-batch of `tokens` tokens needs. element: bytes of a computed number (2 for bf16, 4 for float32).

    bits: of the frozen linear weights, where they are quantised. model: may live on the meta device. A rough figure
    for planning: within about a third for Llama-like models.
    """
    from luthier.model.policy import CHUNK_ELEMENTS

    config = model.config.get_text_config()
    parameters = list({id(p): p for p in model.parameters()}.values())
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    per_unit = CHECKPOINTED_PER_UNIT if checkpointing else ACTIVATIONS_PER_UNIT
    kept = tokens * config.num_hidden_layers * config.hidden_size * per_unit * element
    one_layer = tokens * config.hidden_size * ACTIVATIONS_PER_UNIT * element if checkpointing else 0
    return Memory(
        weights=sum(p.numel() * p.element_size() for p in parameters) - _spared(model, bits),
        gradients=trainable * 4,
        optimizer=trainable * 4 * optimizer_states,
        activations=kept + one_layer,
        # The logits of one chunk, their softmax and their gradient, in float32.
        logits=min(tokens * config.vocab_size, CHUNK_ELEMENTS) * 4 * 3,
    )


def _spared(model: nn.Module, bits: int | None) -> int:
    """Bytes that quantising the frozen linear layers saves; scales of blocks take about half a bit a weight."""
    from torch import nn

    if bits is None:
        return 0
    head = model.get_output_embeddings()
    frozen = {
        id(module.weight): module.weight
        for module in model.modules()
        if isinstance(module, nn.Linear) and module is not head and not module.weight.requires_grad
    }
    return int(sum(weight.numel() * (weight.element_size() - (bits + 0.5) / 8) for weight in frozen.values()))


def skeleton(run: Run) -> nn.Module:
    """The model with its adapter, on the meta device: shapes without numbers."""
    import torch

    from luthier.core.registry import find
    from luthier.model.adapt import adapt
    from luthier.model.source import auto_class, read_settings

    settings = read_settings(run.model)
    half = run.training.get("bf16") and find("adapters", run.adapter.finetuning_type).IS_ADAPTER
    dtype = torch.bfloat16 if run.train.pure_bf16 or half else torch.float32
    with torch.device("meta"):
        model = auto_class(settings).from_config(settings, dtype=dtype)
        # Earlier adapters change numbers, not shapes.
        fresh = replace(run.adapter, adapter_name_or_path=None)
        return adapt(model, fresh, run.adapter_keys, model_config=run.model, trainable=True)


def check(run: Run) -> list[str]:
    """The findings, one line each; raises a LuthierError for what would stop the run."""
    from luthier.assemble import choose_optimiser, layout_wish
    from luthier.data.compare import compare
    from luthier.model.adapt import count_parameters
    from luthier.model.quantise import loading
    from luthier.model.source import read_settings, sees
    from luthier.model.tokenizer import load_tokenizer
    from luthier.preview import prepare_data
    from luthier.train import report
    from luthier.train.config import training_arguments
    from luthier.train.rows import bundle, choose

    logging.quiet_libraries()
    if run.train.plot_loss:
        report.check_plotting()
    args = training_arguments(run.training, run.train)
    choose_optimiser(run, args)
    loading(run.quant, read_settings(run.model), None, sharded=False)
    _, prepared = prepare_data(run, run.data)
    examples = prepared.train if prepared.stream is None else prepared.stream.sample()
    wish = run.layout.packing
    packing = (run.objective.packs if wish is None else wish) or run.layout.neat_packing
    rows = bundle(examples, packing=packing, cutoff_len=run.layout.cutoff_len)
    layout = layout_wish(run, sees=sees(read_settings(run.model)))
    choice = choose(rows, layout, args.per_device_train_batch_size, noisy=bool(args.neftune_noise_alpha))
    tokens = _largest_micro_batch(rows, choice.layout, args.per_device_train_batch_size)
    model = skeleton(run)
    half = args.bf16 or args.fp16 or run.train.pure_bf16
    memory = estimate(
        model,
        tokens=tokens,
        element=2 if half else 4,
        checkpointing=_checkpointing(args),
        bits=run.quant.quantization_bit,
    )
    micro = -(-len(rows) // (args.per_device_train_batch_size * args.world_size))
    steps = -(-micro // args.gradient_accumulation_steps)
    saved = choice.padded_tokens / max(_computed(choice), 1)
    looked_at = "" if prepared.stream is None else " (of the first rows; the rest is read while training)"
    return [
        str(prepared.report),
        f"{len(examples):,} examples in {len(rows):,} rows; {steps:,} optimiser steps per epoch{looked_at}",
        choice.reason(),
        f"{saved:.2f} times fewer tokens than padded rows",
        str(count_parameters(model)),
        *compare(run.template, load_tokenizer(run.model)),
        f"memory for the largest micro-batch ({tokens:,} tokens): {memory}",
    ]


def _computed(choice: Any) -> int:
    return {"shared": choice.tree_tokens, "packed": choice.path_tokens, "padded": choice.padded_tokens}[choice.layout]


def _largest_micro_batch(rows: Any, layout: str, batch_size: int) -> int:
    """Tokens of a micro-batch of the largest rows there are: what shuffling may bring at worst."""
    examples = rows.examples
    bundles = rows.bundles if rows.bundles is not None else [[i] for i in range(len(examples))]
    per_row = examples.tree_tokens if layout == "shared" else examples.path_tokens
    if layout == "padded":
        longest = int(examples.longest.max(initial=0))
        return longest * sum(sorted((int(examples.answers[b].sum()) for b in bundles), reverse=True)[:batch_size])
    return sum(sorted((int(per_row[b].sum()) for b in bundles), reverse=True)[:batch_size])


def _checkpointing(args: Any) -> bool:
    return bool(getattr(args, "activation_checkpointing", None) or args.gradient_checkpointing)


def main(argv: Sequence[str]) -> int:
    """`luthier check CONFIG [--config-only [--json]] [key=value ...]`."""
    command = parse_command(argv, "check")
    if command.flags["json"] and not command.flags["config-only"]:
        raise ConfigError("--json prints the resolved configuration: write --config-only --json.")
    if command.flags["config-only"]:
        return resolved.show(command.config, command.overrides, as_json=command.flags["json"])
    trains = resolved.trains(read(command.config, command.overrides))
    run = resolve(command.config, command.overrides, verb="train" if trains else "chat")
    run.announce(log)
    if not trains:
        print(f"{run.source.name}: nothing in it says train (no dataset, no output_dir); it will do for chat, infer, "
              "score and export, where adapter and model fit.")  # fmt: skip
        return 0
    for line in check(run):
        print(line)
    print(f"{run.source.name}: this can be trained.")
    return 0
