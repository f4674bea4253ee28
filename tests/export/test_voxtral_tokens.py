"""Voxtral's tokenizer: tekken.json through transformers into the runtime, beside mistral-common."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from edge_safe.errors import ExportError
from edge_safe.export.families.base import find_family
from edge_safe.runtime.families.base import Placed
from edge_safe.runtime.prompt import Message, PromptBuilder
from edge_safe.runtime.template import ChatTemplate
from edge_safe.runtime.tokens import Tokens, Trusted, Untrusted
from tests.export.audio_families import AUDIO_FAMILIES, write_audio_family, write_extractor
from tests.runtime.test_audio_io import wav
from tests.runtime.test_audio_windows import speech

AUDIO, SAFE = 24, 20
# Words of a user, and seconds of the sound in front of them.
CONVERSATIONS: dict[str, list[tuple[str, float]]] = {
    "text": [("What's this? Ünïcode 123  two  spaces\n\nand a new line", 0)],
    "sound": [("What does he say?\nAnd where?", 1.0)],
    "space first": [(" What does he say?", 0.2)],
    "long sound": [("What does he say?", 31.0)],
    "two turns": [("What does he say?", 3.0), ("And she?", 2.0)],
    "a sound after words": [("Who are you?", 0), ("What does he say?", 2.0)],
}


def test_a_checkpoint_with_tekken_alone_is_refused_with_the_way_out(tmp_path: Path) -> None:
    AUDIO_FAMILIES["voxtral"].make().config.save_pretrained(tmp_path)
    write_extractor(tmp_path)
    (tmp_path / "tekken.json").write_text("{}")
    with pytest.raises(ExportError, match=r"no tokenizer\.json.*mistral_format=False"):
        find_family(tmp_path)[1](tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("{{ '<s>' }}", "", "begin with '<s>'"),
        ("'input_audio', 'audio_url'", "'sound'", r"writes no '\[AUDIO\]' for a sound"),
    ],
)
def test_templates_that_lose_something_are_refused(
    old: str, new: str, message: str, tmp_path: Path
) -> None:
    checkpoint = write_audio_family(tmp_path / "checkpoint", "voxtral")
    (checkpoint / "model.safetensors").unlink()
    path = checkpoint / "chat_template.jinja"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ExportError, match=message):
        find_family(checkpoint)[1](checkpoint)


@pytest.fixture(scope="module")
def tekken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tekken.json of Voxtral's layout, over a vocabulary of mistral-common's."""
    mistral_common = pytest.importorskip("mistral_common")
    data = Path(mistral_common.__file__).parent / "data" / "tekken_240911.json"
    tokens = json.loads(data.read_text())
    tokens["config"]["version"] = "v7"
    del tokens["image"]
    known = (
        "<unk> <s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] "
        "[/TOOL_RESULTS] [TOOL_CALLS] [IMG] <pad> [IMG_BREAK] [IMG_END] [PREFIX] [MIDDLE] [SUFFIX] "
        "[SYSTEM_PROMPT] [/SYSTEM_PROMPT] [TOOL_CONTENT] <SPECIAL_20> <SPECIAL_21> <SPECIAL_22> "
        "<SPECIAL_23> [AUDIO] [BEGIN_AUDIO] [TRANSCRIBE]"
    )
    names = enumerate(known.split())
    tokens["special_tokens"] = [
        {"rank": rank, "token_str": name, "is_control": True} for rank, name in names
    ]
    encoding = {"num_mel_bins": 128, "hop_length": 160, "window_size": 400}
    tokens["audio"] = {
        "sampling_rate": 16_000,
        "frame_rate": 12.5,
        "audio_encoding_config": encoding,
        "chunk_length_s": 30.0,
    }
    folder = tmp_path_factory.mktemp("tekken")
    (folder / "tekken.json").write_text(json.dumps(tokens))
    (folder / "config.json").write_text('{"model_type": "voxtral"}')
    return folder


@pytest.fixture(scope="module")
def builder(tekken: Path, tmp_path_factory: pytest.TempPathFactory) -> PromptBuilder:
    """The runtime's prompts, from what transformers makes of tekken.json."""
    from mistral_common.integrations.chat_templates.chat_templates import (
        convert_tokenizer_to_chat_template,
    )

    folder = tmp_path_factory.mktemp("converted")
    AutoTokenizer.from_pretrained(tekken, mistral_format=False).save_pretrained(folder)
    template = ChatTemplate(
        convert_tokenizer_to_chat_template(tekken / "tekken.json"),
        {"bos_token": "<s>", "eos_token": "</s>"},
        {"input_audio": "[AUDIO]"},
    )
    tokens = Tokens((folder / "tokenizer.json").read_bytes(), (SAFE,))
    return PromptBuilder(template, tokens, SAFE, 32_768)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_ids_are_those_of_mistral_common(name: str, tekken: Path, builder: PromptBuilder) -> None:
    turns, answer = CONVERSATIONS[name], "The shop opens at nine."
    theirs: list[dict[str, Any]] = []
    ours: list[Message] = []
    for number, (text, seconds) in enumerate(turns):
        content: list[dict[str, str]] = [{"type": "text", "text": text}]
        media = []
        if seconds:
            data = base64.b64encode(wav(speech(seconds), 16_000)).decode()
            content.insert(0, {"type": "audio", "base64": data})
            count = 375 * -(-int(seconds * 16_000) // 480_000)
            features = np.zeros((count, 8), np.float32)
            media = [Placed("input_audio", [Trusted("[BEGIN_AUDIO]"), features])]
        theirs.append({"role": "user", "content": content})
        ours.append(Message("user", [Untrusted(text)], media=media))
        if number + 1 < len(turns):
            theirs.append({"role": "assistant", "content": answer})
            ours.append(Message("assistant", [Untrusted(answer)]))
    tokenizer = AutoTokenizer.from_pretrained(tekken)
    assert type(tokenizer).__name__ == "MistralCommonBackend"
    encoded = tokenizer.apply_chat_template([theirs], tokenize=True, return_dict=True)
    ids: list[int] = []
    for array in builder.build(ours):
        ids += [AUDIO] * len(array) if array.ndim == 2 else array.tolist()
    # Theirs has no safety token in front of an answer.
    assert ids.count(SAFE) == len(turns) - 1
    assert [index for index in ids if index != SAFE] == encoded["input_ids"][0]
