"""The recipe's ``[objects_projector]``: cut-outs and pages into a trained objects projector."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor

from edge_safe.errors import DataError
from edge_safe.models.data import read_json_lines
from edge_safe.models.pebble import parts
from edge_safe.models.pebble.efficientnet_lite import read_checkpoint
from edge_safe.models.pebble.modeling_pebble import PebbleForConditionalGeneration
from edge_safe.models.pebble.object_pictures import draw_objects, draw_page, find_cutouts
from edge_safe.models.pebble.object_states import Pictures, Teacher, averaged_states
from edge_safe.models.pebble.objects_projector_training import (
    ObjectTraining,
    naming_accuracy,
    train_objects_projector,
)
from edge_safe.models.pebble.processing_pebble import object_pixels
from edge_safe.models.pebble.processor_settings import ObjectConfig
from edge_safe.models.pebble.projector_training import settings_of, train_resumably
from edge_safe.models.progress import Progress
from edge_safe.models.recipe import ObjectsProjectorSection

CONFIDENT = 0.5
"""Probability of the classifier from which on its label counts in the reported accuracy."""

_HELD_PICTURES = 512


def run_objects_job(
    model: PebbleForConditionalGeneration,
    tokenizer: Tokenizer,
    section: ObjectsProjectorSection,
    data: Path,
    cache: Path,
    work: Path,
    progress: Progress,
) -> float:
    """Trains the objects projector of a pebble in place and marks it trained.

    States of pictures are cached in ``cache``, the state of training in ``work``; a killed run
    goes on from both.

    Returns:
        Share of held-out cut-outs' pictures with a confident label that get its whole name.

    Raises:
        DataError: There are no cut-outs, or no texts.
    """
    size = ObjectConfig().size
    train, held = find_cutouts([Path(f) for f in section.cutouts], section.held_share)
    texts = [str(line["prompt"]) for f in section.texts for _, line in read_json_lines(data / f)]
    if not texts:
        raise DataError(f"[objects_projector] found no text in {', '.join(section.texts)}.")

    def states(name: str, count: int, draw: Pictures, seed: int) -> Tensor:
        shards = []
        for shard in averaged_states(cache, name, count, draw, encode, seed):
            shards.append(shard)
            progress(f"pictures of {name}", sum(map(len, shards)), count)
        return torch.from_numpy(np.concatenate(shards).astype(np.float32))

    def encode(pictures: list[Image.Image]) -> Tensor:
        with torch.no_grad():
            seen: Tensor = model.vision_encoder(object_pixels(pictures, ObjectConfig()))
        return seen

    things = states(
        "things", section.pictures, lambda r: draw_objects(train, r, size), section.seed
    )
    pages = states(
        "pages",
        section.pages,
        lambda r: draw_page(texts[int(r.integers(len(texts)))], r, size),
        section.seed,
    )
    validation = states(
        "held out things", _HELD_PICTURES, lambda r: draw_objects(held, r, size), section.seed + 1
    )
    named = parts.read_parts(model.config.parts)["vision_encoder"]
    _, classifier = read_checkpoint(parts.fetch({"encoder": named})["encoder"])
    teacher = Teacher.make(classifier, tokenizer, model.config.vision_projector_config.slots)
    embedding = model.language_model.model.embed_tokens.weight.detach()
    projector = model.vision_projector
    projector.requires_grad_(True)
    settings = settings_of(section, ObjectTraining)
    train_resumably(
        lambda start: train_objects_projector(
            projector,
            embedding,
            things,
            pages,
            teacher,
            settings,
            lambda step, loss: progress("objects projector", step + 1, section.steps),
            start,
        ),
        work / "objects_projector.pt",
    )
    projector.requires_grad_(False).eval()
    model.config.modalities["objects"]["trained"] = True
    return naming_accuracy(projector, embedding, validation, teacher, CONFIDENT)
