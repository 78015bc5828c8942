"""From what the user wrote to a Run: every key checked, every derived value said, once.

run = resolve("train.yaml", ["learning_rate=1e-4"])
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.contradictions import contradictions, evaluates_only
from luthier.core import registry
from luthier.core.compat import PEERS, REFUSED, RENAMED, STAGES, idle_variables
from luthier.core.config import Given, Owner, Problem, Settled, Source, dump, keys_of, owner, read, refuse, settle
from luthier.core.errors import ConfigError
from luthier.core.kinds import is_true
from luthier.core.objective import Objective
from luthier.idle import idle
from luthier.rules import TRAINS, Keys
from luthier.train.config import TrainConfig, derive
from luthier.train.keys import training_keys

if TYPE_CHECKING:
    from luthier.collect import CollectConfig
    from luthier.data.layout import LayoutConfig
    from luthier.data.media import MediaConfig
    from luthier.data.source import DataConfig
    from luthier.data.template import TemplateConfig
    from luthier.engines.drafting import SpeculateConfig
    from luthier.engines.sampling import GenerateConfig
    from luthier.engines.scoring import ScoreConfig
    from luthier.export import ExportConfig
    from luthier.launch import LaunchConfig
    from luthier.model.adapt import AdapterConfig
    from luthier.model.quantise import QuantConfig
    from luthier.model.reference import ReferenceConfig
    from luthier.model.source import ModelConfig
    from luthier.train.resume import ResumeConfig

__all__ = ["OWNERS", "Run", "RunConfig", "Source", "resolve"]


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What kind of run this is."""

    stage: str = "sft"
    """What is trained: the name of a file in `objectives/`, such as pt (pre-training) or sft (fine-tuning)."""
    plugins: str | None = None
    """A folder of your own stages, formats, templates ...; its sub-folders are named as Luthier's are."""


OWNERS: dict[str, str] = {
    "run": "luthier.run:RunConfig",
    "model": "luthier.model.source:ModelConfig",
    "quant": "luthier.model.quantise:QuantConfig",
    "data": "luthier.data.source:DataConfig",
    "media": "luthier.data.media:MediaConfig",
    "template": "luthier.data.template:TemplateConfig",
    "layout": "luthier.data.layout:LayoutConfig",
    "adapter": "luthier.model.adapt:AdapterConfig",
    "reference": "luthier.model.reference:ReferenceConfig",
    "train": "luthier.train.config:TrainConfig",
    "resume": "luthier.train.resume:ResumeConfig",
    "generate": "luthier.engines.sampling:GenerateConfig",
    "score": "luthier.engines.scoring:ScoreConfig",
    "speculate": "luthier.engines.drafting:SpeculateConfig",
    "collect": "luthier.collect:CollectConfig",
    "export": "luthier.export:ExportConfig",
    "launch": "luthier.launch:LaunchConfig",
}
"""Sections of a run and the dataclass that owns each one's keys."""

MEMBERS: dict[str, tuple[str, str, str]] = {
    "adapter_keys": ("adapters", "finetuning_type", "adapter"),
    "scorer_keys": ("scorers", "collect_scorer", "collect"),
}
"""Sections owned by the `Config` of one member of a family: the family, the key that names it, that key's section."""

OPTIM = "optim."
"""Sections that are the `Config` of a file in optim/ begin so; all of them are read, whichever a run asks for."""

SECRET = ("_token", "_api_key", "_secret")
"""Keys that end so are never written down."""


