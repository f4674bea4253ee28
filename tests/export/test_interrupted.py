"""An export that is killed, or that has no room, leaves nothing at its place."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
from collections import namedtuple
from pathlib import Path

import pytest

from edge_safe import SafeModel
from edge_safe.errors import ExportError
from edge_safe.export import export_bundle


def _export_until(step: str, source: Path, out: Path) -> None:
    """Exports, and kills itself as a step begins."""

    def progress(name: str, share: float) -> None:
        if name == step:
            os.kill(os.getpid(), signal.SIGKILL)

    export_bundle(source, out, precision="fp32", overwrite=True, progress=progress)


@pytest.mark.parametrize(
    "step", ["quantize", pytest.param("test the bundle", marks=pytest.mark.slow)]
)
def test_a_killed_export_leaves_the_place_as_it_was_and_can_be_repeated(
    step: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out" / "bundle"
    # A forked child of a process with torch's threads may wait for ever.
    process = multiprocessing.get_context("spawn").Process(
        target=_export_until, args=(step, tiny_checkpoint, out)
    )
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert [path.name.startswith(".bundle.exporting-") for path in out.parent.iterdir()] == [True]
    export_bundle(tiny_checkpoint, out, precision="fp32")
    assert [path.name for path in out.parent.iterdir()] == ["bundle"]
    assert SafeModel.load(out).assess("Tell me a story.").reason is None


def test_a_disk_without_room_is_one_line_before_work(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    steps: list[str] = []
    with pytest.raises(ExportError, match="0 MB free") as caught:
        export_bundle(
            tiny_checkpoint, tmp_path / "b", progress=lambda step, share: steps.append(step)
        )
    assert len(str(caught.value).splitlines()) == 1
    assert "quantize" not in steps
    assert list(tmp_path.iterdir()) == []
