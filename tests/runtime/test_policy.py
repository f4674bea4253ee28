"""Policy files: both formats, helpful errors, stages."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from edge_safe.errors import PolicyError
from edge_safe.runtime.model import SafeModel
from edge_safe.runtime.policy import REFUSAL, Policy, load_policy, parse_policy


def test_json_is_read(tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    path.write_text('{"stages": ["gate", "final"], "thresholds": {"gate": 0.2}}')
    assert load_policy(path) == Policy(stages=("gate", "final"), thresholds={"gate": 0.2})


@pytest.mark.skipif(sys.version_info < (3, 11), reason="TOML needs Python 3.11")
def test_toml_is_read(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text('language = "de"\n[refusals]\nde = "Dabei helfe ich nicht."\n')
    assert load_policy(path).refusal() == "Dabei helfe ich nicht."


def test_the_default_refusal_is_english() -> None:
    assert Policy().refusal() == REFUSAL


def test_an_unknown_key_is_answered_with_the_nearest() -> None:
    with pytest.raises(PolicyError, match=r"'treshold'.*did you mean 'thresholds'"):
        parse_policy({"treshold": {}}, "p.toml")


@pytest.mark.parametrize(
    "raw",
    [
        {"stages": ["final", "gate"]},
        {"stages": ["gate", "gate"]},
        {"stages": ["vision"]},
        {"thresholds": {"gate": 1.5}},
        {"thresholds": {"gate": float("nan")}},
        {"thresholds": {"other": 0.5}},
        {"language": "fr"},
        [],
        "gate",
    ],
)
def test_impossible_policies_are_rejected(raw: object) -> None:
    with pytest.raises(PolicyError):
        parse_policy(raw, "p.toml")


def test_a_missing_file_is_a_policy_error(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=r"absent\.toml"):
        load_policy(tmp_path / "absent.toml")


def test_a_broken_file_is_a_policy_error(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text("{")
    with pytest.raises(PolicyError, match="parsed"):
        load_policy(path)


def test_a_stage_the_bundle_lacks_is_found_at_load(gateless_folder: Path) -> None:
    with pytest.raises(PolicyError, match="this bundle has: final"):
        SafeModel.load(gateless_folder, policy=Policy(stages=("gate",)))
