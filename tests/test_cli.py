"""The command line: which verb is called with what, exit codes, help, and that it starts without heavy imports."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from types import ModuleType

import pytest

import luthier
from luthier import cli, launch
from luthier.cli import main
from luthier.commands import VERBS, parse_command
from luthier.core.errors import ConfigError, DataError
from luthier.keys import USUAL
from luthier.run import resolve
from luthier.schema import sections

LAUNCH_SCRIPT = """
    --deepspeed {deepspeed}
    --model_name_or_path ../model/qwen/Qwen2-7B-Instruct
    --stage sft
    --do_train
    --finetuning_type lora
    --lora_target all
    --dataset user
    --template qwen
    --cutoff_len 8192
    --overwrite_cache true
    --preprocessing_num_workers 16
    --output_dir saves/qwen2-7b/lora/sft
    --logging_steps 10
    --save_steps 500
    --plot_loss true
    --overwrite_output_dir true
    --per_device_train_batch_size 1
    --gradient_accumulation_steps 8
    --learning_rate 1.0e-4
    --num_train_epochs 3.0
    --lr_scheduler_type cosine
    --warmup_ratio 0.1
    --bf16 true
    --ddp_timeout 180000000
    --val_size 0.1
    --per_device_eval_batch_size 1
    --eval_strategy steps
    --eval_steps 500
    --ddp_find_unused_parameters false
"""


@pytest.fixture(autouse=True)
def own_log(monkeypatch):
    """The handler that `main` sets up belongs to this test's stderr and goes with it."""
    root = logging.getLogger("luthier")
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "propagate", True)
    monkeypatch.setattr(root, "level", root.level)


@pytest.fixture
def verb(monkeypatch):
    """Stands in for `luthier.launch` and remembers how it was called."""
    module = ModuleType("luthier.launch")
    module.LaunchConfig = launch.LaunchConfig
    module.calls = []
    module.raises = None

    def run(argv):
        module.calls.append(argv)
        if module.raises is not None:
            raise module.raises
        return 0

    module.main = run
    for name in ("luthier.launch", "luthier.fit"):
        monkeypatch.setitem(sys.modules, name, module)
    return module


def test_a_verb_gets_its_arguments(verb):
    assert main(["train", "a.yaml", "x=1", "--do_train"]) == 0
    assert verb.calls == [["a.yaml", "x=1", "--do_train"]]


@pytest.mark.parametrize("debug", [False, True])
def test_an_error_of_the_user_is_one_message_and_exit_code_2(verb, capsys, debug):
    verb.raises = DataError("data.jsonl:3: not JSON.")
    assert main(["train", "a.yaml", *(["--debug"] if debug else [])]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "error: data.jsonl:3: not JSON." in captured.err
    assert ("Traceback" in captured.err) is debug
    assert verb.calls == [["a.yaml"]]


def test_an_interrupt_is_130_and_a_defect_is_not_hidden(verb):
    verb.raises = KeyboardInterrupt()
    assert main(["train", "a.yaml"]) == 130
    verb.raises = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError):
        main(["train", "a.yaml"])


def test_unknown_verb_names_the_nearest(capsys):
    assert main(["trian"]) == 2
    assert "'trian'. Did you mean 'train'?" in capsys.readouterr().err


def test_version_and_help(capsys):
    for words in (["version"], ["--version"]):
        assert main(words) == 0
        assert capsys.readouterr().out == f"luthier {luthier.__version__}\n"
    for words in ([], ["--help"], ["-h"], ["help"]):
        assert main(words) == 0
        out = capsys.readouterr().out
        assert all(f"  {name} " in out for name in [*VERBS, "version"])


@pytest.mark.parametrize("name", sorted(set(VERBS) - {"fetch-model"}))
def test_every_verb_explains_itself_with_an_example(name, capsys):
    assert main([name, "--help"]) == 0
    out = capsys.readouterr().out
    assert VERBS[name].example in out and all(f"--{flag}" in out for flag in VERBS[name].flags)
    assert main(["help", name]) == 0
    assert capsys.readouterr().out == out


def test_train_help_shows_the_usual_keys_and_all_of_them_are_keys(capsys):
    main(["train", "--help"])
    out = capsys.readouterr().out
    known = {name for section in sections() for name in section.keys}
    assert USUAL.keys() <= known and all(f"  {name} " in out for name in USUAL)


def test_keys_are_listed_with_default_and_text(capsys):
    assert main(["keys"]) == 0
    out = capsys.readouterr().out
    for words in ("[model]", "[stage: sft]", "[finetuning_type: lora]", "  lora_rank = 8\n      Rank", "warmup_steps"):
        assert words in out


def test_keys_are_looked_up_by_name_and_by_owner(capsys):
    assert main(["keys", "Save_Steps", "kto"]) == 0
    out = capsys.readouterr().out
    assert "  save_steps = 500" in out and "  kto_chosen_weight" in out and "[stage: kto]" in out
    assert "save_total_limit" not in out and "[model]" not in out
    assert main(["keys", "lorra_rank"]) == 2 and "Did you mean lora_rank" in capsys.readouterr().err
    assert main(["keys", "--all"]) == 2 and "--all" in capsys.readouterr().err


@pytest.mark.parametrize("buffered", ["", "1"])
def test_a_reader_that_has_seen_enough_is_no_mistake(buffered):
    read, write = os.pipe()
    os.close(read)
    env = os.environ | {"PYTHONUNBUFFERED": buffered}
    words = [sys.executable, "-m", "luthier", "--help"]
    found = subprocess.run(words, stdout=write, stderr=subprocess.PIPE, env=env, check=False)
    os.close(write)
    assert (found.returncode, found.stderr) == (141, b"")


