"""A folder is published whole, or everything is as it was."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge_safe.errors import ExportError
from edge_safe.export import publish
from edge_safe.export.publish import staged


def write(out: Path, text: str = "new", *, overwrite: bool = False) -> None:
    with staged(out, overwrite=overwrite) as folder:
        (folder / "file").write_text(text)


def contents(parent: Path) -> list[str]:
    return sorted(str(path.relative_to(parent)) for path in parent.rglob("*"))


def test_folder_appears_at_the_end(tmp_path: Path) -> None:
    out = tmp_path / "made" / "bundle"
    with staged(out, overwrite=False) as folder:
        (folder / "file").write_text("new")
        assert not out.exists()
    assert contents(out) == ["file"]
    assert contents(tmp_path) == ["made", "made/bundle", "made/bundle/file"]


def test_published_folder_is_readable_by_others(tmp_path: Path) -> None:
    write(tmp_path / "bundle")
    assert (tmp_path / "bundle").stat().st_mode & 0o055 == 0o055 & ~_umask()


def test_a_folder_that_is_there_is_not_overwritten(tmp_path: Path) -> None:
    write(tmp_path / "bundle", "old")
    with pytest.raises(ExportError, match="--overwrite"):
        write(tmp_path / "bundle")
    assert (tmp_path / "bundle" / "file").read_text() == "old"


def test_an_empty_folder_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    write(tmp_path / "bundle")
    assert (tmp_path / "bundle" / "file").read_text() == "new"


def test_a_file_in_the_place_is_refused_even_with_overwrite(tmp_path: Path) -> None:
    (tmp_path / "bundle").write_text("mine")
    with pytest.raises(ExportError, match="no folder"):
        write(tmp_path / "bundle", overwrite=True)


def test_a_link_in_the_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "bundle").symlink_to("elsewhere")
    with pytest.raises(ExportError, match="no folder"):
        write(tmp_path / "bundle", overwrite=True)


def test_overwrite_replaces_all_of_the_old_folder(tmp_path: Path) -> None:
    write(tmp_path / "bundle", "old")
    (tmp_path / "bundle" / "more").write_text("old")
    write(tmp_path / "bundle", overwrite=True)
    assert contents(tmp_path) == ["bundle", "bundle/file"]
    assert (tmp_path / "bundle" / "file").read_text() == "new"


@pytest.mark.parametrize(
    ("failure", "error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), ExportError, "disk is full"),
        (KeyboardInterrupt(), KeyboardInterrupt, ""),
        (OSError(errno.EACCES, "Permission denied"), ExportError, "Permission denied"),
    ],
)
def test_failure_leaves_the_old_folder_and_nothing_else(
    failure: BaseException, error: type[BaseException], message: str, tmp_path: Path
) -> None:
    write(tmp_path / "bundle", "old")
    with pytest.raises(error, match=message):
        _fail(tmp_path / "bundle", failure)
    assert contents(tmp_path) == ["bundle", "bundle/file"]
    assert (tmp_path / "bundle" / "file").read_text() == "old"


def test_other_errors_pass_through_and_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mine"), staged(tmp_path / "bundle", overwrite=False):
        raise ValueError("mine")
    assert contents(tmp_path) == []


def test_folder_of_a_killed_export_is_removed(tmp_path: Path) -> None:
    process = started(_hang, tmp_path / "bundle")
    left = _wait_for(tmp_path, ".bundle.exporting-*/new/file")
    process.kill()
    process.join()
    assert left.exists()
    write(tmp_path / "bundle")
    assert contents(tmp_path) == ["bundle", "bundle/file"]


def test_folder_that_a_killed_export_never_locked_is_removed_in_time(tmp_path: Path) -> None:
    left = tmp_path / ".bundle.exporting-1"
    left.mkdir()
    write(tmp_path / "bundle")
    assert left.exists()
    os.utime(left, (0, 0))
    write(tmp_path / "bundle", overwrite=True)
    assert contents(tmp_path) == ["bundle", "bundle/file"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_whose_replacement_was_killed_comes_back(overwrite: bool, tmp_path: Path) -> None:
    write(tmp_path / "bundle", "old")
    process = started(_die_between_the_renames, tmp_path / "bundle")
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "bundle").exists()
    if overwrite:
        write(tmp_path / "bundle", overwrite=True)
    else:
        with pytest.raises(ExportError, match="--overwrite"):
            write(tmp_path / "bundle")
    assert contents(tmp_path) == ["bundle", "bundle/file"]
    assert (tmp_path / "bundle" / "file").read_text() == ("new" if overwrite else "old")


def test_folder_of_a_running_export_is_left_alone(tmp_path: Path) -> None:
    with staged(tmp_path / "bundle", overwrite=True) as folder:
        (folder / "file").write_text("slow")
        write(tmp_path / "bundle", "quick")
        assert (folder / "file").exists()
    assert (tmp_path / "bundle" / "file").read_text() == "slow"


def test_folder_that_is_being_published_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Path] = []

    def slow(path: Path) -> None:
        if not seen:
            seen.append(path)
            os.utime(path.parents[1], (0, 0))
            write(tmp_path / "bundle", "quick")

    monkeypatch.setattr(publish, "_sync", slow)
    write(tmp_path / "bundle", "slow", overwrite=True)
    assert seen
    assert (tmp_path / "bundle" / "file").read_text() == "slow"


def test_a_folder_that_appeared_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    with (
        pytest.raises(ExportError, match="there already"),
        staged(tmp_path / "bundle", overwrite=False),
    ):
        write(tmp_path / "bundle", "quick")
    assert (tmp_path / "bundle" / "file").read_text() == "quick"
    assert contents(tmp_path) == ["bundle", "bundle/file"]


def started(target: Callable[[Path], None], out: Path) -> Any:
    process = multiprocessing.get_context("fork").Process(target=target, args=(out,))
    process.start()
    return process


def _fail(out: Path, failure: BaseException) -> None:
    with staged(out, overwrite=True) as folder:
        (folder / "file").write_text("half")
        raise failure


def _hang(out: Path) -> None:
    with staged(out, overwrite=False) as folder:
        (folder / "file").write_text("half")
        time.sleep(60)


def _die_between_the_renames(out: Path) -> None:
    """The old folder is out of its place, the new one not in it yet."""
    rename = Path.rename

    def one(self: Path, target: Path) -> Path:
        rename(self, target)
        os.kill(os.getpid(), signal.SIGKILL)
        return target

    Path.rename = one  # type: ignore[method-assign]
    write(out, overwrite=True)


def _wait_for(parent: Path, pattern: str) -> Path:
    for _ in range(500):
        found = list(parent.glob(pattern))
        if found:
            return found[0]
        time.sleep(0.02)
    raise AssertionError(f"{pattern} never appeared")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
