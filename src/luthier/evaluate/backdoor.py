"""Backdoors in classifiers, and a defence that rewrites the input before the classifier sees it.

The front door (Liu et al., ICML 2024, "Causality Based Front-door Defense Against Backdoor Attack on Language Models"):
a defence model makes M rewrites x_1 .. x_M of an input, with scores s_1 .. s_M, and

    prediction = argmax_y  sum_j  softmax(s)_j  f(x_j)[y]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from luthier.core.errors import DataError, ModelError
from luthier.core.log import get_logger

if TYPE_CHECKING:
    from transformers import Pipeline, PreTrainedModel, PreTrainedTokenizerBase

log = get_logger("evaluate")

Label = str | int


@dataclass(frozen=True)
class Classifier:
    """Whatever gives texts labels: a function, or a Hugging Face model."""

    labels: tuple[Label, ...]
    probabilities: Callable[[Sequence[str]], np.ndarray]
    """texts -> float64 [texts, labels], each row summing to 1."""

    def predict(self, texts: Sequence[str]) -> list[Label]:
        """The most probable label of each text; the first of several that are equally probable."""
        return [self.labels[i] for i in self._of(texts).argmax(1)]

    def _of(self, texts: Sequence[str]) -> np.ndarray:
        if not texts:
            return np.zeros((0, len(self.labels)))
        given = np.asarray(self.probabilities(texts), np.float64)
        if given.shape != (len(texts), len(self.labels)):
            raise ModelError(
                f"the classifier gave {given.shape} numbers; expected one row per text and one column per label, "
                f"{(len(texts), len(self.labels))}."
            )
        if not (np.isfinite(given).all() and (given >= 0).all() and np.allclose(given.sum(1), 1, atol=1e-3)):
            raise ModelError("the classifier gave numbers that are no probabilities: each row must sum to 1.")
        return given


class Rewrite(NamedTuple):
    """One of the texts that stand for an input."""

    text: str
    score: float
    """How likely the defence model finds it: its mean log-prob, for example."""


@dataclass(frozen=True)
class BackdoorReport:
    """An attack with and without defence; shares, None where there is no input to take the share of."""

    cacc_before: float | None
    """Accuracy on clean inputs, undefended."""
    cacc: float | None
    """Accuracy on clean inputs, defended."""
    asr_before: float | None
    """Attack success rate, undefended: inputs with the trigger that are given the attacker's label."""
    asr: float | None
    """Attack success rate, defended."""
    frr: float | None
    """False rejections: clean inputs that the defence made wrong."""
    far: float | None
    """False acceptances: attacks that worked before and still do."""

    def as_dict(self) -> dict[str, float | None]:
        """Name -> share."""
        return asdict(self)


def classifier_of(function: Callable[[str], Label], labels: Sequence[Label]) -> Classifier:
    """A function from a text to one of `labels`; its label has probability 1."""
    known = _distinct(labels)

    def probabilities(texts: Sequence[str]) -> np.ndarray:
        given = [function(text) for text in texts]
        for label, text in zip(given, texts):
            if label not in known:
                raise ModelError(f"the classifier gave {label!r} for {text[:60]!r}; its labels are {list(known)}.")
        return np.array([[float(label == one) for one in known] for label in given])

    return Classifier(known, probabilities)


def load_classifier(folder: str | Path, *, batch_size: int = 16) -> Classifier:
    """A sequence classifier saved in a Hugging Face folder (or an id on the hub); labels are its `id2label`."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    place = str(Path(folder).expanduser()) if Path(folder).expanduser().exists() else str(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(place)
        model, info = AutoModelForSequenceClassification.from_pretrained(place, output_loading_info=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"{place} cannot be loaded as a sequence classifier: {error}") from error
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:4])
        raise ModelError(f"{place} is no trained classifier: it has no weights for {missing}. Give one that has.")
    return hugging_face(model, tokenizer, batch_size=batch_size)


def from_pipeline(pipeline: Pipeline, *, batch_size: int = 16) -> Classifier:
    """The model of a transformers text-classification pipeline."""
    return hugging_face(pipeline.model, pipeline.tokenizer, batch_size=batch_size)


def hugging_face(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch_size: int = 16) -> Classifier:
    """A sequence classifier in memory. Texts longer than it takes are cut, and counted in a warning."""
    import torch

    config = model.config
    if config.num_labels < 2 or config.problem_type == "multi_label_classification":
        raise ModelError(
            f"this classifier does not choose among labels ({config.num_labels} labels, problem type "
            f"{config.problem_type}); expected two labels or more, one for each text."
        )
    # Without a token to pad with, rows stand alone.
    size = batch_size if tokenizer.pad_token_id is not None and config.pad_token_id is not None else 1
    limit = _longest(model, tokenizer)
    cutting = {} if limit is None else {"truncation": True, "max_length": limit}

    def rows(texts: Sequence[str]) -> Iterator[np.ndarray]:
        for start in range(0, len(texts), size):
            batch = tokenizer(list(texts[start : start + size]), padding=size > 1, return_tensors="pt", **cutting)
            with torch.inference_mode():
                yield model(**batch.to(model.device)).logits.double().softmax(-1).cpu().numpy()

    def probabilities(texts: Sequence[str]) -> np.ndarray:
        cut = 0 if limit is None else sum(len(tokenizer(text, verbose=False)["input_ids"]) > limit for text in texts)
        if cut:
            log.warning("%d of %d texts have more tokens than the classifier's %d and are cut.", cut, len(texts), limit)
        training = model.training
        model.eval()
        try:
            return np.concatenate(list(rows(texts)))
        finally:
            model.train(training)

    return Classifier(tuple(config.id2label[i] for i in range(config.num_labels)), probabilities)


def front_door(votes: np.ndarray, scores: Sequence[float]) -> np.ndarray:
    """softmax(scores) @ votes: [M, labels] and [M] -> [labels]. Raises DataError for scores that are not finite."""
    weights = np.asarray(scores, np.float64)
    if len(weights) == 0 or len(weights) != len(votes):
        raise DataError(f"{len(votes)} rewrites and {len(weights)} scores; expected as many, and at least one.")
    if not np.isfinite(weights).all():
        raise DataError(f"the scores of the rewrites are {weights.tolist()}; expected finite numbers.")
    weights = np.exp(weights - weights.max())
    return (weights / weights.sum()) @ votes


def defended(classifier: Classifier, rewrites: Sequence[Sequence[Rewrite]]) -> list[Label]:
    """The front door's label of each input, given its rewrites; inputs may have any number of them."""
    votes = classifier._of([one.text for several in rewrites for one in several])
    labels, start = [], 0
    for several in rewrites:
        total = front_door(votes[start : start + len(several)], [one.score for one in several])
        labels.append(classifier.labels[int(total.argmax())])
        start += len(several)
    return labels


