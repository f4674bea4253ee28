"""Phi-4-multimodal beside transformers: sound, sound beside pictures, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from transformers import Phi4MultimodalFeatureExtractor

from edge_safe import Decision, Reply, SafeModel
from edge_safe.errors import BundleError, ExportError, MediaError, SchemaError
from edge_safe.export import ExportReport, export_bundle
from edge_safe.export.audio_language import read_extractor
from edge_safe.export.families.base import find_family
from edge_safe.export.families.phi3 import phi3_spec
from edge_safe.export.image_processors import crops_and_whole
from edge_safe.models.prompts import template_parts
from edge_safe.models.safety_model import SafetyTokenModel
from edge_safe.runtime.image_steps import FillCrops
from tests.conftest import END_ID, SAFE_ID, UNSAFE_ID
from tests.export.conftest import FamilyFiles
from tests.export.phi4_multimodal import (
    AUDIO,
    ENCODER,
    IMAGE,
    LONGROPE,
    RATE,
    SPECIAL,
    VISION,
    Files,
    Processor,
    heard,
    opened,
    phi4_multimodal,
    pictures,
)
from tests.export.test_vision_families import (
    ALLOW,
    PICTURES,
    QUESTION,
    SECOND,
    SHED,
    TOKENS,
    changed,
)
from tests.export.vision_families import write_vision_family
from tests.runtime.test_audio_windows import speech

FAMILY = "phi4_multimodal"
SOUNDS = {"short": speech(0.31), "long": speech(1.37), "two windows": speech(43.0)}
# Turns of a user: the words, the names of the pictures and of the sound in front of them.
Turns = list[tuple[str, list[str], str | None]]
ALONE: dict[str, Turns] = {
    "a sound": [(QUESTION, [], "long")],
    "a sound beside a picture": [(QUESTION, ["small"], "short")],
    "a sound beside two pictures": [(QUESTION, ["small", "wide"], "long")],
}
CHATS: dict[str, Turns] = {
    "a sound in each": [(QUESTION, [], "short"), (SECOND, [], "long")],
    "a picture, then a sound": [(QUESTION, ["small"], None), (SECOND, [], "long")],
    "a sound, then a picture with one": [(QUESTION, [], "long"), (SECOND, ["small"], "short")],
    "words, then a sound": [(SHED, [], None), (QUESTION, [], "short")],
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> FamilyFiles:
    folder = tmp_path_factory.mktemp(FAMILY)
    checkpoint = write_vision_family(folder / "checkpoint", FAMILY)
    export_bundle(checkpoint, folder / "bundle", precision="fp32")
    return FamilyFiles(checkpoint, folder / "bundle")


@pytest.fixture(scope="module")
def model(files: FamilyFiles) -> SafeModel:
    return SafeModel.load(files.bundle, threads=1, policy=ALLOW)


@pytest.fixture(scope="module")
def torch_model(files: FamilyFiles) -> SafetyTokenModel:
    return opened(files.checkpoint)


def media_of(names: list[str], sound: str | None) -> dict[str, Any]:
    """What the bundle is given of a turn."""
    audio = None if sound is None else (SOUNDS[sound], RATE)
    return {"images": [PICTURES[name] for name in names], "audio": audio}


def ids_of(torch_model: SafetyTokenModel, turns: Turns, answers: list[str]) -> list[int]:
    """Ids of a conversation up to the start of the next answer."""
    messages: list[dict[str, Any]] = []
    for number, (text, names, sound) in enumerate(turns):
        parts: list[dict[str, Any]] = [{"type": "image", "image": PICTURES[n]} for n in names]
        if sound is not None:
            parts.append({"type": "audio", "sound": SOUNDS[sound]})
        messages.append({"role": "user", "content": [*parts, *template_parts(text)]})
        if number + 1 < len(turns):
            messages.append({"role": "assistant", "content": template_parts(answers[number])})
    found: list[int] = Processor(torch_model.tokenizer).ids(messages)[0].tolist()
    return found


@torch.no_grad()
def embedded(torch_model: SafetyTokenModel, ids: list[int], turns: Turns) -> torch.Tensor:
    """(1, T, d): transformers' own embeddings, the pictures and the sound of one turn at a time."""
    inside: Any = torch_model.model.model
    vocabulary = torch_model.tokenizer.get_vocab()
    marks = (vocabulary[IMAGE], vocabulary[AUDIO])
    row = torch.tensor([ids])
    embeds = inside.embed_tokens(row)
    counts = [sum(map(ids_of(torch_model, [turn], []).count, marks)) for turn in turns]
    places = [n for n, entry in enumerate(ids) if entry in marks]
    assert sum(counts) == len(places)
    for (_, names, sound), taken in zip(turns, counts, strict=True):
        own, places = places[:taken], places[taken:]
        alone = torch.zeros_like(row)
        alone[0, own] = row[0, own]
        given = pictures([PICTURES[name] for name in names])
        if sound is not None:
            given |= heard(SOUNDS[sound])
        embeds = inside.embed_tokens_extend(alone, embeds, **given)
    return embeds


