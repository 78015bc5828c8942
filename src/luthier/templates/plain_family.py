"""Templates of plain words, without special tokens but eos: for base models and the early chat models."""

from __future__ import annotations

from luthier.data.template import BOS, EOS, Template

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
    "vicuna": Template(
        user="USER: {{content}} ASSISTANT:",
        default_system=(
            "A chat between a curious user and an artificial intelligence assistant. "
            "The assistant gives helpful, detailed, and polite answers to the user's questions."
        ),
        replace_chat_template=True,
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
