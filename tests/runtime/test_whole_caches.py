"""Graphs that take all places of a cache at once, as TensorRT's do, run like all others."""

from __future__ import annotations

import math
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from edge_safe.errors import PromptError
from edge_safe.export.graphs.cut_gate import early_graph, late_graph
from edge_safe.export.graphs.decoder import (
    decoder_graph,
    embedding_graph,
    gate_graph,
    store_model,
)
from edge_safe.export.graphs.safety import TokenRows
from edge_safe.export.graphs.store import WeightStore
from edge_safe.export.quantization import precision_named
from edge_safe.export.tensorrt.folder import lower_folder
from edge_safe.export.tensorrt.releases import RELEASES
from edge_safe.runtime import manifest as m
from edge_safe.runtime import prefill
from edge_safe.runtime.batch import AssessRequest
from edge_safe.runtime.bundle import open_bundle
from edge_safe.runtime.cache import STEP
from edge_safe.runtime.chat import Chat
from edge_safe.runtime.deadline import Deadline
from edge_safe.runtime.engine import Engine
from edge_safe.runtime.model import SafeModel
from edge_safe.runtime.policy import Policy
from edge_safe.runtime.state import State
from edge_safe.runtime.verdict import Decision
from tests.runtime.conftest import (
    CONTEXT,
    EARLY_LAYER,
    EXIT_LAYER,
    HEAD_DIM,
    WIDTH,
    allow_all,
    decoder_spec,
    random_head,
    random_weights,
    tiny_tokenizer,
    write_bundle,
    write_manifest,
)

ALLOW = Policy(thresholds={"gate": 1.0})
REFUSE = Policy(thresholds={"gate": 0.0})
END_EARLY = Policy(thresholds={"gate": 1.0}, early_threshold=0.0)
NEVER_EARLY = Policy(thresholds={"gate": 1.0}, early_threshold=1.0)
TEXTS = [
    "Tell me of the tide.",
    "Where is the harbour, and who lives beside the water?",
    "A rope.",
    "Name three birds of the coast and say in a few words how each of them catches its food.",
    "Is the shop open on Sunday?",
]
NAMES = {onnx.TensorProto.FLOAT: "float32", onnx.TensorProto.INT64: "int64"}
NAMES |= {onnx.TensorProto.FLOAT16: "float16"}


def write_whole(folder: Path, *, early: bool, half: bool = False) -> Path:
    """The bundle that ``write_bundle`` writes, in standard operators."""
    write_bundle(folder, early=(lambda head: head) if early else None)
    manifest = m.load_manifest(folder)
    for path in folder.glob("*.onnx*"):
        path.unlink()
    spec = decoder_spec(tiny_tokenizer().get_vocab_size())
    rng = np.random.default_rng(7)
    head = random_head(rng)
    rows = TokenRows((rng.standard_normal((2, WIDTH)) / 8).astype(np.float32), None)
    scratch = folder / "scratch"
    scratch.mkdir()
    with WeightStore(scratch / "weights.onnx.data") as store:
        weights = store_model(
            store, spec, random_weights(spec), precision_named("fp32"), lambda _: None
        )
        graphs = {"embed_tokens": embedding_graph(weights, spec)}
        if early:
            below = random_head(rng, EARLY_LAYER)
            graphs["gate"] = early_graph(weights, spec, below, head, store)
            graphs["gate_late"] = late_graph(weights, spec, EXIT_LAYER, below, head, store)
        else:
            graphs["gate"] = gate_graph(weights, spec, EXIT_LAYER, head, store)
        graphs["decoder"] = decoder_graph(weights, spec, EXIT_LAYER, rows, store)
        for name, graph in graphs.items():
            graph.save(scratch / f"{name}.onnx")
    lower_folder(scratch, folder, RELEASES["10.3"], half=half, progress=lambda _: None)
    for path in scratch.iterdir():
        path.unlink()
    scratch.rmdir()
    described = {name: describe(folder / f"{name}.onnx") for name in graphs}
    manifest = msgspec.structs.replace(manifest, graphs=described)
    write_manifest(folder, manifest)
    return folder


def describe(path: Path) -> m.Graph:
    """Inputs and outputs of a graph as it stands in its file."""
    graph = onnx.load(str(path), load_external_data=False).graph

    def tensors(values: object) -> list[m.Tensor]:
        return [
            m.Tensor(
                value.name,
                NAMES[value.type.tensor_type.elem_type],
                [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim],
            )
            for value in values
        ]

    return m.Graph(path.name, tensors(graph.input), tensors(graph.output), "fp32")


