"""Google's Gemma: `<start_of_turn>role`, no system role before Gemma 4."""

from __future__ import annotations

from dataclasses import replace

from luthier.data.template import BOS, Template

_GEMMA = Template(
    user="<start_of_turn>user\n{{content}}<end_of_turn>\n<start_of_turn>model\n",
    assistant="{{content}}<end_of_turn>\n",
    system="{{content}}\n\n",
    observation="<start_of_turn>tool\n{{content}}<end_of_turn>\n<start_of_turn>model\n",
    opening="<start_of_turn>model\n",
    prefix=(BOS,),
    stop_words=("<end_of_turn>",),
    markers=("<start_of_turn>",),
    replace_eos=True,
    fuse_system=True,
)

# The system prompt asks for thoughts, and there always is one; `template: auto` knows it without them.
_GEMMA4 = Template(
    user="<|turn>user\n{{content}}<turn|>\n<|turn>model\n",
    assistant="{{content}}<turn|>\n",
    system="<|turn>system\n<|think|>{{content}}<turn|>\n",
    observation="<|turn>tool\n{{content}}<turn|>\n<|turn>model\n",
    opening="<|turn>model\n",
    tool_format="gemma4",
    prefix=(BOS,),
    default_system="You are a helpful assistant.",
    stop_words=("<turn|>",),
    markers=("<|turn>", "<|think|>", "<|channel>", "<channel|>"),
    thought_words=("<|channel>thought\n", "<channel|>"),
    replace_eos=True,
    reasoning=True,
)

TEMPLATES = {
    "gemma": _GEMMA,
    "gemma2": replace(_GEMMA, stop_words=("<eos>", "<end_of_turn>"), replace_eos=False, efficient_eos=True),
    "gemma3": _GEMMA,
    "gemma3n": _GEMMA,
    "gemma4": _GEMMA4,
    "gemma4n": _GEMMA4,
    "gemma4n_nothink": replace(
        _GEMMA4, system="<|turn>system\n{{content}}<turn|>\n", default_system="", reasoning=False
    ),
    "paligemma": Template(user="{{content}}\n", prefix=(BOS,), fuse_system=True),
    "paligemma_chat": replace(_GEMMA, system="{{content}}"),
}
