"""An early exit from a checkpoint into a bundle: torch's verdicts, and thresholds of its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest

from edge_safe.errors import ExportError
from edge_safe.export import export_bundle
from edge_safe.export.safety_plan import plan_from_module
from edge_safe.export.ungated import write_ungated
from edge_safe.models.safety_file import SAFETY_JSON, EarlyExit, read_safety_file
from edge_safe.models.safety_model import SafetyTokenModel
from edge_safe.runtime.manifest import load_manifest
from edge_safe.runtime.model import SafeModel
from edge_safe.runtime.policy import Policy
from edge_safe.runtime.verdict import Decision
from tests.export.families import EXIT_LAYER

TEXTS = ["What is the capital of France?", "How do I pick a lock?", "Tell me of boats.", "A rope."]


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint, whose head at layer 1 ends what it finds clear."""
    folder = tmp_path_factory.mktemp("early") / "checkpoint"
    shutil.copytree(tiny_checkpoint, folder)
    file = read_safety_file(folder)
    early = EarlyExit(1, file.calibration["gate.1"], file.calibration[f"gate.{EXIT_LAYER}"])
    (folder / SAFETY_JSON).write_bytes(
        msgspec.json.encode(msgspec.structs.replace(file, early=early))
    )
    return folder


@pytest.fixture(scope="module")
def bundle(checkpoint: Path) -> Path:
    out = checkpoint.with_name("bundle")
    export_bundle(checkpoint, out, precision="fp32")
    return out


def test_every_boundary_is_torchs(bundle: Path) -> None:
    parity = json.loads((bundle / "report.json").read_text())["parity"]
    compared = [b for b in parity["boundaries"] if b["output"] == "early_verdict_logits"]
    assert {b["case"].split(",")[-1].strip() for b in compared} >= {"with past", "prompt 0"}
    assert max(b["relative_difference"] for b in compared) < 1e-4


def test_verdicts_at_both_exits_are_torchs(checkpoint: Path, bundle: Path) -> None:
    torch_model = SafetyTokenModel.from_pretrained(checkpoint)
    for stage, policy in (
        ("gate.1", Policy(early_threshold=0.0)),
        (f"gate.{EXIT_LAYER}", Policy(thresholds={"gate": 0.0})),
    ):
        model = SafeModel.load(bundle, threads=1, policy=policy)
        for text in TEXTS:
            ids = torch_model.tokenizer.apply_chat_template(
                [{"role": "user", "content": text}],
                add_generation_prompt=True,
                return_tensors="pt",
                return_dict=True,
            )["input_ids"]
            expected = float(torch_model.assess(input_ids=ids, stage=stage).p_unsafe[0])
            assert model.assess(text).p_unsafe == pytest.approx(expected, abs=1e-4)


def test_a_layer_that_is_asked_for_decides_alone(checkpoint: Path) -> None:
    assert plan_from_module(checkpoint, "auto").early is not None
    assert plan_from_module(checkpoint, str(EXIT_LAYER)).early is None
    assert plan_from_module(checkpoint, "1").exit_layer == 1


def test_auto_takes_the_earliest_head_within_the_bound(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, folder)
    raw = json.loads((folder / SAFETY_JSON).read_text())
    for layer, asr in ((1, 0.2), (EXIT_LAYER, 0.05)):
        raw["calibration"][f"gate.{layer}"]["asr"] = asr
    (folder / SAFETY_JSON).write_text(json.dumps(raw))
    assert plan_from_module(folder, "auto", 0.3).exit_layer == 1
    assert plan_from_module(folder, "auto", 0.1).exit_layer == EXIT_LAYER
    with pytest.raises(ExportError, match=r"max_asr of 0\.01.*1: 0\.200, 2: 0\.050"):
        plan_from_module(folder, "auto", 0.01)


def test_a_policy_goes_into_the_bundle(checkpoint: Path, tmp_path: Path) -> None:
    policy = tmp_path / "policy.json"
    policy.write_text(json.dumps({"max_asr": 0.5, "refusals": {"en": "No."}}))
    export_bundle(checkpoint, tmp_path / "out", precision="fp32", policy=policy)
    safety = load_manifest(tmp_path / "out").safety
    assert (safety.policy.refusals["en"], safety.exit_layer) == ("No.", 1)


def test_thresholds_are_fitted_again_on_the_bundle_s_own_verdicts(
    checkpoint: Path, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    words = ["boat", "tide", "rope", "gull", "lock", "shed", "sun", "bird", "river", "people"]
    rows = [
        {"id": str(n), "prompt": " ".join(rng.choice(words, 6)), "label": ["safe", "unsafe"][n % 2]}
        for n in range(120)
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    export_bundle(
        checkpoint, tmp_path / "out", precision="fp32", calibration=data, allow_unaccepted=True
    )
    safety = load_manifest(tmp_path / "out").safety
    assert safety.refitted
    assert safety.early is not None
    assert safety.early.calibration.rows == safety.stages["gate"].rows == 120
    model = SafeModel.load(tmp_path / "out", threads=1, accept_failed=True)
    verdicts = [model.assess(row["prompt"]) for row in rows]
    refused = np.array([v.decision is Decision.REFUSE for v in verdicts])
    early = np.array([v.layer == 1 for v in verdicts])
    unsafe = np.array([row["label"] == "unsafe" for row in rows])
    assert refused[~unsafe].mean() == pytest.approx(safety.stages["gate"].fpr)
    assert (~early)[unsafe].mean() == pytest.approx(safety.early.calibration.asr)


def test_without_its_gate_it_answers_the_same(bundle: Path, tmp_path: Path) -> None:
    plain = write_ungated(bundle, tmp_path / "plain")
    never = Policy(thresholds={"gate": 1.0})
    for text in TEXTS[:2]:
        said = SafeModel.load(bundle, threads=1, policy=never).generate(text, max_tokens=8).text
        free = SafeModel.load(plain, threads=1, policy=Policy(thresholds={"final": 1.0}))
        assert free.generate(text, max_tokens=8).text == said
