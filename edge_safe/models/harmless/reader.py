"""Reads the harmless prompts, fills their slots and splits them by template.

A file ``<kind>.toml`` holds ``[[template]]`` tables with one ``text`` each and, for all of them,
``[slots]``: lists of the fillings of ``{name}``. All fillings of a template belong to the
template's part of the split, so that nothing seen in training is a twin of something measured.
"""

from __future__ import annotations

import hashlib
import math
import random
import string
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from edge_safe.errors import DataError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Part = Literal["train", "validation", "test"]
Text = Annotated[str, Meta(min_length=1)]

TRAIN_SHARE = 0.70
VALIDATION_SHARE = 0.15
PREFIXES = ("Hi! ", "Quick one: ", "Please help me with this. ", "I was wondering. ")
SUFFIXES = (" Thanks!", " Please be brief.", " Please explain.", " Cheers")


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    text: Text


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    template: Annotated[list[_Entry], Meta(min_length=1)]
    slots: dict[str, Annotated[list[Text], Meta(min_length=1)]] = {}


@dataclass(frozen=True, slots=True)
class Template:
    """One prompt as written; `slots` are those that its text names, in order of appearance."""

    kind: str
    text: str
    slots: tuple[tuple[str, tuple[str, ...]], ...]

    @property
    def id(self) -> str:
        """The kind and the beginning of the text's SHA-256."""
        return f"{self.kind}-{hashlib.sha256(self.text.encode()).hexdigest()[:8]}"

    @property
    def fillings(self) -> int:
        """How many prompts the slots give."""
        return math.prod(len(values) for _, values in self.slots)

    def fill(self, index: int) -> str:
        """The filling of that number, 0 <= index < `fillings`."""
        chosen = {}
        for name, values in self.slots:
            index, place = divmod(index, len(values))
            chosen[name] = values[place]
        return self.text.format_map(chosen)


def kinds(folder: Path | None = None) -> tuple[str, ...]:
    """The kinds there are, sorted; `folder` defaults to the prompts of this package."""
    return tuple(sorted(path.stem for path in _folder(folder).glob("*.toml")))


def read_kind(kind: str, folder: Path | None = None) -> tuple[Template, ...]:
    """Reads one kind's file.

    Raises:
        DataError: There is no such kind, the file is not TOML, has an unknown key or a wrong
            value, a template names an unknown slot, or a template or filling stands there twice.
    """
    path = _folder(folder) / f"{kind}.toml"
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        known = ", ".join(kinds(folder)) or "none"
        raise DataError(
            f"Cannot read {path}: {error.strerror}. Kinds there are: {known}."
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a TOML file: {error}.") from error
    try:
        file = msgspec.convert(table, _File)
    except msgspec.ValidationError as error:
        raise DataError(f"{path} has a wrong key or value: {error}.") from error
    for name, values in file.slots.items():
        _refuse_repeats(values, f"{path}, slot {name!r}")
    _refuse_repeats([entry.text for entry in file.template], f"{path}, templates")
    return tuple(_template(kind, entry.text, file.slots, path) for entry in file.template)


def part_of(template_id: str) -> Part:
    """The part of the split a template belongs to: 70 % train, 15 % validation, 15 % test."""
    place = int(hashlib.sha256(template_id.encode()).hexdigest()[:8], 16) / 2**32
    if place < TRAIN_SHARE:
        return "train"
    return "validation" if place < TRAIN_SHARE + VALIDATION_SHARE else "test"


def variations(template: Template, number: int, seed: int, *, surface: bool = False) -> list[str]:
    """Different prompts of one template, the same ones for the same seed.

    Args:
        template: What to fill.
        number: The most prompts wanted. Without `surface` there are at most `template.fillings`.
        seed: Chooses fillings and surfaces.
        surface: Also vary how the prompt is typed (case, missing end mark, a polite word around
            it, two letters swapped); about every other prompt stays as written.
    """
    chance = random.Random(f"{template.id} {seed}")
    filled = chance.sample(range(template.fillings), min(number, template.fillings))
    if not surface:
        return [template.fill(index) for index in filled]
    prompts: dict[str, None] = {}
    for turn in range(4 * number):
        if len(prompts) == number:
            break
        prompts[typed(template.fill(filled[turn % len(filled)]), chance)] = None
    return list(prompts)


def typed(prompt: str, chance: random.Random) -> str:
    """The prompt as one of many people would type it."""
    way = chance.choice(("as is", "as is", "as is", "as is", "lower", "bare", "polite", "typo"))
    if way == "lower":
        return prompt.lower()
    if way == "bare":
        return prompt.rstrip("?.!")
    if way == "polite":
        before = chance.random() < 0.5
        return chance.choice(PREFIXES) + prompt if before else prompt + chance.choice(SUFFIXES)
    if way == "typo":
        return _swapped(prompt, chance)
    return prompt


def _swapped(prompt: str, chance: random.Random) -> str:
    """Two neighbouring letters inside one longer word change places."""
    words = prompt.split(" ")
    long = [place for place, word in enumerate(words) if len(word) >= 5 and word.isalpha()]
    if not long:
        return prompt
    place = chance.choice(long)
    word = words[place]
    cut = chance.randrange(1, len(word) - 2)
    words[place] = word[:cut] + word[cut + 1] + word[cut] + word[cut + 2 :]
    return " ".join(words)


def _folder(folder: Path | None) -> Path:
    return Path(__file__).parent if folder is None else folder


def _template(kind: str, text: str, slots: dict[str, list[str]], path: Path) -> Template:
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(text) if name is not None]
    except ValueError as error:
        raise DataError(f"{path}, template {text!r}: {error}.") from error
    for name in names:
        if name not in slots:
            known = ", ".join(slots) or "none"
            raise DataError(f"{path}, template {text!r}: unknown slot {name!r}. Known: {known}.")
    return Template(kind, text, tuple((name, tuple(slots[name])) for name in dict.fromkeys(names)))


def _refuse_repeats(texts: list[str], where: str) -> None:
    repeats = sorted({text for text in texts if texts.count(text) > 1})
    if repeats:
        raise DataError(f"{where}: {repeats[0]!r} stands there more than once. Keep one.")
