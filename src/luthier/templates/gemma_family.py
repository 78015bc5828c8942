"""Google's Gemma: `<start_of_turn>role`, no system role of its own."""

from __future__ import annotations

from dataclasses import replace

from luthier.data.template import BOS, Template

_GEMMA = Template(
    user="<start_of_turn>user\n{{content}}<end_of_turn>\n<start_of_turn>model\n",
    assistant="{{content}}<end_of_turn>\n",
    system="{{content}}\n\n",
    observation="<start_of_turn>tool\n{{content}}<end_of_turn>\n<start_of_turn>model\n",
    prefix=(BOS,),
    stop_words=("<end_of_turn>",),
    markers=("<start_of_turn>",),
    replace_eos=True,
    fuse_system=True,
)

TEMPLATES = {
    "gemma": _GEMMA,
    "gemma2": replace(_GEMMA, stop_words=("<eos>", "<end_of_turn>"), replace_eos=False, efficient_eos=True),
    "gemma3": _GEMMA,
    "gemma3n": _GEMMA,
}