@dataclass(frozen=True)
class Run:
    """A configuration that came through the gate. Nothing changes it afterwards."""

    source: Source
    keys: Mapping[str, Any]
    """All keys as given, overrides merged."""
    stage: str
    """Name of the objective."""
    objective: Objective
    model: ModelConfig
    quant: QuantConfig
    data: DataConfig
    media: MediaConfig
    template: TemplateConfig
    layout: LayoutConfig
    adapter: AdapterConfig
    adapter_keys: Any
    """The Config of adapters/FINETUNING_TYPE.py."""
    optim: Mapping[str, Any]
    """The Config of each file in optim/, by its name."""
    reference: ReferenceConfig
    train: TrainConfig
    resume: ResumeConfig
    training: dict[str, Any]
    """Hugging Face's training keys: those the user set, under today's names, and those derived from the machine."""
    generate: GenerateConfig
    score: ScoreConfig
    speculate: SpeculateConfig
    collect: CollectConfig
    scorer_keys: Any
    """The Config of scorers/COLLECT_SCORER.py."""
    export: ExportConfig
    launch: LaunchConfig
    plugins: str | None = None
    notes: tuple[str, ...] = ()
    """What was derived."""
    warnings: tuple[str, ...] = ()

    def announce(self, log: logging.Logger) -> None:
        """Say what was derived and what will change nothing, before the work begins."""
        for line in self.warnings:
            log.warning("%s", line)
        for line in self.notes:
            log.info("%s", line)

    def to_yaml(self) -> str:
        """The resolved configuration: every key with its value; `resolve` of it gives this run again."""
        return "\n".join(f"# {name}\n{dump(values)}" for name, values in self._parts().items() if values)

    def flat(self) -> dict[str, Any]:
        """The same as one mapping of all keys."""
        return {key: value for values in self._parts().values() for key, value in values.items()}

    def _parts(self) -> dict[str, dict[str, Any]]:
        defaults = {key.name: key.default for key in training_keys().values() if key.rule is None}
        parts = {"run": {"stage": self.stage, "plugins": self.plugins}, "objective": _values(self.objective.config)}
        parts |= {name: _values(getattr(self, name)) for name in (*OWNERS, *MEMBERS) if name != "run"}
        parts |= {f"{OPTIM}{name}": _values(config) for name, config in self.optim.items()}
        parts["training"] = defaults | self.training
        return parts


def resolve(config: str | Path | Mapping[str, Any], overrides: Sequence[str] = (), *, verb: str = "train") -> Run:
    """Check a configuration and say all that is wrong with it in one ConfigError.

    config: a YAML or JSON file, or a dict. overrides: `key=value` texts that win over it. verb: what the run is
    for; what must be given depends on it.
    """
    given = read(config, overrides)
    if given.values.get("plugins"):
        registry.use_plugins(str(given.values["plugins"]))
    misses: list[Problem] = []
    stage, objective = _objective(given, misses)
    owners = [*_owners(), Owner("training", training_keys(), dict, "training")]
    if objective is not None:
        owners.append(owner("objective", objective.Config, f"stage {stage}"))
    for name, (family, key, section) in MEMBERS.items():
        kind = str(given.values.get(key, keys_of(load_owner(OWNERS[section]))[key].default))
        member = _member(given, family, key, kind, misses)
        if member is not None:
            owners.append(owner(name, member.Config, f"{key} {kind}"))
    extra = is_true(os.environ.get("ALLOW_EXTRA_ARGS"))
    owners += [owner(f"{OPTIM}{name}", module.Config, "optimiser") for name, module in _rules()]
    settled = settle(given, owners, elsewhere=_elsewhere, refused=REFUSED, renamed=RENAMED, peers=PEERS, extra=extra)
    settled.problems.extend(misses)
    settled.problems.extend(contradictions(given, settled, stage=stage, objective=objective, verb=verb))
    refuse(given.source, settled.problems)
    assert objective is not None
    # Unset, do_train is not false: most runs train and do not say so.
    values = settled.values | {"do_train": settled.sections["training"].get("do_train")}
    defaults = {key.name: key.default for part in owners for key in part.keys.values()}
    settled.warnings.extend(idle(Keys(values, given, stage), defaults, verb))
    return _finish(given, settled, objective, stage, verb)


def load_owner(path: str) -> type:
    """The dataclass that a path of `OWNERS` names."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def _owners() -> list[Owner]:
    return [owner(name, load_owner(path)) for name, path in OWNERS.items()]


def _objective(given: Given, misses: list[Problem]) -> tuple[str, type[Objective] | None]:
    """The objective of `stage`, unless another claims these keys."""
    stage = str(given.values.get("stage", RunConfig.stage))
    found = {name: objective_in(registry.find("objectives", name)) for name in registry.names("objectives")}
    claims = [name for name, objective in found.items() if objective.claims(given.values, stage)]
    if len(claims) > 1:
        misses.append(Problem("stage", _place(given, "stage"), f"these keys mean several stages: {', '.join(claims)}."))
    stage = claims[0] if claims else stage
    if stage not in found:
        text = STAGES.get(stage) or registry.miss("stage", stage, list(found))
        misses.append(Problem("stage", _place(given, "stage"), text))
    return stage, found.get(stage)


def objective_in(module: Any) -> type[Objective]:
    """The one Objective that a file of `objectives/` defines."""
    found = [
        item
        for item in vars(module).values()
        if isinstance(item, type) and issubclass(item, Objective) and item.__module__ == module.__name__
    ]
    if len(found) != 1:
        raise ConfigError(f"{module.__file__} must define exactly one Objective, and defines {len(found)}.")
    return found[0]


def _rules() -> Iterator[tuple[str, Any]]:
    """Every file in optim/ by its name."""
    for name in registry.names("optim"):
        yield name, registry.find("optim", name)


def _member(given: Given, family: str, key: str, name: str, misses: list[Problem]) -> Any:
    try:
        return registry.find(family, name)
    except ConfigError as error:
        misses.append(Problem(key, _place(given, key), str(error)))
        return None


def _elsewhere() -> dict[str, str]:
    """Keys of all stages and finetuning_types, in words; asked for keys that this run's own parts do not know."""
    homes: dict[str, list[str]] = {}
    for name in registry.names("objectives"):
        for key in keys_of(objective_in(registry.find("objectives", name)).Config):
            homes.setdefault(key, []).append(f"stage {name}")
    for family, chooser, _ in MEMBERS.values():
        for name in registry.names(family):
            for key in keys_of(registry.find(family, name).Config):
                homes.setdefault(key, []).append(f"{chooser} {name}")
    return {key: " and ".join(places) for key, places in homes.items()}


