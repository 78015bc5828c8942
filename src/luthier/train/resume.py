"""Which checkpoint a run goes on from, and whether it is still the same run."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.core import manifest
from luthier.core.errors import CheckpointError, ConfigError
from luthier.core.log import get_logger
from luthier.train import checkpoint, loop_state

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from luthier.train.loop_state import LoopState
    from luthier.train.rows import Examples
    from luthier.train.sampler import Bundles

log = get_logger("train")

RESOLVED = ("resolved_config.again.yaml", "resolved_config.yaml")
"""Names of the resolved configuration in a checkpoint; the first that is there is the one."""
STARTED = "LUTHIER_STARTED"
"""Environment variable of the launcher: when it began. What is newer was written by this very run, before a restart."""


@dataclass(frozen=True, kw_only=True)
class ResumeConfig:
    """How a run is made safe, and gone on with."""

    allow_config_change: bool = False
    """Go on from a checkpoint although keys that change what is computed are not as they were; they are listed."""
    async_save: bool = False
    """Write checkpoints while training goes on: a copy in CPU memory is made first, which needs room for it."""
    skip_bad_steps: int = 0
    """How many steps in a row may be left out because their loss or gradient is not finite; 0 stops at the first. A
    step that is left out changes no weight, and still counts as a step for the learning rate and the data."""

    def __post_init__(self) -> None:
        if self.skip_bad_steps < 0:
            raise ConfigError(f"skip_bad_steps: {self.skip_bad_steps} must be 0 or more.")


ALL = "all of them"

FREE: dict[str, str] = {
    "run": "plugins",
    "model": "cache_dir hf_hub_token ms_hub_token om_hub_token trust_remote_code infer_dtype print_param_status",
    "quant": "quantization_device_map",
    "data": "dataset_dir media_dir overwrite_cache preprocessing_batch_size preprocessing_num_workers tokenized_path "
    "data_shared_file_system max_bad_rows data_cache_dir",
    "layout": "layout",
    "adapter": "adapter_folder",
    "reference": "precompute_reference",
    "train": "overwrite_output_dir plot_loss compute_accuracy include_effective_tokens_per_second verify_layout "
    "disable_gradient_checkpointing use_reentrant_gc activation_offload logging_dir",
    "resume": ALL,
    "launch": ALL,
    "generate": ALL,
    "score": ALL,
    "scorer_keys": ALL,
    "speculate": ALL,
    "collect": ALL,
    "export": ALL,
    "training": "output_dir do_train do_eval do_predict resume_from_checkpoint local_rank debug skip_memory_metrics "
    "per_device_eval_batch_size eval_on_start torch_empty_cache_steps auto_find_batch_size use_cpu "
    "activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs "
    "logging_strategy logging_steps logging_first_step log_on_each_node logging_nan_inf_filter log_level "
    "log_level_replica include_num_input_tokens_seen disable_tqdm report_to run_name project trackio_space_id "
    "trackio_bucket_id trackio_static_space_id save_only_model save_strategy save_steps save_on_each_node "
    "save_total_limit dataloader_num_workers dataloader_persistent_workers dataloader_prefetch_factor "
    "ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout",
}
"""Keys, by owner, that may change between a checkpoint and the run that goes on from it: they say where things are,
what is shown and saved, who does the work. Every other key decides what is learnt."""

EVALUATION: dict[str, str] = {
    "data": "eval_dataset eval_on_each_dataset",
    "train": "early_stopping_steps",
    "training": "eval_strategy eval_steps eval_delay metric_for_best_model greater_is_better load_best_model_at_end",
}
"""Free as well, unless evaluations decide about the run: see `_steered`."""

STEP = ("per_device_train_batch_size", "gradient_accumulation_steps")
"""Free as long as an optimiser step, over all processes, has as many rows as it had."""


def choose(args: TrainingArguments, *, asked: bool | str | None, overwrite: bool, free: bool = True) -> Path | None:
    """The checkpoint to go on from, None to begin. Every rank gets the answer of rank 0.

    asked: `resume_from_checkpoint`. free: no other run is training into the folder. Removes what an interrupted run
    left half-written, and puts aside checkpoints that this run does not go on with. Raises CheckpointError or
    ConfigError where there is nothing to go on from, and where the folder is taken.
    """
    answer: list[Any] = [None]
    if args.process_index == 0:
        try:
            answer = [_choose(args, asked, overwrite) if free else _taken(args)]
        except (CheckpointError, ConfigError) as error:
            answer = [error]
    if args.world_size > 1:
        import torch

        torch.distributed.broadcast_object_list(answer, src=0, device=args.device)
    if isinstance(answer[0], Exception):
        raise answer[0]
    return answer[0]


def _taken(args: TrainingArguments) -> ConfigError:
    return ConfigError(
        f"output_dir: another run is training into {args.output_dir}. Wait until it has ended, stop it, or give this "
        "run a folder of its own."
    )


def _choose(args: TrainingArguments, asked: bool | str | None, overwrite: bool) -> Path | None:
    folder = Path(args.output_dir)
    if not args.do_train:
        return None
    named = _named(asked) if isinstance(asked, str) else None
    checkpoint.sweep(folder)
    own = checkpoint.last_whole(folder)
    if own is not None and _since_launch(own):
        log.info("Going on from %s, which this run wrote before it was restarted.", own)
        return own
    if named is not None:
        return _from(named, folder, own, overwrite)
    if overwrite and not asked:
        if own is not None:
            log.warning(
                "WARNING: overwrite_output_dir: true starts afresh and does not go on from %s, which is removed when "
                "there is a new checkpoint.",
                own,
            )
        checkpoint.set_aside(folder)
        return None
    if own is not None:
        log.info("Resuming from %s. (overwrite_output_dir: true starts afresh.)", own)
        return own
    if asked:
        raise CheckpointError(f"resume_from_checkpoint: there is no complete checkpoint in {folder}.")
    if weights := [path.name for path in folder.glob("*.safetensors")]:
        raise ConfigError(
            f"output_dir: {folder} already holds a trained model ({weights[0]}) and no checkpoint to go on from. "
            "Choose another folder, or set overwrite_output_dir: true."
        )
    return None


def _named(asked: str) -> Path:
    """The checkpoint a user named. Another one is not put in its place: it would be another model."""
    folder = Path(asked).expanduser()
    if not (folder / checkpoint.STATE).is_file():
        raise CheckpointError(f"resume_from_checkpoint: {asked} is no complete checkpoint (no {checkpoint.STATE}).")
    if wrong := manifest.damage(folder):
        others = [path for path in checkpoint.complete(folder.parent) if manifest.damage(path, contents=False) is None]
        before = [str(path) for path in others if path != folder]
        hint = f"{before[-1]} is there too." if before else "There is no other one beside it."
        raise CheckpointError(f"resume_from_checkpoint: {asked} is damaged: {wrong}. {hint}")
    return folder


def _from(named: Path, folder: Path, own: Path | None, overwrite: bool) -> Path:
    step = checkpoint.step_in(named)
    if named.resolve().parent == folder.resolve():
        checkpoint.set_aside(folder, after=step)
    elif own is not None and not overwrite and checkpoint.step_of(own) > step:
        log.info(
            "Resuming from %s: this run has begun from %s before. (overwrite_output_dir: true starts there again.)",
            own,
            named,
        )
        return own
    else:
        checkpoint.set_aside(folder)
    return named


def _since_launch(folder: Path) -> bool:
    """Whether a checkpoint is younger than the launcher, which has restarted its processes."""
    started, restarts = os.environ.get(STARTED), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return started is not None and restarts != "0" and (folder / checkpoint.STATE).stat().st_mtime >= float(started)


# Is it the same run?


def check_states(folder: Path, *, key: str, allow: bool) -> None:
    """Raise CheckpointError if a checkpoint holds weights alone and steps are left to be taken.

    key: what names such weights for a run that begins with them. allow: only say so.
    """
    # DeepSpeed keeps the scheduler with its own parts.
    if (folder / "scheduler.pt").is_file() or any(folder.glob("global_step*")):
        return
    state = json.loads((folder / checkpoint.STATE).read_text(encoding="utf-8"))
    if state["global_step"] >= state["max_steps"]:
        return
    fresh = "a fresh optimiser, a learning rate that begins again, and other random numbers"
    if allow:
        log.warning("WARNING: %s holds weights alone (save_only_model: true); they are gone on with %s.", folder, fresh)
        return
    raise CheckpointError(
        f"{folder} holds weights alone (save_only_model: true), and a run cannot go on from them to where it would "
        f"have ended. Begin another run from them ({key}: {folder}), start afresh with overwrite_output_dir: true, or "
        f"go on with {fresh} with allow_config_change: true."
    )


def check_config(folder: Path, now: str, *, rows_per_step: int, allow: bool) -> None:
    """Raise ConfigError listing every key that decides what is learnt and is not as it was in a checkpoint.

    now: this run's resolved configuration, as text. allow: only say so.
    """
    file = next((folder / name for name in RESOLVED if (folder / name).is_file()), None)
    state = loop_state.first(folder)
    if file is None:
        log.warning("%s says nothing of its configuration; it is taken to be that of this run.", folder)
        return
    changed = list(_changes(file.read_text(encoding="utf-8"), now, state, rows_per_step))
    if not changed:
        return
    table = "\n".join(f"  {key}: {was!r} then, {now!r} now" for key, was, now in changed)
    if allow:
        log.warning("WARNING: %s is gone on with under another configuration:\n%s", folder, table)
        return
    raise ConfigError(
        f"{folder} was written with another configuration:\n{table}\nTo go on would be another run than the one that "
        "was begun. Put the old values back, choose another output_dir, start afresh with overwrite_output_dir: true, "
        "or go on with the new values with allow_config_change: true."
    )


def _changes(then: str, now: str, state: LoopState | None, rows: int) -> Iterator[tuple[str, Any, Any]]:
    old, new = sections(then), sections(now)
    free = {owner: names if names == ALL else set(names.split()) for owner, names in FREE.items()}
    if not _steered(old) and not _steered(new):
        for owner, names in EVALUATION.items():
            free[owner] |= set(names.split())
    if state is not None and state.rows_per_step == rows:
        free["training"] |= set(STEP)
    for owner, values in new.items():
        allowed = free.get(owner, set())
        if allowed == ALL:
            continue
        before = old.get(owner, {})
        for key, value in values.items():
            # A key that did not exist yet had its default.
            if key not in allowed and key in before and before[key] != value:
                yield key, before[key], value


def _steered(config: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether evaluations decide how a run goes on: when it ends, what is learnt, which model is kept."""
    training, train = config.get("training", {}), config.get("train", {})
    return bool(
        training.get("lr_scheduler_type") in ("reduce_lr_on_plateau", "greedy")
        or training.get("load_best_model_at_end")
        or training.get("save_strategy") == "best"
        or train.get("early_stopping_steps") is not None
    )