def check_reply(
    reply: Reply, torch_model: SafetyTokenModel, ids: list[int], turns: Turns
) -> list[int]:
    """Log-odds within 1e-4 of torch's, the same text; returns the answer's ids without the end."""
    embeds = embedded(torch_model, ids, turns)
    unsafe, safe = torch_model.assess(inputs_embeds=embeds).readout.verdict_logits[0]
    language: Any = torch_model.model
    behind = torch.cat([embeds, language.model.embed_tokens(torch.tensor([[SAFE_ID]]))], dim=1)
    answer = language.generate(
        inputs_embeds=behind,
        attention_mask=torch.ones(behind.shape[:2], dtype=torch.int64),
        max_new_tokens=TOKENS,
        do_sample=False,
        suppress_tokens=[SAFE_ID, UNSAFE_ID],
    )[0].tolist()
    assert reply.verdict.stage == "gate"
    odds = math.log(reply.verdict.p_unsafe / (1 - reply.verdict.p_unsafe))
    assert odds == pytest.approx(float(unsafe - safe), abs=1e-4)
    tokenizer: Any = torch_model.tokenizer
    assert reply.text == tokenizer.decode(answer, skip_special_tokens=True)
    assert len(set(answer)) >= 4
    return [token for token in answer if token != END_ID]


@pytest.mark.slow
@pytest.mark.parametrize("case", ALONE)
def test_verdict_and_answer_are_torch_s(
    case: str, model: SafeModel, torch_model: SafetyTokenModel
) -> None:
    ((text, names, sound),) = turns = ALONE[case]
    ids = ids_of(torch_model, turns, [])
    reply = model.generate(text, **media_of(names, sound), max_tokens=TOKENS)
    check_reply(reply, torch_model, ids, turns)
    vocabulary = torch_model.tokenizer.get_vocab()
    usage = reply.usage
    assert usage.prompt_tokens == len(ids)
    assert usage.image_tokens == ids.count(vocabulary[IMAGE])
    assert usage.audio_tokens == ids.count(vocabulary[AUDIO])


@pytest.mark.slow
@pytest.mark.parametrize("case", ["a sound", "a sound beside a picture"])
def test_a_turn_embedded_by_itself_is_the_whole_of_a_conversation_of_one(
    case: str, torch_model: SafetyTokenModel
) -> None:
    ((_, names, sound),) = turns = ALONE[case]
    ids = ids_of(torch_model, turns, [])
    given = pictures([PICTURES[name] for name in names]) | heard(SOUNDS[str(sound)])
    whole = torch_model.assess(input_ids=torch.tensor([ids]), **given).readout
    parts = torch_model.assess(inputs_embeds=embedded(torch_model, ids, turns)).readout
    torch.testing.assert_close(whole.verdict_logits, parts.verdict_logits)


@pytest.mark.slow
@pytest.mark.parametrize("case", CHATS)
def test_a_chat_is_torch_s_turn_by_turn(
    case: str, model: SafeModel, torch_model: SafetyTokenModel
) -> None:
    turns = CHATS[case]
    chat = model.chat()
    ids = ids_of(torch_model, turns[:1], [])
    text, *media = turns[0]
    first = chat.send(text, **media_of(*media), max_tokens=TOKENS)
    answer = check_reply(first, torch_model, ids, turns[:1])
    # What stands behind an answer does not depend on it, as a special token ends it.
    marked = ids_of(torch_model, turns, ["Nine."])
    rest = marked[len(ids) + marked[len(ids) :].index(END_ID) :]
    text, *media = turns[1]
    second = chat.send(text, **media_of(*media), max_tokens=TOKENS)
    check_reply(second, torch_model, [*ids, SAFE_ID, *answer, *rest], turns)


