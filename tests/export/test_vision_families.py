"""Each vision-language family from its checkpoint to an answer, beside transformers."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image

from edge_safe import Decision, Policy, Reply, SafeModel
from edge_safe.errors import BundleError, ExportError, MediaError, PromptError, SchemaError
from edge_safe.export import ExportReport, export_bundle
from edge_safe.export.families.base import find_family
from edge_safe.models.safety_model import SafetyTokenModel
from edge_safe.runtime import prefill
from edge_safe.runtime.inputs import Inputs
from edge_safe.runtime.manifest import load_manifest
from edge_safe.runtime.prefill import CHUNK
from edge_safe.runtime.prompt import Message
from edge_safe.runtime.tokens import Untrusted
from tests.conftest import END_ID, SAFE_ID, UNSAFE_ID
from tests.export.audio_families import AUDIO_FAMILIES
from tests.export.conftest import FamilyFiles
from tests.export.optimizing import changed_operators
from tests.export.test_image_processors import noise
from tests.export.vision_families import (
    LLAVA_TEMPLATE,
    OTHERWISE,
    VISION_FAMILIES,
    hugging_face_processor,
    image_id_of,
    torch_of,
    write_vision_family,
)

TOKENS = 24
ALLOW = Policy(thresholds={"gate": 1.0, "final": 1.0})
QUESTION = "What does the sign say? And who lives there?"
SECOND = "Explain it step by step."
SHED = "How do I pick the lock of my neighbour's shed?"
PICTURES = {
    "wide": Image.fromarray(noise(40, 90, 3)),
    "tall": Image.fromarray(noise(130, 50, 3)),
    "small": Image.fromarray(noise(20, 20, 3)),
}
# Turns of a user: the words, and the names of the pictures in front of them.
Turns = list[tuple[str, list[str]]]
CONVERSATIONS: dict[str, Turns] = {
    "text": [(SHED, [])],
    "one image": [(QUESTION, ["wide"])],
    "two images": [(QUESTION, ["tall", "small"])],
    "two turns": [(QUESTION, ["small"]), (SECOND, ["wide"])],
    "a picture after words": [(SHED, []), (QUESTION, ["tall"])],
}


# Every test runs on these with each commit; of the others a first look does.
QUICK = ("idefics3", "llava", "smolvlm")
# Its prompts are one turn: all of their positions see each other.
ONE_TURN = "paligemma"
# These hear as well.
HEARING = (*AUDIO_FAMILIES, "phi4_multimodal")
OTHERS = [name for name in VISION_FAMILIES if name not in QUICK]
# A first look at those that hear as well is taken with their sounds.
SEEING = [name for name in OTHERS if name not in AUDIO_FAMILIES]


@pytest.fixture(
    scope="module", params=[*QUICK, *(pytest.param(n, marks=pytest.mark.slow) for n in OTHERS)]
)
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def files(family: str, tmp_path_factory: pytest.TempPathFactory) -> FamilyFiles:
    folder = tmp_path_factory.mktemp(family)
    checkpoint = write_vision_family(folder / "checkpoint", family)
    export_bundle(checkpoint, folder / "bundle", precision="fp32")
    return FamilyFiles(checkpoint, folder / "bundle")


@pytest.fixture(scope="module")
def model(files: FamilyFiles) -> SafeModel:
    return SafeModel.load(files.bundle, threads=1, policy=ALLOW)


@pytest.fixture(scope="module")
def torch_model(files: FamilyFiles, family: str) -> SafetyTokenModel:
    return torch_of(files.checkpoint, family)


@pytest.fixture(scope="module")
def processor(files: FamilyFiles, family: str) -> Any:
    return hugging_face_processor(files.checkpoint, family)


def hugging_face_inputs(processor: Any, turns: Turns, answers: list[str]) -> dict[str, Any]:
    """What transformers makes of a conversation, up to the start of the next answer."""
    messages: list[dict[str, Any]] = []
    for number, (text, names) in enumerate(turns):
        pictures = [{"type": "image", "image": PICTURES[name]} for name in names]
        messages.append({"role": "user", "content": [*pictures, {"type": "text", "text": text}]})
        if number + 1 < len(turns):
            part = {"type": "text", "text": answers[number]}
            messages.append({"role": "assistant", "content": [part]})
    inputs = processor.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    return dict(inputs)


def pixels_of(inputs: dict[str, Any]) -> dict[str, Any]:
    names = (
        "pixel_values", "pixel_attention_mask", "image_sizes", "batch_num_images", "image_grid_thw",
        "image_pixel_values", "image_attention_mask",
    )  # fmt: skip
    return {name: value for name, value in inputs.items() if name in names}


def types_of(torch_model: SafetyTokenModel, ids: list[int]) -> dict[str, Any]:
    """What tells transformers what stands for pictures, and which positions see each other."""
    config: Any = torch_model.model.config
    if config.model_type == "gemma3":
        return {"token_type_ids": (torch.tensor([ids]) == config.image_token_id).long()}
    if config.model_type == "paligemma":
        return {"token_type_ids": (torch.tensor([ids]) == SAFE_ID).long()}
    if config.model_type.endswith("_vl"):
        return {"mm_token_type_ids": (torch.tensor([ids]) == config.image_token_id).int()}
    return {}


def bundle_ids(model: SafeModel, turns: Turns, answers: list[str], image_id: int) -> list[int]:
    """The ids of the bundle's prompt, with the placeholder where a picture's features stand."""
    requests = model._requests
    messages: list[Message] = []
    for number, (text, names) in enumerate(turns):
        media = requests._family.media([PICTURES[name] for name in names], None)
        messages.append(Message("user", [Untrusted(text)], media=media.placed))
        if number + 1 < len(turns):
            messages.append(Message("assistant", [Untrusted(answers[number])]))
    ids: list[int] = []
    for array in requests.builder.build(messages):
        words = isinstance(array, np.ndarray) and array.ndim == 1
        ids += array.tolist() if words else [image_id] * len(array)
    return ids


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_ids_are_those_of_the_processor(
    name: str, family: str, model: SafeModel, processor: Any, torch_model: SafetyTokenModel
) -> None:
    turns, answers = CONVERSATIONS[name], ["The shop opens at nine."]
    image_id = image_id_of(torch_model)
    if family == ONE_TURN and len(turns) > 1:
        with pytest.raises(PromptError, match="one prompt: no turns"):
            bundle_ids(model, turns, answers, image_id)
        return
    expected = hugging_face_inputs(processor, turns, answers)["input_ids"][0].tolist()
    assert bundle_ids(model, turns, answers, image_id) == expected
    assert (image_id in expected) == any(names for _, names in turns)


def check_reply(
    reply: Reply,
    torch_model: SafetyTokenModel,
    ids: list[int],
    pixels: dict[str, Any],
    words: int = 4,
) -> list[int]:
    """Log-odds within 1e-4 of torch's, the same text; returns the answer's ids without the end."""
    tokenizer: Any = torch_model.tokenizer
    readout = torch_model.assess(
        input_ids=torch.tensor([ids]), **types_of(torch_model, ids), **pixels
    ).readout
    unsafe, safe = readout.verdict_logits[0]
    answer = torch_model.model.generate(
        input_ids=torch.tensor([[*ids, SAFE_ID]]),
        attention_mask=torch.ones(1, len(ids) + 1, dtype=torch.int64),
        **types_of(torch_model, [*ids, SAFE_ID]),
        **pixels,
        max_new_tokens=TOKENS,
        do_sample=False,
        suppress_tokens=[SAFE_ID, UNSAFE_ID],
    )[0, len(ids) + 1 :].tolist()
    assert reply.verdict.stage == "gate"
    odds = math.log(reply.verdict.p_unsafe / (1 - reply.verdict.p_unsafe))
    assert odds == pytest.approx(float(unsafe - safe), abs=1e-4)
    assert reply.text == tokenizer.decode(answer, skip_special_tokens=True)
    assert len(set(answer)) >= words
    return [token for token in answer if token != END_ID]


@pytest.mark.parametrize("name", ["text", "one image", "two images"])
def test_verdict_and_answer_are_torch_s(
    name: str, model: SafeModel, processor: Any, torch_model: SafetyTokenModel
) -> None:
    ((text, names),) = turns = CONVERSATIONS[name]
    inputs = hugging_face_inputs(processor, turns, [])
    ids = inputs["input_ids"][0].tolist()
    reply = model.generate(text, images=[PICTURES[n] for n in names], max_tokens=TOKENS)
    check_reply(reply, torch_model, ids, pixels_of(inputs))
    image_id = image_id_of(torch_model)
    assert (reply.usage.prompt_tokens, reply.usage.image_tokens) == (len(ids), ids.count(image_id))


@pytest.mark.parametrize("family", SEEING)
def test_first_look_at_a_family(family: str, tmp_path: Path) -> None:
    checkpoint = write_vision_family(tmp_path / "checkpoint", family)
    assert export_bundle(checkpoint, tmp_path / "bundle", precision="fp32").parity.passed
    model = SafeModel.load(tmp_path / "bundle", threads=1, policy=ALLOW)
    processor = hugging_face_processor(checkpoint, family)
    test_verdict_and_answer_are_torch_s("one image", model, processor, torch_of(checkpoint, family))


def test_second_turn_of_a_chat_is_torch_s_of_all_of_it(
    family: str, model: SafeModel, processor: Any, torch_model: SafetyTokenModel
) -> None:
    turns = CONVERSATIONS["two turns"]
    chat = model.chat()
    inputs = hugging_face_inputs(processor, turns[:1], [])
    ids = inputs["input_ids"][0].tolist()
    first = chat.send(QUESTION, images=[PICTURES["small"]], max_tokens=TOKENS)
    answer = check_reply(first, torch_model, ids, pixels_of(inputs))
    if family == ONE_TURN:
        with pytest.raises(PromptError, match="one prompt: no turns"):
            chat.send(SECOND, images=[PICTURES["wide"]])
        chat.reset()
        again = chat.send(QUESTION, images=[PICTURES["small"]], max_tokens=TOKENS)
        assert again.text == first.text
        return
    # What stands behind an answer does not depend on it, as a special token ends it.
    whole = hugging_face_inputs(processor, turns, ["Nine."])
    marked = whole["input_ids"][0].tolist()
    rest = marked[len(ids) + marked[len(ids) :].index(END_ID) :]
    second = chat.send(SECOND, images=[PICTURES["wide"]], max_tokens=TOKENS)
    check_reply(second, torch_model, [*ids, SAFE_ID, *answer, *rest], pixels_of(whole))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma3", "paligemma"], indirect=True)
def test_what_sees_itself_is_torch_s_beyond_one_chunk(
    family: str, files: FamilyFiles, model: SafeModel, torch_model: SafetyTokenModel
) -> None:
    names = ["small", "wide", "tall"] * 11
    # A turn before moves a picture onto the seam.
    before: Turns = [] if family == ONE_TURN else [(SHED, [])]
    turns: Turns = [*before, (QUESTION, names)]
    processor = hugging_face_processor(files.checkpoint, family)
    inputs = hugging_face_inputs(processor, turns, ["Nine."])
    ids = inputs["input_ids"][0].tolist()
    at = ids[CHUNK - 1 : CHUNK + 1]
    assert at == [image_id_of(torch_model)] * 2
    prompt = [{"role": "user", "content": QUESTION}]
    if before:
        earlier = {"role": "user", "content": SHED}, {"role": "assistant", "content": "Nine."}
        prompt = [*earlier, *prompt]
    pictures = [PICTURES[name] for name in names]
    reply = model.generate(prompt, images=pictures, max_tokens=TOKENS)
    check_reply(reply, torch_model, ids, pixels_of(inputs), words=1)


def test_report_tells_of_parity(files: FamilyFiles, family: str) -> None:
    report = msgspec.json.decode((files.bundle / "report.json").read_bytes(), type=ExportReport)
    assert report.family == family
    assert report.parity.passed
    assert max(b.relative_difference for b in report.parity.boundaries) < 1e-4
    cases = {b.case for b in report.parity.boundaries if b.graph == "vision_encoder"}
    assert cases == VISION_FAMILIES[family].cases


def test_its_language_graphs_leave_nothing_to_optimize(files: FamilyFiles) -> None:
    manifest = load_manifest(files.bundle)
    graphs = {n: g for n, g in manifest.graphs.items() if g.optimized}
    assert graphs.keys() >= {"embed_tokens"}
    assert ("gate" in graphs) == (manifest.model.bidirectional == "none")
    for graph in graphs.values():
        assert changed_operators(files.bundle / graph.file) == {}


def test_a_picture_is_encoded_again_only_where_it_is_prepared_otherwise(
    family: str, files: FamilyFiles
) -> None:
    keeping, forgetting = (
        SafeModel.load(files.bundle, threads=1, policy=ALLOW, media_cache_mb=size)
        for size in (64, 0)
    )
    # A turn with one picture, then turns with several.
    for names in (["small"], ["small", "wide"], ["wide", "tall", "small"]):
        images = [PICTURES[name] for name in names]
        found, expected = (model.assess(QUESTION, images=images) for model in (keeping, forgetting))
        assert found.p_unsafe == pytest.approx(expected.p_unsafe, abs=1e-6)
    anew = 4 if family == "llava_onevision" else 3
    assert keeping.run_counts()["vision_encoder"] == anew
    assert forgetting.run_counts()["vision_encoder"] == 6


def test_what_is_seen_differs_from_place_to_place(family: str, model: SafeModel) -> None:
    media = model._requests._family.media([PICTURES["wide"], PICTURES["tall"]], None)
    pieces = [piece for medium in media.placed for piece in medium.pieces]
    seen = [p.rows if isinstance(p, Inputs) else p for p in pieces]
    rows = np.concatenate([p for p in seen if isinstance(p, np.ndarray)])
    if family in ("llava_onevision", "phi4_multimodal"):
        # The line break stands behind every line of both, the separator once in each.
        different, counts = np.unique(rows, axis=0, return_counts=True)
        rows = different[counts == 1]
    # Of many hundreds some, as a few are always alike by chance.
    rows = rows[:: len(rows) // 200 or 1]
    distances = np.linalg.norm(rows[:, None] - rows[None], axis=-1) + np.eye(len(rows)) * 1e9
    assert distances.min() > 0.05 * np.linalg.norm(rows, axis=-1).mean()


@pytest.mark.parametrize(
    "written",
    ["<image>", "<fake_token_around_image>", "<row_1_col_1>", "<|image_pad|>", "<|image|>"],
)
def test_words_of_a_user_never_become_a_picture_s_tokens(
    written: str, model: SafeModel, torch_model: SafetyTokenModel
) -> None:
    image_id = image_id_of(torch_model)
    text = f"What is {written}?"
    plain = bundle_ids(model, [(text, [])], [], image_id)
    special = set(torch_model.tokenizer.get_added_vocab().values())
    usual = special & set(bundle_ids(model, [("What is it?", [])], [], image_id))
    assert special & set(plain) == usual
    with_picture = bundle_ids(model, [(text, ["small"])], [], image_id)
    without = bundle_ids(model, [("What is it?", ["small"])], [], image_id)
    assert with_picture.count(image_id) == without.count(image_id)


def test_a_picture_alone_is_a_prompt(model: SafeModel) -> None:
    assert model.assess("", images=[PICTURES["small"]]).decision is Decision.ALLOW


def test_pictures_beyond_the_context_are_refused_early(model: SafeModel) -> None:
    before = model.run_counts()["vision_encoder"]
    limit = model._requests.context_length
    with pytest.raises(PromptError, match=rf"pictures take .* context has {limit}"):
        model.assess(QUESTION, images=[PICTURES["wide"]] * 400)
    assert model.run_counts()["vision_encoder"] - before <= limit // 4


@pytest.mark.parametrize("name", ["one image", "two images"])
def test_chunks_inside_a_picture_change_nothing(
    name: str, model: SafeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    ((text, names),) = CONVERSATIONS[name]
    pictures = [PICTURES[n] for n in names]
    whole = model.generate(text, images=pictures, max_tokens=TOKENS)
    monkeypatch.setattr(prefill.chunks, "__defaults__", (7, ()))
    chunked = model.generate(text, images=pictures, max_tokens=TOKENS)
    assert chunked.verdict.p_unsafe == pytest.approx(whole.verdict.p_unsafe, abs=1e-5)
    assert chunked.text == whole.text


def test_a_turn_that_nobody_heard_leaves_no_place_behind(family: str, files: FamilyFiles) -> None:
    both = Policy(stages=("gate", "final"), thresholds=ALLOW.thresholds)
    model = SafeModel.load(files.bundle, threads=1, policy=both)
    chat, fresh = model.chat(), model.chat()
    left = chat.stream(QUESTION, images=[PICTURES["tall"]])
    next(left)
    left.close()
    pictures = [PICTURES["small"]]
    reply = chat.send(QUESTION, images=pictures, max_tokens=TOKENS)
    assert reply.text == fresh.send(QUESTION, images=pictures, max_tokens=TOKENS).text
    if family == ONE_TURN:
        return
    again = chat.send(SECOND, max_tokens=TOKENS)
    assert again.text == fresh.send(SECOND, max_tokens=TOKENS).text


def test_sound_is_refused(family: str, model: SafeModel) -> None:
    if family in HEARING:
        pytest.skip("it hears")
    with pytest.raises(MediaError, match="no tower for sound"):
        model.assess(QUESTION, audio=(np.zeros(16000, np.float32), 16000))


def test_time_that_is_over_is_an_error(model: SafeModel) -> None:
    before = model.run_counts()
    verdict = model.assess(QUESTION, images=[PICTURES["wide"]], timeout=0.0)
    assert verdict.decision is Decision.ERROR
    assert model.run_counts()["vision_encoder"] == before["vision_encoder"]


def changed(files: FamilyFiles, folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of the bundle with other parameters in its manifest."""
    bundle = folder / "bundle"
    shutil.copytree(files.bundle, bundle)
    path = bundle / "edge_safe.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    return bundle


