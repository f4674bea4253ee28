"""Finds the weight files an ONNX graph points to, before ONNX Runtime opens any of them.

Reads just enough of the file (field numbers from onnx.proto, ONNX IR version 10) to reach every
``TensorProto.external_data``, and looks into no message that cannot hold one.
"""

from __future__ import annotations

from collections.abc import Iterator

from edge_safe.errors import BundleError
from edge_safe.runtime.wire_format import read_fields

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
_LOCATION = b"location"

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
        entry = {n: bytes(value) for n, value in read_fields(data) if not isinstance(value, int)}
        if entry.get(_KEY) == _LOCATION:
            yield entry.get(_VALUE, b"").decode("utf-8")
        return
    for number, value in read_fields(data):
        inner = _FIELDS[message].get(number)
        # Text stands in a message as it is: where the key does not, there is no such entry.
        if inner is not None and not isinstance(value, int) and _LOCATION in bytes(value):
            yield from _walk(value, inner, depth + 1)
