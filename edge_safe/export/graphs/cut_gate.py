"""The gate in two graphs, cut behind its early exit, for runtimes without conditions.

What the first one finds clear needs no second one; else the second one goes on where it ended. Run
one after the other they compute what ``gate_graph`` does.
"""

from __future__ import annotations

from edge_safe.export.graphs.builder import FLOAT, GraphBuilder
from edge_safe.export.graphs.decoder import (
    ModelWeights,
    deepstack_input,
    pass_layers,
    states_name,
    states_of,
)
from edge_safe.export.graphs.early_exit import some_heads
from edge_safe.export.graphs.layers import common_inputs
from edge_safe.export.graphs.safety import GateHead, gate_outputs, judge_chunk
from edge_safe.export.graphs.spec import DecoderSpec
from edge_safe.export.graphs.store import WeightStore
from edge_safe.export.quantization import MatrixFormat
from edge_safe.runtime.gate import EARLY_PRESENT, EARLY_VERDICT


def early_graph(
    weights: ModelWeights,
    spec: DecoderSpec,
    early: GateHead,
    head: GateHead,
    store: WeightStore,
    form: MatrixFormat,
) -> GraphBuilder:
    """Layers below the early exit, its verdict, and its columns.

    Args:
        weights: The stored model.
        spec: The decoder.
        early: What ends clear cases.
        head: What decides all others, at a layer behind.
        store: The weights file.
        form: How the matrix of its keys and values is packed.
    """
    g = GraphBuilder("gate")
    shape: list[int | str] = ["batch", "sequence", spec.hidden_size]
    layer = early.sources[-1].layer
    embeds = g.input("inputs_embeds", FLOAT, shape)
    common = common_inputs(g, weights.ropes, spans=spec.bidirectional != "none")
    deepstack = deepstack_input(g, spec, range(layer))
    read = [k for k in _sources(early, head) if k < layer]
    entering = pass_layers(g, spec, weights, common, deepstack, range(layer), (embeds, ""), read)
    g.op("Add", list(entering), scope=f"layers.{layer}", outputs=[states_name(layer)])
    # Of these the second graph goes on, or its head reads them.
    for below in [*(k for k in read if k in _sources(head)), layer]:
        g.output(states_name(below), FLOAT, shape)
    count, width = early.query.shape
    g.input("gate_past", FLOAT, ["batch", 2, count + len(head.query), "gate_past", width])
    own = some_heads(g, 0, count)
    judged = judge_chunk(g, states_of(early, -1), early, store, form, "early", own)
    for made, name in ((judged.present, EARLY_PRESENT), (judged.verdict, EARLY_VERDICT)):
        g.op("Identity", [made], scope="early", outputs=[name])
    g.output(EARLY_PRESENT, FLOAT, ["batch", 2, count, "gate_total", width])
    g.output(EARLY_VERDICT, FLOAT, ["batch", 2])
    return g


def late_graph(
    weights: ModelWeights,
    spec: DecoderSpec,
    exit_layer: int,
    early: GateHead,
    head: GateHead,
    store: WeightStore,
    form: MatrixFormat,
) -> GraphBuilder:
    """Layers from the early exit up to the gate, and the gate's verdict.

    Args:
        weights: The stored model.
        spec: The decoder.
        exit_layer: The gate's layer.
        early: What ends clear cases, at a layer below.
        head: What decides.
        store: The weights file.
        form: How the matrix of its keys and values is packed.
    """
    g = GraphBuilder("gate_late")
    shape: list[int | str] = ["batch", "sequence", spec.hidden_size]
    layer = early.sources[-1].layer
    for below in [k for k in _sources(head) if k < layer]:
        g.input(states_name(below), FLOAT, shape)
    entering = g.input(states_name(layer), FLOAT, shape)
    common = common_inputs(g, weights.ropes, spans=spec.bidirectional != "none")
    indices = range(layer, exit_layer)
    deepstack = deepstack_input(g, spec, indices)
    g.output("hidden_states", FLOAT, shape)
    leaving = pass_layers(
        g, spec, weights, common, deepstack, indices, (entering, ""), _sources(head)
    )
    g.op("Add", list(leaving), scope="exit", outputs=["hidden_states"])
    (first, width), count = early.query.shape, len(head.query)
    gate_outputs(g, first + count, width)
    g.input(EARLY_PRESENT, FLOAT, ["batch", 2, first, "gate_total", width])
    own = some_heads(g, first, first + count)
    judged = judge_chunk(g, states_of(head, exit_layer), head, store, form, "gate", own)
    both = [EARLY_PRESENT, judged.present]
    g.op("Concat", both, scope="gate/columns", outputs=["gate_present"], axis=2)
    g.op("Identity", [judged.verdict], scope="gate", outputs=["verdict_logits"])
    return g


def _sources(*heads: GateHead) -> list[int]:
    """Layers whose states heads read."""
    return sorted({source.layer for head in heads for source in head.sources})
