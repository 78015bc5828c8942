"""What the models' rarer templates write, by hand, in the notation of golden.py."""

from tests.templates.golden import _CHATML, _EMPTY_THOUGHT, _GEMMA, _GLM4, _QWEN3, GOLDEN, PLAIN

_THINK = "<think>\n\n</think>\n\n"
_NO_BREAKS = "<think></think>"
_GRANITE = GOLDEN["granite3"]
_LLAMA3 = GOLDEN["llama3"]
_VICUNA = GOLDEN["vicuna"]
_GEMMA4 = (
    "<s><|turn>system\n<|think|>S<turn|>\n<|turn>user\nU1<turn|>\n<|turn>model\n[[<|channel>thought\n<channel|>A1<turn|>\n]]"
    "<|turn>user\nU2<turn|>\n<|turn>model\n[[<|channel>thought\n<channel|>A2<turn|>\n]]"
)
_KIMI = (
    "<|im_system|>system<|im_middle|>S<|im_end|><|im_user|>user<|im_middle|>U1<|im_end|>"
    "<|im_assistant|>assistant<|im_middle|>[[◁think▷◁/think▷A1<|im_end|>]]<|im_user|>user<|im_middle|>U2<|im_end|>"
    "<|im_assistant|>assistant<|im_middle|>[[◁think▷◁/think▷A2<|im_end|>]]"
)
_HARMONY = "<|channel|>analysis<|message|><|end|><|start|>assistant<|channel|>final<|message|>"

