"""The gate's promises, on real graphs: slot T, padding, chunks, early exit, failing closed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edge_safe.errors import PromptError
from edge_safe.runtime import prefill
from edge_safe.runtime.bundle import open_bundle
from edge_safe.runtime.deadline import Deadline
from edge_safe.runtime.engine import Engine
from edge_safe.runtime.policy import Policy
from edge_safe.runtime.verdict import Decision

ALLOW = Policy(thresholds={"gate": 1.0})
REFUSE = Policy(thresholds={"gate": 0.0})


@pytest.fixture(scope="module")
def engine(bundle_folder: Path) -> Engine:
    return Engine(open_bundle(bundle_folder, threads=1))


@pytest.fixture
def ids() -> np.ndarray:
    return np.random.default_rng(5).integers(5, 300, 40)


def feeds(engine: Engine, ids: np.ndarray, slot: int, padding: int = 0) -> dict[str, np.ndarray]:
    """Inputs of gate.onnx for a prompt with any token at slot T, padded on the right."""
    state = engine.new_state()
    embeds = engine.embed([*ids, slot, *[7] * padding]).rows[None]
    length = len(ids) + 1
    result = {
        "inputs_embeds": embeds,
        "attention_mask": np.array([[1] * length + [0] * padding], np.int64),
        "position_ids": np.arange(length + padding, dtype=np.int64)[None],
        "gate_past": state.columns.view(),
    }
    for layer in range(2):
        for kind in ("key", "value"):
            result[f"past_key_values.{layer}.{kind}"] = np.zeros((1, 2, 0, 16), np.float32)
    return result


def p_unsafe(engine: Engine, ids: np.ndarray, state: object = None) -> float:
    state = state or engine.new_state()
    return engine.judge(engine.embed(ids), state, ALLOW, Deadline(None)).verdict.p_unsafe


def test_what_stands_at_slot_t_cannot_change_the_verdict(
    engine: Engine, bundle_folder: Path, ids: np.ndarray
) -> None:
    gate = open_bundle(bundle_folder, threads=1).session("gate")
    logits = [gate.run(feeds(engine, ids, slot))["verdict_logits"] for slot in (3, 4, 100, 2)]
    for other in logits[1:]:
        np.testing.assert_array_equal(other, logits[0])


def test_padding_cannot_change_the_verdict(
    engine: Engine, bundle_folder: Path, ids: np.ndarray
) -> None:
    gate = open_bundle(bundle_folder, threads=1).session("gate")
    bare = gate.run(feeds(engine, ids, 3))["verdict_logits"]
    padded = gate.run(feeds(engine, ids, 3, padding=9))["verdict_logits"]
    np.testing.assert_allclose(padded, bare, atol=1e-5)


@pytest.mark.parametrize("size", [2, 5, 8, 39, 40])
def test_chunks_cannot_change_verdict_or_answer(
    engine: Engine, ids: np.ndarray, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole_state = engine.new_state()
    whole = engine.judge(engine.embed(ids), whole_state, ALLOW, Deadline(None))
    expected = engine.open(whole, whole_state, Deadline(None))
    monkeypatch.setattr(prefill.chunks, "__defaults__", (size, ()))
    state = engine.new_state()
    judged = engine.judge(engine.embed(ids), state, ALLOW, Deadline(None))
    assert judged.verdict.p_unsafe == pytest.approx(whole.verdict.p_unsafe, abs=1e-5)
    np.testing.assert_allclose(engine.open(judged, state, Deadline(None)), expected, atol=1e-4)


def test_decoding_equals_reading_all_at_once(engine: Engine, ids: np.ndarray) -> None:
    state = engine.new_state()
    engine.open(
        engine.judge(engine.embed(ids), state, ALLOW, Deadline(None)), state, Deadline(None)
    )
    step = engine.stepper(state)
    tail = [11, 12, 13, 14]
    stepped = [step(token).copy() for token in tail][-1]
    whole_state = engine.new_state()
    # Slot T is the last position read: the tail's last token is put there in its place.
    embeds = engine.embed([*ids, 3, *tail])
    whole_state.cache.reserve(len(embeds))
    passage = engine._gate().prefill(embeds, whole_state.cache, whole_state.columns, Deadline(None))
    logits, _ = engine._decoder().prefill(passage.states(), whole_state.cache, Deadline(None))
    np.testing.assert_allclose(stepped, logits[0, 0], atol=1e-4)
    np.testing.assert_allclose(state.columns.view(), whole_state.columns.view(), atol=1e-4)


def test_caches_that_grow_keep_what_they_hold(engine: Engine) -> None:
    ids = np.random.default_rng(6).integers(5, 300, 250)
    answers = []
    for reserved in (0, 600):
        state = engine.new_state()
        state.cache.reserve(reserved)
        engine.open(
            engine.judge(engine.embed(ids), state, ALLOW, Deadline(None)), state, Deadline(None)
        )
        step = engine.stepper(state)
        answers.append([int(step(9).argmax()) for _ in range(20)])
    assert answers[0] == answers[1]


def test_a_refusal_leaves_the_model_nothing_and_the_gate_its_columns(
    engine: Engine, ids: np.ndarray
) -> None:
    state = engine.new_state()
    judged = engine.judge(engine.embed(ids), state, REFUSE, Deadline(None))
    assert judged.verdict.decision is Decision.REFUSE
    assert (state.cache.length, state.columns.length) == (0, len(ids))


def test_the_decoder_is_not_run_on_a_refusal(bundle_folder: Path, ids: np.ndarray) -> None:
    bundle = open_bundle(bundle_folder, threads=1)
    engine = Engine(bundle)
    engine.judge(engine.embed(ids), engine.new_state(), REFUSE, Deadline(None))
    assert bundle.run_counts()["decoder"] == 0
    assert bundle.run_counts()["gate"] == 1


def test_a_refused_prompt_cannot_be_opened(engine: Engine, ids: np.ndarray) -> None:
    from edge_safe.errors import GateError

    state = engine.new_state()
    embeds = engine.embed(ids)
    refused = engine.judge(embeds, state, Policy(stages=("gate", "final")), Deadline(None))
    refused.states = refused.logits = None
    with pytest.raises(GateError, match="not allowed"):
        engine.open(refused, state, Deadline(None))


def test_refused_columns_count_in_the_next_verdict(engine: Engine, ids: np.ndarray) -> None:
    fresh = p_unsafe(engine, ids)
    state = engine.new_state()
    engine.judge(engine.embed(ids[::-1]), state, REFUSE, Deadline(None))
    assert p_unsafe(engine, ids, state) != pytest.approx(fresh, abs=1e-6)


@pytest.mark.parametrize("thresholds", [{"gate": 0.0, "final": 1.0}, {"gate": 1.0, "final": 0.0}])
def test_any_stage_may_refuse(
    engine: Engine, ids: np.ndarray, thresholds: dict[str, float]
) -> None:
    policy = Policy(stages=("gate", "final"), thresholds=thresholds)
    verdict = engine.judge(engine.embed(ids), engine.new_state(), policy, Deadline(None)).verdict
    refusing = min(thresholds, key=thresholds.__getitem__)
    assert (verdict.decision, verdict.stage) == (Decision.REFUSE, refusing)


def test_only_the_last_stage_allows(engine: Engine, ids: np.ndarray) -> None:
    policy = Policy(stages=("gate", "final"), thresholds={"gate": 1.0, "final": 1.0})
    verdict = engine.judge(engine.embed(ids), engine.new_state(), policy, Deadline(None)).verdict
    assert (verdict.decision, verdict.stage) == (Decision.ALLOW, "final")


def test_a_bundle_without_a_gate_has_the_final_stage(
    gateless_folder: Path, ids: np.ndarray
) -> None:
    bundle = open_bundle(gateless_folder, threads=1)
    engine = Engine(bundle)
    state = engine.new_state()
    judged = engine.judge(engine.embed(ids), state, Policy(), Deadline(None))
    assert judged.verdict.stage == "final"
    vocab_size = bundle.manifest.model.vocab_size
    assert engine.open(judged, state, Deadline(None)).shape == (vocab_size,)


def test_a_gate_that_gives_nan_cannot_decide(broken_gate_folder: Path, ids: np.ndarray) -> None:
    engine = Engine(open_bundle(broken_gate_folder, threads=1))
    state = engine.new_state()
    verdict = engine.judge(engine.embed(ids), state, ALLOW, Deadline(None)).verdict
    assert verdict.decision is Decision.ERROR
    assert "nan" in (verdict.reason or "")
    assert (state.cache.length, state.columns.length) == (0, 0)


def test_a_verdict_that_comes_too_late_is_an_error(engine: Engine, ids: np.ndarray) -> None:
    with Deadline(0.0) as deadline:
        verdict = engine.judge(engine.embed(ids), engine.new_state(), ALLOW, deadline).verdict
    assert verdict.decision is Decision.ERROR
    assert "time" in (verdict.reason or "")


@pytest.mark.parametrize("error", [MemoryError, RuntimeError, ValueError])
def test_whatever_breaks_in_the_gate_is_an_error_verdict(
    engine: Engine,
    ids: np.ndarray,
    error: type[Exception],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    state = engine.new_state()

    def break_down(length: int) -> bool:
        raise error

    monkeypatch.setattr(state.cache, "reserve", break_down)
    verdict = engine.judge(engine.embed(ids), state, ALLOW, Deadline(None)).verdict
    assert verdict.decision is Decision.ERROR
    assert error.__name__ in (verdict.reason or "")


def test_embeddings_of_a_wrong_width_are_an_error_verdict(engine: Engine) -> None:
    narrow = engine.place(np.zeros((9, 63), np.float32))
    verdict = engine.judge(narrow, engine.new_state(), ALLOW, Deadline(None)).verdict
    assert verdict.decision is Decision.ERROR


def test_a_prompt_beyond_the_context_is_a_prompt_error(engine: Engine) -> None:
    with pytest.raises(PromptError, match="640"):
        engine.judge(engine.embed([9] * 700), engine.new_state(), ALLOW, Deadline(None))
