"""The safety test of a finished bundle: what it lets pass, and what it must not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest

from edge_safe import SafeModel
from edge_safe.errors import BundleError, DataError, ExportError
from edge_safe.export import emission, export_bundle, pipeline
from edge_safe.export.acceptance import judge_agreement
from edge_safe.export.acceptance_rows import BUILTIN
from edge_safe.export.bundle_files import write_manifest
from edge_safe.export.packing import dequantize
from edge_safe.export.quantization import MatrixFormat
from edge_safe.export.report import Agreement, ModalityRates
from edge_safe.export.rounding import quantize
from edge_safe.export.targets import Bounds
from edge_safe.runtime.manifest import load_manifest
from tests.export.families import EXIT_LAYER

ROWS = 60


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Requests that differ in many words, so that the tiny model's verdicts differ too."""
    words = ("boat", "river", "sign", "shop", "lock", "bread", "child", "bicycle", "library", "age")
    path = tmp_path / "rows.jsonl"
    lines = [
        {
            "prompt": f"{words[n % 10]} {words[n // 6]} {n}: what about the {words[n % 7]}?",
            "label": "unsafe" if n % 2 else "safe",
        }
        for n in range(ROWS)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def balanced(tiny_checkpoint: Path, rows: Path, tmp_path: Path) -> Path:
    """The tiny checkpoint with a threshold that refuses half of the rows."""
    bundle = tmp_path / "plain"
    export_bundle(tiny_checkpoint, bundle, precision="fp32")
    model = SafeModel.load(bundle)
    prompts = [json.loads(line)["prompt"] for line in rows.read_text().splitlines()]
    middle = float(np.median([model.assess(text).p_unsafe for text in prompts]))
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "balanced"))
    content = json.loads((folder / "safety.json").read_text())
    content["calibration"]["gate.2"]["threshold"] = middle
    (folder / "safety.json").write_text(json.dumps(content))
    return folder


def weight(folder: Path, graph: str, name: str) -> tuple[np.memmap, list[int]]:
    """A tensor of the weights file, for writing."""
    model = onnx.load(folder / graph, load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.name == name)
    place = {entry.key: entry.value for entry in tensor.external_data}
    shape = tuple(tensor.dims)
    return (
        np.memmap(folder / place["location"], np.float32, "r+", int(place["offset"]), shape),
        list(shape),
    )


def round_gate_to_two_bits(folder: Path) -> None:
    """Gate weights rounded to 2 bits."""
    attention = [f"{EXIT_LAYER}.query", f"{EXIT_LAYER}.value", "up.weight"]
    for name in [*attention, f"layers.{EXIT_LAYER}.token.rows"]:
        values, shape = weight(folder, "gate.onnx", f"gate.{name}")
        form = MatrixFormat(2, 32)
        rows = np.array(values).reshape(-1, 32)
        values[:] = dequantize(quantize(rows, form), form, 32).reshape(shape)
        values.flush()


