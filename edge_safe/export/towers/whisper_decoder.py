"""The speech decoder in two graphs: what is computed once for a recording, and what for a token.

``audio_projector`` turns the encoder's states into each layer's keys and values; ``audio_decoder``
reads tokens over them, with a cache of its own.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from edge_safe.export.graphs.builder import FLOAT, INT64, GraphBuilder
from edge_safe.export.graphs.matrices import Matrix, linear, look_up, store_table
from edge_safe.export.graphs.store import WeightStore
from edge_safe.export.quantization import MatrixFormat, Precision
from edge_safe.export.towers.modules import Layers
from edge_safe.models.pebble.speech_decoder import Attention, Layer, SpeechDecoder

PARTS = ("key", "value")


def heard_graph(
    decoder: SpeechDecoder, store: WeightStore, form: MatrixFormat
) -> tuple[GraphBuilder, list[Matrix]]:
    """audio_states (1, T, c) -> heard.N.key and heard.N.value (1, heads, T, head_dim) by layer."""
    g = GraphBuilder("audio_projector")
    states = g.input("audio_states", FLOAT, [1, "steps", decoder.embed_tokens.embedding_dim])
    layers = Layers(g, store, form)
    for index, layer in enumerate(_layers(decoder.layers)):
        attention = layer.encoder_attn
        for part, projection in zip(PARTS, (attention.k_proj, attention.v_proj), strict=True):
            name = f"heard.{index}.{part}"
            g.output(name, FLOAT, _heads(attention, "steps"))
            _split(layers, layers.linear(states, projection, name), attention, name, name)
    return g, layers.matrices


def whisper_decoder_graph(
    decoder: SpeechDecoder, store: WeightStore, precision: Precision
) -> tuple[GraphBuilder, list[Matrix]]:
    """input_ids (1, S), caches and ``heard_graph``'s outputs -> logits (1, S, V), present.N.*.

    Tokens are looked up in the table that the logits are made with, which is stored once.
    """
    g = GraphBuilder("audio_decoder")
    width = decoder.embed_tokens.embedding_dim
    ids = g.input("input_ids", INT64, [1, "sequence"])
    g.output("logits", FLOAT, [1, "sequence", decoder.embed_tokens.num_embeddings])
    layers = Layers(g, store, precision.towers)
    caches = []
    for index, layer in enumerate(_layers(decoder.layers)):
        groups = (
            ("past_key_values", "past", layer.self_attn),
            ("heard", "steps", layer.encoder_attn),
        )
        caches.append(
            [
                [g.input(f"{name}.{index}.{part}", FLOAT, _heads(owner, size)) for part in PARTS]
                for name, size, owner in groups
            ]
        )
        for part in PARTS:
            g.output(f"present.{index}.{part}", FLOAT, _heads(layer.self_attn, "present"))
    table = store_table(store, decoder.embed_tokens.weight.detach().numpy(), precision.embedding)
    layers.matrices.append(table)

    past = g.op("Shape", [caches[0][0][0]], scope="positions/past", start=2, end=3)
    count = g.op("Shape", [ids], scope="positions/count", start=1, end=2)
    end = g.op("Add", [past, count], scope="positions")
    places = layers.stored("positions", decoder.embed_positions.weight)
    place = g.op("Slice", [places, past, end, g.constant([0])], scope="positions")
    x = layers.add(look_up(g, ids, table, "embedding"), place, "positions")
    for index, (layer, (own, heard)) in enumerate(
        zip(_layers(decoder.layers), caches, strict=True)
    ):
        x = _layer(layers, x, layer, own, heard, index)
    x = layers.layer_norm(x, decoder.layer_norm, "layer_norm")
    flat = g.op("Reshape", [x, g.constant([-1, width])], scope="head")
    logits = linear(g, flat, table, "embedding")
    g.op("Unsqueeze", [logits, g.constant([0])], scope="head", outputs=["logits"])
    return g, layers.matrices


def _layer(
    layers: Layers, x: str, layer: Layer, past: list[str], heard: list[str], index: int
) -> str:
    g, base = layers.g, f"layers.{index}"
    own, name = layer.self_attn, f"{base}.self"
    normed = layers.layer_norm(x, layer.self_attn_layer_norm, f"{name}.norm")
    parts = [
        layers.linear(normed, projection, f"{name}.{part}")
        for part, projection in zip("qkv", (own.q_proj, own.k_proj, own.v_proj), strict=True)
    ]
    mixed = g.contrib(
        "MultiHeadAttention",
        [*parts, "", "", "", *past],
        scope=name,
        outputs=[f"{name}/mixed", *(f"present.{index}.{part}" for part in PARTS)],
        num_heads=own.heads,
        unidirectional=1,
    )
    x = layers.add(x, layers.linear(mixed, own.out_proj, f"{name}.out"), name)

    sound, name = layer.encoder_attn, f"{base}.sound"
    normed = layers.layer_norm(x, layer.encoder_attn_layer_norm, f"{name}.norm")
    query = layers.linear(normed, sound.q_proj, f"{name}.q")
    mixed = g.contrib("MultiHeadAttention", [query, *heard], scope=name, num_heads=sound.heads)
    x = layers.add(x, layers.linear(mixed, sound.out_proj, f"{name}.out"), name)

    normed = layers.layer_norm(x, layer.final_layer_norm, f"{base}.mlp_norm")
    hidden = layers.gelu(layers.linear(normed, layer.fc1, f"{base}.up"), f"{base}.up")
    return layers.add(x, layers.linear(hidden, layer.fc2, f"{base}.down"), f"{base}.mlp")


def _split(layers: Layers, x: str, attention: Attention, name: str, output: str) -> None:
    """(1, T, c) -> (1, heads, T, head_dim)."""
    shape = layers.g.constant([0, 0, attention.heads, -1])
    parted = layers.g.op("Reshape", [x, shape], scope=name)
    layers.g.op("Transpose", [parted], scope=name, outputs=[output], perm=[0, 2, 1, 3])


def _heads(attention: Attention, positions: str) -> list[int | str]:
    return [1, attention.heads, positions, attention.q_proj.out_features // attention.heads]


def _layers(modules: nn.ModuleList) -> Iterable[Layer]:
    return (module for module in modules if isinstance(module, Layer))
