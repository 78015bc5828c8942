"""AcceptHead: whether a draft token that the target would not have chosen is good enough to keep.

loss = mean over the scored mismatches of BCE(sigmoid(head(h)), score / 10), h the hidden state at the draft token.

    accept_layout     token sequence                         which tokens are computed
    sep               context [sep] draft [sep] verifier     up to the last scored draft token: under a causal mask
                                                             nothing that comes later can change a judgement
    hybrid            the same, and everything behind the    all
                      context sees itself both ways
    judge             context draft (Judge Decoding,         up to the last scored draft token
                      Bachmann et al. 2025)

BCE with a soft target y cannot fall below its entropy; `excess` is what is above it. Rounds of one request leave one
context: each is tokenised as if it were alone, and the trie merges what is equal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F

from luthier.core.errors import ConfigError, DataError
from luthier.core.objective import Objective
from luthier.core.prefix import common_prefix
from luthier.core.types import NAN, Column, Encoded, Path
from luthier.data.source import BadRow

SCORE = "accept_score"
ROUNDS = "rounds"
"""Name in `Encoded.extra` of what is known about each round."""


@dataclass(frozen=True, kw_only=True)
class AcceptHeadConfig:
    """How rounds of speculative decoding become training examples."""

    replace_lm_head: bool = False
    """stage: sft with replace_lm_head: true means stage: accept_head. lm_head itself is not lost: the head reads what
    it reads."""
    use_accept_head_format: bool = False
    """stage: sft with use_accept_head_format: true means stage: accept_head. The data set says formatting:
    accept_head."""
    accept_layout: Literal["sep", "hybrid", "judge"] = "sep"
    """sep: context, separator, draft; hybrid: the verifier's tokens are seen too; judge: no separators, the head reads
    the target model's own hidden state at the draft token."""
    accept_tree_tokens: int = 4096
    """Longest token tree: the rounds of a request that are computed together; longer requests become several trees.
    A tree is what per_device_train_batch_size counts."""
    accept_rounds_per_tree: int | None = None
    """Most rounds in one tree; 1 trains on one round a row."""
    freeze_backbone: bool = False
    """Train the head alone, on hidden states that are computed once: many epochs in seconds."""
    accept_harm: float = 0.05
    """Share of rounds in which the threshold that evaluation suggests may keep a token that is not good enough."""

    def __post_init__(self) -> None:
        for key, least in (("accept_tree_tokens", 1), ("accept_rounds_per_tree", 1)):
            value = vars(self)[key]
            if value is not None and value < least:
                raise ConfigError(f"{key}: {value} must be {least} or more.")
        if not 0 <= self.accept_harm <= 1:
            raise ConfigError(f"accept_harm: {self.accept_harm} must be a share from 0 to 1.")


