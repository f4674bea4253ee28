"""From rows to training examples: every request in every way in, harmful and harmless alike.

Whatever is put around a harmful request (a wrapping, a long document, a picture, a voice) is put
around as many harmless ones, so that it says nothing by itself. Rows, templates and documents are
split into training and validation before anything is made of them.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from edge_safe.errors import DataError
from edge_safe.models.contrasts.reader import contrast_kinds, read_contrasts
from edge_safe.models.contrasts.wordnet import WordNet
from edge_safe.models.conversations import make_conversations
from edge_safe.models.data import (
    Example,
    Row,
    is_held,
    load_rows,
    read_json_lines,
    share_of,
    user_turn,
)
from edge_safe.models.dictionary import dictionary_pages
from edge_safe.models.harmless.reader import kinds, part_of, read_kind, variations
from edge_safe.models.recipe import (
    ContrastsSection,
    DataSection,
    HarmlessSection,
    RephrasedSection,
)
from edge_safe.models.row_groups import RowGroups
from edge_safe.models.ways_in import (
    BESIDE_PICTURES,
    BESIDE_RECORDINGS,
    DOCUMENTS,
    PICTURE_TEXTS,
    Surroundings,
    make_ways_in,
)
from edge_safe.models.wrappings import HELD_FAMILIES, read_wrappings

_TASK = re.compile(
    r"\b(?:how (?:to|do i|do you|do people|can i|can one|could i|should i|would i)|help me"
    r"|(?:ways|steps|instructions|tutorial|strategy|plan|guide|best way) to)"
    r"\s+([a-z][^.?!:;\n]{7,139})",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Split:
    """Examples for training and for validation; no prompt or template stands in both."""

    train: tuple[Example, ...]
    validation: tuple[Example, ...]


def build_examples(section: DataSection, root: Path) -> Split:
    """Reads, caps, splits and composes.

    Args:
        section: The recipe's ``[data]``.
        root: Folder its files are relative to.

    Raises:
        DataError: A file is missing or malformed, or a split lacks one of the labels.
    """
    seed = section.split_seed
    rows = load_rows(section, root)
    files: list[str] = []
    if section.wrappings is not None:
        files = _read_templates(root / section.wrappings.file, section.wrappings.max_characters)
    written = [w.text for w in read_wrappings() if w.family not in HELD_FAMILIES]
    halves = []
    for name, held in (("train", False), ("validation", True)):
        part = [r for r in rows if is_held(r.prompt, seed, section.validation_share) == held]
        labels = {row.unsafe for row in part}
        if labels != {True, False}:
            raise DataError(
                f"The {name} split has {len(part)} rows and not both labels. "
                "Give more rows, or another validation_share."
            )
        templates, own = (
            [t for t in texts if is_held(t, seed, section.validation_share) == held]
            for texts in (files, written)
        )
        maker = _Maker(section, part, templates, own, f"{seed}:{name}", held)
        halves.append(tuple(maker.examples()))
    return Split(*halves)


class _Maker:
    """Everything one split is made of."""

    def __init__(
        self,
        section: DataSection,
        rows: Sequence[Row],
        templates: Sequence[str],
        written: Sequence[str],
        seed: str,
        held: bool,
    ) -> None:
        self._section = section
        self._held = held
        self._templates = templates
        self._written = written
        self._seed = seed
        self._chance = random.Random(seed)
        self._texts = _written_prompts(
            section.harmless, section.split_seed, "validation" if held else "train"
        )
        apart = {*PICTURE_TEXTS, BESIDE_PICTURES, BESIDE_RECORDINGS, DOCUMENTS}
        own = [row for kind, texts in self._texts.items() if kind not in apart for row in texts]
        contrasts = _contrasts(section.contrasts, section, held)
        self._rows = [*rows, *own, *contrasts]
        harmful, harmless = ([r for r in rows if r.unsafe is unsafe] for unsafe in (True, False))
        twins = {un: [row for row in contrasts if row.unsafe is un] for un in (True, False)}
        self._count = len(harmful)
        self._asked = {True: harmful, False: [*harmless, *own]}
        self._harmful = RowGroups(harmful, twins[True])
        self._harmless = RowGroups(harmless, own, twins[False])

    def examples(self) -> Iterator[Example]:
        """Plain rows, wrapped ones, conversations, and the other ways in."""
        section = self._section
        for row in self._rows:
            yield Example(row.id, row.source, row.unsafe, (user_turn(row.prompt),))
        shells: list[tuple[str, float, Sequence[str]]] = []
        if section.wrappings is not None:
            shells.append(("wrapped", section.wrappings.share, self._templates))
        if section.written_wrappings > 0.0:
            shells.append(("written", section.written_wrappings, self._written))
        if section.carriers is not None:
            shells.append(("carried", section.carriers.share, section.carriers.templates))
        for name, share, choices in shells:
            self._begin(name)
            yield from self._shells(name, share, choices)
        if section.rephrased is not None:
            self._begin("rephrased")
            yield from self._rephrased(section.rephrased)
        chance = self._begin("conversations")
        yield from make_conversations(
            section.conversations, self._count, self._draw_harmful, self._draw, chance
        )
        around = Surroundings(
            **{
                name: tuple(row.prompt for row in self._texts.get(kind, ()))
                for name, kind in (
                    ("documents", DOCUMENTS),
                    ("beside_pictures", BESIDE_PICTURES),
                    ("beside_recordings", BESIDE_RECORDINGS),
                )
            },
            dictionary=_dictionary(section, self._held),
            picture_texts=tuple(row for kind in PICTURE_TEXTS for row in self._texts.get(kind, ())),
        )
        yield from make_ways_in(
            section,
            self._count,
            self._draw_asked_harmful if self._held else self._draw_harmful,
            self._draw_asked if self._held else self._draw,
            around,
            self._begin,
            section.validation_media if self._held else 1,
        )

    def _begin(self, way: str) -> random.Random:
        """Starts the draws of one way in: what another way takes changes nothing in it."""
        self._chance.seed(f"{self._seed}:{way}")
        return self._chance

    def _draw(self) -> Row:
        """A harmless row."""
        return self._harmless.draw(self._chance)

    def _draw_harmful(self) -> Row:
        """A harmful row."""
        return self._harmful.draw(self._chance)

    def _draw_asked(self) -> Row:
        """A harmless row as often as it stands among requests as they come.

        Thresholds are fitted on the validation split: pictures, sound and long texts there hold
        the same mix of requests as plain text.
        """
        return self._chance.choice(self._asked[False])

    def _draw_asked_harmful(self) -> Row:
        """A harmful row of files; see ``_draw_asked``."""
        return self._chance.choice(self._asked[True])

    def _shells(self, name: str, share: float, choices: Sequence[str]) -> Iterator[Example]:
        if not choices:
            return
        for _ in range(round(share * self._count)):
            for row in (self._draw_harmful(), self._draw()):
                text = self._chance.choice(choices).replace("{prompt}", row.prompt)
                yield Example(row.id, f"{name}:{row.source}", row.unsafe, (user_turn(text),))

    def _rephrased(self, section: RephrasedSection) -> Iterator[Example]:
        chance = self._chance
        harmful, harmless = (
            rows.where(lambda row: find_task(row.prompt) is not None)
            for rows in (self._harmful, self._harmless)
        )
        if not harmful or not harmless:
            return
        for _ in range(round(section.share * self._count)):
            for rows in (harmful, harmless):
                row = rows.draw(chance)
                text = chance.choice(section.forms).replace("{task}", find_task(row.prompt) or "")
                yield Example(row.id, f"rephrased:{row.source}", row.unsafe, (user_turn(text),))


def find_task(prompt: str) -> str | None:
    """What a prompt wants to have done: the words behind "how to", "help me" and the like."""
    found = _TASK.search(prompt)
    return found.group(1).strip() if found else None


def _written_prompts(section: HarmlessSection | None, seed: int, part: str) -> dict[str, list[Row]]:
    """Our own harmless prompts of one part of the split, by kind."""
    if section is None:
        return {}
    unknown = set(section.kinds) - set(kinds())
    if unknown:
        raise DataError(
            f"data.harmless.kinds names {', '.join(sorted(unknown))}. "
            f"Kinds there are: {', '.join(kinds())}."
        )
    found: dict[str, list[Row]] = {}
    for kind in kinds():
        number = section.kinds.get(kind, section.prompts_per_template)
        surface = kind not in (*PICTURE_TEXTS, DOCUMENTS)
        found[kind] = [
            Row(f"{template.id}-{place}", prompt, False, kind)
            for template in read_kind(kind)
            if part_of(template.id) == part and share_of(template.id, "harmless") < number
            for place, prompt in enumerate(
                variations(template, max(1, round(number)), seed, surface=surface)
            )
        ]
    return {kind: rows for kind, rows in found.items() if rows}


def _contrasts(section: ContrastsSection | None, data: DataSection, held: bool) -> list[Row]:
    """Requests in pairs of one side of the split, fewer of them for validation.

    Their source has a colon, since they are not requests as they come; see ``as_they_came``.
    """
    if section is None:
        return []
    share = data.validation_share
    number = max(1, round(section.prompts * share / (1 - share))) if held else section.prompts
    wordnet = WordNet(Path(data.wordnet))
    return [
        Row(contrast.id, contrast.text, contrast.unsafe, f"contrast:{kind}")
        for kind in contrast_kinds()
        for contrast in read_contrasts(kind, held, number, data.split_seed, wordnet)
    ]


def _dictionary(data: DataSection, held: bool) -> tuple[str, ...]:
    """Pages of definitions of one side of the split, fewer of them for validation."""
    if data.long is None or not data.long.dictionary_pages:
        return ()
    share = data.validation_share
    number = data.long.dictionary_pages
    if held:
        number = max(1, round(number * share / (1 - share)))
    pages = dictionary_pages(WordNet(Path(data.wordnet)), data.split_seed)
    wanted = (page for page in pages if is_held(page, data.split_seed, share) == held)
    return tuple(itertools.islice(wanted, number))


def _read_templates(path: Path, longest: int | None) -> list[str]:
    templates = []
    for number, line in read_json_lines(path):
        template = line.get("template")
        if not isinstance(template, str) or "{prompt}" not in template:
            raise DataError(f'{path}, line {number}: needs a "template" that has {{prompt}}.')
        if longest is None or len(template) <= longest:
            templates.append(template)
    if not templates:
        raise DataError(f"{path} has no template of at most {longest} characters.")
    return sorted(templates, key=lambda text: share_of(text, "templates"))
