"""Export of a reward model: the merged model with its head beside it, or transformers' own classifier.

transformers' classifiers read the score at the last token that is not the pad token. A pad token that may end an answer
(pad equal to eos, most often) would make them read the token before it, so the exported model and tokenizer pad with a
token that never ends one. What was saved is loaded again and its scores are held against the head's.
"""

from __future__ import annotations

import copy
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from luthier.core.errors import ConfigError, ModelError
from luthier.export import EXACT, ROUNDED, Form, digests
from luthier.model import heads
from luthier.model.load import load_model
from luthier.model.source import ModelConfig
from luthier.model.tokenizer import PADS, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from luthier.run import Run

LENGTHS = (5, 24, 9, 17, 6, 20, 12, 14)
"""Tokens of the sequences on which scores are compared."""
NEW_PAD = "<|pad|>"
SPARE = re.compile(r"pad|reserved|unused", re.IGNORECASE)
"""Tokens of a vocabulary that nobody says."""


def reward_form(run: Run) -> Form | None:
    """How a run's model is exported; None for one without a head. Raises ConfigError, ModelError."""
    from luthier.engines.scoring import HEADS
    from luthier.serving import head_folder

    folder = head_folder(run)
    if run.export.export_reward_as == "head":
        return None if folder is None else WithHead(folder, run.model)
    if folder is None:
        raise ConfigError(
            "export_reward_as: sequence_classification needs a reward model, and neither model_name_or_path nor "
            "adapter_name_or_path holds a head (such as value_head.safetensors)."
        )
    name = heads.saved_in(folder)
    if name not in HEADS:
        raise ModelError(f"The {name} head of {folder} gives no reward; export it with export_reward_as: head.")
    return Classifier(folder, run)


class WithHead:
    """A causal language model with the files of its head beside it."""

    causal = True

    def __init__(self, source: Path, model_config: ModelConfig):
        self.source, self.model_config = source, model_config
        self.name = heads.saved_in(source)
        assert self.name is not None
        self.probes: list[Tensor] = []
        self.wanted = torch.zeros(0)

    def take(self, merged: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        """The merged model as it is."""
        self._listen(merged, _probes(len(tokenizer), {tokenizer.eos_token_id}, tokenizer.pad_token_id))
        return merged

    def write(self, folder: Path) -> None:
        """The head's own files, as they were trained."""
        for file in self.source.glob(f"{self.name}_head.*"):
            shutil.copy(file, folder / file.name)

    def check(self, folder: Path, saved: dict[str, bytes], device: torch.device) -> tuple[float, str]:
        """The scores of the saved model and head."""
        again = ModelConfig(model_name_or_path=str(folder), trust_remote_code=self.model_config.trust_remote_code)
        model = load_model(again, tokenizer=load_tokenizer(again), device=device)
        dtype = model.dtype
        found = verdicts(model.float(), _head(model, folder), self.probes)
        difference = _agree(found, self.wanted, dtype)
        return difference, f"The {self.name} head lies beside it; its scores agree to {difference:.2g}."

    def _listen(self, merged: PreTrainedModel, probes: list[Tensor]) -> nn.Module:
        head = _head(merged, self.source)
        self.probes, self.wanted = probes, verdicts(merged, head, probes)
        return head


class Classifier(WithHead):
    """A transformers model for sequence classification with one label: the reward, or its mean."""

    causal = False

    def __init__(self, source: Path, run: Run):
        super().__init__(source, run.model)
        self.template = run.template
        self.pad_id = -1
        self.bias = 0.0
        """What the head adds to every score and the classifier, which has no bias, does not."""

    def take(self, merged: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        """The classifier, which takes the merged model's layers over; the tokenizer gets a pad token that is safe."""
        ends = self._ends(tokenizer)
        choose_pad(tokenizer, ends)
        tokenizer.padding_side = "right"  # absolute positions count from the left
        self.pad_id = tokenizer.pad_token_id
        rows = merged.get_input_embeddings().weight.shape[0]
        if self.pad_id >= rows:
            merged.resize_token_embeddings(self.pad_id + 1, mean_resizing=False)
        head = self._listen(merged, _probes(min(len(tokenizer), rows), ends, self.pad_id))
        self.wanted = self.wanted[:, :1]
        model, score = _classifier(merged, self.pad_id)
        state = head.state_dict()
        score.weight.data = state["summary.weight"].clone()
        bias = state["summary.bias"].clone()
        if score.bias is not None:
            score.bias.data = bias
        elif bias.item():
            self.bias = model.config.reward_bias = bias.item()
        return model.eval()

    def check(self, folder: Path, saved: dict[str, bytes], device: torch.device) -> tuple[float, str]:
        """The scores of the saved classifier in a padded batch, against the head's one sequence at a time."""
        from transformers import AutoModelForSequenceClassification

        model = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype="auto", trust_remote_code=self.model_config.trust_remote_code
        ).to(device)
        dtype = model.dtype
        found = digests(model, dtype)
        if wrong := [name for name in {**saved, **found} if saved.get(name) != found.get(name)]:
            raise ModelError(f"The saved weights {', '.join(wrong[:5])} are not those of the merged model.")
        score = _padded_scores(model.float().eval(), self.probes, self.pad_id)
        difference = _agree(score, self.wanted - self.bias, dtype)
        text = f"Its scores in padded batches agree with the {self.name} head's to {difference:.2g}."
        if self.bias:
            text += (
                f" {type(model).__name__} has no bias: its scores are the head's minus {self.bias:.6g}, the same for "
                "every answer (config.json: reward_bias)."
            )
        return difference, text

    def _ends(self, tokenizer: PreTrainedTokenizerBase) -> set[int]:
        """Ids that may be the last of an answer."""
        from luthier.core.types import Message
        from luthier.data.document import DocumentRenderer
        from luthier.data.renderer import make_renderer

        renderer = make_renderer(self.template, copy.deepcopy(tokenizer))
        ends = {tokenizer.eos_token_id, renderer.tokenizer.eos_token_id, *renderer.stop_ids} - {None}
        if not isinstance(renderer, DocumentRenderer):
            _, said = renderer.oneturn((Message("user", "a"), Message("assistant", "a")))
            ends.add(said[-1])
        return ends


def choose_pad(tokenizer: PreTrainedTokenizerBase, ends: set[int]) -> None:
    """Give the tokenizer a pad token that ends no answer: its own, a spare one, unk, or a new one."""
    vocabulary = tokenizer.get_vocab()
    special = set(tokenizer.get_added_vocab())
    taken = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token}
    wanted = [
        tokenizer.pad_token,
        *(pad for pad in PADS if pad not in taken),
        *sorted(token for token in special - taken if SPARE.search(token)),
        tokenizer.unk_token,
    ]
    safe = (token for token in wanted if token in vocabulary and vocabulary[token] not in ends)
    tokenizer.add_special_tokens({"pad_token": next(safe, NEW_PAD)})
    others = {number for token, number in vocabulary.items() if token != tokenizer.pad_token}
    if tokenizer.pad_token_id in others | ends:
        raise ModelError(f"The tokenizer takes no token to pad with that ends no answer ({tokenizer.pad_token!r}).")


