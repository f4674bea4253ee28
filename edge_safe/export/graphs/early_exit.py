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
    seen_states,
    side_by_side,
    single_position,
)
from edge_safe.export.graphs.store import WeightStore
from edge_safe.runtime.gate import EARLY_VERDICT
from edge_safe.runtime.prefill import EARLY_BOUND

_PRESENT, _STOP = "early/present", "early/stop"


def stop_or_go_on(
    g: GraphBuilder,
    states: Sequence[str],
    early: GateHead,
    head: GateHead,
    store: WeightStore,
    several: str,
    left: Mapping[str, int],
    go_on: Callable[[], Sequence[str]],
) -> None:
    """Ends the run behind the early head where all its prompts are clear.

    Its layers come first in gate_past. A single position always goes on.

    Args:
        g: The graph.
        states: (B, S, d) states entering the layer of each of the early head's sources.
        early: What ends clear cases.
        head: What decides all others.
        store: The weights file.
        several: Whether there are at least two positions.
        left: Names and types of the states and caches that the layers behind it leave.
        go_on: Emits these layers, leaves the values of ``left``, and gives the (B, S, d) states
            entering the layer of each of the gate's sources.
    """
    gate_outputs(g, len(rows_of_gate_past(head, early)), len(head.sources[0].attention_norm))
    bound = g.input(EARLY_BOUND, FLOAT, ["batch"])
    g.output(EARLY_VERDICT, FLOAT, ["batch", 2])

    def chunk() -> list[str]:
        present, verdict = judge_early(g, states, early, store)
        return [present, verdict, _all_clear(g, verdict, bound)]

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
            return list(judge_late(g, at_gate, early, head, store, _PRESENT))

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


def rows_of_gate_past(head: GateHead, early: GateHead | None) -> list[int]:
    """Layers whose entering states heads read, in the order that gate_past has them.

    Those of the early exit come first, the gate's own one last.
    """
    first = [] if early is None else [source.layer for source in early.sources]
    return first + [source.layer for source in head.sources if source.layer not in first]


def judge_early(
    g: GraphBuilder, states: Sequence[str], early: GateHead, store: WeightStore
) -> tuple[str, str]:
    """Adds the early exit's verdict.

    Args:
        g: The graph, with a gate_past.
        states: (B, S, d) states entering the layer of each of its sources.
        early: What ends clear cases.
        store: The weights file.

    Returns:
        (B, Ke, G + S, d) the states it has seen, and (B, 2) its verdict.
    """
    seen = [seen_states(g, own, row) for row, own in enumerate(states)]
    judged = judge_chunk(g, states, seen, early, store, "early")
    return side_by_side(g, judged.present, "early"), judged.verdict


def judge_late(
    g: GraphBuilder,
    states: Sequence[str],
    early: GateHead,
    head: GateHead,
    store: WeightStore,
    present: str,
) -> tuple[str, str]:
    """Adds the verdict of the gate behind an early exit.

    Args:
        g: The graph, with a gate_past.
        states: (B, S, d) states entering the layer of each of the gate's sources.
        early: What ended clear cases.
        head: What decides.
        store: The weights file.
        present: What ``judge_early`` gave.

    Returns:
        (B, K, G + S, d) the states that both have seen, and (B, 2) the verdict.
    """
    rows = rows_of_gate_past(head, early)
    first = len(early.sources)
    seen, more = [], []
    for own, source in zip(states, head.sources, strict=True):
        row = rows.index(source.layer)
        if row < first:
            # Both read this layer.
            seen.append(g.op("Gather", [present, g.constant(row)], scope="gate/shared", axis=1))
        else:
            seen.append(seen_states(g, own, row))
            more.append(seen[-1])
    judged = judge_chunk(g, states, seen, head, store, "gate")
    both = [present, side_by_side(g, more, "gate")]
    return g.op("Concat", both, scope="gate/present", axis=1), judged.verdict


def _past_of(present: str) -> str:
    """What a cache was before."""
    return present.replace("present.", "past_key_values.", 1)


def _grown(g: GraphBuilder, states: str) -> str:
    """Shape of gate_past with columns for states (B, S, d)."""
    scope = "early.stop/columns"
    count = g.op("Shape", [states], scope=scope, start=1, end=2)
    parts = [
        g.op("Shape", ["gate_past"], scope=scope, start=first, end=end)
        for first, end in ((0, 2), (2, 3), (3, 4))
    ]
    total = g.op("Add", [parts[1], count], scope=scope)
    return g.op("Concat", [parts[0], total, parts[2]], scope=scope, axis=0)
