"""`doctor` and what stands behind it: libraries, Jetsons, starts in a process of their own.

No GPU is needed: a machine without one is the case that has to be explained. What a Jetson says is
read from files in its own format.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edge_safe.cli.doctor import asking, basics, nvidia, providers
from edge_safe.cli.doctor.asking import Answer, ask
from edge_safe.cli.doctor.check import Check
from edge_safe.cli.doctor.child import GRAPH
from edge_safe.runtime import library_table
from edge_safe.runtime.jetson import GENERATIONS, Jetson, this_jetson
from edge_safe.runtime.libraries import advice, diagnose, how_to_get
from edge_safe.runtime.library_table import LIBRARIES, file_name, install_command, library_named

ROOT = Path(__file__).parents[2]

# The first line of /etc/nv_tegra_release.
RELEASE = "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64, DATE: …\n"
ORIN = Jetson("36.4.3", GENERATIONS[36])
THOR = Jetson("39.2", GENERATIONS[39])

# What onnxruntime-gpu 1.31.1 prints on a machine without CUDA.
NO_CUBLAS = (
    "Failed to load library /venv/onnxruntime/capi/libonnxruntime_providers_cuda.so with error: "
    "libcublasLt.so.13: cannot open shared object file: No such file or directory"
)


def names(checks: list[Check]) -> list[str]:
    return [check.name for check in checks]


def named(checks: list[Check], name: str) -> Check:
    return next(check for check in checks if check.name == name)


# --- which machine this is -------------------------------------------------------------------


def test_a_jetson_is_known_by_its_release(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/nv_tegra_release").write_text(RELEASE)
    jetson = this_jetson(tmp_path)
    assert jetson == ORIN
    assert str(jetson) == "JetPack 6 (Jetson Linux 36.4.3)"


def test_a_jetson_is_known_inside_a_container_too(tmp_path: Path) -> None:
    (tmp_path / "proc/device-tree").mkdir(parents=True)
    compatible = b"nvidia,p3768-0000+p3767-0005\0nvidia,p3767-0005\0nvidia,tegra234\0"
    (tmp_path / "proc/device-tree/compatible").write_bytes(compatible)
    assert this_jetson(tmp_path) == Jetson("", None)


def test_any_other_machine_is_no_jetson(tmp_path: Path) -> None:
    (tmp_path / "proc/device-tree").mkdir(parents=True)
    (tmp_path / "proc/device-tree/compatible").write_bytes(b"raspberrypi,5-model-b\0brcm,bcm2712\0")
    assert this_jetson(tmp_path) is None


# --- what a failed start means ---------------------------------------------------------------


def test_a_missing_library_is_named_with_the_package_that_brings_it() -> None:
    assert advice("cuda", NO_CUBLAS) == (
        "libcublasLt.so.13 (cuBLAS) is missing: pip install nvidia-cublas."
    )


def test_advice_on_advice_stays_the_same() -> None:
    once = advice("cuda", NO_CUBLAS)
    assert advice("cuda", once) == once


@pytest.mark.parametrize(
    ("message", "jetson", "what", "remedy"),
    [
        (NO_CUBLAS, None, "libcublasLt.so.13 (cuBLAS)", "pip install nvidia-cublas"),
        (NO_CUBLAS, THOR, "libcublasLt.so.13", "sudo apt install nvidia-jetpack"),
        (NO_CUBLAS, ORIN, "built for CUDA 13, and JetPack 6", "was built for Jetson"),
        ("libcublas.so.12: cannot open shared object file", None, "cuBLAS", "nvidia-cublas-cu12"),
        (
            "libcudnn_graph.so.9: cannot open shared object file; needs CUDA 13.*",
            None,
            "libcudnn_graph.so.9 (cuDNN)",
            "pip install nvidia-cudnn-cu13",
        ),
        (
            "libnvinfer.so.10: cannot open shared object file; CUDA 13",
            None,
            "TensorRT",
            "pip install 'tensorrt-cu13==10.*' --extra-index-url",
        ),
        (
            "libnvinfer.so.10: cannot open shared object file; CUDA 12",
            ORIN,
            "TensorRT",
            "nvidia-jetpack",
        ),
        ("libcuda.so.1: cannot open shared object file", None, "driver", "--gpus all"),
        ("libcuda.so.1: cannot open shared object file", ORIN, "driver", "--runtime nvidia"),
        ("Unable to dlopen libcuda.so.1 : ", None, "libcuda.so.1", "driver"),
        (
            "libgomp.so.1: cannot open shared object file",
            None,
            "libgomp.so.1",
            "that holds libgomp",
        ),
        ("CUDA failure 35: CUDA driver version is insufficient", None, "too old", "580"),
        ("CUDA failure 209: no kernel image is available", None, "no kernels", "capability"),
        ("CUDA failure 209: no kernel image is available", THOR, "no kernels", "for Jetson"),
        ("CUDA failure 100: no CUDA-capable device is detected", None, "no GPU", "nvidia-smi"),
        ("CUDA failure 2: out of memory", None, "too little memory", "smaller bundle"),
        (
            "/lib/libm.so.6: version `GLIBC_2.38' not found (required by x.so)",
            None,
            "asks for GLIBC_2.38",
            "older onnxruntime",
        ),
        (
            "libonnxruntime_providers_cuda.so: undefined symbol: cublasLtMatmulDescDestroy",
            None,
            "cublasLtMatmulDescDestroy",
            "all of one release",
        ),
        ("Please install TensorRT libraries as mentioned", None, "TensorRT", "tensorrt-cu13"),
        ("Please install TensorRT libraries as mentioned", ORIN, "TensorRT", "nvidia-jetpack"),
    ],
)
def test_words_of_a_failure_lead_to_a_remedy(
    message: str, jetson: Jetson | None, what: str, remedy: str
) -> None:
    found = diagnose(message, jetson)
    assert found is not None
    assert what in found.what
    assert remedy in found.remedy


def test_without_a_number_the_cuda_of_the_installed_onnxruntime_decides(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package = tmp_path / "onnxruntime/capi"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / "build_and_package_info.py").write_text(
        "package_name = 'onnxruntime-gpu'\n__version__ = '1.23.2'\ncuda_version = '12.8'\n"
    )
    code = (
        "from edge_safe.runtime.libraries import diagnose\n"
        "print(diagnose('libcurand.so.10: cannot open shared object file', None).remedy)"
    )
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.strip() == "pip install nvidia-curand-cu12"


def test_words_that_nobody_knows_are_not_explained_away() -> None:
    assert diagnose("something new", None) is None
    assert "did not say why" in advice("cuda", "something new")


@pytest.mark.parametrize(
    ("provider", "jetson", "machine", "words"),
    [
        ("cuda", None, "x86_64", "edge-safe[gpu]"),
        ("cuda", ORIN, "aarch64", "built for Jetson"),
        ("tensorrt", None, "aarch64", "build onnxruntime with TensorRT"),
        ("tensorrt-rtx", THOR, "aarch64", "--provider tensorrt"),
        ("tensorrt-rtx", None, "x86_64", "edge-safe[tensorrt-rtx]"),
    ],
)
def test_a_provider_that_is_not_there_is_got_by_platform(
    provider: str, jetson: Jetson | None, machine: str, words: str
) -> None:
    assert words in how_to_get(provider, jetson, machine)


# --- the table of libraries ------------------------------------------------------------------


def test_every_library_of_the_table_is_found_by_its_file_name() -> None:
    for row in LIBRARIES:
        stem = row.stem.replace("*", "")
        assert library_named(stem) is row, stem
    assert library_named("libcudnn_engines_precompiled") is library_named("libcudnn")
    assert library_named("libm") is None


def test_one_command_brings_several_libraries_once() -> None:
    wanted = [row for row in LIBRARIES if row.what in ("cuBLAS", "cuRAND", "NVIDIA's driver")]
    assert install_command(wanted, 13) == "pip install nvidia-cublas nvidia-curand"
    driver = [row for row in LIBRARIES if row.stem == library_table.DRIVER_STEM]
    assert install_command(driver, 13) == ""


def test_the_table_names_what_the_installed_providers_are_linked_to() -> None:
    """Skipped with the CPU's wheel: it has no provider to look at."""
    import onnxruntime

    library = Path(onnxruntime.__file__).parent / "capi/libonnxruntime_providers_tensorrt.so"
    if not library.is_file() or shutil.which("readelf") is None:
        pytest.skip("this onnxruntime has no TensorRT provider")
    printed = subprocess.run(["readelf", "-d", library], capture_output=True, text=True).stdout
    linked = [line.split("[")[1].rstrip("]\n") for line in printed.splitlines() if "NEEDED" in line]
    known = {file_name(row, 13) for row in LIBRARIES}
    nvidia_files = [file for file in linked if file.startswith(("libcu", "libnv"))]
    assert [file for file in nvidia_files if file not in known] == []


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs a C compiler")
def test_libraries_of_python_packages_are_found_by_name_once_they_are_loaded(
    tmp_path: Path,
) -> None:
    place = tmp_path / "nvidia/cu13/lib"
    place.mkdir(parents=True)
    (tmp_path / "s.c").write_text("int cublas_here;\n")
    name = "libcublas.so.13"
    subprocess.run(
        ["gcc", "-shared", f"-Wl,-soname,{name}", "-o", place / name, tmp_path / "s.c"], check=True
    )
    info = tmp_path / "onnxruntime/capi/build_and_package_info.py"
    info.parent.mkdir(parents=True)
    (tmp_path / "onnxruntime/__init__.py").touch()
    info.write_text("cuda_version = '13.0'\n")
    code = (
        "import ctypes\n"
        "from edge_safe.runtime.packaged_libraries import load_packaged_libraries\n"
        "print([path.name for path in load_packaged_libraries('cuda')])\n"
        f"print(ctypes.c_int.in_dll(ctypes.CDLL({name!r}), 'cublas_here').value)\n"
    )
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert done.stdout.splitlines() == ["['libcublas.so.13']", "0"], done.stderr


