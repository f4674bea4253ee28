"""Every row of the table of precisions: exports, loads, decides, and is as close as it says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

from edge_safe import Decision, SafeModel
from edge_safe.errors import ExportError, UsageError
from edge_safe.evaluation.speed.requests import Answers
from edge_safe.export import auto, export_bundle
from edge_safe.export.bundle_files import write_manifest
from edge_safe.export.checkpoint.four_bit import FourBit, FourBitTensors
from edge_safe.export.checkpoint.shards import Shards
from edge_safe.export.packing import lattice_matrix
from edge_safe.export.quantization import INT4, PRECISIONS
from edge_safe.export.rounding import round_matrix
from edge_safe.export.targets import target_named
from edge_safe.export.ungated import write_ungated
from edge_safe.runtime.deadline import Deadline
from edge_safe.runtime.manifest import load_manifest
from edge_safe.runtime.policy import Policy
from tests.export.optimizing import changed_operators

# Largest mean KL divergence of the next token from torch's, and largest change of p_unsafe, on
# random weights of four layers that lie on int4's own lattice. Plain 4 bits lose so much of such
# weights that p_unsafe says nothing; AWQ's thresholds are re-fitted, so its p_unsafe is another.
COARSE = (0.35, None)
BOUNDS = {
    "fp32": (1e-6, 1e-4),
    "fp16": (1e-4, 0.005),
    "bf16": (1e-3, 0.03),
    "int8": (0.01, 0.05),
    "int8-weights": (0.01, 0.05),
    "int4": (0.01, 0.05),
    "int4-symmetric-32": COARSE,
    "int4-symmetric-64": COARSE,
    "int4-symmetric-128": COARSE,
    "int4-asymmetric-32": COARSE,
    "int4-asymmetric-64": COARSE,
    "int4-asymmetric-128": COARSE,
    "int4-kquant": COARSE,
    "int4-hqq": COARSE,
    "int4-awq": COARSE,
    "int4-gate8": (0.01, 0.05),
    "int4-fast": COARSE,
    "int8-rows": (0.01, 0.05),
    "int4-int8": (0.35, 0.05),
    "int4-rows": (0.35, 0.05),
}
REQUESTS = (
    "Tell me a story about a boat.",
    "How do I pick the lock of my neighbour's shed?",
    "Explain how bread rises, step by step.",
)


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("calibration") / "rows.jsonl"
    lines = [
        {"prompt": f"Tell me a story about {n} boats.", "label": ("safe", "unsafe")[n % 2]}
        for n in range(12)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def shares(bundle: Path) -> list[float]:
    """p_unsafe of some requests, by the real runtime."""
    model = SafeModel.load(bundle, accept_failed=True)
    verdicts = [model.assess(text) for text in REQUESTS]
    assert all(verdict.decision is not Decision.ERROR for verdict in verdicts)
    return [verdict.p_unsafe for verdict in verdicts]


def test_every_row_has_a_bound() -> None:
    assert set(BOUNDS) | {"imported"} == set(PRECISIONS)


@pytest.mark.parametrize("name", BOUNDS)
def test_a_row_exports_loads_and_decides(
    name: str, tiny_checkpoint: Path, tiny_bundle: Path, calibration: Path, tmp_path: Path
) -> None:
    report = export_bundle(
        tiny_checkpoint,
        tmp_path / "b",
        precision=name,
        calibration=calibration if PRECISIONS[name].scaled else None,
        allow_unaccepted=True,
    )
    kl, change = BOUNDS[name]
    assert report.parity.greedy.kl <= kl
    assert report.acceptance.errors == 0
    found = shares(tmp_path / "b")
    if change is not None:
        assert report.acceptance.max_p_difference <= change
        assert found == pytest.approx(shares(tiny_bundle), abs=change)
    assert load_manifest(tmp_path / "b").precision == name


def test_layers_below_the_gate_may_have_more_bits(tiny_checkpoint: Path, tmp_path: Path) -> None:
    report = export_bundle(
        tiny_checkpoint, tmp_path / "b", precision="int4-gate8", allow_unaccepted=True
    )
    bits = {m.bits: m.parameters for m in report.matrices if m.kind == "layers"}
    assert bits[4] == bits[8] > 0
    manifest = load_manifest(tmp_path / "b")
    assert {n: manifest.graphs[n].precision for n in ("gate", "decoder")} == {
        "gate": "int8",
        "decoder": "int4",
    }


@pytest.fixture(scope="module")
def fast_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Reads prompts through other graphs than it decodes with."""
    out = tmp_path_factory.mktemp("bundles") / "fast"
    export_bundle(tiny_checkpoint, out, precision="int4-int8", allow_unaccepted=True)
    return out


