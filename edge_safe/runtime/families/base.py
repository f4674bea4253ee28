"""What a family has to offer, and how it is found."""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from edge_safe.errors import BundleError, MediaError
from edge_safe.runtime.bundle import Bundle
from edge_safe.runtime.deadline import Deadline
from edge_safe.runtime.media import AudioInput, ImageInput
from edge_safe.runtime.session import Array
from edge_safe.runtime.tokens import Tokens


@dataclass(frozen=True, slots=True)
class Media:
    """Embeddings that stand in front of a user's text.

    Attributes:
        features: (n, d) float32 arrays in prompt order.
        image_tokens: Rows that stand for pictures.
        audio_tokens: Rows that stand for sound.
    """

    features: list[Array] = field(default_factory=list)
    image_tokens: int = 0
    audio_tokens: int = 0


class Family(Protocol):
    """Turns media into embeddings; one per loaded bundle, shared between threads."""

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

    A text-only family needs no file.

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
    if manifest.family == "base" or not plain or importlib.util.find_spec(module) is None:
        raise BundleError(
            f"This edge-safe cannot prepare pictures or sound for model type '{manifest.family}'. "
            "Upgrade edge-safe."
        )
    family: Family = importlib.import_module(module).open_family(bundle, tokens, untrained_towers)
    return family
