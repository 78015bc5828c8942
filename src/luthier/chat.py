"""A conversation in the terminal.

luthier chat CONFIG [key=value ...]

With `draft` set answers come by speculative decoding, each followed by what that saved.

Piped text works too: each line is a message, answers go to stdout, everything else to stderr.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TextIO

from luthier.commands import parse_command
from luthier.core.errors import DataError, LuthierError
from luthier.core.log import get_logger
from luthier.core.types import Message

if TYPE_CHECKING:
    from luthier.engines.sampling import GenerateConfig
    from luthier.run import Run
    from luthier.serving import Speaker

log = get_logger("chat")

HELP = """\
/clear        forget the conversation
/system TEXT  set the system prompt and begin anew; without TEXT, the template's own
/help         these lines
/exit         leave (as do Ctrl-D, and Ctrl-C while nothing is being said)"""


class Chat:
    """What was said so far. A new question is answered with all of it in mind."""

    def __init__(
        self, speaker: Speaker, sampling: GenerateConfig, out: TextIO, *, told: Callable[[], str] | None = None
    ):
        """told: what to say, aside, about each answer once it is there."""
        self._speaker = speaker
        self._sampling = sampling
        self._out = out
        self._told = told
        self.system = ""
        self.messages: list[Message] = []
        self._turns = 0

    def ask(self, text: str) -> str:
        """Stream the answer to `out` and remember it. Ctrl-C ends the answer; what was said until then stays.

        It is remembered with its special tokens, also where they are not shown: the words around a thought may be
        such, and the template must find the thought in the history.

        Raises LuthierError, with the conversation as it was before, where the model cannot take it.
        """
        asked = [*self.messages, Message("user", text)]
        ids = self._speaker.renderer.prompt(asked, system=self.system)
        seed, self._turns = self._speaker.seed + self._turns, self._turns + 1
        said = answer = ""
        whole = replace(self._sampling, skip_special_tokens=False)
        pieces = self._speaker.engine.stream(ids, whole, self._speaker.renderer.stop_ids, seed=seed)
        try:
            for piece in pieces:
                said += piece
                shown = self._shown(piece)
                answer += shown
                print(shown, end="", file=self._out, flush=True)
        except KeyboardInterrupt:
            pieces.close()
        print(file=self._out, flush=True)
        if self._told is not None:
            _aside(self._told())
        self.messages = [*asked, Message("assistant", said)]
        return answer

    def _shown(self, piece: str) -> str:
        """A piece of the answer as it is shown."""
        if not self._sampling.skip_special_tokens:
            return piece
        for token in self._speaker.engine.tokenizer.all_special_tokens:
            piece = piece.replace(token, "")
        return piece

    def command(self, line: str) -> str | None:
        """Do what a line that begins with / says; returns what to tell the user, None to leave."""
        name, _, rest = line[1:].partition(" ")
        commands: dict[str, Callable[[str], str | None]] = {
            "clear": self._forget,
            "system": self._set_system,
            "help": lambda _: HELP,
            "exit": lambda _: None,
        }
        if name not in commands:
            return f"There is no command /{name}.\n{HELP}"
        return commands[name](rest.strip())

    def _forget(self, _: str) -> str:
        self.messages = []
        return "The conversation is forgotten."

    def _set_system(self, text: str) -> str:
        self.system, self.messages = text, []
        return f"System prompt: {text}" if text else "System prompt: the template's own."


def main(argv: Sequence[str]) -> int:
    """The verb; returns the exit code."""
    from luthier.run import resolve

    command = parse_command(argv, "chat")
    run = resolve(command.config, command.overrides, verb="chat")
    run.announce(log)
    talk(_start(run), sys.stdin)
    return 0


def _start(run: Run) -> Chat:
    """A chat with nothing said yet."""
    if run.speculate.draft is None:
        from luthier.serving import load_engine

        return Chat(load_engine(run), run.generate, sys.stdout)
    from luthier.speculative import greedy, load_fast

    sampling = greedy(run)
    fast = load_fast(run)
    return Chat(fast.speaker, sampling, sys.stdout, told=fast.engine.told)


def talk(chat: Chat, source: TextIO) -> None:
    """Read lines until /exit or the end, and answer each."""
    live = source.isatty()
    if live:
        _say(f"Write a message, or a command:\n{HELP}")
    while (line := _read(source, live)) is not None:
        if not line.strip():
            continue
        if line.startswith("/"):
            reply = chat.command(line.strip())
            if reply is None:
                return
            _say(reply)
            continue
        try:
            if live:
                print("Assistant: ", end="", flush=True)
            chat.ask(line)
        except LuthierError as error:
            _refuse(error, live)


def _read(source: TextIO, live: bool) -> str | None:
    """The next line, None at the end."""
    if not live:
        line = source.readline()
        return line.rstrip("\r\n") if line else None
    try:
        import readline  # noqa: F401  gives `input` a history and the arrow keys

        return input("User: ")
    except (EOFError, KeyboardInterrupt):
        _say("")
        return None


def _refuse(error: LuthierError, live: bool) -> None:
    """A conversation that grew too long is no reason to leave; a script, though, must not miss an answer."""
    if not live:
        raise error
    hint = " /clear begins anew." if isinstance(error, DataError) else ""
    _say(f"{error}{hint}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _aside(text: str) -> None:
    from rich.console import Console

    Console(stderr=True, highlight=False).print(text, style="dim")
