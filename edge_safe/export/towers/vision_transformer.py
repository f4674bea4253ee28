"""Vision transformers of the CLIP and SigLIP kind, on squares of the size they were trained on.

Their layers have the same parts under the same names; they differ in what stands before and
behind the layers. Squares are a batch of any size, as a picture may be cut into several.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from edge_safe.errors import ExportError
from edge_safe.export.towers.modules import ACTIVATIONS, Layers


def check_vision(config: Any, kinds: Sequence[str]) -> None:
    """Makes sure that a vision tower can be emitted, before its weights are read.

    Raises:
        ExportError: It is of another type, or has something that the graphs do not.
    """
    if config.model_type not in kinds:
        raise ExportError(
            f"The vision tower is a {config.model_type!r}, which cannot be exported here yet; "
            f"possible: {', '.join(kinds)}."
        )
    check_activation(config.hidden_act)
    for name in ("image_size", "patch_size"):
        if not isinstance(getattr(config, name), int):
            raise ExportError(
                f"The vision tower's {name} is {getattr(config, name)}; one number is needed, as "
                "its pictures have to be squares."
            )
    if config.num_channels != 3:
        raise ExportError(
            f"The vision tower takes {config.num_channels} channels; it has to take 3."
        )


def check_activation(name: str) -> None:
    """Makes sure that towers have an activation.

    Raises:
        ExportError: They have not.
    """
    if name not in ACTIVATIONS:
        raise ExportError(
            f"Activation {name!r} has no counterpart in the towers' graphs; they can: "
            f"{', '.join(ACTIVATIONS)}."
        )


def square_states(layers: Layers, x: str, tower: nn.Module, depths: Sequence[int]) -> list[str]:
    """States (tiles, T, c) after the given numbers of layers.

    Args:
        layers: The graph.
        x: (tiles, 3, side, side).
        tower: CLIP's, SigLIP's or Idefics 3's vision model.
        depths: Numbers of layers, 0 for what enters the first one.
    """
    model: Any = tower
    embeddings = model.embeddings
    x = patches(layers, x, embeddings.patch_embedding)
    if hasattr(embeddings, "class_embedding"):
        x = with_class(layers, x, embeddings.class_embedding)
    x = layers.add(x, layers.stored("positions", _positions(model)), "positions")
    if hasattr(model, "pre_layrnorm"):
        x = layers.layer_norm(x, model.pre_layrnorm, "pre_norm")
    return encoder_states(layers, x, tower, depths)


def encoder_states(
    layers: Layers, x: str, tower: nn.Module, depths: Sequence[int], seen: str = ""
) -> list[str]:
    """States (tiles, T, c) after the given numbers of layers.

    Args:
        layers: The graph.
        x: What enters the first layer.
        tower: See ``square_states``.
        depths: Likewise.
        seen: (tiles, T) int32, 0 at patches that none attends to; none without it.
    """
    model: Any = tower
    states = [x]
    for index, layer in enumerate(model.encoder.layers[: max(depths)]):
        states.append(_layer(layers, states[-1], layer, f"layers.{index}", model.config, seen))
    return [states[depth] for depth in depths]


def patches(layers: Layers, x: str, convolution: nn.Conv2d) -> str:
    """(tiles, 3, side, side) -> (tiles, T, c)."""
    x = layers.convolution(x, convolution, "patches")
    x = layers.g.op("Reshape", [x, layers.g.constant([0, 0, -1])], scope="patches")
    return layers.turn(x, "patches")


def with_class(layers: Layers, x: str, embedding: Tensor) -> str:
    """Puts the class embedding (c) in front of (tiles, T, c)."""
    g = layers.g
    tiles = g.op("Shape", [x], scope="class", start=0, end=1)
    shape = g.op("Concat", [tiles, g.constant([1, embedding.shape[0]])], scope="class", axis=0)
    row = g.op("Expand", [layers.stored("class", embedding), shape], scope="class")
    return g.op("Concat", [row, x], scope="class", axis=1)


def shuffled(layers: Layers, x: str, side: int, width: int, factor: int) -> str:
    """(tiles, s * s, c) -> (tiles, s * s / f², c f²): f x f neighbours become one state.

    Args:
        layers: The graph.
        x: States of whole squares, row by row.
        side: Their number s of states in each direction.
        width: Channels c.
        factor: Neighbours f in each direction.
    """
    g, less, name = layers.g, side // factor, "shuffle"
    cells = g.constant([-1, less, factor, less, factor, width])
    x = g.op("Reshape", [x, cells], scope=name)
    x = g.op("Transpose", [x], scope=name, perm=[0, 1, 3, 2, 4, 5])
    return g.op("Reshape", [x, g.constant([-1, less * less, factor**2 * width])], scope=name)


def pooled(layers: Layers, x: str, side: int, kernel: int) -> str:
    """(tiles, s * s, c) -> (tiles, tokens, c): means of squares.

    Args:
        layers: The graph.
        x: States of whole squares, row by row.
        side: Their number s of states in each direction; what lacks to whole squares is mirrored.
        kernel: States of a square in each direction.
    """
    g, name = layers.g, "pool"
    x = layers.turn(x, name)
    x = g.op("Reshape", [x, g.constant([0, 0, side, side])], scope=name)
    lack = -side % kernel
    if lack:
        ends = g.constant([0, 0, 0, 0, 0, 0, lack, lack])
        x = g.op("Pad", [x, ends], scope=name, mode="reflect")
    x = g.op("AveragePool", [x], scope=name, kernel_shape=[kernel] * 2, strides=[kernel] * 2)
    x = g.op("Reshape", [x, g.constant([0, 0, -1])], scope=name)
    return layers.turn(x, name)


@torch.no_grad()
def _positions(model: Any) -> Tensor:
    """(T, c) position embeddings of a whole square.

    Idefics 3 computes the place of each patch in floating point, so its own rounding is asked
    instead of being repeated here.
    """
    embeddings = model.embeddings
    table: Tensor = embeddings.position_embedding.weight
    if hasattr(embeddings, "position_ids"):
        return table
    side = embeddings.image_size // embeddings.patch_size
    blank = torch.zeros(1, 3, embeddings.image_size, embeddings.image_size)
    everywhere = torch.ones(1, side, side, dtype=torch.bool)
    return table[asked_positions(embeddings, blank, everywhere)[0]]


def asked_positions(embeddings: Any, pixel_values: Tensor, mask: Tensor) -> Tensor:
    """(tiles, T) rows of the position embedding that torch takes for pictures and their mask."""
    ids: list[Tensor] = []
    hook = embeddings.position_embedding.register_forward_pre_hook(
        lambda _, inputs: ids.append(inputs[0])
    )
    try:
        embeddings(pixel_values, mask)
    finally:
        hook.remove()
    return ids[0]


def _layer(layers: Layers, x: str, layer: Any, name: str, config: Any, seen: str) -> str:
    """A pre-norm layer."""
    normed = layers.layer_norm(x, layer.layer_norm1, f"{name}.attention_norm")
    attention = layer.self_attn
    parts = [
        layers.linear(normed, getattr(attention, f"{part}_proj"), f"{name}.{part}")
        for part in "qkv"
    ]
    mixed = layers.g.contrib(
        "MultiHeadAttention",
        [*parts, "", seen] if seen else parts,
        scope=f"{name}.attention",
        num_heads=config.num_attention_heads,
        scale=float(attention.head_dim**-0.5),
    )
    out = layers.linear(mixed, attention.out_proj, f"{name}.out")
    x = layers.add(x, out, f"{name}.attention")
    normed = layers.layer_norm(x, layer.layer_norm2, f"{name}.mlp_norm")
    up = layers.linear(normed, layer.mlp.fc1, f"{name}.up")
    up = layers.activation(up, config.hidden_act, f"{name}.up")
    return layers.add(x, layers.linear(up, layer.mlp.fc2, f"{name}.down"), f"{name}.mlp")
