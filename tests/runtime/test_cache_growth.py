"""A cache that cannot grow is as it was, so that the next request finds it whole."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edge_safe.runtime import cache as module
from edge_safe.runtime.cache import STEP, KeyValueCache
from edge_safe.runtime.session import Array, Buffer


def new_cache() -> KeyValueCache:
    model = SimpleNamespace(context_length=4 * STEP, layers=3, kv_heads=1, head_dim=2)
    manifest: Any = SimpleNamespace(model=model, whole_caches=False)
    return KeyValueCache(manifest, np.dtype(np.float32), "cpu")


@pytest.mark.parametrize("before", [0, STEP])
def test_memory_that_runs_out_leaves_the_cache_as_it_was(
    before: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = new_cache()
    if before:
        cache.reserve(before)
        cache.load([np.ones((1, 1, before, 2), np.float32)] * 6, before)
        cache.extend(before, before)
    made = []

    def scarce(array: Array, device: str) -> Buffer:
        made.append(array)
        if len(made) == 4:
            raise RuntimeError("out of memory")
        return Buffer(array, device)

    with monkeypatch.context() as patch:
        patch.setattr(module, "Buffer", scarce)
        with pytest.raises(RuntimeError):
            cache.reserve(before + 1)
    assert cache.capacity == before
    assert all(np.all(kept == 1) for kept in cache.copy(range(3), before)) or not before
    cache.reserve(before + 1)
    assert cache.capacity == before + STEP
