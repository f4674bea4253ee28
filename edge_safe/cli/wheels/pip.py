"""pip for a platform: what it is told, and what its output means.

It knows nothing of edge-safe, nor of the folder that the wheels go to.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edge_safe.cli.wheels.platforms import Platform

_DOWNLOADING = re.compile(r"^\s*Downloading (\S+\.whl)(?:\.metadata)? \((.+)\)")
_NO_MATCH = re.compile(r"No matching distribution found for ([^\s;]+)")
_SKIPPED = re.compile(r"Skipping link: none of the wheel's tags .*?/([^/\s]+\.whl)")
_OTHER_PYTHON = re.compile(
    r"requires a different Python \(\S+ not in: '([^']+)'\).*?/([^/\s]+\.whl)"
)
_UNREACHABLE = ("connection broken by", "Could not fetch URL")
# Wheels that an error message names.
_SHOWN = 6

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a command of pip ended, and all that it printed."""

    code: int
    output: str

    def missing(self) -> str | None:
        """The requirement that pip found no file for."""
        found = _NO_MATCH.search(self.output)
        return found[1] if found else None

    def reason(self) -> str:
        """The error lines of pip in one, and of what it started."""
        lines = [line.strip() for line in self.output.splitlines()]
        errors = [line for line in lines if line.lower().startswith("error:")]
        return " ".join(line[len("error:") :].strip() for line in errors) or "no reason given"

    def unreachable(self) -> bool:
        """Whether pip failed for want of a network."""
        return any(words in self.output for words in _UNREACHABLE)


@dataclass(frozen=True, slots=True)
class TargetPip:
    """pip for one platform and Python.

    Attributes:
        platform: The row of the table.
        python: Full version of Python.
        tell: Told of every file that is fetched.
    """

    platform: Platform
    python: str
    tell: Tell

    def __str__(self) -> str:
        """``jetpack-6 (aarch64, glibc 2.35), Python 3.10``."""
        return f"{self.platform}, Python {self.python.rpartition('.')[0]}"

    def download(self, folder: Path, requirements: list[str], *options: str) -> Outcome:
        """Fetches requirements and all they need into a folder, which may hold some of it."""
        where = ("--dest", str(folder), "--find-links", str(folder))
        return self._run("download", *self._target(), *where, *options, *requirements)

    def resolve_alone(self, folder: Path, requirements: Path, scratch: Path) -> Outcome:
        """Asks pip's resolver whether a folder alone serves a list of pinned, hashed wheels.

        `pip install --dry-run` would compare Requires-Python with the Python that runs it;
        `pip download` has the same resolver and compares it with the one asked for.
        """
        offline = ("--no-index", "--find-links", str(folder), "--require-hashes")
        into = ("--dest", str(scratch), "-r", str(requirements))
        return self._run("download", *self._target(), *offline, *into, alone=True)

    def build(self, folder: Path, source: str) -> Outcome:
        """Builds a wheel on this machine, of a source tree or a package that has source alone."""
        what = ("--no-deps", "--wheel-dir", str(folder), source)
        return _watched([sys.executable, "-m", "pip", "wheel", *what], os.environ, self.tell)

    def look(self, requirement: str, scratch: Path) -> Outcome:
        """Asks again for a package that has no wheel here, and has pip say what it passed over."""
        package = re.split(r"[\[<>=!~]", requirement)[0]
        return self.download(scratch, [package], "--no-deps", "-vv")

    def what_exists(self, requirement: str, looked: Outcome) -> str:
        """Says which wheels there are of a package that has none for this platform."""
        package, output = re.split(r"[\[<>=!~]", requirement)[0], looked.output
        pythons = {file: wanted for wanted, file in _OTHER_PYTHON.findall(output)}
        files = list(dict.fromkeys([*_SKIPPED.findall(output), *pythons]))
        if not files:
            return f"There are no wheels of {package} at all."
        newest = max((file.split("-")[1] for file in files), key=_numbers)
        of_newest = [file for file in files if file.split("-")[1] == newest]
        ours = [file for file in of_newest if self.platform.machine in file] or of_newest
        shown = ", ".join(
            file.split("-", 2)[2].removesuffix(".whl")
            + (f" (Python {pythons[file]})" if file in pythons else "")
            for file in ours[:_SHOWN]
        )
        more = f" and {len(ours) - _SHOWN} more" if len(ours) > _SHOWN else ""
        return f"Its release {newest} has wheels for {shown}{more}."

    def _target(self) -> list[str]:
        options = ["--only-binary", ":all:", "--implementation", "cp"]
        options += ["--python-version", self.python]
        for tag in self.platform.tags():
            options += ["--platform", tag]
        return options

    def _run(self, command: str, *arguments: str, alone: bool = False) -> Outcome:
        """Runs a command; ``alone`` keeps indexes and folders of pip's own configuration out."""
        environment = dict(os.environ)
        if alone:
            environment = {k: v for k, v in environment.items() if not k.startswith("PIP_")}
            environment["PIP_CONFIG_FILE"] = os.devnull
        child = [
            sys.executable,
            "-m",
            "edge_safe.cli.wheels.target_pip",
            json.dumps(self._markers()),
        ]
        common = (
            "--disable-pip-version-check",
            "--no-color",
            "--no-input",
            "--progress-bar",
            "off",
        )
        return _watched([*child, command, *common, *arguments], environment, self.tell)

    def _markers(self) -> dict[str, str]:
        return {
            "implementation_name": "cpython",
            "implementation_version": self.python,
            "os_name": "posix",
            "platform_machine": self.platform.machine,
            "platform_python_implementation": "CPython",
            "platform_system": "Linux",
            "python_full_version": self.python,
            "python_version": self.python.rpartition(".")[0],
            "sys_platform": "linux",
        }


def _watched(
    command: list[str], environment: os._Environ[str] | dict[str, str], tell: Tell
) -> Outcome:
    """Runs a command to its end, telling of downloads on the way."""
    lines = []
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=dict(environment),
    ) as process:
        for line in process.stdout or ():
            lines.append(line)
            if found := _DOWNLOADING.match(line):
                tell(f"{found[1].rpartition('/')[2]} ({found[2]})")
    return Outcome(process.returncode, "".join(lines))


def _numbers(version: str) -> list[int]:
    """A version as numbers, for a message alone."""
    return [int(part) for part in re.findall(r"\d+", version)]
