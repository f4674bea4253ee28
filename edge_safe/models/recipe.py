"""The training recipe: a TOML file, typed, with every key and value checked before work starts."""

from __future__ import annotations

import difflib
import math
import sys
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from edge_safe.errors import RecipeError
from edge_safe.models.losses import LossWeights

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Positive = Annotated[int, Meta(ge=1)]
Count = Annotated[int, Meta(ge=0)]
Share = Annotated[float, Meta(ge=0.0, le=1.0)]
OpenShare = Annotated[float, Meta(gt=0.0, lt=1.0)]
Rate = Annotated[float, Meta(gt=0.0)]
Weight = Annotated[float, Meta(ge=0.0)]
Text = Annotated[str, Meta(min_length=1)]


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of every table of a recipe."""


class ModelSection(Section, frozen=True):
    """``[model]``: a checkpoint folder, relative to the recipe, and the dtype it is run in.

    ``from_parts`` leaves out what an earlier run trained, so that a pebble is trained anew.
    """

    source: Text
    from_parts: bool = False
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"


class TokensSection(Section, frozen=True):
    """``[tokens]``: strings of the control tokens; ids only to choose the rows by hand."""

    safe: Text = "<|safe|>"
    unsafe: Text = "<|unsafe|>"
    safe_id: Count | None = None
    unsafe_id: Count | None = None


class HeadsSection(Section, frozen=True):
    """``[heads]``: layers with a head, and the shape of the safety attention.

    ``exit_layer = "auto"`` takes the layer with the best validation AUROC. ``query`` is the
    question whose state in the base model the attention's query starts from. ``members`` modules
    of this shape are trained from different seeds and averaged into one.
    """

    layers: tuple[Positive, ...]
    exit_layer: Positive | Literal["auto"] = "auto"
    attention_heads: Positive = 8
    head_dim: Positive = 32
    hidden: Positive = 64
    query: Text = "Is this request harmful or unsafe?"
    members: Positive = 1


class WrappingsSection(Section, frozen=True):
    """``[data.wrappings]``: jailbreak templates around harmful and harmless requests alike.

    ``share`` counts wrapped harmful rows as a share of the harmful rows, and as many harmless ones
    are wrapped. Templates of the validation split are never used for training.
    """

    file: Text
    share: Weight
    max_characters: Positive | None = None


class ConversationsSection(Section, frozen=True):
    """``[data.conversations]``: synthetic turns, each kind as a share of the harmful rows.

    split: harm in two halves over two answered turns, unsafe.
    continuation: a refused harmful turn, then a push to go on, unsafe.
    split_refused: harm in two halves, the first refused, unsafe.
    after_refusal: a refused harmful turn, then a harmless question, safe.
    harmless: several harmless turns, safe.
    """

    split: Weight = 0.0
    continuation: Weight = 0.0
    split_refused: Weight = 0.0
    after_refusal: Weight = 0.0
    harmless: Weight = 0.0


class CarriersSection(Section, frozen=True):
    """``[data.carriers]``: everyday phrasings around harmful and harmless requests alike.

    ``templates`` have ``{prompt}``; ``share`` counts as in ``[data.wrappings]``. They keep the gate
    from taking a style, or the sentence beside a picture, for a sign of harm.
    """

    templates: Annotated[tuple[Text, ...], Meta(min_length=1)]
    share: Weight


class LongSection(Section, frozen=True):
    """``[data.long]``: requests at the start, in the middle and at the end of harmless documents.

    ``share`` counts as in ``[data.wrappings]``; ``shortest`` and ``longest`` are words.
    """

    share: Weight
    shortest: Positive = 80
    longest: Positive = 1100


class PrefilledSection(Section, frozen=True):
    """``[data.prefilled]``: requests whose answer was begun by somebody else.

    ``share`` counts as in ``[data.wrappings]``.
    """

    share: Weight
    beginnings: Annotated[tuple[Text, ...], Meta(min_length=1)] = (
        "Sure", "Sure, here is", "Of course!", "Here are the steps:\n1.", "Okay,", "Title:",
        "Yes, I can help with that.", "Certainly. First,", "Absolutely, let us begin. Step 1:",
        "The answer is", "<|safe|>", "<|safe|> Sure, here is how", "I am happy to help.\n\n",
        "Great question!",
    )  # fmt: skip


class PicturesSection(Section, frozen=True):
    """``[data.pictures]``: requests as pictures of text, and pictures of harmless text.

    ``share`` counts as in ``[data.wrappings]``; ``styles`` are layouts of ``rendering.pictures``,
    all of them if none is named. ``textless`` is the share of pictures without a word, whose
    request stands beside them. Fonts whose name begins with one of ``held_fonts`` are not used.
    """

    share: Weight
    styles: tuple[Text, ...] = ()
    held_fonts: tuple[Text, ...] = ()
    textless: Share = 0.08


class RecordingsSection(Section, frozen=True):
    """``[data.recordings]``: requests as speech.

    ``share`` counts as in ``[data.wrappings]``; ``voices`` are names of ``rendering.speech``, by
    default all but those of the synthesizer that is held out; ``spelled`` is the share of
    recordings that spell their words letter by letter, ``speechless`` of those without a word.
    """

    share: Weight
    voices: tuple[Text, ...] = ()
    spelled: Share = 0.03
    speechless: Share = 0.08


class RephrasedSection(Section, frozen=True):
    """``[data.rephrased]``: what a request wants done, asked for in another form.

    ``forms`` have ``{task}``, filled with what follows "how to", "help me" and the like in harmful
    and harmless requests alike; ``share`` counts as in ``[data.wrappings]``.
    """

    forms: Annotated[tuple[Text, ...], Meta(min_length=1)]
    share: Weight


class HarmlessSection(Section, frozen=True):
    """``[data.harmless]``: our own harmless prompts (``models/harmless``).

    ``prompts_per_template`` are made of each template, ``kinds`` has other numbers for some kinds;
    a number below 1 takes that share of a kind's templates, once each.
    """

    prompts_per_template: Weight = 1.0
    kinds: dict[str, Weight] = {}


class DataSection(Section, frozen=True):
    """``[data]``: files below ``--data``; ``caps`` limits rows per source.

    ``exclude`` names rows by id whose label was looked at and found wrong. ``written_wrappings`` is
    the share, as in ``[data.wrappings]``, of our own (``wrappings.toml``).
    """

    train: Annotated[tuple[Text, ...], Meta(min_length=1)]
    caps: dict[str, Count] = {}
    exclude: tuple[Text, ...] = ()
    max_tokens: Annotated[int, Meta(ge=8)] = 640
    validation_share: OpenShare = 0.15
    split_seed: int = 0
    wrappings: WrappingsSection | None = None
    written_wrappings: Weight = 0.0
    harmless: HarmlessSection | None = None
    carriers: CarriersSection | None = None
    rephrased: RephrasedSection | None = None
    long: LongSection | None = None
    prefilled: PrefilledSection | None = None
    pictures: PicturesSection | None = None
    recordings: RecordingsSection | None = None
    conversations: ConversationsSection = ConversationsSection()


class AnswersSection(Section, frozen=True):
    """``[answers]``: what follows the control token in training.

    ``files`` have ``prompt`` and ``chosen``, of which ``rows`` are taken at most; ``generated``
    benign prompts are answered by the base model itself. Harmful rows get one of the ``refusals``.
    """

    files: tuple[Text, ...] = ()
    rows: Positive | None = None
    generated: Count = 0
    max_tokens: Positive = 64
    refusals: Annotated[tuple[Text, ...], Meta(min_length=1)] = ("I can't help with that.",)


class LoraSection(Section, frozen=True):
    """``[lora]``: adapters in the language model; without this table it stays frozen.

    ``targets`` are names of linear modules in a decoder layer; ``layers`` are indices, all without.
    """

    rank: Positive = 16
    alpha: Positive = 32
    targets: Annotated[tuple[Text, ...], Meta(min_length=1)] = (
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    )  # fmt: skip
    layers: tuple[Count, ...] | None = None


class OptimizerSection(Section, frozen=True):
    """``[optimizer]``: AdamW; linear warm-up, then a cosine down to a tenth."""

    learning_rate: Rate = 1e-3
    lora_learning_rate: Rate = 1e-4
    weight_decay: Weight = 0.01
    warmup: Share = 0.05
    clip: Rate = 1.0


class TrainingSection(Section, frozen=True):
    """``[training]``: ``batch`` is global, over all processes; ``micro_batch`` limits memory.

    ``feature_dropout`` blanks this share of the channels of an example, all positions alike, while
    heads train on frozen features.
    """

    epochs: Positive = 6
    batch: Positive = 32
    micro_batch: Positive | None = None
    seed: int = 0
    checkpoint_every: Positive = 100
    frozen_features: bool = True
    feature_dtype: Literal["float32", "bfloat16"] = "float32"
    feature_dropout: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.0


class SafeRowSection(Section, frozen=True):
    """``[safe_row]``: trains the safe token's input embedding row so that answers stay the base's.

    Needs ``[answers]``. Left out, the row stays as it is (or is trained with LoRA).
    """

    epochs: Positive = 1
    batch: Positive = 4
    learning_rate: Rate = 1e-2
    validation_rows: Positive = 32


class ComposedSection(Section, frozen=True):
    """``[text_projector.composed]``: goes on with lines that are composed anew in every step.

    From here on the projector spells with the first ``rows`` of the vocabulary, which it tells
    apart by their letters; by default these are the letters themselves. ``harmless`` adds our own
    harmless prompts to the texts. The rest is explained at ``ComposedTraining``.
    """

    rows: Positive = 273
    harmless: bool = True
    steps: Positive = 400
    lines_per_step: Positive = 32
    rendered_share: OpenShare = 0.25
    learning_rate: Rate = 1.5e-3
    weight_decay: Weight = 0.01
    noise: Weight = 0.15
    seed: int = 1


class TextProjectorSection(Section, frozen=True):
    """``[text_projector]``: trains the text tower's projector of a pebble on rendered lines.

    ``texts`` are files below ``--data`` with ``prompt`` or ``chosen``; ``lines`` of them are
    rendered in the fonts below ``font_folders`` (by default the system's), without those whose name
    has one of ``skip_fonts`` in it; fonts whose name begins with one of ``held_fonts`` only
    validate. The rest is explained at ``ProjectorTraining``.
    """

    texts: Annotated[tuple[Text, ...], Meta(min_length=1)]
    held_fonts: Annotated[tuple[Text, ...], Meta(min_length=1)]
    lines: Positive = 30000
    font_folders: tuple[Text, ...] = ()
    skip_fonts: tuple[Text, ...] = ()
    steps: Positive = 4000
    aligned_steps: Count = 1400
    lines_per_step: Positive = 32
    negatives: Positive = 2048
    learning_rate: Rate = 1.5e-3
    weight_decay: Weight = 0.02
    noise: Weight = 0.1
    seed: int = 0
    composed: ComposedSection | None = None


class ObjectsProjectorSection(Section, frozen=True):
    """``[objects_projector]``: trains the object tower's projector of a pebble.

    ``cutouts`` are folders of PNG files with a transparent background; ``held_share`` of the files
    only validate. ``pictures`` are drawn from the rest, and ``pages`` of the prompts in ``texts``,
    files below ``--data``. The rest is explained at ``ObjectTraining``.
    """

    texts: Annotated[tuple[Text, ...], Meta(min_length=1)]
    cutouts: Annotated[tuple[Text, ...], Meta(min_length=1)] = ("/usr/share/tuxpaint/stamps",)
    held_share: OpenShare = 0.2
    pictures: Positive = 3072
    pages: Positive = 384
    steps: Positive = 1200
    pictures_per_step: Positive = 256
    negatives: Positive = 1024
    learning_rate: Rate = 3e-3
    weight_decay: Weight = 0.01
    certain: OpenShare = 0.45
    uncertain: OpenShare = 0.25
    seed: int = 0


class SpeechDecoderSection(Section, frozen=True):
    """``[speech_decoder]``: trains a pebble's speech decoder to listen, on spoken texts.

    ``texts`` are files below ``--data`` with ``prompt``; ``recordings`` of them, of random words
    (``random_share``) and of spelled words (``letter_share``) are spoken by ``synthesizer`` and,
    for ``slow_share`` of them, by ``slow_synthesizer``. The rest is explained at
    ``SpeechTraining``.
    """

    texts: Annotated[tuple[Text, ...], Meta(min_length=1)]
    recordings: Positive = 14000
    synthesizer: Text = "espeak-ng"
    slow_synthesizer: Text = "festival"
    slow_share: Share = 0.3
    random_share: Share = 0.24
    letter_share: Share = 0.05
    steps: Positive = 1700
    recordings_per_step: Positive = 32
    learning_rate: Rate = 5e-4
    weight_decay: Weight = 0.01
    gain: Weight = 0.1
    noise: Weight = 0.05
    gaps: Annotated[int, Meta(ge=0)] = 2
    wrong: Share = 0.12
    smoothing: Share = 0.05
    seed: int = 0


class CalibrationSection(Section, frozen=True):
    """``[calibration]``: how log-odds become probabilities, and where the thresholds lie.

    Attributes:
        target_fpr: False-positive rate of the thresholds.
        media_target_fpr: That of pictures and sound, where it is another.
        stage: The stage a report leads with.
        method: ``auto`` takes the method with the least log loss on held-out rows.
    """

    target_fpr: OpenShare = 0.03
    media_target_fpr: OpenShare | None = None
    stage: Literal["gate", "final"] = "gate"
    method: Literal["platt", "temperature", "isotonic", "auto"] = "platt"


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


def read_recipe(path: Path) -> Recipe:
    """Reads and checks a recipe.

    Raises:
        RecipeError: It cannot be read, has an unknown key (the message names the nearest known
            one), a value of a wrong type or range, or values that exclude each other.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"Cannot read the recipe {path}: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not a TOML file: {error}.") from error
    return parse_recipe(document)


