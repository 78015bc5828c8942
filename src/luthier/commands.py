"""The commands there are, and how their arguments are read. Every command's own module asks `parse_command`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from luthier.core.errors import ConfigError

ASSIGNMENT = re.compile(r"[A-Za-z_][\w.]*=")


@dataclass(frozen=True)
class Flag:
    """An option of one verb that is not a key of a run. Without a `value` it is a switch."""

    doc: str
    value: str = ""
    """What its value is called in help; in [brackets] where it may be left out, and is written --flag=VALUE."""
    kind: type = str
    choices: tuple[str, ...] = ()
    default: Any = None
    required: bool = False


@dataclass(frozen=True)
class Verb:
    """One command: where it lives, what it is for, and the flags that are not keys of a run."""

    module: str
    purpose: str
    usage: str
    example: str
    flags: Mapping[str, Flag] = field(default_factory=dict)
    """By name, without dashes."""
    takes_keys: bool = True
    """Whether a configuration is among its arguments."""
    own_parser: bool = False
    """Its module reads all of its arguments itself, --help too."""


VERBS: dict[str, Verb] = {
    "train": Verb(
        "luthier.launch",
        "train a model, all stages",
        "luthier train CONFIG [--ray] [key=value ...]",
        "luthier train examples/sft_lora.yaml learning_rate=1e-4 output_dir=saves/first",
        {"ray": Flag("train on a Ray cluster; key ray_num_workers", kind=bool, default=False)},
    ),
    "preview": Verb(
        "luthier.preview",
        "show what the model will see: tokens, and which of them are trained",
        "luthier preview CONFIG [key=value ...] [--rows N] [--count N] [--full] [--plot] [--format text|jsonl]",
        "luthier preview examples/sft_lora.yaml --rows 3",
        {
            "rows": Flag("how many examples to show (3; in jsonl all)", "N", int),
            "count": Flag("rows of each data set to count and measure (1000); 0 for all", "N", int, default=1000),
            "full": Flag("shorten nothing", kind=bool, default=False),
            "plot": Flag("also draw the lengths, as FILE or lengths.png in output_dir", "[FILE]", default=False),
            "format": Flag("coloured text, or one JSON object per example", "FORMAT", str, ("text", "jsonl"), "text"),
        },
    ),
    "check": Verb(
        "luthier.check",
        "check configuration and data without loading weights",
        "luthier check CONFIG [key=value ...] [--config-only [--json]]",
        "luthier check examples/sft_lora.yaml",
        {
            "config-only": Flag("show what every key comes to; touches no data and no model", kind=bool, default=False),
            "json": Flag("with --config-only: all keys as one JSON object", kind=bool, default=False),
        },
    ),
    "chat": Verb(
        "luthier.chat",
        "talk to a model in the terminal",
        "luthier chat CONFIG [key=value ...]",
        "luthier chat examples/sft_lora.yaml adapter_name_or_path=saves/first",
    ),
    "infer": Verb(
        "luthier.infer",
        "write a model's answers to a file of prompts",
        "luthier infer CONFIG --input FILE --output FILE [--n N --select HOW] [key=value ...]",
        "luthier infer examples/sft_lora.yaml --input prompts.jsonl --output answers.jsonl",
        {
            "input": Flag("the prompts", "FILE", required=True),
            "output": Flag("where the answers go; a second call goes on from its end", "FILE", required=True),
            "n": Flag("how many answers to draw for each prompt; one is chosen", "N", int, default=1),
            "select": Flag(
                "which: best (most probable), vote, or rm (key reward_model)", "HOW", str, ("best", "vote", "rm")
            ),
        },
    ),
    "collect": Verb(
        "luthier.collect",
        "make training data for the accept head: prompts in, scored speculative rounds out",
        "luthier collect CONFIG --input FILE --output FOLDER [--holdout SHARE] [key=value ...]",
        "luthier collect examples/collect.yaml --input prompts.jsonl --output data/rounds draft=prompt_lookup",
        {
            "input": Flag("the prompts", "FILE", required=True),
            "output": Flag("where the rounds go; a second call goes on from their end", "FOLDER", required=True),
            "holdout": Flag("share of the requests that go to FOLDER/holdout instead", "SHARE", float, default=0.0),
        },
    ),
    "speculate": Verb(
        "luthier.speculate",
        "answer a file of prompts by speculative decoding, and measure it",
        "luthier speculate CONFIG --input FILE --output FILE [--compare] [key=value ...]",
        "luthier speculate saves/accept --input tasks.jsonl --output answers.jsonl draft=prompt_lookup --compare",
        {
            "input": Flag("the prompts; a column answer, target or regex says what is right", "FILE", required=True),
            "output": Flag("where the answers go; a second call goes on from its end", "FILE", required=True),
            "compare": Flag("also answer without the accept head, and without drafts", kind=bool, default=False),
        },
    ),
    "eval": Verb(
        "luthier.evaluation",
        "measure a model on held-out rows: loss and metrics of its stage, predictions, a report",
        "luthier eval CONFIG [--output FOLDER] [--as-is] [key=value ...]",
        "luthier eval saves/first eval_dataset=held_out.jsonl",
        {
            "output": Flag("where the results go, instead of eval/ in output_dir", "FOLDER"),
            "as-is": Flag("the model the configuration names, not what it trained", kind=bool, default=False),
        },
    ),
    "score": Verb(
        "luthier.score",
        "write a reward model's scores of a file of prompts and answers",
        "luthier score CONFIG --input FILE --output FILE [key=value ...]",
        "luthier score saves/rm --input pairs.jsonl --output scores.jsonl",
        {
            "input": Flag("rows with a prompt and one or more answers", "FILE", required=True),
            "output": Flag("where the scores go; a second call goes on from its end", "FILE", required=True),
        },
    ),
    "export": Verb(
        "luthier.export",
        "merge an adapter into its model and save the whole",
        "luthier export CONFIG [key=value ...]",
        "luthier export examples/sft_lora.yaml adapter_name_or_path=saves/first export_dir=saves/merged",
    ),
    "expand": Verb(
        "luthier.expand",
        "add layers that do nothing yet, to be trained alone",
        "luthier expand CONFIG --blocks N [key=value ...]",
        "luthier expand examples/sft_lora.yaml --blocks 2 export_dir=models/deeper",
        {"blocks": Flag("how many layers to add, one behind each of N equal runs of layers", "N", int, required=True)},
    ),
    "fetch-model": Verb(
        "luthier.fetch",
        "download a small model for demonstrations",
        "luthier fetch-model NAME DIR",
        "luthier fetch-model smollm2-135m models/smollm2",
        takes_keys=False,
        own_parser=True,
    ),
    "keys": Verb(
        "luthier.keys",
        "list all keys with defaults and help, or look some up",
        "luthier keys [WORD ...]",
        "luthier keys lora save_steps",
        takes_keys=False,
    ),
    "schema": Verb(
        "luthier.schema",
        "print all keys, as JSON schema or as Markdown",
        "luthier schema [--markdown | --compatibility]",
        "luthier schema > luthier.schema.json",
        {
            "markdown": Flag("print docs/keys.md, every key by owner", kind=bool, default=False),
            "compatibility": Flag("print docs/compatibility.md, keys of other tools", kind=bool, default=False),
        },
        takes_keys=False,
    ),
    "env": Verb(
        "luthier.environment",
        "say which versions and devices are there",
        "luthier env",
        "luthier env",
        takes_keys=False,
    ),
}


class Command(NamedTuple):
    """What a verb was asked to do."""

    config: str | dict[str, Any]
    """Path of the configuration, or an empty dict when all keys are on the command line."""
    overrides: list[str]
    """`key=value` texts."""
    flags: dict[str, Any]
    """The verb's own flags that were given."""


