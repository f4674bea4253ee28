"""Which grid of tiles a picture is cut into, by the rules of the Hugging Face image processors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from edge_safe.errors import MediaError

ByteImage = NDArray[np.uint8]
Pixel = TypeVar("Pixel", np.uint8, np.int32)

Grid = tuple[int, int]
"""Rows and columns of tiles."""


def nearest_grid(height: int, width: int, size: int, least: int, most: int) -> Grid:
    """The grid whose proportions are nearest to a picture's (GOT-OCR 2's rule).

    Of grids that are equally near it is the larger one, if the picture has more than half of that
    grid's pixels.

    Args:
        height: Of the picture.
        width: Likewise.
        size: Side of a tile.
        least: Tiles of a grid.
        most: Likewise.
    """
    grids = [
        (rows, columns)
        for columns in range(1, most + 1)
        for rows in range(1, most + 1)
        if least <= rows * columns <= most
    ]
    best, smallest = (1, 1), math.inf
    for rows, columns in sorted(grids, key=lambda grid: grid[0] * grid[1]):
        difference = abs(width / height - columns / rows)
        large = height * width > 0.5 * size**2 * rows * columns
        if difference < smallest or (difference == smallest and large):
            best, smallest = (rows, columns), difference
    return best


def roomiest_grid(height: int, width: int, size: int, grids: Sequence[Grid]) -> Grid:
    """The grid that keeps most of a picture's pixels, and of these the smallest (LLaVA-NeXT's).

    Raises:
        MediaError: The picture is so thin that nothing would be left of it in any of them.
    """
    best, kept, wasted = None, 0, math.inf
    for rows, columns in grids:
        scale = min(columns * size / width, rows * size / height)
        pixels = min(int(width * scale) * int(height * scale), width * height)
        waste = rows * columns * size**2 - pixels
        if pixels > kept or (pixels == kept and waste < wasted):
            best, kept, wasted = (rows, columns), pixels, waste
    if best is None:
        raise MediaError(
            f"A picture of {width} x {height} pixels is too long for its breadth. Crop it."
        )
    return best


def needed_grid(height: int, width: int, size: int, most: int) -> Grid:
    """The grid that holds a picture in its own size; the nearest one, if that has too many tiles.

    Phi-4-multimodal's rule.

    Args:
        height: Of the picture.
        width: Likewise.
        size: Side of a tile.
        most: Tiles of a grid.
    """
    rows, columns = math.ceil(height / size), math.ceil(width / size)
    if rows * columns > most:
        return nearest_grid(height, width, size, 1, most)
    return rows, columns


def filled(height: int, width: int, size: int, grid: Grid) -> tuple[int, int]:
    """Like ``fitted``, the other side rounded down."""
    tall, wide = grid[0] * size, grid[1] * size
    if wide / width < tall / height:
        return int(height * (wide / width)), wide
    return tall, int(width * (tall / height))


def fitted(height: int, width: int, size: int, grid: Grid) -> tuple[int, int]:
    """Height and width of a picture that fills a grid in one direction, in its proportions."""
    tall, wide = grid[0] * size, grid[1] * size
    if wide / width < tall / height:
        return min(math.ceil(height * (wide / width)), tall), wide
    return tall, min(math.ceil(width * (tall / height)), wide)


def centred(image: ByteImage, height: int, width: int) -> ByteImage:
    """The picture in the middle of black; of an odd rest the larger half is behind it."""
    canvas = np.zeros((height, width, 3), np.uint8)
    top, left = (height - image.shape[0]) // 2, (width - image.shape[1]) // 2
    canvas[top : top + image.shape[0], left : left + image.shape[1]] = image
    return canvas


def on_white(image: ByteImage, height: int, width: int) -> ByteImage:
    """The picture at the upper left of white."""
    canvas = np.full((height, width, 3), 255, np.uint8)
    canvas[: image.shape[0], : image.shape[1]] = image
    return canvas


def squeezed(image: ByteImage, size: int) -> NDArray[np.float32]:
    """Whole tiles squeezed to size x size, neither smoothed before nor rounded to bytes.

    Bicubic interpolation with a = -0.75 as torch has it. Sides are n times as long, so that a
    place is either a pixel's middle or half way between two.
    """
    return _thinned(_thinned(image, size, 0), size, 1)


def _thinned(image: NDArray[Any], size: int, axis: int) -> NDArray[np.float32]:
    """One axis of a picture brought to a length that divides it."""
    step = image.shape[axis] // size
    middle = np.arange(size) * step + (step - 1) // 2
    mixed: NDArray[np.float32] = np.take(image, middle, axis).astype(np.float32)
    if step % 2:
        return mixed
    mixed[:] = 0
    for place, weight in ((-1, -0.09375), (0, 0.59375), (1, 0.59375), (2, -0.09375)):
        taken = np.take(image, np.clip(middle + place, 0, image.shape[axis] - 1), axis)
        mixed += np.float32(weight) * taken
    return mixed


def cut(image: NDArray[Pixel], size: int) -> list[NDArray[Pixel]]:
    """Tiles of size x size, row by row."""
    return [
        image[top : top + size, left : left + size]
        for top in range(0, image.shape[0], size)
        for left in range(0, image.shape[1], size)
    ]
