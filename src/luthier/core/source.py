"""Reading what the user wrote: a YAML or JSON file, a dict, `key=value` and `--key value` on the command line.

YAML goes through OmegaConf, so `1e-4` is a number, `${other_key}` is filled in and a key written twice is refused.
Every key keeps the place where it was written, and scalars keep their spelling: `model_revision: 1.10` is "1.10".
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from luthier.core.errors import ConfigError
from luthier.core.paths import is_file, is_folder, local

COMMAND_LINE = "command line"
DEEPEST = 32
"""Lists and mappings may stand inside each other so often; no key wants more than a few."""


@dataclass(frozen=True)
class Source:
    """Where a configuration came from, and its text as the user wrote it."""

    name: str
    text: str
    path: Path | None = None


@dataclass(frozen=True)
class Given:
    """Keys and values as the user gave them, overrides merged, nothing checked yet."""

    source: Source
    values: dict[str, Any]
    places: dict[str, str] = field(default_factory=dict)
    """`file:line` of each key, or `command line`."""
    spelling: dict[str, str] = field(default_factory=dict)
    """The text of each plain scalar, before YAML gave it a type."""


def read(config: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Given:
    """Read a configuration and merge `key=value` overrides into it; the last one wins.

    Raises ConfigError for a file that is missing or is not a YAML or JSON mapping, a key written twice, an
    override without `=`, and a `${...}` that leads nowhere.
    """
    if isinstance(config, Mapping):
        given = _read_mapping(config, "the given keys" if config or not overrides else COMMAND_LINE)
    else:
        given = _read_file(local(config))
    for override in overrides:
        _override(given, override)
    _not_too_deep(given)
    values = _interpolate(given)
    spelling = {key: text for key, text in given.spelling.items() if "${" not in text}
    source = given.source
    if not source.text:
        source = Source(source.name, dump(values), None)
    return Given(source, values, given.places, spelling)


def dump(values: Mapping[str, Any]) -> str:
    """Values as YAML, in the given order. Floats are written so that any YAML reader sees a number."""
    import yaml

    class Plain(yaml.SafeDumper):
        pass

    def number(dumper: yaml.SafeDumper, value: float) -> yaml.Node:
        node = yaml.SafeDumper.represent_float(dumper, value)
        if "e" in node.value and "." not in node.value.split("e")[0]:
            node.value = node.value.replace("e", ".0e", 1)
        return node

    Plain.add_representer(float, number)
    Plain.add_representer(tuple, lambda dumper, value: dumper.represent_list(list(value)))
    Plain.add_multi_representer(Path, lambda dumper, value: dumper.represent_str(str(value)))
    return yaml.dump(dict(values), Dumper=Plain, sort_keys=False, allow_unicode=True, width=4096) if values else ""


def _read_mapping(config: Mapping[str, Any], name: str) -> Given:
    values = {str(key): value for key, value in config.items()}
    return Given(Source(name, ""), values, dict.fromkeys(values, name))


def _read_file(path: Path) -> Given:
    if not is_file(path):
        raise ConfigError(_no_file(path))
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text ({error}). Save it as UTF-8.") from None
    source = Source(str(path), text, path)
    if path.suffix.lower() == ".json":
        return _read_json(source)
    return _read_yaml(source)


def _no_file(path: Path) -> str:
    if is_folder(path):
        return f"{path} is a folder; give the configuration file itself (YAML or JSON)."
    siblings = [file.name for file in path.parent.glob("*") if file.suffix.lower() in (".yaml", ".yml", ".json")]
    near = get_close_matches(path.name, siblings, n=1)
    hint = f" Did you mean {path.with_name(near[0])}?" if near else ""
    return f"There is no configuration file {path}.{hint}"


def _read_yaml(source: Source) -> Given:
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    places, spelling = {}, {}
    try:
        with _sound(source.name):
            node = yaml.compose(source.text, Loader=yaml.SafeLoader)
            if node is None:
                return Given(source, {})
            if not isinstance(node, yaml.MappingNode):
                raise ConfigError(
                    f"{source.name}: expected lines of the form `key: value` at the top, got {_kind(node)}."
                )
            for key, value in node.value:
                places[str(key.value)] = f"{source.name}:{key.start_mark.line + 1}"
                if isinstance(value, yaml.ScalarNode) and value.style is None:
                    spelling[str(key.value)] = value.value
            values = OmegaConf.to_container(OmegaConf.create(source.text), resolve=False)
    except yaml.MarkedYAMLError as error:
        raise ConfigError(_bad_yaml(source.name, error)) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{source.name} is not valid YAML: {error}") from None
    except OmegaConfBaseException as error:
        raise _bad_value(error, places, source.name) from None
    return Given(source, {str(key): value for key, value in values.items()}, places, spelling)


def _kind(node: Any) -> str:
    return {"sequence": "a list", "scalar": f"the text {str(node.value)[:60]!r}"}[node.id]


def _bad_yaml(name: str, error: Any) -> str:
    mark = error.problem_mark or error.context_mark
    place = f"{name}:{mark.line + 1}" if mark else name
    found = re.fullmatch(r"found duplicate key (.*)", error.problem or "")
    if found:
        return f"{place}: {found[1]} is written twice. Keep one of the two lines."
    hint = " Indent with blanks, not tabs." if "\\t" in (error.problem or "") else ""
    return f"{place}: this is not valid YAML: {error.problem}{f' ({error.context})' if error.context else ''}.{hint}"


def _read_json(source: Source) -> Given:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key, value in pairs:
            if key in values:
                raise ConfigError(f"{source.name}: {key} is written twice. Keep one of the two.")
            values[key] = value
        return values

    try:
        with _sound(source.name):
            values = json.loads(source.text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{source.name}:{error.lineno}: this is not valid JSON: {error.msg}.") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{source.name}: expected a JSON object at the top, got {type(values).__name__}.")
    lines = source.text.splitlines()
    places = {}
    for key in values:
        quoted = re.compile(re.escape(json.dumps(key, ensure_ascii=False)) + r"\s*:")
        line = next((number for number, text in enumerate(lines, 1) if quoted.search(text)), None)
        places[key] = f"{source.name}:{line}" if line else source.name
    return Given(source, values, places)


def _override(given: Given, text: str) -> None:
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise ConfigError(f"command line: expected key=value, got {text!r}.")
    key, *inner = name.strip().split(".")
    parsed = _scalar(value)
    given.places[key] = COMMAND_LINE
    given.spelling.pop(key, None)
    if not inner:
        given.values[key] = parsed
        if not isinstance(parsed, (list, dict)):
            given.spelling[key] = value
        return
    branch = given.values.get(key) or {}
    if not isinstance(branch, dict):
        raise ConfigError(f"command line: {name} looks into {key}, but {key} is {branch!r} and not a mapping.")
    given.values[key] = branch = dict(branch)
    for step in inner[:-1]:
        branch[step] = dict(branch.get(step) or {})
        branch = branch[step]
    branch[inner[-1]] = parsed


def _scalar(text: str) -> Any:
    """A value from the command line: YAML where it is a number, a flag, null, a quoted text, [list] or {mapping}."""
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        with _sound(COMMAND_LINE):
            value = OmegaConf.to_container(OmegaConf.create(f"value: {text}"), resolve=False)["value"]
    except (yaml.YAMLError, ConfigError, OmegaConfBaseException):
        return text
    if text == "":
        return ""
    written = text.lstrip()[:1]
    if isinstance(value, str) and written not in ("'", '"'):
        return text
    if isinstance(value, (dict, list)) and written not in ("[", "{"):
        return text
    return value


def _interpolate(given: Given) -> dict[str, Any]:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        with _sound(given.source.name):
            values = OmegaConf.to_container(OmegaConf.create(given.values), resolve=True)
    except OmegaConfBaseException as error:
        raise _bad_value(error, given.places, given.source.name) from None
    return {str(key): value for key, value in values.items()}


def _bad_value(error: Any, places: Mapping[str, str], name: str) -> ConfigError:
    """What OmegaConf cannot fill in or hold, with its place."""
    key = str(error.full_key or "").split(".")[0].split("[")[0]
    what = (str(error.msg or error).strip() or type(error).__name__).splitlines()[0]
    hint = " ${KEY} stands for the value of another key."
    return ConfigError(f"{places.get(key, name)}: {f'{key}: ' if key else ''}{what}.{hint}")


@contextmanager
def _sound(name: str) -> Iterator[None]:
    """Turn what parsers raise beside their own errors into words: bottomless nesting, dates that are none."""
    from omegaconf.errors import OmegaConfBaseException

    try:
        yield
    except RecursionError:
        raise ConfigError(f"{name}: lists and mappings are nested too deep to be read.") from None
    except (ConfigError, json.JSONDecodeError, OmegaConfBaseException):
        raise
    except ValueError as error:
        raise ConfigError(f"{name}: a value cannot be read: {str(error).splitlines()[0]}.") from None


def _not_too_deep(given: Given) -> None:
    for key, value in given.values.items():
        level, depth = [value], 0
        while level:
            level = [inner for item in level for inner in _inside(item)]
            depth += 1
            if depth > DEEPEST:
                place = given.places.get(key, given.source.name)
                raise ConfigError(f"{place}: {key}: nested deeper than {DEEPEST} levels, which no key wants.")


def _inside(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    return list(value) if isinstance(value, list | tuple) else []
