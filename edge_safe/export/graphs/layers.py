"""What decoder layers are made of, but for their attention, as stored weights and nodes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edge_safe.export.cache_format import CacheFormat
from edge_safe.export.graphs.builder import FLOAT, FLOAT16, INT8, INT32, INT64, GraphBuilder
from edge_safe.export.graphs.matrices import Matrix, linear, store_lattice, store_linear
from edge_safe.export.graphs.spec import (
    Activation,
    DecoderSpec,
    LatticeSource,
    TensorSource,
)
from edge_safe.export.graphs.store import Stored, WeightStore
from edge_safe.export.packing import Lattice
from edge_safe.export.quantization import MatrixFormat
from edge_safe.runtime.prefill import ATTENTION_END

CACHE_TYPES = {"fp32": FLOAT, "fp16": FLOAT16, "int8": INT8}


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
        prompts: Whether prompts alone are read into it, many positions at once.
    """

    format: CacheFormat = "fp32"
    key_scale: Stored | None = None
    value_scale: Stored | None = None
    prompts: bool = False


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


def mlp(g: GraphBuilder, x: str, weights: LayerWeights, index: int, activation: Activation) -> str:
    """The gated MLP of one layer."""
    name = f"layers.{index}.mlp"
    if weights.up is None:
        both = project(g, x, weights.gate, f"{name}.gate_up")
        gate, up = (f"{name}.gate_up/split/{part}" for part in ("gate", "up"))
        width = weights.gate.matrix.rows // 2
        scope = f"{name}.gate_up"
        g.op("Split", [both, g.constant([width, width])], scope=scope, outputs=[gate, up], axis=-1)
    else:
        gate = project(g, x, weights.gate, f"{name}.gate")
        up = project(g, x, weights.up, f"{name}.up")
    if activation == "silu":
        # SiLU, x * sigmoid(x), in one node.
        active = g.contrib("QuickGelu", [gate], scope=name, alpha=1.0)
    else:
        active = g.op("Gelu", [gate], scope=name, approximate="tanh")
    return project(g, g.op("Mul", [active, up], scope=name), weights.down, f"{name}.down")


def output_projection(g: GraphBuilder, x: str, weights: LayerWeights, index: int) -> str:
    """The projection behind the attention."""
    return project(g, x, weights.output, f"layers.{index}.attention.output")


def project(g: GraphBuilder, x: str, layer: Affine, name: str) -> str:
    """A stored linear layer of x (B, S, columns): (B, S, rows)."""
    return linear(g, x, layer.matrix, name, layer.bias)


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
