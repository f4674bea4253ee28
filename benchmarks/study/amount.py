"""Whether the data or the model is the limit: fewer harmful rows, and one source of them less."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.study.figures import FPR, LEAST, labels, over_seeds, percent, rates, shown
from benchmarks.study.lab import Array, Lab
from benchmarks.study.report import Row, bars
from benchmarks.study.rows import PLAIN, way_of
from benchmarks.study.states import BorrowingCache
from edge_safe.evaluation import metrics
from edge_safe.models import base_model
from edge_safe.models.examples import Encoded
from edge_safe.models.safety_head import SafetyModule

NAME = "amount"
TITLE = "Amount of data: harmful rows, and sources left out"
SETTINGS = ("amount_seeds", "amount_depths")

SHARES = {"1/8": 0.125, "1/4": 0.25, "1/2": 0.5, "all": 1.0}
# What passes of a source, by the name it has in the picture.
PASSED = {
    "unseen": "left out: all its rows",
    "held_without": "left out: its validation rows",
    "held_with": "not left out: its validation rows",
}
MISSING = {"mean": 0.0, "low": 0.0, "high": 0.0}


def answer(lab: Lab) -> dict[str, Any]:
    """Rates on plain requests by the share of harmful rows, and what passes of a new source."""
    count = base_model.text_layers(lab.model)
    depths = (k for k in lab.options.amount_depths if 1 <= k < count)
    layers = tuple(sorted({lab.layer, *depths}))
    tests = {name: _plain(examples) for name, examples in lab.tests.items()}
    tested = [e for examples in tests.values() for e in examples]
    cache = lab.states(layers, [*lab.train_set, *tested])
    sources: dict[str, set[str]] = {}
    for example in lab.train_set:
        if example.unsafe:
            rows = sources.setdefault(example.source.split(":")[-1], set())
            rows.add(lab.requests[example.prompts])
    harmful = sorted(set().union(*sources.values()))
    seeds = range(lab.options.amount_seeds)

    def trained(seed: int, left: Collection[str]) -> SafetyModule:
        return lab.heads("together", seed, layers, cache, without(lab, left))

    def tested_rates(safety: SafetyModule) -> dict[str, Any]:
        reads = {test: lab.read(safety, cache, own) for test, own in tests.items()}
        return {
            str(k): {t: rates(labels(tests[t]), r.verdicts[k]) or {} for t, r in reads.items()}
            for k in layers
        }

    shares = {}
    for name, share in SHARES.items():
        kept = round(share * len(harmful))
        found = [tested_rates(trained(s, _shuffled(harmful, s)[kept:])) for s in seeds]
        shares[name] = {"harmful_rows": kept, "depths": over_seeds(found)}
    left_out = {}
    for source, rows in sorted(sources.items()):
        own = _Source(source, lab.train_set, tests["validation"])
        if len(own.seen) + len(own.held) >= LEAST and len(rows) < len(harmful):
            found = []
            for seed in seeds:
                less = trained(seed, rows)
                passed = own.passed(lab, cache, less, trained(seed, ()))
                found.append({"depths": tested_rates(less), "passed": passed})
            left_out[source] = {
                "harmful_rows": len(harmful) - len(rows),
                "tested": {"unseen": len(own.seen) + len(own.held), "held": len(own.held)},
                **over_seeds(found),
            }
    return {"layer": lab.layer, "shares": shares, "left_out": left_out}


def without(lab: Lab, rows: Collection[str]) -> list[Encoded]:
    """Training examples that were made of none of these rows."""
    return [
        e for e in lab.train_set if not any(r in rows for r in lab.requests[e.prompts].split("+"))
    ]


class _Source:
    """Plain harmful rows of a source, and the harmless ones that give the threshold."""

    def __init__(self, name: str, train: Sequence[Encoded], held: Sequence[Encoded]) -> None:
        self.seen = [e for e in train if e.unsafe and e.source == name]
        self.held = [e for e in held if e.unsafe and e.source == name]
        self.harmless = [e for e in held if not e.unsafe]

    def passed(
        self, lab: Lab, cache: BorrowingCache, less: SafetyModule, whole: SafetyModule
    ) -> dict[str, float]:
        """Shares that pass the gate trained without the source and the one trained with it."""

        def passes(safety: SafetyModule, examples: list[Encoded]) -> Array:
            read = lab.read(safety, cache, [*self.harmless, *examples]).verdicts[lab.layer]
            count = len(self.harmless)
            threshold = metrics.threshold_at_fpr(read[:count], FPR)
            return (read[count:] < threshold).astype(np.float64)

        found = {"unseen": float(passes(less, [*self.seen, *self.held]).mean())}
        if self.held:
            found["held_without"] = float(passes(less, self.held).mean())
            found["held_with"] = float(passes(whole, self.held).mean())
        return found


def _plain(examples: Sequence[Encoded]) -> list[Encoded]:
    return [e for e in examples if way_of(e.source) == PLAIN]


def _shuffled(rows: Sequence[str], seed: int) -> list[str]:
    """The rows in an order of the seed's own, so that a smaller share is part of a larger one."""
    order = list(rows)
    random.Random(f"amount {seed}").shuffle(order)
    return order