def test_verbs_are_files_with_a_main():
    import importlib

    for verb in VERBS.values():
        assert callable(importlib.import_module(verb.module).main)


# Arguments


@pytest.mark.parametrize(
    "argv, config, overrides",
    [
        (["a.yaml"], "a.yaml", []),
        (["a.yaml", "x=1", "y=a,b"], "a.yaml", ["x=1", "y=a,b"]),
        (["a.yaml", "--x", "1", "--flag", "--y=2"], "a.yaml", ["x=1", "flag=true", "y=2"]),
        (["--x", "-1", "--flag"], {}, ["x=-1", "flag=true"]),
        (["--learning-rate", "1e-4"], {}, ["learning_rate=1e-4"]),
        (["--report_to", "wandb", "tensorboard", "--x", "1"], {}, ["report_to=[wandb, tensorboard]", "x=1"]),
        (["--x", "1", "y=2"], {}, ["x=1", "y=2"]),
        (["--text", "a b"], {}, ["text=a b"]),
        (["x=1", "a.yaml"], "a.yaml", ["x=1"]),
    ],
)
def test_arguments(argv, config, overrides):
    assert parse_command(argv, "train") == (config, overrides, {"ray": False})


def test_flags_of_verbs():
    defaults = {"rows": None, "count": 1000, "full": False, "plot": False, "format": "text"}
    assert parse_command(["a.yaml"], "preview").flags == defaults
    command = parse_command(["--rows", "3", "a.yaml", "--format=jsonl", "x=1"], "preview")
    assert command == ("a.yaml", ["x=1"], defaults | {"rows": 3, "format": "jsonl"})
    assert parse_command(["--plot", "a.yaml"], "preview") == ("a.yaml", [], defaults | {"plot": True})
    assert parse_command(["--plot=l.png", "a.yaml"], "preview").flags["plot"] == "l.png"
    assert parse_command(["--markdown"], "schema").flags == {"markdown": True, "compatibility": False}
    command = parse_command(["a.yaml", "--input", "in.jsonl", "--output", "out.jsonl"], "infer")
    assert command.flags == {"input": "in.jsonl", "output": "out.jsonl", "n": 1, "select": None}


@pytest.mark.parametrize(
    "argv, name, words",
    [
        ([], "train", "needs a configuration"),
        (["a.yaml", "b.yaml"], "train", "one argument too many"),
        (["a.yaml", "--rows"], "preview", "--rows wants a value"),
        (["a.yaml", "--rows", "few"], "preview", "whole number"),
        (["a.yaml", "--format", "html"], "preview", "one of text, jsonl"),
        (["a.yaml", "--output", "o"], "infer", "--input FILE is missing"),
        (["x=1"], "env", "knows no argument 'x=1'"),
    ],
)
def test_wrong_arguments(argv, name, words):
    with pytest.raises(ConfigError, match=words):
        parse_command(argv, name)


def test_the_launch_script_that_users_have(tmp_path):
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 2}}')
    argv = LAUNCH_SCRIPT.format(deepspeed=tmp_path / "ds.json").split()
    command = parse_command(argv, "train")
    run = resolve(command.config, command.overrides)
    assert command.config == {} and run.source.path is None
    assert (run.model.model_name_or_path, run.data.dataset, run.layout.cutoff_len) == (
        "../model/qwen/Qwen2-7B-Instruct",
        "user",
        8192,
    )
    assert run.training["do_train"] is True and run.training["warmup_steps"] == 0.1
    assert run.training["learning_rate"] == 1e-4 and run.training["ddp_find_unused_parameters"] is False
    assert run.train.overwrite_output_dir is True and run.data.overwrite_cache is True and run.train.plot_loss is True
    assert run.warnings == ()


def test_python_does_what_the_command_line_does(verb, tmp_path):
    runs = []
    verb.fit = runs.append
    path = tmp_path / "a.yaml"
    path.write_text("model_name_or_path: m\ndataset: d\noutput_dir: o\n")
    values = {
        "learning_rate": 1e-5,
        "adapter_folder": "no",
        "lora_target": ["q_proj"],
        "default_system": "a: b # c",
        "seed": 3,
    }
    luthier.train(path, **values)
    luthier.train({"model_name_or_path": "m", "dataset": "d", "output_dir": "o"} | values)
    for run in runs:
        assert run.training["learning_rate"] == 1e-5 and run.training["seed"] == 3
        assert (run.adapter.adapter_folder, run.template.default_system) == ("no", "a: b # c")
        assert run.adapter_keys.lora_target == ["q_proj"]
    assert len(runs) == 2 and luthier.resolve is resolve
    with pytest.raises(AttributeError):
        luthier.nothing  # noqa: B018


# Start


@pytest.mark.parametrize("words", [["version"], ["--help"], ["preview", "--help"], ["train", "--help"]])
def test_light_words_import_nothing_heavy(words):
    code = (
        "import sys; from luthier.cli import main; assert main(sys.argv[1:]) == 0;"
        "heavy = {'torch', 'transformers', 'pydantic', 'omegaconf', 'numpy', 'rich', 'peft'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code, *words], check=True, capture_output=True, timeout=60)


def test_python_dash_m_is_the_command():
    done = subprocess.run([sys.executable, "-m", "luthier", "nonsense"], capture_output=True, text=True, timeout=60)
    assert (
        done.returncode == 2 and "error: there is no command 'nonsense'" in done.stderr and "Trace" not in done.stderr
    )


def test_logs_go_to_stderr(verb, capsys):
    verb.main = lambda argv: logging.getLogger("luthier.launch").info("hello") or 0
    assert cli.main(["train", "a.yaml"]) == 0
    captured = capsys.readouterr()
    assert "hello" in captured.err and captured.out == ""
