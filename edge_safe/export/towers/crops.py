"""A vision tower over crops of which a part may lie beside the picture, and its projector.

What lies beside is masked: nothing attends to it, and positions stretch over what is left. Line
break and separator are projected with the features, behind those of each crop.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import gelu

from edge_safe.export.families.base import Emission, TowerCase, float_array
from edge_safe.export.graphs.builder import FLOAT, INT32, INT64, GraphBuilder
from edge_safe.export.graphs.matrices import Matrix
from edge_safe.export.graphs.store import WeightStore
from edge_safe.export.towers.modules import Layers
from edge_safe.export.towers.squares import RESULT, SOURCE
from edge_safe.export.towers.tower import GraphTower
from edge_safe.export.towers.vision_transformer import (
    asked_positions,
    encoder_states,
    patches,
    pooled,
)
from edge_safe.runtime.crop_lines import EXTRA
from edge_safe.runtime.families.placeholders import PATCH_MASK, VISION_ENCODER

# States of a feature in each direction.
POOLED = 2


def crop_tower(embedding: Any, depth: int, tokens: int) -> GraphTower:
    """The graph of ``Phi4MultimodalImageEmbedding``.

    pixel_values (tiles, 3, side, side), patch_attention_mask (tiles, rows, columns) int32 ->
    image_features (tiles, tokens + 2, width).

    Args:
        embedding: The torch module.
        depth: Number of layers behind which states are taken.
        tokens: Features of a crop.
    """
    config = embedding.img_processor.config
    size, side = config.image_size, config.image_size // config.patch_size
    width = embedding.img_projection_down.out_features

    def build(emission: Emission, store: WeightStore) -> tuple[GraphBuilder, list[Matrix]]:
        g = GraphBuilder(VISION_ENCODER)
        x = g.input(SOURCE, FLOAT, ["tiles", 3, size, size])
        mask = g.input(PATCH_MASK, INT32, ["tiles", side, side])
        g.output(RESULT, FLOAT, ["tiles", tokens + EXTRA, width])
        layers = Layers(g, store, emission.precision.towers)
        found = _features(layers, x, mask, embedding, depth)
        g.op("Identity", [found], scope="features", outputs=[RESULT])
        return g, layers.matrices

    def cases() -> Iterator[TowerCase]:
        random = np.random.default_rng(0)
        for label, sizes in _masks(side):
            values = random.uniform(-1.0, 1.0, (len(sizes), 3, size, size)).astype(np.float32)
            mask = np.zeros((len(sizes), side, side), np.int32)
            for seen, (rows, columns) in zip(mask, sizes, strict=True):
                seen[:rows, :columns] = 1
            with torch.no_grad():
                expected = _expected(embedding, torch.from_numpy(values), torch.from_numpy(mask))
            yield TowerCase(
                label, {SOURCE: values, PATCH_MASK: mask}, {RESULT: float_array(expected)}
            )

    return GraphTower(VISION_ENCODER, build, cases)


def _masks(side: int) -> list[tuple[str, list[tuple[int, int]]]]:
    """Pictures that graphs are compared on: rows and columns of patches of each tile."""
    half = side // 2 + 1
    return [
        ("1 tiles", [(side, side)]),
        ("3 tiles", [(side, side), (side, side), (half, side)]),
        ("a corner", [(side, side), (3, 1)]),
    ]


def _features(layers: Layers, x: str, mask: str, embedding: Any, depth: int) -> str:
    g, tower = layers.g, embedding.img_processor
    side = tower.config.image_size // tower.config.patch_size
    x = patches(layers, x, tower.embeddings.patch_embedding)
    x = layers.add(x, _positions(layers, mask, tower, side), "positions")
    seen = g.op("Reshape", [mask, g.constant([0, -1])], scope="mask")
    (x,) = encoder_states(layers, x, tower, [depth], seen)
    x = pooled(layers, x, side, POOLED)
    ends = [embedding.sub_img_feature_extensor, embedding.global_img_feature_extensor]
    rows = layers.stored("ends", torch.cat([end.reshape(1, -1) for end in ends]))
    tiles = g.op("Shape", [x], scope="ends", start=0, end=1)
    shape = g.op("Concat", [tiles, g.constant([EXTRA, 1])], scope="ends", axis=0)
    rows = g.op("Expand", [rows, shape], scope="ends")
    x = g.op("Concat", [x, rows], scope="ends", axis=1)
    x = layers.gelu(layers.linear(x, embedding.img_projection_up, "projector.up"), "projector.up")
    return layers.linear(x, embedding.img_projection_down, "projector.down")


def _positions(layers: Layers, mask: str, tower: Any, side: int) -> str:
    """Position embeddings (tiles, T, c): those of a grid stretched over the patches that count."""
    g, name = layers.g, "positions"
    places = layers.stored("positions.places", _places(tower, side))
    places = g.op("Cast", [places], scope=name, to=INT64)
    ends = []
    # As those that count are a rectangle, the first column tells the rows, the first row columns.
    for line in (2, 1):
        first = g.op("Gather", [mask, g.constant(0)], scope=name, axis=line)
        count = g.op("ReduceSum", [first, g.constant([1])], scope=name, keepdims=0)
        count = g.op("Cast", [count], scope=name, to=INT64)
        place = g.op("Gather", [places, count], scope=name, axis=0)
        ends.append(g.op("Unsqueeze", [place, g.constant([line])], scope=name))
    rows = g.op("Mul", [ends[0], g.constant(side)], scope=name)
    ids = g.op("Add", [rows, ends[1]], scope=name)
    # What does not count takes the first place.
    wide = g.op("Cast", [mask], scope=name, to=INT64)
    ids = g.op("Mul", [ids, wide], scope=name)
    ids = g.op("Reshape", [ids, g.constant([0, -1])], scope=name)
    table = layers.stored("positions.weight", tower.embeddings.position_embedding.weight)
    return g.op("Gather", [table, ids], scope=name, axis=0)


@torch.no_grad()
def _places(tower: Any, side: int) -> Tensor:
    """(side + 1, side): for n patches that count, the place of each along the grid.

    They are computed in floating point, so torch's own rounding is asked instead of being repeated.
    """
    size = tower.config.image_size
    blank = torch.zeros(1, 3, size, size)
    places = torch.zeros(side + 1, side)
    for count in range(1, side + 1):
        mask = torch.zeros(1, side, side, dtype=torch.bool)
        mask[:, :, :count] = True
        ids = asked_positions(tower.embeddings, blank, mask)
        places[count] = ids.reshape(side, side)[0].float()
    return places


def _expected(embedding: Any, pixel_values: Tensor, mask: Tensor) -> Tensor:
    """What torch makes of it, line break and separator behind each tile."""
    found = embedding.get_img_features(pixel_values, attention_mask=mask.bool())
    ends = [embedding.sub_img_feature_extensor, embedding.global_img_feature_extensor]
    rows = [end.reshape(1, 1, -1).expand(len(found), 1, -1) for end in ends]
    states = gelu(embedding.img_projection_up(torch.cat([found, *rows], dim=1)))
    features: Tensor = embedding.img_projection_down(states)
    return features
