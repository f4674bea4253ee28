"""Towers and projectors beside torch, small and random."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from transformers import WhisperConfig

from edge_safe.export.graphs.builder import GraphBuilder
from edge_safe.export.graphs.matrices import store_table
from edge_safe.export.graphs.store import WeightStore
from edge_safe.export.packing import dequantize
from edge_safe.export.quantization import PLAIN, MatrixFormat, precision_named
from edge_safe.export.rounding import quantize
from edge_safe.export.towers.efficientnet import efficientnet_graph
from edge_safe.export.towers.onnx_spec import onnx_graph
from edge_safe.export.towers.projectors import object_projector_graph, sequence_projector_graph
from edge_safe.export.towers.whisper import whisper_graph
from edge_safe.export.towers.whisper_decoder import heard_graph, whisper_decoder_graph
from edge_safe.models.onnx_graph import OnnxGraph
from edge_safe.models.pebble.efficientnet_lite import EfficientNetLite, Stage
from edge_safe.models.pebble.object_projector import ObjectProjector, ObjectProjectorConfig
from edge_safe.models.pebble.projectors import SequenceProjector, SequenceProjectorConfig
from edge_safe.models.pebble.speech_decoder import SpeechDecoder
from edge_safe.models.pebble.speech_decoder import Transcription as Settings
from edge_safe.models.pebble.speech_encoder import SpeechEncoder
from edge_safe.runtime.session import Session
from edge_safe.runtime.speech_decoder import SpeechDecoder as RuntimeDecoder
from edge_safe.runtime.speech_decoder import Transcription

Feeds = dict[str, np.ndarray]


def run(
    folder: Path, build: Callable[[WeightStore], GraphBuilder], feeds: Feeds
) -> dict[str, np.ndarray]:
    with WeightStore(folder / "tower.onnx.data") as store:
        graph = build(store)
    graph.save(folder / "tower.onnx")
    return Session(folder / "tower.onnx", threads=1).run(feeds)


def shaken(module: torch.nn.Module) -> torch.nn.Module:
    """Random numbers where a fresh module has zeros and ones."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in module.state_dict().items():
        if tensor.dim() <= 1 and tensor.is_floating_point():
            noise = torch.rand(tensor.shape, generator=generator)
            tensor.copy_(0.5 + noise if "var" in name or name == "gain" else tensor + 0.3 * noise)
    return module.eval().requires_grad_(False)


@pytest.fixture
def random() -> np.random.Generator:
    torch.manual_seed(0)
    return np.random.default_rng(0)


@pytest.mark.parametrize("side", [64, 96])
def test_object_encoder(side: int, random: np.random.Generator, tmp_path: Path) -> None:
    stages = (Stage(1, 3, 1, 1, 8), Stage(2, 3, 2, 6, 12), Stage(2, 5, 2, 6, 16))
    encoder = shaken(EfficientNetLite(8, stages, 32))
    pixels = random.standard_normal((1, 3, side, side)).astype(np.float32)
    expected = encoder(torch.tensor(pixels)).numpy()
    found = run(
        tmp_path,
        lambda store: efficientnet_graph(encoder, store, side, expected.shape[1]),
        {"pixel_values": pixels},
    )
    np.testing.assert_allclose(found["vision_states"], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("form", "allowed"), [(PLAIN, 1e-4), (MatrixFormat(8), 0.1)], ids=str)