def verdicts(model: PreTrainedModel, head: nn.Module, sequences: Sequence[Tensor]) -> Tensor:
    """What the head says at the end of each sequence, one forward pass each; float32 [sequences, width], on the CPU."""
    from luthier.model.policy import HiddenTap

    output = model.get_output_embeddings()
    if output is None:
        raise ModelError(f"{type(model).__name__} has no output head; Luthier's heads read what it reads.")
    tap, said = HiddenTap(output), []
    try:
        for ids in sequences:
            with torch.no_grad(), tap.opened():
                model(input_ids=ids[None].to(model.device), use_cache=False)
                assert tap.hidden is not None
                said.append(head(tap.hidden[0, -1].float()).cpu())
    finally:
        tap.handle.remove()
    return torch.stack(said)


def _head(model: PreTrainedModel, folder: Path) -> nn.Module:
    """The head saved in a folder, on the model's device but not part of the model."""
    from luthier.core.registry import find

    name = heads.saved_in(folder)
    assert name is not None
    head = find("heads", name).build(model.config.get_text_config().hidden_size, None)
    heads.load(head, name, folder)
    return head.to(model.device, torch.float32).eval()


def _classifier(merged: PreTrainedModel, pad_id: int) -> tuple[PreTrainedModel, nn.Linear]:
    """The classifier around the merged model's layers, and its last layer, still to be filled."""
    from transformers import AutoModelForSequenceClassification

    config = copy.deepcopy(merged.config)
    config.num_labels = 1
    config.id2label, config.label2id = {0: "reward"}, {"reward": 0}
    config.pad_token_id = config.get_text_config().pad_token_id = pad_id
    try:
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config)
    except ValueError as error:
        raise ModelError(
            f"transformers has no sequence classification for {type(merged).__name__}; use export_reward_as: head."
        ) from error
    last = [(n, m) for n, m in model.named_children() if isinstance(m, nn.Linear) and m.out_features == 1]
    if type(model.base_model) is not type(merged.base_model) or len(last) != 1:
        raise ModelError(
            f"{type(model).__name__} is not built as {type(merged).__name__} is; use export_reward_as: head."
        )
    setattr(model, model.base_model_prefix, merged.base_model)
    name, empty = last[0]
    score = nn.Linear(empty.in_features, 1, bias=empty.bias is not None)
    setattr(model, name, score)
    return model, score


def _probes(vocabulary: int, ends: set[Any], pad_id: int) -> list[Tensor]:
    """Sequences of random tokens, never the pad token, that end as answers do or anyhow."""
    generator = torch.Generator().manual_seed(0)
    words = torch.tensor([token for token in range(vocabulary) if token != pad_id])
    known = sorted(end for end in ends if end is not None)
    sequences = [words[torch.randint(len(words), (length,), generator=generator)] for length in LENGTHS]
    for nth, sequence in enumerate(sequences[:-2]):
        if known:
            sequence[-1] = known[nth % len(known)]
    return sequences


def _padded_scores(model: PreTrainedModel, sequences: Sequence[Tensor], pad_id: int) -> Tensor:
    """The classifier's scores of one batch padded on the right, float32 [sequences, 1]."""
    ids = nn.utils.rnn.pad_sequence(list(sequences), batch_first=True, padding_value=pad_id)
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    with torch.no_grad():
        return model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device)).logits.float().cpu()


def _agree(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> float:
    """The largest difference. Raises ModelError for more than rounding explains, as a share of the largest score."""
    difference = float((found - wanted).abs().max())
    # A score is one sum, and small where its terms cancel: allow twice what is allowed to the largest logit.
    allowed = 2 * (EXACT if dtype == torch.float32 else ROUNDED * torch.finfo(dtype).eps) * float(wanted.abs().max())
    if not difference <= allowed:
        raise ModelError(
            f"The saved model does not score as the head does: scores differ by {difference:.2g}, more than the "
            f"{allowed:.2g} that rounding explains. Nothing was saved."
        )
    return difference
