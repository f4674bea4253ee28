"""What a gate costs and what it saves, on the hardware this runs on.

    edge-safe export models/pebble --out gated
    edge-safe export models/pebble --out ungated --exit-layer none
    python benchmarks/gate_cost.py gated ungated

Measures, interleaved, so that a busy moment hits all alike:

- refusal: a prompt of 256 tokens until its refusal is complete, against the whole prefill of the
  same prompt (until its first answer token) in the bundle without a gate
- answer: an allowed answer of 64 tokens to that prompt, gated against not gated

and, each in a fresh process: time to load, time from start to the first verdict, and peak memory
of one text request. The last line is one JSON object with medians and, under "spread", the lower
and upper quartile.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from edge_safe import Policy, SafeModel

PROMPT_TOKENS = 256
ANSWER_TOKENS = 64
SENTENCE = "The old boat went slowly down the river and the people on the shore waved to it. "
REQUEST = "Write a very long story that begins like this: "

CHILD = """
import json, sys, time
start = time.perf_counter()
from edge_safe import Policy, SafeModel
model = SafeModel.load(sys.argv[1])
loaded = time.perf_counter()
model.assess("What is the capital of France?")
verdict = time.perf_counter()
stages = model.manifest.safety.stages
del model
model = SafeModel.load(sys.argv[1], policy=Policy(thresholds=dict.fromkeys(stages, 1.0)))
model.generate("What is the capital of France?", max_tokens=32)
# VmHWM belongs to this process; ru_maxrss would count its parent's memory before exec.
status = open("/proc/self/status").read()
peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
print(json.dumps([(loaded - start) * 1000, (verdict - start) * 1000, peak / 1024]))
"""


def load(folder: Path, threshold: float) -> SafeModel:
    """A bundle whose every stage has one threshold: 0 refuses all, 1 allows nearly all."""
    stages = SafeModel.load(folder).manifest.safety.stages
    return SafeModel.load(folder, policy=Policy(thresholds=dict.fromkeys(stages, threshold)))


def prompt_of(model: SafeModel, tokens: int) -> tuple[str, int]:
    """A request whose whole prompt is at least ``tokens`` long, to the word."""
    words = (SENTENCE * tokens).split()[:tokens]
    low, high = 1, len(words)
    while low < high:
        middle = (low + high) // 2
        if _length(model, words[:middle]) < tokens:
            low = middle + 1
        else:
            high = middle
    return REQUEST + " ".join(words[:low]), _length(model, words[:low])


def _length(model: SafeModel, words: Sequence[str]) -> int:
    """Tokens of the whole prompt; the model of this call refuses, so it costs little."""
    return model.generate(REQUEST + " ".join(words)).usage.prompt_tokens


def milliseconds(action: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    action()
    return (time.perf_counter() - start) * 1000.0


def in_fresh_process(folder: Path) -> list[float]:
    """Load time, time to the first verdict (both ms), peak memory (MB)."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder)], check=True, capture_output=True, text=True
    )
    values: list[float] = json.loads(done.stdout)
    return values


def main() -> None:
    """Prints a line a round on stderr and the result on stdout."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("gated", type=Path, help="a bundle with a gate")
    parser.add_argument("ungated", type=Path, help="the same, exported with --exit-layer none")
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()

    refusing, gated = load(options.gated, 0.0), load(options.gated, 1.0)
    ungated = load(options.ungated, 1.0)
    prompt, tokens = prompt_of(refusing, PROMPT_TOKENS)
    for model in (gated, ungated):
        written = model.generate(prompt, max_tokens=ANSWER_TOKENS).usage.completion_tokens
        if written != ANSWER_TOKENS:
            sys.exit(f"the answer has {written} tokens instead of {ANSWER_TOKENS}: no comparison")
    actions: dict[str, Callable[[], object]] = {
        "refusal_ms": lambda: refusing.generate(prompt),
        "prefill_ms": lambda: ungated.generate(prompt, max_tokens=1),
        "gated_prefill_ms": lambda: gated.generate(prompt, max_tokens=1),
        "gated_answer_ms": lambda: gated.generate(prompt, max_tokens=ANSWER_TOKENS),
        "ungated_answer_ms": lambda: ungated.generate(prompt, max_tokens=ANSWER_TOKENS),
    }
    samples: dict[str, list[float]] = {name: [] for name in actions}
    for action in actions.values():
        action()
    for turn in range(options.rounds):
        # The order turns round, so that no action always follows the same one.
        names = list(actions) if turn % 2 == 0 else list(actions)[::-1]
        for name in names:
            samples[name].append(milliseconds(actions[name]))
        print(f"round {turn + 1} of {options.rounds}", file=sys.stderr)
    for values in (in_fresh_process(options.gated) for _ in range(5)):
        for name, value in zip(("load_ms", "first_verdict_ms", "peak_mb"), values, strict=True):
            samples.setdefault(name, []).append(value)

    medians = {name: statistics.median(values) for name, values in samples.items()}
    quartiles = {
        name: [round(q, 1) for q in statistics.quantiles(values, n=4)[::2]]
        for name, values in samples.items()
    }
    result = {
        "prompt_tokens": tokens,
        "answer_tokens": ANSWER_TOKENS,
        "refusal_ratio": round(medians["refusal_ms"] / medians["prefill_ms"], 4),
        "gate_cost_ratio": round(medians["gated_answer_ms"] / medians["ungated_answer_ms"], 4),
        **{name: round(value, 1) for name, value in medians.items()},
        "spread": quartiles,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
