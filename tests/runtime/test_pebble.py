"""pebble's towers: what is read, in which order, and what an untrained bundle refuses.

The towers here are small made-up graphs: the detector finds what is dark, the recognizer averages
columns, the projectors multiply. Preprocessing is compared with the torch side's processor.
"""

from __future__ import annotations

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from edge_safe.errors import MediaError, SchemaError
from edge_safe.runtime import manifest as m
from edge_safe.runtime.digest import sha256_file
from edge_safe.runtime.families.pebble import Objects, Speech, image_square, window_seconds
from edge_safe.runtime.model import SafeModel
from edge_safe.runtime.policy import Policy

WIDTH = 64
ALLOW = Policy(thresholds={"gate": 1.0})
PROCESSORS: dict[str, dict[str, Any]] = {
    "text_lines": {
        "longest_side": 960,
        "multiple": 32,
        "pixel_threshold": 0.3,
        "box_threshold": 0.5,
        "unclip": 1.6,
        "smallest_side": 3.0,
        "vertical_ratio": 1.5,
        "line_height": 48,
        "line_multiple": 8,
        "line_width": 1600,
        "most_lines": 64,
        "mean": 0.5,
        "std": 0.5,
    },
    "objects": {"size": 224, "mean": 127.0, "scale": 128.0},
    "speech": {
        "sampling_rate": 16000,
        "feature_size": 80,
        "hop_length": 160,
        "n_fft": 400,
        "chunk_length": 30,
        "samples_per_state": 320,
    },
}
DECODER = {
    "prompt_ids": [301, 303],
    "end_id": 300,
    "no_speech_id": 302,
    "no_speech_threshold": 0.6,
    "tokens_per_second": 6.0,
    "extra_tokens": 8,
    "max_positions": 448,
    "tokenizer": "audio_tokenizer.json",
}
VOCABULARY = 304


