"""A deadline: it ends what runs when the time is over or somebody cancels, and stays over."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from edge_safe.errors import GateError
from edge_safe.runtime.deadline import Deadline
from edge_safe.runtime.session import Session


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Session:
    """A graph that counts for hours."""
    number, truth = onnx.TensorProto.INT64, onnx.TensorProto.BOOL

    def scalar(name: str, kind: int = number) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, [])

    body = helper.make_graph(
        [
            helper.make_node("Add", ["before", "step"], ["after"]),
            helper.make_node("Identity", ["on"], ["go_on"]),
        ],
        "body",
        [scalar("step"), scalar("on", truth), scalar("before")],
        [scalar("go_on", truth), scalar("after")],
    )
    graph = helper.make_graph(
        [helper.make_node("Loop", ["times", "", "start"], ["sum"], body=body)],
        "endless",
        [scalar("times"), scalar("start")],
        [scalar("sum")],
    )
    path: Path = tmp_path_factory.mktemp("endless") / "endless.onnx"
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=9), path)
    return Session(path, threads=1)


def seconds_of_run(session: Session, deadline: Deadline) -> float:
    """How long the graph ran until it was ended."""
    feeds = {"times": np.array(10**12), "start": np.array(0)}
    start = time.monotonic()
    with pytest.raises(Exception, match="terminate"):
        session.run(feeds, deadline.abort)
    return time.monotonic() - start


def watching() -> int:
    """Threads that wait for the end of a request."""
    return sum(thread.name.endswith("(_watch)") for thread in threading.enumerate())


def until(enough: object) -> None:
    """Waits until something is so, for seconds at most."""
    for _ in range(500):
        if enough():  # type: ignore[operator]
            return
        time.sleep(0.01)
    raise AssertionError


def test_a_set_event_ends_a_run_in_progress(endless: Session) -> None:
    cancel = threading.Event()
    threading.Timer(0.1, cancel.set).start()
    with Deadline(None, cancel) as deadline:
        assert seconds_of_run(endless, deadline) < 5.0
        assert deadline.over == "the request was cancelled"


def test_time_that_is_over_ends_a_run_in_progress(endless: Session) -> None:
    with Deadline(0.1, threading.Event()) as deadline:
        assert seconds_of_run(endless, deadline) < 5.0
        assert deadline.over == "the time for a verdict is over"


def test_without_a_limit_nothing_waits() -> None:
    until(lambda: watching() == 0)
    with Deadline(None) as deadline:
        assert watching() == 0
        assert deadline.over is None


@pytest.mark.parametrize("cancel", [None, threading.Event()])
def test_with_the_request_ends_its_watch(cancel: threading.Event | None) -> None:
    with Deadline(60.0, cancel):
        assert watching() == 1
    until(lambda: watching() == 0)
    assert cancel is None or not cancel.is_set()


def test_a_wish_that_is_taken_back_was_granted_all_the_same() -> None:
    cancel = threading.Event()
    cancel.set()
    deadline = Deadline(None, cancel)
    with pytest.raises(GateError, match="cancelled"):
        deadline.check()
    cancel.clear()
    assert deadline.over == "the request was cancelled"


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan")])
def test_no_time_is_over_at_once(seconds: float) -> None:
    assert Deadline(seconds).over is not None


def test_who_wants_to_know_is_told_once() -> None:
    told: list[bool] = []
    with Deadline(0.05, None, lambda: told.append(True)):
        until(lambda: told)
    assert told == [True]