@pytest.mark.parametrize("frames", [100, 36])
def test_speech_encoder(
    form: MatrixFormat, allowed: float, frames: int, random: np.random.Generator, tmp_path: Path
) -> None:
    encoder = shaken(
        SpeechEncoder(
            WhisperConfig(
                d_model=64,
                encoder_layers=2,
                encoder_attention_heads=4,
                encoder_ffn_dim=96,
                num_mel_bins=20,
                max_source_positions=50,
            )
        )
    )
    features = random.standard_normal((1, 20, frames)).astype(np.float32)
    expected = encoder(torch.tensor(features)).last_hidden_state.numpy()
    found = run(
        tmp_path,
        lambda store: whisper_graph(encoder, store, form)[0],
        {"input_features": features},
    )
    np.testing.assert_allclose(found["audio_states"], expected, atol=allowed)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_speech_decoder(precision: str, random: np.random.Generator, tmp_path: Path) -> None:
    """The runtime writes down what torch does, and each graph gives torch's numbers."""
    row = precision_named(precision)
    allowed = 1e-3 if precision == "fp32" else 0.15
    words = 60
    decoder = shaken(
        SpeechDecoder(
            WhisperConfig(
                vocab_size=words + 4,
                d_model=64,
                decoder_layers=2,
                decoder_attention_heads=4,
                decoder_ffn_dim=96,
                max_target_positions=50,
            )
        )
    )
    with torch.no_grad():
        for weight in decoder.parameters():
            if weight.dim() == 2:
                weight.normal_(0, 0.3)
    sessions = []
    for name, build in (
        ("audio_projector", lambda store: heard_graph(decoder, store, row.towers)[0]),
        ("audio_decoder", lambda store: whisper_decoder_graph(decoder, store, row)[0]),
    ):
        with WeightStore(tmp_path / f"{name}.onnx.data") as store:
            graph = build(store)
        graph.save(tmp_path / f"{name}.onnx")
        sessions.append(Session(tmp_path / f"{name}.onnx", threads=1))
    states = random.standard_normal((1, 40, 64)).astype(np.float32)
    heard = sessions[0].run({"audio_states": states})
    expected = decoder.listen(torch.tensor(states))
    for index, pair in enumerate(expected):
        for part, wanted in zip(("key", "value"), pair, strict=True):
            np.testing.assert_allclose(heard[f"heard.{index}.{part}"], wanted, atol=allowed)
    past = {n.replace("heard", "past_key_values"): v[:, :, :0] for n, v in heard.items()}
    before = None
    for ids in ([words + 1, words + 3], [5], [9]):
        found = sessions[1].run({"input_ids": np.array([ids]), **heard, **past})
        logits, before = decoder(torch.tensor([ids]), expected, before)
        spread = float(logits.std())
        np.testing.assert_allclose(found.pop("logits"), logits, atol=allowed * spread)
        past = {n.replace("present", "past_key_values"): v for n, v in found.items()}
    settings = Settings((words + 1, words + 3), end_id=words, no_speech_id=words + 2)
    written = decoder.write_down(torch.tensor(states), 0.8, settings)
    ear = Transcription(**dataclasses.asdict(settings), max_positions=50, tokenizer="")
    told = RuntimeDecoder(*sessions, ear).write_down(states, 0.8, None)
    assert written
    if precision == "fp32":
        assert told == written


def projector(pieces: int = 0) -> SequenceProjector:
    module = SequenceProjector(
        SequenceProjectorConfig(
            state_size=24,
            hidden_size=64,
            width=32,
            layers=2,
            heads=4,
            kernel=5,
            window=6,
            candidates=4,
            pieces=pieces,
        )
    )
    if pieces:
        module.piece_ids.copy_(torch.randperm(200)[:pieces])
    for block in module.blocks:
        torch.nn.init.normal_(block.attention.offset_bias)
    shaken(module)
    # About half of the steps emit a piece.
    module.emission.weight.mul_(10.0)
    return module


def project(
    folder: Path, module: SequenceProjector, embedding: np.ndarray, form: MatrixFormat, feeds: Feeds
) -> dict[str, np.ndarray]:
    with WeightStore(folder / "weights.onnx.data") as shared:
        table = store_table(shared, embedding, form)

    def build(store: WeightStore) -> GraphBuilder:
        return sequence_projector_graph(
            "text_projector", module, store, table, "text_states", "image_features"
        )[0]

    return run(folder, build, feeds)


@pytest.mark.parametrize("pieces", [0, 30])
@pytest.mark.parametrize("form", [PLAIN, MatrixFormat(8, accuracy_level=0)], ids=str)
def test_sequence_projector(
    form: MatrixFormat, pieces: int, random: np.random.Generator, tmp_path: Path
) -> None:
    module = projector(pieces)
    states = random.standard_normal((3, 120, 24)).astype(np.float32)
    lengths = np.array([120, 57, 1])
    embedding = random.standard_normal((200, 64)).astype(np.float32)
    used = embedding if form is PLAIN else dequantize(quantize(embedding, form), form, 64)
    features, line, ids = module.read(
        torch.tensor(states), torch.tensor(lengths), torch.tensor(used)
    )
    found = project(tmp_path, module, embedding, form, {"text_states": states, "lengths": lengths})
    assert len(line) > 3
    np.testing.assert_array_equal(found["line_index"], line.numpy())
    if pieces:
        np.testing.assert_array_equal(found["image_features"], ids.numpy())
    else:
        np.testing.assert_allclose(found["image_features"], features.numpy(), atol=1e-4)


