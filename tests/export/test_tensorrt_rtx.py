"""Engines of TensorRT for RTX: built without a GPU, whole or not at all, and described."""

from __future__ import annotations

import gc
import importlib.util
import multiprocessing
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edge_safe.errors import ExportError
from edge_safe.export.tensorrt.rtx import Profile, Shape, build_engine, capability_named

WIDTH, INNER = 64, 256
FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16
LONG = Profile({"x": ((1, 1, WIDTH), (1, 64, WIDTH), (1, 512, WIDTH))})
SHORT = Profile({"x": ((1, 1, WIDTH), (1, 1, WIDTH), (1, 2, WIDTH))})

rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason="needs pip install 'edge-safe[tensorrt-rtx]'",
)


def _save(
    path: Path,
    nodes: list[onnx.NodeProto],
    initializers: list[onnx.TensorProto],
    kind: int = HALF,
    inputs: tuple[str, ...] = ("x",),
) -> Path:
    """Writes a graph from ``inputs`` to ``z``: all (1, free, WIDTH), and of one type."""
    places = [helper.make_tensor_value_info(name, kind, [1, name, WIDTH]) for name in inputs]
    result = helper.make_tensor_value_info("z", kind, [1, "S", WIDTH])
    graph = helper.make_graph(nodes, path.stem, places, [result], initializers)
    opset = helper.make_opsetid("", 21)
    path.write_bytes(
        helper.make_model(graph, opset_imports=[opset], ir_version=10).SerializeToString()
    )
    return path


def _weights(name: str, shape: Shape, dtype: type = np.float16) -> onnx.TensorProto:
    # Of another seed for each name: the builder keeps equal weights once.
    values = np.random.default_rng(list(name.encode())).standard_normal(shape)
    return numpy_helper.from_array(values.astype(dtype), name)


def _scales(name: str, shape: Shape) -> onnx.TensorProto:
    return numpy_helper.from_array(np.full(shape, 0.02, np.float16), name)


def _whole(name: str, shape: Shape, kind: int) -> onnx.TensorProto:
    """Weights of ±7, which int4 and int8 hold."""
    values = np.random.default_rng(0).integers(-7, 8, shape)
    return helper.make_tensor(name, kind, shape, values.ravel().tolist())


def _layer(path: Path, inner: int = INNER, kind: int = HALF) -> Path:
    """Two matrix products, and a softmax in fp32 between casts where they are fp16."""
    dtype = np.float16 if kind == HALF else np.float32
    nodes = [
        helper.make_node("MatMul", ["x", "up.weight"], ["a"], name="up"),
        helper.make_node("Gelu", ["a"], ["b"], name="gelu"),
        helper.make_node("MatMul", ["b", "down.weight"], ["c"], name="down"),
        helper.make_node("Cast", ["c"], ["d"], name="to32", to=FLOAT),
        helper.make_node("Softmax", ["d"], ["e"], name="softmax"),
        helper.make_node("Cast", ["e"], ["z"], name="back", to=kind),
    ]
    weights = [
        _weights("up.weight", (WIDTH, inner), dtype),
        _weights("down.weight", (inner, WIDTH), dtype),
    ]
    return _save(path, nodes, weights, kind)


def _in_fp32(path: Path) -> Path:
    return _layer(path, kind=FLOAT)


