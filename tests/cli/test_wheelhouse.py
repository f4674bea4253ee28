"""`wheelhouse`: a folder of wheels for another machine, proved complete by pip's resolver.

The quick tests give pip a folder of tiny wheels in place of an index; the slow ones ask the real
index. Nothing of pip is replaced.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

import edge_safe
from edge_safe.cli.wheels.house import source_tree
from edge_safe.cli.wheels.pip import TargetPip
from edge_safe.cli.wheels.platforms import PLATFORMS

OURS = f"edge_safe-{edge_safe.__version__}-py3-none-any.whl"


def write_wheel(
    folder: Path,
    name: str,
    version: str = "1.0",
    tag: str = "py3-none-any",
    requires: Sequence[str] = (),
    extras: Sequence[str] = (),
    python: str = ">=3.8",
) -> Path:
    """A wheel with nothing but its metadata."""
    info = f"{name.replace('-', '_')}-{version}.dist-info"
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Python: {python}"]
    lines += [f"Provides-Extra: {extra}" for extra in extras]
    lines += [f"Requires-Dist: {requirement}" for requirement in requires]
    files = {
        f"{info}/METADATA": "\n".join(lines) + "\n",
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n",
    }
    record = "".join(f"{path},{_hash(text)},{len(text)}\n" for path, text in files.items())
    path = folder / f"{name.replace('-', '_')}-{version}-{tag}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for each, text in (files | {f"{info}/RECORD": f"{record}{info}/RECORD,,\n"}).items():
            archive.writestr(each, text)
    return path


def _hash(text: str) -> str:
    digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest())
    return f"sha256={digest.rstrip(b'=').decode()}"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for all the wheels there are."""
    folder = tmp_path / "index"
    folder.mkdir()
    for key in [key for key in os.environ if key.startswith("PIP_")]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def ours(index: Path, tmp_path: Path) -> Path:
    """A wheel of edge-safe that needs what the real one does, by name."""
    write_wheel(index, "numpy", "2.2.6", "cp310-cp310-manylinux_2_17_aarch64", python=">=3.10")
    write_wheel(index, "numpy", "2.4.6", "cp312-cp312-manylinux_2_28_aarch64", python=">=3.11")
    write_wheel(index, "tomli")
    write_wheel(index, "onnxruntime", "1.23.2", "cp310-cp310-manylinux_2_28_aarch64")
    write_wheel(index, "onnxruntime", "1.31.1", "cp312-cp312-manylinux_2_28_aarch64")
    write_wheel(index, "onnxruntime-gpu", "1.31.1", "cp312-cp312-manylinux_2_34_aarch64")
    write_wheel(index, "soxr", tag="cp310-cp310-win_amd64")
    return write_wheel(
        tmp_path,
        "edge-safe",
        edge_safe.__version__,
        requires=(
            "numpy>=1.26",
            'tomli>=1; python_version < "3.11"',
            'onnxruntime>=1.23; extra == "cpu"',
            'onnxruntime-gpu>=1.23; extra == "gpu"',
            'soxr>=1; extra == "audio"',
            'newest>=1; extra == "eval"',
        ),
        extras=("cpu", "gpu", "audio", "eval"),
        python=">=3.10",
    )


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.whl"))


# --- what goes in ----------------------------------------------------------------------------


def test_the_folder_holds_what_the_device_needs_and_not_what_this_machine_does(
    cli, ours: Path, tmp_path: Path
) -> None:
    for platform, wheels in (
        (
            "jetpack-6",
            [
                OURS,
                "numpy-2.2.6-cp310-cp310-manylinux_2_17_aarch64.whl",
                "onnxruntime-1.23.2-cp310-cp310-manylinux_2_28_aarch64.whl",
                "tomli-1.0-py3-none-any.whl",
            ],
        ),
        (
            "jetpack-7",
            [
                OURS,
                "numpy-2.4.6-cp312-cp312-manylinux_2_28_aarch64.whl",
                "onnxruntime-1.31.1-cp312-cp312-manylinux_2_28_aarch64.whl",
            ],
        ),
    ):
        out = tmp_path / platform
        result = cli("wheelhouse", "--platform", platform, "--out", out, "--wheel", ours)
        assert result.code == 0, result.err
        assert files(out) == wheels


