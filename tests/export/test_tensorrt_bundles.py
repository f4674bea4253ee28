"""Bundles for TensorRT beside those for the CPU: the same checkpoint, verdicts and words."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto
from transformers import LlamaForCausalLM

from edge_safe.errors import BundleError, IntegrityError, ProviderError
from edge_safe.export import export_bundle
from edge_safe.export.report import ExportReport
from edge_safe.export.tensorrt.releases import RELEASES
from edge_safe.models.safety_file import SAFETY_JSON, EarlyExit, read_safety_file
from edge_safe.models.safety_model import SafetyTokenModel
from edge_safe.runtime.bundle import open_bundle
from edge_safe.runtime.manifest import CAPACITY, Manifest, load_manifest
from edge_safe.runtime.model import SafeModel
from edge_safe.runtime.policy import Policy
from edge_safe.runtime.session import PROVIDERS
from edge_safe.runtime.verdict import Decision
from tests.export.families import EXIT_LAYER

TEXTS = [
    "What is the capital of France?",
    "How do I pick the lock of my neighbour's shed?",
    "Tell me of boats, of rivers and of the people who live beside the water.",
    "A rope.",
]
EARLY_LAYER = 1
ALLOW = Policy(thresholds={"gate": 1.0})
PRECISIONS = ("fp32", "fp16", "int8", "int4")
# How far p_unsafe may be from the CPU's fp32, by what weights are kept as.
REACH = {"fp32": 1e-4, "fp16": 0.01, "int8": 0.1, "int4": 0.1}

Bundles = Callable[[str, bool], Path]


@pytest.fixture(scope="module")
def checkpoints(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The tiny checkpoint on lattices that TensorRT's 4 bits hold; then with an early exit."""
    folder = tmp_path_factory.mktemp("checkpoints")
    plain, early = folder / "plain", folder / "early"
    shutil.copytree(tiny_checkpoint, plain)
    round_layers(plain)
    shutil.copytree(plain, early)
    file = read_safety_file(early)
    exit_there = EarlyExit(
        EARLY_LAYER, file.calibration["gate.1"], file.calibration[f"gate.{EXIT_LAYER}"]
    )
    changed = msgspec.structs.replace(file, early=exit_there)
    (early / SAFETY_JSON).write_bytes(msgspec.json.encode(changed))
    return {False: plain, True: early}


def round_layers(folder: Path) -> None:
    """Puts layers' weights on lattices of -8 .. 7, the furthest of every 64 being -8."""
    model = LlamaForCausalLM.from_pretrained(folder)
    for name, parameter in model.named_parameters():
        if "layers" in name and parameter.dim() == 2:
            weight = parameter.detach().numpy()
            blocks = weight.reshape(len(weight), -1, 64)
            places = np.abs(blocks).argmax(axis=-1, keepdims=True)
            step = np.take_along_axis(blocks, places, axis=-1) / -8
            values = np.clip(np.rint(blocks / step), -8, 7) * np.abs(step)
            parameter.data[:] = parameter.new_tensor(values).reshape(parameter.shape)
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def bundles(checkpoints: dict[bool, Path]) -> Bundles:
    """The bundle of a precision, without or with an early exit; ``cpu`` is the CPU's fp32."""

    @cache
    def bundle(precision: str, early: bool) -> Path:
        out = checkpoints[early].parent / f"{precision}-{early}"
        cpu = precision == "cpu"
        options = {"precision": "fp32"} if cpu else {"target": "tensorrt", "precision": precision}
        export_bundle(checkpoints[early], out, **options)
        return out

    return bundle


def opened(folder: Path, policy: Policy | None = None) -> SafeModel:
    return SafeModel.load(folder, provider="cpu", threads=1, policy=policy)


def report_of(folder: Path) -> ExportReport:
    return msgspec.json.decode((folder / "report.json").read_bytes(), type=ExportReport)


