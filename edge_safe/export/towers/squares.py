"""A vision tower that takes squares of one size: its graph, and what torch makes of the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edge_safe.export.families.base import Emission, TowerCase, float_array
from edge_safe.export.graphs.builder import FLOAT, GraphBuilder
from edge_safe.export.graphs.matrices import Matrix
from edge_safe.export.graphs.store import WeightStore
from edge_safe.export.towers.modules import Layers
from edge_safe.export.towers.tower import GraphTower
from edge_safe.runtime.families.placeholders import VISION_ENCODER

SOURCE, RESULT = "pixel_values", "image_features"

# Numbers of squares that the graph is compared on.
TILES = (1, 3)

Emit = Callable[[Any, Layers, str], str]
Features = Callable[[Any, Tensor], Tensor]


def square_tower(
    model: Any, side: int, tokens: int, width: int, emit: Emit, features: Features
) -> GraphTower:
    """The graph pixel_values (tiles, 3, side, side) -> image_features (tiles, tokens, width).

    Args:
        model: The torch model.
        side: Height and width of a square.
        tokens: Features of one.
        width: Width of the language model.
        emit: Emits tower and projector, given the model, the graph and the input's name; returns
            the output's name.
        features: What torch makes of pixel values, (tiles, tokens, width).
    """

    def build(emission: Emission, store: WeightStore) -> tuple[GraphBuilder, list[Matrix]]:
        g = GraphBuilder(VISION_ENCODER)
        x = g.input(SOURCE, FLOAT, ["tiles", 3, side, side])
        g.output(RESULT, FLOAT, ["tiles", tokens, width])
        layers = Layers(g, store, emission.precision.towers)
        g.op("Identity", [emit(model, layers, x)], scope="features", outputs=[RESULT])
        return g, layers.matrices

    def cases() -> Iterator[TowerCase]:
        random = np.random.default_rng(0)
        for tiles in TILES:
            values = random.uniform(-1.8, 1.8, (tiles, 3, side, side)).astype(np.float32)
            with torch.no_grad():
                expected = features(model, torch.from_numpy(values))
            yield TowerCase(f"{tiles} tiles", {SOURCE: values}, {RESULT: float_array(expected)})

    return GraphTower(VISION_ENCODER, build, cases)
