"""Random rounds in the form of predictions, for tests of what is measured on them."""

from __future__ import annotations

import random

SCORES = [0.0, 0.1, 0.4, 0.5, 0.5, 0.7, 1.0]
JUDGEMENTS = [0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95]


def random_round(rng: random.Random, request: str, row: int, *, rivals=("kl", "prob", "rank")):
    """A round of up to 8 draft tokens; judgements from few values, so that there are ties."""
    draft = rng.randint(1, 8)
    places = sorted(rng.sample(range(draft), rng.randint(0, min(draft, 4))))
    known = {
        "kl": lambda: rng.choice([0.1, 0.5, 1.5, 4.0]),
        "prob": lambda: rng.choice([0.9, 0.5, 0.1, 0.01]),
        "rank": lambda: rng.choice([2, 3, 7, 30]),
    }
    mismatches = [
        {
            "index": i,
            "target": rng.choice(SCORES),
            "probability": rng.choice(JUDGEMENTS),
            **{name: known[name]() for name in rivals},
        }
        for i in places
    ]
    free = [i for i in range(draft) if i not in places]
    unscored = rng.choice(free) if free and rng.random() < 0.3 else None
    return {"req_id": request, "row": row, "draft": draft, "mismatches": mismatches, "unscored": unscored}


def random_records(seed: int, requests: int = 6, most: int = 12, **options):
    """Trees of rounds; a request may come in two of them."""
    rng = random.Random(seed)
    records, row = [], 0
    for request in range(requests):
        rounds = []
        for _ in range(rng.randint(1, most)):
            row += 1
            rounds.append(random_round(rng, str(request), row, **options))
        cut = rng.randint(0, len(rounds) - 1)
        records += [(f"train.jsonl:{row}", part) for part in (rounds[:cut], rounds[cut:]) if part]
    return records


def all_rounds(records):
    return [answer for _, answers in records for answer in answers]


def all_mismatches(records):
    return [mismatch for answer in all_rounds(records) for mismatch in answer["mismatches"]]
