"""What the command line says, and which of it the answers depend on."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from edge_safe.models.cache import cache_folder
from edge_safe.models.recipe import read_recipe
from edge_safe.models.safety_file import SAFETY_TENSORS

SHARED = ("layer", "limit", "rows")


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says.

    Attributes:
        recipe: The recipe whose data, losses and schedule are used.
        data: Folder its data files are relative to.
        checkpoint: The trained model, whose language model is taken as it is.
        measure: Rows that are reported and never trained on, or None.
        cache: Folder of training's caches; the study's own work stands below it.
        layer: The gate's layer, None for the recipe's or the checkpoint's own.
        depths: Layers that are compared.
        seeds: Heads of every kind that are trained.
        depth_seeds: The same for the comparison of layers, whose heads are many.
        choice_seeds: The same for every changed choice of training; the recipe itself has
            ``seeds``, whose range tells how much a difference means.
        amount_seeds: The same for the amount of data; which rows are left out follows the seed.
        amount_depths: Layers that the amount of data is compared at, besides the gate's.
        limit: Training examples at most, and half as many validation examples; None for all.
        rows: Measuring rows at most, None for all.
        quantized_rows: Rows for the comparison of precisions.
        context_rows: Rows of each label for the comparison of context lengths.
        lengths: Tokens of harmless text around them.
        rounds: How often a time is taken.
        threads: Of torch and of ONNX Runtime.
    """

    recipe: Path
    data: Path
    checkpoint: Path
    measure: Path | None
    cache: Path
    layer: int | None = None
    depths: tuple[int, ...] = (6, 10, 14, 16, 18, 22, 26)
    seeds: int = 3
    depth_seeds: int = 1
    choice_seeds: int = 1
    amount_seeds: int = 2
    amount_depths: tuple[int, ...] = ()
    limit: int | None = None
    rows: int | None = None
    quantized_rows: int = 300
    context_rows: int = 20
    lengths: tuple[int, ...] = (0, 128, 512, 1024, 1500)
    rounds: int = 7
    threads: int = 2


def settings_of(options: Options, own: Sequence[str]) -> dict[str, Any]:
    """What an answer depends on, without this machine's folders; ``own`` is the question's."""
    found: dict[str, Any] = {name: getattr(options, name) for name in (*SHARED, *own)}
    hashed = {
        "recipe": options.recipe,
        "measure": options.measure,
        "checkpoint": options.checkpoint / SAFETY_TENSORS,
    }
    for name, path in hashed.items():
        found[name] = None
        if path is not None and path.exists():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    read: dict[str, Any] = json.loads(json.dumps(found))  # as it comes back from the file
    return read


def read_arguments(
    description: str, questions: Sequence[str]
) -> tuple[Options, argparse.Namespace]:
    """Reads the command line: the options, and what does not change any answer."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.study",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    whole: dict[str, Any] = {"type": int, "default": argparse.SUPPRESS}
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="folder of the recipe's files")
    parser.add_argument("--checkpoint", type=Path, help="the trained model; else the recipe's own")
    parser.add_argument("--measure", type=Path, help="labelled text rows, reported alone")
    parser.add_argument("--out", type=Path, required=True, help="for results and pictures")
    parser.add_argument("--docs", type=Path, help="a page with places for the tables")
    parser.add_argument("--questions", nargs="+", choices=questions, default=list(questions))
    parser.add_argument("--again", action="store_true", help="ask answered questions again")
    parser.add_argument("--layer", help="the gate's layer; else the recipe's", **whole)
    parser.add_argument("--depths", nargs="+", help="layers that are compared", **whole)
    parser.add_argument("--seeds", help="heads of every kind", **whole)
    parser.add_argument("--depth-seeds", help="the same where layers are compared", **whole)
    parser.add_argument("--choice-seeds", help="the same for training choices", **whole)
    parser.add_argument("--amount-seeds", help="the same for the amount of data", **whole)
    parser.add_argument(
        "--amount-depths",
        nargs="+",
        help="layers for the amount of data, besides the gate's",
        **whole,
    )
    parser.add_argument("--limit", help="training examples; half as many to validate", **whole)
    parser.add_argument("--rows", help="measuring rows", **whole)
    parser.add_argument("--quantized-rows", help="rows for the precisions", **whole)
    parser.add_argument("--context-rows", help="of each label, for context lengths", **whole)
    parser.add_argument("--lengths", nargs="+", help="tokens around the request", **whole)
    parser.add_argument("--rounds", help="how often a time is taken", **whole)
    parser.add_argument("--threads", **whole)
    given = parser.parse_args()
    if given.checkpoint is None:
        given.checkpoint = given.recipe.parent / read_recipe(given.recipe).model.source
    values: dict[str, Any] = {
        field.name: getattr(given, field.name) for field in fields(Options) if field.name in given
    }
    several = ("depths", "amount_depths", "lengths")
    values |= {name: tuple(values[name]) for name in several if name in values}
    return Options(cache=cache_folder(), **values), given
