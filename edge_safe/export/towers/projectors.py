"""The bridges from tower states to word embeddings, as ``models/pebble/projectors.py`` has them.

The read-out uses the bundle's own tied embedding for both products. A projector's other layers
stay in float32: whether a word piece is emitted hangs on the sign of one number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from edge_safe.export.graphs.builder import FLOAT, INT64, GraphBuilder
from edge_safe.export.graphs.matrices import Matrix, linear, look_up
from edge_safe.export.graphs.store import WeightStore
from edge_safe.export.quantization import PLAIN
from edge_safe.export.towers.modules import Layers
from edge_safe.models.pebble.object_projector import SCALE, ObjectProjector
from edge_safe.models.pebble.projectors import (
    HIDDEN_SCORE,
    ConvolutionBlock,
    LocalAttention,
    ProjectorBlock,
    SequenceProjector,
)


@dataclass(frozen=True, slots=True)
class Window:
    """What all attentions of one projector share.

    Attributes:
        rows: (T, T) int64 row of ``offset_bias`` for each pair of steps.
        seen: (N, 1, T, T) bool, near and real.
    """

    rows: str
    seen: str


def sequence_projector_graph(
    name: str,
    projector: SequenceProjector,
    store: WeightStore,
    embedding: Matrix,
    source: str,
    result: str,
) -> tuple[GraphBuilder, list[Matrix]]:
    """Tower states to one embedding per emitted word piece, or with own pieces to their ids.

    Args:
        name: Name of the graph.
        projector: The torch module.
        store: Takes the projector's own weights.
        embedding: The tied embedding, in the shared weights file.
        source: Name of the input (N, T, c); ``lengths`` (N,) stands beside it.
        result: Name of the output, (M, d) or (M,) int64 with own pieces; ``line_index`` (M,)
            stands beside it.
    """
    config = projector.config
    g = GraphBuilder(name)
    states = g.input(source, FLOAT, ["lines", "steps", config.state_size])
    lengths = g.input("lengths", INT64, ["lines"])
    if config.pieces:
        g.output(result, INT64, ["pieces"])
    else:
        g.output(result, FLOAT, ["pieces", config.hidden_size])
    g.output("line_index", INT64, ["pieces"])
    layers = Layers(g, store, PLAIN)

    hidden = layers.layer_norm(states, projector.input_norm, "input_norm")
    steps, real, keep = _real_steps(g, hidden, lengths, "steps")
    window = _window(g, steps, real, config.window)
    hidden = layers.linear(hidden, projector.input, "input")
    hidden = g.op("Mul", [hidden, keep], scope="input")
    for index, block in enumerate(projector.blocks):
        if isinstance(block, ProjectorBlock):
            hidden = _convolution(layers, hidden, block.convolution, keep, f"blocks.{index}")
            hidden = _attention(layers, hidden, block.attention, window, f"blocks.{index}")
    hidden = layers.layer_norm(hidden, projector.norm, "norm")
    emission = layers.linear(hidden, projector.emission, "emission")
    emission = g.op("Squeeze", [emission, g.constant([2])], scope="emission")
    if config.pieces:
        emission, query = _choose(layers, hidden, emission, projector)
    else:
        query = layers.linear(hidden, projector.query, "query")

    emits = g.op("Greater", [emission, g.floats(0.0)], scope="emission")
    emits = g.op("And", [emits, real], scope="emission")
    found = g.op("NonZero", [emits], scope="select")
    where = g.op("Transpose", [found], scope="select", perm=[1, 0])
    query = g.op("GatherND", [query, where], scope="select")
    if config.pieces:
        features = pieces = query
    else:
        features, pieces = _read_out(g, query, embedding, config.candidates)
    kept = _first_of_run(g, found, pieces)
    line = g.op("Gather", [found, g.constant(0)], scope="select", axis=0)
    g.op("Compress", [features, kept], scope="select", outputs=[result], axis=0)
    g.op("Compress", [line, kept], scope="select", outputs=["line_index"], axis=0)
    return g, layers.matrices


def object_projector_graph(
    name: str, projector: ObjectProjector, store: WeightStore, embedding: Matrix, cells: int
) -> tuple[GraphBuilder, list[Matrix]]:
    """One picture's vision_states (1, cells, c) -> image_features (M, d), pieces of its name."""
    config = projector.config
    g = GraphBuilder(name)
    states = g.input("vision_states", FLOAT, [1, cells, config.state_size])
    g.output("image_features", FLOAT, ["pieces", config.hidden_size])
    layers = Layers(g, store, PLAIN)
    mean = g.op("ReduceMean", [states, g.constant([1])], scope="mean", keepdims=0)
    classes = layers.linear(mean, projector.input, "input")
    share = g.op("Softmax", [classes], scope="input", axis=-1)
    share = g.op("Mul", [share, g.floats(SCALE)], scope="input")
    hidden = layers.linear(share, projector.mix, "mix")
    slots = layers.gelu(layers.add(hidden, layers.stored("slot", projector.slot), "slots"), "slots")
    emission = layers.linear(slots, projector.emission, "emission")
    silent = g.op("LessOrEqual", [emission, g.floats(0.0)], scope="emission")
    silent = g.op("Cast", [silent], scope="emission", to=INT64)
    silent = g.op("CumSum", [silent, g.constant(0)], scope="emission")
    # Slots and pieces stand in one column: (slots, 1).
    named = g.op("Equal", [silent, g.constant(0)], scope="emission")
    named = g.op("Squeeze", [named, g.constant([1])], scope="emission")
    query = g.op("Compress", [slots, named], scope="select", axis=0)
    query = layers.linear(query, projector.query, "query")
    features, _ = _read_out(g, query, embedding, 1)
    g.op("Identity", [features], scope="select", outputs=["image_features"])
    return g, layers.matrices


