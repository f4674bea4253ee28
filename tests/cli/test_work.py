"""`train`, `export` and `demo`, as far as they go without weights."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_an_unknown_recipe_key_is_wrong_usage_and_names_the_nearest(cli, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="needs the train extra")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[model]\nsorce = "x"\n')
    result = cli("train", recipe, "--data", tmp_path, "--out", tmp_path / "out")
    assert result.code == 2
    assert "source" in result.err
    assert not (tmp_path / "out").exists()


def test_a_missing_recipe_is_one_line(cli, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="needs the train extra")
    result = cli("train", tmp_path / "none.toml", "--data", tmp_path, "--out", tmp_path / "out")
    assert result.code in (1, 2)
    assert len(result.err.strip().splitlines()) == 1


def test_a_missing_checkpoint_is_one_line_and_leaves_nothing(cli, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="needs the export extra")
    result = cli("export", tmp_path / "none", "--out", tmp_path / "bundle")
    assert result.code == 1
    assert "none" in result.err
    assert list(tmp_path.iterdir()) == []


def test_an_export_prints_what_it_made(cli, tiny_checkpoint, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    result = cli("export", tiny_checkpoint, "--out", out, "--precision", "int4", "--json")
    assert result.code == 0
    assert result.document["out"] == str(out)
    assert result.document["manifest"]["precision"] == "int4"
    assert cli("verify", out).code == 0


def test_nothing_is_overwritten_unasked(cli, tiny_checkpoint, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    out.mkdir()
    (out / "letter.txt").write_text("dear friend")
    result = cli("export", tiny_checkpoint, "--out", out)
    assert result.code in (1, 2)
    assert [path.name for path in out.iterdir()] == ["letter.txt"]


def test_a_layer_without_a_head_is_an_error_that_lists_those_there_are(
    cli, tiny_checkpoint, tmp_path: Path
) -> None:
    result = cli("export", tiny_checkpoint, "--out", tmp_path / "b", "--exit-layer", "3")
    assert result.code in (1, 2)
    assert "1, 2" in result.err
    assert list(tmp_path.iterdir()) == []


EXPORT = [sys.executable, "-m", "edge_safe.cli.main", "export"]


def test_a_full_disk_leaves_nothing_behind(tiny_checkpoint, tmp_path: Path) -> None:
    def small_disk() -> None:
        # The kernel then refuses to write more than this into any file.
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    done = subprocess.run(
        [*EXPORT, tiny_checkpoint, "--out", tmp_path / "bundle", "--quiet"],
        preexec_fn=small_disk,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_export_leaves_nothing_behind(tiny_checkpoint, tmp_path: Path) -> None:
    with subprocess.Popen(
        [*EXPORT, tiny_checkpoint, "--out", tmp_path / "bundle"],
        # A shell starts background jobs with the signal ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as job:
        assert job.stderr is not None
        while b"quantize" not in job.stderr.readline():
            assert job.poll() is None
        job.send_signal(signal.SIGINT)
        _, errors = job.communicate(timeout=120)
    assert job.returncode == 130
    assert b"Traceback" not in errors
    assert b"interrupted" in errors
    assert list(tmp_path.iterdir()) == []


def test_an_exit_layer_that_is_no_number_is_wrong_usage(cli, tmp_path: Path) -> None:
    result = cli("export", tmp_path, "--out", tmp_path / "b", "--exit-layer", "deep")
    assert result.code == 2
    assert "--exit-layer" in result.err


def test_one_token_without_the_other_is_wrong_usage(cli, tmp_path: Path) -> None:
    result = cli("export", tmp_path, "--out", tmp_path / "b", "--safe-token", "<safe>")
    assert result.code == 2
    assert "--unsafe-token" in result.err


def test_the_demo_ends_with_0_only_if_every_outcome_is_right(cli, seeing_bundle) -> None:
    result = cli("demo", "--bundle", seeing_bundle, "--json")
    outcomes = result.document["outcomes"]
    assert [outcome["expected"] for outcome in outcomes] == ["allow"] * 2 + ["refuse"] * 3
    right = all(outcome["decision"] == outcome["expected"] for outcome in outcomes)
    assert result.document["ok"] is right
    assert result.code == (0 if right else 1)


def test_the_demo_shows_every_request_in_a_table(cli, seeing_bundle) -> None:
    result = cli("demo", "--bundle", seeing_bundle)
    for column in ("verdict", "stage", "p_unsafe", "in all, ms"):
        assert column in result.out
    assert result.out.count("gate") >= 5
    assert "edge-safe run" in result.out


def test_the_demo_says_where_its_checkpoint_should_be(
    cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_safe.cli.demo.__file__", str(tmp_path / "a" / "b" / "demo.py"))
    monkeypatch.chdir(tmp_path)
    result = cli("demo")
    assert result.code == 1
    assert "--bundle" in result.err
