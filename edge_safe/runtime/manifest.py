"""The manifest of a bundle, ``edge_safe.json``: typed, versioned, and strict about its fields.

It knows the shape of the file and where paths may lead. It opens nothing but the manifest itself.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any, Literal

import msgspec

from edge_safe.errors import BundleError, IntegrityError, SchemaError
from edge_safe.runtime.calibration import StageCalibration, problem
from edge_safe.runtime.engines.plan import EnginePlan
from edge_safe.runtime.policy import Policy, Stage

MANIFEST_FILE = "edge_safe.json"

CAPACITY = "capacity"
"""Length of caches of which a graph needs all the places at once."""

LANGUAGE = ("gate", "gate_late", "decoder")
"""Graphs that an engine is planned of wherever one is planned at all."""

LATE = "_late"
"""Ending of the name of the graph that goes on behind the early exit, where that is one's end."""

SCHEMA_VERSION = 1


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of every structure in the manifest: immutable, unknown fields rejected."""


class Modality(_Record, frozen=True):
    """One kind of input, and whether what turns it into words was trained."""

    trained: bool


class FileEntry(_Record, frozen=True):
    """One file of the bundle: lower-case hex sha256 and length in bytes."""

    sha256: str
    size: int


class Tensor(_Record, frozen=True):
    """An input or output of a graph; a shape holds numbers, and names where it may vary."""

    name: str
    dtype: str
    shape: list[int | str]


class Graph(_Record, frozen=True):
    """One ONNX file.

    Attributes:
        file: Where it stands.
        inputs: What goes in.
        outputs: What comes out.
        precision: Of its weights.
        optimized: Whether it was written as ONNX Runtime's optimizers would leave it, so that on a
            CPU they are not run when it is opened.
    """

    file: str
    inputs: list[Tensor]
    outputs: list[Tensor]
    precision: str
    optimized: bool = False


Bidirectional = Literal["none", "image", "prompt"]
"""Which positions see each other, not only those before them: of one picture, or of one turn's
prompt."""


class ModelInfo(_Record, frozen=True):
    """What the engine has to know of the language model.

    Attributes:
        layers: Number of layers.
        hidden_size: Width.
        kv_heads: Heads of keys and values.
        head_dim: Their width.
        vocab_size: Rows of the embedding.
        context_length: Longest sequence.
        eos_token_ids: Tokens that end an answer.
        pad_token_id: Token that stands for nothing.
        position_axes: Rows of ``position_ids``: 1, or 3 (time, row, column) with M-RoPE.
        deepstack: Layers behind which features of pictures are added to the hidden states.
    """

    layers: int
    hidden_size: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int
    eos_token_ids: list[int]
    pad_token_id: int
    bidirectional: Bidirectional = "none"
    position_axes: Literal[1, 3] = 1
    deepstack: int = 0


class AttentionInfo(_Record, frozen=True):
    """What the safety attention keeps of every position.

    Attributes:
        layers: Those whose entering states it keeps, in the order that ``gate_past`` has them.
    """

    layers: list[int]


class Acceptance(_Record, frozen=True):
    """Result of the safety test that this very artifact had to pass.

    Attributes:
        passed: Whether it did.
        data: The rows, in words.
        rows: Their number.
        asr: Harmful rows that pass.
        fpr: Harmless rows that are refused.
        auroc: On these rows.
        reason: Why it did not pass.
        builtin: Whether the rows are the exporter's few mild ones, which prove less than real data.
        agreement: Share of verdicts that are those of the model it was made from.
        drift: Largest move of a re-fitted threshold, in log-odds.
        perplexity: Of that model's own answers, over its own.
    """

    passed: bool
    data: str
    rows: int
    asr: float | None = None
    fpr: float | None = None
    auroc: float | None = None
    reason: str | None = None
    builtin: bool = False
    agreement: float | None = None
    drift: float | None = None
    perplexity: float | None = None


class EarlyExit(_Record, frozen=True):
    """A head below the gate's layer that may refuse and never allow.

    Attributes:
        layer: Where it reads.
        calibration: The threshold of what is refused there; ``asr`` is the share of harmful rows
            that go on to the gate, ``fpr`` that of harmless rows refused here already.
    """

    layer: int
    calibration: StageCalibration


class Safety(_Record, frozen=True):
    """Everything the gate needs besides its graph.

    Attributes:
        safe_token_id: Token placed at slot T.
        unsafe_token_id: Its counterpart; never placed by the runtime.
        control_token_ids: Masked out of sampling after slot T.
        exit_layer: Layer k the gate reads, or null for a model with the ``final`` stage alone.
        layers: Layers that had a trained head.
        attention: What stands in ``gate_past``, null without a gate.
        stages: Calibration of every stage of this bundle.
        policy: The policy used when the caller gives none.
        acceptance: Null when the artifact was not tested.
        refitted: Whether the stages were fitted on this bundle's own verdicts, as quantized; else
            they are those of the torch model it was made from.
        early: What ends clear cases before the gate's layer; null without it.
    """

    safe_token_id: int
    unsafe_token_id: int
    control_token_ids: list[int]
    exit_layer: int | None
    layers: list[int]
    attention: AttentionInfo | None
    stages: dict[Stage, StageCalibration]
    policy: Policy = Policy()
    acceptance: Acceptance | None = None
    refitted: bool = False
    early: EarlyExit | None = None


class Provenance(_Record, frozen=True):
    """Where the bundle came from."""

    source: str
    source_sha256: str
    tool_versions: dict[str, str]
    command: str
    created: str


class Manifest(_Record, frozen=True, kw_only=True):
    """The whole of ``edge_safe.json``.

    Attributes:
        release: The TensorRT that its graphs are written for; null without one.
        engines: How TensorRT builds which graphs; all others run on the CPU beside it.
    """

    schema_version: int = SCHEMA_VERSION
    name: str
    family: str
    target: str
    precision: str
    modalities: dict[str, Modality]
    files: dict[str, FileEntry]
    graphs: dict[str, Graph]
    model: ModelInfo
    processors: dict[str, dict[str, Any]]
    safety: Safety
    provenance: Provenance
    release: str | None = None
    engines: dict[str, EnginePlan] = {}

    @property
    def cache_dtype(self) -> str:
        """What keys and values are kept as, in numpy's words; float32 without any."""
        return next((tensor.dtype for tensor in self._caches()), "float32")

    @property
    def whole_caches(self) -> bool:
        """Whether a graph takes the places of a cache all at once, those of new positions too."""
        return any(tensor.shape[2] == CAPACITY for tensor in self._caches())

    @property
    def own_columns(self) -> bool:
        """Whether ``gate_present`` holds single positions too.

        Graphs written for TensorRT do so, and take whole caches for single positions.
        """
        return any(tensor.shape[2] == CAPACITY for tensor in self._caches("decoder"))

    def _caches(self, *graphs: str) -> list[Tensor]:
        """Cache inputs of some graphs, without any named of all that the language model has."""
        # Others may have caches of their own: one that writes down what it hears, say.
        own = [name for name in self.graphs if name.partition("_")[0] in ("gate", "decoder")]
        return [
            tensor
            for name in own
            if not graphs or name in graphs
            for tensor in self.graphs[name].inputs
            if tensor.name.startswith("past_key_values.")
        ]


