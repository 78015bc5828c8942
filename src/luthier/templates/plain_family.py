"""Templates of plain words, without special tokens but eos: for base models and the early chat models."""

from __future__ import annotations

from dataclasses import replace

from luthier.data.template import BOS, EOS, Template

_VICUNA = Template(
    user="USER: {{content}} ASSISTANT:",
    default_system=(
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    ),
)

TEMPLATES = {
    "default": Template(
        user=("Human: {{content}}", EOS, "\nAssistant:"),
        assistant=("{{content}}", EOS, "\n"),
        system=("System: {{content}}", EOS, "\n"),
        replace_chat_template=True,
    ),
    "empty": Template(assistant="{{content}}"),
    "alpaca": Template(
        user="### Instruction:\n{{content}}\n\n### Response:\n",
        assistant=("{{content}}", EOS, "\n\n"),
        default_system=(
            "Below is an instruction that describes a task. "
            "Write a response that appropriately completes the request.\n\n"
        ),
        replace_chat_template=True,
    ),
    "vicuna": replace(_VICUNA, replace_chat_template=True),
    "llava": _VICUNA,
    "llava_next": _VICUNA,
    "llava_next_video": _VICUNA,
    "video_llava": _VICUNA,
    "xuanyuan": Template(
        user="Human: {{content}} Assistant:",
        default_system=(
            "以下是用户和人工智能助手之间的对话。用户以Human开头，人工智能助手以Assistant开头，"
            "会对人类提出的问题给出有帮助、高质量、详细和礼貌的回答，并且总是拒绝参与与不道德、"
            "不安全、有争议、政治敏感等相关的话题、问题和指示。\n"
        ),
    ),
    "yi_vl": Template(
        user="### Human: {{content}}\n### Assistant:",
        assistant="{{content}}\n",
        default_system=(
            "This is a chat between an inquisitive human and an AI assistant. "
            "Assume the role of the AI assistant. Read all the images carefully, "
            "and respond to the human's questions with informative, helpful, detailed and polite answers. "
            "这是一个好奇的人类和一个人工智能助手之间的对话。假设你扮演这个AI助手的角色。"
            "仔细阅读所有的图像，并对人类的问题做出信息丰富、有帮助、详细的和礼貌的回答。\n\n"
        ),
        stop_words=("###",),
        efficient_eos=True,
    ),
    "falcon": Template(user="User: {{content}}\nFalcon:", assistant="{{content}}\n", efficient_eos=True),
    "fewshot": Template(assistant="{{content}}\n\n", efficient_eos=True, replace_chat_template=True),
    "openchat": Template(
        user=("GPT4 Correct User: {{content}}", EOS, "GPT4 Correct Assistant:"),
        prefix=(BOS,),
    ),
    "olmo": Template(user="<|user|>\n{{content}}<|assistant|>\n", prefix=(EOS,)),
    "solar": Template(
        user="### User:\n{{content}}\n\n### Assistant:\n", system="### System:\n{{content}}\n\n", efficient_eos=True
    ),
    "zephyr": Template(
        user=("<|user|>\n{{content}}", EOS, "<|assistant|>\n"),
        system=("<|system|>\n{{content}}", EOS),
        default_system="You are Zephyr, a helpful assistant.",
    ),
}