def _real_steps(g: GraphBuilder, x: str, lengths: str, scope: str) -> tuple[str, str, str]:
    """Numbers of x's steps (T,), which are real (N, T), and the same as float (N, T, 1)."""
    size = g.op("Shape", [x], scope=scope, start=1, end=2)
    count = g.op("Squeeze", [size, g.constant([0])], scope=scope)
    steps = g.op("Range", [g.constant(0), count, g.constant(1)], scope=scope)
    ends = g.op("Unsqueeze", [lengths, g.constant([1])], scope=scope)
    real = g.op("Less", [steps, ends], scope=scope)
    keep = g.op("Cast", [real], scope=scope, to=FLOAT)
    return steps, real, g.op("Unsqueeze", [keep, g.constant([2])], scope=scope)


def _window(g: GraphBuilder, steps: str, real: str, reach: int) -> Window:
    """Relative offsets of all pairs of steps."""
    scope = "window"
    column = g.op("Unsqueeze", [steps, g.constant([1])], scope=scope)
    offset = g.op("Sub", [steps, column], scope=scope)
    clipped = g.op("Clip", [offset, g.constant(-reach), g.constant(reach)], scope=scope)
    rows = g.op("Add", [clipped, g.constant(reach)], scope=scope)
    distance = g.op("Abs", [offset], scope=scope)
    near = g.op("LessOrEqual", [distance, g.constant(reach)], scope=scope)
    keys = g.op("Unsqueeze", [real, g.constant([1, 2])], scope=scope)
    return Window(rows, g.op("And", [near, keys], scope=scope))


def _convolution(layers: Layers, x: str, block: ConvolutionBlock, keep: str, base: str) -> str:
    """Depthwise convolution over time, then a pointwise MLP, both residual."""
    name = f"{base}.convolution"
    normed = layers.layer_norm(x, block.mix_norm, f"{name}.mix_norm")
    kept = layers.turn(layers.g.op("Mul", [normed, keep], scope=name), f"{name}.mix")
    mixed = layers.turn(layers.convolution(kept, block.mix, f"{name}.mix"), f"{name}.mixed")
    x = layers.add(x, mixed, f"{name}.mixed")
    normed = layers.layer_norm(x, block.norm, f"{name}.norm")
    wide = layers.gelu(layers.linear(normed, block.up, f"{name}.up"), f"{name}.up")
    return layers.add(x, layers.linear(wide, block.down, f"{name}.down"), f"{name}.down")


