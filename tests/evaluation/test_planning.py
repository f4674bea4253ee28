"""Planning: work counted in graphs, times from work, constants checked on what they did not see."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper, shape_inference

from edge_safe.errors import DataError, UsageError
from edge_safe.evaluation.planning import fitting, page
from edge_safe.evaluation.planning.bundle_work import bundle_work
from edge_safe.evaluation.planning.devices import DEVICES, Mode, find_device
from edge_safe.evaluation.planning.fitting import (
    KINDS,
    WITHIN,
    checks,
    constants_of,
    group,
    split,
)
from edge_safe.evaluation.planning.formulas import (
    Constants,
    compute_seconds,
    read_seconds,
    seconds,
)
from edge_safe.evaluation.planning.measured import measured_constants
from edge_safe.evaluation.planning.memory import memory_of
from edge_safe.evaluation.planning.pictures import picture
from edge_safe.evaluation.planning.prediction import Request, make_plan, predict
from edge_safe.evaluation.planning.public_models import (
    DECODERS,
    PRECISIONS,
    VISION_TOWERS,
    VisionTower,
)
from edge_safe.evaluation.planning.published import OWN, PHASES, SOURCES, figures
from edge_safe.evaluation.planning.step import Step
from edge_safe.evaluation.planning.tower_step import tower_step
from edge_safe.evaluation.speed.graph_work import read_graph, weights_of, work_of
from edge_safe.runtime.bundle import Bundle, open_bundle
from tests.conftest import export
from tests.export.vision_families import qwen3_vl, write_vision_family

ROOT = Path(__file__).parents[2]
NANO, FIFTEEN_WATTS = find_device("orin-nano")
PI, PI_MODE = find_device("raspberry-pi-5")


@pytest.fixture(scope="module")
def opened(tiny_bundle: Path) -> Bundle:
    return open_bundle(tiny_bundle)


def graph_of(
    nodes: Sequence[onnx.NodeProto],
    weights: Sequence[TensorProto],
    inputs: dict[str, Sequence[int]],
    output: str,
) -> onnx.ModelProto:
    """A graph of float inputs."""
    given = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in inputs.items()]
    result = helper.make_tensor_value_info(output, TensorProto.FLOAT, None)
    return helper.make_model(helper.make_graph(nodes, "g", given, [result], list(weights)))


def floats(name: str, *shape: int) -> TensorProto:
    return numpy_helper.from_array(np.zeros(shape, np.float32), name)


def four_bits(name: str, *shape: int) -> TensorProto:
    return helper.make_tensor(name, TensorProto.INT4, shape, bytes(math.prod(shape) // 2), raw=True)


def multiplied(model: onnx.ModelProto) -> int:
    """Multiplications of convolutions and products, by the shapes that onnx infers."""
    inferred = shape_inference.infer_shapes(model).graph
    weights = {tensor.name: list(tensor.dims) for tensor in inferred.initializer}
    shapes = {
        value.name: [size.dim_value for size in value.type.tensor_type.shape.dim]
        for value in (*inferred.value_info, *inferred.input, *inferred.output)
    }
    total = 0
    for node in inferred.node:
        if node.op_type == "Conv":
            total += math.prod(shapes[node.output[0]]) * math.prod(weights[node.input[1]][1:])
        elif node.op_type == "MatMul":
            inner = shapes[node.input[0]][-1]
            total += math.prod(shapes[node.output[0]]) * inner
    return total


# ---- counting in graphs


@pytest.mark.parametrize("turned", [False, True])
def test_a_product_behind_unpacked_4_bit_weights_counts_them_and_their_packed_bytes(
    turned: bool,
) -> None:
    shape = (24, 64) if turned else (64, 24)
    weights = [four_bits("w", *shape), floats("scale", 1, shape[1])]
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "scale"], ["u"], axis=0, block_size=shape[0]),
        helper.make_node("Transpose", ["u"], ["t"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "t" if turned else "u"], ["y"]),
    ]
    model = graph_of(nodes, weights, {"x": (1, 5, 64)}, "y").SerializeToString()
    tensors, found = read_graph(model)
    assert [weights_of(node, tensors) for node in found][-1] == 64 * 24
    step = tower_step(model, {"x": (1, 5, 64)})
    assert step.operations == 2 * 5 * 64 * 24
    assert step.read_bytes == 64 * 24 / 2 + 4 * shape[1]


def test_products_of_8_bit_activations_count_as_integer_work() -> None:
    weight = numpy_helper.from_array(np.zeros((64, 24), np.int8), "w")
    nodes = [helper.make_node("MatMulInteger", ["x", "w"], ["y"])]
    step = tower_step(
        graph_of(nodes, [weight], {"x": (1, 5, 64)}, "y").SerializeToString(), {"x": (1, 5, 64)}
    )
    assert (step.operations, step.integer_operations) == (0.0, 2 * 5 * 64 * 24)


def test_a_convolutional_tower_counts_what_onnx_infers() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "a"], ["c1"], strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c1"], ["r1"]),
        helper.make_node("Conv", ["r1", "d"], ["c2"], group=16, pads=[1, 1, 1, 1]),
        helper.make_node("ReduceMean", ["c2", "axes"], ["m"], keepdims=1),
        helper.make_node("Conv", ["m", "s"], ["c3"]),
        helper.make_node("Sigmoid", ["c3"], ["gate"]),
        helper.make_node("Mul", ["c2", "gate"], ["scaled"]),
        helper.make_node("MaxPool", ["scaled"], ["p"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Conv", ["p", "e"], ["y"]),
    ]
    weights = [
        floats("a", 16, 3, 3, 3),
        floats("d", 16, 1, 3, 3),
        floats("s", 16, 16, 1, 1),
        floats("e", 40, 16, 1, 1),
        numpy_helper.from_array(np.array([2, 3]), "axes"),
    ]
    shape = (1, 3, 32, 48)
    model = graph_of(nodes, weights, {"x": shape}, "y")
    step = tower_step(model.SerializeToString(), {"x": shape})
    assert step.operations == 2 * multiplied(model)
    assert step.read_bytes == 4 * (16 * 27 + 16 * 9 + 16 * 16 + 40 * 16)


def test_a_tower_of_patches_counts_products_and_both_products_of_its_attention() -> None:
    width, heads, patches = 32, 4, 6 * 6
    nodes = [
        helper.make_node("Conv", ["x", "patch"], ["c"], strides=[7, 7]),
        helper.make_node("Reshape", ["c", "flat"], ["f"]),
        helper.make_node("Transpose", ["f"], ["t"], perm=[0, 2, 1]),
        *(helper.make_node("MatMul", ["t", f"w{p}"], [f"m{p}"]) for p in "qkv"),
        *(helper.make_node("Reshape", [f"m{p}", "split"], [f"s{p}"]) for p in "qkv"),
        helper.make_node("Transpose", ["sq"], ["q"], perm=[0, 2, 1, 3]),
        helper.make_node("Transpose", ["sk"], ["k"], perm=[0, 2, 3, 1]),
        helper.make_node("Transpose", ["sv"], ["v"], perm=[0, 2, 1, 3]),
        helper.make_node("MatMul", ["q", "k"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["p"]),
        helper.make_node("MatMul", ["p", "v"], ["mixed"]),
        helper.make_node("Transpose", ["mixed"], ["back"], perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["back", "joined"], ["j"]),
        helper.make_node("MatMul", ["j", "wo"], ["y"]),
    ]
    weights = [
        floats("patch", width, 3, 7, 7),
        *(floats(f"w{p}", width, width) for p in "qkvo"),
        numpy_helper.from_array(np.array([1, width, patches]), "flat"),
        numpy_helper.from_array(np.array([1, patches, heads, width // heads]), "split"),
        numpy_helper.from_array(np.array([1, patches, width]), "joined"),
    ]
    model = graph_of(nodes, weights, {"x": (1, 3, 42, 42)}, "y")
    step = tower_step(model.SerializeToString(), {"x": (1, 3, 42, 42)})
    assert step.operations == 2 * multiplied(model)


@pytest.fixture(scope="module")
def seeing_qwen(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A tiny Qwen3-VL, exported."""
    folder = tmp_path_factory.mktemp("qwen")
    write_vision_family(folder / "checkpoint", "qwen3_vl")
    return open_bundle(export(folder / "checkpoint", folder / "bundle", "fp32"))


