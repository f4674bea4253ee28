"""Attention in which the positions of a span see each other, and not only those before them.

GroupQueryAttention is causal (its attribute ``causal`` is younger than the oldest onnxruntime that
reads a bundle), and no bias can show a position what stands behind it. So it writes the caches and
its result stands wherever there is no span; where there is one, plain nodes compute the chunk's
attention anew over the same keys and values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from edge_safe.export.graphs.builder import GraphBuilder

# A score at which a position counts nothing. Finite: a row of nothing else stays a number.
HIDDEN = -3.0e38


@dataclass(frozen=True, slots=True)
class Heads:
    """Heads of an attention and the factor of its scores."""

    query: int
    key: int
    width: int
    scale: float


@dataclass(frozen=True, slots=True)
class Places:
    """Where a chunk's positions stand in the cache, and what they see.

    Attributes:
        query: (B, S) int64 place of each new position.
        key: (total,) int64 places of the cache.
        ends: (B, S) int64 last place that each new position sees.
        lengths: (B,) int64 real positions of each row.
        position_ids: (B, S) int64.
    """

    query: str
    key: str
    ends: str
    lengths: str
    position_ids: str


def over_spans(
    g: GraphBuilder,
    heads: Heads,
    causal: str,
    query: str,
    present: list[str],
    numbers: Callable[[str, int], str],
    tables: list[str],
    places: Places,
    window: int | None,
    name: str,
) -> str:
    """The result of an attention for chunks with and without spans.

    Args:
        g: The graph.
        heads: Shape and scale.
        causal: (B, S, heads * width) what GroupQueryAttention made of the chunk.
        query: (B, S, heads * width) as the kernel got it.
        present: Keys and values (B, kv_heads, >= total, width) it left, the keys rotated.
        numbers: Turns cached keys (0) or values (1) into float32.
        tables: Cosine and sine of the kernel's rotary embedding, empty strings without one.
        places: What sees what.
        window: Positions that a position sees at most before and with itself.
        name: Place in the model.

    Returns:
        (B, S, heads * width).
    """
    some = g.once("spans/any", lambda: _any_span(g, places))
    seen = g.once(f"spans/seen.{window}", lambda: _seen(g, places, window))
    real = g.once("spans/real", lambda: _real(g, places))
    scope, result = f"{name}.spans", f"{name}/attended"

    def anew() -> list[str]:
        turned = query
        if all(tables):
            turned = g.contrib(
                "RotaryEmbedding",
                [query, places.position_ids, *tables],
                scope=scope,
                num_heads=heads.query,
                interleaved=0,
            )
        group = heads.query // heads.key
        split = g.constant([0, 0, heads.key, group, heads.width])
        rows = g.op("Reshape", [turned, split], scope=scope)
        rows = g.op("Transpose", [rows], scope=scope, perm=[0, 2, 3, 1, 4])
        keys, values = (
            numbers(_grouped(g, part, places, scope), slot) for slot, part in enumerate(present)
        )
        values = g.op("Where", [real, values, g.floats(0.0)], scope=scope)
        columns = g.op("Transpose", [keys], scope=scope, perm=[0, 1, 2, 4, 3])
        score = g.op("MatMul", [rows, columns], scope=scope)
        score = g.op("Mul", [score, g.floats(heads.scale)], scope=scope)
        score = g.op("Where", [seen, score, g.floats(HIDDEN)], scope=scope)
        share = g.op("Softmax", [score], scope=scope, axis=-1)
        mixed = g.op("MatMul", [share, values], scope=scope)
        mixed = g.op("Transpose", [mixed], scope=scope, perm=[0, 3, 1, 2, 4])
        return [
            g.op("Reshape", [mixed, g.constant([0, 0, heads.query * heads.width])], scope=scope)
        ]

    def as_it_is() -> list[str]:
        return [g.op("Identity", [causal], scope=scope)]

    g.choose(some, anew, as_it_is, scope=scope, outputs=[result])
    return result


def _any_span(g: GraphBuilder, places: Places) -> str:
    """Whether a new position sees one behind itself."""
    ahead = g.op("Sub", [places.ends, places.query], scope="spans")
    most = g.op("ReduceMax", [ahead], scope="spans", keepdims=0)
    return g.op("Greater", [most, g.constant(0)], scope="spans")


def _seen(g: GraphBuilder, places: Places, window: int | None) -> str:
    """(B, 1, 1, S, total) bool: which places each new position sees."""
    scope = f"spans/seen.{window}"
    ends = g.op("Unsqueeze", [places.ends, g.constant([1, 2, 4])], scope=scope)
    seen = g.op("LessOrEqual", [places.key, ends], scope=scope)
    if window is not None:
        own = g.op("Unsqueeze", [places.query, g.constant([1, 2, 4])], scope=scope)
        distance = g.op("Sub", [own, places.key], scope=scope)
        near = g.op("Less", [distance, g.constant(window)], scope=scope)
        seen = g.op("And", [seen, near], scope=scope)
    length = g.op("Unsqueeze", [places.lengths, g.constant([1, 2, 3, 4])], scope=scope)
    real = g.op("Less", [places.key, length], scope=scope)
    return g.op("And", [seen, real], scope=scope)


def _real(g: GraphBuilder, places: Places) -> str:
    """(B, 1, 1, total, 1) bool: which places hold a position, and no padding."""
    scope = "spans/real"
    key = g.op("Unsqueeze", [places.key, g.constant([1])], scope=scope)
    length = g.op("Unsqueeze", [places.lengths, g.constant([1, 2, 3, 4])], scope=scope)
    return g.op("Less", [key, length], scope=scope)


def _grouped(g: GraphBuilder, present: str, places: Places, scope: str) -> str:
    """(B, kv_heads, 1, total, width) of a cache that may be longer than what it holds."""
    total = g.op("Shape", [places.key], scope=scope, start=0, end=1)
    part = g.op("Slice", [present, g.constant([0]), total, g.constant([2])], scope=scope)
    return g.op("Unsqueeze", [part, g.constant([2])], scope=scope)
