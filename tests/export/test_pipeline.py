"""From a checkpoint folder to a bundle, and every way it can be refused."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest

from edge_safe import SafeModel
from edge_safe.errors import CheckpointError, DataError, ExportError, UsageError
from edge_safe.export import ExportReport, export_bundle
from edge_safe.export.bundle_files import hash_source
from edge_safe.runtime.bundle import open_bundle
from edge_safe.runtime.manifest import load_manifest


def report_of(bundle: Path) -> ExportReport:
    return msgspec.json.decode((bundle / "report.json").read_bytes(), type=ExportReport)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A file of labelled prompts."""
    path = tmp_path / "rows.jsonl"
    prompts = [f"Tell me a story about {n} boats and a river." for n in range(12)]
    lines = [
        {"id": n, "prompt": text, "label": "unsafe" if n % 3 == 0 else "safe"}
        for n, text in enumerate(prompts)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def copy(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint that a test may change."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))


def test_report_tells_what_was_done(tiny_bundle: Path) -> None:
    report = report_of(tiny_bundle)
    assert (report.family, report.target, report.precision) == ("llama", "cpu", "fp32")
    assert report.exit_layer == 2
    assert report.parity.passed
    assert report.parity.greedy.agreement == 1
    assert report.parity.verdicts.agreement == 1
    assert report.parity.verdicts.slot_change == 0
    assert {m.kind for m in report.matrices} == {"layers", "embedding"}
    assert set(report.sizes) == {
        "embed_tokens.onnx", "gate.onnx", "decoder.onnx", "weights.onnx.data",
    }  # fmt: skip
    assert {"quantize", "compare with torch"} <= set(report.seconds)


def test_every_boundary_is_compared(tiny_bundle: Path) -> None:
    boundaries = report_of(tiny_bundle).parity.boundaries
    compared = {(b.graph, b.output) for b in boundaries}
    assert {
        ("embed_tokens", "inputs_embeds"),
        ("gate", "hidden_states"),
        ("gate", "verdict_logits"),
        ("gate", "gate_present"),
        ("decoder", "logits"),
        ("decoder", "verdict_logits"),
    } <= compared
    cases = {b.case for b in boundaries}
    assert {"prompt 0", "prompt 0, with past", "padded", "steered safe", "steered unsafe"} <= cases
    assert max(b.relative_difference for b in boundaries) < 1e-4


def test_both_verdicts_are_among_the_compared(tiny_bundle: Path) -> None:
    verdicts = report_of(tiny_bundle).parity.verdicts
    assert verdicts.safe > 0
    assert verdicts.unsafe > 0


def test_manifest_fits_the_checkpoint(tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    manifest = load_manifest(tiny_bundle)
    assert manifest.name == "tiny"
    assert manifest.modalities == {}
    assert manifest.model.layers == 4
    assert manifest.model.eos_token_ids == [2]
    safety = manifest.safety
    assert (safety.exit_layer, safety.layers) == (2, [1, 2])
    assert (safety.safe_token_id, safety.unsafe_token_id) == (3, 4)
    assert set(safety.stages) == {"gate", "final"}
    assert manifest.provenance.source_sha256 == hash_source(tiny_checkpoint)
    assert str(tiny_checkpoint.parent) not in (tiny_bundle / "edge_safe.json").read_text()


def test_all_files_are_named_with_their_hashes(tiny_bundle_int4: Path) -> None:
    open_bundle(tiny_bundle_int4).verify()
    on_disk = {path.name for path in tiny_bundle_int4.iterdir()} - {"edge_safe.json"}
    assert on_disk == set(load_manifest(tiny_bundle_int4).files)


def test_int4_is_smaller_and_says_so(tiny_bundle: Path, tiny_bundle_int4: Path) -> None:
    small, large = report_of(tiny_bundle_int4), report_of(tiny_bundle)
    assert small.sizes["weights.onnx.data"] < 0.4 * large.sizes["weights.onnx.data"]
    assert small.parity.tolerance is None
    assert load_manifest(tiny_bundle_int4).graphs["gate"].precision == "int4"
    assert load_manifest(tiny_bundle_int4).graphs["embed_tokens"].precision == "int8"


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_quantized_bundle_runs(precision: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    export_bundle(tiny_checkpoint, tmp_path / "b", precision=precision)
    verdict = SafeModel.load(tmp_path / "b").assess("Tell me a story.")
    assert np.isfinite(verdict.p_unsafe)


def test_exit_layer_none_has_no_gate(tiny_checkpoint: Path, tmp_path: Path) -> None:
    report = export_bundle(tiny_checkpoint, tmp_path / "b", precision="fp32", exit_layer="none")
    assert report.exit_layer is None
    assert not (tmp_path / "b" / "gate.onnx").exists()
    manifest = load_manifest(tmp_path / "b")
    assert set(manifest.safety.stages) == {"final"}
    assert manifest.graphs["decoder"].inputs[0].name == "inputs_embeds"
    assert SafeModel.load(tmp_path / "b").assess("Tell me a story.").stage == "final"


def test_exit_layer_by_number(tiny_checkpoint: Path, tmp_path: Path) -> None:
    report = export_bundle(tiny_checkpoint, tmp_path / "b", precision="fp32", exit_layer="1")
    assert report.exit_layer == 1
    assert load_manifest(tmp_path / "b").safety.exit_layer == 1


def test_joined_heads_decide_together_in_the_bundle(copy: Path, tmp_path: Path) -> None:
    content = json.loads((copy / "safety.json").read_text())
    asked = ["Tell me a story.", "What does the sign say?", "Boats and a river, please. " * 20]

    def log_odds(exit_layer: str, joined: list[int]) -> list[float]:
        (copy / "safety.json").write_text(json.dumps(content | {"joined": joined}))
        out = tmp_path / f"{exit_layer}{len(joined)}"
        report = export_bundle(copy, out, precision="fp32", exit_layer=exit_layer)
        assert max(b.relative_difference for b in report.parity.boundaries) < 1e-4
        model = SafeModel.load(out)
        found = [model.assess(prompt).p_unsafe for prompt in asked]
        return [float(np.log(p) - np.log1p(-p)) for p in found]

    lower, upper, joined = log_odds("1", []), log_odds("2", []), log_odds("2", [1, 2])
    assert joined == pytest.approx([(a + b) / 2 for a, b in zip(lower, upper, strict=True)])
    assert joined != pytest.approx(upper)
    manifest = load_manifest(tmp_path / "22")
    assert (manifest.safety.exit_layer, manifest.safety.attention.layers) == (2, [1, 2])


def test_exit_layer_without_a_head_lists_those_there_are(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=r"layer 3.*1, 2"):
        export_bundle(tiny_checkpoint, tmp_path / "b", exit_layer="3")
    assert not (tmp_path / "b").exists()


def test_two_tokens_take_the_place_of_a_safety_module(copy: Path, tmp_path: Path) -> None:
    for name in ("safety.json", "safety.safetensors"):
        (copy / name).unlink()
    export_bundle(
        copy, tmp_path / "b", precision="fp32", safe_token="<|safe|>", unsafe_token="<|unsafe|>"
    )
    safety = load_manifest(tmp_path / "b").safety
    assert (safety.exit_layer, safety.layers, safety.attention) == (None, [], None)
    assert (safety.safe_token_id, safety.unsafe_token_id) == (3, 4)
    assert SafeModel.load(tmp_path / "b").assess("Tell me a story.").stage == "final"


def test_a_string_that_is_no_token_is_refused(copy: Path, tmp_path: Path) -> None:
    (copy / "safety.json").unlink()
    with pytest.raises(ExportError, match="no token"):
        export_bundle(copy, tmp_path / "b", safe_token="<|good|>", unsafe_token="<|unsafe|>")


def test_tokens_beside_a_safety_module_are_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"safety\.json"):
        export_bundle(tiny_checkpoint, tmp_path / "b", safe_token="a", unsafe_token="b")


def test_a_checkpoint_without_a_safety_module_is_refused(copy: Path, tmp_path: Path) -> None:
    (copy / "safety.json").unlink()
    with pytest.raises(CheckpointError, match="edge-safe train"):
        export_bundle(copy, tmp_path / "b")


def test_unknown_family_is_refused_before_a_weight_is_read(copy: Path, tmp_path: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"model_type": "granite"}))
    (copy / "model.safetensors").write_bytes(b"")
    with pytest.raises(ExportError, match=r"'granite'.*llama, .*mistral, .*pebble"):
        export_bundle(copy, tmp_path / "b")


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"config\.json"):
        export_bundle(tmp_path, tmp_path / "b")


