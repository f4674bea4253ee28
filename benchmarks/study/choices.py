"""What the choices of training are worth: one changed at a time against the recipe."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.study.figures import by_way, labels, over_seeds, percent, shown
from benchmarks.study.heads import CHOICES
from benchmarks.study.lab import Lab
from benchmarks.study.report import Row, dots
from benchmarks.study.rows import PLAIN
from benchmarks.study.states import BorrowingCache
from benchmarks.study.tasks import find_twins
from edge_safe.models.examples import Encoded

NAME = "choices"
TITLE = "Training choices, one changed at a time"
SETTINGS = ("seeds", "choice_seeds")

RECIPE = "the recipe"
MINED = "hard examples twice"
MINED_SHARE = 0.1
WAYS = (PLAIN, "picture", "recording")


def answer(lab: Lab) -> dict[str, Any]:
    """Rates of the recipe and of every choice that differs from it, by set and way in."""
    layer = lab.layer
    cache = lab.states((layer,), [*lab.train_set, *lab.validation_set, *lab.measured])

    def tested(variant: str, seed: int, examples: list[Encoded]) -> dict[str, Any]:
        safety = lab.heads(variant, seed, (layer,), cache, examples)
        found = {}
        for test, own in lab.tests.items():
            ways = by_way(own, lab.read(safety, cache, own).verdicts[layer])
            found[test] = {way: ways[way] for way in WAYS if way in ways}
        return found

    train, few = lab.train_set, range(lab.options.choice_seeds)
    twins = len(find_twins(train, lab.requests))
    choices = {RECIPE: over_seeds([tested("together", s, train) for s in range(lab.options.seeds)])}
    for title, made in CHOICES.items():
        if made.adapted(lab.recipe) != lab.recipe or (made.consistency > 0.0 and twins):
            choices[title] = over_seeds([tested(title, s, train) for s in few])
    choices[MINED] = over_seeds(
        [tested("together", s, [*train, *hardest(lab, cache, s)]) for s in few]
    )
    return {"layer": layer, "examples": len(train), "with_twin": twins, "choices": choices}


def hardest(lab: Lab, cache: BorrowingCache, seed: int) -> list[Encoded]:
    """The training examples with the greatest loss of the verdict after one epoch."""
    safety = lab.heads("one epoch", seed, (lab.layer,), cache)
    odds = lab.read(safety, cache, lab.train_set).verdicts[lab.layer]
    loss = np.logaddexp(0.0, np.where(labels(lab.train_set), -odds, odds))
    count = round(MINED_SHARE * len(loss))
    return [lab.train_set[i] for i in sorted(np.argsort(-loss, kind="stable")[:count].tolist())]


def rows(found: dict[str, Any]) -> list[Row]:
    """A line a choice, a column a set and way in: AUROC and ASR at FPR 2 %."""
    table = []
    for title, tests in found["choices"].items():
        row = {"changed": title}
        for test, ways in tests.items():
            for way, values in ways.items():
                cell = f"{shown(values['auroc'])} / {percent(values['asr'])}"
                row[f"{test}, {way} ({values['rows']} rows)"] = cell
        table.append(row)
    return table


def draw(found: dict[str, Any], figure: Figure) -> None:
    """AUROC and ASR of every choice, a mark a set and way in."""
    choices = found["choices"]
    axes = figure.subplots(1, 2, sharey=True)
    for axis, key, label in ((axes[0], "auroc", "AUROC"), (axes[1], "asr", "ASR at FPR 2 %")):
        series = {
            f"{test}, {way}": [tests[test][way][key] for tests in choices.values()]
            for test, ways in choices[RECIPE].items()
            for way in ways
        }
        dots(axis, list(choices), series)
        axis.set(xlabel=label)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
