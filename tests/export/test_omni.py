"""What a model that both sees and hears does beyond those that do one of it: Qwen2.5-Omni."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge_safe import SafeModel
from edge_safe.errors import ExportError, MediaError
from edge_safe.export import export_bundle
from edge_safe.export.families.base import find_family
from edge_safe.models.prompts import template_parts
from edge_safe.models.safety_model import SafetyTokenModel
from tests.conftest import END_ID, SAFE_ID
from tests.export.audio_families import omni_inputs, write_audio_family
from tests.export.conftest import FamilyFiles
from tests.export.test_audio_families import SOUNDS, sound
from tests.export.test_vision_families import (
    ALLOW,
    PICTURES,
    QUESTION,
    SECOND,
    TOKENS,
    check_reply,
)

FAMILY = "qwen2_5_omni"
# Turns of a user: the words, the pictures in front of them, and the sound between both.
Turns = list[tuple[str, list[str], str | None]]
CONVERSATIONS: dict[str, Turns] = {
    "a picture and a sound": [(QUESTION, ["wide"], "long")],
    "two pictures and a sound": [(QUESTION, ["tall", "small"], "short")],
}
TURNS: dict[str, Turns] = {
    "a sound, then a picture": [(QUESTION, [], "short"), (SECOND, ["wide"], None)],
    "a picture, then a sound": [(QUESTION, ["small"], None), (SECOND, [], "long")],
    "both, then both": [(QUESTION, ["tall"], "short"), (SECOND, ["small"], "long")],
}


@pytest.fixture
def files(audio_files: Callable[[str], FamilyFiles]) -> FamilyFiles:
    return audio_files(FAMILY)


@pytest.fixture
def model(files: FamilyFiles) -> SafeModel:
    return SafeModel.load(files.bundle, threads=1, policy=ALLOW)


@pytest.fixture
def torch_model(files: FamilyFiles) -> SafetyTokenModel:
    return SafetyTokenModel.from_pretrained(files.checkpoint)


def hugging_face_inputs(files: FamilyFiles, turns: Turns, answers: list[str]) -> dict[str, Any]:
    """What transformers makes of a conversation, up to the start of the next answer."""
    tokenizer = SafetyTokenModel.from_pretrained(files.checkpoint).tokenizer
    messages: list[dict[str, Any]] = []
    for number, (text, pictures, name) in enumerate(turns):
        parts: list[dict[str, str]] = [{"type": "image", "image": ""} for _ in pictures]
        parts += [] if name is None else [{"type": "audio", "audio": ""}]
        messages.append({"role": "user", "content": [*parts, *template_parts(text)]})
        if number + 1 < len(turns):
            messages.append({"role": "assistant", "content": template_parts(answers[number])})
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return omni_inputs(
        files.checkpoint,
        str(text),
        [SOUNDS[name] for _, _, name in turns if name is not None],
        [PICTURES[name] for _, pictures, _ in turns for name in pictures],
    )


def media_of(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: v for name, v in inputs.items() if name not in ("input_ids", "attention_mask")}


@pytest.mark.parametrize(
    "name",
    ["a picture and a sound", pytest.param("two pictures and a sound", marks=pytest.mark.slow)],
)
def test_pictures_and_a_sound_are_judged_and_answered_as_torch_does(
    name: str, files: FamilyFiles, model: SafeModel, torch_model: SafetyTokenModel
) -> None:
    ((text, pictures, heard),) = turns = CONVERSATIONS[name]
    inputs = hugging_face_inputs(files, turns, [])
    ids = inputs["input_ids"][0].tolist()
    reply = model.generate(
        text, images=[PICTURES[p] for p in pictures], audio=sound(heard), max_tokens=TOKENS
    )
    check_reply(reply, torch_model, ids, media_of(inputs))
    config: Any = torch_model.model.config
    found = (reply.usage.prompt_tokens, reply.usage.image_tokens, reply.usage.audio_tokens)
    assert found == (len(ids), ids.count(config.image_token_id), ids.count(config.audio_token_id))


@pytest.mark.slow
@pytest.mark.parametrize("name", TURNS)
def test_second_turn_of_a_chat_is_torch_s_of_all_of_it(
    name: str, files: FamilyFiles, model: SafeModel, torch_model: SafetyTokenModel
) -> None:
    turns = TURNS[name]
    chat = model.chat()

    def send(turn: int) -> Any:
        text, pictures, heard = turns[turn]
        seen = [PICTURES[p] for p in pictures]
        return chat.send(text, images=seen, audio=sound(heard), max_tokens=TOKENS)

    inputs = hugging_face_inputs(files, turns[:1], [])
    ids = inputs["input_ids"][0].tolist()
    answer = check_reply(send(0), torch_model, ids, media_of(inputs))
    # What stands behind an answer does not depend on it, as a special token ends it.
    whole = hugging_face_inputs(files, turns, ["Nine."])
    marked = whole["input_ids"][0].tolist()
    rest = marked[len(ids) + marked[len(ids) :].index(END_ID) :]
    check_reply(send(1), torch_model, [*ids, SAFE_ID, *answer, *rest], media_of(whole))


@pytest.mark.slow
def test_a_sound_is_heard_chunk_by_chunk(model: SafeModel) -> None:
    model.assess(QUESTION, audio=sound("long"))
    # 137 frames, 40 a chunk.
    assert model.run_counts()["audio_encoder"] == 4


@pytest.mark.slow
def test_the_part_that_answers_is_a_checkpoint_too(files: FamilyFiles, tmp_path: Path) -> None:
    checkpoint = write_audio_family(tmp_path / "checkpoint", FAMILY)
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config["thinker_config"]))
    report = export_bundle(checkpoint, tmp_path / "bundle", precision="fp32")
    assert (report.family, report.parity.passed) == ("qwen2_5_omni_thinker", True)
    both = [SafeModel.load(b, threads=1) for b in (files.bundle, tmp_path / "bundle")]
    first, second = (m.assess(QUESTION, audio=sound("long")).p_unsafe for m in both)
    assert first == second


# Opens a checkpoint and says by how much that raised the process's peak of memory, in KiB.
PEAK = """
import sys
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
import torch
from edge_safe.models.base_model import load_base
load_base(Path(sys.argv[1]), torch.float32)
before = getrusage(RUSAGE_SELF).ru_maxrss
model = load_base(Path(sys.argv[2]), torch.float32).model
print(type(model).__name__, getrusage(RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_weights_that_speak_are_never_read(files: FamilyFiles, tmp_path: Path) -> None:
    large = tmp_path / "large"
    shutil.copytree(files.checkpoint, large)
    add_hole(large / "model.safetensors", "talker.model.embed_tokens.weight", 2**28)
    command = [sys.executable, "-c", PEAK, str(files.checkpoint), str(large)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    name, grown = output.split()[-2:]
    assert name == "Qwen2_5OmniThinkerForConditionalGeneration"
    # 1 GiB of zeros, had they been read.
    assert int(grown) < 2**18


def add_hole(path: Path, name: str, count: int) -> None:
    """Adds a float32 tensor to a file of safetensors, of zeros that take no place on the disk."""
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    header[name] = {
        "dtype": "F32",
        "shape": [count],
        "data_offsets": [len(data), len(data) + 4 * count],
    }
    head = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(head)) + head + data)
        file.truncate(file.tell() + 4 * count)


@pytest.mark.parametrize("part", ["talker", "token2wav"])
def test_a_part_that_speaks_is_no_family(part: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": f"qwen2_5_omni_{part}"}))
    with pytest.raises(ExportError, match=rf"qwen2_5_omni_{part}.*families: .*qwen2_5_omni,"):
        find_family(tmp_path)


@pytest.mark.slow
def test_a_video_is_refused(model: SafeModel) -> None:
    # The head of an MP4 file.
    video = b"\x00\x00\x00\x18ftypmp42\x00\x00\x00\x00mp42isom" + bytes(64)
    with pytest.raises(MediaError, match="not a picture of a known format"):
        model.assess(QUESTION, images=[video])