@pytest.mark.slow
def test_a_sound_of_several_windows_is_torch_s(
    files: FamilyFiles, torch_model: SafetyTokenModel
) -> None:
    model = SafeModel.load(files.bundle, threads=1, policy=ALLOW)
    turns: Turns = [(QUESTION, [], "two windows")]
    embeds = embedded(torch_model, ids_of(torch_model, turns, []), turns)
    unsafe, safe = torch_model.assess(inputs_embeds=embeds).readout.verdict_logits[0]
    p_unsafe = model.assess(QUESTION, **media_of([], "two windows")).p_unsafe
    assert math.log(p_unsafe / (1 - p_unsafe)) == pytest.approx(float(unsafe - safe), abs=1e-4)
    assert model.run_counts()["audio_encoder"] == 2


@pytest.mark.slow
def test_report_tells_of_parity(files: FamilyFiles) -> None:
    report = msgspec.json.decode((files.bundle / "report.json").read_bytes(), type=ExportReport)
    assert report.parity.passed
    assert max(b.relative_difference for b in report.parity.boundaries) < 1e-4
    cases = {b.case for b in report.parity.boundaries if b.graph == "audio_encoder"}
    assert cases == {
        "one token", "half a window", "a window", "two windows, 1", "two windows, 2",
    }  # fmt: skip


# Chunks of states, other norms of the features, an odd number of patches, sizes of their own.
OTHERWISE: dict[str, Any] = {
    "vision_config": VISION | {"image_size": 62, "crop_size": 62, "feature_layer": -1},
    "audio_config": ENCODER
    | {
        "chunk_size": 9,
        "left_chunk": 2,
        "bias_symmetric": True,
        "bias_max_distance": 700,
        "kernel_size": 5,
        "depthwise_multiplier": 2,
        "conv_activation": "relu",
        "nemo_activation": "swish",
        "time_reduction": 4,
    },
    "tie_word_embeddings": True,
    "sliding_window": 300,
}


@pytest.mark.slow
def test_family_in_another_shape(tmp_path: Path) -> None:
    changes = {"size": {"height": 62, "width": 62}, "audio_compression_rate": 4, "dynamic_hd": 3}
    checkpoint = write_vision_family(tmp_path / "checkpoint", FAMILY, changes, **OTHERWISE)
    report = export_bundle(checkpoint, tmp_path / "bundle", precision="fp32")
    assert report.parity.passed
    assert max(b.relative_difference for b in report.parity.boundaries) < 1e-4
    model = SafeModel.load(tmp_path / "bundle", threads=1, policy=ALLOW)
    verdict = model.assess(QUESTION, **media_of(["wide"], "long"))
    assert verdict.decision is Decision.ALLOW


@pytest.mark.slow
def test_int8_hears_as_fp32_does(files: FamilyFiles, tmp_path: Path) -> None:
    report = export_bundle(files.checkpoint, tmp_path / "bundle", precision="int8")
    assert {m.kind: m.bits for m in report.matrices}["audio_encoder"] == 8
    found, expected = (
        SafeModel.load(bundle, threads=1).assess(QUESTION, **media_of([], "long"))
        for bundle in (tmp_path / "bundle", files.bundle)
    )
    assert found.p_unsafe == pytest.approx(expected.p_unsafe, abs=0.05)


@pytest.mark.slow
def test_words_of_a_user_never_become_a_medium_s_tokens(
    model: SafeModel, torch_model: SafetyTokenModel
) -> None:
    plain = model.assess("What is it?")
    assert plain.decision is Decision.ALLOW
    for written in SPECIAL:
        reply = model.generate(f"What is {written}?", max_tokens=1)
        tokenizer: Any = torch_model.tokenizer
        text = ids_of(torch_model, [("What is it?", [], None)], [])
        spelled = tokenizer(f"What is {written}?", split_special_tokens=True)["input_ids"]
        usual = tokenizer("What is it?")["input_ids"]
        assert reply.usage.prompt_tokens == len(text) - len(usual) + len(spelled)


@pytest.mark.slow
def test_sound_is_encoded_only_where_there_is_some(files: FamilyFiles) -> None:
    model = SafeModel.load(files.bundle, threads=1, policy=ALLOW)
    model.assess(SHED)
    assert not {"audio_encoder", "vision_encoder"} & {n for n, c in model.run_counts().items() if c}
    model.assess(QUESTION, **media_of([], "short"))
    assert model.run_counts()["audio_encoder"] == 1