def _attention(layers: Layers, x: str, block: LocalAttention, window: Window, base: str) -> str:
    """Attention over near and real steps, with a learned bias per offset; residual."""
    g, name = layers.g, f"{base}.attention"
    normed = layers.layer_norm(x, block.norm, f"{name}.norm")
    heads = g.constant([0, 0, block.heads, block.head_dim])

    def split(layer: str, perm: list[int], scale: float = 1.0) -> str:
        made = layers.linear(normed, getattr(block, layer), f"{name}.{layer}", scale)
        parted = g.op("Reshape", [made, heads], scope=f"{name}.{layer}")
        return g.op("Transpose", [parted], scope=f"{name}.{layer}", perm=perm)

    query = split("query", [0, 2, 1, 3], 1 / math.sqrt(block.head_dim))
    score = g.op("MatMul", [query, split("key", [0, 2, 3, 1])], scope=f"{name}.score")
    offsets = layers.stored(f"{name}.offset_bias", block.offset_bias)
    bias = g.op("Gather", [offsets, window.rows], scope=f"{name}.bias", axis=0)
    bias = g.op("Transpose", [bias], scope=f"{name}.bias", perm=[2, 0, 1])
    score = layers.add(score, bias, f"{name}.score")
    score = g.op("Where", [window.seen, score, g.floats(HIDDEN_SCORE)], scope=f"{name}.score")
    share = g.op("Softmax", [score], scope=f"{name}.share", axis=-1)
    pooled = g.op("MatMul", [share, split("value", [0, 2, 1, 3])], scope=f"{name}.pooled")
    pooled = g.op("Transpose", [pooled], scope=f"{name}.pooled", perm=[0, 2, 1, 3])
    width = block.heads * block.head_dim
    joined = g.op("Reshape", [pooled, g.constant([0, 0, width])], scope=f"{name}.pooled")
    return layers.add(x, layers.linear(joined, block.out, f"{name}.out"), f"{name}.out")


def _read_out(g: GraphBuilder, query: str, embedding: Matrix, candidates: int) -> tuple[str, str]:
    """Mean of the embedding's best rows for each query (M, d), and the best row (M,)."""
    scope = "read_out"
    logits = linear(g, query, embedding, "embedding")
    best, rows = f"{scope}/best", f"{scope}/rows"
    g.op("TopK", [logits, g.constant([candidates])], scope=scope, outputs=[best, rows], axis=-1)
    share = g.op("Softmax", [best], scope=scope, axis=-1)
    share = g.op("Unsqueeze", [share, g.constant([1])], scope=scope)
    picked = look_up(g, rows, embedding, "embedding")
    mixed = g.op("MatMul", [share, picked], scope=scope)
    features = g.op("Squeeze", [mixed, g.constant([1])], scope=scope)
    return features, g.op("Gather", [rows, g.constant(0)], scope=scope, axis=1)


def _choose(
    layers: Layers, hidden: str, emission: str, projector: SequenceProjector
) -> tuple[str, str]:
    """Logit (N, S) of the best of a projector's own pieces against none, and the piece's id."""
    g, scope = layers.g, "choose"
    logits = layers.linear(hidden, projector.classes, "classes")
    shares = g.op("LogSoftmax", [logits], scope=scope, axis=-1)
    best = g.op("ReduceMax", [shares, g.constant([-1])], scope=scope, keepdims=0)
    place = g.op("ArgMax", [logits], scope=scope, axis=-1, keepdims=0)
    ids = g.op("Gather", [g.constant(projector.piece_ids.tolist()), place], scope=scope, axis=0)
    return g.op("Add", [emission, best], scope=scope), ids


def _first_of_run(g: GraphBuilder, found: str, pieces: str) -> str:
    """(M,) bool, False where the step before, in the same line, emits the same piece.

    Args:
        g: The graph.
        found: (2, M) int64 line and step of each emitted piece.
        pieces: (M,) int64.
    """
    scope = "first_of_run"
    piece = g.op("Unsqueeze", [pieces, g.constant([0])], scope=scope)
    # A step one further makes line, step - 1 and piece those of the entry before.
    entry = g.op("Concat", [found, piece], scope=scope, axis=0)
    start = g.op("Unsqueeze", [g.constant([-1, -1, -1]), g.constant([1])], scope=scope)
    padded = g.op("Concat", [start, entry], scope=scope, axis=1)
    before = g.op(
        "Slice", [padded, g.constant([0]), g.constant([-1]), g.constant([1])], scope=scope
    )
    one_on = g.op("Unsqueeze", [g.constant([0, 1, 0]), g.constant([1])], scope=scope)
    expected = g.op("Add", [before, one_on], scope=scope)
    apart = g.op("Abs", [g.op("Sub", [entry, expected], scope=scope)], scope=scope)
    apart = g.op("ReduceMax", [apart, g.constant([0])], scope=scope, keepdims=0)
    return g.op("Greater", [apart, g.constant(0)], scope=scope)
