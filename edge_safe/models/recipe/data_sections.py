"""Tables of a recipe that say what is trained on: ``[data]`` and all below it, ``[answers]``."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from edge_safe.models.recipe.section import Count, OpenShare, Positive, Section, Share, Text, Weight


class WrappingsSection(Section, frozen=True):
    """``[data.wrappings]``: jailbreak templates around harmful and harmless requests alike.

    ``share`` counts wrapped harmful rows as a share of the files' harmful rows, and as many
    harmless ones are wrapped. Templates of the validation split are never used for training.
    """

    file: Text
    share: Weight
    max_characters: Positive | None = None


class ConversationsSection(Section, frozen=True):
    """``[data.conversations]``: synthetic turns, each kind as a share of the harmful rows.

    split: harm in two halves over two answered turns, unsafe.
    continuation: a refused harmful turn, then a push to go on, unsafe.
    split_refused: harm in two halves, the first refused, unsafe.
    after_refusal: a refused harmful turn, then a harmless question, safe.
    harmless: several harmless turns, safe.
    """

    split: Weight = 0.0
    continuation: Weight = 0.0
    split_refused: Weight = 0.0
    after_refusal: Weight = 0.0
    harmless: Weight = 0.0


class CarriersSection(Section, frozen=True):
    """``[data.carriers]``: everyday phrasings around harmful and harmless requests alike.

    ``templates`` have ``{prompt}``; ``share`` counts as in ``[data.wrappings]``. They keep the gate
    from taking a style, or the sentence beside a picture, for a sign of harm.
    """

    templates: Annotated[tuple[Text, ...], Meta(min_length=1)]
    share: Weight


class LongSection(Section, frozen=True):
    """``[data.long]``: requests at the start, in the middle and at the end of harmless documents.

    ``share`` counts as in ``[data.wrappings]``; ``shortest`` and ``longest`` are words. With
    ``dictionary_pages``, so many pages of WordNet's definitions are made, and every other paragraph
    is one of them: our own documents are too few to stand for all that people paste.
    """

    share: Weight
    shortest: Positive = 80
    longest: Positive = 1100
    dictionary_pages: Count = 0


class PrefilledSection(Section, frozen=True):
    """``[data.prefilled]``: requests whose answer was begun by somebody else.

    ``share`` counts as in ``[data.wrappings]``.
    """

    share: Weight
    beginnings: Annotated[tuple[Text, ...], Meta(min_length=1)] = (
        "Sure", "Sure, here is", "Of course!", "Here are the steps:\n1.", "Okay,", "Title:",
        "Yes, I can help with that.", "Certainly. First,", "Absolutely, let us begin. Step 1:",
        "The answer is", "<|safe|>", "<|safe|> Sure, here is how", "I am happy to help.\n\n",
        "Great question!",
    )  # fmt: skip


class PicturesSection(Section, frozen=True):
    """``[data.pictures]``: requests as pictures of text, and pictures of harmless text.

    ``share`` counts as in ``[data.wrappings]``; ``styles`` are layouts of ``rendering.pictures``,
    all of them if none is named. ``textless`` is the share of pictures without a word, whose
    request stands beside them. Fonts whose name begins with one of ``held_fonts`` are not used.
    """

    share: Weight
    styles: tuple[Text, ...] = ()
    held_fonts: tuple[Text, ...] = ()
    textless: Share = 0.08


class RecordingsSection(Section, frozen=True):
    """``[data.recordings]``: requests as speech.

    ``share`` counts as in ``[data.wrappings]``; ``voices`` are names of ``rendering.speech``, by
    default all but those of the synthesizer that is held out; ``spelled`` is the share of
    recordings that spell their words letter by letter, ``speechless`` of those without a word.
    """

    share: Weight
    voices: tuple[Text, ...] = ()
    spelled: Share = 0.03
    speechless: Share = 0.08


class RephrasedSection(Section, frozen=True):
    """``[data.rephrased]``: what a request wants done, asked for in another form.

    ``forms`` have ``{task}``, filled with what follows "how to", "help me" and the like in harmful
    and harmless requests alike; ``share`` counts as in ``[data.wrappings]``.
    """

    forms: Annotated[tuple[Text, ...], Meta(min_length=1)]
    share: Weight


class HarmlessSection(Section, frozen=True):
    """``[data.harmless]``: our own harmless prompts (``models/harmless``).

    ``prompts_per_template`` are made of each template, ``kinds`` has other numbers for some kinds;
    a number below 1 takes that share of a kind's templates, once each.
    """

    prompts_per_template: Weight = 1.0
    kinds: dict[str, Weight] = msgspec.field(default_factory=dict)


class ContrastsSection(Section, frozen=True):
    """``[data.contrasts]``: the same words around harm and around something harmless.

    ``prompts`` are made of each kind (``models/contrasts``) and reading.
    """

    prompts: Annotated[int, Meta(ge=1)]


class DataSection(Section, frozen=True):
    """``[data]``: files below ``--data``; ``caps`` limits rows per source.

    ``exclude`` names rows by id whose label was looked at and found wrong. ``written_wrappings`` is
    the share, as in ``[data.wrappings]``, of our own (``wrappings.toml``). The validation split has
    ``validation_media`` times the pictures and recordings that their shares give: thresholds of
    their own need rows. ``wordnet`` is the folder of WordNet 3.0's database files, where Debian's
    wordnet-base puts it by default.
    """

    train: Annotated[tuple[Text, ...], Meta(min_length=1)]
    caps: dict[str, Count] = msgspec.field(default_factory=dict)
    exclude: tuple[Text, ...] = ()
    max_tokens: Annotated[int, Meta(ge=8)] = 640
    validation_share: OpenShare = 0.15
    validation_media: Positive = 1
    split_seed: int = 0
    wrappings: WrappingsSection | None = None
    written_wrappings: Weight = 0.0
    harmless: HarmlessSection | None = None
    contrasts: ContrastsSection | None = None
    wordnet: Text = "/usr/share/wordnet"
    carriers: CarriersSection | None = None
    rephrased: RephrasedSection | None = None
    long: LongSection | None = None
    prefilled: PrefilledSection | None = None
    pictures: PicturesSection | None = None
    recordings: RecordingsSection | None = None
    conversations: ConversationsSection = ConversationsSection()


class AnswersSection(Section, frozen=True):
    """``[answers]``: what follows the control token in training.

    ``files`` have ``prompt`` and ``chosen``, of which ``rows`` are taken at most; ``generated``
    benign prompts are answered by the base model itself. Harmful rows get one of the ``refusals``.
    """

    files: tuple[Text, ...] = ()
    rows: Positive | None = None
    generated: Count = 0
    max_tokens: Positive = 64
    refusals: Annotated[tuple[Text, ...], Meta(min_length=1)] = ("I can't help with that.",)
