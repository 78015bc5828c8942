"""One way to train a tiny model on made-up items, for every objective there is."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
import transformers

from luthier.core.batch import Batch
from luthier.core.objective import Objective
from luthier.core.registry import find, names
from luthier.core.types import Encoded, Path
from luthier.data.layout import collate
from luthier.model import heads
from luthier.model.policy import PolicySetup
from luthier.model.reference import FrozenModel
from luthier.train.sampler import Bundles, Collator
from luthier.train.trainer import Trainer
from tests.conftest import build_model

OBJECTIVES = names("objectives")


def objective_of(name: str) -> Objective:
    """A fresh objective with its default keys."""
    module = find("objectives", name)
    return next(
        v for v in vars(module).values() if isinstance(v, type) and issubclass(v, Objective) and v is not Objective
    )()


def items_for(objective: Objective, count: int, seed: int = 0) -> list[tuple[Encoded, str]]:
    """Random examples with as many answers as the objective wants, scored, with its columns."""
    rng = random.Random(seed)
    low, high = objective.answers
    items = []
    for number in range(count):
        prompt = [rng.randrange(7, 400) for _ in range(rng.randint(2, 9))]
        answers = rng.randint(max(low, 1), min(high or 4, 4))
        paths = []
        for k in range(answers):
            reply = [rng.randrange(7, 400) for _ in range(rng.randint(1, 8))]
            weights = [0.0] * len(prompt) + [1.0] * len(reply)
            columns = {c.name: [rng.random() if w else float("nan") for w in weights] for c in objective.columns}
            paths.append(Path(prompt + reply, weights, f"candidate-{k}", float(answers - k), columns))
        items.append((Encoded(tuple(paths)), f"row {number}"))
    return items


def setup_for(objective: Objective, model) -> PolicySetup:
    """The model with the head and the reference that the objective declares; the reference differs from the policy."""
    head = None if objective.head is None else heads.attach(model, objective.head, objective.config, seed=1)
    setup = PolicySetup(model, head=head)
    if "reference" in objective.frozen:
        setup.reference = FrozenModel(build_model("llama", dtype=next(model.parameters()).dtype, seed=99), setup)
    return setup


def batches_for(objective: Objective, items, layout: str = "padded") -> Batch:
    """One micro-batch of all items, completed as the objective wants."""
    chosen = [objective.complete(i, items) for i in range(len(items))]
    return collate(chosen, layout=layout, pad_id=3, columns=[c.name for c in objective.columns])


def trainer_for(
    name: str,
    folder,
    *,
    items=None,
    layout="shared",
    batch=2,
    accumulate=1,
    dtype=torch.float64,
    lr=0.1,
    own=None,
    **extra,
) -> Trainer:
    """A Trainer with plain SGD on a tiny Llama. own: what our Trainer takes beyond transformers' arguments."""
    objective = objective_of(name)
    items = items_for(objective, 12) if items is None else items
    setup = setup_for(objective, build_model("llama", dtype=dtype))
    arguments = {
        "output_dir": str(folder),
        "per_device_train_batch_size": batch,
        "per_device_eval_batch_size": batch,
        "gradient_accumulation_steps": accumulate,
        "learning_rate": lr,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "num_train_epochs": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "seed": 7,
    }
    trainer = Trainer(
        setup=setup,
        objective=objective,
        args=transformers.TrainingArguments(**{**arguments, **extra}),
        train_dataset=Bundles(items, complete=objective.complete),
        eval_dataset=Bundles(items, complete=objective.complete),
        data_collator=Collator(collate, layout=layout, pad_id=3, columns=[c.name for c in objective.columns]),
        **(own or {}),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def at(trainer: Trainer, event: str, function: Callable[[transformers.TrainerState], object]) -> None:
    """Call a function with the state at an event of the loop, such as on_step_end."""

    def call(self, args, state, control, **kwargs):
        function(state)

    trainer.add_callback(type("At", (transformers.TrainerCallback,), {event: call})())


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The model's parameters by name, detached."""
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def furthest(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Largest absolute difference between two sets of weights."""
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)
