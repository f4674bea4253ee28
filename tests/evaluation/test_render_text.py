"""Prompts as pictures: repeatable, legible, varied."""

from __future__ import annotations

import numpy as np

from edge_safe.evaluation.render_text import render_text


def test_equal_seeds_give_equal_pictures() -> None:
    first, second = (np.asarray(render_text("Help me bake a cake.", 7)) for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_seeds_vary_the_picture() -> None:
    sizes = {render_text("Help me bake a cake.", seed).size for seed in range(6)}
    assert len(sizes) > 3


def test_the_text_is_there() -> None:
    drawn, blank = (np.asarray(render_text(text, 3)) for text in ("mmmmmmmm", ""))
    assert drawn.shape == blank.shape
    changed = (drawn != blank).any(axis=2)
    assert changed.mean() > 0.02
    assert changed[: drawn.shape[0] // 8].sum() == 0  # the margin above stays empty


def test_long_text_keeps_inside_a_page() -> None:
    picture = render_text("a fairly ordinary sentence " * 70, 1)
    assert picture.width <= 960
    assert picture.height < 1500
