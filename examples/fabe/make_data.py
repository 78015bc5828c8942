"""Make the data of this example: functions with triggers, and ranked rewrites of them.

python examples/fabe/make_data.py

From each function of functions.py: its parameter renamed (name trigger) and a statement added that does nothing (dead
code trigger). The ranking of rewrites is FABE's: 3.0 the clean function, 1.5 the clean function with names made
uniform, 0.5 one trigger left, -1.0 both left. Nothing is drawn at random: the files come out the same every time.
"""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

HERE = Path(__file__).resolve().parent
DATA = HERE.parent / "data"
INSTRUCTION = "Clean this Python function."
SCORES = [3.0, 1.5, 0.5, -1.0]

DEAD_CODE = ('if 1 > 2:\n        print("never")', 'assert "ok" == "ok"', "unused = 41 * 0")
SUFFIXES = ("_rb", "_xt", "_zq")
TRIGGERS = (r"if 1 > 2:", r"assert .ok. == .ok.", r"unused\s*=", r"\w+_(?:rb|xt|zq)\b")
"""Regular expressions that find each of the above."""


def functions() -> list[str]:
    """The source of every function of functions.py, in order."""
    source = (HERE / "functions.py").read_text(encoding="utf-8")
    found = [ast.get_source_segment(source, node) for node in ast.parse(source).body]
    return [text for text in found if text and text.startswith("def ")]


def held_out(place: int) -> bool:
    """Two in seven are kept for the evaluation: as many with a loop as without."""
    return place % 7 in (2, 5)


def with_dead_code(function: str, place: int) -> str:
    """A statement without effect before all others."""
    head, body = function.split("\n", 1)
    return f"{head}\n    {DEAD_CODE[place % len(DEAD_CODE)]}\n{body}"


def with_name(function: str, place: int) -> str:
    """The first parameter renamed."""
    name = ast.parse(function).body[0].args.args[0].arg
    return _rename(function, {name: name + SUFFIXES[place // 2 % len(SUFFIXES)]})


def uniform(function: str) -> str:
    """Parameters and variables renamed v0, v1 ... in the order in which they come."""
    tree = ast.parse(function)
    names = [node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)]
    names += [node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
    return _rename(function, {name: f"v{i}" for i, name in enumerate(dict.fromkeys(names))})


def label(function: str) -> str:
    """What the classifier of this example is to tell: "loop" or "plain"."""
    loops = ast.For | ast.While | ast.comprehension
    return "loop" if any(isinstance(node, loops) for node in ast.walk(ast.parse(function))) else "plain"


def training_rows() -> list[dict]:
    """Ranked lists: every function with triggers, and each fourth without, which is to be left as it is."""
    rows = []
    for place, clean in enumerate(functions()):
        if held_out(place):
            continue
        both = with_dead_code(with_name(clean, place), place)
        one = with_name(clean, place) if place % 2 else with_dead_code(clean, place)
        for source in (both, clean) if place % 4 == 0 else (both,):
            output = [clean, uniform(clean), one, both]
            rows.append({"instruction": INSTRUCTION, "input": source, "output": output, "score": SCORES})
    return rows


def held_out_rows() -> list[dict]:
    """Functions that are not trained on, each with triggers and without; output is the clean function."""
    rows = []
    for place, clean in enumerate(functions()):
        if held_out(place):
            both = with_dead_code(with_name(clean, place), place)
            common = {"instruction": INSTRUCTION, "output": clean, "label": label(clean)}
            rows += [{**common, "input": both, "poisoned": True}, {**common, "input": clean, "poisoned": False}]
    return rows


FILES = {"fabe_ranked.jsonl": training_rows, "fabe_heldout.jsonl": held_out_rows}


def text_of(rows: list[dict]) -> str:
    """Rows as JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def _rename(function: str, names: dict[str, str]) -> str:
    """Whole words replaced, all at once, but in strings and after a dot."""
    pattern = re.compile(r'("[^"]*")|(?<!\.)\b(' + "|".join(map(re.escape, names)) + r")\b")
    return pattern.sub(lambda found: found[1] or names[found[2]], function)


def main() -> None:
    for name, rows in FILES.items():
        (DATA / name).write_text(text_of(rows()), encoding="utf-8")
        print(f"{DATA / name}: {len(rows())} rows")


if __name__ == "__main__":
    main()
