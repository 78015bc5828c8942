"""The gate, with dataclasses made here: what is coerced, what is refused, and that all problems are said together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from luthier.core import config as gate
from luthier.core.compat import Refused, Renamed
from luthier.core.errors import ConfigError
from luthier.core.kinds import coerce, describe
from luthier.core.source import dump, read


@dataclass(frozen=True, kw_only=True)
class Motor:
    """How fast it goes."""

    speed: float = 1.0
    """Metres
    per second."""
    gears: int = 5
    # A comment between a field and the next is no documentation.
    name: str | None = None
    """What it is called."""
    parts: list[str] = field(default_factory=list)
    """What it is made of."""
    mode: Literal["slow", "fast"] = "slow"
    """How it is driven."""
    loud: bool = False
    """Whether it is heard."""

    def __post_init__(self):
        if self.gears < 1:
            raise ConfigError(f"gears: {self.gears} must be 1 or more.")


@dataclass(frozen=True, kw_only=True)
class Frame:
    path: str
    """Where it stands."""


def settle(values, **tables):
    owners = [gate.owner("motor", Motor), gate.owner("frame", Frame)]
    given = values if isinstance(values, gate.Given) else read({"path": "here", **values})
    return given, gate.settle(given, owners, **tables)


def problems(values, **tables) -> str:
    given, settled = settle(values, **tables)
    with pytest.raises(ConfigError) as caught:
        gate.refuse(given.source, settled.problems)
    return str(caught.value)


def write(tmp_path, text, name="car.yaml"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


# Reading


def test_yaml_as_omegaconf_reads_it(tmp_path):
    given = read(write(tmp_path, "speed: 1e-4\nname: x-${gears}\ngears: 3\n"))
    assert given.values == {"speed": 1e-4, "name": "x-3", "gears": 3}
    assert isinstance(given.values["speed"], float)


def test_places_count_comments_and_blank_lines(tmp_path):
    path = write(tmp_path, "### engine\n\nspeed: 2\nparts:\n  - a\n  - b\n# more\ngears: 3\n")
    assert read(path).places == {"speed": f"{path}:3", "parts": f"{path}:4", "gears": f"{path}:8"}


def test_source_is_verbatim(tmp_path):
    text = "# mine\nspeed:   2   # fast\n"
    path = write(tmp_path, text)
    source = read(path, ["gears=3"]).source
    assert (source.text, source.path, source.name) == (text, path, str(path))


@pytest.mark.parametrize(
    "text, words",
    [
        ("speed: 1\ngears: 2\nspeed: 3\n", [":3:", "speed", "twice"]),
        ("speed: 1\n\tgears: 2\n", [":2:", "not valid YAML"]),
        ("speed: [1, 2\ngears: 3\n", ["not valid YAML"]),
        ("- speed\n", ["key: value", "a list"]),
        ("speed\n", ["key: value"]),
        ("speed: ${nothing}\n", [":1: speed", "nothing"]),
        ("gears: 1\nspeed: ${\n", [":2: speed"]),
        ("speed: " + "[" * 2000 + "]" * 2000, ["nested"]),
        ("parts: " + "[" * 40 + "]" * 40, [":1: parts", "nested deeper than 32 levels"]),
        ("gears: " + "9" * 5000 + "\n", ["cannot be read"]),
        ("speed: !!timestamp 2024-13-45\n", ["car.yaml"]),
    ],
)
def test_broken_yaml_is_said_with_its_line(tmp_path, text, words):
    with pytest.raises(ConfigError) as caught:
        read(write(tmp_path, text))
    assert all(word in str(caught.value) for word in ["car.yaml", *words]), caught.value


def test_missing_file_names_the_nearest(tmp_path):
    write(tmp_path, "speed: 1\n", "train_sft.yaml")
    with pytest.raises(ConfigError, match=r"no configuration file .*train_stf\.yaml\. Did you mean .*train_sft\.yaml"):
        read(tmp_path / "train_stf.yaml")
    with pytest.raises(ConfigError, match="is a folder"):
        read(tmp_path)


def test_not_text(tmp_path):
    (tmp_path / "model.yaml").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read(tmp_path / "model.yaml")


def test_json_with_lines(tmp_path):
    path = write(tmp_path, '{\n\t"speed": 1e-4,\n\t"parts": ["a"],\n\t"geers": 3\n}', "car.json")
    given = read(path)
    assert given.values == {"speed": 1e-4, "parts": ["a"], "geers": 3}
    assert given.places["geers"] == f"{path}:4"
    with pytest.raises(ConfigError, match="twice"):
        read(write(tmp_path, '{"speed": 1, "speed": 2}', "car.json"))
    with pytest.raises(ConfigError, match=r"car\.json:2.*JSON"):
        read(write(tmp_path, '{\n"speed": }', "car.json"))
    with pytest.raises(ConfigError, match="JSON object"):
        read(write(tmp_path, "[1]", "car.json"))


@pytest.mark.parametrize(
    "override, value",
    [
        ("x=1e-4", 1e-4),
        ("x=null", None),
        ("x=", ""),
        ("x=a,b", "a,b"),
        ("x=[a, b]", ["a", "b"]),
        ("x={a: 1}", {"a": 1}),
        ("x=a: b", "a: b"),
        ("x=a #1", "a #1"),
        ("x='yes'", "yes"),
        ("x=C:\\models", "C:\\models"),
        ("x=a=b", "a=b"),
        ("x=true", True),
        ("x=$5", "$5"),
    ],
)
def test_values_on_the_command_line(override, value):
    given = read({"x": 0}, [override])
    assert given.values == {"x": value} and given.places["x"] == "command line"


def test_overrides_win_reach_inside_and_interpolate():
    given = read({"x": 1, "more": {"a": 1}, "y": "${x}"}, ["x=2", "x=3", "more.b=4", "new.deep.er=5"])
    assert given.values == {"x": 3, "more": {"a": 1, "b": 4}, "y": 3, "new": {"deep": {"er": 5}}}
    for wrong in (["x"], ["=1"], ["x.y=1"]):
        with pytest.raises(ConfigError, match="command line"):
            read({"x": 1}, wrong)


@pytest.mark.parametrize("value", ["${", "${oc.env", "[" * 3000])
def test_a_command_line_that_cannot_be_read(value):
    try:
        read({"x": 0}, [f"x={value}"])
    except ConfigError as error:
        assert "x" in str(error)


@pytest.mark.parametrize("name", ["~nobody-of-that-name/a.yaml", "x" * 300, "a\0b.yaml"])
def test_names_that_no_file_system_takes(name):
    with pytest.raises(ConfigError, match="no configuration file"):
        read(name)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [1.0, float("-inf")], {"a": float("nan")}])
def test_numbers_are_finite(value):
    with pytest.raises(ValueError, match="finite"):
        coerce(Any, value)


def test_dump_is_read_back_by_any_yaml_reader():
    import yaml

    values = {"a": 1e-5, "b": [1, "x"], "c": None, "d": "1e-5", "e": True, "f": "no", "g": {"h": 2.5e20}, "i": (1, 2)}
    assert yaml.safe_load(dump(values)) == values | {"i": [1, 2]}
    assert read({}, ["speed=1e-5"]).source.text == dump({"speed": 1e-5})


# Coercion


@pytest.mark.parametrize(
    "hint, value, spelling, expected",
    [
        (int, "4", None, 4),
        (int, 4.0, None, 4),
        (int, " 4 ", None, 4),
        (float, "1e-4", None, 1e-4),
        (float, 3, None, 3.0),
        (bool, "true", None, True),
        (bool, "no", None, False),
        (bool, 1, None, True),
        (bool | None, None, None, None),
        (bool | None, "False", None, False),
        (str, False, "no", "no"),
        (str, 1.1, "1.10", "1.10"),
        (str | None, 7, "007", "007"),
        (Literal["no", "steps"], False, "no", "no"),
        (list[str], "a, b", None, ["a", "b"]),
        (list[int], "1,2", None, [1, 2]),
        (list[int] | None, 3, "3", [3]),
        (tuple[str, ...], ["a"], None, ("a",)),
        (str | list[str], "a,b", None, "a,b"),
        (int | str, 4, "4", 4),
        (dict[str, Any] | str | None, {"a": 1}, None, {"a": 1}),
    ],
)
def test_coerced(hint, value, spelling, expected):
    got = coerce(hint, value, spelling)
    assert got == expected and type(got) is type(expected)


@pytest.mark.parametrize(
    "hint, value",
    [
        (int, True),
        (float, False),
        (int, 4.5),
        (int, "four"),
        (bool, "maybe"),
        (bool, 2),
        (str, 3),
        (str, None),
        (int, None),
    ]
    + [(list[str], {"a": 1}), (Literal["a"], "b"), (dict, "x"), (float, "")],
)
def test_not_coerced(hint, value):
    with pytest.raises(ValueError):
        coerce(hint, value)


def test_words_for_types():
    assert describe(int | None) == "a whole number or null"
    assert describe(list[str]) == "a list of texts"
    assert describe(Literal["a", "b", None]) == "one of a, b, null"


# The gate


def test_every_key_reaches_its_owner():
    _, settled = settle({"speed": "2.5", "gears": "3", "parts": "a,b", "mode": "fast", "loud": "yes"})
    assert settled.sections["motor"] == Motor(speed=2.5, gears=3, parts=["a", "b"], mode="fast", loud=True)
    assert settled.sections["frame"] == Frame(path="here")
    assert not settled.problems and not settled.warnings


def test_all_problems_of_a_file_together_in_its_order(tmp_path):
    path = write(tmp_path, "geers: 4\n\nspeed: quick\nloud: 3\nmode: fats\nold: 2\n")
    text = problems(read(path, ["partz=a"]), refused={"old": Refused((1,), "gone")})
    assert text.splitlines()[:6] == [
        f"7 problems in {path}:",
        f"  {path}:1: geers: no such key; did you mean 'gears'?",
        f"  {path}:3: speed: expected a number, got 'quick'.",
        f"  {path}:4: loud: expected true or false, got 3.",
        f"  {path}:5: mode: expected one of slow, fast, got 'fats'; did you mean 'fast'?",
        f"  {path}:6: old: gone (got 2).",
    ]
    assert "command line: partz: no such key; did you mean 'parts'?" in text
    assert "path: is not set. Where it stands." in text


def test_a_section_may_complain_about_its_own_values(tmp_path):
    path = write(tmp_path, "path: x\n\ngears: 0\nsped: 1\n")
    text = problems(read(path))
    assert f"{path}:3: gears: 0 must be 1 or more." in text and f"{path}:4: sped" in text


def test_a_key_of_another_stage_warns():
    _, settled = settle({"wings": 2, "fins": None}, elsewhere=lambda: {"wings": "stage fly", "fins": "stage swim"})
    assert settled.warnings == ["the given keys: wings belongs to stage fly; it has no effect in this run."]
    assert not settled.problems


def test_elsewhere_is_asked_only_when_needed():
    def elsewhere():
        raise AssertionError("asked")

    settle({"speed": 1}, elsewhere=elsewhere)


@pytest.mark.parametrize("value, fine", [(False, True), ("false", True), (True, False), (0, False)])
def test_known_keys_pass_at_the_values_that_ask_for_nothing(value, fine):
    _, settled = settle({"turbo": value}, refused={"turbo": Refused((False,), "there is no turbo")})
    assert bool(settled.problems) is not fine


def test_refused_numbers_compare_as_numbers():
    assert Refused((1e-6,), "").takes("1e-6") and Refused((0,), "").takes(0.0)
    assert not Refused((1,), "").takes(True) and not Refused((None,), "").takes(0)


def test_renamed_keys():
    table = {"velocity": Renamed("speed"), "pace": Renamed("speed", lambda v: float(v) / 2, yields=True)}
    _, settled = settle({"velocity": 3}, renamed=table)
    assert settled.sections["motor"].speed == 3
    _, settled = settle({"pace": 3}, renamed=table)
    assert settled.sections["motor"].speed == 1.5
    assert "old name of speed" in problems({"velocity": 3, "speed": 2}, renamed=table)
    _, settled = settle({"pace": 3, "speed": 2}, renamed=table)
    assert settled.sections["motor"].speed == 2 and "pace has no effect" in settled.warnings[0]
    assert "velocity: expected a number" in problems({"velocity": "x"}, renamed=table)


def test_docs_are_the_texts_under_the_fields():
    assert gate.field_docs(Motor) == {
        "speed": "Metres\nper second.",
        "name": "What it is called.",
        "parts": "What it is made of.",
        "mode": "How it is driven.",
        "loud": "Whether it is heard.",
    }


def test_suspects_name_what_was_meant():
    _, settled = settle({"sped": 1, "gears": "x"})
    assert settled.suspects() == {"sped", "speed", "gears"}
