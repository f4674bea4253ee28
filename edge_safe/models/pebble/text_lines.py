"""Finds the lines of text in a picture and cuts them out for the recognizer.

The post-processing is DB's (arXiv 1911.08947): pixels over a threshold, one box per connected
region, grown by area and perimeter. Written with scipy and PIL, and independent of the runtime's
own numpy version, so that each can be tested against the other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from edge_safe.errors import MediaError

FloatArray = NDArray[np.float32]


class TextLineConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Parameters of detection and cropping, section ``text_lines`` of preprocessor_config.json.

    Attributes:
        longest_side: A picture is made smaller until its longer side fits.
        multiple: The detector wants sides that are multiples of this.
        pixel_threshold: Probability over which a pixel belongs to text.
        box_threshold: Least mean probability inside a box.
        unclip: Growth of a box; the detector is trained on shrunken ones.
        smallest_side: Boxes thinner than this in the detector's pixels are noise.
        vertical_ratio: Height over width from which a box is a line written downwards.
        line_height: Height of a cut line, the recognizer's.
        line_multiple: The width is padded to a multiple of this, one state of the recognizer.
        line_width: Wider lines are squeezed to this width.
        most_lines: A picture with more lines is refused, for what is not read is not judged.
        mean: Subtracted from pixels scaled to 0 ... 1.
        std: Divides the difference.
    """

    longest_side: int = 960
    multiple: int = 32
    pixel_threshold: float = 0.3
    box_threshold: float = 0.5
    unclip: float = 1.6
    smallest_side: float = 3.0
    vertical_ratio: float = 1.5
    line_height: int = 48
    line_multiple: int = 8
    line_width: int = 1600
    most_lines: int = 64
    mean: float = 0.5
    std: float = 0.5


@dataclass(frozen=True, slots=True)
class Box:
    """A rotated rectangle. Coordinates count pixels from the picture's upper left corner.

    Attributes:
        center: (x, y).
        along: Half of the upper edge as a vector, pointing to the right within 45 degrees.
        down: Half of the left edge as a vector, pointing downwards.
    """

    center: tuple[float, float]
    along: tuple[float, float]
    down: tuple[float, float]

    @property
    def width(self) -> float:
        """Length of the upper edge in pixels."""
        return 2 * math.hypot(*self.along)

    @property
    def height(self) -> float:
        """Length of the left edge in pixels."""
        return 2 * math.hypot(*self.down)


def detector_input(image: Image.Image, config: TextLineConfig) -> FloatArray:
    """Scales a picture for the detector.

    Args:
        image: RGB.
        config: The parameters.

    Returns:
        (1, 3, H, W) float32 in [-1, 1], blue first as the detector was trained.
    """
    ratio = min(1.0, config.longest_side / max(image.size))
    size = [
        max(config.multiple, int(side * ratio / config.multiple + 0.5) * config.multiple)
        for side in image.size
    ]
    resized = image.resize((size[0], size[1]), Image.Resampling.BILINEAR)
    return _normalized(resized, config)[None]


def find_boxes(probability: FloatArray, size: tuple[int, int], config: TextLineConfig) -> list[Box]:
    """Turns the detector's map into boxes in reading order.

    Args:
        probability: (H, W) float32, the detector's output.
        size: Width and height of the picture.
        config: The parameters.

    Returns:
        Boxes in the picture's own pixels.

    Raises:
        MediaError: There are more than ``most_lines``.
    """
    # Eight neighbours: strokes that touch at a corner are one region.
    labels, _ = ndimage.label(probability > config.pixel_threshold, np.ones((3, 3)))
    boxes = []
    for number, window in enumerate(ndimage.find_objects(labels), start=1):
        box = _region_box(labels[window] == number, window)
        if min(box.width, box.height) < config.smallest_side:
            continue
        if _mean_inside(probability, box) < config.box_threshold:
            continue
        boxes.append(_scaled(_grown(box, config.unclip), probability.shape, size))
    if len(boxes) > config.most_lines:
        raise MediaError(
            f"The picture has {len(boxes)} lines of text, more than the {config.most_lines} that "
            "are read; what is not read cannot be judged. Cut it into parts."
        )
    return reading_order(boxes)


