"""Models whose roles are words between tokens or tags: Seed, Bailing, Ernie, TeleChat, Index and Yuan."""

from __future__ import annotations

from dataclasses import replace

from luthier.data.template import BOS, EOS, Template, Token

_SEED = Template(
    user=(BOS, "user\n{{content}}", EOS, BOS, "assistant\n"),
    system=(BOS, "system\n{{content}}", EOS),
    opening=(BOS, "assistant\n"),
)

TEMPLATES = {
    "seed_coder": replace(
        _SEED,
        default_system=(
            "You are an AI programming assistant, utilizing the Seed-Coder model, developed by ByteDance Seed, "
            "and you only answer questions related to computer science. For politically sensitive questions, "
            "security and privacy issues, and other non-computer science questions, you will refuse to answer.\n\n"
        ),
    ),
    "seed_oss": replace(_SEED, tool_format="seed_oss", thought_words=("<seed:think>", "</seed:think>"), reasoning=True),
    "bailing": Template(
        user="<role>HUMAN</role>{{content}}<role>ASSISTANT</role>",
        system="<role>SYSTEM</role>{{content}}",
        observation="<role>OBSERVATION</role>{{content}}<role>ASSISTANT</role>",
        opening="<role>ASSISTANT</role>",
        stop_words=("<|endoftext|>",),
        efficient_eos=True,
    ),
    "bailing_v2": Template(
        user="<role>HUMAN</role>{{content}}<|role_end|><role>ASSISTANT</role>",
        assistant="{{content}}<|role_end|>",
        system="<role>SYSTEM</role>{{content}}<|role_end|>",
        observation=(
            "<role>OBSERVATION</role>\n<tool_response>\n{{content}}\n</tool_response><|role_end|><role>ASSISTANT</role>"
        ),
        opening="<role>ASSISTANT</role>",
        results_joint="\n</tool_response>\n<tool_response>\n",
        tool_format="ling",
        stop_words=("<|endoftext|>",),
        markers=("<|role_end|>",),
        efficient_eos=True,
    ),
    "ernie_nothink": Template(
        user="User: {{content}}\nAssistant: ",
        assistant="{{content}}<|end_of_sentence|>",
        system="{{content}}\n",
        prefix="<|begin_of_sentence|>",
        stop_words=("<|end_of_sentence|>",),
        markers=("<|begin_of_sentence|>",),
    ),
    "ernie_vl": Template(
        user="User: {{content}}",
        assistant="\nAssistant: {{content}}<|end_of_sentence|>",
        system="{{content}}\n",
        stop_words=("<|end_of_sentence|>",),
        replace_eos=True,
        replace_chat_template=True,
        reasoning=True,
    ),
    "telechat2": Template(
        user="<_user>{{content}}<_bot>",
        system="<_system>{{content}}",
        default_system=(
            "你是中国电信星辰语义大模型，英文名是TeleChat，"
            "你是由中电信人工智能科技有限公司和中国电信人工智能研究院（TeleAI）研发的人工智能助手。"
        ),
    ),
    "index": Template(user="reserved_0{{content}}reserved_1", system="<unk>{{content}}", efficient_eos=True),
    "yuan": Template(user=("{{content}}", Token("<sep>")), assistant="{{content}}<eod>\n", stop_words=("<eod>",)),
}
