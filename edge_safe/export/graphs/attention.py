"""The attention of one decoder layer, with its cache, as nodes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from edge_safe.errors import ExportError
from edge_safe.export.graphs.builder import FLOAT, FLOAT16, INT64, GraphBuilder
from edge_safe.export.graphs.layers import (
    CACHE_TYPES,
    PLAIN_CACHE,
    Common,
    LayerWeights,
    RopeTables,
    StoredCache,
    Turn,
    norm,
    project,
    rotate,
)
from edge_safe.export.graphs.spans import HIDDEN, Heads, Places, over_spans
from edge_safe.export.graphs.spec import DecoderSpec, LayerAttention
from edge_safe.export.graphs.store import Stored
from edge_safe.runtime.manifest import CAPACITY

# A score at which a position counts nothing in float16, which ends at 65504.
HALF_REACH = 6.0e4

# Place of an int8 cache's scales among the attention kernel's inputs.
SCALES_AT = 12


@dataclass(frozen=True, slots=True)
class Call:
    """What the nodes of one layer's attention have in common.

    Attributes:
        query: Queries, keys and values (B, S, .), or all of them packed and two empty strings.
        rotary: Whether the kernel turns queries and keys.
        scale: Factor of the scores.
        common: What the layers share.
        kind: The layer's kind of attention.
        spec: The decoder.
        name: Place in the model.
    """

    query: list[str]
    rotary: bool
    scale: float
    common: Common
    kind: LayerAttention
    spec: DecoderSpec
    name: str


def attention(
    g: GraphBuilder, spec: DecoderSpec, x: str, weights: LayerWeights, common: Common, index: int
) -> str:
    """Attention of one layer up to, but without, its output projection.

    Args:
        g: The graph.
        spec: The decoder.
        x: (B, S, d) normalized states.
        weights: The layer's weights.
        common: What the layers share.
        index: Layer, which names the cache.

    Returns:
        (B, S, heads * head_dim).
    """
    name = f"layers.{index}.attention"
    beside = weights.cache.format == "int8" and weights.cache.prompts
    held: list[int | str] = ["batch", spec.kv_heads, CAPACITY, spec.head_dim]
    shapes = (
        [held, held] if beside else [[*held[:2], size, held[3]] for size in ("past", "present")]
    )
    type_kept = CACHE_TYPES[weights.cache.format]
    parts = ("key", "value")
    past = [g.input(f"past_key_values.{index}.{part}", type_kept, shapes[0]) for part in parts]
    present = [g.output(f"present.{index}.{part}", type_kept, shapes[1]) for part in parts]
    packed = project(g, x, weights.qkv, f"{name}.qkv")
    query = [packed, "", ""]
    kind = spec.attention_of(index)
    rope = None if kind.rope is None else common.ropes[kind.rope]
    if weights.query_norm is not None or isinstance(rope, Turn) or common.ends is not None:
        query = _split(g, spec, packed, name)
    if weights.query_norm is not None and weights.key_norm is not None:
        query = _normed_heads(g, spec, query, weights.query_norm, weights.key_norm, name)
    if isinstance(rope, Turn):
        for slot, heads in enumerate((spec.heads, spec.kv_heads)):
            scope = f"{name}.{('query', 'key')[slot]}_rotary"
            query[slot] = rotate(g, query[slot], rope, heads, scope)
    scale = spec.head_dim**-0.5 if spec.attention_scale is None else spec.attention_scale
    call = Call(query, isinstance(rope, RopeTables), float(scale), common, kind, spec, name)
    seen, cache_seen = present, weights.cache
    if beside:
        seen, cache_seen = [f"{name}/{part}s" for part in parts], PLAIN_CACHE
        attended = _read_prompt(g, call, past, seen, present, weights.cache)
    else:
        attended = _kernel(g, call, past, [f"{name}/out", *present], weights.cache)
    if common.ends is None:
        return attended
    return over_spans(
        g,
        Heads(spec.heads, spec.kv_heads, spec.head_dim, float(scale)),
        attended,
        query[0],
        seen,
        lambda part, slot: _numbers(g, call, part, slot, cache_seen, rank=5),
        _rotary(g, call, half=False)[:2],
        Places(
            _query_places(g, common),
            _key_places(g, common),
            common.ends,
            common.lengths,
            common.position_ids,
        ),
        kind.window,
        name,
    )


def _kernel(
    g: GraphBuilder, call: Call, past: list[str], made: list[str], cache: StoredCache
) -> str:
    """GroupQueryAttention.

    Args:
        g: The graph.
        call: What it works on.
        past: Keys and values of earlier positions.
        made: Names of the result, and of the keys and values with the new positions behind.
        cache: Type and scales of both.

    Returns:
        (B, S, heads * head_dim) float32.
    """
    spec, name, window = call.spec, call.name, call.kind.window
    half = cache.format == "fp16"
    query = [_half(g, part, name) for part in call.query] if half else call.query
    rotary = _rotary(g, call, half=half)
    inputs = [*query, *past, call.common.last_key, call.common.total, *rotary]
    further: dict[str, Any] = {}
    if window is not None:
        further["local_window_size"] = window
        # onnxruntime 1.23 sees one position more than local_window_size says, later ones do not;
        # the bias hides it from both. The attribute saves the work on all that is further away.
        bias = _window_bias(g, call.common, window)
        inputs.append(_half(g, bias, f"window.{window}") if half else bias)
    if cache.key_scale is not None and cache.value_scale is not None:
        # Attention bias and sink stand before the scales.
        inputs += [""] * (SCALES_AT - len(inputs))
        inputs.append(g.weight(f"{name}.key_scale", cache.key_scale))
        inputs.append(g.weight(f"{name}.value_scale", cache.value_scale))
        further |= {f"{part}_quant_type": "PER_CHANNEL" for part in "kv"}
        further["kv_cache_bit_width"] = 8
    attended = g.contrib(
        "GroupQueryAttention",
        inputs,
        scope=name,
        outputs=made,
        num_heads=spec.heads,
        kv_num_heads=spec.kv_heads,
        do_rotary=int(call.rotary),
        rotary_interleaved=0,
        scale=call.scale,
        **further,
    )
    return g.op("Cast", [attended], scope=f"{name}/float", to=FLOAT) if half else attended


def _read_prompt(
    g: GraphBuilder,
    call: Call,
    past: list[str],
    grown: list[str],
    present: list[str],
    cache: StoredCache,
) -> str:
    """Attention of many new positions beside an int8 cache, by the float32 kernel.

    The int8 kernel takes much longer for many positions. So earlier ones are read from the cache,
    new ones see each other unrounded, and are rounded into the cache behind it.

    Args:
        g: The graph.
        call: What it works on.
        past: Keys and values as the cache has them, with places for the new positions.
        grown: Names of the same in float32, up to the last new position.
        present: Names of the cache with the new positions in it.
        cache: Its scales.

    Returns:
        (B, S, heads * head_dim).
    """
    name = call.name
    earlier = g.once("cache/earlier", lambda: _earlier(g, call.common))
    edges = [g.constant([0]), earlier, g.constant([2])]
    read = [g.op("Slice", [part, *edges], scope=f"{name}/earlier") for part in past]
    numbers = [_numbers(g, call, part, slot, cache, rank=4) for slot, part in enumerate(read)]
    attended = _kernel(g, call, numbers, [f"{name}/out", *grown], PLAIN_CACHE)
    rows = g.once("cache/rows", lambda: _rows(g, call))
    for slot, (whole, made) in enumerate(zip(grown, present, strict=True)):
        new = g.op("GatherND", [whole, rows], scope=f"{name}/new")
        shares = g.op("Div", [new, _scale(g, call, slot, cache, rank=4)], scope=f"{name}/new")
        rounding = [shares, g.floats(1.0), g.constant(0, np.int8)]
        rounded = g.op("QuantizeLinear", rounding, scope=f"{name}/new")
        # Past and present are the same memory, so that nothing else is copied.
        g.op("ScatterND", [past[slot], rows, rounded], scope=f"{name}/new", outputs=[made])
    return attended


def _earlier(g: GraphBuilder, common: Common) -> str:
    """(1,) int64 positions before the new ones; the cache has places for more."""
    return g.op("Sub", [_total(g, common), _size(g, common)], scope="cache/earlier")


def _rows(g: GraphBuilder, call: Call) -> str:
    """Where new positions stand in a cache: (B, kv_heads, S, 3) int64, batch, head and place."""
    scope = "cache/rows"
    query = _query_places(g, call.common)
    place = g.op("Unsqueeze", [query, g.constant([1, 3])], scope=scope)
    heads = g.constant(np.arange(call.spec.kv_heads).reshape(1, -1, 1, 1))
    count = g.op("Squeeze", [g.op("Shape", [query], scope=scope, end=1)], scope=scope)
    batch = g.op("Range", [g.constant(0), count, g.constant(1)], scope=scope)
    batch = g.op("Unsqueeze", [batch, g.constant([1, 2, 3])], scope=scope)
    whole = g.op("Shape", [g.op("Add", [place, heads], scope=scope)], scope=scope)
    parts = [g.op("Expand", [part, whole], scope=scope) for part in (batch, heads, place)]
    return g.op("Concat", parts, scope=scope, axis=-1)


def _numbers(
    g: GraphBuilder, call: Call, part: str, slot: int, cache: StoredCache, *, rank: int
) -> str:
    """Cached keys (slot 0) or values (1), (B, kv_heads, ..., positions, head_dim), as float32.

    Args:
        g: The graph.
        call: What the layer's nodes have in common.
        part: What is cached.
        slot: Which of the two it is.
        cache: What both are kept as.
        rank: Axes of ``part``.
    """
    if cache.format == "fp32":
        return part
    scope = f"{call.name}/cached"
    numbers = g.op("Cast", [part], scope=scope, to=FLOAT)
    if cache.format == "fp16":
        return numbers
    return g.op("Mul", [numbers, _scale(g, call, slot, cache, rank=rank)], scope=scope)


def _scale(g: GraphBuilder, call: Call, slot: int, cache: StoredCache, *, rank: int) -> str:
    """Scales of an int8 cache's keys or values, as of tensors (B, kv_heads, ..., head_dim)."""
    stored = (cache.key_scale, cache.value_scale)[slot]
    if stored is None:
        raise ExportError("An int8 cache needs scales; give --calibration texts to look at.")
    name = f"{call.name}.{('key', 'value')[slot]}_scale/{rank}"
    ones = [1] * (rank - 3)
    return g.weight(name, stored, [call.spec.kv_heads, *ones, call.spec.head_dim])


