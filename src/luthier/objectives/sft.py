"""Supervised fine-tuning: cross-entropy on what the assistant says."""

from __future__ import annotations

from dataclasses import dataclass

from luthier.core.errors import ConfigError
from luthier.core.objective import Objective
from luthier.core.types import Encoded, Path
from luthier.data.source import BadRow
from luthier.data.truncate import fit_lengths


@dataclass(frozen=True, kw_only=True)
class SftConfig:
    """Which tokens of a conversation are trained."""

    train_on_prompt: bool = False
    """Train on the prompts too, not only on the responses."""
    mask_history: bool = False
    """Train only on the last response of a conversation; when it must be cut, the last turns are kept."""

    def __post_init__(self) -> None:
        if self.train_on_prompt and self.mask_history:
            raise ConfigError("train_on_prompt and mask_history cannot both be true: one trains what the other masks.")


class Sft(Objective):
    """Trains every response of a conversation (labels and cuts as in LLaMA-Factory)."""

    Config = SftConfig
    perplexity = True

    def start(self, renderer):
        if self.config.train_on_prompt and renderer.efficient_eos:
            raise ConfigError("train_on_prompt does not work with a template that ends turns by efficient_eos.")

    def encode(self, example, renderer, *, cutoff_len):
        if example.answers[0].score < 0:
            raise BadRow("the answer is marked as disliked", "SFT would teach it; stage: kto learns from both kinds")
        messages = (*example.prompt, *example.answers[0].messages)
        pairs = renderer.pairs(
            messages, system=example.system, tools=example.tools, mask_history=self.config.mask_history
        )
        spoken = [m.weight for m in messages if m.role in ("assistant", "function")]
        turns, truncated = self._cut(pairs, spoken, cutoff_len - renderer.efficient_eos)
        ids: list[int] = []
        weights: list[float] = []
        ends: list[Path] = []
        for nth, (source, target, weight) in enumerate(turns):
            ids += source + target
            weights += [float(self.config.train_on_prompt)] * len(source) + [weight] * len(target)
            if renderer.efficient_eos and weight and nth < len(turns) - 1:
                # The end of this turn is learnt, but the conversation goes on with the user's header: a branch.
                name = f"end-of-turn-{nth + 1}"
                ends.append(Path([*ids, renderer.tokenizer.eos_token_id], [0.0] * len(ids) + [weight], name))
        if renderer.efficient_eos and turns:
            ids, weights = [*ids, renderer.tokenizer.eos_token_id], [*weights, turns[-1][2]]
        if not any(weights[1:]):
            return []
        return [Encoded((Path(ids, weights), *ends), truncated)]

    def _cut(self, pairs, spoken, room):
        """The exchanges that fit, in order, as (source, target, weight of the target); and how much was cut."""
        kept: list[tuple[list[int], list[int], float]] = []
        total, last = 0, len(pairs) - 1
        for nth in range(last, -1, -1) if self.config.mask_history else range(len(pairs)):
            if total >= room:
                break
            source, target = pairs[nth]
            s, t = fit_lengths(len(source), len(target), room - total)
            weight = 1.0 if spoken[nth] is None else float(spoken[nth])
            kept.append((source[:s], target[:t], 0.0 if self.config.mask_history and nth < last else weight))
            total += s + t
        everything = sum(len(source) + len(target) for source, target in pairs)
        return (kept[::-1] if self.config.mask_history else kept), everything - total

    def loss(self, policy, batch):
        return batch.mean(policy.nll(batch), over="token"), {}
