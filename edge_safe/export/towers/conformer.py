"""Phi-4-multimodal's audio encoder, a conformer, with its two projectors.

Convolutions halve the frames until one state stands for ``time_reduction`` of them. Layers attend
within windows of states, with a learned bias by distance; a visible state has 1 more than one that
the chunks hide, which is how transformers applies this model's mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from edge_safe.export.families.base import Emission, TowerCase, float_array
from edge_safe.export.graphs.builder import BOOL, FLOAT, INT64, GraphBuilder
from edge_safe.export.graphs.matrices import Matrix
from edge_safe.export.graphs.store import WeightStore
from edge_safe.export.towers.modules import Layers
from edge_safe.export.towers.tower import GraphTower
from edge_safe.runtime.audio_frames import (
    BESIDE_PICTURES,
    FEATURES,
    STATES,
    Frames,
    cut_frames,
    frame_features,
)
from edge_safe.runtime.hearing import AUDIO_ENCODER

RESULT = "audio_features"

# States that transformers lets see each other, whatever the configuration says.
WINDOW = 500

# Both are SiLU in transformers.
SILU = ("swish", "silu")


def conformer_tower(embedding: Any, frames: Frames) -> GraphTower:
    """The graph of ``Phi4MultimodalAudioEmbedding`` over one window.

    input_features (1, frames, bins), states (2,), beside_pictures (1,) -> audio_features
    (1, tokens, width); see ``runtime.audio_frames``.

    Args:
        embedding: The torch module.
        frames: What the runtime feeds.
    """
    width = embedding.down_proj_for_speech.out_features

    def build(emission: Emission, store: WeightStore) -> tuple[GraphBuilder, list[Matrix]]:
        g = GraphBuilder(AUDIO_ENCODER)
        x = g.input(FEATURES, FLOAT, [1, "frames", frames.feature_size])
        states = g.input(STATES, INT64, [2])
        beside = g.input(BESIDE_PICTURES, INT64, [1])
        g.output(RESULT, FLOAT, [1, "tokens", width])
        layers = Layers(g, store, emission.precision.towers)
        x = _encode(layers, x, states, embedding.encoder)
        _project(layers, x, beside, embedding)
        return g, layers.matrices

    def cases() -> Iterator[TowerCase]:
        random = np.random.default_rng(0)
        window = frames.window_tokens * frames.frames_per_token * frames.hop_length
        lengths = {
            "one token": frames.win_length,
            "half a window": window // 2,
            "a window": window,
            "two windows": window + window // 9,
        }
        for label, count in lengths.items():
            beside = label == "half a window"
            samples = random.normal(0, 0.1, count).astype(np.float32)
            whole = _expected(embedding, samples, frames, beside)
            start = 0
            for number, part in enumerate(cut_frames(samples, frames, beside)):
                expected = whole[:, start : start + part.tokens]
                start += part.tokens
                name = f"{label}, {number + 1}" if label == "two windows" else label
                yield TowerCase(name, part.feeds, {RESULT: float_array(expected)})

    return GraphTower(AUDIO_ENCODER, build, cases)


@torch.no_grad()
def _expected(embedding: Any, samples: Any, frames: Frames, beside_pictures: bool) -> Tensor:
    """What torch makes of a whole sound, (1, tokens, width)."""
    features = torch.from_numpy(frame_features(samples, frames))[None]
    kind = "vision_speech" if beside_pictures else "speech"
    up, down = (getattr(embedding, f"{part}_proj_for_{kind}") for part in ("up", "down"))
    found: Tensor = down(gelu(up(embedding.encoder(features, None))))
    return found


def _encode(layers: Layers, x: str, states: str, encoder: Any) -> str:
    """(1, frames, bins) -> (1, tokens, c)."""
    g, config = layers.g, encoder.config
    norm = encoder.encoder_embedding
    mean = g.op("Sub", [x, layers.stored("mean", norm.global_mean)], scope="normalize")
    x = g.op("Mul", [mean, layers.stored("scale", norm.global_invstd)], scope="normalize")
    x = _subsample(layers, x, encoder.embed, config)
    margin, count = (
        g.op("Slice", [states, g.constant([at]), g.constant([at + 1])], scope="window")
        for at in (0, 1)
    )
    ends = [g.constant([2**31 - 1]), g.constant([1])]
    x = g.op("Slice", [x, margin, *ends], scope="window")
    tokens = g.op("Shape", [x], scope="window", start=1, end=2)
    lack = g.op("Sub", [count, tokens], scope="window")
    zero = g.constant([0])
    pads = g.op("Concat", [zero, zero, zero, zero, lack, zero], scope="window", axis=0)
    x = g.op("Pad", [x, pads], scope="window")
    bias = _bias(layers, count, encoder)
    for index, layer in enumerate(encoder.encoders):
        x = _layer(layers, x, bias, layer, f"layers.{index}", config)
    return g.op("Slice", [x, zero, tokens, g.constant([1])], scope="tokens")


def _subsample(layers: Layers, x: str, embed: Any, config: Any) -> str:
    """(1, frames, bins) -> (1, states, c)."""
    g, name = layers.g, "subsample"
    x = g.op("Unsqueeze", [x, g.constant([1])], scope=name)
    for index, module in enumerate(embed.conv):
        if isinstance(module, nn.Conv2d):
            x = layers.convolution(x, module, f"{name}.{index}")
        else:
            x = _activate(layers, x, config.nemo_activation, f"{name}.{index}")
    x = g.op("Transpose", [x], scope=name, perm=[0, 2, 1, 3])
    x = g.op("Reshape", [x, g.constant([0, 0, -1])], scope=name)
    return layers.linear(x, embed.out, f"{name}.out")


def _bias(layers: Layers, count: str, encoder: Any) -> str:
    """(1, heads, n, n) bias of the attention within a window of n states."""
    g, name, config = layers.g, "bias", encoder.config
    numbers = g.op("Range", [g.constant(0), _scalar(g, count, name), g.constant(1)], scope=name)
    row, column = (g.op("Unsqueeze", [numbers, g.constant([axis])], scope=name) for axis in (1, 0))
    # By distance from -(WINDOW - 1) on.
    distance = g.op("Sub", [column, row], scope=name)
    place = g.op("Add", [distance, g.constant(WINDOW - 1)], scope=name)
    table = layers.stored("bias.values", _by_distance(encoder.relative_attention_bias_layer))
    bias = g.op("Gather", [table, place], scope=name, axis=0)
    if config.chunk_size > 0:
        size, left = g.constant(config.chunk_size), g.constant(config.left_chunk)
        own, other = (g.op("Div", [part, size], scope=name) for part in (row, column))
        first = g.op("Sub", [own, left], scope=name)
        seen = g.op(
            "And",
            [
                g.op("GreaterOrEqual", [other, first], scope=name),
                g.op("LessOrEqual", [other, own], scope=name),
            ],
            scope=name,
        )
        seen = g.op("Unsqueeze", [seen, g.constant([2])], scope=name)
        bias = g.op("Add", [bias, g.op("Cast", [seen], scope=name, to=FLOAT)], scope=name)
    bias = g.op("Transpose", [bias], scope=name, perm=[2, 0, 1])
    return g.op("Unsqueeze", [bias, g.constant([0])], scope=name)


@torch.no_grad()
def _by_distance(layer: Any) -> Tensor:
    """(2 * WINDOW - 1, heads): torch's own bias for every distance within a window."""
    bias = layer(torch.zeros(1, WINDOW, 1))[0]
    return torch.cat([bias[:, :, 0].T.flip(0), bias[:, 0, 1:].T])


