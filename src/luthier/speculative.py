"""From a Run to a model that answers by speculation: the target, who drafts for it, and the accept head that judges."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from luthier.core.errors import ConfigError, ModelError
from luthier.core.log import get_logger
from luthier.engines.acceptance import AcceptJudge, Facts
from luthier.engines.drafting import make_drafter
from luthier.engines.hf import Engine
from luthier.engines.speculate import Round, Speculator, Tally
from luthier.engines.target import Cached, Target
from luthier.model import heads
from luthier.model.adapt import adapter_folders, attach
from luthier.model.modules import as_names
from luthier.run import Run, resolve
from luthier.serving import RESOLVED, Speaker, as_trained, left_in, load_engine

if TYPE_CHECKING:
    from luthier.engines.sampling import GenerateConfig

log = get_logger("speculate")

HEAD = "accept"


class FastEngine(Engine):
    """An engine that speaks by speculation, greedily, one prompt at a time."""

    def __init__(self, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, speculator: Speculator):
        super().__init__(model, tokenizer)
        self.speculator = speculator
        self.tally = Tally()
        """Of the last answer."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: GenerateConfig,
        stop_ids: Sequence[int],
        *,
        seeds: Sequence[int] | None = None,
        keep_stop: bool = False,
    ) -> list[list[int]]:
        """The answer to each prompt, in order. seeds are of no use to a greedy engine."""
        answers = [[token for done in self._rounds(ids, sampling, stop_ids) for token in done.ids] for ids in prompts]
        return [ids[:-1] if ids[-1] in stop_ids and not keep_stop else ids for ids in answers]

    def told(self) -> str:
        """What speculation did for the last answer, in a line."""
        tally = self.tally
        kept = f", {tally.kept} of {tally.drafted} draft tokens kept" if tally.drafted else ", nothing drafted"
        judged = f" ({tally.judged} by the accept head)" if tally.judged else ""
        return f"{tally.tokens_per_pass:.2f} tokens per pass{kept}{judged}"

    def _tokens(
        self, prompt: Sequence[int], sampling: GenerateConfig, stop_ids: Sequence[int], seed: int
    ) -> Iterator[int]:
        for done in self._rounds(prompt, sampling, stop_ids):
            yield from (token for token in done.ids if token not in stop_ids)

    def _rounds(self, prompt: Sequence[int], sampling: GenerateConfig, stop_ids: Sequence[int]) -> Iterator[Round]:
        self.tally = Tally()
        room, penalty = self._room(prompt, sampling), sampling.repetition_penalty
        for done in self.speculator.rounds(prompt, room, stop_ids, repetition_penalty=penalty):
            self.tally.add(done)
            yield done


@dataclass(frozen=True)
class Fast:
    """A model ready to speculate."""

    speaker: Speaker
    """Its engine speculates, with the judge if there is one."""
    engine: FastEngine
    """The same engine."""
    draft_tokens: int

    @property
    def judge(self) -> AcceptJudge | None:
        """The accept head at work; None where every token is the target's own."""
        judge = self.engine.speculator.judge
        assert judge is None or isinstance(judge, AcceptJudge)
        return judge

    def without(self, *, judge: bool = False, draft: bool = False) -> FastEngine:
        """The same model, cache and drafter, without the parts that are named here."""
        own = self.engine.speculator
        left = Speculator(
            own.target,
            None if draft else own.drafter,
            None if judge or draft else own.judge,
            draft_tokens=self.draft_tokens,
        )
        return FastEngine(self.engine.model, self.engine.tokenizer, left)


def find_fast(config: str | Path, overrides: Sequence[str]) -> Run:
    """A run from its YAML file, or from the folder that stage accept_head left behind. Raises ConfigError."""
    folder = Path(config).expanduser()
    if not folder.is_dir():
        return resolve(config, overrides, verb="speculate")
    # A resolved configuration holds every default, the one of do_sample too.
    return resolve(left_in(folder), [f"accept_head={folder}", "do_sample=false", *overrides], verb="speculate")


def greedy(run: Run) -> GenerateConfig:
    """How a run speculates: as it generates, but greedily. Raises ConfigError where it asks for something else."""
    if run.speculate.draft is None:
        raise ConfigError("draft is not set. Say who drafts: prompt_lookup, draft_model or early_exit.")
    if run.generate.num_beams > 1:
        raise ConfigError(
            f"num_beams: {run.generate.num_beams} does not go with draft: a draft is one text. Leave it out."
        )
    if run.generate.do_sample and "do_sample" in run.keys:
        raise ConfigError(
            "do_sample: true does not go with draft: speculation takes the most probable token. Set do_sample: false."
        )
    return replace(run.generate, do_sample=False)


