"""What stands in `deploy/` and in the pages about it works, or at least says what exists.

The script of the service is run for real. Containers cannot be built here; of them it is checked
that they install offline, by hash, and what the wheelhouse command in them makes.
"""

from __future__ import annotations

import configparser
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib
import typer

from edge_safe.cli.main import app
from edge_safe.cli.wheels.platforms import PLATFORMS, platform_named

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
CONTAINERS = sorted(DEPLOY.glob("*.Dockerfile"))
PAGES = [ROOT / "docs/jetson.md", ROOT / "docs/rtx.md"]
SCRIPT = DEPLOY / "classify-inbox"
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]

REQUESTS = [{"id": 1, "prompt": "Tell me of the tide."}, {"id": 2, "prompt": "A rope."}]


# --- the script of the service -------------------------------------------------------------------


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """The folders that systemd makes for the service."""
    for name in unit("edge-safe.service")["Service"]["StateDirectory"].split()[1:]:
        (tmp_path / name).mkdir(parents=True)
    return tmp_path / "edge-safe"


def judge(state: Path, bundle: Path) -> subprocess.CompletedProcess[str]:
    """Runs the script as the service does."""
    program = state / "edge-safe-program"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m edge_safe.cli.main "$@"\n')
    program.chmod(0o755)
    folders = f"{state}:{state / 'inbox'}"
    settings = {"EDGE_SAFE_PROGRAM": str(program), "EDGE_SAFE_BUNDLE": str(bundle)}
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [SCRIPT],
        env=os.environ | settings | {"STATE_DIRECTORY": folders, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )


def put(state: Path, name: str, rows: list[dict[str, object]]) -> Path:
    path = state / "inbox" / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def verdicts(state: Path) -> dict[str, list[object]]:
    """Ids of the verdicts, by file."""
    return {
        path.name.partition(".")[0]: [json.loads(line)["id"] for line in path.open()]
        for path in (state / "outbox").glob("*.jsonl")
    }


def test_requests_in_the_inbox_are_judged_and_put_away(state: Path, tiny_bundle: Path) -> None:
    put(state, "a.jsonl", REQUESTS)
    put(state, "b c.jsonl", REQUESTS[:1])
    done = judge(state, tiny_bundle)
    assert done.returncode == 0, done.stderr
    assert verdicts(state) == {"a": [1, 2], "b c": [1]}
    assert sorted(path.name for path in (state / "done").iterdir()) == ["a.jsonl", "b c.jsonl"]
    assert list((state / "inbox").iterdir()) == []


def test_a_file_that_cannot_be_read_is_put_aside_and_the_others_are_judged(
    state: Path, tiny_bundle: Path
) -> None:
    (state / "inbox/a.jsonl").write_text("no JSON\n")
    put(state, "b.jsonl", REQUESTS)
    done = judge(state, tiny_bundle)
    assert done.returncode == 1
    assert "line 1: not valid JSON" in done.stderr
    assert (state / "failed/a.jsonl").exists()
    assert verdicts(state) == {"b": [1, 2]}


def test_an_empty_inbox_is_nothing_to_do(state: Path, tiny_bundle: Path) -> None:
    assert judge(state, tiny_bundle).returncode == 0


def test_new_requests_under_an_old_name_get_verdicts_of_their_own(
    state: Path, tiny_bundle: Path
) -> None:
    put(state, "a.jsonl", REQUESTS)
    judge(state, tiny_bundle)
    put(state, "a.jsonl", [{"id": 1, "prompt": "Something else."}])
    assert judge(state, tiny_bundle).returncode == 0
    assert sorted(map(len, verdicts_of_each_file(state))) == [1, 2]


def verdicts_of_each_file(state: Path) -> list[list[str]]:
    return [path.read_text().splitlines() for path in (state / "outbox").glob("*.jsonl")]


def test_after_a_kill_the_next_run_goes_on(state: Path, tiny_bundle: Path) -> None:
    put(state, "a.jsonl", REQUESTS)
    judge(state, tiny_bundle)
    whole = next((state / "outbox").glob("*.jsonl"))
    first = json.loads(whole.read_text().splitlines()[0]) | {"p_unsafe": 0.125}
    whole.with_name(f"{whole.name}.part").write_text(json.dumps(first) + "\n")
    whole.unlink()
    put(state, "a.jsonl", REQUESTS)
    assert judge(state, tiny_bundle).returncode == 0
    kept, new = map(json.loads, whole.read_text().splitlines())
    assert kept["p_unsafe"] == 0.125
    assert new["id"] == 2


