"""The measuring file in several ways in, the way in of any example, and choices among examples."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from edge_safe.models.conversations import make_conversations
from edge_safe.models.data import Example, Row, read_rows, user_turn
from edge_safe.models.harmless.reader import part_of, read_kind
from edge_safe.models.recipe import ConversationsSection, DataSection, LongSection
from edge_safe.models.ways_in import DOCUMENTS, Surroundings, make_ways_in
from edge_safe.models.wrappings import HELD_FAMILIES, read_wrappings

Item = TypeVar("Item")

PLAIN = "plain"
# By what stands before the colon of an example's source.
WAYS = {
    "wrapped": "wrapped",
    "written": "wrapped",
    "carried": "carried",
    "rephrased": "rephrased",
    "long_start": "long",
    "long_middle": "long",
    "long_end": "long",
    "split": "conversation",
    "split_refused": "conversation",
    "continuation": "conversation",
    "after_refusal": "conversation",
    "harmless_turns": "conversation",
    "prefilled": "prefilled",
    "picture": "picture",
    "textless": "picture",
    "recording": "recording",
    "speechless": "recording",
}
CONVERSATIONS = ConversationsSection(
    split=0.1, continuation=0.1, split_refused=0.1, after_refusal=0.15, harmless=0.15
)
LONG = LongSection(share=0.2, shortest=80, longest=400)


def way_of(source: str) -> str:
    """The way in of an example by its source."""
    return WAYS.get(source.split(":")[0], PLAIN) if ":" in source else PLAIN


def measuring_examples(path: Path, limit: int | None) -> list[Example]:
    """The rows as they are, in wrappings that training never saw, in turns, and in long texts.

    Args:
        path: A file of labelled text rows.
        limit: Rows at most, spread over the file and over both labels.

    Raises:
        DataError: The file is missing or malformed.
    """
    rows = spread(read_rows(path), limit)
    return [*_plain(rows), *_wrapped(rows), *_composed(rows)]


def spread(rows: Sequence[Row], limit: int | None) -> list[Row]:
    """At most so many rows, evenly over the file; of each label its share."""
    if limit is None or limit >= len(rows):
        return list(rows)
    kept: list[Row] = []
    for label in (True, False):
        side = [row for row in rows if row.unsafe == label]
        count = max(1, round(limit * len(side) / len(rows))) if side else 0
        kept += [side[i] for i in np.linspace(0, len(side) - 1, count).astype(int)]
    return kept


def drawn(items: Sequence[Item], limit: int | None, seed: str = "study") -> list[Item]:
    """At most so many items, at random but always the same ones, in their order."""
    if limit is None or limit >= len(items):
        return list(items)
    places = random.Random(seed).sample(range(len(items)), limit)
    return [items[i] for i in sorted(places)]


def balanced(
    items: Sequence[Item], unsafe: Callable[[Item], bool], limit: int | None
) -> list[Item]:
    """Like ``drawn``, half of them harmful where there are enough."""
    if limit is None or limit >= len(items):
        return list(items)
    sides = [[i for i in items if unsafe(i) == label] for label in (True, False)]
    harmful = drawn(sides[0], max(limit // 2, limit - len(sides[1])))
    return harmful + drawn(sides[1], limit - len(harmful))


def documents() -> list[str]:
    """Harmless paragraphs that nothing was trained on."""
    return [t.text for t in read_kind(DOCUMENTS) if part_of(t.id) == "test"]


def _plain(rows: Sequence[Row]) -> Iterator[Example]:
    for row in rows:
        yield Example(row.id, row.source.replace(":", " "), row.unsafe, (user_turn(row.prompt),))


def _wrapped(rows: Sequence[Row]) -> Iterator[Example]:
    held = [w for w in read_wrappings() if w.family in HELD_FAMILIES]
    for number, row in enumerate(rows):
        text = held[number % len(held)].around(row.prompt)
        yield Example(row.id, f"written:{row.source}", row.unsafe, (user_turn(text),))


def _composed(rows: Sequence[Row]) -> Iterator[Example]:
    """Conversations and long texts, made by training's own functions."""
    chance = random.Random("study")
    harmful = [row for row in rows if row.unsafe]
    harmless = [row for row in rows if not row.unsafe]
    if not harmful or not harmless:
        return

    def draw() -> Row:
        return chance.choice(harmless)

    def draw_harmful() -> Row:
        return chance.choice(harmful)

    yield from make_conversations(CONVERSATIONS, len(harmful), draw_harmful, draw, chance)
    around = Surroundings(tuple(documents()))
    section = DataSection(train=("-",), long=LONG)
    yield from make_ways_in(section, len(harmful), draw_harmful, draw, around, lambda _: chance)
