"""What the tests of the loop share."""

from __future__ import annotations

import gc

import pytest

from luthier.core.log import get_logger


@pytest.fixture(autouse=True, scope="module")
def light():
    """Every Trainer collects garbage when it starts, which takes long among all that the suite has imported."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def said(monkeypatch):
    """What the loop and its checkpoints warned of."""
    texts: list[str] = []
    log = get_logger("train")
    monkeypatch.setattr(log, "warning", lambda text, *values: texts.append(text % values if values else text))
    return texts
