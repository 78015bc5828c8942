"""`luthier schema`: every key of a configuration, from the same dataclasses that read it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from luthier import rules
from luthier.commands import parse_command
from luthier.core import registry
from luthier.core.compat import ENVIRONMENT, HUGGING_FACE, LLAMA_FACTORY, PEERS, RENAMED, Refused
from luthier.core.config import Key, keys_of
from luthier.core.kinds import describe, json_type
from luthier.run import MEMBERS, OWNERS, load_owner, objective_in
from luthier.train.keys import DIFFERS, RULES, training_keys


@dataclass(frozen=True)
class Section:
    """The keys of one owner."""

    title: str
    intro: str
    keys: Mapping[str, Key]


def sections() -> Iterator[Section]:
    """All keys there are, owner by owner: the run's parts, every stage, every finetuning_type, the Trainer's."""
    for name, path in OWNERS.items():
        config = load_owner(path)
        yield Section(name, _intro(config), keys_of(config))
    families = [("stage", "objectives"), *((key, family) for family, key, _ in MEMBERS.values())]
    for kind, family in families:
        for name in registry.names(family):
            module = registry.find(family, name)
            config = objective_in(module).Config if family == "objectives" else module.Config
            if keys_of(config):
                yield Section(f"{kind}: {name}", _intro(config), keys_of(config))
    for name in registry.names("optim"):
        config = registry.find("optim", name).Config
        if keys_of(config):
            yield Section(f"optimiser: {name}", _intro(config), keys_of(config))
    yield Section("training", "Keys of Hugging Face's TrainingArguments; the Trainer is theirs.", training_keys())


def json_schema() -> dict[str, Any]:
    """A JSON schema of a configuration file, for editors and web forms."""
    properties: dict[str, Any] = {}
    for section in sections():
        for key in section.keys.values():
            facts = json_type(key.hint) | {"description": key.doc, "x-owner": section.title}
            properties[key.name] = facts if key.required else facts | {"default": key.default}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Luthier configuration",
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
    }


def keys_page() -> str:
    """docs/keys.md."""
    lines = [
        "# Keys",
        "",
        "Every key that a configuration file or the command line may set. Made by `luthier schema --markdown` from",
        "the dataclasses that own the keys; do not edit it by hand. Keys of other tools:",
        "[compatibility](compatibility.md).",
    ]
    for section in sections():
        lines += [
            "",
            f"## {section.title}",
            "",
            section.intro,
            "",
            "| key | type | default | meaning |",
            "|---|---|---|---|",
        ]
        for key in section.keys.values():
            limit = f" **{_limit(key.rule)}**" if key.rule else ""
            default = "required" if key.required else f"`{_shown(key.default)}`"
            lines.append(f"| `{key.name}` | {_cell(describe(key.hint))} | {default} | {_cell(key.doc)}{limit} |")
    return "\n".join(lines)


def compatibility_page() -> str:
    """docs/compatibility.md."""
    return "\n".join(
        [
            "# Compatibility",
            "",
            "Luthier reads configuration files written for LLaMA-Factory, and Hugging Face's training keys under",
            "their old and new names. Made by `luthier schema --compatibility` from the tables that the",
            "configuration gate uses; do not edit it by hand.",
            "",
            "* A key with an owner works as documented in [keys](keys.md), under LLaMA-Factory's name and default.",
            "* A key that is known and not supported yet is accepted at the values below, which ask for nothing;",
            "  any other value stops the run before it starts, with the words of the last column.",
            "* One that could change nothing but speed is accepted at any value; the run warns that it has no effect.",
            "* A key of another stage or finetuning_type gets a warning: it has no effect in this run. So does one",
            "  that another key leaves nothing to do, such as eval_steps without eval_strategy.",
            "* An unknown key stops the run, with file, line and the nearest name.",
            "",
            "## What differs, and why",
            "",
            "| key | difference |",
            "|---|---|",
            *(f"| `{key}` | {_cell(text)} |" for key, text in DIFFERS.items()),
            "",
            "## Old names",
            "",
            "| old | new |",
            "|---|---|",
            *(f"| `{old}` | `{rule.new}` |" for old, rule in RENAMED.items()),
            "",
            "## LLaMA-Factory keys that are not supported yet",
            "",
            *_refusals(LLAMA_FACTORY),
            "",
            "## Keys that do not go together",
            "",
            "Each of these stops the run before it starts, together with whatever else is wrong in the file.",
            "",
            "| keys | why |",
            "|---|---|",
            *(f"| {', '.join(f'`{key}`' for key in rule.keys)} | {_rule(rule)} |" for rule in rules.RULES),
            "",
            "LLaMA-Factory refuses some more, which work here:",
            "",
            "| | why it can |",
            "|---|---|",
            *(f"| {name} | {why} |" for name, why in rules.WORKS.items()),
            "",
            "## Environment variables",
            "",
            "Those that LLaMA-Factory reads. Where one is set for training and changes nothing, the run says so.",
            "",
            "| variable | here | |",
            "|---|---|---|",
            *(
                f"| `{name}` | {'works' if variable.works else 'no effect'} | {_cell(variable.does)} |"
                for name, variable in ENVIRONMENT.items()
            ),
            "",
            "## Hugging Face training keys of which some values cannot work",
            "",
            *_refusals(RULES),
            "",
            "## Keys that older versions of transformers had",
            "",
            *_refusals(HUGGING_FACE),
            "",
            "## Names that Axolotl and TRL have for keys",
            "",
            "A file with one of them is told the name here. What stands behind it may be written another way.",
            "",
            "| there | here |",
            "|---|---|",
            *(f"| `{theirs}` | `{ours}` |" for theirs, ours in PEERS.items()),
        ]
    )


def _refusals(table: Mapping[str, Refused]) -> list[str]:
    head = ["| key | accepted | otherwise |", "|---|---|---|"]
    return head + [f"| `{key}` | {_accepted(rule)} | {_cell(rule.why)} |" for key, rule in sorted(table.items())]


def _rule(rule: rules.Rule) -> str:
    """A rule's words, with the names of keys where a message has their values."""
    return _cell(re.sub(r"\{(\w+)[^}]*\}", r"*\1*", rule.text))


def _intro(config: type) -> str:
    return prose((config.__doc__ or "").strip().split("\n\n")[0])


def prose(text: str) -> str:
    """A docstring as one line."""
    return " ".join(text.split())


def _accepted(rule: Refused) -> str:
    return "any, without effect" if rule.idle else ", ".join(f"`{_shown(value)}`" for value in rule.accepts)


def _limit(rule: Refused) -> str:
    return _cell(f"Works as {' or '.join(_shown(value) for value in rule.accepts)} only: {rule.why}.")


def _cell(text: str) -> str:
    return prose(text).replace("|", "\\|")


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str) if value != "" else '""'


def default(key: Key) -> str:
    """A key's default, as it is written behind its name."""
    return "  (required)" if key.required else f" = {_shown(key.default)}"


PAGES = {"markdown": keys_page, "compatibility": compatibility_page}


def main(argv: Sequence[str]) -> int:
    """`luthier schema [--markdown | --compatibility]`."""
    flags = parse_command(argv, "schema").flags
    pages = [page for name, page in PAGES.items() if flags[name]]
    print("\n".join(page() for page in pages) or json.dumps(json_schema(), indent=2, default=str))
    return 0
