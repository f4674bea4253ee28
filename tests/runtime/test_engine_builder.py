"""Plans, memory, versions, and builds that cannot start on this machine."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_safe.errors import BundleError, ProviderError
from edge_safe.runtime.bundle import open_bundle
from edge_safe.runtime.engines import memory
from edge_safe.runtime.engines.builder import (
    engine_source,
    engines_folder,
    obtain_engine,
)
from edge_safe.runtime.engines.device import (
    driver_version,
    first_gpu,
    free_on_card,
    tensorrt_version,
    this_device,
)
from edge_safe.runtime.engines.key import Device
from edge_safe.runtime.engines.plan import EnginePlan, Profile, Range, provider_options
from edge_safe.runtime.engines.store import EngineStore
from edge_safe.runtime.manifest import Tensor

MB = 2**20

DEVICE = Device("1.23.2", "10.3.0", "540.4.0", "Orin", "8.7")

PREFILL = Profile(
    {"x": Range((1, 1, 64), (1, 128, 64), (1, 512, 64)), "n": Range((1,), (1,), (1,))}
)
DECODE = Profile({"x": Range((1, 1, 64), (1, 1, 64), (1, 2, 64)), "n": Range((1,), (1,), (1,))})

# Holds a lock for a second.
HOLD = """
import sys, time
from pathlib import Path
from edge_safe.runtime.engines.lock import locked
with locked(Path(sys.argv[1]), 1.0, print):
    print("held", flush=True)
    time.sleep(1.0)
"""

NVIDIA_SMI = shutil.which("nvidia-smi")


def silent(step: str, share: float) -> None:
    pass


def test_profiles_are_written_one_after_the_other() -> None:
    options = provider_options(EnginePlan((PREFILL, DECODE), fp16=True))
    assert options == {
        "trt_profile_min_shapes": "n:1,x:1x1x64,n:1,x:1x1x64",
        "trt_profile_opt_shapes": "n:1,x:1x128x64,n:1,x:1x1x64",
        "trt_profile_max_shapes": "n:1,x:1x512x64,n:1,x:1x2x64",
        "trt_fp16_enable": "1",
        "trt_layer_norm_fp32_fallback": "1",
        "trt_int8_enable": "0",
    }


def profile(name: str, *shapes: list[int]) -> dict[str, object]:
    """A profile of one input as it stands in the manifest."""
    return {"shapes": {name: dict(zip(("min", "opt", "max"), shapes, strict=True))}}


@pytest.mark.parametrize(
    ("document", "what"),
    [
        ({"profiles": []}, "at least one profile"),
        ({"profiles": [profile("x", [1], [1], [1]), profile("y", [1], [1], [1])]}, "different"),
        ({"profiles": [profile("x", [2], [1], [3])]}, "min <= opt"),
        ({"profiles": [profile("x", [-1], [1], [3])]}, "0 <= min"),
        ({"profiles": [profile("x", [1], [1, 1], [1])]}, "length"),
        ({"profiles": [profile("x:y", [1], [1], [1])]}, "cannot be called"),
        ({"profiles": [profile("x", [1], [1], [1])], "fp8": True}, "unknown field"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(document: dict[str, object], what: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=what):
        msgspec.json.decode(json.dumps(document), type=EnginePlan)


def test_a_plan_survives_the_manifest() -> None:
    plan = EnginePlan((PREFILL, DECODE), fp16=True)
    assert msgspec.json.decode(msgspec.json.encode(plan), type=EnginePlan) == plan


def test_inputs_take_what_the_largest_profile_needs() -> None:
    inputs = [
        Tensor("x", "float16", [1, "length", 64]),
        Tensor("n", "int64", ["one"]),
        Tensor("flags", "bool", [10]),
    ]
    assert memory.input_bytes(inputs, EnginePlan((DECODE, PREFILL))) == 512 * 64 * 2 + 8 + 10


def test_an_input_that_varies_without_a_profile_is_an_error() -> None:
    with pytest.raises(BundleError, match="'y' varies in shape"):
        memory.input_bytes([Tensor("y", "float32", [1, "length"])], EnginePlan((PREFILL,)))


@pytest.mark.parametrize("graph", ["gate", "decoder", "embed_tokens"])
def test_weights_are_those_of_the_graph_alone(bundle_folder: Path, graph: str) -> None:
    path = bundle_folder / f"{graph}.onnx"
    model = onnx.load(path, load_external_data=False)
    outside = [
        int(entry.value)
        for tensor in model.graph.initializer
        for entry in tensor.external_data
        if entry.key == "length"
    ]
    assert outside
    assert memory.weight_bytes(path.read_bytes()) == path.stat().st_size + sum(outside)


def test_a_graph_that_is_no_graph_has_no_weights() -> None:
    with pytest.raises(BundleError, match="well-formed"):
        memory.weight_bytes(b"\x3a\x7fnot an ONNX file")


def test_this_machine_tells_what_is_free() -> None:
    free = memory.available()
    assert free is not None
    told = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    total = sum(int(told[name].split()[0]) * 1024 for name in ("MemTotal", "SwapTotal"))
    assert 0 < free <= total


def write(root: Path, files: dict[str, str]) -> Path:
    """Files of the kernel below a folder."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MEMINFO = "MemTotal: 8000000 kB\nMemFree: 1000 kB\nMemAvailable: 4096000 kB\nSwapFree: 1024000 kB\n"


