"""Load times, from storage and from memory, and peak memory: each in a fresh process."""

from __future__ import annotations

import os
from pathlib import Path

from edge_safe.evaluation.speed.fresh import run_fresh
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
    """One fresh process."""
    values = [folder, tokens, threads or 0, provider or ""]
    module = "edge_safe.evaluation.speed.child"
    return run_fresh(module, values, f"{folder} could not be loaded in a process of its own")
