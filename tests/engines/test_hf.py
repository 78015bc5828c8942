"""The engine against a loop written out by hand: one prompt, no padding, no cache, one argmax after another."""

from __future__ import annotations

import copy
import random

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from tests.conftest import build_model

from luthier.core.errors import ConfigError, DataError
from luthier.engines.hf import Engine, GumbelNoise
from luthier.engines.sampling import GenerateConfig

PROMPTS = [[7, 8, 9], [40] * 9 + [11, 12], [60, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50], [30], [5, 3, 17, 3, 5, 120]]
GREEDY = GenerateConfig(do_sample=False, max_new_tokens=12, infer_batch_size=3)


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma3"])
def model(request):
    """float64, so that padding cannot move an argmax; weights spread, so that answers are not one token repeated."""
    return spread(build_model(request.param, dtype=torch.float64))


def spread(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.15)
    return model.eval()


def by_hand(model, prompt, new_tokens, stop=(), penalty=1.0):
    ids, answer = list(prompt), []
    for _ in range(new_tokens):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        for seen in set(ids):
            logits[seen] = logits[seen] / penalty if logits[seen] > 0 else logits[seen] * penalty
        token = int(logits.argmax())
        if token in stop:
            break
        ids.append(token)
        answer.append(token)
    return answer


def test_greedy_answers_are_those_of_each_prompt_alone(model, tokenizer):
    expected = [by_hand(model, prompt, 12) for prompt in PROMPTS]
    assert len({tuple(answer) for answer in expected}) == len(PROMPTS)
    for size in (1, 2, 3, 8):
        sampling = GenerateConfig(do_sample=False, max_new_tokens=12, infer_batch_size=size)
        assert Engine(model, tokenizer).generate(PROMPTS, sampling, []) == expected


def test_stop_ids_end_an_answer_and_are_not_part_of_it(model, tokenizer):
    free = [by_hand(model, prompt, 12) for prompt in PROMPTS]
    stop = (free[0][4], free[1][7])
    expected = [by_hand(model, prompt, 12, stop=stop) for prompt in PROMPTS]
    assert len(expected[0]) <= 4 and expected != free
    assert Engine(model, tokenizer).generate(PROMPTS, GREEDY, stop) == expected


def test_repetition_penalty_does_not_see_the_padding(model, tokenizer):
    sampling = GenerateConfig(do_sample=False, max_new_tokens=8, infer_batch_size=8, repetition_penalty=1.7)
    expected = [by_hand(model, prompt, 8, penalty=1.7) for prompt in PROMPTS]
    assert expected != [by_hand(model, prompt, 8) for prompt in PROMPTS]
    assert Engine(model, tokenizer).generate(PROMPTS, sampling, []) == expected


def test_stream_is_the_text_of_generate(model, tokenizer):
    engine = Engine(model, tokenizer)
    for sampling in (GREEDY, GenerateConfig(max_new_tokens=12, repetition_penalty=1.3, temperature=1.4)):
        answers = engine.generate(PROMPTS, sampling, [5])
        for seed, (prompt, answer) in enumerate(zip(PROMPTS, answers)):
            pieces = list(engine.stream(prompt, sampling, [5], seed=seed))
            assert "".join(pieces) == tokenizer.decode(answer, skip_special_tokens=True)
            assert all(pieces)


def test_stream_stops_at_a_stop_id(model, tokenizer):
    answer = by_hand(model, PROMPTS[0], 12)
    expected = by_hand(model, PROMPTS[0], 12, stop=(answer[5],))
    sampling = GenerateConfig(do_sample=False, max_new_tokens=12, skip_special_tokens=False)
    assert "".join(Engine(model, tokenizer).stream(PROMPTS[0], sampling, [answer[5]])) == tokenizer.decode(expected)


def test_stream_never_shows_half_a_character(tokenizer):
    text = "na\u00efve \u2603\ufe0f \U0001f468\u200d\U0001f469\u200d\U0001f467 \u4f60\u597d, done"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    engine = Engine(Parrot(ids, first=1), tokenizer)
    pieces = list(engine.stream([1], GenerateConfig(do_sample=False, max_new_tokens=len(ids)), []))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert len(pieces) > 5
    whole = text.encode().decode()
    assert all(whole.startswith("".join(pieces[: n + 1])) for n in range(len(pieces)))


