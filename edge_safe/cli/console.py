"""What the verbs print: one JSON document or words on stdout, everything else on stderr.

Knows no verb.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


@dataclass(slots=True)
class Terminal:
    """Where a verb writes.

    Attributes:
        json: Whether stdout gets one JSON document and nothing else.
        quiet: Whether notes and progress are left out.
        verbose: Whether details are shown.
        out: stdout, with colours only on a terminal and without NO_COLOR.
        err: stderr, likewise.
    """

    json: bool = False
    quiet: bool = False
    verbose: bool = False
    out: Console = field(default_factory=lambda: Console(highlight=False, soft_wrap=True))
    err: Console = field(
        default_factory=lambda: Console(stderr=True, highlight=False, soft_wrap=True)
    )

    def document(self, value: dict[str, Any]) -> None:
        """Prints the JSON document, if one was asked for."""
        if self.json:
            sys.stdout.write(json.dumps(plain(value), ensure_ascii=False, indent=2) + "\n")
            sys.stdout.flush()

    def say(self, text: str, style: str | None = None) -> None:
        """Prints a line of the result, in words."""
        if not self.json:
            self.out.print(printable(text), style=style, markup=False)

    def piece(self, text: str) -> None:
        """Prints a piece of an answer as it arrives, without a line break."""
        if not self.json:
            sys.stdout.write(printable(text))
            sys.stdout.flush()

    def show(self, renderable: Any) -> None:
        """Prints a table."""
        if not self.json:
            self.out.print(renderable)

    def note(self, text: str) -> None:
        """Says on stderr what is going on."""
        if not self.quiet:
            self.err.print(printable(text), style="dim", markup=False)

    def detail(self, text: str) -> None:
        """Says on stderr what only a curious reader wants to know."""
        if self.verbose:
            self.err.print(printable(text), style="dim", markup=False)

    def warn(self, text: str) -> None:
        """Says on stderr what should not be missed, quiet or not."""
        self.err.print(printable(text), style="yellow", markup=False)

    @contextmanager
    def progress(self, label: str, total: int) -> Iterator[Progress]:
        """A progress bar on stderr with one task, 0; hidden where nobody looks."""
        hidden = self.quiet or not self.err.is_terminal
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.err,
            transient=True,
            disable=hidden,
        ) as bar:
            bar.add_task(label, total=total)
            yield bar

    @contextmanager
    def steps(self) -> Iterator[Callable[[str, float], None]]:
        """Shows the steps of a long job on stderr; told a step's name and the share done."""
        drawn = self.err.is_terminal and not self.quiet
        started: dict[str, TaskID] = {}
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self.err, disable=not drawn) as bar:

            def tell(step: str, share: float) -> None:
                if step not in started:
                    started[step] = bar.add_task(step, total=1.0)
                    if not drawn:
                        self.note(step)
                bar.update(started[step], completed=share)

            yield tell


def without_loading_bars() -> None:
    """Keeps transformers from drawing progress bars of its own between ours."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def printable(text: str) -> str:
    """The text without control characters, so that no answer can steer the terminal."""
    return "".join(c for c in text if c in "\n\t" or (c >= " " and not "\x7f" <= c <= "\x9f"))


def plain(value: Any) -> Any:
    """The value as JSON has it: NaN and infinity become null."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def percent(share: float | None) -> str:
    """A share in words: ``3.1 %``, or a dash where there is none."""
    return "-" if share is None or not math.isfinite(share) else f"{100 * share:.1f} %"


def number(value: float | None, digits: int = 3) -> str:
    """A number in words, or a dash where there is none."""
    return "-" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"
