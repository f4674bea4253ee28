"""Reads a recipe and checks every key and value before work starts."""

from __future__ import annotations

import difflib
import math
import sys
import typing
from pathlib import Path
from typing import Any

import msgspec

from edge_safe.errors import RecipeError
from edge_safe.models.recipe.recipe import Recipe

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def read_recipe(path: Path) -> Recipe:
    """Reads and checks a recipe.

    Raises:
        RecipeError: It cannot be read, has an unknown key (the message names the nearest known
            one), a value of a wrong type or range, or values that exclude each other.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"Cannot read the recipe {path}: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not a TOML file: {error}.") from error
    return parse_recipe(document)


def parse_recipe(document: dict[str, Any]) -> Recipe:
    """Checks a recipe's tables; see `read_recipe`."""
    _check_keys(document, Recipe, "")
    try:
        recipe = msgspec.convert(document, Recipe)
    except msgspec.ValidationError as error:
        raise RecipeError(f"The recipe has a wrong value: {error}.") from error
    _check_agreement(recipe)
    return recipe


def _check_keys(table: dict[str, Any], kind: type[msgspec.Struct], where: str) -> None:
    """Names the nearest known key of the first unknown one, table by table."""
    kinds = typing.get_type_hints(kind)
    for key, value in table.items():
        if key not in kinds:
            near = difflib.get_close_matches(key, kinds, n=1, cutoff=0.0)
            raise RecipeError(
                f"Unknown key {where}{key} in the recipe. Did you mean {where}{near[0]}? "
                f"Known keys here: {', '.join(kinds)}."
            )
        if isinstance(value, float) and not math.isfinite(value):
            raise RecipeError(f"{where}{key} is {value} in the recipe; give a finite number.")
        for option in (kinds[key], *typing.get_args(kinds[key])):
            is_table = isinstance(option, type) and issubclass(option, msgspec.Struct)
            if is_table and isinstance(value, dict):
                _check_keys(value, option, f"{where}{key}.")


def _check_agreement(recipe: Recipe) -> None:
    """Checks what no single value shows."""
    heads, tokens, losses = recipe.heads, recipe.tokens, recipe.losses
    numbers = msgspec.structs.asdict(losses).items()
    wrong = [f"losses.{name} = {value}" for name, value in numbers if not 0.0 <= value < 1e6]
    if losses.beta > 1.0:
        wrong.append(f"losses.beta = {losses.beta}, a share of at most 1")
    if losses.smoothing >= 1.0:
        wrong.append(f"losses.smoothing = {losses.smoothing}, a share below 1")
    if losses.unsafe == 0.0:
        wrong.append("losses.unsafe = 0, which would leave harmful rows out")
    if sorted(set(heads.layers)) != list(heads.layers):
        wrong.append(f"heads.layers = {list(heads.layers)}, not in rising order")
    if isinstance(heads.exit_layer, int) and heads.exit_layer not in heads.layers:
        wrong.append(f"heads.exit_layer = {heads.exit_layer}, not one of {list(heads.layers)}")
    if heads.joined and not (
        set(heads.joined) <= set(heads.layers) and list(heads.joined) == sorted(set(heads.joined))
    ):
        wrong.append(
            f"heads.joined = {list(heads.joined)}, not some of {list(heads.layers)} by rising depth"
        )
    if heads.early_layer is not None and not (
        heads.early_layer in heads.layers
        and isinstance(heads.exit_layer, int)
        and heads.early_layer < heads.exit_layer
    ):
        wrong.append(
            f"heads.early_layer = {heads.early_layer}, not one of {list(heads.layers)} below "
            f"heads.exit_layer = {heads.exit_layer}, which has to be a number"
        )
    if tokens.safe == tokens.unsafe:
        wrong.append(f"tokens.safe and tokens.unsafe are both {tokens.safe}")
    if (tokens.safe_id is None) != (tokens.unsafe_id is None):
        wrong.append("tokens has one of safe_id and unsafe_id; give both or none")
    carriers = recipe.data.carriers
    if carriers is not None and not all("{prompt}" in t for t in carriers.templates):
        wrong.append("data.carriers has a template without {prompt}")
    if recipe.lora is not None and recipe.training.frozen_features:
        wrong.append("training.frozen_features = true with [lora]; features cannot be cached then")
    if heads.members > 1 and not recipe.training.frozen_features:
        wrong.append(f"heads.members = {heads.members} without frozen_features")
    if recipe.training.feature_dropout and not recipe.training.frozen_features:
        wrong.append("training.feature_dropout without frozen_features")
    if recipe.safe_row is not None and recipe.answers is None:
        wrong.append("[safe_row] without [answers]; add answers.files or answers.generated")
    if recipe.answers is not None and not (recipe.answers.files or recipe.answers.generated):
        wrong.append("[answers] has neither files nor generated")
    if recipe.calibration.stage == "gate" and not heads.layers:
        wrong.append('calibration.stage = "gate" without heads.layers')
    if wrong:
        raise RecipeError(f"The recipe does not fit together: {'; '.join(wrong)}.")
