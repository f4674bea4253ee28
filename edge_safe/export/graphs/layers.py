"""One decoder layer, and the shared pieces around it, as nodes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from edge_safe.export.cache_format import CacheFormat
from edge_safe.export.graphs.builder import FLOAT, FLOAT16, INT8, INT32, INT64, GraphBuilder
from edge_safe.export.graphs.matrices import Matrix, linear, store_lattice, store_linear
from edge_safe.export.graphs.spans import HIDDEN, Heads, Places, over_spans
from edge_safe.export.graphs.spec import (
    Activation,
    DecoderSpec,
    LatticeSource,
    LayerAttention,
    TensorSource,
)
from edge_safe.export.graphs.store import Stored, WeightStore
from edge_safe.export.packing import Lattice
from edge_safe.export.quantization import MatrixFormat
from edge_safe.runtime.prefill import ATTENTION_END

# A score at which a position counts nothing in float16, which ends at 65504.
HALF_REACH = 6.0e4

CACHE_TYPES = {"fp32": FLOAT, "fp16": FLOAT16, "int8": INT8}
# Place of an int8 cache's scales among the attention kernel's inputs.
SCALES_AT = 12


@dataclass(frozen=True, slots=True)
class Affine:
    """A stored linear layer with its optional bias."""

    matrix: Matrix
    bias: Stored | None


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """Stored weights of one decoder layer.

    ``gate`` holds the outputs of both inner projections where ``up`` is None.
    """

    input_norm: Stored
    qkv: Affine
    query_norm: Stored | None
    key_norm: Stored | None
    output: Affine
    attention_post_norm: Stored | None
    mlp_norm: Stored
    gate: Affine
    up: Affine | None
    down: Affine
    mlp_post_norm: Stored | None
    cache: StoredCache


@dataclass(frozen=True, slots=True)
class StoredCache:
    """What a layer keeps its keys and values as.

    Attributes:
        format: Their type.
        key_scale: (kv_heads * head_dim,) of an int8 cache.
        value_scale: Likewise.
    """

    format: CacheFormat = "fp32"
    key_scale: Stored | None = None
    value_scale: Stored | None = None


@dataclass(frozen=True, slots=True)
class RopeTables:
    """Stored cosine and sine of one rotary embedding, each (context, rotary_dim / 2)."""

    cosine: Stored
    sine: Stored


@dataclass(frozen=True, slots=True)
class RopeAxes:
    """A rotary embedding with M-RoPE, whose tables a graph makes for the positions at hand.

    Attributes:
        frequencies: Stored (rotary_dim / 2,).
        axes: Row of position_ids that each of them follows.
        scale: Factor of cosine and sine.
    """

    frequencies: Stored
    axes: tuple[int, ...]
    scale: float


@dataclass(frozen=True, slots=True)
class Turn:
    """Values of a graph that turn its positions: one row of the tables for each.

    Attributes:
        cosine: (B * S, rotary_dim / 2).
        sine: Likewise.
        rows: (B, S) int64 row of each position.
    """

    cosine: str
    sine: str
    rows: str


@dataclass(frozen=True, slots=True)
class Common:
    """What all layers of a graph share: mask figures, positions and rotary tables.

    Attributes:
        lengths: (B,) int64 real positions of each row, past ones included.
        last_key: (B,) int32, lengths - 1.
        total: int32 scalar, columns of the mask.
        position_ids: (B, S) int64, (3, B, S) with M-RoPE.
        ropes: The tables, in the order of the decoder's rotary embeddings.
        ends: (B, S) int64 last place that each position sees, None where that is its own.
    """

    lengths: str
    last_key: str
    total: str
    position_ids: str
    ropes: tuple[RopeTables | Turn, ...]
    ends: str | None = None


PLAIN_CACHE = StoredCache()


def store_layer(
    store: WeightStore,
    spec: DecoderSpec,
    tensor: TensorSource,
    index: int,
    form: MatrixFormat,
    lattice: LatticeSource | None = None,
    cache: StoredCache = PLAIN_CACHE,
    *,
    joined: bool = False,
) -> LayerWeights:
    """Reads, quantizes and stores the weights of one layer.

    Args:
        store: The weights file.
        spec: The decoder.
        tensor: Source of the weights, by the names transformers gives to Llama's.
        index: Layer.
        form: How the matrices are packed.
        lattice: Source of matrices that keep the 4 bits they come in.
        cache: What its keys and values are kept as.
        joined: Whether the two inner projections of the MLP are one product, whose outputs a
            split copies: faster for one position, slower for many.
    """
    base = f"model.layers.{index}"
    attention = f"{base}.self_attn"

    def affine(names: list[str], has_bias: bool) -> Affine:
        bias = np.concatenate([tensor(f"{name}.bias") for name in names]) if has_bias else None
        stored_bias = None if bias is None else store.add(bias)
        rounded = (
            None if lattice is None else _joined([lattice(f"{name}.weight") for name in names])
        )
        if rounded is not None:
            kept = MatrixFormat(4, rounded.values.shape[2])
            return Affine(store_lattice(store, rounded, kept), stored_bias)
        weight = np.concatenate([tensor(f"{name}.weight") for name in names])
        return Affine(store_linear(store, weight, form), stored_bias)

    def norm(name: str) -> Stored:
        return store.add(tensor(f"{name}.weight"))

    # Where outputs are normalized as well, transformers gives the MLP's norm another name.
    mlp_norm = "pre_feedforward_layernorm" if spec.post_norms else "post_attention_layernorm"
    inner = [f"{base}.mlp.{part}_proj" for part in ("gate", "up")]
    return LayerWeights(
        input_norm=norm(f"{base}.input_layernorm"),
        qkv=affine([f"{attention}.{part}_proj" for part in "qkv"], spec.qkv_bias),
        query_norm=norm(f"{attention}.q_norm") if spec.qk_norm else None,
        key_norm=norm(f"{attention}.k_norm") if spec.qk_norm else None,
        output=affine([f"{attention}.o_proj"], spec.output_bias),
        attention_post_norm=(norm(f"{base}.post_attention_layernorm") if spec.post_norms else None),
        mlp_norm=norm(f"{base}.{mlp_norm}"),
        gate=affine(inner if joined else inner[:1], spec.mlp_bias),
        up=None if joined else affine(inner[1:], spec.mlp_bias),
        down=affine([f"{base}.mlp.down_proj"], spec.mlp_bias),
        mlp_post_norm=norm(f"{base}.post_feedforward_layernorm") if spec.post_norms else None,
        cache=cache,
    )


def _joined(parts: list[Lattice | None]) -> Lattice | None:
    """Outputs of several layers in one, None unless all are there and have the same blocks."""
    found = [part for part in parts if part is not None]
    if len(found) < len(parts) or len({part.values.shape[1:] for part in found}) != 1:
        return None
    return Lattice(
        np.concatenate([part.values for part in found]),
        np.concatenate([part.scales for part in found]),
        np.concatenate([part.zeros for part in found]),
    )


def common_inputs(
    g: GraphBuilder, ropes: tuple[RopeTables | RopeAxes, ...], *, spans: bool = False
) -> Common:
    """Declares attention_mask and position_ids and derives what GroupQueryAttention wants.

    The mask is right-padded, so the sum of a row is its length. With spans there is also
    attention_end, the last place that each position sees.
    """
    mask = g.input("attention_mask", INT64, ["batch", "total"])
    axes: list[int | str] = [3] if any(isinstance(rope, RopeAxes) for rope in ropes) else []
    positions = g.input("position_ids", INT64, [*axes, "batch", "sequence"])
    lengths = g.op("ReduceSum", [mask, g.constant([1])], scope="mask", keepdims=0)
    last = g.op("Sub", [lengths, g.constant(1)], scope="mask")
    size = g.op("Shape", [mask], scope="mask")
    total = g.op("Gather", [size, g.constant(1)], scope="mask", axis=0)
    return Common(
        lengths=lengths,
        last_key=g.op("Cast", [last], scope="mask/last", to=INT32),
        total=g.op("Cast", [total], scope="mask/total", to=INT32),
        position_ids=positions,
        ropes=tuple(
            turn(g, rope, positions, f"rope.{number}") if isinstance(rope, RopeAxes) else rope
            for number, rope in enumerate(ropes)
        ),
        ends=g.input(ATTENTION_END, INT64, ["batch", "sequence"]) if spans else None,
    )


def turn(g: GraphBuilder, rope: RopeAxes, positions: str, name: str) -> Turn:
    """Cosine and sine of positions (3, B, S), each frequency by its own row of them.

    GroupQueryAttention's own rotary embedding takes one number a position, so that this one is
    done before it.
    """
    own = g.op("Gather", [positions, g.constant(list(rope.axes))], scope=name, axis=0)
    own = g.op("Transpose", [own], scope=name, perm=[1, 2, 0])
    own = g.op("Cast", [own], scope=name, to=FLOAT)
    angles = g.op("Mul", [own, g.weight(f"{name}.frequencies", rope.frequencies)], scope=name)
    flat = g.op("Reshape", [angles, g.constant([-1, len(rope.axes)])], scope=f"{name}/angles")
    cosine, sine = (g.op(kind, [flat], scope=name) for kind in ("Cos", "Sin"))
    if rope.scale != 1:
        cosine, sine = (
            g.op("Mul", [table, g.floats(rope.scale)], scope=name) for table in (cosine, sine)
        )
    shape = g.op("Shape", [positions], scope=f"{name}/rows", start=1)
    count = g.op("ReduceProd", [shape], scope=f"{name}/rows", keepdims=0)
    rows = g.op("Range", [g.constant(0), count, g.constant(1)], scope=f"{name}/rows")
    return Turn(cosine, sine, g.op("Reshape", [rows, shape], scope=f"{name}/rows"))


def rotate(g: GraphBuilder, x: str, turning: Turn, heads: int, name: str) -> str:
    """Turns the heads of queries or keys (B, S, heads * head_dim), halves rotated."""
    inputs = [x, turning.rows, turning.cosine, turning.sine]
    return g.contrib("RotaryEmbedding", inputs, scope=name, interleaved=0, num_heads=heads)


def norm(g: GraphBuilder, x: str, weight: Stored, name: str, eps: float) -> str:
    """RMSNorm over the last axis."""
    # SimplifiedLayerNormalization is registered in the standard domain, though no part of it.
    scale = g.weight(f"{name}.weight", weight)
    return g.op(
        "SimplifiedLayerNormalization", [x, scale], scope=name, axis=-1, epsilon=eps, stash_type=1
    )


def add_norm(
    g: GraphBuilder, x: str, residual: str, weight: Stored, name: str, eps: float
) -> tuple[str, str]:
    """RMSNorm of x + residual, and the sum itself."""
    normed, total = f"{name}/normed", f"{name}/sum"
    g.contrib(
        "SkipSimplifiedLayerNormalization",
        [x, residual, g.weight(f"{name}.weight", weight)],
        scope=name,
        outputs=[normed, "", "", total],
        epsilon=eps,
    )
    return normed, total


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
    cache: list[int | str] = ["batch", spec.kv_heads, "past", spec.head_dim]
    grown: list[int | str] = ["batch", spec.kv_heads, "present", spec.head_dim]
    kept = weights.cache.format
    kind_of_cache = CACHE_TYPES[kept]
    parts = ("key", "value")
    past = [g.input(f"past_key_values.{index}.{part}", kind_of_cache, cache) for part in parts]
    present = [g.output(f"present.{index}.{part}", kind_of_cache, grown) for part in parts]
    packed = _affine(g, x, weights.qkv, f"{name}.qkv")
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
    given = query[0]
    if kept == "fp16":
        query = [_half(g, part, name) for part in query]
    rotary = _rotary(g, kind, common, half=kept == "fp16")
    inputs = [*query, *past, common.last_key, common.total, *rotary]
    further: dict[str, Any] = {}
    if kind.window is not None:
        # onnxruntime 1.23 sees one position more than local_window_size says, later ones do not;
        # the bias hides it from both. The attribute saves the work on all that is further away.
        further["local_window_size"] = kind.window
        bias = _window_bias(g, common, kind.window)
        inputs.append(_half(g, bias, f"window.{kind.window}") if kept == "fp16" else bias)
    scale = spec.head_dim**-0.5 if spec.attention_scale is None else spec.attention_scale
    if weights.cache.key_scale is not None and weights.cache.value_scale is not None:
        # Attention bias and sink stand before the scales.
        inputs += [""] * (SCALES_AT - len(inputs))
        inputs.append(g.weight(f"{name}.key_scale", weights.cache.key_scale))
        inputs.append(g.weight(f"{name}.value_scale", weights.cache.value_scale))
        further |= {f"{part}_quant_type": "PER_CHANNEL" for part in "kv"}
        further["kv_cache_bit_width"] = 8
    attended = g.contrib(
        "GroupQueryAttention",
        inputs,
        scope=name,
        outputs=[f"{name}/out", *present],
        num_heads=spec.heads,
        kv_num_heads=spec.kv_heads,
        do_rotary=int(isinstance(rope, RopeTables)),
        rotary_interleaved=0,
        scale=float(scale),
        **further,
    )
    if kept == "fp16":
        attended = g.op("Cast", [attended], scope=f"{name}/float", to=FLOAT)
    if common.ends is None:
        return attended
    return over_spans(
        g,
        Heads(spec.heads, spec.kv_heads, spec.head_dim, float(scale)),
        attended,
        given,
        present,
        lambda part, slot: _cached(g, spec, weights.cache, part, slot, name),
        _rotary(g, kind, common, half=False)[:2],
        Places(*_places(g, common), common.ends, common.lengths, common.position_ids),
        kind.window,
        name,
    )


def _cached(
    g: GraphBuilder, spec: DecoderSpec, cache: StoredCache, part: str, slot: int, name: str
) -> str:
    """Keys (slot 0) or values (1), (B, kv_heads, 1, total, head_dim), as float32."""
    if cache.format == "fp32":
        return part
    scope = f"{name}/cached"
    numbers = g.op("Cast", [part], scope=scope, to=FLOAT)
    scale = (cache.key_scale, cache.value_scale)[slot]
    if scale is None:
        return numbers
    factor = g.weight(f"{name}.{('key', 'value')[slot]}_scale", scale)
    shape = g.constant([spec.kv_heads, 1, 1, spec.head_dim])
    return g.op("Mul", [numbers, g.op("Reshape", [factor, shape], scope=scope)], scope=scope)


def _half(g: GraphBuilder, value: str, scope: str) -> str:
    """A value as float16, "" for one that is left out; what is beyond its range is cut off."""
    if not value:
        return value

    def cast() -> str:
        low, high = g.floats(-HALF_REACH), g.floats(HALF_REACH)
        within = g.op("Clip", [value, low, high], scope=f"{scope}/half")
        return g.op("Cast", [within], scope=f"{scope}/half", to=FLOAT16)

    return g.once(f"{value}/half", cast)


def _rotary(g: GraphBuilder, kind: LayerAttention, common: Common, *, half: bool) -> list[str]:
    """Tables and positions for the kernel's rotary embedding, left out where it does none."""
    tables = None if kind.rope is None else common.ropes[kind.rope]
    if not isinstance(tables, RopeTables):
        return ["", "", ""]
    name = f"rope.{kind.rope}"
    found = [g.weight(f"{name}.cosine", tables.cosine), g.weight(f"{name}.sine", tables.sine)]
    if half:
        found = [_half(g, table, name) for table in found]
    return [*found, common.position_ids]