def _layer(layers: Layers, x: str, bias: str, layer: Any, name: str, config: Any) -> str:
    """Half an MLP, attention, convolutions, half an MLP."""
    x = layers.add(x, _mlp(layers, x, layer.feed_forward_in, f"{name}.mlp_in", config), name)
    normed = layers.layer_norm(x, layer.layer_norm_att, f"{name}.attention_norm")
    attention = layer.self_attn
    parts = [
        layers.linear(normed, getattr(attention, f"{part}_proj"), f"{name}.{part}")
        for part in "qkv"
    ]
    mixed = layers.g.contrib(
        "MultiHeadAttention",
        [*parts, "", "", bias],
        scope=f"{name}.attention",
        num_heads=config.num_attention_heads,
        scale=float(attention.scaling),
    )
    x = layers.add(x, layers.linear(mixed, attention.o_proj, f"{name}.out"), f"{name}.attention")
    x = layers.add(x, _convolve(layers, x, layer.conv, f"{name}.conv", config), f"{name}.conv")
    x = layers.add(x, _mlp(layers, x, layer.feed_forward_out, f"{name}.mlp_out", config), name)
    return layers.layer_norm(x, layer.layer_norm, f"{name}.norm")


def _mlp(layers: Layers, x: str, mlp: Any, name: str, config: Any) -> str:
    """Half of down(up(x) * activation(gate(x)))."""
    x = layers.layer_norm(x, mlp.layer_norm, f"{name}.norm")
    both = layers.linear(x, mlp.gate_up_proj, f"{name}.gate_up")
    x = _gated(layers, both, mlp.down_proj.in_features, config.activation, name)
    return layers.linear(x, mlp.down_proj, f"{name}.down", scale=0.5)


