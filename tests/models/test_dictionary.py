"""Pages of definitions: what stands on them, and that splits keep their own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from edge_safe.errors import DataError
from edge_safe.models.compose import build_examples
from edge_safe.models.contrasts.wordnet import WordNet
from edge_safe.models.dictionary import dictionary_pages
from edge_safe.models.recipe import DataSection, HarmlessSection, LongSection

GLOSS = "a thing that has many words in its definition and then some more of them"
FILES = {"noun": "n", "verb": "v", "adj": "a", "adv": "r"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A database in the format of wndb(5), 40 meanings of each part of speech."""
    for name, part in FILES.items():
        lines = [
            f"{number:08d} 00 {part} 01 {name}_{number} 0 000 | {GLOSS} {number}  "
            for number in range(40)
        ]
        (tmp_path / f"data.{name}").write_text("  1 a licence\n" + "\n".join(lines) + "\n")
    return tmp_path


def test_every_meaning_stands_on_one_page_at_most(folder: Path) -> None:
    pages = list(dictionary_pages(WordNet(folder), 0))
    words = [f"{name} {number}" for name in FILES for number in range(40)]
    found = [re.search(rf"\b{word}\b", page) is not None for page in pages for word in words]
    assert sum(found) > 140
    assert all(50 <= len(page.split()) <= 160 for page in pages)
    assert sum(page.count(GLOSS) for page in pages) == sum(found)


def test_a_seed_gives_the_same_pages(folder: Path) -> None:
    first, again, other = (list(dictionary_pages(WordNet(folder), seed)) for seed in (0, 0, 1))
    assert first == again != other


def test_long_texts_of_the_splits_share_no_page(folder: Path, data_folder: Path) -> None:
    section = DataSection(
        train=("unsafe.jsonl", "safe.jsonl"),
        validation_share=0.3,
        harmless=HarmlessSection(),
        long=LongSection(share=1.0, shortest=300, longest=400, dictionary_pages=20),
        wordnet=str(folder),
    )
    split = build_examples(section, data_folder)
    train, held = (
        {
            f"{name} {number}"
            for example in part
            for number in range(40)
            for name in FILES
            if re.search(rf"\b{name} {number}\b", example.prompts[0][0].content)
        }
        for part in (split.train, split.validation)
    )
    assert train
    assert held
    assert not train & held


def test_a_folder_without_the_database_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="apt-get install wordnet-base"):
        next(dictionary_pages(WordNet(tmp_path), 0))
