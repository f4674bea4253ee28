"""The gate's own nodes: which position is slot T, safety attention, verdict rows.

The formulas are those of ``edge_safe.models.safety_head``, over a chunk of positions whose
predecessors stand in ``gate_past``. All of it stays in float32 whatever the precision.

The query of safety attention is the same for every prompt. So a head's score of a position is the
product of that position's normalized state with one vector, key matrix times query, and the sum of
the values is the value matrix times the sum of these states (the order of products that MLA takes
to decode, arXiv 2405.04434, section 2.1.2). Neither keys nor values are ever made: what stands for
both are the states themselves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from edge_safe.export.graphs.builder import FLOAT, GraphBuilder
from edge_safe.export.graphs.layers import norm
from edge_safe.export.graphs.spans import HIDDEN
from edge_safe.export.graphs.spec import FloatArray
from edge_safe.export.graphs.store import WeightStore


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Two verdict rows behind an RMSNorm.

    Attributes:
        rows: (2, d), unsafe first.
        norm: (d,) weight of the norm, None where the states are read as they are.
        eps: Its epsilon.
    """

    rows: FloatArray
    norm: FloatArray | None
    eps: float = 1e-5


@dataclass(frozen=True, slots=True)
class GateSource:
    """What the gate reads of one layer's states.

    Attributes:
        layer: The states that enter this layer.
        token: Token read-out; those of all sources are added up.
        attention_norm: (d,).
        key: (Hs * dk, d), of the source's own attention heads.
        value: (Hs * dk, d).
    """

    layer: int
    token: TokenRows
    attention_norm: FloatArray
    key: FloatArray
    value: FloatArray


@dataclass(frozen=True, slots=True)
class GateHead:
    """What decides at the exit layer.

    Attributes:
        sources: By rising layer; the last one is the exit layer.
        query: (H, dk) of all sources' attention heads, one source after the other.
        slope: (H,), not negative.
        up_weight: (hidden, H * dk).
        up_bias: (hidden,).
        down_weight: (1, hidden).
        down_bias: (1,).
    """

    sources: tuple[GateSource, ...]
    query: FloatArray
    slope: FloatArray
    up_weight: FloatArray
    up_bias: FloatArray
    down_weight: FloatArray
    down_bias: FloatArray


@dataclass(frozen=True, slots=True)
class Slots:
    """Where slot T and the prompt's last position stand in a chunk of at least two positions.

    Attributes:
        slot: (B, 1) index of slot T in the chunk.
        last: (B, 1) index of T-1.
    """

    slot: str
    last: str


def find_slots(g: GraphBuilder, states: str) -> Slots:
    """Derives the positions from the mask alone: slot T is its last real position."""
    scope = "slots"
    zero, one = g.constant(0), g.constant(1)
    length = g.op("Shape", [states], scope=f"{scope}/sequence", start=1, end=2)
    total = g.op("Shape", ["attention_mask"], scope=f"{scope}/total", start=1, end=2)
    past = g.op("Sub", [total, length], scope=f"{scope}/past")
    real = g.op("ReduceSum", ["attention_mask", g.constant([1])], scope=scope, keepdims=1)
    index = g.op("Sub", [g.op("Sub", [real, one], scope=scope), past], scope=f"{scope}/index")
    end = g.op("Sub", [length, one], scope=f"{scope}/end")
    slot = g.op("Min", [g.op("Max", [index, zero], scope=scope), end], scope=scope)
    before = g.op("Sub", [slot, one], scope=f"{scope}/before")
    return Slots(slot, g.op("Max", [before, zero], scope=f"{scope}/last"))


def pick(g: GraphBuilder, states: str, index: str, scope: str) -> str:
    """Reads positions: states (B, S, d), index (B, M) -> (B, M, d)."""
    where = g.op("Unsqueeze", [index, g.constant([2])], scope=scope)
    return g.op("GatherND", [states, where], scope=scope, batch_dims=1)


def token_logits(
    g: GraphBuilder, state: str, rows: TokenRows, store: WeightStore, name: str
) -> str:
    """Reads one state (B, d) through the verdict rows into (B, 2)."""
    if rows.norm is not None:
        state = norm(g, state, store.add(rows.norm), f"{name}.norm", rows.eps)
    return g.op(
        "Gemm", [state, g.weight(f"{name}.rows", store.add(rows.rows))], scope=name, transB=1
    )


@dataclass(frozen=True, slots=True)
class Judged:
    """What a head makes of a chunk of at least two positions.

    Attributes:
        present: By source, (B, G + S, d) the states it has seen, the chunk's behind the others.
        verdict: (B, 2).
    """

    present: tuple[str, ...]
    verdict: str