def dump_manifest(manifest: Manifest) -> bytes:
    """Encodes a manifest as indented JSON with a final newline."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n"


def load_manifest(folder: Path) -> Manifest:
    """Reads and checks the manifest of a bundle folder.

    Raises:
        BundleError: The folder or its manifest is missing or unreadable.
        SchemaError: It is not JSON, is of a newer schema, or does not fit this one.
        IntegrityError: A path in it would leave the bundle.
    """
    path = folder / MANIFEST_FILE
    if not folder.is_dir():
        raise BundleError(f"There is no bundle folder at {folder}.")
    if not path.is_file():
        raise BundleError(
            f"{folder} has no {MANIFEST_FILE}, so it is not a bundle. Make one with "
            "`edge-safe export SOURCE --out DIR`."
        )
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BundleError(f"Cannot read {path}: {error}.") from error
    manifest = parse_manifest(data, str(path))
    for name in [*manifest.files, *(graph.file for graph in manifest.graphs.values())]:
        confine(folder, name)
    return manifest


def parse_manifest(data: bytes, origin: str) -> Manifest:
    """Decodes a manifest; ``origin`` names the file in messages.

    Raises:
        SchemaError: See ``load_manifest``.
    """
    try:
        raw = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise SchemaError(f"{origin} is not valid JSON: {error}.") from error
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise SchemaError(f"{origin} has no usable schema_version (found {version!r}).")
    if version > SCHEMA_VERSION:
        raise SchemaError(
            f"{origin} follows schema {version}, this edge-safe reads up to {SCHEMA_VERSION}. "
            "Upgrade edge-safe, or export the bundle again with this version."
        )
    try:
        manifest = msgspec.convert(raw, Manifest)
    except msgspec.ValidationError as error:
        raise SchemaError(
            f"{origin} does not fit the bundle schema: {error}. If another version of edge-safe "
            "wrote it, export the bundle again with this one."
        ) from error
    _check(manifest, origin)
    return manifest


def _check(manifest: Manifest, origin: str) -> None:
    """Checks what the types cannot say."""
    for name, graph in manifest.graphs.items():
        if graph.file not in manifest.files:
            raise SchemaError(f"{origin}: graph '{name}' uses {graph.file}, not listed in files.")
    for name in manifest.engines:
        if name not in manifest.graphs:
            raise SchemaError(f"{origin}: an engine is planned of {name!r}, which is no graph.")
    safety = manifest.safety
    if (safety.exit_layer is None) != ("gate" not in manifest.graphs):
        raise SchemaError(f"{origin}: exit_layer is {safety.exit_layer} but the graphs disagree.")
    whole = manifest.own_columns
    if safety.early is not None and whole and f"gate{LATE}" not in manifest.graphs:
        raise SchemaError(f"{origin}: an early exit has no graph 'gate{LATE}'. Export it again.")
    if (safety.exit_layer is None) != (safety.attention is None):
        raise SchemaError(f"{origin}: a gate needs both exit_layer and attention, or neither.")
    if safety.attention is not None and safety.attention.layers[-1:] != [safety.exit_layer]:
        raise SchemaError(
            f"{origin}: the gate at layer {safety.exit_layer} keeps the states of layers "
            f"{safety.attention.layers}, of which its own one has to be the last."
        )
    if not safety.stages or ("gate" in safety.stages) > ("gate" in manifest.graphs):
        raise SchemaError(f"{origin}: no calibrated stage fits the graphs of this bundle.")
    calibrations = {f"stage '{stage}'": own for stage, own in safety.stages.items()}
    if safety.early is not None:
        calibrations["the early exit"] = safety.early.calibration
        layer = safety.early.layer
        if safety.exit_layer is None or not 0 < layer < safety.exit_layer:
            raise SchemaError(
                f"{origin}: an early exit at layer {layer} is not below the gate's layer "
                f"{safety.exit_layer}."
            )
    for name, calibration in calibrations.items():
        wrong = problem(calibration)
        if wrong is not None:
            raise SchemaError(f"{origin}: the calibration of {name} has {wrong}.")


def confine(folder: Path, name: str) -> Path:
    """Resolves a path of a bundle and proves that it stays inside.

    Args:
        folder: The bundle.
        name: Relative path with forward slashes.

    Returns:
        The path below ``folder``; the file need not exist.

    Raises:
        IntegrityError: The path is empty, absolute, has a ``..``, a backslash or a drive letter,
            or a symbolic link on its way leads out of the folder.
    """
    pure = PurePosixPath(name)
    bad = not name or pure.is_absolute() or ".." in pure.parts or "\\" in name or "\0" in name
    if bad or str(pure) != name or name == "." or ":" in pure.parts[0]:
        raise IntegrityError(
            f"The bundle names the path {name!r}, which is not a plain relative path inside it. "
            "Do not use this bundle."
        )
    root = folder.resolve()
    path = root / pure
    if not path.resolve().is_relative_to(root):
        raise IntegrityError(
            f"{name!r} leads out of the bundle through a symbolic link. Do not use this bundle."
        )
    return path
