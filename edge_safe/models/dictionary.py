"""Pages of a dictionary, made of WordNet's definitions: harmless text of every subject."""

from __future__ import annotations

import random
from collections.abc import Iterator

from edge_safe.models.contrasts.wordnet import WordNet

_PARTS = {"n": "noun", "v": "verb", "a": "adjective", "r": "adverb"}
_WORDS = (50, 130)
# How an entry is written; one form a page.
_FORMS = (
    "{words}: {gloss}.",
    "{words} ({part}) {gloss}.",
    "- {words} - {gloss}",
    "The word {words} means: {gloss}.",
    "{gloss} ({words})",
)


def dictionary_pages(wordnet: WordNet, seed: int) -> Iterator[str]:
    """Yields pages of 50 to 150 words, each meaning at most once, the same ones for a seed.

    Args:
        wordnet: The database.
        seed: Chooses the order.

    Raises:
        DataError: The database cannot be read.
    """
    chance = random.Random(f"dictionary {seed}")
    entries = [
        (", ".join(synset.words), name, synset.gloss)
        for part, name in _PARTS.items()
        for synset in wordnet.synsets(part)
        if synset.gloss
    ]
    chance.shuffle(entries)
    page: list[str] = []
    form, length = chance.choice(_FORMS), chance.randint(*_WORDS)
    for words, part, gloss in entries:
        page.append(form.format(words=words, part=part, gloss=gloss))
        if sum(len(line.split()) for line in page) >= length:
            yield chance.choice((" ", "\n")).join(page)
            page, form, length = [], chance.choice(_FORMS), chance.randint(*_WORDS)