def test_an_exported_tower_counts_what_its_configuration_says(seeing_qwen: Bundle) -> None:
    config = qwen3_vl().config.vision_config
    tower = VisionTower(
        layers=config.depth,
        width=config.hidden_size,
        inner=config.intermediate_size,
        patch=3 * config.temporal_patch_size * config.patch_size**2,
        merge=config.spatial_merge_size**2,
        mergers=1 + len(config.deepstack_visual_indexes),
        out=config.out_hidden_size,
    )
    seen = picture(seeing_qwen)
    assert seen is not None
    expected = tower.encode(seen.tokens)
    assert seen.step.operations == pytest.approx(expected.operations, rel=0.02)


def test_a_picture_joins_the_prompt_with_its_own_tokens(seeing_qwen: Bundle) -> None:
    seen = picture(seeing_qwen)
    assert seen is not None
    plan = make_plan(seeing_qwen, Request(64, images=2))
    assert plan.prompt == 64 + 2 * seen.tokens
    assert make_plan(seeing_qwen, Request(64, images=2, image_tokens=7)).prompt == 64 + 14
    found = predict(plan, PI, PI_MODE)
    once = seconds("encode", seen.step, PI_MODE, constants_of("cpu"))
    assert found["encode_ms"] == pytest.approx(2000 * once)
    assert found["first_token_ms"] == pytest.approx(found["encode_ms"] + found["prefill_ms"])


