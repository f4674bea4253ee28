"""Options that several verbs share, each with its help text and environment variable."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer

from edge_safe.errors import UsageError


class Provider(str, enum.Enum):
    """What a bundle can run on."""

    CPU = "cpu"
    CUDA = "cuda"
    TENSORRT = "tensorrt"
    TENSORRT_RTX = "tensorrt-rtx"


Bundle = Annotated[Path, typer.Argument(metavar="DIR", help="The bundle folder.")]

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]

Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="No notes or progress.", envvar="EDGE_SAFE_QUIET"),
]

Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose",
        "-v",
        help="Say more, and show where an internal error arose.",
        envvar="EDGE_SAFE_VERBOSE",
    ),
]

RunOn = Annotated[
    Provider | None,
    typer.Option(
        "--provider",
        help="What to run on; by default what the bundle's target names.",
        envvar="EDGE_SAFE_PROVIDER",
    ),
]

SuiteName = Annotated[
    str,
    typer.Option(
        "--suite",
        metavar="NAME",
        help="Whose layout the data has: jsonl is our own rows; docs/evaluate.md lists the others.",
    ),
]

PolicyFile = Annotated[
    Path | None,
    typer.Option(
        "--policy",
        metavar="FILE",
        help="A policy (TOML or JSON) in place of the bundle's own.",
        envvar="EDGE_SAFE_POLICY",
    ),
]

MaxTokens = Annotated[
    int,
    typer.Option(metavar="N", help="Longest answer, in tokens.", envvar="EDGE_SAFE_MAX_TOKENS"),
]

Temperature = Annotated[
    float, typer.Option(metavar="T", help="0 always takes the likeliest token.")
]


def _seconds(timeout: float | None) -> float | None:
    """Takes a time that is one.

    Raises:
        UsageError: It is zero, negative or no number.
    """
    if timeout is not None and not timeout > 0:
        raise UsageError(f"--timeout is {timeout:g}; give more than 0 seconds.")
    return timeout


Timeout = Annotated[
    float | None,
    typer.Option(
        "--timeout",
        metavar="SECONDS",
        help="Longest time for a request, loading aside: without a verdict by then the decision "
        "is error, and an answer under way is cut off.",
        envvar="EDGE_SAFE_TIMEOUT",
        callback=_seconds,
    ),
]

Seed = Annotated[int | None, typer.Option(metavar="N", help="Makes sampling repeatable.")]


def name_of(provider: Provider | None) -> str | None:
    """The name that the runtime knows a provider by."""
    return None if provider is None else provider.value
