"""What stands in the prompt for a picture: its features, with markers around them.

The markers are the bundle's own text, in which special tokens count. The features are numbers and
cannot become a token. The ids equal those of the Hugging Face processor, which writes the
placeholder once per feature.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import msgspec
import numpy as np
from msgspec import Meta

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


class Grid(_Layout, frozen=True, tag="grid"):
    """The features of a picture that was cut into patches, a tile for each cell, in a grid."""

    tokens: ClassVar[int] = 1


Layout = Plain | TileRows | Grid


def markers(layout: Layout) -> list[str]:
    """Texts of a layout that may be special tokens."""
    match layout:
        case TileRows():
            places = range(1, MARKED + 1)
            rows = [f"<row_{row}_col_{column}>" for row in places for column in places]
            return [layout.around, layout.whole, *rows]
        case Plain() | Grid():
            return []


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
        case TileRows():
            return _tile_rows(layout, pixels, features)


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
