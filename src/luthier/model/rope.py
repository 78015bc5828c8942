"""Rotary positions stretched beyond the length a model was made for: `rope_scaling`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from luthier.core.errors import ConfigError
from luthier.core.log import get_logger

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PretrainedConfig

log = get_logger("model")

EXTRA: dict[str, dict[str, float]] = {
    "linear": {},
    "dynamic": {},
    "yarn": {},
    "llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
}
"""What each kind is told beside its factor, as in LLaMA-Factory."""


def stretch(settings: PretrainedConfig, kind: str, length: int) -> None:
    """Change `settings` so that positions up to `length` are stretched into those the model knows.

    The factor is a whole number, ceil(length / max_position_embeddings), and max_position_embeddings grows by it.
    Nothing changes where `length` fits. Raises ConfigError for models without rotary positions and for those that are
    stretched in another way already.
    """
    text = settings.get_text_config()
    parameters: dict[str, Any] | None = getattr(text, "rope_parameters", None)
    known: int | None = getattr(text, "max_position_embeddings", None)
    if not parameters or known is None:
        raise ConfigError(f"rope_scaling: {settings.model_type} has no rotary positions. Leave the key out.")
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    full = [value for name, value in parameters.items() if isinstance(value, dict) and name == "full_attention"]
    for part in full or nested or [parameters]:
        given = part.get("rope_type", "default")
        if given != "default" and length > known:
            raise ConfigError(
                f"rope_scaling: the model is stretched already ({given}, to {known} positions), and cutoff_len asks "
                f"for {length}. Lower cutoff_len, or change rope_parameters in the model's config.json."
            )
    if length <= known:
        log.info("rope_scaling: %d tokens fit the model's own %d positions; nothing is stretched.", length, known)
        return
    factor = float(math.ceil(length / known))
    # Layers that look at a window only never see far positions, and keep theirs.
    for part in full or nested or [parameters]:
        part |= {"rope_type": kind, "factor": factor, **EXTRA[kind]}
        if kind in ("yarn", "llama3"):
            part["original_max_position_embeddings"] = known
    text.max_position_embeddings = int(known * factor)
    log.info("rope_scaling: %s, factor %g; the model now takes %d positions.", kind, factor, known * factor)
    if kind == "dynamic":
        # As transformers and LLaMA-Factory have it: how far a sequence is stretched depends on its own length.
        log.warning(
            "rope_scaling: dynamic leaves sequences of up to %d tokens as they are, so that it changes nothing in "
            "training; linear, yarn and llama3 stretch positions from the first one.",
            known * factor,
        )


def remind(settings: PretrainedConfig, folder: Path) -> None:
    """Warn where the adapter of `folder` was trained on stretched positions and the model has its own ones."""
    import yaml

    trained = folder / "resolved_config.yaml"
    parameters = getattr(settings.get_text_config(), "rope_parameters", None) or {}
    kinds = [part.get("rope_type") for part in (parameters, *parameters.values()) if isinstance(part, dict)]
    if not trained.is_file() or any(kind not in (None, "default") for kind in kinds):
        return
    keys = yaml.safe_load(trained.read_text("utf-8")) or {}
    kind, length = keys.get("rope_scaling"), keys.get("cutoff_len") or 0
    if kind is not None and length > settings.get_text_config().max_position_embeddings:
        log.warning(
            "WARNING: %s was trained with rope_scaling: %s and cutoff_len: %d, and here nothing is stretched, so that "
            "positions are not those of its training. Set both keys as they were.",
            folder,
            kind,
            length,
        )
