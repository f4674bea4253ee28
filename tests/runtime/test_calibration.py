"""Which calibration a verdict is read through, and what it makes of log-odds."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_safe.errors import GateError, SchemaError
from edge_safe.evaluation import metrics
from edge_safe.models.safety_file import Calibration
from edge_safe.models.safety_file import Fitted as TorchFitted
from edge_safe.runtime.calibration import Fitted, StageCalibration, score, sigmoid, way_in
from edge_safe.runtime.families.base import Media
from edge_safe.runtime.gate import judge
from edge_safe.runtime.manifest import MANIFEST_FILE, load_manifest
from edge_safe.runtime.model import SafeModel
from edge_safe.runtime.policy import Policy
from edge_safe.runtime.verdict import Decision

KNOTS = ((-4.0, -6.0), (-1.0, -0.5), (0.0, -0.25), (3.0, 5.0))


class Senses:
    """Two embeddings for whatever comes in, in place of towers."""

    def media(self, images: Sequence[object], audio: object, deadline: object) -> Media:
        return Media([np.full((2, 64), 0.1, np.float32)], 2 * bool(images), 2 * (audio is not None))


def with_stage(folder: Path, **fields: object) -> None:
    """Changes the gate's calibration in a bundle's manifest."""
    path = folder / MANIFEST_FILE
    data = json.loads(path.read_text())
    data["safety"]["stages"]["gate"].update(fields)
    path.write_text(json.dumps(data))


@pytest.fixture
def folder(own_bundle: Path) -> Path:
    """A bundle that refuses every picture, by the picture's calibration alone."""
    with_stage(
        own_bundle, threshold=1.0, modalities={"image": {"threshold": 0.0}, "audio": {"bias": -99}}
    )
    return own_bundle


def loaded(folder: Path, policy: Policy | None = None) -> SafeModel:
    model = SafeModel.load(folder, threads=1, policy=policy)
    model._requests._family = Senses()
    return model


@given(st.floats(-2000, 2000), st.sampled_from([(), KNOTS]), st.floats(-3, 3))
def test_the_runtime_s_formula_is_the_one_that_was_fitted(
    odds: float, knots: tuple[tuple[float, float], ...], bias: float
) -> None:
    found = sigmoid(score(Fitted(0.7, bias, knots=knots), odds))
    expected = metrics.calibrated(np.array([odds]), 0.7, bias, knots)[0]
    assert found == pytest.approx(expected, rel=1e-12, abs=1e-300)


@given(st.lists(st.floats(-50, 50), min_size=2, max_size=2))
def test_a_curve_never_swaps_two_verdicts(pair: list[float]) -> None:
    fitted = Fitted(1.0, 0.0, knots=KNOTS)
    low, high = sorted(pair)
    assert score(fitted, low) <= score(fitted, high)


def test_log_odds_that_are_infinite_are_an_error_even_where_the_curve_is_level() -> None:
    logits = np.array([[np.inf, 0.0]], np.float32)
    with pytest.raises(GateError):
        judge(logits, Fitted(knots=KNOTS), 0.5, "gate")


def test_everything_that_training_writes_fits_the_manifest() -> None:
    own = (0.5, -1.0, 0.4, "rows", 10, 0.9, 0.1, 0.02)
    rest = ("isotonic", KNOTS, 0.03, (0.8, 0.95), (0.0, 0.2), (0.0, 0.1))
    image = TorchFitted(*own, *rest)
    calibration = Calibration(*own, *rest, modalities={"image": image})
    found = msgspec.convert(msgspec.to_builtins(calibration), StageCalibration)
    assert msgspec.to_builtins(found) == msgspec.to_builtins(calibration)


@pytest.mark.parametrize(
    ("ways", "way"),
    [
        ([], "text"),
        (["text", "text"], "text"),
        (["image", "text"], "image"),
        (["audio", "image", "text"], "audio"),
    ],
)
def test_sound_counts_before_pictures_and_pictures_before_text(ways: list[str], way: str) -> None:
    assert way_in(ways) == way


def test_each_way_in_is_judged_by_its_own_calibration(folder: Path) -> None:
    model = loaded(folder)
    assert model.assess("hello there").decision is Decision.ALLOW
    assert model.assess("hello there", images=["a.png"]).decision is Decision.REFUSE
    heard = model.assess("hello there", images=["a.png"], audio="a.wav")
    assert heard.p_unsafe < 1e-6


def test_a_way_in_without_its_own_uses_the_stage_s(own_bundle: Path) -> None:
    plain = loaded(own_bundle).assess("hello there", images=["a.png"]).p_unsafe
    with_stage(own_bundle, modalities={"audio": {"bias": -99}})
    assert loaded(own_bundle).assess("hello there", images=["a.png"]).p_unsafe == plain


def test_a_policy_s_threshold_wins(folder: Path) -> None:
    model = loaded(folder, Policy(thresholds={"gate": 1.0}))
    assert model.assess("hello there", images=["a.png"]).decision is Decision.ALLOW


def test_a_picture_of_an_earlier_turn_still_counts(folder: Path) -> None:
    model = loaded(folder, Policy(thresholds={"gate": 1.0}))
    chat = model.chat()
    assert chat.send("look", images=["a.png"], max_tokens=1).verdict.decision is Decision.ALLOW
    model._requests.policy = Policy()
    assert chat.send("and now?", max_tokens=1).verdict.decision is Decision.REFUSE


def test_a_refused_picture_counts_until_it_is_forgotten(folder: Path) -> None:
    chat = loaded(folder).chat()
    assert chat.send("look", images=["a.png"], max_tokens=1).verdict.decision is Decision.REFUSE
    assert chat.send("and now?", max_tokens=1).verdict.decision is Decision.REFUSE
    chat.reset()
    assert chat.send("and now?", max_tokens=1).verdict.decision is Decision.ALLOW


@pytest.mark.parametrize(
    "wrong",
    [
        {"knots": [[0.0, 0.0], [1.0, -1.0]]},
        {"modalities": {"audio": {"knots": [[1.0, 0.0], [0.0, 1.0]]}}},
        {"modalities": {"smell": {}}},
        {"modalities": {"image": {"modalities": {}}}},
    ],
)
def test_a_calibration_that_could_swap_verdicts_is_rejected(
    own_bundle: Path, wrong: dict[str, object]
) -> None:
    with_stage(own_bundle, **wrong)
    with pytest.raises(SchemaError, match=r"falls|smell|modalities"):
        load_manifest(own_bundle)


def test_a_bundle_from_before_modalities_still_opens(own_bundle: Path) -> None:
    path = own_bundle / MANIFEST_FILE
    data = json.loads(path.read_text())
    old = ("scale", "bias", "threshold", "fitted_on", "rows", "auroc", "asr", "fpr")
    stages = data["safety"]["stages"]
    for stage, fit in stages.items():
        stages[stage] = {name: fit[name] for name in old}
    del data["safety"]["refitted"]
    path.write_text(json.dumps(data))
    stage = load_manifest(own_bundle).safety.stages["gate"]
    assert (stage.method, stage.knots, stage.of("image")) == ("platt", (), stage)
    assert not math.isnan(loaded(own_bundle).assess("hello there").p_unsafe)