class AcceptHead(Objective):
    """Judges scored mismatches; every draft token of a round could be judged."""

    Config = AcceptHeadConfig
    encoding_keys = ("accept_layout", "accept_tree_tokens", "accept_rounds_per_tree")
    answers = (0, 0)
    renders = False
    head = "accept"
    columns = (Column(SCORE, "float64"),)
    report = "acceptance"
    announces = (
        "Replaced lm_head with AcceptHead; it reads what lm_head reads, and lm_head itself is kept as it is.",
        "Using AcceptHead regression loss (BCEWithLogitsLoss).",
    )

    @classmethod
    def claims(cls, keys, stage):
        asked = [keys.get(key) for key in ("replace_lm_head", "use_accept_head_format")]
        return stage == "sft" and any(value is True or str(value).lower() == "true" for value in asked)

    @property
    def trains_backbone(self):
        return not self.config.freeze_backbone

    def facts(self, tokenizer):
        sep = None if tokenizer is None or self.config.accept_layout == "judge" else separator(tokenizer)
        return {
            "layout": self.config.accept_layout,
            "sep_id": sep,
            "template": "USER: {user_text}\nASSISTANT:{assistant_text}",
            "threshold": 0.5,
            "frozen": self.config.freeze_backbone,
        }

    def start(self, renderer):
        if self.config.accept_layout != "judge":
            separator(renderer.tokenizer)

    def encode(self, example, renderer, *, cutoff_len):
        known = example.extra
        if "mismatches" not in known:
            raise BadRow("is no round of speculative decoding", "give the data set formatting: accept_head")
        _within_vocabulary(known, len(renderer.tokenizer))
        told = {ROUNDS: [_told(known)]}
        if not known["mismatches"]:
            return [Encoded((), extra=told)]
        context = known.get("context_ids")
        if context is None:
            context = renderer.tokenizer.encode(known["text"], add_special_tokens=False)
        suffix, first = self._suffix(known, renderer.tokenizer)
        cut = overhang(len(context) + len(suffix), cutoff_len)
        if cut >= len(context):
            raise BadRow(f"the round does not fit cutoff_len={cutoff_len}", f"{len(suffix)} tokens follow the context")
        context = context[cut:]
        weights, scores = [0.0] * len(context), [NAN] * len(context)
        labels = {first + m["index"]: m["target"] for m in known["mismatches"]}
        weights += [1.0 if i in labels else 0.0 for i in range(len(suffix))]
        scores += [labels.get(i, NAN) for i in range(len(suffix))]
        block = len(context) if self.config.accept_layout == "hybrid" else None
        name = f"round {known['place'].rpartition(':')[2]}".strip()
        path = Path([*context, *suffix], weights, name, columns={SCORE: scores}, block=block)
        return [Encoded((path,), cut, told)]

    def _suffix(self, known: Mapping[str, Any], tokenizer: Any) -> tuple[list[int], int]:
        """What follows the context, and where in it the draft begins."""
        draft = known["draft"]
        needed = draft[: known["mismatches"][-1]["index"] + 1]
        if self.config.accept_layout == "judge":
            return needed, 0
        sep = separator(tokenizer)
        if self.config.accept_layout == "sep":
            return [sep, *needed], 1
        return [sep, *draft, sep, *known["verifier"]], 1

    def gather(self, rows):
        """Rounds of one request as trees of at most accept_tree_tokens tokens and accept_rounds_per_tree rounds."""
        judged = [row for row in rows if row.paths]
        matched = [entry for row in rows if not row.paths for entry in row.extra[ROUNDS]]
        most = self.config.accept_rounds_per_tree or len(rows)
        trees = []
        for chosen in _cut([row.paths[0] for row in judged], self.config.accept_tree_tokens, most):
            members = [judged[i] for i in chosen]
            told = [entry for row in members for entry in row.extra[ROUNDS]]
            paths = tuple(row.paths[0] for row in members)
            trees.append(Encoded(paths, sum(row.truncated for row in members), {ROUNDS: told}))
        if trees and matched:
            trees[0] = replace(trees[0], extra={ROUNDS: [*trees[0].extra[ROUNDS], *matched]})
        # A request without a scored mismatch trains nothing, but what decoding keeps of it counts.
        return trees or [Encoded((), extra={ROUNDS: matched})]

    def loss(self, policy, batch):
        logit = policy.verdict_at_tokens(batch)[:, 0]
        target = batch.columns[SCORE].to(logit.dtype)
        bce = F.binary_cross_entropy_with_logits(logit, target, reduction="none")
        judged = torch.sigmoid(logit.detach())
        entropy = -(torch.xlogy(target, target) + torch.xlogy(1 - target, 1 - target))
        logs = {
            "excess": bce.detach() - entropy,
            "mae": (judged - target).abs(),
            "mse": (judged - target) ** 2,
            "accuracy": ((judged >= 0.5) == (target >= 0.5)).to(logit.dtype),
        }
        return batch.mean(bce, over="token"), {name: batch.mean(value, over="token") for name, value in logs.items()}

    def rows(self, policy, batch):
        """Each tree's rounds with the probability that every scored mismatch is good enough."""
        probability = torch.sigmoid(policy.verdict_at_tokens(batch)[:, 0].double()).tolist()
        found, edge, answer = [], 0, 0
        owners = batch.answer.tolist()
        for extra in batch.extras:
            rounds = []
            for told in extra[ROUNDS]:
                mismatches = []
                for mismatch in told["mismatches"]:
                    assert owners[edge] == answer, "edges come in the order of rounds"
                    mismatches.append(mismatch | {"probability": probability[edge]})
                    edge += 1
                answer += bool(told["mismatches"])
                rounds.append(told | {"mismatches": mismatches})
            found.append(rounds)
        return found


def separator(tokenizer: Any) -> int:
    """The token between context, draft and verifier: sep_token, else eos_token. Raises ConfigError."""
    for token in (tokenizer.sep_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise ConfigError("accept_layout: the tokenizer has neither a sep_token nor an eos_token to separate with.")


def overhang(length: int, cutoff_len: int) -> int:
    """How many tokens to cut off a context's beginning so that `length` fits.

    Cut in steps of half a cutoff_len, so that rounds of about the same length begin at the same token and can share,
    whatever other rounds there are.
    """
    step = max(cutoff_len // 2, 1)
    return max(0, -(-(length - cutoff_len) // step) * step)


def _told(known: Mapping[str, Any]) -> dict[str, Any]:
    """What predictions say about a round beside its judgements."""
    line = known["place"].rpartition(":")[2]
    return {
        "req_id": known["req_id"],
        "row": int(line) if line.isdigit() else None,
        "draft": len(known["draft"]),
        "mismatches": known["mismatches"],
        "unscored": known["unscored"],
    }


def _within_vocabulary(known: Mapping[str, Any], size: int) -> None:
    wrong = [token for token in (*known["draft"], *known["verifier"], *known.get("context_ids", ())) if token >= size]
    if wrong:
        raise DataError(
            f"{known['place']}: token id {wrong[0]} is outside the vocabulary of {size} tokens. The rounds were logged "
            "with another tokenizer; name the model that they come from in model_name_or_path."
        )


def _cut(paths: Sequence[Path], budget: int, most: int) -> list[list[int]]:
    """Paths in groups whose tries hold at most `budget` tokens (one path may alone hold more), `most` paths each.

    In the order of their ids, a trie has as many tokens as the first path and what each other does not have in common
    with the one before it.
    """
    order = sorted(range(len(paths)), key=lambda i: (paths[i].ids, i))
    groups: list[list[int]] = []
    size = 0
    for place, i in enumerate(order):
        fresh = len(paths[i].ids) - (_in_common(paths[order[place - 1]], paths[i]) if place else 0)
        if groups and size + fresh <= budget and len(groups[-1]) < most:
            groups[-1].append(i)
            size += fresh
        else:
            groups.append([i])
            size = len(paths[i].ids)
    return [sorted(group) for group in groups]


def _in_common(a: Path, b: Path) -> int:
    most = min(len(a.ids), len(b.ids), *(path.block for path in (a, b) if path.block is not None))
    return min(common_prefix(a.ids, b.ids), most)
