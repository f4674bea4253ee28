"""The training loop: one for one process or several, that goes on after a kill where it stopped.

What is trained is a Task; the loop knows its trainable parameters, batches and losses, and nothing
else. The order of batches and the learning rate are functions of seed and step, so a resumed run
repeats what an uninterrupted one would have done. Processes are started with ``accelerate launch``
or ``torchrun``; each takes its rows of the same global batch, and gradients are averaged.

Checkpoints hold the trainable tensors alone, which are small; models split over devices (FSDP,
DeepSpeed) are not supported.
"""

from __future__ import annotations

import json
import math
import random
import shutil
import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from edge_safe.errors import RecipeError
from edge_safe.models.progress import Progress
from edge_safe.models.recipe import OptimizerSection

# Examples of about the same length share a batch: sorted within this many batches.
_SORTED_TOGETHER = 20
_FIELDS = ("exp_avg", "exp_avg_sq", "step")


class Task(Protocol):
    """What a run trains.

    Attributes:
        name: For logs and progress.
        module: Called with a batch, gives {"loss": scalar, ...}; its trainable parameters train.
        lengths: Tokens of each training example.
    """

    name: str
    module: nn.Module
    lengths: list[int]

    def batch(self, indices: Sequence[int], seed: int) -> Any:
        """The examples of these indices, on the module's device.

        What is random in an example depends on its index and the seed of the step alone, so that
        it does not matter which process it falls to.
        """

    def learning_rate(self, parameter: str) -> float:
        """Peak learning rate of a parameter, by its name in the module."""

    def evaluate(self) -> dict[str, float]:
        """Figures on the validation split, logged after each epoch; may be empty."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long and in what steps a task is trained; ``batch`` counts all processes' rows."""

    epochs: int
    batch: int
    seed: int
    optimizer: OptimizerSection
    micro_batch: int | None = None
    checkpoint_every: int = 100


def make_accelerator() -> Accelerator:
    """The process group this process was started in, or itself alone."""
    return Accelerator(
        cpu=not torch.accelerator.is_available(),
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )


def epoch_batches(lengths: Sequence[int], batch: int, seed: int, epoch: int) -> list[list[int]]:
    """Global batches of an epoch: shuffled, examples of similar length together.

    The last rows that fill no batch are left out; they are others in each epoch.
    """
    chance = random.Random(f"{seed}:{epoch}")
    order = list(range(len(lengths)))
    chance.shuffle(order)
    window = batch * _SORTED_TOGETHER
    batches = []
    for start in range(0, len(order), window):
        part = sorted(order[start : start + window], key=lambda i: lengths[i])
        # Only the last window has a remainder; where it is cut off differs by epoch, or the longest
        # examples would always be the ones left out.
        offset = chance.randrange(len(part) % batch + 1)
        batches += [part[i : i + batch] for i in range(offset, len(part) - batch + 1, batch)]
    chance.shuffle(batches)
    return batches


def rate_at(step: int, total: int, warmup: float) -> float:
    """Factor on the learning rate: linear warm-up, then a cosine from 1 to 0.1."""
    rise = max(1, round(total * warmup))
    if step < rise:
        return (step + 1) / rise
    along = (step - rise) / max(1, total - rise)
    return 0.55 + 0.45 * math.cos(math.pi * along)