def gate_outputs(g: GraphBuilder, layers: int, width: int) -> None:
    """Declares gate_past, gate_present and verdict_logits.

    Args:
        g: The graph.
        layers: Layers K whose entering states heads read.
        width: Of a state, d.
    """
    g.input("gate_past", FLOAT, ["batch", layers, "gate_past", width])
    g.output("gate_present", FLOAT, ["batch", layers, "gate_total", width])
    g.output("verdict_logits", FLOAT, ["batch", 2])


def gate_verdict(
    g: GraphBuilder, states: Sequence[str], head: GateHead, store: WeightStore, several: str
) -> None:
    """Adds gate_past, gate_present and verdict_logits to a graph.

    Args:
        g: The graph.
        states: (B, S, d) states entering the layer of each source.
        head: What decides.
        store: The weights file.
        several: Whether there are at least two positions; see ``single_position``.
    """
    gate_outputs(g, len(head.sources), len(head.sources[0].attention_norm))

    def chunk() -> list[str]:
        seen = [seen_states(g, own, row) for row, own in enumerate(states)]
        judged = judge_chunk(g, states, seen, head, store, "gate")
        return [side_by_side(g, judged.present, "gate"), judged.verdict]

    outputs = ["gate_present", "verdict_logits"]
    g.choose(several, chunk, lambda: single_position(g), scope="gate", outputs=outputs)


def single_position(g: GraphBuilder) -> list[str]:
    """What a decoding step leaves: gate_past as it is, and a verdict of NaN.

    It would throw its verdict away, and its states leave the graph by names of their own.
    """
    past = g.op("Identity", ["gate_past"], scope="gate.nothing")
    return [past, no_verdict(g, "gate_past", "gate.nothing")]


def seen_states(g: GraphBuilder, states: str, row: int) -> str:
    """States of a layer, (B, S, d), behind those of gate_past, its row: (B, G + S, d)."""
    scope = f"{states}/seen"
    past = g.op("Gather", ["gate_past", g.constant(row)], scope=scope, axis=1)
    return g.op("Concat", [past, states], scope=scope, axis=1)


def side_by_side(g: GraphBuilder, present: Sequence[str], scope: str) -> str:
    """States of K layers, (B, G + S, d) each: (B, K, G + S, d)."""
    axis = g.constant([1])
    rows = [g.op("Unsqueeze", [one, axis], scope=f"{scope}/columns") for one in present]
    if len(rows) == 1:
        return rows[0]
    return g.op("Concat", rows, scope=f"{scope}/columns", axis=1)


def judge_chunk(
    g: GraphBuilder,
    states: Sequence[str],
    seen: Sequence[str],
    head: GateHead,
    store: WeightStore,
    name: str,
) -> Judged:
    """Adds a head's verdict.

    Args:
        g: The graph, with a gate_past.
        states: (B, S, d) states entering the layer of each source, S >= 2.
        seen: The same behind earlier ones, (B, G + S, d).
        head: What decides.
        store: The weights file.
        name: Of the head in the graph.
    """
    slots = find_slots(g, states[-1])
    penalty = _penalty(g, seen, slots, head, store, name)
    read = [
        _read_token(g, own, slots, source, store, name)
        for own, source in zip(states, head.sources, strict=True)
    ]
    logits = read[0] if len(read) == 1 else g.op("Sum", read, scope=f"{name}.token")
    return Judged(tuple(seen), g.op("Sub", [logits, penalty], scope=f"{name}.verdict"))


def no_verdict(g: GraphBuilder, states: str, name: str) -> str:
    """(B, 2) NaN."""
    shape = g.op("Shape", [states], scope=f"{name}.nothing", end=1)
    whole = g.op("Concat", [shape, g.constant([2])], scope=f"{name}.nothing", axis=0)
    return filled(g, whole, math.nan, f"{name}.nothing")


def filled(g: GraphBuilder, shape: str, number: float, scope: str) -> str:
    """A float32 value of a shape, the same number everywhere."""
    value = onnx.helper.make_tensor("value", FLOAT, [1], [number])
    return g.op("ConstantOfShape", [shape], scope=scope, value=value)


def longer_than_one(g: GraphBuilder, states: str, scope: str) -> str:
    """Whether there is a position before slot T in the chunk, S >= 2."""
    length = g.op("Shape", [states], scope=f"{scope}/length", start=1, end=2)
    several = g.op("Greater", [length, g.constant([1])], scope=f"{scope}/length")
    return g.op("Squeeze", [several], scope=f"{scope}/length")