@pytest.mark.slow
def test_a_sound_beside_a_picture_is_another_one(files: FamilyFiles) -> None:
    model = SafeModel.load(files.bundle, threads=1, policy=ALLOW)
    for _ in range(2):
        model.assess(QUESTION, **media_of([], "short"))
        model.assess(QUESTION, **media_of(["small"], "short"))
        model.assess(QUESTION, **media_of(["small", "wide"], "short"))
    assert model.run_counts()["audio_encoder"] == 2
    assert model.run_counts()["vision_encoder"] == 2


@pytest.mark.slow
def test_sounds_of_another_length_than_the_encoder_s_are_refused(model: SafeModel) -> None:
    with pytest.raises(MediaError, match="25 ms, too short"):
        model.assess(QUESTION, audio=(np.zeros(399, np.float32), RATE))
    seconds = model._requests.bundle.manifest.processors["audio"]["frames"]["max_seconds"]
    # 4096 positions of 80 ms.
    assert seconds == 327
    with pytest.raises(MediaError, match="at most 327 s"):
        model.assess(QUESTION, audio=(np.zeros(328 * RATE, np.float32), RATE))


def audio_of(manifest: dict[str, Any]) -> dict[str, Any]:
    section: dict[str, Any] = manifest["processors"]["audio"]
    return section