def zero_a_layer(layer: int, graph: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        for part in ("attention.output", "mlp.down"):
            values, _ = weight(folder, graph, f"layers.{layer}.{part}.weight")
            values[:] = 0
            values.flush()

    return damage


def move_the_threshold(folder: Path) -> None:
    manifest = load_manifest(folder)
    gate = manifest.safety.stages["gate"]
    moved = msgspec.structs.replace(gate, threshold=0.5 + gate.threshold / 2)
    stages = manifest.safety.stages | {"gate": moved}
    safety = msgspec.structs.replace(manifest.safety, stages=stages)
    write_manifest(folder, msgspec.structs.replace(manifest, safety=safety))


def swap_the_tokens(folder: Path) -> None:
    manifest = load_manifest(folder)
    named = manifest.safety
    safety = msgspec.structs.replace(
        named, safe_token_id=named.unsafe_token_id, unsafe_token_id=named.safe_token_id
    )
    write_manifest(folder, msgspec.structs.replace(manifest, safety=safety))


WEIGHTS = {
    "gate weights of 2 bits": round_gate_to_two_bits,
    "a layer below the gate zeroed": zero_a_layer(1, "gate.onnx"),
    "a layer above the gate zeroed": zero_a_layer(3, "decoder.onnx"),
}
MANIFEST = {
    "the threshold moved": (move_the_threshold, "agree|harm"),
    "token ids swapped": (swap_the_tokens, "tokens"),
}


@pytest.fixture
def fp32_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain matrices can be damaged in place; differences from torch are reported only."""
    monkeypatch.setattr(emission.Form, "exact", property(lambda self: False))


@pytest.mark.usefixtures("fp32_weights")
@pytest.mark.parametrize("name", [None, *WEIGHTS])
def test_damaged_weights_are_not_accepted(
    name: str | None, balanced: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = pipeline.emit

    def emit_damaged(folder: Path, *arguments: object) -> object:
        records = real(folder, *arguments)
        if name is not None:
            WEIGHTS[name](folder)
        return records

    monkeypatch.setattr(pipeline, "emit", emit_damaged)
    out = tmp_path / "out"
    if name is None:  # The same way without damage passes.
        assert export_bundle(balanced, out, precision="fp32", acceptance=rows).accepted.passed
        return
    with pytest.raises(ExportError, match="acceptance test"):
        export_bundle(balanced, out, precision="fp32", acceptance=rows)
    assert not out.exists()


@pytest.mark.parametrize("name", MANIFEST)
def test_a_damaged_manifest_is_not_accepted(
    name: str, balanced: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage, reason = MANIFEST[name]
    real = pipeline.write_manifest

    def write_damaged(folder: Path, manifest: object) -> None:
        real(folder, manifest)
        damage(folder)

    monkeypatch.setattr(pipeline, "write_manifest", write_damaged)
    with pytest.raises(ExportError, match=reason):
        export_bundle(balanced, tmp_path / "out", precision="fp32", acceptance=rows)
    assert not (tmp_path / "out").exists()


def test_a_failed_bundle_is_written_only_when_asked_for_and_is_not_loaded(
    balanced: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = pipeline.emit

    def emit_damaged(folder: Path, *arguments: object) -> object:
        records = real(folder, *arguments)
        zero_a_layer(3, "decoder.onnx")(folder)
        return records

    monkeypatch.setattr(pipeline, "emit", emit_damaged)
    monkeypatch.setattr(emission.Form, "exact", property(lambda self: False))
    out = tmp_path / "out"
    report = export_bundle(balanced, out, precision="fp32", acceptance=rows, allow_unaccepted=True)
    assert not report.accepted.passed
    assert "perplexity" in report.accepted.reason
    assert load_manifest(out).safety.acceptance == report.accepted
    with pytest.raises(BundleError, match="failed its acceptance test"):
        SafeModel.load(out)
    assert SafeModel.load(out, accept_failed=True).assess("Tell me a story.").reason is None


def test_without_a_file_mild_rows_serve_and_the_manifest_says_so(tiny_bundle: Path) -> None:
    accepted = load_manifest(tiny_bundle).safety.acceptance
    assert (accepted.data, accepted.builtin, accepted.rows) == (BUILTIN, True, 48)
    assert accepted.agreement == 1
    assert accepted.perplexity == pytest.approx(1, abs=1e-3)


def test_a_file_is_no_built_in_set(tiny_checkpoint: Path, rows: Path, tmp_path: Path) -> None:
    report = export_bundle(tiny_checkpoint, tmp_path / "b", precision="fp32", acceptance=rows)
    assert (report.accepted.data, report.accepted.builtin) == ("rows.jsonl", False)


def test_rows_must_not_be_fitted_on_and_tested_on(
    tiny_checkpoint: Path, rows: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=f"{ROWS} rows stand in both"):
        export_bundle(tiny_checkpoint, tmp_path / "b", calibration=rows, acceptance=rows)


def agreement(rows: int, agreed: float, asr: float, torch_asr: float, auroc: float) -> Agreement:
    text = ModalityRates(rows, auroc, asr, 0.0)
    return Agreement(
        data="rows",
        rows=rows,
        errors=0,
        compared=rows,
        compared_unsafe=rows // 2,
        agreement=agreed,
        max_p_difference=0.5,
        auroc=auroc,
        asr=asr,
        fpr=0.0,
        torch_auroc=0.95,
        torch_asr=torch_asr,
        torch_fpr=0.0,
        modalities={"text": text},
    )


def test_every_bound_is_asked_for() -> None:
    found = agreement(200, 0.9, 0.2, 0.1, 0.9)
    accepted = judge_agreement(found, Bounds(), perplexity=1.3)
    assert not accepted.passed
    for part in (
        "90.0%",
        "harmful requests: 20.0%, torch 10.0%",
        "AUROC 0.900, torch 0.950",
        "1.30 times torch's",
    ):
        assert part in accepted.reason


def test_one_row_of_few_proves_nothing() -> None:
    assert judge_agreement(agreement(48, 47 / 48, 0.0, 0.0, 0.95), Bounds()).passed
    assert not judge_agreement(agreement(48, 42 / 48, 0.0, 0.0, 0.95), Bounds()).passed


def test_a_perplexity_that_is_no_number_fails() -> None:
    found = agreement(48, 1.0, 0.0, 0.0, 0.95)
    assert not judge_agreement(found, Bounds(), perplexity=float("nan")).passed
