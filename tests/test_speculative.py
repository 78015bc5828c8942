"""Which model speaks and which one judges, however target, adapters and accept head lie on disk."""

from __future__ import annotations

import json
import re

import peft
import pytest
import safetensors.torch
import torch
import transformers

from luthier.core.errors import ConfigError, ModelError
from luthier.model import heads
from luthier.run import Run
from luthier.run import resolve as resolve_run
from luthier.speculative import accept_folder, find_fast, greedy, load_fast
from tests.conftest import save_lively_model

IDS = list(range(20, 40))


@pytest.fixture(scope="module")
def folder(model_folder, tmp_path_factory):
    return save_lively_model(model_folder, tmp_path_factory.mktemp("target"))


def plain(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def logits(model):
    with torch.no_grad():
        return model(torch.tensor([IDS]), use_cache=False).logits[0, -1]


def save_head(folder, **facts):
    """An accept head with weights far apart, in a folder of its own or beside what is there."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(5)
    head = heads.find("heads", "accept").build(32, None)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(torch.randn_like(parameter))
    heads.save(head, "accept", folder, {"layout": "sep", "sep_id": 5, "threshold": 0.4, "frozen": True} | facts)
    return folder


def save_adapter(model, folder, seed):
    """A LoRA adapter on `model`, saved; returns the model with it merged."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    adapted.save_pretrained(folder)
    return adapted.merge_and_unload().eval()


def resolve(keys) -> Run:
    return resolve_run(keys, verb="speculate")


def fast(model, **keys):
    return load_fast(resolve({"model_name_or_path": str(model), "use_cpu": True, "draft": "prompt_lookup"} | keys))


def speaks(found):
    return found.engine.speculator.target.verify(IDS, []).logits[0]


def judges(found):
    return found.judge.scorer.run(IDS).logits[0]


def agree(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_without_a_head_nothing_is_judged(folder):
    found = fast(folder)
    assert found.judge is None
    agree(speaks(found), logits(plain(folder)))


@pytest.mark.parametrize(("layout", "own_pass"), [("judge", False), ("sep", True), ("hybrid", True)])
def test_a_head_on_a_frozen_backbone_reads_the_targets_own_states(folder, tmp_path, layout, own_pass):
    found = fast(folder, accept_head=str(save_head(tmp_path / "head", layout=layout)))
    assert found.judge.scorer is (found.engine.speculator.target if own_pass else None)
    assert found.judge.threshold == 0.4
    head = heads.head_of(found.engine.speculator.target.model)
    stored = safetensors.torch.load_file(tmp_path / "head" / "accept_head.safetensors")
    assert torch.equal(head.fc1.weight, stored["v_head.fc1.weight"]) and not head.training


def test_the_users_threshold_wins(folder, tmp_path):
    assert fast(folder, accept_head=str(save_head(tmp_path)), accept_threshold=0.9).judge.threshold == 0.9


@pytest.mark.parametrize("named", ["adapter_name_or_path", "output_dir", "accept_head"])
def test_an_adapter_trained_with_the_head_judges_and_does_not_speak(folder, tmp_path, named, caplog):
    adapted = save_adapter(plain(folder), tmp_path, 1)
    # The judge layout too: the target's own states are not those that the head was trained on.
    save_head(tmp_path, frozen=False, layout="judge" if named == "output_dir" else "sep")
    found = fast(folder, **{named: str(tmp_path)})
    agree(speaks(found), logits(plain(folder)))
    agree(judges(found), logits(adapted))
    agree(speaks(found), logits(plain(folder)))
    assert not torch.allclose(speaks(found), judges(found), atol=0.1)
    assert "model before training" not in caplog.text


def test_adapters_below_are_part_of_the_target(folder, tmp_path):
    spoken = save_adapter(plain(folder), tmp_path / "sft", 1)
    expected = logits(spoken)
    judged = save_adapter(spoken, tmp_path / "accept", 2)
    save_head(tmp_path / "accept", frozen=False)
    found = fast(folder, adapter_name_or_path=f"{tmp_path / 'sft'},{tmp_path / 'accept'}")
    agree(speaks(found), expected)
    agree(judges(found), logits(judged))


def test_an_adapter_that_went_on_from_the_targets_replaces_it_in_the_judge_alone(folder, tmp_path):
    """Training with adapter_name_or_path goes on with that adapter: what it saves stands on the bare model."""
    spoken = save_adapter(plain(folder), tmp_path / "sft", 1)
    judged = save_adapter(plain(folder), tmp_path / "accept", 2)
    save_head(tmp_path / "accept", frozen=False)
    keys = {"adapter_name_or_path": str(tmp_path / "sft"), "output_dir": str(tmp_path / "accept")}
    found = fast(folder, **keys)
    agree(speaks(found), logits(spoken))
    agree(judges(found), logits(judged))
    # The folder remembers how it was trained, also where the configuration at hand does not.
    (tmp_path / "accept" / "resolved_config.yaml").write_text(
        f"model_name_or_path: {folder}\nadapter_name_or_path: {tmp_path / 'sft'}\nfinetuning_type: lora\n"
    )
    found = fast(folder, adapter_name_or_path=str(tmp_path / "sft"), accept_head=str(tmp_path / "accept"))
    agree(speaks(found), logits(spoken))
    agree(judges(found), logits(judged))


def test_a_frozen_adapter_beside_the_head_is_the_targets(folder, tmp_path):
    spoken = save_adapter(plain(folder), tmp_path / "accept", 1)
    save_head(tmp_path / "accept")
    found = fast(folder, output_dir=str(tmp_path / "accept"))
    agree(speaks(found), logits(spoken))
    assert found.judge.scorer is found.engine.speculator.target


def test_a_model_trained_whole_with_the_head_judges_and_does_not_speak(folder, tmp_path):
    trained = plain(folder)
    with torch.no_grad():
        trained.model.layers[0].mlp.down_proj.weight.mul_(-3)
    trained.save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    save_head(tmp_path, frozen=False)
    found = fast(folder, accept_head=str(tmp_path), finetuning_type="full")
    agree(speaks(found), logits(plain(folder)))
    agree(judges(found), logits(trained))
    with pytest.raises(ConfigError, match="trained to judge, not to speak"):
        fast(tmp_path, finetuning_type="full")


def test_a_training_folder_is_a_configuration(folder, tmp_path):
    save_head(tmp_path)
    (tmp_path / "resolved_config.yaml").write_text(f"model_name_or_path: {folder}\ndo_sample: true\nuse_cpu: true\n")
    run = find_fast(tmp_path, ["draft=prompt_lookup", "accept_threshold=0.7"])
    assert accept_folder(run) == tmp_path
    assert greedy(run).do_sample is False
    assert load_fast(run).judge.threshold == 0.7
    with pytest.raises(ConfigError, match="resolved_config"):
        find_fast(folder, [])


def test_a_folder_without_an_accept_head_is_refused(folder, tmp_path):
    with pytest.raises(ModelError, match="holds no accept_head"):
        fast(folder, accept_head=str(tmp_path))
    (tmp_path / "value_head.safetensors").write_bytes(b"")
    assert accept_folder(resolve({"model_name_or_path": str(folder), "output_dir": str(tmp_path)})) is None


@pytest.mark.parametrize(
    ("keys", "complaint"),
    [
        ({"draft": None}, "draft is not set"),
        ({"do_sample": True}, "do_sample: true"),
        ({"num_beams": 2}, "num_beams: 2"),
    ],
)
def test_what_speculation_cannot_do_is_refused(folder, keys, complaint):
    run = resolve({"model_name_or_path": str(folder), "draft": "prompt_lookup"} | keys)
    with pytest.raises(ConfigError, match=complaint):
        greedy(run)


def test_greedy_is_what_happens_where_nothing_is_said(folder):
    run = resolve({"model_name_or_path": str(folder), "draft": "prompt_lookup"})
    assert run.generate.do_sample and not greedy(run).do_sample


def test_a_head_of_another_size_is_refused(folder, tmp_path):
    head = heads.find("heads", "accept").build(48, None)
    heads.save(head, "accept", tmp_path, {"layout": "judge", "frozen": True})
    with pytest.raises(ModelError, match="does not fit"):
        fast(folder, accept_head=str(tmp_path))


def test_a_head_that_does_not_say_how_it_was_trained_is_refused(folder, tmp_path):
    save_head(tmp_path)
    (tmp_path / "accept_head.json").write_text(json.dumps({"head": "accept"}))
    with pytest.raises(ModelError, match="layout None"):
        fast(folder, accept_head=str(tmp_path))


def test_the_engine_keeps_the_stop_token_where_it_is_asked_to(folder):
    found = fast(folder, max_new_tokens=9)
    sampling = greedy(resolve({"model_name_or_path": str(folder), "draft": "prompt_lookup", "max_new_tokens": 9}))
    (whole,) = found.engine.generate([IDS], sampling, [])
    stop, cut = whole[4], whole.index(whole[4])
    assert len(whole) == 9
    assert found.engine.generate([IDS], sampling, [stop], keep_stop=True) == [whole[: cut + 1]]
    assert found.engine.generate([IDS, IDS], sampling, [stop]) == [whole[:cut]] * 2
    assert list(found.engine.stream(IDS, sampling, [stop])) and found.engine.tally.tokens == cut + 1


@pytest.mark.parametrize(
    ("verb", "keys", "complaint"),
    [
        ("infer", {"draft": "prompt_lookup"}, "draft has no effect on infer"),
        ("chat", {"draft": "prompt_lookup", "draft_layers": 3}, "draft_layers has no effect.*draft is prompt_lookup"),
        ("speculate", {"draft": "early_exit", "draft_layers": 1, "draft_model": "x"}, "draft_model has no effect"),
        ("speculate", {"draft": "early_exit", "draft_layers": 1}, None),
        ("train", {"draft": "prompt_lookup", "draft_layers": 3, "output_dir": "x", "dataset": "x"}, None),
    ],
)
def test_keys_that_change_nothing_are_pointed_out(folder, verb, keys, complaint):
    warnings = [
        line for line in resolve_run({"model_name_or_path": str(folder)} | keys, verb=verb).warnings if "draft" in line
    ]
    assert bool(warnings) == (complaint is not None)
    assert complaint is None or re.search(complaint, warnings[0])
