"""A gate and an early exit that read several layers, apart, in common and by turns."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from edge_safe.export.graphs.cut_gate import early_graph, late_graph
from edge_safe.export.graphs.decoder import gate_graph, states_name, store_model
from edge_safe.export.graphs.early_exit import rows_of_gate_past
from edge_safe.export.graphs.safety import GateHead
from edge_safe.export.graphs.store import WeightStore
from edge_safe.export.quantization import precision_named
from edge_safe.runtime.prefill import EARLY_BOUND
from edge_safe.runtime.session import Array, Session
from tests.runtime.conftest import HEAD_DIM, WIDTH, decoder_spec, joined_head, random_weights

EXIT = 5
LENGTH = 20  # slot T included
SOURCES = [
    ((), (2, 4, 5)),
    ((3,), (5,)),
    ((3,), (3, 5)),
    ((1, 3), (2, 5)),
    ((1, 3), (1, 2, 4, 5)),
    ((2,), (1, 5)),
]
IDS = ["-".join(map(str, (*early, "then", *gate))) for early, gate in SOURCES]


@dataclass
class Gates:
    """Both forms of a gate, with the heads in it."""

    early: GateHead | None
    head: GateHead
    whole: Session
    cut: tuple[Session, ...]

    @property
    def rows(self) -> list[int]:
        return rows_of_gate_past(self.head, self.early)


@pytest.fixture(params=SOURCES, ids=IDS)
def gates(request: pytest.FixtureRequest, tmp_path: Path) -> Gates:
    below, above = request.param
    spec = replace(decoder_spec(300), layers=EXIT + 1)
    rng = np.random.default_rng(11)
    early = _uneven(joined_head(rng, below), rng) if below else None
    head = _uneven(joined_head(rng, above), rng)
    with WeightStore(tmp_path / "weights.onnx.data") as store:
        form = precision_named("fp32")
        weights = store_model(store, spec, random_weights(spec), form, lambda _: None)
        graphs = [gate_graph(weights, spec, EXIT, head, store, early)]
        if early is not None:
            graphs.append(early_graph(weights, spec, early, head, store))
            graphs.append(late_graph(weights, spec, EXIT, early, head, store))
    sessions = []
    for number, graph in enumerate(graphs):
        graph.save(tmp_path / f"{number}.onnx")
        sessions.append(Session(tmp_path / f"{number}.onnx", threads=1))
    return Gates(early, head, sessions[0], tuple(sessions[1:]))


def _uneven(head: GateHead, rng: np.random.Generator) -> GateHead:
    """The head with norms that are not all ones."""

    def norm() -> np.ndarray:
        return rng.uniform(0.5, 2.0, WIDTH).astype(np.float32)

    return replace(
        head,
        sources=tuple(
            replace(own, token=replace(own.token, norm=norm()), attention_norm=norm())
            for own in head.sources
        ),
    )


def prompt(batch: int = 1) -> Array:
    return np.random.default_rng(4).standard_normal((batch, LENGTH, WIDTH)).astype(np.float32)


def run(
    gates: Gates,
    embeds: Array,
    past: Mapping[str, Array] | None = None,
    *,
    cut: bool = False,
    mask: Array | None = None,
) -> dict[str, Array]:
    """One run behind what an earlier one gave; with ``cut`` of the gate in two graphs."""
    batch, count, _ = embeds.shape
    seen = 0 if past is None else past["present.0.key"].shape[2]
    feeds: dict[str, Array] = {
        "inputs_embeds": embeds,
        "attention_mask": np.ones((batch, seen + count), np.int64) if mask is None else mask,
        "position_ids": np.broadcast_to(np.arange(seen, seen + count), (batch, count)).copy(),
        "gate_past": np.zeros((batch, len(gates.rows), 0, WIDTH), np.float32),
        EARLY_BOUND: np.full(batch, np.inf, np.float32),
    }
    if past is not None:
        feeds["gate_past"] = past["gate_present"]
    nothing = np.zeros((batch, 2, 0, HEAD_DIM), np.float32)
    for layer in range(EXIT):
        for kind in ("key", "value"):
            before = nothing if past is None else past[f"present.{layer}.{kind}"]
            feeds[f"past_key_values.{layer}.{kind}"] = before
    found: dict[str, Array] = {}
    for session in gates.cut if cut else (gates.whole,):
        given = feeds | found
        found |= session.run({name: given[name] for name in session.inputs})
    return found


def states_of(gates: Gates, found: Mapping[str, Array]) -> dict[int, Array]:
    names = {layer: states_name(layer) for layer in gates.rows} | {EXIT: "hidden_states"}
    return {layer: found[name] for layer, name in names.items()}


def by_the_formulas(head: GateHead, states: Mapping[int, Array]) -> Array:
    """Verdict logits with the keys and values of every position, in float64 (docs/gate.md)."""
    heads, width = head.query.shape
    first, pooled, token = 0, [], np.zeros(2)
    for source in head.sources:
        own = states[source.layer][0, :-1].astype(np.float64)
        count = len(own)

        def normed(weight: Array, eps: float, own: Array = own) -> Array:
            result: Array = own / np.sqrt((own**2).mean(-1, keepdims=True) + eps) * weight
            return result

        assert source.token.norm is not None
        token += source.token.rows @ normed(source.token.norm, source.token.eps)[-1]
        m = normed(source.attention_norm, source.token.eps)
        keys, values = ((m @ w.T).reshape(count, -1, width) for w in (source.key, source.value))
        last = first + keys.shape[1]
        score = np.einsum("thd,hd->ht", keys, head.query[first:last]) / math.sqrt(width)
        score -= head.slope[first:last, None] * np.log(1.0 + np.arange(count)[::-1])
        share = np.exp(score - score.max(-1, keepdims=True))
        share /= share.sum(-1, keepdims=True)
        pooled.append(np.einsum("ht,thd->hd", share, values))
        first = last
    assert first == heads
    up = head.up_weight @ np.concatenate(pooled).reshape(-1) + head.up_bias
    gelu = up * np.array([0.5 * (1.0 + math.erf(x / math.sqrt(2.0))) for x in up])
    logit = float((head.down_weight @ gelu + head.down_bias)[0])
    return token - np.log1p(np.exp([-logit, logit]))


def test_verdicts_are_those_of_the_formulas_with_keys_and_values(gates: Gates) -> None:
    found = run(gates, prompt())
    states = states_of(gates, found)
    expected = by_the_formulas(gates.head, states)
    np.testing.assert_allclose(found["verdict_logits"][0], expected, atol=2e-5)
    if gates.early is not None:
        expected = by_the_formulas(gates.early, states)
        np.testing.assert_allclose(found["early_verdict_logits"][0], expected, atol=2e-5)


def test_what_is_kept_are_the_states_in_the_order_of_the_outputs(gates: Gates) -> None:
    found = run(gates, prompt())
    states = states_of(gates, found)
    for row, layer in enumerate(gates.rows):
        np.testing.assert_array_equal(found["gate_present"][:, row], states[layer])
    named = [name for name in gates.whole.outputs if name.startswith("gate_states.")]
    assert named == [states_name(layer) for layer in gates.rows[:-1]]


def test_in_two_graphs_it_says_the_same(gates: Gates) -> None:
    if not gates.cut:
        pytest.skip("there is nothing to cut off")
    one, two = run(gates, prompt()), run(gates, prompt(), cut=True)
    for name in ("verdict_logits", "early_verdict_logits", "gate_present", "hidden_states"):
        np.testing.assert_allclose(two[name], one[name], atol=2e-5)


@pytest.mark.parametrize("cut", [False, True])
def test_pieces_and_single_positions_change_nothing(gates: Gates, cut: bool) -> None:
    if cut and not gates.cut:
        pytest.skip("there is nothing to cut off")
    embeds = prompt()
    whole = run(gates, embeds)
    first = run(gates, embeds[:, :9], cut=cut)
    single = run(gates, embeds[:, 9:10], first)
    assert np.isnan(single["verdict_logits"]).all()
    states = states_of(gates, single)
    column = np.stack([states[layer] for layer in gates.rows], axis=1)
    np.testing.assert_array_equal(single["gate_present"], first["gate_present"])
    single["gate_present"] = np.concatenate([first["gate_present"], column], axis=2)
    found = run(gates, embeds[:, 10:], single, cut=cut)
    for name in ("verdict_logits", "gate_present"):
        np.testing.assert_allclose(found[name], whole[name], atol=2e-5)


def test_what_stands_at_padded_positions_is_not_seen(gates: Gates) -> None:
    embeds = prompt(2)
    mask = np.ones((2, LENGTH), np.int64)
    mask[0, 12:] = 0
    embeds[0, 12:] = np.nan
    found = run(gates, embeds, mask=mask)
    alone = run(gates, embeds[:1, :12])
    np.testing.assert_allclose(found["verdict_logits"][:1], alone["verdict_logits"], atol=2e-5)


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_in_the_past_gives_no_verdict(gates: Gates, number: float) -> None:
    embeds = prompt()
    first = run(gates, embeds[:, :9])
    for source in gates.head.sources:
        row = gates.rows.index(source.layer)
        spoilt = first["gate_present"].copy()
        spoilt[0, row, 4, 7] = number
        found = run(gates, embeds[:, 9:], {**first, "gate_present": spoilt})
        assert np.isnan(found["verdict_logits"]).any()