def reading_order(boxes: list[Box]) -> list[Box]:
    """Sorts boxes into rows from top to bottom, and each row from left to right.

    Top and left are those of the page as it is turned: the sum of the upper edges says which way
    its text runs. A box belongs to a row when its center lies less than half the height of the
    row's first box below that one's center.
    """
    x = sum(box.along[0] for box in boxes)
    y = sum(box.along[1] for box in boxes)
    length = math.hypot(x, y) or 1.0
    cos, sin = x / length, y / length

    def place(box: Box) -> tuple[float, float]:
        """(down, along) the page."""
        return (
            cos * box.center[1] - sin * box.center[0],
            cos * box.center[0] + sin * box.center[1],
        )

    rows: list[list[Box]] = []
    for box in sorted(boxes, key=place):
        first = rows[-1][0] if rows else None
        if first and place(box)[0] - place(first)[0] < first.height / 2:
            rows[-1].append(box)
        else:
            rows.append([box])
    return [box for row in rows for box in sorted(row, key=lambda b: place(b)[1])]


def cut_line(image: Image.Image, box: Box, config: TextLineConfig) -> Image.Image:
    """Cuts a box out of an RGB picture, turned upright and scaled to the recognizer's height."""
    width, height = max(1, round(box.width)), max(1, round(box.height))
    corner = (
        box.center[0] - box.along[0] - box.down[0],
        box.center[1] - box.along[1] - box.down[1],
    )
    patch, left, top = _surroundings(image, box)
    # Rows of the matrix that takes a pixel of the cut line to one of the patch.
    matrix = (
        2 * box.along[0] / width,
        2 * box.down[0] / height,
        corner[0] - left,
        2 * box.along[1] / width,
        2 * box.down[1] / height,
        corner[1] - top,
    )
    line = patch.transform(
        (width, height), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR
    )
    if height >= config.vertical_ratio * width:
        line = line.transpose(Image.Transpose.ROTATE_90)
        width, height = height, width
    scaled = min(config.line_width, math.ceil(config.line_height * width / height))
    return line.resize((scaled, config.line_height), Image.Resampling.BILINEAR)


