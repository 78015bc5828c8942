"""Supervised fine-tuning: cross-entropy on what the assistant says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from luthier.core.errors import ConfigError
from luthier.core.objective import Objective, Renderer
from luthier.core.prefix import common_prefix
from luthier.core.types import Encoded, Path
from luthier.data.source import BadRow
from luthier.data.truncate import fit_lengths
from luthier.data.turns import RESPONSES

Turn = tuple[list[int], list[int], float]
"""Ids of a prompt, ids of the response to it, loss weight of the response."""


@dataclass(frozen=True, kw_only=True)
class SftConfig:
    """Which tokens of a conversation are trained."""

    train_on_prompt: bool = False
    """Train on the prompts too, not only on the responses."""
    mask_history: bool = False
    """Train only on the last response of a conversation; when it must be cut, the last turns are kept."""
    train_on: str = "all"
    """all | last: which responses of a conversation are trained; last is mask_history by another name. A message's own
    `weight` or `loss` (0, 1 or between) says how much."""

    def __post_init__(self) -> None:
        if self.train_on not in ("all", "last"):
            raise ConfigError(f"train_on: {self.train_on!r} is none of all, last.")
        if self.train_on_prompt and (self.mask_history or self.train_on == "last"):
            other = "mask_history" if self.mask_history else "train_on: last"
            raise ConfigError(f"train_on_prompt and {other} cannot go together: one trains what the other masks.")


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
        given = {"system": example.system, "tools": example.tools}
        weights = [1.0 if m.weight is None else float(m.weight) for m in messages if m.role in RESPONSES]
        if self.last_only:
            branches = [renderer.pairs(messages, **given, mask_history=True)]
            weights = [0.0] * (len(branches[0]) - 1) + weights[-1:]
        else:
            branches = renderer.branches(messages, **given)
        paths: list[Path] = []
        before: list[int] = []
        spoken = truncated = 0
        for branch in branches:
            own = weights[spoken : spoken + len(branch)]
            shared = common_prefix(before, branch[0][0])
            turns, cut = self._cut(branch, own, cutoff_len - renderer.efficient_eos, whole_prompt=spoken > 0)
            found = self._paths(turns, shared, spoken, renderer)
            paths += [path for path in found if any(path.weights[1:])]
            before = found[0].ids if found else before
            spoken, truncated = spoken + len(branch), truncated + cut - (0 if turns else shared)
        return [Encoded(tuple(paths), truncated)] if paths else []

    def unserved(self, example, renderer):
        return not self.last_only and renderer.unserved((*example.prompt, *example.answers[0].messages))

    @property
    def last_only(self) -> bool:
        """Whether only the last response of a conversation is trained."""
        return self.config.mask_history or self.config.train_on == "last"

    def _paths(self, turns: Sequence[Turn], shared: int, first: int, renderer: Renderer) -> list[Path]:
        """A branch as one path, and a path for each end of a turn that the template leaves to the next one.

        first: number of the branch's first response; shared: tokens of its prompt that stood in an earlier branch."""
        ids: list[int] = []
        weights: list[float] = []
        ends: list[Path] = []
        for nth, (source, target, weight) in enumerate(turns):
            known = 0 if nth else min(shared, len(source))
            ids += source + target
            weights += [0.0] * known + [float(self.config.train_on_prompt)] * (len(source) - known)
            weights += [weight] * len(target)
            if renderer.efficient_eos and weight and nth < len(turns) - 1:
                # The end of this turn is learnt, but the conversation goes on with the user's header: a branch.
                name = f"end-of-turn-{first + nth + 1}"
                ends.append(Path([*ids, renderer.tokenizer.eos_token_id], [0.0] * len(ids) + [weight], name))
        if not turns:
            return []
        if renderer.efficient_eos:
            ids, weights = [*ids, renderer.tokenizer.eos_token_id], [*weights, turns[-1][2]]
        return [Path(ids, weights, f"response-{first + 1}" if first else "response"), *ends]

    def _cut(
        self, pairs: Sequence[tuple[list[int], list[int]]], weights: Sequence[float], room: int, *, whole_prompt: bool
    ) -> tuple[list[Turn], int]:
        """The exchanges that fit, in order; and how many tokens were cut.

        whole_prompt: the first prompt holds history and is kept whole or not at all; a model never meets a piece."""
        kept: list[Turn] = []
        total = 0
        for nth in range(len(pairs) - 1, -1, -1) if self.last_only else range(len(pairs)):
            source, target = pairs[nth]
            if total >= room or (whole_prompt and nth == 0 and len(source) >= room):
                break
            s, t = fit_lengths(len(source), len(target), room - total)
            if whole_prompt and nth == 0:
                s, t = len(source), min(len(target), room - len(source))
            kept.append((source[:s], target[:t], weights[nth]))
            total += s + t
        everything = sum(len(source) + len(target) for source, target in pairs)
        return (kept[::-1] if self.last_only else kept), everything - total

    def loss(self, policy, batch):
        return batch.mean(policy.nll(batch), over="token"), {}
