"""What every template of the catalogue writes, by hand: two exchanges with the system prompt S.

The trained parts stand between [[ and ]]. <s> is bos; </s> is the eos the tokenizer came with.
`PLAIN` has the beginning, up to the first U, when no system prompt is given.
"""

_CHATML = (
    "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU1<|im_end|>\n<|im_start|>assistant\n[[A1<|im_end|>\n]]"
    "<|im_start|>user\nU2<|im_end|>\n<|im_start|>assistant\n[[A2<|im_end|>\n]]"
)
_EMPTY_THOUGHT = "<think>\n\n</think>\n\n"
_QWEN3 = (
    "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU1<|im_end|>\n<|im_start|>assistant\n"
    "[[<think>\n\n</think>\n\nA1<|im_end|>\n]]"
    "<|im_start|>user\nU2<|im_end|>\n<|im_start|>assistant\n[[<think>\n\n</think>\n\nA2<|im_end|>\n]]"
)
_GEMMA = (
    "<s><start_of_turn>user\nS\n\nU1<end_of_turn>\n<start_of_turn>model\n[[A1<end_of_turn>\n]]"
    "<start_of_turn>user\nU2<end_of_turn>\n<start_of_turn>model\n[[A2<end_of_turn>\n]]"
)
_GLM4 = "[gMASK]<sop><|system|>\nS<|user|>\nU1<|assistant|>[[\nA1]]<|user|>\nU2<|assistant|>[[\nA2]]"

