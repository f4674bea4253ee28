"""The training recipe: a TOML file, typed, with every key and value checked before work starts."""

from __future__ import annotations

from edge_safe.models.recipe.data_sections import (
    AnswersSection,
    CarriersSection,
    ContrastsSection,
    ConversationsSection,
    DataSection,
    HarmlessSection,
    LongSection,
    PicturesSection,
    PrefilledSection,
    RecordingsSection,
    RephrasedSection,
    WrappingsSection,
)
from edge_safe.models.recipe.projector_sections import (
    ComposedSection,
    ObjectsProjectorSection,
    SpeechDecoderSection,
    TextProjectorSection,
)
from edge_safe.models.recipe.reader import parse_recipe, read_recipe
from edge_safe.models.recipe.recipe import Recipe
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

__all__ = [
    "AnswersSection",
    "CalibrationSection",
    "CarriersSection",
    "ComposedSection",
    "ContrastsSection",
    "ConversationsSection",
    "DataSection",
    "HarmlessSection",
    "HeadsSection",
    "LongSection",
    "LoraSection",
    "ModelSection",
    "ObjectsProjectorSection",
    "OptimizerSection",
    "PicturesSection",
    "PrefilledSection",
    "Recipe",
    "RecordingsSection",
    "RephrasedSection",
    "SafeRowSection",
    "Section",
    "SpeechDecoderSection",
    "TextProjectorSection",
    "TokensSection",
    "TrainingSection",
    "WrappingsSection",
    "parse_recipe",
    "read_recipe",
]
