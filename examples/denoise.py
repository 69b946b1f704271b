"""Denoise a photograph by non-local means, with dense attention, adaptive sparse attention, and scikit-image beside.

Every pixel looks for 5 x 5 patches like its own and averages the colours at their centres: attention with the patches
as queries and keys, s_ij = -||p_i - p_j||^2 / h^2, and the colours as values (Buades, Coll and Morel, "A non-local
algorithm for image denoising", CVPR 2005). Dense attention averages over all pixels, however unlike; adaptive sparse
attention keeps the reciprocal neighbours alone. scikit-image's non-local means looks at the pixels nearby alone; it is
a denoiser and no attention, and shows what a tool made for the task reaches.

    python examples/denoise.py                          # scikit-image's astronaut at 96 x 96
    python examples/denoise.py --size 256 photo.jpg     # 65,536 tokens
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import files
import matplotlib.pyplot as plt
import memory
import numpy as np
import pictures
import skimage
import torch
from matplotlib.colors import LogNorm
from patches import PATCH, SAMPLES, patches_of, photograph, query_and_key
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from skimage.restoration import denoise_nl_means
from torch import Tensor
from tqdm import tqdm

from asa_ops import AsaStats, asa_attention
from asa_ops.asa.ops import flops

WIDTHS = (0.5, 0.7, 0.9, 1.2, 1.6)  # h, in units of noise * sqrt(values in a patch)
ALPHAS = (0.5, 1.0, 2.0, 4.0, 8.0)
NEARBY_WIDTHS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # h of scikit-image's method, in units of noise
NEARBY = 11  # how far it looks, pixels (its default)
TUNING_SIZE = 96  # h and alpha are chosen on a picture no larger than this
MATRIX_LIMIT = 4 * 2**30  # bytes of one N x N float32 matrix above which dense attention that stores it is not tried
TIMING = 1.0  # seconds of repeated calls that a median is of


def load(name: str, size: int) -> np.ndarray:
    """Return a sample's or a file's photograph as float64 [size, size, 3] in [0, 1]."""
    image = skimage.util.img_as_float(photograph(name))
    return skimage.transform.resize(image, (size, size), anti_aliasing=True).clip(0, 1)


def patch_tokens(image: np.ndarray) -> Tensor:
    """Return the patch around every pixel, [N, PATCH * PATCH * 3], less its mean over the picture."""
    x = torch.from_numpy(image).float().permute(2, 0, 1)[None]
    patches = patches_of(torch.nn.functional.pad(x, [PATCH // 2] * 4, mode="reflect"))
    return patches - patches.mean(0)  # differences of patches stay as they are, products lose less to rounding


def attention_inputs(image: np.ndarray, h: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return query, key, value [1, 1, N, .] with <q_i, k_j> = -||p_i - p_j||^2 / h^2 and the colours as value."""
    query, key = query_and_key(patch_tokens(image) / h)
    value = torch.from_numpy(image).float().reshape(-1, 3)
    return query, key, value[None, None]


def dense(noisy: np.ndarray, h: float, padded: bool = True) -> np.ndarray:
    """Return dense attention's picture.

    torch's fused kernel, which never stores the N x N matrix, wants values as long as keys: ``padded`` appends zeros to
    the colours. Without them torch stores the matrix.
    """
    query, key, value = attention_inputs(noisy, h)
    longer = torch.nn.functional.pad(value, (0, key.shape[-1] - value.shape[-1])) if padded else value
    out = torch.nn.functional.scaled_dot_product_attention(query, key, longer, scale=1.0)
    return to_image(out[..., : value.shape[-1]], noisy.shape)


def sparse(noisy: np.ndarray, h: float, alpha: float) -> tuple[np.ndarray, AsaStats]:
    query, key, value = attention_inputs(noisy, h)
    thresholds = torch.full((1, 1, query.shape[2]), alpha)
    out, stats = asa_attention(query, key, value, thresholds, scale=1.0, return_stats=True)
    return to_image(out, noisy.shape), stats


def to_image(tokens: Tensor, shape: tuple[int, ...]) -> np.ndarray:
    return tokens[0, 0].double().numpy().reshape(shape).clip(0, 1)


def psnr(clean: np.ndarray, image: np.ndarray) -> float:
    return peak_signal_noise_ratio(clean, image, data_range=1)


def nearby(noisy: np.ndarray, noise: float, h: float, fast: bool) -> np.ndarray:
    """Return scikit-image's non-local means over the pixels at most NEARBY away, given the noise; h in its units."""
    options = {"patch_size": PATCH, "patch_distance": NEARBY, "h": h * noise, "sigma": noise, "fast_mode": fast}
    return denoise_nl_means(noisy, channel_axis=2, **options).clip(0, 1)


