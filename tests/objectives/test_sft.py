"""Which tokens SFT trains, spelled out; a renderer of plain numbers stands in for the template."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from luthier.core.errors import ConfigError
from luthier.core.types import Answer, Example, Message
from luthier.data.truncate import fit_lengths
from luthier.objectives.sft import Sft, SftConfig

EOS = 5


@dataclass
class Numbers:
    """Renders the nth exchange as given; knows nothing of text."""

    exchanges: list
    efficient_eos: bool = False
    others: list | None = None
    tokenizer = SimpleNamespace(eos_token_id=EOS)

    def pairs(self, messages, *, system="", tools="", mask_history=False):
        return self.exchanges

    def branches(self, messages, *, system="", tools=""):
        return self.others or [self.exchanges]


def conversation(turns: int, weights=()) -> Example:
    messages = []
    for n in range(turns):
        messages += [Message("user", "?"), Message("assistant", "!", weights[n] if weights else None)]
    return Example(tuple(messages[:-1]), (Answer((messages[-1],)),))


def encode(exchanges, *, cutoff_len=100, efficient_eos=False, weights=(), **keys):
    objective = Sft(SftConfig(**keys))
    example = conversation(len(exchanges), weights)
    return objective.encode(example, Numbers(exchanges, efficient_eos), cutoff_len=cutoff_len)


TWO = [([11, 12, 13], [21, 22]), ([31, 32], [41, 42, 43])]


@pytest.mark.parametrize(
    ("source", "target", "cutoff", "expected"),
    [  # values of LLaMA-Factory's infer_seqlen
        (3000, 2000, 1000, (600, 400)), (1000, 100, 1000, (900, 100)), (100, 1000, 1000, (100, 900)),
        (500, 500, 1000, (500, 500)), (7, 100, 16, (7, 9)), (3, 2, 4, (3, 1)), (2, 3, 4, (2, 2)), (1, 1, 1, (1, 0)),
        (499, 1, 10, (9, 1)),
    ],
)  # fmt: skip
def test_lengths_are_cut_by_llama_factorys_rule(source, target, cutoff, expected):
    assert fit_lengths(source, target, cutoff) == expected


def test_every_response_is_trained_and_nothing_else():
    (encoded,) = encode(TWO)
    (path,) = encoded.paths
    assert path.ids == [11, 12, 13, 21, 22, 31, 32, 41, 42, 43]
    assert path.weights == [0, 0, 0, 1, 1, 0, 0, 1, 1, 1]
    assert encoded.truncated == 0


def test_train_on_prompt():
    assert encode(TWO, train_on_prompt=True)[0].paths[0].weights == [1.0] * 10


def test_mask_history_trains_the_last_response_and_keeps_the_last_turns():
    assert encode(TWO, mask_history=True)[0].paths[0].weights == [0] * 7 + [1] * 3
    (encoded,) = encode(TWO, mask_history=True, cutoff_len=5)
    assert encoded.paths[0].ids == [31, 32, 41, 42, 43]
    assert encoded.truncated == 5


def test_early_turns_win_when_history_is_trained():
    (encoded,) = encode(TWO, cutoff_len=5)
    assert encoded.paths[0].ids == [11, 12, 13, 21, 22]
    assert encoded.truncated == 5


def test_a_turn_that_fits_in_part_is_cut_on_the_right():
    (encoded,) = encode(TWO, cutoff_len=8)
    assert encoded.paths[0].ids == [11, 12, 13, 21, 22, 31, 32, 41]
    assert encoded.paths[0].weights == [0, 0, 0, 1, 1, 0, 0, 1]
    assert encoded.truncated == 2


def test_weights_of_single_turns():
    assert encode(TWO, weights=(0.0, 0.5))[0].paths[0].weights == [0] * 7 + [0.5] * 3
    assert encode(TWO, weights=(0.0, 0.0)) == []


def test_efficient_eos_ends_the_conversation_and_teaches_every_end_of_turn():
    (encoded,) = encode(TWO, efficient_eos=True)
    whole, end = encoded.paths
    assert whole.ids == [11, 12, 13, 21, 22, 31, 32, 41, 42, 43, EOS]
    assert whole.weights == [0, 0, 0, 1, 1, 0, 0, 1, 1, 1, 1]
    # The end of the first turn: learnt after 22, though the conversation goes on with 31 there.
    assert end.ids == [11, 12, 13, 21, 22, EOS]
    assert end.weights == [0, 0, 0, 0, 0, 1]


def test_efficient_eos_has_room_for_the_end():
    (encoded,) = encode([([1, 2, 3], [4, 5, 6])], efficient_eos=True, cutoff_len=5)
    assert len(encoded.paths[0].ids) == 5
    assert encoded.paths[0].ids[-1] == EOS


@pytest.mark.parametrize("keys", [{"mask_history": True}, {"train_on": "last"}])
def test_last_and_mask_history_are_one(keys):
    assert encode(TWO, **keys)[0].paths[0].weights == [0] * 7 + [1] * 3


def test_train_on_is_one_of_two():
    with pytest.raises(ConfigError, match="'first' is none of all, last"):
        SftConfig(train_on="first")
    with pytest.raises(ConfigError, match="train_on: last"):
        SftConfig(train_on="last", train_on_prompt=True)


class TestBranches:
    """A template that forgets thoughts (99): the second turn sees 21 without it, and the third follows the second."""

    FORGETFUL = [[([11, 12], [99, 21])], [([11, 12, 21, 31], [99, 41]), ([51], [61])]]

    def encode(self, *, cutoff_len=100, efficient_eos=False, weights=(), **keys):
        renderer = Numbers([], efficient_eos, self.FORGETFUL)
        found = Sft(SftConfig(**keys)).encode(conversation(3, weights), renderer, cutoff_len=cutoff_len)
        return [(path.name, path.ids, path.weights) for path in found[0].paths], found[0].truncated

    def test_each_response_is_trained_once_after_what_the_model_saw(self):
        assert self.encode() == (
            [
                ("response", [11, 12, 99, 21], [0, 0, 1, 1]),
                ("response-2", [11, 12, 21, 31, 99, 41, 51, 61], [0, 0, 0, 0, 1, 1, 0, 1]),
            ],
            0,
        )

    def test_weights_go_to_their_turns(self):
        assert [weights for _, _, weights in self.encode(weights=(0.0, 0.5, 0.25))[0]] == [
            [0, 0, 0, 0, 0.5, 0.5, 0, 0.25]
        ]

    def test_prompts_are_trained_once(self):
        assert [weights for _, _, weights in self.encode(train_on_prompt=True)[0]] == [
            [1, 1, 1, 1],
            [0, 0, 1, 1, 1, 1, 1, 1],
        ]

    def test_history_is_never_cut(self):
        paths, truncated = self.encode(cutoff_len=4)
        assert paths == [("response", [11, 12, 99, 21], [0, 0, 1, 1])]
        assert truncated == 6  # 21 31 99 41 51 61; 11 12 are there already
        paths, truncated = self.encode(cutoff_len=5)
        assert paths[1] == ("response-2", [11, 12, 21, 31, 99], [0, 0, 0, 0, 1])
        assert truncated == 3

    def test_ends_of_turns_are_branches_too(self):
        paths, _ = self.encode(efficient_eos=True)
        assert paths == [
            ("response", [11, 12, 99, 21, EOS], [0, 0, 1, 1, 1]),
            ("response-2", [11, 12, 21, 31, 99, 41, 51, 61, EOS], [0, 0, 0, 0, 1, 1, 0, 1, 1]),
            ("end-of-turn-2", [11, 12, 21, 31, 99, 41, EOS], [0, 0, 0, 0, 0, 0, 1]),
        ]


def test_nothing_left_to_train():
    assert encode([([11], [21])], cutoff_len=1) == []


def test_keys_that_exclude_each_other():
    with pytest.raises(ConfigError, match="mask_history"):
        Sft(SftConfig(train_on_prompt=True, mask_history=True)).start(Numbers([]))
    with pytest.raises(ConfigError, match="efficient_eos"):
        Sft(SftConfig(train_on_prompt=True)).start(Numbers([], efficient_eos=True))


def test_a_disliked_answer_is_not_taught():
    from luthier.data.source import BadRow

    example = Example((Message("user", "?"),), (Answer((Message("assistant", "!"),), -1.0),))
    with pytest.raises(BadRow, match="disliked"):
        Sft().encode(example, Numbers([([11], [21])]), cutoff_len=10)