MALFORMED: dict[str, tuple[Callable[[dict[str, Any]], Any], type[BundleError], str]] = {
    "neither": (lambda m: audio_of(m).update(frames=None), SchemaError, "need one of"),
    "field": (lambda m: audio_of(m)["frames"].update(videos=1), SchemaError, "videos"),
    "spectrum": (lambda m: audio_of(m)["frames"].update(n_fft=256), SchemaError, "400 samples"),
    "bins": (lambda m: audio_of(m)["frames"].update(max_frequency=0.0), SchemaError, "0.0 to 0.0"),
    "layout": (
        lambda m: m["processors"]["image"].update(layout={"layout": "plain", "tokens": 256}),
        SchemaError,
        "need each other",
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
@pytest.mark.parametrize("change", [{"frames_per_token": 5}, {"feature_size": 40}], ids=str)
def test_an_encoder_that_fails_is_an_error(
    change: dict[str, Any], files: FamilyFiles, tmp_path: Path
) -> None:
    bundle = changed(files, tmp_path, lambda m: audio_of(m)["frames"].update(change))
    model = SafeModel.load(bundle, threads=1, policy=ALLOW)
    reply = model.generate(QUESTION, **media_of([], "long"))
    assert (reply.verdict.decision, reply.text) == (Decision.ERROR, None)


def test_longrope_has_the_context_in_which_it_does_not_change() -> None:
    config = phi4_multimodal(rope_parameters=LONGROPE, max_position_embeddings=4096).config
    spec = phi3_spec(config)
    assert spec.context_length == 2048
    base = 10000.0 ** (-np.arange(0, 16, 2) / 16)
    (rope,) = spec.ropes
    np.testing.assert_allclose(rope.inverse_frequencies, base / LONGROPE["short_factor"], rtol=1e-6)
    # sqrt(1 + ln(4096 / 2048) / ln(2048)), LongRoPE's factor of cosine and sine.
    assert rope.scale == pytest.approx(math.sqrt(1 + math.log(2) / math.log(2048)))


def refused(folder: Path, files: dict[str, Any], **config: Any) -> None:
    """Opens a folder that has no weights."""
    document = phi4_multimodal().config.to_dict()
    for section, changes in config.items():
        if isinstance(document.get(section), dict):
            document[section].update(changes)
        else:
            document[section] = changes
    (folder / "config.json").write_text(json.dumps(document))
    Files(**files).save_pretrained(folder)
    find_family(folder)[1](folder)


def test_parameters_may_stand_in_one_file_of_the_processor(tmp_path: Path) -> None:
    config = phi4_multimodal().config
    config.save_pretrained(tmp_path)
    Files(dynamic_hd=7, preemphasis=0.5).save_pretrained(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    own = json.loads(path.read_text())
    path.unlink()
    whole = {"processor_class": "Phi4MultimodalProcessor"}
    whole |= {"image_processor": own, "audio_processor": own}
    (tmp_path / "processor_config.json").write_text(json.dumps(whole))
    (step,) = crops_and_whole(tmp_path, config.vision_config).steps
    assert step == FillCrops(64, 2, 7)
    extractor = read_extractor(tmp_path, Phi4MultimodalFeatureExtractor, {"feature_size": 80})
    assert extractor.preemphasis == 0.5


# What differs in preprocessor_config.json and in config.json, and what is said of it.
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "adapters in the weights": ({}, {"vision_lora": {"r": 256}}, "adapters.*vision_lora"),
    "scaling": (
        {},
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
        "transformers refuses",
    ),
    "layer": ({}, {"vision_config": {"feature_layer": 7}}, "is 7.*has 3 layers"),
    "layer 0": ({}, {"vision_config": {"feature_layer": 0}}, "is 0.*has 3 layers"),
    "activation of the tower": ({}, {"vision_config": {"hidden_act": "tanh"}}, "'tanh'"),
    "activation of the encoder": (
        {},
        {"audio_config": {"conv_glu_type": "sigmoid"}},
        "conv_glu_type 'sigmoid'.*swish",
    ),
    "reduction": ({}, {"audio_config": {"time_reduction": 6}}, "time_reduction is 6"),
    "states in pairs": ({}, {"audio_config": {"downsample_rate": 2}}, "downsample_rate 2"),
    "distances": (
        {},
        {"audio_config": {"bias_symmetric": True, "bias_max_distance": 100}},
        "distance of 100.*500",
    ),
    "crops": ({"size": {"height": 448, "width": 448}}, {}, "448.*image_size 64"),
    "sizes": ({}, {"vision_config": {"crop_size": 32}}, "crop_size 32"),
    "features": (
        {"patch_size": 4},
        {"vision_config": {"patch_size": 4}},
        "8 x 8 features.*counts 256",
    ),
    "interpolation": ({"resample": 2}, {}, "resample 2"),
    "number of crops": ({"dynamic_hd": 65}, {}, "dynamic_hd 65"),
    "image processor": (
        {"image_processor_type": "CLIPImageProcessor"},
        {},
        "'CLIPImageProcessor'.*Phi4Multimodal",
    ),
    "rate": ({"sampling_rate": 8000}, {}, "sampling_rate is 8000.*16000"),
    "compression": ({"audio_compression_rate": 4}, {}, "audio_compression_rate is 4.*8"),
    "bins": ({"feature_size": 40}, {}, "feature_size is 40.*80"),
    "frames": ({"win_length": 600}, {}, "600 samples for spectra of 512"),
    "feature extractor": (
        {"feature_extractor_type": "WhisperFeatureExtractor"},
        {},
        "possible: Phi4Multimodal",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_exported_is_refused_without_weights(case: str, tmp_path: Path) -> None:
    files, config, message = REFUSED[case]
    with pytest.raises(ExportError, match=message):
        refused(tmp_path, files, **config)


def test_adapters_that_are_switched_are_refused_without_weights(tmp_path: Path) -> None:
    for name in ("vision-lora", "speech-lora"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text("{}")
    with pytest.raises(ExportError, match=r"speech-lora, vision-lora.*merge_and_unload"):
        refused(tmp_path, {})


@pytest.mark.slow
def test_ids_are_those_of_transformers_own_processor(torch_model: SafetyTokenModel) -> None:
    pytest.importorskip("torchvision", reason="its image processor needs it")
    from transformers import Phi4MultimodalFeatureExtractor
    from transformers.models.phi4_multimodal.image_processing_phi4_multimodal import (
        Phi4MultimodalImageProcessor,
    )
    from transformers.models.phi4_multimodal.processing_phi4_multimodal import (
        Phi4MultimodalProcessor,
    )

    tokenizer: Any = torch_model.tokenizer
    for kind, token in (("image", IMAGE), ("audio", AUDIO)):
        setattr(tokenizer, f"{kind}_token", token)
        setattr(tokenizer, f"{kind}_token_id", tokenizer.convert_tokens_to_ids(token))
    own = Phi4MultimodalProcessor(
        Phi4MultimodalImageProcessor(size={"height": 64, "width": 64}, patch_size=2),
        Phi4MultimodalFeatureExtractor(),
        tokenizer,
    )
    ((text, names, sound),) = turns = ALONE["a sound beside two pictures"]
    parts = [{"type": "image"}] * len(names) + [{"type": "audio"}, {"type": "text", "text": text}]
    written = tokenizer.apply_chat_template(
        [{"role": "user", "content": parts}], tokenize=False, add_generation_prompt=True
    )
    found = own(
        text=[written],
        images=[PICTURES[name] for name in names],
        audio=[SOUNDS[str(sound)]],
        return_tensors="pt",
    )
    assert found["input_ids"][0].tolist() == ids_of(torch_model, turns, [])
