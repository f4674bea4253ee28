"""Pictures and sounds that were encoded before are not encoded again.

Kept are the embeddings, by a hash of what was handed over; the gate judges a request that holds
them as any other.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path

import numpy as np

from edge_safe.runtime.deadline import Deadline
from edge_safe.runtime.families.base import Family, Media
from edge_safe.runtime.image_io import read_image
from edge_safe.runtime.inputs import Inputs
from edge_safe.runtime.media import AudioInput, ImageInput
from edge_safe.runtime.tokens import Piece


class MediaCache:
    """A family that remembers, the least recently used out first. Shared between threads.

    The media of a turn are remembered together: how a picture is prepared may depend on how many
    there are.

    Args:
        family: What encodes.
        limit: Bytes it may hold.
    """

    def __init__(self, family: Family, limit: int) -> None:
        self.placeholders: Mapping[str, str] = family.placeholders
        self._family = family
        self._limit = limit
        self._kept: OrderedDict[bytes, tuple[Media, int]] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def size(self) -> int:
        """Bytes held."""
        with self._lock:
            return sum(size for _, size in self._kept.values())

    def media(
        self,
        images: Sequence[ImageInput],
        audio: AudioInput | None,
        deadline: Deadline | None = None,
    ) -> Media:
        """See ``Family.media``."""
        if isinstance(images, str | bytes) or not (len(images) or audio is not None):
            return self._family.media(images, audio, deadline)
        images = [_decoded(image) for image in images]
        key = _key(images, audio)
        if key is None:
            return self._family.media(images, audio, deadline)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return _copy(self._kept[key][0])
        found = self._family.media(images, audio, deadline)
        # A file that somebody wrote to meanwhile may be another one than that which was read.
        if _key(images, audio) == key:
            self._keep(key, found)
        return _copy(found)

    def _keep(self, key: bytes, media: Media) -> None:
        size = _size(media)
        if size > self._limit:
            return
        with self._lock:
            self._kept[key] = media, size
            self._kept.move_to_end(key)
            while sum(one for _, one in self._kept.values()) > self._limit:
                self._kept.popitem(last=False)


def _decoded(image: ImageInput) -> ImageInput:
    """PIL images as arrays, for their pixels alone do not say how they are shown."""
    if isinstance(image, str | PathLike | bytes | np.ndarray):
        return image
    return read_image(image)


def _key(images: Sequence[ImageInput], audio: AudioInput | None) -> bytes | None:
    """Hash of what was handed over; None where a file cannot be read, which its reader will say."""
    digest = hashlib.sha256()
    try:
        for medium in (*images, b"" if audio is None else audio):
            _add(digest, medium)
    except (OSError, TypeError, ValueError):
        return None
    return digest.digest()


def _add(digest: hashlib._Hash, medium: object) -> None:
    if isinstance(medium, tuple):
        digest.update(f"{len(medium)}(".encode())
        for part in medium:
            _add(digest, part)
    elif isinstance(medium, np.ndarray):
        digest.update(f"{medium.dtype.str}{medium.shape}".encode())
        digest.update(np.ascontiguousarray(medium).data)
    elif isinstance(medium, int | np.integer):
        digest.update(f"int {medium}".encode())
    else:
        data = medium if isinstance(medium, bytes) else Path(str(medium)).read_bytes()
        digest.update(f"{len(data)} bytes ".encode())
        digest.update(data)


def _copy(media: Media) -> Media:
    """The same arrays in lists of its own."""
    return replace(media, features=list(media.features), placed=list(media.placed))


def _size(media: Media) -> int:
    pieces: list[Piece] = [piece for placed in media.placed for piece in placed.pieces]
    arrays = [*media.features]
    for piece in pieces:
        if isinstance(piece, Inputs):
            arrays += [piece.rows, piece.places, piece.deepstack]
        elif isinstance(piece, np.ndarray):
            arrays.append(piece)
    return sum(array.nbytes for array in arrays)