def train(
    task: Task,
    schedule: Schedule,
    work: Path,
    accelerator: Accelerator,
    progress: Progress,
) -> int:
    """Trains a task to its end, from its newest checkpoint if there is one.

    Args:
        task: What is trained; its module is changed in place.
        schedule: How.
        work: Folder of checkpoints and log, of this task on this data alone.
        accelerator: The processes.
        progress: Told of every step.

    Returns:
        The number of steps of the whole run.

    Raises:
        RecipeError: The batch is larger than the data or cannot be shared by the processes.
    """
    rows, processes = len(task.lengths), accelerator.num_processes
    if schedule.batch > rows or schedule.batch % processes:
        raise RecipeError(
            f"{task.name}: a batch of {schedule.batch} rows does not fit {rows} examples and "
            f"{processes} processes. Choose a multiple of {processes} that is at most {rows}."
        )
    plan = [
        batch
        for epoch in range(schedule.epochs)
        for batch in epoch_batches(task.lengths, schedule.batch, schedule.seed, epoch)
    ]
    per_epoch = len(plan) // schedule.epochs
    module = task.module.to(accelerator.device)
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        [
            {
                "params": [p],
                "lr": task.learning_rate(name),
                "peak": task.learning_rate(name),
                # Norm weights, biases and slopes have nothing to decay towards.
                "weight_decay": schedule.optimizer.weight_decay if p.ndim > 1 else 0.0,
            }
            for name, p in named.items()
        ]
    )
    run = _Run(work, named, optimizer, accelerator)
    first = run.resume()
    prepared = accelerator.prepare(module)
    started = time.monotonic()
    for step in range(first, len(plan)):
        seed = hash((schedule.seed, step)) % 2**31
        torch.manual_seed(seed)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate_at(step, len(plan), schedule.optimizer.warmup)
        mine = plan[step][accelerator.process_index :: processes]
        losses = _gradients(task, prepared, mine, seed, schedule.micro_batch, accelerator)
        accelerator.clip_grad_norm_(list(named.values()), schedule.optimizer.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        means = accelerator.reduce(losses, reduction="mean")
        run.log(step + 1, step / per_epoch, {name: float(x) for name, x in means.items()}, started)
        progress(task.name, step + 1, len(plan))
        if (step + 1) % per_epoch == 0:
            figures = task.evaluate()
            if figures:
                run.log(step + 1, (step + 1) / per_epoch, figures, started)
        if (step + 1) % schedule.checkpoint_every == 0 or step + 1 == len(plan):
            run.save(step + 1)
    module.zero_grad(set_to_none=True)
    accelerator.wait_for_everyone()
    return len(plan)


def _gradients(
    task: Task,
    module: nn.Module,
    rows: Sequence[int],
    seed: int,
    micro: int | None,
    accelerator: Accelerator,
) -> dict[str, Tensor]:
    """Backward passes over this process's rows; returns the mean losses."""
    size = micro or len(rows)
    parts = [rows[i : i + size] for i in range(0, len(rows), size)]
    total: dict[str, Tensor] = {}
    for number, part in enumerate(parts, 1):
        # Gradients are exchanged once a step, after the last part.
        quiet = accelerator.no_sync(module) if number < len(parts) else nullcontext()
        with quiet:
            losses: dict[str, Tensor] = module(task.batch(part, seed))
            share = len(part) / len(rows)
            accelerator.backward(losses["loss"] * share)
        for name, value in losses.items():
            total[name] = total.get(name, value.new_zeros(())) + value.detach() * share
    return total


class _Run:
    """Checkpoints and log of one run, written by its first process alone."""

    def __init__(
        self,
        work: Path,
        named: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        accelerator: Accelerator,
    ) -> None:
        self.work = work
        self.named = named
        self.optimizer = optimizer
        self.accelerator = accelerator
        self.log_file = work / "log.jsonl"

    def resume(self) -> int:
        """Loads the newest checkpoint; returns its step, 0 without one."""
        step = 0
        newest = max(self.work.glob("step-*"), default=None)
        if newest is not None:
            state = json.loads((newest / "state.json").read_text())
            step = int(state["step"])
            self._load(load_file(newest / "tensors.safetensors"))
        if self.accelerator.is_main_process:
            self.work.mkdir(parents=True, exist_ok=True)
            kept = [line for line in read_log(self.log_file) if line["step"] <= step]
            text = "".join(json.dumps(line) + "\n" for line in kept)
            self.log_file.write_text(text, encoding="utf-8")
        self.accelerator.wait_for_everyone()
        return step

    def _load(self, tensors: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.named.items():
                parameter.copy_(tensors[f"weight/{name}"])
                self.optimizer.state[parameter] = {
                    # AdamW keeps its step counter on the CPU.
                    field: value if field == "step" else value.to(parameter.device)
                    for field in _FIELDS
                    if (value := tensors.get(f"{field}/{name}")) is not None
                }

    def save(self, step: int) -> None:
        """Writes a checkpoint beside the last, then removes the last."""
        if not self.accelerator.is_main_process:
            return
        tensors = {}
        for name, parameter in self.named.items():
            tensors[f"weight/{name}"] = parameter.detach().cpu().contiguous()
            for field, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{field}/{name}"] = value.detach().cpu().contiguous()
        temporary = self.work / "writing"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_file(tensors, temporary / "tensors.safetensors")
        (temporary / "state.json").write_text(json.dumps({"step": step}))
        target = self.work / f"step-{step:08d}"
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
        for old in sorted(self.work.glob("step-*"))[:-1]:
            shutil.rmtree(old)

    def log(self, step: int, epoch: float, figures: dict[str, float], started: float) -> None:
        """Adds a line to the log."""
        if not self.accelerator.is_main_process:
            return
        line: dict[str, float] = {"step": step, "epoch": round(epoch, 4)}
        line |= figures
        line["seconds"] = round(time.monotonic() - started, 3)
        with self.log_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def read_log(path: Path) -> list[dict[str, float]]:
    """The lines of a log; a half-written last one is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def plot_losses(lines: Iterable[dict[str, float]], path: Path) -> None:
    """Draws every figure of a log over its steps, as a PNG."""
    # Imported here: only a finished run draws, and the library takes a second to load.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns: dict[str, list[tuple[float, float]]] = {}
    for line in lines:
        for name, value in line.items():
            if name not in ("step", "epoch", "seconds"):
                columns.setdefault(name, []).append((line["step"], value))
    figure = Figure(figsize=(10, 6), layout="constrained")
    FigureCanvasAgg(figure)
    losses, measures = figure.subplots(2, 1, sharex=True)
    for name, points in sorted(columns.items()):
        axis = measures if name.startswith("validation") else losses
        axis.plot(*zip(*points, strict=True), label=name, linewidth=1)
    for axis, label in ((losses, "loss"), (measures, "validation")):
        axis.set_ylabel(label)
        if axis.lines:
            axis.legend(fontsize="small", ncols=3)
    measures.set_xlabel("step")
    figure.savefig(path, dpi=110)
