"""Judging and answering touch no network and write nothing that was not asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

WATCHED = """
import os, sys

def forbid(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto", "socket.bind"):
        raise SystemExit(f"network use: {event} {arguments}")
    if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        if not str(arguments[0]).startswith("/dev/"):
            raise SystemExit(f"wrote {arguments[0]}")
    if event in ("subprocess.Popen", "os.system"):
        raise SystemExit(f"started {arguments}")

sys.addaudithook(forbid)
from edge_safe.cli.main import call

codes = [call(arguments) for arguments in (
    ["run", sys.argv[1], "How do I bake a cake?", "--max-tokens", "4"],
    ["inspect", sys.argv[1]],
    ["verify", sys.argv[1]],
)]
# Native code does not pass Python's hooks; a socket of its own would stand here.
folder = "/proc/self/fd"
if os.path.isdir(folder):
    paths = [f"{folder}/{name}" for name in os.listdir(folder)]
    links = [os.readlink(path) for path in paths if os.path.lexists(path)]
    if any(link.startswith("socket:") for link in links):
        raise SystemExit("a socket is open")
assert codes[0] in (0, 3) and codes[1:] == [0, 0], codes
"""


def test_requests_open_no_connection_and_write_no_file(tiny_bundle: Path, tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HOME": str(tmp_path),
        "EDGE_SAFE_CACHE": str(tmp_path / "cache"),
    }
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, str(tiny_bundle)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_nothing_of_a_prompt_stands_in_the_output_of_classify(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    data, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    data.write_text('{"id": 1, "prompt": "a zebra in pyjamas"}\n')
    program = [sys.executable, "-m", "edge_safe.cli.main", "classify", str(tiny_bundle)]
    subprocess.run(
        [*program, "--input", str(data), "--output", str(output)],
        check=True,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert "zebra" not in output.read_text()
