"""pebble, the reference model: a small language model that reads, sees and hears.

Importing this package registers pebble with transformers' Auto classes. It knows nothing of
export, bundles or the runtime.
"""

from __future__ import annotations

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)

from edge_safe.models.pebble.configuration_pebble import PebbleConfig
from edge_safe.models.pebble.modeling_pebble import PebbleForConditionalGeneration
from edge_safe.models.pebble.processing_pebble import PebbleProcessor
from edge_safe.models.pebble.tokenization_pebble import PebbleTokenizer

__all__ = ["PebbleConfig", "PebbleForConditionalGeneration", "PebbleProcessor", "PebbleTokenizer"]

AutoConfig.register(PebbleConfig.model_type, PebbleConfig)
AutoTokenizer.register(PebbleConfig, fast_tokenizer_class=PebbleTokenizer)
AutoProcessor.register(PebbleConfig, PebbleProcessor)
AutoModelForCausalLM.register(PebbleConfig, PebbleForConditionalGeneration)
AutoModelForImageTextToText.register(PebbleConfig, PebbleForConditionalGeneration)
