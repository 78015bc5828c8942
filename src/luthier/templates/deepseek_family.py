"""DeepSeek's models, and Tencent's Hunyuan and Youtu, which took over their words."""

from __future__ import annotations

from dataclasses import replace

from luthier.data.template import BOS, Template

_DEEPSEEK3 = Template(
    user="<｜User｜>{{content}}<｜Assistant｜>",
    opening="<｜Assistant｜>",
    prefix=(BOS,),
    markers=("<｜User｜>", "<｜Assistant｜>"),
)

TEMPLATES = {
    "deepseek": Template(user="User: {{content}}\n\nAssistant:", system="{{content}}\n\n", prefix=(BOS,)),
    "deepseek3": _DEEPSEEK3,
    "deepseekr1": replace(_DEEPSEEK3, reasoning=True),
    "deepseekcoder": Template(
        user="### Instruction:\n{{content}}\n### Response:",
        assistant="\n{{content}}\n<|EOT|>\n",
        prefix=(BOS,),
        stop_words=("<|EOT|>",),
        default_system=(
            "You are an AI programming assistant, utilizing the DeepSeek Coder model, "
            "developed by DeepSeek Company, and you only answer questions related to computer science. "
            "For politically sensitive questions, security and privacy issues, "
            "and other non-computer science questions, you will refuse to answer.\n"
        ),
    ),
    "hy3": Template(
        user="<｜hy_User｜>{{content}}<｜hy_Assistant｜>",
        assistant="{{content}}<｜hy_eos｜>",
        opening="<｜hy_Assistant｜>",
        prefix=(BOS,),
        stop_words=("<｜hy_eos｜>",),
        markers=("<｜hy_User｜>", "<｜hy_Assistant｜>"),
        thought_words=("<think>", "</think>"),
        replace_eos=True,
        reasoning=True,
    ),
    "hunyuan": Template(
        user="{{content}}<|extra_0|>",
        assistant="{{content}}<|eos|>",
        system="{{content}}<|extra_4|>",
        prefix="<|startoftext|>",
        stop_words=("<|eos|>",),
        markers=("<|startoftext|>", "<|extra_0|>", "<|extra_4|>"),
    ),
    "hunyuan_small": Template(
        user="<｜hy_User｜>{{content}}<｜hy_place▁holder▁no▁8｜>",
        assistant="{{content}}<｜hy_place▁holder▁no▁2｜>",
        system="{{content}}<｜hy_place▁holder▁no▁3｜>",
        prefix="<｜hy_begin▁of▁sentence｜>",
        stop_words=("<｜hy_place▁holder▁no▁2｜>",),
        markers=(
            "<｜hy_begin▁of▁sentence｜>",
            "<｜hy_User｜>",
            "<｜hy_place▁holder▁no▁3｜>",
            "<｜hy_place▁holder▁no▁8｜>",
        ),
    ),
    "hy_dense_1_8b": Template(
        user="<｜hy_User｜>{{content}}",
        assistant="<｜hy_Assistant｜>{{content}}",
        system="{{content}}<｜hy_place▁holder▁no▁3｜>",
        prefix=(BOS,),
        stop_words=("<｜hy_place▁holder▁no▁2｜>",),
        markers=("<｜hy_User｜>", "<｜hy_Assistant｜>", "<｜hy_place▁holder▁no▁3｜>"),
        efficient_eos=True,
    ),
    "hy_dense_7b": Template(
        user="{{content}}<|extra_0|>",
        assistant="{{content}}",
        system="{{content}}<|extra_4|>",
        prefix=(BOS,),
        stop_words=("<|eos|>",),
        markers=("<|extra_0|>", "<|extra_4|>"),
        efficient_eos=True,
    ),
    "youtu": Template(
        user="<|User|>{{content}}<|Assistant|>",
        assistant="{{content}}<|end_of_text|>",
        observation="<tool_response>\n{{content}}\n</tool_response><|Assistant|>",
        opening="<|Assistant|>",
        prefix=(BOS,),
        stop_words=("<|end_of_text|>",),
        markers=("<|User|>", "<|Assistant|>"),
        replace_eos=True,
        reasoning=True,
    ),
}
