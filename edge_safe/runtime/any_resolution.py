"""LLaVA-OneVision's rows of features: without the padding, not too many, a line break behind each.

The whole picture's features come first. The tiles' features stand as one map of the picture; what
lies over its padding is cut off, and a map of too many features is made smaller (arXiv 2408.03326).
"""

from __future__ import annotations

import math

import numpy as np

from edge_safe.runtime.image_steps import FloatArray, PixelValues

# A map may have this much more than the most in each direction before it is made smaller.
LEEWAY = 1.1


def map_size(pixels: PixelValues, side: int, most: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Rows and columns of a picture's map: without padding, and as they stand in the prompt.

    Args:
        pixels: The picture, cut into tiles.
        side: Features of a tile in each direction.
        most: Tiles whose features a map may have.
    """
    rows, columns = pixels.rows * side, pixels.columns * side
    if pixels.width / pixels.height > columns / rows:
        kept = int(round(pixels.height * (columns / pixels.width), 7))
        rows -= (rows - kept) // 2 * 2
    else:
        kept = int(round(pixels.width * (rows / pixels.height), 7))
        columns -= (columns - kept) // 2 * 2
    ratio = math.sqrt(rows * columns / (most * side**2))
    if ratio > LEEWAY:
        return (rows, columns), (int(rows // ratio), int(columns // ratio))
    return (rows, columns), (rows, columns)


def pack(pixels: PixelValues, features: FloatArray, most: int) -> FloatArray:
    """The features of one picture in the order of the prompt, (n, d).

    Args:
        pixels: The picture; one that was not cut has 0 rows of tiles.
        features: (tiles, tokens + 1, d), the whole picture's first; the last one of each tile is
            the line break.
        most: Tiles whose features a map may have.
    """
    line_break, whole = features[:1, -1], features[0, :-1]
    if not pixels.rows:
        return np.concatenate([whole, line_break])
    side = math.isqrt(len(whole))
    grid = as_map(features[1:, :-1], pixels.rows, pixels.columns)
    (rows, columns), wanted = map_size(pixels, side, most)
    top, left = (grid.shape[0] - rows) // 2, (grid.shape[1] - columns) // 2
    grid = grid[top : top + rows, left : left + columns]
    if wanted != (rows, columns):
        grid = _smaller(_smaller(grid, wanted[0], 0), wanted[1], 1)
    return np.concatenate([whole, lines(grid, line_break)]).astype(np.float32, copy=False)


def as_map(tiles: FloatArray, rows: int, columns: int) -> FloatArray:
    """The features (tiles, side², d) of a grid of tiles as one map (H, W, d)."""
    side, width = math.isqrt(tiles.shape[1]), tiles.shape[2]
    grid = tiles.reshape(rows, columns, side, side, width).transpose(0, 2, 1, 3, 4)
    return grid.reshape(rows * side, columns * side, width)


def lines(grid: FloatArray, line_break: FloatArray) -> FloatArray:
    """A map (H, W, d) line by line, a line break (1, d) behind each: (H (W + 1), d)."""
    width = grid.shape[2]
    breaks = np.broadcast_to(line_break, (len(grid), 1, width))
    return np.concatenate([grid, breaks], axis=1).reshape(-1, width)


def _smaller(grid: FloatArray, length: int, axis: int) -> FloatArray:
    """Bilinear along one axis, between the two nearest of each place (torch's interpolate)."""
    count = grid.shape[axis]
    places = (np.arange(length, dtype=np.float32) + np.float32(0.5)) * np.float32(count / length)
    places = np.maximum(places - np.float32(0.5), np.float32(0))
    first = places.astype(np.int64)
    share = (places - first).reshape([-1 if n == axis else 1 for n in range(3)])
    second = np.minimum(first + 1, count - 1)
    mixed: FloatArray = (
        np.take(grid, first, axis) * (1 - share) + np.take(grid, second, axis) * share
    )
    return mixed
