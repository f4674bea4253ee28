"""The graph interpreter against ONNX's own reference evaluator."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import helper
from onnx.reference import ReferenceEvaluator

from edge_safe.errors import PartsError
from edge_safe.models.onnx_graph import GraphSpec, OnnxGraph
from tests.models.pebble.tiny import save_graph

rng = np.random.default_rng(0)
Weights = dict[str, NDArray[Any]]


def floats(*shape: int) -> NDArray[np.float32]:
    return rng.normal(0, 1, shape).astype(np.float32)


def positive(*shape: int) -> NDArray[np.float32]:
    return rng.uniform(0.5, 1.5, shape).astype(np.float32)


def integers(*values: int) -> NDArray[np.int64]:
    return np.array(values, np.int64)


IMAGE = (2, 4, 9, 11)
ROWS = (2, 5, 6)
CASES: dict[str, tuple[str, tuple[int, ...], Weights, dict[str, Any]]] = {
    "Add": ("Add", ROWS, {"w": floats(6)}, {}),
    "Sub": ("Sub", ROWS, {"w": floats(1, 5, 1)}, {}),
    "Mul": ("Mul", ROWS, {"w": floats(6)}, {}),
    "Div": ("Div", ROWS, {"w": positive(6)}, {}),
    "Pow": ("Pow", ROWS, {"w": np.array(2.0, np.float32)}, {}),
    "Sqrt of a square": ("Sqrt", ROWS, {}, {}),
    "Erf": ("Erf", ROWS, {}, {}),
    "Relu": ("Relu", ROWS, {}, {}),
    "Sigmoid": ("Sigmoid", ROWS, {}, {}),
    "HardSigmoid": ("HardSigmoid", ROWS, {}, {"alpha": 0.1666667, "beta": 0.5}),
    "Softmax": ("Softmax", ROWS, {}, {"axis": 2}),
    "MatMul": ("MatMul", ROWS, {"w": floats(6, 3)}, {}),
    "Transpose": ("Transpose", ROWS, {}, {"perm": [2, 0, 1]}),
    "ReduceMean": ("ReduceMean", ROWS, {}, {"axes": [1, 2], "keepdims": 0}),
    "GlobalAveragePool": ("GlobalAveragePool", IMAGE, {}, {}),
    "Conv": (
        "Conv",
        IMAGE,
        {"w": floats(6, 2, 3, 3), "b": floats(6)},
        {"kernel_shape": [3, 3], "strides": [2, 1], "pads": [1, 0, 2, 1], "group": 2},
    ),
    "Conv same": (
        "Conv",
        IMAGE,
        {"w": floats(3, 4, 2, 2)},
        {"kernel_shape": [2, 2], "auto_pad": "SAME_UPPER"},
    ),
    "Conv same, stride 2": (
        "Conv",
        IMAGE,
        {"w": floats(3, 4, 3, 2)},
        {"kernel_shape": [3, 2], "strides": [2, 2], "auto_pad": "SAME_UPPER"},
    ),
    "ConvTranspose": (
        "ConvTranspose",
        IMAGE,
        {"w": floats(4, 3, 2, 2), "b": floats(3)},
        {"kernel_shape": [2, 2], "strides": [2, 2]},
    ),
    "MaxPool same": ("MaxPool", IMAGE, {}, {"kernel_shape": [2, 2], "auto_pad": "SAME_UPPER"}),
    "AveragePool": ("AveragePool", IMAGE, {}, {"kernel_shape": [3, 2], "strides": [3, 2]}),
    "Resize": (
        "Resize",
        IMAGE,
        {"roi": np.zeros(0, np.float32), "scales": np.array([1, 1, 2, 3], np.float32)},
        {
            "mode": "nearest",
            "coordinate_transformation_mode": "asymmetric",
            "nearest_mode": "floor",
        },
    ),
    "Reshape": ("Reshape", ROWS, {"shape": integers(0, -1, 3)}, {}),
    "Slice": (
        "Slice",
        ROWS,
        {
            "from": integers(1, 0),
            "to": integers(4, 6),
            "axes": integers(1, 2),
            "by": integers(1, 2),
        },
        {},
    ),
    "Unsqueeze": ("Unsqueeze", ROWS, {}, {"axes": [0, 2]}),
}


@pytest.mark.parametrize("name", CASES)
def test_an_operator_does_what_the_reference_does(name: str, tmp_path: Path) -> None:
    op, shape, weights, attributes = CASES[name]
    path = tmp_path / "one.onnx"
    node = helper.make_node(op, ["x", *weights], ["y"], **attributes)
    save_graph(path, [node], weights, list(shape), "y")
    x = positive(*shape) if op == "Sqrt" else floats(*shape)
    expected = ReferenceEvaluator(str(path)).run(None, {"x": x})[0]
    found = OnnxGraph.from_file(path)(torch.from_numpy(x)).numpy()
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_batch_normalization_uses_the_stored_statistics(tmp_path: Path) -> None:
    # The reference evaluator normalizes by the batch's own statistics before opset 14.
    scale, bias, mean, variance = positive(4), floats(4), floats(4), positive(4)
    path = tmp_path / "bn.onnx"
    weights: Weights = {"s": scale, "b": bias, "m": mean, "v": variance}
    node = helper.make_node("BatchNormalization", ["x", *weights], ["y"], epsilon=1e-3)
    save_graph(path, [node], weights, list(IMAGE), "y")
    x = floats(*IMAGE)
    side = (slice(None), None, None)
    expected = (x - mean[side]) / np.sqrt(variance[side] + 1e-3) * scale[side] + bias[side]
    found = OnnxGraph.from_file(path)(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def shape_arithmetic(path: Path) -> None:
    """Width of the input taken by Shape, Slice, Squeeze, Unsqueeze and Concat into a Reshape."""
    constants = {
        "three": integers(3),
        "four": integers(4),
        "zero": integers(0),
        "one": integers(1),
        "minus": integers(-1),
        "scalar": np.zeros(0, np.int64),
    }
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Slice", ["shape", "three", "four", "zero", "one"], ["last"]),
        helper.make_node("Squeeze", ["last"], ["width"], axes=[0]),
        helper.make_node("Reshape", ["width", "scalar"], ["number"]),
        helper.make_node("Unsqueeze", ["number"], ["again"], axes=[0]),
        helper.make_node("Concat", ["again", "minus"], ["target"], axis=0),
        helper.make_node("Reshape", ["x", "target"], ["flat"]),
        helper.make_node("Concat", ["flat", "flat"], ["twice"], axis=1),
        helper.make_node("Slice", ["twice", "zero", "one", "zero", "one"], ["row"]),
        helper.make_node("Squeeze", ["row"], ["y"], axes=[0]),
    ]
    save_graph(path, nodes, constants, ["N", 2, 3, "W"], "y")


def test_shapes_computed_on_the_way(tmp_path: Path) -> None:
    path = tmp_path / "shapes.onnx"
    shape_arithmetic(path)
    x = floats(2, 2, 3, 5)
    expected = ReferenceEvaluator(str(path)).run(None, {"x": x})[0]
    graph = OnnxGraph.from_file(path)
    np.testing.assert_array_equal(graph(torch.from_numpy(x)).numpy(), expected)
    assert not list(graph.buffers())


def test_a_graph_survives_its_own_description(tmp_path: Path) -> None:
    path = tmp_path / "conv.onnx"
    node = helper.make_node("Conv", ["x", "layer.w"], ["y"], kernel_shape=[3, 3], pads=[1] * 4)
    save_graph(path, [node], {"layer.w": floats(3, 4, 3, 3)}, list(IMAGE), "y")
    graph = OnnxGraph.from_file(path)
    again = OnnxGraph(GraphSpec.from_dict(json.loads(json.dumps(graph.spec.to_dict()))))
    again.load_state_dict(graph.state_dict())
    x = torch.from_numpy(floats(*IMAGE))
    assert torch.equal(graph(x), again(x))


def test_gradients_flow_to_the_input(tmp_path: Path) -> None:
    path = tmp_path / "chain.onnx"
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("Erf", ["a"], ["y"]),
    ]
    save_graph(path, nodes, {"w": floats(6, 2)}, list(ROWS), "y")
    graph = OnnxGraph.from_file(path).double()
    x = torch.from_numpy(floats(*ROWS)).double().requires_grad_()
    assert torch.autograd.gradcheck(graph, (x,))


def test_an_unknown_operator_is_named(tmp_path: Path) -> None:
    path = tmp_path / "unknown.onnx"
    save_graph(path, [helper.make_node("Tanh", ["x"], ["y"])], {}, list(ROWS), "y")
    with pytest.raises(PartsError, match="Tanh"):
        OnnxGraph.from_file(path)


def test_a_cut_at_no_tensor_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "relu.onnx"
    save_graph(path, [helper.make_node("Relu", ["x"], ["y"])], {}, list(ROWS), "y")
    with pytest.raises(PartsError, match="no tensor 'z'"):
        OnnxGraph.from_file(path, "z")


def test_an_operator_set_with_another_meaning_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "new.onnx"
    save_graph(path, [helper.make_node("Relu", ["x"], ["y"])], {}, list(ROWS), "y", opset=17)
    with pytest.raises(PartsError, match="operator set 17"):
        OnnxGraph.from_file(path)


def test_a_softmax_over_several_axes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "softmax.onnx"
    save_graph(path, [helper.make_node("Softmax", ["x"], ["y"], axis=1)], {}, list(ROWS), "y")
    with pytest.raises(PartsError, match="Softmax"):
        OnnxGraph.from_file(path)(torch.zeros(ROWS))


def test_a_file_that_is_no_graph_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "text.onnx"
    path.write_text("not a graph", encoding="utf-8")
    with pytest.raises(PartsError):
        OnnxGraph.from_file(path)
    onnx.save(helper.make_model(helper.make_graph([], "g", [], [])), str(path))
    with pytest.raises(PartsError):
        OnnxGraph.from_file(path)
