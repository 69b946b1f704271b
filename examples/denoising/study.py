"""Training a method on some photographs and testing it on others."""

import math
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from skimage.metrics import structural_similarity
from torch import Tensor, nn

from asa_ops.nn import parameter_groups

from ..photographs import Part, Photographs
from .attention import Constants, NonLocalMeans
from .methods import KINDS, METHODS, Denoiser, Method, Tuned, nearby

NOISES = (0.05, 0.1, 0.2)  # standard deviations, colours in [0, 1]; every training crop has one of them
WIDTHS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2)  # what is tried for the constants
ALPHAS = (0.5, 0.7, 1.0, 1.4, 2.0, 4.0)
TAILS = (0.05, 0.1, 0.2, 0.35, 0.5, 0.7)
TUNING = 16  # crops for training that the constants are tuned on
SIDE, BATCH = 32, 4  # of the crops in a step of training
RATE, DECAY, NORM = 2e-3, 1e-3, 1.0  # of AdamW, its weight decay, and where gradients are clipped
TEST_CROPS = 4  # of a photograph, at most
TEST_BATCH = 6
POINTS = 10  # of a curve of training


def tune(photographs: Photographs) -> Tuned:
    """Return by noise level the h and alpha that are best for crops to train on, by their mean PSNR.

    And the best tail, with the h of alpha: a tail takes long.
    """
    crops = photographs.train.crops
    clean = crops[torch.linspace(0, len(crops) - 1, min(TUNING, len(crops))).long()].float() / 255
    tuned: Tuned = {kind: {} for kind in KINDS}
    for noise in NOISES:
        noisy = clean + noise * torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
        levels = torch.full((len(clean),), noise)

        def find(settings, build=NonLocalMeans, noise=noise, noisy=noisy, levels=levels) -> Constants:
            def score(constants: Constants) -> float:
                with torch.no_grad():
                    return psnr(in_batches(build({noise: constants}), noisy, levels), clean).mean().item()

            return max(settings, key=score)

        alone = [Constants(width) for width in WIDTHS]
        tuned["dense"][noise], tuned["nearby"][noise] = find(alone), find(alone, nearby)
        tuned["asa"][noise] = find([Constants(width, alpha) for width in WIDTHS for alpha in ALPHAS])
        tuned["tail"][noise] = find([Constants(tuned["asa"][noise].width, tail=tail) for tail in TAILS])
    return tuned


def in_batches(denoise: Denoiser, noisy: Tensor, noise: Tensor) -> Tensor:
    parts = zip(noisy.split(TEST_BATCH), noise.split(TEST_BATCH), strict=True)
    return torch.cat([denoise(*each) for each in parts]).clamp(0, 1)