def rows(found: dict[str, Any]) -> list[Row]:
    """A line a share and depth, then a line a source that is left out."""
    named = {f"{name} of the harmful rows": values for name, values in found["shares"].items()}
    named |= {f"all but {source}": values for source, values in found["left_out"].items()}
    return [
        {
            "trained on": title,
            "harmful rows": str(values["harmful_rows"]),
            "layer": layer,
            **_rates(tests),
            **_passed(values if int(layer) == found["layer"] else {}),
        }
        for title, values in named.items()
        for layer, tests in values["depths"].items()
    ]


def _rates(tests: Mapping[str, Any]) -> Row:
    row = {}
    for test, values in tests.items():
        row[f"AUROC ({test})"] = shown(values.get("auroc"))
        row[f"ASR at FPR 2 % ({test})"] = percent(values.get("asr"))
    return row


def _passed(values: Mapping[str, Any]) -> Row:
    passed, tested = values.get("passed", {}), values.get("tested", {})
    unseen, held, known = (percent(passed.get(name)) for name in PASSED)
    return {
        "the source's rows that pass": f"{unseen} of {tested['unseen']}" if tested else "-",
        "validation rows alone": f"{held} of {tested['held']}" if tested else "-",
        "these, source not left out": known,
    }


def draw(found: dict[str, Any], figure: Figure) -> None:
    """AUROC and ASR over the number of harmful rows, and what passes of sources left out."""
    axes = figure.subplots(1, 3, width_ratios=(1.0, 1.0, 1.3))
    shares = list(found["shares"].values())
    for axis, key, label in ((axes[0], "auroc", "AUROC"), (axes[1], "asr", "ASR at FPR 2 %")):
        for layer, tests in shares[0]["depths"].items():
            for test in (t for t, values in tests.items() if values):
                points = [values["depths"][layer][test][key] for values in shares]
                means, lows, highs = (
                    np.array([p[name] for p in points]) for name in ("mean", "low", "high")
                )
                spread = np.maximum([means - lows, highs - means], 0.0)
                counts = [values["harmful_rows"] for values in shares]
                axis.errorbar(
                    counts, means, spread, marker="o", capsize=2, label=f"{test}, layer {layer}"
                )
        axis.set_xscale("log", base=2)
        axis.set_xticks(counts, [str(count) for count in counts])
        axis.minorticks_off()
        axis.set(xlabel="harmful rows", ylabel=label)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize="small")
    sources = found["left_out"]
    if sources:
        series = {
            title: [values["passed"].get(name, MISSING) for values in sources.values()]
            for name, title in PASSED.items()
        }
        bars(axes[2], list(sources), series, bottom=0.0)
        axes[2].tick_params(axis="x", rotation=20)
        figure.legend(*axes[2].get_legend_handles_labels(), loc="outside lower right", ncols=3)
    axes[2].set(ylabel="passed at FPR 2 %")
