"""Starts ``child.py`` and reads its answer, whatever becomes of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

CHILD = "edge_safe.cli.doctor.child"
# Seconds; the first start of TensorRT builds an engine, which takes long on small devices.
PATIENCE = 300.0


@dataclass(frozen=True, slots=True)
class Answer:
    """What the child said.

    Attributes:
        document: Its line of JSON; None if it ended before.
        output: All that it and its libraries printed.
        ending: How it ended, in words, if not well.
    """

    document: dict[str, Any] | None
    output: str
    ending: str = ""


def ask(*arguments: str) -> Answer:
    """Runs the child to its end.

    Args:
        arguments: ``look``, or ``start`` and a provider.
    """
    command = [sys.executable, "-m", CHILD, *arguments]
    # Nothing that lies in the current folder is to be taken for a module.
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PATIENCE,
            stdin=subprocess.DEVNULL,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        return Answer(None, "", f"was not done after {PATIENCE:.0f} s")
    output = done.stdout + done.stderr
    last = done.stdout.rstrip().rpartition("\n")[2]
    try:
        document = json.loads(last)
    except json.JSONDecodeError:
        document = None
    if isinstance(document, dict) and done.returncode == 0:
        return Answer(document, output)
    return Answer(None, output, _ending(done.returncode))


def _ending(code: int) -> str:
    if code < 0:
        return f"crashed ({signal.Signals(-code).name})"
    return f"ended with code {code}"
