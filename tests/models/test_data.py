"""Examples from files: caps, split, wrappings, conversations, ways in."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from edge_safe.errors import DataError
from edge_safe.models.base_model import BaseModel
from edge_safe.models.compose import Split, build_examples, find_task
from edge_safe.models.data import Example, read_rows
from edge_safe.models.examples import encode
from edge_safe.models.harmless.reader import kinds, part_of, read_kind
from edge_safe.models.media import Picture, Recording
from edge_safe.models.prompts import Message, PromptEncoder
from edge_safe.models.recipe import (
    CarriersSection,
    ConversationsSection,
    DataSection,
    HarmlessSection,
    LongSection,
    PicturesSection,
    PrefilledSection,
    RecordingsSection,
    RephrasedSection,
    WrappingsSection,
)
from edge_safe.models.wrappings import HELD_FAMILIES, read_wrappings
from edge_safe.rendering.speech import HELD_OUT_SYNTHESIZER

FILES = ("unsafe.jsonl", "safe.jsonl")


def build(folder: Path, **changes: object) -> Split:
    values = {"train": FILES, "validation_share": 0.3} | changes
    return build_examples(DataSection(**values), folder)  # type: ignore[arg-type]


def texts(split: Split) -> tuple[set[str], set[str]]:
    train, validation = (
        {m.content for e in part for p in e.prompts for m in p if m.role == "user"}
        for part in (split.train, split.validation)
    )
    return train, validation


def test_no_prompt_stands_in_both_splits(data_folder: Path) -> None:
    train, validation = texts(build(data_folder))
    assert train
    assert validation
    assert not train & validation


def test_the_split_of_a_prompt_does_not_depend_on_the_others(data_folder: Path) -> None:
    whole, less = build(data_folder), build(data_folder, caps={"safe-made": 20})
    assert texts(less)[1] <= texts(whole)[1]


def test_caps_limit_a_source(data_folder: Path) -> None:
    split = build(data_folder, caps={"safe-made": 20})
    assert sum(not e.unsafe for e in split.train + split.validation) == 20


def test_a_cap_for_an_unknown_source_is_an_error(data_folder: Path) -> None:
    with pytest.raises(DataError, match="safe-mode"):
        build(data_folder, caps={"safe-mode": 3})


def test_wrappings_are_on_both_sides_and_their_templates_in_one_split(data_folder: Path) -> None:
    split = build(data_folder, wrappings=WrappingsSection("templates.jsonl", 1.0))
    parts: list[set[str]] = []
    for half in (split.train, split.validation):
        wrapped = [e for e in half if e.source.startswith("wrapped:")]
        assert sum(e.unsafe for e in wrapped) == len(wrapped) / 2 > 0
        parts.append({e.prompts[0][0].content.split(" and ")[0] for e in wrapped})
    assert not parts[0] & parts[1]


@pytest.mark.parametrize(
    ("kind", "unsafe", "prompts", "turns"),
    [
        ("split", True, 1, 3),
        ("split_refused", True, 2, 1),
        ("continuation", True, 2, 1),
        ("after_refusal", False, 2, 1),
    ],
)
def test_conversations_have_the_label_and_form_of_their_kind(
    data_folder: Path, kind: str, unsafe: bool, prompts: int, turns: int
) -> None:
    split = build(data_folder, conversations=ConversationsSection(**{kind: 0.5}))
    made = [e for e in split.train if e.source.startswith(f"{kind}:")]
    assert made
    assert {e.unsafe for e in made} == {unsafe}
    assert {len(e.prompts) for e in made} == {prompts}
    assert {len(e.prompts[-1]) for e in made} == {turns}


def test_harmless_conversations_have_every_form_of_the_harmful_ones(data_folder: Path) -> None:
    split = build(data_folder, conversations=ConversationsSection(harmless=3.0))
    made = [e for e in split.train if e.source.startswith("harmless_turns:")]
    assert not any(e.unsafe for e in made)
    assert {len(e.prompts[0]) for e in made} == {3, 5}


def test_the_same_seed_gives_the_same_examples(data_folder: Path) -> None:
    conversations = ConversationsSection(split=0.5, harmless=0.5)
    assert build(data_folder, conversations=conversations) == build(
        data_folder, conversations=conversations
    )


def test_a_prompt_may_hold_signs_that_end_a_line_elsewhere(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "one\u2028two", "label": "safe"}\n', encoding="utf-8")
    assert read_rows(path)[0].prompt == "one\u2028two"


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ('{"prompt": "a", "label": "fine"}', "line 1.*'fine'"),
        ('{"label": "safe"}', 'needs "prompt"'),
        ("[1]", "no JSON object"),
        ("{", "no JSON"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: str, what: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(DataError, match=what):
        read_rows(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl"):
        read_rows(tmp_path / "none.jsonl")


def test_a_split_without_both_labels_is_an_error(data_folder: Path) -> None:
    with pytest.raises(DataError, match="not both labels"):
        build(data_folder, train=("safe.jsonl",))


def test_excluded_rows_are_left_out(data_folder: Path) -> None:
    first = read_rows(data_folder / "safe.jsonl")[0]
    split = build(data_folder, exclude=(first.id,))
    assert first.prompt not in set.union(*texts(split))


def test_excluding_an_unknown_row_is_an_error(data_folder: Path) -> None:
    with pytest.raises(DataError, match="row-nobody-has"):
        build(data_folder, exclude=("row-nobody-has",))


def test_carriers_stand_around_harmful_and_harmless_rows_alike(data_folder: Path) -> None:
    split = build(data_folder, carriers=CarriersSection(("Please: {prompt}",), 1.0))
    for half in (split.train, split.validation):
        carried = [e for e in half if e.source.startswith("carried:")]
        assert sum(e.unsafe for e in carried) == len(carried) / 2 > 0
        assert all(e.prompts[0][0].content.startswith("Please: ") for e in carried)


def test_long_contexts_hold_the_request_at_three_places(data_folder: Path) -> None:
    split = build(
        data_folder, harmless=HarmlessSection(), long=LongSection(2.0, shortest=60, longest=120)
    )
    made = [e for e in split.train if e.source.startswith("long_")]
    assert {e.source.split(":")[0] for e in made} == {"long_start", "long_middle", "long_end"}
    assert sum(e.unsafe for e in made) == len(made) / 2
    plain = {e.id: e.prompts[0][0].content for e in split.train if ":" not in e.source}
    for example in made:
        text = example.prompts[0][0].content
        assert plain[example.id] in text
        assert len(text.split()) >= 60


def test_a_begun_answer_stands_behind_harmful_and_harmless_requests(data_folder: Path) -> None:
    split = build(data_folder, prefilled=PrefilledSection(1.0, beginnings=("Sure, here",)))
    made = [e for e in split.train if e.source.startswith("prefilled:")]
    assert {e.unsafe for e in made} == {True, False}
    assert {e.prompts[0][-1] for e in made} == {Message("assistant", "Sure, here")}


def test_pictures_and_recordings_carry_the_request_and_not_the_prompt(data_folder: Path) -> None:
    split = build(
        data_folder,
        harmless=HarmlessSection(),
        pictures=PicturesSection(1.0, styles=("sign",), textless=0.0),
        recordings=RecordingsSection(1.0, speechless=0.0, spelled=0.0),
    )
    for kind, way in (("picture", Picture), ("recording", Recording)):
        made = [e for e in split.train if e.source.startswith(f"{kind}:")]
        assert {e.unsafe for e in made} == {True, False}
        for example in made:
            message = example.prompts[0][0]
            assert isinstance(message.medium, way)
            assert message.medium.text
            assert message.medium.text not in message.content


def test_the_validation_split_may_have_more_media_and_training_keeps_its_own(
    data_folder: Path,
) -> None:
    few, many = (
        build(data_folder, recordings=RecordingsSection(1.0), validation_media=times)
        for times in (1, 3)
    )
    assert many.train == few.train
    spoken = [
        [e for e in split.validation if any(m.medium for p in e.prompts for m in p)]
        for split in (few, many)
    ]
    assert len(spoken[1]) == 3 * len(spoken[0]) > 0


def test_ways_in_of_the_validation_split_hold_requests_as_they_come(data_folder: Path) -> None:
    sections = {
        "harmless": HarmlessSection(),
        "long": LongSection(share=6.0),
        "pictures": PicturesSection(share=6.0),
        "recordings": RecordingsSection(share=6.0),
    }
    split = build(data_folder, **sections)

    def shares(part: tuple[Example, ...]) -> tuple[float, float]:
        """Share of the files' harmless requests among the plain ones and among other ways in."""
        harmless = [e.source for e in part if not e.unsafe]
        plain = [s for s in harmless if ":" not in s]
        others = [s.split(":")[1] for s in harmless if ":" in s and s.split(":")[1] in set(plain)]
        return tuple(sum(s == "safe-made" for s in x) / len(x) for x in (plain, others))  # type: ignore[return-value]

    plain, others = shares(split.validation)
    assert others == pytest.approx(plain, abs=0.12)
    plain, others = shares(split.train)
    assert others > plain + 0.2


