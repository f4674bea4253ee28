"""`chat`: turns, commands, and Ctrl-C."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture
def talk(cli, tiny_bundle, allow, monkeypatch: pytest.MonkeyPatch):
    """Types lines into a conversation."""

    def type_lines(*lines: str, options: tuple[str, ...] = ("--json",)):
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
        return cli("chat", tiny_bundle, "--policy", allow, "--max-tokens", 4, *options)

    return type_lines


def test_every_turn_is_in_the_document(talk) -> None:
    result = talk("Hello.", "", "And now?")
    assert result.code == 0
    assert [turn["decision"] for turn in result.document["turns"]] == ["allow", "allow"]


def test_a_second_turn_stands_on_the_first(talk) -> None:
    follow_up = talk("Hello.", "And now?").document["turns"][1]
    alone = talk("And now?").document["turns"][0]
    after_reset = talk("Hello.", "/reset", "And now?").document["turns"][1]
    assert follow_up["p_unsafe"] != alone["p_unsafe"]
    assert after_reset["p_unsafe"] == pytest.approx(alone["p_unsafe"], abs=1e-6)


def test_every_turn_has_its_own_time(talk) -> None:
    late = talk("Hello.", "And now?", options=("--timeout", "1e-6", "--json"))
    assert late.code == 0
    assert [turn["decision"] for turn in late.document["turns"]] == ["error", "error"]
    turns = talk("Hello.", "And now?", options=("--timeout", "60", "--json")).document["turns"]
    assert [turn["decision"] for turn in turns] == ["allow", "allow"]


def test_quit_ends_it(talk) -> None:
    assert len(talk("Hello.", "/quit", "And now?").document["turns"]) == 1


def test_a_missing_picture_is_said_at_once_and_the_conversation_goes_on(talk) -> None:
    result = talk("/image none.png", "Hello.")
    assert "none.png" in result.err
    assert len(result.document["turns"]) == 1


def test_a_message_that_cannot_be_judged_does_not_end_it(talk) -> None:
    result = talk("word " * 20_000, "Hello.")
    assert result.code == 0
    assert len(result.document["turns"]) == 1


def test_unknown_commands_show_those_there_are(talk) -> None:
    assert "/reset" in talk("/dance").err


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT to one process")
def test_ctrl_c_cancels_the_answer_and_not_the_program(tiny_bundle: Path, allow: Path) -> None:
    program = [sys.executable, "-u", "-m", "edge_safe.cli.main", "chat", str(tiny_bundle)]
    options = ["--policy", str(allow), "--max-tokens", "500", "--temperature", "2", "--verbose"]
    with subprocess.Popen(
        [*program, *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "EDGE_SAFE_QUIET": "0"},
    ) as job:
        assert job.stdin is not None
        assert job.stdout is not None
        for _ in range(8):
            # An answer may end by itself before the signal comes; then the next one is cancelled.
            job.stdin.write(b"Tell me a story.\n")
            job.stdin.flush()
            job.stdout.read(1)
            job.send_signal(signal.SIGINT)
        _, errors = job.communicate(b"Hello.\n/quit\n", timeout=60)
    assert job.returncode == 0
    assert b"ended by cancelled" in errors


TWICE = """
import os, signal, threading, time
from edge_safe.cli.chat import _interrupt_sets

class Slow(threading.Event):
    def set(self):
        with self._cond:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)
        super().set()

cancel = Slow()
with _interrupt_sets(cancel):
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.05)
print(cancel.is_set())
"""


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT to one process")
def test_a_second_ctrl_c_does_not_wait_for_the_first() -> None:
    command = [sys.executable, "-c", TWICE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert (done.stdout.strip(), done.returncode) == ("True", 0), done.stderr


def test_a_conversation_goes_on_from_its_file(talk, tmp_path: Path) -> None:
    file = tmp_path / "talk"
    first = talk("Hello.", options=("--json", "--conversation", str(file)))
    second = talk("And now?", options=("--json", "--conversation", str(file)))
    assert (first.code, second.code) == (0, 0)
    at_once = talk("Hello.", "And now?").document["turns"][1]
    assert second.document["turns"][0]["p_unsafe"] == pytest.approx(at_once["p_unsafe"], abs=1e-6)


def test_a_system_text_comes_too_late_for_a_conversation_that_has_begun(
    talk, tmp_path: Path
) -> None:
    options = ("--json", "--conversation", str(tmp_path / "talk"))
    talk("Hello.", options=options)
    result = talk("And now?", options=(*options, "--system", "Be brief."))
    assert result.code == 2
    assert "--system" in result.err


def test_a_conversation_without_a_folder_is_refused_before_it_begins(talk, tmp_path: Path) -> None:
    result = talk("Hello.", options=("--json", "--conversation", str(tmp_path / "none" / "talk")))
    assert result.code == 2
    assert "no folder" in result.err


def test_a_file_that_is_no_conversation_is_said(talk, tmp_path: Path) -> None:
    (tmp_path / "talk").write_text("hello")
    result = talk("Hello.", options=("--json", "--conversation", str(tmp_path / "talk")))
    assert result.code == 1
    assert "no whole conversation" in result.err
    assert (tmp_path / "talk").read_text() == "hello"
