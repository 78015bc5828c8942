"""Chat templates as data: lists of slots. `slot_template.py` turns messages into ids with them.

The catalogue is `luthier/templates/`; each file there has `TEMPLATES: dict[str, Template]`. The ids are those of
LLaMA-Factory's templates of the same names: every string of a slot list is tokenised on its own, bos and eos are
ids, and what stands after the prompt is the response with its end-of-turn marker.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

from luthier.core.errors import ConfigError
from luthier.core.log import get_logger
from luthier.core.registry import every, miss
from luthier.data.tools import tool_format

log = get_logger("data.template")

AUTO = "auto"
"""The value of `template` that says what unset says: the tokenizer's own."""


@dataclass(frozen=True, kw_only=True)
class TemplateConfig:
    """How messages become tokens."""

    template: str | None = None
    """Name of the chat template; unset or auto: the tokenizer's own. It must be the one the model was trained with."""
    default_system: str | None = None
    """System prompt of conversations that bring none; unset: the template's."""
    enable_thinking: bool | None = True
    """Reasoning templates. true: thoughts are trained, turns without one train an empty one; false: thoughts are
    removed and an empty one stands in the prompt; null: thoughts are kept, an empty one in the prompt if missing."""
    preserve_thinking: bool = False
    """Reasoning templates: the model goes on seeing the thoughts of its earlier turns. Off: they vanish from history
    when the model is asked, and where only the last response is trained."""
    branch_thinking: bool = False
    """Reasoning templates over several turns: train each response after the history that it will be asked with, from
    which thoughts have vanished, as a branch of its own. Off: one sequence that keeps every thought, as LLaMA-Factory
    trains it. The tokenizer's own template always branches."""
    tool_format: str | None = None
    """How tools and their calls are written, a name of tool_formats/ (default, qwen, llama3, mistral, glm4 ...);
    unset: the template's way."""
    date_string: str = "26 Jul 2024"
    """The day that templates with a date in the prompt are told (Llama 3 with tools, gpt-oss); never the clock's, so
    that tokens repeat."""
    efficient_eos: bool | None = None
    """Whether only the end of a conversation carries eos, not each turn; unset: as the template has it."""
    replace_eos: bool | None = None
    """Whether the template's first stop word becomes the tokenizer's eos; unset: as the template has it."""


class Special(Enum):
    """A slot that is an id of the tokenizer, left out if the tokenizer has none."""

    BOS = "bos"
    EOS = "eos"


BOS, EOS = Special.BOS, Special.EOS


@dataclass(frozen=True, slots=True)
class Token:
    """A slot that is one token of the vocabulary, looked up by its text."""

    text: str


Slots = str | tuple[str | Special | Token, ...]
"""What a message becomes. `{{content}}` stands for its text, `{{idx}}` for the number of the exchange (user and
observation). One string stands for a tuple of one."""

Parts = tuple[str | Special | Token, ...]