def line_pixels(lines: list[Image.Image], config: TextLineConfig) -> tuple[FloatArray, list[int]]:
    """Stacks cut lines.

    Returns:
        (N, 3, 48, W) float32, blue first, padded on the right with 0 (the color between black and
        white), and for each line the width that is its own, a multiple of ``line_multiple``.
        Beyond that width a line has to be cut off before it is recognized.
    """
    step = config.line_multiple
    widths = [-(-line.width // step) * step for line in lines]
    pixels = np.zeros((len(lines), 3, config.line_height, max(widths, default=0)), np.float32)
    for row, line in zip(pixels, lines, strict=True):
        row[:, :, : line.width] = _normalized(line, config)
    return pixels, widths


def _normalized(image: Image.Image, config: TextLineConfig) -> FloatArray:
    """RGB picture -> (3, H, W) float32, blue first."""
    scaled = np.asarray(image, np.float32)[:, :, ::-1] / np.float32(255.0)
    normalized = (scaled - np.float32(config.mean)) / np.float32(config.std)
    return np.ascontiguousarray(normalized.transpose(2, 0, 1))


def _region_box(region: NDArray[np.bool_], window: tuple[Any, ...]) -> Box:
    """The rectangle of least area around the pixel centers of a region, half a pixel wider."""
    rows = np.flatnonzero(region.any(1))
    first = region[rows].argmax(1)
    last = region.shape[1] - 1 - region[rows, ::-1].argmax(1)
    points = np.concatenate([np.stack([first, rows], 1), np.stack([last, rows], 1)])
    hull = _hull(points + np.array([window[1].start + 0.5, window[0].start + 0.5]))

    edges = np.diff(hull, axis=0, append=hull[:1])
    angles = np.arctan2(edges[:, 1], edges[:, 0])
    # A quarter turn gives the same rectangle: keep the direction nearest to the x axis.
    angles = np.unique(np.round((angles + math.pi / 4) % (math.pi / 2) - math.pi / 4, 9))
    best: tuple[float, float, NDArray[np.float64], NDArray[np.float64]] | None = None
    # Nearly upright ones first: they win against one that is smaller by rounding alone.
    for angle in sorted(map(float, angles), key=abs):
        turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
        turned = hull @ turn.T
        low, high = turned.min(0) - 0.5, turned.max(0) + 0.5
        area = float(np.prod(high - low))
        if best is None or area < best[0] - 1e-6:
            best = (area, angle, low, high)
    if best is None:
        raise ValueError("an empty region has no box")
    _, angle, low, high = best
    cos, sin = math.cos(angle), math.sin(angle)
    middle, half = (low + high) / 2, (high - low) / 2
    return Box(
        (cos * middle[0] - sin * middle[1], sin * middle[0] + cos * middle[1]),
        (cos * half[0], sin * half[0]),
        (-sin * half[1], cos * half[1]),
    )


def _hull(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Corners of the convex hull of (N, 2) points in order (Andrew's monotone chain)."""
    ordered = sorted({(float(x), float(y)) for x, y in points})
    if len(ordered) < 3:
        return np.array(ordered)

    def chain(path: list[tuple[float, float]]) -> list[tuple[float, float]]:
        kept: list[tuple[float, float]] = []
        for x, y in path:
            while len(kept) > 1:
                (ax, ay), (bx, by) = kept[-2], kept[-1]
                if (bx - ax) * (y - ay) - (by - ay) * (x - ax) > 0:
                    break
                kept.pop()
            kept.append((x, y))
        return kept[:-1]

    return np.array(chain(ordered) + chain(ordered[::-1]))


def _mean_inside(probability: FloatArray, box: Box) -> float:
    """Mean probability of the pixels whose centers lie in the box."""
    reach_x = abs(box.along[0]) + abs(box.down[0])
    reach_y = abs(box.along[1]) + abs(box.down[1])
    left, top = max(0, int(box.center[0] - reach_x)), max(0, int(box.center[1] - reach_y))
    area = probability[
        top : int(box.center[1] + reach_y) + 1, left : int(box.center[0] + reach_x) + 1
    ]
    x = np.arange(area.shape[1])[None, :] + (left + 0.5 - box.center[0])
    y = np.arange(area.shape[0])[:, None] + (top + 0.5 - box.center[1])
    across = np.abs(x * box.along[0] + y * box.along[1]) <= (box.width / 2) ** 2 + 1e-6
    inside = across & (np.abs(x * box.down[0] + y * box.down[1]) <= (box.height / 2) ** 2 + 1e-6)
    return float(area[inside].mean()) if inside.any() else 0.0


def _grown(box: Box, unclip: float) -> Box:
    """Moves every edge outwards by area * unclip / perimeter."""
    distance = box.width * box.height * unclip / (2 * (box.width + box.height))
    wider, higher = 1 + 2 * distance / box.width, 1 + 2 * distance / box.height
    return Box(
        box.center,
        (box.along[0] * wider, box.along[1] * wider),
        (box.down[0] * higher, box.down[1] * higher),
    )


def _scaled(box: Box, shape: tuple[int, ...], size: tuple[int, int]) -> Box:
    """From the detector's pixels to the picture's; a scale per axis keeps a parallelogram."""
    x, y = size[0] / shape[1], size[1] / shape[0]
    return Box(
        (box.center[0] * x, box.center[1] * y),
        (box.along[0] * x, box.along[1] * y),
        (box.down[0] * x, box.down[1] * y),
    )


def _surroundings(image: Image.Image, box: Box) -> tuple[Image.Image, int, int]:
    """The upright patch around a box and its corner; the picture's edge pixels go on outside."""
    reach_x = abs(box.along[0]) + abs(box.down[0])
    reach_y = abs(box.along[1]) + abs(box.down[1])
    left, top = math.floor(box.center[0] - reach_x) - 1, math.floor(box.center[1] - reach_y) - 1
    right, bottom = math.ceil(box.center[0] + reach_x) + 1, math.ceil(box.center[1] + reach_y) + 1
    columns = np.arange(left, right).clip(0, image.width - 1)
    rows = np.arange(top, bottom).clip(0, image.height - 1)
    near = image.crop((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
    pixels = np.asarray(near)[(rows - rows[0])[:, None], (columns - columns[0])[None, :]]
    return Image.fromarray(pixels), left, top
