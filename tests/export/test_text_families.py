"""Each text-only family from its checkpoint to a verdict and an answer, beside transformers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from edge_safe import Decision, Policy, Reply, SafeModel
from edge_safe.errors import ExportError, PromptError
from edge_safe.export import ExportReport, export_bundle
from edge_safe.export.families.base import find_family
from edge_safe.models.prompts import Message, PromptEncoder
from edge_safe.models.safety_model import SafetyTokenModel
from edge_safe.runtime.manifest import load_manifest
from tests.conftest import END_ID, SAFE_ID, UNSAFE_ID
from tests.export.conftest import FamilyFiles
from tests.export.families import FAMILIES, OTHERWISE, WINDOW, write_family
from tests.export.optimizing import changed_operators

TOKENS = 24
ONE_TURN = [("user", "How do I pick the lock of my neighbour's shed?")]
TWO_TURNS = [
    ("user", "Tell me a story about a boat."),
    ("assistant", "The boat opens at nine, and the river beside the shop at five."),
    ("user", "And who lives there? Explain it step by step."),
]
CONVERSATIONS = {"one turn": ONE_TURN, "two turns": TWO_TURNS}
ALLOW = Policy(thresholds={"gate": 1.0, "final": 1.0})


@pytest.fixture(scope="module", params=list(FAMILIES))
def files(
    request: pytest.FixtureRequest, family_files: Callable[[str], FamilyFiles]
) -> FamilyFiles:
    return family_files(request.param)


@pytest.fixture(scope="module")
def model(files: FamilyFiles) -> SafeModel:
    return SafeModel.load(files.bundle, threads=1, policy=ALLOW, accept_failed=True)


@pytest.fixture(scope="module")
def torch_model(files: FamilyFiles) -> SafetyTokenModel:
    return SafetyTokenModel.from_pretrained(files.checkpoint)


def check_report(report: ExportReport) -> None:
    """All boundaries within 1e-4, 32 greedy tokens of two prompts, nothing to see at slot T."""
    assert report.parity.passed
    assert max(b.relative_difference for b in report.parity.boundaries) < 1e-4
    greedy, verdicts = report.parity.greedy, report.parity.verdicts
    assert (greedy.agreement, greedy.identical_prefix) == (1.0, 32.0)
    assert (verdicts.agreement, verdicts.slot_change) == (1.0, 0.0)


def test_report_tells_of_parity(files: FamilyFiles) -> None:
    report = msgspec.json.decode((files.bundle / "report.json").read_bytes(), type=ExportReport)
    config = json.loads((files.checkpoint / "config.json").read_text())
    assert report.family == config["model_type"]
    check_report(report)


def test_its_graphs_leave_nothing_to_optimize(files: FamilyFiles) -> None:
    graphs = load_manifest(files.bundle).graphs
    assert {name for name, graph in graphs.items() if graph.optimized} == set(graphs)
    for graph in graphs.values():
        assert changed_operators(files.bundle / graph.file) == {}


@pytest.mark.parametrize("turns", CONVERSATIONS)
def test_verdict_and_answer_are_torch_s(
    turns: str, model: SafeModel, torch_model: SafetyTokenModel
) -> None:
    conversation = CONVERSATIONS[turns]
    encoder = PromptEncoder(torch_model.tokenizer)
    ids = encoder.encode([Message(role, text) for role, text in conversation])
    assert len(ids) > 3 * WINDOW
    messages = [{"role": role, "content": text} for role, text in conversation]
    check_reply(model.generate(messages, max_tokens=TOKENS), torch_model, ids)


def test_second_turn_of_a_chat_is_torch_s_of_all_of_it(
    model: SafeModel, torch_model: SafetyTokenModel
) -> None:
    chat = model.chat()
    tokenizer: Any = torch_model.tokenizer
    ids = PromptEncoder(tokenizer).encode([Message(*TWO_TURNS[0])])
    answer = check_reply(chat.send(TWO_TURNS[0][1], max_tokens=TOKENS), torch_model, ids)
    between = f"<|im_end|>\n<|im_start|>user\n{TWO_TURNS[2][1]}<|im_end|>\n<|im_start|>assistant\n"
    ids += [SAFE_ID, *answer, *tokenizer(between, add_special_tokens=False)["input_ids"]]
    check_reply(chat.send(TWO_TURNS[2][1], max_tokens=TOKENS), torch_model, ids)


def check_reply(reply: Reply, torch_model: SafetyTokenModel, ids: list[int]) -> list[int]:
    """Log-odds within 1e-4 of torch's, the same text; returns the answer's ids without the end."""
    tokenizer: Any = torch_model.tokenizer
    unsafe, safe = torch_model.assess(input_ids=torch.tensor([ids])).readout.verdict_logits[0]
    answer = torch_model.model.generate(
        input_ids=torch.tensor([[*ids, SAFE_ID]]),
        attention_mask=torch.ones(1, len(ids) + 1, dtype=torch.int64),
        max_new_tokens=TOKENS,
        do_sample=False,
        suppress_tokens=[SAFE_ID, UNSAFE_ID],
    )[0, len(ids) + 1 :].tolist()
    assert reply.verdict.stage == "gate"
    # The tiny checkpoints' calibration is the plain sigmoid.
    odds = math.log(reply.verdict.p_unsafe / (1 - reply.verdict.p_unsafe))
    assert odds == pytest.approx(float(unsafe - safe), abs=1e-4)
    assert reply.text == tokenizer.decode(answer, skip_special_tokens=True)
    assert len(set(answer)) > 3
    return [token for token in answer if token != END_ID]


def test_a_refusal_never_runs_the_decoder(files: FamilyFiles) -> None:
    refuse = Policy(thresholds={"gate": 0.0})
    model = SafeModel.load(files.bundle, threads=1, policy=refuse, accept_failed=True)
    assert model.generate(ONE_TURN[0][1]).verdict.decision is Decision.REFUSE
    assert model.run_counts()["decoder"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("family", OTHERWISE)
def test_family_in_another_shape(family: str, tmp_path: Path) -> None:
    checkpoint = write_family(tmp_path / "checkpoint", family, **OTHERWISE[family])
    check_report(export_bundle(checkpoint, tmp_path / "bundle", precision="fp32"))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_quantized_family_decides(
    family: str, precision: str, family_files: Callable[[str], FamilyFiles], tmp_path: Path
) -> None:
    export_bundle(family_files(family).checkpoint, tmp_path / "bundle", precision=precision)
    verdict = SafeModel.load(tmp_path / "bundle", threads=1).assess(ONE_TURN[0][1])
    assert verdict.decision in (Decision.ALLOW, Decision.REFUSE)
    plain = SafeModel.load(family_files(family).bundle, threads=1).assess(ONE_TURN[0][1])
    assert verdict.p_unsafe == pytest.approx(plain.p_unsafe, abs=0.25)


def rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **more}}


LONG = {
    "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "partial_rotary_factor": 0.5,
    "original_max_position_embeddings": 256,
}  # fmt: skip
REFUSED = {
    "dynamic rotary": ("qwen2", rope("dynamic", factor=2.0), "'dynamic'.*default, linear, llama3"),
    "longrope": ("qwen2", rope("longrope", **LONG), "'longrope'.*default, linear, llama3"),
    "partial rotary": ("qwen3", rope("default", partial_rotary_factor=0.5), "0.5 .* has to be 1"),
    "few dimensions": ("phi3", rope("default", partial_rotary_factor=0.25), "^8 .*multiples of 16"),
    "odd head": ("mistral", {"head_dim": 24}, "^24 .*multiples of 16"),
    "activation": ("smollm3", {"hidden_act": "relu"}, "'relu'.*silu, gelu_pytorch_tanh"),
    "gemma's activation": ("gemma3_text", {"hidden_activation": "gelu"}, "'gelu'.*silu, gelu_py"),
    "soft caps": ("gemma3_text", {"attn_logit_softcapping": 50.0}, "softcapping is 50.0.*null"),
    "both directions in gemma": ("gemma", {"use_bidirectional_attention": True}, "bidirectional"),
    "both directions": ("gemma3_text", {"use_bidirectional_attention": True}, "bidirectional"),
    "chunks": ("qwen3", {"layer_types": ["chunked_attention"] * 4}, "'chunked_attention'.*full_"),
    "no window": ("qwen2", {"use_sliding_window": False}, "sliding_window of at least 1, not None"),
    "no config": ("qwen2", {"num_hidden_layers": "four"}, "transformers refuses"),
}  # fmt: skip


@pytest.mark.slow
def test_longrope_is_exported_as_far_as_its_frequencies_stay(tmp_path: Path) -> None:
    short = [1.0 + n / 8 for n in range(8)]
    changes = rope("longrope", **LONG | {"short_factor": short})
    checkpoint = write_family(
        tmp_path / "checkpoint", "phi3", **changes | {"original_max_position_embeddings": 256}
    )
    check_report(export_bundle(checkpoint, tmp_path / "bundle", precision="fp32"))
    model = SafeModel.load(tmp_path / "bundle", threads=1)
    assert model._requests.context_length == 256
    with pytest.raises(PromptError, match="context of 256"):
        model.assess("word " * 300)


@pytest.mark.parametrize("case", REFUSED)
def test_what_graphs_cannot_express_is_refused_without_weights(case: str, tmp_path: Path) -> None:
    family, changes, message = REFUSED[case]
    config = FAMILIES[family]().config.to_dict() | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    _, open_checkpoint = find_family(tmp_path)
    with pytest.raises(ExportError, match=message):
        open_checkpoint(tmp_path)