def _place(given: Given, *keys: str) -> str:
    return next((given.places[key] for key in keys if key in given.places), given.source.name)


def _finish(given: Given, settled: Settled, objective: type[Objective], stage: str, verb: str) -> Run:
    """Derive what follows from the keys and from the machine; nothing is derived later."""
    sections = dict(settled.sections)
    notes: list[str] = []
    layout = sections["layout"]
    if layout.neat_packing and layout.packing is None:
        sections["layout"] = replace(layout, packing=True)
    sections["adapter"] = _without_head(sections["adapter"], objective, notes)
    training = dict(sections.pop("training"))
    warnings = [*settled.warnings, *_idle(sections, training, verb)]
    if verb in TRAINS:
        warnings += idle_variables(os.environ)
        if evaluates_only(vars(sections["data"]) | training):
            training["do_train"] = False
            notes.append("eval_dataset is all there is: this run evaluates and does not train.")
        training, sections["train"], derived = derive(training, sections["train"])
        notes += derived
        if training.get("max_steps", -1) > 0 and "num_train_epochs" in training:
            notes.append(f"max_steps ({training['max_steps']}) ends the run, whatever num_train_epochs says.")
    run_keys = sections.pop("run")
    optim = {name.removeprefix(OPTIM): sections.pop(name) for name in list(sections) if name.startswith(OPTIM)}
    return Run(
        source=given.source,
        keys=given.values,
        stage=stage,
        objective=objective(sections.pop("objective")),
        training=training,
        optim=optim,
        plugins=run_keys.plugins,
        notes=tuple(notes),
        warnings=tuple(warnings),
        **sections,
    )


def _without_head(adapter: AdapterConfig, objective: type[Objective], notes: list[str]) -> AdapterConfig:
    """additional_target without lm_head where a head stands in its place: that head is always trained and saved."""
    from luthier.model.modules import as_names

    targets = as_names(adapter.additional_target)
    if objective.head is None or "lm_head" not in targets:
        return adapter
    notes.append(f"additional_target: lm_head means the {objective.head} head here, which is always trained.")
    return replace(adapter, additional_target=[name for name in targets if name != "lm_head"] or None)


def _idle(sections: Mapping[str, Any], training: dict[str, Any], verb: str) -> Iterator[str]:
    """Keys that make sense and will still change nothing."""
    evaluates = training.get("eval_strategy", "no") != "no" or training.get("do_eval") or training.get("do_predict")
    if verb in TRAINS and sections["data"].val_size and not evaluates:
        yield "val_size keeps rows from training, but nothing evaluates them; set eval_strategy: steps or epoch."
    steps, epochs = training.get("max_steps", -1), training.get("num_train_epochs", 3)
    if verb in TRAINS and (steps == 0 or (steps < 0 and epochs == 0)):
        said = "max_steps: 0 (-1 lets num_train_epochs decide)" if steps == 0 else "num_train_epochs: 0"
        yield f"no step will be taken, as {said} says; the model is saved as it begins."
    if verb not in TRAINS:
        yield from sections["speculate"].idle(verb)


def _values(section: Any) -> dict[str, Any]:
    """A section's keys and values, secrets left out."""
    names = [item.name for item in fields(section) if item.init and not item.name.endswith(SECRET)]
    return {name: getattr(section, name) for name in names}
