"""Llama's and Mistral's own templates."""

from __future__ import annotations

from dataclasses import replace

from luthier.data.template import BOS, EOS, Template

_LLAMA2 = Template(
    user=(BOS, "[INST] {{content}} [/INST]"),
    system="<<SYS>>\n{{content}}\n<</SYS>>\n\n",
    fuse_system=True,
)

_TEKKEN = Template(
    user="[INST]{{content}}[/INST]",
    system="{{content}}\n\n",
    function=("[TOOL_CALLS]{{content}}", EOS),
    observation='[TOOL_RESULTS]{"content": {{content}}}[/TOOL_RESULTS]',
    tool_format="mistral",
    prefix=(BOS,),
    fuse_system=True,
)

TEMPLATES = {
    "llama2": _LLAMA2,
    "llama2_zh": replace(_LLAMA2, default_system="You are a helpful assistant. 你是一个乐于助人的助手。"),
    "llama3": Template(
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
        tool_format="llama3",
        prefix=(BOS,),
        stop_words=("<|eot_id|>", "<|eom_id|>"),
        markers=("<|start_header_id|>", "<|end_header_id|>"),
        replace_eos=True,
        document_end="<|end_of_text|>",
    ),
    "llama4": Template(
        user="<|header_start|>user<|header_end|>\n\n{{content}}<|eot|><|header_start|>assistant<|header_end|>\n\n",
        assistant="{{content}}<|eot|>",
        system="<|header_start|>system<|header_end|>\n\n{{content}}<|eot|>",
        observation=(
            "<|header_start|>ipython<|header_end|>\n\n{{content}}<|eot|><|header_start|>assistant<|header_end|>\n\n"
        ),
        tool_format="llama3",
        prefix=(BOS,),
        stop_words=("<|eot|>", "<|eom|>"),
        markers=("<|header_start|>", "<|header_end|>"),
        replace_eos=True,
    ),
    "mistral": replace(
        _TEKKEN,
        user="[INST] {{content}}[/INST]",
        assistant=(" {{content}}", EOS),
        function=("[TOOL_CALLS] {{content}}", EOS),
        observation='[TOOL_RESULTS] {"content": {{content}}}[/TOOL_RESULTS]',
    ),
    "ministral": _TEKKEN,
    "mistral_small": replace(_TEKKEN, system="[SYSTEM_PROMPT]{{content}}[/SYSTEM_PROMPT]", fuse_system=False),
}
