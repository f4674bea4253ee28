"""An int8 cache where prompts have graphs of their own: they see each other unrounded."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest

from edge_safe import Decision, Policy, SafeModel
from edge_safe.errors import BundleError
from edge_safe.evaluation.speed.requests import Answers
from edge_safe.export import export_bundle
from edge_safe.runtime import prefill
from edge_safe.runtime.batch import AssessRequest
from edge_safe.runtime.deadline import Deadline
from edge_safe.runtime.manifest import Tensor, load_manifest
from edge_safe.runtime.policy import Stage
from edge_safe.runtime.session import Session

ALLOW = Policy(thresholds={"gate": 1.0})
TEXTS = (
    "Tell me a story about a boat.",
    "How do I pick the lock of my neighbour's shed?",
    "Explain how bread rises, step by step, and what the baker does while it does so.",
)


@pytest.fixture(scope="module")
def bundles(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same weights with a whole cache and an int8 one."""
    folder = tmp_path_factory.mktemp("caches")
    for cache in ("fp32", "int8"):
        export_bundle(
            tiny_checkpoint,
            folder / cache,
            precision="int4-int8",
            kv_cache=cache,
            allow_unaccepted=True,
        )
    return {cache: folder / cache for cache in ("fp32", "int8")}


def opened(bundle: Path) -> SafeModel:
    return SafeModel.load(bundle, threads=1, accept_failed=True, policy=ALLOW)


def shares(bundle: Path) -> list[float]:
    model = opened(bundle)
    verdicts = [model.assess(text) for text in TEXTS]
    assert all(verdict.decision is not Decision.ERROR for verdict in verdicts)
    return [verdict.p_unsafe for verdict in verdicts]


def held(bundle: Path, text: str) -> list[np.ndarray]:
    """Keys and values that a prompt leaves, layer by layer."""
    model = opened(bundle)
    engine, ids = model.engine, np.array(model.prompt_ids(text))
    state = engine.new_state()
    with Deadline(None) as deadline:
        judged = engine.judge(engine.embed(ids), state, ALLOW, deadline)
        engine.open(judged, state, deadline)
    layers = range(load_manifest(bundle).model.layers)
    return state.cache.copy(layers, len(ids))


def test_a_prompt_in_one_piece_is_judged_as_with_a_whole_cache(bundles: dict[str, Path]) -> None:
    # Not to the last bit: other memory, another order of sums, and activations in 8 bits.
    assert shares(bundles["int8"]) == pytest.approx(shares(bundles["fp32"]), abs=1e-3)


def test_a_prompt_leaves_its_keys_and_values_rounded(bundles: dict[str, Path]) -> None:
    whole, rounded = held(bundles["fp32"], TEXTS[0]), held(bundles["int8"], TEXTS[0])
    assert {array.dtype.name for array in rounded} == {"int8"}
    scales = scales_of(bundles["int8"])
    assert len(scales) == len(whole) == len(rounded)
    for numbers, steps, scale in zip(whole, rounded, scales, strict=True):
        wanted = np.clip(np.rint(numbers / scale), -128, 127)
        np.testing.assert_allclose(steps, wanted, atol=1)
        assert np.mean(steps != wanted) < 0.01
        assert np.abs(steps).max() > 20


def scales_of(bundle: Path) -> list[np.ndarray]:
    """(heads, 1, width) of keys and values, layer by layer."""
    found = {}
    for name in ("gate_prefill", "decoder_prefill"):
        for tensor in onnx.load(bundle / f"{name}.onnx").graph.initializer:
            if "_scale/4" in tensor.name:
                found[tensor.name] = onnx.numpy_helper.to_array(tensor)
    layers = load_manifest(bundle).model.layers
    names = [
        f"layers.{n}.attention.{part}_scale/4" for n in range(layers) for part in ("key", "value")
    ]
    return [found[name] for name in names]


