"""Prompts on which graphs are compared with torch, one of them with a picture on a grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_safe.export.graphs.spec import DecoderSpec
from edge_safe.export.reference import Picture, Reference
from edge_safe.runtime.calibration import Modality
from edge_safe.runtime.inputs import in_a_row, join, on_a_grid
from edge_safe.runtime.prefill import Span

Array = npt.NDArray[Any]

# Rows and columns of the picture's features.
GRID = (3, 5)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt that ends in slot T.

    Attributes:
        label: What it is.
        embeds: (1, S, d).
        way: Whose threshold it meets.
        places: (3, 1, S) for M-RoPE where a picture is in it.
        deepstack: (D, 1, S, d) for deeper layers, likewise.
        picture: The picture as torch takes it.
        span: Positions that see each other, as they stand for a picture.
    """

    label: str
    embeds: Array
    way: Modality = "text"
    places: Array | None = None
    deepstack: Array | None = None
    picture: Picture | None = None
    span: Span | None = None


def pictured(reference: Reference, spec: DecoderSpec, ids: Array) -> Prompt:
    """A prompt (1, S) with a picture of random features in the middle of its words.

    Its places are the runtime's own; torch finds them by itself.
    """
    random, (height, width) = np.random.default_rng(0), GRID
    cut = ids.shape[1] // 2 + 1
    # Some models find the places of a picture by this token alone.
    ids = np.insert(ids, cut - 1, reference.image_start, axis=1)
    words, count = reference.embed(ids)[0], height * width
    scale = float(words.std())
    features = random.normal(0, scale, (count, spec.hidden_size)).astype(np.float32)
    deeper = random.normal(0, scale, (spec.deepstack, *features.shape)).astype(np.float32)
    before, behind = (
        in_a_row(part, spec.position_axes, spec.deepstack) for part in (words[:cut], words[cut:])
    )
    run = join([before, on_a_grid(features, height, width, deeper), behind])
    marks = np.full((1, count), reference.image_token, np.int64)
    whole = np.concatenate([ids[:, :cut], marks, ids[:, cut:]], axis=1)
    return Prompt(
        "picture",
        run.rows[None],
        "image",
        run.places[:, None],
        run.deepstack[:, None],
        Picture(whole, height, width, features, deeper),
    )
