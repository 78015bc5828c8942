"""A language model is asked how good it would be to keep the draft token, from 0 to 10.

Any server that speaks OpenAI's chat completions will do: vLLM, SGLang, llama.cpp, Ollama, a hosted one. Nothing is
sent unless `collect_llm_url` names it.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from luthier.core.errors import ModelError, refuse_all
from luthier.core.log import get_logger
from luthier.scorers._endpoint import Endpoint, Memory, fingerprint
from luthier.scorers._spot import UNSCORED, Scorer, Spot, Tools

log = get_logger("scorers")

AHEAD = 16
"""Tokens of the target's own answer that are shown beside the draft."""
TRIES = 3
"""How often the same is asked where the answer is no number from 0 to 10."""
STRANGE = 5
"""Mismatches in a row without a usable answer that stop the run."""
MEMORY = "llm_answers.jsonl"

INSTRUCTION = """\
Two language models write the answer to a question together. The small model proposes how the text goes on; the large \
model would have gone on otherwise. Judge whether the small model's next token, in double brackets [[ ]], can be kept \
without making the final answer worse. Wording, style and layout do not matter; meaning and correctness do.
10: just as good. 5: the least that may be kept. 0: it makes the answer wrong or senseless.
Reply with one integer from 0 to 10 and nothing else."""

QUESTION = """\
### Question
{question}

### Answer so far
{before}

### The large model goes on with
{target}

### The small model goes on with
[[{token}]]{after}"""


@dataclass(frozen=True, kw_only=True)
class Config:
    """The server that is asked. The API key is read from the environment, never from a file."""

    collect_llm_url: str = ""
    """Base URL of an OpenAI-compatible server, such as http://localhost:8000/v1. Questions and answers of your
    prompts are sent there."""
    collect_llm_model: str = ""
    """The model's name on that server."""
    collect_llm_key_env: str = "OPENAI_API_KEY"
    """The environment variable that holds the API key; none is sent where it is not set."""
    collect_llm_workers: int = 4
    """Requests that are under way at the same time."""
    collect_llm_timeout: float = 60.0
    """Seconds that one request may take."""
    collect_llm_retries: int = 5
    """How often a request is made again that failed or met a busy server, after 1, 2, 4 ... seconds."""

    def __post_init__(self) -> None:
        parts = urlsplit(self.collect_llm_url)
        known = parts.scheme in ("http", "https") and parts.netloc
        rules = (
            (self.collect_llm_url, "collect_llm_url is not set; collect_scorer: llm needs to know which server to ask"),
            (known or not self.collect_llm_url, f"collect_llm_url: {self.collect_llm_url!r} is no address of a server,"
             " such as http://localhost:8000/v1"),
            (self.collect_llm_model, "collect_llm_model is not set; collect_scorer: llm needs to know which model to"
             " ask"),
            (self.collect_llm_workers >= 1, f"collect_llm_workers: {self.collect_llm_workers} must be 1 or more"),
            (0 < self.collect_llm_timeout < math.inf, f"collect_llm_timeout: {self.collect_llm_timeout} must be above"
             " 0"),
            (self.collect_llm_retries >= 0, f"collect_llm_retries: {self.collect_llm_retries} must be 0 or more"),
        )  # fmt: skip
        refuse_all(f"{what}." for holds, what in rules if not holds)


class Llm(Scorer):
    """Answers are remembered in the output folder by the hash of the request, so that none is asked for twice."""

    config: Config

    def __init__(self, config: Config, tools: Tools):
        super().__init__(config, tools)
        self._endpoint = Endpoint(
            config.collect_llm_url,
            config.collect_llm_model,
            os.environ.get(config.collect_llm_key_env) or None,
            config.collect_llm_timeout,
            config.collect_llm_retries,
        )
        self._memory = Memory(tools.folder / MEMORY)
        self._strange = 0

    def score(self, spots: Sequence[Spot]) -> list[float]:
        """What the model said, tenths. Raises ModelError when it keeps saying something else than a number."""
        bodies = [self._body(spot) for spot in spots]
        with ThreadPoolExecutor(self.config.collect_llm_workers) as pool:
            try:
                return [self._accepted(*said) for said in pool.map(self._ask, bodies)]
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _body(self, spot: Spot) -> dict[str, Any]:
        text, at = self.tools.text, spot.mismatch.index
        place = spot.round.cut + at
        own = spot.request.answer_ids[place : place + AHEAD]
        # Of later mismatches in a round the target's own answer stands beside another text: only its token is meant.
        follows = spot.round.draft[:at] == spot.request.answer_ids[spot.round.cut : place]
        question = QUESTION.format(
            question=spot.request.question,
            before=text(spot.before),
            target=text(own if follows and own else [spot.round.verifier[at]]) or "(the answer ends)",
            token=text([spot.token]) or "(the answer ends)",
            after=text(spot.round.draft[at + 1 :]),
        )
        return {
            "model": self.config.collect_llm_model,
            "messages": [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": question}],
            "temperature": 0,
        }

    def _ask(self, body: dict[str, Any]) -> tuple[float, str]:
        """(score, what was said)."""
        key = fingerprint(self.config.collect_llm_url, body)
        reply = self._memory.get(key)
        if reply is not None:
            return read_score(reply), reply
        for _ in range(TRIES):
            reply = self._endpoint.ask(body)
            score = read_score(reply)
            if not math.isnan(score):
                self._memory.put(key, reply)
                break
        return score, reply

    def _accepted(self, score: float, reply: str) -> float:
        self._strange = self._strange + 1 if math.isnan(score) else 0
        if self._strange:
            model = self._endpoint.model
            log.warning("%s said %r instead of 0 to 10; this mismatch stays unscored.", model, reply[:80])
        if self._strange >= STRANGE:
            raise ModelError(
                f"collect_llm_model: {self._endpoint.model} gave no number from 0 to 10 for {STRANGE} mismatches in a "
                f"row; the last reply was {reply[:200]!r}. Name a model that follows instructions."
            )
        return score


def read_score(reply: str) -> float:
    """The one whole number from 0 to 10 in a reply, as a share of 10 (`7`, `Score: 7`, `7/10`, `7 out of 10`)."""
    numbers = re.findall(r"-?\d+(?:[.,]\d+)?", re.sub(r"(?i)\s*(?:/|out of)\s*10\b", "", reply))
    if len(numbers) != 1 or not numbers[0].isdigit() or int(numbers[0]) > 10:
        return UNSCORED
    return int(numbers[0]) / 10
