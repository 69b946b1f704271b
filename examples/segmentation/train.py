"""Train a network with any of the attention blocks.

    python -m examples.segmentation.train --block asa --data shapes
    torchrun --nproc-per-node 8 -m examples.segmentation.train --data cityscapes --root /data/cityscapes --out runs/city
    torchrun --nproc-per-node 8 -m examples.segmentation.train --root /data/cityscapes --out runs/city --resume

Writes `checkpoint.pt` and `log.jsonl`, the loss of every step, to --out. The same command with --resume goes on after
an interruption, to the same losses: what is random in a step is a function of the seed and the step. The checkpoint has
the settings and the precision; without --resume it is replaced only with --overwrite.
"""

import argparse
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from tqdm import tqdm

from asa_ops.nn import parameter_groups

from .. import files
from . import data
from .checkpoint import Checkpoint, CheckpointError
from .cli import main_of, tell
from .config import NAMES, Config, ConfigError
from .evaluate import Report, evaluate
from .model import Segmenter, loss_of
from .pipeline import Parts, loader
from .sample import Samples

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)  # on disk nothing is sharded
PARTS = "processes * accumulate"


@dataclass(frozen=True)
class Result:
    """The mean loss of every step since the start of training, and the figures on the validation set."""

    losses: list[float]
    report: Report


