"""Finds the weight files an ONNX graph points to, before ONNX Runtime opens any of them.

Reads just enough of the protobuf wire format (field numbers from onnx.proto, ONNX IR version 10)
to reach every ``TensorProto.external_data``. Large initializers are skipped over, not copied.
"""

from __future__ import annotations

from collections.abc import Iterator

from edge_safe.errors import BundleError

# Message -> field number -> message of that field. Only the fields that can lead to a tensor.
_FIELDS: dict[str, dict[int, str]] = {
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}

_KEY, _VALUE = 1, 2

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

_MAX_DEPTH = 64


def external_files(model: bytes) -> set[str]:
    """Names of the external data files of a serialized ModelProto, as written in it.

    Raises:
        BundleError: The bytes are not a well-formed protobuf message.
    """
    try:
        return set(_walk(memoryview(model), "model", 0))
    except (IndexError, UnicodeDecodeError) as error:
        raise BundleError(f"The graph is not a well-formed ONNX file: {error}.") from error


def _walk(data: memoryview, message: str, depth: int) -> Iterator[str]:
    """Yields the locations below one message."""
    if depth > _MAX_DEPTH:
        raise BundleError("The graph is nested too deeply to be an ONNX file.")
    if message == "entry":
        entry = {number: bytes(value) for number, value in _fields(data)}
        if entry.get(_KEY) == b"location":
            yield entry.get(_VALUE, b"").decode("utf-8")
        return
    for number, value in _fields(data):
        inner = _FIELDS[message].get(number)
        if inner is not None:
            yield from _walk(value, inner, depth + 1)


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Yields the length-delimited fields of a message and steps over the others."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, kind = tag >> 3, tag & 7
        if kind == _VARINT:
            _, at = _varint(data, at)
        elif kind == _FIXED64:
            at += 8
        elif kind == _FIXED32:
            at += 4
        elif kind == _BYTES:
            length, at = _varint(data, at)
            if at + length > len(data):
                raise IndexError("a field runs past the end")
            yield number, data[at : at + length]
            at += length
        else:
            raise IndexError(f"unknown wire type {kind}")


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """Reads a base-128 number at an offset; returns it and the offset behind it."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise IndexError("a number is too long")
