"""What a family has to offer, and how it is found.

A family's file offers ``Towers``, which encode one medium at a time; ``MediaEncoder`` makes a
``Family`` of them, which encodes all media of a turn.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from edge_safe.errors import BundleError, MediaError
from edge_safe.runtime.bundle import Bundle
from edge_safe.runtime.deadline import Deadline
from edge_safe.runtime.media import AudioInput, ImageInput, Kind
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
    """The pictures and the sound of one user turn, or one of them.

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

    @property
    def tokens(self) -> int:
        """Rows of all of them."""
        return self.image_tokens + self.audio_tokens


def joined(media: Iterable[Media]) -> Media:
    """Media one after the other, in lists of their own."""
    whole = Media()
    for one in media:
        whole = Media(
            whole.features + one.features,
            whole.image_tokens + one.image_tokens,
            whole.audio_tokens + one.audio_tokens,
            whole.placed + one.placed,
        )
    return whole


@dataclass(frozen=True, slots=True)
class Prepared:
    """A medium that was read, ready for its towers.

    Attributes:
        tokens: Rows that will stand for it, as far as they are known by now.
        encode: Runs the towers; the deadline ends long work early. Raises ``MediaError`` where the
            bundle cannot judge what it finds, and ``GateError`` where the deadline passed or a
            tower gave no usable numbers.
    """

    tokens: int
    encode: Callable[[Deadline | None], Media]


class Towers(Protocol):
    """Encode one medium at a time; one set per loaded bundle, shared between threads.

    Attributes:
        placeholders: See ``Family``.
    """

    placeholders: Mapping[str, str]

    def variant(self, kind: Kind, images: int) -> str:
        """Names the way in which media of a kind are encoded in a turn.

        It is all that a medium's embeddings depend on but the medium itself.

        Args:
            kind: The kind.
            images: How many pictures the turn has.

        Raises:
            MediaError: This bundle cannot judge the kind.
        """

    def image(self, source: ImageInput, variant: str) -> Prepared:
        """Reads a picture; no tower runs yet.

        Raises:
            MediaError: It cannot be read.
        """

    def sound(self, source: AudioInput, variant: str) -> Prepared:
        """Reads a sound; no tower runs yet.

        Raises:
            MediaError: It cannot be read.
        """


class Family(Protocol):
    """Turns the media of a turn into embeddings; one per bundle, shared between threads.

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
            PromptError: They do not fit the context.
            GateError: The deadline passed, or a tower gave no usable numbers.
        """


class TextOnly:
    """No towers."""

    def __init__(self, name: str) -> None:
        self.placeholders: Mapping[str, str] = {}
        self._refusal = (
            f"This bundle ('{name}') reads text only; leave the media out or use a "
            "bundle that has towers for them."
        )

    def variant(self, kind: Kind, images: int) -> str:
        """Refuses whatever it is."""
        raise MediaError(self._refusal)

    def image(self, source: ImageInput, variant: str) -> Prepared:
        """Refuses it."""
        raise MediaError(self._refusal)

    def sound(self, source: AudioInput, variant: str) -> Prepared:
        """Refuses it."""
        raise MediaError(self._refusal)


def open_towers(bundle: Bundle, tokens: Tokens, untrained_towers: bool) -> Towers:
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
    towers: Towers = importlib.import_module(module).open_towers(bundle, tokens, untrained_towers)
    return towers
