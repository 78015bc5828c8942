"""Tiny tokenizers and models, made here: no test needs a network, a GPU or data of somebody else's."""

from __future__ import annotations

import logging
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

import pytest

from luthier.core.log import set_up

CORPUS = [
    "The quick brown fox jumps over the lazy dog.",
    "A violin maker is called a luthier; she carves the scroll by hand.",
    "What is the capital of France? The capital of France is Paris.",
    "one two three four five six seven eight nine ten eleven twelve",
    "def add(a, b):\n    return a + b\n",
    "system user assistant tool <think> think </think> hello world goodbye",
]


@pytest.fixture(autouse=True)
def _own_surroundings():
    """What a run writes into the process's environment (TensorBoard's folder, say) does not meet the next test. The
    log begins anew, as the command line sets it up, and `caplog` hears it too, whoever called what before."""
    before, root = dict(os.environ), logging.getLogger("luthier")
    root.handlers.clear()
    set_up()
    root.propagate = True
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


SPECIALS = ["<unk>", "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"]

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def build_tokenizer(vocab_size: int = 400, extra_specials: tuple[str, ...] = ()):
    """A byte-level BPE tokenizer trained on a few sentences; eos <|im_end|>, pad <pad>, ChatML chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*SPECIALS, *extra_specials],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="<|im_end|>", pad_token="<pad>"
    )
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture
def tokenizer():
    """A tokenizer of the test's own: named templates write to the tokenizer they are bound to."""
    return build_tokenizer()


TINY = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def build_model(kind: str = "llama", *, dtype=None, seed: int = 0, **changes):
    """A random two-layer model: llama, mistral (all layers sliding), qwen3 and gemma3 (mixed layers) or gpt2."""
    import torch
    import transformers

    torch.manual_seed(seed)
    common = TINY | {
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "pad_token_id": 3,
        "eos_token_id": 5,
        "bos_token_id": 1,
    }
    builders = {
        "llama": lambda: transformers.LlamaConfig(**common | changes),
        "mistral": lambda: transformers.MistralConfig(**common | {"sliding_window": 7} | changes),
        "qwen3": lambda: transformers.Qwen3Config(
            **common
            | {
                "head_dim": 8,
                "use_sliding_window": True,
                "sliding_window": 7,
                "layer_types": ["full_attention", "sliding_attention"],
            }
            | changes
        ),
        "gemma3": lambda: transformers.Gemma3TextConfig(
            **common
            | {
                "head_dim": 8,
                "query_pre_attn_scalar": 8,
                "sliding_window": 7,
                "layer_types": ["full_attention", "sliding_attention"],
            }
            | changes
        ),
        "gpt2": lambda: transformers.GPT2Config(
            **{
                "vocab_size": 400,
                "n_embd": 32,
                "n_layer": 2,
                "n_head": 4,
                "n_positions": 512,
                "pad_token_id": 3,
                "eos_token_id": 5,
                "bos_token_id": 1,
                "attn_pdrop": 0.0,
                "embd_pdrop": 0.0,
                "resid_pdrop": 0.0,
            }
            | changes
        ),
    }
    config = builders[kind]()
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype or torch.float32)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A tiny Llama with its tokenizer, saved as a folder that `model_name_or_path` can name. Read-only."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    model = build_model("llama")
    model.config.vocab_size = 400
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def save_lively_model(model_folder, folder):
    """The tiny model of `model_folder` with weights far from zero, so that it does not repeat one token; saved."""
    import torch
    import transformers

    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.add_(torch.randn_like(parameter) * 0.15)
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(model_folder).save_pretrained(folder)
    return folder