def test_unknown_target_and_precision_are_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="cpu, cuda"):
        export_bundle(tiny_checkpoint, tmp_path / "b", target="phone")
    with pytest.raises(ExportError, match="fp32, fp16, bf16, int8"):
        export_bundle(tiny_checkpoint, tmp_path / "b", precision="int3")


def test_a_bundle_that_is_there_is_not_touched(tiny_checkpoint: Path, tiny_bundle: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in tiny_bundle.iterdir()}
    with pytest.raises(ExportError, match="--overwrite"):
        export_bundle(tiny_checkpoint, tiny_bundle, precision="fp32")
    assert {path.name: path.stat().st_mtime_ns for path in tiny_bundle.iterdir()} == before


@pytest.mark.parametrize(
    ("failure", "error", "message"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt, ""),
        (OSError(errno.ENOSPC, "No space left on device"), ExportError, "disk is full"),
    ],
)
@pytest.mark.parametrize("at", ["quantize", "compare with torch"])
def test_a_broken_export_leaves_nothing(
    failure: BaseException,
    error: type[BaseException],
    message: str,
    at: str,
    tiny_checkpoint: Path,
    tmp_path: Path,
) -> None:
    def progress(step: str, share: float) -> None:
        if step == at:
            raise failure

    with pytest.raises(error, match=message):
        export_bundle(tiny_checkpoint, tmp_path / "b", precision="fp32", progress=progress)
    assert list(tmp_path.iterdir()) == []


