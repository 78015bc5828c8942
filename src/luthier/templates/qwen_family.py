"""Qwen and the models that took over its ChatML, with results of tools inside user turns."""

from __future__ import annotations

from dataclasses import replace

from luthier.data.template import Template

_QWEN = Template(
    user="<|im_start|>user\n{{content}}<|im_end|>\n<|im_start|>assistant\n",
    assistant="{{content}}<|im_end|>\n",
    system="<|im_start|>system\n{{content}}<|im_end|>\n",
    observation="<|im_start|>user\n<tool_response>\n{{content}}\n</tool_response><|im_end|>\n<|im_start|>assistant\n",
    opening="<|im_start|>assistant\n",
    results_joint="\n</tool_response>\n<tool_response>\n",
    tool_format="qwen",
    stop_words=("<|im_end|>",),
    markers=("<|im_start|>",),
    replace_eos=True,
)
_HELPFUL = replace(_QWEN, default_system="You are a helpful assistant.")
_THINKING = replace(_QWEN, reasoning=True)

TEMPLATES = {
    "qwen": replace(_QWEN, default_system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
    "qwen2_vl": _HELPFUL,
    "qwen2_audio": replace(_HELPFUL, observation=None, results_joint=None, tool_format="default"),
    "qwen2_omni": _HELPFUL,
    "qwen3": _THINKING,
    "qwen3_nothink": _QWEN,
    "qwen3_vl": _THINKING,
    "qwen3_vl_nothink": _QWEN,
    "qwen3_omni": _THINKING,
    "qwen3_omni_nothink": _QWEN,
    "qwen3_5": replace(_THINKING, tool_format="qwen3_5"),
    "qwen3_5_nothink": replace(_QWEN, tool_format="qwen3_5"),
    "qwen3_6": replace(_THINKING, tool_format="qwen3_5"),
    "keye_vl": _THINKING,
    "mimo": replace(_HELPFUL, reasoning=True),
    "mimo_v2": replace(
        _THINKING,
        thought_words=("<think>", "</think>"),
        default_system="You are MiMo, a helpful AI assistant engineered by Xiaomi.",
    ),
    "mimo_vl": replace(_THINKING, default_system="You are MiMo, an AI assistant developed by Xiaomi."),
    "moss_vl": replace(_QWEN, trim_tools=True),
    "llava_next_qwen": _HELPFUL,
}
