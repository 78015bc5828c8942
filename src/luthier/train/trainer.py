"""The one Trainer: transformers.Trainer, told how to ask an objective. It names no stage."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.trainer_utils import EvalLoopOutput

from luthier.core.batch import Batch
from luthier.data.stream import Stream
from luthier.model.policy import ModelPolicy
from luthier.train.by_hand import survey
from luthier.train.guarding import Guarding
from luthier.train.sampler import Bundles, EpochLoader, RankSampler
from luthier.train.streaming import StreamLoader


class Trainer(Guarding):
    """Trains whatever `objective` asks for; `Saving`, `Resuming` and `Guarding` are its other parts.

    shuffle: new order each epoch. accuracy: measure token accuracy too. effective: log supervised tokens per second.
    max_bad_rows: share of streamed rows that may be of no use.
    Datasets are `Bundles`; the collator gives {"batch": Batch, "rows": Rows}.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        *,
        shuffle: bool = True,
        accuracy: bool = False,
        effective: bool = False,
        max_bad_rows: float = 1.0,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.max_bad_rows = max_bad_rows
        self.shuffle, self.accuracy, self.meter.effective = shuffle, accuracy, effective
        self.setup.autocast = self.accelerator.autocast
        self.setup.label_smoothing = self.args.label_smoothing_factor
        # Counted now: an engine may leave this process a part of them.
        self._parameters = sum(p.numel() for p in self.model.parameters())
        self._eval_totals: dict[int, dict[str, float]] = {}

    # Data: every rank asks for its own micro-batches, so accelerate must not shard them again.

    def get_train_dataloader(self) -> EpochLoader | StreamLoader:
        """This rank's micro-batches."""
        if isinstance(self.train_dataset, Stream):
            return self._stream_loader(self.train_dataset)
        sizes = self.train_dataset.sizes()
        return self._loader(self.train_dataset, self._train_batch_size, shuffle=self.shuffle, sizes=sizes)

    def get_eval_dataloader(self, eval_dataset: str | Bundles | None = None) -> EpochLoader:
        """This rank's part of an evaluation set; no example is seen twice."""
        chosen = self.eval_dataset if eval_dataset is None else eval_dataset
        dataset = self.eval_dataset[chosen] if isinstance(chosen, str) else chosen
        return self._loader(dataset, self.args.eval_batch_size, shuffle=False)

    def _stream_loader(self, stream: Stream) -> StreamLoader:
        args = self.args
        loader = self._streaming = StreamLoader(
            stream,
            self.data_collator,
            batch_size=self._train_batch_size,
            workers=args.dataloader_num_workers,
            ahead=args.dataloader_prefetch_factor,
            rank=args.process_index,
            world=args.world_size,
            max_bad_rows=self.max_bad_rows,
        )
        state = self._stored()
        if state is not None:
            loader.go_on(state.stream, state.world)
        # The loader begins where the checkpoint says; nothing has to be read again to get there.
        args.ignore_data_skip = True
        return loader

    def _loader(
        self, dataset: Bundles, batch_size: int, *, shuffle: bool, sizes: Sequence[int] | None = None
    ) -> EpochLoader:
        args = self.args
        sampler = RankSampler(
            len(dataset),
            batch_size=batch_size,
            rank=args.process_index,
            world=args.world_size,
            seed=args.seed if args.data_seed is None else args.data_seed,
            shuffle=shuffle,
            sizes=sizes,
        )
        workers = args.dataloader_num_workers
        return EpochLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=self.data_collator,
            num_workers=workers,
            persistent_workers=args.dataloader_persistent_workers and workers > 0,
            prefetch_factor=args.dataloader_prefetch_factor if workers else None,
            # A generator of its own: the loader must not draw from the global one, or a resumed run would differ.
            generator=torch.Generator().manual_seed(args.seed),
        )

    # Loss: units of the whole optimiser step are counted over micro-batches and ranks before the first backward.

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> dict[str, float]:
        batches = [sample["batch"] for sample in batch_samples]
        counts = _counts(batches)
        totals = self._over_ranks(counts) | self._survey(batches)
        computed = int(totals.pop("computed"))
        self.meter.begin(computed, totals["token"])
        self.begin_step(batch_samples)
        self.state.num_input_tokens_seen += computed
        return totals

    def _survey(self, batches: Iterable[Batch]) -> dict[str, float]:
        """What the objective sums over the whole step before its first loss, over all ranks."""
        if not self.objective.surveys:
            return {}
        device = self.args.device
        return self._over_ranks(
            survey(lambda: self.setup.bind(), self.objective, (batch.to(device) for batch in batches))
        )

    def _over_ranks(self, counts: Mapping[str, float]) -> dict[str, float]:
        names = sorted(counts)
        values = torch.tensor([counts[name] for name in names], dtype=torch.float64, device=self.args.device)
        if self.args.world_size > 1:
            torch.distributed.all_reduce(values)
        return dict(zip(names, values.tolist()))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """This micro-batch's share of the step's loss; times the number of ranks, whose gradients are averaged."""
        progress = self.state.global_step / max(self.state.max_steps, 1)
        batch = inputs["batch"].to(self.args.device).with_totals(num_items_in_batch, progress)
        loss, logs = self.ask(model, batch)
        self.saw(loss, num_items_in_batch, progress)
        self.meter.add(logs)
        return loss * self.args.world_size

    def ask(self, model: torch.nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a micro-batch and what it measures."""
        policy = self.setup.bind(model)
        loss, logs = self.objective.loss(policy, batch)
        router = policy.router_loss(batch) if isinstance(policy, ModelPolicy) else None
        if router is not None:
            loss, logs = loss + router, {**logs, "router_loss": router}
        # A stage with a head does not train the model's words; its own accuracy is that of its judgements.
        if not self.accuracy or self.objective.head is not None:
            return loss, dict(logs)
        return loss, {**logs, "accuracy": batch.mean(policy.hits(batch), over="token")}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the objective's logs and the throughput since the last time to transformers' own."""
        if "loss" in logs:
            logs["loss"] = self.meter.of_loss(logs["loss"])
            logs |= self.meter.take(self._over_ranks)
        if "train_loss" in logs:
            # Of the whole run, also where this process only finished it.
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 1)
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """6 N T, the usual estimate: T tokens computed by N parameters, forward and backward."""
        return 6 * inputs["batch"].tokens * self._parameters

    # Evaluation is one big optimiser step without the optimiser: the same loss, the same exact means.

    @torch.no_grad()
    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        """Loss and logs of the objective over a whole set, whatever the batch size or the number of ranks."""
        model = self.model_wrapped if self.is_deepspeed_enabled or self.is_fsdp_enabled else self.model
        training = model.training
        model.eval()
        self.callback_handler.eval_dataloader = dataloader
        totals = self._totals_of(dataloader) | self._survey_all(dataloader)
        sums: dict[str, float] = {"loss": 0.0}
        for inputs in dataloader:
            batch = inputs["batch"].to(self.args.device).with_totals(totals)
            loss, logs = self.ask(model, batch)
            for name, value in {"loss": loss, **logs}.items():
                sums[name] = sums.get(name, 0.0) + float(value)
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self._over_ranks(sums).items()}
        model.train(training)
        return EvalLoopOutput(None, None, metrics, int(totals["group"]))

    def _totals_of(self, dataloader: EpochLoader) -> dict[str, float]:
        known = id(dataloader.dataset)
        if known not in self._eval_totals:
            counts = _counts(inputs["batch"] for inputs in dataloader)
            self._eval_totals[known] = self._over_ranks(counts)
        return self._eval_totals[known]

    def _survey_all(self, dataloader: EpochLoader) -> dict[str, float]:
        # Not remembered: the model changes between evaluations.
        return self._survey(inputs["batch"] for inputs in dataloader) if self.objective.surveys else {}

    @torch.no_grad()
    def records(self, dataset: Bundles) -> Iterator[tuple[str, list[dict[str, Any]]]]:
        """What the objective records about each answer of a set: (where the example came from, one dict per answer)."""
        self.model.eval()
        for inputs in self._loader(dataset, self.args.eval_batch_size, shuffle=False):
            batch = inputs["batch"].to(self.args.device)
            yield from zip(batch.names, self.objective.rows(self.setup.bind(), batch))


def _counts(batches: Iterable[Batch]) -> dict[str, float]:
    totals: dict[str, float] = {"computed": 0.0, "token": 0.0, "answer": 0.0, "group": 0.0}
    for batch in batches:
        for name, count in {**batch.units(), "computed": float(batch.tokens)}.items():
            totals[name] = totals.get(name, 0.0) + count
    return totals
