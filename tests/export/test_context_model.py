"""Context models: the file that ONNX Runtime opens in place of a graph with a built engine."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from edge_safe.export import export_bundle
from edge_safe.export.tensorrt.context_model import write_context_model
from edge_safe.export.tensorrt.rtx import EngineRecord, Profile, build_engine
from edge_safe.runtime.bundle import open_bundle
from edge_safe.runtime.external_data import external_files
from edge_safe.runtime.manifest import load_manifest
from edge_safe.runtime.rtx_provider import context_engine, context_file

rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason="needs pip install 'edge-safe[tensorrt-rtx]'",
)

SHAPES = {"x": ((1, 0, 8), (1, 4, 8), (1, 16, 8)), "ids": ((1, 0), (1, 4), (1, 16))}


def _graph(path: Path) -> Path:
    """Two inputs and two outputs, of different types and free lengths."""
    graph = helper.make_graph(
        [
            helper.make_node("Add", ["x", "x"], ["y"], name="twice"),
            helper.make_node("Add", ["ids", "ids"], ["z"], name="ids_twice"),
        ],
        path.stem,
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT16, [1, "sequence", 8]),
            helper.make_tensor_value_info("ids", TensorProto.INT64, [1, "total"]),
        ],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT16, [1, "sequence", 8]),
            helper.make_tensor_value_info("z", TensorProto.INT64, [1, "total"]),
        ],
    )
    opset = helper.make_opsetid("", 21)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=10), path)
    return path


def _record(graph: Path) -> EngineRecord:
    """What the builder says of an engine; none is built."""
    return EngineRecord(
        graph=graph.name,
        engine=graph.with_suffix(".engine").name,
        capabilities=["SM89", "SM120"],
        bytes=1,
        seconds=0.0,
        layers={},
        matrices={},
        weight_bytes=None,
        activation_bytes=None,
        profiles=[],
        tensorrt_version="1.7.1.116",
    )


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    return _graph(tmp_path / "decoder.onnx")


def test_it_is_one_node_that_names_the_engine(graph: Path) -> None:
    written = write_context_model(graph, _record(graph))
    assert written.name == context_file("decoder.onnx") == "decoder_ctx.onnx"
    model = onnx.load(str(written))
    (node,) = model.graph.node
    assert (node.domain, node.op_type) == ("com.microsoft", "EPContext")
    attributes = {own.name: helper.get_attribute_value(own) for own in node.attribute}
    # Those that the provider writes itself: it does not always look whether one is there.
    assert attributes == {
        "embed_mode": 0,
        "ep_cache_context": b"decoder.engine",
        "main_context": 0,
        "source": b"NvTensorRTRTXExecutionProvider",
        "partition_name": b"decoder",
        "onnx_model_filename": b"decoder.onnx",
        "ep_sdk_version": b"1.7.1.116",
        "hardware_architecture": b"SM89,SM120",
    }


def test_inputs_and_outputs_are_those_of_the_graph(graph: Path) -> None:
    model = onnx.load(str(write_context_model(graph, _record(graph))))
    source = onnx.load(str(graph))
    assert list(model.graph.input) == list(source.graph.input)
    assert list(model.graph.output) == list(source.graph.output)
    assert list(model.graph.node[0].input) == ["x", "ids"]
    assert list(model.graph.node[0].output) == ["y", "z"]


def test_the_checker_of_onnx_accepts_it(graph: Path) -> None:
    onnx.checker.check_model(onnx.load(str(write_context_model(graph, _record(graph)))))


def test_the_runtime_reads_the_engine_s_name_without_onnx(graph: Path) -> None:
    model = write_context_model(graph, _record(graph)).read_bytes()
    assert context_engine(model) == "decoder.engine"
    assert external_files(model) == set()


def test_onnx_runtime_knows_the_node_and_the_cpu_does_not_run_it(graph: Path) -> None:
    written = write_context_model(graph, _record(graph))
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4
    with pytest.raises(Exception, match=r"NOT_IMPLEMENTED.*EPContext"):
        onnxruntime.InferenceSession(str(written), settings, providers=["CPUExecutionProvider"])


def test_only_the_finished_file_is_left(graph: Path) -> None:
    write_context_model(graph, _record(graph))
    write_context_model(graph, _record(graph))
    assert sorted(path.name for path in graph.parent.iterdir()) == [
        "decoder.onnx",
        "decoder_ctx.onnx",
    ]


def test_the_same_engine_gives_the_same_bytes(graph: Path) -> None:
    first = write_context_model(graph, _record(graph)).read_bytes()
    assert write_context_model(graph, _record(graph)).read_bytes() == first


@rtx
def test_an_engine_that_was_built_is_named_as_it_stands_beside_it(graph: Path) -> None:
    engine = graph.with_suffix(".engine")
    record = build_engine(graph, engine, ["SM89"], [Profile(SHAPES)], lambda share: None)
    written = write_context_model(graph, record)
    assert written.with_name(context_engine(written.read_bytes())) == engine
    assert engine.stat().st_size == record.bytes


@rtx
def test_an_exported_bundle_lists_one_for_every_engine(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "bundle"
    export_bundle(
        tiny_checkpoint, out, precision="fp16", target="tensorrt-rtx", capabilities=("SM89",)
    )
    manifest = load_manifest(out)
    assert {"gate", "decoder"} <= set(manifest.engines) <= set(manifest.graphs)
    for name in manifest.engines:
        context = context_file(manifest.graphs[name].file)
        engine = context_engine((out / context).read_bytes())
        assert {context, engine} <= set(manifest.files)
    open_bundle(out, provider="cpu").verify()
