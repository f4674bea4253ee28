"""Whisper's decoder over the encoder's states, beside transformers' own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperDecoder

from edge_safe.models.pebble.speech_decoder import SpeechDecoder, Transcription

WORDS = 40
SETTINGS = Transcription((WORDS + 1, WORDS + 3), end_id=WORDS, no_speech_id=WORDS + 2)


def config() -> WhisperConfig:
    return WhisperConfig(
        vocab_size=WORDS + 4,
        d_model=32,
        decoder_layers=2,
        decoder_attention_heads=4,
        decoder_ffn_dim=48,
        max_target_positions=60,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        decoder_start_token_id=0,
    )


@pytest.fixture
def decoder() -> SpeechDecoder:
    torch.manual_seed(0)
    module = SpeechDecoder(config())
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.3)
    return module.eval().requires_grad_(False)


@pytest.fixture
def states() -> Tensor:
    return torch.randn(2, 21, 32, generator=torch.Generator().manual_seed(1))


def test_logits_are_those_of_transformers_with_a_tied_head(
    decoder: SpeechDecoder, states: Tensor
) -> None:
    original = WhisperDecoder(config()).eval()
    original.load_state_dict(decoder.state_dict())
    ids = torch.randint(WORDS, (2, 9))
    with torch.no_grad():
        hidden = original(input_ids=ids, encoder_hidden_states=states).last_hidden_state
    logits, _ = decoder(ids, decoder.listen(states))
    torch.testing.assert_close(logits, hidden @ decoder.embed_tokens.weight.T, rtol=1e-4, atol=1e-4)


def test_a_past_takes_the_place_of_the_tokens_before(
    decoder: SpeechDecoder, states: Tensor
) -> None:
    ids = torch.randint(WORDS, (2, 5))
    heard = decoder.listen(states)
    whole, _ = decoder(ids, heard)
    first, past = decoder(ids[:, :3], heard)
    steps = [first]
    for place in (3, 4):
        logits, past = decoder(ids[:, place : place + 1], heard, past)
        steps.append(logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-4)


def test_padding_is_not_listened_to(decoder: SpeechDecoder, states: Tensor) -> None:
    ids = torch.randint(WORDS, (2, 4))
    own = torch.ones(2, 21, dtype=torch.bool)
    own[0, 12:] = False
    padded, _ = decoder(ids, decoder.listen(states), own=own)
    alone, _ = decoder(ids[:1], decoder.listen(states[:1, :12]))
    torch.testing.assert_close(padded[:1], alone, rtol=1e-4, atol=1e-4)


def test_the_attention_to_the_sound_is_what_is_trained(decoder: SpeechDecoder) -> None:
    names = decoder.trained_weights()
    kinds = {name.split(".")[2] for name in names}
    assert kinds == {"encoder_attn", "encoder_attn_layer_norm"}
    assert {name.split(".")[1] for name in names} == {"0", "1"}


def test_the_likeliest_token_is_written_at_each_step(
    decoder: SpeechDecoder, states: Tensor
) -> None:
    written = decoder.write_down(states[:1], 1.0, SETTINGS)
    assert written
    ids = torch.tensor([[*SETTINGS.prompt_ids, *written]])
    logits, _ = decoder(ids, decoder.listen(states[:1]))
    best = logits[0, len(SETTINGS.prompt_ids) - 1 :, : SETTINGS.end_id + 1].argmax(-1).tolist()
    assert best[: len(written)] == written


def test_a_decoder_that_goes_round_in_circles_is_stopped(
    decoder: SpeechDecoder, states: Tensor
) -> None:
    with torch.no_grad():
        decoder.embed_tokens.weight[WORDS] = 0.0
        decoder.layer_norm.weight.zero_()
        decoder.layer_norm.bias.copy_(decoder.embed_tokens.weight[5])
    assert decoder.write_down(states[:1], 0.5, SETTINGS) == [5] * 11
    # Never more than it has positions for.
    assert decoder.write_down(states[:1], 30.0, SETTINGS) == [5] * 58


def test_nothing_is_heard_where_nobody_speaks(decoder: SpeechDecoder, states: Tensor) -> None:
    heard = decoder.listen(states[:1])
    logits, _ = decoder(torch.tensor([list(SETTINGS.prompt_ids)]), heard)
    silence = float(logits[0, 0].softmax(-1)[SETTINGS.no_speech_id])
    deaf = replace(SETTINGS, no_speech_threshold=silence - 1e-4)
    keen = replace(SETTINGS, no_speech_threshold=silence + 1e-4)
    assert decoder.write_down(states[:1], 1.0, deaf) == []
    assert decoder.write_down(states[:1], 1.0, keen) != []
