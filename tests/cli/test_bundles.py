"""`verify`, `inspect` and `doctor`."""

from __future__ import annotations

import json
from pathlib import Path

from edge_safe.runtime.manifest import MANIFEST_FILE, load_manifest


def test_verify_counts_what_it_checked(cli, tiny_bundle: Path) -> None:
    manifest = load_manifest(tiny_bundle)
    document = cli("verify", tiny_bundle, "--json").document
    assert document["ok"] is True
    assert document["files"] == len(manifest.files)
    assert document["bytes"] == sum(entry.size for entry in manifest.files.values())
    assert document["signature"] == "none"


def test_verify_finds_a_changed_file_that_no_request_opens(cli, own_bundle: Path) -> None:
    name = "tokenizer_config.json"
    path = own_bundle / name
    path.write_bytes(path.read_bytes() + b" ")
    result = cli("verify", own_bundle)
    assert result.code == 1
    assert name in result.err


def test_verify_refuses_a_bundle_that_failed_its_safety_test(cli, own_bundle: Path) -> None:
    path = own_bundle / MANIFEST_FILE
    manifest = json.loads(path.read_text())
    manifest["safety"]["acceptance"] = {
        "passed": False,
        "data": "rows.jsonl",
        "rows": 10,
        "reason": "ASR 40 %",
    }
    path.write_text(json.dumps(manifest))
    result = cli("verify", own_bundle)
    assert result.code == 1
    assert "ASR 40 %" in result.err


def test_inspect_shows_the_manifest(cli, tiny_bundle: Path) -> None:
    document = cli("inspect", tiny_bundle, "--json").document
    assert document == json.loads((tiny_bundle / MANIFEST_FILE).read_text())


def test_inspect_says_in_words_where_the_gate_reads(cli, tiny_bundle: Path) -> None:
    manifest = load_manifest(tiny_bundle)
    result = cli("inspect", tiny_bundle)
    assert result.code == 0
    assert f"the gate reads layer {manifest.safety.exit_layer}" in result.out
    assert manifest.family in result.out


def test_inspect_shows_the_calibration_of_every_way_in(
    cli, tiny_bundle: Path, tmp_path: Path
) -> None:
    document = json.loads((tiny_bundle / MANIFEST_FILE).read_text())
    document["safety"]["stages"]["gate"]["modalities"] = {
        "image": {
            "threshold": 0.625,
            "method": "isotonic",
            "fpr": 0.02,
            "fpr_interval": [0.01, 0.04],
        }
    }
    (tmp_path / MANIFEST_FILE).write_text(json.dumps(document))
    for name in document["files"]:
        (tmp_path / name).touch()
    line = next(t for t in cli("inspect", tmp_path).out.splitlines() if "gate, image" in t)
    assert "from p_unsafe 0.6250 on; isotonic" in line
    assert "FPR 2.0 % (1.0 % to 4.0 %)" in line


def test_inspect_names_tensors_when_asked(cli, tiny_bundle: Path) -> None:
    assert "verdict_logits" in cli("inspect", tiny_bundle, "--verbose").out
    assert "verdict_logits" not in cli("inspect", tiny_bundle).out


def test_doctor_looks_at_the_basics_first(cli) -> None:
    result = cli("doctor", "--json")
    checks = result.document["checks"]
    assert [check["name"] for check in checks[:5]] == [
        "Python",
        "System",
        "Processor",
        "Memory",
        "onnxruntime",
    ]
    assert result.code == (0 if result.document["ok"] else 1)


def test_doctor_says_what_to_do_about_everything_that_is_not_ok(cli) -> None:
    for check in cli("doctor", "--json").document["checks"]:
        assert check["status"] in ("ok", "note", "missing")
        assert check["status"] == "ok" or check["advice"]


def test_doctor_knows_the_provider_that_runs_here(cli) -> None:
    checks = {check["name"]: check for check in cli("doctor", "--json").document["checks"]}
    assert checks["Provider cpu"]["found"] == "CPUExecutionProvider"
    assert checks["Provider cpu"]["status"] == "ok"


def test_capabilities_without_the_target_they_belong_to_are_refused(cli, tmp_path: Path) -> None:
    result = cli("export", "nowhere", "--out", tmp_path / "out", "--capability", "SM89")
    assert result.code == 2
    assert "--target tensorrt-rtx" in result.err