def load_fast(run: Run) -> Fast:
    """Load the target, its drafter and the accept head, if there is one."""
    folder = accept_folder(run)
    if folder is None:
        log.info("There is no accept head: every token is the model's own, as in plain greedy decoding.")
        speaker = load_engine(_as_target(run))
        return _fast(run, speaker, Target(speaker.engine.model), None)
    facts = Facts.read(heads.facts(folder), f"{folder / HEAD}_head.json")
    speaker, target, scorer = _models(run, folder, facts)
    judge = _judge(run, folder, facts, target if scorer is None else scorer, speaker.engine.context)
    log.info(
        "The accept head is that of %s (layout %s, %s). Draft tokens it gives %g or more are kept.",
        folder,
        facts.layout,
        "frozen backbone" if facts.frozen else "a backbone of its own",
        judge.threshold,
    )
    return _fast(run, speaker, target, judge)


def accept_folder(run: Run) -> Path | None:
    """Where the accept head lies: `accept_head`, else beside an adapter, in the model's folder or in `output_dir`."""
    if run.speculate.accept_head is not None:
        folder = Path(run.speculate.accept_head).expanduser()
        if heads.saved_in(folder) != HEAD:
            raise ModelError(
                f"accept_head: {folder} holds no {HEAD}_head.safetensors. Give a folder that stage accept_head trained."
            )
        return folder
    folders = [*reversed(adapter_folders(run.adapter, run.model)), Path(run.model.model_name_or_path).expanduser()]
    if run.training.get("output_dir"):
        folders.append(Path(run.training["output_dir"]))
    return next((folder for folder in folders if heads.saved_in(folder) == HEAD), None)


def _fast(run: Run, speaker: Speaker, target: Target, judge: AcceptJudge | None) -> Fast:
    keys, tokenizer = run.speculate, speaker.engine.tokenizer
    drafter = make_drafter(keys, target, tokenizer, run.model)
    speculator = Speculator(target, drafter, judge, draft_tokens=keys.draft_tokens)
    engine = FastEngine(speaker.engine.model, tokenizer, speculator)
    return Fast(replace(speaker, engine=engine), engine, keys.draft_tokens)


def _models(run: Run, folder: Path, facts: Facts) -> tuple[Speaker, Target, Cached | None]:
    """The target, and the model whose states the head reads; None where that is the target itself."""
    is_adapter = (folder / "adapter_config.json").is_file()
    given = adapter_folders(run.adapter, run.model)
    if facts.frozen:
        # Nothing but the head was trained: the adapter beside it, if any, is a copy of the target's own.
        if is_adapter and folder not in given:
            run = as_trained(run, folder)
        speaker = load_engine(_as_target(run))
        return speaker, Target(speaker.engine.model), None
    own = [path for path in given if path != folder]
    speaker = load_engine(_as_target(_with_adapters(run, own)))
    if not is_adapter:
        return speaker, Target(speaker.engine.model), _whole_model(run, folder)
    below = given[: given.index(folder)] if folder in given else _trained_on(run, folder)
    if below != own:
        scorer = load_engine(_as_target(_with_adapters(run, [*below, folder])))
        return speaker, Target(speaker.engine.model), Cached(scorer.engine.model)
    adapted = attach(speaker.engine.model, folder).requires_grad_(False).eval()
    return speaker, Target(adapted, within=adapted.disable_adapter), Cached(adapted)


def _judge(run: Run, folder: Path, facts: Facts, model: Cached, context: int | None) -> AcceptJudge:
    head = heads.attach(model.model, HEAD)
    heads.load(head, HEAD, folder)
    wanted = run.speculate.accept_threshold
    return AcceptJudge(
        head.requires_grad_(False).eval(),
        facts,
        threshold=facts.threshold if wanted is None else wanted,
        scorer=None if facts.frozen and facts.layout == "judge" else model,
        context=context,
    )


def _whole_model(run: Run, folder: Path) -> Cached:
    """A model that was trained in all its weights together with the head."""
    if Path(run.model.model_name_or_path).expanduser().resolve() == folder.resolve():
        raise ConfigError(
            f"model_name_or_path: {folder} was trained to judge, not to speak. Name the model that it was made from, "
            f"and this folder as accept_head."
        )
    scorer = replace(run, model=replace(run.model, model_name_or_path=str(folder)))
    return Cached(load_engine(_as_target(_with_adapters(scorer, []))).engine.model)


def _trained_on(run: Run, folder: Path) -> list[Path]:
    """The adapters that were merged below the one in `folder` when it was trained."""
    trained = resolve(folder / RESOLVED, verb="speculate") if (folder / RESOLVED).is_file() else run
    return [Path(name) for name in as_names(as_trained(trained, folder).adapter.adapter_name_or_path)[:-1]]


def _with_adapters(run: Run, folders: Sequence[Path]) -> Run:
    names = [str(folder) for folder in folders] or None
    # The folders are whole: `adapter_folder` is in them already.
    return replace(run, adapter=replace(run.adapter, adapter_name_or_path=names, adapter_folder=None))


def _as_target(run: Run) -> Run:
    """Where the accept head was trained into `output_dir`, the target is the model before that training."""
    return replace(run, training={key: value for key, value in run.training.items() if key != "output_dir"})