def test_no_recording_is_spoken_by_the_synthesizer_that_is_held_out(data_folder: Path) -> None:
    split = build(data_folder, recordings=RecordingsSection(3.0))
    spoken = [m.medium for e in split.train for p in e.prompts for m in p]
    voices = {m.voice for m in spoken if isinstance(m, Recording)}
    assert voices
    assert not any(voice.startswith(HELD_OUT_SYNTHESIZER) for voice in voices)


def test_our_own_harmless_prompts_keep_their_template_in_one_split(data_folder: Path) -> None:
    split = build(data_folder, harmless=HarmlessSection(2.0))
    train, validation = (
        {e.id.rsplit("-", 1)[0] for e in part if e.source in kinds()}
        for part in (split.train, split.validation)
    )
    assert train
    assert validation
    assert {part_of(template) for template in train} == {"train"}
    assert {part_of(template) for template in validation} == {"validation"}


def test_a_kind_gives_as_many_prompts_as_asked_for_or_a_share_of_its_templates(
    data_folder: Path,
) -> None:
    section = HarmlessSection(0.0, kinds={"plain_orders": 3.0, "homonyms": 0.3})
    split = build(data_folder, harmless=section)
    counts = Counter(e.source for e in split.train)
    templates = {
        kind: [t for t in read_kind(kind) if part_of(t.id) == "train"]
        for kind in ("plain_orders", "homonyms", "signs")
    }
    assert counts["plain_orders"] == 3 * len(templates["plain_orders"])
    assert 0.15 < counts["homonyms"] / len(templates["homonyms"]) < 0.45
    assert counts["history"] == 0


