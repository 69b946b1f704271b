"""One run: a small network with a block in its middle learns the pictures, and is tested.

The network is a patch embedding, a residual layer that sees one tile, the block, and a linear classifier: nothing but
the block carries anything from tile to tile. All blocks but the variants of `asa` are as published, with as many
channels of queries and keys each, and with batch norm at their end where they may have it, as the authors' code of
adaptive sparse attention does.

Every picture of training is new. They begin with few distractors, and the most that one has grows with the steps, since
no block finds out what to look for among many.
"""

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from asa_ops import asa_attention
from asa_ops import nn as blocks

from . import pictures

CHANNELS = 32
KEYS = CHANNELS // 2  # channels of queries and keys, of every block that has them
BATCH = 8
GROWING = 0.8  # of the steps: from then on pictures have up to MOST distractors
WEIGHT_DECAY = 1e-4
MOMENTUM = 0.9
LARGEST = 1.0  # norm of a gradient under SGD
TRAINING, VALIDATION, TEST = range(3)  # seeds of pictures
AT_ONCE = 25  # pictures to test


def _asa(rate: float = 0.1, start: float | None = None, **options) -> dict:
    """Return a variant whose thresholds learn at ``rate`` times the rate of the rest, alpha from about ``start`` on."""
    return {"block": "asa", "options": {"norm": "batch"} | options, "threshold_rate": rate, "start": start}


