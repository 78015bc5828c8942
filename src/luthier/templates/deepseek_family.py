"""DeepSeek's models."""

from __future__ import annotations

from dataclasses import replace

from luthier.data.template import BOS, Template

_DEEPSEEK3 = Template(
    user="<｜User｜>{{content}}<｜Assistant｜>",
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
}