def sections(text: str) -> dict[str, dict[str, Any]]:
    """A resolved configuration by owner: `# owner` stands above the keys of each."""
    import yaml

    parts = re.split(r"^# ([\w.]+)$", text, flags=re.MULTILINE)
    return {name: yaml.safe_load(body) or {} for name, body in zip(parts[1::2], parts[2::2])}


def check_data(folder: Path, mark: str, *, allow: bool) -> None:
    """Raise ConfigError if the training data are others than those a checkpoint was trained on (`data_mark`)."""
    state = loop_state.first(folder)
    if state is None or not state.data or state.data == mark:
        return
    text = f"The training data are not those that {folder} was trained on: rows, their order or their lengths differ."
    if not allow:
        raise ConfigError(f"{text} Put the old files back, or go on with the new ones with allow_config_change: true.")
    log.warning("WARNING: %s", text)


def data_mark(rows: Bundles) -> str:
    """A digest of how many training rows there are, in which order, and how long each is."""
    examples: Examples = rows.examples  # type: ignore[assignment]
    digest = hashlib.sha256(examples.tree_tokens.tobytes() + examples.path_tokens.tobytes())
    for bundle in rows.bundles or ():
        digest.update(repr(tuple(bundle)).encode())
    return digest.hexdigest()


def same_step(folder: Path, args: TrainingArguments) -> dict[str, int]:
    """Changes to TrainingArguments that keep the rows of an optimiser step where the number of processes changed.

    Order and steps then stay what they were. Empty where nothing is to be changed, or nothing can be: then
    `check_config` tells. Raises CheckpointError for parts of a ZeRO optimiser, which belong to their processes.
    """
    state = loop_state.first(folder)
    world = args.world_size
    if state is None or state.world == world:
        return {}
    if args.deepspeed and any(folder.glob("global_step*")):
        raise CheckpointError(
            f"{folder} holds the optimiser in {state.world} parts, one for each process, and this run has {world}. "
            f"Start {state.world} processes, or begin a run from its weights (model_name_or_path)."
        )
    names = f"{folder} was written by {state.world} processes and is gone on with by {world}"
    if args.per_device_train_batch_size * args.gradient_accumulation_steps * world == state.rows_per_step:
        log.warning("%s. A step still takes the same %d rows; dropout draws others.", names, state.rows_per_step)
        return {}
    for size in range(args.per_device_train_batch_size, 0, -1):
        if state.rows_per_step % (size * world) == 0:
            changes = {STEP[0]: size, STEP[1]: state.rows_per_step // (size * world)}
            said = ", ".join(f"{name}: {value}" for name, value in changes.items())
            log.warning(
                "%s: %s, so that a step still takes the same %d rows in the same order. Results agree up to rounding; "
                "dropout draws other numbers.",
                names,
                said,
                state.rows_per_step,
            )
            return changes
    log.warning(
        "%s, which cannot share the %d rows of a step evenly. Steps of another size go on where the data were left; at "
        "most one step's rows are seen again.",
        names,
        state.rows_per_step,
    )
    return {}
