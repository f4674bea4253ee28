"""Hidden states at any depth: borrowed from a cache of training where they agree, else computed."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from edge_safe.models.features import FeatureCache, Ids

# States of the same weights in bfloat16 differ by this share of their norm when the prompts they
# were batched with differ; those of other weights differ by far more.
TOLERANCE = 0.05
SAMPLES = 4


class Depth(nn.Module):
    """The first layers of a model's decoder, without lm_head, in a dtype of their own.

    Attributes:
        decoder: Its last state is the one that enters the layer it was cut at, not normalized.
        config: The model's, uncut.
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype, layer: int | None) -> None:
        super().__init__()
        decoder: Any = copy.deepcopy(cast(Any, model).get_decoder())
        if layer is not None:
            decoder.layers = decoder.layers[:layer]
            decoder.norm = nn.Identity()
        self.decoder = decoder.to(dtype).requires_grad_(False)
        self.decoder.train(False)
        self.config = model.config

    def get_decoder(self) -> nn.Module:
        """Where ``base_model.run_decoder`` looks for it."""
        return cast(nn.Module, self.decoder)

    @property
    def device(self) -> torch.device:
        """Of the weights."""
        return next(self.parameters()).device


class BorrowingCache(FeatureCache):
    """A cache that takes what it can from another one.

    Args:
        root: Folder of all caches of the study.
        key: Names the model, its dtype and the depth it was cut at.
        layers: Depths that are kept.
        lender: A cache of the same model that has these layers, or None.
    """

    def __init__(
        self, root: Path, key: str, layers: Sequence[int], lender: FeatureCache | None = None
    ) -> None:
        self._lender = lender
        super().__init__(root, key, layers)

    def missing(self, prompts: Sequence[Ids]) -> list[Ids]:
        """The prompts that neither cache has, each once, shortest first."""
        absent = super().missing(prompts)
        return absent if self._lender is None else self._lender.missing(absent)

    def states(self, layer: int, ids: Ids) -> NDArray[np.float16]:
        """(T, d) states of a prompt entering a layer."""
        lender = self._lender_of(ids)
        return super().states(layer, ids) if lender is None else lender.states(layer, ids)

    def final(self, ids: Ids) -> NDArray[np.float16]:
        """(d,) state at T-1 at the depth that was run."""
        lender = self._lender_of(ids)
        return super().final(ids) if lender is None else lender.final(ids)

    def _lender_of(self, ids: Ids) -> FeatureCache | None:
        lender = self._lender
        return None if lender is None or lender.missing([ids]) else lender


def find_lender(
    root: Path, model: Depth, layers: Sequence[int], prompts: Sequence[Ids], scratch: Path
) -> FeatureCache | None:
    """The training cache that has most of these prompts at these layers, and the same states.

    Args:
        root: Folder of training's caches.
        model: Gives the states that a cache has to have.
        layers: Depths that are needed.
        prompts: Prompts that are needed.
        scratch: Folder for the states of the prompts that are compared.
    """
    held: list[tuple[int, FeatureCache]] = []
    for folder in sorted(root.glob("*/")):
        if not _has_layers(folder, layers):
            continue
        cache = FeatureCache(root, "", layers)
        cache.folder = folder
        cache.refresh()
        known = len(set(prompts)) - len(cache.missing(prompts))
        if known:
            held.append((known, cache))
    for _, cache in sorted(held, key=lambda pair: -pair[0]):
        if _agree(cache, model, layers, prompts, scratch):
            return cache
    return None


def _has_layers(folder: Path, layers: Sequence[int]) -> bool:
    shard = next(folder.glob("*.safetensors"), None)
    if shard is None:
        return False
    with safe_open(shard, framework="numpy") as opened:
        return {f"layer.{k}" for k in layers} <= set(opened.keys())


def _agree(
    cache: FeatureCache,
    model: Depth,
    layers: Sequence[int],
    prompts: Sequence[Ids],
    scratch: Path,
) -> bool:
    """Whether a few of its prompts have the states that the model gives."""
    absent = set(cache.missing(prompts))
    known = sorted({p for p in prompts if p not in absent}, key=lambda ids: (len(ids), ids))
    places = np.linspace(0, len(known) - 1, min(SAMPLES, len(known))).astype(int)
    chosen = [known[i] for i in places]
    own = FeatureCache(scratch, f"samples {cache.folder.name}", layers)
    own.compute(cast(PreTrainedModel, model), chosen, lambda job, done, total: None)
    for layer in layers:
        for ids in chosen:
            expected = own.states(layer, ids).astype(np.float64)
            difference = cache.states(layer, ids).astype(np.float64) - expected
            # The first position of many models dwarfs all others, so each counts by itself.
            shares = np.linalg.norm(difference, axis=-1) / np.linalg.norm(expected, axis=-1)
            if not np.median(shares) < TOLERANCE:
                return False
    return True
