"""`luthier keys`: look a key up, without leaving the terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from difflib import get_close_matches

from luthier.core.errors import ConfigError

USUAL: dict[str, str] = {
    "model_name_or_path": "folder or hub id of the model",
    "stage": "what is trained: sft, pt, rm, dpo, kto, pro, tuna, ...",
    "finetuning_type": "how: lora, full, freeze, oft",
    "dataset": "names in dataset_info.json, or files",
    "template": "chat template; unset: the tokenizer's own",
    "cutoff_len": "most tokens of a row",
    "packing": "several examples a row",
    "val_size": "rows kept for evaluation, a share or a number",
    "output_dir": "folder that the run writes",
    "per_device_train_batch_size": "rows of a micro-batch",
    "gradient_accumulation_steps": "micro-batches of a step",
    "learning_rate": "its peak",
    "num_train_epochs": "how often the data are seen; or max_steps",
    "save_steps": "steps between checkpoints",
    "bf16": "compute in bfloat16",
}
"""What most configurations set; the page of `luthier train --help` shows them."""


def usual() -> str:
    """The keys that most configurations set, a line each."""
    width = max(map(len, USUAL)) + 2
    return "\n".join(f"  {name:<{width}}{text}" for name, text in USUAL.items())


def key_list(words: Sequence[str] = (), width: int = 110) -> str:
    """Every key with its default and help; with words, those that have one of them in their name or their owner's.

    Raises ConfigError where nothing is found.
    """
    from luthier.schema import default, prose, sections

    lines: list[str] = []
    names: list[str] = []
    for section in sections():
        names += section.keys
        owned = any(word.lower() in section.title for word in words)
        keys = [k for k in section.keys.values() if not words or owned or any(w.lower() in k.name for w in words)]
        if not keys:
            continue
        lines += [f"[{section.title}] {section.intro}", ""]
        for key in keys:
            lines.append(f"  {key.name}{default(key)}")
            lines += textwrap.wrap(prose(key.doc), width, initial_indent=" " * 6, subsequent_indent=" " * 6)
        lines.append("")
    if not lines:
        near = get_close_matches(words[0], names, n=3)
        hint = f" Did you mean {' or '.join(near)}?" if near else " `luthier keys` lists all."
        raise ConfigError(f"no key has {' or '.join(map(repr, words))} in its name.{hint}")
    return "\n".join(lines).rstrip()


def main(argv: Sequence[str]) -> int:
    """`luthier keys [WORD ...]`."""
    unknown = [word for word in argv if word.startswith("-")]
    if unknown:
        raise ConfigError(f"`luthier keys` knows no option {unknown[0]}. Usage: luthier keys [WORD ...]")
    print(key_list(argv))
    return 0
