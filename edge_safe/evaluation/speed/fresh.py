"""Runs a module in a process of its own, with the very package that runs here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import edge_safe
from edge_safe.errors import BundleError


def run_fresh(module: str, arguments: Sequence[object], failure: str) -> dict[str, float]:
    """What a module run as a program prints: numbers by name, as JSON, on its last line.

    Args:
        module: Its dotted name.
        arguments: What it is given.
        failure: Beginning of the message if it fails.

    Raises:
        BundleError: It failed; the message ends with the last line of its errors.
    """
    home = str(Path(edge_safe.__file__).parents[1])
    path = os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        check=False,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise BundleError(f"{failure}: {lines[-1]}")
    values: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return values