def best(clean: np.ndarray, method: Callable, settings: list[tuple], bar: tqdm) -> tuple:
    """Return the arguments, one of ``settings``, with which ``method`` comes closest to the clean picture by PSNR."""
    scores = {}
    for setting in settings:
        scores[setting] = psnr(clean, method(*setting))
        bar.update()
    return max(scores, key=scores.get)


def measured(run: Callable) -> tuple[object, float, float | None]:
    """Return what ``run`` returns, its seconds, and the bytes by which it raised the peak of resident memory.

    The seconds are the median of the calls that fit into TIMING, at least one.
    """
    seconds = []

    def timed() -> object:
        start = time.perf_counter()
        result = run()
        seconds.append(time.perf_counter() - start)
        return result

    result, peak = memory.added(timed)
    while sum(seconds) + seconds[-1] < TIMING:
        result = timed()
    return result, statistics.median(seconds), peak


@dataclass
class Result:
    """One row of the table."""

    name: str
    image: np.ndarray
    psnr: float
    ssim: float
    seconds: float | None = None
    memory: float | None = None
    flops: float | None = None
    survivors: float | None = None

    @classmethod
    def of(cls, name: str, clean: np.ndarray, image: np.ndarray, **figures) -> "Result":
        ssim = structural_similarity(clean, image, data_range=1, channel_axis=2)
        return cls(name, image, psnr(clean, image), ssim, **figures)

    def row(self) -> str:
        def cell(x, form, unit=1.0):
            return "-" if x is None else format(x / unit, form)

        cells = (
            f"{self.psnr:.2f}",
            f"{self.ssim:.3f}",
            cell(self.seconds, ".2f"),
            cell(self.memory, ".0f", 1e6),
            cell(self.flops, ".1f", 1e9),
            cell(self.survivors, ".1f"),
        )
        return f"{self.name:<{NAME}}" + "".join(
            f"{c:>{width}}" for c, width in zip(cells, WIDTH_OF.values(), strict=True)
        )


NAME = 40
WIDTH_OF = {"PSNR dB": 9, "SSIM": 7, "seconds": 9, "peak MB": 9, "GFLOP": 9, "survivors/row": 15}


def weight_map(
    noisy: np.ndarray, h: float, alpha: float, stats: AsaStats, pixel: tuple[int, int]
) -> tuple[np.ndarray, int]:
    """Return the weights by which one pixel keeps those of the picture, and how many it would keep one-sidedly."""
    height, width, _ = noisy.shape
    i, n = pixel[0] * width + pixel[1], height * width
    query, key, _ = attention_inputs(noisy, h)
    s_i, s_to_i = key[0, 0] @ query[0, 0, i], query[0, 0] @ key[0, 0, i]
    threshold = stats.lse[0, 0] + math.log(alpha / n)
    adaptive = s_i > threshold[i]
    weights = s_i.masked_fill(~(adaptive & (s_to_i > threshold)), -torch.inf).softmax(0)
    return weights.reshape(height, width).numpy(), int(adaptive.sum())