@pytest.fixture(scope="session")
def whole_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``bundle_folder`` with whole caches; not to be changed."""
    return write_whole(tmp_path_factory.mktemp("whole") / "tiny", early=False)


@pytest.fixture(scope="session")
def whole_early_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``early_folder`` with whole caches; not to be changed."""
    return write_whole(tmp_path_factory.mktemp("whole") / "early", early=True)


@pytest.fixture(scope="session")
def half_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``bundle_folder`` with whole caches in float16; not to be changed."""
    return write_whole(tmp_path_factory.mktemp("whole") / "half", early=False, half=True)


@pytest.fixture(params=["gate", "early"])
def folders(
    request: pytest.FixtureRequest,
    bundle_folder: Path,
    whole_folder: Path,
    early_folder: Path,
    whole_early_folder: Path,
) -> tuple[Path, Path]:
    """The CPU's bundle and the same with whole caches; without and with an early exit."""
    if request.param == "gate":
        return bundle_folder, whole_folder
    return early_folder, whole_early_folder


def engine_of(folder: Path) -> Engine:
    return Engine(open_bundle(folder, provider="cpu", threads=1))


def load(folder: Path, policy: Policy, megabytes: float = 0) -> SafeModel:
    return SafeModel.load(
        folder, provider="cpu", threads=1, policy=policy, prefix_cache_mb=megabytes
    )


def prompt(count: int, seed: int = 5) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(5, 300, count)


def same(found: float, expected: float) -> None:
    """Two probabilities that are one; near 0 and 1 their log-odds say more."""
    assert found == pytest.approx(expected, abs=1e-5)
    odds = [math.log(p / (1 - p)) for p in (found, expected)]
    assert odds[0] == pytest.approx(odds[1], abs=2e-4)


def answer(
    engine: Engine, state: State, ids: NDArray[np.int64], count: int, policy: Policy = NEVER_EARLY
) -> tuple[float, list[int]]:
    """p_unsafe of a prompt, and the greedy tokens behind it."""
    judged = engine.judge(engine.embed(ids), state, policy, Deadline(None))
    logits = engine.open(judged, state, Deadline(None))
    step = engine.stepper(state)
    tokens = []
    for _ in range(count):
        tokens.append(int(logits.argmax()))
        logits = step(tokens[-1])
    return judged.verdict.p_unsafe, tokens


def test_the_manifest_says_that_caches_are_whole(
    bundle_folder: Path, whole_folder: Path, half_folder: Path
) -> None:
    found = [m.load_manifest(f).whole_caches for f in (bundle_folder, whole_folder, half_folder)]
    assert found == [False, True, True]


# Shorter than a chunk, one over, slot T alone left over, two chunks and more.
@pytest.mark.parametrize("count", [1, 40, 256, 511, 512, 513, 600])
def test_prompts_of_every_length_get_the_cpus_verdict_and_answer(
    folders: tuple[Path, Path], count: int
) -> None:
    (p_unsafe, tokens), (found, own) = (
        answer(engine, engine.new_state(), prompt(count), 12) for engine in map(engine_of, folders)
    )
    same(found, p_unsafe)
    assert own == tokens


