"""Whisper's encoder over one window of log-mel features, as long as the sound.

The encoders inside Qwen 2 Audio, Voxtral and Qwen2.5-Omni have the same layers under the same
names.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from edge_safe.export.graphs.builder import FLOAT, GraphBuilder
from edge_safe.export.graphs.matrices import Matrix
from edge_safe.export.graphs.store import WeightStore
from edge_safe.export.quantization import MatrixFormat
from edge_safe.export.towers.modules import Layers

NAME = "audio_encoder"


def whisper_graph(
    encoder: WhisperEncoder, store: WeightStore, form: MatrixFormat
) -> tuple[GraphBuilder, list[Matrix]]:
    """input_features (1, bins, 2 T) -> audio_states (1, T, c), for any T up to the positions'."""
    config: Any = encoder.config
    g = GraphBuilder(NAME)
    x = g.input("input_features", FLOAT, [1, config.num_mel_bins, "frames"])
    g.output("audio_states", FLOAT, [1, "steps", config.d_model])
    layers = Layers(g, store, form)
    x = whisper_states(layers, x, encoder, encoder.embed_positions.weight)
    final = layers.layer_norm(x, encoder.layer_norm, "layer_norm")
    g.op("Identity", [final], scope="states", outputs=["audio_states"])
    return g, layers.matrices


def whisper_states(
    layers: Layers, x: str, encoder: Any, positions: Tensor, steps: str | None = None
) -> str:
    """States (1, T, c) behind the layers, before the last normalization.

    Args:
        layers: The graph.
        x: (1, bins, frames).
        encoder: The torch module.
        positions: (at least T, c) their embeddings.
        steps: (1,) int64, how many states are real and attend to each other; None for all.
    """
    g, config = layers.g, encoder.config
    for name in ("conv1", "conv2"):
        x = layers.gelu(layers.convolution(x, getattr(encoder, name), name), name)
    x = layers.turn(x, "positions")
    if steps is not None:
        x = g.op("Slice", [x, g.constant([0]), steps, g.constant([1])], scope="steps")
    table = layers.stored("positions", positions)
    count = g.op("Shape", [x], scope="positions", start=1, end=2)
    first = g.op("Slice", [table, g.constant([0]), count, g.constant([0])], scope="positions")
    x = layers.add(x, first, "positions")
    for index, layer in enumerate(encoder.layers):
        x = _layer(layers, x, layer, f"layers.{index}", config)
    return x


def pooled(layers: Layers, x: str, count: int) -> str:
    """(1, T, c) -> (1, T // count, c): means of neighbours."""
    x = layers.turn(x, "pool")
    x = layers.g.op("AveragePool", [x], scope="pool", kernel_shape=[count], strides=[count])
    return layers.turn(x, "pooled")


def _layer(layers: Layers, x: str, layer: Any, name: str, config: Any) -> str:
    normed = layers.layer_norm(x, layer.self_attn_layer_norm, f"{name}.attention_norm")
    attention = layer.self_attn
    parts = [
        layers.linear(normed, getattr(attention, f"{part}_proj"), f"{name}.{part}")
        for part in "qkv"
    ]
    mixed = layers.g.contrib(
        "MultiHeadAttention",
        parts,
        scope=f"{name}.attention",
        num_heads=config.encoder_attention_heads,
        scale=float(attention.head_dim**-0.5),
    )
    out = layers.linear(mixed, attention.out_proj, f"{name}.out")
    x = layers.add(x, out, f"{name}.attention")
    normed = layers.layer_norm(x, layer.final_layer_norm, f"{name}.mlp_norm")
    hidden = layers.linear(normed, layer.fc1, f"{name}.up")
    hidden = layers.activation(hidden, config.activation_function, f"{name}.up")
    return layers.add(x, layers.linear(hidden, layer.fc2, f"{name}.down"), f"{name}.mlp")
