"""The shared weights file: tensors go in one by one, equal ones are stored once."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt
import onnx

# Large tensors start on a page, so that several sessions map the same pages of the file.
PAGE = 4096
SMALL = 64


@dataclass(frozen=True, slots=True)
class Stored:
    """Where one tensor's bytes stand in the weights file.

    Attributes:
        file: Name of the weights file, beside the graphs.
        offset: First byte.
        length: Number of bytes.
        dtype: numpy dtype of the elements.
        shape: Shape it was stored with; a graph may view the same bytes with another one.
    """

    file: str
    offset: int
    length: int
    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]

    def proto(self, name: str, shape: Sequence[int] | None = None) -> onnx.TensorProto:
        """An initializer that points here."""
        proto = onnx.TensorProto()
        proto.name = name
        proto.data_type = onnx.helper.np_dtype_to_tensor_dtype(self.dtype)
        proto.dims.extend(self.shape if shape is None else shape)
        proto.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (
            ("location", self.file),
            ("offset", self.offset),
            ("length", self.length),
        ):
            entry = proto.external_data.add()
            entry.key, entry.value = key, str(value)
        return proto


class WeightStore:
    """Writes tensors to one file as they come; nothing but their hashes stays in memory.

    Use as a context manager, which closes the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # Unbuffered: some graphs take small tensors back while others are still added.
        self._file = path.open("wb", buffering=0)
        self._known: dict[bytes, Stored] = {}

    def __enter__(self) -> WeightStore:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def add(self, array: npt.NDArray[np.generic]) -> Stored:
        """Stores a tensor, unless equal bytes of the same type and shape are there already."""
        data = np.ascontiguousarray(array)
        digest = hashlib.sha256(f"{data.dtype.str}{data.shape}".encode())
        # numpy shows bfloat16 to nobody but as bytes.
        raw = data.reshape(-1).view(np.uint8)
        digest.update(raw.data)
        key = digest.digest()
        if key not in self._known:
            align = PAGE if data.nbytes >= 16 * PAGE else SMALL
            start = -(-self._file.tell() // align) * align
            self._file.write(b"\0" * (start - self._file.tell()))
            self._file.write(raw.data)
            self._known[key] = Stored(self.path.name, start, data.nbytes, data.dtype, data.shape)
        return self._known[key]
