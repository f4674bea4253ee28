"""The whole of pebble, from its parts to a bundle."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_safe.export import export_bundle
from edge_safe.runtime.manifest import load_manifest

PEBBLE = Path(__file__).parents[2] / "models" / "pebble"

LARGEST_BUNDLE = 250 * 2**20

TOWERS = {
    "text_detector",
    "text_recognizer",
    "text_projector",
    "vision_encoder",
    "vision_projector",
    "audio_encoder",
    "audio_projector",
    "audio_decoder",
}


@pytest.mark.slow
@pytest.mark.parts
def test_pebble_in_int4(tmp_path: Path) -> None:
    report = export_bundle(PEBBLE, tmp_path / "bundle", precision="int4")
    manifest = load_manifest(tmp_path / "bundle")
    assert set(manifest.graphs) == TOWERS | {"embed_tokens", "gate", "decoder"}
    assert sum(entry.size for entry in manifest.files.values()) <= LARGEST_BUNDLE
    assert report.parity.greedy.kl < 0.02
    # Of a dozen prompts one may stand so near to the threshold that its decision turns.
    assert report.parity.verdicts.max_p_difference < 0.06
    assert report.parity.verdicts.agreement >= 11 / 12
    exact = {b.graph: b.relative_difference for b in report.parity.boundaries}
    assert exact["text_recognizer"] < 1e-4
    assert exact["text_detector"] < 1e-4
    assert exact["vision_encoder"] < 1e-4
