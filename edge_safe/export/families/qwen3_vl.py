"""Qwen3-VL (``model_type: qwen3_vl``): features of several depths for the first layers.

Its M-RoPE deals frequencies out in turn instead of in blocks, and its tower adds learned positions
that are interpolated to each picture's own grid.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from edge_safe.errors import ExportError
from edge_safe.export.decoder_config import TextFamily, decoder_spec, static_rope
from edge_safe.export.families.base import Opened, Tower
from edge_safe.export.families.qwen2_vl import AXES, mrope_sections
from edge_safe.export.graphs.builder import FLOAT, INT64
from edge_safe.export.graphs.spec import DecoderSpec
from edge_safe.export.image_processors import patches_of_any_size, read_image_processor
from edge_safe.export.towers.modules import Layers
from edge_safe.export.towers.patches import (
    Places,
    attend,
    check_patches,
    embed_patches,
    merged,
    patch_tower,
    turn_patches,
)
from edge_safe.export.towers.vision_transformer import check_activation
from edge_safe.export.vision_language import Pictures, VisionFamily, open_vision
from edge_safe.runtime.image_tokens import Grid

SECTIONS = (24, 20, 20)


def open_checkpoint(folder: Path) -> Opened:
    """Opens a Qwen3-VL checkpoint; see ``open_vision``."""
    return open_vision(folder, FAMILY)


def _spec(config: Any) -> DecoderSpec:
    """Describes its language model.

    Raises:
        ExportError: It uses something that the graphs cannot express.
    """
    rope = static_rope(config)
    sections = mrope_sections(config, rope, SECTIONS)
    axes = [0] * len(rope.inverse_frequencies)
    for axis in range(1, AXES):
        for index in range(axis, AXES * sections[axis], AXES):
            if index < len(axes):
                axes[index] = axis
    return replace(
        decoder_spec(config, config.hidden_act, [replace(rope, axes=tuple(axes))]),
        qkv_bias=bool(config.attention_bias),
        output_bias=bool(config.attention_bias),
        qk_norm=True,
    )


def _describe(config: Any, folder: Path) -> Pictures:
    vision, text = config.vision_config, config.text_config
    check_patches(vision, "qwen3_vl_vision", vision.hidden_size, text.hidden_size)
    check_activation(vision.hidden_act)
    depths = list(vision.deepstack_visual_indexes)
    if len(set(depths)) != len(depths) or not all(0 <= depth < vision.depth for depth in depths):
        raise ExportError(
            f"deepstack_visual_indexes is {depths}; it has to name different ones of the vision "
            f"tower's {vision.depth} layers."
        )
    if len(depths) >= text.num_hidden_layers:
        raise ExportError(
            f"Features of {len(depths)} depths are added behind as many layers of the language "
            f"model, which has {text.num_hidden_layers}; the last one has to be left without."
        )
    side = int(vision.num_position_embeddings**0.5)
    if side**2 != vision.num_position_embeddings:
        raise ExportError(
            f"num_position_embeddings is {vision.num_position_embeddings}, which is no square."
        )
    pixels = patches_of_any_size(read_image_processor(folder), vision)
    return Pictures(pixels=pixels, layout=Grid(), deepstack=len(depths))


def _emit(model: Any, layers: Layers, x: str, places: Places) -> tuple[str, list[str]]:
    tower, config = model.model.visual, model.config.vision_config
    x = embed_patches(layers, x, tower.patch_embed.proj)
    x = layers.add(x, _positions(layers, tower, places), "positions")
    turning = turn_patches(layers, places, tower.rotary_pos_emb.inv_freq)
    # In the order in which the tower reaches them, as transformers returns them.
    depths, deeper = list(config.deepstack_visual_indexes), []
    for index, block in enumerate(tower.blocks):
        name = f"layers.{index}"
        normed = layers.layer_norm(x, block.norm1, f"{name}.attention_norm")
        mixed = attend(layers, normed, block.attn, turning, None, f"{name}.attention")
        x = layers.add(x, mixed, f"{name}.attention")
        normed = layers.layer_norm(x, block.norm2, f"{name}.mlp_norm")
        up = layers.linear(normed, block.mlp.linear_fc1, f"{name}.up")
        up = layers.activation(up, config.hidden_act, f"{name}.up")
        down = layers.linear(up, block.mlp.linear_fc2, f"{name}.down")
        x = layers.add(x, down, f"{name}.mlp")
        if index in depths:
            merger = tower.deepstack_merger_list[depths.index(index)]
            deeper.append(_merge(layers, x, merger, places, f"deepstack.{index}"))
    return _merge(layers, x, tower.merger, places, "merger"), deeper


def _merge(layers: Layers, x: str, merger: Any, places: Places, name: str) -> str:
    """(n, c) -> (cells, d); the norm is over a patch or over a cell."""
    width = merger.hidden_size // places.merge**2
    if merger.use_postshuffle_norm:
        x = layers.layer_norm(merged(layers, x, width, places, name), merger.norm, f"{name}.norm")
    else:
        x = merged(layers, layers.layer_norm(x, merger.norm, f"{name}.norm"), width, places, name)
    x = layers.gelu(layers.linear(x, merger.linear_fc1, f"{name}.up"), f"{name}.up")
    return layers.linear(x, merger.linear_fc2, f"{name}.down")


def _positions(layers: Layers, tower: Any, places: Places) -> str:
    """(n, c) learned positions, bilinear between the corners of a square table."""
    g, side, scope = layers.g, tower.num_grid_per_side, "positions"
    table = layers.stored("positions.table", tower.pos_embed.weight)
    total = ""
    for row, down in _taps(layers, places.row, places.height, side, f"{scope}/rows"):
        for column, across in _taps(layers, places.column, places.width, side, f"{scope}/columns"):
            start = g.op("Mul", [row, g.constant(side)], scope=scope)
            where = g.op("Add", [start, column], scope=scope)
            found = g.op("Gather", [table, where], scope=scope, axis=0)
            share = g.op("Mul", [down, across], scope=scope)
            share = g.op("Unsqueeze", [share, g.constant([1])], scope=scope)
            part = g.op("Mul", [found, share], scope=scope)
            total = part if not total else layers.add(total, part, scope)
    return total


def _taps(layers: Layers, place: str, count: str, side: int, scope: str) -> list[tuple[str, str]]:
    """The two rows of a table of ``side`` that a place lies between, with their shares.

    The first and the last of ``count`` places lie on the first and the last row.
    """
    g = layers.g

    def op(kind: str, *inputs: str) -> str:
        return g.op(kind, list(inputs), scope=scope)

    real = g.op("Cast", [place], scope=scope, to=FLOAT)
    gaps = op("Max", op("Sub", count, g.constant(1)), g.constant(1))
    gaps = g.op("Cast", [gaps], scope=scope, to=FLOAT)
    exact = op("Div", op("Mul", real, g.floats(side - 1)), gaps)
    floor = op("Floor", exact)
    beyond = op("Sub", exact, floor)
    low = g.op("Cast", [floor], scope=scope, to=INT64)
    last = g.constant(side - 1)
    high = op("Min", op("Add", low, g.constant(1)), last)
    return [(op("Min", low, last), op("Sub", g.floats(1.0), beyond)), (high, beyond)]


def _tower(model: Any, pictures: Pictures) -> Tower:
    return patch_tower(model, _emit, pictures.deepstack)


FAMILY = VisionFamily(_describe, "model.language_model.", _tower, text=TextFamily(_spec))
