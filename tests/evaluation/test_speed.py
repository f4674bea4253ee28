"""Measuring: exact prompts, interleaving, quartiles, and the work that graphs do by themselves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edge_safe.evaluation.speed.graph_work import work_of
from edge_safe.evaluation.speed.integer_product import integer_product
from edge_safe.evaluation.speed.limits import Peak, bound, measure_peak
from edge_safe.evaluation.speed.prompts import exact_prompt, plain_ids
from edge_safe.evaluation.speed.requests import Answers, allowing, refusing
from edge_safe.evaluation.speed.samples import interleave, quartiles
from edge_safe.export.ungated import write_ungated
from edge_safe.runtime.bundle import open_bundle
from edge_safe.runtime.model import SafeModel
from edge_safe.runtime.verdict import Decision


@pytest.fixture(scope="module")
def model(tiny_bundle: Path) -> SafeModel:
    return SafeModel.load(tiny_bundle, threads=1)


@pytest.fixture(scope="module")
def ungated(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ungated(tiny_bundle, tmp_path_factory.mktemp("ungated") / "bundle")


@pytest.mark.parametrize("tokens", [48, 49, 50, 51, 64, 100, 257, 510])
def test_a_prompt_has_exactly_the_tokens_asked(model: SafeModel, tokens: int) -> None:
    prompt = exact_prompt(model, tokens)
    assert prompt is not None
    assert model.generate(prompt, max_tokens=1).usage.prompt_tokens == tokens


def test_no_prompt_is_shorter_than_the_template(model: SafeModel) -> None:
    assert exact_prompt(model, 3) is None


def test_plain_ids_hold_no_control_token(model: SafeModel) -> None:
    safety = model.manifest.safety
    ids = set(plain_ids(model, 400).tolist())
    special = {safety.safe_token_id, safety.unsafe_token_id, *safety.control_token_ids}
    assert not ids & (special | set(model.manifest.model.eos_token_ids))


def test_the_forced_policies_decide_both_ways(model: SafeModel) -> None:
    prompt = "What does the sign say?"
    assert allowing(model).assess(prompt).decision is Decision.ALLOW
    assert refusing(model).assess(prompt).decision is Decision.REFUSE


def test_another_policy_opens_no_graph_again(model: SafeModel) -> None:
    before = model.run_counts()["gate"]
    refusing(model).assess("What does the sign say?")
    assert model.run_counts()["gate"] == before + 1


def test_an_answer_has_exactly_the_tokens_asked_and_its_moments_in_order(model: SafeModel) -> None:
    times = Answers(model).run(plain_ids(model, 40), 90)
    assert len(times.ids) == 90
    assert 0 < times.verdict < times.first_token < times.total


def test_actions_take_turns_forwards_and_backwards() -> None:
    seen: list[str] = []

    def action(name: str) -> dict[str, float]:
        seen.append(name)
        return {name: float(len(seen))}

    samples = interleave([lambda: action("a"), lambda: action("b")], 2)
    assert seen == ["a", "b", "a", "b", "b", "a"]
    # The first round warms up and is not counted.
    assert samples.values == {"a": [3.0, 6.0], "b": [4.0, 5.0]}


def test_quartiles_are_those_of_numpy() -> None:
    values = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.6]
    assert quartiles(values) == pytest.approx(np.percentile(values, [25, 75]).tolist())
    assert quartiles([2.0]) == [2.0, 2.0]


def test_the_multiplications_are_those_of_the_layers(ungated: Path) -> None:
    work = work_of(open_bundle(ungated))
    width, inner, keys, words = 64, 128, 2 * 16, 420
    layer = 2 * width * width + 2 * width * keys + 3 * width * inner
    rows = 2 * width  # of the final stage's verdict
    assert work.multiplications == 4 * layer + words * width + rows
    assert work.head_multiplications == words * width
    assert work.weight_bytes == 4 * work.multiplications


def test_packed_weights_count_by_what_they_stand_for(
    tiny_bundle_int4: Path, tiny_bundle: Path
) -> None:
    packed, plain = (work_of(open_bundle(folder)) for folder in (tiny_bundle_int4, tiny_bundle))
    assert packed.multiplications >= plain.multiplications
    assert packed.weight_bytes < plain.weight_bytes / 2


def test_the_slower_of_reading_and_computing_is_the_bound() -> None:
    peak = Peak(
        1e9, float_operations_per_second=1e10, integer_operations_per_second=4e10, spread={}
    )
    found = bound(2e6, 1e6, 0.0, peak, 4.0)
    assert found["bound"] == "memory"
    assert found["memory_ms"] == pytest.approx(2.0)
    assert found["share_reached"] == pytest.approx(0.5)
    assert bound(2e6, 1e9, 0.0, peak, 200.0)["bound"] == "compute"


def test_operations_of_integer_kernels_are_held_against_their_own_peak() -> None:
    peak = Peak(
        1e9, float_operations_per_second=1e10, integer_operations_per_second=4e10, spread={}
    )
    assert bound(0.0, 1e9, 4e9, peak, 400.0)["compute_ms"] == pytest.approx(200.0)


def test_products_with_packed_weights_at_accuracy_level_4_are_integer_operations(
    tiny_bundle_int4: Path, tiny_bundle: Path
) -> None:
    packed, plain = (work_of(open_bundle(folder)) for folder in (tiny_bundle_int4, tiny_bundle))
    assert packed.rounded_multiplications > packed.rounded_head_multiplications
    assert plain.rounded_multiplications == 0


def test_the_integer_peak_is_measured_with_a_graph_that_onnx_accepts() -> None:
    import onnx
    from onnx.reference import ReferenceEvaluator

    model = onnx.load_from_string(integer_product(6))
    onnx.checker.check_model(model, full_check=True)
    left = np.arange(12, dtype=np.uint8).reshape(2, 6)
    (product,) = ReferenceEvaluator(model).run(None, {"left": left})
    np.testing.assert_array_equal(product, left.astype(np.int32) @ np.ones((6, 6), np.int32))


def test_a_machine_reads_and_multiplies_at_some_rate() -> None:
    peak = measure_peak(threads=1)
    for name, (lower, upper) in peak.spread.items():
        assert 0 < lower <= upper <= getattr(peak, name)


@pytest.mark.parametrize("bundle", ["tiny_bundle", "tiny_bundle_int4"])
def test_without_its_gate_a_model_answers_the_same(
    bundle: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(bundle)
    bare = SafeModel.load(write_ungated(folder, tmp_path / "ungated"), threads=1)
    whole = SafeModel.load(folder, threads=1)
    ids = plain_ids(whole, 60)
    assert Answers(bare).run(ids, 40).ids == Answers(whole).run(ids, 40).ids


def test_without_its_gate_a_model_has_one_graph_and_no_safety_attention(ungated: Path) -> None:
    import onnx

    graph = onnx.load(str(ungated / "decoder.onnx"), load_external_data=False).graph
    assert {value.name for value in graph.input} >= {"inputs_embeds", "past_key_values.0.key"}
    assert not [node.name for node in graph.node if node.name.startswith("gate")]
    open_bundle(ungated).verify()