# --- beside the CPU's --------------------------------------------------------


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_verdicts_are_those_of_the_cpus_bundle(
    bundles: Bundles, precision: str, early: bool
) -> None:
    expected, found = (opened(bundles(name, early)) for name in ("cpu", precision))
    for text in TEXTS:
        one, other = expected.assess(text), found.assess(text)
        assert other.p_unsafe == pytest.approx(one.p_unsafe, abs=REACH[precision])
        assert (other.decision, other.stage, other.layer) == (one.decision, one.stage, one.layer)


def test_greedy_answers_are_those_of_the_cpus_bundle(bundles: Bundles) -> None:
    for early in (False, True):
        expected, found = (opened(bundles(name, early), ALLOW) for name in ("cpu", "fp32"))
        for text in TEXTS:
            assert (
                found.generate(text, max_tokens=24).text
                == expected.generate(text, max_tokens=24).text
            )


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision_answers(bundles: Bundles, precision: str) -> None:
    reply = opened(bundles(precision, False), ALLOW).generate(TEXTS[0], max_tokens=6)
    assert reply.verdict.decision is Decision.ALLOW
    assert reply.usage.completion_tokens == 6


@pytest.mark.parametrize("stage", ["gate.1", f"gate.{EXIT_LAYER}"])
def test_verdicts_at_both_exits_are_torchs(
    bundles: Bundles, checkpoints: dict[bool, Path], stage: str
) -> None:
    torch_model = SafetyTokenModel.from_pretrained(checkpoints[True])
    ends_early = stage == f"gate.{EARLY_LAYER}"
    policy = Policy(early_threshold=0.0) if ends_early else Policy(thresholds={"gate": 0.0})
    model = opened(bundles("fp32", True), policy)
    for text in TEXTS:
        ids = torch_model.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )["input_ids"]
        expected = float(torch_model.assess(input_ids=ids, stage=stage).p_unsafe[0])
        verdict = model.assess(text)
        assert verdict.p_unsafe == pytest.approx(expected, abs=1e-4)
        assert verdict.layer == (EARLY_LAYER if ends_early else EXIT_LAYER)


def test_what_is_clear_does_not_reach_the_graph_behind_the_early_exit(bundles: Bundles) -> None:
    model = opened(bundles("fp32", True), Policy(early_threshold=0.0))
    model.assess(TEXTS[0])
    counts = model.run_counts()
    assert (counts["gate"], counts["gate_late"], counts["decoder"]) == (1, 0, 0)


# --- what stands in it -------------------------------------------------------


@pytest.mark.parametrize("early", [False, True])
def test_the_manifest_says_what_runs_where(bundles: Bundles, early: bool) -> None:
    manifest = load_manifest(bundles("fp16", early))
    language = {"gate", "gate_late", "decoder"} if early else {"gate", "decoder"}
    assert (manifest.target, manifest.release, manifest.precision) == ("tensorrt", "10.3", "fp16")
    assert set(manifest.graphs) == language | {"embed_tokens"}
    assert set(manifest.engines) == language
    engines = report_of(bundles("fp16", early)).engines
    assert engines is not None
    assert engines.built == []
    assert set(engines.on_the_cpu) == {"embed_tokens"}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_release_is_the_oldest_that_reads_the_precision(
    bundles: Bundles, precision: str
) -> None:
    name = "10.16" if precision == "int4" else "10.3"
    folder = bundles(precision, False)
    manifest, engines = load_manifest(folder), report_of(folder).engines
    assert engines is not None
    assert manifest.release == engines.release == name
    assert f"--release {name}" in manifest.provenance.command


