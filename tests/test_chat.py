"""`luthier chat` with piped input, against transformers alone."""

from __future__ import annotations

import io
import logging
from types import SimpleNamespace

import pytest
import torch
import transformers

from luthier import chat
from luthier.cli import main
from luthier.core.errors import DataError
from luthier.core.types import Message
from luthier.engines.sampling import GenerateConfig
from tests.conftest import save_lively_model

NEW = 8


@pytest.fixture(scope="module")
def folder(model_folder, tmp_path_factory):
    """The tiny model with weights that do not repeat one token."""
    return save_lively_model(model_folder, tmp_path_factory.mktemp("chat-model"))


@pytest.fixture
def say(folder, monkeypatch, capsys):
    """Run the verb with this as stdin; gives (exit code, stdout, stderr)."""

    def run(text, *overrides):
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        keys = [f"model_name_or_path={folder}", f"max_new_tokens={NEW}", "use_cpu=true", *overrides]
        code = main(["chat", *keys])
        caught = capsys.readouterr()
        return code, caught.out, caught.err

    return run


def answer(folder, *turns, system=None, whole=False):
    """What transformers says next, greedily, after user and assistant turns; whole: with its special tokens."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    messages = [{"role": ("user", "assistant")[n % 2], "content": turn} for n, turn in enumerate(turns)]
    messages = [{"role": "system", "content": system}, *messages] if system else messages
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW,
                         eos_token_id=end, pad_token_id=0)  # fmt: skip
    said = out[0, ids.shape[1] :].tolist()
    return tokenizer.decode([token for token in said if token != end], skip_special_tokens=not whole)


def test_a_conversation_goes_on_with_what_was_said(folder, say):
    first = answer(folder, "Hello world")
    second = answer(folder, "Hello world", answer(folder, "Hello world", whole=True), "goodbye")
    assert second != answer(folder, "goodbye")
    code, out, _ = say("Hello world\n\ngoodbye\n", "do_sample=false")
    assert code == 0 and out == f"{first}\n{second}\n"


def test_clear_forgets_and_exit_leaves(folder, say):
    alone = answer(folder, "goodbye")
    code, out, err = say("Hello world\n/clear\ngoodbye\n/exit\nHello world\n", "do_sample=false")
    assert code == 0 and out == f"{answer(folder, 'Hello world')}\n{alone}\n"
    assert "forgotten" in err


def test_system_sets_the_system_prompt_and_begins_anew(folder, say):
    briefly = answer(folder, "Hello", system="Be brief.")
    plain = answer(folder, "Hello")
    assert briefly != plain
    _, out, err = say("Hello\n/system Be brief.\nHello\n/system\nHello\n", "do_sample=false")
    assert out == f"{plain}\n{briefly}\n{plain}\n" and "Be brief." in err


def test_help_and_unknown_commands_go_to_stderr(say):
    code, out, err = say("/help\n/nothing\n")
    assert code == 0 and out == "" and err.count("/system TEXT") == 2 and "no command /nothing" in err


def test_the_seed_decides_what_is_drawn(say):
    keys = ("temperature=1.5", "top_p=1.0")
    talks = [say("Hello\nHello\n", *keys, f"seed={seed}")[1] for seed in (1, 1, 2)]
    assert talks[0] == talks[1] != talks[2]


def test_text_is_shown_as_it_comes(folder, say, monkeypatch):
    shown = []

    class Out(io.StringIO):
        def flush(self):
            shown.append(self.getvalue())

    out = Out()
    monkeypatch.setattr("sys.stdout", out)
    say("Hello world\n", "do_sample=false")
    whole = answer(folder, "Hello world") + "\n"
    assert out.getvalue() == whole and len(set(shown)) > 3
    assert all(whole.startswith(part) for part in shown)


def test_a_conversation_too_long_for_the_model_ends_a_script_with_an_error(say):
    code, out, err = say("Hello world " * 400 + "\n")
    assert code == 2 and out == "" and "leaves no room" in err


class Script:
    """A renderer and an engine that say what they are told."""

    stop_ids = ()
    tokenizer = SimpleNamespace(all_special_tokens=["<|think|>", "<|done|>"])

    def __init__(self, *answers):
        self.answers, self.engine, self.renderer, self.seed = list(answers), self, self, 0
        self.asked, self.sampled = [], []

    def prompt(self, messages, *, system=""):
        self.asked.append(list(messages))
        return [1]

    def stream(self, prompt, sampling, stop_ids, *, seed):
        self.sampled.append(sampling)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        for piece in answer:
            if piece is KeyboardInterrupt:
                raise KeyboardInterrupt
            yield piece


def test_ctrl_c_ends_the_answer_and_keeps_what_was_said():
    out, script = io.StringIO(), Script(["Hel", "lo", KeyboardInterrupt], ["bye"])
    talk = chat.Chat(script, GenerateConfig(), out)
    assert talk.ask("one") == "Hello"
    talk.ask("two")
    assert script.asked[1] == [Message("user", "one"), Message("assistant", "Hello"), Message("user", "two")]
    assert out.getvalue() == "Hello\nbye\n"


@pytest.mark.parametrize(("skip", "shown"), [(True, "hmHello"), (False, "<|think|>hm<|done|>Hello")])
def test_what_is_not_shown_is_remembered(skip, shown):
    out, script = io.StringIO(), Script(["<|think|>", "hm", "<|done|>Hel", "lo"], ["bye"])
    talk = chat.Chat(script, GenerateConfig(skip_special_tokens=skip), out)
    assert talk.ask("one") == shown
    talk.ask("two")
    assert script.asked[1][1] == Message("assistant", "<|think|>hm<|done|>Hello")
    assert out.getvalue() == f"{shown}\nbye\n"
    assert [keys.skip_special_tokens for keys in script.sampled] == [False, False]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_on_a_terminal_an_error_does_not_end_the_conversation(monkeypatch, capsys):
    lines = iter(["one", "two", "three"])

    def read(_):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    script = Script(["first"], DataError("too long."), ["third"])
    chat.talk(chat.Chat(script, GenerateConfig(), io.StringIO()), Terminal())
    assert "too long. /clear begins anew." in capsys.readouterr().err
    assert script.asked[2] == [Message("user", "one"), Message("assistant", "first"), Message("user", "three")]


def test_a_training_configuration_points_out_its_adapter(tmp_path, say, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("luthier"), "handlers", [caplog.handler])
    say("/exit\n", f"output_dir={tmp_path}")
    assert "before training" not in caplog.text
    (tmp_path / "adapter_config.json").write_text("{}")
    say("/exit\n", f"output_dir={tmp_path}")
    assert f"adapter_name_or_path={tmp_path}" in caplog.text


def test_with_drafts_the_answer_is_the_same_and_what_they_saved_is_said_aside(folder, say):
    code, out, err = say("What is the capital of France?\n", "draft=draft_model", f"draft_model={folder}")
    assert (code, out) == (0, answer(folder, "What is the capital of France?") + "\n")
    assert f"{NEW / 2:.2f} tokens per pass, {NEW - 2} of {NEW - 2} draft tokens kept" in err
    code, out, err = say("Hello\n", "draft=prompt_lookup", "do_sample=true")
    assert code == 2 and "do_sample: true does not go with draft" in err


def test_drafts_are_greedy_where_nothing_is_said_about_sampling(folder, say):
    text = "one two three\nfour\n"
    assert say(text, "draft=prompt_lookup")[1] == say(text, "do_sample=false")[1]
    assert "tokens per pass" not in say(text, "do_sample=false")[2]