def test_swap_counts_as_memory(tmp_path: Path) -> None:
    assert memory.available(write(tmp_path, {"proc/meminfo": MEMINFO})) == 5000 * MB


def test_what_the_system_does_not_tell_is_not_known(tmp_path: Path) -> None:
    assert memory.available(tmp_path) is None


def test_the_tightest_control_group_counts(tmp_path: Path) -> None:
    groups = "sys/fs/cgroup"
    root = write(
        tmp_path,
        {
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": "0::/app.slice/mine\n",
            f"{groups}/app.slice/memory.max": f"{600 * MB}\n",
            f"{groups}/app.slice/memory.current": f"{300 * MB}\n",
            f"{groups}/app.slice/memory.stat": f"anon 1\ninactive_file {100 * MB}\n",
            f"{groups}/app.slice/mine/memory.max": "max\n",
            f"{groups}/app.slice/mine/memory.current": f"{200 * MB}\n",
            f"{groups}/app.slice/mine/memory.stat": "anon 1\ninactive_file 0\n",
        },
    )
    assert memory.available(root) == 400 * MB


def test_a_container_that_sees_its_group_as_the_root_has_its_limit(tmp_path: Path) -> None:
    groups = "sys/fs/cgroup/memory"
    root = write(
        tmp_path,
        {
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": "5:cpu,cpuacct:/docker/1\n4:memory:/docker/1\n0::/\n",
            f"{groups}/memory.limit_in_bytes": f"{500 * MB}\n",
            f"{groups}/memory.usage_in_bytes": f"{100 * MB}\n",
            f"{groups}/memory.stat": f"cache 1\ntotal_inactive_file {50 * MB}\n",
        },
    )
    assert memory.available(root) == 450 * MB


NEED = memory.Need(weights=300 * MB, inputs=100 * MB)


def test_too_little_memory_names_both_figures_and_a_way_out() -> None:
    with pytest.raises(BundleError, match=r"about 1600 MB .* 1599 MB are free.*swap"):
        memory.require(NEED, 1600 * MB - 1, None)


def test_too_little_on_the_card_is_said_apart() -> None:
    with pytest.raises(BundleError, match=r"at least 400 MB of the GPU's memory.* 399 MB"):
        memory.require(NEED, 1600 * MB, 400 * MB - 1)


@given(st.one_of(st.none(), st.integers(1600 * MB)), st.one_of(st.none(), st.integers(400 * MB)))
def test_enough_memory_is_enough(system: int | None, card: int | None) -> None:
    memory.require(NEED, system, card)


def plan_for(bundle: Path, graph: str, largest: int) -> EnginePlan:
    """A plan in which every size that may vary goes up to a number."""
    shapes = {}
    for tensor in open_bundle(bundle, provider="cpu").manifest.graphs[graph].inputs:
        if any(isinstance(size, str) for size in tensor.shape):
            low, best, high = (
                tuple(size if isinstance(size, int) else value for size in tensor.shape)
                for value in (1, min(8, largest), largest)
            )
            shapes[tensor.name] = Range(low, best, high)
    return EnginePlan((Profile(shapes),))


def test_the_key_has_the_hashes_of_graph_and_weights(bundle_folder: Path) -> None:
    bundle = open_bundle(bundle_folder, provider="cpu")
    source = engine_source(bundle, "gate", plan_for(bundle_folder, "gate", 16))
    expected = {
        name: bundle.manifest.files[name].sha256 for name in ("gate.onnx", "weights.onnx.data")
    }
    assert source.key(DEVICE).files == expected


