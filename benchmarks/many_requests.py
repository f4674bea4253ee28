"""How many verdicts a second, many at once beside one by one.

    python benchmarks/many_requests.py BUNDLE [--requests 10000] [--rounds 10]
        [--data prompts.jsonl | --words N]

With --data the prompts of a file, over and over, so that lengths are mixed as people's are.
Otherwise harmless prompts of made-up words, half of them short commands, the others up to 400
words; with --words all have that many words: several calls give the curve over the length. Each has
a system text of its own first, so that no two begin alike and nothing kept can be used again.
Both ways take turns in processes of their own, a round each on the same requests, every other round
the other way first: ``SafeModel.assess`` on a model whose operators use all cores, and
``assess_many`` on one that gives each run one thread, as ``edge-safe classify`` does. The last line
is one JSON object:

- requests, tokens: how much was judged, each way
- one_by_one, many: requests a second, median over rounds, with quartiles
- ratio: of the two, round by round, with quartiles
- agreement: share of the same decisions; max_p_difference: largest change of p_unsafe
- peak_memory_mb: largest memory of each process
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import random
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from edge_safe import SafeModel
from edge_safe.evaluation.rows import read_rows
from edge_safe.evaluation.speed.requests import load_forgetful
from edge_safe.evaluation.speed.samples import quartiles
from edge_safe.export.footprint import peak_memory_mb
from edge_safe.runtime.batch import AssessRequest
from edge_safe.runtime.cores import available_cores
from edge_safe.runtime.verdict import Verdict

SYLLABLES = [first + second for first in "bdklm" for second in "aeiou"]
SHORT_WORDS, LONG_WORDS, SYSTEM_WORDS = 20, 400, 4


def made_up_text(chance: random.Random, words: int) -> str:
    """Words that nobody has said."""
    return " ".join(
        "".join(chance.choices(SYLLABLES, k=chance.randint(1, 3))) for _ in range(words)
    )


def made_up(count: int, context: int, length: int | None = None) -> list[AssessRequest]:
    """Requests that fit a context, of mixed length or of one; the same at every call."""
    chance = random.Random(0)
    # A made-up word may take six tokens, of a tokenizer that knows single characters alone.
    most = [min(words, context // 12) for words in (SHORT_WORDS, LONG_WORDS)]
    return [
        AssessRequest(
            made_up_text(chance, length or chance.randint(3, most[number % 2])),
            system=made_up_text(chance, SYSTEM_WORDS),
        )
        for number in range(count)
    ]


def taken(count: int, prompts: list[str]) -> list[AssessRequest]:
    """Requests with given prompts, shuffled, each behind a system text of its own."""
    chance = random.Random(0)
    found = [
        AssessRequest(prompts[number % len(prompts)], system=made_up_text(chance, SYSTEM_WORDS))
        for number in range(count)
    ]
    chance.shuffle(found)
    return found


@functools.cache
def opened(bundle: Path, threads: int) -> SafeModel:
    """The bundle, once in each process."""
    return load_forgetful(bundle, threads=threads)


@dataclass(frozen=True, slots=True)
class Round:
    """What came of some requests: verdicts, seconds, and the process's largest memory so far."""

    verdicts: list[Verdict]
    seconds: float
    peak_mb: float


def one_by_one(bundle: Path, cores: int, part: list[AssessRequest]) -> Round:
    """Judges each by itself, on all cores."""
    model = opened(bundle, cores)
    start = time.perf_counter()
    verdicts = [model.assess(one.prompt, system=one.system) for one in part]
    return Round(verdicts, time.perf_counter() - start, peak_memory_mb())


def many(bundle: Path, cores: int, part: list[AssessRequest]) -> Round:
    """Judges all, several runs side by side, each on one core."""
    model = opened(bundle, 1)
    start = time.perf_counter()
    verdicts = [found.verdict for found in model.assess_many(part, workers=cores)]
    return Round(verdicts, time.perf_counter() - start, peak_memory_mb())


def main() -> None:
    """Judges everything twice."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=10)
    lengths = parser.add_mutually_exclusive_group()
    lengths.add_argument("--words", type=int)
    lengths.add_argument("--data", type=Path, help="JSON lines with a field 'prompt'")
    options = parser.parse_args()
    cores = available_cores()
    model = opened(options.bundle, 1)
    context = model.manifest.model.context_length
    if options.data is None:
        requests = made_up(options.requests, context, options.words)
    else:
        requests = taken(
            options.requests, [row.prompt for row in read_rows(options.data, labelled=False)]
        )
    size = -(-len(requests) // options.rounds)
    rates: dict[str, list[float]] = {"one_by_one": [], "many": [], "ratio": []}
    peaks: dict[str, float] = {}
    same, change = 0, 0.0
    apart = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(1, mp_context=apart) as first,
        ProcessPoolExecutor(1, mp_context=apart) as second,
    ):

        def judge(name: str, part: list[AssessRequest]) -> Round:
            pool, way = (first, one_by_one) if name == "one_by_one" else (second, many)
            return pool.submit(way, options.bundle, cores, part).result()

        ways = ["one_by_one", "many"]
        for name in ways:
            judge(name, requests[:20])
        for number in range(options.rounds):
            part = requests[number * size : (number + 1) * size]
            if not part:
                break
            found: dict[str, Round] = {}
            for name in ways if number % 2 else reversed(ways):
                found[name] = judge(name, part)
                rates[name].append(len(part) / found[name].seconds)
                peaks[name] = found[name].peak_mb
            rates["ratio"].append(rates["many"][-1] / rates["one_by_one"][-1])
            for one, other in zip(
                found["one_by_one"].verdicts, found["many"].verdicts, strict=True
            ):
                same += one.decision is other.decision
                change = max(change, abs(one.p_unsafe - other.p_unsafe))
            print(
                f"round {number + 1}: one by one {rates['one_by_one'][-1]:.1f}/s, "
                f"many {rates['many'][-1]:.1f}/s",
                flush=True,
            )
    document = {
        "requests": len(requests),
        "tokens": sum(len(model.prompt_ids(one.prompt, system=one.system)) for one in requests),
        **{name: statistics.median(values) for name, values in rates.items()},
        "spread": {name: quartiles(values) for name, values in rates.items()},
        "agreement": same / len(requests),
        "max_p_difference": change,
        "peak_memory_mb": peaks,
    }
    print(json.dumps(document))


if __name__ == "__main__":
    main()