# ---- work of a bundle


def test_a_decoding_step_reads_the_weights_and_the_cache(opened: Bundle) -> None:
    work = bundle_work(opened)
    keys_and_values = 2 * 4 * 2 * 16 * 4  # both, layers, heads, width, bytes
    assert work.decode(100).read_bytes == work_of(opened).weight_bytes + 100 * keys_and_values


def test_the_first_half_of_the_layers_is_half_of_the_body_without_lm_head(opened: Bundle) -> None:
    work, reading = bundle_work(opened), work_of(opened, prefill=True)
    body = reading.multiplications - reading.head_multiplications
    attention = 4.0 * 4 * 64 * 100 * 50
    assert work.prefill(100, 2).operations == pytest.approx(body * 100 + attention / 2)
    whole = 2.0 * (body * 100 + reading.head_multiplications) + attention
    assert work.prefill(100).operations == pytest.approx(whole)


def test_every_further_chunk_of_a_prompt_reads_the_weights_again(opened: Bundle) -> None:
    work = bundle_work(opened)
    assert work.prefill(513).read_bytes == 2 * work.prefill(512).read_bytes


def test_a_packed_bundle_reads_less_and_multiplies_as_much(
    opened: Bundle, tiny_bundle_int4: Path
) -> None:
    plain, packed = bundle_work(opened), bundle_work(open_bundle(tiny_bundle_int4))
    assert packed.decode(1).read_bytes < plain.decode(1).read_bytes / 2
    assert packed.prefill(64).operations >= plain.prefill(64).operations


# ---- formulas and memory


def test_decoding_takes_its_bytes_over_the_share_of_the_bandwidth() -> None:
    mode = Mode("m", gb_per_second=50.0, tflops=10.0, int8_tops=20.0)
    took = seconds("decode", Step(2e9, 1e12), mode, Constants(1.0, 1.0, 0.8))
    assert took == pytest.approx(2.0 / (50 * 0.8))


def test_prefill_adds_reading_and_computing_each_at_its_share() -> None:
    mode = Mode("m", gb_per_second=50.0, tflops=10.0, int8_tops=20.0)
    step = Step(2e9, operations=3e12, integer_operations=4e12)
    took = seconds("prefill", step, mode, Constants(0.1, 0.5, 0.8))
    assert took == pytest.approx(2 / 40 + 3 / (10 * 0.5) + 4 / (20 * 0.5))


