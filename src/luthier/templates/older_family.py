"""Models of 2023 and 2024 that LLaMA-Factory knew once; their configurations still run."""

from __future__ import annotations

from luthier.data.template import BOS, EOS, Template, Token

TEMPLATES = {
    "atom": Template(
        user=(BOS, "Human: {{content}}\n", EOS, BOS, "Assistant:"),
        assistant=("{{content}}\n", EOS),
    ),
    "baichuan": Template(user=(Token("<reserved_102>"), "{{content}}", Token("<reserved_103>")), efficient_eos=True),
    "baichuan2": Template(
        user="<reserved_106>{{content}}<reserved_107>",
        markers=("<reserved_106>", "<reserved_107>"),
        efficient_eos=True,
    ),
    "belle": Template(user="Human: {{content}}\n\nBelle: ", assistant=("{{content}}", EOS, "\n\n"), prefix=(BOS,)),
    "bluelm": Template(user=(Token("[|Human|]:"), "{{content}}", Token("[|AI|]:"))),
    "chatglm2": Template(
        user="[Round {{idx}}]\n\n问：{{content}}\n\n答：",
        prefix=(Token("[gMASK]"), Token("sop")),
        efficient_eos=True,
    ),
    "codegeex2": Template(prefix=(Token("[gMASK]"), Token("sop"))),
    "codegeex4": Template(
        user="<|user|>\n{{content}}<|assistant|>\n",
        system="<|system|>\n{{content}}",
        function="{{content}}",
        observation="<|observation|>\n{{content}}<|assistant|>\n",
        opening="<|assistant|>\n",
        prefix="[gMASK]<sop>",
        tool_format="glm4",
        default_system=(
            "你是一位智能编程助手，你叫CodeGeeX。你会为用户回答关于编程、代码、计算机方面的任何问题，"
            "并提供格式规范、可以执行、准确安全的代码，并在必要时提供详细的解释。"
        ),
        stop_words=("<|user|>", "<|observation|>"),
        markers=("[gMASK]", "<sop>", "<|system|>", "<|assistant|>"),
        efficient_eos=True,
    ),
    "cpm": Template(user="<用户>{{content}}<AI>", prefix=(BOS,)),
    "cpm3": Template(
        user="<|im_start|>user\n{{content}}<|im_end|>\n<|im_start|>assistant\n",
        assistant="{{content}}<|im_end|>\n",
        system="<|im_start|>system\n{{content}}<|im_end|>\n",
        observation="<|im_start|>tool\n{{content}}<|im_end|>\n<|im_start|>assistant\n",
        opening="<|im_start|>assistant\n",
        prefix=(BOS,),
        stop_words=("<|im_end|>",),
        markers=("<|im_start|>",),
    ),
    "intern": Template(
        user="<|User|>:{{content}}\n<|Bot|>:",
        assistant="{{content}}<eoa>\n",
        system="<|System|>:{{content}}\n",
        prefix=(BOS,),
        default_system=(
            "You are an AI assistant whose name is InternLM (书生·浦语).\n"
            "- InternLM (书生·浦语) is a conversational language model that is developed by Shanghai AI Laboratory "
            "(上海人工智能实验室). It is designed to be helpful, honest, and harmless.\n"
            "- InternLM (书生·浦语) can understand and communicate fluently in the language "
            "chosen by the user such as English and 中文."
        ),
        stop_words=("<eoa>",),
    ),
    "orion": Template(user=("Human: {{content}}\n\nAssistant: ", EOS), prefix=(BOS,)),
    "telechat": Template(user="<_user>{{content}}<_bot>", system="<_system>{{content}}<_end>"),
    "xverse": Template(user="Human: {{content}}\n\nAssistant: "),
}