def graph(
    inputs: dict[str, list[Any]],
    outputs: dict[str, list[Any]],
    nodes: list[onnx.NodeProto],
    **constants: np.ndarray,
) -> onnx.ModelProto:
    """An ONNX model of a few nodes."""

    def values(shapes: dict[str, list[Any]]) -> list[onnx.ValueInfoProto]:
        kinds = {"lengths": 7, "line_index": 7, "input_ids": 7}
        return [
            helper.make_tensor_value_info(name, kinds.get(name, 1), shape)
            for name, shape in shapes.items()
        ]

    made = helper.make_graph(
        nodes,
        "tower",
        values(inputs),
        values(outputs),
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def towers() -> dict[str, onnx.ModelProto]:
    """All eight graphs."""
    node = helper.make_node
    rng = np.random.default_rng(1)

    def weight(rows: int) -> np.ndarray:
        return (rng.standard_normal((rows, WIDTH)) * 0.1).astype(np.float32)

    def projector(states: str, features: str, rows: int) -> onnx.ModelProto:
        nodes = [
            node("MatMul", [states, "w"], ["all"]),
            node("Reshape", ["all", "flat"], [features]),
            node("Identity", ["lengths"], ["line_index"]),
        ]
        return graph(
            {states: ["n", "t", rows], "lengths": ["n"]},
            {features: ["m", WIDTH], "line_index": ["n"]},
            nodes,
            w=weight(rows),
            flat=np.array([-1, WIDTH]),
        )

    pixels = {"pixel_values": [1, 3, "h", "w"]}
    return {
        "text_detector": graph(
            pixels,
            {"probability": [1, 1, "h", "w"]},
            [
                node("ReduceMean", ["pixel_values", "axes"], ["mean"], keepdims=1),
                node("Neg", ["mean"], ["dark"]),
                node("Clip", ["dark", "zero", "one"], ["probability"]),
            ],
            axes=np.array([1]),
            zero=np.float32(0),
            one=np.float32(1),
        ),
        "text_recognizer": graph(
            {"pixel_values": ["n", 3, 48, "w"]},
            {"text_states": ["n", "t", 3]},
            [
                node(
                    "AveragePool", ["pixel_values"], ["pool"], kernel_shape=[48, 8], strides=[48, 8]
                ),
                node("Squeeze", ["pool", "axes"], ["flat"]),
                node("Transpose", ["flat"], ["text_states"], perm=[0, 2, 1]),
            ],
            axes=np.array([2]),
        ),
        "text_projector": projector("text_states", "image_features", 3),
        "vision_encoder": graph(
            {"pixel_values": [1, 3, 224, 224]},
            {"vision_states": [1, 49, 3]},
            [
                node(
                    "AveragePool",
                    ["pixel_values"],
                    ["pool"],
                    kernel_shape=[32, 32],
                    strides=[32, 32],
                ),
                node("Reshape", ["pool", "grid"], ["flat"]),
                node("Transpose", ["flat"], ["vision_states"], perm=[0, 2, 1]),
            ],
            grid=np.array([1, 3, 49]),
        ),
        "vision_projector": graph(
            {"vision_states": [1, 49, 3]},
            {"image_features": ["m", WIDTH]},
            [
                node("Gather", ["vision_states", "named"], ["first"], axis=1),
                node("Squeeze", ["first", "batch"], ["flat"]),
                node("MatMul", ["flat", "w"], ["image_features"]),
            ],
            w=weight(3),
            named=np.arange(4),
            batch=np.array([0]),
        ),
        "audio_encoder": graph(
            {"input_features": [1, 80, "frames"]},
            {"audio_states": [1, "steps", 80]},
            [
                node("AveragePool", ["input_features"], ["p"], kernel_shape=[2], strides=[2]),
                node("Transpose", ["p"], ["audio_states"], perm=[0, 2, 1]),
            ],
        ),
        "audio_projector": graph(
            {"audio_states": [1, "t", 80]},
            {f"heard.0.{part}": [1, 1, "t", 80] for part in ("key", "value")},
            [
                node("Unsqueeze", ["audio_states", "heads"], [f"heard.0.{part}"])
                for part in ("key", "value")
            ],
            heads=np.array([1]),
        ),
        "audio_decoder": speech_decoder(),
    }


def speech_decoder(said: str = "Open the door", silence: float = -9.0) -> onnx.ModelProto:
    """A decoder that writes down the same letters, whatever it hears.

    Which letter is next it knows from the positions of its past. The first logits say how likely
    nothing was said.
    """
    node = helper.make_node
    letters = [*(tiny_words().token_to_id(s) for s in f" {said}".replace(" ", "Ġ")), 300]
    # One position of the past is the prompt's first token; behind the last letter comes the end.
    rows = np.full((len(letters) + 1, VOCABULARY), -9.0, np.float32)
    rows[0, 302] = silence
    rows[np.arange(1, len(letters) + 1), letters] = 9.0
    past = {f"past_key_values.0.{part}": [1, 1, "p", 80] for part in ("key", "value")}
    present = {f"present.0.{part}": [1, 1, "q", 80] for part in ("key", "value")}
    heard = {f"heard.0.{part}": [1, 1, "t", 80] for part in ("key", "value")}
    nodes = [
        node("Shape", ["past_key_values.0.key"], ["past"], start=2, end=3),
        node("Shape", ["input_ids"], ["count"], start=1, end=2),
        node("Add", ["past", "count"], ["length"]),
        node("Slice", ["rows", "past", "length", "zero"], ["next"]),
        node("Unsqueeze", ["next", "zero"], ["logits"]),
        node("Concat", ["batch", "count", "width"], ["shape"], axis=0),
        node("ConstantOfShape", ["shape"], ["new"]),
        *(
            node("Concat", [f"past_key_values.0.{part}", "new"], [f"present.0.{part}"], axis=2)
            for part in ("key", "value")
        ),
    ]
    return graph(
        {"input_ids": [1, "s"], **past, **heard},
        {"logits": [1, "s", VOCABULARY], **present},
        nodes,
        rows=rows,
        zero=np.array([0]),
        batch=np.array([1, 1]),
        width=np.array([80]),
    )


def tiny_words() -> Tokenizer:
    """Letters, and four control tokens behind them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fillers = [f"<{number}>" for number in range(300 - len(alphabet))]
    vocabulary = {token: index for index, token in enumerate([*alphabet, *fillers])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.decoder = decoders.ByteLevel()
    controls = ("<|endoftext|>", "<|startoftranscript|>", "<|nospeech|>", "<|notimestamps|>")
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in controls])
    return tokenizer


def with_towers(
    source: Path, folder: Path, trained: set[str], processors: dict[str, Any] = PROCESSORS
) -> Path:
    """Copies the tiny bundle and adds pebble's towers."""
    shutil.copytree(source, folder)
    manifest = m.load_manifest(folder)
    files, graphs = dict(manifest.files), dict(manifest.graphs)
    words = folder / "audio_tokenizer.json"
    words.write_text(tiny_words().to_str(), encoding="utf-8")
    files[words.name] = m.FileEntry(sha256_file(words), words.stat().st_size)
    processors = {**processors, "speech": {**processors["speech"], "decoder": DECODER}}
    for name, model in towers().items():
        path = folder / f"{name}.onnx"
        path.write_bytes(model.SerializeToString())
        files[path.name] = m.FileEntry(sha256_file(path), path.stat().st_size)
        graphs[name] = m.Graph(path.name, [], [], "fp32")
    changed = msgspec.structs.replace(
        manifest,
        family="pebble",
        files=files,
        graphs=graphs,
        modalities={name: m.Modality(name in trained) for name in PROCESSORS},
        processors=processors,
    )
    (folder / m.MANIFEST_FILE).write_bytes(m.dump_manifest(changed))
    return folder


@pytest.fixture(scope="module")
def folder(bundle_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pebble whose text tower alone is trained."""
    return with_towers(bundle_folder, tmp_path_factory.mktemp("pebble") / "b", {"text_lines"})


@pytest.fixture(scope="module")
def pebble(folder: Path) -> SafeModel:
    return SafeModel.load(folder, threads=1, policy=ALLOW)


def page(*lines: tuple[int, int, int]) -> np.ndarray:
    """A white picture with dark bars at (top, left, width)."""
    pixels = np.full((256, 320, 3), 255, np.uint8)
    for top, left, width in lines:
        pixels[top : top + 20, left : left + width] = 0
    return pixels


def test_every_line_of_a_picture_becomes_tokens(pebble: SafeModel) -> None:
    one = pebble.generate("hi", images=[page((40, 20, 100))], max_tokens=1)
    two = pebble.generate("hi", images=[page((40, 20, 100), (140, 20, 100))], max_tokens=1)
    bare = pebble.generate("hi", max_tokens=1)
    assert two.usage.image_tokens == 2 * one.usage.image_tokens > 0
    # One token more than the picture's own: the line break behind it.
    assert one.usage.prompt_tokens == bare.usage.prompt_tokens + one.usage.image_tokens + 1


def test_a_picture_without_text_leaves_the_prompt_as_it_is(pebble: SafeModel) -> None:
    bare = pebble.assess("hi")
    assert pebble.assess("hi", images=[page()]) == bare


def test_what_a_picture_shows_reaches_the_gate(pebble: SafeModel) -> None:
    wide, narrow = page((40, 20, 250)), page((40, 20, 60))
    assert (
        pebble.assess("hi", images=[wide]).p_unsafe != pebble.assess("hi", images=[narrow]).p_unsafe
    )


def test_towers_that_are_not_needed_stay_closed(folder: Path) -> None:
    model = SafeModel.load(folder, threads=1, policy=ALLOW)
    model.assess("hi")
    assert not {"text_detector", "vision_encoder", "audio_encoder"} & set(
        model._requests.bundle._sessions
    )


def test_an_untrained_object_tower_is_left_out(pebble: SafeModel) -> None:
    pebble.assess("hi", images=[page((40, 20, 100))])
    assert pebble.run_counts()["vision_encoder"] == 0


def test_an_untrained_ear_says_so(pebble: SafeModel) -> None:
    with pytest.raises(MediaError, match="speech decoder has not been trained"):
        pebble.generate("hi", audio=(np.zeros(1600, np.float32), 16_000))


def test_untrained_towers_can_be_asked_for(folder: Path) -> None:
    model = SafeModel.load(folder, threads=1, policy=ALLOW, untrained_towers=True)
    sound = (np.full(16_000, 0.1, np.float32), 16_000)
    reply = model.generate("hi", images=[page((40, 20, 100))], audio=sound, max_tokens=1)
    lines = model.generate("hi", images=[page()], max_tokens=1)
    assert lines.usage.image_tokens == 4
    assert reply.usage.image_tokens > 4
    assert reply.usage.audio_tokens > 0


def test_media_are_not_computed_again_in_a_chat(folder: Path) -> None:
    model = SafeModel.load(folder, threads=1, policy=ALLOW)
    chat = model.chat()
    chat.send("hi", images=[page((40, 20, 100))], max_tokens=2)
    seen = model.run_counts()["text_detector"]
    second = chat.send("and now?", max_tokens=2)
    assert model.run_counts()["text_detector"] == seen == 1
    assert second.verdict.p_unsafe > 0


SOUND = (np.full(32_000, 0.1, np.float32), 16_000)
ONE, TWO, THREE = (page((40, 20, 100 * n), (140, 20, 60)) for n in (1, 2, 3))
TOWERS = ("text_detector", "text_recognizer", "vision_encoder", "audio_encoder")


def everything(folder: Path, **options: Any) -> SafeModel:
    """The bundle with all of its towers."""
    return SafeModel.load(folder, threads=1, policy=ALLOW, untrained_towers=True, **options)


def test_a_picture_that_comes_again_beside_a_new_one_is_not_encoded_again(folder: Path) -> None:
    model = everything(folder)
    model.assess("hi", images=[ONE])
    once = model.run_counts()
    model.assess("hi", images=[ONE, TWO], audio=SOUND)
    twice = model.run_counts()
    assert [twice[name] / max(once[name], 1) for name in TOWERS] == [2, 2, 2, 1]
    model.assess("hi", images=[TWO, ONE], audio=SOUND)
    model.assess("hi", audio=SOUND)
    assert [model.run_counts()[name] for name in TOWERS] == [twice[name] for name in TOWERS]


def test_requests_at_once_encode_the_picture_they_share_once(folder: Path) -> None:
    model = everything(folder)
    together = threading.Barrier(4)

    def ask(_: int) -> float:
        together.wait(10)
        return model.assess("hi", images=[ONE, TWO]).p_unsafe

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(ask, range(4)))
    assert model.run_counts()["text_detector"] == 2
    assert max(found) - min(found) < 1e-6


def test_media_that_were_kept_are_judged_as_if_they_were_new(folder: Path) -> None:
    keeping, forgetting = everything(folder), everything(folder, media_cache_mb=0)
    turns = [([ONE], None), ([ONE, TWO], SOUND), ([TWO, THREE, ONE], None), ([THREE], SOUND)]
    for images, audio in turns:
        found, expected = (
            model.generate("hi", images=images, audio=audio, max_tokens=4)
            for model in (keeping, forgetting)
        )
        assert found.verdict.p_unsafe == pytest.approx(expected.verdict.p_unsafe, abs=1e-6)
        assert (found.text, found.usage) == (expected.text, expected.usage)
        kept, anew = (m._requests._family.media(images, audio) for m in (keeping, forgetting))
        for one, other in zip(kept.features, anew.features, strict=True):
            np.testing.assert_array_equal(one, other)
    assert keeping.run_counts()["text_detector"] == 3
    assert forgetting.run_counts()["text_detector"] == 14


def test_media_of_a_turn_are_encoded_as_each_by_itself(folder: Path) -> None:
    family = everything(folder, media_cache_mb=0)._requests._family
    together = family.media([ONE, TWO, THREE], SOUND)
    alone = [family.media([one], None) for one in (ONE, TWO, THREE)] + [family.media([], SOUND)]
    features = [array for media in alone for array in media.features]
    for one, other in zip(together.features, features, strict=True):
        np.testing.assert_array_equal(one, other)
    assert together.tokens == sum(media.tokens for media in alone)


def test_the_time_for_a_verdict_includes_reading_a_picture(folder: Path) -> None:
    model = everything(folder)
    verdict = model.assess("hi", images=[ONE], timeout=0.0)
    assert verdict.decision.value == "error"
    assert verdict.reason == "the time for a verdict is over"
    assert model.run_counts()["text_detector"] == 0


def test_a_bundle_that_sees_nothing_refuses_pictures(bundle_folder: Path, tmp_path: Path) -> None:
    model = SafeModel.load(with_towers(bundle_folder, tmp_path / "b", set()))
    with pytest.raises(MediaError, match="pictures"):
        model.assess("hi", images=[page()])


def test_a_single_path_in_place_of_a_list_is_named(pebble: SafeModel) -> None:
    with pytest.raises(MediaError, match="as a list"):
        pebble.assess("hi", images="sign.png")


def test_unknown_parameters_are_rejected(bundle_folder: Path, tmp_path: Path) -> None:
    processors = {**PROCESSORS, "objects": {"size": 224, "mean": 127.0, "scale": 128.0, "x": 1}}
    with pytest.raises(SchemaError, match="do not fit pebble"):
        SafeModel.load(with_towers(bundle_folder, tmp_path / "b", set(), processors))


def test_a_broken_tower_is_an_error_verdict(bundle_folder: Path, tmp_path: Path) -> None:
    folder = with_towers(bundle_folder, tmp_path / "b", {"text_lines"})
    manifest = m.load_manifest(folder)
    graphs = {**manifest.graphs, "text_detector": manifest.graphs["vision_encoder"]}
    changed = msgspec.structs.replace(manifest, graphs=graphs)
    (folder / m.MANIFEST_FILE).write_bytes(m.dump_manifest(changed))
    reply = SafeModel.load(folder, policy=ALLOW).generate("hi", images=[page((40, 20, 100))])
    assert (reply.verdict.decision.value, reply.text) == ("error", None)


def test_parameters_are_those_of_the_torch_side() -> None:
    stored = pytest.importorskip("edge_safe.models.pebble.processor_settings")
    defaults = msgspec.to_builtins(stored.ProcessorSettings())
    assert {name: defaults[name] for name in PROCESSORS} == PROCESSORS


def test_object_pixels_equal_the_torch_processors() -> None:
    """Both scale with pillow's bicubic filter; equal to the last bit."""
    processing = pytest.importorskip("edge_safe.models.pebble.processing_pebble")
    stored = pytest.importorskip("edge_safe.models.pebble.processor_settings")
    pixels = np.random.default_rng(0).integers(0, 255, (300, 400, 3)).astype(np.uint8)
    ours = image_square(pixels, msgspec.convert(PROCESSORS["objects"], Objects))
    theirs = processing.object_pixels([Image.fromarray(pixels)], stored.ObjectConfig())
    np.testing.assert_array_equal(ours, theirs.numpy())


@pytest.mark.parametrize(
    ("states", "seconds"), [(1, 1), (25, 1), (26, 2), (75, 2), (1475, 30), (1500, 30)]
)
def test_the_speech_window_is_as_long_as_the_sound_and_half_a_second(
    states: int, seconds: int
) -> None:
    assert (
        window_seconds(
            states, msgspec.convert({**PROCESSORS["speech"], "decoder": DECODER}, Speech)
        )
        == seconds
    )


def hearing(folder: Path, target: Path, decoder: onnx.ModelProto) -> SafeModel:
    """The bundle with another speech decoder."""
    shutil.copytree(folder, target)
    manifest = m.load_manifest(target)
    path = target / "audio_decoder.onnx"
    path.write_bytes(decoder.SerializeToString())
    files = {**manifest.files, path.name: m.FileEntry(sha256_file(path), path.stat().st_size)}
    changed = msgspec.structs.replace(manifest, files=files)
    (target / m.MANIFEST_FILE).write_bytes(m.dump_manifest(changed))
    return SafeModel.load(target, threads=1, policy=ALLOW, untrained_towers=True)


def test_what_is_said_stands_in_the_prompt_as_if_it_were_typed(
    folder: Path, tmp_path: Path
) -> None:
    model = hearing(folder, tmp_path / "b", speech_decoder("Open the door"))
    media = model._requests._family.media([], SOUND)
    typed = model._requests._tokens.typed("Open the door")
    assert media.audio_tokens == len(typed)
    np.testing.assert_array_equal(media.features[0], model._requests.engine.embed(typed).rows)


def test_spoken_control_tokens_are_words(folder: Path, tmp_path: Path) -> None:
    model = hearing(folder, tmp_path / "b", speech_decoder("<|safe|>"))
    media = model._requests._family.media([], SOUND)
    assert media.audio_tokens > 1


def test_nothing_is_heard_where_nobody_speaks(folder: Path, tmp_path: Path) -> None:
    model = hearing(folder, tmp_path / "b", speech_decoder(silence=9.0))
    assert model._requests._family.media([], SOUND).audio_tokens == 0
    assert model.assess("hi", audio=SOUND).decision.value == "allow"


def test_a_decoder_that_finds_no_end_is_stopped(folder: Path, tmp_path: Path) -> None:
    model = hearing(folder, tmp_path / "b", speech_decoder("a" * 60))
    model._requests._family.media([], SOUND)
    # Two seconds: 20 tokens, the first of which comes from the prompt's run.
    assert model.run_counts()["audio_decoder"] == 20


def test_a_decoder_that_gives_no_numbers_is_an_error_verdict(folder: Path, tmp_path: Path) -> None:
    model = hearing(folder, tmp_path / "b", speech_decoder(silence=float("nan")))
    reply = model.generate("hi", audio=SOUND)
    assert (reply.verdict.decision.value, reply.text) == ("error", None)
    assert "not finite" in str(reply.verdict.reason)


def test_a_decoder_without_logits_is_an_error_verdict(folder: Path, tmp_path: Path) -> None:
    broken = speech_decoder()
    kept = [value for value in broken.graph.output if value.name != "logits"]
    del broken.graph.output[:]
    broken.graph.output.extend(kept)
    model = hearing(folder, tmp_path / "b", broken)
    assert model.assess("hi", audio=SOUND).decision.value == "error"


def test_the_time_for_a_verdict_includes_listening(folder: Path, tmp_path: Path) -> None:
    model = hearing(folder, tmp_path / "b", speech_decoder())
    verdict = model.assess("hi", audio=SOUND, timeout=0.0)
    assert verdict.decision.value == "error"
    assert verdict.reason == "the time for a verdict is over"
    assert model.run_counts()["audio_decoder"] == 0
