"""Puts what pebble's towers read, name and hear into prompts, where its placeholders stand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from edge_safe.errors import CheckpointError

if TYPE_CHECKING:
    from edge_safe.models.pebble.modeling_pebble import PebbleForConditionalGeneration

IGNORED_LABEL = -100


@dataclass(slots=True)
class MergedPrompt:
    """A batch of prompts with their media in place.

    Attributes:
        inputs_embeds: (B, S, d).
        attention_mask: (B, S) int64, 0 at padding.
        labels: (B, S) int64 with -100 at media and padding, or None.
        image_tokens: Embeddings of each prompt that stand for pictures.
        audio_tokens: Embeddings of each prompt that stand for sound.
    """

    inputs_embeds: Tensor
    attention_mask: Tensor
    labels: Tensor | None
    image_tokens: list[int]
    audio_tokens: list[int]


def image_features(
    model: PebbleForConditionalGeneration,
    images: int,
    line_pixel_values: Tensor | None,
    line_widths: Tensor | None,
    line_images: Tensor | None,
    object_pixel_values: Tensor | None,
) -> list[Tensor]:
    """Every picture's embeddings: its lines, then its objects."""
    seen: list[list[Tensor]] = [[] for _ in range(images)]
    if line_pixel_values is not None and len(line_pixel_values):
        if line_widths is None or line_images is None:
            raise CheckpointError("line_pixel_values need line_widths and line_images.")
        if int(line_images.max()) >= images:
            raise CheckpointError(
                f"A line belongs to picture {int(line_images.max())}, but the prompt has "
                f"{images} image placeholders."
            )
        features, line = model.embed_text_lines(line_pixel_values, line_widths)
        for image, found in enumerate(seen):
            found.append(features[line_images[line] == image])
    if object_pixel_values is not None:
        if len(object_pixel_values) != images:
            raise CheckpointError(
                f"There are {len(object_pixel_values)} pictures for {images} placeholders."
            )
        features, picture = model.embed_objects(object_pixel_values)
        for image, found in enumerate(seen):
            found.append(features[picture == image])
    return [torch.cat(found) if found else _nothing(model) for found in seen]


def audio_features(
    model: PebbleForConditionalGeneration,
    recordings: int,
    input_features: Tensor | None,
    audio_lengths: Tensor | None,
) -> list[Tensor]:
    """Every recording's embeddings."""
    given = 0 if input_features is None else len(input_features)
    if given != recordings:
        raise CheckpointError(f"There are {given} recordings for {recordings} placeholders.")
    if input_features is None or audio_lengths is None:
        return []
    features, recording = model.embed_speech(input_features, audio_lengths)
    return [features[recording == i] for i in range(recordings)]


def merge_prompts(
    model: PebbleForConditionalGeneration,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    labels: Tensor | None,
    seen: list[Tensor],
    heard: list[Tensor],
    pad_left: bool,
) -> MergedPrompt:
    """Puts embeddings in place; takes them off the front of both lists.

    Args:
        model: Embeds the text.
        input_ids: (B, T) with one id per picture and recording.
        attention_mask: (B, T), 1 at real positions.
        labels: (B, T).
        seen: Every picture's (M, d), as ``image_features`` gives them.
        heard: Every recording's, as ``audio_features`` gives them.
        pad_left: Aligns prompts at their ends.
    """
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    rows: list[Tensor] = []
    row_labels: list[Tensor] = []
    image_tokens: list[int] = []
    audio_tokens: list[int] = []
    for row in range(len(input_ids)):
        real = attention_mask[row].bool()
        merged, kept_labels, counts = _merge_row(
            model, input_ids[row][real], None if labels is None else labels[row][real], seen, heard
        )
        rows.append(merged)
        if kept_labels is not None:
            row_labels.append(kept_labels)
        image_tokens.append(counts[0])
        audio_tokens.append(counts[1])
    side = "left" if pad_left else "right"
    pad = nn.utils.rnn.pad_sequence
    embeds = pad(rows, batch_first=True, padding_side=side)
    ones = [torch.ones(len(r), dtype=torch.long, device=embeds.device) for r in rows]
    mask = pad(ones, batch_first=True, padding_side=side)
    merged_labels = None
    if labels is not None:
        merged_labels = pad(
            row_labels, batch_first=True, padding_value=IGNORED_LABEL, padding_side=side
        )
    return MergedPrompt(embeds, mask, merged_labels, image_tokens, audio_tokens)


def _merge_row(
    model: PebbleForConditionalGeneration,
    ids: Tensor,
    labels: Tensor | None,
    seen: list[Tensor],
    heard: list[Tensor],
) -> tuple[Tensor, Tensor | None, tuple[int, int]]:
    """One prompt without padding; takes its media off the front of both lists."""
    config = model.config
    embed = model.get_input_embeddings()
    pieces: list[Tensor] = []
    kept: list[Tensor] = []
    images = sounds = 0
    start = embeddings_of_turn = 0
    special = (config.image_token_id, config.audio_token_id, config.media_end_token_id)
    for position, token in enumerate(ids.tolist()):
        if token not in special:
            continue
        pieces.append(embed(ids[start:position]))
        if labels is not None:
            kept.append(labels[start:position])
        start = position + 1
        if token == config.media_end_token_id:
            newline = ids.new_tensor([config.newline_token_id])
            piece = embed(newline) if embeddings_of_turn else _nothing(model)
            embeddings_of_turn = 0
        else:
            is_image = token == config.image_token_id
            piece = (seen if is_image else heard).pop(0)
            images += len(piece) if is_image else 0
            sounds += 0 if is_image else len(piece)
            embeddings_of_turn += len(piece)
        pieces.append(piece)
        if labels is not None:
            kept.append(labels.new_full((len(piece),), IGNORED_LABEL))
    pieces.append(embed(ids[start:]))
    if labels is not None:
        kept.append(labels[start:])
    return torch.cat(pieces), torch.cat(kept) if labels is not None else None, (images, sounds)


def _nothing(model: PebbleForConditionalGeneration) -> Tensor:
    return model.tied_embedding[:0]
