"""Reads the contrasts, fills their slots and splits them by template.

A file ``<kind>.toml`` holds ``[[template]]`` tables. One without ``reading`` is filled in both
ways: the form is the same and the filling alone decides, so a gate learns nothing from the form.
Slots stand under ``[slots.harmful]``, ``[slots.harmless]`` or ``[slots.both]``; each is a list of
words, or a table that names senses of WordNet whose hyponyms or similar words fill it.
"""

from __future__ import annotations

import hashlib
import random
import re
import string
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from edge_safe.errors import DataError
from edge_safe.models.contrasts.wordnet import Synset, WordNet
from edge_safe.models.harmless.reader import Text, part_of, typed

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Reading = Literal["harmful", "harmless"]
READINGS: tuple[Reading, ...] = ("harmful", "harmless")
# A word of WordNet that can stand in a sentence: letters, apostrophes, hyphens.
_WORD = re.compile(r"[A-Za-z][A-Za-z' -]+[a-z]")


class Senses(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Words of WordNet: all kinds of the senses named ``wordnet``, all ``similar`` adjectives.

    ``form`` puts the article before them or makes them plural; words of more than ``most_words``
    words, seen less often than ``seen`` times, or named in ``without`` are left out.
    """

    wordnet: tuple[Text, ...] = ()
    similar: tuple[Text, ...] = ()
    form: Literal["plain", "article", "plural"] = "plain"
    most_words: Annotated[int, Meta(ge=1)] = 2
    seen: Annotated[int, Meta(ge=0)] = 0
    without: frozenset[str] = frozenset()


Slot = tuple[Text, ...] | Senses


class _Template(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    text: Text
    reading: Reading | None = None


class _Slots(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    harmful: dict[str, Slot] = {}
    harmless: dict[str, Slot] = {}
    both: dict[str, Slot] = {}


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    template: Annotated[tuple[_Template, ...], Meta(min_length=1)]
    slots: _Slots = _Slots()


@dataclass(frozen=True, slots=True)
class Contrast:
    """One prompt that a template gave.

    Attributes:
        id: Kind, hash of the template, reading and number.
        text: The prompt.
        unsafe: Whether it is the harmful reading.
    """

    id: str
    text: str
    unsafe: bool


def contrast_kinds(folder: Path | None = None) -> tuple[str, ...]:
    """The kinds there are, sorted; ``folder`` defaults to the files of this package."""
    return tuple(sorted(path.stem for path in _folder(folder).glob("*.toml")))


def read_contrasts(
    kind: str, held: bool, number: int, seed: int, wordnet: WordNet, folder: Path | None = None
) -> list[Contrast]:
    """Prompts of one kind from the templates of one side of the split.

    Args:
        kind: The file's name.
        held: The side for validation, 15 % of the templates, instead of the other. All fillings
            of a template stand on the same side.
        number: Prompts of each reading, fewer where the templates do not give so many.
        seed: Chooses the fillings and how they are typed.
        wordnet: Where words come from.
        folder: Of the files; those of this package by default.

    Raises:
        DataError: The file has an unknown key or a wrong value, a template names a slot that its
            reading lacks, or WordNet cannot be read or lacks a sense.
    """
    path = _folder(folder) / f"{kind}.toml"
    file = _read(path)
    found = []
    for reading in READINGS:
        slots: dict[str, tuple[str, ...]] = {}
        named = {**file.slots.both, **getattr(file.slots, reading)}
        templates = [t.text for t in file.template if t.reading in (None, reading)]
        for text in templates:
            for name in _slot_names(text, path):
                if name not in named:
                    raise DataError(
                        f"{path}, template {text!r}: the {reading} reading has no slot {name!r}."
                    )
                if name not in slots:
                    slots[name] = slot_words(named[name], wordnet)
                if not slots[name]:
                    raise DataError(f"{path}: the {reading} slot {name!r} has no word left.")
        ours = [t for t in templates if (part_of(_template_id(kind, t)) == "validation") == held]
        found += _fill(kind, reading, ours, slots, number, seed)
    return found


def slot_words(slot: Slot, wordnet: WordNet) -> tuple[str, ...]:
    """What may fill a slot, each once.

    Raises:
        DataError: WordNet cannot be read or lacks a sense.
    """
    if not isinstance(slot, Senses):
        return slot
    synsets: list[Synset] = []
    for sense in slot.wordnet:
        synsets += wordnet.hyponyms(sense)
    first = [synset.words[0] for synset in synsets]
    near = [word for sense in slot.similar for s in wordnet.similar(sense) for word in s.words]
    kept = [
        word
        for word in dict.fromkeys([*first, *near])
        if _WORD.fullmatch(word)
        and len(word.split()) <= slot.most_words
        and word not in slot.without
        and (slot.seen == 0 or wordnet.seen(word) >= slot.seen)
    ]
    return tuple(_in_form(word, slot.form) for word in kept)


def _in_form(word: str, form: str) -> str:
    if form == "article":
        return f"an {word}" if word[0].lower() in "aeiou" else f"a {word}"
    if form != "plural":
        return word
    if word.endswith(("s", "x", "ch", "sh")):
        return word + "es"
    if word.endswith("y") and word[-2] not in "aeiou":
        return word[:-1] + "ies"
    return word + "s"


def _fill(
    kind: str,
    reading: Reading,
    templates: list[str],
    slots: dict[str, tuple[str, ...]],
    number: int,
    seed: int,
) -> list[Contrast]:
    """Takes the templates in turn until there are enough different prompts."""
    found: dict[str, Contrast] = {}
    chance = random.Random(f"{kind} {reading} {seed}")
    for turn in range(4 * number if templates else 0):
        if len(found) == number:
            break
        text = templates[turn % len(templates)]
        names = dict.fromkeys(_slot_names(text, Path(kind)))
        prompt = text.format_map({name: chance.choice(slots[name]) for name in names})
        name = f"{_template_id(kind, text)}-{reading}-{turn}"
        found.setdefault(prompt, Contrast(name, typed(prompt, chance), reading == "harmful"))
    return list(found.values())


def _read(path: Path) -> _File:
    try:
        return msgspec.convert(tomllib.loads(path.read_text(encoding="utf-8")), _File)
    except OSError as error:
        known = ", ".join(contrast_kinds(path.parent)) or "none"
        raise DataError(
            f"Cannot read {path}: {error.strerror}. Kinds there are: {known}."
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a TOML file: {error}.") from error
    except msgspec.ValidationError as error:
        raise DataError(f"{path} has a wrong key or value: {error}.") from error


def _slot_names(text: str, path: Path) -> list[str]:
    try:
        return [name for _, name, _, _ in string.Formatter().parse(text) if name is not None]
    except ValueError as error:
        raise DataError(f"{path}, template {text!r}: {error}.") from error


def _template_id(kind: str, text: str) -> str:
    return f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _folder(folder: Path | None) -> Path:
    return Path(__file__).parent if folder is None else folder
