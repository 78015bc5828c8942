"""Out of memory: how it is recognised, and what a user is told."""

from __future__ import annotations

import resource
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from luthier.core.batch import Batch

if TYPE_CHECKING:
    from transformers import TrainingArguments


def exhausted(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on an accelerator or on the CPU."""
    from accelerate.utils.memory import should_reduce_batch_size

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, Exception) and should_reduce_batch_size(error)


def peak(device: torch.device) -> float:
    """Bytes: the most that tensors held of an accelerator, or on a CPU the process of the machine."""
    if device.type != "cpu":
        return float(torch.get_device_module(device).max_memory_allocated(device))
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def used(device: torch.device) -> str:
    """The most that this process has held at once."""
    kind = "the process" if device.type == "cpu" else str(device)
    return f"{kind} used up to {peak(device) / 2**30:.2f} GiB"


def checkpointed(args: TrainingArguments) -> bool:
    """Whether activations are computed twice; transformers renamed the key on its way through version 5."""
    return bool(getattr(args, "activation_checkpointing", None) or args.gradient_checkpointing)


def advice(batch: Batch, rows: int, args: TrainingArguments, *, finds: bool) -> list[str]:
    """What would need less memory, the harmless first. rows: of the micro-batch. finds: they were halved already."""
    size, steps = args.per_device_train_batch_size, args.gradient_accumulation_steps
    found = []
    if batch.layout == "padded" and batch.ids.numel() > batch.tokens:
        found.append(f"layout: shared ({batch.ids.numel():,} positions are computed for {batch.tokens:,} tokens)")
    elif batch.layout == "packed" and batch.unshared > 1:
        found.append("layout: shared, where answers have their beginnings in common")
    if rows > 1 and not finds:
        half = max(1, size // 2)
        found.append(
            f"per_device_train_batch_size: {half} with gradient_accumulation_steps: {steps * size // half}, which is "
            "the same step (auto_find_batch_size: true does it by itself)"
        )
    if not checkpointed(args):
        found.append("disable_gradient_checkpointing: false, which computes activations twice instead of keeping them")
    return [*found, "a smaller cutoff_len", "finetuning_type: lora or quantization_bit: 4, if weights fill the memory"]


def some(rows: Sequence[str]) -> str:
    """The first few rows by name."""
    return ", ".join(rows[:8]) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "") or "none"


def message(
    what: str, batch: Batch | None, rows: int, args: TrainingArguments, *, estimate: str, finds: bool = False
) -> str:
    """One text about a step that did not fit. estimate: what `luthier check` says of such a micro-batch."""
    lines = [f"Out of memory {what}; {used(args.device)}."]
    if estimate:
        lines.append(f"Estimated beforehand for it, as `luthier check` does: {estimate}.")
    if batch is not None:
        lines.append(
            f"The micro-batch had {batch.tokens:,} tokens in {tuple(batch.ids.shape)} {batch.layout} positions, "
            f"{batch.answers} answers of the rows {some(batch.names)}."
        )
        lines += ["What needs less:", *(f"  {hint}" for hint in advice(batch, rows, args, finds=finds))]
    return "\n".join(lines)
