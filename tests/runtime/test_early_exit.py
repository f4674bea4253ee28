"""A gate with an early exit: clear cases end there, and nothing else is any different."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from edge_safe.errors import PolicyError, SchemaError
from edge_safe.evaluation.speed.graph_work import work_of
from edge_safe.export.graphs.safety import GateHead
from edge_safe.runtime.batch import AssessRequest
from edge_safe.runtime.bundle import open_bundle
from edge_safe.runtime.calibration import StageCalibration
from edge_safe.runtime.deadline import Deadline
from edge_safe.runtime.engine import Engine
from edge_safe.runtime.gate import early_bound
from edge_safe.runtime.manifest import load_manifest
from edge_safe.runtime.model import SafeModel
from edge_safe.runtime.policy import Policy, parse_policy
from edge_safe.runtime.verdict import Decision
from tests.runtime.conftest import (
    EARLY_LAYER,
    EXIT_LAYER,
    WIDTH,
    joined_head,
    write_bundle,
    write_manifest,
)

TEXTS = [
    "Tell me of the tide.",
    "Where is the harbour, and who lives beside the water?",
    "A rope.",
    "Name three birds of the coast and say in a few words how each of them catches its food.",
    "Is the shop open on Sunday?",
    "Explain how a lock on a canal works.",
]
# Nothing ends early under a policy that moves the gate's threshold and not this one.
NEVER_EARLY = Policy(thresholds={"gate": 0.5})


def load(folder: Path, policy: Policy | None = None) -> SafeModel:
    return SafeModel.load(folder, threads=1, policy=policy)


def ending_half(folder: Path) -> Policy:
    """A policy whose early exit ends about half of the texts."""
    all_end = load(folder, Policy(early_threshold=0.0))
    p_unsafe = [all_end.assess(text).p_unsafe for text in TEXTS]
    return Policy(early_threshold=float(np.median(p_unsafe)))


@pytest.fixture(scope="module")
def half(early_folder: Path) -> Policy:
    return ending_half(early_folder)


def test_clear_cases_end_early_and_the_others_get_the_gates_verdict(
    early_folder: Path, half: Policy
) -> None:
    model, whole = load(early_folder, half), load(early_folder, NEVER_EARLY)
    layers = []
    for text in TEXTS:
        verdict = model.assess(text)
        layers.append(verdict.layer)
        if verdict.layer == EXIT_LAYER:
            assert verdict == whole.assess(text)
        else:
            assert verdict.decision is Decision.REFUSE
    assert set(layers) == {EARLY_LAYER, EXIT_LAYER}


def joined(head: GateHead) -> GateHead:
    """A head that reads the early exit's layer too."""
    return joined_head(np.random.default_rng(3), (EARLY_LAYER, head.sources[0].layer))


def test_a_layer_that_both_read_is_kept_once(tmp_path: Path) -> None:
    both = write_bundle(tmp_path / "both", change=joined, early=lambda head: head)
    gate_alone = load(write_bundle(tmp_path / "alone", change=joined))
    model = load(both, NEVER_EARLY)
    gate = model.engine._bundle.session("gate")
    assert gate.shape("gate_past")[1:] == [2, "gate_past", WIDTH]
    chats = [one.chat() for one in (model, gate_alone)]
    for text in TEXTS:
        found = model.assess(text).p_unsafe
        assert found == pytest.approx(gate_alone.assess(text).p_unsafe, abs=1e-6)
        first, second = (chat.send(text, max_tokens=3).verdict for chat in chats)
        assert first.p_unsafe == pytest.approx(second.p_unsafe, abs=1e-6)


def test_layers_above_the_exit_do_not_run(early_folder: Path) -> None:
    engine = Engine(open_bundle(early_folder, threads=1))
    state = engine.new_state()
    inputs = engine.embed([7, 8, 9, 10, 11])
    judged = engine.judge(inputs, state, Policy(early_threshold=0.0), Deadline(None))
    assert judged.verdict.layer == EARLY_LAYER
    # The caches of layers that have run hold the prompt's keys.
    keys = [state.cache.copy(range(k, k + 1), 6)[0] for k in range(4)]
    assert [bool(key.any()) for key in keys] == [True, False, False, False]