def train(
    config: Config,
    out: Path,
    root: Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    precision: str | None = None,
    shard: bool = False,
    accumulate: int | None = None,
    workers: int = 0,
    checkpoint_every: int = 1000,
    after_step: Callable[[int, nn.Module], None] = lambda step, model: None,
) -> Result:
    """Train, evaluate, and leave a checkpoint and a log in ``out``.

    Args:
        config: the run.
        out: folder, made if it is not there.
        root: folder of a real data set.
        resume: go on from the checkpoint in ``out``.
        overwrite: replace it, where ``resume`` is not given.
        precision: "no" or "bf16", mixed precision; None: the checkpoint's, without one "no".
        shard: FSDP2 instead of DDP among processes.
        accumulate: forward and backward passes per step and process; None: as many as the checkpoint needs, without
            one 1.
        workers: processes that load data.
        checkpoint_every: steps between checkpoints; there is one at the end too.
        after_step: called with the number of steps done and the network.

    Raises:
        CheckpointError, ConfigError, DataError, FileError, PictureError: something that the user can put right.
    """
    checkpoint_path, log_path = outputs = paths_in(out)
    checkpoint = Checkpoint.load(checkpoint_path) if resume else None
    if checkpoint is None and checkpoint_path.exists() and not overwrite:
        raise CheckpointError(f"{str(out)!r} holds a checkpoint: expected --resume, --overwrite or another --out")
    if precision is None:
        precision = checkpoint.arithmetic["precision"] if checkpoint else "no"
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=precision)
    if accumulate is None:
        accumulate = max(checkpoint.arithmetic[PARTS] // accelerator.num_processes, 1) if checkpoint else 1
    training, validation = (data.build(config, root, training) for training in (True, False))
    weights = Path(config.pretrained).glob("*") if config.pretrained else ()
    files.check(outputs, itertools.chain(data.inputs(training), data.inputs(validation), weights))
    run = Run.start(config, accelerator, accumulate, training, shard)
    losses = []
    if checkpoint:
        run.load(checkpoint)
        losses = read_log(log_path, checkpoint.step)
    first = len(losses)
    parts = Parts(config, first, accelerator.process_index, accelerator.num_processes, accumulate)
    accelerator.wait_for_everyone()  # every process has read what is replaced now
    if accelerator.is_main_process:
        out.mkdir(parents=True, exist_ok=True)
        files.write(log_path, "".join(log_line(config, step, loss) for step, loss in enumerate(losses)))
        if not checkpoint:
            checkpoint_path.unlink(missing_ok=True)  # its log is gone
    batches = iter(loader(training, config, parts, workers, accelerator.device.type == "cuda"))
    run.model.train()
    bar = tqdm(
        range(first, config.steps), f"training {config.block}", config.steps, initial=first, unit="step",
        disable=not accelerator.is_main_process,
    )  # fmt: skip
    for step in bar:
        loss = run.step(step, batches, parts.parts)
        losses.append(loss)
        if accelerator.is_main_process:
            files.append(log_path, log_line(config, step, loss))
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        after_step(step + 1, run.model)
        if (step + 1) % checkpoint_every == 0 or step + 1 == config.steps:
            run.save(step + 1, checkpoint_path)
    report = evaluate(accelerator.unwrap_model(run.model), validation, config)
    return Result(losses, report)


@dataclass(frozen=True)
class Run:
    """A network in training, as one of the processes holds it."""

    config: Config
    accelerator: Accelerator
    accumulate: int  # passes a step and process
    training: Samples
    model: nn.Module
    optimizer: torch.optim.Optimizer

    @classmethod
    def start(cls, config: Config, accelerator: Accelerator, accumulate: int, training: Samples, shard: bool) -> "Run":
        """Return a run at its first step."""
        torch.manual_seed(config.seed)
        model = distribute(Segmenter(config, len(training.classes)), accelerator, shard)
        return cls(config, accelerator, accumulate, training, model, optimizer_of(config, model))

    @property
    def arithmetic(self) -> dict:
        """What the losses of a run depend on beside its configuration."""
        return arithmetic_of(self.config, self.accelerator, self.accumulate)

    def load(self, checkpoint: Checkpoint) -> None:
        """Take over a checkpoint of the same run."""
        check_same(self.config.to_dict(), checkpoint.config)
        check_same(self.arithmetic, checkpoint.arithmetic)
        checkpoint.check_classes(self.training)
        set_model_state_dict(self.model, checkpoint.model, options=WHOLE)
        set_optimizer_state_dict(self.model, self.optimizer, checkpoint.optimizer, options=WHOLE)

    def save(self, step: int, path: Path) -> None:
        """Write a checkpoint after ``step`` steps."""
        share_buffers(self.model)
        weights = get_model_state_dict(self.model, options=WHOLE)
        state = get_optimizer_state_dict(self.model, self.optimizer, options=WHOLE)
        if self.accelerator.is_main_process:
            classes, palette = list(self.training.classes), self.training.palette.tolist()
            Checkpoint(self.config.to_dict(), self.arithmetic, classes, palette, step, weights, state).save(path)
        self.accelerator.wait_for_everyone()

    def step(self, step: int, batches: Iterator, parts: Iterable[int]) -> float:
        """Take one step on the next batches, one for each of ``parts``; return the mean loss over all processes."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, step) * group["rate"]
        self.optimizer.zero_grad()
        total = torch.zeros((), device=self.accelerator.device)
        for part in parts:
            image, label = (x.to(self.accelerator.device, non_blocking=True) for x in next(batches))
            seed_step(self.config.seed, step, part)
            with self.accelerator.autocast():
                outputs = self.model(image)
            loss = loss_of(outputs, label, self.config.auxiliary_weight) / self.accumulate
            loss.backward()
            total += loss.detach()
        mean = self.accelerator.reduce(total, "mean").item()
        if not math.isfinite(mean):
            raise ConfigError(f"the loss of step {step} is {mean}: lower learning_rate = {self.config.learning_rate}")
        self.optimizer.step()
        return mean


def paths_in(out: Path) -> tuple[Path, Path]:
    """Return what a run writes: the checkpoint and the log."""
    return out / "checkpoint.pt", out / "log.jsonl"


def distribute(model: Segmenter, accelerator: Accelerator, shard: bool) -> nn.Module:
    """Return ``model`` on its device, and where there are several processes replicated by DDP or sharded by FSDP2.

    accelerate shards on accelerators only, so ``fully_shard`` is called here: the backbone's stages and the whole.
    Batch norm is synchronised on GPUs; on CPUs torch cannot, there every process normalises its own part.
    """
    if accelerator.num_processes == 1:
        if shard:
            raise ConfigError("--shard needs several processes: start them with torchrun")
        return model.to(accelerator.device)
    if accelerator.device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if not shard:
        return accelerator.prepare_model(model)
    model.to(accelerator.device)
    mesh = dist.device_mesh.init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for stage in model.backbone.encoder.stages:
        fully_shard(stage, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def share_buffers(model: nn.Module) -> None:
    """Give all processes the first one's running statistics, where batch norm is not synchronised."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def optimizer_of(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer; a group's learning rate is its ``rate`` times that of the step."""
    groups = [group | {"rate": group["lr"]} for group in parameter_groups(model, 1.0, config.threshold_rate)]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, config.learning_rate, momentum=0.9, weight_decay=config.weight_decay)
    return torch.optim.AdamW(groups, config.learning_rate, weight_decay=config.weight_decay)


def learning_rate(config: Config, step: int) -> float:
    """Return the polynomially decaying learning rate of a step; that of torch's PolynomialLR ends at 0."""
    span = config.learning_rate - config.min_learning_rate
    return span * (1 - step / config.steps) ** 0.9 + config.min_learning_rate


def seed_step(*numbers: int) -> None:
    """Seed torch, whose dropout is all that is random in a step, by seed, step and part of the batch."""
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))


