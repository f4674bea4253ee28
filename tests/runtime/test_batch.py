"""Many requests: the verdicts of one by one, in order, whatever stands between them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edge_safe.errors import GateError
from edge_safe.runtime import batch
from edge_safe.runtime.batch import AssessRequest, Batches
from edge_safe.runtime.deadline import Deadline
from edge_safe.runtime.model import SafeModel
from edge_safe.runtime.policy import Policy
from edge_safe.runtime.request import Prompt
from edge_safe.runtime.verdict import Decision, Verdict
from tests.runtime.conftest import allow_all

RNG = np.random.default_rng(3)
TEXTS = [
    " ".join(RNG.choice(["boat", "tide", "harbour", "rope", "gull", "anchor"], n).tolist())
    for n in (1, 40, 3, 7, 7, 90, 2, 20, 1, 5, 33, 12)
]


def judged(model: SafeModel, requests: object, **options: object) -> list[Verdict]:
    return [found.verdict for found in model.assess_many(requests, **options)]


def one_by_one(model: SafeModel) -> list[Verdict]:
    return [model.assess(text) for text in TEXTS]


@pytest.mark.parametrize("workers", [1, 3])
def test_verdicts_are_those_of_one_by_one(model: SafeModel, workers: int) -> None:
    found = judged(model, [AssessRequest(text) for text in TEXTS], workers=workers)
    for one, many in zip(one_by_one(model), found, strict=True):
        assert many.decision is one.decision
        assert many.stage == one.stage
        assert many.p_unsafe == pytest.approx(one.p_unsafe, abs=1e-5)


def test_several_are_judged_in_one_run(model: SafeModel) -> None:
    before = model.run_counts()["gate"]
    judged(model, [AssessRequest("Tell me of boats.") for _ in range(8)], workers=1)
    assert model.run_counts()["gate"] - before < 8


def test_a_policy_with_the_last_stage_is_kept_to(bundle_folder: Path) -> None:
    policy = Policy(stages=("gate", "final"), thresholds={"gate": 1.0, "final": 0.5})
    model = SafeModel.load(bundle_folder, threads=1, policy=policy)
    found = judged(model, [AssessRequest(text) for text in TEXTS])
    assert [v.stage for v in found] == ["final"] * len(TEXTS)
    for one, many in zip(one_by_one(model), found, strict=True):
        assert many.decision is one.decision


def test_a_bundle_without_a_gate_judges_many_too(gateless_folder: Path) -> None:
    model = SafeModel.load(gateless_folder, threads=1)
    found = judged(model, [AssessRequest(text) for text in TEXTS])
    for one, many in zip(one_by_one(model), found, strict=True):
        assert many.p_unsafe == pytest.approx(one.p_unsafe, abs=1e-6)


def test_what_cannot_be_read_is_an_error_of_its_own(model: SafeModel) -> None:
    requests = [
        AssessRequest("Tell me of boats."),
        AssessRequest(""),
        AssessRequest("boat " * 100_000),
        AssessRequest("Look.", images=["none.png"]),
        AssessRequest([{"role": "user"}]),
        AssessRequest("And of tides."),
    ]
    found = judged(model, requests)
    decisions = [verdict.decision is Decision.ERROR for verdict in found]
    assert decisions == [False, True, True, True, True, False]
    assert all(v.stage == "input" and v.reason for v in found[1:5])


def test_a_system_text_counts(model: SafeModel) -> None:
    (found,) = judged(model, [AssessRequest("Hello.", system="Speak of boats alone.")])
    expected = model.assess("Hello.", system="Speak of boats alone.")
    assert found.p_unsafe == pytest.approx(expected.p_unsafe, abs=1e-5)


def test_an_answer_begun_is_judged_with_its_question(model: SafeModel) -> None:
    begun = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Sure"}]
    found = judged(model, [AssessRequest(begun), AssessRequest("Hello.")])
    assert found[0].p_unsafe == pytest.approx(model.assess(begun).p_unsafe, abs=1e-5)


def test_a_gate_that_gives_no_number_lets_nothing_pass(broken_gate_folder: Path) -> None:
    model = SafeModel.load(broken_gate_folder, threads=1, policy=allow_all())
    found = judged(model, [AssessRequest(text) for text in TEXTS])
    assert all(verdict.decision is Decision.ERROR for verdict in found)
    assert all(math.isnan(verdict.p_unsafe) for verdict in found)


def test_without_time_there_is_no_verdict(model: SafeModel) -> None:
    found = judged(model, [AssessRequest(text) for text in TEXTS[:4]], timeout=0.0)
    assert all(verdict.decision is Decision.ERROR for verdict in found)


def test_reading_and_judging_share_one_time(model: SafeModel) -> None:
    left: list[float] = []

    def encode(request: AssessRequest, deadline: Deadline) -> Prompt:
        time.sleep(0.2)
        return model._encode(request.prompt, (), None, None, deadline)

    def alone(prompt: Prompt, deadline: Deadline) -> Verdict:
        left.append(deadline.left)
        return model._judge_alone(prompt, deadline)

    (found,) = Batches(model._requests, encode, alone, 1, 60.0).assess([AssessRequest("Hello.")])
    assert found.verdict.decision is Decision.ALLOW
    assert left[0] < 59.8
    (late,) = Batches(model._requests, encode, alone, 1, 0.1).assess([AssessRequest("Hello.")])
    assert late.verdict.decision is Decision.ERROR
    assert late.verdict.reason == "the time for a verdict is over"


def test_a_run_in_vain_counts_for_those_that_were_in_it(
    model: SafeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    together, left = model.engine.judge_together, []

    def slow(prompts: list, policy: Policy, deadline: Deadline) -> list[Verdict]:
        time.sleep(0.2)
        together(prompts, policy, deadline)
        raise GateError("one of them broke it")

    def alone(prompt: Prompt, deadline: Deadline) -> Verdict:
        left.append(deadline.left)
        return model._judge_alone(prompt, deadline)

    def encode(request: AssessRequest, deadline: Deadline) -> Prompt:
        return model._encode(request.prompt, (), None, None, deadline)

    monkeypatch.setattr(model.engine, "judge_together", slow)
    batches = Batches(model._requests, encode, alone, 1, 60.0)
    found = list(batches.assess([AssessRequest("Hello."), AssessRequest("Tell me of boats.")]))
    assert [one.verdict.decision for one in found] == [Decision.ALLOW] * 2
    assert len(left) == 2
    assert max(left) < 59.8


def test_who_has_no_time_left_takes_none_from_the_others(model: SafeModel) -> None:
    def encode(request: AssessRequest, deadline: Deadline) -> Prompt:
        # One of them has used all but a moment of its time when the run begins.
        if request.prompt == TEXTS[0]:
            time.sleep(max(0.0, deadline.left - 0.001))
        return model._encode(request.prompt, (), None, None, deadline)

    batches = Batches(model._requests, encode, model._judge_alone, 1, 1.0)
    slow, quick = batches.assess([AssessRequest(TEXTS[0]), AssessRequest(TEXTS[2])])
    assert slow.verdict.decision is Decision.ERROR
    assert quick.verdict.decision is Decision.ALLOW


def test_requests_are_not_read_far_ahead(model: SafeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "_WINDOW_REQUESTS", 8)
    taken = 0

    def endless() -> Iterator[AssessRequest]:
        nonlocal taken
        while True:
            taken += 1
            yield AssessRequest("Tell me of boats.")

    found = model.assess_many(endless(), workers=2)
    for _ in range(3):
        assert next(found).verdict.decision is Decision.ALLOW
    assert taken <= 16


def test_what_the_source_raises_comes_after_the_verdicts_before_it(
    model: SafeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "_WINDOW_REQUESTS", 8)

    def broken() -> Iterator[AssessRequest]:
        for _ in range(8):
            yield AssessRequest("Tell me of boats.")
        raise OSError("the disk is gone")

    found = model.assess_many(broken(), workers=2)
    verdicts = [next(found).verdict for _ in range(8)]
    assert all(verdict.decision is Decision.ALLOW for verdict in verdicts)
    with pytest.raises(OSError, match="the disk is gone"):
        next(found)


def test_groups_stay_within_their_positions(model: SafeModel) -> None:
    sizes: list[int] = []
    engine = model.engine
    together = engine.judge_together

    def watched(prompts: list, policy: Policy, deadline: object) -> list[Verdict]:
        sizes.append(len(prompts) * max(len(inputs) + 1 for inputs, _ in prompts))
        return together(prompts, policy, deadline)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "judge_together", watched)
        judged(model, [AssessRequest(text) for text in TEXTS * 6])
    assert sizes
    assert max(sizes) <= 256


def test_of_nothing_there_is_nothing(model: SafeModel) -> None:
    assert judged(model, []) == []
