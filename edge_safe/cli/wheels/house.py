"""Makes a folder of wheels for another machine, and has pip's resolver prove that it is complete.

Whatever comes from the package index comes through pip. edge-safe's own wheel never does: it is
built from the source tree that this program runs from, or named by the user, so that nobody else's
package of that name is taken.
"""

from __future__ import annotations

import email.parser
import hashlib
import json
import re
import shutil
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from email.message import Message
from pathlib import Path

import edge_safe
from edge_safe.cli.wheels.pip import Outcome, TargetPip
from edge_safe.errors import UsageError, WheelError
from edge_safe.export.publish import check_free, staged

RECORD_FILE, REQUIREMENTS_FILE, INSTALL_FILE = "wheels.json", "requirements.txt", "INSTALL.txt"

PROJECT = "edge-safe"
# Of the source tree, what its wheel is built from.
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "edge_safe")
# Extras that bring an onnxruntime other than that of "gpu"; the two overwrite each other's files.
PLAIN_RUNTIME = ("cpu", "tensorrt-rtx")
# Packages that have source alone and are built here; one more than any extra needs.
MOST_BUILDS = 8
_BLOCK = 1 << 20

INSTALL = """\
{project} {version} with {extras} for {target}: {count} wheels, {size} MB.

On the device, in this folder, without a network:

    python{python} -m venv ~/edge-safe
    ~/edge-safe/bin/python -m pip install --no-index --find-links . \\
        --require-hashes -r {requirements}
    ~/edge-safe/bin/edge-safe doctor

pip compares every wheel with its sha256 in {requirements}; {record} lists them too.
"""


@dataclass(frozen=True, slots=True)
class Wheel:
    """One file of the folder.

    Attributes:
        name: Of the package.
        version: Of the package.
        file: Name of the file.
        sha256: Its hash, in hexadecimal.
        size: In bytes.
    """

    name: str
    version: str
    file: str
    sha256: str
    size: int


def make_house(
    pip: TargetPip,
    out: Path,
    extras: Sequence[str],
    *,
    own: Path | None = None,
    brought: Sequence[Path] = (),
    overwrite: bool = False,
) -> list[Wheel]:
    """Makes the folder, or nothing at all.

    Args:
        pip: pip for the platform and its Python.
        out: The folder to make.
        extras: Of edge-safe.
        own: edge-safe's wheel; by default it is built from the source tree.
        brought: Wheels that the user has, such as one of NVIDIA's.
        overwrite: Whether a folder that this program made may be replaced.

    Returns:
        The wheels in it, by name.

    Raises:
        UsageError: The extras do not go together or not with the platform, a file is not there.
        WheelError: A package has no wheel for the platform, or they do not fit each other.
        ExportError: The folder is there already or cannot be written.
    """
    _check_files([*brought, *([own] if own else [])])
    _check_place(out, overwrite=overwrite)
    _check_extras(pip, extras, brought)
    with staged(out, overwrite=overwrite) as folder, tempfile.TemporaryDirectory() as scratch:
        mine = _own_wheel(pip, own, folder, Path(scratch))
        known = _metadata(mine).get_all("Provides-Extra") or []
        if unknown := [extra for extra in extras if extra not in known]:
            raise UsageError(f"{PROJECT} has no extra {unknown[0]!r}; it has {', '.join(known)}.")
        copies = [Path(shutil.copy(path, folder)) for path in brought]
        wanted = f"{mine}[{','.join(extras)}]" if extras else str(mine)
        _fetch(pip, folder, [wanted, *map(str, copies)], Path(scratch))
        wheels = sorted(map(_describe, folder.glob("*.whl")), key=lambda wheel: wheel.name)
        _write(pip, folder, extras, wheels)
        _prove(pip, folder, wheels, Path(scratch))
    return wheels


def source_tree() -> Path | None:
    """The source tree that this program runs from; None where it was installed from a wheel."""
    root = Path(edge_safe.__file__).parents[1]
    return root if all((root / name).exists() for name in SOURCES) else None


def _check_files(files: Sequence[Path]) -> None:
    for path in files:
        if not path.is_file():
            raise UsageError(f"There is no file {path}.")
        if path.suffix != ".whl" or not zipfile.is_zipfile(path):
            raise UsageError(f"{path} is not a wheel; name a file that ends in .whl.")


def _check_place(out: Path, *, overwrite: bool) -> None:
    check_free(out, overwrite=overwrite)
    if out.is_dir() and any(out.iterdir()) and not (out / RECORD_FILE).is_file():
        raise UsageError(
            f"{out} is not a folder that `edge-safe wheelhouse` made (there is no {RECORD_FILE} in "
            "it), so it is not replaced. Choose another one."
        )


def _check_extras(pip: TargetPip, extras: Sequence[str], brought: Sequence[Path]) -> None:
    plain = [extra for extra in PLAIN_RUNTIME if extra in extras]
    if plain and "gpu" in extras:
        raise UsageError(
            f"The extras {plain[0]} and gpu bring two onnxruntime packages that overwrite each "
            "other; choose one."
        )
    for extra in extras:
        if extra in pip.platform.without:
            raise UsageError(f"No extra {extra} for {pip}: {pip.platform.without[extra]}.")
    files = {_describe(path).name: path.name for path in brought}
    for package, why in pip.platform.own_wheels.items():
        # Only what an index serves is tagged so; builds for Jetson are plain linux_aarch64.
        if "gpu" in extras and "manylinux" in files.get(package, "manylinux"):
            raise UsageError(f"No {files.get(package, package)} for {pip}: {why}.")