def test_memory_is_weights_cache_columns_and_the_runtime(opened: Bundle) -> None:
    manifest = opened.manifest
    short, long = (memory_of(opened, NANO, 64, context, ()) for context in (100, 200))
    attention = manifest.safety.attention
    assert attention is not None
    columns = len(attention.layers) * manifest.model.hidden_size * 4
    assert long.cache - short.cache == 100 * (2 * 4 * 2 * 16 * 4 + columns)
    used = {"embed_tokens", "gate", "decoder"}
    graphs = {manifest.graphs[name].file for name in used}
    data = {name for name in manifest.files if name.endswith(".onnx.data")}
    assert short.weights == sum(manifest.files[name].size for name in graphs | data)
    assert memory_of(opened, PI, 64, 100, ()).weights == 2 * short.weights


def test_a_bundle_that_is_larger_than_the_memory_does_not_fit(opened: Bundle) -> None:
    plan = make_plan(opened, Request(64))
    assert predict(plan, NANO, FIFTEEN_WATTS)["fits"]
    assert not predict(plan, replace(NANO, memory_gb=0.5), FIFTEEN_WATTS)["fits"]


# ---- predictions


def test_a_refusal_comes_before_the_first_token_and_an_early_one_before_it(opened: Bundle) -> None:
    found = predict(make_plan(opened, Request(256)), PI, PI_MODE)
    layer = opened.manifest.safety.exit_layer
    assert layer == 2
    assert found["refusal_ms"] == found["late_refusal_ms"]
    assert 0.3 < found["refusal_ms"] / found["first_token_ms"] < 0.6


def test_twice_the_bandwidth_decodes_twice_as_fast(opened: Bundle) -> None:
    plan = make_plan(opened, Request(64))
    wide = replace(PI_MODE, gb_per_second=2 * PI_MODE.gb_per_second)
    slow, fast = (predict(plan, PI, mode)["decode_tokens_per_second"] for mode in (PI_MODE, wide))
    assert fast == pytest.approx(2 * slow)


