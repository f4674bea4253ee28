"""What the gate costs an allowed answer: a bundle against the same without its gate.

    python -m edge_safe.evaluation.speed.gate_cost BUNDLE UNGATED TOKENS COUNT FIRST THREADS \
        PROVIDER

Where the system puts weights in memory makes the same graphs some per cent faster or slower in one
process than in another, which is more than the gate costs. So it is measured in many of them,
each of which loads both and lets them answer in turn; the command above is one such process and
prints one line of JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from edge_safe.evaluation.speed.fresh import run_fresh
from edge_safe.evaluation.speed.prompts import plain_ids
from edge_safe.evaluation.speed.requests import Answers, load_forgetful
from edge_safe.evaluation.speed.samples import interleave

PROCESSES_PER_RUN = 3
_PAIRS = 2  # answers of each in one process


def measure_gate_cost(
    bundle: Path,
    ungated: Path,
    tokens: int,
    count: int,
    threads: int | None,
    provider: str | None,
    number: int,
) -> dict[str, float]:
    """Lets both answer in turn, in a fresh process.

    Args:
        bundle: The bundle.
        ungated: The same model without its gate.
        tokens: Length of the prompt.
        count: Length of the answers.
        threads: Threads inside one operator; None lets ONNX Runtime choose.
        provider: What to run on; None takes what the bundle's target names.
        number: Of this process; what is loaded first may fare better, so they take turns there.

    Returns:
        Its medians of ``gated_answer_ms``, ``ungated_answer_ms`` and, pair by pair,
        ``gate_cost_ratio``.

    Raises:
        BundleError: One of them cannot be loaded or run; the message is the process's.
    """
    first = ("gated", "ungated")[number % 2]
    values = [bundle, ungated, tokens, count, first, threads or 0, provider or ""]
    module = "edge_safe.evaluation.speed.gate_cost"
    return run_fresh(module, values, f"{bundle} could not answer in a process of its own")


def main(
    bundle: str,
    ungated: str,
    tokens: int,
    count: int,
    first: str,
    threads: int | None,
    provider: str | None,
) -> dict[str, float]:
    """Compares both in this process; see ``measure_gate_cost``."""
    folders = {"gated": Path(bundle), "ungated": Path(ungated)}
    order = sorted(folders, key=lambda name: name != first)
    models = {name: load_forgetful(folders[name], threads, provider) for name in order}
    ids = plain_ids(models["gated"], tokens)
    answers = [Answers(models[name]).whole(f"{name}_answer_ms", ids, count) for name in order]
    samples = interleave(answers, _PAIRS)
    samples.divide("gate_cost_ratio", "gated_answer_ms", "ungated_answer_ms")
    return samples.medians()


if __name__ == "__main__":
    bundle, ungated, tokens, count, first, threads, provider = sys.argv[1:]
    found = main(
        bundle, ungated, int(tokens), int(count), first, int(threads) or None, provider or None
    )
    sys.stdout.write(json.dumps(found) + "\n")