@pytest.mark.parametrize("precision", PRECISIONS)
def test_caches_have_all_their_places_and_the_type_of_products(
    bundles: Bundles, precision: str
) -> None:
    manifest = load_manifest(bundles(precision, True))
    wanted = "float32" if precision == "fp32" else "float16"
    caches = [
        tensor
        for name in manifest.engines
        for tensor in (*manifest.graphs[name].inputs, *manifest.graphs[name].outputs)
        if tensor.name.startswith(("past_key_values.", "present."))
    ]
    # Keys and values, in and out, of four layers.
    assert len(caches) == 16
    assert {(tensor.dtype, *tensor.shape[1:]) for tensor in caches} == {(wanted, 2, CAPACITY, 16)}
    assert manifest.whole_caches


@pytest.mark.parametrize("precision", PRECISIONS)
def test_engines_are_planned_for_prompts_and_for_single_tokens(
    bundles: Bundles, precision: str
) -> None:
    manifest = load_manifest(bundles(precision, True))
    for name, plan in manifest.engines.items():
        assert plan.fp16 is (precision != "fp32")
        prompts, tokens = (profile.shapes for profile in plan.profiles)
        free = {
            tensor.name
            for tensor in manifest.graphs[name].inputs
            if any(isinstance(size, str) for size in tensor.shape)
        }
        assert set(prompts) == set(tokens) == free
        assert prompts["position_ids"].max[1] == manifest.model.context_length
        assert tokens["position_ids"].opt == (1, 1)
        cache = next(own for own in prompts if own.startswith("past_key_values."))
        assert prompts[cache].max[2] == manifest.model.context_length


@pytest.mark.parametrize("precision", PRECISIONS)
def test_it_was_tested_like_any_other_bundle(bundles: Bundles, precision: str) -> None:
    folder = bundles(precision, True)
    acceptance = load_manifest(folder).safety.acceptance
    assert acceptance is not None
    assert (acceptance.passed, acceptance.builtin) == (True, True)
    assert acceptance.rows > 20
    assert acceptance.agreement is not None
    assert acceptance.agreement >= 0.99
    parity = report_of(folder).parity
    assert parity.tolerance == (1e-4 if precision == "fp32" else None)
    assert any(row.output == "early_verdict_logits" for row in parity.boundaries)


def graphs_of(folder: Path, manifest: Manifest) -> dict[str, onnx.ModelProto]:
    """The graphs that TensorRT reads."""
    return {
        name: onnx.load(str(folder / manifest.graphs[name].file), load_external_data=False)
        for name in manifest.engines
    }


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_its_graphs_are_of_standard_operators_that_the_release_knows(
    bundles: Bundles, precision: str, early: bool
) -> None:
    folder = bundles(precision, early)
    manifest = load_manifest(folder)
    assert manifest.release is not None
    opset = RELEASES[manifest.release].opset
    for name, model in graphs_of(folder, manifest).items():
        onnx.checker.check_model(str(folder / manifest.graphs[name].file))
        assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", opset)]
        for node in model.graph.node:
            assert node.domain == ""
            assert node.op_type != "If"
            assert onnx.defs.has(node.op_type, max_inclusive_version=opset)
        read = {value for node in model.graph.node for value in node.input}
        assert {tensor.name for tensor in model.graph.initializer} <= read


