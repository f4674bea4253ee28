"""`edge-safe verify`: is this bundle whole, and did it pass its safety test?"""

from __future__ import annotations

from typing import Any

from edge_safe.cli import options
from edge_safe.cli.console import Terminal
from edge_safe.errors import BundleError

SIGNATURE_FILE = "model.sig"


def command(
    bundle: options.Bundle,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> int:
    """Check every file, the schema and the acceptance result of a bundle."""
    from edge_safe.runtime.bundle import open_bundle

    terminal = Terminal(as_json, quiet, verbose)
    opened = open_bundle(bundle, provider="cpu", accept_failed=True)
    opened.verify()
    manifest = opened.manifest
    acceptance = manifest.safety.acceptance
    size = sum(entry.size for entry in manifest.files.values())
    signature = "present, not checked" if (bundle / SIGNATURE_FILE).exists() else "none"
    result: dict[str, Any] = {
        "ok": acceptance is None or acceptance.passed,
        "schema_version": manifest.schema_version,
        "files": len(manifest.files),
        "bytes": size,
        "signature": signature,
        "acceptance": None if acceptance is None else acceptance.passed,
    }
    for name, entry in manifest.files.items():
        terminal.detail(f"  {entry.sha256}  {name}")
    if acceptance is not None and not acceptance.passed:
        raise BundleError(
            f"all {len(manifest.files)} files of {bundle} are intact, but it failed its "
            f"acceptance test on {acceptance.data}: {acceptance.reason or 'no reason given'}. "
            "Do not use it; export again with another precision"
        )
    terminal.document(result)
    terminal.say(f"{len(manifest.files)} files, {size / 1e6:.1f} MB: all as the manifest says")
    terminal.say(f"schema      {manifest.schema_version}")
    terminal.say(f"signature   {signature}")
    terminal.say(f"acceptance  {'not tested' if acceptance is None else 'passed'}")
    return 0
