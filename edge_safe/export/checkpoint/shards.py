"""safetensors files of a checkpoint folder: one, or shards with an index."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from edge_safe.errors import ExportError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Checkpoints of a bare decoder leave this out of their names.
PREFIX = "model."


class Shards:
    """The tensors of a folder by name.

    A shard is opened for each tensor and closed again: pages of a file that stays mapped would
    count as this process's memory until the whole checkpoint did.
    """

    def __init__(self, folder: Path) -> None:
        """Finds all tensors and proves that every shard is there and readable.

        Raises:
            ExportError: There is no safetensors file, or a shard is missing, damaged, or lacks a
                tensor that the index expects there; the message names it.
        """
        self.folder = folder
        self._files = _locate(folder)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._stored(name) is not None

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def tensor(self, name: str) -> torch.Tensor:
        """Reads one tensor in the type it is stored in.

        Raises:
            ExportError: There is none of that name, or its shard cannot be read any more.
        """
        stored = self._stored(name)
        if stored is None:
            raise ExportError(f"The checkpoint {self.folder} has no tensor {name}.")
        path = self._files[stored]
        try:
            with safe_open(path, framework="pt") as file:
                found: torch.Tensor = file.get_tensor(stored)
                return found
        except (OSError, SafetensorError) as error:
            raise _unreadable(path, error) from error

    def _stored(self, name: str) -> str | None:
        """The name in the files of what transformers calls ``name``."""
        if name in self._files:
            return name
        short = name.removeprefix(PREFIX)
        return short if short in self._files else None


def _locate(folder: Path) -> dict[str, Path]:
    """The file of every tensor."""
    index = folder / INDEX
    if not index.exists():
        path = folder / SINGLE
        if not path.exists():
            raise ExportError(
                f"{folder} has neither {SINGLE} nor {INDEX}. Weights are read from safetensors "
                "alone; save the model again with save_pretrained."
            )
        return dict.fromkeys(_names(path), path)
    try:
        parts: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(parts.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ExportError(f"{index} cannot be read: {error!r}. Fetch it again.") from error
    held = {}
    for shard in shards:
        path = folder / shard
        if not path.is_file():
            raise ExportError(
                f"{folder} lacks the shard {shard}, which {INDEX} names "
                f"({shards.index(shard) + 1} of {len(shards)}). Fetch it again."
            )
        held[shard] = _names(path)
    for name, shard in parts.items():
        if name not in held[shard]:
            raise ExportError(
                f"{folder / shard} lacks the tensor {name}, which {INDEX} puts there."
            )
    return {name: folder / shard for name, shard in parts.items()}


def _names(path: Path) -> set[str]:
    """Names of the tensors of a file; its header is checked against its length."""
    try:
        with safe_open(path, framework="pt") as file:
            return set(file.keys())
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> ExportError:
    return ExportError(f"{path} cannot be read as safetensors ({error}). Fetch it again.")
