"""Load times, from storage and from memory, and peak memory: each in a fresh process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import edge_safe
from edge_safe.errors import BundleError
from edge_safe.evaluation.speed.samples import Samples
from edge_safe.runtime.manifest import load_manifest


def measure_loading(
    folder: Path, tokens: int, threads: int | None, provider: str | None, rounds: int
) -> Samples:
    """Loads the bundle again and again, in turn with and without its pages in memory.

    Returns:
        ``load_ms``, ``first_verdict_ms`` and ``read_mb`` after its pages were dropped, the same
        with ``_warm`` behind it, and ``peak_memory_mb``.

    Raises:
        BundleError: The bundle cannot be loaded; the message is the child's.
    """
    samples = Samples()
    for _ in range(rounds):
        drop_pages(folder)
        cold = _load(folder, tokens, threads, provider)
        samples.add({"peak_memory_mb": cold.pop("peak_memory_mb"), **cold})
        warm = _load(folder, tokens, threads, provider)
        samples.add({"peak_memory_mb": warm.pop("peak_memory_mb")})
        samples.add({f"{name}_warm": value for name, value in warm.items()})
    return samples


def drop_pages(folder: Path) -> None:
    """Asks the system to forget the bundle's files in memory; needs no rights.

    Pages that another process has mapped stay; ``read_mb`` shows what came from storage.
    """
    if not hasattr(os, "posix_fadvise"):
        return
    for name in load_manifest(folder).files:
        handle = os.open(folder / name, os.O_RDONLY)
        try:
            os.fsync(handle)  # what is not written yet cannot be dropped
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def _load(folder: Path, tokens: int, threads: int | None, provider: str | None) -> dict[str, float]:
    """One fresh process, run with the very package that runs here."""
    home = str(Path(edge_safe.__file__).parents[1])
    path = os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH", "")]))
    command = [sys.executable, "-m", "edge_safe.evaluation.speed.child", str(folder)]
    command += [str(tokens), str(threads or 0), provider or ""]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, check=False
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise BundleError(f"{folder} could not be loaded in a process of its own: {lines[-1]}")
    values: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return values
