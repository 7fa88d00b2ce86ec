"""Talk to a bundle. A line is a message; these lines are commands:

/reset        forget the conversation
/save FILE    keep the conversation and the model's state (FILE and FILE.json)
/load FILE    go on from there, without reading anything again
/exit         leave; so does the end of the input
"""  # noqa: D415 - shown as the help text

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from edgekit.cli.arguments import add_adapters, add_engine, add_graph, opened
from edgekit.cli.output import as_json, write_text
from edgekit.cli.sampling import add_sampling, settings
from edgekit.errors import EdgekitError, UsageError
from edgekit.utf8 import read_text

if TYPE_CHECKING:
    from edgekit.runtime import GenerationOptions, GenerationStats, Model
    from edgekit.runtime.engine import Integers

__all__ = ["HELP", "Conversation", "add_arguments", "run"]

HELP = "talk to a bundle"
COMMANDS = ("/reset", "/save FILE", "/load FILE", "/exit")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("bundle", metavar="BUNDLE", type=Path)
    parser.add_argument("--stats", action="store_true", help="print each answer's speed to stderr")
    add_engine(parser)
    add_graph(parser)
    add_adapters(parser)
    add_sampling(parser)


def run(args: argparse.Namespace) -> int:
    """Answer line after line; returns the exit code."""
    from edgekit.cli.run import stats_line
    from edgekit.runtime import GenerationOptions

    options = GenerationOptions.of(settings(args))
    model = opened(args)
    conversation = Conversation(model, options)
    for line in _lines():
        try:
            if line.startswith("/"):
                _command(conversation, line)
                continue
            _show(conversation.answer(line))
            if args.stats and conversation.stats is not None:
                print(stats_line(model, conversation.stats), file=sys.stderr)
        except (EdgekitError, KeyboardInterrupt) as error:
            if not sys.stdin.isatty():
                raise
            print(f"edgekit: {str(error) or 'answer stopped'}", file=sys.stderr)
    return 0


def _lines() -> Iterator[str]:
    """Messages and commands, up to /exit or the end of the input."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if line == "/exit":
            return
        if line:
            yield line


def _show(pieces: Iterator[str]) -> None:
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def _command(conversation: "Conversation", line: str) -> None:
    name, _, argument = line.partition(" ")
    file = Path(argument.strip())
    if name == "/reset" and not argument:
        conversation.reset()
    elif name == "/save" and argument.strip():
        conversation.save(file)
    elif name == "/load" and argument.strip():
        conversation.load(file)
    else:
        raise UsageError(f"{line!r} is not a command; known: {', '.join(COMMANDS)}")


class Conversation:
    """Messages so far, and a session that has read them: a new turn costs only its own tokens."""

    def __init__(self, model: "Model", options: "GenerationOptions") -> None:
        """Start with nothing said.

        Args:
            model: a loaded bundle with a chat template.
            options: how to answer.
        """
        self.messages: list[dict[str, str]] = []
        self.stats: GenerationStats | None = None
        self._model, self._options = model, options
        self._session = model.session()
        self._read = ""  # the text that the session's state stands for

    def reset(self) -> None:
        """Forget everything."""
        self.messages = []
        self._session.reset()
        self._read = ""

    def answer(self, message: str) -> Iterator[str]:
        """Say `message` and yield the answer's pieces.

        Raises:
            UsageError: if the model has no chat template, or the conversation outgrew its context.
        """
        from edgekit.runtime.generation import Generation

        asked = [*self.messages, {"role": "user", "content": message}]
        prompt = self._model.chat_prompt(asked)
        ids = self._model.tokenizer.encode_prompt(prompt)
        fresh = self._unread(ids)
        self._read = ""  # until the answer is whole, the state stands for no known text
        facts = self._model.manifest.model
        generation = Generation(
            self._session,
            self._model.tokenizer,
            [fresh],
            self._options,
            facts.eos_token_ids,
            facts.vocab_size,
            seen=[ids],  # an answer must not depend on how much of the prompt was read before
        )
        pieces = []
        for _, piece in generation.pieces():
            pieces.append(piece)
            yield piece
        self.stats = generation.stats
        self.messages = [*asked, {"role": "assistant", "content": "".join(pieces)}]
        if self.stats is not None and self.stats.endings == ("end of text",):
            self._read = prompt + "".join(pieces)

    def _unread(self, ids: "Integers") -> "Integers":
        """The prompt's `ids [T]` that the session has not read; all if it has read another text."""
        read = self._model.tokenizer.encode_prompt(self._read) if self._read else ids[:0]
        same = len(read) == self._session.position and ids[: len(read)].tolist() == read.tolist()
        if not same or len(ids) == len(read):
            self._session.reset()
            return ids
        return ids[len(read) :]

    def save(self, path: Path) -> None:
        """Write the state to `path` and the messages beside it.

        Raises:
            UsageError: if a file cannot be written.
        """
        self._session.save(path)
        write_text(as_json({"messages": self.messages, "read": self._read}), _beside(path))

    def load(self, path: Path) -> None:
        """Go on from what `save` wrote.

        Raises:
            UsageError: if the messages cannot be read.
            BundleError: if the state is damaged or of another bundle or engine.
        """
        try:
            kept = json.loads(read_text(_beside(path)))
            messages, read = list(kept["messages"]), str(kept["read"])
        except (ValueError, KeyError, TypeError) as cause:
            raise UsageError(f"{_beside(path)}: not a saved conversation") from cause
        self._session.load(path)
        self.messages, self._read = messages, read


def _beside(path: Path) -> Path:
    return path.with_name(path.name + ".json")
