"""Phi-4-multimodal's rows of features: the crops' without what lies beside, then the whole's.

The crops' features stand as one map of the picture with a line break behind each line, then a
separator, then the whole picture's features in the same way (arXiv 2503.01743).
"""

from __future__ import annotations

import math

import numpy as np

from edge_safe.errors import GateError
from edge_safe.runtime.any_resolution import as_map, lines
from edge_safe.runtime.image_steps import FloatArray, PixelValues

# The graph gives the line break and the separator behind the features of each tile.
EXTRA = 2


def crop_map(pixels: PixelValues) -> tuple[int, int]:
    """Rows and columns of the crops' map that show the picture.

    Raises:
        GateError: The picture was not cut into crops.
    """
    if pixels.mask is None:
        raise GateError("the bundle's image steps leave no crops, which its layout needs")
    # A feature is the mean of 2 x 2 patches and counts where its first one does.
    seen = pixels.mask[1:, ::2, ::2].astype(np.float32)
    grid = as_map(seen.reshape(len(seen), -1, 1), pixels.rows, pixels.columns)[..., 0]
    return int(grid[:, 0].sum()), int(grid[0].sum())


def count_crop_lines(pixels: PixelValues, tokens: int) -> int:
    """Rows that a picture takes in the prompt.

    Args:
        pixels: The picture.
        tokens: Features of a crop.

    Raises:
        GateError: See ``crop_map``.
    """
    rows, columns = crop_map(pixels)
    side = math.isqrt(tokens)
    return rows * (columns + 1) + 1 + side * (side + 1)


def crop_lines(pixels: PixelValues, features: FloatArray) -> FloatArray:
    """The features of one picture in the order of the prompt, (n, d).

    Args:
        pixels: The picture.
        features: (tiles, tokens + 2, d), the whole picture's first.
    """
    line_break, separator = features[:1, -2], features[:1, -1]
    rows, columns = crop_map(pixels)
    crops = as_map(features[1:, :-EXTRA], pixels.rows, pixels.columns)[:rows, :columns]
    whole = as_map(features[:1, :-EXTRA], 1, 1)
    return np.concatenate([lines(crops, line_break), separator, lines(whole, line_break)])
