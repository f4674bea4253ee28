"""Every family whose chat template marks the places of pictures and sound with a placeholder.

The manifest's ``processors.image`` says how a picture becomes pixel values, where its features
stand, and what surrounds them; ``vision_encoder`` turns pixel values into features. Sound is
``runtime.hearing``'s. Nothing here knows a model.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence

import msgspec
import numpy as np

from edge_safe.errors import GateError, MediaError, PromptError, SchemaError
from edge_safe.runtime.bundle import Bundle
from edge_safe.runtime.deadline import Deadline
from edge_safe.runtime.families.base import Media, Placed
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
from edge_safe.runtime.media import AudioInput, ImageInput
from edge_safe.runtime.prefill import DEEPSTACK
from edge_safe.runtime.session import Array
from edge_safe.runtime.tokens import Tokens

VISION_ENCODER = "vision_encoder"
IMAGE_GRID = "image_grid_thw"
PATCH_MASK = "patch_attention_mask"


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

    def media(
        self,
        images: Sequence[ImageInput],
        audio: AudioInput | None,
        deadline: Deadline | None = None,
    ) -> Media:
        """Embeds the pictures and the sound of one user turn.

        Raises:
            MediaError: They cannot be read, or this bundle cannot judge them.
            PromptError: They do not fit the context.
            GateError: The deadline passed, or a tower gave no usable numbers.
        """
        if isinstance(images, str | bytes):
            raise MediaError("Give the pictures as a list, even a single one.")
        if audio is not None:
            self._require("audio", self._hearing, "sound")
        if len(images):
            self._require("image", self._image, "pictures")
        placed, rows, heard = [], 0, 0
        if self._image is not None:
            steps = self._image.pixels
            if len(images) > 1:
                steps = self._image.pixels_of_several or steps
            for image in images:
                if deadline is not None:
                    deadline.check()
                pixels = pixel_values(read_image(image), steps)
                rows += count_features(self._image.layout, pixels)
                self._check_room(rows)
                placed.append(self._see(pixels, self._image, deadline))
        if audio is not None and self._hearing is not None:
            pieces, heard = self._hearing.hear(audio, rows, deadline)
            placed.append(Placed(self._hearing.part, pieces))
        return Media(placed=placed, image_tokens=rows, audio_tokens=heard)

    def _require(self, kind: str, tower: object, what: str) -> None:
        """Makes sure that the tower of a kind of media is there and may be used.

        Raises:
            MediaError: It is not.
        """
        if tower is None:
            raise MediaError(f"This bundle has no tower for {what}; leave {what} out.")
        if kind not in self._usable:
            raise MediaError(
                f"This bundle's projector of {what} has not been trained, so the gate cannot judge "
                f"{what}. Use a bundle where it is, or ask in words."
            )

    def _check_room(self, rows: int) -> None:
        """Turns too many pictures away before the tower has seen all of them.

        Raises:
            PromptError: They alone do not fit the context.
        """
        limit = self._bundle.manifest.model.context_length
        if rows > limit:
            raise PromptError(
                f"The pictures take {rows} positions or more; this model's context has {limit}. "
                "Leave some out."
            )

    def _see(self, pixels: PixelValues, image: ImageProcessor, deadline: Deadline | None) -> Placed:
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
        return Placed("image", lay_out(layout, pixels, features, deepstack))


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


def open_family(bundle: Bundle, tokens: Tokens, untrained_towers: bool) -> PlaceholderFamily:
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