def _int4(path: Path) -> Path:
    """One matrix product; its weights are int4 in blocks of 32."""
    nodes = [
        helper.make_node(
            "DequantizeLinear", ["w", "s"], ["v"], name="dequantize", axis=0, block_size=32
        ),
        helper.make_node("MatMul", ["x", "v"], ["z"], name="product"),
    ]
    weights = [_whole("w", (WIDTH, WIDTH), TensorProto.INT4), _scales("s", (WIDTH // 32, WIDTH))]
    return _save(path, nodes, weights)


def _int8(path: Path) -> Path:
    """One matrix product of int8 states and int8 weights."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "t", "o"], ["q"], name="quantize"),
        helper.make_node("DequantizeLinear", ["q", "t", "o"], ["y"], name="states"),
        helper.make_node("DequantizeLinear", ["w", "s"], ["v"], name="weights", axis=1),
        helper.make_node("MatMul", ["y", "v"], ["z"], name="product"),
    ]
    weights = [
        _whole("w", (WIDTH, WIDTH), TensorProto.INT8),
        _scales("s", (WIDTH,)),
        numpy_helper.from_array(np.float16(0.05), "t"),
        numpy_helper.from_array(np.int8(0), "o"),
    ]
    return _save(path, nodes, weights)


def _ignore(share: float) -> None:
    pass


@rtx
def test_an_engine_is_built_without_a_gpu_and_described(tmp_path: Path) -> None:
    graph, out = _layer(tmp_path / "gate.onnx"), tmp_path / "gate.engine"
    record = build_engine(graph, out, ["SM89"], [LONG, SHORT], _ignore)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gate.engine", "gate.onnx"]
    assert (record.graph, record.engine) == ("gate.onnx", "gate.engine")
    assert record.capabilities == ["SM89"]
    assert record.bytes == out.stat().st_size
    assert record.seconds > 0
    assert record.profiles == [
        {"x": [[1, 1, WIDTH], [1, 64, WIDTH], [1, 512, WIDTH]]},
        {"x": [[1, 1, WIDTH], [1, 1, WIDTH], [1, 2, WIDTH]]},
    ]
    assert record.tensorrt_version.startswith("1.")


@rtx
def test_the_memory_asked_for_is_the_weights_and_what_each_profile_needs(tmp_path: Path) -> None:
    graph = _layer(tmp_path / "gate.onnx", inner=8192)
    record = build_engine(graph, tmp_path / "gate.engine", ["SM89"], [LONG, SHORT], _ignore)
    weights = 2 * WIDTH * 8192 * 2
    assert record.weight_bytes == pytest.approx(weights, rel=0.01)
    long, short = record.activation_bytes or []
    # Between the two products stand 512 rows against 2, of fp16.
    assert long - short == pytest.approx((512 - 2) * 8192 * 2, rel=0.1)


@rtx
def test_one_file_serves_several_capabilities_and_holds_the_weights_once(tmp_path: Path) -> None:
    graph = _layer(tmp_path / "gate.onnx", inner=16384)
    names = ["SM75", "SM80", "SM86", "SM89", "SM120"]
    one = build_engine(graph, tmp_path / "one.engine", ["SM89"], [LONG], _ignore)
    all_ = build_engine(graph, tmp_path / "all.engine", names, [LONG], _ignore)
    assert all_.capabilities == names
    assert all_.bytes < 1.2 * one.bytes
    assert (tmp_path / "all.engine").read_bytes() != (tmp_path / "one.engine").read_bytes()


@rtx
def test_an_engine_for_two_capabilities_is_that_of_neither_alone(tmp_path: Path) -> None:
    graph = _layer(tmp_path / "gate.onnx")
    engines = set()
    for names in (["SM86"], ["SM89"], ["SM86", "SM89"]):
        build_engine(graph, tmp_path / "gate.engine", names, [LONG], _ignore)
        engines.add((tmp_path / "gate.engine").read_bytes())
    assert len(engines) == 3


def _built_directly(graph: Path, tf32: bool) -> bytes:
    """The engine that the builder makes of the same graph, with and without its TF32 setting."""
    import tensorrt_rtx as trt

    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(graph))
    config = builder.create_builder_config()
    (config.set_flag if tf32 else config.clear_flag)(trt.BuilderFlag.TF32)
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    profile = builder.create_optimization_profile()
    profile.set_shape("x", *LONG.shapes["x"])
    config.add_optimization_profile(profile)
    return bytes(builder.build_serialized_network(network, config))


@rtx
def test_fp32_is_not_computed_in_tf32(tmp_path: Path) -> None:
    graph, out = _in_fp32(tmp_path / "gate.onnx"), tmp_path / "gate.engine"
    build_engine(graph, out, ["SM89"], [LONG], _ignore)
    assert out.read_bytes() == _built_directly(graph, tf32=False)
    assert out.read_bytes() != _built_directly(graph, tf32=True)


@rtx
def test_weights_beside_the_graph_are_read(tmp_path: Path) -> None:
    inside = build_engine(
        _layer(tmp_path / "gate.onnx"), tmp_path / "inside.engine", ["SM89"], [LONG], _ignore
    )
    model = onnx.load(tmp_path / "gate.onnx")
    onnx.save(
        model,
        tmp_path / "gate.onnx",
        save_as_external_data=True,
        location="weights.data",
        size_threshold=0,
    )
    assert (tmp_path / "weights.data").stat().st_size >= 2 * WIDTH * INNER * 2
    beside = build_engine(
        tmp_path / "gate.onnx", tmp_path / "beside.engine", ["SM89"], [LONG], _ignore
    )
    assert (beside.bytes, beside.weight_bytes) == (inside.bytes, inside.weight_bytes)


@rtx
def test_layers_are_counted_by_the_type_they_compute_in(tmp_path: Path) -> None:
    record = build_engine(
        _layer(tmp_path / "gate.onnx"), tmp_path / "gate.engine", ["SM89"], [LONG], _ignore
    )
    # up, gelu, down and the cast back; the cast to fp32 and softmax.
    assert record.layers == {"fp16": 4, "fp32": 2}
    assert record.matrices == {"fp16 x fp16": 2}


@rtx
def test_int4_weights_are_multiplied_in_fp16_and_stay_packed(tmp_path: Path) -> None:
    record = build_engine(
        _int4(tmp_path / "gate.onnx"), tmp_path / "gate.engine", ["SM89"], [LONG], _ignore
    )
    assert record.layers == {"fp16": 1}
    assert record.matrices == {"fp16 x int4": 1}
    assert record.weight_bytes is not None
    assert WIDTH * WIDTH / 2 < record.weight_bytes < WIDTH * WIDTH


@rtx
def test_a_product_of_int8_states_and_weights_counts_as_int8(tmp_path: Path) -> None:
    record = build_engine(
        _int8(tmp_path / "gate.onnx"), tmp_path / "gate.engine", ["SM89"], [LONG], _ignore
    )
    assert record.layers == {"int8": 1}
    assert record.matrices == {"int8 x int8": 1}


@rtx
def test_progress_never_falls_and_ends_at_one(tmp_path: Path) -> None:
    shares: list[float] = []
    build_engine(
        _layer(tmp_path / "gate.onnx"), tmp_path / "gate.engine", ["SM89"], [LONG], shares.append
    )
    assert len(shares) > 10
    assert shares == sorted(shares)
    assert (shares[0] < 0.1, shares[-1]) == (True, 1.0)


@rtx
def test_all_operators_that_cannot_be_read_are_in_one_error(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Riddle", ["x"], ["a"], name="layer.0.query", domain="com.nobody"),
        helper.make_node("Puzzle", ["a"], ["z"], domain="com.nobody"),
    ]
    graph = _save(tmp_path / "gate.onnx", nodes, [])
    with pytest.raises(ExportError, match=r"cannot read gate\.onnx") as caught:
        build_engine(graph, tmp_path / "gate.engine", ["SM89"], [LONG], _ignore)
    message = str(caught.value)
    assert "Riddle layer.0.query" in message
    assert "Puzzle (node 1)" in message
    assert "--target cuda" in message
    assert [path.name for path in tmp_path.iterdir()] == ["gate.onnx"]


@rtx
@pytest.mark.parametrize(
    ("make", "what"),
    [(_in_fp32, r"fp32 matrix products.*\(up and 1 more\)"), (_int4, r"int4 weights.*\(w\)")],
)
def test_turing_refuses_what_it_cannot_multiply_with_the_place_named(
    make: Callable[[Path], Path], what: str, tmp_path: Path
) -> None:
    graph = make(tmp_path / "gate.onnx")
    with pytest.raises(ExportError, match=rf"SM75.*{what}.*Leave SM75 out"):
        build_engine(graph, tmp_path / "gate.engine", ["SM75", "SM89"], [LONG], _ignore)
    assert build_engine(graph, tmp_path / "gate.engine", ["SM89"], [LONG], _ignore).bytes


@rtx
@pytest.mark.parametrize(
    ("profiles", "message"),
    [
        ([], "lacks the input 'x'"),
        ([LONG, Profile({})], "Profile 1 .*lacks the input 'x'"),
        ([Profile({**LONG.shapes, "y": ((1,), (1,), (1,))})], "'y', which is no input; inputs: x"),
        ([Profile({"x": ((1, 1), (1, 1), (1, 1))})], "that fit"),
        ([Profile({"x": ((1, 1, 8), (1, 1, 8), (1, 2, 8))})], "that fit"),
        ([Profile({"x": ((1, 9, WIDTH), (1, 4, WIDTH), (1, 8, WIDTH))})], "in this order"),
    ],
)
def test_a_profile_that_does_not_fit_the_graph_is_refused(
    profiles: list[Profile], message: str, tmp_path: Path
) -> None:
    graph = _layer(tmp_path / "gate.onnx")
    with pytest.raises(ExportError, match=message):
        build_engine(graph, tmp_path / "gate.engine", ["SM89"], profiles, _ignore)


def _counted(path: Path) -> Path:
    """A table of as many rows as an input's value says, added to x."""
    nodes = [
        helper.make_node("Squeeze", ["count", "axis"], ["n"], name="n"),
        helper.make_node("Range", ["zero", "n", "one"], ["steps"], name="steps"),
        helper.make_node("Gather", ["table", "steps"], ["rows"], name="rows"),
        helper.make_node("Add", ["x", "rows"], ["y"], name="add"),
        helper.make_node("Cast", ["flag"], ["f"], name="flag", to=HALF),
        helper.make_node("Mul", ["y", "f"], ["z"], name="scale"),
    ]
    inputs = [
        helper.make_tensor_value_info("x", HALF, ["rows", WIDTH]),
        helper.make_tensor_value_info("count", TensorProto.INT64, [1]),
        helper.make_tensor_value_info("flag", TensorProto.INT64, [1]),
    ]
    numbers = {"axis": np.array([0]), "zero": np.array(0), "one": np.array(1)}
    weights = [numpy_helper.from_array(value, name) for name, value in numbers.items()]
    result = helper.make_tensor_value_info("z", HALF, ["rows", WIDTH])
    table = _weights("table", (INNER, WIDTH))
    graph = helper.make_graph(nodes, path.stem, inputs, [result], [*weights, table])
    opset = helper.make_opsetid("", 21)
    path.write_bytes(
        helper.make_model(graph, opset_imports=[opset], ir_version=10).SerializeToString()
    )
    return path


@rtx
def test_values_that_set_shapes_are_asked_for_and_others_left_aside(tmp_path: Path) -> None:
    graph = _counted(tmp_path / "tower.onnx")
    shapes = {"x": ((2, WIDTH), (50, WIDTH), (200, WIDTH))}
    values = {"count": ((2,), (50,), (200,)), "flag": ((0,), (1,), (4,))}
    profile = Profile(shapes, values)
    record = build_engine(graph, tmp_path / "tower.engine", ["SM89"], [profile], _ignore)
    assert record.profiles == [
        {"x": [[2, WIDTH], [50, WIDTH], [200, WIDTH]], "count": [[2], [50], [200]]}
    ]


@rtx
def test_values_that_contradict_a_shape_are_an_error(tmp_path: Path) -> None:
    graph = _counted(tmp_path / "tower.onnx")
    profile = Profile(
        {"x": ((2, WIDTH), (50, WIDTH), (200, WIDTH))}, {"count": ((2,), (60,), (200,))}
    )
    with pytest.raises(ExportError, match=r"could not build tower\.onnx.*50 != 60|60 != 50"):
        build_engine(graph, tmp_path / "tower.engine", ["SM89"], [profile], _ignore)


@rtx
def test_a_failed_build_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    nodes = [helper.make_node("Add", ["x", "y"], ["z"], name="sum")]
    graph = _save(tmp_path / "gate.onnx", nodes, [], inputs=("x", "y"))
    never = Profile(
        {
            "x": ((1, 4, WIDTH), (1, 4, WIDTH), (1, 5, WIDTH)),
            "y": ((1, 6, WIDTH), (1, 6, WIDTH), (1, 7, WIDTH)),
        }
    )
    with pytest.raises(
        ExportError, match=r"could not build gate\.onnx for SM86, SM89.*sum"
    ) as found:
        build_engine(graph, tmp_path / "gate.engine", ["SM86", "SM89"], [never], _ignore)
    # Without a GPU the builder also names the driver, which is not the reason.
    assert "driver" not in str(found.value)
    assert [path.name for path in tmp_path.iterdir()] == ["gate.onnx"]


@rtx
def test_a_full_disk_is_an_error_and_the_older_engine_stays(tmp_path: Path) -> None:
    graph, out = _layer(tmp_path / "gate.onnx"), tmp_path / "gate.engine"
    build_engine(graph, out, ["SM89"], [LONG], _ignore)
    older = out.read_bytes()
    (tmp_path / ".gate.engine.part").symlink_to("/dev/full")
    with pytest.raises(ExportError, match=r"cannot be written: .*No space left"):
        build_engine(graph, out, ["SM86"], [LONG], _ignore)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gate.engine", "gate.onnx"]
    assert out.read_bytes() == older


@rtx
def test_an_interrupted_build_stops_and_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(share: float) -> None:
        if share > 0.5:
            raise KeyboardInterrupt

    graph = _layer(tmp_path / "gate.onnx")
    with pytest.raises(KeyboardInterrupt):
        build_engine(graph, tmp_path / "gate.engine", ["SM89"], [LONG], interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["gate.onnx"]


@rtx
def test_ctrl_c_is_not_lost_where_the_builder_calls_back(tmp_path: Path) -> None:
    """An exception in the logger goes no further than the builder."""
    graph, calls = _layer(tmp_path / "gate.onnx"), []
    last: list[int] = []

    def interrupt(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code.co_name == "log":
            calls.append(frame)
            if [len(calls)] == last:
                signal.raise_signal(signal.SIGINT)

    def build(name: str) -> None:
        calls.clear()
        sys.setprofile(interrupt)
        try:
            build_engine(graph, tmp_path / name, ["SM89"], [LONG], _ignore)
        finally:
            sys.setprofile(None)

    # The builder says more the first time, and says as much every time after that.
    for _ in range(2):
        build("other.engine")
    last.append(len(calls) // 2)
    # A process that was started in the background may be told to ignore Ctrl-C.
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            build("gate.engine")
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, usual)
    assert {path.name for path in tmp_path.iterdir()} == {"gate.onnx", "other.engine"}


def _build_until(share: float, graph: Path, out: Path) -> None:
    """Builds, and kills itself once a share is done."""

    def progress(done: float) -> None:
        if done > share:
            os.kill(os.getpid(), signal.SIGKILL)

    build_engine(graph, out, ["SM89"], [LONG], progress)


@rtx
@pytest.mark.parametrize("share", [0.0, 0.5, 0.8])
def test_a_killed_build_leaves_no_engine_and_can_be_repeated(share: float, tmp_path: Path) -> None:
    graph, out = _layer(tmp_path / "gate.onnx"), tmp_path / "gate.engine"
    process = multiprocessing.get_context("spawn").Process(
        target=_build_until, args=(share, graph, out)
    )
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert not list(tmp_path.glob("*.engine"))
    build_engine(graph, out, ["SM89"], [LONG], _ignore)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gate.engine", "gate.onnx"]


def _build_with_a_dead_builder_about(graph: Path, out: Path) -> None:
    """Leaves garbage that holds a builder, to be collected when the next one calls its logger."""
    import tensorrt_rtx as trt

    gc.disable()
    cycle: list[object] = [trt.Builder(trt.Logger(trt.Logger.ERROR))]
    cycle.append(cycle)
    del cycle
    gc.set_threshold(10**9)
    gc.enable()

    def collect_soon(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code.co_name == "log":
            gc.set_threshold(1)

    sys.setprofile(collect_soon)
    build_engine(graph, out, ["SM89"], [LONG], _ignore)
    sys.setprofile(None)
    assert gc.isenabled()


@rtx
def test_garbage_with_an_earlier_builder_in_it_does_not_stop_the_next(tmp_path: Path) -> None:
    graph, out = _layer(tmp_path / "gate.onnx"), tmp_path / "gate.engine"
    process = multiprocessing.get_context("spawn").Process(
        target=_build_with_a_dead_builder_about, args=(graph, out)
    )
    process.start()
    process.join(60)
    process.kill()
    process.join()
    assert process.exitcode == 0
    assert out.exists()


@rtx
def test_a_failed_build_gives_the_builder_back_at_once(tmp_path: Path) -> None:
    graph = _layer(tmp_path / "gate.onnx")
    with pytest.raises(ExportError) as caught:
        build_engine(graph, tmp_path / "gate.engine", ["SM89"], [], _ignore)
    frames = [frame for frame, _ in traceback.walk_tb(caught.tb)]
    held = [
        name for frame in frames if "rtx" in frame.f_code.co_filename for name in frame.f_locals
    ]
    assert "builder" not in held


def test_an_unknown_capability_is_refused_with_those_there_are() -> None:
    with pytest.raises(ExportError, match="no engine for 'SM87'") as caught:
        capability_named("SM87")
    message = str(caught.value)
    assert all(name in message for name in ("SM75", "SM80", "SM86", "SM89", "SM120", "SM121"))
    assert "Orin (SM87) export with --target tensorrt" in message


@rtx
def test_every_capability_of_the_table_is_one_of_the_builders() -> None:
    import tensorrt_rtx

    from edge_safe.export.tensorrt.rtx import CAPABILITIES

    known = set(tensorrt_rtx.ComputeCapability.__members__) - {"NONE", "CURRENT"}
    assert set(CAPABILITIES) == known


def test_the_missing_package_is_an_error_that_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(ExportError, match=r"pip install 'edge-safe\[tensorrt-rtx\]'"):
        build_engine(tmp_path / "gate.onnx", tmp_path / "gate.engine", ["SM89"], [LONG], _ignore)


def test_the_module_loads_without_the_package() -> None:
    script = "import edge_safe.export.tensorrt.rtx, sys; print('tensorrt_rtx' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"
