"""The protobuf wire format, as much of it as ONNX files need (a device has no onnx package).

See protobuf.dev, "Encoding". Fields come as views of the bytes; nothing large is copied.
"""

from __future__ import annotations

from collections.abc import Iterator

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_LONGEST_SHIFT = 63


def read_fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Yields number and value of each field: integers, and messages or text as views.

    Fields of fixed width are stepped over.

    Raises:
        IndexError: The bytes are not a well-formed message.
    """
    at = 0
    while at < len(data):
        tag, at = _read_varint(data, at)
        number, kind = tag >> 3, tag & 7
        if kind == _VARINT:
            value, at = _read_varint(data, at)
            yield number, value
        elif kind == _FIXED64:
            at += 8
        elif kind == _FIXED32:
            at += 4
        elif kind == _BYTES:
            length, at = _read_varint(data, at)
            if at + length > len(data):
                raise IndexError("a field runs past the end")
            yield number, data[at : at + length]
            at += length
        else:
            raise IndexError(f"unknown wire type {kind}")


def read_packed(data: memoryview) -> Iterator[int]:
    """Integers of a packed field.

    Raises:
        IndexError: The bytes end within a number.
    """
    at = 0
    while at < len(data):
        value, at = _read_varint(data, at)
        yield value


def _read_varint(data: memoryview, at: int) -> tuple[int, int]:
    """Reads a base-128 number at an offset; returns it and the offset behind it."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > _LONGEST_SHIFT:
            raise IndexError("a number is too long")