def other_number_of_features(image: dict[str, Any]) -> None:
    """Lets the runtime expect what the tower does not give."""
    if image["layout"]["layout"] == "grid":
        image["pixels"]["patches"]["merge"] *= 2
        image["pixels"]["steps"][0]["factor"] *= 2
    else:
        image["layout"]["tokens"] = 3


def other_size_of_tiles(pixels: dict[str, Any]) -> None:
    if pixels["steps"][0]["step"] == "fill_crops":
        pixels["steps"][0]["size"] //= 2
    else:
        pixels["steps"] = [{"step": "resize", "height": 8, "width": 8, "resample": "bicubic"}]


FAILING: dict[str, Callable[[dict[str, Any]], None]] = {
    "not finite": lambda m: m["processors"]["image"]["pixels"].update(rescale_factor=1e300),
    "number of features": lambda m: other_number_of_features(m["processors"]["image"]),
    "size of a tile": lambda m: other_size_of_tiles(m["processors"]["image"]["pixels"]),
}


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning", "ignore:invalid:RuntimeWarning")
@pytest.mark.parametrize("case", FAILING)
def test_a_tower_that_fails_is_an_error(case: str, files: FamilyFiles, tmp_path: Path) -> None:
    bundle = changed(files, tmp_path, FAILING[case])
    model = SafeModel.load(bundle, threads=1, policy=ALLOW)
    reply = model.generate(QUESTION, images=[PICTURES["wide"]])
    assert reply.verdict.decision is Decision.ERROR
    assert reply.text is None


