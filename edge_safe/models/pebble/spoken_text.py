"""Texts as they are spoken and heard: numbers in words, no capitals, no punctuation."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer

_ONES = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
_TENS = ["-", "-", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_SCALES = (
    (1_000_000_000, "billion"),
    (1_000_000, "million"),
    (1_000, "thousand"),
    (100, "hundred"),
)

_SPEAKABLE = re.compile(r"[A-Za-z' .,?!:;\"()-]+")
_LONGEST_NUMBER = 9

SPACE = "\u0120"
"""How byte-level word pieces write a space."""


def number_in_words(number: int) -> str:
    """A whole number from 0 up, as it is said: 342 is "three hundred forty two"."""
    for scale, name in _SCALES:
        if number >= scale:
            rest = number % scale
            head = f"{number_in_words(number // scale)} {name}"
            return f"{head} {number_in_words(rest)}" if rest else head
    if number >= 20:
        ones = number % 10
        return _TENS[number // 10] + (f" {_ONES[ones]}" if ones else "")
    return _ONES[number]


def speakable(text: str) -> str | None:
    """The text with its numbers in words, or None where how it is said is open.

    Signs other than letters and common punctuation (formulas, code, addresses) leave it open.
    """
    text = text.translate(str.maketrans("\u2018\u2019\u201c\u201d\n\t", "''\"\"  "))
    text = re.sub(r"\$(\d+)", r"\1 dollars", text).replace("&", " and ").replace("%", " percent ")
    text = re.sub(r"(?<=\d),(?=\d{3})", "", text)
    if re.search(rf"\d{{{_LONGEST_NUMBER + 1},}}|\d[.:/-]\d|\d[A-Za-z]|[A-Za-z]\d", text):
        return None
    text = re.sub(r"\d+", lambda match: f" {number_in_words(int(match.group()))} ", text)
    text = re.sub(r"\s+", " ", text).strip()
    return text if _SPEAKABLE.fullmatch(text) else None


def heard(text: str) -> str:
    """What a listener writes down: lower-case words and apostrophes, one space between."""
    text = re.sub(r"[^a-z' ]+", " ", text.lower())
    return " ".join(word for word in (w.strip("'") for w in text.split()) if word)


def common_words(tokenizer: Tokenizer, longest: int = 12) -> list[str]:
    """Lower-case words of two letters or more that the tokenizer has as one piece, by id."""
    pattern = re.compile(rf"{SPACE}([a-z]{{2,{longest}}})")
    found = (pattern.fullmatch(token) for token, _ in _by_id(tokenizer))
    return [match.group(1) for match in found if match]


def random_words(words: Sequence[str], rng: np.random.Generator) -> str:
    """Four to nine words that follow from nothing; short frequent ones no more often than rare."""
    return " ".join(words[int(i)] for i in rng.integers(len(words), size=int(rng.integers(4, 10))))


def letter_by_letter(text: str) -> str:
    """The first words of a text, spelled; at most 24 letters, since each takes a third of a second.

    Returns:
        The heard words that are spelled, to be spoken through `spelled`.
    """
    chosen: list[str] = []
    for word in heard(text).split():
        if sum(map(len, chosen)) + len(word) > 24:
            break
        chosen.append(word.replace("'", ""))
    return " ".join(chosen)


def _by_id(tokenizer: Tokenizer) -> list[tuple[str, int]]:
    return sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