# --- the units -----------------------------------------------------------------------------------


def unit(name: str) -> configparser.RawConfigParser:
    """A unit's sections; of a key that stands there several times, the last."""
    parser = configparser.RawConfigParser(strict=False, comment_prefixes=("#",), delimiters=("=",))
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read_string((DEPLOY / name).read_text())
    return parser


@pytest.mark.parametrize("with_gpu", [False, True])
def test_systemd_finds_nothing_wrong_with_the_units(tmp_path: Path, with_gpu: bool) -> None:
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("there is no systemd-analyze here")
    installed = unit("edge-safe.service")["Service"]["ExecStart"]
    text = (DEPLOY / "edge-safe.service").read_text().replace(installed, str(SCRIPT))
    (tmp_path / "edge-safe.service").write_text(text)
    shutil.copy(DEPLOY / "edge-safe.path", tmp_path)
    if with_gpu:
        folder = tmp_path / "edge-safe.service.d"
        folder.mkdir()
        shutil.copy(DEPLOY / "edge-safe-gpu.conf", folder / "gpu.conf")
    units = [tmp_path / "edge-safe.service", tmp_path / "edge-safe.path"]
    done = subprocess.run([program, "verify", *units], capture_output=True, text=True)
    ours = [line for line in done.stderr.splitlines() if "edge-safe" in line]
    assert (done.returncode, ours) == (0, []), done.stderr


def test_the_service_has_no_network_no_rights_and_a_user_of_its_own() -> None:
    service = unit("edge-safe.service")["Service"]
    expected = {
        "DynamicUser": "yes",
        "PrivateNetwork": "yes",
        "IPAddressDeny": "any",
        "ProtectSystem": "strict",
        "ProtectHome": "yes",
        "NoNewPrivileges": "yes",
        "CapabilityBoundingSet": "",
        "PrivateDevices": "yes",
        "MemoryDenyWriteExecute": "yes",
    }
    assert {key: service[key] for key in expected} == expected


def test_the_gpu_gets_devices_and_nothing_else_is_loosened() -> None:
    gpu = unit("edge-safe-gpu.conf")["Service"]
    assert gpu["DevicePolicy"] == "closed"
    loosened = {key for key, value in gpu.items() if value == "no"}
    assert loosened == {"PrivateDevices", "MemoryDenyWriteExecute"}
    text = (DEPLOY / "edge-safe-gpu.conf").read_text()
    allowed = re.findall(r"^DeviceAllow=(\S+) rw$", text, re.MULTILINE)
    assert {"char-nvidia*", "/dev/nvmap", "/dev/nvhost-ctrl-gpu"} <= set(allowed)


def test_the_path_unit_watches_the_folder_that_the_service_reads() -> None:
    state = unit("edge-safe.service")["Service"]["StateDirectory"].split()
    assert state[0] == "edge-safe"
    watched = Path(unit("edge-safe.path")["Path"]["PathExistsGlob"])
    assert watched.parent.relative_to("/var/lib").as_posix() in state
    moved = re.findall(r"\b(inbox|outbox|done|failed)/", SCRIPT.read_text())
    assert {f"edge-safe/{name}" for name in moved} == set(state[1:])


def test_the_settings_are_those_that_the_script_reads() -> None:
    text = (DEPLOY / "edge-safe.env").read_text()
    given = set(re.findall(r"^([A-Z_]+)=", text, re.MULTILINE))
    read = set(re.findall(r"\$\{?(EDGE_SAFE_[A-Z]+)", SCRIPT.read_text()))
    assert given == read


def test_the_page_installs_every_file_of_the_service_where_the_units_look() -> None:
    page = (ROOT / "docs/jetson.md").read_text()
    named = set(re.findall(r"deploy/([\w.-]+)", page)) - {"wheels"}
    assert {path.name for path in DEPLOY.iterdir() if path.name != "wheels"} == named
    service = unit("edge-safe.service")["Service"]
    for path in (service["ExecStart"], service["EnvironmentFile"]):
        assert re.search(rf"sudo install .* {re.escape(path)}$", page, re.MULTILINE), path


