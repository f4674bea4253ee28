"""What all questions share: one model, its examples, states at any depth, and trained heads.

Everything is done by the functions that train a recipe; this file only chooses what they are given.
Features and heads are kept in the work folder, so that a stopped study goes on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.study.heads import VARIANTS
from benchmarks.study.options import Options
from benchmarks.study.rows import drawn, measuring_examples
from benchmarks.study.states import BorrowingCache, Depth, find_lender
from benchmarks.study.tasks import ConsistentTask, StudyTask, find_twins
from edge_safe.errors import UsageError
from edge_safe.models import base_model, training
from edge_safe.models.compose import Split
from edge_safe.models.examples import Encoded, encode
from edge_safe.models.features import FeatureCache, Ids
from edge_safe.models.progress import Progress
from edge_safe.models.prompts import PromptEncoder
from edge_safe.models.recipe import Recipe, read_recipe
from edge_safe.models.run import Run
from edge_safe.models.safety_file import SAFETY_JSON, read_safety
from edge_safe.models.safety_head import SafetyModule

READING_TOKENS = 16384
MICRO_BATCH = 16

Array = NDArray[np.float64]


@dataclass(slots=True)
class Reading:
    """What heads say of examples, in their order.

    Attributes:
        parts: By layer, (n, 3): z_unsafe, z_safe, a.
        verdicts: By layer, (n,) log-odds of the head's own combination.
        final: (n,) log-odds at full depth; means nothing where that was not run.
    """

    parts: dict[int, Array]
    verdicts: dict[int, Array]
    final: Array


class Lab:
    """One model and its examples.

    Attributes:
        options: The command line's.
        recipe: Those parts of the recipe that the study needs.
        run: The recipe's run on the checkpoint; nothing of the language model is trained.
        layer: The gate's layer.
        work: Where the study keeps what it made.
        train_set: Training examples.
        requests: By the prompts of a training example, the ids of the rows it was made from.
        validation_set: The recipe's own validation split.
        measured: Examples made of the measuring file, empty without one.
        progress: Told how far each job is.
    """

    def __init__(self, options: Options, progress: Progress) -> None:
        torch.set_num_threads(options.threads)
        self.options = options
        self.progress = progress
        whole = read_recipe(options.recipe)
        self.layer = _layer(options, whole)
        self.recipe = _needed(whole, options.checkpoint, self.layer)
        self.work = options.cache / "study"
        accelerator = training.make_accelerator()
        folder = options.recipe.parent
        self.run = Run(
            self.recipe, options.data, folder, self.work, options.cache, accelerator, progress
        )
        split, limit = self.run.split, options.limit
        self.run.split = Split(
            tuple(drawn(split.train, limit)),
            tuple(drawn(split.validation, None if limit is None else limit // 2)),
        )
        self.run.read_examples()
        self.train_set, self.validation_set = self.run.train_set, self.run.validation_set
        self.requests: dict[tuple[Ids, ...], str] = {
            encoded.prompts: example.id
            for encoded, example in zip(self.train_set, self.run.split.train, strict=True)
        }
        # The recipe's limit on tokens is for training; slot T has to fit the context as well.
        longest = int(self.language.config.max_position_embeddings) - 1
        self.encoder = PromptEncoder(self.run.base.tokenizer, longest, self.run.encoder.read)
        self.measured: list[Encoded] = []
        if options.measure is not None:
            examples = measuring_examples(options.measure, options.rows)
            self.measured = encode(self.encoder, examples)
        self.model_hash = base_model.fingerprint(cast(Any, self.model).get_decoder())
        self._lenders: dict[tuple[int, ...], FeatureCache | None] = {}

    @property
    def model(self) -> PreTrainedModel:
        """The checkpoint's model."""
        return self.run.base.model

    @property
    def language(self) -> PreTrainedModel:
        """Its language model."""
        return cast(PreTrainedModel, getattr(self.model, "language_model", self.model))

    @property
    def tests(self) -> dict[str, list[Encoded]]:
        """The sets that heads are tested on, by name."""
        sets = {"validation": self.validation_set, "measured": self.measured}
        return {name: examples for name, examples in sets.items() if examples}

    @property
    def reported(self) -> list[Encoded]:
        """Examples made of the measuring file, or the validation split without one."""
        return self.measured or self.validation_set

    def states(
        self, layers: Sequence[int], examples: Sequence[Encoded], *, full: bool = False
    ) -> BorrowingCache:
        """States of all prompts of these examples.

        Args:
            layers: Depths.
            examples: Whose prompts.
            full: Whether the final state is needed too; otherwise layers above are not run.
        """
        dtype = self.recipe.training.feature_dtype
        depth = None if full else max(layers)
        model = Depth(self.model, getattr(torch, dtype), depth)
        key = f"{self.model_hash} {dtype} {depth}"
        prompts = [p for e in examples for p in e.prompts]
        lender = None if full else self._lender(model, tuple(layers))
        cache = BorrowingCache(self.work / "features", key, layers, lender)
        cache.compute(cast(PreTrainedModel, model), prompts, self.progress)
        return cache

    def _lender(self, model: Depth, layers: tuple[int, ...]) -> FeatureCache | None:
        """Training's cache for these layers, if there is one that agrees with the model."""
        if layers not in self._lenders:
            prompts = [p for e in (*self.train_set, *self.validation_set) for p in e.prompts]
            root, scratch = self.options.cache / "features", self.work / "samples"
            self._lenders[layers] = find_lender(root, model, layers, prompts, scratch)
        return self._lenders[layers]

    def heads(
        self,
        variant: str,
        seed: int,
        layers: Sequence[int],
        cache: FeatureCache,
        examples: Sequence[Encoded] | None = None,
    ) -> SafetyModule:
        """Heads trained by the recipe on cached states; those trained before come from disk.

        Args:
            variant: A key of ``heads.VARIANTS``.
            seed: Added to the recipe's.
            layers: Depths with a head.
            cache: Has the states of the examples.
            examples: By default all training examples.
        """
        examples = self.train_set if examples is None else examples
        made = VARIANTS[variant]
        recipe = made.adapted(self.recipe)
        heads = msgspec.structs.replace(recipe.heads, layers=tuple(layers), exit_layer="auto")
        self.run.recipe = msgspec.structs.replace(recipe, heads=heads)
        safety = made.build(self.run.member(seed), self._vocabulary_rows())
        section = recipe.training
        schedule = replace(
            self.run.schedule(),
            seed=section.seed + seed,
            micro_batch=section.micro_batch or MICRO_BATCH,
        )
        weights, name = made.weights(recipe.losses), f"{variant} {seed + 1}"
        rate, dropout = recipe.optimizer.learning_rate, section.feature_dropout
        task = StudyTask(safety, weights, cache, examples, (), rate, dropout, name)
        if made.consistency > 0.0:
            twins = find_twins(examples, self.requests)
            task = ConsistentTask(
                safety, weights, cache, examples, rate, dropout, name, twins, made.consistency
            )
        content = repr((variant, made, seed, heads, self.recipe, self.model_hash))
        named = repr([(e.prompts, e.unsafe) for e in examples])
        content_hash = hashlib.sha256(f"{content} {named}".encode()).hexdigest()[:16]
        folder = self.work / "heads" / content_hash
        training.train(task, schedule, folder, self.run.accelerator, self.progress)
        return safety

    def gate(self) -> SafetyModule:
        """The checkpoint's own gate at the layer, or one that is trained here."""
        if (self.options.checkpoint / SAFETY_JSON).exists():
            _, safety = read_safety(self.options.checkpoint)
            if self.layer in safety.config.layers:
                return safety
        cache = self.states((self.layer,), self.train_set)
        return self.heads("together", 0, (self.layer,), cache)

    def read(
        self,
        safety: SafetyModule,
        cache: FeatureCache,
        examples: Sequence[Encoded],
        layers: Sequence[int] | None = None,
    ) -> Reading:
        """What heads say of examples whose states are cached."""
        layers = cache.layers if layers is None else layers
        task = StudyTask(safety, self.recipe.losses, cache, (), (), 0.0)
        order = sorted(range(len(examples)), key=lambda i: examples[i].length)
        parts = {k: np.zeros((len(examples), 3)) for k in layers}
        verdicts = {k: np.zeros(len(examples)) for k in layers}
        final = np.zeros(len(examples))
        with torch.no_grad():
            for places in _batches(order, [e.length for e in examples]):
                batch = task.gate_batch([examples[i] for i in places])
                for layer in layers:
                    read = safety.head(layer)(batch.states[layer], batch.mask)
                    a = cast(Tensor, read.attention_logit)[:, None]
                    parts[layer][places] = torch.cat([read.token_logits, a], -1).numpy()
                    verdicts[layer][places] = _odds(read.verdict_logits)
                final[places] = _odds(safety.final(batch.final))
        return Reading(parts, verdicts, final)

    def _vocabulary_rows(self) -> Tensor:
        head: Any = self.model.get_output_embeddings()
        rows: Tensor = head.weight[list(self.run.tokens.ids)].float()
        return rows


