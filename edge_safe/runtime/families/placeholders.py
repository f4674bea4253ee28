"""Every family whose chat template marks the places of pictures and sound with a placeholder.

The manifest's ``processors.image`` says how a picture becomes pixel values, where its features
stand, and what surrounds them; ``vision_encoder`` turns pixel values into features. Sound is
``runtime.hearing``'s. Nothing here knows a model.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from functools import partial
from typing import TypeVar

import msgspec
import numpy as np

from edge_safe.errors import GateError, MediaError, SchemaError
from edge_safe.runtime.bundle import Bundle
from edge_safe.runtime.deadline import Deadline
from edge_safe.runtime.families.base import Media, Placed, Prepared
from edge_safe.runtime.hearing import AudioProcessor, Hearing, open_hearing
from edge_safe.runtime.image_io import read_image
from edge_safe.runtime.image_steps import FillCrops, FloatArray, Pixels, PixelValues, pixel_values
from edge_safe.runtime.image_tokens import (
    CropLines,
    Grid,
    Layout,
    Marker,
    count_features,
    lay_out,
    markers,
    rows_of_tile,
)
from edge_safe.runtime.media import AudioInput, ImageInput, Kind
from edge_safe.runtime.prefill import DEEPSTACK
from edge_safe.runtime.session import Array
from edge_safe.runtime.tokens import Tokens

VISION_ENCODER = "vision_encoder"
IMAGE_GRID = "image_grid_thw"
PATCH_MASK = "patch_attention_mask"

# Of pictures: where a turn has more than one, and they are prepared otherwise then.
SEVERAL = "several"

Tower = TypeVar("Tower")


class ImageProcessor(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Section ``image`` of the manifest's ``processors``.

    Attributes:
        placeholder: What the chat template writes where a picture belongs; a special token.
        pixels: From the picture to pixel values.
        pixels_of_several: The same for a turn with more than one picture, where it differs.
        layout: What stands in the place of the placeholder.
    """

    placeholder: Marker
    pixels: Pixels
    layout: Layout
    pixels_of_several: Pixels | None = None


