"""Contrasts: WordNet's files, the slots' words, both readings of a template, and the split."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import msgspec
import pytest

from edge_safe.errors import DataError
from edge_safe.models.compose import build_examples
from edge_safe.models.contrasts.reader import (
    READINGS,
    Contrast,
    Senses,
    contrast_kinds,
    read_contrasts,
    slot_words,
)
from edge_safe.models.contrasts.wordnet import WordNet
from edge_safe.models.data import Row
from edge_safe.models.recipe import ContrastsSection, DataSection
from edge_safe.models.row_groups import RowGroups

# The format of wndb(5), with a licence line as in the files of Princeton.
NOUNS = """  1 This software and database is being provided to you
00000100 06 n 02 toy 0 plaything 0 003 ~ 00000200 n 0000 ~ 00000300 n 0000 @ 00000900 n 0000 | x
00000200 06 n 01 toy_boat 0 003 @ 00000100 n 0000 ~ 00000300 n 0000 ~ 00000400 n 0000 | floats
00000300 06 n 01 ark 0 001 @ 00000200 n 0000 | big
00000400 06 n 01 very_small_boat 0 001 @ 00000200 n 0000 | small
00000500 06 n 01 box 0 000 | holds things
00000600 06 n 01 baby 0 000 | a small person
00000900 06 n 01 thing 0 001 ~ 00000100 n 0000 | anything
"""
NOUN_INDEX = """  1 This software and database is being provided to you
toy n 2 1 @ 2 1 00000500 00000100
box n 1 0 1 0 00000500
baby n 1 0 1 0 00000600
"""
ADJECTIVES = """00000100 00 a 01 good 0 001 & 00000200 a 0000 | fine
00000200 00 s 02 nice(a) 0 great 0 001 & 00000100 a 0000 | pleasant
"""
COUNTS = "nice%5:00:00:good:00 1 4\nnice%3:00:00:: 2 1\n"

FILE = """
[slots.harmful]
thing = ["ogre", "yeti"]
[slots.harmless]
thing = { wordnet = ["toy.n.02"] }
pet = ["cat"]
[slots.both]
place = ["here", "there"]
"""


@pytest.fixture
def wordnet(tmp_path: Path) -> WordNet:
    folder = tmp_path / "wordnet"
    folder.mkdir()
    for name, text in (
        ("data.noun", NOUNS),
        ("index.noun", NOUN_INDEX),
        ("data.adj", ADJECTIVES),
        ("index.adj", "good a 1 1 & 1 1 00000100\n"),
        ("cntlist.rev", COUNTS),
    ):
        (folder / name).write_text(text, encoding="utf-8")
    return WordNet(folder)


def kind_file(folder: Path, templates: str) -> Path:
    (folder / "tale.toml").write_text(FILE + templates, encoding="utf-8")
    return folder


def template(text: str, reading: str | None = None) -> str:
    return f'[[template]]\ntext = "{text}"\n' + (f'reading = "{reading}"\n' if reading else "")


def prompts(folder: Path, wordnet: WordNet, number: int = 8) -> list[Contrast]:
    sides = [read_contrasts("tale", held, number, 0, wordnet, folder) for held in (False, True)]
    return [contrast for side in sides for contrast in side]


def test_hyponyms_are_all_kinds_of_a_sense_each_once_the_nearest_first(wordnet: WordNet) -> None:
    found = [synset.words for synset in wordnet.hyponyms("toy.n.02")]
    assert found == [("toy", "plaything"), ("toy boat",), ("ark",), ("very small boat",)]


def test_a_sense_is_told_from_another_of_the_same_word(wordnet: WordNet) -> None:
    assert [synset.words for synset in wordnet.hyponyms("toy.n.01")] == [("box",)]


def test_similar_adjectives_come_without_their_syntactic_marks(wordnet: WordNet) -> None:
    assert [s.words for s in wordnet.similar("good.a.01")] == [("good",), ("nice", "great")]


def test_counts_of_all_senses_of_a_word_are_added(wordnet: WordNet) -> None:
    assert (wordnet.seen("nice"), wordnet.seen("Great")) == (5, 0)


@pytest.mark.parametrize("sense", ["toy", "toy.n.03", "toy.n.00", "bicycle.n.01", "toy.x.01"])
def test_an_unknown_sense_is_named(wordnet: WordNet, sense: str) -> None:
    with pytest.raises(DataError, match=sense):
        wordnet.hyponyms(sense)


def test_a_missing_database_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="apt-get install wordnet-base"):
        WordNet(tmp_path / "nowhere").hyponyms("toy.n.01")


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"wordnet": ["toy.n.02"]}, ("toy", "toy boat", "ark")),
        ({"wordnet": ["toy.n.02"], "most_words": 1}, ("toy", "ark")),
        ({"wordnet": ["toy.n.02"], "most_words": 1, "form": "article"}, ("a toy", "an ark")),
        ({"wordnet": ["toy.n.01", "baby.n.01"], "form": "plural"}, ("boxes", "babies")),
        ({"similar": ["good.a.01"], "without": ["great"]}, ("good", "nice")),
        ({"similar": ["good.a.01"], "seen": 5}, ("nice",)),
    ],
)
def test_senses_become_words(
    wordnet: WordNet, wanted: dict[str, object], words: tuple[str, ...]
) -> None:
    assert slot_words(msgspec.convert(wanted, Senses), wordnet) == words


def test_a_template_without_a_reading_is_filled_in_both(tmp_path: Path, wordnet: WordNet) -> None:
    made = prompts(kind_file(tmp_path, template("Is the {thing} {place}?")), wordnet)
    assert {c.unsafe for c in made} == {True, False}
    for contrast in made:
        assert contrast.unsafe is any(word in contrast.text.lower() for word in ("ogre", "yeti"))


def test_a_template_with_a_reading_gives_no_other(tmp_path: Path, wordnet: WordNet) -> None:
    made = prompts(kind_file(tmp_path, template("Feed the {pet} {place}.", "harmless")), wordnet)
    assert made
    assert not any(contrast.unsafe for contrast in made)


def test_prompts_are_at_most_as_many_as_wanted_and_differ(tmp_path: Path, wordnet: WordNet) -> None:
    made = prompts(kind_file(tmp_path, template("Fight the {thing} {place}.", "harmful")), wordnet)
    assert 1 < len({c.id for c in made}) == len(made) <= 4


@pytest.mark.parametrize(
    ("templates", "complaint"),
    [
        ("[[template]\n", "is not a TOML file"),
        ("", "template"),
        (template("See the {thnig}"), r"harmful reading has no slot 'thnig'"),
        (template("Pet the {pet}"), r"harmful reading has no slot 'pet'"),
        (template("a", "evil"), "evil"),
        (template("See the {thing"), r"See the \{thing"),
    ],
)
def test_a_malformed_file_is_named_with_what_is_wrong(
    tmp_path: Path, wordnet: WordNet, templates: str, complaint: str
) -> None:
    with pytest.raises(DataError, match=complaint) as caught:
        prompts(kind_file(tmp_path, templates), wordnet)
    assert "tale.toml" in str(caught.value)


def test_no_template_of_our_own_stands_on_both_sides_or_in_one_reading_only() -> None:
    folder = Path("/usr/share/wordnet")
    if not (folder / "data.noun").is_file():
        pytest.skip("wordnet-base is not installed")
    wordnet = WordNet(folder)
    for kind in contrast_kinds():
        train, held = (
            {c.id.split("-harm")[0] for c in read_contrasts(kind, side, 60, 0, wordnet)}
            for side in (False, True)
        )
        assert not train & held
        labels = Counter(c.unsafe for c in read_contrasts(kind, False, 20, 0, wordnet))
        assert labels == {True: 20, False: 20}


def test_contrasts_join_the_examples_with_fewer_for_validation(data_folder: Path) -> None:
    folder = Path("/usr/share/wordnet")
    if not (folder / "data.noun").is_file():
        pytest.skip("wordnet-base is not installed")
    files = ("unsafe.jsonl", "safe.jsonl")
    section = DataSection(train=files, validation_share=0.3, contrasts=ContrastsSection(10))
    split = build_examples(section, data_folder)
    train, held = (
        [e for e in part if e.source.startswith("contrast:")]
        for part in (split.train, split.validation)
    )
    assert len(READINGS) * 10 * len(contrast_kinds()) == len(train) > len(held) > 0


def test_draws_take_groups_then_sources_then_rows_evenly() -> None:
    files = [Row(f"a{i}", "x", True, "large") for i in range(99)] + [Row("b", "x", True, "small")]
    groups = RowGroups(files, [], [Row("c", "x", True, "own")])
    chance = random.Random(0)
    drawn = Counter(groups.draw(chance).source for _ in range(4000))
    assert drawn["own"] == pytest.approx(2000, abs=150)
    assert drawn["small"] == pytest.approx(1000, abs=150)


def test_groups_without_rows_are_empty() -> None:
    groups = RowGroups([Row("a", "x", True, "one")])
    assert groups
    assert not groups.where(lambda row: row.unsafe is False)
