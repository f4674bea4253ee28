"""Operators of ONNX Runtime's own beside what they are lowered to: the same numbers."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from edge_safe.errors import ExportError
from edge_safe.export.graphs.builder import CONTRIB, FLOAT, GraphBuilder
from edge_safe.export.graphs.matrices import linear, store_linear
from edge_safe.export.graphs.store import WeightStore
from edge_safe.export.packing import Packed, dequantize
from edge_safe.export.quantization import ROWS, MatrixFormat
from edge_safe.export.tensorrt.lowering import lower_graph
from edge_safe.export.tensorrt.releases import RELEASES, Release
from edge_safe.runtime.session import Session

Array = np.ndarray[Any, Any]
OLDEST, NEWEST = RELEASES["10.3"], RELEASES["10.16"]
MASK, PLACES = "attention_mask", "position_ids"
KEY, VALUE = "past_key_values.0.key", "past_key_values.0.value"
# Rounding of products in float16, of values about 1.
HALF = 0.02

few = settings(max_examples=30, deadline=None)


def floats(rng: np.random.Generator, *shape: int) -> Array:
    return rng.standard_normal(shape).astype(np.float32)


def contrib(kind: str, inputs: Sequence[str], outputs: Sequence[str], **more: Any) -> Any:
    name = f"{outputs[0]}/{kind}"
    return helper.make_node(kind, list(inputs), list(outputs), name=name, domain=CONTRIB, **more)


def plain(kind: str, inputs: Sequence[str], output: str, **more: Any) -> Any:
    return helper.make_node(kind, list(inputs), [output], name=f"{output}/{kind}", **more)


@dataclass
class Pair:
    """A graph and what it was lowered to."""

    source: onnx.ModelProto
    lowered: onnx.ModelProto
    weights: Mapping[str, bytes]

    def expect(self, feeds: Mapping[str, Array]) -> list[Array]:
        return run(self.source, feeds, {})

    def find(self, feeds: Mapping[str, Array]) -> list[Array]:
        return run(self.lowered, feeds, self.weights)


def run(
    model: onnx.ModelProto, feeds: Mapping[str, Array], files: Mapping[str, bytes]
) -> list[Array]:
    """Every output of a model on the CPU."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    # Else it makes products of its own again of what was lowered, and rounds their inputs.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    with tempfile.TemporaryDirectory() as folder:
        for name, data in files.items():
            (Path(folder) / name).write_bytes(data)
        path = Path(folder) / "graph.onnx"
        path.write_bytes(model.SerializeToString())
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = {node.name for node in session.get_inputs()}
    return session.run(None, {name: value for name, value in feeds.items() if name in names})