# --- the process apart -----------------------------------------------------------------------


def test_the_start_check_is_a_graph_of_two_operators() -> None:
    onnx = pytest.importorskip("onnx")
    model = onnx.load_from_string(GRAPH)
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node] == ["MatMul", "Add"]
    assert model.ir_version == 8
    assert [opset.version for opset in model.opset_import] == [17]


def test_the_cpu_starts_and_says_what_onnxruntime_holds() -> None:
    document = ask("start", "cpu").document
    assert document is not None
    assert document["started"]
    assert document["names"]["cpu"] == "CPUExecutionProvider"


def test_a_provider_that_is_not_compiled_in_is_not_started() -> None:
    import onnxruntime

    if "NvTensorRTRTXExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has it")
    document = ask("start", "tensorrt-rtx").document
    assert document is not None
    assert not document["started"]


def test_looking_for_libraries_tells_of_each_one() -> None:
    document = ask("look").document
    assert document is not None
    assert {"libcuda.so.1", "libcudnn.so.9", "libnvinfer.so.10"} <= set(document["libraries"])


@pytest.fixture
def crashing_child(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "crashes.py").write_text(
        "import os, signal, sys\n"
        "print('libfoo says hello', flush=True)\n"
        "os.kill(os.getpid(), signal.SIGSEGV)\n"
    )
    paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.setattr(asking, "CHILD", "crashes")


