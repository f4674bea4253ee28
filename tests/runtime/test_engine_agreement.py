"""An engine that computes something else than its graph is not used."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from edge_safe.errors import ProviderError
from edge_safe.export import export_bundle
from edge_safe.runtime.engines.agreement import TOLERANCE, made_up, require_agreement
from edge_safe.runtime.manifest import Manifest, load_manifest
from edge_safe.runtime.session import Array, Session


@pytest.fixture(scope="module")
def bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("agreement") / "bundle"
    export_bundle(tiny_checkpoint, out, target="tensorrt", precision="fp32", allow_unaccepted=True)
    return out


@pytest.fixture(scope="module")
def manifest(bundle: Path) -> Manifest:
    return load_manifest(bundle)


class Changed:
    """A graph on the CPU of which one output comes out otherwise."""

    def __init__(self, session: Session, output: str, change: float) -> None:
        self._session, self._output, self._change = session, output, change

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        found = self._session.run(feeds)
        found[self._output] = found[self._output] + np.abs(found[self._output]).max() * self._change
        return found


def compare(bundle: Path, manifest: Manifest, graph: str, output: str, change: float) -> None:
    entry = manifest.graphs[graph]
    host = Session(bundle / entry.file)
    engine = Changed(host, output, change)
    require_agreement(graph, entry, manifest.engines[graph], engine, host)


@pytest.mark.parametrize("graph", ["gate", "decoder"])
def test_a_graph_agrees_with_itself_in_every_profile(
    bundle: Path, manifest: Manifest, graph: str
) -> None:
    compare(bundle, manifest, graph, "verdict_logits", 0.0)


@pytest.mark.parametrize("change", [2 * TOLERANCE, -2 * TOLERANCE, float("nan"), float("inf")])
def test_a_verdict_that_moved_is_named_and_refused(
    bundle: Path, manifest: Manifest, change: float
) -> None:
    with pytest.raises(ProviderError, match=r"verdict_logits.*is not used"):
        compare(bundle, manifest, "gate", "verdict_logits", change)


def test_what_rounding_leaves_is_let_pass(bundle: Path, manifest: Manifest) -> None:
    compare(bundle, manifest, "gate", "hidden_states", TOLERANCE / 2)


def test_inputs_have_the_profile_s_likeliest_shapes(manifest: Manifest) -> None:
    plan = manifest.engines["gate"]
    for number, profile in enumerate(plan.profiles):
        feeds = made_up(manifest.graphs["gate"], plan, number)
        for name, sizes in profile.shapes.items():
            assert feeds[name].shape == sizes.opt
