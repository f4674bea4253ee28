"""Two thresholds that are fitted together."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_safe.errors import RecipeError
from edge_safe.models.calibration import calibrate
from edge_safe.models.early_exit import fit_early_exit
from edge_safe.models.examples import LogOdds
from edge_safe.models.recipe import parse_recipe

STAGES = ("gate.1", "gate.3")


def odds(seed: int = 0, lower: float = 2.0, upper: float = 4.0, rows: int = 400) -> LogOdds:
    chance = np.random.default_rng(seed)
    unsafe = np.arange(rows) % 3 == 0
    common = chance.normal(size=rows)
    stages = {
        name: common + chance.normal(size=rows) + height * unsafe
        for name, height in zip(STAGES, (lower, upper), strict=True)
    }
    return LogOdds(stages, unsafe, ["b"] * rows)


@given(
    seed=st.integers(0, 50),
    lower=st.floats(0.0, 6.0),
    upper=st.floats(0.5, 6.0),
    target=st.sampled_from([0.0, 0.01, 0.05, 0.3]),
)
def test_the_pair_keeps_the_target_and_lets_no_more_pass_than_the_upper_head_alone(
    seed: int, lower: float, upper: float, target: float
) -> None:
    rows = odds(seed, lower, upper)
    fitted = calibrate(rows, target, "made-up rows")
    pair = fit_early_exit(rows, fitted, 1, STAGES, target)
    early = pair.calibration.p_unsafe(rows.stages[STAGES[0]]) >= pair.calibration.threshold
    gate = pair.gate.p_unsafe(rows.stages[STAGES[1]]) >= pair.gate.threshold
    refused = early | gate
    assert refused[~rows.unsafe].mean() <= target + 1e-9
    assert (~refused)[rows.unsafe].mean() <= fitted[STAGES[1]].asr + 1e-9
    assert pair.gate.fpr == pytest.approx(refused[~rows.unsafe].mean())
    assert pair.gate.asr == pytest.approx((~refused)[rows.unsafe].mean())
    assert pair.calibration.fpr == pytest.approx(early[~rows.unsafe].mean())
    assert pair.calibration.asr == pytest.approx((~early)[rows.unsafe].mean())


def test_a_better_lower_head_ends_more() -> None:
    ended = []
    for height in (0.5, 3.0, 5.0):
        rows = odds(lower=height)
        fitted = calibrate(rows, 0.05, "made-up rows")
        ended.append(1 - fit_early_exit(rows, fitted, 1, STAGES, 0.05).calibration.asr)
    assert ended == sorted(ended)
    assert ended[-1] > ended[0] + 0.2


def test_each_way_in_has_its_own_pair() -> None:
    plain, pictures = odds(1), odds(2)
    rows = LogOdds(
        {name: np.r_[plain.stages[name], pictures.stages[name] - 3] for name in STAGES},
        np.r_[plain.unsafe, pictures.unsafe],
        ["b"] * 800,
        ["text"] * 400 + ["image"] * 400,
    )
    pair = fit_early_exit(rows, calibrate(rows, 0.05, "rows"), 1, STAGES, 0.05, 0.1)
    for part in (pair.calibration, pair.gate):
        assert list(part.modalities) == ["image"]
        assert part.of("image").rows == 400
        assert part.of("image").target_fpr == 0.1


@pytest.mark.parametrize(("early", "exit_layer"), [(2, 3), (3, 3), (1, "auto")])
def test_an_early_layer_that_does_not_fit_is_refused(early: int, exit_layer: int | str) -> None:
    heads = {"layers": [1, 3], "exit_layer": exit_layer, "early_layer": early}
    raw = {"model": {"source": "."}, "heads": heads, "data": {"train": ["a.jsonl"]}}
    with pytest.raises(RecipeError, match=r"heads\.early_layer"):
        parse_recipe(raw)
