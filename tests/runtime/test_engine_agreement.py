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


def test_numbers_beyond_what_float16_squares_are_among_the_inputs(manifest: Manifest) -> None:
    plan, graph = manifest.engines["gate"], manifest.graphs["gate"]
    plain, outlying = (
        made_up(graph, plan, 0, outlying=flag)["inputs_embeds"] for flag in (False, True)
    )
    assert np.square(np.abs(outlying).max(), dtype=np.float64) > np.finfo(np.float16).max
    np.testing.assert_array_equal(plain[:, 1:], outlying[:, 1:])


def test_a_norm_that_overflows_in_float16_is_noticed(bundle: Path, manifest: Manifest) -> None:
    entry = manifest.graphs["gate"]
    host = Session(bundle / entry.file)

    class Overflowing(Changed):
        """What a norm in float16 leaves of states whose squares it cannot hold: nothing."""

        def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
            embeds = feeds["inputs_embeds"].copy()
            embeds[np.square(embeds, dtype=np.float64).max(-1) > np.finfo(np.float16).max] = 0.0
            return self._session.run({**feeds, "inputs_embeds": embeds})

    with pytest.raises(ProviderError, match="is not used"):
        require_agreement("gate", entry, manifest.engines["gate"], Overflowing(host, "", 0.0), host)


def test_an_output_without_a_number_proves_nothing(bundle: Path, manifest: Manifest) -> None:
    entry = manifest.graphs["gate"]
    broken = Changed(Session(bundle / entry.file), "verdict_logits", float("nan"))
    with pytest.raises(ProviderError, match="verdict_logits"):
        require_agreement("gate", entry, manifest.engines["gate"], broken, broken)
