"""How fast bundles can load at all: the work of a load on one core, shared out among all.

    python benchmarks/load_floor.py BUNDLE... [--runs 7] [--threads 2]

Files are in memory. Each load is a fresh process and is timed from before `import edge_safe`; loads
on all cores and loads bound to one core take turns. Those on one core open graphs with one thread,
so that none waits for another: shared out without loss, their time divided by the number of cores
is what is left. The last line is one JSON object, for each bundle by name:

- weights_mb: what is hashed
- hash_ms: hashing them alone, on one core, median and quartiles
- import_ms: importing what computes, alone
- load_ms: a load on all cores
- one_core_ms: the same on one core
- floor_ms: one_core_ms divided by the cores
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import track

from edge_safe.evaluation.speed.samples import Samples, quartiles
from edge_safe.runtime.cores import available_cores
from edge_safe.runtime.manifest import load_manifest
from edge_safe.runtime.verified_files import VerifiedFiles

_LOAD = """
from edge_safe import SafeModel
SafeModel.load(sys.argv[1], threads=int(sys.argv[2]), accept_failed=True)
"""
_IMPORT = "import edge_safe.runtime.loading"
_HASH = """
from pathlib import Path
from edge_safe.runtime.digest import sha256_file
start = time.perf_counter()
for name in sys.argv[3:]:
    sha256_file(Path(sys.argv[1], name))
"""


def timed(code: str, arguments: list[str], cores: set[int]) -> float:
    """Milliseconds that some code takes in a fresh process on some cores."""
    script = (
        f"import sys, time\nstart = time.perf_counter()\n{code}\nprint(time.perf_counter() - start)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )
    return float(done.stdout) * 1000.0


def measure(bundle: Path, runs: int, threads: int) -> dict[str, object]:
    """The figures of one bundle; see above."""
    files = VerifiedFiles(bundle, load_manifest(bundle))
    weights = sorted(files.of_graph("decoder"))
    cores = os.sched_getaffinity(0)
    one = {max(cores)}
    alone = [str(bundle), "1"]
    ways = {
        "hash_ms": (_HASH, [*alone, *weights], one),
        "import_ms": (_IMPORT, alone, one),
        "load_ms": (_LOAD, [str(bundle), str(threads)], cores),
        "one_core_ms": (_LOAD, alone, one),
    }
    samples = Samples()
    for turn in track(range(runs + 1), str(bundle), console=Console(stderr=True)):
        order = list(ways.items())
        values = {name: timed(*way) for name, way in (order if turn % 2 else order[::-1])}
        if turn:
            samples.add(values)
    medians = samples.medians()
    return {
        "weights_mb": sum(files.sized(name).stat().st_size for name in weights) / 1e6,
        **{name: [medians[name], *quartiles(samples.values[name])] for name in ways},
        "floor_ms": statistics.median(samples.values["one_core_ms"]) / available_cores(),
    }


def main() -> None:
    """Prints a line for each bundle, and all of them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=available_cores())
    options = parser.parse_args()
    found = {}
    for bundle in options.bundles:
        found[str(bundle)] = one = measure(bundle, options.runs, options.threads)
        print(f"{bundle}: {one}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