VARIANTS: dict[str, dict] = {
    "none": {"block": None},
    "non_local": {"block": "non_local", "options": {"norm": "batch"}},
    "asa, published": _asa(published=True),
    "asa": _asa(),
    "criss_cross": {"block": "criss_cross", "options": {"reduction": CHANNELS // KEYS}},
    "interlaced_sparse": {"block": "interlaced_sparse", "options": {"factors": (4, 4)}},
    "channelized_axial": {"block": "channelized_axial", "options": {"key_channels": KEYS}},
    "salient_positions": {"block": "salient_positions"},
    "efficient_attention": {"block": "efficient_attention", "options": {"key_channels": KEYS}},
    "linear_attention": {"block": "linear_attention", "options": {"reduction": CHANNELS // KEYS}},
    "squeeze_and_attention": {"block": "squeeze_and_attention"},
    # The rest are ablations.
    "asa, no gradient": _asa(threshold_grad=None),
    "asa, NLSCB alone": _asa(local=False),
    "asa, band 0.5": _asa(threshold_band=0.5),
    "asa, rate 1": _asa(1.0),
    "asa, alpha 1 at first": _asa(start=1.0),
    "asa, alpha 1 at first, no gradient": _asa(start=1.0, threshold_grad=None),
    "asa, softplus": _asa(threshold_activation="softplus"),
}
LEARNED = "asa"  # what gains are told of, and whose learning rate ablations have
ABLATIONS = list(VARIANTS)[list(VARIANTS).index("asa, no gradient") :]
# Learning rates, of which the best is taken; while that is the least or the largest, also the next below or above.
RATES = {"adamw": (0.003, 0.01, 0.03), "sgd": (0.1, 0.2, 0.4)}
FURTHER = {"adamw": ((0.001, 0.0003), (0.1, 0.3)), "sgd": ((0.05, 0.025), (0.8, 1.6))}
# What a trained network is tested without, as well.
WITHOUT = {"reciprocity": {"reciprocal": False}, "thresholds": {"alpha": None, "beta": None}}


@dataclass(frozen=True)
class Run:
    """What a run is told; the same run gives the same figures, bit for bit, on the same machine."""

    variant: str
    optimizer: str
    rate: float
    seed: int
    steps: int


class Residual(nn.Module):
    """What a tile can know of itself: among else how strong its code is, which a product of two does not tell."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(CHANNELS, 2 * CHANNELS, 1), nn.ReLU(), nn.Conv2d(2 * CHANNELS, CHANNELS, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class Network(nn.Module):
    """Maps pictures [B, 3, H, W] to logits of their tiles [B, CLASSES, H / TILE, W / TILE]."""

    def __init__(self, block: str | None, options: dict | None = None, start: float | None = None):
        super().__init__()
        self.embed = nn.Conv2d(3, CHANNELS, pictures.TILE, pictures.TILE)
        self.tile = Residual()
        self.block = nn.Identity() if block is None else blocks.build(block, CHANNELS, **(options or {}))
        if start is not None:
            nn.init.constant_(self.block.alpha.bias, start)
        self.head = nn.Conv2d(CHANNELS, pictures.CLASSES, 1)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.block(self.tile(self.embed((image - 0.5) / pictures.CODE))))


class Changed(nn.Module):
    """A trained adaptive sparse attention block whose attention is given other arguments."""

    def __init__(self, block: blocks.AdaptiveSparseAttention, arguments: dict):
        super().__init__()
        self.block, self.arguments = block, arguments

    def forward(self, x: Tensor) -> Tensor:
        out = asa_attention(**(self.block.tokens(x) | self.arguments))
        return x + self.block.norm(self.block.proj(out[:, 0].mT.unflatten(2, x.shape[2:])))


def run(told: Run, distractors: Sequence[int], validation: int, test: int) -> dict:
    """Train and test; return figures for each number of distractors, of so many pictures."""
    settings = dict(VARIANTS[told.variant])
    threshold_rate = settings.pop("threshold_rate", 1.0)
    torch.manual_seed(told.seed)
    model = Network(**settings)
    seconds, losses = train(model, told, threshold_rate)
    model.eval()
    figures = {
        "distractors": list(distractors),
        "validation": [evaluate(model, VALIDATION, validation, count) for count in distractors],
        "test": [evaluate(model, TEST, test, count) for count in distractors],
        "survivors": None,
        "alpha": None,
        "without": None,
        "loss": statistics.fmean(losses[-max(told.steps // 10, 1) :]) if len(losses) == told.steps else None,
        "seconds": statistics.median(seconds),
    }
    if isinstance(model.block, blocks.AdaptiveSparseAttention):
        figures |= of_thresholds(model, distractors, test)
    return vars(told) | figures


def train(model: nn.Module, told: Run, threshold_rate: float) -> tuple[list[float], list[float]]:
    """Return of every step the seconds of this processor and the loss, until that is no number any more."""
    groups = blocks.parameter_groups(model, told.rate, threshold_rate)
    if told.optimizer == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(groups, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    else:
        optimizer = torch.optim.AdamW(groups, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, told.steps, power=0.9)
    seconds, losses = [], []
    for step in range(told.steps):
        rng = np.random.default_rng([told.seed, step])
        most = pictures.MOST * min(step / (GROWING * told.steps), 1)
        indices = range(step * BATCH, (step + 1) * BATCH)
        image, label = batch((TRAINING, told.seed), indices, (most * rng.random(BATCH)).astype(int))
        start = time.process_time()
        loss = F.cross_entropy(model(image), label, ignore_index=pictures.VOID)
        optimizer.zero_grad()
        loss.backward()
        if told.optimizer == "sgd":
            nn.utils.clip_grad_norm_(model.parameters(), LARGEST)
        optimizer.step()
        schedule.step()
        seconds.append(time.process_time() - start)
        if not math.isfinite(loss.item()):
            break
        losses.append(loss.item())
    return seconds, losses


def batch(seed: tuple[int, ...], indices: Sequence[int], distractors: int | np.ndarray) -> tuple[Tensor, Tensor]:
    made = pictures.make(seed, indices, distractors)
    return torch.from_numpy(np.ascontiguousarray(made.image)), torch.from_numpy(made.label).long()


@torch.no_grad()
def evaluate(model: Network, seed: int, count: int, distractors: int) -> float:
    """Return the mIoU over so many pictures."""
    confusion = torch.zeros(pictures.CLASSES, pictures.CLASSES, dtype=torch.int64)
    for start in range(0, count, AT_ONCE):
        image, label = batch((seed,), range(start, min(start + AT_ONCE, count)), distractors)
        predicted, real = model(image).argmax(1), label != pictures.VOID
        index = pictures.CLASSES * label[real] + predicted[real]
        confusion += index.bincount(minlength=confusion.numel()).view_as(confusion)
    return miou(confusion)


@torch.no_grad()
def of_thresholds(model: Network, distractors: Sequence[int], test: int) -> dict:
    """Return survivors of a row and quantiles of alpha, of a few pictures, and mIoU without something of the block."""
    block, survivors = model.block, []
    with blocks.monitor(model) as watched:
        for count in distractors:
            image, _ = batch((TEST,), range(max(test - AT_ONCE, 0), test), count)
            model(image)
            told = watched.statistics()
            survivors.append(told["block/survivors"])
    figures = {"survivors": survivors, "alpha": [told[f"block/alpha_q{quantile}"] for quantile in ("05", "50", "95")]}
    if not block.published:
        figures["without"] = {}
        for name, arguments in WITHOUT.items():
            model.block = Changed(block, arguments)
            figures["without"][name] = [evaluate(model, TEST, test, count) for count in distractors]
    return figures


def miou(confusion: Tensor) -> float:
    """Return the mean intersection over union, of counts [classes, predicted]."""
    both = confusion.diagonal()
    return (both / (confusion.sum(0) + confusion.sum(1) - both).clamp(min=1)).mean().item()
