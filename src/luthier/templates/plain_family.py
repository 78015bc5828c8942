"""Templates of plain words, without special tokens but eos: for base models and the early chat models."""

from __future__ import annotations

from luthier.data.template import BOS, EOS, Template

TEMPLATES = {
    "default": Template(
        user=("Human: {{content}}", EOS, "\nAssistant:"),
        assistant=("{{content}}", EOS, "\n"),
        system=("System: {{content}}", EOS, "\n"),
    ),
    "empty": Template(assistant="{{content}}"),
    "alpaca": Template(
        user="### Instruction:\n{{content}}\n\n### Response:\n",
        assistant=("{{content}}", EOS, "\n\n"),
        default_system=(
            "Below is an instruction that describes a task. "
            "Write a response that appropriately completes the request.\n\n"
        ),
    ),
    "vicuna": Template(
        user="USER: {{content}} ASSISTANT:",
        default_system=(
            "A chat between a curious user and an artificial intelligence assistant. "
            "The assistant gives helpful, detailed, and polite answers to the user's questions."
        ),
    ),
    "deepseek": Template(user="User: {{content}}\n\nAssistant:", system="{{content}}\n\n", prefix=(BOS,)),
}
