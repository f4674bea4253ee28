"""Peers: a real one by its worker, the bundle and a guard beside it, and what can go wrong."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edge_safe.errors import PeerError
from edge_safe.evaluation.speed.peers import (
    OURS,
    PEERS_FILE,
    Peer,
    Worker,
    choose,
    compare,
    read_peers,
)
from edge_safe.export.ungated import write_ungated
from tests.conftest import SAFE_ID

WORKERS = Path(__file__).parents[2] / "benchmarks" / "peers"
IDS = [1, 40, 57, 91, 120, 33, 210, 77, 19, 305, 64, 128]
TOKENS = 6


def worker(script: str, *arguments: str) -> list[str]:
    return [sys.executable, str(WORKERS / script), *arguments, "--threads", "1"]


@pytest.fixture(scope="module")
def transformers_peer(tiny_checkpoint: Path) -> Peer:
    return Peer("torch", worker("run_transformers.py", "--model", str(tiny_checkpoint)))


def bundle_peer(pipeline: str, place: str) -> Peer:
    command = worker("run_bundle.py", "--bundle", place, "--pipeline", pipeline)
    return Peer(pipeline, command, judges=True)


@pytest.fixture(scope="module")
def compared(
    tiny_bundle: Path, transformers_peer: Peer, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    ungated = write_ungated(tiny_bundle, tmp_path_factory.mktemp("peers") / "ungated")
    peers = {
        OURS: bundle_peer("gate", "{bundle}"),
        "transformers": transformers_peer,
        "guard-logit": bundle_peer("guard-logit", "{ungated}"),
        "guard-generate": bundle_peer("guard-generate", "{ungated}"),
        "generate-then-check": bundle_peer("generate-then-check", "{ungated}"),
    }
    places = {"bundle": str(tiny_bundle), "ungated": str(ungated), "threads": "1"}
    return compare(peers, places, IDS, SAFE_ID, TOKENS, 2)


@pytest.mark.slow
def test_the_worker_answers_as_transformers_does(
    tiny_checkpoint: Path, transformers_peer: Peer
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    expected = list(IDS)
    with torch.inference_mode():
        for _ in range(TOKENS):
            expected.append(int(model(torch.tensor([expected])).logits[0, -1].argmax()))
    with Worker("transformers", transformers_peer, {}) as running:
        answer = running.ask({"ids": IDS, "tokens": TOKENS, "refuse": False})
    assert answer["ids"] == expected[len(IDS) :]


@pytest.mark.slow
def test_every_peer_is_timed_and_set_against_ours(compared: dict[str, dict[str, Any]]) -> None:
    for name, peer in compared.items():
        assert 0 < peer["first_token_ms"] <= peer["answer_ms"]
        assert peer["peak_memory_mb"] > 10
        assert peer["versions"]
        lower, upper = peer["spread"]["answer_ms"]
        assert lower <= peer["answer_ms"] <= upper
        assert (name == OURS) or peer["ratio"]["answer_ms"] > 0
    assert compared[OURS]["ratio"] == {}


@pytest.mark.slow
def test_only_those_that_judge_refuse(compared: dict[str, dict[str, Any]]) -> None:
    refusing = {name for name, peer in compared.items() if "refusal_ms" in peer}
    assert refusing == {OURS, "guard-logit", "guard-generate", "generate-then-check"}


@pytest.mark.slow
def test_all_run_the_same_weights(compared: dict[str, dict[str, Any]]) -> None:
    assert len({tuple(peer["first_ids"]) for peer in compared.values()}) == 1


@pytest.mark.slow
def test_what_is_checked_afterwards_is_shown_all_at_once(
    compared: dict[str, dict[str, Any]],
) -> None:
    peer = compared["generate-then-check"]
    assert peer["first_token_ms"] == peer["answer_ms"]
    assert "decode_ms_per_token" not in peer


def test_a_worker_that_cannot_open_its_model_says_so() -> None:
    peer = bundle_peer("gate", "/nowhere")
    with pytest.raises(PeerError, match="nowhere"), Worker("broken", peer, {}):
        pass


def test_a_worker_that_ends_without_a_word_is_an_error() -> None:
    peer = Peer("mute", [sys.executable, "-c", "import sys; sys.exit('out of order')"])
    with pytest.raises(PeerError, match="out of order"), Worker("mute", peer, {}):
        pass


def test_an_unknown_peer_is_named_with_those_there_are(tmp_path: Path) -> None:
    peers = {OURS: Peer("ours", [sys.executable]), "guard-logit": Peer("g", [sys.executable])}
    with pytest.raises(PeerError, match=r"'llama-cpp'.*guard-logit"):
        choose(peers, ["llama-cpp"], tmp_path)


def test_a_peer_whose_environment_is_gone_is_an_error(tmp_path: Path) -> None:
    peers = {OURS: Peer("ours", [sys.executable]), "x": Peer("x", [str(tmp_path / "bin/python")])}
    with pytest.raises(PeerError, match="environment of peer 'x' is missing"):
        choose(peers, ["x"], tmp_path)


def test_peers_are_read_from_their_file(tmp_path: Path) -> None:
    peers = {"x": Peer("what it is", ["program"], judges=True)}
    (tmp_path / PEERS_FILE).write_bytes(msgspec.json.encode(peers))
    assert read_peers(tmp_path) == peers


@pytest.mark.parametrize("text", ["no json", '{"x": {"what": "", "command": [], "more": 1}}'])
def test_a_file_that_does_not_fit_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / PEERS_FILE).write_text(text)
    with pytest.raises(PeerError, match=PEERS_FILE):
        read_peers(tmp_path)
