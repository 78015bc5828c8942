"""ChatML and the models that speak it: `<|im_start|>role ... <|im_end|>`, one line each."""

from __future__ import annotations

from dataclasses import replace

from luthier.data.template import BOS, Template

_CHATML = Template(
    user="<|im_start|>user\n{{content}}<|im_end|>\n<|im_start|>assistant\n",
    assistant="{{content}}<|im_end|>\n",
    system="<|im_start|>system\n{{content}}<|im_end|>\n",
    stop_words=("<|im_end|>",),
    markers=("<|im_start|>",),
)

_WITH_TOOL_TURNS = replace(_CHATML, observation="<|im_start|>tool\n{{content}}<|im_end|>\n<|im_start|>assistant\n")

_QWEN3 = replace(
    _CHATML,
    observation=("<|im_start|>user\n<tool_response>\n{{content}}\n</tool_response><|im_end|>\n<|im_start|>assistant\n"),
    tool_format="qwen",
    replace_eos=True,
)

_CHATML_EOS = replace(
    _WITH_TOOL_TURNS, stop_words=("<|im_end|>", "<|im_start|>"), replace_eos=True, replace_chat_template=True
)

TEMPLATES = {
    "chatml": _CHATML_EOS,
    "chatml_de": replace(_CHATML_EOS, default_system="Du bist ein freundlicher und hilfsbereiter KI-Assistent."),
    "qwen": replace(_QWEN3, default_system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
    "qwen3": replace(_QWEN3, reasoning=True),
    "qwen3_nothink": _QWEN3,
    "smollm": _CHATML,
    "smollm2": replace(_CHATML, default_system="You are a helpful AI assistant named SmolLM, trained by Hugging Face."),
    "yi": _CHATML,
    "cpm4": replace(_WITH_TOOL_TURNS, prefix=(BOS,)),
    "falcon_h1": replace(_WITH_TOOL_TURNS, prefix=(BOS,), stop_words=("<|im_end|>", "<|end_of_text|>")),
    "intern_s1": replace(_CHATML, prefix=(BOS,)),
    "mimo": replace(_QWEN3, reasoning=True, default_system="You are a helpful assistant."),
    "opencoder": replace(_WITH_TOOL_TURNS, default_system="You are OpenCoder, created by OpenCoder Team."),
    "sailor": replace(
        _CHATML,
        user="<|im_start|>question\n{{content}}<|im_end|>\n<|im_start|>answer\n",
        default_system=(
            "You are an AI assistant named Sailor created by Sea AI Lab. "
            "Your answer should be friendly, unbiased, faithful, informative and detailed."
        ),
    ),
    "intern2": replace(
        _CHATML,
        prefix=(BOS,),
        default_system=(
            "You are an AI assistant whose name is InternLM (书生·浦语).\n"
            "- InternLM (书生·浦语) is a conversational language model that is developed by Shanghai AI Laboratory "
            "(上海人工智能实验室). It is designed to be helpful, honest, and harmless.\n"
            "- InternLM (书生·浦语) can understand and communicate fluently in the language "
            "chosen by the user such as English and 中文."
        ),
    ),
}
