"""Configuration of pebble: the language model, three towers, what reads them, and their origin."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig, PreTrainedConfig, WhisperConfig

from edge_safe.models.pebble.efficientnet_lite import LITE0_STAGES, Stage
from edge_safe.models.pebble.object_projector import ObjectProjectorConfig
from edge_safe.models.pebble.projectors import SequenceProjectorConfig
from edge_safe.models.pebble.speech_decoder import Transcription

MODALITIES = ("text_lines", "objects", "speech")


class PebbleConfig(PreTrainedConfig):
    """Configuration of :class:`PebbleForConditionalGeneration`.

    It comes in two forms. The small one names the ``parts`` that the model is assembled from and
    has no graphs; the full one, written by ``save_pretrained``, has the graphs of both text towers
    and stands beside a ``model.safetensors`` with every weight.

    Args:
        text_config: Of the language model, a ``LlamaConfig`` or its dict.
        audio_config: Of the speech encoder and decoder, a ``WhisperConfig`` or its dict.
        vision_config: ``stem``, ``stages`` (repeats, kernel, stride, expansion, channels) and
            ``head`` of the object encoder; default EfficientNet-Lite0.
        text_projector: Fields of ``SequenceProjectorConfig``.
        audio_decoder: Fields of ``Transcription``.
        vision_projector: Fields of ``ObjectProjectorConfig``.
        text_detector: ``GraphSpec.to_dict()`` of the line detector, or None in the small form.
        text_recognizer: The same of the line recognizer, cut at its states.
        modalities: By modality, ``{"trained": bool}``.
        parts: Fields of ``parts.Part``, by the module that each part fills.
        image_token_id: Stands for one picture in ``input_ids``.
        audio_token_id: Stands for one recording.
        media_end_token_id: Stands for the line break behind a turn's media, which is left out
            where the media gave no embedding.
        newline_token_id: That line break.
        safe_token_id: Written in front of every answer.
        unsafe_token_id: Its counterpart.
        seed: Projectors that were not trained start from it.
    """

    model_type = "pebble"
    sub_configs = {"text_config": LlamaConfig, "audio_config": WhisperConfig}  # noqa: RUF012 - transformers' own declaration

    def __init__(
        self,
        text_config: LlamaConfig | dict[str, Any] | None = None,
        audio_config: WhisperConfig | dict[str, Any] | None = None,
        vision_config: dict[str, Any] | None = None,
        text_projector: dict[str, Any] | None = None,
        audio_decoder: dict[str, Any] | None = None,
        vision_projector: dict[str, Any] | None = None,
        text_detector: dict[str, Any] | None = None,
        text_recognizer: dict[str, Any] | None = None,
        modalities: dict[str, dict[str, bool]] | None = None,
        parts: dict[str, dict[str, Any]] | None = None,
        image_token_id: int = 12,
        audio_token_id: int = 13,
        media_end_token_id: int = 14,
        newline_token_id: int = 198,
        safe_token_id: int = 15,
        unsafe_token_id: int = 16,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        text = text_config if text_config is not None else {}
        audio = audio_config if audio_config is not None else {}
        self.text_config = LlamaConfig(**text) if isinstance(text, dict) else text
        self.audio_config = WhisperConfig(**audio) if isinstance(audio, dict) else audio
        lite0 = [[s.repeats, s.kernel, s.stride, s.expansion, s.channels] for s in LITE0_STAGES]
        self.vision_config = vision_config or {"stem": 32, "stages": lite0, "head": 1280}
        self.text_projector = text_projector or {"state_size": 120}
        self.audio_decoder = audio_decoder or {}
        self.vision_projector = vision_projector or {}
        self.text_detector = text_detector
        self.text_recognizer = text_recognizer
        self.modalities = modalities or {name: {"trained": False} for name in MODALITIES}
        self.parts = parts or {}
        self.image_token_id = image_token_id
        self.audio_token_id = audio_token_id
        self.media_end_token_id = media_end_token_id
        self.newline_token_id = newline_token_id
        self.safe_token_id = safe_token_id
        self.unsafe_token_id = unsafe_token_id
        self.seed = seed
        kwargs.setdefault("tie_word_embeddings", self.text_config.tie_word_embeddings)
        super().__init__(**kwargs)

    @property
    def is_small_form(self) -> bool:
        """Whether the weights have to be assembled from parts."""
        return self.text_detector is None

    @property
    def text_projector_config(self) -> SequenceProjectorConfig:
        """Shape of the projector behind the line recognizer."""
        return SequenceProjectorConfig(**self.text_projector, hidden_size=self._width)

    @property
    def transcription(self) -> Transcription:
        """How the speech decoder writes a recording down."""
        return Transcription(**self.audio_decoder)

    @property
    def vision_projector_config(self) -> ObjectProjectorConfig:
        """Shape of the projector behind the object encoder."""
        return ObjectProjectorConfig(**self.vision_projector, hidden_size=self._width)

    @property
    def vision_stages(self) -> tuple[Stage, ...]:
        """Stages of the object encoder."""
        return tuple(Stage(*stage) for stage in self.vision_config["stages"])

    def trained(self, modality: str) -> bool:
        """Whether a modality's projector was trained."""
        return bool(self.modalities.get(modality, {}).get("trained", False))

    @property
    def _width(self) -> int:
        return int(self.text_config.hidden_size)
