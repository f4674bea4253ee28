"""Reads WordNet's database files, for the words that fill the slots of contrasts.

The format is wndb(5) of WordNet 3.0; Debian's package wordnet-base has the files. A sense is named
as usual: lemma, part of speech and number, ``bomb.n.01``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from edge_safe.errors import DataError

FILES = {"n": "noun", "v": "verb", "a": "adj", "s": "adj", "r": "adv"}
HYPONYM, SIMILAR = "~", "&"


@dataclass(frozen=True, slots=True)
class Synset:
    """One meaning.

    Attributes:
        words: Its words as written, most usual first.
        pointers: Relation symbol, file and offset of the synsets it points to.
        gloss: Its definition, with examples.
    """

    words: tuple[str, ...]
    pointers: tuple[tuple[str, str, str], ...]
    gloss: str


@dataclass(slots=True)
class WordNet:
    """The database in one folder; files are read when first asked for."""

    folder: Path
    _senses: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    _synsets: dict[str, dict[str, Synset]] = field(default_factory=dict)
    _seen: dict[str, int] | None = None

    def hyponyms(self, sense: str) -> list[Synset]:
        """A sense and all that are a kind of it, the nearest first.

        Raises:
            DataError: There is no such sense, or the database cannot be read.
        """
        name, offset = self._find(sense)
        return list(self._reached(name, offset, HYPONYM))

    def similar(self, sense: str) -> list[Synset]:
        """An adjective's sense and those similar to it.

        Raises:
            DataError: There is no such sense, or the database cannot be read.
        """
        name, offset = self._find(sense)
        first = self._read(name)[offset]
        near = (self._read(file)[at] for kind, file, at in first.pointers if kind == SIMILAR)
        return [first, *near]

    def synsets(self, part: str) -> list[Synset]:
        """All meanings of one part of speech ("n", "v", "a" or "r"), as they stand in its file.

        Raises:
            DataError: The database cannot be read.
        """
        return list(self._read(FILES[part]).values())

    def seen(self, word: str) -> int:
        """How often a word stands in the texts that WordNet's authors tagged."""
        if self._seen is None:
            self._seen = {}
            for line in self._lines("cntlist.rev"):
                key, _, count = line.split()[:3]
                lemma = key.partition("%")[0]
                self._seen[lemma] = self._seen.get(lemma, 0) + int(count)
        return self._seen.get(word.replace(" ", "_").lower(), 0)

    def _find(self, sense: str) -> tuple[str, str]:
        found = re.fullmatch(r"(\S+)\.([nvasr])\.(\d+)", sense)
        if found is None:
            raise DataError(f"{sense!r} is no sense of WordNet; write it like 'bomb.n.01'.")
        lemma, name, number = found[1].lower(), FILES[found[2]], int(found[3])
        if name not in self._senses:
            self._senses[name] = dict(map(_sense_offsets, self._lines(f"index.{name}")))
        offsets = self._senses[name].get(lemma, [])
        if not 0 < number <= len(offsets):
            raise DataError(
                f"{self.folder} has no sense {sense!r} ({lemma!r} has {len(offsets)} as {name}). "
                "WordNet 3.0 is needed."
            )
        return name, offsets[number - 1]

    def _reached(self, name: str, offset: str, kind: str) -> Iterator[Synset]:
        waiting, known = [offset], {offset}
        for at in waiting:
            synset = self._read(name)[at]
            yield synset
            further = [to for way, file, to in synset.pointers if way == kind and file == name]
            waiting += [to for to in dict.fromkeys(further) if to not in known]
            known.update(further)

    def _read(self, name: str) -> dict[str, Synset]:
        if name not in self._synsets:
            self._synsets[name] = dict(map(_synset, self._lines(f"data.{name}")))
        return self._synsets[name]

    def _lines(self, file: str) -> list[str]:
        """Lines behind the licence, which is indented."""
        path = self.folder / file
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"Cannot read WordNet's {path} ({error}). Install it (apt-get install "
                "wordnet-base) or name its folder in data.wordnet."
            ) from error
        return [line for line in text.split("\n") if line and not line.startswith(" ")]


def _sense_offsets(line: str) -> tuple[str, list[str]]:
    """``lemma pos synset_cnt p_cnt [symbol...] sense_cnt tagsense_cnt offset [offset...]``."""
    fields = line.split()
    return fields[0], fields[-int(fields[2]) :]


def _synset(line: str) -> tuple[str, Synset]:
    """``offset lex_filenum ss_type w_cnt(hex) word lex_id ... p_cnt [symbol offset pos st]...``."""
    data, _, gloss = line.partition("|")
    fields = data.split()
    words_end = 4 + 2 * int(fields[3], 16)
    words = [re.sub(r"\(\w+\)$", "", word).replace("_", " ") for word in fields[4:words_end:2]]
    behind = fields[words_end + 1 : words_end + 1 + 4 * int(fields[words_end])]
    pointers = zip(behind[::4], (FILES[p] for p in behind[2::4]), behind[1::4], strict=True)
    return fields[0], Synset(tuple(words), tuple(pointers), gloss.strip())
