"""The gate's cost, measured in fresh processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_safe.errors import BundleError
from edge_safe.evaluation.speed.fresh import run_fresh
from edge_safe.evaluation.speed.gate_cost import measure_gate_cost
from edge_safe.export.ungated import write_ungated


@pytest.mark.parametrize("number", [0, 1])
def test_a_process_compares_answers_with_and_without_the_gate(
    number: int, tiny_bundle: Path, tmp_path: Path
) -> None:
    ungated = write_ungated(tiny_bundle, tmp_path / "ungated")
    found = measure_gate_cost(tiny_bundle, ungated, 64, 8, 1, None, number)
    assert sorted(found) == ["gate_cost_ratio", "gated_answer_ms", "ungated_answer_ms"]
    assert all(value > 0 for value in found.values())


def test_what_went_wrong_in_the_process_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"could not answer .*There is no bundle folder") as error:
        measure_gate_cost(tmp_path / "none", tmp_path / "none", 64, 8, 1, None, 0)
    assert "\n" not in str(error.value)


def test_a_fresh_process_says_which_module_failed() -> None:
    with pytest.raises(BundleError, match=r"it failed: .*No module named edge_safe\.nowhere"):
        run_fresh("edge_safe.nowhere", [], "it failed")