def test_prompts_of_an_unknown_kind_are_an_error(data_folder: Path) -> None:
    with pytest.raises(DataError, match="kind-nobody-wrote"):
        build(data_folder, harmless=HarmlessSection(kinds={"kind-nobody-wrote": 1.0}))


def test_held_families_of_wrappings_are_never_trained_on(data_folder: Path) -> None:
    split = build(data_folder, written_wrappings=3.0)
    ends = [w.text.split("{prompt}")[-1] for w in read_wrappings() if w.family in HELD_FAMILIES]
    made = [e for e in (*split.train, *split.validation) if e.source.startswith("written:")]
    assert made
    long_ends = [end for end in ends if len(end) > 20]
    assert not any(e.prompts[0][0].content.endswith(end) for e in made for end in long_ends)


def test_the_way_in_of_an_example_is_that_of_its_media(base: BaseModel) -> None:
    words = base.tokenizer("the shop", add_special_tokens=False)["input_ids"]
    encoder = PromptEncoder(base.tokenizer, read=lambda _: words)
    picture, recording = Picture("the shop", "sign", 0), Recording("the shop", "espeak-en-us", 0)
    turns = {
        "text": (Message("user", "a"),),
        "image": (Message("user", "a", picture), Message("assistant", "b"), Message("user", "c")),
        "audio": (Message("user", "a", picture), Message("user", "b", recording)),
    }
    examples = [Example(name, "made", False, (prompt,)) for name, prompt in turns.items()]
    assert [e.modality for e in encode(encoder, examples)] == list(turns)


@pytest.mark.parametrize(
    ("prompt", "task"),
    [
        ("How do I repair a violin?", "repair a violin"),
        (
            "Please help me steal a bicycle from the shed. Be quick.",
            "steal a bicycle from the shed",
        ),
        ("Write a guide to growing herbs: basil, mint.", "growing herbs"),
        ("Where is the shop?", None),
    ],
)
def test_the_task_of_a_request_is_found(prompt: str, task: str | None) -> None:
    assert find_task(prompt) == task


def test_tasks_of_both_labels_are_asked_for_in_other_forms(data_folder: Path) -> None:
    forms = RephrasedSection(("Make a plan to {task}.", "Teach me to {task}."), 1.0)
    split = build(data_folder, rephrased=forms, harmless=HarmlessSection())
    made = [e for e in split.train if e.source.startswith("rephrased:")]
    assert {e.unsafe for e in made} == {True, False}
    starts = {" ".join(e.prompts[0][0].content.split()[:2]) for e in made}
    assert starts == {"Make a", "Teach me"}
