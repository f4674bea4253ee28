"""For which shapes engines are built: prompts and tokens of the language model, cases of towers."""

from __future__ import annotations

import numpy as np

from edge_safe.export.tensorrt.profiles import tower_plan
from edge_safe.runtime.engines.plan import Range
from edge_safe.runtime.manifest import Graph, Tensor


def _tower(*inputs: Tensor, precision: str = "fp16") -> Graph:
    return Graph(
        file="tower.onnx",
        precision=precision,
        inputs=list(inputs),
        outputs=[Tensor("features", "float32", [1, "tokens", 8])],
    )


def _floats(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


def test_free_lengths_reach_from_the_smallest_case_to_four_times_the_largest() -> None:
    tower = _tower(Tensor("input_features", "float32", [1, 80, "frames"]))
    cases = [{"input_features": _floats(1, 80, frames)} for frames in (30, 6)]
    (profile,) = tower_plan(tower, cases).profiles
    assert profile.shapes == {"input_features": Range((1, 80, 6), (1, 80, 30), (1, 80, 120))}


def test_inputs_of_fixed_shapes_need_no_range() -> None:
    tower = _tower(Tensor("pixel_values", "float32", [1, 3, 32, 32]))
    (profile,) = tower_plan(tower, [{"pixel_values": _floats(1, 3, 32, 32)}]).profiles
    assert profile.shapes == {}


def test_whole_numbers_of_a_fixed_count_get_their_values_ranges() -> None:
    tower = _tower(
        Tensor("input_features", "float32", [1, 8, "frames"]), Tensor("steps", "int64", [1])
    )
    cases = [
        {"input_features": _floats(1, 8, 2 * steps), "steps": np.array([steps])}
        for steps in (2, 50)
    ]
    (profile,) = tower_plan(tower, cases).profiles
    assert profile.shapes["steps"] == Range((2,), (50,), (200,))
    assert profile.shapes["input_features"] == Range((1, 8, 4), (1, 8, 100), (1, 8, 400))


def test_as_many_patches_go_with_each_range_as_the_grid_has_places() -> None:
    tower = _tower(
        Tensor("pixel_values", "float32", ["patches", 12]),
        Tensor("image_grid_thw", "int64", [1, 3]),
    )
    # The tallest case and the widest are not the same.
    cases = [
        {
            "pixel_values": _floats(rows * columns, 12),
            "image_grid_thw": np.array([[1, rows, columns]]),
        }
        for rows, columns in ((2, 4), (10, 18), (16, 6))
    ]
    (profile,) = tower_plan(tower, cases).profiles
    assert profile.shapes["image_grid_thw"] == Range((1, 2, 4), (1, 16, 18), (1, 32, 36))
    assert profile.shapes["pixel_values"] == Range((8, 12), (16 * 18, 12), (32 * 36, 12))


def test_three_numbers_that_no_length_follows_are_no_grid() -> None:
    tower = _tower(
        Tensor("input_features", "float32", [1, "frames"]), Tensor("states", "int64", [3])
    )
    cases = [
        {"input_features": _floats(1, frames), "states": np.array([1, 2, 3])} for frames in (6, 20)
    ]
    (profile,) = tower_plan(tower, cases).profiles
    assert profile.shapes["states"] == Range((1, 2, 3), (1, 2, 3), (4, 8, 12))
    assert profile.shapes["input_features"] == Range((1, 6), (1, 20), (1, 80))


def test_only_fp32_is_computed_in_fp32() -> None:
    tensor = Tensor("x", "float32", ["rows"])
    plans = [
        tower_plan(_tower(tensor, precision=precision), [{"x": _floats(2)}])
        for precision in ("fp32", "fp16", "int8")
    ]
    assert [plan.fp16 for plan in plans] == [False, True, True]
