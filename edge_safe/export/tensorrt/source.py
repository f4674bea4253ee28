"""Reads a graph that stands in files: its nodes, and its weights one at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

Array = npt.NDArray[Any]

# Initializers of at most so many bytes are shapes and constants: they stay in the graph's file.
SMALL = 4096


class Source:
    """A graph whose weights are read when they are asked for.

    Attributes:
        graph: The graph, without its weights.
        opset: Version of the standard operators.
    """

    def __init__(self, path: Path) -> None:
        self._folder = path.parent
        model = onnx.load(str(path), load_external_data=False)
        self.graph = model.graph
        self.opset = next(entry.version for entry in model.opset_import if not entry.domain)
        self._tensors: dict[str, onnx.TensorProto] = {}

    def index(self) -> None:
        """Takes note of the initializers, those of branches that were inlined included."""
        self._tensors = {tensor.name: tensor for tensor in self.graph.initializer}

    def has(self, name: str) -> bool:
        """Whether a value is an initializer."""
        return name in self._tensors

    def is_small(self, name: str) -> bool:
        """Whether an initializer stands in the graph's own file and is small."""
        tensor = self._tensors[name]
        return (
            tensor.data_location != onnx.TensorProto.EXTERNAL
            and len(tensor.SerializeToString()) <= SMALL
        )

    def tensor(self, name: str) -> onnx.TensorProto:
        """An initializer as it stands in the file."""
        return self._tensors[name]

    def array(self, name: str) -> Array:
        """The numbers of an initializer."""
        tensor = self._tensors[name]
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            return numpy_helper.to_array(tensor)
        place = {entry.key: entry.value for entry in tensor.external_data}
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
        values: Array = np.fromfile(
            self._folder / place["location"],
            dtype=dtype,
            offset=int(place.get("offset", 0)),
            count=int(np.prod(tensor.dims, dtype=np.int64)),
        )
        return values.reshape(tuple(tensor.dims))

    def dtype(self, name: str) -> int:
        """ONNX element type of an initializer."""
        return int(self._tensors[name].data_type)
