"""Llama's own templates, and what was built on them."""

from __future__ import annotations

from dataclasses import replace

from luthier.data.template import BOS, Template

_LLAMA2 = Template(
    user=(BOS, "[INST] {{content}} [/INST]"),
    system="<<SYS>>\n{{content}}\n<</SYS>>\n\n",
    fuse_system=True,
)

_LLAMA3 = Template(
    user=(
        "<|start_header_id|>user<|end_header_id|>\n\n{{content}}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    assistant="{{content}}<|eot_id|>",
    system="<|start_header_id|>system<|end_header_id|>\n\n{{content}}<|eot_id|>",
    observation=(
        "<|start_header_id|>ipython<|end_header_id|>\n\n{{content}}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    opening="<|start_header_id|>assistant<|end_header_id|>\n\n",
    tool_format="llama3",
    prefix=(BOS,),
    stop_words=("<|eot_id|>", "<|eom_id|>"),
    markers=("<|start_header_id|>", "<|end_header_id|>"),
    replace_eos=True,
)

TEMPLATES = {
    "llama2": _LLAMA2,
    "llama2_zh": replace(_LLAMA2, default_system="You are a helpful assistant. 你是一个乐于助人的助手。"),
    "llama3": replace(_LLAMA3, document_end="<|end_of_text|>"),
    "mllama": _LLAMA3,
    "skywork_o1": replace(
        _LLAMA3,
        replace_eos=False,
        default_system=(
            "You are Skywork-o1, a thinking model developed by Skywork AI, specializing in solving complex problems "
            "involving mathematics, coding, and logical reasoning through deep thought. When faced with a user's "
            "request, you first engage in a lengthy and in-depth thinking process to explore possible solutions to "
            "the problem. After completing your thoughts, you then provide a detailed explanation of the solution "
            "process in your response."
        ),
    ),
    "llava_next_llama3": _LLAMA3,
    "llama4": Template(
        user="<|header_start|>user<|header_end|>\n\n{{content}}<|eot|><|header_start|>assistant<|header_end|>\n\n",
        assistant="{{content}}<|eot|>",
        system="<|header_start|>system<|header_end|>\n\n{{content}}<|eot|>",
        observation=(
            "<|header_start|>ipython<|header_end|>\n\n{{content}}<|eot|><|header_start|>assistant<|header_end|>\n\n"
        ),
        opening="<|header_start|>assistant<|header_end|>\n\n",
        tool_format="llama3",
        prefix=(BOS,),
        stop_words=("<|eot|>", "<|eom|>"),
        markers=("<|header_start|>", "<|header_end|>"),
        replace_eos=True,
    ),
    "openchat-3.6": Template(
        user=(
            "<|start_header_id|>GPT4 Correct User<|end_header_id|>\n\n{{content}}<|eot_id|>"
            "<|start_header_id|>GPT4 Correct Assistant<|end_header_id|>\n\n"
        ),
        opening="<|start_header_id|>GPT4 Correct Assistant<|end_header_id|>\n\n",
        prefix=(BOS,),
        stop_words=("<|eot_id|>",),
        markers=("<|start_header_id|>", "<|end_header_id|>"),
    ),
}
