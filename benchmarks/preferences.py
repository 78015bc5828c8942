"""Pairs and lists of answers: TRL's DPOTrainer and RewardTrainer next to Luthier's padded, packed and shared rows.

    python benchmarks/preferences.py                # a Llama of SmolLM2-135M's shape with random weights
    python benchmarks/preferences.py --layers 6     # a fifth of it, for a quick look

A step is one prompt of 1,024 tokens with K answers of 128, forward and backward, without the optimiser. `dpo` is the
sigmoid loss, the reference being the same model with its adapter off; `rm` the Bradley-Terry loss of a scalar head.
Both train LoRA of rank 8 on all linear layers, in float32. Every way has the same weights (the adapter's too, which are
random: from zeros, every loss would be ln 2), ids and pairs, and gives its loss and the length of its gradient: they
must agree. TRL knows pairs alone, so a list reaches it as a step of as many pairs, one after the other.

Each way of computing runs in a process of its own; speeds are ratios within one run, since machines are noisy. CPU
seconds, over all threads, stand beside them: on a machine that others use too they are the steadier of the two.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from layouts import build
from ranking import ranked
from workers import keep, measure, wait_for_device

if TYPE_CHECKING:
    import torch
    from torch import nn

WAYS = ("trl", "padded", "packed", "shared")
CASES = ("dpo:2", "rm:2", "rm:4", "rm:8")
BETA = 0.1
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

Step = Callable[[], float]
"""One forward and backward pass; returns the loss."""
Prepare = Callable[[list], tuple[Step, int]]
"""The step of some items, and how many tokens it computes."""


def fill(model: nn.Module, head: torch.Tensor | None) -> None:
    """Give an adapter, and the weight of a reward head, values that are the same however the model was wrapped."""
    import torch

    generator = torch.Generator().manual_seed(1)
    adapter = sorted((name, weight) for name, weight in model.named_parameters() if ".lora_" in name)
    with torch.no_grad():
        for _, weight in adapter:
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.05)
        if head is not None:
            head.copy_(torch.randn(head.shape, generator=generator) / head.shape[-1] ** 0.5)


def luthier(stage: str, options: argparse.Namespace) -> tuple[nn.Module, Prepare]:
    """The model, and its steps in one of Luthier's layouts."""
    from luthier.adapters import lora
    from luthier.data.layout import collate
    from luthier.model import heads
    from luthier.model.policy import PolicySetup
    from luthier.model.reference import AdapterOff
    from luthier.objectives.dpo import Dpo, DpoConfig
    from luthier.objectives.rm import Rm, RmConfig

    model = lora.apply(build(options.layers), lora.Config(lora_rank=8), also=(), seed=0).to(options.device).train()
    if stage == "dpo":
        setup, objective = PolicySetup(model), Dpo(DpoConfig(pref_beta=BETA, dpo_pairs=options.pairs))
        setup.reference = AdapterOff(setup)
        fill(model, None)
    else:
        head = heads.attach(model, "value")
        setup, objective = PolicySetup(model, head=head), Rm(RmConfig(rm_pairs=options.pairs))
        fill(model, head.summary.weight)

    def prepare(items: list) -> tuple[Step, int]:
        batch = collate(items, layout=options.way, pad_id=0).to(options.device)

        def step() -> float:
            loss, _ = objective.loss(setup.bind(), batch)
            loss.backward()
            return loss.item()

        return step, batch.ids.numel()

    return model, prepare


def trl(stage: str, options: argparse.Namespace) -> tuple[nn.Module, Prepare]:
    """The model, and its steps through the training step of TRL's trainer."""
    trainer = TRAINERS[stage](options)

    def prepare(items: list) -> tuple[Step, int]:
        ((encoded, _),) = items
        steps = [trainer.data_collator([row]) for row in trl_rows(stage, encoded.paths, options.pairs)]
        trainer.current_gradient_accumulation_steps = len(steps)

        def step() -> float:
            return sum(trainer.training_step(trainer.model, dict(inputs)).item() for inputs in steps)

        return step, sum(inputs["input_ids"].numel() for inputs in steps)

    return trainer.model, prepare


def trl_rows(stage: str, paths: tuple, pairs: str) -> Iterator[dict]:
    """The pairs of a list, best first, as the trainers' collators take them."""
    stem = paths[0].weights.count(0.0)
    for better, chosen in enumerate(paths if pairs == "all" else paths[:1]):
        for rejected in paths[better + 1 :]:
            if stage == "rm":
                yield {"chosen_ids": chosen.ids, "rejected_ids": rejected.ids}
            else:
                answers = {"chosen_ids": chosen.ids[stem:], "rejected_ids": rejected.ids[stem:]}
                yield {"prompt_ids": chosen.ids[:stem], **answers}


