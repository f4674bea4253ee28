"""Tables of a recipe for a pebble's towers: to read text, to name objects, to hear speech."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from edge_safe.models.recipe.section import (
    Count,
    OpenShare,
    Positive,
    Rate,
    Section,
    Share,
    Text,
    Weight,
)


class ComposedSection(Section, frozen=True):
    """``[text_projector.composed]``: goes on with lines that are composed anew in every step.

    From here on the projector spells with the first ``rows`` of the vocabulary, which it tells
    apart by their letters; by default these are the letters themselves. ``harmless`` adds our own
    harmless prompts to the texts. The rest is explained at ``ComposedTraining``.
    """

    rows: Positive = 273
    harmless: bool = True
    steps: Positive = 400
    lines_per_step: Positive = 32
    rendered_share: OpenShare = 0.25
    learning_rate: Rate = 1.5e-3
    weight_decay: Weight = 0.01
    noise: Weight = 0.15
    seed: int = 1


class TextProjectorSection(Section, frozen=True):
    """``[text_projector]``: trains the text tower's projector of a pebble on rendered lines.

    ``texts`` are files below ``--data`` with ``prompt`` or ``chosen``; ``lines`` of them are
    rendered in the fonts below ``font_folders`` (by default the system's), without those whose name
    has one of ``skip_fonts`` in it; fonts whose name begins with one of ``held_fonts`` only
    validate. The rest is explained at ``ProjectorTraining``.
    """

    texts: Annotated[tuple[Text, ...], Meta(min_length=1)]
    held_fonts: Annotated[tuple[Text, ...], Meta(min_length=1)]
    lines: Positive = 30000
    font_folders: tuple[Text, ...] = ()
    skip_fonts: tuple[Text, ...] = ()
    steps: Positive = 4000
    aligned_steps: Count = 1400
    lines_per_step: Positive = 32
    negatives: Positive = 2048
    learning_rate: Rate = 1.5e-3
    weight_decay: Weight = 0.02
    noise: Weight = 0.1
    seed: int = 0
    composed: ComposedSection | None = None


class ObjectsProjectorSection(Section, frozen=True):
    """``[objects_projector]``: trains the object tower's projector of a pebble.

    ``cutouts`` are folders of PNG files with a transparent background; ``held_share`` of the files
    only validate. ``pictures`` are drawn from the rest, and ``pages`` of the prompts in ``texts``,
    files below ``--data``. The rest is explained at ``ObjectTraining``.
    """

    texts: Annotated[tuple[Text, ...], Meta(min_length=1)]
    cutouts: Annotated[tuple[Text, ...], Meta(min_length=1)] = ("/usr/share/tuxpaint/stamps",)
    held_share: OpenShare = 0.2
    pictures: Positive = 3072
    pages: Positive = 384
    steps: Positive = 1200
    pictures_per_step: Positive = 256
    negatives: Positive = 1024
    learning_rate: Rate = 3e-3
    weight_decay: Weight = 0.01
    certain: OpenShare = 0.45
    uncertain: OpenShare = 0.25
    seed: int = 0


class SpeechDecoderSection(Section, frozen=True):
    """``[speech_decoder]``: trains a pebble's speech decoder to listen, on spoken texts.

    ``texts`` are files below ``--data`` with ``prompt``; ``recordings`` of them, of random words
    (``random_share``) and of spelled words (``letter_share``) are spoken by ``synthesizer`` and,
    for ``slow_share`` of them, by ``slow_synthesizer``. The rest is explained at
    ``SpeechTraining``.
    """

    texts: Annotated[tuple[Text, ...], Meta(min_length=1)]
    recordings: Positive = 14000
    synthesizer: Text = "espeak-ng"
    slow_synthesizer: Text = "festival"
    slow_share: Share = 0.3
    random_share: Share = 0.24
    letter_share: Share = 0.05
    steps: Positive = 1700
    recordings_per_step: Positive = 32
    learning_rate: Rate = 5e-4
    weight_decay: Weight = 0.01
    gain: Weight = 0.1
    noise: Weight = 0.05
    gaps: Annotated[int, Meta(ge=0)] = 2
    wrong: Share = 0.12
    smoothing: Share = 0.05
    seed: int = 0
