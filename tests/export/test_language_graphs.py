"""Gate and decoder graphs beside torch on a tiny checkpoint of each family."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from edge_safe.export import export_bundle
from edge_safe.export.families.base import find_family
from edge_safe.export.graphs.store import WeightStore
from edge_safe.export.language_graphs import Cache, LanguageGraphs
from edge_safe.models.safety_file import read_safety
from edge_safe.models.safety_head import SafetyModule
from tests.export.conftest import FamilyFiles
from tests.export.families import EXIT_LAYER, FAMILIES

SAFE_ID = 3


@pytest.fixture(scope="module", params=["llama", *FAMILIES])
def files(
    request: pytest.FixtureRequest, family_files: Callable[[str], FamilyFiles]
) -> FamilyFiles:
    return family_files(request.param)


@pytest.fixture(scope="module")
def model(files: FamilyFiles) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(files.checkpoint).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def safety(files: FamilyFiles) -> SafetyModule:
    return read_safety(files.checkpoint)[1]


@pytest.fixture(scope="module")
def graphs(files: FamilyFiles) -> LanguageGraphs:
    return open_graphs(files.checkpoint, files.bundle)


def open_graphs(checkpoint: Path, bundle: Path) -> LanguageGraphs:
    _, open_checkpoint = find_family(checkpoint)
    return LanguageGraphs(bundle, open_checkpoint(checkpoint).spec, EXIT_LAYER, [EXIT_LAYER])


def prompt(length: int, seed: int = 0) -> np.ndarray:
    """(1, length) ids that end in the safe token."""
    ids = np.random.default_rng(seed).integers(5, 300, (1, length))
    ids[0, -1] = SAFE_ID
    return ids


def expect(
    model: torch.nn.Module, safety: SafetyModule, ids: np.ndarray, mask: np.ndarray | None = None
) -> SimpleNamespace:
    """What torch says of prompts whose last real position is slot T."""
    mask = np.ones_like(ids) if mask is None else mask
    output = model(
        input_ids=torch.tensor(ids),
        attention_mask=torch.tensor(mask),
        output_hidden_states=True,
        use_cache=True,
        # Without this a layer with a window keeps the keys in its window alone.
        past_key_values=DynamicCache(),
    )
    last = mask.sum(1) - 1
    seen = torch.tensor(np.arange(ids.shape[1])[None] < last[:, None])
    states = output.hidden_states
    return SimpleNamespace(
        gate=safety.head(EXIT_LAYER)(states[EXIT_LAYER], seen).verdict_logits.numpy(),
        final=safety.read_final(states[-1], seen).verdict_logits.numpy(),
        logits=output.logits.numpy()[np.arange(len(ids)), last],
        hidden=states[EXIT_LAYER].numpy(),
        keys=[layer.keys.numpy() for layer in output.past_key_values.layers],
    )


def ones(ids: np.ndarray) -> np.ndarray:
    return np.ones(ids.shape, np.int64)


def close(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-5)


def test_prompt_in_one_run(
    graphs: LanguageGraphs, model: torch.nn.Module, safety: SafetyModule
) -> None:
    ids = prompt(23)
    found = graphs.run(graphs.embed(ids), ones(ids), graphs.empty(1))
    expected = expect(model, safety, ids)
    close(found.gate_verdict, expected.gate)
    close(found.final_verdict, expected.final)
    close(found.logits, expected.logits)
    close(found.hidden_states, expected.hidden)
    for layer, keys in zip(found.cache.layers, expected.keys, strict=True):
        close(layer[0], keys)


def test_prompt_in_three_chunks(
    graphs: LanguageGraphs, model: torch.nn.Module, safety: SafetyModule
) -> None:
    ids = prompt(31)
    embeds, mask, cache = graphs.embed(ids), ones(ids), graphs.empty(1)
    for start, end in ((0, 9), (9, 10), (10, 31)):
        found = graphs.run(embeds[:, start:end], mask[:, :end], cache)
        cache = found.cache
    expected = expect(model, safety, ids)
    close(found.gate_verdict, expected.gate)
    close(found.final_verdict, expected.final)
    close(found.logits, expected.logits)


def test_windows_hold_where_the_kernel_sees_one_position_more(
    family_files: Callable[[str], FamilyFiles], tmp_path: Path
) -> None:
    """Version 1.23 of onnxruntime leaves the position itself out of the count, 1.31 does not."""
    files = family_files("mistral")
    other = Path(shutil.copytree(files.bundle, tmp_path / "bundle"))
    for name in ("gate.onnx", "decoder.onnx"):
        graph = onnx.load(files.bundle / name, load_external_data=False)
        sizes = [a for n in graph.graph.node for a in n.attribute if a.name == "local_window_size"]
        assert len(sizes) == 2
        for attribute in sizes:
            attribute.i += 1
        (other / name).write_bytes(graph.SerializeToString())
    ids = np.concatenate([prompt(20), prompt(20, seed=1)])
    mask = ones(ids)
    mask[1, 13:] = 0
    longer = np.zeros((2, 21), np.int64)
    longer[0], longer[1, :14] = 1, 1
    found = []
    for folder in (files.bundle, other):
        graphs = open_graphs(files.checkpoint, folder)
        first = graphs.run(graphs.embed(ids), mask, graphs.empty(2))
        second = graphs.run(graphs.embed(np.array([[40], [41]])), longer, first.cache)
        found += [(first.gate_verdict, first.final_verdict, first.logits, second.logits)]
    for one, two in zip(*found, strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5)


def test_padded_batch(graphs: LanguageGraphs, model: torch.nn.Module, safety: SafetyModule) -> None:
    ids = np.concatenate([prompt(20), prompt(20, seed=1)])
    mask = ones(ids)
    mask[1, 13:] = 0
    found = graphs.run(graphs.embed(ids), mask, graphs.empty(2))
    expected = expect(model, safety, ids, mask)
    close(found.gate_verdict, expected.gate)
    close(found.final_verdict, expected.final)
    close(found.logits, expected.logits)


def test_padded_batch_goes_on_decoding(graphs: LanguageGraphs, model: torch.nn.Module) -> None:
    ids = np.concatenate([prompt(20), prompt(20, seed=1)])
    mask = ones(ids)
    mask[1, 13:] = 0
    first = graphs.run(graphs.embed(ids), mask, graphs.empty(2))
    longer = np.zeros((2, 21), np.int64)
    longer[0], longer[1, :14] = 1, 1
    cache = Cache(first.cache.layers, graphs.empty(2).gate)
    found = graphs.run(graphs.embed(np.array([[40], [41]])), longer, cache)
    for row, (length, token) in enumerate(((20, 40), (13, 41))):
        whole = torch.tensor([[*ids[row, :length], token]])
        close(found.logits[row], model(whole).logits[0, -1].numpy())


def test_greedy_text_is_torch_s(graphs: LanguageGraphs, model: torch.nn.Module) -> None:
    ids = prompt(12)
    expected = list(ids[0])
    for _ in range(24):
        expected.append(int(model(torch.tensor([expected])).logits[0, -1].argmax()))
    found = graphs.run(graphs.embed(ids), ones(ids), graphs.empty(1))
    text = [int(found.logits[0].argmax())]
    for step in range(23):
        mask = np.ones((1, ids.shape[1] + step + 1), np.int64)
        cache = Cache(found.cache.layers, graphs.empty(1).gate)
        found = graphs.run(graphs.embed(np.array([[text[-1]]])), mask, cache)
        text.append(int(found.logits[0].argmax()))
    assert text == expected[12:]


def test_slot_t_cannot_change_the_verdict(graphs: LanguageGraphs) -> None:
    check_slot(graphs)


def test_slot_t_cannot_change_an_int4_verdict(
    tiny_checkpoint: Path, tiny_bundle_int4: Path
) -> None:
    check_slot(open_graphs(tiny_checkpoint, tiny_bundle_int4))


def check_slot(graphs: LanguageGraphs) -> None:
    embeds = graphs.embed(prompt(17))
    one = graphs.run(embeds, np.ones((1, 17), np.int64), graphs.empty(1))
    other = embeds.copy()
    other[:, -1] = 50.0 * embeds[:, 0][:, ::-1]
    two = graphs.run(other, np.ones((1, 17), np.int64), graphs.empty(1))
    np.testing.assert_array_equal(one.gate_verdict, two.gate_verdict)
    np.testing.assert_array_equal(one.final_verdict, two.final_verdict)
    assert not np.allclose(one.logits, two.logits)


@pytest.mark.parametrize("padding", [0.0, 1e4, np.nan])
def test_padding_cannot_change_the_verdict(graphs: LanguageGraphs, padding: float) -> None:
    embeds = graphs.embed(prompt(17))
    alone = graphs.run(embeds, np.ones((1, 17), np.int64), graphs.empty(1))
    padded = np.full((2, 40, embeds.shape[2]), padding, np.float32)
    padded[0, :17] = embeds
    padded[1, :] = graphs.embed(prompt(40, seed=3))
    mask = np.ones((2, 40), np.int64)
    mask[0, 17:] = 0
    beside = graphs.run(padded, mask, graphs.empty(2))
    np.testing.assert_allclose(beside.gate_verdict[0], alone.gate_verdict[0], atol=1e-5)
    np.testing.assert_allclose(beside.final_verdict[0], alone.final_verdict[0], atol=1e-5)


def test_gate_sees_columns_that_the_model_forgot(
    graphs: LanguageGraphs, model: torch.nn.Module, safety: SafetyModule
) -> None:
    """A refused turn is rolled back from the caches and stays in gate_past."""
    refused, asked = prompt(15), prompt(11, seed=4)
    first = graphs.run(graphs.embed(refused), ones(refused), graphs.empty(1))
    kept = first.cache.gate[:, :, :14]
    found = graphs.run(graphs.embed(asked), ones(asked), Cache(graphs.empty(1).layers, kept))
    states = [
        model(torch.tensor(ids), output_hidden_states=True).hidden_states[EXIT_LAYER]
        for ids in (refused, asked)
    ]
    joined = torch.cat([states[0][:, :14], states[1]], dim=1)
    seen = torch.ones(joined.shape[:2], dtype=torch.bool)
    seen[:, -1] = False
    expected = safety.head(EXIT_LAYER)(joined, seen).verdict_logits.numpy()
    close(found.gate_verdict, expected)
    alone = graphs.run(graphs.embed(asked), ones(asked), graphs.empty(1))
    assert np.abs(alone.gate_verdict - found.gate_verdict).max() > 1e-3


def test_a_single_position_gives_logits_and_no_verdict(graphs: LanguageGraphs) -> None:
    ids = prompt(1)
    found = graphs.run(graphs.embed(ids), ones(ids), graphs.empty(1))
    assert np.isnan(found.gate_verdict).all()
    assert np.isfinite(found.logits).all()


def test_position_ids_are_followed(
    graphs: LanguageGraphs, files: FamilyFiles, model: torch.nn.Module
) -> None:
    from edge_safe.runtime.session import Session

    ids = prompt(9)
    gate = Session(files.bundle / "gate.onnx", threads=1)
    cache = graphs.empty(1)
    feeds = {
        "inputs_embeds": graphs.embed(ids),
        "attention_mask": ones(ids),
        "position_ids": np.arange(9, dtype=np.int64)[None] + 30,
        "gate_past": cache.gate,
    }
    for index in range(EXIT_LAYER):
        for part in ("key", "value"):
            feeds[f"past_key_values.{index}.{part}"] = cache.layers[index][0]
    moved = model(
        input_ids=torch.tensor(ids),
        position_ids=torch.arange(9)[None] + 30,
        past_key_values=DynamicCache(),
    )
    close(gate.run(feeds)["present.1.key"], moved.past_key_values.layers[1].keys.numpy())


def external(graph: Path) -> dict[str, tuple[str, int, int]]:
    """Name -> file, offset and length of a graph's external weights."""
    found = {}
    for tensor in onnx.load(graph, load_external_data=False).graph.initializer:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if entries:
            place = (entries["location"], int(entries["offset"]), int(entries["length"]))
            found[tensor.name] = place
    return found


