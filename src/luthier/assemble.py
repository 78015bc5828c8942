"""The parts of a run, put together the same way for training and for evaluation: data, policy, Trainer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.core.errors import ConfigError
from luthier.core.log import get_logger

if TYPE_CHECKING:
    import transformers

    from luthier.data.encode import Prepared
    from luthier.data.processor import Vision
    from luthier.data.source import DataConfig
    from luthier.model.policy import PolicySetup
    from luthier.run import Run
    from luthier.train.rows import Rows
    from luthier.train.sampler import Bundles
    from luthier.train.trainer import Trainer

log = get_logger("fit")


def load_data(run: Run, *, seed: int, trains: bool = True) -> tuple[Any, Prepared]:
    """The tokenizer, and the rows as the stage wants them: read, encoded, mixed and split.

    trains: whether any of them are trained on, for the words of the report.
    """
    tokenizer, data = read_data(run, run.data, seed=seed)
    log.info("%s", replace(data.report, trains=trains))
    return tokenizer, data


def read_data(run: Run, data: DataConfig, *, seed: int) -> tuple[Any, Prepared]:
    """As `load_data`, of other data than the run's own, in silence."""
    from luthier.data.bare import Bare
    from luthier.data.encode import prepare
    from luthier.model.source import access
    from luthier.model.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(run.model)
    renderer: Any = renderer_of(run, tokenizer) if run.objective.renders else Bare(tokenizer)
    run.objective.start(renderer)
    hubs = access(run.model)
    return tokenizer, prepare(data, run.objective, renderer, cutoff_len=run.layout.cutoff_len, seed=seed, access=hubs)


def vision_of(run: Run, tokenizer: Any) -> Vision | None:
    """The processor of a model that reads images, told what the run says of them; None where it reads text alone."""
    from luthier.core.paths import local
    from luthier.model.processor import load_processor

    processor = load_processor(run.model, tokenizer)
    if processor is None:
        return None
    from luthier.data.processor import Vision

    root = run.data.media_dir if run.data.media_dir is not None else run.data.dataset_dir
    return Vision(processor, run.media, local(root) if isinstance(root, str) else None)


def renderer_of(run: Run, tokenizer: Any) -> Any:
    """The chat template of a run bound to its tokenizer; that of the model's processor, where it has one and the run
    names no other. Raises ConfigError."""
    from luthier.data.renderer import make_renderer
    from luthier.data.template import AUTO, customise, find_template

    vision = vision_of(run, tokenizer)
    if vision is None:
        return make_renderer(run.template, tokenizer)
    if run.template.template not in (None, AUTO):
        from luthier.data.slot_media import SlotMediaRenderer

        return SlotMediaRenderer(run.template, customise(find_template(run.template.template), run.template), vision)
    from luthier.data.processor_template import ProcessorRenderer

    return ProcessorRenderer(run.template, vision)


def bundles(run: Run, examples: Any, *, packing: bool = False) -> Bundles:
    """Encoded examples, one a row, or with packing as many as fit."""
    from luthier.train.rows import bundle

    return bundle(examples, packing=packing, cutoff_len=run.layout.cutoff_len, complete=run.objective.complete)


def lay_out(
    run: Run,
    examples: Bundles,
    setup: PolicySetup,
    tokenizer: Any,
    *,
    batch_size: int,
    noisy: bool = False,
    late: bool = False,
) -> Rows:
    """The rows in the layout that the run asks for, or that is cheapest; checked on the first batch, unless `late`."""
    from luthier.data.layout import collate
    from luthier.data.media_batch import MediaCollate
    from luthier.model.sight import looks_ahead, trains_sight
    from luthier.train import rows

    vision = vision_of(run, tokenizer)
    lay: Any = collate
    wish = layout_wish(run, sees=vision is not None)
    if vision is not None:
        shown = MediaCollate(vision, blank=True)([], layout="padded", pad_id=tokenizer.pad_token_id)
        # `late`: an engine cuts the weights, and its processes gather them together, whatever their rows show.
        lay = MediaCollate(vision, blank=trains_sight(setup.model, shown) or late)
        if wish != "padded" and (late or looks_ahead(setup.model, shown)):
            wish = "padded"
            why = "the model's weights are cut" if late else "the tokens of an image see later ones"
            log.warning(
                "WARNING: every example is a padded row of its own: %s. Layout and packing have no effect.", why
            )
    return rows.lay_out(
        examples,
        setup,
        wish=wish,
        lay=lay,
        batch_size=batch_size,
        pad_id=tokenizer.pad_token_id,
        columns=[column.name for column in run.objective.columns],
        noisy=noisy,
        check=run.train.verify_layout and not late,
    )


