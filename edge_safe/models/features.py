"""Hidden states of a frozen model, computed once and kept on disk, so that heads train in minutes.

A cache belongs to one model (its weights' hash) and one set of layers. Its entries are single
prompts, found by the hash of their ids: a recipe that changes only its data mix reuses them, and a
run that was killed goes on after its last finished shard.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file
from transformers import PreTrainedModel

from edge_safe.errors import DataError
from edge_safe.models import base_model
from edge_safe.models.progress import Progress

BATCH_TOKENS = 2048
SHARD_TOKENS = 65536
# Some models have states beyond the range of fp16 at their first positions.
_LARGEST = 60000.0

Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Entry:
    shard: int
    row: int
    start: int
    length: int


class FeatureCache:
    """Cached states of prompts, fp16, read from disk as they are needed.

    Args:
        root: Folder of all caches.
        model_hash: Hash of the model's weights, see ``base_model.fingerprint``.
        layers: Depths that are kept, besides the final state at T-1.
    """

    def __init__(self, root: Path, model_hash: str, layers: Sequence[int]) -> None:
        name = hashlib.sha256(f"{model_hash} {list(layers)}".encode()).hexdigest()[:16]
        self.folder = root / name
        self.layers = tuple(layers)
        self._shards: list[Any] = []
        self._entries: dict[str, _Entry] = {}
        self._read: set[str] = set()
        self.refresh()

    def refresh(self) -> None:
        """Takes up finished shards that are new on disk."""
        for path in sorted(self.folder.glob("*.safetensors")):
            if path.name in self._read:
                continue
            shard: Any = safe_open(path, framework="numpy")
            keys, lengths = shard.get_tensor("keys"), shard.get_tensor("lengths")
            start = 0
            for row, (key, length) in enumerate(zip(keys, lengths, strict=True)):
                self._entries[key.tobytes().hex()] = _Entry(
                    len(self._shards), row, start, int(length)
                )
                start += int(length)
            self._shards.append(shard)
            self._read.add(path.name)

    def missing(self, prompts: Sequence[Ids]) -> list[Ids]:
        """The prompts that have no entry, each once, shortest first."""
        unique = {_key(ids): ids for ids in prompts}
        absent = [(len(ids), key, ids) for key, ids in unique.items() if key not in self._entries]
        return [ids for _, _, ids in sorted(absent)]

    def compute(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Ids],
        progress: Progress,
        part: tuple[int, int] = (0, 1),
    ) -> None:
        """Runs the model over the prompts that are missing.

        Args:
            model: The frozen model of this cache.
            prompts: Ids of each prompt.
            progress: Told of every batch.
            part: (rank, number) of the processes that share the work.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        rank, processes = part
        shards = list(_groups(self.missing(prompts), SHARD_TOKENS))
        mine = shards[rank::processes]
        done, total = 0, sum(len(shard) for shard in mine)
        for shard in mine:
            columns: dict[str, list[NDArray[np.float16]]] = {}
            for batch in _groups(shard, BATCH_TOKENS):
                for name, array in self._run(model, batch):
                    columns.setdefault(name, []).append(array)
                done += len(batch)
                progress("features", done, total)
            self._write(shard, {name: np.concatenate(parts) for name, parts in columns.items()})
        self.refresh()

    def states(self, layer: int, ids: Ids) -> NDArray[np.float16]:
        """(T, d) states of a prompt entering a layer.

        Raises:
            DataError: The prompt was not computed.
        """
        entry = self._entry(ids)
        rows = self._shards[entry.shard].get_slice(f"layer.{layer}")
        states: NDArray[np.float16] = rows[entry.start : entry.start + entry.length]
        return states

    def final(self, ids: Ids) -> NDArray[np.float16]:
        """(d,) normalized state at T-1 at full depth.

        Raises:
            DataError: The prompt was not computed.
        """
        entry = self._entry(ids)
        rows = self._shards[entry.shard].get_slice("final")
        state: NDArray[np.float16] = rows[entry.row : entry.row + 1][0]
        return state

    def _entry(self, ids: Ids) -> _Entry:
        entry = self._entries.get(_key(ids))
        if entry is None:
            raise DataError(
                f"The feature cache {self.folder} lacks a prompt of {len(ids)} tokens. "
                "Remove the folder and train again."
            )
        return entry

    def _run(
        self, model: PreTrainedModel, batch: Sequence[Ids]
    ) -> list[tuple[str, NDArray[np.float16]]]:
        """States of a batch, all prompts one after the other."""
        ids, mask = base_model.pad(batch, model.device)
        with torch.no_grad():
            layers, final = base_model.run_decoder(model, self.layers, ids, mask)
        last = mask.sum(-1) - 1
        kept = {f"layer.{k}": value[mask] for k, value in layers.items()}
        kept["final"] = final[torch.arange(len(batch), device=ids.device), last]
        return [
            (name, value.float().clamp(-_LARGEST, _LARGEST).half().cpu().numpy())
            for name, value in kept.items()
        ]

    def _write(self, shard: Sequence[Ids], arrays: dict[str, NDArray[np.float16]]) -> None:
        keys = [bytes.fromhex(_key(ids)) for ids in shard]
        tensors: dict[str, NDArray[Any]] = dict(arrays)
        tensors["keys"] = np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), -1)
        tensors["lengths"] = np.array([len(ids) for ids in shard], np.int64)
        name = hashlib.sha256(b"".join(keys)).hexdigest()[:16]
        temporary = self.folder / f"{name}.{os.getpid()}.part"
        save_file(tensors, temporary)
        temporary.replace(self.folder / f"{name}.safetensors")


def _key(ids: Ids) -> str:
    return hashlib.sha256(np.array(ids, np.int64).tobytes()).hexdigest()[:32]


def _groups(prompts: Sequence[Ids], tokens: int) -> list[list[Ids]]:
    """Cuts prompts, shortest first, into groups of about this many tokens with padding."""
    groups: list[list[Ids]] = []
    for ids in prompts:
        # The newest prompt is the longest, so it says how long every row of its group becomes.
        if groups and (len(groups[-1]) + 1) * len(ids) <= tokens:
            groups[-1].append(ids)
        else:
            groups.append([ids])
    return groups