@pytest.mark.parametrize("size", [2, 5, 8, 39, 40])
def test_chunks_cannot_change_verdict_or_answer(
    folders: tuple[Path, Path], size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, ids = engine_of(folders[1]), prompt(40)
    whole_state = engine.new_state()
    whole = engine.judge(engine.embed(ids), whole_state, NEVER_EARLY, Deadline(None))
    expected = engine.open(whole, whole_state, Deadline(None)).copy()
    monkeypatch.setattr(prefill.chunks, "__defaults__", (size, ()))
    state = engine.new_state()
    judged = engine.judge(engine.embed(ids), state, NEVER_EARLY, Deadline(None))
    same(judged.verdict.p_unsafe, whole.verdict.p_unsafe)
    np.testing.assert_allclose(engine.open(judged, state, Deadline(None)), expected, atol=1e-4)
    assert state.columns is not None
    assert whole_state.columns is not None
    np.testing.assert_allclose(state.columns.view(), whole_state.columns.view(), atol=1e-5)


def test_decoding_equals_reading_all_at_once(folders: tuple[Path, Path]) -> None:
    engine, ids, tail = engine_of(folders[1]), prompt(40), [11, 12, 13, 14]
    state = engine.new_state()
    judged = engine.judge(engine.embed(ids), state, NEVER_EARLY, Deadline(None))
    engine.open(judged, state, Deadline(None))
    step = engine.stepper(state)
    stepped = [step(token).copy() for token in tail][-1]
    whole = engine.new_state()
    embeds = engine.embed([*ids, 3, *tail])
    whole.cache.reserve(len(embeds))
    gate = engine._gate()
    assert gate is not None
    assert state.columns is not None
    assert whole.columns is not None
    passage = gate.prefill(embeds, whole.cache, whole.columns, Deadline(None))
    logits, _ = engine._decoder().prefill(passage.states(), whole.cache, Deadline(None))
    assert logits is not None
    np.testing.assert_allclose(stepped, logits[0, 0], atol=1e-4)
    # Of the last one read the columns are those of slot T, which nobody sees.
    assert state.columns.length == whole.columns.length == 45
    np.testing.assert_allclose(state.columns.first(44), whole.columns.first(44), atol=1e-5)


@pytest.mark.parametrize("count", [250, STEP - 2, STEP - 1, STEP, 500])
def test_caches_that_grow_keep_what_they_hold(folders: tuple[Path, Path], count: int) -> None:
    engine = engine_of(folders[1])
    answers = []
    for reserved in (0, CONTEXT):
        state = engine.new_state()
        state.cache.reserve(reserved)
        answers.append(answer(engine, state, prompt(count, seed=6), 20))
        assert state.cache.capacity % STEP == 0 or state.cache.capacity == CONTEXT
        assert state.cache.capacity >= count + 21
    assert answers[0][1] == answers[1][1]
    same(answers[0][0], answers[1][0])


def test_the_context_may_be_filled_to_its_last_place(folders: tuple[Path, Path]) -> None:
    ids = prompt(CONTEXT - 6, seed=8)
    answers = []
    for folder in folders:
        engine = engine_of(folder)
        state = engine.new_state()
        answers.append(answer(engine, state, ids, 5)[1])
        assert state.cache.length == state.cache.capacity == CONTEXT
        with pytest.raises(PromptError, match=str(CONTEXT)):
            engine.stepper(state)(9)
    assert answers[0] == answers[1]


def test_nothing_is_read_of_places_that_were_left(folders: tuple[Path, Path]) -> None:
    engine, ids = engine_of(folders[1]), prompt(30)
    clean, spoilt = engine.new_state(), engine.new_state()
    expected = answer(engine, clean, ids, 8)
    spoilt.cache.reserve(STEP)
    for buffer in spoilt.cache._buffers:
        buffer.write(np.full_like(buffer.numpy(), np.nan))
    assert answer(engine, spoilt, ids, 8) == expected


# --- conversations -----------------------------------------------------------


def said(chats: list[Chat], text: str, tokens: int = 8) -> None:
    """Sends a turn to both and compares what comes back."""
    expected, found = (chat.send(text, max_tokens=tokens) for chat in chats)
    assert found.verdict.decision is expected.verdict.decision
    same(found.verdict.p_unsafe, expected.verdict.p_unsafe)
    assert (found.text, found.usage) == (expected.text, expected.usage)


def test_a_conversation_is_that_of_the_cpus_bundle(folders: tuple[Path, Path]) -> None:
    chats = [load(folder, NEVER_EARLY).chat("Be brief.") for folder in folders]
    for text in TEXTS * 3:
        said(chats, text, 12)
    # It has outgrown its first places on the way.
    for chat in chats:
        assert chat._state.cache.capacity > STEP


def test_what_was_refused_is_seen_and_what_follows_is_answered(
    folders: tuple[Path, Path],
) -> None:
    chats = [load(folder, NEVER_EARLY).chat() for folder in folders]
    refusing = [load(folder, REFUSE) for folder in folders]
    said(chats, TEXTS[0])
    for chat, other in zip(chats, refusing, strict=True):
        asked, chat._requests = chat._requests, other.chat()._requests
        assert chat.send(TEXTS[1]).verdict.decision is Decision.REFUSE
        chat._requests = asked
    said(chats, TEXTS[2])


def test_a_refused_turn_counts_in_the_next_verdict(folders: tuple[Path, Path]) -> None:
    model = load(folders[1], NEVER_EARLY)
    alone = model.chat().send(TEXTS[1], max_tokens=1).verdict.p_unsafe
    chat = load(folders[1], REFUSE).chat()
    assert chat.send(TEXTS[0]).verdict.decision is Decision.REFUSE
    chat._requests = model.chat()._requests
    assert abs(chat.send(TEXTS[1], max_tokens=1).verdict.p_unsafe - alone) > 1e-4


@pytest.mark.parametrize("turns", [0, 1, 2])
def test_a_saved_conversation_goes_on(
    folders: tuple[Path, Path], tmp_path: Path, turns: int
) -> None:
    model = load(folders[1], NEVER_EARLY)
    chat = model.chat("Be brief.")
    for text in TEXTS[:turns]:
        chat.send(text, max_tokens=5)
    chat.save(tmp_path / "talk")
    again = load(folders[1], NEVER_EARLY).load_chat(tmp_path / "talk")
    for text in TEXTS[2:4]:
        said([chat, again], text, 9)


def test_a_conversation_of_the_other_flavour_is_not_taken(
    bundle_folder: Path, whole_folder: Path, tmp_path: Path
) -> None:
    from edge_safe.errors import BundleError

    load(bundle_folder, ALLOW).chat().save(tmp_path / "talk")
    with pytest.raises(BundleError, match="another bundle"):
        load(whole_folder, ALLOW).load_chat(tmp_path / "talk")


# --- the early exit ----------------------------------------------------------


def test_layers_above_the_exit_do_not_run(whole_early_folder: Path) -> None:
    bundle = open_bundle(whole_early_folder, provider="cpu", threads=1)
    engine = Engine(bundle)
    state = engine.new_state()
    judged = engine.judge(engine.embed(prompt(5)), state, END_EARLY, Deadline(None))
    assert (judged.verdict.decision, judged.verdict.layer) == (Decision.REFUSE, EARLY_LAYER)
    counts = bundle.run_counts()
    assert (counts["gate"], counts["gate_late"], counts["decoder"]) == (1, 0, 0)
    keys = [state.cache.copy(range(k, k + 1), 6)[0] for k in range(4)]
    assert [bool(key.any()) for key in keys] == [True, False, False, False]


def test_only_the_last_chunk_of_a_prompt_may_end_early(whole_early_folder: Path) -> None:
    bundle = open_bundle(whole_early_folder, provider="cpu", threads=1)
    engine = Engine(bundle)
    judged = engine.judge(engine.embed(prompt(600)), engine.new_state(), END_EARLY, Deadline(None))
    assert judged.ended_early
    counts = bundle.run_counts()
    assert (counts["gate"], counts["gate_late"], counts["decoder"]) == (2, 1, 0)


def test_both_flavours_end_early_at_the_same_verdict(
    early_folder: Path, whole_early_folder: Path
) -> None:
    for policy in (END_EARLY, Policy(thresholds={"gate": 0.5})):
        expected, found = (load(f, policy) for f in (early_folder, whole_early_folder))
        for text in [*TEXTS, " ".join(TEXTS * 4)]:
            one, other = expected.assess(text), found.assess(text)
            assert (other.decision, other.layer) == (one.decision, one.layer)
            same(other.p_unsafe, one.p_unsafe)


def test_what_ended_early_is_settled_before_the_next_turn(
    early_folder: Path, whole_early_folder: Path
) -> None:
    first, second = prompt(9), prompt(7, seed=1)
    verdicts = []
    for folder in (early_folder, whole_early_folder):
        engine = engine_of(folder)
        state = engine.new_state()
        judged = engine.judge(engine.embed(first), state, END_EARLY, Deadline(None))
        assert judged.ended_early
        assert state.owed is not None
        assert state.lengths() == (0, 0)
        engine.settle(state, Deadline(None))
        assert state.owed is None
        assert state.lengths() == (0, len(first))
        verdicts.append(answer(engine, state, second, 6))
    same(verdicts[1][0], verdicts[0][0])
    assert verdicts[1][1] == verdicts[0][1]
    fresh = engine_of(whole_early_folder)
    assert abs(answer(fresh, fresh.new_state(), second, 1)[0] - verdicts[1][0]) > 1e-4


def test_what_stands_at_slot_t_moves_no_verdict(whole_early_folder: Path) -> None:
    engine = engine_of(whole_early_folder)
    gate = engine._gate()
    assert gate is not None
    found = []
    for last in (3, 300):
        state = engine.new_state()
        state.cache.reserve(6)
        assert state.columns is not None
        embeds = engine.embed([7, 8, 9, 10, 11, last])
        passage = gate.prefill(embeds, state.cache, state.columns, Deadline(None))
        found.append((passage.early, passage.logits))
    for one, two in zip(*found, strict=True):
        np.testing.assert_allclose(one, two, atol=1e-6)


# --- many requests -----------------------------------------------------------


@pytest.mark.parametrize("policy", [NEVER_EARLY, END_EARLY], ids=["gate", "early"])
def test_many_at_once_get_the_verdicts_of_one_by_one(
    folders: tuple[Path, Path], policy: Policy
) -> None:
    texts = [text * times for text in TEXTS for times in (1, 3)]
    expected, model = (load(folder, policy) for folder in folders)
    before = model.run_counts()["gate"]
    found = [f.verdict for f in model.assess_many([AssessRequest(t) for t in texts], workers=1)]
    assert model.run_counts()["gate"] - before < len(texts)
    for text, many in zip(texts, found, strict=True):
        for one in (model.assess(text), expected.assess(text)):
            assert (many.decision, many.layer) == (one.decision, one.layer)
            same(many.p_unsafe, one.p_unsafe)


def test_in_one_run_some_may_end_early_and_others_not(
    early_folder: Path, whole_early_folder: Path
) -> None:
    ends = sorted(load(whole_early_folder, END_EARLY).assess(text).p_unsafe for text in TEXTS)
    half = Policy(thresholds={"gate": 1.0}, early_threshold=(ends[1] + ends[2]) / 2)
    expected, model = (load(folder, half) for folder in (early_folder, whole_early_folder))
    found = [f.verdict for f in model.assess_many([AssessRequest(t) for t in TEXTS], workers=1)]
    assert {verdict.layer for verdict in found} == {EARLY_LAYER, EXIT_LAYER}
    for text, many in zip(TEXTS, found, strict=True):
        one = expected.assess(text)
        assert (many.decision, many.layer) == (one.decision, one.layer)
        same(many.p_unsafe, one.p_unsafe)


# --- shared beginnings -------------------------------------------------------


SYSTEM = "You are the voice of a small ferry and know the timetable by heart."


@pytest.mark.parametrize("stages", [("gate",), ("gate", "final")])
def test_beginnings_that_are_kept_change_nothing(
    folders: tuple[Path, Path], stages: tuple[str, ...]
) -> None:
    policy = allow_all(stages=stages, early_threshold=1.0)
    plain, keeping = load(folders[0], policy), load(folders[1], policy, 8)
    for text in TEXTS:
        expected, found = (
            model.generate(text, system=SYSTEM, max_tokens=10) for model in (plain, keeping)
        )
        assert found.text == expected.text
        same(found.verdict.p_unsafe, expected.verdict.p_unsafe)
    kept = keeping.engine._prefixes._kept
    assert kept
    for prefix in kept:
        for array in (*prefix.caches, prefix.columns):
            assert array is not None
            array[:] = np.nan
    # It was read indeed: spoilt, it spoils the verdict.
    assert keeping.assess("And tomorrow?", system=SYSTEM).decision is Decision.ERROR


# --- caches in float16 -------------------------------------------------------


def test_caches_in_float16_stay_near(bundle_folder: Path, half_folder: Path) -> None:
    engine = engine_of(half_folder)
    state = engine.new_state()
    state.cache.reserve(1)
    assert {buffer.numpy().dtype for buffer in state.cache._buffers} == {np.dtype(np.float16)}
    assert state.cache.nothing(7).shape == (1, 2, 7, HEAD_DIM)
    exact, near = (load(folder, ALLOW) for folder in (bundle_folder, half_folder))
    for text in TEXTS:
        one = exact.assess(text).p_unsafe
        assert near.assess(text).p_unsafe == pytest.approx(one, abs=0.01)
        assert near.assess(text).p_unsafe != one


def test_many_at_once_with_caches_in_float16(half_folder: Path) -> None:
    model = load(half_folder, ALLOW)
    found = [f.verdict for f in model.assess_many([AssessRequest(t) for t in TEXTS], workers=1)]
    for text, many in zip(TEXTS, found, strict=True):
        assert many.p_unsafe == pytest.approx(model.assess(text).p_unsafe, abs=1e-3)


def test_a_conversation_with_caches_in_float16_is_saved(half_folder: Path, tmp_path: Path) -> None:
    model = load(half_folder, ALLOW)
    chat = model.chat()
    chat.send(TEXTS[0], max_tokens=5)
    chat.save(tmp_path / "talk")
    again = load(half_folder, ALLOW).load_chat(tmp_path / "talk")
    said([chat, again], TEXTS[1])