def layout_wish(run: Run, *, sees: bool) -> str:
    """The layout a run asks for. For a model that reads images `auto` means padded rows, as its own processor makes
    them, unless packing is asked for."""
    if run.model.moe_aux_loss_coef:
        return "padded"
    asked = run.layout.layout != "auto" or run.layout.packing or run.layout.neat_packing
    return run.layout.layout if asked or not sees else "padded"


def load_base(run: Run, tokenizer: Any, *, dtype: Any, device: Any, seed: int = 0, sharded: bool = False) -> Any:
    """The model that the run's keys describe, before any adapter: quantised, stretched, grown, as they say.

    sharded: FSDP or ZeRO-3 will cut its weights.
    """
    from luthier.model.load import load_model

    return load_model(
        run.model,
        tokenizer=tokenizer,
        dtype=dtype,
        device=device,
        seed=seed,
        quant=run.quant,
        length=run.layout.cutoff_len,
        sharded=sharded,
    )


def choose_optimiser(run: Run, args: Any) -> Any:
    """What the Trainer is told to make its optimiser with; None leaves it to `optim`. Raises ConfigError."""
    from luthier.core.registry import find
    from luthier.optim._task import Task
    from luthier.train import optimiser

    adapter = find("adapters", run.adapter.finetuning_type).IS_ADAPTER
    return optimiser.choose(run.optim, Task(args, adapter=adapter, pure_bf16=run.train.pure_bf16))


def in_half(run: Run) -> bool:
    """Whether trained weights stay in 16 bits: the optimiser rounds at random, or keeps a copy of those it moves."""
    return run.train.pure_bf16 or run.optim["badam"].use_badam


def make_trainer(run: Run, setup: PolicySetup, args: Any, tokenizer: Any, **parts: Any) -> Trainer:
    """The Trainer of a run. parts: data sets, collator, callbacks, as `Trainer` takes them."""
    import transformers

    from luthier.train.trainer import Trainer

    trainer = Trainer(
        setup=setup,
        objective=run.objective,
        args=args,
        shuffle=not run.train.disable_shuffling,
        accuracy=run.train.compute_accuracy,
        effective=run.train.include_effective_tokens_per_second,
        max_bad_rows=run.data.max_bad_rows,
        processing_class=tokenizer,
        **parts,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def make_policy(
    run: Run, model: Any, args: transformers.TrainingArguments, *, head_from: Path | None = None
) -> PolicySetup:
    """The model with the head and the reference its objective asks for.

    head_from: the folder whose head is taken up; None: that of the adapters or of the model, if one has any.
    """
    from luthier.model import heads
    from luthier.model.policy import PolicySetup
    from luthier.model.reference import make_reference, without_dropout
    from luthier.serving import head_folder

    objective, head = run.objective, None
    if objective.head is not None:
        head = heads.attach(model, objective.head, objective.config, seed=args.seed)
        for line in objective.announces:
            log.info("%s", line)
        source = head_from or head_folder(run)
        if source is not None:
            heads.load(head, objective.head, source)
            log.info("The %s head of %s is taken up.", objective.head, source)
    setup = PolicySetup(model, head=head, router=run.model.moe_aux_loss_coef or 0.0)
    if "reference" in objective.frozen:
        # With dropout in the policy its first step would already differ from the reference (TRL switches it off too).
        silenced = without_dropout(model)
        if silenced:
            log.info("Dropout is off in %d modules: the policy is compared with its reference.", silenced)
        setup.reference = make_reference(run.reference, setup, run.model, dtype=weights(run, args))
    else:
        for key in ("ref_model", "ref_model_adapters", "ref_model_quantization_bit", "precompute_reference"):
            if run.keys.get(key):
                log.warning("%s has no effect: stage %s compares with no reference model.", key, run.stage)
    return setup


def one_device_each(args: transformers.TrainingArguments) -> None:
    """Raise ConfigError where one process would have to serve several accelerators."""
    if args.n_gpu > 1:
        raise ConfigError(
            f"{args.n_gpu} accelerators are visible to one process. Start one process for each with `torchrun "
            f"--nproc_per_node {args.n_gpu} -m luthier ...`, or show it one with CUDA_VISIBLE_DEVICES=0."
        )


def weights(run: Run, args: transformers.TrainingArguments) -> Any:
    """The number format the model is loaded in: what is trained whole stays float32 unless `pure_bf16`.

    Under bf16 or fp16 the frozen base of an adapter is kept in that format; the adapter itself is float32.
    """
    import torch

    from luthier.core.registry import find

    frozen_base = find("adapters", run.adapter.finetuning_type).IS_ADAPTER
    if run.train.pure_bf16:
        return torch.bfloat16
    half = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    return half if frozen_base or in_half(run) else torch.float32