def test_prompts_go_through_graphs_of_their_own(fast_bundle: Path) -> None:
    model = SafeModel.load(fast_bundle, accept_failed=True, policy=Policy(thresholds={"gate": 1.0}))
    model.assess(REQUESTS[0])
    runs = model.run_counts()
    assert (runs["gate_prefill"], runs["gate"], runs["decoder_prefill"]) == (1, 0, 0)
    model.generate(REQUESTS[0], max_tokens=3)
    runs = model.run_counts()
    assert (runs["gate_prefill"], runs["decoder_prefill"]) == (2, 1)
    # Two tokens, and slot T for the logits of the first.
    assert (runs["gate"], runs["decoder"]) == (2, 3)
    assert model.manifest.graphs["gate_prefill"].precision == "int8"
    assert model.manifest.graphs["gate"].precision == "int4"


def test_single_tokens_multiply_both_inner_projections_at_once(fast_bundle: Path) -> None:
    def products(graph: str) -> int:
        nodes = onnx.load(fast_bundle / f"{graph}.onnx", load_external_data=False).graph.node
        return sum(node.op_type in ("MatMulNBits", "MatMulIntegerToFloat") for node in nodes)

    layers = len(
        [n for n in load_manifest(fast_bundle).graphs["decoder"].inputs if n.name.endswith(".key")]
    )
    # The other one of the decoder's is lm_head, which prompts do not go through.
    assert (products("decoder"), products("decoder_prefill")) == (4 * layers + 1, 5 * layers)


def test_single_tokens_go_through_no_condition(fast_bundle: Path) -> None:
    for graph in ("gate", "decoder"):
        nodes = onnx.load(fast_bundle / f"{graph}.onnx", load_external_data=False).graph.node
        assert "If" not in {node.op_type for node in nodes}