MORE = {
    # ChatML and Qwen
    "dbrx": _CHATML,
    "intern_vl": "<s>" + _CHATML,
    "keye_vl": _QWEN3,
    "lfm2": _CHATML,
    "lfm2_vl": _CHATML,
    "llava_next_qwen": _CHATML,
    "llava_next_video_yi": _CHATML,
    "llava_next_yi": _CHATML,
    "mimo_v2": _QWEN3.replace(_THINK, _NO_BREAKS),
    "mimo_vl": _QWEN3,
    "minicpm_o": _CHATML,
    "minicpm_v": _CHATML,
    "minicpm_v_4_6": _CHATML,
    "moss_vl": _CHATML,
    "qwen2_audio": _CHATML,
    "qwen2_omni": _CHATML,
    "qwen2_vl": _CHATML,
    "qwen3_5": _QWEN3,
    "qwen3_5_nothink": _CHATML,
    "qwen3_6": _QWEN3,
    "qwen3_omni": _QWEN3,
    "qwen3_omni_nothink": _CHATML,
    "qwen3_vl": _QWEN3,
    "qwen3_vl_nothink": _CHATML,
    "ernie": _CHATML.replace("<|im_end|>\n", "<|im_end|>\n\n"),
    "youtu_vl": _CHATML.replace("<|im_start|>", "<|begin_of_text|>").replace("<|im_end|>", "<|end_of_text|>"),
    # Llama and Mistral
    "mllama": _LLAMA3,
    "llava_next_llama3": _LLAMA3,
    "openchat-3.6": (
        "<s>S<|start_header_id|>GPT4 Correct User<|end_header_id|>\n\nU1<|eot_id|>"
        "<|start_header_id|>GPT4 Correct Assistant<|end_header_id|>\n\n[[A1</s>]]"
        "<|start_header_id|>GPT4 Correct User<|end_header_id|>\n\nU2<|eot_id|>"
        "<|start_header_id|>GPT4 Correct Assistant<|end_header_id|>\n\n[[A2</s>]]"
    ),
    "ministral3": GOLDEN["ministral"],
    "pixtral": GOLDEN["ministral"],
    "llava_next_mistral": GOLDEN["mistral"],
    "llava_next_video_mistral": GOLDEN["mistral"],
    "breeze": "<s>S[INST] U1 [/INST] [[A1]][INST] U2 [/INST] [[A2]]",
    # Gemma
    "gemma4": _GEMMA4,
    "gemma4n": _GEMMA4,
    "paligemma": "<s>SU1\n[[A1</s>]]U2\n[[A2</s>]]",
    "paligemma_chat": _GEMMA.replace("S\n\nU1", "SU1"),
    # GLM
    "glm_ocr": _GLM4,
    "glm4_moe": _GLM4.replace("[[", "[[" + _EMPTY_THOUGHT),
    "glm4v": _GLM4.replace("[[", "[[" + _EMPTY_THOUGHT),
    "glm4_5v": _GLM4.replace("[[", "[[" + _EMPTY_THOUGHT),
    "glm4_7": _GLM4.replace("[[", "[[</think>"),
    "aeva": _GLM4.replace("[[", "[[</think>"),
    # Tencent
    "hy3": (
        "<s>S<｜hy_User｜>U1<｜hy_Assistant｜>[[<think></think>A1<｜hy_eos｜>]]"
        "<｜hy_User｜>U2<｜hy_Assistant｜>[[<think></think>A2<｜hy_eos｜>]]"
    ),
    "hunyuan": "<|startoftext|>S<|extra_4|>U1<|extra_0|>[[A1<|eos|>]]U2<|extra_0|>[[A2<|eos|>]]",
    "hunyuan_small": (
        "<｜hy_begin▁of▁sentence｜>S<｜hy_place▁holder▁no▁3｜>"
        "<｜hy_User｜>U1<｜hy_place▁holder▁no▁8｜>[[A1<｜hy_place▁holder▁no▁2｜>]]"
        "<｜hy_User｜>U2<｜hy_place▁holder▁no▁8｜>[[A2<｜hy_place▁holder▁no▁2｜>]]"
    ),
    "hy_dense_1_8b": (
        "<s>S<｜hy_place▁holder▁no▁3｜><｜hy_User｜>U1[[<｜hy_Assistant｜>A1]]<｜hy_User｜>U2[[<｜hy_Assistant｜>A2]]"
    ),
    "hy_dense_7b": "<s>S<|extra_4|>U1<|extra_0|>[[A1]]U2<|extra_0|>[[A2]]",
    "youtu": (
        "<s>S<|User|>U1<|Assistant|>[[<think>\n\n</think>\n\nA1<|end_of_text|>]]"
        "<|User|>U2<|Assistant|>[[<think>\n\n</think>\n\nA2<|end_of_text|>]]"
    ),
    # Tokens for each role
    "phi_small": "<|endoftext|>" + GOLDEN["phi"],
    "phi4_mini": (
        "<|system|>S<|end|><|user|>U1<|end|><|assistant|>[[A1<|end|>]]<|user|>U2<|end|><|assistant|>[[A2<|end|>]]"
    ),
    "starchat": (
        "<|system|>\nS<|end|>\n<|user|>\nU1<|end|>\n<|assistant|>[[A1<|end|>\n]]"
        "<|user|>\nU2<|end|>\n<|assistant|>[[A2<|end|>\n]]"
    ),
    "granite3_vision": "<|system|>\nS\n<|user|>\nU1\n<|assistant|>\n[[A1</s>]]<|user|>\nU2\n<|assistant|>\n[[A2</s>]]",
    "granite4": _GRANITE,
    "kimi_vl": _KIMI,
    "dots_ocr": (
        "<|system|>S<|endofsystem|>\n<|user|>U1<|endofuser|><|assistant|>[[A1<|endofassistant|>]]"
        "<|user|>U2<|endofuser|><|assistant|>[[A2<|endofassistant|>]]"
    ),
    "gpt_oss": (
        "<|start|>system<|message|>S<|end|><|start|>user<|message|>U1<|end|><|start|>assistant[[" + _HARMONY + "A1]]"
        "<|start|>user<|message|>U2<|end|><|start|>assistant[[" + _HARMONY + "A2]]"
    ),
    "minimax1": (
        "<beginning_of_sentence>system ai_setting=assistant\nS<end_of_sentence>\n"
        "<beginning_of_sentence>user name=user\nU1<end_of_sentence>\n"
        "<beginning_of_sentence>ai name=assistant\n[[A1<end_of_sentence>\n]]"
        "<beginning_of_sentence>user name=user\nU2<end_of_sentence>\n"
        "<beginning_of_sentence>ai name=assistant\n[[A2<end_of_sentence>\n]]"
    ),
    "minimax2": (
        "]~!b[]~b]system\nS[e~[\n]~b]user\nU1[e~[\n]~b]ai\n[[<think>\n\n</think>\n\nA1[e~[\n]]"
        "]~b]user\nU2[e~[\n]~b]ai\n[[<think>\n\n</think>\n\nA2[e~[\n]]"
    ),
    # Words between tags
    "seed_oss": (
        "<s>system\nS</s><s>user\nU1</s><s>assistant\n[[<seed:think></seed:think>A1</s>]]"
        "<s>user\nU2</s><s>assistant\n[[<seed:think></seed:think>A2</s>]]"
    ),
    "bailing": (
        "<role>SYSTEM</role>S<role>HUMAN</role>U1<role>ASSISTANT</role>[[A1]]"
        "<role>HUMAN</role>U2<role>ASSISTANT</role>[[A2]]"
    ),
    "bailing_v2": (
        "<role>SYSTEM</role>S<|role_end|><role>HUMAN</role>U1<|role_end|><role>ASSISTANT</role>[[A1<|role_end|>]]"
        "<role>HUMAN</role>U2<|role_end|><role>ASSISTANT</role>[[A2<|role_end|>]]"
    ),
    "ernie_nothink": (
        "<|begin_of_sentence|>S\nUser: U1\nAssistant: [[A1<|end_of_sentence|>]]User: U2\nAssistant: "
        "[[A2<|end_of_sentence|>]]"
    ),
    "ernie_vl": (
        "S\nUser: U1[[<think>\n\n</think>\n\n\nAssistant: A1<|end_of_sentence|>]]"
        "User: U2[[<think>\n\n</think>\n\n\nAssistant: A2<|end_of_sentence|>]]"
    ),
    "telechat2": "<_system>S<_user>U1<_bot>[[A1</s>]]<_user>U2<_bot>[[A2</s>]]",
    "index": "<unk>Sreserved_0U1reserved_1[[A1]]reserved_0U2reserved_1[[A2]]",
    "yuan": "SU1<sep>[[A1<eod>\n]]U2<sep>[[A2<eod>\n]]",
    # Names that LLaMA-Factory had once, or has since
    "atom": "S<s>Human: U1\n</s><s>Assistant:[[A1\n</s>]]<s>Human: U2\n</s><s>Assistant:[[A2\n</s>]]",
    "baichuan": "S<reserved_102>U1<reserved_103>[[A1]]<reserved_102>U2<reserved_103>[[A2]]",
    "baichuan2": "S<reserved_106>U1<reserved_107>[[A1]]<reserved_106>U2<reserved_107>[[A2]]",
    "belle": "<s>SHuman: U1\n\nBelle: [[A1</s>\n\n]]Human: U2\n\nBelle: [[A2</s>\n\n]]",
    "bluelm": "S[|Human|]:U1[|AI|]:[[A1</s>]][|Human|]:U2[|AI|]:[[A2</s>]]",
    "chatglm2": "[gMASK]sopS[Round 0]\n\n问：U1\n\n答：[[A1]][Round 1]\n\n问：U2\n\n答：[[A2]]",
    "codegeex2": "[gMASK]sopSU1[[A1</s>]]U2[[A2</s>]]",
    "codegeex4": "[gMASK]<sop><|system|>\nS<|user|>\nU1<|assistant|>\n[[A1]]<|user|>\nU2<|assistant|>\n[[A2]]",
    "cpm": "<s>S<用户>U1<AI>[[A1</s>]]<用户>U2<AI>[[A2</s>]]",
    "cpm3": "<s>" + _CHATML,
    "gemma4n_nothink": _GEMMA4.replace("<|think|>", "").replace("<|channel>thought\n<channel|>", ""),
    "intern": ("<s><|System|>:S\n<|User|>:U1\n<|Bot|>:[[A1<eoa>\n]]<|User|>:U2\n<|Bot|>:[[A2<eoa>\n]]"),
    "marco": _CHATML,
    "orion": "<s>SHuman: U1\n\nAssistant: </s>[[A1</s>]]Human: U2\n\nAssistant: </s>[[A2</s>]]",
    "skywork_o1": _LLAMA3,
    "telechat": "<_system>S<_end><_user>U1<_bot>[[A1</s>]]<_user>U2<_bot>[[A2</s>]]",
    "xverse": "SHuman: U1\n\nAssistant: [[A1</s>]]Human: U2\n\nAssistant: [[A2</s>]]",
    # Plain words
    "llava": _VICUNA,
    "llava_next": _VICUNA,
    "llava_next_video": _VICUNA,
    "video_llava": _VICUNA,
    "xuanyuan": "SHuman: U1 Assistant:[[A1</s>]]Human: U2 Assistant:[[A2</s>]]",
    "yi_vl": "S### Human: U1\n### Assistant:[[A1\n]]### Human: U2\n### Assistant:[[A2\n]]",
}

