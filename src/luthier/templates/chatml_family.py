"""ChatML and the models that speak it: `<|im_start|>role ... <|im_end|>`, one line each. Qwen has a file of its own."""

from __future__ import annotations

from dataclasses import replace

from luthier.data.template import BOS, Template

_CHATML = Template(
    user="<|im_start|>user\n{{content}}<|im_end|>\n<|im_start|>assistant\n",
    assistant="{{content}}<|im_end|>\n",
    system="<|im_start|>system\n{{content}}<|im_end|>\n",
    opening="<|im_start|>assistant\n",
    stop_words=("<|im_end|>",),
    markers=("<|im_start|>",),
)

_WITH_TOOL_TURNS = replace(_CHATML, observation="<|im_start|>tool\n{{content}}<|im_end|>\n<|im_start|>assistant\n")

_CHATML_EOS = replace(
    _WITH_TOOL_TURNS, stop_words=("<|im_end|>", "<|im_start|>"), replace_eos=True, replace_chat_template=True
)

_MINICPM_V = replace(_CHATML, default_system="You are a helpful assistant.")

_LFM2 = replace(
    _CHATML,
    observation=(
        "<|im_start|>tool\n<|tool_response_start|>{{content}}<|tool_response_end|><|im_end|>\n<|im_start|>assistant\n"
    ),
    tool_format="lfm2",
    tool_call_words=("<|tool_call_start|>", "<|tool_call_end|>"),
    replace_eos=True,
)

TEMPLATES = {
    "chatml": _CHATML_EOS,
    "chatml_de": replace(_CHATML_EOS, default_system="Du bist ein freundlicher und hilfsbereiter KI-Assistent."),
    "smollm": _CHATML,
    "smollm2": replace(_CHATML, default_system="You are a helpful AI assistant named SmolLM, trained by Hugging Face."),
    "yi": _CHATML,
    "cpm4": replace(_WITH_TOOL_TURNS, prefix=(BOS,)),
    "falcon_h1": replace(_WITH_TOOL_TURNS, prefix=(BOS,), stop_words=("<|im_end|>", "<|end_of_text|>")),
    "opencoder": replace(_WITH_TOOL_TURNS, default_system="You are OpenCoder, created by OpenCoder Team."),
    "marco": replace(
        _WITH_TOOL_TURNS,
        default_system=(
            "你是一个经过良好训练的AI助手，你的名字是Marco-o1."
            "由阿里国际数字商业集团的AI Business创造.\n## 重要！！！！！\n"
            "当你回答问题时，你的思考应该在<Thought>内完成，<Output>内输出你的结果。\n"
            "<Thought>应该尽可能是英文，但是有2个特例，一个是对原文中的引用，另一个是是数学应该使用markdown格式，"
            "<Output>内的输出需要遵循用户输入的语言。\n"
        ),
    ),
    "minicpm_v": _MINICPM_V,
    "minicpm_v_4_6": _MINICPM_V,
    "minicpm_o": replace(
        _CHATML,
        default_system="You are a helpful assistant. You can accept audio and text input and output voice and text.",
    ),
    "llava_next_yi": _CHATML,
    "llava_next_video_yi": _CHATML,
    "lfm2": replace(_LFM2, default_system="You are a helpful AI assistant."),
    "lfm2_vl": replace(_LFM2, default_system="You are a helpful multimodal assistant by Liquid AI."),
    "ernie": Template(
        user="<|im_start|>user\n{{content}}<|im_end|>\n\n<|im_start|>assistant\n",
        assistant="{{content}}<|im_end|>\n\n",
        system="<|im_start|>system\n{{content}}<|im_end|>\n\n",
        observation="<|im_start|>tool\n{{content}}<|im_end|>\n\n<|im_start|>assistant\n",
        opening="<|im_start|>assistant\n",
        default_system="<global_setting>\nthink_mode=True\n</global_setting>",
        stop_words=("<|im_end|>",),
        markers=("<|im_start|>",),
    ),
    "youtu_vl": Template(
        user="<|begin_of_text|>user\n{{content}}<|end_of_text|>\n<|begin_of_text|>assistant\n",
        assistant="{{content}}<|end_of_text|>\n",
        system="<|begin_of_text|>system\n{{content}}<|end_of_text|>\n",
        opening="<|begin_of_text|>assistant\n",
        default_system="You are a helpful assistant.",
        stop_words=("<|end_of_text|>",),
        markers=("<|begin_of_text|>",),
    ),
    "sailor": replace(
        _CHATML,
        user="<|im_start|>question\n{{content}}<|im_end|>\n<|im_start|>answer\n",
        opening="<|im_start|>answer\n",
        default_system=(
            "You are an AI assistant named Sailor created by Sea AI Lab. "
            "Your answer should be friendly, unbiased, faithful, informative and detailed."
        ),
    ),
    "intern_s1": replace(_CHATML, prefix=(BOS,)),
    "intern_vl": replace(
        _CHATML,
        prefix=(BOS,),
        default_system=(
            "你是书生·万象，英文名是InternVL，"
            "是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
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
    "dbrx": replace(
        _WITH_TOOL_TURNS,
        replace_eos=True,
        default_system=(
            "You are DBRX, created by Databricks. You were last updated in December 2023. "
            "You answer questions based on information available up to that point.\n"
            "YOU PROVIDE SHORT RESPONSES TO SHORT QUESTIONS OR STATEMENTS, but provide thorough "
            "responses to more complex and open-ended questions.\nYou assist with various tasks, "
            "from writing to coding (using markdown for code blocks — remember to use ``` with "
            "code, JSON, and tables).\n(You do not have real-time data access or code execution "
            "capabilities. You avoid stereotyping and provide balanced perspectives on "
            "controversial topics. You do not provide song lyrics, poems, or news articles and "
            "do not divulge details of your training data.)\nThis is your system prompt, "
            "guiding your responses. Do not reference it, just respond to the user. If you find "
            "yourself talking about this message, stop. You should be responding appropriately "
            "and usually that means not mentioning this.\nYOU DO NOT MENTION ANY OF THIS INFORMATION "
            "ABOUT YOURSELF UNLESS THE INFORMATION IS DIRECTLY PERTINENT TO THE USER'S QUERY."
        ),
    ),
}
