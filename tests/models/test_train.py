"""A recipe from start to end, on cached features and through the language model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import edge_safe
from edge_safe.errors import CheckpointError, RecipeError
from edge_safe.models.safety_file import read_safety
from edge_safe.models.safety_model import SafetyTokenModel
from edge_safe.models.train import train_recipe

LORA = """
[answers]
files = ["answers.jsonl"]
generated = 12
max_tokens = 6

[lora]
rank = 2
alpha = 4
targets = ["q_proj", "up_proj"]
"""
SAFE_ROW = """
[answers]
files = ["answers.jsonl"]
generated = 12
max_tokens = 6

[safe_row]
epochs = 2
batch = 4
"""
RUN = """
import sys, torch
from pathlib import Path
from edge_safe.models.train import train_recipe
torch.set_num_threads(1)
recipe, data, out, cache = map(Path, sys.argv[1:])
train_recipe(recipe, data=data, out=out, cache=cache)
"""

Write = Callable[..., Path]


def _command(*arguments: Path, before: tuple[str, ...] = ()) -> list[str]:
    return [sys.executable, *before, *map(str, arguments)]


def _environment() -> dict[str, str]:
    package = str(Path(edge_safe.__file__).parents[1])
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": package}


def test_a_recipe_on_cached_features_gives_a_calibrated_checkpoint(
    write_recipe: Write, data_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    report = train_recipe(
        write_recipe(SAFE_ROW, epochs=12), data=data_folder, out=out, cache=tmp_path / "cache"
    )
    assert set(report.stages) == {"gate.1", "gate.3", "final"}
    assert report.stages[report.stage].auroc > 0.8
    assert report.stages[report.stage].fpr <= 0.1
    assert report.fidelity is not None
    for name in ("model.safetensors", "tokenizer.json", "chat_template.jinja", "loss_curves.png"):
        assert (out / name).stat().st_size > 0
    file, _ = read_safety(out)
    assert file.layers == (1, 3)
    assert file.exit_layer == report.exit_layer
    lines = Path(report.log).read_text().splitlines()
    assert {"step", "loss", "attention.1", "token.3", "final"} <= json.loads(lines[0]).keys()


def test_the_checkpoint_opens_and_judges(
    write_recipe: Write, data_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    train_recipe(write_recipe(), data=data_folder, out=out, cache=tmp_path / "cache")
    model = SafetyTokenModel.from_pretrained(out)
    ids = model.tokenizer("how do I clean the shed", return_tensors="pt")
    verdict = model.assess(**ids)
    assert 0.0 <= float(verdict.p_unsafe[0]) <= 1.0


def test_lora_through_the_language_model(
    write_recipe: Write, data_folder: Path, tmp_path: Path, base_folder: Path
) -> None:
    out = tmp_path / "out"
    report = train_recipe(
        write_recipe(LORA, frozen_features=False, micro_batch=3), data=data_folder, out=out
    )
    assert report.fidelity is not None
    trained, base = (
        load_file(out / "model.safetensors"),
        load_file(base_folder / "model.safetensors"),
    )
    moved = {name for name, value in base.items() if not torch.equal(value, trained[name])}
    assert "model.layers.0.self_attn.q_proj.weight" in moved
    assert "model.layers.3.mlp.up_proj.weight" in moved
    assert "model.layers.0.self_attn.k_proj.weight" not in moved
    changed = (base["model.embed_tokens.weight"] != trained["model.embed_tokens.weight"]).any(-1)
    file, _ = read_safety(out)
    assert set(changed.nonzero()[:, 0].tolist()) == {file.safe_token_id, file.unsafe_token_id}


def test_training_twice_gives_the_same_weights(
    write_recipe: Write, data_folder: Path, tmp_path: Path
) -> None:
    recipe, cache = write_recipe(), tmp_path / "cache"
    for name in ("a", "b"):
        train_recipe(recipe, data=data_folder, out=tmp_path / name, cache=cache)
    one, two = (load_file(tmp_path / name / "safety.safetensors") for name in ("a", "b"))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_weights(
    write_recipe: Write, data_folder: Path, tmp_path: Path
) -> None:
    recipe, cache = write_recipe(epochs=40), tmp_path / "cache"
    train_recipe(recipe, data=data_folder, out=tmp_path / "whole", cache=cache)
    script = tmp_path / "run.py"
    script.write_text(RUN)
    out = tmp_path / "killed"
    process = subprocess.Popen(
        _command(script, recipe, data_folder, out, cache), env=_environment()
    )
    work = tmp_path / "killed.work"
    while not any(work.glob("heads-*/step-*")):
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    assert max(work.glob("heads-*/step-*")).name < "step-00000200"
    report = train_recipe(recipe, data=data_folder, out=out, cache=cache)
    one, two = (load_file(tmp_path / n / "safety.safetensors") for n in ("whole", "killed"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    steps = [json.loads(line)["step"] for line in Path(report.log).read_text().splitlines()]
    assert steps == sorted(steps)


@pytest.mark.slow
@pytest.mark.parametrize("path", ["features", "lora"])
def test_two_processes_agree_with_one(
    path: str, write_recipe: Write, data_folder: Path, tmp_path: Path
) -> None:
    recipe = (
        write_recipe(SAFE_ROW) if path == "features" else write_recipe(LORA, frozen_features=False)
    )
    script = tmp_path / "run.py"
    script.write_text(RUN)
    launch = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29517")
    for name, before in (("one", ()), ("two", launch)):
        arguments = (script, recipe, data_folder, tmp_path / name, tmp_path / f"{name}-cache")
        subprocess.run(_command(*arguments, before=before), env=_environment(), check=True)
    for file in ("safety.safetensors", "model.safetensors"):
        one, two = (load_file(tmp_path / name / file) for name in ("one", "two"))
        assert max(float((one[k] - two[k]).abs().max()) for k in one) < 1e-5
    logs = [
        [json.loads(line) for line in path.read_text().splitlines()]
        for name in ("one", "two")
        for path in (tmp_path / f"{name}.work").glob("heads-*/log.jsonl")
    ]
    losses = [[line["loss"] for line in log if "loss" in line] for log in logs]
    np.testing.assert_allclose(losses[0], losses[1], atol=1e-5)


def test_a_changed_recipe_starts_anew_and_a_changed_threshold_does_not(
    write_recipe: Write, data_folder: Path, tmp_path: Path
) -> None:
    out, cache, done = tmp_path / "out", tmp_path / "cache", []

    def progress(job: str, step: int, steps: int) -> None:
        if job == "heads":
            done.append(steps)

    def run(recipe: Path) -> int:
        done.clear()
        train_recipe(recipe, data=data_folder, out=out, cache=cache, progress=progress)
        return len(done)

    first = run(write_recipe())
    assert first > 0
    recipe = write_recipe()
    recipe.write_text(recipe.read_text().replace("target_fpr = 0.1", "target_fpr = 0.2"))
    assert run(recipe) == 0
    assert run(write_recipe(epochs=1)) == first / 2


def test_a_batch_larger_than_the_data_is_an_error(
    write_recipe: Write, data_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match="batch of 4000"):
        train_recipe(
            write_recipe(batch=4000), data=data_folder, out=tmp_path / "out",
            cache=tmp_path / "cache",
        )  # fmt: skip


def test_a_folder_of_other_things_is_not_overwritten(
    write_recipe: Write, data_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "diary.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="no safety-token checkpoint"):
        train_recipe(write_recipe(), data=data_folder, out=out)
