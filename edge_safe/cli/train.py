"""`edge-safe train`: CASA training by a recipe."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from edge_safe.cli import options
from edge_safe.cli.console import Terminal, number, percent


def command(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.toml", help="What to train, and how.")],
    data: Annotated[Path, typer.Option(metavar="DIR", help="The folder of the data files.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where checkpoints and the result go.")],
    restart: Annotated[
        bool, typer.Option("--restart", help="Forget the checkpoints of a run that was stopped.")
    ] = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> int:
    """Train a safety token and its gate. Run it again to go on after a kill.

    For several processes: accelerate launch -m edge_safe.cli.main train ...
    """
    import msgspec

    from edge_safe.models.progress import Bars, silent
    from edge_safe.models.train import train_recipe

    terminal = Terminal(as_json, quiet, verbose)
    report = train_recipe(
        recipe, data=data, out=out, resume=not restart, progress=silent if quiet else Bars()
    )
    if os.environ.get("RANK", "0") != "0":
        return 0
    terminal.document(msgspec.to_builtins(report))
    terminal.say(f"The trained checkpoint is in {report.out}; logs and curves in {report.work}.")
    for stage, fit in report.stages.items():
        terminal.say(
            f"  {stage}: AUROC {number(fit.auroc)}, ASR {percent(fit.asr)}, "
            f"FPR {percent(fit.fpr)} on {fit.rows} rows"
        )
    return 0
