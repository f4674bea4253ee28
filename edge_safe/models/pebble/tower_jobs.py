"""The tables of a recipe that train a pebble's towers, before anything is trained on examples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from tokenizers import Tokenizer

from edge_safe.errors import RecipeError
from edge_safe.models.base_model import BaseModel
from edge_safe.models.pebble import objects_projector_job, speech_job, text_projector_job
from edge_safe.models.pebble.modeling_pebble import PebbleForConditionalGeneration
from edge_safe.models.pebble.processing_pebble import PebbleProcessor
from edge_safe.models.progress import Progress
from edge_safe.models.recipe import Recipe, Section, SpeechDecoderSection
from edge_safe.models.work_folders import WorkFolders

Table = TypeVar("Table", bound=Section)

Job = Callable[
    [PebbleForConditionalGeneration, Tokenizer, Table, Path, Path, Path, Progress], float
]
"""Trains by a table, with folders of data, cache and work; returns the share it then gets right."""


@dataclass(frozen=True, slots=True)
class TowerScores:
    """How well trained towers do on what was held out; None for those that were not trained.

    Attributes:
        reading: Share of word pieces read right.
        naming: Share of confident pictures named wholly.
        hearing: Share of words heard right.
    """

    reading: float | None = None
    naming: float | None = None
    hearing: float | None = None


def train_towers(
    recipe: Recipe,
    base: BaseModel,
    source: Path,
    data: Path,
    cache: Path,
    folders: WorkFolders,
    progress: Progress,
) -> TowerScores:
    """Trains the towers that the recipe has a table for, in place.

    Of the language model they need its embedding at most, so they come before anything moves it.

    Args:
        recipe: Has the tables.
        base: A pebble, if there is a table.
        source: The folder it was opened from.
        data: Folder that data files are relative to.
        cache: Folder of what was rendered and spoken.
        folders: Where the state of training is kept.
        progress: Told how far each job is.

    Raises:
        RecipeError: The model is no pebble.
    """

    def train(
        table: str, tower: str, cached: str, section: Table | None, job: Job[Table]
    ) -> float | None:
        if section is None:
            return None
        model = base.model
        if not isinstance(model, PebbleForConditionalGeneration):
            raise RecipeError(
                f"[{table}] is for pebble; {type(model).__name__} has no {tower} tower. Remove "
                "the table."
            )
        tokenizer = cast(Any, base.tokenizer).backend_tokenizer
        work = folders.path(table.replace("_", "-"), section)
        return job(model, tokenizer, section, data, cache / cached, work, progress)

    def train_speech(
        model: PebbleForConditionalGeneration,
        tokenizer: Tokenizer,
        section: SpeechDecoderSection,
        data: Path,
        cache: Path,
        work: Path,
        progress: Progress,
    ) -> float:
        processor = PebbleProcessor.from_pretrained(source)
        return speech_job.run_job(model, processor, tokenizer, section, data, cache, work, progress)

    text, objects, speech = recipe.text_projector, recipe.objects_projector, recipe.speech_decoder
    run_objects_job = objects_projector_job.run_objects_job
    # In this order, for a work folder's name depends on what was trained before.
    return TowerScores(
        reading=train("text_projector", "text", "lines", text, text_projector_job.run_job),
        naming=train("objects_projector", "object", "objects", objects, run_objects_job),
        hearing=train("speech_decoder", "speech", "recordings", speech, train_speech),
    )
