"""`train`, `export` and `demo`, as far as they go without weights."""

from __future__ import annotations

from pathlib import Path

import pytest


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


def test_an_exit_layer_that_is_no_number_is_wrong_usage(cli, tmp_path: Path) -> None:
    result = cli("export", tmp_path, "--out", tmp_path / "b", "--exit-layer", "deep")
    assert result.code == 2
    assert "--exit-layer" in result.err


def test_one_token_without_the_other_is_wrong_usage(cli, tmp_path: Path) -> None:
    result = cli("export", tmp_path, "--out", tmp_path / "b", "--safe-token", "<safe>")
    assert result.code == 2
    assert "--unsafe-token" in result.err


def test_the_demo_ends_with_0_only_if_every_outcome_is_right(cli, tiny_bundle) -> None:
    result = cli("demo", "--bundle", tiny_bundle, "--json")
    if result.code == 1 and "error" in result.document:
        # A bundle without a text tower cannot be shown a picture; that is said in one line.
        assert result.document["error"]["type"] == "MediaError"
        return
    outcomes = result.document["outcomes"]
    assert [outcome["expected"] for outcome in outcomes] == ["allow"] * 2 + ["refuse"] * 3
    right = all(outcome["decision"] == outcome["expected"] for outcome in outcomes)
    assert result.document["ok"] is right
    assert result.code == (0 if right else 1)


def test_the_demo_says_where_its_checkpoint_should_be(
    cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_safe.cli.demo.__file__", str(tmp_path / "a" / "b" / "demo.py"))
    monkeypatch.chdir(tmp_path)
    result = cli("demo")
    assert result.code == 1
    assert "--bundle" in result.err