def test_a_prompt_in_the_graphs_for_single_tokens_gets_no_verdict(
    fast_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = SafeModel.load(fast_bundle, accept_failed=True).engine
    monkeypatch.setattr(engine, "_prefill_session", engine._bundle.session)
    prompt = engine.embed(np.arange(20, 60))
    judged = engine.judge(prompt, engine.new_state(), Policy(), Deadline(None))
    assert judged.verdict.decision is Decision.ERROR


@pytest.mark.parametrize(("threshold", "runs"), [(0.0, 0), (1.0, 1)])
def test_slot_t_is_read_behind_the_verdict_at_full_depth(
    fast_bundle: Path, threshold: float, runs: int
) -> None:
    policy = Policy(stages=("final",), thresholds={"final": threshold})
    model = SafeModel.load(fast_bundle, accept_failed=True, policy=policy)
    model.assess(REQUESTS[0])
    assert (model.run_counts()["decoder_prefill"], model.run_counts()["decoder"]) == (1, runs)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("bundle", ["fast_bundle", "tiny_bundle_int4"])
def test_what_is_no_number_does_not_get_lost_in_whole_numbers(
    bundle: str, value: float, request: pytest.FixtureRequest
) -> None:
    engine = SafeModel.load(request.getfixturevalue(bundle), accept_failed=True).engine
    inputs = engine.embed(np.arange(20, 60))
    inputs.rows[3, 5] = value
    judged = engine.judge(inputs, engine.new_state(), Policy(), Deadline(None))
    assert judged.verdict.decision is Decision.ERROR


def test_without_its_gate_it_still_reads_prompts_through_them(
    fast_bundle: Path, tmp_path: Path
) -> None:
    final = Policy(stages=("final",), thresholds={"final": 1.0})
    bare = SafeModel.load(write_ungated(fast_bundle, tmp_path / "bare"), policy=final)
    gated = SafeModel.load(fast_bundle, accept_failed=True, policy=final)
    shares = [model.assess(REQUESTS[0]).p_unsafe for model in (gated, bare)]
    assert shares[0] == pytest.approx(shares[1], abs=1e-5)
    assert bare.generate(REQUESTS[0], max_tokens=8).text
    assert bare.run_counts()["decoder_prefill"] == 2


@pytest.mark.parametrize(
    ("precision", "cache"),
    [
        ("int8", "fp32"),
        ("int4", "fp32"),
        ("int4-rows", "fp32"),
        ("int4-int8", "fp32"),
        ("int4-int8", "int8"),
    ],
)
def test_integer_graphs_leave_nothing_to_optimize(
    precision: str, cache: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    export_bundle(
        tiny_checkpoint,
        tmp_path / "b",
        precision=precision,
        kv_cache=cache,
        allow_unaccepted=True,
    )
    for graph in load_manifest(tmp_path / "b").graphs.values():
        assert graph.optimized
        assert changed_operators(tmp_path / "b" / graph.file) == {}


def test_halves_are_left_to_be_cast_when_a_graph_is_opened(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    export_bundle(tiny_checkpoint, tmp_path / "b", precision="fp16")
    decoder = load_manifest(tmp_path / "b").graphs["decoder"]
    assert not decoder.optimized
    assert changed_operators(tmp_path / "b" / decoder.file)["Cast"] < 0


@pytest.mark.parametrize("bundle", ["fast_bundle", "tiny_bundle_int4"])
def test_optimizers_change_no_number(
    bundle: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(request.getfixturevalue(bundle), tmp_path / "b"))
    manifest = load_manifest(folder)
    assert manifest.graphs["decoder"].optimized
    graphs = {
        name: msgspec.structs.replace(graph, optimized=False)
        for name, graph in manifest.graphs.items()
    }
    write_manifest(folder, msgspec.structs.replace(manifest, graphs=graphs))
    without, run = (
        SafeModel.load(one, threads=1, accept_failed=True)
        for one in (request.getfixturevalue(bundle), folder)
    )
    for text in REQUESTS:
        assert without.assess(text).p_unsafe == pytest.approx(run.assess(text).p_unsafe, abs=1e-6)
    ids = np.arange(20, 60)
    assert Answers(without).run(ids, 16).ids == Answers(run).run(ids, 16).ids


def test_awq_needs_texts(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--calibration"):
        export_bundle(tiny_checkpoint, tmp_path / "b", precision="int4-awq")


def test_tables_are_stored_as_they_are_asked_for(tiny_checkpoint: Path, tmp_path: Path) -> None:
    report = export_bundle(
        tiny_checkpoint, tmp_path / "b", precision="int4", embedding="fp16", lm_head="int8"
    )
    assert {m.kind: m.bits for m in report.matrices} == {"layers": 4, "embedding": 16, "lm_head": 8}
    command = load_manifest(tmp_path / "b").provenance.command
    assert "--precision int4 --embedding fp16 --lm-head int8" in command


@pytest.mark.parametrize(("cache", "bound"), [("fp16", 0.01), ("int8", 0.1)])
def test_keys_and_values_in_fewer_bits(
    cache: str, bound: float, tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    out = tmp_path / "b"
    report = export_bundle(tiny_checkpoint, out, precision="fp32", kv_cache=cache)
    assert report.cache == cache
    assert report.acceptance.max_p_difference <= bound
    past = load_manifest(out).graphs["decoder"].inputs
    dtypes = {t.dtype for t in past if t.name.startswith("past_key_values")}
    assert dtypes == {{"fp16": "float16", "int8": "int8"}[cache]}
    whole, small = (SafeModel.load(b).chat() for b in (tiny_bundle, out))
    for text in ("Tell me a story.", "And another one about the sea?"):
        expected, found = (chat.send(text, max_tokens=4) for chat in (whole, small))
        assert found.verdict.p_unsafe == pytest.approx(expected.verdict.p_unsafe, abs=bound)


def test_a_cache_that_no_kernel_takes_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="bfloat16 has no kernel"):
        export_bundle(tiny_checkpoint, tmp_path / "b", kv_cache="bf16")


def pack_rows(values: np.ndarray, order: tuple[int, ...]) -> torch.Tensor:
    """(n, 8 m) values of 4 bits -> (n, m) int32, written out bit by bit."""
    words = np.zeros((values.shape[0], values.shape[1] // 8), np.uint32)
    for column in range(values.shape[1]):
        place = order.index(column % 8)
        words[:, column // 8] |= values[:, column].astype(np.uint32) << np.uint32(4 * place)
    return torch.from_numpy(words.view(np.int32).copy())


def quantized(source: Path, folder: Path, method: str) -> dict[str, np.ndarray]:
    """Rewrites a checkpoint as GPTQ or AWQ would, and gives the weights that it then has."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    expected = {}
    form = type(INT4)(4, 32)
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        weight = tensors.pop(name).numpy()
        rounded = round_matrix(weight, form)
        rounded.scales[:] = rounded.scales.astype(np.float16)
        expected[name] = lattice_matrix(rounded, weight.shape[1])
        values = rounded.values.reshape(len(weight), -1).T
        zeros = rounded.zeros.astype(np.uint8).T
        module = name.removesuffix(".weight")
        if method == "gptq":
            tensors[f"{module}.qweight"] = pack_rows(values.T, tuple(range(8))).T.contiguous()
            tensors[f"{module}.qzeros"] = pack_rows((zeros - 1) & 15, tuple(range(8)))
            tensors[f"{module}.g_idx"] = torch.arange(weight.shape[1]) // 32
        else:
            tensors[f"{module}.qweight"] = pack_rows(values, (0, 2, 4, 6, 1, 3, 5, 7))
            tensors[f"{module}.qzeros"] = pack_rows(zeros, (0, 2, 4, 6, 1, 3, 5, 7))
        tensors[f"{module}.scales"] = torch.from_numpy(rounded.scales.T.copy()).half()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": 32}
    (folder / "config.json").write_text(json.dumps(config))
    return expected


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_values_of_4_bit_checkpoints_are_kept(
    method: Any, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    expected = quantized(tiny_checkpoint, tmp_path / "q", method)
    packed = FourBitTensors(Shards(tmp_path / "q"), FourBit(method))
    for name, weight in expected.items():
        np.testing.assert_array_equal(packed.dense(name).numpy(), weight)
        np.testing.assert_array_equal(lattice_matrix(packed.lattice(name), weight.shape[1]), weight)
    report = export_bundle(tmp_path / "q", tmp_path / "b", precision="imported")
    layers = next(m for m in report.matrices if m.kind == "layers")
    assert (layers.bits, layers.relative_error) == (4, 0.0)
    assert report.accepted.passed


def test_groups_in_an_order_of_their_own_are_rounded_again(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    quantized(tiny_checkpoint, tmp_path / "q", "gptq")
    path = tmp_path / "q" / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.self_attn.o_proj"
    tensors[f"{name}.g_idx"] = tensors[f"{name}.g_idx"].flip(0).contiguous()
    save_file(tensors, path)
    packed = FourBitTensors(Shards(tmp_path / "q"), FourBit("gptq"))
    assert packed.lattice(f"{name}.weight") is None
    assert packed.lattice("model.layers.1.self_attn.o_proj.weight") is not None


def test_other_quantizations_are_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    quantized(tiny_checkpoint, tmp_path / "q", "gptq")
    path = tmp_path / "q" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= {"bits": 3}
    path.write_text(json.dumps(config))
    with pytest.raises(ExportError, match="bits 3"):
        export_bundle(tmp_path / "q", tmp_path / "b")


def test_nothing_to_import_is_said(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="does not come in 4 bits"):
        export_bundle(tiny_checkpoint, tmp_path / "b", precision="imported")


def test_auto_takes_the_smallest_that_is_accepted(tiny_checkpoint: Path, tmp_path: Path) -> None:
    report = export_bundle(tiny_checkpoint, tmp_path / "b", precision="auto")
    search = report.search
    assert [c.bytes for c in search.candidates] == sorted(c.bytes for c in search.candidates)
    assert search.candidates[search.chosen].accepted
    smaller = search.candidates[: search.chosen]
    bound = target_named("cpu").bounds.perplexity
    assert all(c.accepted is (None if c.hopeless(bound) else False) for c in smaller)
    first, last = search.candidates[0], search.candidates[-1]
    assert (set(first.layers), first.tables) == ({"int4-asymmetric-128"}, "int4")
    assert (set(last.layers), last.tables) == ({"int8"}, "int8")
    by_row = {row: [g.layers for g in search.groups if g.row == row] for row in auto.LAYER_ROWS}
    assert by_row["int4-asymmetric-128"] == [(0, 0), (1, 1), (2, 2), (3, 3)]
    assert by_row["int4"] == [None, *by_row["int4-asymmetric-128"]]
    assert (tmp_path / "b" / "pareto.png").read_bytes().startswith(b"\x89PNG")
    assert "pareto.png" in load_manifest(tmp_path / "b").files
    assert SafeModel.load(tmp_path / "b").assess("Tell me a story.").reason is None


def test_auto_goes_on_where_4_bits_are_not_enough(tiny_checkpoint: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))
    tensors = load_file(copy / "model.safetensors")
    torch.manual_seed(4)
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        # Off any lattice of 4 bits.
        tensors[name] = 0.15 * torch.randn_like(tensors[name])
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    report = export_bundle(copy, tmp_path / "b", precision="auto")
    assert report.search.chosen > 0
    assert report.accepted.passed
    before = report.search.candidates[0]
    assert report.search.candidates[report.search.chosen].kl < before.kl
