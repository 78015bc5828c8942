"""Pre-training: every token of every document, each exactly once.

A document longer than `cutoff_len` continues in the next piece, which begins with the last token of the piece before
it, so that no token goes untrained at a cut. Pieces are packed without seeing each other.
"""

from __future__ import annotations

from luthier.core.objective import Objective
from luthier.core.types import Encoded, Path


class Pt(Objective):
    """Causal language modelling on plain text."""

    answers = (0, 1)
    packs = True
    perplexity = True

    def encode(self, example, renderer, *, cutoff_len):
        ids = renderer.document("".join(message.content for message in example.prompt))
        step = max(cutoff_len - 1, 1)  # of pieces of one token, none has anything to train
        pieces = [ids[i : i + cutoff_len] for i in range(0, max(len(ids) - 1, 1), step)]
        return [
            Encoded((Path(piece, [0.0] + [1.0] * (len(piece) - 1), "document"),)) for piece in pieces if len(piece) > 1
        ]

    def loss(self, policy, batch):
        return batch.mean(policy.nll(batch), over="token"), {}