def test_the_folder_says_what_it_is_and_what_to_run(cli, ours: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ("--platform", "jetpack-6", "--out", out, "--wheel", ours, "--json")
    result = cli("wheelhouse", *arguments)
    record = json.loads((out / "wheels.json").read_text())
    assert record["python"] == "3.10"
    assert record["extras"] == ["cpu"]
    assert record["wheels"] == result.document["wheels"]
    for wheel in record["wheels"]:
        content = (out / wheel["file"]).read_bytes()
        assert wheel["sha256"] == hashlib.sha256(content).hexdigest()
        assert wheel["size"] == len(content)
    text = (out / "INSTALL.txt").read_text()
    assert "--no-index --find-links ." in text
    assert "--require-hashes -r requirements.txt" in text
    assert (
        f"edge-safe[cpu]=={edge_safe.__version__} --hash=sha256:"
        in (out / "requirements.txt").read_text()
    )


def test_a_wheel_that_the_user_has_is_taken_before_the_indexs(
    cli, ours: Path, tmp_path: Path
) -> None:
    own = write_wheel(tmp_path, "onnxruntime-gpu", "1.23.0", "cp310-cp310-linux_aarch64")
    out = tmp_path / "out"
    arguments = ("--platform", "jetpack-6", "--out", out, "--wheel", ours, "--extra", "gpu")
    result = cli("wheelhouse", *arguments, "--extra-wheel", own)
    assert result.code == 0, result.err
    assert own.name in files(out)


def test_the_folder_installs_with_the_command_that_it_names(
    cli, ours: Path, index: Path, tmp_path: Path
) -> None:
    """On this very machine: its Python and its wheels, no index, hashes checked by pip."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    python = f"cp{version.replace('.', '')}"
    platform = "linux-x86_64" if os.uname().machine == "x86_64" else "linux-aarch64"
    tag = f"{python}-{python}-manylinux_2_17_{os.uname().machine}"
    for name in ("numpy", "onnxruntime"):
        write_wheel(index, name, "9.0", tag)
    out = tmp_path / "out"
    options = ("--platform", platform, "--python", version, "--out", out, "--wheel", ours)
    assert cli("wheelhouse", *options).code == 0
    offline = ["--no-index", "--find-links", ".", "--require-hashes", "-r", "requirements.txt"]
    install = [sys.executable, "-m", "pip", "install", "--target", tmp_path / "site", *offline]
    done = subprocess.run(install, cwd=out, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site/onnxruntime-9.0.dist-info").is_dir()


# --- what cannot be --------------------------------------------------------------------------


def refused(cli, *arguments: object) -> str:
    """The one line on stderr of a command that fails."""
    result = cli("wheelhouse", *arguments, "--quiet")
    assert result.code in (1, 2)
    lines = result.err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_a_package_without_a_wheel_for_the_platform_is_named_with_what_there_is(
    cli, ours: Path, tmp_path: Path
) -> None:
    arguments = ("--platform", "jetpack-6", "--out", tmp_path / "out", "--wheel", ours)
    line = refused(cli, *arguments, "--extra", "audio")
    assert "no wheel of soxr>=1 for jetpack-6 (aarch64, glibc 2.35), Python 3.10" in line
    assert "release 1.0 has wheels for cp310-cp310-win_amd64" in line
    assert not (tmp_path / "out").exists()
    assert list(tmp_path.glob(".out*")) == []


def test_a_package_that_is_nowhere_is_named(cli, ours: Path, tmp_path: Path) -> None:
    arguments = ("--platform", "jetpack-7", "--out", tmp_path / "out", "--wheel", ours)
    line = refused(cli, *arguments, "--extra", "eval")
    assert "no wheel of newest>=1 for jetpack-7" in line
    assert "no wheels of newest at all" in line


def test_a_wheel_for_another_python_is_refused(cli, ours: Path, tmp_path: Path) -> None:
    own = write_wheel(tmp_path, "onnxruntime-gpu", "1.23.0", "cp312-cp312-linux_aarch64")
    arguments = ("--platform", "jetpack-6", "--out", tmp_path / "out", "--wheel", ours)
    line = refused(cli, *arguments, "--extra", "gpu", "--extra-wheel", own)
    assert f"{own.name} is not a supported wheel" in line


def test_the_indexs_gpu_wheel_is_refused_for_a_jetson(
    cli, ours: Path, index: Path, tmp_path: Path
) -> None:
    arguments = ("--platform", "jetpack-7", "--out", tmp_path / "out", "--wheel", ours)
    assert "no kernels for Jetson" in refused(cli, *arguments, "--extra", "gpu")
    brought = index / "onnxruntime_gpu-1.31.1-cp312-cp312-manylinux_2_34_aarch64.whl"
    line = refused(cli, *arguments, "--extra", "gpu", "--extra-wheel", brought)
    assert brought.name in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--platform", "mars"), "choose one of jetpack-6"),
        (("--platform", "jetpack-6", "--python", "3.12"), "jetpack-6 has Python 3.10"),
        (("--platform", "jetpack-6", "--extra", "cpu", "--extra", "gpu"), "overwrite each other"),
        (("--platform", "jetpack-6", "--extra", "tensorrt-rtx"), "take TensorRT with the extra"),
        (("--platform", "jetpack-6", "--extra", "nonsense"), "no extra 'nonsense'; it has cpu"),
        (("--platform", "jetpack-6", "--extra-wheel", "none.whl"), "no file none.whl"),
        (("--platform", "jetpack-6", "--extra-wheel", __file__), "is not a wheel"),
    ],
)
def test_wrong_usage_is_said_before_anything_is_fetched(
    cli, ours: Path, tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    line = refused(cli, *arguments, "--out", tmp_path / "out", "--wheel", ours)
    assert words in line


def test_another_packages_wheel_is_not_taken_for_ours(cli, index: Path, tmp_path: Path) -> None:
    other = write_wheel(tmp_path, "edge-safer")
    arguments = ("--platform", "jetpack-6", "--out", tmp_path / "out", "--wheel", other)
    assert "is edge-safer, not edge-safe" in refused(cli, *arguments)


def test_a_folder_that_is_there_stays_unless_it_may_be_overwritten(
    cli, ours: Path, tmp_path: Path
) -> None:
    arguments = ("--platform", "jetpack-6", "--out", tmp_path / "out", "--wheel", ours)
    assert cli("wheelhouse", *arguments).code == 0
    (tmp_path / "out/mine.txt").touch()
    assert "--overwrite" in refused(cli, *arguments)
    assert (tmp_path / "out/mine.txt").exists()
    assert cli("wheelhouse", *arguments, "--overwrite").code == 0
    assert not (tmp_path / "out/mine.txt").exists()


def test_a_folder_of_something_else_is_never_overwritten(cli, ours: Path, tmp_path: Path) -> None:
    out = tmp_path / "photographs"
    out.mkdir()
    (out / "one.jpg").touch()
    arguments = ("--platform", "jetpack-6", "--out", out, "--wheel", ours, "--overwrite")
    assert "is not replaced" in refused(cli, *arguments)
    assert (out / "one.jpg").exists()


# --- pip as if elsewhere ---------------------------------------------------------------------


@pytest.mark.parametrize("platform", PLATFORMS.values(), ids=lambda row: row.name)
def test_tags_go_from_the_platforms_own_glibc_down(platform) -> None:
    tags = platform.tags()
    major, minor = platform.glibc
    assert tags[0] == f"manylinux_{major}_{minor}_{platform.machine}"
    assert f"manylinux2014_{platform.machine}" in tags
    assert f"manylinux_2_{minor + 1}_{platform.machine}" not in tags
    assert len(set(tags)) == len(tags)
    assert platform.sources


def test_a_pip_that_cannot_be_told_of_another_machine_stops(index: Path, tmp_path: Path) -> None:
    child = [sys.executable, "-m", "edge_safe.cli.wheels.target_pip"]
    told = subprocess.run(
        [*child, '{"sys_platform": "linux", "python_version": "3.10"}', "--version"],
        capture_output=True,
        text=True,
    )
    assert told.returncode == 0, told.stderr
    # A pip whose markers come from somewhere else, as a later one may have it.
    code = (
        "import pip._vendor.packaging.markers as markers\n"
        "class Fixed:\n"
        "    def __init__(self, text): pass\n"
        "    def evaluate(self): return False\n"
        "markers.Marker = Fixed\n"
        "from edge_safe.cli.wheels.target_pip import main\n"
        'main(\'{"python_version": "3.10"}\', ["--version"])\n'
    )
    stopped = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert stopped.returncode == 1
    assert "cannot be told of another machine's python_version" in stopped.stderr


def test_a_package_with_source_alone_is_built_if_it_fits_any_machine(
    ours: Path, index: Path, tmp_path: Path
) -> None:
    """A source package whose build backend stands in it, so that nothing else is fetched."""
    source = tmp_path / "newest-1.0"
    source.mkdir()
    (source / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    )
    wheel = write_wheel(tmp_path, "newest")
    (source / "newest.whl").write_bytes(wheel.read_bytes())
    (source / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: newest\nVersion: 1.0\n")
    (source / "backend.py").write_text(
        "import pathlib, shutil\n"
        "def build_wheel(folder, settings=None, metadata=None):\n"
        "    here = pathlib.Path(__file__).parent / 'newest.whl'\n"
        f"    shutil.copy(here, pathlib.Path(folder) / {wheel.name!r})\n"
        f"    return {wheel.name!r}\n"
    )
    import tarfile

    with tarfile.open(index / "newest-1.0.tar.gz", "w:gz") as archive:
        archive.add(source, arcname="newest-1.0")
    from edge_safe.cli.wheels.house import make_house

    said: list[str] = []
    row = PLATFORMS["jetpack-7"]
    pip = TargetPip(row, row.python(None), said.append)
    wheels = make_house(pip, tmp_path / "out", ["eval"], own=ours)
    assert "newest" in [each.name for each in wheels]
    assert any("trying its source" in line for line in said)


# --- the real index --------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(source_tree() is None, reason="edge-safe runs from no source tree")
def test_the_real_wheels_for_jetpack_6_are_complete(cli, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--platform", "jetpack-6", "--extra", "cpu", "--extra", "audio")
    result = cli("wheelhouse", *options, "--out", out, "--json")
    assert result.code == 0, result.err
    versions = {wheel["name"]: wheel["version"] for wheel in result.document["wheels"]}
    assert versions["onnxruntime"] == "1.23.2"
    assert "tomli" in versions
    assert all("aarch64" in name or name.endswith("-none-any.whl") for name in files(out))


@pytest.mark.slow
@pytest.mark.skipif(source_tree() is None, reason="edge-safe runs from no source tree")
def test_the_real_wheels_for_linux_install_and_run_without_an_index(cli, tmp_path: Path) -> None:
    if os.uname().machine != "x86_64":
        pytest.skip("the wheels are for x86_64")
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    out, environment = tmp_path / "out", tmp_path / "environment"
    options = ("--platform", "linux-x86_64", "--python", version, "--out", out)
    result = cli("wheelhouse", *options)
    assert result.code == 0, result.err
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "PYTHON"))}
    variables["PIP_CONFIG_FILE"] = os.devnull
    offline = ["--no-index", "--find-links", ".", "--require-hashes", "-r", "requirements.txt"]
    for command in (
        [environment / "bin/python", "-m", "pip", "install", "--quiet", *offline],
        [environment / "bin/edge-safe", "doctor"],
    ):
        done = subprocess.run(command, cwd=out, env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "This machine can run bundles on: cpu" in done.stdout
