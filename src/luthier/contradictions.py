"""Keys that do not go together, said all at once before anything is loaded: by a table, or in words of their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from luthier.core.config import Given, Problem, Settled
from luthier.core.errors import ConfigError
from luthier.core.objective import Objective
from luthier.data.template import AUTO, find_template
from luthier.rules import EVALUATES, NEEDS_DATA, RULES, TRAINS, Keys
from luthier.train.config import TrainConfig
from luthier.train.sense import Complaint, complaints


def contradictions(
    given: Given, settled: Settled, *, stage: str, objective: type[Objective] | None, verb: str
) -> Iterator[Problem]:
    """Problems between keys, except where one of them is in doubt already."""
    suspects = settled.suspects()
    # Unset, do_train is not false: most runs train and do not say so.
    values = settled.values | {"do_train": settled.sections.get("training", {}).get("do_train")}
    if evaluates_only(values):
        values["do_train"] = False
    keys = Keys(values, given, stage)
    for blamed, text in _all(keys, settled, objective, verb):
        if not suspects.intersection(blamed):
            place = next((given.places[key] for key in blamed if key in given.places), given.source.name)
            yield Problem(blamed[0], place, text)


def evaluates_only(keys: Mapping[str, Any]) -> bool:
    """Whether a run that does not say names no training data, and asks for evaluation or predictions."""
    named = keys.get("dataset") or keys.get("tokenized_path")
    asks = keys.get("do_eval") or keys.get("do_predict")
    return bool(keys.get("do_train") is None and keys.get("eval_dataset") and asks and not named)


def _all(keys: Keys, settled: Settled, objective: type[Objective] | None, verb: str) -> Iterator[Complaint]:
    yield from _missing(keys, verb)
    yield from _template(keys)
    for rule in RULES:
        if (not rule.verbs or verb in rule.verbs) and rule.broken(keys):
            yield rule.keys, rule.text.format_map(keys)
    if verb in TRAINS:
        training, train = settled.sections.get("training", {}), settled.sections.get("train", TrainConfig())
        yield from complaints(training, train)
        yield from _evaluates_nothing(keys, training)
    if verb in EVALUATES:
        yield from _predicts(keys, objective)


def _missing(keys: Keys, verb: str) -> Iterator[Complaint]:
    if verb in TRAINS and not keys["output_dir"]:
        yield ("output_dir",), "is not set. Say where the run is written, such as saves/my-first-run."
    if verb in NEEDS_DATA and not (keys["dataset"] or keys["eval_dataset"] or keys["tokenized_path"]):
        yield ("dataset",), "is not set. Name data sets of dataset_info.json, or a file."


def _template(keys: Keys) -> Iterator[Complaint]:
    """A template that the catalogue does not have; unset or auto, the tokenizer's own is found when it is loaded."""
    if keys["template"] in (None, AUTO):
        return
    try:
        find_template(keys["template"])
    except ConfigError as error:
        yield ("template",), str(error).removeprefix("template: ")


def _evaluates_nothing(keys: Keys, training: Mapping[str, Any]) -> Iterator[Complaint]:
    if keys["val_size"] or keys["eval_dataset"] or keys["tokenized_path"]:
        return
    for key in ("eval_strategy", "do_eval", "eval_on_start", "do_predict"):
        if training.get(key) not in (None, False, "no"):
            text = "asks for evaluation, but there are no rows for it. Set val_size or eval_dataset."
            yield (key, "val_size", "eval_dataset"), text


def _predicts(keys: Keys, objective: type[Objective] | None) -> Iterator[Complaint]:
    """do_predict with a stage that has nothing to say about an answer."""
    if objective is None or not keys["do_predict"] or keys.on("predict_with_generate"):
        return
    if objective.record is Objective.record and objective.rows is Objective.rows:
        text = f"stage {keys['stage']} does not judge answers. To write answers to a file of prompts: luthier infer"
        yield ("do_predict",), f"{text} CONFIG."
