"""Evaluate a checkpoint: a table of the intersection over union of every class.

python -m examples.segmentation.evaluate runs/segmentation/checkpoint.pt
torchrun --nproc-per-node 8 -m examples.segmentation.evaluate runs/city/checkpoint.pt --root /data/city --flip
python -m examples.segmentation.evaluate runs/city/checkpoint.pt --root /data/city --window 769 769 --stride 513 513
"""

import argparse
import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F
from torchmetrics.classification import MulticlassConfusionMatrix
from tqdm import tqdm

from ..pictures import PictureError
from . import data
from .checkpoint import Checkpoint
from .cli import main_of, tell
from .config import Config
from .pipeline import normalise, scaled
from .sample import IGNORE, DataError, Samples


@torch.no_grad()
def probabilities(
    model: nn.Module, image: np.ndarray, config: Config, scales: Sequence[float] = (1.0,), flip: bool = False
) -> Tensor:
    """Return the class probabilities [classes, H, W] of a picture uint8 [H, W, 3].

    The mean over ``scales``, times the size that ``config.resize`` gives, and with ``flip`` over mirrored pictures.
    Slides ``config.window`` if there is one. ``model`` is in evaluation mode.
    """
    device = next(model.parameters()).device
    total = 0
    for scale in scales:
        x = normalise(scaled(image, config, scale))[None].to(device)
        for mirrored in (False, True) if flip else (False,):
            scores = scores_of(model, x.flip(-1) if mirrored else x, config)
            scores = upsample(scores.flip(-1) if mirrored else scores, image.shape[:2])
            total = total + scores.float().softmax(1)[0]
    return total / (len(scales) * (2 if flip else 1))


def scores_of(model: nn.Module, x: Tensor, config: Config) -> Tensor:
    """Return the scores [1, classes, H, W] of a picture [1, 3, H, W], as a whole or the mean over sliding windows."""
    size = x.shape[-2:]
    if config.window is None:
        return upsample(model(x), size)
    total, count = 0, x.new_zeros(1, 1, *size)
    for window in windows(size, config.window, config.stride):
        part = x[..., window[0], window[1]]
        scores = upsample(model(part), part.shape[-2:])
        if isinstance(total, int):
            total = scores.new_zeros(1, scores.shape[1], *size)
        total[..., window[0], window[1]] += scores
        count[..., window[0], window[1]] += 1
    return total / count


def windows(size: Sequence[int], window: Sequence[int], stride: Sequence[int]) -> Iterator[tuple[slice, slice]]:
    """Yield the slices of windows that cover [H, W]; the last ones are moved inwards, one too large is cut."""
    starts = []
    for length, width, step in zip(size, window, stride, strict=True):
        last = max(length - width, 0)
        starts.append([*range(0, last, step), last])
    for top in starts[0]:
        for left in starts[1]:
            yield slice(top, top + window[0]), slice(left, left + window[1])


def upsample(scores: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(scores, size=tuple(size), mode="bilinear", align_corners=False)


@dataclass(frozen=True)
class Report:
    """``iou`` float64 [classes], NaN for a class that occurs neither in the labels nor in the predictions.

    ``broken`` says of each picture that is left out why.
    """

    classes: tuple[str, ...]
    iou: np.ndarray
    accuracy: float
    broken: tuple[str, ...] = ()

    @property
    def miou(self) -> float:
        return float(np.nanmean(self.iou)) if np.isfinite(self.iou).any() else math.nan  # of no picture at all

    @classmethod
    def of(cls, classes: Sequence[str], confusion: Tensor, broken: Sequence[str]) -> "Report":
        """Return the figures of a confusion matrix [label, prediction]."""
        confusion = confusion.double().cpu().numpy()
        both = confusion.diagonal()
        either = confusion.sum(0) + confusion.sum(1) - both
        iou = np.divide(both, either, out=np.full(len(both), np.nan), where=either > 0)
        return cls(tuple(classes), iou, both.sum() / max(confusion.sum(), 1), tuple(broken))

    def __str__(self) -> str:
        width = max(map(len, (*self.classes, "pixel accuracy")))
        rows = zip((*self.classes, "mean", "pixel accuracy"), (*self.iou, self.miou, self.accuracy), strict=True)
        lines = (f"{name:<{width}} {'-' if np.isnan(part) else f'{100 * part:.2f}':>7}" for name, part in rows)
        return "\n".join((f"{'class':<{width}} {'IoU %':>7}", *lines))


@contextlib.contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Keep the weights of a sharded network whole in every process.

    Otherwise each forward pass gathers them, in which all processes must take part; and they make different numbers of
    passes, as a large picture has more windows than a small one.
    """
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in sharded:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.reshard()
            module.set_reshard_after_forward(module is not model, recurse=False)  # as fully_shard does


def evaluate(
    model: nn.Module, samples: Samples, config: Config, scales: Sequence[float] = (1.0,), flip: bool = False
) -> Report:
    """Return the figures of ``model`` on ``samples``, which the processes share, but for those that are broken."""
    state, was_training = PartialState(), model.training
    model.eval()
    device = next(model.parameters()).device
    metric = MulticlassConfusionMatrix(len(samples.classes), ignore_index=IGNORE).to(device)
    broken = []
    share = range(state.process_index, len(samples), state.num_processes)
    with gathered(model):
        for index in tqdm(share, desc="evaluating", unit="picture", leave=False, disable=not state.is_main_process):
            try:
                sample = samples[index]
            except (DataError, PictureError) as error:
                broken.append(str(error))
                continue
            prediction = probabilities(model, sample.image, config, scales, flip).argmax(0)
            metric.update(prediction, torch.from_numpy(sample.label).to(device).long())
    model.train(was_training)
    return Report.of(samples.classes, metric.compute(), gather_object(broken))


def main(arguments: list[str] | None = None) -> Report:
    parser = argparse.ArgumentParser(
        prog="evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--root", type=Path, help="the folder that holds the data set; none for shapes")
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0], help="mean over these sizes (1)")
    parser.add_argument("--flip", action="store_true", help="and over mirrored pictures")
    size = {"type": int, "nargs": 2, "metavar": ("HEIGHT", "WIDTH")}
    parser.add_argument("--window", **size, help="slide a window of this size (as in the checkpoint's config)")
    parser.add_argument("--stride", **size, help="by this much")
    options = parser.parse_args(arguments)
    for scale in options.scales:
        if not 0 < scale < math.inf:
            parser.error(f"--scales must be > 0 and finite, got {scale}")
    checkpoint = Checkpoint.load(options.checkpoint)
    config = checkpoint.settings()
    if options.window or options.stride:
        config = config.replace(window=options.window, stride=options.stride)
    samples = data.build(config, options.root, training=False)
    checkpoint.check_classes(samples)
    state = PartialState(cpu=not torch.cuda.is_available())
    report = evaluate(checkpoint.segmenter().to(state.device), samples, config, options.scales, options.flip)
    if state.is_main_process:
        count = f"{len(samples) - len(report.broken)} of {len(samples)}" if report.broken else len(samples)
        print(f"{options.checkpoint}: block {config.block}, {checkpoint.step} steps, {count} pictures\n\n{report}")
        tell(report.broken)
    return report


if __name__ == "__main__":
    main_of(main)
