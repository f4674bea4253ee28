"""Calls a function in a process of its own, so that memory and a crash are its own as well."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


class CrashedError(Exception):
    """The process ended without a result; the message says how."""


def prepare(*modules: str) -> None:
    """Names modules that all processes share, so that each need not import them anew."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(modules))


def call_apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """What the function returns.

    Raises:
        CrashedError: It raised an error, or its process was killed.
    """
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(theirs, function, arguments))
    process.start()
    theirs.close()
    try:
        good, value = ours.recv()
    except EOFError:
        process.join()
        raise CrashedError(f"the process ended with exit code {process.exitcode}") from None
    finally:
        process.join()
    if not good:
        raise CrashedError(value)
    return value


def _serve(connection: Connection, function: Callable[..., Any], arguments: Any) -> None:
    try:
        connection.send((True, function(*arguments)))
    except Exception as error:  # whatever it is, the table names it
        connection.send((False, f"{type(error).__name__}: {error}"))
