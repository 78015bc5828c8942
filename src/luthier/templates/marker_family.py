"""Microsoft's Phi, IBM's Granite, Cohere's Command and others that mark each role with tokens of their own."""

from __future__ import annotations

from dataclasses import replace

from luthier.data.template import BOS, EOS, Template, Token

_PHI = Template(
    user="<|user|>\n{{content}}<|end|>\n<|assistant|>\n",
    assistant="{{content}}<|end|>\n",
    system="<|system|>\n{{content}}<|end|>\n",
    opening="<|assistant|>\n",
    stop_words=("<|end|>",),
    markers=("<|user|>", "<|assistant|>", "<|system|>"),
    replace_eos=True,
)

_GRANITE = Template(
    user="<|start_of_role|>user<|end_of_role|>{{content}}<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>",
    assistant="{{content}}<|end_of_text|>\n",
    system="<|start_of_role|>system<|end_of_role|>{{content}}<|end_of_text|>\n",
    opening="<|start_of_role|>assistant<|end_of_role|>",
    stop_words=("<|end_of_text|>",),
    markers=("<|start_of_role|>", "<|end_of_role|>"),
)

_MOONSHOT = Template(
    user="<|im_user|>user<|im_middle|>{{content}}<|im_end|><|im_assistant|>assistant<|im_middle|>",
    assistant="{{content}}<|im_end|>",
    system="<|im_system|>system<|im_middle|>{{content}}<|im_end|>",
    opening="<|im_assistant|>assistant<|im_middle|>",
    stop_words=("<|im_end|>",),
    markers=("<|im_user|>", "<|im_assistant|>", "<|im_system|>", "<|im_middle|>"),
)

TEMPLATES = {
    "phi": _PHI,
    "phi_small": replace(_PHI, prefix=(Token("<|endoftext|>"),)),
    "phi4": Template(
        user="<|im_start|>user<|im_sep|>{{content}}<|im_end|><|im_start|>assistant<|im_sep|>",
        assistant="{{content}}<|im_end|>",
        system="<|im_start|>system<|im_sep|>{{content}}<|im_end|>",
        opening="<|im_start|>assistant<|im_sep|>",
        stop_words=("<|im_end|>",),
        markers=("<|im_start|>", "<|im_sep|>"),
        replace_eos=True,
    ),
    "phi4_mini": Template(
        user="<|user|>{{content}}<|end|><|assistant|>",
        assistant="{{content}}<|end|>",
        system="<|system|>{{content}}<|end|>",
        opening="<|assistant|>",
        tool_format="phi4_mini",
        stop_words=("<|end|>",),
        markers=("<|user|>", "<|assistant|>", "<|system|>"),
        replace_eos=True,
    ),
    "starchat": Template(
        user="<|user|>\n{{content}}<|end|>\n<|assistant|>",
        assistant="{{content}}<|end|>\n",
        system="<|system|>\n{{content}}<|end|>\n",
        opening="<|assistant|>",
        stop_words=("<|end|>",),
        markers=("<|user|>", "<|assistant|>", "<|system|>"),
    ),
    "granite3": _GRANITE,
    "granite3_vision": Template(
        user="<|user|>\n{{content}}\n<|assistant|>\n",
        system="<|system|>\n{{content}}\n",
        default_system=(
            "A chat between a curious user and an artificial intelligence assistant. "
            "The assistant gives helpful, detailed, and polite answers to the user's questions."
        ),
    ),
    "granite4": replace(
        _GRANITE,
        observation=(
            "<|start_of_role|>tool<|end_of_role|>{{content}}<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>"
        ),
        default_system="You are Granite, developed by IBM. You are a helpful AI assistant.",
    ),
    "cohere": Template(
        user=(
            "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>{{content}}<|END_OF_TURN_TOKEN|>"
            "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"
        ),
        system="<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>{{content}}<|END_OF_TURN_TOKEN|>",
        opening="<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
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
        opening="[|assistant|]",
    ),
    "moonlight": replace(
        _MOONSHOT, default_system="You are a helpful assistant provided by Moonshot-AI.", replace_eos=True
    ),
    "kimi_vl": replace(
        _MOONSHOT,
        default_system="You are a helpful assistant",
        thought_words=("◁think▷", "◁/think▷"),
        reasoning=True,
    ),
    "dots_ocr": Template(
        user="<|user|>{{content}}<|endofuser|><|assistant|>",
        assistant="{{content}}<|endofassistant|>",
        system="<|system|>{{content}}<|endofsystem|>\n",
        opening="<|assistant|>",
        stop_words=("<|endofassistant|>",),
        markers=("<|user|>", "<|endofuser|>", "<|assistant|>", "<|system|>", "<|endofsystem|>"),
        efficient_eos=True,
    ),
    "gpt_oss": Template(
        user="<|start|>user<|message|>{{content}}<|end|><|start|>assistant",
        assistant="{{content}}",
        system="<|start|>system<|message|>{{content}}<|end|>",
        opening="<|start|>assistant",
        default_system="You are ChatGPT, a large language model trained by OpenAI.",
        markers=("<|start|>", "<|message|>", "<|end|>", "<|channel|>"),
        thought_words=("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
        efficient_eos=True,
        reasoning=True,
    ),
    "minimax1": Template(
        user=(
            "<beginning_of_sentence>user name=user\n{{content}}<end_of_sentence>\n"
            "<beginning_of_sentence>ai name=assistant\n"
        ),
        assistant="{{content}}<end_of_sentence>\n",
        system="<beginning_of_sentence>system ai_setting=assistant\n{{content}}<end_of_sentence>\n",
        observation=(
            "<beginning_of_sentence>tool name=tools\n{{content}}<end_of_sentence>\n"
            "<beginning_of_sentence>ai name=assistant\n"
        ),
        opening="<beginning_of_sentence>ai name=assistant\n",
        tool_format="minimax1",
        default_system="You are a helpful assistant.",
        stop_words=("<end_of_sentence>",),
        markers=("<beginning_of_sentence>",),
    ),
    "minimax2": Template(
        user="]~b]user\n{{content}}[e~[\n]~b]ai\n",
        assistant="{{content}}[e~[\n",
        system="]~!b[]~b]system\n{{content}}[e~[\n",
        observation="]~b]tool\n<response>{{content}}</response>[e~[\n]~b]ai\n",
        opening="]~b]ai\n",
        results_joint="</response>\n<response>",
        tool_format="minimax2",
        default_system="You are a helpful assistant. Your name is MiniMax-M2.1 and is built by MiniMax.",
        stop_words=("[e~[",),
        markers=("]~!b[", "]~b]"),
        reasoning=True,
    ),
}
