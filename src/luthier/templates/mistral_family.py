"""Mistral's templates: `[INST]` around what the user says, no header before a response."""

from __future__ import annotations

from dataclasses import replace

from luthier.data.template import BOS, EOS, Template

# Tokenizer v3 of the tekken kind, which writes no blanks.
_TEKKEN = Template(
    user="[INST]{{content}}[/INST]",
    system="{{content}}\n\n",
    function=("[TOOL_CALLS]{{content}}", EOS),
    observation='[TOOL_RESULTS]{"content": {{content}}}[/TOOL_RESULTS]',
    tool_format="mistral",
    prefix=(BOS,),
    fuse_system=True,
)
_V3 = replace(
    _TEKKEN,
    user="[INST] {{content}}[/INST]",
    assistant=(" {{content}}", EOS),
    function=("[TOOL_CALLS] {{content}}", EOS),
    observation='[TOOL_RESULTS] {"content": {{content}}}[/TOOL_RESULTS]',
)

TEMPLATES = {
    "mistral": _V3,
    "llava_next_mistral": _V3,
    "llava_next_video_mistral": _V3,
    "ministral": _TEKKEN,
    "ministral3": _TEKKEN,
    "pixtral": _TEKKEN,
    "mistral_small": replace(_TEKKEN, system="[SYSTEM_PROMPT]{{content}}[/SYSTEM_PROMPT]", fuse_system=False),
    "breeze": Template(user="[INST] {{content}} [/INST] ", prefix=(BOS,), efficient_eos=True),
}