_CURIOUS = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def _im(system):
    return f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n"


MORE_PLAIN = {
    "qwen2_vl": _im("You are a helpful assistant."),
    "qwen2_audio": _im("You are a helpful assistant."),
    "qwen2_omni": _im("You are a helpful assistant."),
    "llava_next_qwen": _im("You are a helpful assistant."),
    "minicpm_v": _im("You are a helpful assistant."),
    "minicpm_v_4_6": _im("You are a helpful assistant."),
    "mimo": _im("You are a helpful assistant."),
    "minicpm_o": _im("You are a helpful assistant. You can accept audio and text input and output voice and text."),
    "mimo_v2": _im("You are MiMo, a helpful AI assistant engineered by Xiaomi."),
    "mimo_vl": _im("You are MiMo, an AI assistant developed by Xiaomi."),
    "lfm2": _im("You are a helpful AI assistant."),
    "lfm2_vl": _im("You are a helpful multimodal assistant by Liquid AI."),
    "opencoder": _im("You are OpenCoder, created by OpenCoder Team."),
    "sailor": _im(
        "You are an AI assistant named Sailor created by Sea AI Lab. "
        "Your answer should be friendly, unbiased, faithful, informative and detailed."
    ).replace("|>user", "|>question"),
    "ernie": (
        "<|im_start|>system\n<global_setting>\nthink_mode=True\n</global_setting><|im_end|>\n\n<|im_start|>user\n"
    ),
    "intern_vl": "<s>"
    + _im(
        "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
    ),
    "youtu_vl": ("<|begin_of_text|>system\nYou are a helpful assistant.<|end_of_text|>\n<|begin_of_text|>user\n"),
    "llama2_zh": "<s>[INST] <<SYS>>\nYou are a helpful assistant. 你是一个乐于助人的助手。\n<</SYS>>\n\n",
    "gemma4": "<s><|turn>system\n<|think|>You are a helpful assistant.<turn|>\n<|turn>user\n",
    "gemma4n": "<s><|turn>system\n<|think|>You are a helpful assistant.<turn|>\n<|turn>user\n",
    "aeva": (
        "[gMASK]<sop><|system|>\nYou are an AI assistant named Aeva created by Zongzhi Lou. "
        "Your answer should be friendly, unbiased, faithful, informative and detailed.<|user|>\n"
    ),
    "deepseekcoder": (
        "<s>You are an AI programming assistant, utilizing the DeepSeek Coder model, developed by DeepSeek Company, "
        "and you only answer questions related to computer science. For politically sensitive questions, security and "
        "privacy issues, and other non-computer science questions, you will refuse to answer.\n### Instruction:\n"
    ),
    "seed_coder": (
        "<s>system\nYou are an AI programming assistant, utilizing the Seed-Coder model, developed by ByteDance Seed, "
        "and you only answer questions related to computer science. For politically sensitive questions, security and "
        "privacy issues, and other non-computer science questions, you will refuse to answer.\n\n</s><s>user\n"
    ),
    "granite3_vision": f"<|system|>\n{_CURIOUS}\n<|user|>\n",
    "granite4": (
        "<|start_of_role|>system<|end_of_role|>You are Granite, developed by IBM. You are a helpful AI assistant."
        "<|end_of_text|>\n<|start_of_role|>user<|end_of_role|>"
    ),
    "moonlight": (
        "<|im_system|>system<|im_middle|>You are a helpful assistant provided by Moonshot-AI.<|im_end|>"
        "<|im_user|>user<|im_middle|>"
    ),
    "kimi_vl": ("<|im_system|>system<|im_middle|>You are a helpful assistant<|im_end|><|im_user|>user<|im_middle|>"),
    "gpt_oss": (
        "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.<|end|>"
        "<|start|>user<|message|>"
    ),
    "minimax1": (
        "<beginning_of_sentence>system ai_setting=assistant\nYou are a helpful assistant.<end_of_sentence>\n"
        "<beginning_of_sentence>user name=user\n"
    ),
    "minimax2": (
        "]~!b[]~b]system\nYou are a helpful assistant. Your name is MiniMax-M2.1 and is built by MiniMax.[e~[\n"
        "]~b]user\n"
    ),
    "telechat2": (
        "<_system>你是中国电信星辰语义大模型，英文名是TeleChat，"
        "你是由中电信人工智能科技有限公司和中国电信人工智能研究院（TeleAI）研发的人工智能助手。<_user>"
    ),
    "zephyr": "<|system|>\nYou are Zephyr, a helpful assistant.</s><|user|>\n",
    "llava": f"{_CURIOUS}USER: ",
    "llava_next": f"{_CURIOUS}USER: ",
    "llava_next_video": f"{_CURIOUS}USER: ",
    "video_llava": f"{_CURIOUS}USER: ",
    "xuanyuan": (
        "以下是用户和人工智能助手之间的对话。用户以Human开头，人工智能助手以Assistant开头，"
        "会对人类提出的问题给出有帮助、高质量、详细和礼貌的回答，并且总是拒绝参与与不道德、"
        "不安全、有争议、政治敏感等相关的话题、问题和指示。\nHuman: "
    ),
    "yi_vl": (
        "This is a chat between an inquisitive human and an AI assistant. Assume the role of the AI assistant. Read "
        "all the images carefully, and respond to the human's questions with informative, helpful, detailed and polite "
        "answers. 这是一个好奇的人类和一个人工智能助手之间的对话。假设你扮演这个AI助手的角色。"
        "仔细阅读所有的图像，并对人类的问题做出信息丰富、有帮助、详细的和礼貌的回答。\n\n### Human: "
    ),
    "codegeex4": (
        "[gMASK]<sop><|system|>\n你是一位智能编程助手，你叫CodeGeeX。你会为用户回答关于编程、代码、计算机方面的任何问题，"
        "并提供格式规范、可以执行、准确安全的代码，并在必要时提供详细的解释。<|user|>\n"
    ),
    "intern": (
        "<s><|System|>:You are an AI assistant whose name is InternLM (书生·浦语).\n"
        "- InternLM (书生·浦语) is a conversational language model that is developed by Shanghai AI Laboratory "
        "(上海人工智能实验室). It is designed to be helpful, honest, and harmless.\n- InternLM (书生·浦语) can "
        "understand and communicate fluently in the language chosen by the user such as English and 中文.\n<|User|>:"
    ),
    "marco": (
        "<|im_start|>system\n你是一个经过良好训练的AI助手，你的名字是Marco-o1.由阿里国际数字商业集团的AI Business创造."
        "\n## 重要！！！！！\n当你回答问题时，你的思考应该在<Thought>内完成，<Output>内输出你的结果。\n"
        "<Thought>应该尽可能是英文，"
        "但是有2个特例，一个是对原文中的引用，另一个是是数学应该使用markdown格式，<Output>内的输出需要遵循用户输入的语言。\n"
        "<|im_end|>\n<|im_start|>user\n"
    ),
    "skywork_o1": (
        "<s><|start_header_id|>system<|end_header_id|>\n\n"
        "You are Skywork-o1, a thinking model developed by Skywork AI, specializing in solving complex problems "
        "involving mathematics, coding, and logical reasoning through deep "
        "thought. When faced with a user's request, you first engage in a lengthy and in-depth thinking process to "
        "explore possible solutions to the problem. After completing your thoughts, you then provide a detailed "
        "explanation of the solution process in your response.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
    ),
    "gemma4n_nothink": "<s><|turn>user\n",
    "bailing": "<role>HUMAN</role>",
    "breeze": "<s>[INST] ",
    "hunyuan": "<|startoftext|>",
    "hy3": "<s><｜hy_User｜>",
    "paligemma": "<s>",
    "phi4_mini": "<|user|>",
    "phi_small": "<|endoftext|><|user|>\n",
    "seed_oss": "<s>user\n",
    "youtu": "<s><|User|>",
}