# --- containers ----------------------------------------------------------------------------------


def instructions(container: Path) -> list[tuple[str, str]]:
    """The instructions of a container file, with their lines joined."""
    text = re.sub(r"^\s*#.*\n", "", container.read_text(), flags=re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in lines if line.strip()]


@pytest.mark.parametrize("container", CONTAINERS, ids=lambda path: path.name)
def test_a_container_installs_checked_wheels_and_asks_no_index(container: Path) -> None:
    pip = [rest for name, rest in instructions(container) if name == "RUN" and "pip" in rest]
    assert len(pip) == 1
    assert all(
        words in pip[0]
        for words in ("--no-index", "--require-hashes", "--find-links /wheels", "source=wheels")
    )


@pytest.mark.parametrize("container", CONTAINERS, ids=lambda path: path.name)
def test_a_container_starts_from_a_named_release_and_runs_without_rights(container: Path) -> None:
    steps = instructions(container)
    assert steps[0][0] == "FROM"
    assert re.fullmatch(r"[\w./-]+:[\w.]*\d[\w.]*", steps[0][1])
    assert dict(steps)["USER"] == "edge-safe"
    assert json.loads(dict(steps)["ENTRYPOINT"]) == ["edge-safe"]
    known = {"FROM", "ARG", "ADD", "RUN", "USER", "ENV", "VOLUME", "ENTRYPOINT", "CMD"}
    assert {name for name, _ in steps} <= known


def test_there_is_a_container_for_every_jetpack() -> None:
    names = {path.name.removesuffix(".Dockerfile") for path in CONTAINERS}
    assert names == {row.replace("-", "") for row in PLATFORMS if row.startswith("jetpack")}


# --- commands in pages and containers ------------------------------------------------------------


def commands(path: Path) -> list[list[str]]:
    """The words of every command line of edge-safe in a file."""
    text = re.sub(r"^# ?", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    found = [re.match(r"\s*(?:\S*/bin/)?edge-safe (.+)", line) for line in lines]
    return [shlex.split(each[1], comments=True) for each in found if each]


SPOKEN = [*PAGES, *CONTAINERS]


@pytest.mark.parametrize("path", SPOKEN, ids=lambda path: path.name)
def test_every_command_has_the_options_it_is_given(path: Path) -> None:
    group = typer.main.get_command(app)
    lines = [line for line in commands(path) if re.fullmatch(r"[a-z]+", line[0])]
    assert lines
    for verb, *words in lines:
        known = {name for each in group.commands[verb].params for name in each.opts}
        assert {word for word in words if word.startswith("--")} <= known, (verb, words)


@pytest.mark.parametrize("path", SPOKEN, ids=lambda path: path.name)
def test_every_extra_and_platform_exists(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    lists = [*re.findall(r"edge-safe\[([\w,-]+)\]", text), *re.findall(r"--extra (\S+)", text)]
    named = {name.strip("`") for each in lists for name in each.split(",")}
    assert named <= set(EXTRAS)
    for name in re.findall(r"--platform ((?:jetpack|linux-x86|raspberry)\S+)", text):
        assert name.strip("`") in PLATFORMS


@pytest.mark.parametrize("container", CONTAINERS, ids=lambda path: path.name)
def test_the_wheels_of_a_container_are_for_its_own_platform(container: Path) -> None:
    line = next(words for words in commands(container) if words[0] == "wheelhouse")
    given = dict(itertools.pairwise(line))
    row = platform_named(given["--platform"])
    assert row.name.replace("-", "") == container.name.removesuffix(".Dockerfile")
    tag = "cp" + row.python(None).rpartition(".")[0].replace(".", "")
    assert f"-{tag}-{tag}-linux_{row.machine}.whl" in given["--extra-wheel"]
    assert given["--out"] == "deploy/wheels"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_a_page_says_first_what_was_never_executed(page: Path) -> None:
    assert page.read_text().split("\n\n")[1].startswith("**Nothing on this page has been executed")
