"""The study asks what it promises; on a tiny model its figures mean nothing."""

from __future__ import annotations

import json
import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.study import (
    amount,
    choices,
    combination,
    context_length,
    exit_layer,
    quantization,
    readouts,
    transfer,
)
from benchmarks.study.__main__ import main
from benchmarks.study.heads import VARIANTS, MaxPooling, MeanPooling, multiplied
from benchmarks.study.lab import Lab
from benchmarks.study.options import Options, settings_of
from benchmarks.study.report import insert, markdown, new_figure, save
from benchmarks.study.rows import balanced, measuring_examples, way_of
from benchmarks.study.schemes import SCHEMES, Scheme, exported
from benchmarks.study.states import Depth, find_lender
from benchmarks.study.tasks import ConsistentTask, find_twins
from edge_safe.errors import UsageError
from edge_safe.export.quantization import MatrixFormat
from edge_safe.models import base_model
from edge_safe.models.examples import Encoded
from edge_safe.models.features import FeatureCache
from edge_safe.models.losses import LossWeights
from edge_safe.models.progress import silent
from edge_safe.models.safety_head import SafetyConfig, combine

RECIPE = """
[model]
source = "{base}"

[heads]
layers = [1, 2]
exit_layer = 2
attention_heads = 2
head_dim = 8
hidden = 8

[data]
train = ["unsafe.jsonl", "safe.jsonl"]
validation_share = 0.3
max_tokens = 96

[data.wrappings]
file = "templates.jsonl"
share = 0.2

[optimizer]
learning_rate = 0.005

[training]
epochs = 1
batch = 8
"""


