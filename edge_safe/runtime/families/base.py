"""What a family has to offer, and how it is found."""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from edge_safe.errors import BundleError, MediaError
from edge_safe.runtime.bundle import Bundle
from edge_safe.runtime.deadline import Deadline
from edge_safe.runtime.media import AudioInput, ImageInput
from edge_safe.runtime.session import Array
from edge_safe.runtime.tokens import Piece, Tokens

PLACEHOLDERS = "placeholders"
# Files of this package that are no family.
HELPERS = ("base", PLACEHOLDERS)


@dataclass(frozen=True, slots=True)
class Placed:
    """One picture or sound that has a place of its own in the chat template.

    Attributes:
        kind: Type of the part that the template is given, ``image`` say.
        pieces: What stands there instead of the placeholder: the bundle's own markers, and
            embeddings (n, d).
    """

    kind: str
    pieces: list[Piece]


@dataclass(frozen=True, slots=True)
class Media:
    """The pictures and the sound of one user turn.

    Attributes:
        features: (n, d) float32 arrays in front of the user's text, where the template has no
            places for media.
        image_tokens: Rows that stand for pictures.
        audio_tokens: Rows that stand for sound.
        placed: What stands at the template's places, in their order.
    """

    features: list[Array] = field(default_factory=list)
    image_tokens: int = 0
    audio_tokens: int = 0
    placed: list[Placed] = field(default_factory=list)


class Family(Protocol):
    """Turns media into embeddings; one per loaded bundle, shared between threads.

    Attributes:
        placeholders: By type of part, what the chat template writes in the place of a medium;
            empty where media stand in front of the text.
    """

    placeholders: Mapping[str, str]

    def media(
        self,
        images: Sequence[ImageInput],
        audio: AudioInput | None,
        deadline: Deadline | None = None,
    ) -> Media:
        """Embeds the pictures and the sound of one user turn.

        Args:
            images: The pictures.
            audio: The sound.
            deadline: Ends long work early; None never does.

        Raises:
            MediaError: They cannot be read, or this bundle cannot judge them.
            GateError: The deadline passed, or a tower gave no usable numbers.
        """


class TextOnly:
    """A family without towers."""

    def __init__(self, name: str) -> None:
        self.placeholders: Mapping[str, str] = {}
        self._name = name

    def media(
        self,
        images: Sequence[ImageInput],
        audio: AudioInput | None,
        deadline: Deadline | None = None,
    ) -> Media:
        """Refuses everything but text."""
        if len(images) or audio is not None:
            raise MediaError(
                f"This bundle ('{self._name}') reads text only; leave the media out or use a "
                "bundle that has towers for them."
            )
        return Media()


def open_family(bundle: Bundle, tokens: Tokens, untrained_towers: bool) -> Family:
    """Finds the file named by the bundle's family and lets it read its parameters.

    A text-only family needs no file, and neither does one whose parameters are those of
    ``placeholders``.

    Args:
        bundle: The bundle.
        tokens: Its tokenizer.
        untrained_towers: Also uses towers whose projector was never trained.

    Raises:
        BundleError: This version has no processing for the family's media.
    """
    manifest = bundle.manifest
    if not manifest.modalities:
        return TextOnly(manifest.name)
    module = f"edge_safe.runtime.families.{manifest.family}"
    plain = re.fullmatch(r"[a-z][a-z0-9_]*", manifest.family)
    if manifest.family in HELPERS or not plain or importlib.util.find_spec(module) is None:
        module = f"edge_safe.runtime.families.{PLACEHOLDERS}"
        known = not {"image", "audio"}.isdisjoint(manifest.processors)
    else:
        known = True
    if not known:
        raise BundleError(
            f"This edge-safe cannot prepare pictures or sound for model type '{manifest.family}'. "
            "Upgrade edge-safe."
        )
    family: Family = importlib.import_module(module).open_family(bundle, tokens, untrained_towers)
    return family
