"""`edge-safe chat`: a conversation in the terminal."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edge_safe.cli import options
from edge_safe.cli.console import Terminal
from edge_safe.cli.run import report
from edge_safe.errors import MediaError, PromptError, UsageError

if TYPE_CHECKING:
    from edge_safe.runtime.chat import Chat
    from edge_safe.runtime.model import SafeModel

HELP = """/image F   add a picture to the next message
/audio F   add a recording to the next message
/reset     forget the conversation
/quit      leave (so does Ctrl-D); Ctrl-C cancels an answer"""


@dataclass(slots=True)
class Attachments:
    """What goes with the next message."""

    images: list[Path] = field(default_factory=list)
    audio: Path | None = None


def command(
    bundle: options.Bundle,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="A system text.")] = None,
    conversation: Annotated[
        Path | None,
        typer.Option(
            "--conversation",
            metavar="F",
            help="Go on with the conversation in this file, if it is there, and keep it there "
            "after every turn.",
        ),
    ] = None,
    max_tokens: options.MaxTokens = 256,
    temperature: options.Temperature = 0.0,
    seed: options.Seed = None,
    timeout: options.Timeout = None,
    policy: options.PolicyFile = None,
    provider: options.RunOn = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> int:
    """Talk with a model. Every turn is judged over the whole conversation."""
    from edge_safe.runtime.model import SafeModel

    terminal = Terminal(as_json, quiet, verbose)
    model = SafeModel.load(bundle, provider=options.name_of(provider), policy=policy)
    chat = _begin(model, system, conversation, terminal)
    sampling = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    terminal.note(f"{model.manifest.name}. /help lists the commands.")
    turns: list[dict[str, Any]] = []
    waiting = Attachments()
    for line in _lines(terminal):
        if line.startswith("/"):
            if not _obey(line, chat, waiting, terminal):
                break
            continue
        try:
            turns.append(_answer(chat, line, waiting, timeout, sampling, terminal))
        except (MediaError, PromptError) as error:
            terminal.warn(str(error))
        else:
            if conversation is not None:
                chat.save(conversation)
        waiting = Attachments()
    terminal.document({"turns": turns})
    return 0


def _begin(
    model: SafeModel, system: str | None, conversation: Path | None, terminal: Terminal
) -> Chat:
    """A new conversation, or the one in a file.

    Raises:
        UsageError: A system text is given for one that has begun, or the file has no folder.
    """
    if conversation is not None and not conversation.absolute().parent.is_dir():
        raise UsageError(
            f"--conversation {conversation}: there is no folder "
            f"{conversation.parent}; make it first."
        )
    if conversation is None or not conversation.exists():
        return model.chat(system)
    if system is not None:
        raise UsageError(
            f"The conversation in {conversation} has begun already; leave --system out, or name "
            "another file."
        )
    chat = model.load_chat(conversation)
    terminal.note(f"Going on with the conversation in {conversation}.")
    return chat


def _lines(terminal: Terminal) -> Iterator[str]:
    """What the user types, without empty lines, until Ctrl-D; Ctrl-C drops the line."""
    interactive = sys.stdin.isatty() and not terminal.json
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            terminal.note("\n/quit or Ctrl-D leaves.")
            continue
        if line:
            yield line


def _obey(line: str, chat: Chat, waiting: Attachments, terminal: Terminal) -> bool:
    """Carries out a command; False ends the conversation."""
    word, _, argument = line.partition(" ")
    path = Path(argument.strip()).expanduser()
    if word == "/quit":
        return False
    if word == "/reset":
        chat.reset()
        terminal.note("The conversation is forgotten.")
    elif word in ("/image", "/audio") and not path.is_file():
        terminal.warn(f"There is no file {argument.strip()!r}; give {word} a path.")
    elif word == "/image":
        waiting.images.append(path)
        terminal.note(f"{path.name} goes with the next message.")
    elif word == "/audio":
        waiting.audio = path
        terminal.note(f"{path.name} goes with the next message.")
    else:
        terminal.note(HELP)
    return True


def _answer(
    chat: Chat,
    text: str,
    waiting: Attachments,
    timeout: float | None,
    sampling: dict[str, Any],
    terminal: Terminal,
) -> dict[str, Any]:
    """One turn, as `run --json` shows a request."""
    from edge_safe.runtime.reply import Reply

    cancel = threading.Event()
    with _interrupt_sets(cancel):
        for event in chat.stream(
            text,
            images=waiting.images,
            audio=waiting.audio,
            timeout=timeout,
            cancel=cancel,
            **sampling,
        ):
            if isinstance(event, Reply):
                report(terminal, event)
                return event.to_dict()
            if isinstance(event, str):
                terminal.piece(event)
    raise RuntimeError("the turn ended without a reply")


@contextmanager
def _interrupt_sets(cancel: threading.Event) -> Iterator[None]:
    """While it lasts, Ctrl-C cancels the answer instead of ending the program."""

    def handler(number: int, frame: FrameType | None) -> None:
        # An Event's lock is not reentrant: a second Ctrl-C within set() would wait for the first.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        cancel.set()

    previous = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
