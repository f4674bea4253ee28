"""A conversation as a file: what was said, and the states that were computed of it.

The file holds no verdict: the next turn is judged as if the conversation had never been put away.
It belongs to the very bundle it was made with. Its hash finds damage, not malice: whoever may
write it may put words into the model's memory, so it deserves the protection of the bundle itself.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from edge_safe.errors import BundleError, IntegrityError
from edge_safe.runtime.calibration import Modality
from edge_safe.runtime.families.base import Placed
from edge_safe.runtime.inputs import Inputs
from edge_safe.runtime.manifest import Manifest, dump_manifest
from edge_safe.runtime.prompt import Message
from edge_safe.runtime.session import Array
from edge_safe.runtime.state import State
from edge_safe.runtime.tokens import Piece, Trusted, Untrusted

VERSION = 1
_HEADER = "conversation"
_HASH = "sha256"


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of what the header is made of; numbers stand for the file's arrays."""


class _Piece(_Record, frozen=True):
    kind: Literal["trusted", "untrusted", "array", "inputs"]
    text: str = ""
    arrays: tuple[int, ...] = ()


class _Placed(_Record, frozen=True):
    kind: str
    pieces: tuple[_Piece, ...]


class _Message(_Record, frozen=True):
    role: str
    content: tuple[_Piece, ...]
    media: tuple[_Placed, ...]
    image_tokens: int
    audio_tokens: int
    modality: Modality


class _Turn(_Record, frozen=True):
    messages: tuple[_Message, ...]
    modality: Modality
    columns: int | None


class _Header(_Record, frozen=True):
    version: int
    bundle: str
    system: tuple[_Message, ...]
    turns: tuple[_Turn, ...]
    pending: tuple[int, ...]
    length: int
    lags: tuple[tuple[int, int], ...]
    caches: tuple[int, ...]
    columns: int | None


@dataclass(slots=True)
class Turn:
    """One past turn: answered, or refused with the columns the gate keeps of it.

    Attributes:
        messages: What the model has seen; nothing of a refused turn.
        modality: The way in, which counts as long as the gate sees the turn.
        columns: The gate's, of a refused turn.
    """

    messages: list[Message]
    modality: Modality
    columns: Array | None = None


@dataclass(slots=True)
class Conversation:
    """All that a conversation is between two turns.

    Attributes:
        system: The system message, if there is one.
        turns: What was said since.
        pending: (n,) ids of the last answer that no cache holds yet.
        state: The caches.
    """

    system: list[Message]
    state: State
    turns: list[Turn] = field(default_factory=list)
    pending: list[int] = field(default_factory=list)


def save(path: Path, conversation: Conversation, manifest: Manifest) -> None:
    """Writes a conversation, or leaves what was there.

    Raises:
        OSError: The file cannot be written.
    """
    arrays: list[Array] = []

    def put(array: Array) -> int:
        arrays.append(array)
        return len(arrays) - 1

    cache, columns = conversation.state.cache, conversation.state.columns
    header = _Header(
        VERSION,
        _fingerprint(manifest),
        tuple(_message(message, put) for message in conversation.system),
        tuple(
            _Turn(
                tuple(_message(message, put) for message in turn.messages),
                turn.modality,
                None if turn.columns is None else put(turn.columns),
            )
            for turn in conversation.turns
        ),
        tuple(conversation.pending),
        cache.length,
        cache.lags,
        tuple(map(put, cache.copy(range(manifest.model.layers), cache.length))),
        None if columns is None else put(columns.view()),
    )
    members: dict[str, Any] = {str(number): array for number, array in enumerate(arrays)}
    members[_HEADER] = np.frombuffer(msgspec.json.encode(header), np.uint8)
    members[_HASH] = _hash(members)
    handle, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, **members)
            file.flush()
            os.fsync(file.fileno())
        Path(part).replace(path)
    except BaseException:
        Path(part).unlink()
        raise


