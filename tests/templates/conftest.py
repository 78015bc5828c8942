"""A tokenizer that knows the special tokens of every template, fresh for each test: binding a template changes it."""

from __future__ import annotations

import copy

import pytest

from tests.conftest import build_tokenizer

SPECIALS = (
    "<|start_header_id|> <|end_header_id|> <|eot_id|> <|eom_id|> <|end_of_text|> <|header_start|> <|header_end|> "
    "<|eot|> <|eom|> <start_of_turn> <end_of_turn> <eos> [gMASK] <sop> sop <|user|> <|assistant|> <|system|> "
    "<|observation|> <｜User｜> <｜Assistant｜> <|EOT|> <|end|> <|im_sep|> <|start_of_role|> <|end_of_role|> "
    "<|START_OF_TURN_TOKEN|> <|END_OF_TURN_TOKEN|> <|SYSTEM_TOKEN|> <|USER_TOKEN|> <|CHATBOT_TOKEN|> <|im_user|> "
    "<|im_assistant|> <|im_system|> <|im_middle|> <think> </think> <|begin_of_text|> <|turn> <turn|> <|think|> "
    "<|channel> <channel|> <｜hy_User｜> <｜hy_Assistant｜> <｜hy_eos｜> <｜hy_begin▁of▁sentence｜> "
    "<｜hy_place▁holder▁no▁2｜> <｜hy_place▁holder▁no▁3｜> <｜hy_place▁holder▁no▁8｜> <|startoftext|> <|extra_0|> "
    "<|extra_4|> <|eos|> <|User|> <|Assistant|> <|endofuser|> <|endofassistant|> <|endofsystem|> <|start|> "
    "<|message|> <|channel|> <|return|> <beginning_of_sentence> <end_of_sentence> ]~!b[ ]~b] [e~[ <|role_end|> "
    "<|begin_of_sentence|> <|end_of_sentence|> <sep> <eod> ### "
    "<reserved_102> <reserved_103> <reserved_106> <reserved_107> [|Human|]: [|AI|]: <eoa>"
).split()


@pytest.fixture(scope="session")
def _knows_all():
    tokenizer = build_tokenizer(600, extra_specials=tuple(SPECIALS))
    tokenizer.eos_token = "</s>"
    tokenizer.chat_template = None
    return tokenizer


@pytest.fixture
def tok(_knows_all):
    """bos <s>, eos </s>, no chat template."""
    return copy.deepcopy(_knows_all)
