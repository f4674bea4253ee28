"""`edge-safe run`: one request, judged and answered."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edge_safe.cli import options
from edge_safe.cli.console import Terminal, number

if TYPE_CHECKING:
    from edge_safe.runtime.reply import Reply

EXIT_CODES = {"allow": 0, "refuse": 3, "error": 4}


def command(
    bundle: options.Bundle,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The request; - reads stdin.")],
    image: Annotated[
        list[Path] | None,
        typer.Option("--image", metavar="F", help="A picture; may be given several times."),
    ] = None,
    audio: Annotated[Path | None, typer.Option("--audio", metavar="F", help="A recording.")] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="A system text.")] = None,
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
    """Ask one question. The verdict comes before the answer; a refusal exits with code 3."""
    from edge_safe.runtime.model import SafeModel
    from edge_safe.runtime.reply import Reply

    terminal = Terminal(as_json, quiet, verbose)
    words = sys.stdin.read() if prompt == "-" else prompt
    model = SafeModel.load(bundle, provider=options.name_of(provider), policy=policy)
    reply: Reply | None = None
    for event in model.stream(
        words,
        images=image or (),
        audio=audio,
        system=system,
        timeout=timeout,
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
    ):
        if isinstance(event, Reply):
            reply = event
        elif isinstance(event, str):
            terminal.piece(event)
    if reply is None:
        raise RuntimeError("the stream ended without a reply")
    terminal.document(reply.to_dict())
    report(terminal, reply)
    return EXIT_CODES[reply.verdict.decision.value]


def report(terminal: Terminal, reply: Reply) -> None:
    """Prints what follows the answer: a refusal or a reason, the verdict, and the times."""
    verdict, timing = reply.verdict, reply.timing
    if reply.text is not None:
        terminal.say("")
    if reply.refusal is not None:
        terminal.say(reply.refusal)
    if verdict.decision.value == "error":
        terminal.warn(f"The gate could not decide, so there is no answer: {verdict.reason}")
    terminal.note(
        f"[{verdict.decision.value} at {verdict.stage}, p_unsafe {number(verdict.p_unsafe)}, "
        f"verdict after {timing.verdict_ms:.0f} ms, {timing.total_ms:.0f} ms in all]"
    )
    terminal.detail(
        f"[{reply.usage}; {number(timing.decode_tokens_per_second, 1)} tokens a second; "
        f"ended by {reply.finish_reason}]"
    )
