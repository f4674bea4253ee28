"""How well a pebble hears, beside Whisper tiny.en's own decoder on the same recordings.

    python benchmarks/hearing.py models/pebble --data DATA

pebble listens in a window as long as the sound, with the decoder that was tuned for it; Whisper in
its own window of 30 s, with its own weights. Prompts that the speech decoder never heard in
training (see `speech_job.is_held`) are spoken by every installed synthesizer, half of them with
noise. Words right is 1 - word error rate; both sides are compared without capitals and punctuation,
numbers in words. `relative` is ours divided by Whisper's. flite is never heard in training. The
last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from edge_safe.models.data import read_json_lines
from edge_safe.models.pebble import PebbleForConditionalGeneration, PebbleProcessor, parts
from edge_safe.models.pebble.speech_decoder_training import words_right
from edge_safe.models.pebble.speech_job import MOST_WORDS, is_held
from edge_safe.models.pebble.speech_states import RATE, random_utterance, record
from edge_safe.models.pebble.spoken_text import heard, speakable
from edge_safe.models.pebble.whisper_decoder import WhisperTranscriber
from edge_safe.rendering.sound import Samples
from edge_safe.rendering.speech import installed_voices

WHISPER = ("audio_encoder", "audio_tokenizer")

SYNTHESIZERS = ("flite", "espeak-ng", "festival")


def held_texts(path: Path, count: int, seed: int) -> list[str]:
    """Speakable prompts of a file that training kept apart, in random order."""
    prompts = [str(line["prompt"]) for _, line in read_json_lines(path)]
    spoken = (speakable(prompt) for prompt in prompts if is_held(prompt))
    texts = [t for t in spoken if t and heard(t) and len(t.split()) <= MOST_WORDS]
    order = np.random.default_rng(seed).permutation(len(texts))
    return [texts[i] for i in order[:count]]


def recordings(texts: list[str], synthesizer: str, seed: int) -> list[Samples]:
    """Every text by some voice of a synthesizer; every other one with pink noise."""
    rng = np.random.default_rng([seed, len(synthesizer)])
    voices = installed_voices(synthesizer)
    drawn = (random_utterance(text, False, voices, rng) for text in texts)
    return [
        record(replace(u, noise="pink" if i % 2 else "", room=0.0, narrow=False))
        for i, u in enumerate(drawn)
    ]


class Ear:
    """A pebble's way from a recording to words."""

    def __init__(self, folder: Path) -> None:
        self.model = PebbleForConditionalGeneration.from_pretrained(folder)
        self._processor = PebbleProcessor.from_pretrained(folder)

    def hear(self, sound: Samples) -> str:
        """What the model's gate gets to see, as text."""
        inputs = self._processor.log_mel([(sound, RATE)])
        with torch.no_grad():
            ids = self.model.hear(inputs["input_features"], inputs["audio_lengths"])[0]
        text = self._processor.decode(ids)
        return heard(speakable(text) or text)

    def encode_ms(self, sound: Samples, whole: bool) -> float:
        """Milliseconds of the encoder in the sound's own window, or in the longest one."""
        inputs = self._processor.log_mel([(sound, RATE)])
        features = inputs["input_features"]
        if whole:
            longest = 2 * self.model.config.audio_config.max_source_positions
            missing = longest - features.shape[2]
            features = torch.nn.functional.pad(features, (0, missing), value=float(features.min()))
        start = time.perf_counter()
        with torch.no_grad():
            self.model.audio_encoder(features)
        return 1000 * (time.perf_counter() - start)


def main() -> None:
    """Speaks, listens twice, compares."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="pebble in its small form")
    parser.add_argument("--data", type=Path, required=True, help="folder with train_safe.jsonl")
    parser.add_argument("--texts", default="train_safe.jsonl", help="file below --data")
    parser.add_argument("--count", type=int, default=120, help="recordings of each synthesizer")
    parser.add_argument("--seed", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(2)
    ear = Ear(options.model)
    config = ear.model.config
    paths = parts.fetch({name: parts.read_parts(config.parts)[name] for name in WHISPER})
    whisper = WhisperTranscriber(*(paths[name] for name in WHISPER), config.audio_config)
    texts = held_texts(options.data / options.texts, options.count, options.seed)
    said = [heard(text) for text in texts]
    result: dict[str, object] = {"texts": len(texts)}
    timed: list[Samples] = []
    for synthesizer in SYNTHESIZERS:
        if not installed_voices(synthesizer):
            print(f"{synthesizer} is not installed and left out")
            continue
        sounds = recordings(texts, synthesizer, options.seed)
        timed += sounds[:10]
        ours = words_right(said, [ear.hear(sound) for sound in sounds])
        written = [whisper.transcribe(sound) for sound in sounds]
        theirs = words_right(said, [heard(speakable(text) or text) for text in written])
        result[synthesizer] = {
            "words_right": round(ours, 4),
            "whisper": round(theirs, 4),
            "relative": round(ours / theirs, 4) if theirs > 0 else None,
        }
        print(f"{synthesizer}: {json.dumps(result[synthesizer])}")
    result["seconds"] = round(statistics.median(len(s) / RATE for s in timed), 2)
    for name, whole in (("encode_ms", False), ("encode_30_s_ms", True)):
        result[name] = round(statistics.median(ear.encode_ms(s, whole) for s in timed), 1)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
