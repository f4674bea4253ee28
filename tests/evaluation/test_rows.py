"""The reader of data files: what it accepts, and what its messages say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edge_safe.errors import DataError
from edge_safe.evaluation.rows import read_rows


def write(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def test_media_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    data = write(
        tmp_path / "rows.jsonl",
        {"id": 1, "prompt": "p", "image": "a.png", "audio": "b.wav", "label": "unsafe"},
        {"id": "x", "prompt": "p", "image": ["a.png", "c.png"], "label": "safe", "source": "s"},
        {"id": "y", "prompt": "p", "extra": 1},
    )
    first, second, third = read_rows(data, labelled=False)
    assert (first.images, first.audio) == ((tmp_path / "a.png",), tmp_path / "b.wav")
    assert (first.unsafe, first.source, first.modality) == (True, "unknown", "image+audio")
    assert (second.unsafe, second.source, second.modality) == (False, "s", "image")
    assert (third.unsafe, third.modality) == (None, "text")


def test_empty_lines_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('\n{"id": 1, "prompt": "p"}\n\n')
    assert len(read_rows(path, labelled=False)) == 1


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "p"}, 'line 2: "id" is missing'),
        ({"id": True, "prompt": "p"}, 'line 2: "id" is true'),
        ({"id": 2}, 'line 2: "prompt" is missing'),
        ({"id": 2, "prompt": 5}, 'line 2: "prompt" is 5'),
        ({"id": 2, "prompt": "p", "image": [1]}, 'line 2: "image" is'),
        ({"id": 2, "prompt": "p", "audio": ""}, 'line 2: "audio" is'),
        ({"id": 2, "prompt": "p", "label": "bad"}, 'line 2: "label" is "bad"; give "safe"'),
        ({"id": 2, "prompt": "p", "source": 3}, 'line 2: "source" is 3'),
        ({"id": 1, "prompt": "p"}, "id 1 was already used in line 1"),
        (["id"], "line 2: expected an object"),
    ],
)
def test_a_bad_row_is_named_by_line_and_field(tmp_path: Path, record: object, message: str) -> None:
    data = write(tmp_path / "rows.jsonl", {"id": 1, "prompt": "p"}, record)
    with pytest.raises(DataError) as caught:
        read_rows(data, labelled=False)
    assert message in str(caught.value)


def test_a_missing_label_is_an_error_where_labels_are_needed(tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", {"id": 1, "prompt": "p"})
    with pytest.raises(DataError, match='line 1: "label" is missing'):
        read_rows(data, labelled=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "holds no rows"), (b"{not json", "line 1: not valid JSON"), (b"\xff\xfe", "not UTF-8")],
)
def test_a_file_of_another_kind_is_an_error(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_rows(path, labelled=False)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read_rows(tmp_path / "none.jsonl", labelled=False)


def test_a_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is a folder"):
        read_rows(tmp_path, labelled=False)