@pytest.fixture(scope="module")
def lab(tiny_checkpoint: Path, data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("study")
    recipe = folder / "recipe.toml"
    recipe.write_text(RECIPE.format(base=tiny_checkpoint))
    chosen = [
        *(data_folder / "unsafe.jsonl").read_text().splitlines()[::4],
        *(data_folder / "safe.jsonl").read_text().splitlines()[::4],
    ]
    measure = folder / "measure.jsonl"
    measure.write_text("\n".join(chosen))
    options = Options(
        recipe, data_folder, tiny_checkpoint, measure, folder / "cache", depths=(1, 2), seeds=1,
        limit=48, quantized_rows=16, context_rows=5, lengths=(0, 40), rounds=1, threads=1,
    )  # fmt: skip
    return Lab(options, silent)


def shown(question: Any, found: dict[str, Any], folder: Path) -> str:
    """The question's table, after its picture was drawn and is small."""
    assert json.loads(json.dumps(found)) == found
    figure = new_figure()
    question.draw(found, figure)
    save(figure, folder / "picture.png")
    assert (folder / "picture.png").stat().st_size < 80_000
    return markdown(question.rows(found))


def test_read_outs_are_compared_on_both_sets_and_by_way_in(lab: Lab, tmp_path: Path) -> None:
    found = readouts.answer(lab)
    assert set(found["tests"]) == {"validation", "measured"}
    ways = found["tests"]["measured"]["mean pooling"]
    assert {"all", "plain", "wrapped"} <= set(ways)
    assert 0 <= ways["all"]["auroc"]["low"] <= ways["all"]["auroc"]["high"] <= 1
    assert "attention and last token" in shown(readouts, found, tmp_path)


def test_combinations_are_compared_with_the_rows_they_turn(lab: Lab, tmp_path: Path) -> None:
    found = combination.answer(lab)
    sides = found["tests"]["validation"]
    assert sides["log-odds"]["turned"]["mean"] == 0
    assert sides["multiplied, rows of lm_head"]["turned"]["mean"] > 0
    assert "multiplied" in shown(combination, found, tmp_path)


def test_depths_are_compared_by_auroc_and_time(lab: Lab, tmp_path: Path) -> None:
    found = exit_layer.answer(lab)
    assert set(found["milliseconds"]) == {"1", "2", "4"}
    assert min(found["milliseconds"].values()) > 0
    assert set(found["tests"]["validation"]["4"]) == {"last token"}
    assert "layers run" in shown(exit_layer, found, tmp_path)


def test_precisions_are_compared_with_fp32(lab: Lab, tmp_path: Path) -> None:
    found = quantization.answer(lab)
    schemes = found["schemes"]
    assert schemes["fp32"][quantization.WHOLE_GATE]["agreement"] == 1
    graph = schemes["fp32 graph, ONNX Runtime"][quantization.WHOLE_GATE]
    assert graph["largest_change"] < 0.05
    coarse = schemes["2 bits asymmetric"]
    assert coarse["weight_error"] > schemes["int8"]["weight_error"]
    assert coarse[quantization.WHOLE_GATE] != coarse[quantization.ROUNDED_GATE]
    assert "int4 k-quant" in shown(quantization, found, tmp_path)


def test_context_is_laid_around_the_same_requests(lab: Lab, tmp_path: Path) -> None:
    found = context_length.answer(lab)
    assert [s[2] for s in found["settings"]] == ["0", "40 start", "40 middle", "40 end"]
    values = found["readouts"]["last token"]
    assert values["40 end"]["tokens"]["mean"] > values["0"]["tokens"]["mean"] + 40
    assert "harmless refused" in shown(context_length, found, tmp_path)


def test_transfer_is_measured_by_way_in(lab: Lab, tmp_path: Path) -> None:
    train, held = lab.train_set, lab.validation_set
    try:
        lab.train_set = as_pictures(train)
        lab.validation_set = [*held, *as_pictures(held, every=1)]
        found = transfer.answer(lab)
    finally:
        lab.train_set, lab.validation_set = train, held
    assert found["examples"][transfer.TEXT_ALONE] < found["examples"][transfer.EVERYTHING]
    assert set(found["trained_on"][transfer.TEXT_ALONE]) == {"text", "pictures"}
    assert "pictures" in shown(transfer, found, tmp_path)


def as_pictures(examples: list[Encoded], every: int = 2) -> list[Encoded]:
    """Some of the examples as if they had been read in pictures."""
    return [
        e if number % every else Encoded(e.prompts, e.unsafe, e.source, modality="image")
        for number, e in enumerate(examples)
    ]


def test_without_pictures_and_recordings_there_is_no_transfer(lab: Lab) -> None:
    with pytest.raises(UsageError, match="neither pictures nor recordings"):
        transfer.answer(lab)


def test_training_choices_are_compared_with_the_recipe(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lab, "train_set", as_pictures(lab.train_set))
    found = choices.answer(lab)
    compared = set(found["choices"])
    assert {choices.RECIPE, choices.MINED, "label smoothing 0.2", "16 attention heads"} <= compared
    # The tiny recipe has these values by itself.
    assert not {"harmful rows weigh 1", "no label smoothing", "weight decay 0.01"} & compared
    assert found["with_twin"] > 0
    assert "ways in made consistent" in compared
    assert set(found["choices"][choices.MINED]["validation"]) == {"plain"}
    assert "feature dropout 0.5" in shown(choices, found, tmp_path)


def test_a_choice_changes_its_value_alone(lab: Lab) -> None:
    changed = VARIANTS["feature dropout 0.5"].adapted(lab.recipe)
    assert changed.training.feature_dropout == 0.5
    assert changed.losses == lab.recipe.losses
    cache = lab.states((2,), lab.train_set)
    heads = lab.heads("4 attention heads", 0, (2,), cache).head(2).attention.query
    assert heads.shape == (4, 8)


def test_the_hardest_examples_are_those_judged_worst(lab: Lab) -> None:
    cache = lab.states((lab.layer,), lab.train_set)
    chosen = choices.hardest(lab, cache, 0)
    assert len(chosen) == round(0.1 * len(lab.train_set))
    safety = lab.heads("one epoch", 0, (lab.layer,), cache)
    odds = lab.read(safety, cache, lab.train_set).verdicts[lab.layer]
    right = {e: o if e.unsafe else -o for e, o in zip(lab.train_set, odds.tolist(), strict=True)}
    assert max(right[e] for e in chosen) <= min(right[e] for e in set(right) - set(chosen))


def test_twins_are_pulled_together(lab: Lab) -> None:
    first = lab.train_set[:6]
    shorter = [
        Encoded((e.prompts[0][:-1],), e.unsafe, e.source, modality="audio") for e in first[:2]
    ]
    examples = [*first, *shorter]
    requests = {e.prompts: str(number % 6) for number, e in enumerate(examples)}
    twins = find_twins(examples, requests)
    assert twins == {0: [6], 6: [0], 1: [7], 7: [1]}
    cache = lab.states((2,), examples)
    safety = lab.heads("together", 0, (2,), lab.states((2,), lab.train_set))
    weights = LossWeights(final=0.0)
    task = ConsistentTask(safety, weights, cache, examples, 0.1, 0.0, "twins", twins, 0.1)
    losses = task.module(task.batch([0, 1, 2, 3], seed=3))
    odds = lab.read(safety, cache, examples).verdicts[2]
    expected = ((odds[0] - odds[6]) ** 2 + (odds[1] - odds[7]) ** 2) / 4
    assert losses["consistency"].item() == pytest.approx(expected, rel=1e-3)
    alone = losses["token.2"] + losses["attention.2"]
    assert losses["loss"].item() == pytest.approx((alone + 0.1 * expected).item(), rel=1e-4)
    assert "consistency" not in task.module(task.batch([2, 3], seed=3))


def test_fewer_rows_and_sources_left_out_are_compared(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lab, "train_set", in_two_sources(lab, lab.train_set))
    monkeypatch.setattr(lab, "options", replace(lab.options, amount_depths=(1,)))
    found = amount.answer(lab)
    counts = [values["harmful_rows"] for values in found["shares"].values()]
    assert counts == sorted(counts)
    assert counts[0] == round(counts[-1] / 8)
    assert set(found["shares"]["all"]["depths"]) == {"1", "2"}
    sources = found["left_out"]
    assert set(sources) == {"unsafe-made", "other-made"}
    assert sum(values["harmful_rows"] for values in sources.values()) == counts[-1]
    assert sources["unsafe-made"]["tested"]["held"] > 0
    # The validation split has nothing of the other source.
    assert set(sources["other-made"]["passed"]) == {"unseen"}
    assert "all but other-made" in shown(amount, found, tmp_path)


def in_two_sources(lab: Lab, examples: list[Encoded]) -> list[Encoded]:
    """Harmful rows with an odd number come from another source."""
    return [
        replace(e, source=e.source.replace("unsafe-made", "other-made"))
        if e.unsafe and int(lab.requests[e.prompts][-1]) % 2
        else e
        for e in examples
    ]


def test_with_a_row_goes_all_that_was_made_of_it(lab: Lab) -> None:
    row = next(lab.requests[e.prompts] for e in lab.train_set if e.source.startswith("wrapped:"))
    made = [e for e in lab.train_set if lab.requests[e.prompts] == row]
    left = amount.without(lab, {row})
    assert not set(made) & set(left)
    assert len(left) == len(lab.train_set) - len(made)


def test_with_a_refused_row_goes_the_conversation(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = Encoded(((1, 2), (3, 4)), False, "after_refusal:nq")
    monkeypatch.setattr(lab, "train_set", [example])
    monkeypatch.setattr(lab, "requests", {example.prompts: "harmful-1+harmless-2"})
    assert amount.without(lab, {"harmful-1"}) == []
    assert amount.without(lab, {"harmful-2"}) == [example]


def test_a_model_cut_at_a_layer_gives_the_states_that_enter_it(lab: Lab) -> None:
    ids = torch.tensor([[5, 9, 17, 30]])
    mask = torch.ones_like(ids, dtype=torch.bool)
    whole, _ = base_model.run_decoder(lab.model, (1, 2), ids, mask)
    cut, last = base_model.run_decoder(Depth(lab.model, torch.float32, 2), (1, 2), ids, mask)
    for layer in (1, 2):
        torch.testing.assert_close(cut[layer], whole[layer])
    torch.testing.assert_close(last, whole[2])


@pytest.mark.parametrize("changed", [False, True])
def test_a_cache_is_borrowed_only_from_the_same_weights(
    lab: Lab, tmp_path: Path, changed: bool
) -> None:
    model = Depth(lab.model, torch.float32, None)
    prompts = [p for e in lab.train_set for p in e.prompts]
    training = FeatureCache(tmp_path / "features", "whatever training called it", (1, 2))
    training.compute(model, prompts, silent)  # type: ignore[arg-type]
    if changed:
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.mul_(1.2)
    lender = find_lender(tmp_path / "features", model, (2,), prompts, tmp_path / "samples")
    assert (lender is None) == changed
    assert find_lender(tmp_path / "features", model, (3,), prompts, tmp_path / "samples") is None


def test_heads_that_were_trained_before_come_back(lab: Lab) -> None:
    cache = lab.states((2,), lab.train_set)
    first, again = (lab.heads("mean", 0, (2,), cache) for _ in range(2))
    other = lab.heads("mean", 1, (2,), cache)
    rows = [safety.head(2).attention.value.weight for safety in (first, again, other)]
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2])


