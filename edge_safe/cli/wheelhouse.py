"""`edge-safe wheelhouse`: a folder of wheels for a device without a network."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from edge_safe.cli import options
from edge_safe.cli.console import Terminal
from edge_safe.cli.wheels.platforms import PLATFORMS, platform_named


def command(
    platform: Annotated[
        str,
        typer.Option(
            "--platform",
            metavar="NAME",
            help=f"The device's system: {', '.join(PLATFORMS)}.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The folder to make.")],
    python: Annotated[
        str | None,
        typer.Option(
            "--python", metavar="3.N", help="The device's Python; by default its system's own."
        ),
    ] = None,
    extra: Annotated[
        list[str] | None,
        typer.Option(
            "--extra",
            metavar="NAME",
            help="An extra of edge-safe, such as cpu, gpu or audio (repeatable); cpu alone by "
            "default.",
        ),
    ] = None,
    wheel: Annotated[
        Path | None,
        typer.Option(
            "--wheel",
            metavar="FILE",
            help="edge-safe's own wheel; by default it is built from the source tree.",
        ),
    ] = None,
    extra_wheel: Annotated[
        list[Path] | None,
        typer.Option(
            "--extra-wheel",
            metavar="FILE",
            help="A wheel that you have, such as NVIDIA's onnxruntime-gpu (repeatable).",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a folder that was made this way.")
    ] = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> int:
    """Gather all wheels that a device needs, for an installation without a network.

    pip's resolver checks that the folder is complete for that system and Python. INSTALL.txt in it
    says what to run on the device.
    """
    from edge_safe.cli.wheels.house import INSTALL_FILE, make_house
    from edge_safe.cli.wheels.pip import TargetPip

    terminal = Terminal(as_json, quiet, verbose)
    row = platform_named(platform)
    pip = TargetPip(row, row.python(python), terminal.note)
    extras = list(dict.fromkeys(extra or ["cpu"]))
    wheels = make_house(pip, out, extras, own=wheel, brought=extra_wheel or [], overwrite=overwrite)
    size = sum(each.size for each in wheels)
    terminal.document(
        {"output": str(out), "platform": row.name, "python": pip.python.rpartition(".")[0]}
        | {"extras": extras, "bytes": size, "wheels": [asdict(each) for each in wheels]}
    )
    for each in wheels:
        terminal.detail(f"  {each.sha256}  {each.file}")
    terminal.say(f"{out}: {len(wheels)} wheels, {size / 1e6:.1f} MB, for {pip}")
    terminal.say(f"pip's resolver says they are complete; {out / INSTALL_FILE} says how to go on")
    return 0
