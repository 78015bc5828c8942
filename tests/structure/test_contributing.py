"""The files shown in CONTRIBUTING.md work as they stand, in a user's own folder."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from luthier.core import registry
from luthier.core.types import Answer, Example, Message

GUIDE = Path(__file__).resolve().parents[2] / "CONTRIBUTING.md"
EXAMPLE = Example((Message("user", "What is a luthier?"),), (Answer((Message("assistant", "She makes violins."),)),))


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A plugins folder with every file of the guide."""
    for block in re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL):
        name = re.match(r"# (\S+\.py)\n", block)
        assert name, "the first line of a file in the guide is its name"
        (tmp_path / name[1]).parent.mkdir(exist_ok=True)
        (tmp_path / name[1]).write_text(block)
    monkeypatch.setattr(registry, "_plugins", [])
    registry.use_plugins(tmp_path)
    return tmp_path


def test_the_stage_weighs_tokens_by_their_probability(mine, tokenizer):
    import torch
    from tests.conftest import build_model

    from luthier.data.layout import collate
    from luthier.data.renderer import make_renderer
    from luthier.data.template import TemplateConfig
    from luthier.model.policy import PolicySetup

    stage = registry.find("objectives", "dft")
    renderer = make_renderer(TemplateConfig(template="chatml"), tokenizer)
    objective = stage.Dft(stage.DftConfig(dft_power=1.0))
    (encoded,) = objective.encode(EXAMPLE, renderer, cutoff_len=64)
    model = build_model("llama", dtype=torch.float64).eval()
    batch = collate([(encoded, "row 1")], layout="padded", pad_id=3)
    loss, logs = objective.loss(PolicySetup(model).bind(), batch)

    path = encoded.paths[0]
    with torch.no_grad():
        probs = model(torch.tensor([path.ids])).logits[0].softmax(-1)
    trained = [(i, token) for i, (token, weight) in enumerate(zip(path.ids, path.weights)) if weight]
    p = [probs[i - 1, token].item() for i, token in trained]
    assert loss.item() == pytest.approx(sum(-x * math.log(x) for x in p) / len(p), rel=1e-6)
    assert logs["weight"].item() == pytest.approx(sum(p) / len(p), rel=1e-6)


def test_the_stage_cuts_and_counts(mine, tokenizer):
    from luthier.data.renderer import make_renderer
    from luthier.data.template import TemplateConfig

    renderer = make_renderer(TemplateConfig(template="chatml"), tokenizer)
    objective = registry.find("objectives", "dft").Dft()
    (whole,) = objective.encode(EXAMPLE, renderer, cutoff_len=1000)
    (cut,) = objective.encode(EXAMPLE, renderer, cutoff_len=12)
    assert len(cut.paths[0].ids) == 12
    assert cut.truncated == len(whole.paths[0].ids) - 12


def test_the_format_reads_and_refuses(mine):
    from luthier.data.source import BadRow

    faq = registry.find("formats", "faq")
    example = faq.read({"q": "Why?", "a": "Because."}, None)
    assert (example.prompt[0].content, example.answers[0].messages[0].content) == ("Why?", "Because.")
    with pytest.raises(BadRow, match="empty"):
        faq.read({"q": "Why?"}, None)


def test_the_template_is_written_as_shown(mine, tokenizer):
    from luthier.data.renderer import make_renderer
    from luthier.data.template import TemplateConfig

    renderer = make_renderer(TemplateConfig(template="plain_talk"), tokenizer)
    prompt = renderer.prompt(EXAMPLE.prompt, system="Be kind.")
    assert tokenizer.decode(prompt) == "Be kind.\n\nUser: What is a luthier?\nAssistant: "


def test_the_drafter_repeats(mine):
    drafter = registry.find("drafters", "echo").build(None, None, None, None)
    assert drafter.propose([*range(100, 120)], 5).ids == [104, 105, 106, 107, 108]
    assert drafter.propose([7, 8], 5).ids == [7, 8]


def test_the_scorer_goes_by_rank(mine):
    from luthier.engines.rounds import Mismatch, Round
    from luthier.scorers._spot import Request, Spot, scorer_in

    module = registry.find("scorers", "rank")
    scorer = scorer_in(module)(module.Config(rank_power=2.0), None)
    request, one = Request(0, "Q", [1], [2, 3], None), Round(0, [4], [2, 3], [])
    assert scorer.score([Spot(request, one, Mismatch(0, 0.7, 0.25, rank)) for rank in (2, 3, 5)]) == [1, 1 / 4, 1 / 16]


def test_the_dialect_is_read_as_it_is_written_and_saved(mine, tokenizer):
    import copy

    from luthier.core.types import Call
    from luthier.data.renderer import make_renderer
    from luthier.data.template import TemplateConfig

    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = None
    renderer = make_renderer(TemplateConfig(template="chatml", tool_format="tagged"), tokenizer)
    call = {"name": "add", "arguments": {"a": 1}}
    asked = Message("user", "What is 1 + 1?")
    source, said = renderer.oneturn(
        (asked, Message("function", f"{call}".replace("'", '"'))), tools='[{"name": "add"}]'
    )
    assert tokenizer.decode(said) == '[[{"name": "add", "arguments": {"a": 1}}]]<|im_end|>\n'
    assert renderer.reply("Well. [[no]] [[{}]]").calls == ()
    assert renderer.reply(tokenizer.decode(said[:-2])).calls == (Call("add", {"a": 1}),)
    talk = [{"role": "user", "content": asked.content}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    served = tokenizer.apply_chat_template(talk, tools=[{"name": "add"}], tokenize=False)
    assert served == tokenizer.decode(source + said)


def test_the_optimiser_moves_by_signs(mine):
    import torch
    import transformers
    from tests.conftest import build_model

    from luthier.core.errors import ConfigError
    from luthier.optim._task import Task
    from luthier.run import resolve
    from luthier.train import optimiser

    run = resolve({"model_name_or_path": "m", "dataset": "d", "output_dir": "o", "use_signum": True})
    args = transformers.TrainingArguments(output_dir="o", report_to="none", use_cpu=True, learning_rate=0.25)
    factory, settings = optimiser.choose(run.optim, Task(args, adapter=False))
    model = build_model("llama")
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    made = factory()(model, **settings)
    for weight in model.parameters():
        weight.grad = torch.linspace(-1, 1, weight.numel()).view_as(weight)
    made.step()
    for name, weight in model.named_parameters():
        signs = torch.linspace(-1, 1, weight.numel()).view_as(weight).sign()
        torch.testing.assert_close(weight.detach(), before[name] - 0.25 * signs)
    args.weight_decay = 0.1
    with pytest.raises(ConfigError, match="use_signum: knows no weight_decay"):
        optimiser.choose(run.optim, Task(args, adapter=False))


def test_the_quantisation_leaves_down_projections_whole(mine, model_folder):
    pytest.importorskip("bitsandbytes")
    from luthier.model.load import load_model
    from luthier.model.quantise import QuantConfig
    from luthier.model.source import ModelConfig

    quant = QuantConfig(quantization_bit=8, quantization_method="careful")
    model = load_model(ModelConfig(model_name_or_path=str(model_folder)), quant=quant)
    kinds = {name.split(".")[-1]: type(module).__name__ for name, module in model.named_modules()}
    assert (kinds["up_proj"], kinds["down_proj"], kinds["lm_head"]) == ("Linear8bitLt", "Linear", "Linear")
