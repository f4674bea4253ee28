"""The 4-bit layouts of GPTQ and AWQ checkpoints, unpacked to the values they hold.

Both keep weight = (value - zero) * scale with groups along the inputs. GPTQ packs eight inputs of
an output into an int32, AWQ ("gemm") eight outputs of an input, in an order of its own. GPTQ's
first format stores zeros less 1, modulo 16.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from edge_safe.errors import ExportError
from edge_safe.export.checkpoint.shards import Shards
from edge_safe.export.packing import FloatArray, Lattice

IntArray = npt.NDArray[np.uint8]

# Output within eight that each half byte of AWQ's int32 holds, the lowest first.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
GPTQ_ORDER = tuple(range(8))
# Blocks that MatMulNBits has.
BLOCKS = (16, 32, 64, 128, 256)


class FourBit(msgspec.Struct, frozen=True):
    """What has to be known of ``quantization_config``; other fields are of no account here.

    Attributes:
        quant_method: Whose layout.
        bits: Bits of a value.
        checkpoint_format: Of GPTQ: ``gptq`` stores zeros less 1, ``gptq_v2`` as they are.
        version: Of AWQ.
    """

    quant_method: Literal["gptq", "awq"]
    bits: int = 4
    checkpoint_format: str = "gptq"
    version: str = "gemm"


def four_bit_config(config: Any) -> FourBit | None:
    """Reads the ``quantization_config`` of a model's configuration, None without one.

    Raises:
        ExportError: It is of a kind that cannot be unpacked.
    """
    raw = getattr(config, "quantization_config", None)
    if raw is None:
        return None
    fields = dict(raw) if isinstance(raw, dict) else raw.to_dict()
    try:
        found = msgspec.convert({k: v for k, v in fields.items() if v is not None}, FourBit)
    except msgspec.ValidationError as error:
        raise _refused(fields) from error
    known = ("gptq", "gptq_v2") if found.quant_method == "gptq" else ("gemm",)
    layout = found.checkpoint_format if found.quant_method == "gptq" else found.version.lower()
    if found.bits != 4 or layout not in known:
        raise _refused(fields)
    return found


class FourBitTensors:
    """The packed linear layers of a checkpoint."""

    def __init__(self, shards: Shards, config: FourBit) -> None:
        self._shards = shards
        self._config = config

    def holds(self, name: str) -> bool:
        """Whether ``name`` is the weight of a packed layer."""
        return f"{name.removesuffix('.weight')}.qweight" in self._shards

    def lattice(self, name: str) -> Lattice | None:
        """The (out, in) weight as it was rounded; None where it is not packed or fits no block.

        Groups in an order of their own (``desc_act``) have no place in the kernel's layout.
        """
        if not self.holds(name):
            return None
        values, zeros, scales, groups = self._read(name)
        inputs, count = values.shape[1], zeros.shape[1]
        block = inputs // count
        ordered = groups is None or bool((groups == np.arange(inputs) // block).all())
        if inputs % count or block not in BLOCKS or not ordered:
            return None
        shape = (len(values), count, block)
        return Lattice(values.reshape(shape), scales, zeros.astype(np.float32))

    def dense(self, name: str) -> torch.Tensor:
        """The (out, in) float32 weight."""
        values, zeros, scales, groups = self._read(name)
        if groups is None:
            block = -(-values.shape[1] // zeros.shape[1])
            groups = np.arange(values.shape[1]) // block
        plain = values - zeros.astype(np.float32)[:, groups]
        plain *= scales[:, groups]
        return torch.from_numpy(plain)

    def _read(
        self, name: str
    ) -> tuple[IntArray, IntArray, FloatArray, npt.NDArray[np.int64] | None]:
        """(out, in) values, (out, groups) zeros and scales, and the group of each input."""
        module = name.removesuffix(".weight")
        weight, packed = (
            self._shards.tensor(f"{module}.{part}").numpy() for part in ("qweight", "qzeros")
        )
        scale = self._shards.tensor(f"{module}.scales").float().numpy()
        groups = None
        if self._config.quant_method == "gptq":
            values: IntArray = _unpack(weight.T, GPTQ_ORDER)
            shift = 1 if self._config.checkpoint_format == "gptq" else 0
            found: IntArray = (_unpack(packed, GPTQ_ORDER) + np.uint8(shift)) & np.uint8(15)
            if f"{module}.g_idx" in self._shards:
                groups = self._shards.tensor(f"{module}.g_idx").numpy().astype(np.int64)
        else:
            values = _unpack(weight, AWQ_ORDER).T
            found = _unpack(packed, AWQ_ORDER)
        if len(values) != scale.shape[1] or found.shape != scale.shape:
            raise ExportError(
                f"{module} is packed in another way than quantization_config says: values "
                f"{values.shape}, zeros {found.shape}, scales {scale.shape}."
            )
        return (
            np.ascontiguousarray(values),
            np.ascontiguousarray(found.T),
            np.ascontiguousarray(scale.T, dtype=np.float32),
            groups,
        )


def _unpack(packed: npt.NDArray[np.int32], order: tuple[int, ...]) -> IntArray:
    """(n, m) int32 -> (n, 8 m) values."""
    words = packed.astype(np.int64) & 0xFFFFFFFF
    values = np.empty((*words.shape, 8), np.uint8)
    for place, column in enumerate(order):
        values[..., column] = (words >> (4 * place)) & 15
    return values.reshape(len(words), -1)


def _refused(fields: dict[str, Any]) -> ExportError:
    kind = ", ".join(
        f"{key} {fields[key]!r}"
        for key in ("quant_method", "bits", "checkpoint_format", "version")
        if key in fields
    )
    return ExportError(
        f"The checkpoint is quantized already ({kind}), which the export cannot unpack; it can: "
        "gptq and awq (gemm) of 4 bits. Export the model it was made from."
    )
