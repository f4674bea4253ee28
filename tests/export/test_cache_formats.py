"""KV caches of fewer bits in families whose attention is more than the kernel's own."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from edge_safe import Decision, SafeModel
from edge_safe.export import export_bundle
from edge_safe.runtime.media import ImageInput
from tests.export.test_image_processors import noise
from tests.export.vision_families import write_vision_family

# Beside it: spans of a picture, spans of a prompt, places turned before it (twice).
FAMILIES = ("gemma3", "paligemma", "qwen2_vl", "qwen3_vl")
QUESTION = "What does the sign say? And who lives there?"


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    name: str = request.param
    return write_vision_family(tmp_path_factory.mktemp(name) / "checkpoint", name)


@pytest.fixture(scope="module")
def whole(checkpoint: Path) -> list[float]:
    """p_unsafe of the fp32 bundle."""
    export_bundle(checkpoint, checkpoint.parent / "fp32", precision="fp32")
    return shares(checkpoint.parent / "fp32")


def shares(bundle: Path) -> list[float]:
    """p_unsafe of a request in words and of one with a picture."""
    model = SafeModel.load(bundle, accept_failed=True)
    pictures: list[list[ImageInput]] = [[], [Image.fromarray(noise(40, 90, 3))]]
    verdicts = [model.assess(QUESTION, images=images) for images in pictures]
    assert all(verdict.decision is not Decision.ERROR for verdict in verdicts)
    return [verdict.p_unsafe for verdict in verdicts]


@pytest.mark.parametrize(("cache", "bound", "kl"), [("fp16", 0.01, 1e-3), ("int8", 0.1, 0.05)])
def test_verdicts_and_answers_stay_near_those_of_a_whole_cache(
    cache: str, bound: float, kl: float, checkpoint: Path, whole: list[float], tmp_path: Path
) -> None:
    report = export_bundle(
        checkpoint, tmp_path / "b", precision="fp32", kv_cache=cache, allow_unaccepted=True
    )
    assert report.parity.greedy.kl <= kl
    assert shares(tmp_path / "b") == pytest.approx(whole, abs=bound)


def test_prompts_read_beside_an_int8_cache_are_judged_alike(
    checkpoint: Path, tmp_path: Path
) -> None:
    found = {}
    for cache in ("fp32", "int8"):
        export_bundle(
            checkpoint,
            tmp_path / cache,
            precision="int4-int8",
            kv_cache=cache,
            allow_unaccepted=True,
        )
        found[cache] = shares(tmp_path / cache)
    assert found["int8"] == pytest.approx(found["fp32"], abs=2e-3)
