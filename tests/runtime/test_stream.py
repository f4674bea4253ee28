"""Streaming: whole characters only, and stop texts that span pieces."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from edge_safe.runtime.stream import Detokenizer, StopFilter


@pytest.fixture(scope="module")
def tokenizer(bundle_folder: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(bundle_folder / "tokenizer.json"))
    tokenizer.encode_special_tokens = True  # as the runtime does: text makes no control token
    return tokenizer


@example("<|safe|>")
@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(blacklist_characters="\ufffd", blacklist_categories=["Cs"])))
def test_pieces_are_whole_characters_and_add_up(tokenizer: Tokenizer, text: str) -> None:
    stream = Detokenizer(tokenizer.decode)
    pieces = [stream.push(token) for token in tokenizer.encode(text).ids]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) + stream.flush() == text


def test_a_character_comes_with_its_last_byte(tokenizer: Tokenizer) -> None:
    stream = Detokenizer(tokenizer.decode)
    assert [stream.push(token) for token in tokenizer.encode("🚲").ids] == ["", "", "", "🚲"]


def test_text_before_an_unfinished_character_is_not_held_back(tokenizer: Tokenizer) -> None:
    stream = Detokenizer(tokenizer.decode)
    ids = tokenizer.encode("x🚲").ids
    assert stream.push(ids[0]) == "x"


# Three bytes that cannot begin a character, then one of two bytes: "\u00a1" must stay whole.
@example([99, 99, 99, 131, 99])
@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 380) | st.integers(99, 260), max_size=40))
def test_bytes_that_form_no_character_are_not_held_for_ever(
    tokenizer: Tokenizer, ids: list[int]
) -> None:
    stream, out, whole = Detokenizer(tokenizer.decode), "", tokenizer.decode(ids)
    for count, token in enumerate(ids, 1):
        out += stream.push(token)
        assert whole.startswith(out)
        held = tokenizer.decode(ids[:count])[len(out) :]
        assert held == "\ufffd" * min(len(held), 3)
    assert out + stream.flush() == whole


@settings(deadline=None)
@given(
    st.text("ab#", max_size=30),
    st.lists(st.text("ab#", min_size=1, max_size=4), max_size=3),
    st.data(),
)
def test_the_text_ends_before_the_first_stop(
    text: str, stops: list[str], data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    edges = [0, *cuts, len(text)]
    stream, out = StopFilter(stops), ""
    for start, end in itertools.pairwise(edges):
        out += stream.push(text[start:end])
        if stream.stopped:
            break
    else:
        out += stream.flush()
    # A stop that is complete earlier wins, as it does when text comes letter by letter.
    assert text.startswith(out)
    assert not any(stop in out for stop in stops)
    assert stream.stopped == any(stop in text for stop in stops)


def test_a_stop_may_span_pieces() -> None:
    stream = StopFilter(["STOP"])
    assert [stream.push(piece) for piece in ("one S", "T", "OP two")] == ["one ", "", ""]
    assert stream.stopped


def test_what_was_no_stop_is_given_later() -> None:
    stream = StopFilter(["STOP"])
    assert [stream.push(piece) for piece in ("ST", "AY")] == ["", "STAY"]
    assert not stream.stopped