def _window_bias(g: GraphBuilder, common: Common, window: int) -> str:
    """What hides keys outside a window, (B, 1, S, total): 0 or ``HIDDEN``; layers share it."""
    scope = f"window.{window}"

    def bias() -> str:
        query, key = _places(g, common)
        query = g.op("Unsqueeze", [query, g.constant([2])], scope=f"{scope}/query")
        distance = g.op("Sub", [query, key], scope=f"{scope}/distance")
        far = g.op("GreaterOrEqual", [distance, g.constant(window)], scope=f"{scope}/far")
        hidden = g.op("Where", [far, g.floats(HIDDEN), g.floats(0.0)], scope=scope)
        return g.op("Unsqueeze", [hidden, g.constant([1])], scope=scope)

    return g.once(scope, bias)


def _places(g: GraphBuilder, common: Common) -> tuple[str, str]:
    """Places in the cache of new positions (B, S) and of keys (total,); layers share them.

    They are counted as GroupQueryAttention does: the new positions of a row end at its length,
    unless the row is shorter than they are (padding, no past).
    """

    def query() -> str:
        scope = "places/query"
        size = g.op("Shape", [common.position_ids], scope=scope, start=-1)
        start = g.op("Sub", [common.lengths, size], scope=scope)
        start = g.op("Max", [start, g.constant(0)], scope=scope)
        start = g.op("Unsqueeze", [start, g.constant([1])], scope=scope)
        count = g.op("Squeeze", [size], scope=scope)
        steps = g.op("Range", [g.constant(0), count, g.constant(1)], scope=scope)
        return g.op("Add", [start, steps], scope=scope)

    def key() -> str:
        total = g.op("Cast", [common.total], scope="places/key", to=INT64)
        return g.op("Range", [g.constant(0), total, g.constant(1)], scope="places/key")

    return g.once("places/query", query), g.once("places/key", key)