def trl_arguments(options: argparse.Namespace) -> dict:
    """What both trainers are told: float32, nothing recomputed, nothing cut, and a row so that they start."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate(("<pad>", "<eos>", "<unk>"))}
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return {
        "train_dataset": Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
        "processing_class": PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")), **special
        ),
        "args": {
            "output_dir": tempfile.mkdtemp(),
            "report_to": "none",
            "use_cpu": options.device == "cpu",
            "bf16": False,
            "gradient_checkpointing": False,
            "max_length": None,
            "per_device_train_batch_size": 1,
        },
    }


def dpo_trainer(options: argparse.Namespace):
    """TRL's DPOTrainer with LoRA; its reference is the model without the adapter."""
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer

    told = trl_arguments(options)
    told["args"] = DPOConfig(**told["args"], beta=BETA, loss_type="sigmoid")
    settings = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=LINEAR)
    trainer = DPOTrainer(build(options.layers), peft_config=settings, **told)
    fill(trainer.model, None)
    return trainer


def reward_trainer(options: argparse.Namespace):
    """TRL's RewardTrainer with LoRA and a trained head, on transformers' sequence classifier."""
    from peft import LoraConfig
    from transformers import AutoModelForSequenceClassification
    from trl import RewardConfig, RewardTrainer

    causal, told = build(options.layers), trl_arguments(options)
    causal.config.update({"num_labels": 1, "pad_token_id": 0})
    model = AutoModelForSequenceClassification.from_config(causal.config)
    model.model = causal.model
    told["args"] = RewardConfig(**told["args"])
    settings = LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=LINEAR, modules_to_save=["score"])
    trainer = RewardTrainer(model, peft_config=settings, **told)
    (score,) = (w for name, w in trainer.model.named_parameters() if "score" in name and w.requires_grad)
    fill(trainer.model, score)
    return trainer


TRAINERS = {"dpo": dpo_trainer, "rm": reward_trainer}


def worker(options: argparse.Namespace) -> None:
    """Measure one way at one case and print the figures as JSON."""
    import torch

    options.device = "cuda" if torch.cuda.is_available() else "cpu"
    stage, size = options.case[0].split(":")
    model, prepare = (trl if options.way == "trl" else luthier)(stage, options)
    warm_up, _ = prepare(ranked(2, 64, 16))
    warm_up()
    step, tokens = prepare(ranked(int(size), options.prompt, options.reply))
    wall, cpu = [], []
    for _ in range(options.repeats):
        model.zero_grad()
        wait_for_device()
        start = time.perf_counter(), time.process_time()
        loss = step()
        wait_for_device()
        wall.append(time.perf_counter() - start[0])
        cpu.append(time.process_time() - start[1])
    squares = [weight.grad.double().square().sum() for weight in model.parameters() if weight.grad is not None]
    found = {"tokens": tokens, "seconds": min(wall), "cpu_seconds": min(cpu), "all_seconds": wall}
    print(
        json.dumps(found | {"loss": loss, "gradient": sum(squares).sqrt().item(), "threads": torch.get_num_threads()})
    )


def speed(other: dict, figures: dict) -> str:
    """How many times as fast as another way, by the clock and (in brackets) by CPU seconds."""
    clock, cpu = (other[name] / figures[name] for name in ("seconds", "cpu_seconds"))
    return f"{clock:.2f}x ({cpu:.2f}x)"


def show(case: str, found: dict[str, dict], layers: int) -> None:
    """Print the table of one case."""
    from rich.console import Console
    from rich.table import Table

    stage, size = case.split(":")
    unit = "pair" if size == "2" else "list"
    table = Table(title=f"{stage}, K = {size}: one {unit} a step, {layers} layers")
    columns = (
        "way",
        "tokens",
        f"s/{unit}",
        "CPU s",
        f"{unit}s/s",
        "to TRL (CPU)",
        "to padded (CPU)",
        "loss",
        "gradient",
    )
    for column in columns:
        table.add_column(column, justify="left" if column == "way" else "right")
    for way, figures in found.items():
        table.add_row(
            way,
            f"{figures['tokens']:,}",
            f"{figures['seconds']:.2f}",
            f"{figures['cpu_seconds']:.2f}",
            f"{1 / figures['seconds']:.4f}",
            *(speed(found[other], figures) if other in found else "" for other in ("trl", "padded")),
            f"{figures['loss']:.6f}",
            f"{figures['gradient']:.5f}",
        )
    Console(width=110).print(table)


def main() -> None:
    """Print a table per case; --json FILE keeps the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--case", nargs="+", default=CASES, help="stage:K, such as dpo:2 or rm:8")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--reply", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument(
        "--pairs", choices=["best", "all"], default="best", help="of a list: K - 1 of the best, or all K (K - 1) / 2"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        worker(options)
        return
    found: dict[str, dict] = {}
    for case in options.case:
        same = ("layers", "prompt", "reply", "repeats", "pairs")
        found[case] = {way: measure(__file__, options, same, way=way, case=case) for way in options.ways}
        show(case, found[case], options.layers)
        if options.json:
            keep(options.json, __file__, found, ("torch", "transformers", "trl", "peft"))


if __name__ == "__main__":
    main()
