"""Loads a bundle in a fresh process and says how long that took and how much memory it held.

    python -m edge_safe.evaluation.speed.child BUNDLE TOKENS THREADS PROVIDER

Nothing but the bundle counts here: no other model, no benchmark. Prints one line of JSON.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

ANSWER_TOKENS = 32
FIRST = "Good morning."


def main(folder: str, tokens: int, threads: int | None, provider: str | None) -> dict[str, float]:
    """Loads, judges, answers; times in ms from the first line of this module's code on."""
    start = time.perf_counter()
    from edge_safe import SafeModel

    model = SafeModel.load(folder, threads=threads, provider=provider, accept_failed=True)
    loaded = time.perf_counter()
    model.assess(FIRST)
    judged = time.perf_counter()
    # Not before: what a measurement needs is no part of a load.
    from edge_safe.evaluation.speed.prompts import REQUEST, exact_prompt
    from edge_safe.evaluation.speed.requests import allowing

    read = _counter(Path("/proc/self/io"), "read_bytes:")
    prompt = exact_prompt(model, tokens) or REQUEST
    allowing(model).generate(prompt, max_tokens=ANSWER_TOKENS)
    return {
        "load_ms": (loaded - start) * 1000.0,
        "first_verdict_ms": (judged - start) * 1000.0,
        "read_mb": read / 2**20,
        # VmHWM belongs to this process; ru_maxrss would count its parent's memory before exec.
        "peak_memory_mb": _counter(Path("/proc/self/status"), "VmHWM:") / 2**10,
    }


def _counter(path: Path, name: str) -> int:
    """A number from one of the system's tables; 0 where there is none."""
    try:
        lines = path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(name)), 0)


if __name__ == "__main__":
    folder, tokens, threads, provider = sys.argv[1:]
    found = main(folder, int(tokens), int(threads) or None, provider or None)
    sys.stdout.write(json.dumps(found) + "\n")