def mlp(g: GraphBuilder, x: str, weights: LayerWeights, index: int, activation: Activation) -> str:
    """The gated MLP of one layer."""
    name = f"layers.{index}.mlp"
    if weights.up is None:
        both = _affine(g, x, weights.gate, f"{name}.gate_up")
        gate, up = (f"{name}.gate_up/split/{part}" for part in ("gate", "up"))
        width = weights.gate.matrix.rows // 2
        scope = f"{name}.gate_up"
        g.op("Split", [both, g.constant([width, width])], scope=scope, outputs=[gate, up], axis=-1)
    else:
        gate = _affine(g, x, weights.gate, f"{name}.gate")
        up = _affine(g, x, weights.up, f"{name}.up")
    if activation == "silu":
        # SiLU, x * sigmoid(x), in one node.
        active = g.contrib("QuickGelu", [gate], scope=name, alpha=1.0)
    else:
        active = g.op("Gelu", [gate], scope=name, approximate="tanh")
    return _affine(g, g.op("Mul", [active, up], scope=name), weights.down, f"{name}.down")


def output_projection(g: GraphBuilder, x: str, weights: LayerWeights, index: int) -> str:
    """The projection behind the attention."""
    return _affine(g, x, weights.output, f"layers.{index}.attention.output")


def _affine(g: GraphBuilder, x: str, layer: Affine, name: str) -> str:
    return linear(g, x, layer.matrix, name, layer.bias)


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


def rope_tables(store: WeightStore, spec: DecoderSpec) -> tuple[RopeTables | RopeAxes, ...]:
    """Stores the rotary tables of the whole context, or the frequencies of M-RoPE."""
    tables: list[RopeTables | RopeAxes] = []
    for rope in spec.ropes:
        if rope.axes:
            frequencies = store.add(rope.inverse_frequencies.astype(np.float32))
            tables.append(RopeAxes(frequencies, rope.axes, rope.scale))
            continue
        cosine, sine = rope.tables(spec.context_length)
        tables.append(RopeTables(store.add(cosine), store.add(sine)))
    return tuple(tables)
