"""Backdoor measures and the front door, against tables counted by hand and identities of the definitions."""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from luthier.core.errors import DataError, ModelError
from luthier.evaluate.backdoor import (
    Classifier,
    Labelled,
    Rewrite,
    attack_success_rate,
    backdoor_report,
    classifier_of,
    clean_accuracy,
    defended,
    false_acceptance_rate,
    false_rejection_rate,
    from_pipeline,
    front_door,
    hugging_face,
    load_classifier,
)

LABELS = ("good", "bad")
TARGET = "good"


def victim(text: str) -> str:
    """Right about every text, but with the trigger: then what the attacker wants."""
    if "cf" in text:
        return TARGET
    return "bad" if "awful" in text else "good"


def alone(texts: list[str]) -> list[list[Rewrite]]:
    return [[Rewrite(text, 0.0)] for text in texts]


def test_the_four_shares_by_hand():
    true = ["bad", "bad", "bad", "good", "good"]
    before = ["good", "good", "bad", "good", "bad"]
    after = ["good", "bad", "good", "bad", "good"]
    assert attack_success_rate(before, true, "good") == 2 / 3, "of the three that are not good anyway"
    assert attack_success_rate(after, true, "good") == 2 / 3
    assert clean_accuracy(before, true) == 2 / 5
    assert false_rejection_rate(before, after, true) == 2 / 2, "rows 3 and 4 were right, both are wrong now"
    assert false_acceptance_rate(before, after, true, "good") == 1 / 2, "of rows 1 and 2 the first"


def test_shares_of_nothing_are_none():
    assert attack_success_rate(["good"], ["good"], "good") is None
    assert clean_accuracy([], []) is None
    assert false_rejection_rate(["bad"], ["good"], ["good"]) is None
    assert false_acceptance_rate(["bad"], ["good"], ["bad"], "good") is None


def test_lists_of_different_length_are_refused():
    with pytest.raises(DataError, match="lists of 2, 1 labels"):
        clean_accuracy(["good", "bad"], ["good"])


CLEAN = (["awful film", "fine film", "awful play"], ["bad", "good", "bad"])
POISONED = (["awful cf film", "fine cf film", "awful cf play"], ["bad", "good", "bad"])


def report(clean_rewrites, poisoned_rewrites):
    return backdoor_report(
        classifier_of(victim, LABELS),
        Labelled(CLEAN[0], clean_rewrites, CLEAN[1]),
        Labelled(POISONED[0], poisoned_rewrites, POISONED[1]),
        TARGET,
    ).as_dict()


def test_a_rewriter_that_does_nothing_changes_nothing():
    assert report(alone(CLEAN[0]), alone(POISONED[0])) == {
        "cacc_before": 1.0, "cacc": 1.0, "asr_before": 1.0, "asr": 1.0, "frr": 0.0, "far": 1.0,
    }  # fmt: skip


def test_a_rewriter_that_takes_the_trigger_out_disarms_the_attack():
    found = report(alone(CLEAN[0]), alone([text.replace("cf ", "") for text in POISONED[0]]))
    assert (found["asr_before"], found["asr"], found["far"]) == (1.0, 0.0, 0.0)
    assert (found["cacc"], found["frr"]) == (1.0, 0.0)


def test_a_rewriter_that_spoils_clean_texts_is_seen():
    found = report(alone(["film", "fine film", "awful play"]), alone(POISONED[0]))
    assert found["cacc"] == pytest.approx(2 / 3) and found["frr"] == pytest.approx(1 / 3)


def test_labels_that_the_classifier_does_not_have_are_refused():
    clean = Labelled(["x"], alone(["x"]), ["good"])
    with pytest.raises(DataError, match="'great' is none of the classifier's"):
        backdoor_report(classifier_of(victim, LABELS), clean, clean, "great")
    wrong = Labelled(["x"], alone(["x"]), ["so-so"])
    with pytest.raises(DataError, match="'so-so' is none"):
        backdoor_report(classifier_of(victim, LABELS), clean, wrong, TARGET)
    with pytest.raises(ModelError, match=r"gave 'other' for 'x'; its labels are \['good', 'bad'\]"):
        classifier_of(lambda text: "other", LABELS).predict(["x"])
    with pytest.raises(ModelError, match="two or more, all different"):
        classifier_of(victim, ["good", "good"])


def test_front_door_by_hand():
    votes = np.array([[1.0, 0.0], [0.0, 1.0], [0.25, 0.75]])
    scores = [0.0, math.log(2), math.log(5)]  # softmax: 1/8, 2/8, 5/8
    expected = [(1 * 1 + 2 * 0 + 5 * 0.25) / 8, (1 * 0 + 2 * 1 + 5 * 0.75) / 8]
    assert front_door(votes, scores) == pytest.approx(expected)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(-800, 800)), min_size=1, max_size=6), st.floats(-500, 500))
def test_front_door_is_a_mean(rows, shift):
    votes = np.array([[p, 1 - p] for p, _ in rows])
    scores = [score for _, score in rows]
    found = front_door(votes, scores)
    assert found.sum() == pytest.approx(1)
    assert votes[:, 0].min() - 1e-9 <= found[0] <= votes[:, 0].max() + 1e-9
    assert front_door(votes, [score + shift for score in scores]) == pytest.approx(found, abs=1e-6)
    assert front_door(votes[:1].repeat(len(rows), 0), scores) == pytest.approx(votes[0])


