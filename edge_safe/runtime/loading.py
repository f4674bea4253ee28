"""Loads what a ``SafeModel`` computes with: graphs, tokenizer, template, towers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edge_safe.errors import BundleError
from edge_safe.runtime.bundle import Bundle, open_bundle
from edge_safe.runtime.engine import Engine
from edge_safe.runtime.families.base import open_towers
from edge_safe.runtime.media_cache import MediaCache
from edge_safe.runtime.media_encoder import MediaEncoder
from edge_safe.runtime.policy import Policy
from edge_safe.runtime.prompt import PromptBuilder
from edge_safe.runtime.request import Requests
from edge_safe.runtime.template import ChatTemplate
from edge_safe.runtime.tokens import Tokens
from edge_safe.runtime.verified_files import VerifiedFiles

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"


def load_requests(
    files: VerifiedFiles,
    provider: str | None,
    threads: int | None,
    policy: Policy,
    accept_failed: bool,
    profile_folder: Path | None,
    *,
    untrained_towers: bool,
    prefix_cache_bytes: int,
    media_cache_bytes: int,
) -> Requests:
    """Opens a bundle, as ``SafeModel.load`` describes it, which names the errors as well.

    Args:
        files: The bundle's files, some of which may be hashed already.
        provider: What runs it; None takes what its target names.
        threads: Threads inside one operator.
        policy: A policy that was checked.
        accept_failed: Opens a bundle that failed its acceptance test.
        profile_folder: Where ONNX Runtime writes a profile of every graph.
        untrained_towers: Also uses towers whose projector was never trained.
        prefix_cache_bytes: Memory for what prompts have in common at their beginning.
        media_cache_bytes: The same for pictures and sounds.
    """
    bundle = open_bundle(files, provider, threads, accept_failed, profile_folder)
    safety = bundle.manifest.safety
    engine = Engine(bundle, prefix_cache_bytes)
    engine.stages(policy)
    # The tokenizer is parsed while the weights are hashed and the graphs opened.
    with engine.loading():
        controls = {*safety.control_token_ids, safety.safe_token_id, safety.unsafe_token_id}
        tokens = Tokens(bundle.read(TOKENIZER_FILE), sorted(controls))
        towers = open_towers(bundle, tokens, untrained_towers)
        if media_cache_bytes > 0:
            towers = MediaCache(towers, media_cache_bytes)
        family = MediaEncoder(towers, bundle.manifest.model.context_length)
        template = ChatTemplate(
            _text(bundle, TEMPLATE_FILE), _template_variables(bundle), family.placeholders
        )
    builder = PromptBuilder(
        template, tokens, safety.safe_token_id, bundle.manifest.model.context_length
    )
    return Requests(bundle, engine, tokens, builder, family, policy)


def _text(bundle: Bundle, name: str) -> str:
    """Reads a text file of the bundle."""
    try:
        return bundle.read(name).decode("utf-8")
    except UnicodeDecodeError as error:
        raise BundleError(f"{name} in {bundle.folder} is not UTF-8 text: {error}.") from error


def _template_variables(bundle: Bundle) -> dict[str, str]:
    """Special tokens by the names that chat templates use for them."""
    if not bundle.has(TOKENIZER_CONFIG_FILE):
        return {}
    try:
        config: dict[str, Any] = json.loads(_text(bundle, TOKENIZER_CONFIG_FILE))
    except ValueError as error:
        raise BundleError(f"{TOKENIZER_CONFIG_FILE} is not JSON: {error}.") from error
    variables = {}
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        value = config.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            variables[name] = text
    return variables