def _read_token(
    g: GraphBuilder, states: str, slots: Slots, source: GateSource, store: WeightStore, name: str
) -> str:
    """A source's verdict rows at T-1: (B, 2)."""
    # Two heads may read one layer, each with rows of its own.
    scope = f"{name}.layers.{source.layer}"
    state = pick(g, states, slots.last, f"{scope}.last")
    state = g.op("Squeeze", [state, g.constant([1])], scope=f"{scope}.last")
    return token_logits(g, state, source.token, store, f"{scope}.token")


def _penalty(
    g: GraphBuilder,
    seen: Sequence[str],
    slots: Slots,
    head: GateHead,
    store: WeightStore,
    name: str,
) -> str:
    """What safety attention takes off both verdict rows: (B, 2), -log v and -log (1 - v)."""

    def weight(part: str, array: FloatArray) -> str:
        return g.weight(f"{name}.{part}", store.add(array))

    pooled = _pool(g, seen, slots, head, store, name)
    up = g.op(
        "Gemm",
        [pooled, weight("up.weight", head.up_weight), weight("up.bias", head.up_bias)],
        scope=f"{name}.up",
        transB=1,
    )
    logit = g.op(
        "Gemm",
        [
            g.op("Gelu", [up], scope=name, approximate="none"),
            weight("down.weight", head.down_weight),
            weight("down.bias", head.down_bias),
        ],
        scope=f"{name}.down",
        transB=1,
    )
    # log v and log(1 - v) are -softplus(-a) and -softplus(a).
    signed = g.op("Mul", [logit, g.floats([[-1.0, 1.0]])], scope=f"{name}.v")
    return g.op("Softplus", [signed], scope=f"{name}.v")


def _pool(
    g: GraphBuilder,
    seen: Sequence[str],
    slots: Slots,
    head: GateHead,
    store: WeightStore,
    name: str,
) -> str:
    """Safety attention over gate_past and the positions before slot T: (B, H * dk)."""
    scope = f"{name}.pool"
    before = g.op("Shape", ["gate_past"], scope=f"{scope}/past", start=2, end=3)
    visible = g.op("Add", [slots.slot, before], scope=f"{scope}/visible")
    normed = [
        norm(g, own, store.add(source.attention_norm), f"{scope}/{source.layer}", source.token.eps)
        for own, source in zip(_visible(g, seen, visible, scope), head.sources, strict=True)
    ]
    total = g.op("Shape", [normed[0]], scope=f"{scope}/total", start=1, end=2)
    total = g.op("Squeeze", [total], scope=f"{scope}/total")
    steps = g.op("Range", [g.constant(0), total, g.constant(1)], scope=scope)
    shares = _shares(g, normed, visible, steps, head, store, name)
    pooled = []
    for share, own, source in zip(shares, normed, head.sources, strict=True):
        states = g.op("MatMul", [share, own], scope=f"{scope}/states")
        states = g.op("Unsqueeze", [states, g.constant([2])], scope=f"{scope}/states")
        matrix = g.weight(f"{name}.{source.layer}.value", store.add(_value(head, source)))
        out = g.op("MatMul", [states, matrix], scope=f"{scope}/out")
        shape = g.constant([0, len(source.value)])
        pooled.append(g.op("Reshape", [out, shape], scope=f"{scope}/out"))
    return pooled[0] if len(pooled) == 1 else g.op("Concat", pooled, scope=f"{scope}/out", axis=1)


def _visible(g: GraphBuilder, seen: Sequence[str], visible: str, scope: str) -> list[str]:
    """States (B, N, d) of each source without those that must not be seen.

    The kernels leave anything at padded positions, NaN too, and 0 * NaN would reach the sum.
    """
    outputs = [f"{scope}/seen/{row}" for row in range(len(seen))]

    def every() -> list[str]:
        count = g.op("Shape", [seen[0]], scope=f"{scope}/seen", start=1, end=2)
        count = g.op("Squeeze", [count], scope=f"{scope}/seen")
        steps = g.op("Range", [g.constant(0), count, g.constant(1)], scope=f"{scope}/seen")
        rows = g.op("Less", [steps, visible], scope=f"{scope}/seen")
        rows = g.op("Unsqueeze", [rows, g.constant([2])], scope=f"{scope}/seen")
        return [
            g.op("Where", [rows, own, g.floats(0.0)], scope=f"{scope}/seen/zeroed") for own in seen
        ]

    def alone() -> list[str]:
        # Of one prompt they stand behind all that is seen: cut off, which is quicker than zeroed.
        end = g.op("Reshape", [visible, g.constant([1])], scope=f"{scope}/end")
        edges = [g.constant([0]), end, g.constant([1])]
        return [g.op("Slice", [own, *edges], scope=f"{scope}/seen/cut") for own in seen]

    count = g.op("Shape", [seen[0]], scope=f"{scope}/prompts", end=1)
    several = g.op("Greater", [count, g.constant([1])], scope=f"{scope}/prompts")
    several = g.op("Squeeze", [several], scope=f"{scope}/prompts")
    g.choose(several, every, alone, scope=scope, outputs=outputs)
    return outputs


