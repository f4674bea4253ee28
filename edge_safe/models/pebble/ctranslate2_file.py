"""Reads CTranslate2's ``model.bin`` and turns its Whisper encoder into transformers' weights.

The layout was read off CTranslate2's own model loader (binary version 6): little-endian; strings
are a 16-bit length with the closing zero counted; a variable is name, rank, dimensions, type,
byte count, data; aliases name a variable that is stored once. Data only, nothing is executed.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edge_safe.errors import PartsError

BINARY_VERSION = 6
TYPES = {0: "<f4", 1: "<i1", 2: "<i2", 3: "<i4", 4: "<f2"}
HEADS = "encoder/num_heads"

Variables = dict[str, NDArray[np.generic]]


class _Reader:
    """Walks through the bytes of one file and never past their end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = path.read_bytes()
        self.at = 0

    def take(self, count: int) -> bytes:
        end = self.at + count
        if end > len(self.data):
            raise PartsError(f"{self.path} is not a whole CTranslate2 model: it ends too early.")
        piece = self.data[self.at : end]
        self.at = end
        return piece

    def integer(self, form: str) -> int:
        value: int = struct.unpack("<" + form, self.take(struct.calcsize("<" + form)))[0]
        return value

    def text(self) -> str:
        return self.take(self.integer("H")).rstrip(b"\0").decode("utf-8", "replace")


def read_variables(path: Path) -> Variables:
    """Reads every variable of a ``model.bin``, aliases included.

    Raises:
        PartsError: Another binary version, an unknown number type, or a damaged file.
    """
    reader = _Reader(path)
    version = reader.integer("I")
    if version != BINARY_VERSION:
        raise PartsError(
            f"{path} has CTranslate2 binary version {version}; this reader knows {BINARY_VERSION}."
        )
    reader.text()  # the name of the model's specification
    reader.integer("I")  # and its revision: the shapes below say what matters
    variables: Variables = {}
    for _ in range(reader.integer("I")):
        name = reader.text()
        shape = [reader.integer("I") for _ in range(reader.integer("B"))]
        kind = reader.integer("B")
        data = reader.take(reader.integer("I"))
        if kind not in TYPES:
            raise PartsError(f"{path}: variable {name!r} has the unknown number type {kind}.")
        array = np.frombuffer(data, TYPES[kind])
        if array.size != int(np.prod(shape)):
            raise PartsError(f"{path}: variable {name!r} has {array.size} numbers for {shape}.")
        variables[name] = array.reshape(shape)
    for _ in range(reader.integer("I")):
        alias = reader.text()
        variables[alias] = variables[reader.text()]
    return variables


def whisper_encoder_weights(variables: Variables) -> dict[str, Tensor]:
    """Renames a Whisper encoder's variables into ``transformers.WhisperEncoder``'s state dict.

    Args:
        variables: Of ``read_variables``; those outside ``encoder/`` are not looked at.

    Returns:
        float32 weights.

    Raises:
        PartsError: A variable is missing, or one of the encoder's was not used.
    """
    left = {name for name in variables if name.startswith("encoder/")} - {HEADS}

    def take(name: str) -> Tensor:
        if name not in left:
            raise PartsError(f"The CTranslate2 model has no variable {name!r}.")
        left.remove(name)
        return torch.from_numpy(np.array(variables[name], np.float32))

    weights = {"embed_positions.weight": take("encoder/position_encodings/encodings")}
    for name in ("conv1", "conv2"):
        for kind in ("weight", "bias"):
            weights[f"{name}.{kind}"] = take(f"encoder/{name}/{kind}")

    def norm(ours: str, theirs: str) -> None:
        weights[f"{ours}.weight"] = take(f"{theirs}/gamma")
        weights[f"{ours}.bias"] = take(f"{theirs}/beta")

    def linear(ours: str, theirs: str) -> None:
        weights[f"{ours}.weight"] = take(f"{theirs}/weight")
        weights[f"{ours}.bias"] = take(f"{theirs}/bias")

    layer = 0
    while f"encoder/layer_{layer}/self_attention/linear_0/weight" in left:
        ours, theirs = f"layers.{layer}", f"encoder/layer_{layer}"
        norm(f"{ours}.self_attn_layer_norm", f"{theirs}/self_attention/layer_norm")
        packed = take(f"{theirs}/self_attention/linear_0/weight").chunk(3)
        biases = take(f"{theirs}/self_attention/linear_0/bias").chunk(3)
        for part, weight, bias in zip(("q", "k", "v"), packed, biases, strict=True):
            weights[f"{ours}.self_attn.{part}_proj.weight"] = weight.clone()
            if part != "k":  # Whisper's key has no bias; CTranslate2 stores zeros
                weights[f"{ours}.self_attn.{part}_proj.bias"] = bias.clone()
        linear(f"{ours}.self_attn.out_proj", f"{theirs}/self_attention/linear_1")
        norm(f"{ours}.final_layer_norm", f"{theirs}/ffn/layer_norm")
        linear(f"{ours}.fc1", f"{theirs}/ffn/linear_0")
        linear(f"{ours}.fc2", f"{theirs}/ffn/linear_1")
        layer += 1
    norm("layer_norm", "encoder/layer_norm")
    if left:
        raise PartsError(
            f"Variables of the CTranslate2 encoder were not understood: {sorted(left)}"
        )
    return weights
