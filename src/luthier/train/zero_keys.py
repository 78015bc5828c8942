"""What is wrong with a DeepSpeed file beside the keys of its run, known before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from luthier.core.paths import is_file, local

SAME = {
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
    "fp16.enabled": "fp16",
    "bf16.enabled": "bf16",
}
"""Values of the file, and the keys that say the same."""


def mistakes(value: Any, training: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Keys and what contradicts them. value: the key `deepspeed`. training: training keys as given, others unset."""
    try:
        settings = _read(value)
    except ValueError as error:
        yield "deepspeed", f"{value} is no JSON: {error}."
        return
    if settings is None:
        return
    if not isinstance(settings, dict) or not isinstance(settings.get("zero_optimization"), dict):
        yield "deepspeed", 'expected {"zero_optimization": {"stage": 2}, ...} in it, as in examples/deepspeed.'
        return
    for path, key in SAME.items():
        found = _at(settings, path)
        if found not in (None, "auto") and training.get(key) is not None and found != training[key]:
            yield key, f'is {training[key]!r}, and DeepSpeed\'s file has {path}: {found!r}. Write "auto" in the file.'
    if "optimizer" in settings and training.get("optim") is not None:
        yield "optim", "would not be used: DeepSpeed's file names an optimizer. Keep one of the two."


def _read(value: Any) -> Any:
    """The settings; None where there is no such file, which is said elsewhere."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("{"):
        return json.loads(value)
    return json.loads(local(value).read_text(encoding="utf-8")) if is_file(local(value)) else None


def _at(settings: Mapping[str, Any], path: str) -> Any:
    found: Any = settings
    for name in path.split("."):
        found = found.get(name) if isinstance(found, dict) else None
    return found
