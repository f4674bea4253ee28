"""The engine on a bundle that the real exporter made of a torch checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_safe.runtime.bundle import open_bundle
from edge_safe.runtime.model import SafeModel
from edge_safe.runtime.policy import Policy
from edge_safe.runtime.verdict import Decision

ASKED = ["What does the sign say?", "And the shop?", "Tell me a story about a boat."]


def policy(folder: Path, threshold: float) -> Policy:
    """One threshold for every stage of a bundle."""
    stages = open_bundle(folder, accept_failed=True).manifest.safety.stages
    return Policy(thresholds=dict.fromkeys(stages, threshold))


def test_three_turns_equal_the_same_conversation_at_once(tiny_bundle: Path) -> None:
    allow = policy(tiny_bundle, 1.0)
    model = SafeModel.load(tiny_bundle, threads=1, policy=allow, accept_failed=True)
    chat = model.chat()
    replies = [chat.send(text, max_tokens=1) for text in ASKED]
    messages = [{"role": "user", "content": ASKED[0]}]
    for text, reply in zip(ASKED[1:], replies, strict=False):
        messages.append({"role": "assistant", "content": reply.text or ""})
        messages.append({"role": "user", "content": text})
    whole = model.generate(messages, max_tokens=1)
    assert replies[-1].verdict.p_unsafe == pytest.approx(whole.verdict.p_unsafe, abs=1e-5)
    assert replies[-1].text == whole.text


def test_a_refusal_never_runs_the_decoder(tiny_bundle: Path) -> None:
    refuse = policy(tiny_bundle, 0.0)
    model = SafeModel.load(tiny_bundle, threads=1, policy=refuse, accept_failed=True)
    reply = model.generate(ASKED[0])
    assert (reply.verdict.decision, reply.text) == (Decision.REFUSE, None)
    assert model.run_counts()["decoder"] == 0
