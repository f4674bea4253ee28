"""Recipes: unknown keys, wrong values, and values that exclude each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edge_safe.errors import RecipeError
from edge_safe.models.recipe import parse_recipe, read_recipe


def recipe(**tables: Any) -> dict[str, Any]:
    return {
        "model": {"source": "."},
        "heads": {"layers": [2, 4]},
        "data": {"train": ["a.jsonl"]},
    } | tables


@pytest.mark.parametrize(
    ("tables", "near"),
    [
        ({"optimiser": {}}, "optimizer"),
        ({"heads": {"layers": [2], "exit_layr": 2}}, "heads.exit_layer"),
        ({"training": {"epoch": 3}}, "training.epochs"),
        ({"losses": {"bta": 0.5}}, "losses.beta"),
        (
            {"data": {"train": ["a"], "wrappings": {"file": "t", "shar": 0.1}}},
            "data.wrappings.share",
        ),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(tables: dict[str, Any], near: str) -> None:
    with pytest.raises(RecipeError, match=rf"Did you mean {near}\?"):
        parse_recipe(recipe(**tables))


@pytest.mark.parametrize(
    ("tables", "what"),
    [
        ({"training": {"epochs": 0}}, "training.epochs"),
        ({"training": {"epochs": "six"}}, "training.epochs"),
        ({"optimizer": {"learning_rate": -1.0}}, "optimizer.learning_rate"),
        ({"optimizer": {"learning_rate": float("nan")}}, "optimizer.learning_rate is nan"),
        ({"losses": {"token": -1.0}}, "losses.token"),
        ({"losses": {"beta": 1.5}}, "losses.beta"),
        ({"model": {"source": ".", "dtype": "int4"}}, "model.dtype"),
        ({"heads": {"layers": [4, 2]}}, "rising order"),
        ({"heads": {"layers": [2, 4], "exit_layer": 3}}, "exit_layer = 3"),
        ({"heads": {"layers": [2, 4], "joined": [4, 2]}}, "heads.joined"),
        ({"heads": {"layers": [2, 4], "joined": [3, 4]}}, "heads.joined"),
        ({"tokens": {"safe_id": 3}}, "give both or none"),
        ({"lora": {}}, "frozen_features"),
        ({"safe_row": {}}, "without"),
        ({"calibration": {"target_fpr": 1.0}}, "calibration.target_fpr"),
        ({"data": {"train": []}}, "data.train"),
        ({"data": ["a.jsonl"]}, "data"),
    ],
)
def test_a_wrong_value_is_named(tables: dict[str, Any], what: str) -> None:
    with pytest.raises(RecipeError, match=what):
        parse_recipe(recipe(**tables))


def test_a_missing_table_is_named() -> None:
    with pytest.raises(RecipeError, match="heads"):
        parse_recipe({"model": {"source": "."}, "data": {"train": ["a"]}})


def test_a_file_that_is_no_toml_is_one_clear_line(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text("[model\n")
    with pytest.raises(RecipeError, match="not a TOML file"):
        read_recipe(path)


def test_a_missing_file_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="Cannot read the recipe"):
        read_recipe(tmp_path / "none.toml")
