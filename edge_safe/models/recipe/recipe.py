"""All tables of a recipe together."""

from __future__ import annotations

from edge_safe.models.losses import LossWeights
from edge_safe.models.recipe.data_sections import AnswersSection, DataSection
from edge_safe.models.recipe.projector_sections import (
    ObjectsProjectorSection,
    SpeechDecoderSection,
    TextProjectorSection,
)
from edge_safe.models.recipe.section import Section
from edge_safe.models.recipe.training_sections import (
    CalibrationSection,
    HeadsSection,
    LoraSection,
    ModelSection,
    OptimizerSection,
    SafeRowSection,
    TokensSection,
    TrainingSection,
)


class Recipe(Section, frozen=True):
    """A whole recipe."""

    model: ModelSection
    heads: HeadsSection
    data: DataSection
    tokens: TokensSection = TokensSection()
    answers: AnswersSection | None = None
    lora: LoraSection | None = None
    losses: LossWeights = LossWeights()
    optimizer: OptimizerSection = OptimizerSection()
    training: TrainingSection = TrainingSection()
    safe_row: SafeRowSection | None = None
    text_projector: TextProjectorSection | None = None
    speech_decoder: SpeechDecoderSection | None = None
    objects_projector: ObjectsProjectorSection | None = None
    calibration: CalibrationSection = CalibrationSection()

    @property
    def token_ids(self) -> tuple[int, int] | None:
        """Rows (safe, unsafe) chosen by hand, or None."""
        if self.tokens.safe_id is None or self.tokens.unsafe_id is None:
            return None
        return self.tokens.safe_id, self.tokens.unsafe_id