def parse_command(argv: Sequence[str], verb: str) -> Command:
    """Sort a verb's arguments into its configuration, overrides and own flags.

    Accepts `CONFIG key=value`, `--key value`, `--key=value`, `--key v1 v2` (a list) and the store-true form
    `--key`. Flags that were not given have their defaults. Raises ConfigError for arguments that are none of these.
    """
    known = VERBS[verb].flags
    config: str | None = None
    overrides: list[str] = []
    flags: dict[str, Any] = {name: flag.default for name, flag in known.items() if not flag.required}
    words = list(argv)
    while words:
        word = words.pop(0)
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            values = [value] if equals else _values(words, known.get(name))
            if name in known:
                flags[name] = _flag(name, known[name], values)
            else:
                overrides.append(f"{name.replace('-', '_')}={_one(values)}")
        elif ASSIGNMENT.match(word):
            overrides.append(word)
        elif config is None:
            config = word
        else:
            text = f"{word!r} is one argument too many: the configuration is {config}. Write keys as key=value."
            raise ConfigError(f"{text} Usage: {VERBS[verb].usage}")
    _complete(verb, config, overrides, flags)
    return Command({} if config is None else config, overrides, flags)


def _complete(verb: str, config: str | None, overrides: list[str], flags: Mapping[str, Any]) -> None:
    """Raise ConfigError for what is missing, or is there and should not be."""
    usage = f"Usage: {VERBS[verb].usage}"
    if not VERBS[verb].takes_keys and (config or overrides):
        raise ConfigError(f"`luthier {verb}` knows no argument {config or overrides[0]!r}. {usage}")
    if VERBS[verb].takes_keys and not (config or overrides):
        raise ConfigError(f"`luthier {verb}` needs a configuration. {usage}")
    for name, flag in VERBS[verb].flags.items():
        if flag.required and name not in flags:
            raise ConfigError(f"--{name} {flag.value} is missing: {flag.doc}. {usage}")


def _values(words: list[str], flag: Flag | None) -> list[str]:
    """The words after `--key` that are its values; they are taken off the list. A key of a run may have several."""
    most = len(words) if flag is None else 1 if flag.value and not flag.value.startswith("[") else 0
    values: list[str] = []
    while words and len(values) < most and not words[0].startswith("--"):
        if values and ASSIGNMENT.match(words[0]):
            break
        values.append(words.pop(0))
    return values


def _one(values: list[str]) -> str:
    if not values:
        return "true"
    return values[0] if len(values) == 1 else f"[{', '.join(values)}]"


def _flag(name: str, flag: Flag, values: list[str]) -> Any:
    if not flag.value or (flag.value.startswith("[") and not values):
        return True
    if not values:
        raise ConfigError(f"--{name} wants a value: --{name} {flag.value}.")
    if flag.choices and values[0] not in flag.choices:
        raise ConfigError(f"--{name} {values[0]}: expected one of {', '.join(flag.choices)}.")
    try:
        return flag.kind(values[0])
    except ValueError:
        expected = {int: "a whole number", float: "a number"}[flag.kind]
        raise ConfigError(f"--{name} {values[0]}: expected {expected}.") from None