def draw(path: Path, results: dict[str, Result], weights: np.ndarray, pixel: tuple[int, int]) -> None:
    """Write one row: the pictures of ``results``, by title, and whom one pixel keeps."""
    figure, axes = plt.subplots(1, len(results) + 1, figsize=(12, 3.3), layout="constrained")
    for axis in axes:
        axis.set_axis_off()
    for axis, (title, result) in zip(axes, results.items(), strict=False):
        axis.imshow(result.image, interpolation="nearest")
        axis.set_title(f"{title}: {result.psnr:.1f} dB", fontsize=10)
    kept = np.ma.masked_equal(weights, 0)
    axes[-1].imshow(results["noisy"].image.mean(2) * 0.3 + 0.7, cmap="gray", vmin=0, vmax=1)
    norm = LogNorm(kept.min() / 2, kept.max())  # of one weight alone too
    shown = axes[-1].imshow(kept, norm=norm, cmap="plasma")
    axes[-1].plot(pixel[1], pixel[0], "o", markersize=13, markerfacecolor="none", markeredgecolor="red")
    axes[-1].set_title(f"ASA: this pixel keeps {kept.count():,} of {weights.size:,}", fontsize=10)
    figure.colorbar(shown, ax=axes[-1], label="weight", fraction=0.046)
    files.save(figure, path, dpi=100)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> list[Result]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", nargs="?", default="astronaut", help=f"an image file, or {', '.join(SAMPLES)}")
    parser.add_argument("--size", type=int, default=96, help="side of the square picture; SIZE^2 tokens (96)")
    parser.add_argument("--noise", type=float, default=0.1, help="standard deviation of the noise, colours in [0, 1]")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--out", type=Path, default=Path("denoise.png"), help="the picture to write (denoise.png)")
    options = parser.parse_args(arguments)
    if options.size < 2 * PATCH:
        parser.error(f"--size must be at least {2 * PATCH}, got {options.size}")
    if not 0 < options.noise < math.inf:
        parser.error(f"--noise must be > 0 and finite, got {options.noise}")
    if options.seed < 0:
        parser.error(f"--seed must be >= 0, got {options.seed}")
    files.check_out(parser, options.out, *files.FIGURES)
    files.check([options.out], [] if options.image in SAMPLES else [Path(options.image)])

    size, n = options.size, options.size**2

    def pair(side):
        clean = load(options.image, side)
        noise = np.random.default_rng(options.seed).normal(0, options.noise, clean.shape)
        return clean, clean + noise

    unit = options.noise * math.sqrt(PATCH * PATCH * 3)
    clean, noisy = pair(size)
    tuning_clean, tuning_noisy = (clean, noisy) if size <= TUNING_SIZE else pair(TUNING_SIZE)
    widths, thresholds = [(h,) for h in WIDTHS], [(h, alpha) for h in WIDTHS for alpha in ALPHAS]
    total = len(widths) + len(thresholds) + 2 * len(NEARBY_WIDTHS)
    with tqdm(total=total, desc="tuning h and alpha", unit="run", leave=False) as bar:

        def tune(method: Callable, settings: list[tuple]) -> tuple:
            return best(tuning_clean, lambda *setting: method(tuning_noisy, *setting), settings, bar)

        (h_dense,) = tune(lambda image, h: dense(image, h * unit), widths)
        h_sparse, alpha = tune(lambda image, h, alpha: sparse(image, h * unit, alpha)[0], thresholds)
        nearby_settings = [
            tune(lambda image, h, fast: nearby(image, options.noise, h, fast), [(h, fast) for h in NEARBY_WIDTHS])
            for fast in (False, True)
        ]
    threads = torch.get_num_threads()
    chosen = "" if size <= TUNING_SIZE else f" at {TUNING_SIZE} x {TUNING_SIZE}"
    print(f"{options.image}, {size} x {size} = {n} tokens, noise {options.noise:g}, {threads} CPU threads")
    print(f"h and alpha chosen by PSNR{chosen}\n")

    results = [Result.of("noisy", clean, noisy.clip(0, 1))]
    q_shape, k_shape, v_shape = (x.shape for x in attention_inputs(noisy[:PATCH, :PATCH], unit))
    q_shape, k_shape, v_shape = ((1, 1, n, shape[-1]) for shape in (q_shape, k_shape, v_shape))
    matrix = 4 * n**2
    ways = {"dense, the matrix stored": False} if matrix <= MATRIX_LIMIT else {}
    for name, padded in (ways | {"dense, flash attention": True}).items():
        image, seconds, peak = measured(lambda padded=padded: dense(noisy, h_dense * unit, padded))
        figures = {"seconds": seconds, "memory": peak, "flops": flops(q_shape, k_shape, v_shape), "survivors": n}
        results.append(Result.of(f"{name}, h = {h_dense:g} s", clean, image, **figures))
    (image, stats), seconds, peak = measured(lambda: sparse(noisy, h_sparse * unit, alpha))
    pairs = int(stats.survivors.sum())
    figures = {
        "seconds": seconds,
        "memory": peak,
        "flops": flops(q_shape, k_shape, v_shape, pairs),
        "survivors": pairs / n,
    }
    results.append(Result.of(f"ASA, h = {h_sparse:g} s, alpha = {alpha:g}", clean, image, **figures))
    shown = dict(zip(("noisy", "dense attention", "ASA"), (results[0], *results[-2:]), strict=True))
    for h, fast in nearby_settings:
        image, seconds, peak = measured(lambda h=h, fast=fast: nearby(noisy, options.noise, h, fast))
        name = f"scikit-image{', fast' if fast else ''}, h = {h:g} noise"
        results.append(Result.of(name, clean, image, seconds=seconds, memory=peak))

    print(" " * NAME + "".join(f"{title:>{width}}" for title, width in WIDTH_OF.items()))
    for result in results:
        print(result.row())
    if matrix > MATRIX_LIMIT:
        print(f"dense, the matrix stored: skipped, one {n} x {n} float32 matrix alone is {matrix / 1e9:.1f} GB")
    print(f"\ns = noise * sqrt({PATCH * PATCH * 3}); seconds: the median of the calls in {TIMING:g} s; peak MB is what")
    print("the call added; GFLOP is what the result takes: every score once, and the values of the survivors;")
    print(f"scikit-image: non-local means within {NEARBY} pixels, which knows the noise, on one thread")

    pixel = round(size * 0.22), round(size * 0.42)
    weights, adaptive = weight_map(noisy, h_sparse * unit, alpha, stats, pixel)
    draw(options.out, shown, weights, pixel)
    print(f"pixel {pixel}: {adaptive} of {n} above its threshold, {np.count_nonzero(weights)} mutual")
    print(f"picture: {options.out}")
    return results


if __name__ == "__main__":
    files.run(main, pictures.PictureError)