@dataclass(frozen=True, kw_only=True)
class Template:
    """A chat template. Unset slots follow others, as said under each."""

    user: Slots = "{{content}}"
    assistant: Slots | None = None
    """Unset: the text and eos, or only the text if `efficient_eos`."""
    system: Slots = "{{content}}"
    function: Slots | None = None
    """Unset: those of assistant."""
    observation: Slots | None = None
    """Unset: those of user."""
    prefix: Slots = ()
    """Before everything else."""
    opening: Slots | None = None
    """What begins a response: the end of the slots of user and observation. Where no response follows it is left out,
    where one response follows another it is put between them. Unset: turns must alternate."""
    results_joint: str | None = None
    """What stands between the answers of several tools in a row, which then are one turn; unset: see `joint`."""
    tool_format: str = "default"
    default_system: str = ""
    stop_words: tuple[str, ...] = ()
    """Tokens that end a response beside eos; those the vocabulary lacks are no use and left out."""
    markers: tuple[str, ...] = ()
    """Special tokens the slots write, beside the stop words: the vocabulary must have them."""
    thought_words: tuple[str, str] = ("<think>\n", "\n</think>\n\n")
    empty_thought: str | None = None
    """A thought with nothing in it; unset: the two words."""
    tool_call_words: tuple[str, str] = ("<tool_call>", "</tool_call>")
    efficient_eos: bool = False
    """Turns carry no end token; the stage puts eos at the end of the conversation."""
    replace_eos: bool = False
    """The first stop word becomes the tokenizer's eos."""
    fuse_system: bool = False
    """The system prompt stands inside the first user message."""
    trim_tools: bool = False
    """The list of tools loses its leading line breaks where no system prompt stands before it."""
    reasoning: bool = False
    """Thoughts follow the rules of `data/reasoning.py`."""
    replace_chat_template: bool = False
    """The tokenizer's own chat template gives way to this one when saved: no model's maker ships this one."""
    document_end: str | None = None
    """What ends a pre-training document; unset: eos."""

    @property
    def joint(self) -> str | None:
        """What stands between the answers of several tools in a row; None: each is a turn. Where turns must alternate,
        answers in a row have to be one."""
        return "\n" if self.results_joint is None and self.opening is None else self.results_joint

    def slots(self, role: str) -> Parts:
        """The slots of a role, or of "system" or "prefix" or "opening", with those left unset filled in."""
        assistant = (
            self.assistant if self.assistant is not None else ("{{content}}",) + (EOS,) * (not self.efficient_eos)
        )
        table = {
            "prefix": self.prefix,
            "opening": self.opening or (),
            "system": self.system,
            "user": self.user,
            "observation": self.user if self.observation is None else self.observation,
            "assistant": assistant,
            "function": assistant if self.function is None else self.function,
        }
        found = table[role]
        return (found,) if isinstance(found, str) else found

    def without_opening(self, role: str) -> Parts:
        """The slots of user or observation where no response follows."""
        slots, opening = self.slots(role), self.slots("opening")
        if not opening:
            return slots
        first, *rest = opening
        at = len(slots) - len(rest) - 1
        before, last = slots[:at], slots[at]
        if list(slots[at + 1 :]) == rest and isinstance(last, str) and isinstance(first, str) and last.endswith(first):
            return (*before, last.removesuffix(first)) if last != first else before
        if slots[at:] != opening:
            raise ValueError(f"the slots of {role} must end with the opening {opening}, got {slots}")
        return before


def find_template(name: str) -> Template:
    """A template of the catalogue or of a plugin; ConfigError names the nearest."""
    catalogue: dict[str, Template] = {}
    for module in every("templates"):
        twice = sorted(catalogue.keys() & module.TEMPLATES.keys())
        if twice:
            raise ConfigError(f"{module.__file__} defines templates that another file defines: {', '.join(twice)}.")
        catalogue.update(module.TEMPLATES)
    if name not in catalogue:
        raise ConfigError(f"template: {miss('template', name, sorted(catalogue))}")
    return catalogue[name]


def customise(template: Template, config: TemplateConfig) -> Template:
    """A new template with what the configuration changes."""
    if config.tool_format is not None and config.tool_format != template.tool_format:
        tool_format(config.tool_format)
        template = replace(template, tool_format=config.tool_format, function=None)
    if config.default_system is not None:
        template = replace(template, default_system=config.default_system)
    if config.efficient_eos is not None and config.efficient_eos != template.efficient_eos:
        template = _with_efficient_eos(template, config)
    if config.replace_eos is not None:
        if config.replace_eos and not template.stop_words:
            raise ConfigError(f"replace_eos: template {config.template!r} has no stop word to make eos of.")
        template = replace(template, replace_eos=config.replace_eos)
    if not template.reasoning and (
        config.enable_thinking is False or config.preserve_thinking or config.branch_thinking
    ):
        log.warning(
            "template %r has no thoughts: enable_thinking, preserve_thinking and branch_thinking have no effect.",
            config.template,
        )
    return template


def _with_efficient_eos(template: Template, config: TemplateConfig) -> Template:
    changed = {}
    for role in ("assistant", "function"):
        slots = template.slots(role)
        if not config.efficient_eos:
            changed[role] = (*slots, EOS)
        elif slots[-1] is EOS:
            changed[role] = slots[:-1]
        else:
            raise ConfigError(
                f"efficient_eos: template {config.template!r} ends its turns with {slots[-1]!r}, not with eos; "
                f"leave efficient_eos out."
            )
    return replace(template, efficient_eos=bool(config.efficient_eos), **changed)
