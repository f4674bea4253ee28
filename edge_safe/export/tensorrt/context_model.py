"""The graph that ONNX Runtime opens in place of one whose engine was built ahead of time.

One node, EPContext, names the engine's file beside it; inputs and outputs are those of the graph.
Attributes as the provider itself writes them (github.com/NVIDIA/TensorRT-RTX-EP-ABI,
src/onnx_ctx_model_helper.cc; onnxruntime.ai, "EP Context Design"). No such graph was opened on a
GPU yet.
"""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import helper

from edge_safe.export.tensorrt.rtx import EngineRecord
from edge_safe.runtime.rtx_provider import NAME, context_file

_DOMAIN = "com.microsoft"


def write_context_model(graph: Path, record: EngineRecord) -> Path:
    """Writes the context model of a graph beside it, whole or not at all.

    Args:
        graph: The ONNX file that the engine was built of.
        record: What was built; the engine stands beside the graph.

    Returns:
        The file that was written.
    """
    source = onnx.load(str(graph), load_external_data=False)
    body = source.graph
    node = helper.make_node(
        "EPContext",
        [value.name for value in body.input],
        [value.name for value in body.output],
        name=graph.stem,
        domain=_DOMAIN,
        # 0: the engine stands in a file of its own, whose size knows no limit.
        embed_mode=0,
        ep_cache_context=record.engine,
        # 0: what the provider writes; it knows no node that others refer to.
        main_context=0,
        source=NAME,
        partition_name=graph.stem,
        onnx_model_filename=graph.name,
        ep_sdk_version=record.tensorrt_version,
        hardware_architecture=",".join(record.capabilities),
    )
    model = helper.make_model(
        helper.make_graph([node], graph.stem, list(body.input), list(body.output)),
        opset_imports=[
            *(own for own in source.opset_import if own.domain == ""),
            helper.make_opsetid(_DOMAIN, 1),
        ],
        ir_version=source.ir_version,
        producer_name="edge-safe",
    )
    out = graph.with_name(context_file(graph.name))
    partial = out.with_name(out.name + ".partial")
    try:
        partial.write_bytes(model.SerializeToString(deterministic=True))
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)
    return out
