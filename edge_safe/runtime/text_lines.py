"""Finds the lines of text in a picture and cuts them out, in numpy and pillow.

The post-processing is DB's (arXiv 1911.08947): pixels over a threshold, one box per connected
region, grown by area and perimeter. Regions are found by joining the runs of each row with a
union-find over numpy arrays. What the graphs say of the pixels is the business of the family.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_safe.errors import MediaError

if TYPE_CHECKING:
    from PIL.Image import Image

FloatArray = NDArray[np.float32]
Corners = NDArray[np.float64]
"""(3, 2) x and y of a box's center, its half upper edge (rightwards), its half left edge (down)."""


class TextLines(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Section ``text_lines`` of a manifest's processors.

    Attributes:
        longest_side: A picture is made smaller until its longer side fits.
        multiple: The detector wants sides that are multiples of this.
        pixel_threshold: Probability over which a pixel belongs to text.
        box_threshold: Least mean probability inside a box.
        unclip: Growth of a box; the detector is trained on shrunken ones.
        smallest_side: Boxes thinner than this in the detector's pixels are noise.
        vertical_ratio: Height over width from which a box is a line written downwards.
        line_height: Height of a cut line.
        line_multiple: Widths are padded to a multiple of this, one state of the recognizer.
        line_width: Wider lines are squeezed to this width.
        most_lines: A picture with more lines is refused, for what is not read is not judged.
        mean: Subtracted from pixels scaled to 0 ... 1.
        std: Divides the difference.
    """

    longest_side: int
    multiple: int
    pixel_threshold: float
    box_threshold: float
    unclip: float
    smallest_side: float
    vertical_ratio: float
    line_height: int
    line_multiple: int
    line_width: int
    most_lines: int
    mean: float
    std: float


def detector_input(image: Image, config: TextLines) -> FloatArray:
    """Scales an RGB picture into (1, 3, H, W) float32, blue first."""
    from PIL.Image import Resampling

    ratio = min(1.0, config.longest_side / max(image.size))
    step = config.multiple
    width, height = (max(step, int(side * ratio / step + 0.5) * step) for side in image.size)
    return _normalized(image.resize((width, height), Resampling.BILINEAR), config)[None]


def find_boxes(probability: FloatArray, size: tuple[int, int], config: TextLines) -> list[Corners]:
    """Turns the detector's map into boxes.

    Args:
        probability: (H, W) float32.
        size: Width and height of the picture.
        config: The parameters.

    Returns:
        Boxes in the picture's pixels and in reading order.

    Raises:
        MediaError: There are more than ``most_lines``.
    """
    height, width = probability.shape
    scale = np.array([size[0] / width, size[1] / height])
    boxes = []
    for points in _regions(probability > config.pixel_threshold):
        box = _smallest_rectangle(_hull(points))
        if min(_sides(box)) < config.smallest_side:
            continue
        if _mean_inside(probability, box) < config.box_threshold:
            continue
        boxes.append(_grown(box, config.unclip) * scale)
    if len(boxes) > config.most_lines:
        raise MediaError(
            f"The picture has {len(boxes)} lines of text, more than the {config.most_lines} that "
            "are read; what is not read cannot be judged. Cut it into parts."
        )
    return reading_order(boxes)


def reading_order(boxes: Sequence[Corners]) -> list[Corners]:
    """Sorts boxes into rows from top to bottom, and each row from left to right.

    Top is where the sum of the upper edges says; a box belongs to a row while its center lies less
    than half the height of the row's first box below that one's center.
    """
    if not boxes:
        return []
    edge = np.sum([box[1] for box in boxes], axis=0)
    cos, sin = edge / (math.hypot(*edge) or 1.0)
    turn = np.array([[-sin, cos], [cos, sin]])
    places = [(float(p[0]), float(p[1])) for p in (turn @ box[0] for box in boxes)]
    rows: list[list[int]] = []
    for index in sorted(range(len(boxes)), key=places.__getitem__):
        first = rows[-1][0] if rows else index
        if rows and places[index][0] - places[first][0] < _sides(boxes[first])[1] / 2:
            rows[-1].append(index)
        else:
            rows.append([index])
    return [boxes[i] for row in rows for i in sorted(row, key=lambda i: places[i][1])]


def cut_line(image: Image, box: Corners, config: TextLines) -> Image:
    """Cuts a box out of an RGB picture, upright and as high as the recognizer wants it."""
    from PIL.Image import Resampling, Transform, Transpose

    center, along, down = box
    full_width, full_height = _sides(box)
    width, height = max(1, round(full_width)), max(1, round(full_height))
    patch, origin = _patch(image, box)
    corner = center - along - down - origin
    matrix = np.stack([2 * along / width, 2 * down / height, corner], axis=1).ravel()
    line = patch.transform(
        (width, height), Transform.AFFINE, tuple(matrix.tolist()), Resampling.BILINEAR
    )
    if height >= config.vertical_ratio * width:
        line = line.transpose(Transpose.ROTATE_90)
        width, height = height, width
    scaled = min(config.line_width, math.ceil(config.line_height * width / height))
    return line.resize((scaled, config.line_height), Resampling.BILINEAR)


def line_pixels(line: Image, config: TextLines) -> FloatArray:
    """One cut line as (1, 3, height, W) float32, blue first, padded on the right with 0."""
    width = -(-line.width // config.line_multiple) * config.line_multiple
    pixels = np.zeros((1, 3, config.line_height, width), np.float32)
    pixels[0, :, :, : line.width] = _normalized(line, config)
    return pixels


def _normalized(image: Image, config: TextLines) -> FloatArray:
    """RGB picture -> (3, H, W) float32, blue first."""
    scaled = np.asarray(image, np.float32)[:, :, ::-1] / np.float32(255.0)
    normalized = (scaled - np.float32(config.mean)) / np.float32(config.std)
    return np.ascontiguousarray(normalized.transpose(2, 0, 1))


def _regions(mask: NDArray[np.bool_]) -> Iterator[NDArray[np.float64]]:
    """Centers (n, 2) x, y of the end pixels of every row of each 8-connected region."""
    padded = np.zeros((mask.shape[0], mask.shape[1] + 2), np.int8)
    padded[:, 1:-1] = mask
    change = np.diff(padded, axis=1)
    row, first = np.nonzero(change == 1)
    _, last = np.nonzero(change == -1)
    last -= 1
    label = _join(row, first, last, mask.shape[1] + 2)
    order = np.argsort(label, kind="stable")
    for run in np.split(order, np.flatnonzero(np.diff(label[order])) + 1):
        if run.size:
            x = np.concatenate([first[run], last[run]])
            yield np.stack([x, np.concatenate([row[run], row[run]])], 1) + 0.5


def _join(
    row: NDArray[np.intp], first: NDArray[np.intp], last: NDArray[np.intp], stride: int
) -> NDArray[np.intp]:
    """Labels runs so that those that touch, at a corner too, share the smallest index."""
    # One number per pixel of the picture makes the runs of all rows one sorted sequence.
    below = (row + 1) * stride
    start = np.searchsorted(row * stride + last, below + first - 1, side="left")
    stop = np.searchsorted(row * stride + first, below + last + 1, side="right")
    count = np.maximum(stop - start, 0)
    upper = np.repeat(np.arange(len(row)), count)
    lower = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count) + start[upper]
    parent = np.arange(len(row))
    while True:
        a, b = parent[upper], parent[lower]
        if np.array_equal(a, b):
            return parent
        np.minimum.at(parent, np.maximum(a, b), np.minimum(a, b))
        while not np.array_equal(parent, parent[parent]):
            parent = parent[parent]


def _hull(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Corners of the convex hull in order, by Andrew's monotone chain."""
    ordered = [(float(x), float(y)) for x, y in np.unique(points, axis=0)]
    if len(ordered) < 3:
        return np.array(ordered)
    corners: list[tuple[float, float]] = []
    for path in (ordered, ordered[::-1]):
        chain: list[tuple[float, float]] = []
        for x, y in path:
            while len(chain) > 1:
                (ax, ay), (bx, by) = chain[-2], chain[-1]
                if (bx - ax) * (y - ay) - (by - ay) * (x - ax) > 0:
                    break
                chain.pop()
            chain.append((x, y))
        corners.extend(chain[:-1])
    return np.array(corners)


def _smallest_rectangle(hull: NDArray[np.float64]) -> Corners:
    """The rectangle of least area around pixel centers, half a pixel wider on every side.

    One side of it lies on an edge of the hull. Of equal areas the one nearest to upright wins.
    """
    edges = np.diff(hull, axis=0, append=hull[:1])
    angles = np.arctan2(edges[:, 1], edges[:, 0])
    quarter = math.pi / 2
    angles = np.unique(np.round((angles + quarter / 2) % quarter - quarter / 2, 9))
    angles = angles[np.argsort(np.abs(angles), kind="stable")]
    axes = np.stack([np.cos(angles), np.sin(angles)], 1)
    normals = np.stack([-axes[:, 1], axes[:, 0]], 1)
    along, down = axes @ hull.T, normals @ hull.T
    low = np.stack([along.min(1), down.min(1)], 1) - 0.5
    high = np.stack([along.max(1), down.max(1)], 1) + 0.5
    area = np.prod(high - low, axis=1)
    best = 0
    for index in range(1, len(area)):
        if area[index] < area[best] - 1e-6:
            best = index
    middle, half = (low[best] + high[best]) / 2, (high[best] - low[best]) / 2
    axis, normal = axes[best], normals[best]
    return np.stack([axis * middle[0] + normal * middle[1], axis * half[0], normal * half[1]])


def _sides(box: Corners) -> tuple[float, float]:
    """Width and height."""
    return 2 * math.hypot(*box[1]), 2 * math.hypot(*box[2])


def _reach(box: Corners) -> NDArray[np.float64]:
    """Half of the upright rectangle around a box, (2,)."""
    reach: NDArray[np.float64] = np.abs(box[1]) + np.abs(box[2])
    return reach


def _mean_inside(probability: FloatArray, box: Corners) -> float:
    """Mean probability of the pixels whose centers lie in the box."""
    low = np.maximum(0, (box[0] - _reach(box)).astype(int))
    high = (box[0] + _reach(box)).astype(int) + 1
    area = probability[low[1] : high[1], low[0] : high[0]]
    y, x = np.indices(area.shape)
    x, y = x + (low[0] + 0.5 - box[0, 0]), y + (low[1] + 0.5 - box[0, 1])
    inside = np.ones(area.shape, bool)
    for half in box[1:]:
        inside &= np.abs(x * half[0] + y * half[1]) <= half @ half + 1e-6
    return float(area[inside].mean()) if inside.any() else 0.0


def _grown(box: Corners, unclip: float) -> Corners:
    """Moves every edge outwards by area * unclip / perimeter."""
    width, height = _sides(box)
    distance = width * height * unclip / (2 * (width + height))
    return np.stack(
        [box[0], box[1] * (1 + 2 * distance / width), box[2] * (1 + 2 * distance / height)]
    )


def _patch(image: Image, box: Corners) -> tuple[Image, NDArray[np.float64]]:
    """The upright patch around a box and its corner; the picture's edge pixels go on outside."""
    from PIL.Image import fromarray

    low = np.floor(box[0] - _reach(box)).astype(int) - 1
    high = np.ceil(box[0] + _reach(box)).astype(int) + 1
    columns = np.arange(low[0], high[0]).clip(0, image.width - 1)
    rows = np.arange(low[1], high[1]).clip(0, image.height - 1)
    left, top = int(columns[0]), int(rows[0])
    near = np.asarray(image.crop((left, top, int(columns[-1]) + 1, int(rows[-1]) + 1)))
    pixels = near[(rows - top)[:, None], (columns - left)[None, :]]
    return fromarray(pixels), low.astype(np.float64)
