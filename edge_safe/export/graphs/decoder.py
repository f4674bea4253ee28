"""The three graphs of a language model: embeddings, gate and decoder, over one weights file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from edge_safe.export.activations import CacheReach
from edge_safe.export.cache_format import CacheFormat, cache_scales
from edge_safe.export.graphs.attention import attention
from edge_safe.export.graphs.builder import FLOAT, INT64, GraphBuilder
from edge_safe.export.graphs.early_exit import rows_of_gate_past, stop_or_go_on
from edge_safe.export.graphs.layers import (
    CACHE_TYPES,
    Common,
    LayerWeights,
    RopeAxes,
    RopeTables,
    StoredCache,
    add_norm,
    common_inputs,
    mlp,
    norm,
    output_projection,
    rope_tables,
    store_layer,
)
from edge_safe.export.graphs.matrices import Matrix, linear, look_up, store_linear, store_table
from edge_safe.export.graphs.safety import (
    GateHead,
    TokenRows,
    gate_outputs,
    gate_verdict,
    keep_tail,
    longer_than_one,
    single_position,
    token_logits,
)
from edge_safe.export.graphs.spec import DecoderSpec, LatticeSource, TensorSource
from edge_safe.export.graphs.store import Stored, WeightStore
from edge_safe.export.quantization import Precision
from edge_safe.runtime.prefill import DEEPSTACK, STATES

Progress = Callable[[float], None]


@dataclass(frozen=True, slots=True)
class ModelWeights:
    """Everything of a language model that stands in the weights file.

    Attributes:
        embedding: Looked up.
        ropes: Rotary tables.
        layers: The layers.
        final_norm: In front of lm_head.
        lm_head: The output matrix.
        prefill: The layers in the form that prompts are read with; empty where it is the same.
    """

    embedding: Matrix
    ropes: tuple[RopeTables | RopeAxes, ...]
    layers: tuple[LayerWeights, ...]
    final_norm: Stored
    lm_head: Matrix
    prefill: tuple[LayerWeights, ...] = ()

    def for_prefill(self) -> ModelWeights:
        """The same with the layers that prompts are read with."""
        return replace(self, layers=self.prefill)


def store_model(
    store: WeightStore,
    spec: DecoderSpec,
    tensor: TensorSource,
    precision: Precision,
    progress: Progress,
    exit_layer: int | None = None,
    lattice: LatticeSource | None = None,
    caches: Sequence[CacheReach] | None = None,
    cache_format: CacheFormat = "fp32",
    smoothed: TensorSource | None = None,
) -> ModelWeights:
    """Reads, quantizes and stores a model tensor by tensor.

    Args:
        store: The weights file.
        spec: The decoder.
        tensor: Source of the weights, by the names transformers gives to Llama's.
        precision: How matrices are packed.
        progress: Told the share done after each layer.
        exit_layer: Layer of the gate, for precisions that tell the layers below it apart.
        lattice: Source of matrices that keep the 4 bits they come in.
        caches: Per layer, how far keys and values reach; needed for an int8 cache.
        cache_format: What keys and values are kept as.
        smoothed: Source of the same model for formats of whole rows.

    Raises:
        ExportError: The format needs something that is not given, or a matrix does not fit it.
    """
    embedding = store_table(store, tensor("model.embed_tokens.weight"), precision.embedding)
    ropes = rope_tables(store, spec)
    layers, prefill = [], []
    for index in range(spec.layers):
        form = precision.of_layer(index, exit_layer)
        cache = StoredCache(cache_format)
        if cache_format == "int8" and caches is not None:
            keys, values = map(store.add, cache_scales(caches[index]))
            cache = StoredCache(cache_format, keys, values)
        source = smoothed if form.whole and smoothed is not None else tensor
        # Where prompts have graphs of their own, these see single tokens alone.
        single = precision.prefill is not None
        layers.append(store_layer(store, spec, source, index, form, lattice, cache, joined=single))
        if precision.prefill is not None:
            source = tensor if smoothed is None else smoothed
            read = replace(cache, prompts=True)
            more = store_layer(store, spec, source, index, precision.prefill, None, read)
            prefill.append(more)
        progress((index + 1) / spec.layers)
    head = embedding
    if not spec.tied or precision.head != precision.embedding:
        name = "model.embed_tokens.weight" if spec.tied else "lm_head.weight"
        head = store_linear(store, tensor(name), precision.head)
    return ModelWeights(
        embedding,
        ropes,
        tuple(layers),
        store.add(tensor("model.norm.weight")),
        head,
        tuple(prefill),
    )


def embedding_graph(weights: ModelWeights, spec: DecoderSpec) -> GraphBuilder:
    """input_ids (B, S) -> inputs_embeds (B, S, d)."""
    g = GraphBuilder("embed_tokens")
    ids = g.input("input_ids", INT64, ["batch", "sequence"])
    g.output("inputs_embeds", FLOAT, ["batch", "sequence", spec.hidden_size])
    found = look_up(g, ids, weights.embedding, "embed_tokens")
    if spec.embedding_scale != 1:
        found = g.op("Mul", [found, g.floats(spec.embedding_scale)], scope="embed_tokens")
    g.op("Identity", [found], scope="embed_tokens", outputs=["inputs_embeds"])
    return g


def gate_graph(
    weights: ModelWeights,
    spec: DecoderSpec,
    exit_layer: int,
    head: GateHead,
    store: WeightStore,
    early: GateHead | None = None,
    *,
    single: bool = False,
) -> GraphBuilder:
    """Layers 0 .. exit_layer-1 and the verdict of what decides at exit_layer.

    With one position, S = 1, the verdict is NaN and gate_present is gate_past: what is missing
    there are gate_states.*, in their order, and hidden_states.

    Args:
        weights: The stored model.
        spec: The decoder.
        exit_layer: The gate's layer.
        head: What decides there.
        store: The weights file.
        early: What ends clear cases at a layer below; its layers come first in gate_past.
        single: Whether it sees single positions alone, so that it needs no conditions.
    """
    g = GraphBuilder("gate")
    shape: list[int | str] = ["batch", "sequence", spec.hidden_size]
    residual = g.input("inputs_embeds", FLOAT, shape)
    common = common_inputs(g, weights.ropes, spans=spec.bidirectional != "none")
    deepstack = deepstack_input(g, spec, range(exit_layer))
    g.output("hidden_states", FLOAT, shape)
    rows = rows_of_gate_past(head, early)
    for layer in rows[:-1]:
        g.output(states_name(layer), FLOAT, shape)
    read = sorted(rows)[:-1]
    entering = (residual, "")

    def run(indices: range) -> None:
        nonlocal entering
        entering = pass_layers(g, spec, weights, common, deepstack, indices, entering, read)

    def states(of: GateHead) -> list[str]:
        return states_of(of, exit_layer)

    def leave() -> None:
        g.op("Add", list(entering), scope="exit", outputs=["hidden_states"])

    if single:
        run(range(exit_layer))
        leave()
        gate_outputs(g, len(rows), spec.hidden_size)
        for made, name in zip(single_position(g), ["gate_present", "verdict_logits"], strict=True):
            g.op("Identity", [made], scope="gate", outputs=[name])
        return g

    several = longer_than_one(g, "inputs_embeds", "gate")
    if early is None:
        run(range(exit_layer))
        leave()
        gate_verdict(g, states(head), head, store, several)
        return g

    first = early.sources[-1].layer
    run(range(first))
    at_exit = states_name(first)
    g.op("Add", list(entering), scope=f"layers.{first}", outputs=[at_exit])
    entering = (at_exit, "")
    left = {"hidden_states": FLOAT} | {states_name(k): FLOAT for k in read if k > first}
    for index in range(first, exit_layer):
        kind = CACHE_TYPES[weights.layers[index].cache.format]
        left |= {f"present.{index}.{part}": kind for part in ("key", "value")}

    def go_on() -> list[str]:
        run(range(first, exit_layer))
        leave()
        return states(head)

    stop_or_go_on(g, states(early), early, head, store, several, left, go_on)
    return g


def pass_layers(
    g: GraphBuilder,
    spec: DecoderSpec,
    weights: ModelWeights,
    common: Common,
    deepstack: dict[int, str],
    indices: range,
    entering: tuple[str, str],
    read: Sequence[int],
) -> tuple[str, str]:
    """Emits layers.

    Args:
        g: The graph.
        spec: The decoder.
        weights: The stored model.
        common: What the layers share.
        deepstack: What ``deepstack_input`` gave.
        indices: The layers.
        entering: Residual (B, S, d) and what the layer before still adds to it, "" for nothing.
        read: Layers whose entering states the gate reads: they get a name of their own.

    Returns:
        The same of what leaves them.
    """
    for index in indices:
        if index in read and entering[1]:
            name = states_name(index)
            kept = g.op("Add", list(entering), scope=f"layers.{index}", outputs=[name])
            entering = (kept, "")
        residual, delta = entering
        residual = _add_features(g, residual, deepstack, index)
        normed, residual = _enter(g, spec, residual, delta, weights.layers[index], index)
        attended = attention(g, spec, normed, weights.layers[index], common, index)
        entering = _leave(g, spec, residual, attended, weights.layers[index], index)
    return entering


def states_of(head: GateHead, exit_layer: int) -> list[str]:
    """Names of the (B, S, d) states entering the layer of each of a head's sources."""
    layers = (source.layer for source in head.sources)
    return ["hidden_states" if k == exit_layer else states_name(k) for k in layers]


