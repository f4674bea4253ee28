"""Training of the speech decoder, on made-up states and on recordings."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import WhisperConfig

from edge_safe.errors import DataError
from edge_safe.models.pebble import PebbleForConditionalGeneration, PebbleProcessor
from edge_safe.models.pebble.speech_decoder import SpeechDecoder, Transcription
from edge_safe.models.pebble.speech_decoder_training import (
    SpeechTraining,
    collate,
    disturbed,
    train_speech_decoder,
    transcript_loss,
    words_right,
)
from edge_safe.models.pebble.speech_job import is_held, run_job, training_texts
from edge_safe.models.pebble.speech_states import (
    Heard,
    Spoken,
    random_utterance,
    record,
    with_transcripts,
)
from edge_safe.models.progress import silent
from edge_safe.models.recipe import SpeechDecoderSection
from edge_safe.rendering.speech import installed_voices

WORDS = 12
SETTINGS = Transcription((WORDS + 1, WORDS + 3), end_id=WORDS, no_speech_id=WORDS + 2)


def decoder() -> SpeechDecoder:
    torch.manual_seed(0)
    module = SpeechDecoder(
        WhisperConfig(
            vocab_size=WORDS + 4,
            d_model=24,
            decoder_layers=1,
            decoder_attention_heads=2,
            decoder_ffn_dim=32,
            max_target_positions=20,
        )
    )
    torch.nn.init.normal_(module.embed_tokens.weight, std=0.5)
    return module


def toy_data(recordings: int = 48) -> Spoken:
    """Every word sounds for six states in its own way, and is said again and again."""
    rng = np.random.default_rng(1)
    sounds = rng.standard_normal((WORDS, 24)).astype(np.float16)
    said = rng.integers(WORDS, size=recordings)
    return Spoken([np.repeat(sounds[[w]], 12, 0) for w in said], [[int(w)] * 3 for w in said])


def test_what_goes_in_is_one_token_behind_what_should_come_out() -> None:
    spoken = Spoken([np.ones((4, 24), np.float16), np.ones((7, 24), np.float16)], [[3, 4], [5]])
    batch = collate(spoken, [0, 1], SETTINGS)
    start, no_times = SETTINGS.prompt_ids
    assert batch.ids.tolist() == [[start, no_times, 3, 4], [start, no_times, 5, WORDS]]
    assert batch.targets.tolist() == [[-100, 3, 4, WORDS], [-100, 5, WORDS, -100]]
    assert batch.own.sum(1).tolist() == [4, 7]
    assert not batch.states[0, 4:].any()


def test_disturbing_leaves_prompt_end_and_targets_alone() -> None:
    spoken = Spoken([np.ones((40, 24), np.float16)] * 8, [[3] * 10] * 8)
    batch = collate(spoken, list(range(8)), SETTINGS)
    settings = SpeechTraining(wrong=0.5, gain=0.0, noise=0.0)
    changed = disturbed(batch, settings, WORDS, np.random.default_rng(0))
    assert torch.equal(changed.targets, batch.targets)
    assert torch.equal(changed.ids[:, :2], batch.ids[:, :2])
    differ = (changed.ids != batch.ids)[:, 2:].float().mean()
    assert 0.3 < float(differ) < 0.6
    assert int(changed.ids[:, 2:].max()) < WORDS
    # States are as they were but for at most two gaps of at most eight.
    blank = (changed.states == 0).all(-1).sum(1)
    assert 0 < int(blank.max()) <= 16
    assert set(changed.states.unique().tolist()) == {0.0, 1.0}


def test_padding_does_not_change_the_loss() -> None:
    module, spoken = decoder(), toy_data(2)
    longer = Spoken([*spoken.states, np.ones((30, 24), np.float16)], [*spoken.tokens, [1] * 9])
    alone = [transcript_loss(module, collate(longer, [i], SETTINGS), 0.0).item() for i in range(3)]
    counts = [4, 4, 10]
    together = transcript_loss(module, collate(longer, [0, 1, 2], SETTINGS), 0.0).item()
    assert together == pytest.approx(np.average(alone, weights=counts), rel=1e-4)


def test_words_are_learnt_by_the_attention_alone_and_training_goes_on_where_it_stopped() -> None:
    data, losses = toy_data(), []
    settings = SpeechTraining(steps=110, recordings_per_step=8, learning_rate=1e-2)
    module = decoder()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    states = list(
        train_speech_decoder(module, data, SETTINGS, settings, lambda _, loss: losses.append(loss))
    )
    assert [state["step"] for state in states] == [100, 110]
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:10])
    changed = {n for n, value in module.state_dict().items() if not torch.equal(value, before[n])}
    assert changed == set(module.trained_weights())
    resumed: list[int] = []
    list(
        train_speech_decoder(
            decoder(), data, SETTINGS, settings, lambda step, _: resumed.append(step), states[0]
        )
    )
    assert resumed == list(range(100, 110))


def test_recordings_too_short_for_their_words_are_left_out() -> None:
    shard = Heard(np.zeros((60, 3), np.float16), np.array([0, 10, 60]), np.array([0, 1]))
    kept = with_transcripts([shard], [[5] * 10, [5] * 10], SETTINGS)
    assert [len(states) for states in kept.states] == [50]
    assert kept.tokens == [[5] * 10]


def test_words_right_is_one_minus_the_word_error_rate() -> None:
    assert words_right(["a b c d", "e"], ["a x c", "e"]) == pytest.approx(0.6)
    assert words_right(["a"], ["a b c"]) == pytest.approx(-1.0)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    prompts = [f"please open the {a} {b}" for a in ("red", "old", "big") for b in "abcdefghij"]
    prompts += [f"what is the name of the {a} train" for a in ("next", "last", "best", "first")]
    lines = [json.dumps({"prompt": p}) for p in (*prompts, *(f"number {i}" for i in range(60)))]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    return tmp_path


def test_no_text_is_trained_on_and_held_out(texts: Path) -> None:
    train, held = training_texts(["texts.jsonl"], texts)
    assert held
    assert not set(train) & set(held)
    assert not any(is_held(text) for text in train if text.startswith("please"))


def test_too_few_texts_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "none.jsonl").write_text('{"prompt": "x = 1"}\n')
    with pytest.raises(DataError, match="0 held out"):
        training_texts(["none.jsonl"], tmp_path)


def test_the_held_out_synthesizer_cannot_be_trained_on(
    model: PebbleForConditionalGeneration,
    processor: PebbleProcessor,
    texts: Path,
    tmp_path: Path,
) -> None:
    section = SpeechDecoderSection(texts=("texts.jsonl",), slow_synthesizer="flite")
    with pytest.raises(DataError, match="held out"):
        run_job(
            model,
            processor,
            processor.tokenizer.backend_tokenizer,
            section,
            texts,
            tmp_path,
            tmp_path,
            silent,
        )


@pytest.mark.skipif(not installed_voices("espeak-ng"), reason="espeak-ng is not installed")
def test_a_recording_is_made_as_asked() -> None:
    drawn = random_utterance("open the door", False, ("espeak-en-us",), np.random.default_rng(0))
    samples = record(drawn)
    assert samples.dtype == np.float32
    assert 0.4 < len(samples) / 16_000 < 3.0
    assert np.array_equal(samples, record(drawn))


@pytest.mark.skipif(not installed_voices("espeak-ng"), reason="espeak-ng is not installed")
def test_a_narrow_line_ends_at_4_khz() -> None:
    drawn = random_utterance("see the sea", False, ("espeak-en-us",), np.random.default_rng(0))
    shares = []
    for narrow in (False, True):
        heard = record(replace(drawn, narrow=narrow, noise="", room=0.0))
        power = np.abs(np.fft.rfft(heard)) ** 2
        shares.append(power[int(len(power) * 0.55) :].sum() / power.sum())
    assert shares[1] < 0.01 * shares[0]


@pytest.mark.slow
@pytest.mark.skipif(not installed_voices("espeak-ng"), reason="espeak-ng is not installed")
def test_the_job_trains_and_goes_on_where_it_was_killed(
    tiny_pebble: Path, processor: PebbleProcessor, texts: Path, tmp_path: Path
) -> None:
    model = PebbleForConditionalGeneration.from_pretrained(tiny_pebble)
    section = SpeechDecoderSection(
        texts=("texts.jsonl",),
        slow_synthesizer="espeak-ng",
        recordings=24,
        steps=3,
        recordings_per_step=4,
    )
    arguments = (processor.tokenizer.backend_tokenizer, section, texts, tmp_path / "cache")
    first = run_job(model, processor, *arguments, tmp_path / "work", silent)
    assert first <= 1.0
    assert model.config.trained("speech")
    before = {path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    again = PebbleForConditionalGeneration.from_pretrained(tiny_pebble)
    assert run_job(again, processor, *arguments, tmp_path / "work", silent) == first
    assert before == {path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
