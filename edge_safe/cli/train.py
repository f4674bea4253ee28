"""`edge-safe train`: CASA training by a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edge_safe.cli import options
from edge_safe.cli.console import Terminal


def command(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.toml", help="What to train, and how.")],
    data: Annotated[Path, typer.Option(metavar="DIR", help="The folder of the data files.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where checkpoints and the result go.")],
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> int:
    """Train a safety token and its gate. Run it again to go on after a kill."""
    from edge_safe.models.progress import Bars, silent
    from edge_safe.models.train import train_recipe

    terminal = Terminal(as_json, quiet, verbose)
    result = train_recipe(recipe, data, out, progress=silent if quiet else Bars())
    terminal.document({"out": str(out), "result": result})
    terminal.say(f"The trained checkpoint is in {out}.")
    return 0