def _shares(
    g: GraphBuilder,
    normed: Sequence[str],
    visible: str,
    steps: str,
    head: GateHead,
    store: WeightStore,
    name: str,
) -> list[str]:
    """What each position counts for, by source: (B, Hs, N).

    Args:
        g: The graph.
        normed: By source, normalized states (B, N, d).
        visible: (B, 1) positions that are seen.
        steps: (N,) 0 .. N-1.
        head: What decides.
        store: The weights file.
        name: Of the head in the graph.
    """
    scope = f"{name}.pool"
    scores = [
        g.op(
            "MatMul",
            [own, g.weight(f"{name}.{source.layer}.query", store.add(_query(head, source)))],
            scope=f"{scope}/scores",
        )
        for own, source in zip(normed, head.sources, strict=True)
    ]
    score = scores[0]
    if len(scores) > 1:
        score = g.op("Concat", scores, scope=f"{scope}/scores", axis=2)
    score = g.op("Transpose", [score], scope=f"{scope}/scores", perm=[0, 2, 1])

    last = g.op("Sub", [visible, g.constant(1)], scope=scope)
    distance = g.op("Sub", [last, steps], scope=f"{scope}/distance")
    distance = g.op("Max", [distance, g.constant(0)], scope=f"{scope}/distance")
    distance = g.op("Cast", [distance], scope=f"{scope}/distance", to=FLOAT)
    shifted = g.op("Add", [distance, g.floats(1.0)], scope=f"{scope}/distance")
    logged = g.op("Log", [shifted], scope=f"{scope}/distance")
    logged = g.op("Unsqueeze", [logged, g.constant([1])], scope=f"{scope}/distance")
    slope = g.weight(f"{name}.slope", store.add(head.slope[:, None]))
    score = g.op("Sub", [score, g.op("Mul", [slope, logged], scope=scope)], scope=scope)

    rows = g.op("Less", [steps, visible], scope=f"{scope}/hidden")
    rows = g.op("Unsqueeze", [rows, g.constant([1])], scope=f"{scope}/hidden")
    score = g.op("Where", [rows, score, g.floats(HIDDEN)], scope=scope)
    share = g.op("Softmax", [score], scope=scope, axis=-1)
    if len(head.sources) == 1:
        return [share]
    counts = [len(source.key) // head.query.shape[1] for source in head.sources]
    shares = [f"{scope}/shares/{row}" for row in range(len(counts))]
    g.op("Split", [share, g.constant(counts)], scope=f"{scope}/shares", outputs=shares, axis=1)
    return shares


def _own_heads(head: GateHead, source: GateSource) -> slice:
    """Which of a head's attention heads are those of a source."""
    width, first = head.query.shape[1], 0
    for other in head.sources:
        end = first + len(other.key) // width
        if other is source:
            return slice(first, end)
        first = end
    raise ValueError(f"layer {source.layer} is no source of this head")


def _query(head: GateHead, source: GateSource) -> FloatArray:
    """(d, Hs): what a normalized state is multiplied with for its scores, key matrix and query."""
    query = head.query[_own_heads(head, source)].astype(np.float64)
    key = source.key.reshape(*query.shape, -1)
    folded = np.einsum("hw,hwd->dh", query / math.sqrt(query.shape[1]), key)
    return np.ascontiguousarray(folded, np.float32)


def _value(head: GateHead, source: GateSource) -> FloatArray:
    """(1, Hs, d, dk): the value matrix of each of a source's attention heads."""
    width = head.query.shape[1]
    value = source.value.reshape(1, -1, width, source.value.shape[1])
    return np.ascontiguousarray(value.swapaxes(2, 3))


def keep_tail(g: GraphBuilder, values: Sequence[str]) -> list[str]:
    """Cuts (B, S, d) values down to T-1 and slot T, or to the one position of a decoding step.

    Returns:
        (B, min(S, 2), d) values.
    """
    outputs = [f"tail/{n}" for n in range(len(values))]

    def cut() -> list[str]:
        slots = find_slots(g, values[0])
        both = g.op("Concat", [slots.last, slots.slot], scope="tail", axis=1)
        return [pick(g, value, both, "tail") for value in values]

    def whole() -> list[str]:
        return [g.op("Identity", [value], scope="tail") for value in values]

    several = longer_than_one(g, values[0], "tail")
    g.choose(several, cut, whole, scope="tail", outputs=outputs)
    return outputs