def _half(g: GraphBuilder, value: str, scope: str) -> str:
    """A value as float16, "" for one that is left out; what is beyond its range is cut off."""
    if not value:
        return value

    def cast() -> str:
        low, high = g.floats(-HALF_REACH), g.floats(HALF_REACH)
        within = g.op("Clip", [value, low, high], scope=f"{scope}/half")
        return g.op("Cast", [within], scope=f"{scope}/half", to=FLOAT16)

    return g.once(f"{value}/half", cast)


def _rotary(g: GraphBuilder, call: Call, *, half: bool) -> list[str]:
    """Tables and positions for the kernel's rotary embedding, left out where it does none."""
    tables = None if call.kind.rope is None else call.common.ropes[call.kind.rope]
    if not isinstance(tables, RopeTables):
        return ["", "", ""]
    name = f"rope.{call.kind.rope}"
    found = [g.weight(f"{name}.cosine", tables.cosine), g.weight(f"{name}.sine", tables.sine)]
    if half:
        found = [_half(g, table, name) for table in found]
    return [*found, call.common.position_ids]


def _window_bias(g: GraphBuilder, common: Common, window: int) -> str:
    """What hides keys outside a window, (B, 1, S, total): 0 or ``HIDDEN``; layers share it."""
    scope = f"window.{window}"

    def bias() -> str:
        query = [_query_places(g, common), g.constant([2])]
        own = g.op("Unsqueeze", query, scope=f"{scope}/query")
        distance = g.op("Sub", [own, _key_places(g, common)], scope=f"{scope}/distance")
        far = g.op("GreaterOrEqual", [distance, g.constant(window)], scope=f"{scope}/far")
        hidden = g.op("Where", [far, g.floats(HIDDEN), g.floats(0.0)], scope=scope)
        return g.op("Unsqueeze", [hidden, g.constant([1])], scope=scope)

    return g.once(scope, bias)


