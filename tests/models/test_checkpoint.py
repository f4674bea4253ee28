"""The checkpoint folder: a round trip, typed, and whole or not at all; calibration in it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
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


def test_the_best_layer_is_the_gate_with_the_best_auroc() -> None:
    fitted = calibrate(odds(), 0.05, "made-up rows")
    assert best_layer(fitted) == 3
    assert best_layer({"final": fitted["final"]}) is None


def test_refusals_are_counted_by_kind_of_row() -> None:
    fitted = calibrate(odds(), 0.05, "made-up rows")
    found = refused_by_source(odds(), "gate.3", fitted["gate.3"])
    assert found["b (safe)"]["rows"] == 300
    assert found["split (unsafe)"]["refused"] == pytest.approx(1 - fitted["gate.3"].asr, abs=1e-4)
