"""A head below the gate that ends clear cases: what is left of the gate's graph does not run then.

The graph is given the log-odds from which on a prompt is clear. Where every prompt of a run is,
the layers up to the gate are skipped, and what the gate would have said is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from edge_safe.export.graphs.builder import BOOL, FLOAT, INT32, GraphBuilder
from edge_safe.export.graphs.safety import (
    GateHead,
    filled,
    gate_outputs,
    judge_chunk,
    no_verdict,
    single_position,
)
from edge_safe.export.graphs.store import WeightStore
from edge_safe.export.quantization import MatrixFormat
from edge_safe.runtime.gate import EARLY_VERDICT
from edge_safe.runtime.prefill import EARLY_BOUND

_PRESENT, _STOP = "early/present", "early/stop"


def stop_or_go_on(
    g: GraphBuilder,
    states: Sequence[str],
    early: GateHead,
    head: GateHead,
    store: WeightStore,
    form: MatrixFormat,
    several: str,
    left: Mapping[str, int],
    go_on: Callable[[], Sequence[str]],
) -> None:
    """Ends the run behind the early head where all its prompts are clear.

    Its columns come first in gate_past. A single position always goes on.

    Args:
        g: The graph.
        states: (B, S, d) states entering the layer of each of the early head's sources.
        early: What ends clear cases.
        head: What decides all others.
        store: The weights file.
        form: How the matrices of their keys and values are packed.
        several: Whether there are at least two positions.
        left: Names and types of the states and caches that the layers behind it leave.
        go_on: Emits these layers, leaves the values of ``left``, and gives the (B, S, d) states
            entering the layer of each of the gate's sources.
    """
    counts, width = (len(early.query), len(head.query)), head.query.shape[1]
    gate_outputs(g, sum(counts), width)
    bound = g.input(EARLY_BOUND, FLOAT, ["batch"])
    g.output(EARLY_VERDICT, FLOAT, ["batch", 2])

    def chunk() -> list[str]:
        past = some_heads(g, 0, counts[0])
        judged = judge_chunk(g, states, early, store, form, "early", past)
        return [judged.present, judged.verdict, _all_clear(g, judged.verdict, bound)]

    def token() -> list[str]:
        never = g.op("Identity", [g.constant(False, np.bool_)], scope="early.nothing")
        return [*single_position(g), never]

    g.choose(
        several,
        chunk,
        token,
        scope="early",
        outputs=[_PRESENT, EARLY_VERDICT, _STOP],
        dtypes=[FLOAT, FLOAT, BOOL],
    )

    def rest() -> list[str]:
        at_gate = go_on()

        def decide() -> list[str]:
            past = some_heads(g, counts[0], sum(counts))
            judged = judge_chunk(g, at_gate, head, store, form, "gate", past)
            both = [_PRESENT, judged.present]
            return [g.op("Concat", both, scope="gate/columns", axis=2), judged.verdict]

        outputs = ["gate_present", "verdict_logits"]
        g.choose(several, decide, lambda: single_position(g), scope="gate", outputs=outputs)
        return [*outputs, *left]

    def nothing() -> list[str]:
        unread = g.op("Shape", [states[-1]], scope="early.stop")
        columns = filled(g, _grown(g, states[-1]), math.nan, "early.stop/columns")
        return [
            columns,
            no_verdict(g, "gate_past", "early.stop"),
            *(
                g.op("Identity", [_past_of(name)], scope=f"early.stop/{name}")
                if name.startswith("present.")
                else filled(g, unread, math.nan, f"early.stop/{name}")
                for name in left
            ),
        ]

    g.choose(
        _STOP,
        nothing,
        rest,
        scope="early.exit",
        outputs=["gate_present", "verdict_logits", *left],
        dtypes=[FLOAT, FLOAT, *left.values()],
    )


def _all_clear(g: GraphBuilder, verdict: str, bound: str) -> str:
    """Whether the log-odds of (B, 2) logits all reach a bound (B,); those of NaN never do."""
    scope = "early/clear"
    halves = [g.op("Gather", [verdict, g.constant(n)], scope=scope, axis=1) for n in (0, 1)]
    odds = g.op("Sub", halves, scope=scope)
    clear = g.op("GreaterOrEqual", [odds, bound], scope=scope)
    counted = g.op("Cast", [clear], scope=scope, to=INT32)
    fewest = g.op("ReduceMin", [counted], scope=scope, keepdims=0)
    return g.op("Cast", [fewest], scope=scope, to=BOOL)


def some_heads(g: GraphBuilder, first: int, end: int) -> str:
    """Some heads of gate_past: (B, 2, end - first, G, dk)."""
    edges = [g.constant([first]), g.constant([end]), g.constant([2])]
    return g.op("Slice", ["gate_past", *edges], scope="columns")


def _past_of(present: str) -> str:
    """What a cache was before."""
    return present.replace("present.", "past_key_values.", 1)


def _grown(g: GraphBuilder, states: str) -> str:
    """Shape of gate_past with columns for states (B, S, d)."""
    scope = "early.stop/columns"
    count = g.op("Shape", [states], scope=scope, start=1, end=2)
    parts = [
        g.op("Shape", ["gate_past"], scope=scope, start=first, end=first + size)
        for first, size in ((0, 3), (3, 1), (4, 1))
    ]
    total = g.op("Add", [parts[1], count], scope=scope)
    return g.op("Concat", [parts[0], total, parts[2]], scope=scope, axis=0)
