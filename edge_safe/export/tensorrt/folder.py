"""Lowers all graphs of a folder. The embedding stays as it is: its look-up is the host's work."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import onnx

from edge_safe.export.graphs.store import WeightStore
from edge_safe.export.tensorrt.lowering import lower_graph
from edge_safe.export.tensorrt.releases import Release
from edge_safe.export.tensorrt.source import Source
from edge_safe.runtime.bundle import ON_THE_HOST


def lower_folder(
    source: Path,
    out: Path,
    release: Release,
    *,
    half: bool,
    progress: Callable[[float], None],
) -> None:
    """Writes every graph of ``source`` for a release; graphs that share weights share them again.

    Args:
        source: Folder of graphs in ONNX Runtime's own operators, without early exits inside.
        out: Folder to write to.
        release: Who is to read them.
        half: Whether products are made in float16, and caches kept in it.
        progress: Told the share done after each graph.

    Raises:
        ExportError: An operator has no lowering.
    """
    graphs = sorted(source.glob("*.onnx"))
    with ExitStack() as opened:
        stores: dict[str, WeightStore] = {}
        for number, path in enumerate(graphs):
            embedding = path.stem in ON_THE_HOST
            name = f"{path.name}.data" if embedding else weights_of(path)
            if name not in stores:
                stores[name] = opened.enter_context(WeightStore(out / name))
            if embedding:
                copy_graph(path, out / path.name, stores[name])
            else:
                lower_graph(path, out / path.name, stores[name], release, half=half)
            progress((number + 1) / len(graphs))


def weights_of(path: Path) -> str:
    """Name of the file that a graph's weights stand in."""
    for tensor in Source(path).graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                return str(entry.value)
    return f"{path.name}.data"


def copy_graph(path: Path, out: Path, store: WeightStore) -> None:
    """Writes a graph as it is, with its weights in another file."""
    source = Source(path)
    source.index()
    model = onnx.load(str(path), load_external_data=False)
    kept = [
        store.add(source.array(tensor.name)).proto(tensor.name)
        if tensor.data_location == onnx.TensorProto.EXTERNAL
        else tensor
        for tensor in model.graph.initializer
    ]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    out.write_bytes(model.SerializeToString())