@pytest.mark.parametrize("form", [PLAIN, MatrixFormat(8)], ids=str)
def test_nothing_emitted_gives_no_embeddings(
    form: MatrixFormat, random: np.random.Generator, tmp_path: Path
) -> None:
    module = projector()
    module.emission.bias.fill_(-1e4)
    states = random.standard_normal((2, 9, 24)).astype(np.float32)
    embedding = random.standard_normal((200, 64)).astype(np.float32)
    feeds = {"text_states": states, "lengths": np.array([9, 4])}
    found = project(tmp_path, module, embedding, form, feeds)
    assert found["image_features"].shape == (0, 64)
    assert found["line_index"].shape == (0,)


def test_padding_does_not_reach_real_steps(random: np.random.Generator, tmp_path: Path) -> None:
    module = projector()
    states = random.standard_normal((1, 12, 24)).astype(np.float32)
    embedding = random.standard_normal((200, 64)).astype(np.float32)
    padded = np.concatenate([states, np.full((1, 20, 24), 1e3, np.float32)], axis=1)
    found = [
        project(tmp_path, module, embedding, PLAIN, {"text_states": s, "lengths": np.array([12])})
        for s in (states, padded)
    ]
    np.testing.assert_allclose(found[0]["image_features"], found[1]["image_features"], atol=1e-5)


def test_object_projector(random: np.random.Generator, tmp_path: Path) -> None:
    module = shaken(ObjectProjector(ObjectProjectorConfig(24, 64, 16, inner=12, slots=6)))
    module.emission.weight.mul_(20.0)
    embedding = random.standard_normal((200, 64)).astype(np.float32)
    with WeightStore(tmp_path / "weights.onnx.data") as shared:
        table = store_table(shared, embedding, PLAIN)

    def build(store: WeightStore) -> GraphBuilder:
        return object_projector_graph("vision_projector", module, store, table, 9)[0]

    lengths = set()
    for gain in (0.5, 5.0, 20.0, 50.0, 100.0):
        states = random.standard_normal((1, 9, 24)).astype(np.float32) * np.float32(gain)
        expected, _, _ = module.project(torch.tensor(states), torch.tensor(embedding))
        found = run(tmp_path, build, {"vision_states": states})
        np.testing.assert_allclose(found["image_features"], expected.numpy(), atol=1e-5)
        lengths.add(len(expected))
    assert len(lengths) > 1


def small_onnx(path: Path, random: np.random.Generator) -> None:
    """A graph as the OCR models have them: old operators, a cut behind their states."""

    def weight(name: str, *shape: int) -> TensorProto:
        array = (random.standard_normal(shape) / 3).astype(np.float32)
        return numpy_helper.from_array(array, name)

    def numbers(name: str, values: list[float], kind: type = np.int64) -> TensorProto:
        return numpy_helper.from_array(np.array(values, kind), name)

    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        helper.make_node("HardSigmoid", ["c"], ["h"], alpha=0.2, beta=0.5),
        helper.make_node(
            "Resize",
            ["h", "roi", "scales"],
            ["r"],
            mode="nearest",
            coordinate_transformation_mode="asymmetric",
            nearest_mode="floor",
        ),
        helper.make_node("ReduceMean", ["r"], ["m"], axes=[2], keepdims=1),
        helper.make_node("Squeeze", ["m"], ["s"], axes=[2]),
        helper.make_node("Transpose", ["s"], ["states"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["states", "head"], ["characters"]),
    ]
    graph = helper.make_graph(
        nodes,
        "ocr",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 8, "w"])],
        [helper.make_tensor_value_info("characters", TensorProto.FLOAT, None)],
        [
            weight("w", 6, 3, 3, 3),
            weight("head", 6, 50),
            numbers("roi", [], np.float32),
            numbers("scales", [1, 1, 2, 2], np.float32),
        ],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)]), path)


def test_onnx_tower_is_cut_and_renamed(random: np.random.Generator, tmp_path: Path) -> None:
    small_onnx(tmp_path / "ocr.onnx", random)
    module = OnnxGraph.from_file(tmp_path / "ocr.onnx", "states")
    pixels = random.standard_normal((2, 3, 8, 20)).astype(np.float32)
    found = run(
        tmp_path,
        lambda store: onnx_graph(
            "text_recognizer",
            module,
            store,
            ("pixel_values", ["lines", 3, 8, "width"]),
            ("text_states", ["lines", "steps", 6]),
        ),
        {"pixel_values": pixels},
    )
    expected = module(torch.tensor(pixels)).numpy()
    np.testing.assert_allclose(found["text_states"], expected, atol=1e-5)
    emitted = onnx.load(tmp_path / "tower.onnx", load_external_data=False).graph
    assert "head" not in {name for node in emitted.node for name in node.input}
