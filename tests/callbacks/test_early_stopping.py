from __future__ import annotations

from types import SimpleNamespace

import pytest
import transformers

from luthier.callbacks import early_stopping
from luthier.core.errors import ConfigError

STEPS = {"eval_strategy": "steps", "metric_for_best_model": "eval_loss"}


def wanted(patience, **training):
    return early_stopping.wanted(
        SimpleNamespace(train=SimpleNamespace(early_stopping_steps=patience), training=training)
    )


def test_not_there_unless_asked_for():
    assert wanted(None, **STEPS) is None


@pytest.mark.parametrize(("losses", "stop"), [([3, 2, 2.5, 2.4, 1.0], 4), ([3, 2.5, 2.6, 2.4, 2.3], None)])
def test_stops_when_nothing_became_better_for_so_many_evaluations(tmp_path, losses, stop):
    callback = wanted(2, **STEPS)
    args = transformers.TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, eval_steps=1, **STEPS)
    state, stopped = transformers.TrainerState(), None
    for number, loss in enumerate(losses, 1):
        control = transformers.TrainerControl()
        callback.on_evaluate(args, state, control, metrics={"eval_loss": loss})
        if control.should_training_stop and stopped is None:
            stopped = number
        state.best_metric = min(loss, state.best_metric or loss)
    assert stopped == stop


def test_without_evaluation_it_is_refused_before_the_run():
    with pytest.raises(ConfigError, match="eval_strategy"):
        wanted(2, metric_for_best_model="eval_loss")


def test_without_a_metric_it_is_refused_before_the_run():
    with pytest.raises(ConfigError, match="metric_for_best_model: eval_loss"):
        wanted(2, eval_strategy="epoch")
    assert wanted(2, eval_strategy="epoch", load_best_model_at_end=True) is not None