def test_pooling_leaves_padding_out() -> None:
    torch.manual_seed(0)
    config = SafetyConfig(32, (1,), 2, 8, 8)
    states, mask = torch.randn(2, 5, 32), torch.ones(2, 5, dtype=torch.bool)
    mask[1, 3:] = False
    for kind in (MeanPooling, MaxPooling):
        pooling = kind(config)
        alone = pooling(states[1:, :3], mask[1:, :3])
        torch.testing.assert_close(pooling(states, mask)[1:], alone)


def test_multiplied_logits_turn_a_negative_row() -> None:
    negative = torch.tensor([[-1.0, -2.0]])
    sure, unsure = torch.tensor([3.0]), torch.tensor([-3.0])
    product = [multiplied(negative, a) for a in (sure, unsure)]
    summed = [combine(negative, a) for a in (sure, unsure)]
    assert product[0][0, 0] - product[0][0, 1] < product[1][0, 0] - product[1][0, 1]
    assert summed[0][0, 0] - summed[0][0, 1] > summed[1][0, 0] - summed[1][0, 1]
    parts = np.array([[-1.0, -2.0, 3.0], [1.0, 2.0, 3.0]])
    assert combination.turned(parts).tolist() == [True, False]
    both = torch.tensor(parts)
    expected = multiplied(both[:, :2], both[:, 2])
    assert combination.product(parts) == pytest.approx((expected[:, 0] - expected[:, 1]).numpy())


