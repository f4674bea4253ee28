"""The checkpoint folder: a round trip, typed, and whole or not at all; calibration in it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from transformers import AutoModelForCausalLM, AutoTokenizer

from edge_safe.errors import CheckpointError
from edge_safe.models.base_model import BaseModel
from edge_safe.models.calibration import best_layer, calibrate, refused_by_source
from edge_safe.models.checkpoint import write_checkpoint
from edge_safe.models.control_tokens import ControlTokens
from edge_safe.models.examples import LogOdds
from edge_safe.models.safety_file import SafetyFile, describe, read_safety, read_safety_file
from edge_safe.models.safety_head import SafetyConfig, SafetyModule

Gated = tuple[BaseModel, ControlTokens]


def odds() -> LogOdds:
    chance = np.random.default_rng(0)
    unsafe = np.arange(400) % 4 == 0
    noise = chance.normal(size=400)
    stages = {"gate.1": noise + 2 * unsafe, "gate.3": noise + 4 * unsafe, "final": noise + unsafe}
    return LogOdds(stages, unsafe, ["split:a" if u else "b" for u in unsafe])


def write(gated: Gated, out: Path, **tensors: float) -> tuple[SafetyModule, SafetyFile]:
    base, tokens = gated
    torch.manual_seed(1)
    safety = SafetyModule(SafetyConfig(32, (1, 3), 2, 4, 4))
    file = describe(safety.config, tokens, 3, calibrate(odds(), 0.05, "made-up rows"))
    write_checkpoint(out, base.model, base.tokenizer, safety, file)
    return safety, file


def test_a_checkpoint_comes_back_as_it_was(gated: Gated, tmp_path: Path) -> None:
    out = tmp_path / "out"
    safety, file = write(gated, out)
    again, module = read_safety(out)
    assert again == file
    state = module.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in safety.state_dict().items())


def test_heads_that_were_joined_come_back_joined(gated: Gated, tmp_path: Path) -> None:
    base, tokens = gated
    safety = SafetyModule(SafetyConfig(32, (1, 3), 2, 4, 4))
    safety.join((1, 3))
    file = describe(safety.config, tokens, 3, calibrate(odds(), 0.05, "made-up rows"))
    write_checkpoint(tmp_path / "out", base.model, base.tokenizer, safety, file)
    assert read_safety(tmp_path / "out")[1].layers_at(3) == (1, 3)


def test_it_is_an_ordinary_hugging_face_folder(gated: Gated, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(gated, out)
    ids = torch.tensor([[5, 6, 7]])
    model = AutoModelForCausalLM.from_pretrained(out)
    torch.testing.assert_close(model(ids).logits, gated[0].model(ids).logits)
    assert AutoTokenizer.from_pretrained(out).convert_tokens_to_ids("<|safe|>") == 3
    assert "<|safe|>" in (out / "chat_template.jinja").read_text()


def test_a_model_that_can_writes_its_small_form(gated: Gated, tmp_path: Path) -> None:
    base, _ = gated
    base.model.save_trained = lambda folder: (folder / "small.bin").write_text("s")
    out = tmp_path / "out"
    write(gated, out)
    assert {p.name for p in out.iterdir()} == {"small.bin", "safety.json", "safety.safetensors"}


def test_files_of_an_earlier_checkpoint_stay(gated: Gated, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(gated, out)
    (out / "README.md").write_text("card")
    write(gated, out)
    assert (out / "README.md").read_text() == "card"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_failed_write_leaves_the_old_checkpoint(gated: Gated, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(gated, out)
    before = (out / "safety.json").read_bytes()

    def full(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    gated[0].model.save_trained = full
    with pytest.raises(CheckpointError, match="No space left"):
        write(gated, out)
    assert (out / "safety.json").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"schema_version": 2}, "Update edge-safe"),
        ({"colour": "red"}, "colour"),
        ({"layers": "all"}, "layers"),
    ],
)
def test_a_file_of_another_schema_is_an_error(
    gated: Gated, tmp_path: Path, change: dict[str, object], what: str
) -> None:
    out = tmp_path / "out"
    write(gated, out)
    content = json.loads((out / "safety.json").read_text()) | change
    (out / "safety.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=what):
        read_safety_file(out)


def test_a_folder_without_a_safety_module_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="Train a safety module first"):
        read_safety(tmp_path)


def test_tensors_that_do_not_fit_are_an_error(gated: Gated, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(gated, out)
    content = json.loads((out / "safety.json").read_text()) | {"layers": [1, 2]}
    (out / "safety.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="does not fit"):
        read_safety(out)


def test_a_stage_without_calibration_lists_the_others(gated: Gated, tmp_path: Path) -> None:
    _, file = write(gated, tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"gate\.1, gate\.3, final"):
        file.stage("gate.2")


def test_the_threshold_keeps_the_target_on_the_rows_it_was_fitted_on() -> None:
    fitted = calibrate(odds(), 0.05, "made-up rows")
    gate = fitted["gate.3"]
    p_unsafe = 1 / (1 + np.exp(-(gate.scale * odds().stages["gate.3"] + gate.bias)))
    refused = p_unsafe >= gate.threshold
    assert refused[~odds().unsafe].mean() == pytest.approx(gate.fpr)
    assert gate.fpr == pytest.approx(0.05, abs=0.004)
    assert (~refused[odds().unsafe]).mean() == pytest.approx(gate.asr)


def with_pictures(pictures: int = 200) -> LogOdds:
    """Every second row came as a picture, on which the log-odds are lower by 3."""
    plain = odds()
    modalities = ["image" if i % 2 and i < 2 * pictures else "text" for i in range(400)]
    shift = np.array([3.0 if name == "image" else 0.0 for name in modalities])
    # Rows of an odd number are all safe in ``odds``; here every fourth of them is not.
    unsafe = plain.unsafe | (np.arange(400) % 8 == 1)
    stages = {"gate.3": plain.stages["gate.3"] + 4 * (unsafe ^ plain.unsafe) - shift}
    return LogOdds(stages, unsafe, plain.sources, modalities)


def test_each_way_in_is_calibrated_on_its_own_rows() -> None:
    rows = with_pictures()
    gate = calibrate(rows, 0.05, "made-up rows")["gate.3"]
    image = gate.of("image")
    assert (gate.rows, image.rows, gate.of("audio")) == (200, 200, gate)
    pictures = np.arange(400) % 2 == 1
    for calibration, own in ((gate, ~pictures), (image, pictures)):
        refused = calibration.p_unsafe(rows.stages["gate.3"]) >= calibration.threshold
        assert refused[own & ~rows.unsafe].mean() == pytest.approx(calibration.fpr)
        assert (~refused)[own & rows.unsafe].mean() == pytest.approx(calibration.asr)
    # The threshold lies where the log-odds of pictures lie.
    assert image.bias - gate.bias == pytest.approx(3.0 * gate.scale, rel=0.4)


def test_a_way_in_with_few_rows_uses_the_stage_s_own_calibration() -> None:
    gate = calibrate(with_pictures(pictures=100), 0.05, "made-up rows")["gate.3"]
    assert gate.modalities == {}


def test_text_is_calibrated_on_requests_as_they_come() -> None:
    rows = odds()
    wrapped = LogOdds(
        {stage: np.r_[values, values + 9.0] for stage, values in rows.stages.items()},
        np.r_[rows.unsafe, rows.unsafe],
        ["plain"] * 400 + ["wrapped:plain"] * 400,
    )
    plain = LogOdds(rows.stages, rows.unsafe, ["plain"] * 400)
    assert calibrate(wrapped, 0.05, "rows")["gate.3"] == calibrate(plain, 0.05, "rows")["gate.3"]


def test_contrasts_do_not_move_the_thresholds_of_pictures() -> None:
    rows = with_pictures()
    hard = LogOdds(
        {stage: np.r_[values, values + 9.0] for stage, values in rows.stages.items()},
        np.r_[rows.unsafe, rows.unsafe],
        ["picture:files"] * 400 + ["picture:contrast:drugs"] * 400,
        rows.modalities * 2,
    )
    own = calibrate(rows, 0.05, "rows")["gate.3"].of("image")
    assert calibrate(hard, 0.05, "rows")["gate.3"].of("image") == own


def test_pictures_may_have_a_target_of_their_own() -> None:
    gate = calibrate(with_pictures(), 0.05, "rows", media_target_fpr=0.2)["gate.3"]
    assert (gate.target_fpr, gate.of("image").target_fpr) == (0.05, 0.2)
    assert gate.fpr <= 0.05 < gate.of("image").fpr <= 0.2


def test_a_calibration_states_its_target_method_and_intervals() -> None:
    gate = calibrate(odds(), 0.05, "made-up rows", method="isotonic")["gate.3"]
    assert (gate.method, gate.target_fpr) == ("isotonic", 0.05)
    expected = binomtest(round(gate.fpr * 300), 300).proportion_ci(0.95, method="exact")
    assert gate.fpr_interval == pytest.approx((expected.low, expected.high))
    for value, (low, high) in (
        (gate.asr, gate.asr_interval),
        (gate.fpr, gate.fpr_interval),
        (gate.auroc, gate.auroc_interval),
    ):
        assert low < value < high


def test_every_method_comes_back_from_the_file(gated: Gated, tmp_path: Path) -> None:
    base, tokens = gated
    safety = SafetyModule(SafetyConfig(32, (3,), 2, 4, 4))
    fitted = calibrate(with_pictures(), 0.05, "made-up rows", method="isotonic")
    file = describe(safety.config, tokens, 3, fitted)
    write_checkpoint(tmp_path / "out", base.model, base.tokenizer, safety, file)
    assert read_safety_file(tmp_path / "out") == file
    assert file.stage("gate.3").of("image").knots


def test_a_file_from_before_modalities_still_opens(gated: Gated, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(gated, out)
    content = json.loads((out / "safety.json").read_text())
    old = ("scale", "bias", "threshold", "fitted_on", "rows", "auroc", "asr", "fpr")
    for stage, fit in content["calibration"].items():
        content["calibration"][stage] = {name: fit[name] for name in old}
    (out / "safety.json").write_text(json.dumps(content))
    gate = read_safety_file(out).stage("gate.3")
    assert (gate.method, gate.modalities, gate.of("image")) == ("platt", {}, gate)


def test_the_best_layer_is_the_gate_with_the_best_auroc() -> None:
    fitted = calibrate(odds(), 0.05, "made-up rows")
    assert best_layer(fitted) == 3
    assert best_layer({"final": fitted["final"]}) is None


def test_refusals_are_counted_by_each_way_in_s_own_threshold() -> None:
    rows = with_pictures()
    gate = calibrate(rows, 0.05, "made-up rows")["gate.3"]
    found = refused_by_source(rows, "gate.3", gate)["b (safe)"]
    # 100 texts and 150 pictures are safe.
    shares = [gate.fpr * 100, gate.of("image").fpr * 150]
    assert found["refused"] * found["rows"] == pytest.approx(sum(shares), abs=0.05)


def test_refusals_are_counted_by_kind_of_row() -> None:
    fitted = calibrate(odds(), 0.05, "made-up rows")
    found = refused_by_source(odds(), "gate.3", fitted["gate.3"])
    assert found["b (safe)"]["rows"] == 300
    assert found["split (unsafe)"]["refused"] == pytest.approx(1 - fitted["gate.3"].asr, abs=1e-4)