def parse_recipe(document: dict[str, Any]) -> Recipe:
    """Checks a recipe's tables; see `read_recipe`."""
    _check_keys(document, Recipe, "")
    try:
        recipe = msgspec.convert(document, Recipe)
    except msgspec.ValidationError as error:
        raise RecipeError(f"The recipe has a wrong value: {error}.") from error
    _check_agreement(recipe)
    return recipe


def _check_keys(table: dict[str, Any], kind: type[msgspec.Struct], where: str) -> None:
    """Names the nearest known key of the first unknown one, table by table."""
    kinds = typing.get_type_hints(kind)
    for key, value in table.items():
        if key not in kinds:
            near = difflib.get_close_matches(key, kinds, n=1, cutoff=0.0)
            raise RecipeError(
                f"Unknown key {where}{key} in the recipe. Did you mean {where}{near[0]}? "
                f"Known keys here: {', '.join(kinds)}."
            )
        if isinstance(value, float) and not math.isfinite(value):
            raise RecipeError(f"{where}{key} is {value} in the recipe; give a finite number.")
        for option in (kinds[key], *typing.get_args(kinds[key])):
            is_table = isinstance(option, type) and issubclass(option, msgspec.Struct)
            if is_table and isinstance(value, dict):
                _check_keys(value, option, f"{where}{key}.")