GOLDEN = {
    "alpaca": "S### Instruction:\nU1\n\n### Response:\n[[A1</s>\n\n]]"
    "### Instruction:\nU2\n\n### Response:\n[[A2</s>\n\n]]",
    "chatglm3": "[gMASK]sop<|system|>\nS<|user|>\nU1<|assistant|>[[\nA1]]<|user|>\nU2<|assistant|>[[\nA2]]",
    "chatml": _CHATML,
    "chatml_de": _CHATML,
    "cohere": (
        "<s><|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>S<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>U1<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>[[A1</s>]]"
        "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>U2<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>[[A2</s>]]"
    ),
    "cpm4": "<s>" + _CHATML,
    "deepseek": "<s>S\n\nUser: U1\n\nAssistant:[[A1</s>]]User: U2\n\nAssistant:[[A2</s>]]",
    "deepseek3": "<s>S<｜User｜>U1<｜Assistant｜>[[A1</s>]]<｜User｜>U2<｜Assistant｜>[[A2</s>]]",
    "deepseekcoder": (
        "<s>S### Instruction:\nU1\n### Response:[[\nA1\n<|EOT|>\n]]"
        "### Instruction:\nU2\n### Response:[[\nA2\n<|EOT|>\n]]"
    ),
    "deepseekr1": (
        "<s>S<｜User｜>U1<｜Assistant｜>[[<think>\n\n</think>\n\nA1</s>]]"
        "<｜User｜>U2<｜Assistant｜>[[<think>\n\n</think>\n\nA2</s>]]"
    ),
    "default": "System: S</s>\nHuman: U1</s>\nAssistant:[[A1</s>\n]]Human: U2</s>\nAssistant:[[A2</s>\n]]",
    "empty": "SU1[[A1]]U2[[A2]]",
    "exaone": ("[|system|]S[|endofturn|]\n[|user|]U1\n[|assistant|][[A1</s>\n]][|user|]U2\n[|assistant|][[A2</s>\n]]"),
    "falcon": "SUser: U1\nFalcon:[[A1\n]]User: U2\nFalcon:[[A2\n]]",
    "falcon_h1": "<s>" + _CHATML,
    "fewshot": "SU1[[A1\n\n]]U2[[A2\n\n]]",
    "gemma": _GEMMA,
    "gemma2": _GEMMA,
    "gemma3": _GEMMA,
    "gemma3n": _GEMMA,
    "glm4": _GLM4,
    "glmz1": _GLM4.replace("[[", "[[" + _EMPTY_THOUGHT),
    "granite3": (
        "<|start_of_role|>system<|end_of_role|>S<|end_of_text|>\n"
        "<|start_of_role|>user<|end_of_role|>U1<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>"
        "[[A1<|end_of_text|>\n]]"
        "<|start_of_role|>user<|end_of_role|>U2<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>"
        "[[A2<|end_of_text|>\n]]"
    ),
    "intern2": "<s>" + _CHATML,
    "intern_s1": "<s>" + _CHATML,
    "llama2": "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nU1 [/INST][[A1</s>]]<s>[INST] U2 [/INST][[A2</s>]]",
    "llama2_zh": "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nU1 [/INST][[A1</s>]]<s>[INST] U2 [/INST][[A2</s>]]",
    "llama3": (
        "<s><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nU1<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[[A1<|eot_id|>]]"
        "<|start_header_id|>user<|end_header_id|>\n\nU2<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[[A2<|eot_id|>]]"
    ),
    "llama4": (
        "<s><|header_start|>system<|header_end|>\n\nS<|eot|><|header_start|>user<|header_end|>\n\nU1<|eot|>"
        "<|header_start|>assistant<|header_end|>\n\n[[A1<|eot|>]]<|header_start|>user<|header_end|>\n\nU2<|eot|>"
        "<|header_start|>assistant<|header_end|>\n\n[[A2<|eot|>]]"
    ),
    "mimo": _QWEN3,
    "ministral": "<s>[INST]S\n\nU1[/INST][[A1</s>]][INST]U2[/INST][[A2</s>]]",
    "mistral": "<s>[INST] S\n\nU1[/INST][[ A1</s>]][INST] U2[/INST][[ A2</s>]]",
    "mistral_small": "<s>[SYSTEM_PROMPT]S[/SYSTEM_PROMPT][INST]U1[/INST][[A1</s>]][INST]U2[/INST][[A2</s>]]",
    "moonlight": (
        "<|im_system|>system<|im_middle|>S<|im_end|><|im_user|>user<|im_middle|>U1<|im_end|>"
        "<|im_assistant|>assistant<|im_middle|>[[A1<|im_end|>]]<|im_user|>user<|im_middle|>U2<|im_end|>"
        "<|im_assistant|>assistant<|im_middle|>[[A2<|im_end|>]]"
    ),
    "olmo": "</s>S<|user|>\nU1<|assistant|>\n[[A1</s>]]<|user|>\nU2<|assistant|>\n[[A2</s>]]",
    "openchat": (
        "<s>SGPT4 Correct User: U1</s>GPT4 Correct Assistant:[[A1</s>]]"
        "GPT4 Correct User: U2</s>GPT4 Correct Assistant:[[A2</s>]]"
    ),
    "opencoder": _CHATML,
    "phi": (
        "<|system|>\nS<|end|>\n<|user|>\nU1<|end|>\n<|assistant|>\n[[A1<|end|>\n]]"
        "<|user|>\nU2<|end|>\n<|assistant|>\n[[A2<|end|>\n]]"
    ),
    "phi4": (
        "<|im_start|>system<|im_sep|>S<|im_end|><|im_start|>user<|im_sep|>U1<|im_end|>"
        "<|im_start|>assistant<|im_sep|>[[A1<|im_end|>]]<|im_start|>user<|im_sep|>U2<|im_end|>"
        "<|im_start|>assistant<|im_sep|>[[A2<|im_end|>]]"
    ),
    "qwen": _CHATML,
    "qwen3": _QWEN3,
    "qwen3_nothink": _CHATML,
    "sailor": _CHATML.replace("|>user", "|>question").replace("|>assistant", "|>answer"),
    "seed_coder": ("<s>system\nS</s><s>user\nU1</s><s>assistant\n[[A1</s>]]<s>user\nU2</s><s>assistant\n[[A2</s>]]"),
    "smollm": _CHATML,
    "smollm2": _CHATML,
    "solar": "### System:\nS\n\n### User:\nU1\n\n### Assistant:\n[[A1]]### User:\nU2\n\n### Assistant:\n[[A2]]",
    "vicuna": "SUSER: U1 ASSISTANT:[[A1</s>]]USER: U2 ASSISTANT:[[A2</s>]]",
    "yi": _CHATML,
    "zephyr": ("<|system|>\nS</s><|user|>\nU1</s><|assistant|>\n[[A1</s>]]<|user|>\nU2</s><|assistant|>\n[[A2</s>]]"),
}