def lower(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, tuple[type, Sequence[int | str]]],
    outputs: Sequence[str],
    weights: Mapping[str, Array] | None = None,
    *,
    release: Release = NEWEST,
    half: bool = False,
) -> Pair:
    """Lowers a graph of a few nodes, which is the source beside it."""
    graph = helper.make_graph(
        list(nodes),
        "test",
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(k)), shape)
            for name, (k, shape) in inputs.items()
        ],
        [
            helper.make_tensor_value_info(name, FLOAT, ["b", "h", "present", "d"])
            if name.startswith("present.")
            else onnx.ValueInfoProto(name=name, type=untyped())
            for name in outputs
        ],
        [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(CONTRIB, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return lower_model(model, release, half=half)


def untyped() -> onnx.TypeProto:
    """A float32 of whatever shape."""
    return onnx.TypeProto(tensor_type=onnx.TypeProto.Tensor(elem_type=FLOAT))


def lower_model(model: onnx.ModelProto, release: Release = NEWEST, *, half: bool = False) -> Pair:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "source.onnx").write_bytes(model.SerializeToString())
        with WeightStore(folder / "weights.onnx.data") as store:
            lower_graph(folder / "source.onnx", folder / "out.onnx", store, release, half=half)
        onnx.checker.check_model(str(folder / "out.onnx"))
        lowered = onnx.load(str(folder / "out.onnx"), load_external_data=False)
        weights = {"weights.onnx.data": (folder / "weights.onnx.data").read_bytes()}
    check_standard(lowered, release)
    return Pair(model, lowered, weights)


def check_standard(model: onnx.ModelProto, release: Release) -> None:
    """Nothing in it is ONNX Runtime's own or newer than a release reads."""
    assert [entry.domain for entry in model.opset_import] == [""]
    assert model.opset_import[0].version <= release.opset
    for node in model.graph.node:
        assert node.domain == ""
        assert onnx.defs.has(node.op_type, max_inclusive_version=release.opset)


def close(found: Array, expected: Array, half: bool = False) -> None:
    np.testing.assert_allclose(found, expected, atol=HALF if half else 2e-5, rtol=1e-4)


# --- norms and activations ---------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1, 8), (2, 5, 24), (3, 4, 2, 16)])
@pytest.mark.parametrize("epsilon", [1e-6, 0.5])
def test_simplified_layer_normalization(shape: tuple[int, ...], epsilon: float) -> None:
    rng = np.random.default_rng(0)
    # In the standard domain, where ONNX Runtime has registered it.
    node = plain("SimplifiedLayerNormalization", ["x", "w"], "y", epsilon=epsilon, axis=-1)
    pair = lower([node], {"x": (np.float32, shape)}, ["y"], {"w": floats(rng, shape[-1])})
    feeds = {"x": floats(rng, *shape)}
    close(pair.find(feeds)[0], pair.expect(feeds)[0])


def test_skip_simplified_layer_normalization_gives_norm_and_sum() -> None:
    rng = np.random.default_rng(1)
    shape = (2, 5, 24)
    node = contrib(
        "SkipSimplifiedLayerNormalization",
        ["x", "r", "w"],
        ["normed", "", "", "sum"],
        epsilon=1e-5,
    )
    inputs = {"x": (np.float32, shape), "r": (np.float32, shape)}
    pair = lower([node], inputs, ["normed", "sum"], {"w": floats(rng, 24)})
    feeds = {"x": floats(rng, *shape), "r": floats(rng, *shape)}
    for found, expected in zip(pair.find(feeds), pair.expect(feeds), strict=True):
        close(found, expected)


@pytest.mark.parametrize("alpha", [1.0, 1.702])
def test_quick_gelu(alpha: float) -> None:
    node = contrib("QuickGelu", ["x"], ["y"], alpha=alpha)
    pair = lower([node], {"x": (np.float32, (3, 7))}, ["y"])
    feeds = {"x": 4 * floats(np.random.default_rng(2), 3, 7)}
    close(pair.find(feeds)[0], pair.expect(feeds)[0])


# --- rotary embedding --------------------------------------------------------


@pytest.mark.parametrize(("heads", "width"), [(1, 4), (4, 16), (3, 6)])
def test_rotary_embedding(heads: int, width: int) -> None:
    rng = np.random.default_rng(3)
    node = contrib(
        "RotaryEmbedding", ["x", "rows", "cos", "sin"], ["y"], interleaved=0, num_heads=heads
    )
    angles = floats(rng, 40, width // 2)
    inputs = {"x": (np.float32, (2, 5, heads * width)), "rows": (np.int64, (2, 5))}
    tables = {"cos": np.cos(angles), "sin": np.sin(angles)}
    pair = lower([node], inputs, ["y"], tables)
    rows = rng.permutation(40)[:10].reshape(2, 5)
    feeds = {"x": floats(rng, 2, 5, heads * width), "rows": rows}
    close(pair.find(feeds)[0], pair.expect(feeds)[0])


def test_a_rotary_embedding_that_interleaves_is_refused() -> None:
    names = ["x", "rows", "cos", "sin"]
    node = contrib("RotaryEmbedding", names, ["y"], interleaved=1, num_heads=2)
    tables = {"cos": np.ones((9, 4), np.float32), "sin": np.ones((9, 4), np.float32)}
    inputs = {"x": (np.float32, (1, 5, 16)), "rows": (np.int64, (1, 5))}
    with pytest.raises(ExportError, match="RotaryEmbedding interleaves"):
        lower([node], inputs, ["y"], tables)


# --- attention over caches ---------------------------------------------------


@dataclass(frozen=True)
class Attention:
    """Sizes of a grouped attention, and how it is told."""

    query: int = 4
    key: int = 2
    width: int = 16
    rotary: int = 16
    window: int = -1
    packed: bool = True
    scale: float = 0.3
    half: bool = False

    def pair(self) -> Pair:
        """Its graph, mask and lengths made as the exporter makes them."""
        names = ["q"] if self.packed else ["q", "k", "v"]
        nodes = [
            plain("ReduceSum", [MASK, "axis"], "lengths", keepdims=0),
            plain("Sub", ["lengths", "one"], "before"),
            plain("Cast", ["before"], "last", to=TensorProto.INT32),
            plain("Shape", [MASK], "size"),
            plain("Gather", ["size", "one"], "width", axis=0),
            plain("Cast", ["width"], "total", to=TensorProto.INT32),
        ]
        given = [*names, *[""] * (3 - len(names)), KEY, VALUE, "last", "total"]
        if self.rotary:
            given += ["cos", "sin", PLACES]
        further = {} if self.window < 0 else {"local_window_size": self.window}
        nodes.append(
            contrib(
                "GroupQueryAttention",
                given,
                ["y", "present.0.key", "present.0.value"],
                num_heads=self.query,
                kv_num_heads=self.key,
                do_rotary=int(self.rotary > 0),
                rotary_interleaved=0,
                scale=self.scale,
                **further,
            )
        )
        angles = floats(np.random.default_rng(9), 64, max(self.rotary, 2) // 2)
        weights = {
            "axis": np.array([1]),
            "one": np.array(1),
            "cos": np.cos(angles),
            "sin": np.sin(angles),
        }
        cache = ["b", self.key, "past", self.width]
        inputs = {name: (np.float32, ["b", "s", size]) for name, size in self.sizes().items()}
        inputs |= {MASK: (np.int64, ["b", "total"]), PLACES: (np.int64, ["b", "s"])}
        inputs |= {KEY: (np.float32, cache), VALUE: (np.float32, cache)}
        outputs = ["y", "present.0.key", "present.0.value"]
        return lower(nodes, inputs, outputs, weights, half=self.half)

    def sizes(self) -> dict[str, int]:
        """Widths of queries, keys and values, by input."""
        q, k = self.query * self.width, self.key * self.width
        return {"q": q + 2 * k} if self.packed else {"q": q, "k": k, "v": k}

    def feeds(
        self, rng: np.random.Generator, lengths: Sequence[int], new: int, past: int
    ) -> dict[str, Array]:
        """``new`` positions behind up to ``past`` ones, in rows that end at ``lengths``."""
        count, total = len(lengths), past + new
        mask = (np.arange(total) < np.array(lengths)[:, None]).astype(np.int64)
        first = np.maximum(np.array(lengths) - new, 0)
        cached = [floats(rng, count, self.key, past, self.width) for _ in range(2)]
        states = {name: floats(rng, count, new, size) for name, size in self.sizes().items()}
        return {
            **states,
            MASK: mask,
            PLACES: first[:, None] + np.arange(new),
            KEY: cached[0],
            VALUE: cached[1],
        }

    def in_place(self, feeds: dict[str, Array], lengths: Sequence[int], room: int) -> dict:
        """The same with caches of ``room`` places, where nothing is known to stand but NaN."""
        new = feeds[PLACES].shape[1]
        kind = np.float16 if self.half else np.float32
        caches = {}
        for name in (KEY, VALUE):
            old = feeds[name]
            caches[name] = np.full((len(old), self.key, room, self.width), np.nan, kind)
            for row, length in enumerate(lengths):
                kept = max(length - new, 0)
                caches[name][row, :, :kept] = old[row, :, :kept]
        return feeds | caches

    def check(self, lengths: Sequence[int], new: int, past: int, room: int, seed: int = 0) -> None:
        """Compares one run with the kernel, row by row, where a row has positions."""
        pair = self.pair()
        feeds = self.feeds(np.random.default_rng(seed), lengths, new, past)
        expected = pair.expect(feeds)
        given = self.in_place(feeds, lengths, room)
        found = pair.find(given)
        for row, length in enumerate(lengths):
            first = max(length - new, 0)
            real = length - first
            close(found[0][row, :real], expected[0][row, :real], self.half)
            for slot, name in ((1, KEY), (2, VALUE)):
                close(found[slot][row, :, :length], expected[slot][row, :, :length], self.half)
                # Places behind the new positions were not touched.
                behind = first + new
                kept = given[name][row, :, behind:]
                np.testing.assert_array_equal(found[slot][row, :, behind:], kept)


@given(
    heads=st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 2), (3, 1)]),
    width=st.sampled_from([16, 32]),
    partial=st.booleans(),
    turned=st.booleans(),
    packed=st.booleans(),
    window=st.sampled_from([-1, 1, 3, 8]),
    past=st.integers(0, 12),
    new=st.integers(1, 9),
    spare=st.integers(0, 9),
    half=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_group_query_attention(
    heads: tuple[int, int],
    width: int,
    partial: bool,
    turned: bool,
    packed: bool,
    window: int,
    past: int,
    new: int,
    spare: int,
    half: bool,
) -> None:
    # The kernel turns multiples of 16.
    rotary = 0 if not turned else 16 if partial else width
    case = Attention(*heads, width, rotary, window, packed, half=half)
    case.check([past + new], new, past, past + new + spare)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("lengths", [[7, 7], [7, 3, 1, 5], [1, 7]])
def test_prompts_of_different_lengths_are_padded_on_the_right(
    lengths: list[int], half: bool
) -> None:
    Attention(half=half).check(lengths, new=7, past=0, room=16)


@pytest.mark.parametrize("window", [-1, 3])
@pytest.mark.parametrize("lengths", [[9, 9], [9, 4, 1, 6], [2, 9]])
def test_each_row_goes_on_where_it_ends(lengths: list[int], window: int) -> None:
    Attention(window=window).check(lengths, new=1, past=8, room=12)


def test_positions_one_by_one_are_positions_at_once() -> None:
    case, count = Attention(window=4), 11
    pair, rng = case.pair(), np.random.default_rng(5)
    feeds = case.feeds(rng, [count], count, 0)
    whole = pair.expect(feeds)[0]
    caches = {
        name: value
        for name, value in case.in_place(feeds, [count], 16).items()
        if name in (KEY, VALUE)
    }
    for place in range(count):
        one = {
            "q": feeds["q"][:, place : place + 1],
            MASK: np.ones((1, place + 1), np.int64),
            PLACES: np.array([[place]]),
        }
        found, *grown = pair.find(one | caches)
        close(found[0, 0], whole[0, place])
        caches = dict(zip((KEY, VALUE), grown, strict=True))


def test_keys_beyond_float16_are_cut_off_and_stay_numbers() -> None:
    case = Attention(rotary=0, half=True)
    feeds = case.feeds(np.random.default_rng(6), [4], 4, 0)
    feeds["q"] *= 1e6
    _, keys, values = case.pair().find(case.in_place(feeds, [4], 4))
    for grown in (keys, values):
        assert grown.dtype == np.float16
        assert np.isfinite(grown).all()
        assert np.abs(grown).max() == np.float16(6.0e4)


def test_a_cache_in_whole_numbers_is_refused() -> None:
    node = contrib(
        "GroupQueryAttention",
        ["q", "", "", KEY, VALUE, "last", "total"],
        ["y", "present.0.key", "present.0.value"],
        num_heads=2,
        kv_num_heads=2,
        kv_cache_bit_width=8,
    )
    cache = (np.int8, ("b", 2, "past", 8))
    inputs = {"q": (np.float32, (1, 1, 48)), KEY: cache, VALUE: cache}
    inputs |= {"last": (np.int32, (1,)), "total": (np.int32, ())}
    with pytest.raises(ExportError, match="not as int8"):
        lower([node], inputs, ["y"])


# --- attention of towers -----------------------------------------------------


def multi_head(
    given: Mapping[str, tuple[type, Sequence[int | str]]], *, half: bool = False, **more: Any
) -> Pair:
    """MultiHeadAttention over the inputs that are given; a cache makes caches."""
    names = ["query", "key", "value", "bias", "mask", "added", "past_key", "past_value"]
    taken = [name if name in given else "" for name in names]
    while not taken[-1]:
        taken.pop()
    outputs = ["y", "present_key", "present_value"] if "past_key" in given else ["y"]
    node = contrib("MultiHeadAttention", taken, outputs, **more)
    return lower([node], given, outputs, half=half)


@given(
    heads=st.sampled_from([1, 2, 3]),
    width=st.sampled_from([4, 8]),
    queries=st.integers(1, 6),
    keys=st.integers(1, 7),
    masked=st.booleans(),
    biased=st.sampled_from(["", "shared", "own"]),
    scale=st.sampled_from([None, 0.2]),
    half=st.booleans(),
)
@few
def test_multi_head_attention(
    heads: int,
    width: int,
    queries: int,
    keys: int,
    masked: bool,
    biased: str,
    scale: float | None,
    half: bool,
) -> None:
    rng = np.random.default_rng(7)
    size, batch = heads * width, 2
    feeds = {
        "query": floats(rng, batch, queries, size),
        "key": floats(rng, batch, keys, size),
        "value": floats(rng, batch, keys, size),
    }
    if masked:
        feeds["mask"] = rng.integers(0, 2, (batch, keys)).astype(np.int32)
        feeds["mask"][:, rng.integers(keys)] = 1
    if biased:
        of = (1, heads) if biased == "shared" else (batch, heads)
        feeds["added"] = floats(rng, *of, queries, keys)
    more = {"num_heads": heads} | ({} if scale is None else {"scale": scale})
    given = {name: (value.dtype.type, value.shape) for name, value in feeds.items()}
    pair = multi_head(given, half=half, **more)
    close(pair.find(feeds)[0], pair.expect(feeds)[0], half)


@pytest.mark.parametrize(("past", "new"), [(0, 5), (4, 1), (3, 4)])
def test_multi_head_attention_that_looks_back_over_a_cache(past: int, new: int) -> None:
    rng, heads, width = np.random.default_rng(8), 3, 8
    feeds = {name: floats(rng, 2, new, heads * width) for name in ("query", "key", "value")}
    if past:
        feeds |= {f"past_{n}": floats(rng, 2, heads, past, width) for n in ("key", "value")}
    given = {name: (value.dtype.type, value.shape) for name, value in feeds.items()}
    pair = multi_head(given, num_heads=heads, unidirectional=1)
    for found, expected in zip(pair.find(feeds), pair.expect(feeds), strict=True):
        close(found, expected)


def test_multi_head_attention_over_what_was_heard() -> None:
    rng, heads, width = np.random.default_rng(9), 2, 8
    feeds = {
        "query": floats(rng, 1, 3, heads * width),
        "key": floats(rng, 1, heads, 6, width),
        "value": floats(rng, 1, heads, 6, width),
    }
    given = {name: (value.dtype.type, value.shape) for name, value in feeds.items()}
    pair = multi_head(given, num_heads=heads)
    close(pair.find(feeds)[0], pair.expect(feeds)[0])


def test_a_bias_of_projections_is_refused() -> None:
    given = dict.fromkeys(("query", "key", "value"), (np.float32, (1, 3, 8)))
    given["bias"] = (np.float32, (24,))
    with pytest.raises(ExportError, match="bias of its projections"):
        multi_head(given, num_heads=2)


# --- matrices in whole numbers -----------------------------------------------


def packed(
    rng: np.random.Generator, rows: int, columns: int, form: MatrixFormat
) -> dict[str, Array]:
    """Random bytes of a matrix (rows, columns), as the kernel takes them."""
    blocks = -(-columns // form.block)
    values = rng.integers(0, 256, (rows, blocks, form.block * form.bits // 8)).astype(np.uint8)
    scales = rng.uniform(0.01, 0.05, (rows, blocks)).astype(np.float32)
    found = {"w": values, "scales": scales.reshape(-1)}
    if not form.symmetric:
        zeros = rng.integers(0, 256, (rows, -(-blocks * form.bits // 8)))
        found["zeros"] = zeros.astype(np.uint8).reshape(-1)
    return found


@given(
    bits=st.sampled_from([4, 8]),
    symmetric=st.booleans(),
    block=st.sampled_from([16, 32]),
    columns=st.sampled_from([16, 32, 40, 64, 72, 96, 160]),
    rows=st.sampled_from([1, 2, 7, 24]),
    biased=st.booleans(),
    release=st.sampled_from([OLDEST, NEWEST]),
    half=st.booleans(),
)
@few
def test_mat_mul_n_bits(
    bits: int,
    symmetric: bool,
    block: int,
    columns: int,
    rows: int,
    biased: bool,
    release: Release,
    half: bool,
) -> None:
    rng = np.random.default_rng(10)
    weights = packed(rng, rows, columns, MatrixFormat(bits, block, symmetric))
    names = ["x", "w", "scales", "" if symmetric else "zeros"]
    if biased:
        names += ["", "bias"]
        weights["bias"] = floats(rng, rows)
    more = {"K": columns, "N": rows, "bits": bits, "block_size": block, "accuracy_level": 0}
    node = contrib("MatMulNBits", names, ["y"], **more)
    pair = lower(
        [node], {"x": (np.float32, (2, 3, columns))}, ["y"], weights, release=release, half=half
    )
    feeds = {"x": floats(rng, 2, 3, columns)}
    expected = pair.expect(feeds)[0]
    found = pair.find(feeds)[0]
    # Of what is added up, not of the sum, half precision rounds a share.
    reach = np.abs(expected).max() * (0.01 if half else 1e-5)
    np.testing.assert_allclose(found, expected, atol=max(reach, 2e-5))
    kept = [tensor.data_type for tensor in pair.lowered.graph.initializer]
    whole = TensorProto.INT4 if bits == 4 else TensorProto.INT8
    fits = symmetric and columns % block == 0 and release is NEWEST
    assert (whole in kept) is fits


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_blocks_mean_what_onnx_says_they_mean(bits: int, half: bool) -> None:
    # By ONNX's own reference: the order of half bytes and the axis of the blocks.
    rng, form = np.random.default_rng(11), MatrixFormat(bits, 16, symmetric=True)
    weights = packed(rng, 6, 48, form)
    plain_weight = dequantize(Packed(weights["w"], weights["scales"].reshape(6, 3), None), form, 48)
    more = {"K": 48, "N": 6, "bits": bits, "block_size": 16, "accuracy_level": 0}
    node = contrib("MatMulNBits", ["x", "w", "scales"], ["y"], **more)
    pair = lower([node], {"x": (np.float32, (1, 2, 48))}, ["y"], weights, half=half)
    x = floats(rng, 1, 2, 48)
    with tempfile.TemporaryDirectory() as folder:
        for name, data in pair.weights.items():
            (Path(folder) / name).write_bytes(data)
        path = Path(folder) / "graph.onnx"
        path.write_bytes(pair.lowered.SerializeToString())
        found = ReferenceEvaluator(onnx.load(str(path))).run(None, {"x": x})[0]
    expected = x @ plain_weight.T
    reach = np.abs(expected).max() * (0.01 if half else 1e-5)
    np.testing.assert_allclose(found, expected, atol=reach)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("sign", [0.0, -1.0])
def test_scales_that_are_not_above_0_mean_what_they_say(bits: int, sign: float) -> None:
    # TensorRT takes none that are negative, and rounding to the furthest weight makes them.
    rng = np.random.default_rng(18)
    weights = packed(rng, 6, 64, MatrixFormat(bits, 32, symmetric=True))
    weights["scales"][::2] *= sign
    more = {"K": 64, "N": 6, "bits": bits, "block_size": 32, "accuracy_level": 0}
    node = contrib("MatMulNBits", ["x", "w", "scales"], ["y"], **more)
    pair = lower([node], {"x": (np.float32, (1, 3, 64))}, ["y"], weights)
    feeds = {"x": floats(rng, 1, 3, 64)}
    close(pair.find(feeds)[0], pair.expect(feeds)[0])
    for node in pair.lowered.graph.node:
        if node.op_type == "DequantizeLinear":
            scales = next(t for t in pair.lowered.graph.initializer if t.name == node.input[1])
            place = {entry.key: int(entry.value) for entry in scales.external_data[1:]}
            data = pair.weights["weights.onnx.data"][place["offset"] :][: place["length"]]
            assert (np.frombuffer(data, np.float32) > 0).all()


@pytest.mark.parametrize("half", [False, True])
def test_products_of_rows_do_not_round_their_inputs(tmp_path: Path, half: bool) -> None:
    rng = np.random.default_rng(12)
    weight, x = floats(rng, 24, 32), floats(rng, 1, 4, 32)
    # Far from the others, it sets the scale by which the kernel's inputs are rounded.
    x[0, 0, 0] = 50.0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        g = GraphBuilder("test")
        g.input("x", FLOAT, ["b", "s", 32])
        with WeightStore(folder / "source.data") as store:
            matrix = store_linear(store, weight, ROWS)
            made = linear(g, "x", matrix, "layer")
            g.op("Identity", [made], scope="layer", outputs=["y"])
            g.output("y", FLOAT, ["b", "s", 24])
        g.save(folder / "source.onnx")
        source = onnx.load(str(folder / "source.onnx"))
    pair = lower_model(source, half=half)
    step = np.abs(weight).max(axis=1) / 127
    kept = np.rint(weight / step[:, None]) * step[:, None]
    found, expected = pair.find({"x": x})[0], x @ kept.T
    np.testing.assert_allclose(found, expected, atol=0.2 if half else 1e-4)
    rounded = pair.expect({"x": x})[0]
    assert np.abs(rounded - expected).max() > 10 * np.abs(found - expected).max()
    left = {node.op_type for node in pair.lowered.graph.node}
    assert left <= {"DequantizeLinear", "MatMul", "Cast", "Identity"}
    # Nor does the runtime when it runs what was lowered, so that it shows what TensorRT computes.
    (tmp_path / "graph.onnx").write_bytes(pair.lowered.SerializeToString())
    for name, data in pair.weights.items():
        (tmp_path / name).write_bytes(data)
    own = Session(tmp_path / "graph.onnx", threads=1).run({"x": x})["y"]
    np.testing.assert_allclose(own, expected, atol=0.2 if half else 1e-4)


def test_a_product_of_values_that_came_rounded_is_refused() -> None:
    weights = {
        "w": np.ones((8, 4), np.int8),
        "one": np.ones(1, np.float32),
        "scales": np.ones(4, np.float32),
    }
    node = contrib("MatMulIntegerToFloat", ["x", "w", "one", "scales"], ["y"])
    with pytest.raises(ExportError, match="something else than values it has rounded"):
        lower([node], {"x": (np.uint8, (2, 8))}, ["y"], weights)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_gather_block_quantized(bits: int, symmetric: bool, half: bool) -> None:
    rng, rows, columns, block = np.random.default_rng(13), 50, 96, 32
    weights = packed(rng, rows, columns, MatrixFormat(bits, block, symmetric))
    weights["w"] = weights["w"].reshape(rows, -1)
    weights["scales"] = weights["scales"].reshape(rows, -1)
    names = ["w", "ids", "scales"]
    if not symmetric:
        weights["zeros"] = weights["zeros"].reshape(rows, -1)
        names.append("zeros")
    more = {"bits": bits, "block_size": block, "gather_axis": 0, "quantize_axis": 1}
    node = contrib("GatherBlockQuantized", names, ["y"], **more)
    pair = lower([node], {"ids": (np.int64, ("b", "s"))}, ["y"], weights, half=half)
    feeds = {"ids": rng.integers(0, rows, (2, 7))}
    close(pair.find(feeds)[0], pair.expect(feeds)[0], half)


# --- weights in 16 bits ------------------------------------------------------


def test_products_with_weights_in_16_bits_are_made_in_16_bits() -> None:
    rng = np.random.default_rng(14)
    weights = {
        "w": floats(rng, 80, 40).astype(np.float16),
        "v": floats(rng, 60, 40).astype(np.float16),
        "b": floats(rng, 60),
    }
    nodes = [
        plain("Cast", ["w"], "w32", to=FLOAT),
        plain("Cast", ["v"], "v32", to=FLOAT),
        plain("MatMul", ["x", "w32"], "y"),
        plain("Gemm", ["y", "v32", "b"], "z", transB=1),
    ]
    given = {"x": (np.float32, (5, 80))}
    feeds = {"x": floats(rng, 5, 80)}
    pair = lower(nodes, given, ["z"], weights, half=True)
    expected = pair.expect(feeds)[0]
    np.testing.assert_allclose(pair.find(feeds)[0], expected, atol=0.005 * np.abs(expected).max())
    types = value_types(pair.lowered)
    for node in pair.lowered.graph.node:
        if node.op_type in ("MatMul", "Gemm"):
            assert {types[name] for name in node.input} == {TensorProto.FLOAT16}
        elif node.op_type == "Add":
            assert {types[name] for name in node.input} == {FLOAT}
    exact = lower(nodes, given, ["z"], weights, half=False)
    close(exact.find(feeds)[0], expected)
    made = value_types(exact.lowered)
    assert {made[n.output[0]] for n in exact.lowered.graph.node if n.op_type != "Cast"} == {FLOAT}


def test_a_weight_in_16_bits_that_others_read_is_float32_to_them() -> None:
    rng = np.random.default_rng(15)
    table = floats(rng, 60, 40).astype(np.float16)
    nodes = [
        plain("Cast", ["table"], "table32", to=FLOAT),
        plain("Gather", ["table32", "ids"], "rows"),
        plain("Gemm", ["rows", "table32"], "y", transB=1),
    ]
    pair = lower(nodes, {"ids": (np.int64, (3,))}, ["rows", "y"], {"table": table}, half=True)
    rows, product = pair.find({"ids": np.array([3, 0, 59])})
    assert rows.dtype == product.dtype == np.float32
    np.testing.assert_array_equal(rows, table[[3, 0, 59]].astype(np.float32))
    # The bytes stand in the file once.
    assert [len(data) for data in pair.weights.values()] == [table.nbytes]


def value_types(model: onnx.ModelProto) -> dict[str, int]:
    """Element types by name, by ONNX's own inference."""
    inferred = onnx.shape_inference.infer_shapes(model).graph
    values = itertools.chain(inferred.value_info, inferred.input, inferred.output)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    return types | {tensor.name: tensor.data_type for tensor in inferred.initializer}


# --- the graph as a whole ----------------------------------------------------


def test_an_unknown_operator_is_named() -> None:
    node = contrib("FastGelu", ["x"], ["y"])
    with pytest.raises(ExportError, match="FastGelu of graph test has no form that TensorRT reads"):
        lower([node], {"x": (np.float32, (2, 3))}, ["y"])


def test_an_operator_that_nobody_needs_is_not_looked_at() -> None:
    nodes = [contrib("FastGelu", ["x"], ["unused"]), plain("Neg", ["x"], "y")]
    pair = lower(nodes, {"x": (np.float32, (2, 3))}, ["y"])
    assert [node.op_type for node in pair.lowered.graph.node] == ["Neg"]


def test_weights_that_nobody_reads_go() -> None:
    rng = np.random.default_rng(16)
    weights = {"w": floats(rng, 40, 40), "other": floats(rng, 40, 40)}
    nodes = [plain("MatMul", ["x", "w"], "y"), plain("MatMul", ["x", "other"], "unused")]
    pair = lower(nodes, {"x": (np.float32, (2, 40))}, ["y"], weights)
    assert [tensor.name for tensor in pair.lowered.graph.initializer] == ["w"]
    assert [len(data) for data in pair.weights.values()] == [weights["w"].nbytes]


def condition(name: str) -> tuple[onnx.NodeProto, dict[str, Array]]:
    """An If whose first side doubles x and whose second gives it back."""
    sides = {}
    for side, kind, inputs in (("then", "Add", ["x", "x"]), ("else", "Identity", ["x"])):
        made = helper.make_tensor_value_info(f"{side}/y", FLOAT, None)
        sides[f"{side}_branch"] = helper.make_graph(
            [plain(kind, inputs, f"{side}/y")], side, [], [made]
        )
    node = helper.make_node("If", ["some"], ["y"], name=name, **sides)
    return node, {"some": np.array(False)}


@pytest.mark.parametrize("name", ["gate/If", "early/If", "tail/If", "layers.3.spans/If"])
def test_of_a_known_condition_the_first_side_stays(name: str) -> None:
    node, weights = condition(name)
    pair = lower([node], {"x": (np.float32, (3,))}, ["y"], weights)
    x = floats(np.random.default_rng(17), 3)
    close(pair.find({"x": x})[0], 2 * x)


@pytest.mark.parametrize("name", ["other/If", "gates/If", "spans/If"])
def test_an_unknown_condition_is_refused(name: str) -> None:
    node, weights = condition(name)
    with pytest.raises(ExportError, match=f"{name} of graph test is none that can be left out"):
        lower([node], {"x": (np.float32, (3,))}, ["y"], weights)
