"""Peers: other programs that do the same work on the same weights, in turn with the bundle.

Each is a process of its own that reads requests and writes times, one JSON object a line, so that
only one works at a time and its memory is its own. What there is stands in a folder's
``peers.json``, which ``benchmarks/peers/setup.py`` writes.

The worker's first line is ``{"load_ms", "versions"}``. A request is ``{"ids", "tokens",
"refuse"}`` and its answer ``{"first_token_ms", "total_ms", "ids", "verdict_ms"?}``; a refused one
has no first token and no ids. ``{"stop": true}`` is answered with ``{"peak_memory_mb"}``, and
``{"error"}`` may stand for any answer.
"""

from __future__ import annotations

import json
import select
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any

import msgspec

from edge_safe.errors import PeerError
from edge_safe.evaluation.speed.samples import Action, interleave, quartiles

PEERS_FILE = "peers.json"
OURS = "edge-safe"
_SETUP = "python benchmarks/peers/setup.py"
_TIMEOUT = 900.0
_SHOWN = 8
_COMPARED = ("first_token_ms", "answer_ms", "decode_ms_per_token", "refusal_ms")


class Peer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One peer.

    Attributes:
        what: What it is, in words.
        command: How its worker is started; ``{bundle}``, ``{ungated}`` and ``{threads}`` are
            filled in.
        judges: Whether it can refuse a request.
    """

    what: str
    command: list[str]
    judges: bool = False


def read_peers(folder: Path) -> dict[str, Peer]:
    """The peers that were set up in a folder, by name.

    Raises:
        PeerError: None were, or the file does not fit.
    """
    path = folder / PEERS_FILE
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Peer])
    except OSError as error:
        raise PeerError(
            f"No peers are set up in {folder} ({error.strerror}). Run `{_SETUP} --out {folder}`, "
            "or name their folder with --peers-folder."
        ) from error
    except msgspec.MsgspecError as error:
        raise PeerError(f"{path} cannot be read: {error}. Run `{_SETUP}` again.") from error


def choose(peers: Mapping[str, Peer], names: Sequence[str], folder: Path) -> dict[str, Peer]:
    """Ourselves and the peers asked for.

    Raises:
        PeerError: One is unknown, or what it is started with is not there.
    """
    chosen = {}
    for name in dict.fromkeys([OURS, *names]):
        if name not in peers:
            known = ", ".join(sorted(set(peers) - {OURS})) or "none"
            raise PeerError(f"There is no peer '{name}' in {folder}; it has: {known}.")
        program = Path(peers[name].command[0])
        if not program.exists():
            raise PeerError(
                f"The environment of peer '{name}' is missing: {program} is not there. Run "
                f"`{_SETUP} --out {folder}` again."
            )
        chosen[name] = peers[name]
    return chosen


class Worker:
    """A running peer; used as a context manager.

    Attributes:
        greeting: What it said of itself when it was ready.
        first_ids: How its last answer began, which shows that it has the same weights.
    """

    def __init__(self, name: str, peer: Peer, places: Mapping[str, str]) -> None:
        self._name = name
        self._command = [part.format_map(places) for part in peer.command]
        self.greeting: dict[str, Any] = {}
        self.first_ids: list[int] = []

    def __enter__(self) -> Worker:
        self._errors = tempfile.TemporaryFile()
        try:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
            )
        except OSError as error:
            self._errors.close()
            raise PeerError(f"Peer '{self._name}' cannot be started: {error}.") from error
        try:
            self.greeting = self._receive()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Sends one request and waits for its answer.

        Raises:
            PeerError: The worker ended, took too long or answered with an error.
        """
        stream = self._process.stdin
        if stream is None:
            raise PeerError(f"Peer '{self._name}' was started without an input.")
        try:
            stream.write(json.dumps(dict(request)) + "\n")
            stream.flush()
        except OSError as error:
            raise PeerError(f"Peer '{self._name}' ended: {self._last_words()}") from error
        return self._receive()

    def _receive(self) -> dict[str, Any]:
        """One line of the worker's."""
        stream = self._process.stdout
        if stream is None or not select.select([stream], [], [], _TIMEOUT)[0]:
            raise PeerError(f"Peer '{self._name}' said nothing within {_TIMEOUT:.0f} s.")
        line = stream.readline()
        try:
            answer = json.loads(line)
        except ValueError as error:
            raise PeerError(f"Peer '{self._name}' ended: {self._last_words()}") from error
        if not isinstance(answer, dict) or "error" in answer:
            said = answer["error"] if isinstance(answer, dict) else line.strip()
            raise PeerError(f"Peer '{self._name}' failed: {said}")
        return answer

    def _last_words(self) -> str:
        """The last line it wrote on stderr."""
        self._process.wait(timeout=10)
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"exit code {self._process.returncode}"

    def _end(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            if stream is not None:
                stream.close()


def compare(
    peers: Mapping[str, Peer],
    places: Mapping[str, str],
    ids: Sequence[int],
    safe_token: int,
    tokens: int,
    rounds: int,
    done: Callable[[], None] = lambda: None,
) -> dict[str, dict[str, Any]]:
    """Lets the peers answer the same prompt in turn.

    Args:
        peers: Ourselves among them.
        places: Fills in the commands.
        ids: The prompt.
        safe_token: What an answer begins with. A bundle puts it there by itself; those that do
            not judge read it as the prompt's last one, so that all read the same positions.
        tokens: Length of the answer.
        rounds: How often.
        done: Told after every round.

    Returns:
        By name, medians, spread and, pair by pair, what ours takes in relation to it.

    Raises:
        PeerError: A worker cannot be started or broke.
    """
    request = {"ids": list(ids), "tokens": tokens, "refuse": False}
    with ExitStack() as stack:
        workers = {
            name: stack.enter_context(Worker(name, peer, places)) for name, peer in peers.items()
        }
        actions = []
        for name, worker in workers.items():
            if not peers[name].judges:
                actions.append(_answer(name, worker, {**request, "ids": [*ids, safe_token]}))
            else:
                actions.append(_answer(name, worker, request))
                actions.append(_refusal(name, worker, {**request, "refuse": True}))
        samples = interleave(actions, rounds, done)
        memory = {name: worker.ask({"stop": True}) for name, worker in workers.items()}
        return {
            name: {
                "what": peer.what,
                "versions": workers[name].greeting["versions"],
                "load_ms": workers[name].greeting["load_ms"],
                "first_ids": workers[name].first_ids,
                **memory[name],
                **_summary(samples.values, name),
            }
            for name, peer in peers.items()
        }


def _answer(name: str, worker: Worker, request: Mapping[str, Any]) -> Action:
    """One allowed answer of a peer."""

    def action() -> dict[str, float]:
        times = worker.ask(request)
        count = len(times["ids"])
        if count != request["tokens"]:
            raise PeerError(
                f"Peer '{name}' answered with {count} tokens instead of {request['tokens']}: no "
                "comparison."
            )
        worker.first_ids = times["ids"][:_SHOWN]
        first, total = times["first_token_ms"], times["total_ms"]
        measured = {"first_token_ms": first, "answer_ms": total}
        if count > 1 and total > first:
            measured["decode_ms_per_token"] = (total - first) / (count - 1)
        if "verdict_ms" in times:
            measured["verdict_ms"] = times["verdict_ms"]
        return {f"{name}/{key}": value for key, value in measured.items()}

    return action


def _refusal(name: str, worker: Worker, request: Mapping[str, Any]) -> Action:
    """One refused request of a peer."""
    return lambda: {f"{name}/refusal_ms": worker.ask(request)["total_ms"]}


def _summary(values: Mapping[str, Sequence[float]], name: str) -> dict[str, Any]:
    """Medians, quartiles and ratios of one peer."""
    own = {key.partition("/")[2]: v for key, v in values.items() if key.startswith(f"{name}/")}
    ratios = {
        key: [ours / theirs for ours, theirs in zip(values[f"{OURS}/{key}"], own[key], strict=True)]
        for key in _COMPARED
        if name != OURS and key in own and f"{OURS}/{key}" in values
    }
    return {
        **{key: median(taken) for key, taken in own.items()},
        "spread": {key: quartiles(taken) for key, taken in own.items()},
        "ratio": {key: median(taken) for key, taken in ratios.items()},
        "ratio_spread": {key: quartiles(taken) for key, taken in ratios.items()},
    }
