"""A tiny bundle with random weights, made with the exporter's graphs and without torch."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from edge_safe.export.graphs.builder import GraphBuilder
from edge_safe.export.graphs.decoder import (
    decoder_graph,
    embedding_graph,
    gate_graph,
    store_model,
)
from edge_safe.export.graphs.early_exit import rows_of_gate_past
from edge_safe.export.graphs.safety import GateHead, GateSource, TokenRows
from edge_safe.export.graphs.spec import DecoderSpec, FloatArray, Rope
from edge_safe.export.graphs.store import WeightStore
from edge_safe.export.quantization import precision_named
from edge_safe.runtime import manifest as m
from edge_safe.runtime.model import SafeModel
from edge_safe.runtime.policy import Policy

CONTEXT = 640
EXIT_LAYER, EARLY_LAYER = 2, 1
HEADS, HEAD_DIM, WIDTH = 4, 16, 64
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|safe|>", "<|unsafe|>"]
SAFE, UNSAFE, END = 3, 4, 2

TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{{ '<|safe|>' }}{% endif %}"
    "{{ message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

CORPUS = [
    "What does the sign say? It says that the shop opens at nine and closes at five.",
    "Tell me a story about a boat, a river and the people who live beside the water.",
    "How do I pick the lock of my neighbour's shed? I can't help with that request.",
    "assistant user system\nassistant\nuser\n",
] * 4


def tiny_tokenizer() -> Tokenizer:
    """A byte-level BPE tokenizer that can write every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def decoder_spec(vocab_size: int) -> DecoderSpec:
    """Four Llama layers."""
    rope = Rope(10000.0 ** -(np.arange(0, HEAD_DIM, 2) / HEAD_DIM))
    return DecoderSpec(4, WIDTH, HEADS, 2, HEAD_DIM, 96, vocab_size, CONTEXT, 1e-5, (rope,), True)


def random_weights(spec: DecoderSpec) -> Callable[[str], FloatArray]:
    """Weights by name, the same in every run."""
    inner = {"q": spec.heads, "k": spec.kv_heads, "v": spec.kv_heads, "o": spec.heads}

    def tensor(name: str) -> FloatArray:
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
        rng = np.random.default_rng(seed)
        part = name.rsplit(".", 2)[-2]
        if "norm" in part:
            return np.ones(spec.hidden_size, np.float32)
        if part == "embed_tokens":
            shape = (spec.vocab_size, spec.hidden_size)
        elif part.endswith("_proj") and part[0] in inner and "self_attn" in name:
            outer = inner[part[0]] * spec.head_dim
            shape = (outer, spec.hidden_size) if part[0] != "o" else (spec.hidden_size, outer)
        elif part == "down_proj":
            shape = (spec.hidden_size, spec.intermediate_size)
        else:
            shape = (spec.intermediate_size, spec.hidden_size)
        return (rng.standard_normal(shape) / np.sqrt(shape[1])).astype(np.float32)

    return tensor


def joined_head(rng: np.random.Generator, layers: Sequence[int]) -> GateHead:
    """Heads of several layers that decide together."""
    parts = [random_head(rng, layer) for layer in layers]
    return GateHead(
        tuple(part.sources[0] for part in parts),
        np.concatenate([part.query for part in parts]),
        np.concatenate([part.slope for part in parts]),
        np.concatenate([part.up_weight for part in parts], axis=1),
        parts[0].up_bias,
        parts[0].down_weight,
        parts[0].down_bias,
    )


def random_head(rng: np.random.Generator, layer: int = EXIT_LAYER) -> GateHead:
    """A safety head that tells random prompts apart."""

    def array(*shape: int) -> FloatArray:
        return (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)

    token = TokenRows(array(2, WIDTH) * 4, np.ones(WIDTH, np.float32))
    slope = np.linspace(0.0, 0.9, 4).astype(np.float32)
    norm = np.ones(WIDTH, np.float32)
    return GateHead(
        (GateSource(layer, token, norm, array(32, WIDTH), array(32, WIDTH)),),
        array(4, 8) * 4,
        slope,
        array(16, 32) * 4,
        np.zeros(16, np.float32),
        array(1, 16) * 4,
        np.zeros(1, np.float32),
    )