@pytest.mark.usefixtures("crashing_child")
def test_a_crash_in_the_process_apart_is_an_answer() -> None:
    answer = ask("start", "cuda")
    assert answer.document is None
    assert answer.ending == "crashed (SIGSEGV)"
    assert "libfoo says hello" in answer.output


@pytest.mark.usefixtures("crashing_child")
def test_a_crash_keeps_doctor_from_nothing_but_the_provider(cli) -> None:
    result = cli("doctor", "--json")
    checks = {check["name"]: check for check in result.document["checks"]}
    assert checks["Provider cpu"]["status"] == "missing"
    assert "crashed (SIGSEGV)" in checks["Provider cpu"]["found"]
    assert "crashed (SIGSEGV)" in checks["NVIDIA driver"]["found"]
    assert checks["Extra [audio]"]["status"] in ("ok", "note")
    assert result.code == 1


# --- driver, CUDA, cuDNN, TensorRT -----------------------------------------------------------

ALL_THERE: dict[str, str | None] = {
    "libcuda.so.1": "13.0",
    "libcudart.so.13": "13.0",
    "libcublasLt.so.13": "",
    "libcublas.so.13": "",
    "libcurand.so.10": "",
    "libcufft.so.12": "",
    "libcudnn.so.9": "9.20.0",
    "libnvinfer.so.10": "10.16.2",
    "libnvonnxparser.so.10": "",
}
GPU = {"name": "NVIDIA GeForce RTX 4060", "capability": "8.9"}


