"""Every family's tiny checkpoint for TensorRT for RTX: engines, and torch's and the CPU's words."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from benchmarks.engines.cells import EARLY, Built, rows
from benchmarks.engines.measure import measure
from benchmarks.engines.page import unbuilt
from benchmarks.families.reference import Reference, write_reference
from edge_safe.export.families.base import family_names
from tests.export.every_family import tiny_family

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason="needs pip install 'edge-safe[tensorrt-rtx]'",
)

# One of each kind at every commit.
KINDS = ("llama", "qwen2_5_vl", "qwen2_audio")
TINY = [family for family in family_names() if tiny_family(family) is not None]
REST = [
    *(pytest.param(name, "fp32", marks=pytest.mark.slow) for name in TINY if name not in KINDS),
    *(
        pytest.param(name, precision, marks=pytest.mark.slow)
        for name in TINY
        for precision in ("fp16", "int8", "int4")
    ),
]
LANGUAGE = {"gate.onnx", "decoder.onnx"}


def _built(name: str, precision: str, folder: Path) -> tuple[Built, Reference]:
    reference = (write_reference(name, folder) if name != EARLY else None) or {}
    cell = measure(name, precision, folder, reference)
    assert isinstance(cell.found, Built), cell.found
    return cell.found, reference


@pytest.mark.parametrize(("family", "precision"), [*((kind, "fp32") for kind in KINDS), *REST])
def test_every_graph_that_can_be_read_has_an_engine_and_fp32_is_torchs(
    family: str, precision: str, tmp_path: Path
) -> None:
    found, reference = _built(family, precision, tmp_path / "family")
    assert {record.graph for record in found.engines} >= LANGUAGE
    assert unbuilt(found) == []
    assert all(record.capabilities == list(rows()[family].capabilities) for record in found.engines)
    if precision != "fp32":
        return
    assert found.difference <= 1e-4
    assert set(found.torch) == set(found.cpu) == set(reference) != set()
    for way in (*found.torch.values(), *found.cpu.values()):
        assert way.difference <= 1e-4
        assert way.same == way.answered > 0


@pytest.mark.slow
def test_an_early_exit_is_an_engine_of_its_own(tmp_path: Path) -> None:
    found, _ = _built(EARLY, "fp32", tmp_path)
    assert {record.graph for record in found.engines} == {*LANGUAGE, "gate_late.onnx"}
    assert found.cpu["text"].difference <= 1e-4
