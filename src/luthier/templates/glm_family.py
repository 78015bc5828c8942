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
    opening="<|assistant|>",
    prefix="[gMASK]<sop>",
    tool_format="glm4",
    stop_words=("<|user|>", "<|observation|>"),
    markers=("[gMASK]", "<sop>", "<|system|>", "<|assistant|>"),
    efficient_eos=True,
)
_GLM4_MOE = replace(_GLM4, tool_format="glm4_moe", reasoning=True)
_GLM4_7 = replace(_GLM4_MOE, thought_words=("<think>", "</think>"), empty_thought="</think>")
_ANSWERS = ("<|user|>", "<|observation|>", "</answer>")

TEMPLATES = {
    "glm4": _GLM4,
    "glm_ocr": _GLM4,
    "glmz1": replace(_GLM4, reasoning=True),
    "glm4v": replace(_GLM4, reasoning=True, stop_words=_ANSWERS),
    "glm4_moe": _GLM4_MOE,
    "glm4_5v": replace(_GLM4_MOE, stop_words=_ANSWERS),
    "glm4_7": _GLM4_7,
    "aeva": replace(
        _GLM4_7,
        default_system=(
            "You are an AI assistant named Aeva created by Zongzhi Lou. "
            "Your answer should be friendly, unbiased, faithful, informative and detailed."
        ),
    ),
    "chatglm3": Template(
        user=(Token("<|user|>"), "\n", "{{content}}", Token("<|assistant|>")),
        assistant=("\n", "{{content}}"),
        system=(Token("<|system|>"), "\n", "{{content}}"),
        function="{{content}}",
        observation=(Token("<|observation|>"), "\n", "{{content}}", Token("<|assistant|>")),
        opening=(Token("<|assistant|>"),),
        prefix=(Token("[gMASK]"), Token("sop")),
        tool_format="glm4",
        stop_words=("<|user|>", "<|observation|>"),
        efficient_eos=True,
    ),
}
