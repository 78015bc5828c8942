"""Writes the prompts of this example: train_tasks.jsonl and test_tasks.jsonl, from lists of names, the same each time.

    python make_tasks.py

Each prompt is a short text of made-up facts with a question, and what a right answer says: `output`, the reference that
mismatches are scored by, and in the test `target`, which answers are graded by. People, places and
numbers of the test prompts appear in no training prompt.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

NAMES = (
    "Anna Bert Clara David Emma Felix Greta Hugo Ida Jonas Karla Leo Maria Nils Olga Paul Rosa Simon Tilda Victor "
    "Wanda Xaver Yara Zeno Agnes Boris Carmen Dora Emil Frida Gustav Helena Igor Julia Klaus Laura Martin Nora Oscar "
    "Petra"
).split()
CITIES = (
    "Lisbon Oslo Rome Vienna Porto Prague Dublin Athens Madrid Krakow Basel Ghent Turin Malmo Bergen Seville"
).split()
SHOPS = (
    "bakery;bookshop;bicycle shop;violin workshop;flower shop;toy shop;tea house;pottery;print shop;boat yard"
).split(";")
DAYS = "Mondays Tuesdays Wednesdays Thursdays Sundays".split()
GOODS = ["maps and atlases", "bread and cakes", "kites and marbles", "lamps and mirrors", "seeds and bulbs"]


def shop(rng: random.Random, names: list[str], cities: list[str]) -> list[dict[str, str]]:
    """A text of five facts, with a question about one of them and a wish for a description that must name the city."""
    owner, helper = rng.sample(names, 2)
    kind, city, day, goods = rng.choice(SHOPS), rng.choice(cities), rng.choice(DAYS), rng.choice(GOODS)
    year, bus = rng.randint(1951, 2019), rng.randint(11, 98)
    text = (
        f"{owner} opened a small {kind} in {city} in {year}. It stands beside the old bridge and sells {goods}. "
        f"{owner}'s friend {helper} repairs the tools and keeps the books. The {kind} is closed on {day}. "
        f"Bus number {bus} stops in front of the door every half hour."
    )
    questions = {
        f"When did {owner} open the {kind}?": str(year),
        f"In which city is the {kind}?": city,
        f"Which bus stops in front of the {kind}?": str(bus),
    }
    question = rng.choice(sorted(questions))
    asked = f"Text: {text}\n\nQuestion: {question} Answer in one full sentence."
    told = f"Text: {text}\n\nDescribe the {kind} to a visitor in three sentences. Say in which city it is."
    return [{"instruction": asked, "output": questions[question]}, {"instruction": told, "output": city}]


def tasks(count: int, seed: int, names: list[str], cities: list[str]) -> list[dict[str, str]]:
    """A question and a description in turn."""
    rng = random.Random(seed)
    return [task for _ in range(count // 2) for task in shop(rng, names, cities)]


def main() -> None:
    """Write both files beside this one."""
    for name, made in (
        ("train_tasks", tasks(40, 1, NAMES[:28], CITIES[:11])),
        ("test_tasks", tasks(24, 2, NAMES[28:], CITIES[11:])),
    ):
        if name == "test_tasks":
            made = [{"instruction": task["instruction"], "target": task["output"]} for task in made]
        lines = "".join(json.dumps(row) + "\n" for row in made)
        (Path(__file__).parent / f"{name}.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main()
