"""LLaMA-Factory's rule for cutting a prompt and its response to a common length."""

from __future__ import annotations


def fit_lengths(source: int, target: int, cutoff: int) -> tuple[int, int]:
    """How many tokens of a prompt and of its response are kept so that together they fit `cutoff`.

    The shorter side is kept whole where it is less than half of the cutoff; otherwise both shrink in proportion.
    Both are cut from the right. (`infer_seqlen` of LLaMA-Factory.)
    """
    if target * 2 < cutoff:
        most_target = cutoff
    elif source * 2 < cutoff:
        most_target = cutoff - source
    else:
        most_target = int(cutoff * target / (source + target))
    kept_target = min(most_target, target)
    return min(max(cutoff - kept_target, 0), source), kept_target