def test_stream_keeps_spaces_that_a_tokenizer_writes_only_between_words():
    """SentencePiece tokenizers drop the space of the first token they decode, wherever the decoding begins."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = ["<unk>", "\u2581the", "\u2581quick", "\u2581fox", "es", "\u2581jump"]
    core = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    spaced = transformers.PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", pad_token="<unk>")
    ids = [1, 2, 3, 4, 5, 1]
    assert spaced.decode([2]) == "quick"
    pieces = list(
        Engine(Parrot(ids, first=1), spaced).stream([1], GenerateConfig(do_sample=False, max_new_tokens=6), [])
    )
    assert pieces == ["the", " quick", " fox", "es", " jump", " the"]


def test_stream_shows_at_the_end_what_never_became_a_character(tokenizer):
    ids = tokenizer("ok \U0001f468", add_special_tokens=False)["input_ids"][:-1]
    engine = Engine(Parrot(ids, first=1), tokenizer)
    pieces = list(engine.stream([1], GenerateConfig(do_sample=False, max_new_tokens=len(ids)), []))
    assert "".join(pieces) == tokenizer.decode(ids) and pieces[-1].endswith("\ufffd")


class Parrot(transformers.LlamaForCausalLM):
    """Says the given ids, whatever the prompt."""

    def __init__(self, ids, first):
        super().__init__(build_model("llama").config)
        self.ids, self.first, self.said = ids, first, 0

    def forward(self, input_ids, **kwargs):
        out = super().forward(input_ids=input_ids, **kwargs)
        out.logits[:, -1] = -1.0
        out.logits[:, -1, self.ids[self.said]] = 1.0
        self.said += 1
        return out


def test_adapters_merged_or_not_say_the_same(tokenizer):
    torch.manual_seed(0)
    base = build_model("llama", dtype=torch.float64)
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    spread(adapted)
    apart = Engine(adapted, tokenizer).generate(PROMPTS, GREEDY, [5])
    streamed = ["".join(Engine(adapted, tokenizer).stream(prompt, GREEDY, [5])) for prompt in PROMPTS]
    with adapted.disable_adapter():
        without = Engine(adapted, tokenizer).generate(PROMPTS, GREEDY, [5])
    merged = copy.deepcopy(adapted).merge_and_unload()
    assert apart == [by_hand(merged, prompt, 12, stop=(5,)) for prompt in PROMPTS]
    assert apart == Engine(merged, tokenizer).generate(PROMPTS, GREEDY, [5])
    assert streamed == [tokenizer.decode(answer, skip_special_tokens=True) for answer in apart]
    assert without != apart


def test_the_folders_generation_config_plays_no_part_and_is_left_alone(tokenizer):
    model = spread(build_model("llama", dtype=torch.float64))
    expected = [by_hand(model, prompt, 12) for prompt in PROMPTS]
    stop = expected[0][2]
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=[stop], do_sample=True, temperature=0.01, top_k=1, repetition_penalty=5.0, min_length=3,
        suppress_tokens=[expected[0][0]], forced_eos_token_id=9, max_length=4, no_repeat_ngram_size=1,
    )  # fmt: skip
    before = model.generation_config.to_dict()
    assert Engine(model, tokenizer).generate(PROMPTS, GREEDY, []) == expected
    assert model.generation_config.to_dict() == before


def test_modes_of_the_model_are_put_back(tokenizer):
    model = build_model("gpt2", attn_pdrop=0.5, resid_pdrop=0.5).train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    engine = Engine(model, tokenizer)
    assert engine.generate(PROMPTS, GREEDY, []) == engine.generate(PROMPTS, GREEDY, [])  # dropout is off
    pieces = engine.stream(PROMPTS[0], GREEDY, [])
    next(pieces)
    assert [module.training for module in model.modules()] == modes
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    pieces.close()
    assert [module.training for module in model.modules()] == modes


def test_a_sampled_answer_depends_on_its_seed_and_not_on_its_batch(model, tokenizer):
    engine = Engine(model, tokenizer)
    sampling = GenerateConfig(max_new_tokens=10, temperature=1.5, top_p=0.95, infer_batch_size=8)
    together = engine.generate(PROMPTS, sampling, [], seeds=[11, 12, 13, 14, 15])
    alone = [engine.generate([prompt], sampling, [], seeds=[seed])[0] for prompt, seed in zip(PROMPTS, range(11, 16))]
    other = engine.generate(PROMPTS, sampling, [], seeds=[21, 22, 23, 24, 25])
    assert together == alone
    assert all(a != b for a, b in zip(together, other))


def test_sampling_draws_from_the_softmax_of_what_top_k_and_top_p_leave(tokenizer):
    model = spread(build_model("llama", dtype=torch.float64))
    sampling = GenerateConfig(max_new_tokens=1, temperature=0.7, top_p=0.8, top_k=6, infer_batch_size=4000)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1] / 0.7
    best = logits.topk(6)
    share = best.values.softmax(-1)
    kept = (share.cumsum(-1) - share) < 0.8  # the smallest set that adds up to top_p
    expected = torch.zeros(400, dtype=torch.float64)
    expected[best.indices[kept]] = share[kept] / share[kept].sum()
    drawn = Engine(model, tokenizer).generate([PROMPTS[0]] * 4000, sampling, [], seeds=range(4000))
    seen = torch.bincount(torch.tensor([answer[0] for answer in drawn]), minlength=400) / 4000
    assert int(kept.sum()) > 1
    assert set(seen.nonzero().flatten().tolist()) <= set(best.indices[kept].tolist())
    assert (seen - expected).abs().max() < 4 * (0.25 / 4000) ** 0.5


def test_gumbel_noise_is_a_draw_from_the_softmax():
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, float("-inf")])
    noise = GumbelNoise([3])
    draws = torch.stack([noise(torch.zeros(1, 1), logits[None]).argmax(-1)[0] for _ in range(8000)])
    seen = torch.bincount(draws, minlength=5) / 8000
    assert (seen - logits.softmax(-1)).abs().max() < 0.02
    assert seen[4] == 0


def test_beam_search_finds_the_most_probable_pair(tokenizer):
    model = spread(build_model("llama", dtype=torch.float64), seed=3)
    prompt = PROMPTS[0]
    with torch.no_grad():
        first = model(input_ids=torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
        pairs = model(input_ids=torch.tensor([[*prompt, token] for token in range(400)])).logits[:, -1].log_softmax(-1)
    best = int((first[:, None] + pairs).argmax())
    sampling = GenerateConfig(do_sample=False, num_beams=400, max_new_tokens=2)
    engine = Engine(model, tokenizer)
    assert engine.generate([prompt], sampling, []) == [[best // 400, best % 400]]
    assert "".join(engine.stream(prompt, sampling, [])) == tokenizer.decode(
        [best // 400, best % 400], skip_special_tokens=True
    )


def test_max_length_counts_the_prompt_without_its_padding(model, tokenizer):
    sampling = GenerateConfig(do_sample=False, max_new_tokens=0, max_length=14, infer_batch_size=8)
    expected = [by_hand(model, prompt, 14 - len(prompt)) for prompt in PROMPTS]
    assert Engine(model, tokenizer).generate(PROMPTS, sampling, []) == expected


def test_answers_end_where_the_models_context_ends(tokenizer):
    model = spread(build_model("gpt2", dtype=torch.float64, n_positions=10))
    engine = Engine(model, tokenizer)
    assert engine.context == 10
    assert engine.generate([[7, 8, 9], [10]], GREEDY, []) == [by_hand(model, [7, 8, 9], 7), by_hand(model, [10], 9)]
    with pytest.raises(DataError, match="prompt of 10 tokens leaves no room"):
        engine.generate([[7] * 10], GREEDY, [])


def test_a_prompt_without_tokens_is_refused(tokenizer):
    engine = Engine(build_model("llama"), tokenizer)
    with pytest.raises(DataError, match="no tokens"):
        engine.generate([[1], []], GREEDY, [])
    with pytest.raises(DataError, match="no tokens"):
        next(engine.stream([], GREEDY, []))


def test_no_prompts_no_answers(tokenizer):
    assert Engine(build_model("llama"), tokenizer).generate([], GREEDY, []) == []


@pytest.mark.parametrize(
    ("keys", "word"),
    [
        ({"temperature": 0.0}, "do_sample: false"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"num_beams": 0}, "num_beams"),
        ({"max_new_tokens": 0, "max_length": 0}, "max_length"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"infer_batch_size": 0}, "infer_batch_size"),
    ],
)
def test_values_that_cannot_work_are_refused(keys, word):
    with pytest.raises(ConfigError, match=word):
        GenerateConfig(**keys)


def test_room_is_what_the_keys_and_the_context_leave():
    rng = random.Random(0)
    for _ in range(200):
        prompt, new, length, context = (rng.randint(1, 40) for _ in range(4))
        sampling = GenerateConfig(max_new_tokens=new, max_length=length)
        assert sampling.room(prompt, None) == new
        assert sampling.room(prompt, context) == max(0, min(new, context - prompt))
        assert GenerateConfig(max_new_tokens=0, max_length=length).room(prompt, None) == max(0, length - prompt)