def test_too_little_memory_is_said_before_the_build_starts(
    bundle_folder: Path, tmp_path: Path
) -> None:
    bundle = open_bundle(bundle_folder, provider="cpu")
    source = engine_source(bundle, "gate", plan_for(bundle_folder, "gate", 10**6))
    store = EngineStore(tmp_path / "engines")
    steps: list[str] = []
    with pytest.raises(BundleError, match="MB are free"):
        obtain_engine(store, source, DEVICE, lambda step, share: steps.append(step))
    assert steps == []
    assert list(store.folder.iterdir()) == []


@pytest.mark.skipif(NVIDIA_SMI is not None, reason="this machine may have TensorRT")
def test_a_build_without_tensorrt_is_an_error_and_leaves_nothing(
    bundle_folder: Path, tmp_path: Path
) -> None:
    bundle = open_bundle(bundle_folder, provider="cpu")
    source = engine_source(bundle, "gate", plan_for(bundle_folder, "gate", 16))
    store = EngineStore(tmp_path / "engines")
    with pytest.raises(ProviderError):
        obtain_engine(store, source, DEVICE, silent)
    assert list(store.folder.iterdir()) == []


@pytest.mark.skipif(NVIDIA_SMI is not None, reason="this machine may have TensorRT")
def test_a_build_waits_for_that_of_another_engine(bundle_folder: Path, tmp_path: Path) -> None:
    bundle = open_bundle(bundle_folder, provider="cpu")
    store = EngineStore(tmp_path / "engines")
    store.folder.mkdir()
    steps: list[str] = []
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, store.folder / ".building.lock"], stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(ProviderError):
            obtain_engine(
                store,
                engine_source(bundle, "gate", plan_for(bundle_folder, "gate", 16)),
                DEVICE,
                lambda step, share: steps.append(step),
            )
    assert steps[0] == f"waiting for process {other.pid}, which builds another engine"
    assert "building the engine" in steps[-1]


@pytest.mark.skipif(NVIDIA_SMI is not None, reason="this machine may have TensorRT")
def test_a_device_without_tensorrt_says_what_to_install() -> None:
    with pytest.raises(ProviderError, match="install"):
        this_device()


def test_a_tensorrt_that_is_missing_is_named() -> None:
    with pytest.raises(ProviderError, match=r"libnvinfer\.so\.9 \(TensorRT\) is missing"):
        tensorrt_version(("libnvinfer.so.9",))  # a release that never was


def test_the_version_is_the_one_that_the_library_tells() -> None:
    rtx = pytest.importorskip("tensorrt_rtx")
    folder = Path(pytest.importorskip("tensorrt_rtx_libs").__file__).parent
    (library,) = folder.glob("libtensorrt_rtx.so*")
    assert rtx.__version__.startswith(f"{tensorrt_version([str(library)])}.")


def test_the_driver_is_that_of_the_kernel_and_of_the_jetson(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX Open Kernel Module for "
            "aarch64  540.4.0  Release Build  (buildbrain@mobile)\nGCC version: 9.3.0\n",
            "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: "
            "generic, EABI: aarch64, DATE: Wed Jan  8 01:49:37 UTC 2025\n",
        },
    )
    assert driver_version(root) == "540.4.0, Jetson Linux 36.4.3"


@pytest.mark.skipif(NVIDIA_SMI is None, reason="needs an NVIDIA GPU")
def test_gpu_driver_and_free_memory_are_those_that_nvidia_smi_tells() -> None:
    query = "name,compute_cap,driver_version,memory.free"
    done = subprocess.run(
        [str(NVIDIA_SMI), f"--query-gpu={query}", "--format=csv,noheader,nounits"],
        capture_output=True,
        text=True,
        check=True,
    )
    name, capability, driver, free = done.stdout.splitlines()[0].split(", ")
    gpu = first_gpu()
    assert gpu is not None
    assert (gpu.name, gpu.compute_capability, driver_version()) == (name, capability, driver)
    assert not gpu.integrated
    assert free_on_card(gpu) == pytest.approx(int(free) * MB, abs=64 * MB)


def test_engines_are_kept_in_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EDGE_SAFE_CACHE", str(tmp_path))
    assert engines_folder() == tmp_path / "engines"
    monkeypatch.delenv("EDGE_SAFE_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert engines_folder() == tmp_path / ".cache" / "edge-safe" / "engines"
