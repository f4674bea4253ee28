"""Places of the rotary embedding, beside transformers' own count of them."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel

from edge_safe.runtime.cache import KeyValueCache
from edge_safe.runtime.inputs import Inputs, in_a_row, join, on_a_grid

WIDTH, IMAGE, WORD, MERGE = 2, 7, 5, 2
# Words, or rows and columns of a picture's features.
parts = st.lists(st.one_of(st.integers(1, 6), st.tuples(st.integers(1, 5), st.integers(1, 5))))


def run_of(part: int | tuple[int, int]) -> Inputs:
    if isinstance(part, int):
        return in_a_row(np.zeros((part, WIDTH), np.float32), 3, 1)
    count = part[0] * part[1]
    rows = np.ones((count, WIDTH), np.float32)
    return on_a_grid(rows, *part, rows[None])


def with_words(parts: list[int | tuple[int, int]]) -> list[int | tuple[int, int]]:
    """Every picture between words, as chat templates have it."""
    return [1, *itertools.chain.from_iterable((part, 1) for part in parts)]


@given(parts)
def test_places_are_those_of_transformers(parts: list[int | tuple[int, int]]) -> None:
    parts = with_words(parts)
    run = join([run_of(part) for part in parts])
    ids = [
        index
        for part in parts
        for index in ([WORD] * part if isinstance(part, int) else [IMAGE] * (part[0] * part[1]))
    ]
    grids = [[1, p[0] * MERGE, p[1] * MERGE] for p in parts if not isinstance(p, int)]
    config = SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=MERGE))
    model = SimpleNamespace(config=config)
    model.get_vision_position_ids = lambda *a, **k: Qwen2VLModel.get_vision_position_ids(
        model, *a, **k
    )
    expected, deltas = Qwen2VLModel.get_rope_index(
        model,
        torch.tensor([ids]),
        (torch.tensor([ids]) == IMAGE).int(),
        image_grid_thw=torch.tensor(grids) if grids else None,
    )
    np.testing.assert_array_equal(run.places, expected[:, 0].numpy())
    assert run.span == len(run) + int(deltas[0])
    assert run.deepstack.sum() == WIDTH * ids.count(IMAGE)


def cache() -> KeyValueCache:
    model = SimpleNamespace(context_length=640, layers=1, kv_heads=1, head_dim=2)
    manifest = SimpleNamespace(model=model, whole_caches=False)
    return KeyValueCache(manifest, np.dtype(np.float32), "cpu")  # type: ignore[arg-type]


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), max_size=8), st.data())
def test_a_cache_that_forgets_positions_forgets_their_places(
    steps: list[tuple[int, int]], data: st.DataObject
) -> None:
    kept = data.draw(st.integers(0, len(steps)))
    found = cache()
    for count, span in steps:
        found.extend(count, span)
    found.truncate(sum(count for count, _ in steps[:kept]))
    assert found.place == sum(span for _, span in steps[:kept])
    found.extend(1, 1)
    assert found.place == sum(span for _, span in steps[:kept]) + 1