def psnr(image: Tensor, clean: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio of pictures in [0, 1], [B, 3, H, W], in dB, [B]."""
    return -10 * (image - clean).square().mean((1, 2, 3)).log10()


def ssim(image: Tensor, clean: Tensor) -> Tensor:
    """Return the structural similarity of pictures in [0, 1], [B]."""
    pairs = zip(image.double().numpy(), clean.double().numpy(), strict=True)
    return torch.tensor([structural_similarity(x, y, data_range=1, channel_axis=0) for x, y in pairs])


class Sampler:
    """Crops at random, turned, mirrored, with colours permuted, and their noise; all a function of the seed."""

    def __init__(self, part: Part, seed: int):
        self.crops, self.random = part.crops, np.random.default_rng(seed)

    def __call__(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return clean and noisy crops [BATCH, 3, SIDE, SIDE], and the noise of each [BATCH]."""
        clean = torch.stack([self.one() for _ in range(BATCH)])
        noise = torch.from_numpy(self.random.choice(NOISES, BATCH)).float()
        drawn = torch.from_numpy(self.random.standard_normal(clean.shape, np.float32))
        return clean, clean + noise[:, None, None, None] * drawn, noise

    def one(self) -> Tensor:
        crop = self.crops[self.random.integers(len(self.crops))]
        row, column = (int(self.random.integers(length - SIDE + 1)) for length in crop.shape[1:])
        crop = crop[torch.from_numpy(self.random.permutation(3)), row : row + SIDE, column : column + SIDE]
        crop = crop.rot90(int(self.random.integers(4)), (1, 2))
        return (crop.flip(2) if self.random.integers(2) else crop).float() / 255


def train(
    module: nn.Module, part: Part, seed: int, steps: int, threshold_rate: float, after_step: Callable[[], object]
) -> dict:
    """Train a denoiser in place, for the mean logarithm of the error of a crop.

    Returns:
        The median of a step's seconds of this processor, and a curve: POINTS times the mean PSNR of the crops of the
        steps since the last point.
    """
    groups = parameter_groups(module, RATE, threshold_rate)
    optimizer = torch.optim.AdamW(groups, weight_decay=DECAY)
    rates = [group["lr"] for group in groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, steps, cycle_momentum=False)
    sample, seconds, scores, curve = Sampler(part, seed), [], [], []
    for step in range(steps):
        clean, noisy, noise = sample()
        start = time.process_time()
        error = (module(noisy, noise) - clean).square().mean((1, 2, 3))
        optimizer.zero_grad()
        error.clamp(min=1e-7).log().mean().backward()
        nn.utils.clip_grad_norm_(module.parameters(), NORM)
        optimizer.step()
        schedule.step()
        seconds.append(time.process_time() - start)
        scores.append(-10 * error.detach().log10().mean().item())
        if (step + 1) * POINTS // steps > step * POINTS // steps:
            curve.append(statistics.fmean(scores))
            scores.clear()
        after_step()
    return {"step seconds": statistics.median(seconds), "curve": curve}


def test(denoise: Denoiser, part: Part) -> dict[str, dict]:
    """Return by noise level what comes of crops of photographs: by photograph PSNR and SSIM, and what calls take.

    The noise is that of all methods and seeds.
    """
    ranks = [int((part.of[:i] == photograph).sum()) for i, photograph in enumerate(part.of)]
    most = max(ranks) + 1
    every = max(most // TEST_CROPS, 1)  # crops of all sizes
    chosen = torch.tensor([rank % every == 0 and rank // every < TEST_CROPS for rank in ranks])
    part = Part(part.names, part.crops[chosen], part.of[chosen])
    clean, results = part.floats(), {}
    for i, level in enumerate(NOISES):
        noise = torch.full((len(clean),), level)
        noisy = clean + level * torch.randn(clean.shape, generator=torch.Generator().manual_seed(1000 + i))
        images, seconds, survivors = [], [], []
        for each in zip(noisy.split(TEST_BATCH), noise.split(TEST_BATCH), strict=True):
            start = time.process_time()
            images.append(denoise(*each))
            seconds.append((time.process_time() - start) / len(each[0]))
            if getattr(denoise, "survivors", None) is not None:
                survivors += denoise.survivors.tolist()
        image = torch.cat(images).clamp(0, 1)
        results[f"{level:g}"] = {
            "psnr": part.by_photograph(psnr(image, clean)),
            "ssim": part.by_photograph(ssim(image, clean)),
            "seconds": statistics.median(seconds),
            "survivors": statistics.fmean(survivors) if survivors else None,
        }
    return results


def run(
    name: str,
    seed: int,
    photographs: Photographs,
    tuned: Tuned,
    steps: int,
    after_step: Callable[[], object] = lambda: None,
) -> dict:
    """Train a method, where it has something to train, and return what comes of the photographs to test on.

    Args:
        name: one of METHODS.
        seed: of the initialisation and of what is trained on.
        photographs: of both.
        tuned: where learning starts.
        steps: of training an attention alone; see :attr:`Method.longer`.
        after_step: called after each.
    """
    method: Method = METHODS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        denoise = method.build(tuned)
    steps *= method.longer
    told: dict = {"method": name, "seed": seed, "steps": steps}
    if is_trained(denoise):
        told |= train(denoise, photographs.train, seed, steps, method.threshold_rate, after_step)
        told["parameters"] = sum(x.numel() for x in denoise.parameters())
        denoise.eval()
    with torch.no_grad():
        return told | {"test": test(denoise, photographs.test)}


def is_trained(denoise: Denoiser) -> bool:
    return isinstance(denoise, nn.Module) and any(True for _ in denoise.parameters())


def rounded(x: object, digits: int = 6) -> object:
    """Return results with so many significant digits."""
    if isinstance(x, dict):
        return {name: rounded(value, digits) for name, value in x.items()}
    if isinstance(x, list):
        return [rounded(value, digits) for value in x]
    return float(f"{x:.{digits}g}") if isinstance(x, float) and math.isfinite(x) else x
