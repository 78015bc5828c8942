"""The command line: `luthier VERB ...`. A verb's module is imported only when it is called.

This file imports nothing heavy: `luthier --help` and `luthier version` answer at once.
"""

from __future__ import annotations

import importlib
import os
import select
import sys
import traceback
from collections.abc import Callable, Sequence
from difflib import get_close_matches

from luthier import __version__, ranks
from luthier.commands import VERBS, Verb
from luthier.core.errors import ConfigError, LuthierError, mendable

KEYS = "CONFIG is a YAML or JSON file; key=value or --key value win over it. `luthier keys` lists all keys."


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 for what a user can mend, 130 when interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    argv = ranks.without_local_rank(word for word in argv if word != "--debug")
    return ranks.guarded(lambda: _reported(argv, debug))


def _reported(argv: list[str], debug: bool) -> int:
    """Run one command; what a user can mend becomes one message, said by the first process to fail."""
    try:
        code = _dispatch(argv)
        sys.stdout.flush()
        return code
    except (LuthierError, OSError) as error:
        if isinstance(error, BrokenPipeError) and _unread():
            return 141
        text = mendable(error)
        if text is None or (debug and isinstance(error, OSError)):
            raise
        if debug:
            traceback.print_exc()
        if ranks.speaks_first(2):
            print(f"error: {text}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if debug:
            traceback.print_exc()
        print("interrupted", file=sys.stderr)
        return 130


def _unread() -> bool:
    """Whether nobody reads standard output any more (`luthier keys | head`); what is still to be said goes nowhere."""
    ask = select.poll()
    ask.register(sys.stdout.fileno(), 0)
    if not ask.poll(0):
        return False
    # Python would try once more when it ends, and complain.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(verb_help(argv[1]) if len(argv) > 1 and argv[1] in VERBS else overview())
        return 0
    name, rest = argv[0], argv[1:]
    if name in ("version", "--version", "-V"):
        print(f"luthier {__version__}")
        return 0
    if name not in VERBS:
        near = get_close_matches(name, [*VERBS, "version", "help"], n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"there is no command {name!r}.{hint} There are: {', '.join([*VERBS, 'version', 'help'])}.")
    if not VERBS[name].own_parser and any(word in ("-h", "--help") for word in rest):
        print(verb_help(name))
        return 0
    return _call(VERBS[name], rest)


def _call(verb: Verb, argv: list[str]) -> int:
    # Rust's tokenizer threads and forked data workers do not go together; transformers would warn at every fork.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # OpenMP threads that wait by spinning take the cores from one another on a busy machine: ten times slower there.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from luthier.core.log import set_up

    set_up()
    run: Callable[[list[str]], int] = importlib.import_module(verb.module).main
    return run(argv)


def overview() -> str:
    """The page of `luthier --help`."""
    width = max(map(len, VERBS)) + 2
    lines = [f"  {name:<{width}}{verb.purpose}" for name, verb in VERBS.items()]
    return "\n".join(
        [
            "Fine-tune language models from one YAML file.",
            "",
            "usage: luthier COMMAND ...",
            "",
            *lines,
            f"  {'version':<{width}}print the version",
            "",
            "`luthier COMMAND --help` says more. --debug shows a traceback with an error.",
        ]
    )


def verb_help(name: str) -> str:
    """The page of `luthier VERB --help`."""
    verb = VERBS[name]
    lines = [f"{verb.purpose[0].upper()}{verb.purpose[1:]}.", "", f"usage:   {verb.usage}", f"example: {verb.example}"]
    if verb.flags:
        lines += ["", *(f"  --{f'{name} {flag.value}':<16}{flag.doc}" for name, flag in verb.flags.items())]
    if verb.takes_keys:
        lines += ["", KEYS]
    if name == "train":
        from luthier.keys import usual

        lines += ["", "Keys that most configurations set:", "", usual()]
    return "\n".join(lines)
