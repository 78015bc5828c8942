"""`luthier eval`: how a model does on held-out rows, by the measures of its stage. Trains nothing, changes no weights.

luthier eval CONFIG [--output FOLDER] [--as-is] [key=value ...]

CONFIG is the YAML file of a training, and stands for what it trained into output_dir; or the folder that a training
left behind, also one of its checkpoints; or a file that names any model. The rows are those of eval_dataset, or the
share that val_size holds out. What is written: eval_results.json, and where the stage judges answers
generated_predictions.jsonl with the report of the stage.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier import predictions
from luthier.assemble import (
    bundles,
    in_half,
    lay_out,
    load_base,
    load_data,
    make_policy,
    make_trainer,
    one_device_each,
    weights,
)
from luthier.commands import Command, parse_command
from luthier.core import log as logging
from luthier.core.errors import ConfigError, ModelError
from luthier.run import Run, resolve

if TYPE_CHECKING:
    import transformers

    from luthier.model.policy import PolicySetup
    from luthier.train.trainer import Trainer

log = logging.get_logger("eval")

RESULTS = "eval_results.json"
CONFIG = "eval_config.yaml"
FOLDER, FOLDER_AS_IS = "eval", "eval-as-is"
KEPT = (
    "per_device_eval_batch_size", "seed", "data_seed", "bf16", "fp16", "tf32", "use_cpu", "label_smoothing_factor",
    "dataloader_num_workers", "dataloader_prefetch_factor", "dataloader_persistent_workers", "ddp_backend",
    "ddp_timeout", "do_predict", "disable_tqdm",
)  # fmt: skip
"""The training keys that mean something here."""
SHARDING = ("deepspeed", "fsdp")
NAMES_A_MODEL = ("model_name_or_path", "adapter_name_or_path")


@dataclass(frozen=True)
class Subject:
    """What is evaluated."""

    run: Run
    """Loads it."""
    trained: Path | None
    """The folder of what was trained, unless the model is taken as it is."""
    output: Path
    """Where the results go."""


def evaluate(subject: Subject) -> dict[str, float]:
    """The measures; they, predictions and the report of the stage are left in `subject.output`."""
    import transformers

    from luthier.core.registry import find
    from luthier.train import config, report

    logging.quiet_libraries()
    run, folder = subject.run, subject.output
    folder.mkdir(parents=True, exist_ok=True)
    args = config.training_arguments(run.training, run.train)
    one_device_each(args)
    transformers.set_seed(args.seed)

    tokenizer, data = load_data(run, seed=args.seed, trains=False)
    if not data.eval:
        log.warning(
            "WARNING: neither eval_dataset nor val_size is set: this measures on dataset itself (%s), which the model "
            "may have been trained on.",
            run.data.dataset,
        )
    setup = _policy(subject, tokenizer, args)
    sets = {name: bundles(run, part) for name, part in (data.eval or {"": data.whole}).items()}
    largest = max(sets.values(), key=len)
    laid_out = lay_out(run, largest, setup, tokenizer, batch_size=args.per_device_eval_batch_size)
    trainer = make_trainer(
        run,
        setup,
        args,
        tokenizer,
        eval_dataset=sets.get("", sets),
        data_collator=laid_out.collator,
        callbacks=[find("callbacks", "progress").wanted(run)],
    )
    found = {
        name: value for name, value in trainer.evaluate().items() if name != "epoch"
    }  # of a training: there is none
    found = report.with_perplexity(found) if run.objective.perplexity else found
    found |= _judged(run, trainer, folder)
    if trainer.is_world_process_zero():
        _write(folder, run, found)
    return found


def _judged(run: Run, trainer: Trainer, folder: Path) -> dict[str, float]:
    """What the report of the stage measures, and predictions on disk, for stages that judge answers."""
    if not run.objective.report and not trainer.args.do_predict:
        return {}
    written = predictions.write_predictions(trainer, trainer.eval_dataset, folder)
    reports = run.objective.report and trainer.is_world_process_zero()
    return predictions.report(written, run.objective) if reports else {}


def _policy(subject: Subject, tokenizer: Any, args: transformers.TrainingArguments) -> PolicySetup:
    """The model as its own training would have evaluated it: the last adapter is not merged."""
    from luthier.model.adapt import adapt, adapter_folders

    run = subject.run
    head_from = _head_from(subject)
    folders = adapter_folders(run.adapter, run.model)
    keeps = bool(folders) and run.objective.trains_backbone and not run.adapter.create_new_adapter
    model = load_base(run, tokenizer, dtype=weights(run, args), device=args.device, seed=args.seed)
    model = adapt(
        model,
        run.adapter,
        run.adapter_keys,
        model_config=run.model,
        trainable=keeps,
        upcast=not in_half(run),
    )
    return make_policy(run, model, args, head_from=head_from)


def _head_from(subject: Subject) -> Path | None:
    """Where the stage's head lies, if it has one. Raises ModelError where there is none: a random one says nothing."""
    from luthier.model import heads
    from luthier.serving import head_folder

    run = subject.run
    if run.objective.head is None:
        return None
    if subject.trained is not None and heads.saved_in(subject.trained):
        return subject.trained
    folder = head_folder(run)
    if folder is None:
        raise ModelError(
            f"Stage {run.stage} judges with a head, and neither {run.model.model_name_or_path} nor an adapter has one "
            f"({run.objective.head}_head.safetensors). Name what was trained: its folder, or adapter_name_or_path."
        )
    return folder


