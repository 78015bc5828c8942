"""Microsoft's Phi, IBM's Granite, Cohere's Command and others that mark each role with tokens of their own."""

from __future__ import annotations

from luthier.data.template import BOS, EOS, Template

TEMPLATES = {
    "phi": Template(
        user="<|user|>\n{{content}}<|end|>\n<|assistant|>\n",
        assistant="{{content}}<|end|>\n",
        system="<|system|>\n{{content}}<|end|>\n",
        stop_words=("<|end|>",),
        markers=("<|user|>", "<|assistant|>", "<|system|>"),
        replace_eos=True,
    ),
    "phi4": Template(
        user="<|im_start|>user<|im_sep|>{{content}}<|im_end|><|im_start|>assistant<|im_sep|>",
        assistant="{{content}}<|im_end|>",
        system="<|im_start|>system<|im_sep|>{{content}}<|im_end|>",
        stop_words=("<|im_end|>",),
        markers=("<|im_start|>", "<|im_sep|>"),
        replace_eos=True,
    ),
    "granite3": Template(
        user=(
            "<|start_of_role|>user<|end_of_role|>{{content}}<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>"
        ),
        assistant="{{content}}<|end_of_text|>\n",
        system="<|start_of_role|>system<|end_of_role|>{{content}}<|end_of_text|>\n",
        stop_words=("<|end_of_text|>",),
        markers=("<|start_of_role|>", "<|end_of_role|>"),
    ),
    "cohere": Template(
        user=(
            "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>{{content}}<|END_OF_TURN_TOKEN|>"
            "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"
        ),
        system="<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>{{content}}<|END_OF_TURN_TOKEN|>",
        prefix=(BOS,),
        markers=(
            "<|START_OF_TURN_TOKEN|>",
            "<|END_OF_TURN_TOKEN|>",
            "<|SYSTEM_TOKEN|>",
            "<|USER_TOKEN|>",
            "<|CHATBOT_TOKEN|>",
        ),
    ),
    "exaone": Template(
        user="[|user|]{{content}}\n[|assistant|]",
        assistant=("{{content}}", EOS, "\n"),
        system="[|system|]{{content}}[|endofturn|]\n",
    ),
    "moonlight": Template(
        user="<|im_user|>user<|im_middle|>{{content}}<|im_end|><|im_assistant|>assistant<|im_middle|>",
        assistant="{{content}}<|im_end|>",
        system="<|im_system|>system<|im_middle|>{{content}}<|im_end|>",
        default_system="You are a helpful assistant provided by Moonshot-AI.",
        stop_words=("<|im_end|>",),
        markers=("<|im_user|>", "<|im_assistant|>", "<|im_system|>", "<|im_middle|>"),
        replace_eos=True,
    ),
    "seed_coder": Template(
        user=(BOS, "user\n{{content}}", EOS, BOS, "assistant\n"),
        system=(BOS, "system\n{{content}}", EOS),
        default_system=(
            "You are an AI programming assistant, utilizing the Seed-Coder model, developed by ByteDance Seed, "
            "and you only answer questions related to computer science. For politically sensitive questions, "
            "security and privacy issues, and other non-computer science questions, you will refuse to answer.\n\n"
        ),
    ),
}
