"""One run of a recipe: the base model, what is put on it, the examples, and what trains what."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from edge_safe.models import base_model, training
from edge_safe.models.answers import (
    Answers,
    attach_answers,
    choose_prompts,
    generate_answers,
    read_answers,
)
from edge_safe.models.base_model import BaseModel
from edge_safe.models.compose import build_examples
from edge_safe.models.control_tokens import (
    ControlTokens,
    install_control_tokens,
    template_with_safe_token,
)
from edge_safe.models.examples import Encoded, LogOdds, encode
from edge_safe.models.features import FeatureCache
from edge_safe.models.head_training import HeadTask
from edge_safe.models.lm_training import (
    Fidelity,
    GatedLanguageModel,
    LanguageModelTask,
    add_lora,
)
from edge_safe.models.members import merge_members
from edge_safe.models.pebble.readings import read_media
from edge_safe.models.pebble.tower_jobs import TowerScores, train_towers
from edge_safe.models.progress import Progress, silent
from edge_safe.models.prompts import Message, PromptEncoder
from edge_safe.models.recipe import Recipe, SafeRowSection
from edge_safe.models.safe_row import safe_row_task
from edge_safe.models.safety_head import SafetyConfig, SafetyModule
from edge_safe.models.token_rows import TokenRows
from edge_safe.models.work_folders import WorkFolders
from edge_safe.rendering.fonts import FontChoice

LOG = "log.jsonl"


class Run:
    """One run: the base model, what is put on it, and the examples."""

    def __init__(
        self,
        recipe: Recipe,
        data: Path,
        folder: Path,
        work: Path,
        cache: Path,
        accelerator: Accelerator,
        progress: Progress,
    ) -> None:
        self.recipe = recipe
        self.data = data
        self.cache = cache
        self.accelerator = accelerator
        self.progress = progress if accelerator.is_main_process else silent
        torch.manual_seed(recipe.training.seed)
        self.split = build_examples(recipe.data, data)
        self.source = (folder / recipe.model.source).resolve()
        self.base = base_model.load_base(
            self.source,
            getattr(torch, recipe.model.dtype),
            untrained=recipe.model.from_parts,
        )
        self.folders = WorkFolders(work, self.base)
        model = self.base.model
        base_model.check_layers(model, recipe.heads.layers)
        self.base.tokenizer, self.tokens = _control_tokens(self.base, recipe)
        model.to(accelerator.device)
        self.encoder = PromptEncoder(self.base.tokenizer, recipe.data.max_tokens)
        self.answers = self._answers(data)
        self.train_set: list[Encoded] = []
        self.validation_set: list[Encoded] = []
        self.counts: dict[str, int] = {}
        self.fitted_on = (
            f"validation split of {', '.join(recipe.data.train)} "
            f"({recipe.data.validation_share:g}, seed {recipe.data.split_seed})"
        )
        self.fidelity: Fidelity | None = None
        self.tower_scores = TowerScores()
        self.log = work / LOG  # each task has its own below
        self.safety = SafetyModule(_safety_config(self.base, recipe))

    def train(self) -> tuple[int, LogOdds]:
        """Trains all there is to train; returns the steps and the validation verdicts."""
        self.tower_scores = train_towers(
            self.recipe,
            self.base,
            self.source,
            self.data,
            self.cache,
            self.folders,
            self.progress,
        )
        # Only now is it known what the model reads in pictures and hears in recordings.
        self.read_examples()
        if self.recipe.safe_row is not None and self.answers is not None:
            self._train_safe_row(self.recipe.safe_row, self.answers)
        if self.recipe.training.frozen_features:
            return self._train_on_features()
        self.safety = self.member(0)
        return self._train_language_model()

    def read_examples(self) -> None:
        """Encodes the split, with what the model reads and hears; ``train`` does it by itself."""
        section = self.recipe.data.pictures
        readings = read_media(
            self.base.model,
            self.source,
            (*self.split.train, *self.split.validation),
            FontChoice(never=section.held_fonts if section is not None else ()),
            self.cache / "readings",
            self.accelerator,
            self.progress,
        )
        halves = [self.split.train, self.split.validation]
        if readings is not None:
            self.encoder.read = readings
            halves = [tuple(filter(readings.takes, half)) for half in halves]
        self.train_set, self.validation_set = (encode(self.encoder, half) for half in halves)
        self.counts = {"train": len(self.train_set), "validation": len(self.validation_set)}

    def _answers(self, data: Path) -> Answers | None:
        section = self.recipe.answers
        if section is None:
            return None
        seed, share = self.recipe.data.split_seed, self.recipe.data.validation_share
        answers = read_answers(section, data, self.encoder, seed, share)
        if section.generated:
            sides = [
                encode(self.encoder, part) for part in choose_prompts(self.split, section.generated)
            ]
            prompts = [e.prompts[0] for part in sides for e in part]
            store = self.folders.path("answers", section, suffix=".jsonl")
            texts: list[tuple[int, ...]] = []
            # The first process answers; the others then find everything in the file.
            for turn in (True, False):
                if self.accelerator.is_main_process == turn:
                    texts = generate_answers(
                        self.base, prompts, section.max_tokens, store, self.progress
                    )
                self.accelerator.wait_for_everyone()
            known = dict(zip(prompts, texts, strict=True))
            made = [tuple(replace(e, answer=known[e.prompts[0]]) for e in part) for part in sides]
            answers = Answers(answers.train + made[0], answers.validation + made[1])
        return answers

    def _train_safe_row(self, section: SafeRowSection, answers: Answers) -> None:
        seed, every = self.recipe.training.seed, self.recipe.training.checkpoint_every
        task, rows = safe_row_task(self.base.model, self.tokens, section, answers)
        schedule = training.Schedule(
            section.epochs, section.batch, seed, task.optimizer, checkpoint_every=every
        )
        folder = self.folders.of_task(task.name, seed, answers.train, section)
        training.train(task, schedule, folder, self.accelerator, self.progress)
        self.fidelity = task.gated.fidelity(task.validation)
        rows.merge()

    def member(self, number: int) -> SafetyModule:
        """A fresh safety module with its own seed, whatever ran before.

        Every query starts from the base model's state of a question about safety.
        """
        torch.manual_seed(self.recipe.training.seed + number)
        safety = SafetyModule(_safety_config(self.base, self.recipe))
        device = self.accelerator.device
        safety.to(device)
        question = self.encoder.encode([Message("user", self.recipe.heads.query)])
        ids, mask = base_model.pad([question], device)
        with torch.no_grad():
            layers, _ = base_model.run_decoder(self.base.model, self.recipe.heads.layers, ids, mask)
        for layer, value in layers.items():
            safety.head(layer).attention.start_query(value[0, -1].float())
        return safety

    def schedule(self) -> training.Schedule:
        """The recipe's, for the heads."""
        section = self.recipe.training
        return training.Schedule(
            section.epochs,
            section.batch,
            section.seed,
            self.recipe.optimizer,
            section.micro_batch,
            section.checkpoint_every,
        )

    def _train_on_features(self) -> tuple[int, LogOdds]:
        dtype = getattr(torch, self.recipe.training.feature_dtype)
        model = self.base.model
        if dtype != model.dtype:
            model = cast(Any, copy.deepcopy(model)).to(dtype)
        # Towers and projectors have no part in the states of given ids.
        model_hash = base_model.fingerprint(cast(Any, model).get_decoder())
        cache = FeatureCache(self.cache / "features", model_hash, self.recipe.heads.layers)
        prompts = [p for e in (*self.train_set, *self.validation_set) for p in e.prompts]
        # Nobody writes before everybody has seen what is missing, so that the shares agree.
        self.accelerator.wait_for_everyone()
        place = (self.accelerator.process_index, self.accelerator.num_processes)
        cache.compute(model, prompts, self.progress, place)
        self.accelerator.wait_for_everyone()
        cache.refresh()

        def task(safety: SafetyModule, name: str) -> HeadTask:
            return HeadTask(
                safety,
                self.recipe.losses,
                cache,
                self.train_set,
                self.validation_set,
                self.recipe.optimizer.learning_rate,
                self.recipe.training.feature_dropout,
                name,
            )

        steps, members = 0, []
        for number in range(self.recipe.heads.members):
            members.append(self.member(number))
            count = self.recipe.heads.members
            name = "heads" if count == 1 else f"heads {number + 1} of {count}"
            schedule = replace(self.schedule(), seed=self.recipe.training.seed + number)
            folder = self.folders.of_heads(self.recipe, self.train_set, number)
            self.log = folder / LOG
            steps += training.train(
                task(members[-1], name),
                schedule,
                folder,
                self.accelerator,
                self.progress,
            )
        self.safety = merge_members(members) if len(members) > 1 else members[0]
        self.safety.join(self.recipe.heads.joined)
        return steps, task(self.safety, "heads").log_odds()

    def _train_language_model(self) -> tuple[int, LogOdds]:
        train_set, held = self.train_set, self.validation_set
        if self.answers is not None and self.recipe.answers is not None:
            refusals = [
                tuple(self.encoder.encode_answer(text)) for text in self.recipe.answers.refusals
            ]
            seed = self.recipe.training.seed
            train_set, held = attach_answers(self.answers, train_set, held, refusals, seed)
        folder = self.folders.of_heads(self.recipe, train_set)
        self.log = folder / LOG
        answered = self.answers is not None
        rows = TokenRows(self.base.model, self.tokens.ids) if answered else None
        lora = self.recipe.lora
        model = add_lora(self.base.model, lora) if lora is not None else self.base.model
        module = GatedLanguageModel(
            model, self.tokens, self.recipe.losses, rows, self.safety, with_answers=answered
        )
        task = LanguageModelTask("heads", module, train_set, held, self.recipe.optimizer)
        steps = training.train(task, self.schedule(), folder, self.accelerator, self.progress)
        self.safety.join(self.recipe.heads.joined)
        odds = task.log_odds()
        benign = [e for e in held if e.answer and not e.unsafe]
        if benign:
            self.fidelity = module.fidelity(benign)
        if rows is not None:
            rows.merge()
        if lora is not None:
            self.base.model = cast(Any, model).merge_and_unload()
        return steps, odds


def _control_tokens(
    base: BaseModel, recipe: Recipe
) -> tuple[PreTrainedTokenizerBase, ControlTokens]:
    tokenizer, tokens = install_control_tokens(
        base.tokenizer, base.model, recipe.tokens.safe, recipe.tokens.unsafe, recipe.token_ids
    )
    if tokenizer.chat_template is not None:
        tokenizer.chat_template = template_with_safe_token(tokenizer.chat_template, tokens.safe)
    return tokenizer, tokens


def _safety_config(base: BaseModel, recipe: Recipe) -> SafetyConfig:
    heads = recipe.heads
    return SafetyConfig(
        base_model.hidden_size(base.model),
        heads.layers,
        heads.attention_heads,
        heads.head_dim,
        heads.hidden,
    )