def _query_places(g: GraphBuilder, common: Common) -> str:
    """Places of new positions in the cache, (B, S); layers share them.

    They are counted as GroupQueryAttention does: the new positions of a row end at its length,
    unless the row is shorter than they are (padding, no past).
    """

    def places() -> str:
        scope, size = "places/query", _size(g, common)
        start = g.op("Sub", [common.lengths, size], scope=scope)
        start = g.op("Max", [start, g.constant(0)], scope=scope)
        start = g.op("Unsqueeze", [start, g.constant([1])], scope=scope)
        count = g.op("Squeeze", [size], scope=scope)
        steps = g.op("Range", [g.constant(0), count, g.constant(1)], scope=scope)
        return g.op("Add", [start, steps], scope=scope)

    return g.once("places/query", places)


def _key_places(g: GraphBuilder, common: Common) -> str:
    """Places of keys in the cache, (total,); layers share them."""

    def places() -> str:
        edges = [g.constant(0), _total(g, common), g.constant(1)]
        return g.op("Range", edges, scope="places/key")

    return g.once("places/key", places)


def _size(g: GraphBuilder, common: Common) -> str:
    """(1,) int64 new positions S."""
    return g.once(
        "places/size", lambda: g.op("Shape", [common.position_ids], scope="places", start=-1)
    )


def _total(g: GraphBuilder, common: Common) -> str:
    """int64 scalar, columns of the mask."""
    return g.once("places/total", lambda: g.op("Cast", [common.total], scope="places", to=INT64))


def _split(g: GraphBuilder, spec: DecoderSpec, packed: str, name: str) -> list[str]:
    """Splits packed projections into queries, keys and values."""
    widths = [spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim]
    parts = [f"{name}/split/{part}" for part in ("query", "key", "value")]
    g.op(
        "Split",
        [packed, g.constant([*widths, widths[1]])],
        scope=name,
        outputs=parts,
        axis=-1,
    )
    return parts


def _normed_heads(
    g: GraphBuilder, spec: DecoderSpec, parts: list[str], query: Stored, key: Stored, name: str
) -> list[str]:
    """Normalizes queries and keys head by head."""
    widths = [spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim]
    parts = list(parts)
    for slot, weight in enumerate((query, key)):
        scope = f"{name}.{('query', 'key')[slot]}_norm"
        split = g.op("Reshape", [parts[slot], g.constant([0, 0, -1, spec.head_dim])], scope=scope)
        normed = norm(g, split, weight, scope, spec.eps)
        parts[slot] = g.op("Reshape", [normed, g.constant([0, 0, widths[slot]])], scope=scope)
    return parts