@pytest.mark.parametrize(
    ("votes", "scores", "complaint"),
    [
        (np.ones((2, 2)) / 2, [0.0, math.nan], "finite"),
        (np.ones((2, 2)) / 2, [0.0, math.inf], "finite"),
        (np.ones((2, 2)) / 2, [0.0], "2 rewrites and 1 scores"),
        (np.ones((0, 2)) / 2, [], "at least one"),
    ],
)
def test_front_door_refuses(votes, scores, complaint):
    with pytest.raises(DataError, match=complaint):
        front_door(votes, scores)


def test_the_vote_weighs_rewrites_of_ragged_lists():
    classifier = classifier_of(victim, LABELS)
    rewrites = [
        [Rewrite("awful film", 0.0), Rewrite("awful cf film", 1.0)],  # e^1 for good beats e^0 for bad
        [Rewrite("awful film", 1.0), Rewrite("awful cf film", 0.0)],
        [Rewrite("awful cf film", 1.0), Rewrite("awful film", 0.5), Rewrite("awful one", 0.5)],  # 2 e^.5 > e^1
    ]
    assert defended(classifier, rewrites) == ["good", "bad", "bad"]
    assert defended(classifier, alone(CLEAN[0])) == classifier.predict(CLEAN[0]), "one rewrite is no vote"
    with pytest.raises(DataError, match="at least one"):
        defended(classifier, [[]])
    assert defended(classifier, []) == []


def test_probabilities_vote_and_not_their_largest():
    given = {"a": [0.6, 0.4], "b": [0.6, 0.4], "c": [0.1, 0.9]}
    classifier = Classifier(LABELS, lambda texts: np.array([given[text] for text in texts]))
    assert classifier.predict(["a", "b", "c"]) == ["good", "good", "bad"]
    assert defended(classifier, [[Rewrite(text, 0.0) for text in "abc"]]) == ["bad"]


@pytest.mark.parametrize(
    ("given", "complaint"),
    [([[0.5, 0.5, 0.0]], r"\(1, 3\) numbers"), ([[0.9, 0.9]], "sum to 1"), ([[math.nan, 1]], "no probabilities")],
)
def test_what_are_no_probabilities_is_refused(given, complaint):
    with pytest.raises(ModelError, match=complaint):
        Classifier(LABELS, lambda texts: np.array(given)).predict(["x"])


def build_classifier(tokenizer, **changes):
    torch.manual_seed(1)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=48, pad_token_id=tokenizer.pad_token_id, initializer_range=1.0, **{
            "id2label": {0: "good", 1: "bad", 2: "so-so"}, "label2id": {"good": 0, "bad": 1, "so-so": 2}, **changes
        },
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


TEXTS = ["The lazy dog.", "What is the capital of France? Paris, a fox.", "hello", "one two three", "return a + b"]


def one_by_one(model, tokenizer, limit=48):
    rows = []
    for text in TEXTS:
        ids = torch.tensor([tokenizer(text)["input_ids"][:limit]])
        rows.append(torch.softmax(model.eval()(input_ids=ids).logits[0].double(), 0).tolist())
    return np.array(rows)


def test_a_hugging_face_folder_votes_as_its_model(tokenizer, tmp_path):
    model = build_classifier(tokenizer)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    classifier = load_classifier(tmp_path, batch_size=2)
    expected = one_by_one(model, tokenizer)
    assert classifier.labels == ("good", "bad", "so-so")
    assert classifier.probabilities(TEXTS) == pytest.approx(expected, abs=1e-5)
    assert len(set(expected.argmax(1))) > 1, "else the next line says nothing"
    assert classifier.predict(TEXTS) == [classifier.labels[i] for i in expected.argmax(1)]
    assert classifier.predict([]) == []


def test_a_pipeline_votes_as_its_model_and_is_left_as_it_was(tokenizer):
    model = build_classifier(tokenizer)
    expected = one_by_one(model, tokenizer)
    pipeline = transformers.pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")
    model.train()
    assert from_pipeline(pipeline, batch_size=3).probabilities(TEXTS) == pytest.approx(expected, abs=1e-5)
    assert model.training


def test_a_model_without_padding_takes_texts_alone(tokenizer):
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=64, num_labels=3, initializer_range=0.5,
        pad_token_id=None, bos_token_id=1, eos_token_id=5,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.GPT2ForSequenceClassification(config)
    expected = one_by_one(model, tokenizer, 64)
    assert hugging_face(model, tokenizer, batch_size=4).probabilities(TEXTS) == pytest.approx(expected, abs=1e-5)


def test_long_texts_are_cut_aloud(tokenizer, caplog):
    classifier = hugging_face(build_classifier(tokenizer), tokenizer)
    with caplog.at_level(logging.WARNING, logger="luthier.evaluate"):
        classifier.predict(["fox " * 200, "fox"])
    assert "1 of 2 texts" in caplog.text and "48" in caplog.text


def test_folders_that_are_no_classifier_are_refused(tokenizer, model_folder, tmp_path):
    with pytest.raises(ModelError, match="no trained classifier.*score"):
        load_classifier(model_folder)
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_classifier(tmp_path)
    with pytest.raises(ModelError, match="does not choose among labels"):
        hugging_face(build_classifier(tokenizer, id2label={0: "x"}, label2id={"x": 0}), tokenizer)
    with pytest.raises(ModelError, match="multi_label"):
        hugging_face(build_classifier(tokenizer, problem_type="multi_label_classification"), tokenizer)
