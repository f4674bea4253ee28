"""The gate's own nodes: which position is slot T, safety attention, verdict rows.

The formulas are those of ``edge_safe.models.safety_head``, over a chunk of positions whose
predecessors stand in ``gate_past``. All of it stays in float32 whatever the precision, but for the
matrix of its keys and values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from edge_safe.export.graphs.builder import FLOAT, GraphBuilder
from edge_safe.export.graphs.layers import norm
from edge_safe.export.graphs.matrices import linear, marked_linear, store_linear
from edge_safe.export.graphs.spans import HIDDEN
from edge_safe.export.graphs.spec import FloatArray
from edge_safe.export.graphs.store import WeightStore
from edge_safe.export.quantization import MatrixFormat


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
        present: (B, 2, H, G + S, dk) its columns with those before them.
        verdict: (B, 2).
    """

    present: str
    verdict: str


def gate_outputs(g: GraphBuilder, heads: int, width: int) -> None:
    """Declares gate_past, gate_present and verdict_logits."""
    g.input("gate_past", FLOAT, ["batch", 2, heads, "gate_past", width])
    g.output("gate_present", FLOAT, ["batch", 2, heads, "gate_total", width])
    g.output("verdict_logits", FLOAT, ["batch", 2])


def gate_verdict(
    g: GraphBuilder,
    states: Sequence[str],
    head: GateHead,
    store: WeightStore,
    form: MatrixFormat,
    several: str,
) -> None:
    """Adds gate_past, gate_present and verdict_logits to a graph.

    Args:
        g: The graph.
        states: (B, S, d) states entering the layer of each source.
        head: What decides.
        store: The weights file.
        form: How the matrix of its keys and values is packed.
        several: Whether there are at least two positions; see ``single_position``.
    """
    gate_outputs(g, *head.query.shape)

    def chunk() -> list[str]:
        judged = judge_chunk(g, states, head, store, form, "gate", "gate_past")
        return [judged.present, judged.verdict]

    outputs = ["gate_present", "verdict_logits"]
    g.choose(several, chunk, lambda: single_position(g), scope="gate", outputs=outputs)


def single_position(g: GraphBuilder) -> list[str]:
    """What a decoding step leaves: no new columns, and a verdict of NaN.

    It would throw its verdict away, and its columns are needed when the next turn is judged: they
    are made then, of the states that it leaves, for many steps at once.
    """
    past = g.op("Identity", ["gate_past"], scope="gate.nothing")
    return [past, no_verdict(g, "gate_past", "gate.nothing")]


def judge_chunk(
    g: GraphBuilder,
    states: Sequence[str],
    head: GateHead,
    store: WeightStore,
    form: MatrixFormat,
    name: str,
    past: str,
) -> Judged:
    """Adds a head's columns and its verdict.

    Args:
        g: The graph, with a gate_past.
        states: (B, S, d) states entering the layer of each source, S >= 2.
        head: What decides.
        store: The weights file.
        form: How the matrix of its keys and values is packed.
        name: Of the head in the graph.
        past: (B, 2, H, G, dk) its columns so far.
    """
    columns = new_columns(g, states, head, store, form)
    present = g.op("Concat", [past, columns], scope=name, axis=3)
    slots = find_slots(g, states[-1])
    penalty = _penalty(g, present, slots, head, store, name)
    read = [
        _read_token(g, own, slots, source, store)
        for own, source in zip(states, head.sources, strict=True)
    ]
    logits = read[0] if len(read) == 1 else g.op("Sum", read, scope=f"{name}.token")
    return Judged(present, g.op("Sub", [logits, penalty], scope=f"{name}.verdict"))


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
    g: GraphBuilder, states: str, slots: Slots, source: GateSource, store: WeightStore
) -> str:
    """A source's verdict rows at T-1: (B, 2)."""
    name = f"gate.layers.{source.layer}"
    state = pick(g, states, slots.last, f"{name}.last")
    state = g.op("Squeeze", [state, g.constant([1])], scope=f"{name}.last")
    return token_logits(g, state, source.token, store, f"{name}.token")


