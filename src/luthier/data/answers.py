"""One prompt and K answers to it as K token paths, cut by LLaMA-Factory's rule for pairs."""

from __future__ import annotations

from luthier.core.objective import Renderer
from luthier.core.types import Encoded, Example, Path
from luthier.data.source import BadRow
from luthier.data.truncate import fit_lengths


def encode_answers(example: Example, renderer: Renderer, *, cutoff_len: int) -> list[Encoded]:
    """All answers of an example as one Encoded; every token of an answer has weight 1, the prompt 0.

    The prompt is rendered with the best answer (the first: formats sort by score) and shared by all; prompt and the
    longest answer together fit `cutoff_len`, and all answers are cut to the same length. Empty if no answer keeps a
    token. Raises BadRow where nothing tells the answers apart.
    """
    rendered = [
        renderer.oneturn((*example.prompt, *answer.messages), system=example.system, tools=example.tools)
        for answer in example.answers
    ]
    prompt = rendered[0][0]
    end = [renderer.tokenizer.eos_token_id] if renderer.efficient_eos else []
    replies = [reply + end for _, reply in rendered]
    longest = max(len(reply) for reply in replies)
    kept_prompt, kept_reply = fit_lengths(len(prompt), longest, cutoff_len)
    if not kept_reply or not kept_prompt:
        return []
    if len(replies) > 1 and len({tuple(reply[:kept_reply]) for reply in replies}) == 1:
        cut = f" once they are cut to cutoff_len={cutoff_len}" if kept_reply < longest else ""
        raise BadRow(f"all answers are the same{cut}", f"{len(replies)} answers of {kept_reply} tokens")
    paths = []
    for answer, reply in zip(example.answers, replies):
        reply = reply[:kept_reply]
        weights = [0.0] * kept_prompt + [1.0] * len(reply)
        paths.append(Path(prompt[:kept_prompt] + reply, weights, answer.name, answer.score))
    cut = sum(len(prompt) + len(reply) - len(path.ids) for reply, path in zip(replies, paths))
    return [Encoded(tuple(paths), cut)]


def prompt_length(path: Path) -> int:
    """How many tokens of a path come before its first supervised one."""
    return next((i for i, weight in enumerate(path.weights) if weight), len(path.ids))