def subject_of(command: Command) -> Subject:
    """What a command line asks for. Raises ConfigError where there is nothing to evaluate, or nowhere to write."""
    from luthier.serving import left_in

    config, overrides = command.config, list(command.overrides)
    given = {text.partition("=")[0] for text in overrides}
    if "eval_dataset" in given and "val_size" not in given:
        # Rows that are named now take the place of those the training held out.
        overrides.append("val_size=0")
    as_is = command.flags["as-is"]
    folder = Path(config).expanduser() if isinstance(config, str) else None
    if folder is not None and folder.is_dir():
        run = resolve(left_in(folder), overrides, verb="eval")
        base = folder.parent if folder.name.startswith("checkpoint-") else folder
        part = folder.name if base != folder else ""
    else:
        run = resolve(config, overrides, verb="eval")
        as_is = as_is or bool(given.intersection(NAMES_A_MODEL))
        folder = base = _output_dir(run)
        part = ""
    trained = None if as_is or folder is None or not _holds_model(folder) else folder
    output = Path(command.flags.get("output") or _default_output(base, part, as_is)).expanduser()
    run = run if trained is None else _as_trained(run, trained)
    return Subject(_measuring(run, output), trained, output)


def _output_dir(run: Run) -> Path | None:
    named = run.training.get("output_dir")
    return Path(named).expanduser() if named else None


def _default_output(base: Path | None, part: str, as_is: bool) -> Path:
    if base is None:
        raise ConfigError("output_dir is not set, so say where the results go: --output FOLDER.")
    return base / (FOLDER_AS_IS if as_is else FOLDER) / part


def _holds_model(folder: Path) -> bool:
    """Whether something was trained into a folder. Raises ConfigError where only checkpoints are there."""
    from luthier.model.heads import saved_in
    from luthier.train import checkpoint

    if any((folder / name).is_file() for name in ("adapter_config.json", "config.json")) or saved_in(folder):
        return True
    if unfinished := checkpoint.complete(folder):
        raise ConfigError(
            f"output_dir: {folder} holds no finished model, only checkpoints. Evaluate one of them, such as "
            f"`luthier eval {unfinished[-1]}`, or the model before training with --as-is."
        )
    return False


def _as_trained(run: Run, folder: Path) -> Run:
    """The run that loads what was trained into a folder, compared with the model from before."""
    from luthier.serving import as_trained

    after = as_trained(run, folder)
    if "reference" in run.objective.frozen and run.reference.ref_model is None and after.model != run.model:
        # With an adapter the reference is found under it; weights that were trained whole have replaced it.
        after = replace(after, reference=replace(run.reference, ref_model=run.model.model_name_or_path))
    return replace(after, adapter=replace(after.adapter, create_new_adapter=False))


def _measuring(run: Run, output: Path) -> Run:
    """The run without what belongs to training alone."""
    from luthier.train.config import derive

    for key in SHARDING:
        if run.training.get(key):
            log.warning("%s plays no part in an evaluation: every process holds the whole model.", key)
    training = {name: value for name, value in run.training.items() if name in KEPT}
    training |= {"output_dir": str(output), "do_train": False, "do_eval": True}
    train = replace(run.train, early_stopping_steps=None, disable_gradient_checkpointing=True)
    training, train, notes = derive(training, train)
    data = run.data
    if data.eval_dataset and data.dataset and not data.tokenized_path:
        # Encoding rows that nothing looks at would take its time.
        data = replace(data, dataset=None, interleave_probs=None)
    return replace(run, training=training, train=train, data=data, notes=tuple(notes))


def _write(folder: Path, run: Run, found: Mapping[str, float]) -> None:
    plain = {name: value if math.isfinite(value) else None for name, value in found.items()}
    (folder / RESULTS).write_text(json.dumps(plain, indent=4, sort_keys=True) + "\n", encoding="utf-8")
    (folder / CONFIG).write_text(run.to_yaml(), encoding="utf-8")
    for name, value in found.items():
        if not name.endswith(("_runtime", "_per_second")):
            log.info("%s = %.6g", name, value)
    log.info("The results are in %s.", folder / RESULTS)


def _introduce(subject: Subject) -> None:
    """Say which model is evaluated."""
    run = subject.run
    if subject.trained is not None:
        log.info("Evaluating what was trained into %s.", subject.trained)
    else:
        adapters = run.adapter.adapter_name_or_path
        log.info("Evaluating %s%s as it is.", run.model.model_name_or_path, f" with {adapters}" if adapters else "")


def main(argv: Sequence[str]) -> int:
    """`luthier eval CONFIG [--output FOLDER] [--as-is] [key=value ...]`."""
    subject = subject_of(parse_command(argv, "eval"))
    subject.run.announce(log)
    _introduce(subject)
    evaluate(subject)
    return 0