def log_line(config: Config, step: int, loss: float) -> str:
    return json.dumps({"step": step, "loss": loss, "learning_rate": learning_rate(config, step)}) + "\n"


def read_log(path: Path, steps: int) -> list[float]:
    """Return the losses of the first ``steps`` steps."""
    try:
        losses = [json.loads(line)["loss"] for line in files.read(path).splitlines()[:steps]]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is broken: {error}") from error
    if len(losses) < steps:
        raise CheckpointError(f"{path} has {len(losses)} steps, its checkpoint {steps}")
    return losses


def arithmetic_of(config: Config, accelerator: Accelerator, accumulate: int) -> dict:
    """Return what losses depend on besides the config.

    Dropout is seeded by part of the batch; batch norm sees a part of it, on GPUs the same one of all processes.
    """
    parts = accelerator.num_processes * accumulate
    passes = accumulate if accelerator.device.type == "cuda" else parts
    together = config.batch_size // passes
    return {"precision": accelerator.mixed_precision, PARTS: parts, "pictures per batch norm": together}


def check_same(now: dict, before: dict) -> None:
    """Raise CheckpointError where a resumed run would differ from the one interrupted."""
    for name in now:
        if now[name] != before.get(name):
            raise CheckpointError(f"the checkpoint has {name}={before.get(name)!r}, this run {now[name]!r}")


def settings_of(options: argparse.Namespace) -> Config:
    """Return the config that the command line asks for: a file's, or with --resume the checkpoint's, and changes."""
    if options.resume:
        config = Config.of(Checkpoint.load(options.out / "checkpoint.pt").config)
    else:
        config = Config.load(options.config or options.data or "shapes")
    changes = {name: getattr(options, name) for name in ("data", "block", "steps", "seed")}
    changes = {name: value for name, value in changes.items() if value is not None}
    for setting in options.set:
        name, equals, value = setting.partition("=")
        if not equals:
            raise ConfigError(f"--set takes NAME=VALUE, got {setting!r}")
        try:
            changes[name] = json.loads(value)
        except ValueError:
            changes[name] = value  # a bare word
    if changes.get("block", config.block) != config.block:
        changes.setdefault("block_options", {})  # the file's are for its own block
    elif isinstance(changes.get("block_options"), dict):
        changes["block_options"] = config.block_options | changes["block_options"]
    return config.replace(**changes)


def main(arguments: list[str] | None = None) -> Result:
    parser = argparse.ArgumentParser(
        prog="train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", choices=NAMES, help="the data set, with its file in configs (shapes)")
    parser.add_argument("--root", type=Path, help="the folder that holds it; none for shapes")
    parser.add_argument("--config", type=Path, help="another file of settings")
    parser.add_argument("--block", help='one of asa_ops.nn.available(), or "none" (asa)')
    parser.add_argument("--steps", type=int, help="optimizer steps (as in the file)")
    parser.add_argument("--seed", type=int, help="of everything random (0)")
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=VALUE",
        help='other settings: block_options={"topk":9}, besides those that the file has for this block, crop=[64,64]',
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/segmentation"), help="folder to write (runs/segmentation)"
    )
    parser.add_argument("--resume", action="store_true", help="go on from --out's checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="without --resume: replace --out's checkpoint")
    parser.add_argument("--precision", choices=("no", "bf16"), help="mixed precision (no, or the checkpoint's)")
    parser.add_argument("--shard", action="store_true", help="FSDP2 instead of DDP, under torchrun")
    parser.add_argument("--accumulate", type=int, help="passes per step and process (1, or what the checkpoint needs)")
    parser.add_argument("--workers", type=int, default=0, help="processes that load data, per process (0)")
    parser.add_argument("--checkpoint-every", type=int, default=1000, help="steps (1000)")
    options = parser.parse_args(arguments)
    for name, least in (("accumulate", 1), ("workers", 0), ("checkpoint_every", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    config = settings_of(options)
    if options.config:
        files.check(paths_in(options.out), [options.config])
    names = ("out", "root", "resume", "overwrite", "precision", "shard", "accumulate", "workers", "checkpoint_every")
    result = train(config, **{name: getattr(options, name) for name in names})
    if Accelerator().is_main_process:
        print(
            f"block {config.block}, {config.steps} steps, checkpoint {options.out / 'checkpoint.pt'}\n\n{result.report}"
        )
        tell(result.report.broken)
    return result


if __name__ == "__main__":
    main_of(main)