def _own_wheel(pip: TargetPip, own: Path | None, folder: Path, scratch: Path) -> Path:
    """edge-safe's wheel, put into the folder."""
    if own is not None:
        if _metadata(own)["Name"] != PROJECT:
            raise UsageError(f"--wheel {own} is {_metadata(own)['Name']}, not {PROJECT}.")
        return Path(shutil.copy(own, folder))
    root = source_tree()
    if root is None:
        raise UsageError(
            f"This {PROJECT} was installed from a wheel and has no source tree to build one from; "
            f"name that wheel with --wheel FILE ({PROJECT} {edge_safe.__version__})."
        )
    # From a copy: a build leaves folders of its own beside the sources.
    copy = scratch / "source"
    copy.mkdir()
    for name in SOURCES:
        if (root / name).is_dir():
            shutil.copytree(root / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(root / name, copy)
    pip.tell(f"building {PROJECT} {edge_safe.__version__}")
    outcome = pip.build(folder, str(copy))
    built = sorted(folder.glob("*.whl"))
    if outcome.unreachable():
        raise _no_network(outcome)
    if outcome.code or len(built) != 1:
        raise WheelError(f"{PROJECT}'s own wheel cannot be built: {outcome.reason()}")
    return built[0]


def _fetch(pip: TargetPip, folder: Path, requirements: list[str], scratch: Path) -> None:
    """Downloads everything; what has source alone is built, if the result fits any machine."""
    built: set[str] = set()
    while (outcome := pip.download(folder, requirements)).code:
        missing = outcome.missing()
        if missing is None or missing in built or len(built) == MOST_BUILDS:
            raise _failure(pip, outcome, missing, scratch)
        pip.tell(f"{missing} has no wheel for this platform; trying its source")
        place = Path(tempfile.mkdtemp(dir=scratch))
        pip.build(place, missing)
        pure = list(place.glob("*-none-any.whl"))
        if not pure:
            raise _failure(pip, outcome, missing, scratch)
        shutil.copy(pure[0], folder)
        built.add(missing)


def _failure(pip: TargetPip, outcome: Outcome, missing: str | None, scratch: Path) -> WheelError:
    if outcome.unreachable():
        return _no_network(outcome)
    if missing is None:
        return WheelError(f"pip cannot put the wheels for {pip} together: {outcome.reason()}")
    looked = pip.look(missing, Path(tempfile.mkdtemp(dir=scratch)))
    if looked.unreachable():
        return _no_network(outcome)
    return WheelError(
        f"There is no wheel of {missing} for {pip}. {pip.what_exists(missing, looked)} "
        "Choose another --python or --platform, or bring a wheel with --extra-wheel FILE."
    )


def _no_network(outcome: Outcome) -> WheelError:
    return WheelError(
        "The package index cannot be reached. Check the network, or pip's own configuration "
        f"(`python -m pip config list`). pip said: {outcome.reason()}"
    )


def _prove(pip: TargetPip, folder: Path, wheels: list[Wheel], scratch: Path) -> None:
    """Has pip resolve the list from the folder alone, as the device will."""
    pip.tell(f"checking {len(wheels)} wheels with pip's resolver")
    outcome = pip.resolve_alone(folder, folder / REQUIREMENTS_FILE, scratch / "resolved")
    if outcome.code:
        raise WheelError(f"The wheels for {pip} do not install by themselves: {outcome.reason()}")


def _write(pip: TargetPip, folder: Path, extras: Sequence[str], wheels: list[Wheel]) -> None:
    """Writes the list that pip checks, the record, and what to do on the device."""
    pins = []
    for wheel in wheels:
        chosen = f"[{','.join(extras)}]" if wheel.name == PROJECT and extras else ""
        pins.append(f"{wheel.name}{chosen}=={wheel.version} --hash=sha256:{wheel.sha256}\n")
    (folder / REQUIREMENTS_FILE).write_text("".join(pins), encoding="utf-8")
    record = {
        "platform": pip.platform.name,
        "machine": pip.platform.machine,
        "glibc": ".".join(map(str, pip.platform.glibc)),
        "python": pip.python.rpartition(".")[0],
        "extras": list(extras),
        "wheels": [asdict(wheel) for wheel in wheels],
    }
    (folder / RECORD_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    text = INSTALL.format(
        project=PROJECT,
        version=next(wheel.version for wheel in wheels if wheel.name == PROJECT),
        extras=f"[{', '.join(extras)}]" if extras else "no extra",
        target=pip,
        count=len(wheels),
        size=round(sum(wheel.size for wheel in wheels) / 1e6),
        python=pip.python.rpartition(".")[0],
        requirements=REQUIREMENTS_FILE,
        record=RECORD_FILE,
    )
    notes = "".join(f"\n{note}\n" for note in pip.platform.notes)
    (folder / INSTALL_FILE).write_text(text + notes, encoding="utf-8")


def _describe(path: Path) -> Wheel:
    metadata = _metadata(path)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    name = re.sub(r"[-_.]+", "-", metadata["Name"]).lower()
    size = path.stat().st_size
    return Wheel(name, metadata["Version"], path.name, digest.hexdigest(), size)


def _metadata(wheel: Path) -> Message:
    """The METADATA of a wheel.

    Raises:
        UsageError: The file is no wheel.
    """
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.endswith(".dist-info/METADATA") and name.count("/") == 1:
                return email.parser.Parser().parsestr(archive.read(name).decode("utf-8"))
    raise UsageError(f"{wheel} is not a wheel: it has no METADATA.")
