"""Denoise a photograph by non-local means, once with dense and once with adaptive sparse attention.

Every pixel looks for 5 x 5 patches like its own and averages the colours at their centres: attention with the patches
as queries and keys, s_ij = -||p_i - p_j||^2 / h^2, and the colours as values (Buades, Coll and Morel, "A non-local
algorithm for image denoising", CVPR 2005). Dense attention averages over all pixels, however unlike; adaptive sparse
attention keeps the reciprocal neighbours alone.

    python examples/denoise.py                          # scikit-image's astronaut at 96 x 96
    python examples/denoise.py --size 256 photo.jpg     # 65,536 tokens
"""

import argparse
import contextlib
import ctypes
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import files
import matplotlib.pyplot as plt
import numpy as np
import pictures
import PIL.Image
import skimage
import torch
from matplotlib.colors import LogNorm
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor
from tqdm import tqdm

from asa_ops import AsaStats, asa_attention
from asa_ops.asa.ops import flops

PATCH = 5
SAMPLES = ("astronaut", "coffee", "chelsea", "rocket")
WIDTHS = (0.5, 0.7, 0.9, 1.2, 1.6)  # h, in units of noise * sqrt(values in a patch)
ALPHAS = (0.5, 1.0, 2.0, 4.0, 8.0)
SETTINGS = [(h, None) for h in WIDTHS] + [(h, alpha) for h in WIDTHS for alpha in ALPHAS]  # None: dense
TUNING_SIZE = 96  # h and alpha are chosen on a picture no larger than this
DENSE_LIMIT = 4 * 2**30  # bytes of one N x N float32 matrix above which dense attention is not tried


def load(name: str, size: int) -> np.ndarray:
    """Return a sample's or a file's photograph as float64 [size, size, 3] in [0, 1]."""
    if name in SAMPLES:
        image = getattr(skimage.data, name)()
    elif not Path(name).is_file():
        raise pictures.PictureError(f"no photograph {name!r}: expected a file or one of {', '.join(SAMPLES)}")
    else:
        picture = PIL.Image.fromarray(pictures.read(Path(name), "RGBA", upright=True))
        white = PIL.Image.new("RGBA", picture.size, "white")  # behind what is transparent
        image = np.asarray(PIL.Image.alpha_composite(white, picture).convert("RGB"))
    image = skimage.util.img_as_float(image)
    return skimage.transform.resize(image, (size, size), anti_aliasing=True).clip(0, 1)