def states_name(layer: int) -> str:
    """Name of the states entering a layer below the gate's."""
    return f"{STATES}{layer}"


def decoder_graph(
    weights: ModelWeights,
    spec: DecoderSpec,
    first_layer: int | None,
    final: TokenRows,
    store: WeightStore,
    *,
    answers: bool = True,
    single: bool = False,
) -> GraphBuilder:
    """Layers first_layer .. L-1, logits at slot T and the ``final`` verdict at T-1.

    Behind the last layer's attention only those two positions are computed.

    Args:
        weights: The stored model.
        spec: The decoder.
        first_layer: First layer, or None for all of them without a gate before.
        final: Verdict rows of the ``final`` stage.
        store: The weights file.
        answers: Whether it has lm_head and gives logits.
        single: Whether it sees single positions alone.
    """
    g = GraphBuilder("decoder")
    name = "inputs_embeds" if first_layer is None else "hidden_states"
    residual = g.input(name, FLOAT, ["batch", "sequence", spec.hidden_size])
    common = common_inputs(g, weights.ropes, spans=spec.bidirectional != "none")
    if answers:
        g.output("logits", FLOAT, ["batch", 1, spec.vocab_size])
    g.output("verdict_logits", FLOAT, ["batch", 2])
    deepstack = deepstack_input(g, spec, range(first_layer or 0, spec.layers))
    delta = ""
    for index in range(first_layer or 0, spec.layers):
        residual = _add_features(g, residual, deepstack, index)
        normed, residual = _enter(g, spec, residual, delta, weights.layers[index], index)
        attended = attention(g, spec, normed, weights.layers[index], common, index)
        if index == spec.layers - 1 and not single:
            attended, residual = keep_tail(g, [attended, residual])
        residual, delta = _leave(g, spec, residual, attended, weights.layers[index], index)
    states, _ = add_norm(g, delta, residual, weights.final_norm, "final_norm", spec.eps)
    if answers:
        slot = g.op("Gather", [states, g.constant(-1)], scope="lm_head/slot", axis=1)
        logits = _softcap(g, linear(g, slot, weights.lm_head, "lm_head"), spec.logit_softcap)
        g.op("Unsqueeze", [logits, g.constant([1])], scope="lm_head", outputs=["logits"])
    last = g.op("Gather", [states, g.constant(0)], scope="final/last", axis=1)
    verdict = token_logits(g, last, final, store, "final")
    g.op("Identity", [verdict], scope="final", outputs=["verdict_logits"])
    return g


