"""The program around the verbs: help, version, and the one handler of errors."""

from __future__ import annotations

import errno
import signal

import pytest

import edge_safe
from edge_safe.cli import doctor, main
from edge_safe.cli.console import Terminal, plain, printable
from edge_safe.cli.errors import explain
from edge_safe.cli.main import app
from edge_safe.errors import GateError, UsageError

VERBS = [command.name for command in app.registered_commands]


def test_the_verbs_are_those_of_the_design() -> None:
    designed = [
        "export",
        "verify",
        "inspect",
        "run",
        "chat",
        "classify",
        "eval",
        "bench",
        "plan",
        "build",
        "train",
        "wheelhouse",
        "doctor",
        "demo",
    ]
    assert designed == VERBS


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_and_the_common_options(cli, verb: str) -> None:
    result = cli(verb, "--help")
    assert result.code == 0
    assert all(name in result.out for name in ("--json", "--quiet", "--verbose"))


def test_version(cli) -> None:
    result = cli("--version")
    assert (result.code, result.out) == (0, f"edge-safe {edge_safe.__version__}\n")


@pytest.mark.parametrize("arguments", [(), ("run",), ("classify",)])
def test_no_arguments_show_help(cli, arguments: tuple[str, ...]) -> None:
    result = cli(*arguments)
    assert result.code == 2
    assert "Usage" in result.out + result.err


@pytest.mark.parametrize(
    "arguments", [("fly",), ("run", "x"), ("run", "x", "y", "--fast"), ("eval", "x")]
)
def test_wrong_usage_is_one_line_and_code_2(cli, arguments: tuple[str, ...]) -> None:
    result = cli(*arguments)
    assert result.code == 2
    assert len(result.err.strip().splitlines()) == 1
    assert "--help" in result.err


def test_wrong_usage_with_json_is_a_document(cli) -> None:
    result = cli("verify", "--json", "--fast")
    assert result.document["error"]["type"] == "UsageError"


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (UsageError("no"), 2, "no"),
        (GateError("nan"), 4, "nan"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 1, "memory"),
        (OSError(errno.ENOSPC, "No space left", "/x/y"), 1, "disk is full (/x/y)"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 1, "no permission (/x)"),
        (ModuleNotFoundError("no torch", name="torch.nn"), 1, "edge-safe[export]"),
    ],
)
def test_every_foreseen_error_has_a_message_and_a_code(
    error: BaseException, code: int, words: str
) -> None:
    failure = explain(error)
    assert failure is not None
    assert failure.exit_code == code
    assert words in failure.message
    assert "\n" not in failure.message


def break_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(doctor, "examine", broken)


def test_an_unforeseen_error_is_one_line_without_a_traceback(
    cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_doctor(monkeypatch)
    result = cli("doctor")
    assert result.code == 1
    assert "internal error: ZeroDivisionError: oops" in result.err
    assert "Traceback" not in result.err


def test_verbose_shows_where_an_unforeseen_error_arose(
    cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_doctor(monkeypatch)
    result = cli("doctor", "--verbose")
    assert "Traceback" in result.err


def test_an_answer_cannot_steer_the_terminal() -> None:
    assert printable("a\x1b[2Jb\x07\x9bc\r\nd\te\u00e9\U0001f600") == "a[2Jbc\nd\te\u00e9\U0001f600"


def test_documents_have_null_for_nan() -> None:
    assert plain({"a": [float("nan"), 1.5], "b": float("inf")}) == {"a": [None, 1.5], "b": None}


def test_no_colour_without_a_wish_for_it(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    Terminal().warn("careful")
    assert "\x1b[" in capsys.readouterr().err
    monkeypatch.setenv("NO_COLOR", "1")
    Terminal().warn("careful")
    assert "\x1b[3" not in capsys.readouterr().err


def test_an_interrupt_that_a_library_made_an_error_of_its_own_is_one_still(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def swallowing(*_: object, **__: object) -> int:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ValueError("could not determine the shape") from None
        return 0

    monkeypatch.setattr(main, "app", swallowing)
    # Whoever started the tests may have told them to ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert main.call(["verify", "x"]) == 130
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert "interrupted" in capsys.readouterr().err