DBRX = (
    "You are DBRX, created by Databricks. You were last updated in December 2023. ",
    "PERTINENT TO THE USER'S QUERY.",
)
"""The beginning and the end of the longest default system prompt."""

EMPTY = {
    "aeva": "</think>",
    "gemma4": "<|channel>thought\n<channel|>",
    "gemma4n": "<|channel>thought\n<channel|>",
    "glm4_7": "</think>",
    "gpt_oss": _HARMONY,
    "hy3": _NO_BREAKS,
    "kimi_vl": "◁think▷◁/think▷",
    "mimo_v2": _NO_BREAKS,
    "seed_oss": "<seed:think></seed:think>",
}
"""A thought with nothing in it, where it is not that of Qwen."""

OWN_ENDS = {"bailing_v2": "<|role_end|>", "dots_ocr": "<|endofassistant|>"}
"""Templates whose turns have an end of their own before the eos of the stage."""

MORE_EFFICIENT = set(
    "aeva bailing bailing_v2 breeze dots_ocr glm4_5v glm4_7 glm4_moe glm4v glm_ocr gpt_oss hy_dense_1_8b hy_dense_7b "
    "index yi_vl baichuan baichuan2 chatglm2 codegeex4".split()
)

MORE_TERMINATORS = {
    "<|im_end|>": (
        "dbrx ernie intern_vl keye_vl kimi_vl lfm2 lfm2_vl llava_next_qwen llava_next_video_yi llava_next_yi mimo_v2 "
        "mimo_vl minicpm_o minicpm_v minicpm_v_4_6 moss_vl qwen2_audio qwen2_omni qwen2_vl qwen3_5 qwen3_5_nothink "
        "qwen3_6 qwen3_omni qwen3_omni_nothink qwen3_vl qwen3_vl_nothink cpm3 marco"
    ).split(),
    "<end_of_turn>": ["paligemma_chat"],
    "<turn|>": ["gemma4", "gemma4n", "gemma4n_nothink"],
    "<eoa>": ["intern"],
    "<|eot_id|>": ["llava_next_llama3", "mllama", "skywork_o1"],
    "<|end|>": ["phi4_mini", "phi_small", "starchat"],
    "<|end_of_text|>": ["granite4", "youtu", "youtu_vl"],
    "<|end_of_sentence|>": ["ernie_nothink", "ernie_vl"],
    "<end_of_sentence>": ["minimax1"],
    "[e~[": ["minimax2"],
    "<|eos|>": ["hunyuan"],
    "<｜hy_eos｜>": ["hy3"],
    "<｜hy_place▁holder▁no▁2｜>": ["hunyuan_small"],
    "<eod>": ["yuan"],
    "</s>": (
        "granite3_vision llava llava_next llava_next_mistral llava_next_video llava_next_video_mistral ministral3 "
        "openchat-3.6 paligemma pixtral seed_oss telechat2 video_llava xuanyuan atom belle bluelm codegeex2 cpm orion "
        "telechat xverse"
    ).split(),
}

assert not MORE.keys() & GOLDEN.keys()
assert not MORE_PLAIN.keys() & PLAIN.keys()
