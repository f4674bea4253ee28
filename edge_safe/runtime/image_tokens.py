"""What stands in the prompt for a picture: its features, with markers around them.

The markers are the bundle's own text, in which special tokens count. The features are numbers and
cannot become a token. The ids equal those of the Hugging Face processor, which writes the
placeholder once per feature.
"""

from __future__ import annotations

from math import isqrt
from typing import Annotated, ClassVar

import msgspec
import numpy as np
from msgspec import Meta

from edge_safe.runtime.any_resolution import map_size, pack
from edge_safe.runtime.crop_lines import EXTRA, count_crop_lines, crop_lines
from edge_safe.runtime.image_steps import FloatArray, PixelValues
from edge_safe.runtime.inputs import on_a_grid
from edge_safe.runtime.tokens import Piece, Trusted

Marker = Annotated[str, Meta(min_length=1)]
# Rows and columns of tiles whose markers may be tokens of their own.
MARKED = 16

Count = Annotated[int, Meta(ge=1, le=65536)]


class _Layout(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="layout"):
    """Base of the rows; ``layout`` says which one it is."""


class Plain(_Layout, frozen=True, tag="plain"):
    """The features of one tile and nothing else.

    Attributes:
        tokens: Features of a tile.
    """

    tokens: Count


class TileRows(_Layout, frozen=True, tag="tile_rows"):
    r"""Tiles row by row, each behind its place ``<row_1_col_1>``, then the whole picture.

    Attributes:
        tokens: Features of a tile.
        around: Stands before every tile and behind the last one.
        whole: Stands before the whole picture.
    """

    tokens: Count
    around: Marker
    whole: Marker


class Enclosed(_Layout, frozen=True, tag="enclosed"):
    """The features of all tiles, one tile after the other, between two markers.

    Attributes:
        tokens: Features of a tile.
        before: Stands before the first tile.
        after: Stands behind the last one.
    """

    tokens: Count
    before: Marker
    after: Marker


class AnyResolution(_Layout, frozen=True, tag="any_resolution"):
    """The whole picture's features, then those of its tiles as the lines of one map.

    Attributes:
        tokens: Features of a tile; the graph gives the line break as one more.
        most: Tiles whose features a map may have; a larger map is made smaller.
    """

    tokens: Count
    most: Annotated[int, Meta(ge=1, le=64)]


class CropLines(_Layout, frozen=True, tag="crop_lines"):
    """The features of the crops as the lines of one map, then the whole picture's.

    Attributes:
        tokens: Features of a crop; the graph gives line break and separator as two more.
    """

    tokens: Count


class Grid(_Layout, frozen=True, tag="grid"):
    """The features of a picture that was cut into patches, a tile for each cell, in a grid."""

    tokens: ClassVar[int] = 1


Layout = Plain | TileRows | Enclosed | AnyResolution | CropLines | Grid


def markers(layout: Layout) -> list[str]:
    """Texts of a layout that may be special tokens."""
    match layout:
        case TileRows():
            places = range(1, MARKED + 1)
            rows = [f"<row_{row}_col_{column}>" for row in places for column in places]
            return [layout.around, layout.whole, *rows]
        case Enclosed():
            # White space beside a marker is plain text.
            return [layout.before.strip(), layout.after.strip()]
        case Plain() | AnyResolution() | CropLines() | Grid():
            return []


def rows_of_tile(layout: Layout) -> int:
    """What the graph gives for one tile."""
    extra = EXTRA if isinstance(layout, CropLines) else int(isinstance(layout, AnyResolution))
    return layout.tokens + extra


def count_features(layout: Layout, pixels: PixelValues) -> int:
    """Features that a picture takes in the prompt, its markers not counted."""
    if isinstance(layout, CropLines):
        return count_crop_lines(pixels, layout.tokens)
    if not isinstance(layout, AnyResolution):
        return pixels.count * layout.tokens
    if not pixels.rows:
        return layout.tokens + 1
    _, (rows, columns) = map_size(pixels, isqrt(layout.tokens), layout.most)
    return layout.tokens + rows * (columns + 1)


def lay_out(
    layout: Layout, pixels: PixelValues, features: FloatArray, deepstack: FloatArray
) -> list[Piece]:
    """Puts features (tiles, tokens, d) and markers into the order of the prompt.

    Args:
        layout: What stands where.
        pixels: The picture.
        features: What the tower made of it.
        deepstack: (D, tiles, d) what it made for deeper layers, of a grid.
    """
    match layout:
        case Grid():
            return [
                on_a_grid(np.concatenate(list(features)), pixels.rows, pixels.columns, deepstack)
            ]
        case Plain():
            return [np.concatenate(list(features))]
        case Enclosed():
            joined = np.concatenate(list(features))
            return [Trusted(layout.before), joined, Trusted(layout.after)]
        case TileRows():
            return _tile_rows(layout, pixels, features)
        case AnyResolution():
            return [pack(pixels, features, layout.most)]
        case CropLines():
            return [crop_lines(pixels, features)]


def _tile_rows(layout: TileRows, pixels: PixelValues, features: FloatArray) -> list[Piece]:
    pieces: list[Piece] = []
    for number, tile in enumerate(features[:-1]):
        row, column = divmod(number, pixels.columns)
        pieces += [Trusted(f"{layout.around}<row_{row + 1}_col_{column + 1}>"), tile]
        if column + 1 == pixels.columns:
            pieces.append(Trusted("\n"))
    before = "\n" if pixels.rows else ""
    return [
        *pieces,
        Trusted(f"{before}{layout.around}{layout.whole}"),
        features[-1],
        Trusted(layout.around),
    ]