def seen(**changes: Any) -> Answer:
    """What the process apart says on a machine that has everything, but for some changes."""
    usual = {"cuda": 13, "libraries": ALL_THERE, "driver": "580.65.06", "gpu": GPU}
    return Answer(usual | changes, "")


def test_a_machine_that_has_everything_is_told_so() -> None:
    checks = nvidia.nvidia_checks(seen(), None)
    assert names(checks)[:4] == ["NVIDIA driver", "CUDA", "cuDNN", "TensorRT"]
    assert [check.status for check in checks[:4]] == ["ok"] * 4
    assert "compute capability 8.9" in checks[0].found
    assert named(checks, "TensorRT").found == "10.16.2"


def test_a_machine_without_gpu_and_with_the_cpu_wheel_has_one_line_about_it() -> None:
    nothing = dict.fromkeys(ALL_THERE)
    checks = nvidia.nvidia_checks(seen(cuda=None, libraries=nothing, driver=None, gpu=None), None)
    assert names(checks) == ["NVIDIA driver"]
    assert checks[0].status == "note"


def test_all_missing_libraries_of_cuda_come_with_one_command() -> None:
    libraries = ALL_THERE | {"libcublas.so.13": None, "libcufft.so.12": None}
    check = named(nvidia.nvidia_checks(seen(libraries=libraries), None), "CUDA")
    assert check.found == "without libcublas.so.13, libcufft.so.12"
    assert check.advice.endswith("pip install nvidia-cublas nvidia-cufft")


def test_on_a_jetson_libraries_come_from_jetpack() -> None:
    libraries = ALL_THERE | {"libnvinfer.so.10": None}
    check = named(nvidia.nvidia_checks(seen(libraries=libraries), THOR), "TensorRT")
    assert check.advice == "for tensorrt: sudo apt install nvidia-jetpack"


def test_a_driver_too_old_for_the_wheel_is_said() -> None:
    libraries = ALL_THERE | {"libcuda.so.1": "12.4"}
    check = nvidia.nvidia_checks(seen(libraries=libraries, driver="550.54.15"), None)[0]
    assert check.status == "note"
    assert "it serves CUDA 12.4, and onnxruntime is built for 13" in check.found
    assert "580" in check.advice


def test_a_driver_that_shows_no_gpu_is_said() -> None:
    check = nvidia.nvidia_checks(seen(gpu=None), None)[0]
    assert check.status == "note"
    assert "CUDA shows no GPU" in check.found
    assert check.advice


# --- Jetson ----------------------------------------------------------------------------------