def load(path: Path, state: State, manifest: Manifest) -> Conversation:
    """Reads a conversation.

    Args:
        path: The file.
        state: Empty caches, which are filled.
        manifest: Of the bundle that is to go on with it.

    Raises:
        BundleError: There is no such file, or another bundle or version wrote it.
        IntegrityError: It is damaged, half-written or no conversation.
    """
    advice = "Begin a new conversation, or restore the file."
    try:
        with np.load(path, allow_pickle=False) as file:
            members = {name: file[name] for name in file.files}
        found = members.pop(_HASH)
        if not np.array_equal(found, _hash(members)):
            raise ValueError("its hash does not fit its contents")
        header = msgspec.json.decode(members[_HEADER].tobytes(), type=_Header)
    except FileNotFoundError as error:
        raise BundleError(f"There is no conversation at {path}.") from error
    except Exception as error:
        # Damaged headers make zipfile, zlib and numpy's parser raise almost anything.
        raise IntegrityError(f"{path} is no whole conversation: {error}. {advice}") from error
    if header.version != VERSION:
        raise BundleError(
            f"{path} has version {header.version} of conversations, this edge-safe reads {VERSION}."
        )
    if header.bundle != _fingerprint(manifest):
        raise BundleError(
            f"{path} was made with another bundle than {manifest.name}, whose states it holds. "
            "Go on with that bundle, or begin a new conversation."
        )
    try:
        return _restored(header, members, state)
    except (ValueError, KeyError, IndexError) as error:
        raise IntegrityError(f"{path} does not fit its bundle: {error}. {advice}") from error


def _restored(header: _Header, members: Mapping[str, Array], state: State) -> Conversation:
    def get(number: int) -> Array:
        return members[str(number)]

    state.cache.restore([get(number) for number in header.caches], header.length, header.lags)
    if (state.columns is None) != (header.columns is None):
        raise ValueError("it lacks what its bundle's gate has seen")
    if state.columns is not None and header.columns is not None:
        state.columns.append(get(header.columns))
    return Conversation(
        [_unpacked(message, get) for message in header.system],
        state,
        [
            Turn(
                [_unpacked(message, get) for message in turn.messages],
                turn.modality,
                None if turn.columns is None else get(turn.columns),
            )
            for turn in header.turns
        ],
        list(header.pending),
    )


def _message(message: Message, put: Callable[[Array], int]) -> _Message:
    return _Message(
        message.role,
        tuple(_piece(piece, put) for piece in message.content),
        tuple(
            _Placed(medium.kind, tuple(_piece(piece, put) for piece in medium.pieces))
            for medium in message.media
        ),
        message.image_tokens,
        message.audio_tokens,
        message.modality,
    )


def _piece(piece: Piece, put: Callable[[Array], int]) -> _Piece:
    if isinstance(piece, Trusted):
        return _Piece("trusted", piece.text)
    if isinstance(piece, Untrusted):
        return _Piece("untrusted", piece.text)
    if isinstance(piece, Inputs):
        return _Piece("inputs", arrays=tuple(map(put, (piece.rows, piece.places, piece.deepstack))))
    return _Piece("array", arrays=(put(piece),))


def _unpacked(message: _Message, get: Callable[[int], Array]) -> Message:
    return Message(
        message.role,
        _pieces(message.content, get),
        [Placed(medium.kind, _pieces(medium.pieces, get)) for medium in message.media],
        message.image_tokens,
        message.audio_tokens,
        message.modality,
    )


def _pieces(pieces: Sequence[_Piece], get: Callable[[int], Array]) -> list[Piece]:
    made: list[Piece] = []
    for piece in pieces:
        if piece.kind == "trusted":
            made.append(Trusted(piece.text))
        elif piece.kind == "untrusted":
            made.append(Untrusted(piece.text))
        elif piece.kind == "inputs":
            rows, places, deepstack = map(get, piece.arrays)
            made.append(Inputs(rows, places, deepstack))
        else:
            (array,) = map(get, piece.arrays)
            made.append(array)
    return made


def _fingerprint(manifest: Manifest) -> str:
    """What a bundle is, its weights' hashes included, and how it was calibrated."""
    return hashlib.sha256(dump_manifest(manifest)).hexdigest()


def _hash(members: Mapping[str, Array]) -> Array:
    """(32,) uint8 sha256 of all names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(members):
        array = np.ascontiguousarray(members[name])
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.data)
    return np.frombuffer(digest.digest(), np.uint8)
