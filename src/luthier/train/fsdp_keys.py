"""What stands in `fsdp_config`, read before anything is loaded: a key that nothing obeys is a mistake, not a wish."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from luthier.core.kinds import is_true

KNOWN = (
    "version", "reshard_after_forward", "cpu_offload", "auto_wrap_policy", "transformer_layer_cls_to_wrap",
    "min_num_params", "state_dict_type", "cpu_ram_efficient_loading", "activation_checkpointing",
)  # fmt: skip
FIRST = (
    "sharding_strategy", "forward_prefetch", "backward_prefetch", "use_orig_params", "sync_module_states",
    "limit_all_gathers",
)  # fmt: skip
"""FSDP1's."""


def settings(value: Any) -> Mapping[str, Any]:
    """The settings of `fsdp_config`, a mapping, JSON or the name of a JSON file, without the prefix `fsdp_`.

    Raises ValueError, OSError for what cannot be read.
    """
    if isinstance(value, str):
        text = value if value.lstrip().startswith("{") else Path(value).expanduser().read_text(encoding="utf-8")
        value = json.loads(text)
    if not isinstance(value or {}, Mapping):
        raise ValueError(f"expected a mapping, got {type(value).__name__}")
    return {str(key).removeprefix("fsdp_"): setting for key, setting in (value or {}).items()}


def mistakes(value: Any) -> Iterator[str]:
    """What is wrong with an `fsdp_config`, one text each."""
    try:
        found = settings(value)
    except (ValueError, OSError) as error:
        yield f"{value} cannot be read: {error}"
        return
    if str(found.get("version", 2)) != "2":
        yield f"version {found['version']} is not supported; write version: 2, or leave it out."
    for key in found:
        if key in FIRST:
            yield f"{key} belongs to FSDP1, which is not supported. Leave it out."
        elif key not in KNOWN:
            near = get_close_matches(key, KNOWN, n=1)
            meant = f" Did you mean {near[0]}?" if near else ""
            yield f"knows no {key}.{meant} There are: {', '.join(KNOWN)}."


def recomputes(value: Any) -> bool:
    """Whether FSDP itself computes activations twice, so that the model must not do it as well."""
    asked = is_true(settings(value).get("activation_checkpointing", False)) if value else False
    return asked or is_true(os.environ.get("FSDP_ACTIVATION_CHECKPOINTING", ""))