def test_a_small_model_on_a_gpu_is_a_bound_and_on_a_cpu_a_prediction(opened: Bundle) -> None:
    plan = make_plan(opened, Request(64))
    assert predict(plan, NANO, FIFTEEN_WATTS)["at_best"]
    assert not predict(plan, PI, PI_MODE)["at_best"]


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (Request(0), "--prompt-tokens"),
        (Request(600), "512"),
        (Request(64, images=1), "--images"),
        (Request(64, images=-1), "--images"),
        (Request(64, image_tokens=5), "--image-tokens"),
        (Request(64, context=40), "--context"),
        (Request(64, context=513), "--context"),
    ],
)
def test_a_request_that_cannot_be_is_wrong_usage(
    opened: Bundle, request_: Request, said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        make_plan(opened, request_)


# ---- the table of devices


def test_every_device_has_its_own_name_a_source_and_positive_figures() -> None:
    names = [device.name for device in DEVICES]
    assert len(set(names)) == len(names)
    for device in DEVICES:
        assert device.sources
        for mode in device.modes:
            assert min(device.memory_gb, mode.gb_per_second, mode.tflops) > 0
            assert mode.int8_tops >= 1.9 * mode.tflops


def test_an_unknown_device_or_mode_names_those_there_are() -> None:
    with pytest.raises(UsageError, match=r"orin-nano.*raspberry-pi-5"):
        find_device("jetson-nano")
    with pytest.raises(UsageError, match=r"MAXN_SUPER.*25W.*15W"):
        find_device("orin-nano-super", "50W")
    assert find_device("orin-nano-super", "25w")[1].name == "25W"


# ---- published models, figures, constants

# Billions, as their model cards say; Qwen3's small ones and Llama 3.2 use the embedding twice.
PARAMETERS = {
    "Qwen3-0.6B": (0.6, 1),
    "Qwen3-1.7B": (1.72, 1),
    "Qwen3-4B": (4.0, 1),
    "Qwen3-8B": (8.2, 2),
    "Qwen2.5-7B": (7.61, 2),
    "R1-Distill-Qwen-14B": (14.8, 2),
    "Llama-3.2-3B": (3.21, 1),
    "Llama-3.1-8B": (8.03, 2),
    "Llama-2-7B": (6.74, 2),
    "Llama-2-13B": (13.02, 2),
    "TinyLlama-1.1B": (1.10, 2),
    "Gemma-2-2B": (2.61, 1),
    "Gemma-2-9B": (9.24, 1),
    "Phi-3.5-mini": (3.82, 2),
    "SmolLM2-135M": (0.1345, 1),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_public_decoder_has_the_parameters_of_its_model_card(name: str) -> None:
    billions, embeddings = PARAMETERS[name]
    decoder = DECODERS[name]
    counted = (decoder.body + embeddings * decoder.head) / 1e9
    assert counted == pytest.approx(billions, rel=0.012 if billions > 0.6 else 0.02)


def test_a_public_vision_tower_has_the_weights_of_the_torch_model() -> None:
    from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

    # The 8B model's tower is that configuration's default, but for its features' width.
    config = Qwen3VLVisionConfig(out_hidden_size=4096)
    with torch.device("meta"):
        model = Qwen3VLVisionModel(config)
    matrices = sum(
        weight.numel()
        for name, weight in model.named_parameters()
        if weight.dim() > 1 and "pos_embed" not in name
    )
    assert VISION_TOWERS["Qwen3-VL-8B"].encode(1).read_bytes == 2 * matrices


def test_the_published_sizes_of_llama_cpp_files_are_those_of_the_precision_rows() -> None:
    # github.com/XiongjieDai/GPU-Benchmarks-on-LLM-Inference: 4.58 GiB for Llama 3 8B Q4_K_M; the
    # embedding stands in it as Q4_K, 4.5 bits, and is not read whole for a token.
    decoder = DECODERS["Llama-3-8B"]
    counted = decoder.weight_bytes(PRECISIONS["Q4_K_M"]) + decoder.head * 4.5 / 8
    assert counted == pytest.approx(4.58 * 2**30, rel=0.01)


def test_the_two_published_rows_of_a_picture_are_there_and_predicted() -> None:
    for device, encode, prefill, rate in (
        ("orin-nano", 151.1, 190.9, 36.9),
        ("agx-orin", 39.0, 50.0, 98.4),
    ):
        found = {
            figure.phase: figure
            for figure in figures()
            if figure.source == "edge-llm-0.9"
            and figure.device.name == device
            and figure.model.startswith("Qwen3-VL-2B")
        }
        assert found["encode"].seconds == pytest.approx(encode / 1000)
        assert found["prefill"].seconds == pytest.approx(prefill / 1000)
        assert found["decode"].seconds == pytest.approx(1 / rate)
        for phase, figure in found.items():
            took = seconds(phase, figure.step, figure.mode, constants_of("gpu"))
            assert took == pytest.approx(figure.seconds, rel=WITHIN)


def test_every_figure_has_a_source_on_the_page() -> None:
    assert {figure.source for figure in figures()} == set(SOURCES)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("kind", KINDS)
def test_no_fitted_figure_is_held_out_and_none_is_lost(
    phase: fitting.Phase, kind: fitting.Kind
) -> None:
    fitted, held_out = split(phase, kind)
    assert not set(map(id, fitted)) & set(map(id, held_out))
    assert not [figure for figure in fitted if figure in held_out]
    owned = [figure for figure in figures() if figure.phase == phase and not figure.apart]
    of_kind = [f for f in owned if group(phase, f.device.kind) == group(phase, kind)]
    assert len(fitted) + len(held_out) == len(of_kind)
    own = [figure for figure in of_kind if figure.source == OWN]
    assert len(fitted) == math.ceil(len(own or of_kind) / 2)
    assert all(figure.source == OWN for figure in fitted) or not own


def test_fitting_finds_the_share_that_made_up_figures_have() -> None:
    made = Constants(0.31, 0.42, 0.66)
    known = [
        replace(figure, seconds=seconds(figure.phase, figure.step, figure.mode, made))
        for figure in split("prefill", "gpu")[0]
    ]
    found = fitting._fit("prefill", Constants(1.0, 1.0, 0.66), known)
    assert found.prefill == pytest.approx(0.42, rel=1e-6)


@pytest.mark.parametrize(
    ("phase", "kind", "outside"),
    [
        ("encode", "gpu", 0),
        ("encode", "thor", 0),
        ("prefill", "gpu", 2),
        ("prefill", "thor", 0),
        ("decode", "gpu", 0),
        ("decode", "cpu", 0),
    ],
)
def test_held_out_figures_are_within_35_percent_but_for_those_the_page_names(
    phase: fitting.Phase, kind: fitting.Kind, outside: int
) -> None:
    held_out = [check for check in checks(phase, kind) if not check.fitted]
    wrong = [check for check in held_out if abs(check.error) > WITHIN]
    assert len(wrong) == outside
    assert all(check.figure.device.name == "rtx-4090" for check in wrong)


def test_one_constant_for_gpus_and_thor_together_would_not_hold() -> None:
    gpu, thor = (constants_of(kind).prefill for kind in ("gpu", "thor"))
    middle = math.sqrt(gpu * thor)
    assert gpu / middle > 1 + WITHIN


def test_reading_and_computing_fit_published_prefills_as_a_sum_and_not_as_a_maximum() -> None:
    found = checks("prefill", "gpu")
    share = constants_of("gpu")

    def longer(check: fitting.Check, prefill: float) -> float:
        step, mode = check.figure.step, check.figure.mode
        return max(read_seconds(step, mode, share), compute_seconds(step, mode) / prefill)

    def within(predicted: Sequence[float]) -> int:
        pairs = zip(predicted, found, strict=True)
        return sum(abs(took / check.figure.seconds - 1) <= WITHIN for took, check in pairs)

    best = max(
        within([longer(check, prefill) for check in found]) for prefill in np.arange(0.2, 0.9, 0.01)
    )
    assert within([check.predicted for check in found]) > best


# ---- measured constants


def bench_document(measured: Bundle, **changes: object) -> dict[str, object]:
    """The part of `bench --json` that counts, and something beside it."""
    manifest = measured.manifest
    return {
        "bundle": {"name": manifest.name, "precision": manifest.precision, "bytes": 1},
        "machine": {"cpu": "x"},
        "prompt_tokens": 256,
        "prefill_ms": 40.0,
        "decode_ms_per_token": 2.5,
        "encode_image_ms": None,
    } | changes


def test_with_measured_constants_the_measured_request_is_predicted_as_measured(
    opened: Bundle, tmp_path: Path
) -> None:
    file = tmp_path / "bench.json"
    file.write_text(json.dumps(bench_document(opened)))
    constants = measured_constants(file, opened, PI, PI_MODE)
    assert constants.encode == constants_of("cpu").encode
    found = predict(make_plan(opened, Request(256)), PI, PI_MODE, constants)
    assert found["prefill_ms"] == pytest.approx(40.0)
    assert found["constants_from"] == "bench"
    token = bundle_work(opened).decode(8)
    assert seconds("decode", token, PI_MODE, constants) == pytest.approx(2.5e-3)


def test_measurements_of_another_bundle_are_wrong_usage(opened: Bundle, tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    other = {"name": opened.manifest.name, "precision": "int8"}
    file.write_text(json.dumps(bench_document(opened, bundle=other)))
    with pytest.raises(UsageError, match="int8"):
        measured_constants(file, opened, PI, PI_MODE)


@pytest.mark.parametrize("text", ["{}", "no JSON", '{"bundle": 3}'])
def test_a_file_that_bench_did_not_print_is_a_data_error(
    opened: Bundle, tmp_path: Path, text: str
) -> None:
    file = tmp_path / "bench.json"
    file.write_text(text)
    with pytest.raises(DataError, match="bench --json"):
        measured_constants(file, opened, PI, PI_MODE)


def test_times_that_are_not_positive_are_a_data_error(opened: Bundle, tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    file.write_text(json.dumps(bench_document(opened, prefill_ms=0.0)))
    with pytest.raises(DataError, match="not positive"):
        measured_constants(file, opened, PI, PI_MODE)


# ---- the page


def test_the_page_says_what_the_data_say() -> None:
    text = (ROOT / "docs" / "plan.md").read_text(encoding="utf-8")
    assert page.refresh(text) == text, "run: python benchmarks/fit_plan.py docs/plan.md"


def test_a_page_without_a_section_is_not_written() -> None:
    with pytest.raises(ValueError, match="devices"):
        page.refresh("# Nothing\n")
