"""How far two sequences agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def common_prefix(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many items, or characters, two sequences begin with alike."""
    return next((nth for nth, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))
