"""Each audio-language family from its checkpoint to an answer, beside transformers."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

from edge_safe import Decision, SafeModel
from edge_safe.errors import BundleError, ExportError, MediaError, PromptError, SchemaError
from edge_safe.export import ExportReport, export_bundle
from edge_safe.export.families.base import find_family
from edge_safe.models.prompts import template_parts
from edge_safe.models.safety_model import SafetyTokenModel
from edge_safe.runtime.prompt import Message
from edge_safe.runtime.tokens import Untrusted
from tests.conftest import END_ID, SAFE_ID
from tests.export.audio_families import (
    AUDIO_FAMILIES,
    OTHERWISE,
    RATE,
    WINDOW,
    write_audio_family,
    write_processors,
)
from tests.export.conftest import FamilyFiles
from tests.export.test_vision_families import (
    ALLOW,
    QUESTION,
    SECOND,
    SHED,
    TOKENS,
    changed,
    check_reply,
)
from tests.export.vision_families import VISION_FAMILIES
from tests.runtime.test_audio_io import wav
from tests.runtime.test_audio_windows import speech

SOUNDS = {"short": speech(0.21), "long": speech(1.37), "window": speech(float(WINDOW))}
SOUNDS["three windows"] = speech(2.2 * WINDOW)
# Turns of a user: the words, and the name of the sound in front of them.
Turns = list[tuple[str, str | None]]
CONVERSATIONS: dict[str, Turns] = {
    "text": [(SHED, None)],
    "one sound": [(QUESTION, "long")],
    "a whole window": [(QUESTION, "window")],
    "two turns": [(QUESTION, "short"), (SECOND, "long")],
    "a sound after words": [(SHED, None), (QUESTION, "short")],
    "words after a sound": [(QUESTION, "short"), (SHED, None)],
}
LONG: dict[str, Turns] = {"three windows": [(QUESTION, "three windows")]}


@pytest.fixture(params=list(AUDIO_FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def files(family: str, audio_files: Callable[[str], FamilyFiles]) -> FamilyFiles:
    return audio_files(family)


@pytest.fixture
def model(files: FamilyFiles) -> SafeModel:
    return SafeModel.load(files.bundle, threads=1, policy=ALLOW)


@pytest.fixture
def torch_model(files: FamilyFiles) -> SafetyTokenModel:
    return SafetyTokenModel.from_pretrained(files.checkpoint)


def sound(name: str | None) -> tuple[np.ndarray, int] | None:
    return None if name is None else (SOUNDS[name], RATE)


def hugging_face_inputs(
    files: FamilyFiles, family: str, turns: Turns, answers: list[str]
) -> dict[str, Any]:
    """What transformers makes of a conversation, up to the start of the next answer."""
    tokenizer = SafetyTokenModel.from_pretrained(files.checkpoint).tokenizer
    messages: list[dict[str, Any]] = []
    for number, (text, name) in enumerate(turns):
        part = AUDIO_FAMILIES[family].part
        heard = [] if name is None else [{"type": part, part: "sound.wav"}]
        messages.append({"role": "user", "content": [*heard, *template_parts(text)]})
        if number + 1 < len(turns):
            content = template_parts(answers[number])
            messages.append({"role": "assistant", "content": content})
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    sounds = [SOUNDS[name] for _, name in turns if name is not None]
    return AUDIO_FAMILIES[family].inputs(files.checkpoint, str(text), sounds)


def sounds_of(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if "feature" in name}


def bundle_ids(model: SafeModel, turns: Turns, answers: list[str], audio_id: int) -> list[int]:
    """The ids of the bundle's prompt, with the placeholder where a sound's features stand."""
    requests = model._requests
    messages: list[Message] = []
    for number, (text, name) in enumerate(turns):
        media = requests._family.media([], sound(name))
        messages.append(Message("user", [Untrusted(text)], media=media.placed))
        if number + 1 < len(turns):
            messages.append(Message("assistant", [Untrusted(answers[number])]))
    ids: list[int] = []
    for array in requests.builder.build(messages):
        ids += [audio_id] * len(array) if array.ndim == 2 else array.tolist()
    return ids


def test_one_sound_is_judged_and_answered_as_torch_does(
    files: FamilyFiles, family: str, model: SafeModel, torch_model: SafetyTokenModel
) -> None:
    check_one_turn("one sound", files, family, model, torch_model)


@pytest.mark.slow
def test_words_are_judged_and_answered_as_torch_does(
    files: FamilyFiles, family: str, model: SafeModel, torch_model: SafetyTokenModel
) -> None:
    check_one_turn("text", files, family, model, torch_model)


def check_one_turn(
    case: str, files: FamilyFiles, family: str, model: SafeModel, torch_model: SafetyTokenModel
) -> None:
    ((text, name),) = turns = (CONVERSATIONS | LONG)[case]
    inputs = hugging_face_inputs(files, family, turns, [])
    ids = inputs["input_ids"][0].tolist()
    reply = model.generate(text, audio=sound(name), max_tokens=TOKENS)
    check_reply(reply, torch_model, ids, sounds_of(inputs))
    heard = ids.count(torch_model.model.config.audio_token_id)
    assert (reply.usage.prompt_tokens, reply.usage.audio_tokens) == (len(ids), heard)
    assert bool(heard) == (name is not None)


@pytest.mark.slow
def test_a_sound_of_several_windows_is_heard_whole(
    audio_files: Callable[[str], FamilyFiles],
) -> None:
    files = audio_files("voxtral")
    model = SafeModel.load(files.bundle, threads=1, policy=ALLOW)
    torch_model = SafetyTokenModel.from_pretrained(files.checkpoint)
    check_one_turn("three windows", files, "voxtral", model, torch_model)
    assert model.run_counts()["audio_encoder"] == 3


@pytest.mark.slow
def test_family_in_another_shape(family: str, tmp_path: Path) -> None:
    checkpoint = write_audio_family(
        tmp_path / "checkpoint", family, {"chunk_length": 30}, **OTHERWISE[family]
    )
    export_bundle(checkpoint, tmp_path / "bundle", precision="fp32")
    files = FamilyFiles(checkpoint, tmp_path / "bundle")
    model = SafeModel.load(files.bundle, threads=1, policy=ALLOW)
    torch_model = SafetyTokenModel.from_pretrained(checkpoint)
    check_verdict("three windows", files, family, model, torch_model)


@pytest.mark.slow
def test_a_whole_window_is_judged_as_torch_does(
    files: FamilyFiles, family: str, model: SafeModel, torch_model: SafetyTokenModel
) -> None:
    check_verdict("a whole window", files, family, model, torch_model)


def check_verdict(
    case: str, files: FamilyFiles, family: str, model: SafeModel, torch_model: SafetyTokenModel
) -> None:
    """The verdict alone: many random embeddings leave random models one word to say."""
    turns = (CONVERSATIONS | LONG)[case]
    inputs = hugging_face_inputs(files, family, turns, [])
    logits = torch_model.assess(**inputs).readout.verdict_logits[0]
    expected = float(logits[0] - logits[1])
    assert log_odds(model, sound(turns[0][1])) == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_ids_are_those_of_the_processor(
    name: str, files: FamilyFiles, family: str, model: SafeModel, torch_model: SafetyTokenModel
) -> None:
    turns, answers = CONVERSATIONS[name], ["The shop opens at nine."]
    expected = hugging_face_inputs(files, family, turns, answers)["input_ids"][0].tolist()
    audio_id = torch_model.model.config.audio_token_id
    assert bundle_ids(model, turns, answers, audio_id) == expected
    assert (audio_id in expected) == any(heard for _, heard in turns)


@pytest.mark.slow
def test_second_turn_of_a_chat_is_torch_s_of_all_of_it(
    files: FamilyFiles, family: str, model: SafeModel, torch_model: SafetyTokenModel
) -> None:
    turns = CONVERSATIONS["two turns"]
    chat = model.chat()
    inputs = hugging_face_inputs(files, family, turns[:1], [])
    ids = inputs["input_ids"][0].tolist()
    first = chat.send(QUESTION, audio=sound("short"), max_tokens=TOKENS)
    answer = check_reply(first, torch_model, ids, sounds_of(inputs))
    # What stands behind an answer does not depend on it, as a special token ends it.
    whole = hugging_face_inputs(files, family, turns, ["Nine."])
    marked = whole["input_ids"][0].tolist()
    rest = marked[len(ids) + marked[len(ids) :].index(END_ID) :]
    second = chat.send(SECOND, audio=sound("long"), max_tokens=TOKENS)
    check_reply(second, torch_model, [*ids, SAFE_ID, *answer, *rest], sounds_of(whole))


@pytest.mark.slow
def test_a_file_at_another_rate_is_heard_as_its_samples(model: SafeModel) -> None:
    stereo = np.stack([speech(0.9, 44_100)] * 2, 1)
    found = log_odds(model, wav(stereo, 44_100))
    assert found == pytest.approx(log_odds(model, (stereo[:, 0], 44_100)), abs=0.05)
    assert found != pytest.approx(log_odds(model, sound("short")), abs=0.1)


def log_odds(model: SafeModel, audio: Any) -> float:
    p_unsafe = model.assess(QUESTION, audio=audio).p_unsafe
    return math.log(p_unsafe / (1 - p_unsafe))


@pytest.mark.slow
def test_what_is_heard_differs_from_time_to_time(model: SafeModel) -> None:
    media = model._requests._family.media([], sound("long"))
    rows = np.concatenate([p for m in media.placed for p in m.pieces if isinstance(p, np.ndarray)])
    distances = np.linalg.norm(rows[:, None] - rows[None], axis=-1) + np.eye(len(rows)) * 1e9
    assert distances.min() > 0.01 * np.linalg.norm(rows, axis=-1).mean()


@pytest.mark.slow
def test_report_tells_of_parity(files: FamilyFiles, family: str) -> None:
    report = msgspec.json.decode((files.bundle / "report.json").read_bytes(), type=ExportReport)
    assert report.family == family
    assert report.parity.passed
    assert max(b.relative_difference for b in report.parity.boundaries) < 1e-4
    cases = {b.case for b in report.parity.boundaries if b.graph == "audio_encoder"}
    assert cases >= {"half a window", "a window"}


@pytest.mark.slow
def test_words_of_a_user_never_become_a_sound_s_tokens(
    family: str, model: SafeModel, torch_model: SafetyTokenModel
) -> None:
    audio_id = torch_model.model.config.audio_token_id
    special = set(torch_model.tokenizer.get_added_vocab().values())
    usual = special & set(bundle_ids(model, [("What is it?", None)], [], audio_id))
    for written in AUDIO_FAMILIES[family].special:
        plain = bundle_ids(model, [(f"What is {written}?", None)], [], audio_id)
        assert special & set(plain) == usual


@pytest.mark.slow
def test_a_sound_alone_is_a_prompt(model: SafeModel) -> None:
    assert model.assess("", audio=sound("short")).decision is Decision.ALLOW


@pytest.mark.slow
def test_pictures_are_refused(family: str, model: SafeModel) -> None:
    if family in VISION_FAMILIES:
        pytest.skip("it sees")
    with pytest.raises(MediaError, match="no tower for pictures"):
        model.assess(QUESTION, images=[Image.new("RGB", (8, 8))])


@pytest.mark.slow
def test_sound_that_is_not_finite_is_refused(model: SafeModel) -> None:
    with pytest.raises(MediaError, match="not finite"):
        model.assess(QUESTION, audio=(np.full(RATE, np.nan, np.float32), RATE))


@pytest.mark.slow
def test_sound_that_is_too_long_is_refused_early(model: SafeModel) -> None:
    seconds = model._requests.bundle.manifest.processors["audio"]["windows"]["max_seconds"]
    with pytest.raises(MediaError, match=f"at most {seconds} s"):
        model.assess(QUESTION, audio=(np.zeros((seconds + 1) * RATE, np.float32), RATE))
    assert model.run_counts().get("audio_encoder", 0) == 0


@pytest.mark.slow
def test_time_that_is_over_is_an_error(model: SafeModel) -> None:
    assert model.assess(QUESTION, audio=sound("short"), timeout=0.0).decision is Decision.ERROR
    assert model.run_counts().get("audio_encoder", 0) == 0


def windows_of(manifest: dict[str, Any]) -> dict[str, Any]:
    section: dict[str, Any] = manifest["processors"]["audio"]["windows"]
    return section


FAILING: dict[str, Callable[[dict[str, Any]], Any]] = {
    "bins": lambda m: windows_of(m).update(feature_size=80),
    "number of features": lambda m: windows_of(m).update(states_per_token=5),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", FAILING)
def test_an_encoder_that_fails_is_an_error(case: str, files: FamilyFiles, tmp_path: Path) -> None:
    model = SafeModel.load(changed(files, tmp_path, FAILING[case]), threads=1, policy=ALLOW)
    reply = model.generate(QUESTION, audio=sound("long"))
    assert reply.verdict.decision is Decision.ERROR
    assert reply.text is None


@pytest.mark.slow
def test_an_encoder_without_numbers_is_an_error(files: FamilyFiles, tmp_path: Path) -> None:
    weights = np.fromfile(files.bundle / "audio_encoder.onnx.data", np.float32)
    data = np.full_like(weights, np.nan).tobytes()

    def rehash(manifest: dict[str, Any]) -> None:
        entry = manifest["files"]["audio_encoder.onnx.data"]
        entry.update(sha256=hashlib.sha256(data).hexdigest(), size=len(data))

    bundle = changed(files, tmp_path, rehash)
    (bundle / "audio_encoder.onnx.data").write_bytes(data)
    model = SafeModel.load(bundle, threads=1, policy=ALLOW)
    reply = model.generate(QUESTION, audio=sound("long"))
    assert (reply.verdict.decision, reply.text) == (Decision.ERROR, None)
    assert "not finite" in str(reply.verdict.reason)
    assert model.assess(SHED).decision is Decision.ALLOW


MALFORMED: dict[str, tuple[Callable[[dict[str, Any]], Any], type[BundleError], str]] = {
    "kind": (lambda m: windows_of(m).update(kind="spiral"), SchemaError, "spiral"),
    "field": (lambda m: windows_of(m).update(videos=True), SchemaError, "videos"),
    "size": (lambda m: windows_of(m).update(hop_length=0), SchemaError, ">= 1"),
    "frames": (lambda m: windows_of(m).update(states_per_token=7), SchemaError, "no multiple"),
    "placeholder": (
        lambda m: m["processors"]["audio"].update(placeholder="the"),
        BundleError,
        "'the'.*no special token",
    ),
    "graph": (lambda m: m["graphs"].pop("audio_encoder"), SchemaError, "audio_encoder"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_parameters_are_found_at_loading(
    case: str, files: FamilyFiles, tmp_path: Path
) -> None:
    change, error, message = MALFORMED[case]
    with pytest.raises(error, match=message):
        SafeModel.load(changed(files, tmp_path, change), threads=1)


@pytest.mark.slow
def test_a_projector_that_was_not_trained_is_not_used(files: FamilyFiles, tmp_path: Path) -> None:
    bundle = changed(files, tmp_path, lambda m: m["modalities"]["audio"].update(trained=False))
    with pytest.raises(MediaError, match="not been trained"):
        SafeModel.load(bundle, threads=1).assess(QUESTION, audio=sound("short"))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_quantized_family_decides(precision: str, files: FamilyFiles, tmp_path: Path) -> None:
    report = export_bundle(files.checkpoint, tmp_path / "bundle", precision=precision)
    assert {m.kind: m.bits for m in report.matrices}["audio_encoder"] == 8
    verdict = SafeModel.load(tmp_path / "bundle", threads=1).assess(QUESTION, audio=sound("long"))
    plain = SafeModel.load(files.bundle, threads=1).assess(QUESTION, audio=sound("long"))
    assert verdict.decision in (Decision.ALLOW, Decision.REFUSE)
    # 4 bits move the verdict of these random language models far, on words alone as well.
    if precision == "int8":
        assert verdict.p_unsafe == pytest.approx(plain.p_unsafe, abs=0.05)


CONFIG: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "language model": (lambda c: c["text_config"].update(model_type="gpt2"), "'gpt2'.*possible"),
    "activation": (
        lambda c: c["audio_config"].update(activation_function="tanh"),
        "'tanh'.*quick_gelu",
    ),
    "window": (
        lambda c: c["audio_config"].update(max_source_positions=1500),
        "128 bins and 200 frames.*takes 128 and 3000",
    ),
    "encoder": (
        lambda c: c.update(audio_config={"model_type": "whisper"}),
        "audio encoder is a 'whisper'",
    ),
}


# A sound that is cut into chunks fills no window.
OMNI_CONFIG: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "window": (
        lambda c: c["audio_config"].update(max_source_positions=19),
        "hears 40 frames at once.*for 38",
    ),
    "odd chunk": (lambda c: c["audio_config"].update(n_window=21), "42 frames, no multiple of 4"),
    "width": (lambda c: c["audio_config"].update(output_dim=32), "width 32.*has 64"),
}
REFUSED = [
    (family, *row)
    for family in AUDIO_FAMILIES
    for row in {"qwen2_5_omni": CONFIG | OMNI_CONFIG}.get(family, CONFIG).values()
]


@pytest.mark.parametrize(("family", "change", "message"), REFUSED)
def test_what_cannot_be_exported_is_refused_without_weights(
    family: str, change: Callable[[dict[str, Any]], Any], message: str, tmp_path: Path
) -> None:
    config = AUDIO_FAMILIES[family].make().config.to_dict()
    change(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_processors(tmp_path, family)
    _, open_checkpoint = find_family(tmp_path)
    with pytest.raises(ExportError, match=message):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampling_rate": 8000}, "sampling_rate is 8000.*16000"),
        ({"dither": 0.1}, "dither is 0.1"),
        ({"padding_side": "left"}, "padding_side is left"),
        ({"feature_size": 80}, "gives 80 bins"),
        ({"feature_extractor_type": "SpeechT5FeatureExtractor"}, "possible: WhisperFeature"),
    ],
)
def test_extractors_that_the_runtime_cannot_follow_are_refused(
    changes: dict[str, Any], message: str, family: str, tmp_path: Path
) -> None:
    AUDIO_FAMILIES[family].make().config.save_pretrained(tmp_path)
    write_processors(tmp_path, family, **changes)
    with pytest.raises(ExportError, match=message):
        find_family(tmp_path)[1](tmp_path)


@pytest.mark.slow
def test_a_placeholder_that_text_could_write_is_refused(family: str, tmp_path: Path) -> None:
    checkpoint = write_audio_family(tmp_path / "checkpoint", family)
    path = checkpoint / "tokenizer.json"
    document = json.loads(path.read_text())
    for entry in document["added_tokens"]:
        if entry["content"] == AUDIO_FAMILIES[family].special[0]:
            entry.update(special=False)
    path.write_text(json.dumps(document))
    path = checkpoint / "tokenizer_config.json"
    # A token that has a name here is special to transformers.
    named = {"model_specific_special_tokens": {}}
    path.write_text(json.dumps(json.loads(path.read_text()) | named))
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(ExportError, match=r"sound .* no special token"):
        find_family(checkpoint)[1](checkpoint)


@pytest.mark.slow
def test_text_alone_leaves_the_encoder_closed(model: SafeModel) -> None:
    model.assess(SHED)
    assert model.run_counts().get("audio_encoder", 0) == 0
    model.assess(QUESTION, audio=sound("short"))
    assert model.run_counts()["audio_encoder"] == 1


@pytest.mark.slow
def test_a_sound_beyond_the_context_is_refused_early(files: FamilyFiles, tmp_path: Path) -> None:
    bundle = changed(files, tmp_path, lambda m: m["model"].update(context_length=20))
    model = SafeModel.load(bundle, threads=1)
    with pytest.raises(PromptError, match=r"sound takes .* context has 20"):
        model.assess(QUESTION, audio=sound("long"))
    assert model.run_counts().get("audio_encoder", 0) == 0