def patch_tokens(image: np.ndarray) -> Tensor:
    """Return the patch around every pixel, [N, PATCH * PATCH * 3], less its mean over the picture."""
    x = torch.from_numpy(image).float().permute(2, 0, 1)[None]
    x = torch.nn.functional.pad(x, [PATCH // 2] * 4, mode="reflect")
    patches = torch.nn.functional.unfold(x, PATCH)[0].mT
    return patches - patches.mean(0)  # differences of patches stay as they are, products lose less to rounding


def attention_inputs(image: np.ndarray, h: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return query, key, value [1, 1, N, .] with <q_i, k_j> = -||p_i - p_j||^2 / h^2 and the colours as value."""
    p = patch_tokens(image) / h
    square, one = p.square().sum(-1, keepdim=True), torch.ones(len(p), 1)
    query = torch.cat([2 * p, -square, one], -1)
    key = torch.cat([p, one, -square], -1)
    value = torch.from_numpy(image).float().reshape(-1, 3)
    return query[None, None], key[None, None], value[None, None]


def dense(noisy: np.ndarray, h: float) -> np.ndarray:
    query, key, value = attention_inputs(noisy, h)
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=1.0)
    return to_image(out, noisy.shape)


def sparse(noisy: np.ndarray, h: float, alpha: float) -> tuple[np.ndarray, AsaStats]:
    query, key, value = attention_inputs(noisy, h)
    thresholds = torch.full((1, 1, query.shape[2]), alpha)
    out, stats = asa_attention(query, key, value, thresholds, scale=1.0, return_stats=True)
    return to_image(out, noisy.shape), stats


def to_image(tokens: Tensor, shape: tuple[int, ...]) -> np.ndarray:
    return tokens[0, 0].double().numpy().reshape(shape).clip(0, 1)


def psnr(clean: np.ndarray, image: np.ndarray) -> float:
    return peak_signal_noise_ratio(clean, image, data_range=1)


def tune(clean: np.ndarray, noisy: np.ndarray, unit: float, bar: tqdm) -> tuple[float, float, float]:
    """Return the best h for dense attention, and the best h and alpha for sparse attention, by PSNR."""
    scores = {}
    for h, alpha in SETTINGS:
        image = dense(noisy, h * unit) if alpha is None else sparse(noisy, h * unit, alpha)[0]
        scores[h * unit, alpha] = psnr(clean, image)
        bar.update()
    best_dense = max((s for s in scores if s[1] is None), key=scores.get)
    best_sparse = max((s for s in scores if s[1] is not None), key=scores.get)
    return best_dense[0], *best_sparse


def memory(field: str) -> int | None:
    """Return a memory figure of this process in bytes ("VmRSS": now, "VmHWM": at most), or None outside Linux."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1]) * 1024
    return None


def measured(run: Callable) -> tuple[object, float, float | None]:
    """Return what ``run`` returns, its seconds, and the bytes by which it raised the peak of resident memory."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # give back what earlier runs freed, so that reusing it counts
        Path("/proc/self/clear_refs").write_text("5")  # start the peak anew
    before, start = memory("VmRSS"), time.perf_counter()
    result = run()
    seconds, peak = time.perf_counter() - start, memory("VmHWM")
    return result, seconds, None if peak is None else peak - before


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
        return f"{self.name:<36}" + "".join(f"{c:>{width}}" for c, width in zip(cells, WIDTH_OF.values(), strict=True))


WIDTH_OF = {"PSNR dB": 9, "SSIM": 7, "seconds": 9, "peak MB": 9, "GFLOP": 9, "survivors/row": 15}


def weight_maps(noisy: np.ndarray, h: float, alpha: float, stats: AsaStats, pixel: tuple[int, int]) -> list[np.ndarray]:
    """Return the weights of one pixel over the picture: dense, adaptive neighbours, reciprocal survivors."""
    height, width, _ = noisy.shape
    i, n = pixel[0] * width + pixel[1], height * width
    query, key, _ = attention_inputs(noisy, h)
    s_i, s_to_i = key[0, 0] @ query[0, 0, i], query[0, 0] @ key[0, 0, i]
    threshold = stats.lse[0, 0] + math.log(alpha / n)
    adaptive = s_i > threshold[i]
    maps = []
    for kept in (torch.ones(n, dtype=torch.bool), adaptive, adaptive & (s_to_i > threshold)):
        weights = s_i.masked_fill(~kept, -torch.inf).softmax(0)
        maps.append(weights.reshape(height, width).numpy())
    return maps


def draw(path: Path, results: list[Result], maps: dict[tuple[int, int], list[np.ndarray]]) -> None:
    """Write the pictures above, and below them the weight maps of some pixels."""
    figure, axes = plt.subplots(1 + len(maps), 4, figsize=(12, 3.2 * (1 + len(maps))), layout="constrained")
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, result in zip(axes[0], results, strict=False):
        axis.imshow(result.image)
        axis.set_title(result.name if result is results[0] else f"{result.name}\n{result.psnr:.2f} dB", fontsize=9)
    norm = LogNorm(1e-6, 1, clip=True)
    for row, ((r, c), weights) in zip(axes[1:], maps.items(), strict=True):
        row[0].imshow(results[1].image)
        row[0].plot(c, r, "o", markersize=9, markerfacecolor="none", markeredgecolor="red", markeredgewidth=2)
        row[0].set_title(f"pixel ({r}, {c})", fontsize=9)
        for axis, name, w in zip(
            row[1:], ("dense", "adaptive neighbours", "reciprocal survivors"), weights, strict=True
        ):
            shown = axis.imshow(np.ma.masked_equal(w, 0), norm=norm, cmap="viridis")
            axis.set_title(f"{name}: {np.count_nonzero(w)}", fontsize=9)
        figure.colorbar(shown, ax=row[-1], label="weight")
    files.save(figure, path, dpi=110)
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
    tuning = (clean, noisy) if size <= TUNING_SIZE else pair(TUNING_SIZE)
    with tqdm(total=len(SETTINGS), desc="tuning h and alpha", unit="run", leave=False) as bar:
        h_dense, h_sparse, alpha = tune(*tuning, unit, bar)
    threads = torch.get_num_threads()
    chosen = "" if size <= TUNING_SIZE else f" at {TUNING_SIZE} x {TUNING_SIZE}"
    print(f"{options.image}, {size} x {size} = {n} tokens, noise {options.noise:g}, {threads} CPU threads")
    print(f"h and alpha chosen by PSNR{chosen}\n")

    shown = noisy.clip(0, 1)
    results = [Result("clean", clean, math.inf, 1.0), Result.of("noisy", clean, shown)]
    q_shape, k_shape, v_shape = (x.shape for x in attention_inputs(noisy[:PATCH, :PATCH], unit))
    q_shape, k_shape, v_shape = ((1, 1, n, shape[-1]) for shape in (q_shape, k_shape, v_shape))
    matrix = 4 * n**2
    if matrix <= DENSE_LIMIT:
        image, seconds, peak = measured(lambda: dense(noisy, h_dense))
        figures = {"seconds": seconds, "memory": peak, "flops": flops(q_shape, k_shape, v_shape), "survivors": n}
        results.append(Result.of(f"dense, h = {h_dense / unit:g} s", clean, image, **figures))
    (image, stats), seconds, peak = measured(lambda: sparse(noisy, h_sparse, alpha))
    pairs = int(stats.survivors.sum())
    figures = {
        "seconds": seconds,
        "memory": peak,
        "flops": flops(q_shape, k_shape, v_shape, pairs),
        "survivors": pairs / n,
    }
    results.append(Result.of(f"ASA, h = {h_sparse / unit:g} s, alpha = {alpha:g}", clean, image, **figures))

    print(" " * 36 + "".join(f"{title:>{width}}" for title, width in WIDTH_OF.items()))
    for result in results[1:]:
        print(result.row())
    if matrix > DENSE_LIMIT:
        print(f"dense: skipped, one {n} x {n} float32 matrix alone is {matrix / 1e9:.1f} GB")
    print(f"\ns = noise * sqrt({PATCH * PATCH * 3}); peak MB is what the call added; GFLOP is what the result takes:")
    print("every score once, and the values of the survivors")

    pixels = [(round(size * r), round(size * c)) for r, c in ((0.22, 0.42), (0.5, 0.8), (0.8, 0.3))]
    draw(options.out, results, {p: weight_maps(noisy, h_sparse, alpha, stats, p) for p in pixels})
    print(f"picture: {options.out}")
    return results


if __name__ == "__main__":
    files.run(main, pictures.PictureError)