def new_columns(
    g: GraphBuilder,
    states: Sequence[str],
    head: GateHead,
    store: WeightStore,
    form: MatrixFormat,
) -> str:
    """This chunk's keys and values: (B, 2, H, S, dk)."""
    width = head.query.shape[1]
    columns = []
    for own, source in zip(states, head.sources, strict=True):
        scope = f"gate.layers.{source.layer}.attention"
        normed = norm(g, own, store.add(source.attention_norm), f"{scope}.norm", source.token.eps)
        joined = store_linear(store, np.concatenate([source.key, source.value]), form)
        product = f"{scope}.key_value"
        if form.bits < 16:
            both = marked_linear(g, normed, joined, product, _mark(g, normed, scope))
        else:
            both = linear(g, normed, joined, product)
        shape = g.constant([0, 0, 2, len(source.key) // width, width])
        columns.append(g.op("Reshape", [both, shape], scope=scope))
    scope = f"gate.layers.{head.sources[-1].layer}.columns"
    split = columns[0] if len(columns) == 1 else g.op("Concat", columns, scope=scope, axis=3)
    return g.op("Transpose", [split], scope=scope, perm=[0, 2, 3, 1, 4])


def _mark(g: GraphBuilder, x: str, scope: str) -> str:
    """(B, S, 1): 0 for each position of x (B, S, K), NaN where one of its numbers is not finite.

    What rounds its inputs makes a number of a NaN, and the gate would decide on it.
    """
    total = g.op("ReduceSum", [x, g.constant([-1])], scope=f"{scope}/finite", keepdims=1)
    return g.op("Mul", [total, g.floats(0.0)], scope=f"{scope}/finite")


def _penalty(
    g: GraphBuilder, present: str, slots: Slots, head: GateHead, store: WeightStore, name: str
) -> str:
    """What safety attention takes off both verdict rows: (B, 2), -log v and -log (1 - v)."""

    def weight(part: str, array: FloatArray) -> str:
        return g.weight(f"{name}.{part}", store.add(array))

    pooled = _pool(g, present, slots, head, store, name)
    flat = g.op("Reshape", [pooled, g.constant([0, head.query.size])], scope=name)
    up = g.op(
        "Gemm",
        [flat, weight("up.weight", head.up_weight), weight("up.bias", head.up_bias)],
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
    g: GraphBuilder, present: str, slots: Slots, head: GateHead, store: WeightStore, name: str
) -> str:
    """Safety attention over gate_past and the positions before slot T: (B, H, 1, dk)."""
    width = head.query.shape[1]
    scope = f"{name}.pool"
    keys = g.op("Gather", [present, g.constant(0)], scope=f"{scope}/keys", axis=1)
    query = (head.query / math.sqrt(width)).astype(np.float32)[:, :, None]
    score = g.op("MatMul", [keys, g.weight(f"{name}.query", store.add(query))], scope=scope)
    score = g.op("Squeeze", [score, g.constant([3])], scope=scope)

    before = g.op("Shape", ["gate_past"], scope=f"{scope}/past", start=3, end=4)
    visible = g.op("Add", [slots.slot, before], scope=f"{scope}/visible")
    total = g.op("Shape", [present], scope=f"{scope}/total", start=3, end=4)
    total = g.op("Squeeze", [total], scope=f"{scope}/total")
    steps = g.op("Range", [g.constant(0), total, g.constant(1)], scope=scope)
    last = g.op("Sub", [visible, g.constant(1)], scope=scope)
    distance = g.op("Sub", [last, steps], scope=f"{scope}/distance")
    distance = g.op("Max", [distance, g.constant(0)], scope=f"{scope}/distance")
    distance = g.op("Cast", [distance], scope=f"{scope}/distance", to=FLOAT)
    shifted = g.op("Add", [distance, g.floats(1.0)], scope=f"{scope}/distance")
    logged = g.op("Log", [shifted], scope=f"{scope}/distance")
    logged = g.op("Unsqueeze", [logged, g.constant([1])], scope=f"{scope}/distance")
    slope = g.weight(f"{name}.slope", store.add(head.slope[:, None]))
    score = g.op("Sub", [score, g.op("Mul", [slope, logged], scope=scope)], scope=scope)

    seen = g.op("Less", [steps, visible], scope=f"{scope}/seen")
    seen = g.op("Unsqueeze", [seen, g.constant([1])], scope=f"{scope}/seen")
    score = g.op("Where", [seen, score, g.floats(HIDDEN)], scope=scope)
    share = g.op("Softmax", [score], scope=scope, axis=-1)
    share = g.op("Unsqueeze", [share, g.constant([2])], scope=f"{scope}/share")

    # The kernels leave anything at padded positions, NaN too, and 0 * NaN would reach the sum.
    def every() -> list[str]:
        values = g.op("Gather", [present, g.constant(1)], scope=f"{scope}/values", axis=1)
        rows = g.op("Unsqueeze", [seen, g.constant([3])], scope=f"{scope}/seen")
        values = g.op("Where", [rows, values, g.floats(0.0)], scope=f"{scope}/values")
        return [g.op("MatMul", [share, values], scope=f"{scope}/out")]

    def alone() -> list[str]:
        # Of one prompt they stand behind all that is seen: cut off, which is quicker than zeroed.
        end = g.op("Reshape", [visible, g.constant([1])], scope=f"{scope}/end")
        ends = g.op("Concat", [g.constant([2]), end], scope=f"{scope}/end", axis=0)
        cut = [present, g.constant([1, 0]), ends, g.constant([1, 3])]
        values = g.op("Slice", cut, scope=f"{scope}/values")
        values = g.op("Squeeze", [values, g.constant([1])], scope=f"{scope}/values")
        seen_share = g.op("Slice", [share, g.constant([0]), end, g.constant([3])], scope=scope)
        return [g.op("MatMul", [seen_share, values], scope=f"{scope}/out")]

    count = g.op("Shape", [present], scope=f"{scope}/prompts", end=1)
    several = g.op("Greater", [count, g.constant([1])], scope=f"{scope}/prompts")
    several = g.op("Squeeze", [several], scope=f"{scope}/prompts")
    g.choose(several, every, alone, scope=scope, outputs=[f"{scope}/pooled"])
    return f"{scope}/pooled"


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