def _convolve(layers: Layers, x: str, conv: Any, name: str, config: Any) -> str:
    """Gated channels, a convolution over the states before, channels again."""
    g = layers.g
    x = layers.layer_norm(x, conv.layer_norm, f"{name}.norm")
    glu = conv.glu
    shift = torch.cat([glu.b1.flatten(), glu.b2.flatten()])
    both = layers.linear(x, _pointwise(glu.ext_pw_conv_1d, shift), f"{name}.glu")
    x = _gated(layers, both, glu.output_dim, config.conv_glu_type, f"{name}.glu")
    x = layers.convolution(layers.turn(x, name), conv.dw_sep_conv_1d.dw_conv, f"{name}.depthwise")
    more = conv.kernel_size - 1
    if more:
        # torch pads both ends; without what comes out behind, no state sees a later one.
        ends = [g.constant([0]), g.constant([-more]), g.constant([2])]
        x = g.op("Slice", [x, *ends], scope=name)
    x = layers.linear(layers.turn(x, name), _pointwise(conv.dw_sep_conv_1d.pw_conv), f"{name}.pw")
    x = _activate(layers, x, config.conv_activation, name)
    return layers.linear(x, _pointwise(conv.ext_pw_conv_1d), f"{name}.out")


def _gated(layers: Layers, both: str, width: int, kind: str, name: str) -> str:
    """The first half of (..., 2 width) times the activation of the second."""
    g = layers.g
    parts = [f"{name}/left", f"{name}/gate"]
    g.op("Split", [both, g.constant([width] * 2)], scope=name, outputs=parts, axis=-1)
    return g.op("Mul", [parts[0], _activate(layers, parts[1], kind, name)], scope=name)


def _activate(layers: Layers, x: str, kind: str, name: str) -> str:
    if kind in SILU:
        return layers.g.contrib("QuickGelu", [x], scope=name, alpha=1.0)
    return layers.activation(x, kind, name)


def _pointwise(conv: nn.Conv1d, shift: Tensor | None = None) -> nn.Linear:
    """A convolution over single states as a matrix; ``shift`` is added to what it gives."""
    linear = nn.Linear(conv.in_channels, conv.out_channels)
    bias = torch.zeros(conv.out_channels) if conv.bias is None else conv.bias
    linear.weight = nn.Parameter(conv.weight[..., 0], requires_grad=False)
    linear.bias = nn.Parameter(bias if shift is None else bias + shift, requires_grad=False)
    return linear


def _project(layers: Layers, x: str, beside: str, embedding: Any) -> None:
    """Into the width of the language model, by the projector for words or that for pictures."""

    def through(kind: str) -> list[str]:
        up = layers.linear(x, getattr(embedding, f"up_proj_for_{kind}"), f"projector.{kind}.up")
        up = layers.gelu(up, f"projector.{kind}.up")
        down = getattr(embedding, f"down_proj_for_{kind}")
        return [layers.linear(up, down, f"projector.{kind}.down")]

    g = layers.g
    some = g.op("Cast", [_scalar(g, beside, "projector")], scope="projector", to=BOOL)
    g.choose(
        some,
        lambda: through("vision_speech"),
        lambda: through("speech"),
        scope="projector",
        outputs=[RESULT],
    )


def _scalar(g: GraphBuilder, x: str, name: str) -> str:
    """(1,) -> ()."""
    return g.op("Squeeze", [x, g.constant([0])], scope=name)