def element_types(model: onnx.ModelProto) -> dict[str, int]:
    """Element types by name, by ONNX's own inference."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    values = [*graph.value_info, *graph.input, *graph.output]
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    return types | {tensor.name: tensor.data_type for tensor in graph.initializer}


@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
def test_layers_multiply_in_float16_and_all_else_is_float32(
    bundles: Bundles, precision: str
) -> None:
    folder = bundles(precision, True)
    for model in graphs_of(folder, load_manifest(folder)).values():
        types = element_types(model)
        for node in model.graph.node:
            kinds = {types[name] for name in node.input if name}
            if node.op_type in ("MatMul", "Gemm"):
                in_layer = node.name.startswith("layers.")
                if in_layer or "lm_head" in node.name:
                    assert kinds == {TensorProto.FLOAT16}, node.name
            elif node.op_type in ("Softmax", "Sqrt", "Sigmoid", "Div", "Exp", "ReduceMean"):
                assert kinds - {TensorProto.INT64} == {TensorProto.FLOAT}, node.name
        assert any(n.op_type == "MatMul" and n.name.startswith("layers.") for n in model.graph.node)


@pytest.mark.parametrize(
    ("precision", "kind"), [("int8", TensorProto.INT8), ("int4", TensorProto.INT4)]
)
def test_weights_stay_as_small_as_asked(bundles: Bundles, precision: str, kind: int) -> None:
    folder = bundles(precision, False)
    decoder = graphs_of(folder, load_manifest(folder))["decoder"]
    matrices = {
        node.input[0]
        for node in decoder.graph.node
        if node.op_type == "DequantizeLinear" and node.name.startswith("layers.")
    }
    types = [t.data_type for t in decoder.graph.initializer if t.name in matrices]
    # Of the two layers behind the gate: query, key and value in one, output, gate, up and down.
    assert types == [kind] * 10


def test_whatever_the_weights_every_matrix_of_a_layer_stays_in_4_bits(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    # On no lattice of TensorRT's: half of the blocks are furthest from 0 above it.
    export_bundle(
        tiny_checkpoint,
        tmp_path / "out",
        target="tensorrt",
        precision="int4",
        allow_unaccepted=True,
    )
    decoder = graphs_of(tmp_path / "out", load_manifest(tmp_path / "out"))["decoder"]
    types = [tensor.data_type for tensor in decoder.graph.initializer]
    assert types.count(TensorProto.INT4) == 10


# --- failing closed ----------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "int8", "cpu"])
def test_layers_in_standard_operators_are_left_to_the_optimizers(
    bundles: Bundles, precision: str
) -> None:
    graphs = open_bundle(bundles(precision, False), "cpu").manifest.graphs
    assert graphs["decoder"].optimized == (precision == "cpu")


def test_it_verifies(bundles: Bundles) -> None:
    open_bundle(bundles("int8", True), "cpu").verify()


@pytest.mark.parametrize("file", ["gate_late.onnx", "weights.onnx.data"])
def test_a_changed_file_is_refused(bundles: Bundles, tmp_path: Path, file: str) -> None:
    folder = Path(shutil.copytree(bundles("fp32", True), tmp_path / "bundle"))
    data = bytearray((folder / file).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / file).write_bytes(data)
    with pytest.raises(IntegrityError, match=file):
        opened(folder)


def test_a_bundle_whose_manifest_lacks_the_graph_behind_its_exit_is_refused(
    bundles: Bundles, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(bundles("fp32", True), tmp_path / "bundle"))
    raw = json.loads((folder / "edge_safe.json").read_text())
    del raw["graphs"]["gate_late"], raw["engines"]["gate_late"]
    (folder / "edge_safe.json").write_text(json.dumps(raw))
    with pytest.raises(BundleError, match="gate_late"):
        open_bundle(folder, "cpu")


@pytest.mark.parametrize("provider", [None, "tensorrt"])
def test_without_its_provider_it_does_not_run(bundles: Bundles, provider: str | None) -> None:
    import onnxruntime

    if PROVIDERS["tensorrt"] in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has TensorRT's provider")
    with pytest.raises(ProviderError, match=r"'tensorrt'.*pip uninstall onnxruntime") as caught:
        SafeModel.load(bundles("fp32", False), provider=provider, threads=1)
    assert "\n" not in str(caught.value)


def test_a_bundle_of_the_cpus_is_none_for_tensorrt(
    bundles: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As if this onnxruntime had the provider: what stands in the way is the bundle.
    monkeypatch.setattr(
        "edge_safe.runtime.session.ort.get_available_providers", lambda: list(PROVIDERS.values())
    )
    with pytest.raises(ProviderError, match=r"exported for cpu.*--target tensorrt"):
        open_bundle(bundles("cpu", False), "tensorrt")
