"""A checkpoint's tensors under the names and in the form that its model has them in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from edge_safe.errors import ExportError
from edge_safe.export.checkpoint.adapter import Adapter, is_adapter, weights_folder
from edge_safe.export.checkpoint.four_bit import FourBitTensors, four_bit_config
from edge_safe.export.checkpoint.shards import Shards
from edge_safe.export.packing import FloatArray, Lattice

EMBEDDING = "model.embed_tokens.weight"
OUTPUT = "lm_head.weight"


class CheckpointReader:
    """Reads one tensor at a time: adapters are merged and packed layers unpacked on the way.

    Attributes:
        plain: Whether the files hold the weights just as the model has them.
    """

    def __init__(self, folder: Path, config: Any) -> None:
        """Finds everything; no weights are read.

        Args:
            folder: A model's or an adapter's folder.
            config: The model's configuration.

        Raises:
            ExportError: Something is missing or of a kind that cannot be read.
        """
        self._shards = Shards(weights_folder(folder))
        packed = four_bit_config(config)
        self._packed = None if packed is None else FourBitTensors(self._shards, packed)
        self._adapter = Adapter(folder) if is_adapter(folder) else None
        self._tied = bool(config.tie_word_embeddings)
        self.plain = self._packed is None and self._adapter is None
        targets = [] if self._adapter is None else sorted(self._adapter.targets())
        if self._tied and {EMBEDDING, OUTPUT} & set(targets):
            raise ExportError(
                f"The adapter {folder} changes the embedding of a model that shares it with "
                "lm_head, and peft takes the two apart. Merge with peft's merge_and_unload and "
                "export that."
            )
        for name in targets:
            if not self._has(name):
                raise ExportError(
                    f"The adapter {folder} changes {name}, which its base model does not have."
                )

    def tensor(self, name: str) -> FloatArray:
        """Reads a tensor as float32.

        Raises:
            ExportError: There is none of that name.
        """
        found: FloatArray = self.read(name).float().contiguous().numpy()
        return found

    def read(self, name: str) -> torch.Tensor:
        """Reads a tensor in the type it comes in.

        Raises:
            ExportError: There is none of that name.
        """
        if name == OUTPUT and self._tied and not self._has(name):
            name = EMBEDDING
        if self._adapter is not None:
            return self._adapter.apply(name, self._base)
        return self._base(name)

    def lattice(self, name: str) -> Lattice | None:
        """The 4-bit values of a packed layer, as they are; None for any other."""
        if self._packed is None or self._adapter is not None:
            return None
        return self._packed.lattice(name)

    @property
    def packed(self) -> bool:
        """Whether linear layers come in 4 bits."""
        return self._packed is not None

    def _base(self, name: str) -> torch.Tensor:
        if self._packed is not None and self._packed.holds(name):
            return self._packed.dense(name)
        return self._shards.tensor(name)

    def _has(self, name: str) -> bool:
        return name in self._shards or (self._packed is not None and self._packed.holds(name))


class Float32Weights(Mapping[str, torch.Tensor]):
    """The tensors as torch has them in fp32, read whenever one is asked for."""

    def __init__(self, reader: CheckpointReader, names: list[str]) -> None:
        self._reader = reader
        self._names = names

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._reader.read(name).float()

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
