"""Packing of one matrix: byte layout, accuracy, and the kernels that read it."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from edge_safe.errors import ExportError
from edge_safe.export import rounding
from edge_safe.export.graphs.builder import FLOAT, INT64, GraphBuilder
from edge_safe.export.graphs.matrices import linear, look_up, store_linear, store_table
from edge_safe.export.graphs.store import WeightStore
from edge_safe.export.packing import dequantize, lattice_matrix
from edge_safe.export.quantization import MatrixFormat, precision_named
from edge_safe.export.rounding import quantize, round_matrix
from edge_safe.runtime.session import Session

FORMATS = [
    MatrixFormat(4, 64),
    MatrixFormat(4, 128, symmetric=True),
    MatrixFormat(4, 128),
    MatrixFormat(4, rounding="k_quant"),
    MatrixFormat(4, 128, rounding="k_quant"),
    MatrixFormat(4, offsets=True, rounding="hqq"),
    MatrixFormat(4),
    MatrixFormat(4, symmetric=True),
    MatrixFormat(4, offsets=True),
    MatrixFormat(8),
    MatrixFormat(8, symmetric=True),
    MatrixFormat(4, 64, symmetric=True, positive=True),
    MatrixFormat(8, 64, symmetric=True, positive=True),
]


def weights(rows: int, columns: int) -> np.ndarray:
    return np.random.default_rng(5).standard_normal((rows, columns)).astype(np.float32)


def lattice(rows: int, columns: int) -> np.ndarray:
    """Weights as 4-bit GGUF files hold them: a minimum and 16 steps in every block of 32."""
    rng = np.random.default_rng(6)
    shape = (rows, columns // 32, 32)
    steps = rng.integers(0, 16, shape)
    steps[..., 0], steps[..., 1] = 0, 15
    low = -rng.random((*shape[:2], 1)) * 0.3 - 0.1
    scale = rng.random((*shape[:2], 1)) * 0.03 + 0.01
    return (low + scale * steps).reshape(rows, columns).astype(np.float32)


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def run_linear(tmp_path: Path, weight: np.ndarray, form: MatrixFormat, x: np.ndarray) -> np.ndarray:
    g = GraphBuilder("test")
    source = g.input("x", FLOAT, [1, "rows", weight.shape[1]])
    g.output("y", FLOAT, [1, "rows", weight.shape[0]])
    with WeightStore(tmp_path / "w.data") as store:
        matrix = store_linear(store, weight, form)
    product = linear(g, source, matrix, "layer")
    g.op("Identity", [product], scope="out", outputs=["y"])
    g.save(tmp_path / "linear.onnx")
    return Session(tmp_path / "linear.onnx", threads=1).run({"x": x[None]})["y"][0]


@pytest.mark.parametrize("bits", [4, 8])
def test_where_scales_are_to_be_positive_none_is_negative(bits: int) -> None:
    weight = weights(32, 128)
    weight[:, :64] -= 0.5
    weight[0, :64], weight[1, 64:] = 0.0, -np.abs(weight[1, 64:])
    form = MatrixFormat(bits, 64, symmetric=True, positive=True)
    packed = quantize(weight, form)
    assert (packed.scales >= 0).all()
    step = packed.scales.repeat(64, axis=1)
    found = dequantize(packed, form, 128)
    assert (np.abs(found - weight) <= step / 2 * (1 + 1e-5)).all()


def test_low_half_of_a_byte_is_the_even_column() -> None:
    weight = lattice(1, 32)
    packed = quantize(weight, MatrixFormat(4))
    scale = float(packed.scales[0, 0])
    zero = packed.zero_points[0, 0] & 15
    byte = packed.values[0, 0, 3]
    assert weight[0, 6] == pytest.approx((int(byte & 15) - int(zero)) * scale, abs=scale)
    assert weight[0, 7] == pytest.approx((int(byte >> 4) - int(zero)) * scale, abs=scale)


def test_asymmetric_blocks_are_the_library_quantizers() -> None:
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    from onnxruntime.capi._pybind_state import quantize_matmul_4bits

    weight = weights(12, 96)
    packed = quantize(weight, MatrixFormat(4))
    values = np.zeros((12, 3, 16), np.uint8)
    scales = np.zeros((12, 3), np.float32)
    zeros = np.zeros((12, 2), np.uint8)
    quantize_matmul_4bits(values, np.ascontiguousarray(weight.T), scales, zeros, 32, 12, 96, False)
    np.testing.assert_allclose(packed.scales, scales, rtol=1e-6)
    np.testing.assert_array_equal(packed.zero_points & 15, zeros & 15)
    assert (packed.values == values).mean() > 0.99


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_rounding_stays_within_half_a_step(form: MatrixFormat) -> None:
    weight = weights(8, 96)
    packed = quantize(weight, form)
    error = np.abs(dequantize(packed, form, 96) - weight)
    # Zero points are rounded too, a symmetric block cannot reach the end of its other side, and
    # a search cuts off what lies far out.
    reach = 1.01 if form.rounding == "nearest" else 2.5
    steps = np.repeat(np.abs(packed.scales[:, : -(-96 // form.block)]), form.block, axis=1)
    assert (error <= steps[:, :96] * reach).all()


def test_offsets_give_lattice_weights_back() -> None:
    weight = lattice(40, 576)
    whole, offsets = MatrixFormat(4), MatrixFormat(4, offsets=True)
    assert relative(dequantize(quantize(weight, whole), whole, 576), weight) > 0.04
    assert relative(dequantize(quantize(weight, offsets), offsets, 576), weight) < 0.02


def test_offsets_survive_a_constant_block() -> None:
    weight = lattice(4, 64)
    weight[:, :32] = 0.25
    weight[1, :32] = 0.0
    form = MatrixFormat(4, offsets=True)
    found = dequantize(quantize(weight, form), form, 64)
    assert np.abs(found - weight).max() < 0.02


@pytest.mark.parametrize("columns", [64, 96])
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_kernel_multiplies_by_the_dequantized_matrix(
    form: MatrixFormat, columns: int, tmp_path: Path
) -> None:
    weight, x = lattice(48, columns), weights(5, columns)
    exact = dataclasses.replace(form, accuracy_level=0)
    expected = x @ dequantize(quantize(weight, form), form, columns).T
    found = run_linear(tmp_path, weight, exact, x)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_int8_kernel_stays_close(tmp_path: Path) -> None:
    weight, x = lattice(48, 576), weights(5, 576)
    form = MatrixFormat(4, offsets=True)
    assert relative(run_linear(tmp_path, weight, form, x), x @ weight.T) < 0.04


@pytest.mark.parametrize("columns", [64, 96])
@pytest.mark.parametrize("form", [MatrixFormat(4), MatrixFormat(8), MatrixFormat(32)], ids=str)
def test_looked_up_rows_are_the_dequantized_ones(
    form: MatrixFormat, columns: int, tmp_path: Path
) -> None:
    weight = weights(50, columns)
    expected = weight if form.bits == 32 else dequantize(quantize(weight, form), form, columns)
    g = GraphBuilder("test")
    ids = g.input("ids", INT64, ["n", 2])
    g.output("y", FLOAT, ["n", 2, columns])
    with WeightStore(tmp_path / "w.data") as store:
        table = store_table(store, weight, form)
    g.op("Identity", [look_up(g, ids, table, "table")], scope="out", outputs=["y"])
    g.save(tmp_path / "table.onnx")
    chosen = np.array([[0, 49], [17, 3]])
    found = Session(tmp_path / "table.onnx", threads=1).run({"ids": chosen})["y"]
    np.testing.assert_allclose(found, expected[chosen], rtol=1e-5, atol=1e-6)


def test_embedding_refuses_a_width_that_does_not_fit(tmp_path: Path) -> None:
    with WeightStore(tmp_path / "w.data") as store, pytest.raises(ExportError, match="width 40"):
        store_table(store, weights(4, 40), MatrixFormat(8))


def test_unknown_precision_lists_those_there_are() -> None:
    with pytest.raises(ExportError, match=r"int3.*fp32, fp16, bf16, int8"):
        precision_named("int3")
    with pytest.raises(ExportError, match=r"int3.*fp32, fp16, int8, int4"):
        precision_named("int4", embedding="int3")


def test_dynamic_int8_is_refused_with_its_reason() -> None:
    with pytest.raises(ExportError, match="slot T"):
        precision_named("int8-dynamic")


def test_embedding_and_lm_head_are_chosen_apart() -> None:
    row = precision_named("int4", embedding="fp16")
    assert (row.embedding.label, row.head.label) == ("fp16", "int8")
    row = precision_named("int4", lm_head="int4")
    assert (row.embedding.label, row.head.label) == ("int8", "int4")


@pytest.mark.parametrize("brain", [False, True])
def test_sixteen_bits_keep_what_has_sixteen_bits(brain: bool, tmp_path: Path) -> None:
    form = MatrixFormat(16, brain=brain)
    kind = ml_dtypes.bfloat16 if brain else np.float16
    weight, x = lattice(48, 64).astype(kind).astype(np.float32), weights(5, 64)
    np.testing.assert_allclose(run_linear(tmp_path, weight, form, x), x @ weight.T, atol=1e-5)


def test_a_weight_beyond_float16_is_refused(tmp_path: Path) -> None:
    weight = weights(4, 32)
    weight[2, 3] = 1e5
    with WeightStore(tmp_path / "w.data") as store, pytest.raises(ExportError, match="65504"):
        store_linear(store, weight, MatrixFormat(16))


def test_hqq_zeros_need_offsets_and_get_them() -> None:
    weight = weights(8, 64)
    form = MatrixFormat(4, offsets=True, rounding="hqq")
    rounded = round_matrix(weight, form)
    assert (rounded.zeros != np.rint(rounded.zeros)).any()
    expected = lattice_matrix(rounded, 64)
    assert relative(dequantize(quantize(weight, form), form, 64), expected) < 0.02


def test_a_matrix_is_rounded_in_slabs_as_it_would_be_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = weights(50, 96)
    form = MatrixFormat(4, offsets=True)
    whole = dequantize(quantize(weight, form), form, 96)
    monkeypatch.setattr(rounding, "SLAB", 7 * 96)
    np.testing.assert_array_equal(dequantize(quantize(weight, form), form, 96), whole)


def test_weights_that_are_not_finite_are_refused() -> None:
    weight = weights(2, 32)
    weight[1, 5] = np.nan
    with pytest.raises(ExportError, match="NaN"):
        quantize(weight, MatrixFormat(4))


def test_telemetry_is_off_before_the_quantizers_are_imported() -> None:
    code = (
        "import os, sys; os.environ.pop('ORT_DISABLE_TELEMETRY', None); "
        "import edge_safe.export.library_rounding; "
        "assert 'onnxruntime.quantization' not in sys.modules; "
        "print(os.environ['ORT_DISABLE_TELEMETRY'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"
