"""`edge-safe inspect`: what is inside a bundle, in words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from edge_safe.cli import options
from edge_safe.cli.console import Terminal, number, percent

if TYPE_CHECKING:
    from edge_safe.runtime.calibration import Fitted
    from edge_safe.runtime.manifest import Manifest


def command(
    bundle: options.Bundle,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> int:
    """Show what is inside a bundle. Reads the manifest alone and checks no hash."""
    import msgspec

    from edge_safe.runtime.manifest import load_manifest

    terminal = Terminal(as_json, quiet, verbose)
    manifest = load_manifest(bundle)
    terminal.document(msgspec.to_builtins(manifest))
    for line in describe(manifest):
        terminal.say(line)
    if verbose:
        for line in _tensors(manifest):
            terminal.say(line)
    return 0


def describe(manifest: Manifest) -> Iterator[str]:
    """The lines of the description."""
    size = sum(entry.size for entry in manifest.files.values())
    model, safety, source = manifest.model, manifest.safety, manifest.provenance
    yield f"{manifest.name}: a {manifest.family} model for {manifest.target}, {manifest.precision}"
    yield f"  {len(manifest.files)} files, {size / 1e6:.1f} MB, schema {manifest.schema_version}"
    yield (
        f"  {model.layers} layers, width {model.hidden_size}, vocabulary {model.vocab_size}, "
        f"context {model.context_length} tokens"
    )
    yield "Takes"
    yield "  text"
    for name, modality in manifest.modalities.items():
        yield f"  {name}" + ("" if modality.trained else " (wired, but its projector is untrained)")
    yield "Safety"
    if safety.exit_layer is None:
        yield "  no early exit: the verdict is read at full depth (stage final)"
    else:
        yield (
            f"  the gate reads layer {safety.exit_layer} of {model.layers}; heads were trained at "
            f"{', '.join(map(str, safety.layers))}"
        )
    if safety.early is not None:
        early = safety.early.calibration
        yield f"  clear cases end at layer {safety.early.layer} already"
        for name, fit in (("text", early), *early.modalities.items()):
            ends = None if fit.asr is None else 1.0 - fit.asr
            yield (
                f"  early exit, {name}: ends {percent(ends)} of the harmful, "
                f"{percent(fit.fpr)} of the harmless requests at p_unsafe >= {fit.threshold:.3f}"
            )
    for stage, calibration in safety.stages.items():
        yield from _calibration(f"stage {stage}", calibration)
        for name, fit in calibration.modalities.items():
            yield from _calibration(f"stage {stage}, {name}", fit)
    if safety.refitted:
        yield "  thresholds were fitted on this very bundle"
    if not safety.stages:
        yield "  no stage was calibrated"
    acceptance = safety.acceptance
    if acceptance is None:
        yield "  acceptance: not tested"
    else:
        weaker = ", a weaker test than one with --acceptance" if acceptance.builtin else ""
        outcome = "passed" if acceptance.passed else f"FAILED ({acceptance.reason})"
        yield (
            f"  acceptance: {outcome} on {acceptance.data}, {acceptance.rows} rows, "
            f"ASR {percent(acceptance.asr)}, FPR {percent(acceptance.fpr)}{weaker}"
        )
    yield "Graphs"
    for name, graph in manifest.graphs.items():
        yield f"  {name}: {graph.file}, {graph.precision}"
    yield "Made"
    yield f"  {source.created} from {source.source} (sha256 {source.source_sha256[:12]}…)"
    yield f"  {source.command}"
    yield "  " + ", ".join(f"{name} {version}" for name, version in source.tool_versions.items())


def _calibration(name: str, fit: Fitted) -> Iterator[str]:
    yield (
        f"  {name}: refuses from p_unsafe {number(fit.threshold, 4)} on; {fit.method}, fitted on "
        f"{fit.fitted_on or 'nothing'} ({fit.rows} rows), there AUROC {number(fit.auroc)}, "
        f"ASR {_share(fit.asr, fit.asr_interval)}, FPR {_share(fit.fpr, fit.fpr_interval)}"
    )


def _share(value: float | None, interval: tuple[float, float] | None) -> str:
    if interval is None:
        return percent(value)
    return f"{percent(value)} ({percent(interval[0])} to {percent(interval[1])})"


def _tensors(manifest: Manifest) -> Iterator[str]:
    for name, graph in manifest.graphs.items():
        yield f"{name}"
        for arrow, tensors in (("in ", graph.inputs), ("out", graph.outputs)):
            for tensor in tensors:
                shape = ", ".join(map(str, tensor.shape))
                yield f"  {arrow} {tensor.name} {tensor.dtype} ({shape})"