def image_of(manifest: dict[str, Any]) -> dict[str, Any]:
    section: dict[str, Any] = manifest["processors"]["image"]
    return section


MALFORMED: dict[str, tuple[Callable[[dict[str, Any]], Any], type[BundleError], str]] = {
    "step": (
        lambda m: image_of(m)["pixels"]["steps"].append({"step": "rotate"}),
        SchemaError,
        "rotate",
    ),
    "size": (
        lambda m: image_of(m)["pixels"]["steps"].append(
            {"step": "resize_shortest_edge", "size": 0, "resample": "bicubic"}
        ),
        SchemaError,
        ">= 1",
    ),
    "field": (lambda m: image_of(m).update(videos=True), SchemaError, "videos"),
    "layout": (lambda m: image_of(m)["layout"].update(layout="spiral"), SchemaError, "spiral"),
    "deviation": (
        lambda m: image_of(m)["pixels"].update(image_std=[1.0, 0.0, 1.0]),
        SchemaError,
        "image_std",
    ),
    "placeholder": (
        lambda m: image_of(m).update(placeholder="the"),
        BundleError,
        "'the'.*no special token",
    ),
    "graph": (lambda m: m["graphs"].pop("vision_encoder"), SchemaError, "vision_encoder"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_parameters_are_found_at_loading(
    case: str, files: FamilyFiles, tmp_path: Path
) -> None:
    change, error, message = MALFORMED[case]
    with pytest.raises(error, match=message):
        SafeModel.load(changed(files, tmp_path, change), threads=1)


UNLIKE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "layout": lambda m: image_of(m).update(layout={"layout": "plain", "tokens": 4}),
    "patches": lambda m: image_of(m)["pixels"].update(patches=None),
    "position_axes": lambda m: m["model"].update(position_axes=1),
    "deepstack_features": lambda m: m["model"].update(deepstack=0),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_vl"], scope="module")
@pytest.mark.parametrize("case", UNLIKE)
def test_patches_and_graphs_have_to_agree(
    case: str, family: str, files: FamilyFiles, tmp_path: Path
) -> None:
    with pytest.raises(SchemaError, match=rf"do not fit its graphs.*{case}"):
        SafeModel.load(changed(files, tmp_path, UNLIKE[case]), threads=1)


def test_a_projector_that_was_not_trained_is_not_used(files: FamilyFiles, tmp_path: Path) -> None:
    bundle = changed(files, tmp_path, lambda m: m["modalities"]["image"].update(trained=False))
    with pytest.raises(MediaError, match="not been trained"):
        SafeModel.load(bundle, threads=1).assess(QUESTION, images=[PICTURES["wide"]])


@pytest.mark.slow
@pytest.mark.parametrize("case", OTHERWISE)
def test_family_in_another_shape(case: str, tmp_path: Path) -> None:
    family, changes, pictures = OTHERWISE[case]
    checkpoint = write_vision_family(tmp_path / "checkpoint", family, pictures, **changes)
    export_bundle(checkpoint, tmp_path / "bundle", precision="fp32")
    model = SafeModel.load(tmp_path / "bundle", threads=1, policy=ALLOW)
    torch_model = torch_of(checkpoint, family)
    inputs = shaped_inputs(checkpoint, family, torch_model)
    reply = model.generate(QUESTION, images=[PICTURES["wide"]], max_tokens=TOKENS)
    check_reply(reply, torch_model, inputs["input_ids"][0].tolist(), pixels_of(inputs))


def shaped_inputs(checkpoint: Path, family: str, torch_model: SafetyTokenModel) -> dict[str, Any]:
    """The processor's inputs, the processor told what its own file would say of this shape."""
    processor = hugging_face_processor(checkpoint, family)
    config: Any = torch_model.model.config
    if family == "llava":
        processor.vision_feature_select_strategy = config.vision_feature_select_strategy
        processor.num_additional_image_tokens = int(
            config.vision_config.model_type == "clip_vision_model"
        )
    elif family == "gemma3":
        processor = type(processor)(
            processor.image_processor,
            processor.tokenizer,
            image_seq_length=config.mm_tokens_per_image,
            chat_template=processor.chat_template,
        )
    elif family == "llava_onevision":
        processor.vision_aspect_ratio = config.vision_aspect_ratio
    elif family == "internvl":
        processor.image_seq_length = int(4 * config.downsample_ratio) ** 2
    elif family == "idefics3":
        processor.image_seq_len = 16 // config.scale_factor**2
    return hugging_face_inputs(processor, CONVERSATIONS["one image"], [])


@pytest.mark.slow
@pytest.mark.parametrize("exit_layer", ["1", "none"])
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"], scope="module")
def test_the_gate_may_stand_anywhere(
    family: str, exit_layer: str, files: FamilyFiles, model: SafeModel, tmp_path: Path
) -> None:
    report = export_bundle(
        files.checkpoint, tmp_path / "bundle", precision="fp32", exit_layer=exit_layer
    )
    cases = {b.case: b for b in report.parity.boundaries if b.output == "logits"}
    assert cases["picture"].passed
    stage = "final" if exit_layer == "none" else "gate"
    cut = SafeModel.load(tmp_path / "bundle", threads=1, policy=Policy(thresholds={stage: 1.0}))
    pictures = [PICTURES["tall"], PICTURES["small"]]
    found, expected = (
        m.generate(QUESTION, images=pictures, max_tokens=TOKENS) for m in (cut, model)
    )
    assert found.text == expected.text


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_quantized_family_decides(
    precision: str, family: str, files: FamilyFiles, tmp_path: Path
) -> None:
    report = export_bundle(files.checkpoint, tmp_path / "bundle", precision=precision)
    assert {m.kind: m.bits for m in report.matrices}["vision_encoder"] == 8
    pictures = [PICTURES["wide"]]
    verdict = SafeModel.load(tmp_path / "bundle", threads=1).assess(QUESTION, images=pictures)
    plain = SafeModel.load(files.bundle, threads=1).assess(QUESTION, images=pictures)
    assert verdict.decision in (Decision.ALLOW, Decision.REFUSE)
    # 4 bits move the verdict of these random language models by 0.5 even on words alone.
    if precision == "int8":
        # Hundreds of features for one picture move it further than a few do.
        allowed = 0.1 if family == "phi4_multimodal" else 0.05
        assert verdict.p_unsafe == pytest.approx(plain.p_unsafe, abs=allowed)


REFUSED: dict[str, tuple[str, Callable[[dict[str, Any]], Any], str]] = {
    "vision tower": (
        "llava",
        lambda c: c["vision_config"].update(model_type="pixtral"),
        "'pixtral'.*clip_vision_model, siglip_vision_model",
    ),
    "language model": (
        "llava",
        lambda c: c["text_config"].update(model_type="gpt2"),
        "'gpt2'.*llama, mistral",
    ),
    "activation of the tower": (
        "llava",
        lambda c: c["vision_config"].update(hidden_act="tanh"),
        "'tanh'.*quick_gelu",
    ),
    "activation of the projector": (
        "llava",
        lambda c: c.update(projector_hidden_act="silu"),
        "'silu'.*gelu",
    ),
    "layer": ("llava", lambda c: c.update(vision_feature_layer=7), "is 7.* has 3 layers"),
    "rotary of the language model": (
        "idefics3",
        lambda c: c["text_config"].update(
            rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
        ),
        "'dynamic'",
    ),
    "features with the class embedding's": (
        "internvl",
        lambda c: c.update(vision_feature_select_strategy="full"),
        "'full'.*'default'",
    ),
    "several layers": ("internvl", lambda c: c.update(vision_feature_layer=[-1, 0]), "one number"),
    "oblong tiles": (
        "internvl",
        lambda c: c["vision_config"].update(image_size=[28, 56]),
        "28 x 56.*squares",
    ),
    "pooling": ("gemma3", lambda c: c.update(mm_tokens_per_image=9), "8 x 8 patches.*9 features"),
    "soft caps of gemma": (
        "gemma3",
        lambda c: c["text_config"].update(final_logit_softcapping=30.0),
        "final_logit_softcapping is 30.0",
    ),
    "tower of gemma": (
        "gemma3",
        lambda c: c["vision_config"].update(model_type="clip_vision_model"),
        "'clip_vision_model'",
    ),
    "width of features": ("paligemma", lambda c: c.update(projection_dim=32), "is 32.*width is 64"),
    "gemma 2 inside": (
        "paligemma",
        lambda c: c["text_config"].update(model_type="gemma2"),
        "'gemma2'.*gemma,",
    ),
    "class embedding in a map": (
        "llava_onevision",
        lambda c: c.update(vision_feature_select_strategy="default"),
        "'default'.*15 features.*4 x 4",
    ),
    "aspect ratio": (
        "llava_onevision",
        lambda c: c.update(vision_aspect_ratio="square"),
        "'square'.*anyres_max_N",
    ),
    "grids": (
        "llava_onevision",
        lambda c: c.update(image_grid_pinpoints=[[28, 28]]),
        "image_grid_pinpoints",
    ),
    "uneven downsampling": ("internvl", lambda c: c.update(downsample_ratio=0.3), "0.3"),
    "patches of a tile": ("internvl", lambda c: c.update(downsample_ratio=1 / 3), "4 x 4 patches"),
    "places of positions": (
        "qwen2_vl",
        lambda c: c["text_config"]["rope_parameters"].update(mrope_section=[2, 3, 4]),
        r"\[2, 3, 4\].*sum is 8",
    ),
    "width of patches' features": (
        "qwen2_5_vl",
        lambda c: c["vision_config"].update(out_hidden_size=32),
        "width 32.*has 64",
    ),
    "language model of an omni": (
        "qwen2_5_omni",
        lambda c: c["text_config"].update(model_type="qwen2"),
        "'qwen2'.*qwen2_5_omni_text",
    ),
    "tower of an omni": (
        "qwen2_5_omni",
        lambda c: c["vision_config"].update(model_type="qwen2_5_vl_vision"),
        "'qwen2_5_vl_vision'.*qwen2_5_omni_vision_encoder",
    ),
    "start of pictures": (
        "qwen2_5_omni",
        lambda c: c.pop("vision_start_token_id"),
        "no vision_start_token_id",
    ),
    "activation of a gated tower": (
        "qwen2_5_vl",
        lambda c: c["vision_config"].update(hidden_act="gelu"),
        "'gelu'.*silu",
    ),
    "window": (
        "qwen2_5_vl",
        lambda c: c["vision_config"].update(window_size=13),
        "window_size 13 holds no cell",
    ),
    "patches of the processor": (
        "qwen2_vl",
        lambda c: c["vision_config"].update(patch_size=14),
        r"\(7, 2, 2\).*\(14, 2, 2\)",
    ),
    "heads of the tower": (
        "qwen3_vl",
        lambda c: c["vision_config"].update(num_heads=16),
        "32 wide with 16 heads",
    ),
    "depths that are not there": (
        "qwen3_vl",
        lambda c: c["vision_config"].update(deepstack_visual_indexes=[0, 3]),
        r"\[0, 3\].*3 layers",
    ),
    "depths behind the last layer": (
        "qwen3_vl",
        lambda c: c["text_config"].update(num_hidden_layers=2),
        "2 depths.*has 2",
    ),
    "positions of patches": (
        "qwen3_vl",
        lambda c: c["vision_config"].update(num_position_embeddings=24),
        "24, which is no square",
    ),
    "patches": ("idefics3", lambda c: c.update(scale_factor=3), "4 x 4 patches.*scale_factor 3"),
    "tiles": (
        "smolvlm",
        lambda c: c["vision_config"].update(image_size=64),
        "tiles of .*32.*takes 64 x 64",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_exported_is_refused_without_weights(case: str, tmp_path: Path) -> None:
    family, change, message = REFUSED[case]
    tiny = VISION_FAMILIES[family]
    config = tiny.make().config.to_dict()
    change(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    tiny.image_processor().save_pretrained(tmp_path)
    _, open_checkpoint = find_family(tmp_path)
    with pytest.raises(ExportError, match=message):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"special": False}, "no special token"), ({"lstrip": True}, "swallows white space")],
)
def test_a_placeholder_that_text_could_write_is_refused(
    changes: dict[str, bool], message: str, tmp_path: Path
) -> None:
    checkpoint = write_vision_family(tmp_path / "checkpoint", "idefics3")
    path = checkpoint / "tokenizer.json"
    document = json.loads(path.read_text())
    for entry in document["added_tokens"]:
        if entry["content"] == "<image>":
            entry.update(changes)
    path.write_text(json.dumps(document))
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(ExportError, match=message):
        find_family(checkpoint)[1](checkpoint)


def test_a_tokenizer_that_the_runtime_cannot_follow_is_refused(tmp_path: Path) -> None:
    checkpoint = write_vision_family(tmp_path / "checkpoint", "idefics3")
    path = checkpoint / "tokenizer.json"
    document = json.loads(path.read_text())
    # A leading space for the first text of all, and for none behind a special token.
    document["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Metaspace", "replacement": "Ġ", "prepend_scheme": "first", "split": False},
            document["pre_tokenizer"],
        ],
    }
    path.write_text(json.dumps(document))
    with pytest.raises(ExportError, match="tokenize a prompt with a picture otherwise"):
        find_family(checkpoint)[1](checkpoint)


def test_several_turns_are_refused_where_a_prompt_sees_itself(tmp_path: Path) -> None:
    checkpoint = write_vision_family(tmp_path / "checkpoint", ONE_TURN)
    (checkpoint / "chat_template.jinja").write_text(LLAVA_TEMPLATE)
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(ExportError, match="accepts several turns"):
        find_family(checkpoint)[1](checkpoint)


def test_pan_and_scan_is_refused(tmp_path: Path) -> None:
    checkpoint = write_vision_family(tmp_path / "checkpoint", "gemma3", {"do_pan_and_scan": True})
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(ExportError, match="do_pan_and_scan"):
        find_family(checkpoint)[1](checkpoint)


def test_markers_that_the_tokenizer_does_not_name_are_refused(tmp_path: Path) -> None:
    checkpoint = write_vision_family(tmp_path / "checkpoint", "internvl")
    path = checkpoint / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["model_specific_special_tokens"]
    path.write_text(json.dumps(config))
    with pytest.raises(ExportError, match="names no start_image_token"):
        find_family(checkpoint)[1](checkpoint)
