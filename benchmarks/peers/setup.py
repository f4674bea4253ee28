"""Sets the peers of ``edge-safe bench --peer`` up: environments, converted models, peers.json.

    python benchmarks/peers/setup.py models/pebble
    edge-safe bench bundle --peer llama-cpp-q4_0 --peer guard-logit

    python benchmarks/peers/setup.py models/pebble --shape qwen2_5-0_5b --out shape
    edge-safe bench shape/bundle --peers-folder shape --peer llama-cpp-q4_0

All peers get the weights that the bundle is exported from, each converted by its own tools. With
--shape these are random ones, and the bundle is exported here too. What is there already is not
made again. Needs the export extra; packages come from pip's index. The last line is one JSON
object.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

logger = logging.getLogger("setup")


class Environment(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A virtual environment: what pip installs, and variables it is built with."""

    packages: list[str]
    variables: dict[str, str] = {}


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A peer: what it is, its worker, the environment that runs it, the model it is given."""

    what: str
    worker: str
    environment: str
    model: str


class Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``peers.toml``."""

    environments: dict[str, Environment]
    peers: dict[str, Entry]


def main() -> None:
    """Makes what is missing."""
    from edge_safe.evaluation.speed.peers import PEERS_FILE, Peer
    from edge_safe.models.cache import cache_folder

    text = (HERE / "peers.toml").read_text(encoding="utf-8")
    table = msgspec.convert(tomllib.loads(text), Table)
    options = _arguments(table, cache_folder())
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    chosen = {name: entry for name, entry in table.peers.items() if name in options.only}
    for name in sorted({entry.environment for entry in chosen.values()}):
        _environment(options.environments / name, table.environments[name])
    options.out.mkdir(parents=True, exist_ok=True)
    _checkpoint(options.source, options.shape, options.out)
    for model in sorted({entry.model for entry in chosen.values()}):
        _once(options.out / model, lambda path: _convert(path, options.out, options.environments))
    peers = _ours(Peer)
    for name, entry in chosen.items():
        python = options.environments / entry.environment / "bin" / "python"
        command = [str(python), str(HERE / entry.worker)]
        command += ["--model", str(options.out / entry.model), "--threads", "{threads}"]
        peers[name] = Peer(entry.what, command)
    path = options.out / PEERS_FILE
    partial = path.with_suffix(".partial")
    partial.write_bytes(msgspec.json.format(msgspec.json.encode(peers)))
    partial.replace(path)
    print(json.dumps({"peers": sorted(peers), "file": str(path)}))


def _arguments(table: Table, cache: Path) -> argparse.Namespace:
    """The command line, its paths absolute."""
    from benchmarks.peers.random_checkpoint import read_shapes

    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("source", type=Path, help="the checkpoint that the bundle is made from")
    parser.add_argument(
        "--shape", choices=sorted(read_shapes()), help="random weights; SOURCE is pebble then"
    )
    parser.add_argument("--out", type=Path, default=cache / "peers", help="where models go")
    parser.add_argument(
        "--environments", type=Path, default=cache / "environments", help="where packages go"
    )
    parser.add_argument("--only", nargs="*", choices=sorted(table.peers), default=None)
    options = parser.parse_args()
    for name in ("source", "out", "environments"):
        setattr(options, name, getattr(options, name).resolve())
    options.only = sorted(table.peers) if options.only is None else options.only
    return options


def _ours(peer: type) -> dict[str, object]:
    """The bundle itself and the guard pipelines, which run in this environment."""
    from benchmarks.peers.run_bundle import PIPELINES
    from edge_safe.evaluation.speed.peers import OURS

    words = {
        "guard-logit": "a guard of the same size, one logit read, then the model",
        "guard-generate": "a guard of the same size that writes its verdict, then the model",
        "generate-then-check": "the model, then a guard of the same size reads its answer",
    }
    peers = {}
    for pipeline in PIPELINES:
        ours = pipeline == "gate"
        command = [sys.executable, str(HERE / "run_bundle.py"), "--pipeline", pipeline]
        command += ["--bundle", "{bundle}" if ours else "{ungated}", "--threads", "{threads}"]
        name = OURS if ours else pipeline
        peers[name] = peer(words.get(pipeline, "this bundle"), command, judges=True)
    return peers