def deepstack_input(g: GraphBuilder, spec: DecoderSpec, layers: range) -> dict[int, str]:
    """Declares deepstack_features (D, B, S, d) where one of these layers takes a part of them.

    What stands at d is added behind layer d, that is where layer d + 1 begins: the states between
    the two are those that transformers returns, without it, and those that a gate reads.

    Returns:
        By layer, the (B, S, d) features that are added where it begins.
    """
    taking = [index for index in layers if 0 < index <= spec.deepstack]
    if not taking:
        return {}
    shape: list[int | str] = [spec.deepstack, "batch", "sequence", spec.hidden_size]
    features = g.input(DEEPSTACK, FLOAT, shape)
    return {
        index: g.op(
            "Gather", [features, g.constant(index - 1)], scope=f"layers.{index}.deepstack", axis=0
        )
        for index in taking
    }


def _add_features(g: GraphBuilder, residual: str, deepstack: dict[int, str], index: int) -> str:
    """Adds what a layer finds of pictures beside what the layer before it gave."""
    if index not in deepstack:
        return residual
    return g.op("Add", [residual, deepstack[index]], scope=f"layers.{index}.deepstack")


def _enter(
    g: GraphBuilder,
    spec: DecoderSpec,
    residual: str,
    delta: str,
    layer: LayerWeights,
    index: int,
) -> tuple[str, str]:
    """Normalizes what enters a layer; ``delta`` is what the layer before still has to add."""
    name = f"layers.{index}.input_norm"
    if not delta:
        return norm(g, residual, layer.input_norm, name, spec.eps), residual
    return add_norm(g, delta, residual, layer.input_norm, name, spec.eps)


def _leave(
    g: GraphBuilder,
    spec: DecoderSpec,
    residual: str,
    attended: str,
    layer: LayerWeights,
    index: int,
) -> tuple[str, str]:
    """Output projection and MLP: the residual behind the attention, and the MLP's own part."""
    projected = output_projection(g, attended, layer, index)
    projected = _post_norm(g, spec, projected, layer.attention_post_norm, index, "attention")
    name = f"layers.{index}.mlp_norm"
    normed, residual = add_norm(g, projected, residual, layer.mlp_norm, name, spec.eps)
    delta = mlp(g, normed, layer, index, spec.activation)
    return residual, _post_norm(g, spec, delta, layer.mlp_post_norm, index, "mlp")


def _post_norm(
    g: GraphBuilder, spec: DecoderSpec, x: str, weight: Stored | None, index: int, part: str
) -> str:
    """Normalizes what a layer's part adds to the residual, where the decoder does that."""
    if weight is None:
        return x
    return norm(g, x, weight, f"layers.{index}.{part}_post_norm", spec.eps)


def _softcap(g: GraphBuilder, logits: str, bound: float | None) -> str:
    """Bounds the logits smoothly, c * tanh(logits / c)."""
    if bound is None:
        return logits
    scope = "lm_head/softcap"
    share = g.op("Div", [logits, g.floats(bound)], scope=scope)
    return g.op("Mul", [g.op("Tanh", [share], scope=scope), g.floats(bound)], scope=scope)
