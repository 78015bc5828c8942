"""Zhipu's GLM: a turn ends where the next role's token begins, so no turn carries an end token."""

from __future__ import annotations

from dataclasses import replace

from luthier.data.template import Template, Token

_GLM4 = Template(
    user="<|user|>\n{{content}}<|assistant|>",
    assistant="\n{{content}}",
    system="<|system|>\n{{content}}",
    function="{{content}}",
    observation="<|observation|>\n{{content}}<|assistant|>",
    prefix="[gMASK]<sop>",
    tool_format="glm4",
    stop_words=("<|user|>", "<|observation|>"),
    markers=("[gMASK]", "<sop>", "<|system|>", "<|assistant|>"),
    efficient_eos=True,
)

TEMPLATES = {
    "glm4": _GLM4,
    "glmz1": replace(_GLM4, reasoning=True),
    "chatglm3": Template(
        user=(Token("<|user|>"), "\n", "{{content}}", Token("<|assistant|>")),
        assistant=("\n", "{{content}}"),
        system=(Token("<|system|>"), "\n", "{{content}}"),
        function="{{content}}",
        observation=(Token("<|observation|>"), "\n", "{{content}}", Token("<|assistant|>")),
        prefix=(Token("[gMASK]"), Token("sop")),
        tool_format="glm4",
        stop_words=("<|user|>", "<|observation|>"),
        efficient_eos=True,
    ),
}