def weights(rows: int = 6, columns: int = 96) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(3).normal(size=(rows, columns)).astype(np.float32)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_every_scheme_rounds_to_few_values_in_any_width(scheme: Scheme) -> None:
    rounded = scheme(weights(columns=40))
    assert rounded.shape == (6, 40)
    assert np.abs(rounded - weights(columns=40)).max() < 8 / 2**scheme.bits
    for block in np.split(scheme(weights()).reshape(-1, 32), 18):
        assert len(np.unique(block.round(4))) <= 2**scheme.bits


def test_offsets_keep_weights_that_lie_on_a_lattice() -> None:
    chance = np.random.default_rng(0)
    low = chance.normal(size=(8, 2, 1))
    steps = chance.integers(0, 16, (8, 2, 32))
    steps[..., 0], steps[..., 1] = 0, 15
    lattice = (low + 0.1 * steps).reshape(8, 64).astype(np.float32)
    lost = {
        offsets: np.abs(exported(lattice, MatrixFormat(4, offsets=offsets)) - lattice).max()
        for offsets in (True, False)
    }
    assert lost[True] < lost[False] / 3


def test_ways_in_are_told_by_the_source() -> None:
    names = [way_of(s) for s in ("nq", "wrapped:nq", "long_end:nq", "split:nq", "picture:nq")]
    assert names == ["plain", "wrapped", "long", "conversation", "picture"]


def test_measuring_rows_come_in_several_ways(lab: Lab) -> None:
    assert lab.options.measure is not None
    ways = {way_of(e.source) for e in measuring_examples(lab.options.measure, None)}
    assert ways == {"plain", "wrapped", "conversation", "long"}


def test_a_choice_of_examples_has_both_labels() -> None:
    items = [(number, number < 10) for number in range(100)]
    random.Random(0).shuffle(items)
    chosen = balanced(items, lambda item: item[1], 16)
    assert len(chosen) == 16
    assert sum(harmful for _, harmful in chosen) == 8


def test_an_answer_is_known_by_what_it_depends_on(lab: Lab) -> None:
    settings = settings_of(lab.options, quantization.SETTINGS)
    assert settings["quantized_rows"] == 16
    assert "context_rows" not in settings
    assert str(lab.options.data) not in json.dumps(settings)


def test_a_table_takes_the_place_between_its_markers(tmp_path: Path) -> None:
    page = tmp_path / "study.md"
    page.write_text("before\n<!-- study:x -->\nold\n<!-- /study:x -->\nafter\n")
    insert(page, "x", markdown([{"a": "1", "b": "2"}]))
    text = page.read_text()
    assert "| 1 | 2 |" in text
    assert "old" not in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    with pytest.raises(UsageError, match="no place for y"):
        insert(page, "y", "")


def test_the_command_answers_once_and_fills_the_page(
    lab: Lab,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = lab.options
    page = tmp_path / "study.md"
    page.write_text("<!-- study:readouts -->\n<!-- /study:readouts -->\n")
    monkeypatch.setenv("EDGE_SAFE_CACHE", str(options.cache))
    command = [
        "study", str(options.recipe), "--data", str(options.data), "--measure",
        str(options.measure), "--out", str(tmp_path / "out"), "--docs", str(page), "--questions",
        "readouts", "transfer", "--seeds", "1", "--limit", "48", "--threads", "1",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", command)
    main()
    said = capsys.readouterr()
    answers = json.loads(said.out.splitlines()[-1])
    assert set(answers) == {"study", "readouts"}
    assert "transfer: The recipe makes neither" in said.err
    assert "](out/study_readouts.png)" in page.read_text()
    written = (tmp_path / "out" / "study_readouts.json").stat().st_mtime_ns
    monkeypatch.setattr(sys, "argv", [*command, "--questions", "readouts"])
    main()
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == answers
    assert (tmp_path / "out" / "study_readouts.json").stat().st_mtime_ns == written
