"""The files of a bundle beside its graphs: tokenizer, template, hashes, manifest."""

from __future__ import annotations

import hashlib
import importlib.metadata
import shutil
import tempfile
from datetime import datetime, timezone
from pathlib import Path

import onnx
from transformers import PreTrainedTokenizerBase

from edge_safe.errors import ExportError
from edge_safe.export.checkpoint.adapter import weights_folder
from edge_safe.export.graphs.builder import CONTRIB
from edge_safe.runtime import manifest as schema
from edge_safe.runtime.digest import sha256_file
from edge_safe.runtime.prefill import ATTENTION_END
from edge_safe.runtime.session import PAST

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")

TOOLS = ("edge-safe", "torch", "transformers", "onnx", "onnxruntime")

DTYPES: dict[int, str] = {
    onnx.TensorProto.FLOAT: "float32",
    onnx.TensorProto.FLOAT16: "float16",
    onnx.TensorProto.INT64: "int64",
    onnx.TensorProto.INT32: "int32",
    onnx.TensorProto.INT8: "int8",
}

# Beginnings of the names of graphs that are written with the runtime's fused operators.
_FUSED = ("embed_tokens", "gate", "decoder")

# Types that weight matrices are stored in, the fewest bits first.
STORED: dict[int, str] = {
    onnx.TensorProto.INT4: "int4",
    onnx.TensorProto.INT8: "int8",
    onnx.TensorProto.FLOAT16: "fp16",
    onnx.TensorProto.BFLOAT16: "bf16",
}


def copy_tokenizer(source: Path, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Puts tokenizer and chat template into the bundle, the checkpoint's own files first.

    Raises:
        ExportError: The tokenizer has no tokenizer.json or no chat template.
    """
    # Beside the bundle, so that it goes with what a killed export leaves.
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        saved = Path(name)
        tokenizer.save_pretrained(saved)
        for file in TOKENIZER_FILES:
            origin = source / file if (source / file).is_file() else saved / file
            if origin.is_file():
                shutil.copyfile(origin, folder / file)
    for file, what in (
        ("tokenizer.json", "fast tokenizer (tokenizer.json)"),
        ("chat_template.jinja", "chat template, so there is no place for a safety token"),
    ):
        if not (folder / file).is_file():
            raise ExportError(f"{source} has no {what}. Put {file} beside the model.")


def describe_graphs(folder: Path) -> dict[str, schema.Graph]:
    """Inputs, outputs and precision of every graph in a folder, read from the graphs."""
    return {path.stem: _describe(path) for path in sorted(folder.glob("*.onnx"))}


def hash_files(folder: Path) -> dict[str, schema.FileEntry]:
    """Hash and size of every file but the manifest."""
    entries = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != schema.MANIFEST_FILE:
            entries[name] = schema.FileEntry(sha256_file(path), path.stat().st_size)
    return entries


def write_manifest(folder: Path, manifest: schema.Manifest) -> None:
    """Writes ``edge_safe.json``."""
    (folder / schema.MANIFEST_FILE).write_bytes(schema.dump_manifest(manifest))


def provenance(source: Path, command: str) -> schema.Provenance:
    """Where a bundle comes from."""
    return schema.Provenance(
        source=source.resolve().name,
        source_sha256=hash_source(source),
        tool_versions={name: _version(name) for name in TOOLS},
        command=command,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def hash_source(source: Path) -> str:
    """One hash over the names and contents of a checkpoint folder's files.

    An adapter's base model counts with it.
    """
    digest = hashlib.sha256()
    for folder in dict.fromkeys((source, weights_folder(source))):
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder).as_posix()
            if path.is_file() and not any(part.startswith(".") for part in Path(name).parts):
                digest.update(f"{name}\0{sha256_file(path)}\n".encode())
    return digest.hexdigest()


def _describe(path: Path) -> schema.Graph:
    graph = onnx.load(path, load_external_data=False).graph
    return schema.Graph(
        file=path.name,
        inputs=[_tensor(value) for value in graph.input],
        outputs=[_tensor(value) for value in graph.output],
        precision=_precision(graph),
        optimized=path.stem.startswith(_FUSED) and _optimized(graph),
    )


def _optimized(graph: onnx.GraphProto) -> bool:
    """Whether ONNX Runtime's optimizers would find nothing to fuse and no weight to cast.

    Layers are written with its fused operators, unless they were lowered to standard ones, which
    TensorRT reads; attention in which positions see those behind them is not.
    """
    names = {value.name for value in graph.input}
    layers = any(name.startswith(PAST) for name in names)
    fused = any(node.domain == CONTRIB for node in graph.node)
    return (fused or not layers) and ATTENTION_END not in names and not _foldable(graph, set())


def _foldable(graph: onnx.GraphProto, outside: set[str]) -> bool:
    """Whether a node computes on nothing but weights, so that its result never changes."""
    weights = outside | {tensor.name for tensor in graph.initializer}
    return any(
        (node.input and node.op_type != "Identity" and weights.issuperset(node.input))
        or any(_foldable(part.g, weights) for part in node.attribute if part.HasField("g"))
        for node in graph.node
    )


def _tensor(value: onnx.ValueInfoProto) -> schema.Tensor:
    kind = value.type.tensor_type
    if kind.elem_type not in DTYPES:
        raise ExportError(f"{value.name} is of a type that a bundle cannot describe.")
    shape: list[int | str] = [dim.dim_param or dim.dim_value for dim in kind.shape.dim]
    return schema.Tensor(value.name, DTYPES[kind.elem_type], shape)


def _precision(graph: onnx.GraphProto) -> str:
    """The fewest bits a weight matrix of the graph has."""
    kinds = {tensor.data_type for tensor in graph.initializer if len(tensor.dims) == 2}
    bits = [
        attribute.i
        for node in graph.node
        if node.op_type in ("MatMulNBits", "GatherBlockQuantized")
        for attribute in node.attribute
        if attribute.name == "bits"
    ]
    if bits:
        return f"int{min(bits)}"
    return next((name for kind, name in STORED.items() if kind in kinds), "fp32")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