class Processors(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The manifest's ``processors``; a section is absent where its tower is."""

    image: ImageProcessor | None = None
    audio: AudioProcessor | None = None


class PlaceholderFamily:
    """Embeds media for the places that the template marks. Shared between threads."""

    def __init__(
        self,
        bundle: Bundle,
        image: ImageProcessor | None,
        hearing: Hearing | None,
        usable: Container[str],
    ) -> None:
        places = {} if image is None else {"image": image.placeholder}
        if hearing is not None:
            places[hearing.part] = hearing.placeholder
        self.placeholders: Mapping[str, str] = places
        self._bundle = bundle
        self._image = image
        self._hearing = hearing
        self._usable = usable

    def variant(self, kind: Kind, images: int) -> str:
        """See ``Towers.variant``."""
        if kind == "audio":
            return self._require(kind, self._hearing).variant(images)
        image = self._require(kind, self._image)
        return SEVERAL if images > 1 and image.pixels_of_several is not None else ""

    def image(self, source: ImageInput, variant: str) -> Prepared:
        """See ``Towers.image``."""
        image = self._require("image", self._image)
        steps = (image.pixels_of_several if variant == SEVERAL else None) or image.pixels
        pixels = pixel_values(read_image(source), steps)
        return Prepared(count_features(image.layout, pixels), partial(self._see, pixels, image))

    def sound(self, source: AudioInput, variant: str) -> Prepared:
        """See ``Towers.sound``."""
        return self._require("audio", self._hearing).sound(source, variant)

    def _require(self, kind: Kind, tower: Tower | None) -> Tower:
        """Makes sure that the tower of a kind of media is there and may be used.

        Raises:
            MediaError: It is not.
        """
        what = "sound" if kind == "audio" else "pictures"
        if tower is None:
            raise MediaError(f"This bundle has no tower for {what}; leave {what} out.")
        if kind not in self._usable:
            raise MediaError(
                f"This bundle's projector of {what} has not been trained, so the gate cannot judge "
                f"{what}. Use a bundle where it is, or ask in words."
            )
        return tower

    def _see(self, pixels: PixelValues, image: ImageProcessor, deadline: Deadline | None) -> Media:
        """One picture as what stands in its place."""
        session = self._bundle.session(VISION_ENCODER)
        abort = None if deadline is None else deadline.abort
        feeds: dict[str, Array] = {"pixel_values": pixels.values}
        patches = image.pixels.patches
        if patches is not None:
            sides = [pixels.rows * patches.merge, pixels.columns * patches.merge]
            feeds[IMAGE_GRID] = np.array([[1, *sides]], np.int64)
        if pixels.mask is not None:
            feeds[PATCH_MASK] = pixels.mask
        found = session.run(feeds, abort)
        layout, model = image.layout, self._bundle.manifest.model
        expected = (pixels.count, rows_of_tile(layout), model.hidden_size)
        features = _checked(found["image_features"], expected)
        deepstack = np.zeros((0, pixels.count, model.hidden_size), np.float32)
        if model.deepstack:
            expected = (model.deepstack, pixels.count, model.hidden_size)
            deepstack = _checked(found[DEEPSTACK], expected)
        placed = Placed("image", lay_out(layout, pixels, features, deepstack))
        return Media(placed=[placed], image_tokens=count_features(layout, pixels))


def _checked(found: Array, expected: tuple[int, ...]) -> FloatArray:
    """Features of the tower, of a certain shape.

    Raises:
        GateError: They have another one, or are not finite.
    """
    features: FloatArray = np.asarray(found, np.float32)
    if features.shape != expected:
        raise GateError(f"{VISION_ENCODER} gave features of {features.shape}, not {expected}")
    if not np.isfinite(features).all():
        raise GateError(f"{VISION_ENCODER} gave numbers that are not finite")
    return features


def open_towers(bundle: Bundle, tokens: Tokens, untrained_towers: bool) -> PlaceholderFamily:
    """Reads the processors' parameters.

    Raises:
        SchemaError: The parameters do not fit.
        BundleError: A placeholder or marker is a token that text could produce.
    """
    manifest = bundle.manifest
    try:
        processors = msgspec.convert(manifest.processors, Processors)
    except msgspec.ValidationError as error:
        raise SchemaError(
            f"The processors of {bundle.folder} do not fit this version: {error}."
        ) from error
    image, hearing = processors.image, None
    if image is not None:
        if VISION_ENCODER not in manifest.graphs:
            raise SchemaError(
                f"{bundle.folder} prepares pictures but has no graph '{VISION_ENCODER}'."
            )
        _check_grid(bundle, image)
        tokens.require_special(image.placeholder)
        tokens.require_unspoken(markers(image.layout))
    if processors.audio is not None:
        hearing = open_hearing(bundle, tokens, processors.audio)
    usable = {
        kind
        for kind, modality in manifest.modalities.items()
        if modality.trained or untrained_towers
    }
    return PlaceholderFamily(bundle, image, hearing, usable)


def _check_grid(bundle: Bundle, image: ImageProcessor) -> None:
    """Makes sure that preparation, tower and language model agree on patches and crops.

    Raises:
        SchemaError: They do not.
    """
    model, tower = bundle.manifest.model, bundle.manifest.graphs[VISION_ENCODER]
    crops = any(isinstance(step, FillCrops) for step in image.pixels.steps)
    masked = any(t.name == PATCH_MASK for t in tower.inputs)
    if not crops == masked == isinstance(image.layout, CropLines):
        raise SchemaError(
            f"The processors of {bundle.folder} do not fit its graphs: crops, their mask and "
            "their layout need each other."
        )
    grid = isinstance(image.layout, Grid)
    said = {
        "pixels.patches": image.pixels.patches is not None,
        f"{VISION_ENCODER}'s {IMAGE_GRID}": any(t.name == IMAGE_GRID for t in tower.inputs),
        "three position_axes": model.position_axes == 3,
    }
    wrong = [name for name, there in said.items() if there != grid]
    if wrong or (model.deepstack > 0) != any(t.name == DEEPSTACK for t in tower.outputs):
        raise SchemaError(
            f"The processors of {bundle.folder} do not fit its graphs: layout "
            f"'{'grid' if grid else 'of tiles'}' against {', '.join(wrong) or DEEPSTACK}."
        )