def _odds(logits: Tensor) -> Array:
    """(B, 2), unsafe first -> (B,)."""
    both = logits.double().numpy()
    odds: Array = both[:, 0] - both[:, 1]
    return odds


def _batches(order: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    """Cuts places, shortest example first, into batches of bounded size with their padding."""
    batches: list[list[int]] = []
    for place in order:
        if batches and (len(batches[-1]) + 1) * lengths[place] <= READING_TOKENS:
            batches[-1].append(place)
        else:
            batches.append([place])
    return batches


def _layer(options: Options, recipe: Recipe) -> int:
    """The gate's layer: as asked for, the recipe's, or the deepest it trains."""
    if options.layer is not None:
        return options.layer
    if isinstance(recipe.heads.exit_layer, int):
        return recipe.heads.exit_layer
    if not recipe.heads.layers:
        raise UsageError("The recipe trains no gate; name a layer with --layer.")
    return recipe.heads.layers[-1]


def _needed(recipe: Recipe, checkpoint: Path, layer: int) -> Recipe:
    """The recipe on a model that is trained already: no answers, no projectors, no safe row."""
    source = str(checkpoint.resolve())
    return Recipe(
        model=msgspec.structs.replace(recipe.model, source=source, from_parts=False),
        heads=msgspec.structs.replace(recipe.heads, layers=(layer,), exit_layer=layer, members=1),
        data=recipe.data,
        tokens=recipe.tokens,
        losses=recipe.losses,
        optimizer=recipe.optimizer,
        training=recipe.training,
        calibration=recipe.calibration,
    )
