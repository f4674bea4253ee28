"""The program `edge-safe`: its verbs, and the one handler of errors."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Annotated, Any

import typer

from edge_safe.cli import (
    bench,
    build,
    chat,
    classify,
    demo,
    doctor,
    eval,
    export,
    inspect,
    plan,
    run,
    train,
    verify,
    wheelhouse,
)
from edge_safe.cli.console import Terminal
from edge_safe.cli.errors import INTERRUPTED, Failure, explain

# Seconds after Ctrl-C in which an error that nobody expected is taken for its work.
_AFTERMATH = 5.0

app = typer.Typer(
    name="edge-safe",
    help="Safety-token multimodal models on small devices: a verdict before every answer.",
    epilog=(
        "Exit codes: 0 done or answered, 1 error, 2 usage, 3 refused by policy, "
        "4 the gate could not decide (no answer was given), 130 interrupted."
    ),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

for _name, _verb in (
    ("export", export),
    ("verify", verify),
    ("inspect", inspect),
    ("run", run),
    ("chat", chat),
    ("classify", classify),
    ("eval", eval),
    ("bench", bench),
    ("plan", plan),
    ("build", build),
    ("train", train),
    ("wheelhouse", wheelhouse),
):
    app.command(_name, no_args_is_help=True)(_verb.command)
app.command("doctor")(doctor.command)
app.command("demo")(demo.command)


def _print_version(wanted: bool) -> None:
    if wanted:
        import edge_safe

        typer.echo(f"edge-safe {edge_safe.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point of the program."""
    sys.exit(call(sys.argv[1:]))


def call(arguments: Sequence[str]) -> int:
    """Runs one command.

    Args:
        arguments: As on the command line, without the program's name.

    Returns:
        The exit code.
    """
    options = list(arguments)[: arguments.index("--") if "--" in arguments else None]
    terminal = Terminal(json="--json" in options, verbose=bool({"--verbose", "-v"} & set(options)))
    interrupts: list[float] = []
    try:
        with _noting_interrupts(interrupts):
            code = int(app(list(arguments), prog_name="edge-safe", standalone_mode=False) or 0)
        if code == INTERRUPTED:
            # Typer makes a code of an interrupt, and says nothing.
            raise KeyboardInterrupt
        return code
    except BrokenPipeError:
        # The reader of our output has gone; a flush at exit must not complain about it again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (Exception, KeyboardInterrupt) as error:
        failure = _usage_failure(error) or explain(error)
        if failure is None and interrupts and time.monotonic() - interrupts[-1] < _AFTERMATH:
            failure = explain(KeyboardInterrupt())
        if failure is None or terminal.verbose:
            terminal.detail(traceback.format_exc())
        if failure is None:
            failure = Failure(
                "InternalError",
                f"internal error: {type(error).__name__}: {error}; run again with --verbose "
                "and report what it prints",
                1,
            )
        terminal.document(failure.to_dict())
        if failure.message:
            terminal.err.print(f"edge-safe: {failure.message}", style="red", markup=False)
        return failure.exit_code


@contextmanager
def _noting_interrupts(moments: list[float]) -> Iterator[None]:
    """Notes when Ctrl-C came: libraries written in C may turn it into an error of their own."""
    usual = signal.getsignal(signal.SIGINT)
    if usual is not signal.default_int_handler:
        yield  # somebody else's program, or not the main thread's business
        return

    def note(number: int, frame: FrameType | None) -> None:
        moments.append(time.monotonic())
        signal.default_int_handler(number, frame)

    try:
        signal.signal(signal.SIGINT, note)
    except ValueError:  # only the main thread may
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)


def _usage_failure(error: BaseException) -> Failure | None:
    """The failure behind an exception of the command line's parser.

    typer has used click, and since 0.26 a copy of it; both kinds of exception have this method.
    """
    if isinstance(error, typer.Abort):
        return Failure("Abort", "aborted", 1)
    describe: Any = getattr(error, "format_message", None)
    if describe is None:
        return None
    if type(error).__name__ == "NoArgsIsHelpError":
        return Failure("UsageError", describe(), 2)  # the help, or nothing where it is printed
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "edge-safe"
    return Failure("UsageError", f"{describe()} Try: {path} --help", 2)


if __name__ == "__main__":
    main()
