"""Vision towers of the Qwen-VL kind: patches of one picture of any size, turned by their place.

Patches come cell by cell, merge x merge of them, and each cell becomes one feature. A graph sees
one picture at a time, so that full attention needs no mask; attention in windows gathers each
window's patches into a row of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from edge_safe.errors import ExportError
from edge_safe.export.families.base import Emission, TowerCase, float_array
from edge_safe.export.graphs.builder import FLOAT, INT32, INT64, GraphBuilder
from edge_safe.export.graphs.layers import Turn, rotate
from edge_safe.export.graphs.matrices import Matrix
from edge_safe.export.graphs.store import WeightStore
from edge_safe.export.towers.modules import Layers
from edge_safe.export.towers.tower import GraphTower
from edge_safe.runtime.families.placeholders import IMAGE_GRID, VISION_ENCODER
from edge_safe.runtime.prefill import DEEPSTACK

SOURCE, RESULT = "pixel_values", "image_features"

# Rows and columns of cells that the graph is compared on.
GRIDS = ((1, 1), (5, 9), (8, 3))


@dataclass(frozen=True, slots=True)
class Places:
    """Where the patches of a picture stand; int64 values of a graph.

    Attributes:
        count: Number n of patches.
        numbers: (n,) 0 .. n-1.
        height: Rows of patches.
        width: Columns of patches.
        row: (n,) row of each.
        column: (n,) column of each.
        merge: Side of a cell in patches.
    """

    count: str
    numbers: str
    height: str
    width: str
    row: str
    column: str
    merge: int


@dataclass(frozen=True, slots=True)
class Windows:
    """Attention inside windows of cells.

    Attributes:
        patches: (W * L,) int64 patch at each slot of the windows, 0 at empty ones.
        slots: (n,) int64 slot of each patch.
        seen: (W, L) int32, 0 at empty slots.
        shape: (3,) int64 W, L and the tower's width.
    """

    patches: str
    slots: str
    seen: str
    shape: str


# Emits the tower: features (cells, d), and those for deeper layers.
Emit = Callable[[Any, Layers, str, Places], tuple[str, Sequence[str]]]


def check_patches(config: Any, kind: str, width: int, text_width: int) -> None:
    """Makes sure that a tower can be emitted, before its weights are read.

    Args:
        config: Its configuration.
        kind: The model_type it has to have.
        width: Width of its layers.
        text_width: Width of the language model.

    Raises:
        ExportError: It has something that the graphs do not.
    """
    if config.model_type != kind:
        raise ExportError(
            f"The vision tower is a {config.model_type!r}, which cannot be exported here yet; "
            f"possible: {kind}."
        )
    for name in ("patch_size", "temporal_patch_size", "spatial_merge_size"):
        if not isinstance(getattr(config, name), int):
            raise ExportError(
                f"The vision tower's {name} is {getattr(config, name)}; one number is needed."
            )
    if config.in_channels != 3:
        raise ExportError(
            f"The vision tower takes {config.in_channels} channels; it has to take 3."
        )
    if width % (4 * config.num_heads):
        raise ExportError(
            f"The vision tower is {width} wide with {config.num_heads} heads; rows and columns "
            "need a quarter of a head each for their rotary embedding."
        )
    out = getattr(config, "out_hidden_size", config.hidden_size)
    if out != text_width:
        raise ExportError(
            f"The vision tower gives features of width {out}; the language model has {text_width}."
        )


def patch_tower(model: Any, emit: Emit, deepstack: int = 0) -> GraphTower:
    """The graph pixel_values (n, values), image_grid_thw (1, 3) -> image_features (cells, 1, d).

    With ``deepstack`` also deepstack_features (D, cells, d).

    Args:
        model: The torch model.
        emit: Emits the tower.
        deepstack: Number D of further features.
    """
    vision, width = model.config.vision_config, model.config.text_config.hidden_size
    values = 3 * vision.temporal_patch_size * vision.patch_size**2

    def build(emission: Emission, store: WeightStore) -> tuple[GraphBuilder, list[Matrix]]:
        g = GraphBuilder(VISION_ENCODER)
        x = g.input(SOURCE, FLOAT, ["patches", values])
        grid = g.input(IMAGE_GRID, INT64, [1, 3])
        g.output(RESULT, FLOAT, ["cells", 1, width])
        layers = Layers(g, store, emission.precision.towers)
        places = _places(g, grid, vision.spatial_merge_size)
        features, deeper = emit(model, layers, x, places)
        g.op("Unsqueeze", [features, g.constant([1])], scope="features", outputs=[RESULT])
        if deepstack:
            g.output(DEEPSTACK, FLOAT, [deepstack, "cells", width])
            stacked = [g.op("Unsqueeze", [d, g.constant([0])], scope="deepstack") for d in deeper]
            g.op("Concat", stacked, scope="deepstack", outputs=[DEEPSTACK], axis=0)
        return g, layers.matrices

    def cases() -> Iterator[TowerCase]:
        random = np.random.default_rng(0)
        merge = vision.spatial_merge_size
        for rows, columns in GRIDS:
            count = rows * columns * merge**2
            pixels = random.uniform(-1.8, 1.8, (count, values)).astype(np.float32)
            grid = np.array([[1, rows * merge, columns * merge]], np.int64)
            with torch.no_grad():
                found = model.get_image_features(
                    torch.from_numpy(pixels), torch.from_numpy(grid), return_dict=True
                )
            expected = {RESULT: float_array(found.pooler_output[0])[:, None]}
            if deepstack:
                # Of each depth one tensor a picture.
                deeper = torch.stack([depth[0] for depth in found.deepstack_features])
                expected[DEEPSTACK] = float_array(deeper)
            yield TowerCase(
                f"{rows} x {columns} cells", {SOURCE: pixels, IMAGE_GRID: grid}, expected
            )

    return GraphTower(VISION_ENCODER, build, cases)


def _places(g: GraphBuilder, grid: str, merge: int) -> Places:
    """Rows and columns of patches that come cell by cell."""
    scope = "places"

    def op(kind: str, *inputs: str) -> str:
        return g.op(kind, list(inputs), scope=scope)

    flat = op("Reshape", grid, g.constant([3]))
    height, width = (g.op("Gather", [flat, g.constant(n)], scope=scope, axis=0) for n in (1, 2))
    count = op("Mul", height, width)
    numbers = op("Range", g.constant(0), count, g.constant(1))
    side, area = g.constant(merge), g.constant(merge * merge)
    cell, inside = op("Div", numbers, area), op("Mod", numbers, area)
    across = op("Div", width, side)
    row = op("Add", op("Mul", op("Div", cell, across), side), op("Div", inside, side))
    column = op("Add", op("Mul", op("Mod", cell, across), side), op("Mod", inside, side))
    return Places(count, numbers, height, width, row, column, merge)


def embed_patches(layers: Layers, x: str, convolution: Any) -> str:
    """(n, values) -> (n, c): a convolution whose kernel is the whole patch."""
    flat = convolution.weight.flatten(1).T.contiguous()
    x = layers.g.op("MatMul", [x, layers.stored("patches.weight", flat)], scope="patches")
    if convolution.bias is None:
        return x
    return layers.add(x, layers.stored("patches.bias", convolution.bias), "patches")


def turn_patches(layers: Layers, places: Places, frequencies: torch.Tensor) -> Turn:
    """The rotary embedding: one half of the frequencies by the row, one by the column."""
    g, scope = layers.g, "rotary"
    shared = layers.stored("rotary.frequencies", frequencies)
    parts = []
    for place in (places.row, places.column):
        real = g.op("Cast", [place], scope=scope, to=FLOAT)
        real = g.op("Unsqueeze", [real, g.constant([1])], scope=scope)
        parts.append(g.op("Mul", [real, shared], scope=scope))
    angles = g.op("Concat", parts, scope=scope, axis=-1)
    rows = g.op("Unsqueeze", [places.numbers, g.constant([0])], scope=scope)
    cosine, sine = (g.op(kind, [angles], scope=scope) for kind in ("Cos", "Sin"))
    return Turn(cosine, sine, rows)


def cut_windows(layers: Layers, places: Places, cells: int, width: int) -> Windows:
    """Windows of cells x cells; those at the right and lower edge are smaller.

    Args:
        layers: The graph.
        places: The patches.
        cells: Side of a window.
        width: Of the tower.
    """
    g, scope = layers.g, "windows"

    def op(kind: str, *inputs: str) -> str:
        return g.op(kind, list(inputs), scope=scope)

    side, area = g.constant(cells * places.merge), g.constant(places.merge**2)
    length = cells * cells * places.merge**2
    more = g.constant(cells * places.merge - 1)
    down, across = (op("Div", op("Add", n, more), side) for n in (places.height, places.width))
    window = op(
        "Add", op("Mul", op("Div", places.row, side), across), op("Div", places.column, side)
    )
    # The order inside a window is of no account, as long as every patch has its own slot.
    merge = g.constant(places.merge)
    row, column = (op("Div", op("Mod", n, side), merge) for n in (places.row, places.column))
    cell = op("Add", op("Mul", row, g.constant(cells)), column)
    inside = op("Mod", places.numbers, area)
    slot = op("Add", op("Mul", cell, area), inside)
    slots = op("Add", op("Mul", window, g.constant(length)), slot)
    count = op("Unsqueeze", op("Mul", down, across), g.constant([0]))
    empty = op("Expand", g.constant([0]), op("Mul", count, g.constant([length])))
    patches = g.op("ScatterElements", [empty, slots, places.numbers], scope=scope, axis=0)
    ones = op("Expand", g.constant([1]), op("Unsqueeze", places.count, g.constant([0])))
    seen = g.op("ScatterElements", [empty, slots, ones], scope=f"{scope}/seen", axis=0)
    seen = op("Reshape", seen, g.constant([-1, length]))
    seen = g.op("Cast", [seen], scope=f"{scope}/seen", to=INT32)
    shape = g.op("Concat", [count, g.constant([length, width])], scope=f"{scope}/shape", axis=0)
    return Windows(patches, slots, seen, shape)


def attend(
    layers: Layers, x: str, attention: Any, turning: Turn, windows: Windows | None, name: str
) -> str:
    """Attention of one layer over (n, c), with its projections.

    Args:
        layers: The graph.
        x: Normalized states.
        attention: The torch module.
        turning: The rotary embedding.
        windows: None where every patch sees all of the picture.
        name: Place in the model.
    """
    g, heads, width = layers.g, attention.num_heads, attention.num_heads * attention.head_dim
    parts = _projected(layers, _batch(g, x, name), attention, width, name)
    for slot in (0, 1):
        scope = f"{name}.{('query', 'key')[slot]}_rotary"
        parts[slot] = rotate(g, parts[slot], turning, heads, scope)
    options = {"num_heads": heads, "scale": float(attention.scaling)}
    if windows is None:
        mixed = g.contrib("MultiHeadAttention", parts, scope=name, **options)
    else:
        parts = [_gathered(g, part, windows, name) for part in parts]
        mixed = g.contrib("MultiHeadAttention", [*parts, "", windows.seen], scope=name, **options)
        flat = g.op("Reshape", [mixed, g.constant([-1, width])], scope=f"{name}/out")
        mixed = g.op("Gather", [flat, windows.slots], scope=f"{name}/out", axis=0)
        mixed = _batch(g, mixed, f"{name}/out")
    out = layers.linear(mixed, attention.proj, f"{name}.out")
    return g.op("Squeeze", [out, g.constant([0])], scope=f"{name}/out")


def _projected(layers: Layers, x: str, attention: Any, width: int, name: str) -> list[str]:
    """Query, key and value (1, n, c), of one matrix or of three."""
    if not hasattr(attention, "qkv"):
        return [layers.linear(x, getattr(attention, part), f"{name}.{part}") for part in "qkv"]
    packed = layers.linear(x, attention.qkv, f"{name}.qkv")
    parts = [f"{name}/{part}" for part in ("query", "key", "value")]
    shares = layers.g.constant([width] * 3)
    layers.g.op("Split", [packed, shares], scope=name, outputs=parts, axis=-1)
    return parts


def _batch(g: GraphBuilder, x: str, name: str) -> str:
    """(n, c) -> (1, n, c)."""
    return g.op("Unsqueeze", [x, g.constant([0])], scope=name)


def _gathered(g: GraphBuilder, x: str, windows: Windows, name: str) -> str:
    """(1, n, c) -> (W, L, c)."""
    picked = g.op("Gather", [x, windows.patches], scope=f"{name}/windows", axis=1)
    return g.op("Reshape", [picked, windows.shape], scope=f"{name}/windows")


def merged(layers: Layers, x: str, width: int, places: Places, name: str) -> str:
    """(n, c) -> (cells, c * merge²)."""
    shape = layers.g.constant([-1, width * places.merge**2])
    return layers.g.op("Reshape", [x, shape], scope=name)
