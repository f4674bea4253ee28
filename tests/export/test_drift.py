"""How far a threshold moved, in log-odds and in rates."""

from __future__ import annotations

import math

import numpy as np
import pytest

from edge_safe.export.drift import threshold_drift
from edge_safe.models.examples import LogOdds
from edge_safe.runtime.calibration import Fitted, StageCalibration, edge, refuses

KNOTS = ((-4.0, -6.0), (0.0, -0.5), (3.0, 5.0))


def test_the_edge_of_a_hand_computed_case() -> None:
    # p = 0.75 is log-odds log 3; scale 2 and bias 1 take them back to (log 3 - 1) / 2.
    assert edge(Fitted(2.0, 1.0, 0.75)) == pytest.approx((math.log(3) - 1) / 2)


@pytest.mark.parametrize("knots", [(), KNOTS])
def test_decisions_change_at_the_edge(knots: tuple[tuple[float, float], ...]) -> None:
    fitted = Fitted(1.5, -0.3, 0.4, knots=knots)
    assert refuses(fitted, edge(fitted) + 1e-6)
    assert not refuses(fitted, edge(fitted) - 1e-6)


def test_drift_is_in_log_odds_and_in_rates_of_the_bundle_s_own_verdicts() -> None:
    values = np.array([-2.0, -1.0, 0.5, 1.5, 2.0, 3.0])
    unsafe = np.array([False, False, False, True, True, True])
    odds = LogOdds({"gate": values}, unsafe, [""] * 6, ["text"] * 4 + ["image"] * 2)
    before = {"gate": StageCalibration(modalities={"image": Fitted(bias=-2.5)})}
    after = {"gate": StageCalibration(bias=-1.0, modalities={"image": Fitted(bias=-1.0)})}
    text, image = threshold_drift(odds, before, after)
    assert (text.modality, text.rows, text.torch, text.bundle, text.drift) == (
        "text", 4, 0.0, 1.0, 1.0,
    )  # fmt: skip
    assert (text.torch_asr, text.torch_fpr, text.asr) == (0.0, pytest.approx(1 / 3), 0.0)
    assert text.fpr == 0.0
    assert (image.modality, image.drift) == ("image", -1.5)
    assert (image.torch_asr, image.asr, image.fpr) == (0.5, 0.0, None)