@pytest.mark.parametrize("bundle", ["tiny_bundle", "tiny_bundle_int4"])
def test_graphs_share_one_weights_file(bundle: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(bundle)
    places = {
        name: external(folder / f"{name}.onnx") for name in ("embed_tokens", "gate", "decoder")
    }
    files = {place[0] for graph in places.values() for place in graph.values()}
    assert files == {"weights.onnx.data"}
    assert places["embed_tokens"]["embed_tokens.table"] == places["decoder"]["lm_head.weight"]
    assert places["gate"]["rope.0.cosine"] == places["decoder"]["rope.0.cosine"]
    assert not any(name.startswith("layers.2") for name in places["gate"])
    assert not any(name.startswith("layers.1.") for name in places["decoder"])


@pytest.mark.parametrize("precision", ["int4-fast", "int4-rows"])
def test_a_tied_embedding_of_four_bits_is_lm_head_itself(
    precision: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "b"
    export_bundle(
        tiny_checkpoint, out, precision=precision, embedding="int4", allow_unaccepted=True
    )
    table, head = (external(out / f"{n}.onnx") for n in ("embed_tokens", "decoder"))
    assert len(table) == 3
    assert set(table.values()) <= set(head.values())


@pytest.mark.parametrize("bundle", ["tiny_bundle", "tiny_bundle_int4"])
def test_safety_weights_stay_in_float32(bundle: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(bundle)
    for graph, prefix in (("gate", "gate."), ("decoder", "final.")):
        model = onnx.load(folder / f"{graph}.onnx", load_external_data=False).graph
        types = {t.data_type for t in model.initializer if t.name.startswith(prefix)}
        assert types == {onnx.TensorProto.FLOAT}


def test_equal_tensors_are_stored_once(tmp_path: Path) -> None:
    with WeightStore(tmp_path / "w.data") as store:
        one = store.add(np.arange(64, dtype=np.float32))
        store.add(np.ones(3, np.float32))
        two = store.add(np.arange(64, dtype=np.float32))
        as_rows = store.add(np.arange(64, dtype=np.float32).reshape(8, 8))
    assert one == two
    assert as_rows != one
    assert (tmp_path / "w.data").stat().st_size < 3 * 256 + 64


def test_stored_bytes_come_back(tmp_path: Path) -> None:
    array = np.random.default_rng(0).random((70_000, 3)).astype(np.float32)
    with WeightStore(tmp_path / "w.data") as store:
        store.add(np.ones(3, np.uint8))
        stored = store.add(array)
    data = (tmp_path / "w.data").read_bytes()[stored.offset : stored.offset + stored.length]
    np.testing.assert_array_equal(np.frombuffer(data, np.float32).reshape(array.shape), array)
    assert stored.offset % 4096 == 0
