"""The worker's side of the protocol that ``edge_safe.evaluation.speed.peers`` describes.

Needs the standard library alone: workers run in the peers' own environments.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

Times = dict[str, Any]

Handler = Callable[[list[int], int, bool], Times]
"""Answers a prompt of ids with so many tokens, or refuses it; returns ids and times in ms."""


def serve(load: Callable[[], Handler], packages: tuple[str, ...]) -> None:
    """Loads a model, then answers requests until it is told to stop.

    Args:
        load: Opens the model; its time is the load time.
        packages: Distributions whose versions are told.
    """
    # Libraries write what they like on stdout; the protocol keeps a stream of its own.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(message: dict[str, Any]) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    try:
        start = time.perf_counter()
        handler = load()
        milliseconds = (time.perf_counter() - start) * 1000.0
        versions = {package: metadata.version(package) for package in packages}
        say({"load_ms": milliseconds, "versions": versions})
        for line in sys.stdin:
            request = json.loads(line)
            if request.get("stop"):
                say({"peak_memory_mb": peak_memory_mb()})
                return
            say(handler(request["ids"], request["tokens"], request["refuse"]))
    except Exception as error:
        say({"error": f"{type(error).__name__}: {error}"})
        raise


def timed(prefill: Callable[[], int], step: Callable[[int], int], tokens: int) -> Times:
    """Times one answer.

    Args:
        prefill: Reads the prompt and returns the likeliest first token.
        step: Reads a token and returns the likeliest next one.
        tokens: Length of the answer.
    """
    start = time.perf_counter()
    ids = [prefill()]
    first = time.perf_counter()
    for _ in range(tokens - 1):
        ids.append(step(ids[-1]))
    end = time.perf_counter()
    return {
        "ids": ids,
        "first_token_ms": (first - start) * 1000.0,
        "total_ms": (end - start) * 1000.0,
    }


def peak_memory_mb() -> float:
    """The most memory this process has held, in MB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))
