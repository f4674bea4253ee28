"""A graph that multiplies 8-bit values by an 8-bit matrix: what the integer peak is measured with.

Written byte by byte (field numbers from onnx.proto, IR version 8): a device has no onnx package.
"""

from __future__ import annotations

_UINT8, _INT8, _INT32 = 2, 3, 6
_IR_VERSION, _OPSET = 8, 17


def integer_product(width: int) -> bytes:
    """A serialized ModelProto: ``left`` (n, width) uint8 times a matrix of ones, int32.

    Args:
        width: Rows and columns of the matrix, which stands in the graph as weights do.
    """
    matrix = b"".join(
        (_whole(1, width), _whole(1, width), _whole(2, _INT8), _text(8, "right"))
    ) + _part(9, b"\x01" * (width * width))
    node = _text(1, "left") + _text(1, "right") + _text(2, "product") + _text(4, "MatMulInteger")
    graph = b"".join(
        (
            _part(1, node),
            _text(2, "integer_product"),
            _part(5, matrix),
            _part(11, _value("left", _UINT8, width)),
            _part(12, _value("product", _INT32, width)),
        )
    )
    return _whole(1, _IR_VERSION) + _part(7, graph) + _part(8, _text(1, "") + _whole(2, _OPSET))


def _value(name: str, element: int, width: int) -> bytes:
    """A ValueInfoProto of shape (rows, width)."""
    shape = _part(1, _text(2, "rows")) + _part(1, _whole(1, width))
    return _text(1, name) + _part(2, _part(1, _whole(1, element) + _part(2, shape)))


def _text(number: int, text: str) -> bytes:
    return _part(number, text.encode())


def _part(number: int, data: bytes) -> bytes:
    """A field of bytes: text, or a message within this one."""
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _whole(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; all but the last have the highest bit set."""
    data = bytearray()
    while value > 127:
        data.append(value & 127 | 128)
        value >>= 7
    return bytes([*data, value])