def attack_success_rate(predicted: Sequence[Label], true: Sequence[Label], target: Label) -> float | None:
    """ASR of inputs with the trigger: P(predicted = target | true != target)."""
    return _share([p == target for p, t in _zip(predicted, true) if t != target])


def clean_accuracy(predicted: Sequence[Label], true: Sequence[Label]) -> float | None:
    """CACC: accuracy on clean inputs."""
    return _share([p == t for p, t in _zip(predicted, true)])


def false_rejection_rate(before: Sequence[Label], after: Sequence[Label], true: Sequence[Label]) -> float | None:
    """FRR of clean inputs: P(wrong with the defence | right without)."""
    return _share([a != t for b, a, t in _zip(before, after, true) if b == t])


def false_acceptance_rate(
    before: Sequence[Label], after: Sequence[Label], true: Sequence[Label], target: Label
) -> float | None:
    """FAR of inputs with the trigger: P(target with the defence | target without, true != target)."""
    return _share([a == target for b, a, t in _zip(before, after, true) if t != target and b == target])


@dataclass(frozen=True)
class Labelled:
    """Inputs of one kind, clean or with the trigger, and what the defence made of them."""

    texts: Sequence[str]
    rewrites: Sequence[Sequence[Rewrite]]
    true: Sequence[Label]


def backdoor_report(classifier: Classifier, clean: Labelled, poisoned: Labelled, target: Label) -> BackdoorReport:
    """Attack and defence of a classifier. Raises DataError for labels that it does not have, or lists that differ."""
    for label in (target, *clean.true, *poisoned.true):
        if label not in classifier.labels:
            raise DataError(f"the label {label!r} is none of the classifier's: {list(classifier.labels)}.")
    before, after = classifier.predict(clean.texts), defended(classifier, clean.rewrites)
    attacked, cured = classifier.predict(poisoned.texts), defended(classifier, poisoned.rewrites)
    return BackdoorReport(
        cacc_before=clean_accuracy(before, clean.true),
        cacc=clean_accuracy(after, clean.true),
        asr_before=attack_success_rate(attacked, poisoned.true, target),
        asr=attack_success_rate(cured, poisoned.true, target),
        frr=false_rejection_rate(before, after, clean.true),
        far=false_acceptance_rate(attacked, cured, poisoned.true, target),
    )


def _distinct(labels: Sequence[Label]) -> tuple[Label, ...]:
    if len(set(labels)) != len(labels) or len(labels) < 2:
        raise ModelError(f"the classifier's labels are {list(labels)}; expected two or more, all different.")
    return tuple(labels)


def _longest(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Most tokens of a text, where the tokenizer or the model says."""
    # Not every architecture has a limit, and some have it under another name that only lookup knows.
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and "roberta" in model.config.model_type:
        positions -= model.config.pad_token_id + 1  # its positions begin after the padding index
    # A tokenizer that was never told says 1e30.
    known = [size for size in (positions, tokenizer.model_max_length) if size is not None and size < 10**9]
    return min(known) if known else None


def _zip(*lists: Sequence[Label]) -> list[tuple[Label, ...]]:
    if len({len(one) for one in lists}) > 1:
        raise DataError(f"lists of {', '.join(str(len(one)) for one in lists)} labels; expected one each per input.")
    return list(zip(*lists))


def _share(hits: Sequence[bool]) -> float | None:
    return sum(hits) / len(hits) if hits else None
