"""From a picture to pixel values, by the steps that a bundle's manifest names.

Steps are those of the Hugging Face image processors of the PIL backend, with Pillow's resampling
on uint8, so the pixel values are theirs too; ``fill_crops`` follows a processor that has no such
backend. What a step has to know stands in its row.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from edge_safe.errors import GateError, MediaError
from edge_safe.runtime.image_grids import (
    centred,
    cut,
    filled,
    fitted,
    nearest_grid,
    needed_grid,
    on_white,
    roomiest_grid,
    squeezed,
)
from edge_safe.runtime.image_io import MAX_PIXELS

ByteImage = NDArray[np.uint8]
FloatArray = NDArray[np.float32]
MaskArray = NDArray[np.int32]

Side = Annotated[int, Meta(ge=1, le=8192)]
TileCount = Annotated[int, Meta(ge=1, le=64)]
PixelCount = Annotated[int, Meta(ge=1)]
Byte = Annotated[int, Meta(ge=0, le=255)]
Positive = Annotated[float, Meta(gt=0)]
Resample = Literal["bilinear", "bicubic", "lanczos"]

# Idefics3's image processor never makes a side longer than this.
LONGEST_SIDE = 4096

# Qwen2-VL's takes no picture that is longer than this many times its breadth.
MOST_EXTREME = 200

# Phi-4-multimodal's takes no picture that becomes thinner than this.
THINNEST = 10


class _Step(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="step"):
    """Base of the rows; ``step`` says which one it is."""


class Resize(_Step, frozen=True, tag="resize"):
    """To exactly height x width."""

    height: Side
    width: Side
    resample: Resample


class ResizeShortestEdge(_Step, frozen=True, tag="resize_shortest_edge"):
    """The shorter side to ``size``, the longer one in proportion, rounded down."""

    size: Side
    resample: Resample


class ResizeLongestEdge(_Step, frozen=True, tag="resize_longest_edge"):
    """The longer side to ``size``, the shorter one in proportion, odd lengths rounded up."""

    size: Side
    resample: Resample


class PadToSquare(_Step, frozen=True, tag="pad_to_square"):
    """Centres the picture on a square of one colour (red, green, blue)."""

    color: tuple[Byte, Byte, Byte]


class CenterCrop(_Step, frozen=True, tag="center_crop"):
    """The middle height x width; what lies outside of the picture is black."""

    height: Side
    width: Side


class SplitIntoTiles(_Step, frozen=True, tag="split_into_tiles"):
    """Tiles of size x size, row by row, and the whole picture squeezed to that size as the last.

    The picture is stretched to whole tiles first; one that fits a single tile is not split.
    """

    size: Side
    resample: Resample


class SplitIntoGrid(_Step, frozen=True, tag="split_into_grid"):
    """Tiles of size x size, row by row, and the whole picture squeezed to that size as the last.

    The picture is stretched to the grid whose proportions are nearest to its own; of grids that
    are equally near, to the larger one if the picture has more than half of its pixels. A grid of
    one tile is the whole picture.

    Attributes:
        size: Side of a tile.
        least: Tiles of a grid.
        most: Likewise.
        resample: For the grid and for the whole picture.
    """

    size: Side
    least: TileCount
    most: TileCount
    resample: Resample


class FitIntoGrid(_Step, frozen=True, tag="fit_into_grid"):
    """The whole picture squeezed to size x size first, then tiles of size x size, row by row.

    The picture fills that grid in one direction which keeps most of its pixels, and stands in the
    middle of black.

    Attributes:
        size: Side of a tile.
        grids: Rows and columns to choose from; the order decides between equals.
        resample: For the grid and for the whole picture.
    """

    size: Side
    grids: Annotated[list[tuple[TileCount, TileCount]], Meta(min_length=1)]
    resample: Resample


class FillCrops(_Step, frozen=True, tag="fill_crops"):
    """The whole picture squeezed to size x size first, then crops of size x size, row by row.

    The picture fills the crops in one direction, in its own proportions, and stands at the upper
    left of white; a mask leaves whole patches of white out. There are as many crops as it is
    large, and beyond ``most`` those of the grid nearest in shape.

    Attributes:
        size: Side of a crop.
        patch: Side of a patch.
        most: Crops of a picture.
    """

    size: Side
    patch: Side
    most: TileCount


class SmartResize(_Step, frozen=True, tag="smart_resize"):
    """Both sides to multiples of ``factor``, in proportion as far as that goes.

    Their product is at most ``max_pixels`` and, in small pictures, at least ``min_pixels``.
    """

    factor: Side
    min_pixels: PixelCount
    max_pixels: PixelCount
    resample: Resample


Step = (
    Resize
    | ResizeShortestEdge
    | ResizeLongestEdge
    | PadToSquare
    | CenterCrop
    | SplitIntoTiles
    | SplitIntoGrid
    | FitIntoGrid
    | FillCrops
    | SmartResize
)


class Patches(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a picture is cut up for a tower that takes rows of patches.

    Attributes:
        size: Side of a patch.
        merge: Side of a cell in patches; a cell's patches stand together and become one feature.
        frames: How often a picture is repeated, as a patch of a video has several frames.
    """

    size: Side
    merge: Side
    frames: Side


