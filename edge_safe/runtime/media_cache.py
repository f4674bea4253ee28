"""Pictures and sounds that were encoded before are not encoded again.

Kept are the embeddings of each medium, by a hash of what was handed over; the gate judges a request
that holds them as any other.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future, TimeoutError
from functools import partial
from os import PathLike
from pathlib import Path

import numpy as np

from edge_safe.runtime.deadline import Deadline
from edge_safe.runtime.families.base import Media, Prepared, Towers
from edge_safe.runtime.image_io import read_image
from edge_safe.runtime.inputs import Inputs
from edge_safe.runtime.media import AudioInput, ImageInput, Kind
from edge_safe.runtime.tokens import Piece

# Seconds between two looks at a deadline while another request encodes.
_LOOK = 0.05


class MediaCache:
    """Towers that remember, the least recently used out first. Shared between threads.

    What several requests hand over at once is encoded by one of them.

    Args:
        towers: What encodes.
        limit: Bytes it may hold.
    """

    def __init__(self, towers: Towers, limit: int) -> None:
        self.placeholders: Mapping[str, str] = towers.placeholders
        self._towers = towers
        self._limit = limit
        self._kept: OrderedDict[bytes, tuple[Media, int]] = OrderedDict()
        # None comes out where the one that encoded has nothing to share.
        self._under_way: dict[bytes, Future[Media | None]] = {}
        self._lock = threading.Lock()

    @property
    def size(self) -> int:
        """Bytes held."""
        with self._lock:
            return sum(size for _, size in self._kept.values())

    def variant(self, kind: Kind, images: int) -> str:
        """See ``Towers.variant``."""
        return self._towers.variant(kind, images)

    def image(self, source: ImageInput, variant: str) -> Prepared:
        """See ``Towers.image``; one that is kept, or that another request encodes, is not read."""
        # Their pixels alone do not say how PIL images are shown.
        if not isinstance(source, str | PathLike | bytes | np.ndarray):
            source = read_image(source)
        key = partial(_key, f"image {variant}", source)
        return self._prepared(key, partial(self._towers.image, source, variant))

    def sound(self, source: AudioInput, variant: str) -> Prepared:
        """See ``Towers.sound`` and ``image``."""
        key = partial(_key, f"audio {variant}", source)
        return self._prepared(key, partial(self._towers.sound, source, variant))

    def _prepared(
        self, make_key: Callable[[], bytes | None], prepare: Callable[[], Prepared]
    ) -> Prepared:
        """A medium that is looked up first."""
        key = make_key()
        if key is None:
            return prepare()
        with self._lock:
            kept, under_way = self._find(key), key in self._under_way
        if kept is not None:
            return Prepared(kept.tokens, lambda _: kept)
        if under_way:
            return Prepared(0, partial(self._encode_once, key, make_key, prepare))
        prepared = prepare()
        return Prepared(
            prepared.tokens, partial(self._encode_once, key, make_key, lambda: prepared)
        )

    def _encode_once(
        self,
        key: bytes,
        make_key: Callable[[], bytes | None],
        prepare: Callable[[], Prepared],
        deadline: Deadline | None,
    ) -> Media:
        """Waits for the request that encodes a medium by now, or encodes it for all of them."""
        while True:
            with self._lock:
                kept, other = self._find(key), self._under_way.get(key)
                if kept is not None:
                    return kept
                if other is None:
                    own: Future[Media | None] = Future()
                    self._under_way[key] = own
                    break
            shared = _wait(other, deadline)
            if shared is not None:
                return shared
        shared = None
        try:
            found = prepare().encode(deadline)
            # A file that somebody wrote to meanwhile may be another one than that which was read.
            if make_key() == key:
                shared = found
                self._keep(key, found)
            return found
        finally:
            with self._lock:
                del self._under_way[key]
            own.set_result(shared)

    def _find(self, key: bytes) -> Media | None:
        """What is kept, which was just used then; the caller holds the lock."""
        if key not in self._kept:
            return None
        self._kept.move_to_end(key)
        return self._kept[key][0]

    def _keep(self, key: bytes, media: Media) -> None:
        size = _size(media)
        if size > self._limit:
            return
        with self._lock:
            self._kept[key] = media, size
            self._kept.move_to_end(key)
            while sum(one for _, one in self._kept.values()) > self._limit:
                self._kept.popitem(last=False)


def _wait(other: Future[Media | None], deadline: Deadline | None) -> Media | None:
    """What another request makes of a medium.

    Raises:
        GateError: The deadline of this one passed.
    """
    while True:
        if deadline is not None:
            deadline.check()
        try:
            return other.result(_LOOK)
        except TimeoutError:
            continue


def _key(way: str, medium: object) -> bytes | None:
    """Hash of what was handed over; None where a file cannot be read, which its reader will say."""
    digest = hashlib.sha256(f"{way}:".encode())
    try:
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


def _size(media: Media) -> int:
    pieces: list[Piece] = [piece for placed in media.placed for piece in placed.pieces]
    arrays = [*media.features]
    for piece in pieces:
        if isinstance(piece, Inputs):
            arrays += [piece.rows, piece.places, piece.deepstack]
        elif isinstance(piece, np.ndarray):
            arrays.append(piece)
    return sum(array.nbytes for array in arrays)
