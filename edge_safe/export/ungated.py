"""The same model without its gate: what the gate's cost is measured against.

Joins a bundle's gate and decoder graphs into one that never judges before the last layer. The
weights are the bundle's own bytes; only the safety head is left out.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import msgspec
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto

from edge_safe.errors import ExportError
from edge_safe.runtime.digest import sha256_file
from edge_safe.runtime.gate import EARLY_VERDICT
from edge_safe.runtime.manifest import (
    MANIFEST_FILE,
    FileEntry,
    Graph,
    Manifest,
    Tensor,
    dump_manifest,
    load_manifest,
)
from edge_safe.runtime.prefill import EARLY_BOUND, PREFILL, STATES

_GATE_ALONE = (
    "gate_past",
    "gate_present",
    "verdict_logits",
    EARLY_BOUND,
    EARLY_VERDICT,
)


def write_ungated(bundle: Path, out: Path) -> Path:
    """Writes the text part of a bundle without its gate.

    Args:
        bundle: A bundle with an early exit.
        out: A folder that does not exist yet; on the same disk its weights take no room.

    Returns:
        ``out``.

    Raises:
        ExportError: The bundle has no gate to leave out, or its graphs do not fit each other.
        BundleError: It is no bundle.
    """
    manifest = load_manifest(bundle)
    if manifest.safety.exit_layer is None:
        raise ExportError(f"{bundle} has no early exit, so there is no gate to leave out.")
    joined = {
        ending: join(*(_open(bundle, manifest, name + ending) for name in ("gate", "decoder")))
        for ending in _endings(manifest)
    }
    out.mkdir(parents=True)
    for name in set().union(*(_files(manifest, graph) for graph in joined.values())):
        _place(bundle / name, out / name)
    for ending, graph in joined.items():
        onnx.save(graph, str(out / f"decoder{ending}.onnx"))
    (out / MANIFEST_FILE).write_bytes(dump_manifest(_describe(manifest, out)))
    return out


def _endings(manifest: Manifest) -> list[str]:
    """Of the names of graphs that are pairs of gate and decoder."""
    return ["", PREFILL] if f"gate{PREFILL}" in manifest.graphs else [""]


def _open(bundle: Path, manifest: Manifest, name: str) -> ModelProto:
    return onnx.load(str(bundle / manifest.graphs[name].file), load_external_data=False)


def join(gate: ModelProto, decoder: ModelProto) -> ModelProto:
    """One graph from inputs_embeds to logits, without what only the gate's verdict needs.

    Raises:
        ExportError: What one graph gives is not what the other takes.
    """
    gate_nodes, gate_weights = _never_ending(gate.graph)
    below = [
        node
        for node in gate_nodes
        if not {"verdict_logits", EARLY_VERDICT}.intersection(node.output)
    ]
    given = {value.name for value in gate.graph.output}
    taken = [value.name for value in decoder.graph.input]
    if "hidden_states" not in given or "hidden_states" not in taken:
        raise ExportError("These graphs do not meet at 'hidden_states'; export the bundle again.")
    joined = ModelProto()
    joined.CopyFrom(decoder)
    graph = joined.graph
    for part in ("node", "input", "output", "initializer", "value_info"):
        graph.ClearField(part)
    graph.output.extend(
        v
        for v in gate.graph.output
        if v.name not in (*_GATE_ALONE, "hidden_states") and not v.name.startswith(STATES)
    )
    graph.output.extend(decoder.graph.output)
    # Where both graphs have a name it means the same (mask lengths, constants), and is kept once.
    known: set[str] = set()
    for node in (*below, *decoder.graph.node):
        outputs = [name for name in node.output if name]
        if known.isdisjoint(outputs):
            known.update(outputs)
            graph.node.append(node)
    _drop_unused(graph)
    used = {name for node in graph.node for name in _inputs(node)}
    inputs = (*gate.graph.input, *decoder.graph.input)
    weights = (*gate_weights, *decoder.graph.initializer)
    for values, target in ((inputs, graph.input), (weights, graph.initializer)):
        seen: set[str] = set()
        for value in values:
            if value.name in used and value.name not in seen and value.name != "hidden_states":
                seen.add(value.name)
                target.append(value)
    return joined


def _never_ending(graph: GraphProto) -> tuple[list[NodeProto], list[TensorProto]]:
    """Nodes and weights of a gate, those that stand behind its early exit with the others.

    An exit is an If with caches among its outputs; what runs when nothing is clear is its second
    branch, whose values have names of their own in there.
    """
    nodes: list[NodeProto] = []
    weights = list(graph.initializer)
    for node in graph.node:
        if node.op_type != "If" or not any(name.startswith("present.") for name in node.output):
            nodes.append(node)
            continue
        (rest,) = (a.g for a in node.attribute if a.name == "else_branch")
        weights += rest.initializer
        outside = dict(zip((value.name for value in rest.output), node.output, strict=True))
        for inner in rest.node:
            moved = NodeProto()
            moved.CopyFrom(inner)
            moved.input[:] = [outside.get(name, name) for name in inner.input]
            moved.output[:] = [outside.get(name, name) for name in inner.output]
            nodes.append(moved)
    return nodes, weights


def _drop_unused(graph: GraphProto) -> None:
    """Removes nodes that lead to no output."""
    needed = {value.name for value in graph.output}
    kept = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            kept.append(node)
            needed.update(_inputs(node))
    graph.ClearField("node")
    graph.node.extend(reversed(kept))


def _inputs(node: onnx.NodeProto) -> set[str]:
    """Names a node reads, those inside its branches included."""
    names = set(node.input)
    for attribute in node.attribute:
        for inner in (attribute.g, *attribute.graphs):
            names.update(name for child in inner.node for name in _inputs(child))
            names.update(value.name for value in inner.output)
    return names - {""}


def _files(manifest: Manifest, joined: ModelProto) -> set[str]:
    """Files of the bundle that the text part needs as they are."""
    embed = manifest.graphs["embed_tokens"].file
    words = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    weights = {
        entry.value
        for tensor in joined.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    return {name for name in {embed, *words, *weights} if name in manifest.files}


def _place(source: Path, target: Path) -> None:
    """A hard link where the disk allows it, else a copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _describe(manifest: Manifest, out: Path) -> Manifest:
    """The manifest of what stands in the folder: the ``final`` stage alone, text alone."""

    def joined(ending: str) -> Graph:
        gate, decoder = (manifest.graphs[name + ending] for name in ("gate", "decoder"))
        skipped = {*_GATE_ALONE, "hidden_states", *(tensor.name for tensor in decoder.inputs)}

        def below(tensors: list[Tensor]) -> list[Tensor]:
            return [
                tensor
                for tensor in tensors
                if tensor.name not in skipped and not tensor.name.startswith(STATES)
            ]

        return Graph(
            f"decoder{ending}.onnx",
            [*below(gate.inputs), *(t for t in decoder.inputs if t.name != "hidden_states")],
            [*below(gate.outputs), *decoder.outputs],
            decoder.precision,
            optimized=gate.optimized and decoder.optimized,
        )

    files = {
        path.relative_to(out).as_posix(): FileEntry(sha256_file(path), path.stat().st_size)
        for path in sorted(out.rglob("*"))
        if path.is_file()
    }
    safety = msgspec.structs.replace(
        manifest.safety,
        exit_layer=None,
        layers=[],
        attention=None,
        early=None,
        stages={"final": manifest.safety.stages["final"]},
        policy=msgspec.structs.replace(
            manifest.safety.policy, stages=(), thresholds={}, early_threshold=None
        ),
        acceptance=None,
    )
    return msgspec.structs.replace(
        manifest,
        name=f"{manifest.name} without its gate",
        modalities={},
        processors={},
        files=files,
        graphs={
            "embed_tokens": manifest.graphs["embed_tokens"],
            **{f"decoder{ending}": joined(ending) for ending in _endings(manifest)},
        },
        safety=safety,
    )