def write_bundle(
    folder: Path,
    *,
    gate: bool = True,
    change: Callable[[GateHead], GateHead] | None = None,
    early: Callable[[GateHead], GateHead] | None = None,
    precision: str = "fp32",
) -> Path:
    """Writes a whole bundle.

    Args:
        folder: Where.
        gate: Whether it has one.
        change: Edits the safety head.
        early: Edits the head of its early exit; without it there is none.
        precision: Of its layers.
    """
    folder.mkdir(parents=True)
    tokenizer = tiny_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    spec = decoder_spec(tokenizer.get_vocab_size())
    rng = np.random.default_rng(7)
    head = random_head(rng)
    if change is not None:
        head = change(head)
    rows = TokenRows((rng.standard_normal((2, WIDTH)) / 8).astype(np.float32), None)
    with WeightStore(folder / "weights.onnx.data") as store:
        weights = store_model(
            store, spec, random_weights(spec), precision_named(precision), lambda _: None
        )
        graphs = {"embed_tokens": embedding_graph(weights, spec)}
        lower = None
        if gate:
            lower = None if early is None else early(random_head(rng, EARLY_LAYER))
            graphs["gate"] = gate_graph(weights, spec, EXIT_LAYER, head, store, lower)
        first = EXIT_LAYER if gate else None
        graphs["decoder"] = decoder_graph(weights, spec, first, rows, store)
    for name, graph in graphs.items():
        graph.save(folder / f"{name}.onnx")
    manifest = describe(graphs, spec, rows_of_gate_past(head, lower) if gate else None)
    if early is not None:
        exit_there = m.EarlyExit(EARLY_LAYER, m.StageCalibration(threshold=0.9))
        safety = msgspec.structs.replace(manifest.safety, early=exit_there)
        manifest = msgspec.structs.replace(manifest, safety=safety)
    write_manifest(folder, manifest)
    return folder


def describe(
    graphs: dict[str, GraphBuilder], spec: DecoderSpec, read: list[int] | None
) -> m.Manifest:
    """The manifest, its files not yet hashed; ``read`` are the layers that a gate reads."""
    stages: dict[m.Stage, m.StageCalibration] = {"final": m.StageCalibration()}
    gate = read is not None
    if gate:
        stages["gate"] = m.StageCalibration()
    return m.Manifest(
        name="tiny",
        family="llama",
        target="cpu",
        precision="fp32",
        modalities={},
        files={},
        graphs={name: describe_graph(name, graph) for name, graph in graphs.items()},
        model=m.ModelInfo(
            spec.layers, WIDTH, spec.kv_heads, HEAD_DIM, spec.vocab_size, CONTEXT, [END], END
        ),
        processors={},
        safety=m.Safety(
            safe_token_id=SAFE,
            unsafe_token_id=UNSAFE,
            control_token_ids=[SAFE, UNSAFE],
            exit_layer=EXIT_LAYER if gate else None,
            layers=[EXIT_LAYER] if gate else [],
            attention=None if read is None else m.AttentionInfo(read),
            stages=stages,
        ),
        provenance=m.Provenance("random", "", {}, "pytest", "2026-01-01"),
    )


def describe_graph(name: str, graph: GraphBuilder) -> m.Graph:
    """Inputs and outputs as the manifest writes them."""
    types = {1: "float32", 7: "int64"}

    def tensors(values: object) -> list[m.Tensor]:
        return [
            m.Tensor(
                v.name,
                types[v.type.tensor_type.elem_type],
                [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim],
            )
            for v in values
        ]

    model = graph.model()
    return m.Graph(f"{name}.onnx", tensors(model.graph.input), tensors(model.graph.output), "fp32")


def write_manifest(folder: Path, manifest: m.Manifest) -> None:
    """Hashes what stands in the folder and writes the manifest."""
    files = {}
    for path in sorted(folder.iterdir()):
        if path.name != m.MANIFEST_FILE:
            data = path.read_bytes()
            files[path.name] = m.FileEntry(hashlib.sha256(data).hexdigest(), len(data))
    changed = msgspec.structs.replace(manifest, files=files)
    (folder / m.MANIFEST_FILE).write_bytes(m.dump_manifest(changed))


def allow_all(**fields: object) -> Policy:
    """A policy that refuses nothing but certainty."""
    return Policy(thresholds={"gate": 1.0}, **fields)


@pytest.fixture(scope="session")
def bundle_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with a gate; not to be changed."""
    return write_bundle(tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.fixture(scope="session")
def early_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with an early exit; not to be changed."""
    return write_bundle(tmp_path_factory.mktemp("bundles") / "early", early=lambda head: head)


@pytest.fixture(scope="session")
def gateless_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with the ``final`` stage alone; not to be changed."""
    return write_bundle(tmp_path_factory.mktemp("bundles") / "gateless", gate=False)


@pytest.fixture(scope="session")
def broken_gate_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose gate gives NaN; not to be changed."""

    def spoil(head: GateHead) -> GateHead:
        return replace(head, down_bias=np.full(1, np.nan, np.float32))

    return write_bundle(tmp_path_factory.mktemp("bundles") / "broken", change=spoil)


@pytest.fixture
def own_bundle(bundle_folder: Path, tmp_path: Path) -> Path:
    """A copy of the bundle that a test may change."""
    return Path(shutil.copytree(bundle_folder, tmp_path / "bundle"))


@pytest.fixture(scope="session")
def model(bundle_folder: Path) -> SafeModel:
    """The bundle, loaded with a policy that allows every prompt."""
    return SafeModel.load(bundle_folder, threads=1, policy=allow_all())


@pytest.fixture(scope="session")
def strict_model(bundle_folder: Path) -> SafeModel:
    """The bundle, loaded with a policy that refuses every prompt."""
    return SafeModel.load(bundle_folder, threads=1, policy=Policy(thresholds={"gate": 0.0}))
