"""Texts as they are spoken and heard."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer

from edge_safe.models.pebble.spoken_text import (
    common_words,
    heard,
    letter_by_letter,
    number_in_words,
    random_words,
    speakable,
)
from tests.models.pebble.tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tiny_tokenizer().backend_tokenizer


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "zero"),
        (13, "thirteen"),
        (40, "forty"),
        (342, "three hundred forty two"),
        (1_000, "one thousand"),
        (2_011_007, "two million eleven thousand seven"),
    ],
)
def test_numbers(number: int, words: str) -> None:
    assert number_in_words(number) == words


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("What is 12% of 30?", "What is twelve percent of thirty ?"),
        (
            "It\u2019s $5, or 1,500 in all.",
            "It's five dollars, or one thousand five hundred in all.",
        ),
        ("x = 3", None),
        ("at 10:30", None),
        ("see B2", None),
    ],
)
def test_only_what_has_one_reading_is_spoken(text: str, wanted: str | None) -> None:
    spoken = speakable(text)
    assert spoken == wanted or (spoken or "").replace(" ,", ",").replace(" .", ".") == wanted


def test_a_listener_writes_neither_capitals_nor_signs() -> None:
    assert heard("Don't, please -- 'stop' it!") == "don't please stop it"


def test_random_words_are_words_of_the_vocabulary(tokenizer: Tokenizer) -> None:
    words = common_words(tokenizer)
    assert "the" in words
    drawn = random_words(words, np.random.default_rng(0)).split()
    assert 4 <= len(drawn) <= 9
    assert set(drawn) <= set(words)


def test_few_letters_are_spelled() -> None:
    assert letter_by_letter("Where's the nearest underground parking?") == "wheres the nearest"