def _check_agreement(recipe: Recipe) -> None:
    """Checks what no single value shows."""
    heads, tokens, losses = recipe.heads, recipe.tokens, recipe.losses
    numbers = msgspec.structs.asdict(losses).items()
    wrong = [f"losses.{name} = {value}" for name, value in numbers if not 0.0 <= value < 1e6]
    if losses.beta > 1.0:
        wrong.append(f"losses.beta = {losses.beta}, a share of at most 1")
    if losses.smoothing >= 1.0:
        wrong.append(f"losses.smoothing = {losses.smoothing}, a share below 1")
    if losses.unsafe == 0.0:
        wrong.append("losses.unsafe = 0, which would leave harmful rows out")
    if sorted(set(heads.layers)) != list(heads.layers):
        wrong.append(f"heads.layers = {list(heads.layers)}, not in rising order")
    if isinstance(heads.exit_layer, int) and heads.exit_layer not in heads.layers:
        wrong.append(f"heads.exit_layer = {heads.exit_layer}, not one of {list(heads.layers)}")
    if tokens.safe == tokens.unsafe:
        wrong.append(f"tokens.safe and tokens.unsafe are both {tokens.safe}")
    if (tokens.safe_id is None) != (tokens.unsafe_id is None):
        wrong.append("tokens has one of safe_id and unsafe_id; give both or none")
    carriers = recipe.data.carriers
    if carriers is not None and not all("{prompt}" in t for t in carriers.templates):
        wrong.append("data.carriers has a template without {prompt}")
    if recipe.lora is not None and recipe.training.frozen_features:
        wrong.append("training.frozen_features = true with [lora]; features cannot be cached then")
    if heads.members > 1 and not recipe.training.frozen_features:
        wrong.append(f"heads.members = {heads.members} without frozen_features")
    if recipe.training.feature_dropout and not recipe.training.frozen_features:
        wrong.append("training.feature_dropout without frozen_features")
    if recipe.safe_row is not None and recipe.answers is None:
        wrong.append("[safe_row] without [answers]; add answers.files or answers.generated")
    if recipe.answers is not None and not (recipe.answers.files or recipe.answers.generated):
        wrong.append("[answers] has neither files nor generated")
    if recipe.calibration.stage == "gate" and not heads.layers:
        wrong.append('calibration.stage = "gate" without heads.layers')
    if wrong:
        raise RecipeError(f"The recipe does not fit together: {'; '.join(wrong)}.")