_IM_USER = "<|im_start|>user\n"
_INTERN = (
    "You are an AI assistant whose name is InternLM (书生·浦语).\n"
    "- InternLM (书生·浦语) is a conversational language model that is developed by Shanghai AI Laboratory "
    "(上海人工智能实验室). It is designed to be helpful, honest, and harmless.\n"
    "- InternLM (书生·浦语) can understand and communicate fluently in the language chosen by the user such as "
    "English and 中文."
)

PLAIN = {
    "alpaca": (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\n"
    ),
    "chatglm3": "[gMASK]sop<|user|>\n",
    "chatml": _IM_USER,
    "chatml_de": (
        "<|im_start|>system\nDu bist ein freundlicher und hilfsbereiter KI-Assistent.<|im_end|>\n" + _IM_USER
    ),
    "cohere": "<s><|START_OF_TURN_TOKEN|><|USER_TOKEN|>",
    "deepseek": "<s>User: ",
    "deepseek3": "<s><｜User｜>",
    "deepseekr1": "<s><｜User｜>",
    "default": "Human: ",
    "empty": "",
    "gemma": "<s><start_of_turn>user\n",
    "gemma2": "<s><start_of_turn>user\n",
    "gemma3": "<s><start_of_turn>user\n",
    "glm4": "[gMASK]<sop><|user|>\n",
    "granite3": "<|start_of_role|>user<|end_of_role|>",
    "intern2": "<s><|im_start|>system\n" + _INTERN + "<|im_end|>\n" + _IM_USER,
    "llama2": "<s>[INST] ",
    "llama3": "<s><|start_header_id|>user<|end_header_id|>\n\n",
    "mistral": "<s>[INST] ",
    "phi4": "<|im_start|>user<|im_sep|>",
    "qwen": (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        + _IM_USER
    ),
    "qwen3": _IM_USER,
    "qwen3_nothink": _IM_USER,
    "smollm": _IM_USER,
    "smollm2": (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face.<|im_end|>\n"
        + _IM_USER
    ),
    "vicuna": (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions.USER: "
    ),
    "yi": _IM_USER,
}

EFFICIENT = {"chatglm3", "falcon", "fewshot", "gemma2", "glm4", "glmz1", "solar"}
"""Templates whose turns carry no eos; the stage adds one at the end."""

TERMINATORS = {
    "<|im_end|>": (
        "chatml chatml_de cpm4 falcon_h1 intern2 intern_s1 mimo moonlight opencoder phi4 qwen qwen3 qwen3_nothink "
        "sailor smollm smollm2 yi"
    ).split(),
    "<end_of_turn>": ["gemma", "gemma2", "gemma3", "gemma3n"],
    "<|eot_id|>": ["llama3"],
    "<|eot|>": ["llama4"],
    "<|end|>": ["phi"],
    "<|EOT|>": ["deepseekcoder"],
    "<|end_of_text|>": ["granite3"],
    "</s>": (
        "alpaca cohere deepseek deepseek3 deepseekr1 default exaone llama2 llama2_zh ministral mistral mistral_small "
        "olmo openchat seed_coder vicuna zephyr"
    ).split(),
}
"""The token that ends a turn; white space may follow it."""