def _environment(folder: Path, environment: Environment) -> None:
    """A virtual environment with its packages; one that was only begun is begun again."""
    stamp = folder / "installed.json"
    wanted = msgspec.to_builtins(environment)
    if stamp.is_file() and json.loads(stamp.read_text(encoding="utf-8")) == wanted:
        return
    logger.info("installing %s into %s", ", ".join(environment.packages), folder)
    venv.create(folder, with_pip=True, clear=True)
    _run(
        [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", *environment.packages],
        environment.variables,
    )
    stamp.write_text(json.dumps(wanted), encoding="utf-8")


def _checkpoint(source: Path, shape: str | None, out: Path) -> None:
    """The language model as an ordinary checkpoint, and with a shape its bundle too."""
    if shape is None:
        _once(out / "checkpoint", lambda path: _language_model(source, path))
        return
    from benchmarks.peers.random_checkpoint import read_shapes, write_random
    from edge_safe.export import export_bundle

    _once(out / "checkpoint", lambda path: write_random(read_shapes()[shape], source, path))
    _once(out / "bundle", lambda path: export_bundle(out / "checkpoint", path, precision="int4"))


def _language_model(source: Path, folder: Path) -> None:
    """Saves the language model of a checkpoint, as the export sees it."""
    from edge_safe.export.families.base import find_family

    _, open_checkpoint = find_family(source)
    opened = open_checkpoint(source)
    opened.language.save_pretrained(folder)
    opened.tokenizer.save_pretrained(folder)


def _convert(path: Path, out: Path, environments: Path) -> None:
    """One peer's form of the checkpoint; ``path`` is where, its name says which."""
    checkpoint = out / "checkpoint"
    kind = path.name
    if kind.endswith(".gguf"):
        plain = out / "f32.gguf"
        _once(plain, lambda target: _gguf(checkpoint, target))
        python = environments / "llama-cpp" / "bin" / "python"
        script = str(HERE / "quantize_gguf.py")
        _run([str(python), script, str(plain), str(path), kind.removesuffix(".gguf")])
    elif kind == "genai-int4":
        python = environments / "torch" / "bin" / "python"
        builder = [str(python), "-m", "onnxruntime_genai.models.builder", "-i", str(checkpoint)]
        builder += ["-o", str(path), "-p", "int4", "-e", "cpu", "-c", str(out / "builder-cache")]
        extra = ["int4_accuracy_level=4", "int4_block_size=32", "prune_lm_head=true"]
        _run([*builder, "--extra_options", *extra], {"HF_HUB_OFFLINE": "1"})


def _gguf(checkpoint: Path, path: Path) -> None:
    """The checkpoint in float32 as one file."""
    import torch
    from transformers import AutoModelForCausalLM

    from benchmarks.peers.write_gguf import write_gguf

    write_gguf(AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32), path)


def _once(path: Path, make: Callable[[Path], object]) -> None:
    """Makes a file or folder that is not there; it appears whole or not at all."""
    if path.exists():
        return
    logger.info("making %s", path)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".partial-") as name:
        partial = Path(name) / path.name
        make(partial)
        shutil.move(partial, path)


def _run(command: list[str], variables: Mapping[str, str] | None = None) -> None:
    """Runs a program; what it prints goes to stderr."""
    environment = {**os.environ, "ORT_DISABLE_TELEMETRY": "1", **(variables or {})}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(command, env=environment, stdout=sys.stderr, check=False)
    if done.returncode:
        sys.exit(f"{command[0]} ended with exit code {done.returncode}: {' '.join(command)}")


if __name__ == "__main__":
    main()