def test_many_at_once_get_the_verdicts_of_one_by_one(early_folder: Path, half: Policy) -> None:
    model = load(early_folder, half)
    found = model.assess_many([AssessRequest(text) for text in TEXTS], workers=1)
    for text, assessment in zip(TEXTS, found, strict=True):
        alone = model.assess(text)
        assert (assessment.verdict.decision, assessment.verdict.layer) == (
            alone.decision,
            alone.layer,
        )
        assert assessment.verdict.p_unsafe == pytest.approx(alone.p_unsafe, abs=1e-5)


def test_a_long_prompt_may_end_early_in_its_last_chunk(early_folder: Path) -> None:
    text = " ".join(TEXTS * 4)
    ended = load(early_folder, Policy(early_threshold=0.0)).assess(text)
    assert (ended.decision, ended.layer) == (Decision.REFUSE, EARLY_LAYER)
    assert load(early_folder, Policy(early_threshold=1.0)).assess(text).layer == EXIT_LAYER


def test_what_ended_early_is_seen_by_the_next_turn(early_folder: Path, tmp_path: Path) -> None:
    first = load(early_folder, NEVER_EARLY).assess(TEXTS[0])
    # One model ends the first turn early, the other refuses it at the gate.
    early = Policy(thresholds={"gate": 1.0}, early_threshold=0.0)
    late = Policy(thresholds={"gate": min(first.p_unsafe, 1.0)})
    verdicts = []
    for policy in (early, late):
        chat = load(early_folder, policy).chat()
        assert chat.send(TEXTS[0]).verdict.decision is Decision.REFUSE
        chat.save(tmp_path / "talk")
        asked = load(early_folder, NEVER_EARLY)
        chat._requests = asked.chat()._requests
        verdicts.append(chat.send(TEXTS[1], max_tokens=1).verdict)
        # And so it is in a conversation that was put away in between.
        again = _reopened(tmp_path / "talk", asked, policy)
        assert again.p_unsafe == pytest.approx(verdicts[-1].p_unsafe, abs=1e-5)
    assert verdicts[0].p_unsafe == pytest.approx(verdicts[1].p_unsafe, abs=1e-5)
    alone = load(early_folder, NEVER_EARLY).chat().send(TEXTS[1], max_tokens=1).verdict
    assert abs(alone.p_unsafe - verdicts[0].p_unsafe) > 1e-4


def _reopened(path: Path, model: SafeModel, policy: Policy):
    return model.load_chat(path).send(TEXTS[1], max_tokens=1).verdict


def test_a_turn_that_was_settled_outlives_an_older_one_that_is_dropped(early_folder: Path) -> None:
    chat = load(early_folder, Policy(thresholds={"gate": 1.0}, early_threshold=0.0)).chat()
    chat.send(TEXTS[0])
    assert chat._turns[-1].columns is None
    chat.send(TEXTS[1])
    settled = chat._turns[0].columns
    assert settled is not None
    assert np.isfinite(settled).all()
    assert settled.shape[2] > 4


def test_a_broken_early_head_is_an_error_and_no_refusal(tmp_path: Path) -> None:
    def spoil(head: GateHead) -> GateHead:
        return replace(head, down_bias=np.full(1, np.nan, np.float32))

    verdict = load(write_bundle(tmp_path / "broken", early=spoil)).assess(TEXTS[0])
    assert verdict.decision is Decision.ERROR
    assert math.isnan(verdict.p_unsafe)