class Pixels(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How a picture becomes pixel values: the steps, then (value * factor - mean) / std.

    Attributes:
        steps: In order.
        rescale_factor: What each byte is multiplied with.
        image_mean: Of red, green, blue.
        image_std: Likewise.
        patches: How it is cut up, where the tower takes patches.
    """

    steps: list[Step]
    rescale_factor: Positive
    image_mean: tuple[float, float, float]
    image_std: tuple[Positive, Positive, Positive]
    patches: Patches | None = None


@dataclass(frozen=True, slots=True)
class Tiles:
    """A picture between two steps.

    Attributes:
        images: (H, W, 3) uint8 each.
        rows: Rows of tiles, 0 for a picture that was not split.
        columns: Columns of tiles.
        whole: (H, W, 3) the whole picture in front of its tiles, where it is not rounded to bytes.
        mask: (tiles, patches, patches) 0 where a patch lies beside the picture, with the whole
            one's; None where every patch counts.
    """

    images: tuple[ByteImage, ...]
    rows: int = 0
    columns: int = 0
    whole: FloatArray | None = None
    mask: MaskArray | None = None


@dataclass(frozen=True, slots=True)
class PixelValues:
    """A picture as its tower takes it.

    Attributes:
        values: (tiles, 3, H, W) float32, red first, or (patches, 3 * frames * size * size).
        rows: See ``Tiles``; of patches, rows of cells.
        columns: Likewise.
        count: Number of tiles, or of cells, that the tower makes features of.
        height: Of the picture itself.
        width: Likewise.
        mask: See ``Tiles``.
    """

    values: FloatArray
    rows: int
    columns: int
    count: int
    height: int
    width: int
    mask: MaskArray | None = None


def pixel_values(image: ByteImage, pixels: Pixels) -> PixelValues:
    """Prepares one (H, W, 3) uint8 picture.

    Raises:
        MediaError: It is so long and thin that a step would enlarge it beyond measure.
        GateError: The steps leave tiles of different sizes, which no tower takes.
    """
    tiles = Tiles((image,))
    for step in pixels.steps:
        tiles = _apply(step, tiles)
    whole = () if tiles.whole is None else (tiles.whole,)
    prepared = [*whole, *tiles.images]
    if len({tile.shape for tile in prepared}) != 1:
        raise GateError("the bundle's image steps leave tiles of different sizes")
    # In float64 and rounded in between, as transformers does it.
    stacked = np.stack(prepared).astype(np.float64) * pixels.rescale_factor
    mean = np.array(pixels.image_mean, np.float32)
    std = np.array(pixels.image_std, np.float32)
    values = np.ascontiguousarray(((stacked.astype(np.float32) - mean) / std).transpose(0, 3, 1, 2))
    if pixels.patches is not None:
        return _patches(values, pixels.patches, *image.shape[:2])
    high, wide = image.shape[:2]
    return PixelValues(values, tiles.rows, tiles.columns, len(values), high, wide, tiles.mask)


def _patches(values: FloatArray, patches: Patches, height: int, width: int) -> PixelValues:
    """Cuts (1, 3, H, W) into patches, cell by cell.

    Args:
        values: The prepared picture.
        patches: How it is cut.
        height: Of the picture itself.
        width: Likewise.

    Raises:
        GateError: The steps leave more than one tile, or sides that are not whole cells.
    """
    count, colors, high, wide = values.shape
    size, merge = patches.size, patches.merge
    rows, columns = high // (size * merge), wide // (size * merge)
    if count != 1 or (rows * merge * size, columns * merge * size) != (high, wide):
        raise GateError(
            f"the bundle's image steps leave {count} tiles of {high} x {wide}, which cannot be "
            f"cut into cells of {merge} x {merge} patches of {size} x {size}"
        )
    cut = values[0].reshape(colors, rows, merge, size, columns, merge, size)
    ordered = cut.transpose(1, 4, 2, 5, 0, 3, 6)[:, :, :, :, :, None]
    repeated = np.repeat(ordered, patches.frames, axis=5)
    cells = rows * columns
    return PixelValues(repeated.reshape(cells * merge**2, -1), rows, columns, cells, height, width)


def _apply(step: Step, tiles: Tiles) -> Tiles:
    """Does one step to every tile; only one picture can be split."""
    match step:
        case SplitIntoTiles():
            return _split(tiles.images[-1], step)
        case SplitIntoGrid():
            return _split_grid(tiles.images[-1], step)
        case FitIntoGrid():
            return _fit_grid(tiles.images[-1], step)
        case FillCrops():
            return _fill_crops(tiles.images[-1], step)
        case Resize():
            images = [_resize(t, step.height, step.width, step.resample) for t in tiles.images]
        case ResizeShortestEdge():
            images = [_shortest(t, step) for t in tiles.images]
        case ResizeLongestEdge():
            images = [_longest(t, step) for t in tiles.images]
        case PadToSquare():
            images = [_pad(t, step.color) for t in tiles.images]
        case SmartResize():
            images = [_smart(t, step) for t in tiles.images]
        case CenterCrop():
            images = [_crop(t, step.height, step.width) for t in tiles.images]
    return replace(tiles, images=tuple(images))


def _resize(image: ByteImage, height: int, width: int, resample: Resample) -> ByteImage:
    from PIL.Image import Resampling, fromarray

    if height * width > MAX_PIXELS:
        raise MediaError(
            f"A picture of {image.shape[1]} x {image.shape[0]} pixels would be enlarged to {width} "
            f"x {height}, too long for its breadth. Crop it."
        )
    made = fromarray(image).resize((width, height), Resampling[resample.upper()])
    return np.asarray(made)


def _shortest(image: ByteImage, step: ResizeShortestEdge) -> ByteImage:
    height, width = image.shape[:2]
    short, long = sorted((height, width))
    longer = int(step.size * long / short)
    size = (longer, step.size) if width <= height else (step.size, longer)
    return _resize(image, *size, step.resample)


def _longest(image: ByteImage, step: ResizeLongestEdge) -> ByteImage:
    height, width = image.shape[:2]
    ratio = width / height
    if width >= height:
        width = step.size
        height = int(width / ratio)
        height += height % 2
    else:
        height = step.size
        width = int(height * ratio)
        width += width % 2
    height, width = max(height, 1), max(width, 1)
    ratio = width / height
    if width >= height and width > LONGEST_SIDE:
        height, width = int(LONGEST_SIDE / ratio), LONGEST_SIDE
    elif height > width and height > LONGEST_SIDE:
        height, width = LONGEST_SIDE, int(LONGEST_SIDE * ratio)
    return _resize(image, max(height, 1), max(width, 1), step.resample)


def _smart(image: ByteImage, step: SmartResize) -> ByteImage:
    height, width = image.shape[:2]
    if max(height, width) > MOST_EXTREME * min(height, width):
        raise MediaError(
            f"A picture of {width} x {height} pixels is too long for its breadth: more than "
            f"{MOST_EXTREME} to 1. Crop it."
        )
    high, broad = smart_sides(height, width, step)
    return _resize(image, high, broad, step.resample)


def smart_sides(height: int, width: int, step: SmartResize) -> tuple[int, int]:
    """Height and width that a picture is resized to."""
    factor = step.factor

    def whole(side: float, rounding: Callable[[float], int]) -> int:
        return max(factor, rounding(side / factor) * factor)

    # Python rounds halves to even numbers, as transformers does; there a side may become 0 here,
    # which the next step mends in the same way.
    high, broad = (round(side / factor) * factor for side in (height, width))
    if high * broad > step.max_pixels:
        shrink = math.sqrt(height * width / step.max_pixels)
        return whole(height / shrink, math.floor), whole(width / shrink, math.floor)
    if high * broad < step.min_pixels:
        grow = math.sqrt(step.min_pixels / (height * width))
        return whole(height * grow, math.ceil), whole(width * grow, math.ceil)
    return high, broad


def _pad(image: ByteImage, color: tuple[int, int, int]) -> ByteImage:
    height, width = image.shape[:2]
    side = max(height, width)
    square = np.empty((side, side, 3), np.uint8)
    square[:] = color
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = image
    return square


def _crop(image: ByteImage, height: int, width: int) -> ByteImage:
    crop = np.zeros((height, width, 3), np.uint8)
    top, target_top, rows = _overlap(image.shape[0], height)
    left, target_left, columns = _overlap(image.shape[1], width)
    crop[target_top : target_top + rows, target_left : target_left + columns] = image[
        top : top + rows, left : left + columns
    ]
    return crop


def _overlap(length: int, wanted: int) -> tuple[int, int, int]:
    """Where the middle begins in the picture and in the crop, and how much of it there is."""
    start = (length - wanted) // 2
    if start >= 0:
        return start, 0, wanted
    return 0, math.ceil((wanted - length) / 2), length


def _split(image: ByteImage, step: SplitIntoTiles) -> Tiles:
    height, width = image.shape[:2]
    ratio, size = width / height, step.size
    if width >= height:
        width = math.ceil(width / size) * size
        height = math.ceil(int(width / ratio) / size) * size
    else:
        height = math.ceil(height / size) * size
        width = math.ceil(int(height * ratio) / size) * size
    image = _resize(image, height, width, step.resample)
    rows, columns = height // size, width // size
    if rows == columns == 1:
        return Tiles((image,))
    whole = _resize(image, size, size, step.resample)
    return Tiles((*cut(image, size), whole), rows, columns)


def _split_grid(image: ByteImage, step: SplitIntoGrid) -> Tiles:
    size = step.size
    height, width = image.shape[:2]
    rows, columns = nearest_grid(height, width, size, step.least, step.most)
    stretched = _resize(image, rows * size, columns * size, step.resample)
    if rows == columns == 1:
        return Tiles((stretched,))
    whole = _resize(image, size, size, step.resample)
    return Tiles((*cut(stretched, size), whole), rows, columns)


def _fit_grid(image: ByteImage, step: FitIntoGrid) -> Tiles:
    size = step.size
    height, width = image.shape[:2]
    grid = roomiest_grid(height, width, size, step.grids)
    whole = _resize(image, size, size, step.resample)
    resized = _resize(image, *fitted(height, width, size, grid), step.resample)
    tiles = cut(centred(resized, grid[0] * size, grid[1] * size), size)
    return Tiles((whole, *tiles), *grid)


def _fill_crops(image: ByteImage, step: FillCrops) -> Tiles:
    size = step.size
    height, width = image.shape[:2]
    rows, columns = grid = needed_grid(height, width, size, step.most)
    tall, wide = filled(height, width, size, grid)
    if min(tall, wide) < THINNEST:
        raise MediaError(
            f"A picture of {width} x {height} pixels is too long for its breadth. Crop it."
        )
    canvas = on_white(_resize(image, tall, wide, "bilinear"), rows * size, columns * size)
    side = size // step.patch
    seen = np.zeros((rows * side, columns * side), np.int32)
    # A patch with a part of the picture in it counts.
    beside = [
        (whole - part) // step.patch
        for whole, part in zip(canvas.shape[:2], (tall, wide), strict=True)
    ]
    seen[: len(seen) - beside[0], : seen.shape[1] - beside[1]] = 1
    mask = np.stack([np.ones((side, side), np.int32), *cut(seen, side)])
    return Tiles(tuple(cut(canvas, size)), rows, columns, squeezed(canvas, size), mask)