MODES = """\
< POWER_MODEL ID=0 NAME=15W >
CPU_ONLINE CORE_0 1
< POWER_MODEL ID=1 NAME=25W >
< POWER_MODEL ID=2 NAME=MAXN_SUPER >
< PM_CONFIG DEFAULT=1 >
"""


@pytest.fixture
def orin_in_mode(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Puts nvpmodel's table and an nvpmodel that prints what the real one does."""

    def put(mode: str, number: int) -> Path:
        program = tmp_path / "bin/nvpmodel"
        program.parent.mkdir()
        program.write_text(f"#!/bin/sh\necho 'NV Power Mode: {mode}'\necho {number}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
        (tmp_path / "etc").mkdir()
        (tmp_path / "etc/nvpmodel.conf").write_text(MODES)
        return tmp_path

    return put


def test_a_power_mode_below_the_strongest_is_pointed_out(orin_in_mode) -> None:
    check = named(nvidia.jetson_checks(ORIN, orin_in_mode("25W", 1)), "Power mode")
    assert (check.status, check.found) == ("note", "25W")
    assert "sudo nvpmodel -m 2" in check.advice


def test_the_strongest_power_mode_is_fine(orin_in_mode) -> None:
    check = named(nvidia.jetson_checks(ORIN, orin_in_mode("MAXN_SUPER", 2)), "Power mode")
    assert (check.status, check.found) == ("ok", "MAXN_SUPER")


def test_jetpack_5_is_too_old() -> None:
    check = nvidia.jetson_checks(Jetson("35.4.1", GENERATIONS[35]))[0]
    assert check.status == "note"
    assert "JetPack 6 or 7" in check.advice


def test_the_package_indexs_gpu_wheel_is_wrong_on_a_jetson(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def install(tag: str) -> Check:
        folder = tmp_path / tag / "onnxruntime_gpu-1.31.1.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text(
            "Metadata-Version: 2.1\nName: onnxruntime-gpu\nVersion: 1.31.1\n"
        )
        (folder / "WHEEL").write_text(f"Wheel-Version: 1.0\nTag: cp312-cp312-{tag}\n")
        monkeypatch.syspath_prepend(folder.parent)
        return providers.wheel_check(THOR, ["onnxruntime-gpu"])

    assert install("manylinux_2_34_aarch64").status == "note"
    assert install("linux_aarch64").status == "ok"


def test_a_small_jetson_without_swap_is_told_to_add_some(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    orin_nano = {"MemTotal": 7620, "SwapTotal": 0, "SwapFree": 0}
    monkeypatch.setattr(basics, "_meminfo", lambda: orin_nano)
    assert basics.swap(wanted=True).status == "note"
    assert basics.swap(wanted=False).status == "ok"


# --- the whole -------------------------------------------------------------------------------


def test_doctor_ends_with_the_providers_that_start(cli) -> None:
    assert "This machine can run bundles on: cpu" in cli("doctor").out


@pytest.mark.slow
def test_with_the_real_gpu_wheel_the_missing_library_is_named(tmp_path: Path) -> None:
    """Installs onnxruntime-gpu beside the device install; where CUDA is complete it starts."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "edge_safe", source / "edge_safe", ignore=ignored)
    python = tmp_path / "environment/bin/python"
    pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "environment"], check=True)
    subprocess.run([*pip, "install", f"{source}[gpu]"], check=True)
    done = subprocess.run(
        [str(python.with_name("edge-safe")), "doctor", "--json"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
    )
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert checks["Provider cpu"]["status"] == "ok"
    cuda = checks["Provider cuda"]
    if cuda["status"] == "ok":
        assert checks["NVIDIA driver"]["status"] == "ok"
        return
    assert cuda["found"].startswith("does not start: lib")
    assert "is missing" in cuda["found"]
    assert "pip install nvidia-" in cuda["advice"] or "driver" in cuda["advice"]
    assert done.returncode == 0