def test_what_stands_at_slot_t_does_not_move_the_early_verdict(early_folder: Path) -> None:
    engine = Engine(open_bundle(early_folder, threads=1))
    gate = engine._gate()
    assert gate is not None
    found = []
    for last in (3, 300):
        state = engine.new_state()
        state.cache.reserve(6)
        assert state.columns is not None
        passage = gate.prefill(
            engine.embed([7, 8, 9, 10, 11, last]), state.cache, state.columns, Deadline(None)
        )
        found.append((passage.early, passage.logits))
    for one, two in zip(*found, strict=True):
        np.testing.assert_allclose(one, two, atol=1e-6)


def test_decoded_tokens_have_the_columns_of_tokens_that_were_read(early_folder: Path) -> None:
    engine = Engine(open_bundle(early_folder, threads=1))
    policy = Policy(thresholds={"gate": 1.0})
    ids, tail = [7, 8, 9, 10, 11], [12, 13, 14]
    state = engine.new_state()
    engine.open(
        engine.judge(engine.embed(ids), state, policy, Deadline(None)), state, Deadline(None)
    )
    step = engine.stepper(state)
    for token in tail:
        step(token)
    whole = engine.new_state()
    whole.cache.reserve(20)
    gate = engine._gate()
    assert gate is not None
    assert state.columns is not None
    assert whole.columns is not None
    gate.prefill(engine.embed([*ids, 3, *tail]), whole.cache, whole.columns, Deadline(None))
    assert state.columns.length == 9
    state.columns.truncate(8)
    np.testing.assert_allclose(state.columns.view(), whole.columns.view()[:, :, :8], atol=1e-5)


def test_columns_that_found_no_room_are_still_owed(
    early_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(open_bundle(early_folder, threads=1))
    state = engine.new_state()
    never = Policy(thresholds={"gate": 1.0})
    engine.open(
        engine.judge(engine.embed([7, 8, 9]), state, never, Deadline(None)), state, Deadline(None)
    )
    step = engine.stepper(state)
    for token in (12, 13):
        step(token)
    columns = state.columns
    assert columns is not None
    monkeypatch.setattr(columns, "_write", _no_memory)
    judged = engine.judge(engine.embed([5, 6]), state, never, Deadline(None))
    assert judged.verdict.decision is Decision.ERROR
    monkeypatch.undo()
    assert columns.length == state.cache.length == 6
    assert columns.view().shape[2] == 6


def _no_memory(columns: object) -> None:
    raise MemoryError


def test_bytes_and_multiplications_count_what_stands_behind_the_exit(
    bundle_folder: Path, early_folder: Path
) -> None:
    plain, early = (work_of(open_bundle(f)) for f in (bundle_folder, early_folder))
    assert early.multiplications == plain.multiplications
    assert early.weight_bytes == plain.weight_bytes


@pytest.mark.parametrize("threshold", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("knots", [(), ((-2.0, -1.0), (0.0, 0.0), (1.0, 0.0), (4.0, 2.0))])
def test_a_bound_is_never_below_the_threshold(
    threshold: float, knots: tuple[tuple[float, float], ...]
) -> None:
    from edge_safe.runtime.calibration import refuses

    fitted = StageCalibration(1.3, 0.2, knots=knots)
    bound = early_bound(fitted, threshold)
    assert bound == math.inf or refuses(fitted, bound, threshold)
    if threshold == 0.3 and not knots:
        assert not refuses(fitted, bound - 2e-3, threshold)


def test_an_early_exit_has_to_be_below_the_gate(early_folder: Path, tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "bundle", early=lambda head: head)
    manifest = load_manifest(folder)
    assert manifest.safety.early is not None
    early = msgspec.structs.replace(manifest.safety.early, layer=EXIT_LAYER)
    safety = msgspec.structs.replace(manifest.safety, early=early)
    write_manifest(folder, msgspec.structs.replace(manifest, safety=safety))
    with pytest.raises(SchemaError, match="not below the gate's layer"):
        load_manifest(folder)


@pytest.mark.parametrize("field", ["early_threshold", "max_asr"])
def test_policies_with_shares_beyond_one_are_refused(field: str) -> None:
    with pytest.raises(PolicyError, match="give 0 to 1"):
        parse_policy({field: 1.5}, "a test")
