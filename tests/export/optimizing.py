"""What ONNX Runtime's optimizers still make of a graph."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

import onnx

# They only move values about, or copy them.
LAYOUT = {"Identity", "Gather", "Split", "Squeeze", "Unsqueeze", "Transpose", "Reshape", "Sum"}


def changed_operators(graph: Path) -> dict[str, int]:
    """Operators that compute, by how many more of them the optimizers leave."""
    import onnxruntime as ort

    with tempfile.TemporaryDirectory() as folder:
        settings = ort.SessionOptions()
        settings.log_severity_level = 4
        settings.optimized_model_filepath = f"{folder}/optimized.onnx"
        settings.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", "optimized.onnx.data"
        )
        ort.InferenceSession(str(graph), settings, providers=["CPUExecutionProvider"])
        after = operators(Path(folder) / "optimized.onnx")
    after.subtract(operators(graph))
    return {name: count for name, count in after.items() if count and name not in LAYOUT}


def operators(path: Path) -> Counter[str]:
    """How often each operator stands in a graph and its branches."""
    return _count(onnx.load(path, load_external_data=False).graph)


def _count(graph: onnx.GraphProto) -> Counter[str]:
    found: Counter[str] = Counter()
    for node in graph.node:
        found[node.op_type] += 1
        for attribute in node.attribute:
            if attribute.HasField("g"):
                found += _count(attribute.g)
    return found