def test_thresholds_are_fitted_on_the_bundle_itself(
    tiny_checkpoint: Path, rows: Path, tmp_path: Path
) -> None:
    report = export_bundle(
        # Random labels move a threshold further than acceptance allows.
        tiny_checkpoint,
        tmp_path / "b",
        calibration=rows,
        allow_unaccepted=True,
    )
    assert report.refitted
    gate = report.calibration["gate"]
    assert (gate.fitted_on, gate.rows) == ("rows.jsonl", 12)
    safety = load_manifest(tmp_path / "b").safety
    assert (gate, True) == (safety.stages["gate"], safety.refitted)
    model = SafeModel.load(tmp_path / "b", accept_failed=True)
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    safe = [line["prompt"] for line in lines if line["label"] == "safe"]
    refused = [model.assess(text).p_unsafe >= gate.threshold for text in safe]
    assert np.mean(refused) == pytest.approx(gate.fpr)
    assert gate.fpr <= gate.target_fpr == 0.03
    drift = {d.stage: d for d in report.drift}
    assert (set(drift), drift["gate"].rows) == ({"gate", "final"}, 12)
    assert drift["gate"].fpr == pytest.approx(gate.fpr)
    assert drift["gate"].asr == pytest.approx(gate.asr)


def test_thresholds_that_were_carried_over_say_so(tiny_bundle: Path) -> None:
    assert not load_manifest(tiny_bundle).safety.refitted


def test_every_calibration_of_a_checkpoint_reaches_its_bundle(copy: Path, tmp_path: Path) -> None:
    content = json.loads((copy / "safety.json").read_text())
    gate = content["calibration"]["gate.2"]
    image = gate | {"threshold": 0.8, "bias": -1.0}
    gate |= {"method": "isotonic", "knots": [[-5.0, -3.0], [5.0, 4.0]], "target_fpr": 0.02}
    gate |= {"modalities": {"image": {k: v for k, v in image.items() if k != "modalities"}}}
    (copy / "safety.json").write_text(json.dumps(content))
    report = export_bundle(copy, tmp_path / "b", precision="fp32")
    found = load_manifest(tmp_path / "b").safety.stages["gate"]
    assert (found.method, found.knots) == ("isotonic", ((-5.0, -3.0), (5.0, 4.0)))
    assert (found.target_fpr, found.of("image").threshold) == (0.02, 0.8)
    # Six plain prompts, two steered to either side for text and two for pictures.
    assert (report.parity.verdicts.prompts, report.parity.verdicts.agreement) == (10, 1.0)


def test_acceptance_compares_the_bundle_with_torch(
    tiny_checkpoint: Path, rows: Path, tmp_path: Path
) -> None:
    report = export_bundle(tiny_checkpoint, tmp_path / "b", precision="fp32", acceptance=rows)
    found = report.acceptance
    assert (found.rows, found.errors, found.agreement) == (12, 0, 1.0)
    assert found.modalities["text"].auroc == found.auroc
    assert found.max_p_difference < 1e-4
    assert found.auroc == pytest.approx(found.torch_auroc)
    assert report.accepted.passed
    assert load_manifest(tmp_path / "b").safety.acceptance == report.accepted


def test_malformed_rows_are_refused_before_work_starts(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "Tell me a story.", "label": "safe"}\n')
    with pytest.raises(DataError, match="both labels"):
        export_bundle(tiny_checkpoint, tmp_path / "b", acceptance=path)
