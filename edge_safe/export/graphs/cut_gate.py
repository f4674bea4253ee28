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
from edge_safe.export.graphs.early_exit import judge_early, judge_late, rows_of_gate_past
from edge_safe.export.graphs.layers import common_inputs
from edge_safe.export.graphs.safety import GateHead, gate_outputs
from edge_safe.export.graphs.spec import DecoderSpec
from edge_safe.export.graphs.store import WeightStore
from edge_safe.runtime.gate import EARLY_PRESENT, EARLY_VERDICT


def early_graph(
    weights: ModelWeights,
    spec: DecoderSpec,
    early: GateHead,
    head: GateHead,
    store: WeightStore,
) -> GraphBuilder:
    """Layers below the early exit, its verdict, and the states it has seen.

    Args:
        weights: The stored model.
        spec: The decoder.
        early: What ends clear cases.
        head: What decides all others, at a layer behind.
        store: The weights file.
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
    count, rows = len(early.sources), len(rows_of_gate_past(head, early))
    g.input("gate_past", FLOAT, ["batch", rows, "gate_past", spec.hidden_size])
    judged = judge_early(g, states_of(early, -1), early, store)
    for made, name in zip(judged, (EARLY_PRESENT, EARLY_VERDICT), strict=True):
        g.op("Identity", [made], scope="early", outputs=[name])
    g.output(EARLY_PRESENT, FLOAT, ["batch", count, "gate_total", spec.hidden_size])
    g.output(EARLY_VERDICT, FLOAT, ["batch", 2])
    return g


def late_graph(
    weights: ModelWeights,
    spec: DecoderSpec,
    exit_layer: int,
    early: GateHead,
    head: GateHead,
    store: WeightStore,
) -> GraphBuilder:
    """Layers from the early exit up to the gate, and the gate's verdict.

    Args:
        weights: The stored model.
        spec: The decoder.
        exit_layer: The gate's layer.
        early: What ends clear cases, at a layer below.
        head: What decides.
        store: The weights file.
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
    width = spec.hidden_size
    gate_outputs(g, len(rows_of_gate_past(head, early)), width)
    g.input(EARLY_PRESENT, FLOAT, ["batch", len(early.sources), "gate_total", width])
    judged = judge_late(g, states_of(head, exit_layer), early, head, store, EARLY_PRESENT)
    for made, name in zip(judged, ("gate_present", "verdict_logits"), strict=True):
        g.op("Identity", [made], scope="gate", outputs=[name])
    return g


def _sources(*heads: GateHead) -> list[int]:
    """Layers whose states heads read."""
    return sorted({source.layer for head in heads for source in head.sources})
