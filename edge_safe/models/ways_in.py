"""One request in other ways: within a long text, before a begun answer, as picture, as speech."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from edge_safe.models.data import Example, Row, user_turn
from edge_safe.models.media import Picture, Recording
from edge_safe.models.prompts import Message
from edge_safe.models.recipe import DataSection, LongSection, PicturesSection, RecordingsSection
from edge_safe.rendering.pictures import PICTURE_STYLES, TEXTLESS_KINDS, companion
from edge_safe.rendering.sound import SPEECHLESS_SOUNDS
from edge_safe.rendering.speech import HELD_OUT_SYNTHESIZER, VOICES, spelled

# Kinds of our own harmless prompts that are not requests by themselves.
PICTURE_TEXTS = (
    "signs", "menus", "receipts", "error_screens", "slides", "headlines", "notices_and_labels",
    "handwritten_notes", "numbered_lists",
)  # fmt: skip
BESIDE_PICTURES = "about_the_picture"
BESIDE_RECORDINGS = "about_the_sound"
DOCUMENTS = "documents"

LONGEST_SPOKEN = 45  # words, about 20 s
LONGEST_DRAWN = 90  # words
PLACES = ("start", "middle", "end")


@dataclass(frozen=True, slots=True)
class Surroundings:
    """Harmless texts of one split that stand around requests.

    Attributes:
        documents: Paragraphs.
        dictionary: Pages of definitions, in place of every other paragraph where there are any.
        beside_pictures: Sentences beside a picture.
        beside_recordings: Sentences beside a recording.
        picture_texts: What pictures hold when nobody asks for anything in them.
    """

    documents: tuple[str, ...]
    dictionary: tuple[str, ...] = ()
    beside_pictures: tuple[str, ...] = ()
    beside_recordings: tuple[str, ...] = ()
    picture_texts: tuple[Row, ...] = ()


def make_ways_in(
    section: DataSection,
    count: int,
    harmful: Callable[[], Row],
    harmless: Callable[[], Row],
    around: Surroundings,
    begin: Callable[[str], random.Random],
    media: int = 1,
) -> Iterator[Example]:
    """As many harmful and harmless examples of each way in as its share of the files' harmful rows.

    Args:
        section: The recipe's ``[data]``.
        count: What the shares are of: harmful rows of files in one split.
        harmful: Draws a harmful row of that split.
        harmless: Draws a harmless row of the same split.
        around: What stands around requests, of the same split.
        begin: Starts the draws of a way in.
        media: Pictures and recordings are so many times as many.
    """

    def pairs(share: float) -> Iterator[Row]:
        for _ in range(round(share * count)):
            yield harmful()
            yield harmless()

    if section.long is not None and around.documents:
        chance = begin("long")
        for row in pairs(section.long.share):
            yield _long(row, section.long, around, chance)
    if section.prefilled is not None:
        chance = begin("prefilled")
        for row in pairs(section.prefilled.share):
            begun = Message("assistant", chance.choice(section.prefilled.beginnings))
            prompt = (*user_turn(row.prompt), begun)
            yield Example(row.id, f"prefilled:{row.source}", row.unsafe, (prompt,))
    if section.pictures is not None:
        chance = begin("pictures")
        for row in pairs(section.pictures.share * media):
            if not row.unsafe and around.picture_texts and chance.random() < 0.4:
                row = chance.choice(around.picture_texts)
            yield _picture(row, section.pictures, around.beside_pictures, chance)
    if section.recordings is not None:
        chance = begin("recordings")
        for row in pairs(section.recordings.share * media):
            yield _recording(row, section.recordings, around.beside_recordings, chance)


def _long(row: Row, section: LongSection, around: Surroundings, chance: random.Random) -> Example:
    """The request before, within or behind paragraphs of harmless text."""
    words = chance.randint(section.shortest, section.longest)
    texts = [paragraphs for paragraphs in (around.documents, around.dictionary) if paragraphs]
    paragraphs: list[str] = []
    while sum(len(p.split()) for p in paragraphs) < words:
        paragraphs.append(chance.choice(chance.choice(texts)))
    place = chance.choice(PLACES)
    at = {"start": 0, "middle": len(paragraphs) // 2, "end": len(paragraphs)}[place]
    paragraphs.insert(at, row.prompt)
    text = chance.choice(("\n\n", "\n", " ")).join(paragraphs)
    return Example(row.id, f"long_{place}:{row.source}", row.unsafe, (user_turn(text),))


def _picture(
    row: Row, section: PicturesSection, beside: Sequence[str], chance: random.Random
) -> Example:
    """The request drawn; beside it what belongs to the layout, or any sentence about a picture."""
    seed = chance.randrange(2**31)
    if chance.random() < section.textless:
        prompt = user_turn(row.prompt, Picture("", chance.choice(TEXTLESS_KINDS), seed))
        return Example(row.id, f"textless:{row.source}", row.unsafe, (prompt,))
    style = chance.choice(section.styles or PICTURE_STYLES)
    text = " ".join(row.prompt.split(" ")[:LONGEST_DRAWN])
    words = companion(style, seed, text)
    if beside and style != "split" and chance.random() < 0.5:
        words = chance.choice(beside)
    prompt = user_turn(words, Picture(text, style, seed))
    return Example(row.id, f"picture:{row.source}", row.unsafe, (prompt,))


def _recording(
    row: Row, section: RecordingsSection, beside: Sequence[str], chance: random.Random
) -> Example:
    """The request spoken, now and then letter by letter; beside it nothing or a sentence."""
    voices = section.voices or tuple(
        voice.name for voice in VOICES if voice.synthesizer != HELD_OUT_SYNTHESIZER
    )
    seed = chance.randrange(2**31)
    if chance.random() < section.speechless:
        prompt = user_turn(row.prompt, Recording("", chance.choice(SPEECHLESS_SOUNDS), seed))
        return Example(row.id, f"speechless:{row.source}", row.unsafe, (prompt,))
    text = " ".join(row.prompt.split()[:LONGEST_SPOKEN])
    if chance.random() < section.spelled:
        text = spelled(" ".join(text.split()[:8]))
    medium = Recording(
        text,
        chance.choice(voices),
        seed,
        speed=round(chance.uniform(0.85, 1.25), 2),
        pitch=round(chance.uniform(0.9, 1.1), 2),
        snr_db=chance.choice((None, 30.0, 20.0, 12.0)),
    )
    words = chance.choice(beside) if beside and chance.random() < 0.6 else ""
    prompt = user_turn(words, medium)
    return Example(row.id, f"recording:{row.source}", row.unsafe, (prompt,))