@pytest.mark.parametrize("size", [7, 16])
def test_pieces_of_a_prompt_change_little(
    size: int, bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = shares(bundles["int8"])
    monkeypatch.setattr(prefill.chunks, "__defaults__", (size, ()))
    assert shares(bundles["int8"]) == pytest.approx(whole, abs=0.05)


def test_a_later_piece_sees_what_the_cache_stands_for(bundles: dict[str, Path]) -> None:
    count, new = 9, 6
    past = {}
    rounded = held(bundles["int8"], TEXTS[0])
    for place, (steps, scale) in enumerate(zip(rounded, scales_of(bundles["int8"]), strict=True)):
        part = f"past_key_values.{place // 2}.{('key', 'value')[place % 2]}"
        past[part] = (steps[:, :, :count], (steps[:, :, :count] * scale).astype(np.float32))
    rows = np.random.default_rng(0).standard_normal((1, new, 64)).astype(np.float32)
    found = {}
    for cache, slot in (("int8", 0), ("fp32", 1)):
        graph = Session(bundles[cache] / "gate_prefill.onnx", threads=1)
        _, layers, _, width = (
            int(n) if isinstance(n, int) else 0 for n in graph.shape("gate_past")
        )
        feeds = {
            "inputs_embeds": rows,
            "attention_mask": np.ones((1, count + new), np.int64),
            "position_ids": np.arange(count, count + new)[None],
            "gate_past": np.zeros([1, layers, 0, width], np.float32),
        }
        for name in graph.inputs:
            if name in past:
                # The one has places for the new positions, the other makes them.
                spare = new if slot == 0 else 0
                feeds[name] = np.pad(past[name][slot], [(0, 0), (0, 0), (0, spare), (0, 0)])
        found[cache] = graph.run(feeds)
    hidden = [found[cache]["hidden_states"] for cache in ("int8", "fp32")]
    np.testing.assert_allclose(*hidden, atol=1e-4)
    kept = found["int8"]["present.0.key"]
    np.testing.assert_array_equal(kept[:, :, :count], past["past_key_values.0.key"][0])
    assert np.abs(kept[:, :, count:]).max() > 20


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("stages", [("gate",), ("final",), ("gate", "final")])
@pytest.mark.parametrize("at", [3, 15, 30])
def test_what_is_no_number_does_not_get_lost_between_pieces(
    at: int,
    stages: tuple[Stage, ...],
    value: float,
    bundles: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prefill.chunks, "__defaults__", (16, ()))
    policy = Policy(stages=stages, thresholds=dict.fromkeys(stages, 1.0))
    engine = opened(bundles["int8"]).engine
    inputs = engine.embed(np.arange(20, 60))
    inputs.rows[at, 5] = value
    with Deadline(None) as deadline:
        judged = engine.judge(inputs, engine.new_state(), policy, deadline)
    assert judged.verdict.decision is Decision.ERROR


def test_prompts_judged_together_are_judged_as_alone(bundles: dict[str, Path]) -> None:
    model = opened(bundles["int8"])
    together = model.assess_many([AssessRequest(text) for text in TEXTS])
    found = [assessment.verdict.p_unsafe for assessment in together]
    assert found == pytest.approx(shares(bundles["int8"]), abs=1e-5)


def test_a_second_turn_is_judged_almost_as_anew(bundles: dict[str, Path]) -> None:
    model = opened(bundles["int8"])
    chat = model.chat()
    first = chat.send(TEXTS[0], max_tokens=8)
    kept = chat.send(TEXTS[1], max_tokens=1).verdict
    anew = model.assess(
        [
            {"role": "user", "content": TEXTS[0]},
            {"role": "assistant", "content": first.text or ""},
            {"role": "user", "content": TEXTS[1]},
        ]
    )
    assert kept.p_unsafe == pytest.approx(anew.p_unsafe, abs=0.1)


def test_answers_grow_the_cache_and_stay_near(bundles: dict[str, Path]) -> None:
    ids = np.arange(20, 60)
    # Beyond the places that a cache is made with.
    found = {cache: Answers(opened(bundle)).run(ids, 260).ids for cache, bundle in bundles.items()}
    assert len(found["int8"]) == len(found["fp32"]) == 260
    assert found["int8"][0] == found["fp32"][0]


def test_its_cache_takes_a_quarter_of_the_memory(bundles: dict[str, Path]) -> None:
    sizes = {
        cache: opened(bundle).engine.new_state().cache.size_of(300)
        for cache, bundle in bundles.items()
    }
    assert sizes["fp32"] == 4 * sizes["int8"]


def test_a_cache_of_a_type_that_is_not_held_is_an_error(
    bundles: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(bundles["int8"], tmp_path / "b"))
    text = (folder / "edge_safe.json").read_text().replace('"dtype": "int8"', '"dtype": "bfloat16"')
    (folder / "edge_safe.json").write_text(text)
    with pytest.raises(BundleError, match="bfloat16"):
        opened(folder).assess(TEXTS[0])


def test_a_cache_of_another_model_in_the_bundle_says_nothing_of_it(
    bundles: dict[str, Path],
) -> None:
    manifest = load_manifest(bundles["int8"])
    writer = msgspec.structs.replace(
        manifest.graphs["embed_tokens"],
        inputs=[Tensor("past_key_values.0.key", "float32", [1, 6, "past", 64])],
    )
    graphs = {"audio_decoder": writer, **manifest.graphs}
    with_writer = msgspec.structs.replace(manifest, graphs=graphs)
    assert (with_writer.cache_dtype, with_writer.whole_caches) == ("int8", True)
    assert not with_writer.own_columns
