"""Denoise a volume by non-local means: adaptive sparse attention over the whole volume, against slice by slice.

Every voxel looks for patches like its own, 3 x 3 x 3 in the volume or 5 x 5 in its slice, and averages the voxels at
their centres, as in ``denoise.py``. What the third dimension gains is the difference in dB. scikit-image's non-local
means, which looks at the voxels nearby alone, stands beside.

    python examples/denoise_volume.py                            # 16 slices of 48 x 48 of nibabel's MRI
    python examples/denoise_volume.py brain.nii.gz --size 24 64 64
    python examples/denoise_volume.py stack.tif                  # a TIFF stack; .npy too, [T, H, W]
"""

import argparse
import functools
import math
import warnings
from collections.abc import Callable
from pathlib import Path

import files
import matplotlib.pyplot as plt
import numpy as np
import pictures
import skimage
import torch
from denoise import best, measured, psnr
from patches import query_and_key
from skimage.restoration import denoise_nl_means
from torch import Tensor
from tqdm import tqdm

from asa_ops import asa_attention

SAMPLE = "nibabel's MRI"
WIDTHS = (0.5, 0.7, 0.9, 1.2)  # h, in units of noise * sqrt(voxels in a patch)
ALPHAS = (0.5, 1.0, 2.0, 4.0, 8.0)
NEARBY_WIDTHS = (0.5, 0.7, 0.9)  # h of scikit-image's method, in units of noise
NEARBY = 5  # how far it looks, voxels
TUNING_SIZE = (8, 32, 32)  # h and alpha are chosen on a part of the volume no larger than this
PATCHES = {"slice by slice": (1, 5, 5), "volume": (3, 3, 3)}


def read(name: str) -> np.ndarray:
    """Return a volume [T, H, W], float64, most of it in [0, 1]: NIfTI, .npy, or what scikit-image reads.

    Raises:
        pictures.PictureError: there is no such file, or no volume in it.
    """
    path = Path(name)
    try:
        if name == SAMPLE or path.name.endswith((".nii", ".nii.gz")):
            import nibabel

            place = Path(nibabel.__file__).parent / "tests/data/example4d.nii.gz" if name == SAMPLE else path
            volume = np.asarray(nibabel.load(place).dataobj).T  # slices come first then
            volume = volume[0] if volume.ndim == 4 else volume
        elif path.suffix == ".npy":
            volume = np.load(path, allow_pickle=False)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                volume = skimage.io.imread(path)
    except Exception as error:  # readers raise whatever a broken file makes happen
        reason = "it needs `pip install nibabel`" if isinstance(error, ImportError) else str(error) or repr(error)
        raise pictures.PictureError(f"cannot read {name} as a volume: {reason:.200}") from error
    colours = volume.ndim == 3 and volume.shape[2] in (3, 4) and volume.dtype == np.uint8
    if volume.ndim != 3 or volume.dtype.kind not in "biuf" or colours:
        shape = list(volume.shape)
        what = f"a picture in colours {shape}" if colours else f"{volume.dtype} {shape}"
        raise pictures.PictureError(f"{name} must hold a volume [T, H, W] of numbers, got {what}")
    volume = np.nan_to_num(volume.astype(np.float64))
    low, high = np.percentile(volume, (0.1, 99.9))
    if not low < high:
        raise pictures.PictureError(f"{name} is the same everywhere")
    return ((volume - low) / (high - low)).clip(0, 1)


def centre(volume: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Return the middle of a volume, at most of ``size``."""
    begins = [(n - min(n, side)) // 2 for n, side in zip(volume.shape, size, strict=True)]
    return volume[tuple(slice(begin, begin + side) for begin, side in zip(begins, size, strict=True))]


def patch_tokens(volume: np.ndarray, sides: tuple[int, int, int]) -> Tensor:
    """Return the patch around every voxel, [N, voxels of a patch], less its mean over the volume."""
    x = np.pad(volume, [(side // 2,) * 2 for side in sides], mode="symmetric")
    windows = np.lib.stride_tricks.sliding_window_view(x, sides)
    patches = torch.from_numpy(windows.reshape(volume.size, -1).astype(np.float32))
    return patches - patches.mean(0)


def attend(volume: np.ndarray, sides: tuple[int, int, int], h: float, alpha: float | None) -> np.ndarray:
    """Return one attention over a volume; alpha None: dense."""
    query, key = query_and_key(patch_tokens(volume, sides) / h)
    value = torch.from_numpy(volume).float().reshape(1, 1, -1, 1)
    out = asa_attention(query, key, value, alpha, grid=volume.shape, scale=1.0)
    return out.double().numpy().reshape(volume.shape).clip(0, 1)


def attention(way: str, noisy: np.ndarray, noise: float, h: float, alpha: float | None = None) -> np.ndarray:
    """Return the volume denoised ``way``, a name of PATCHES; h in its unit."""
    sides = PATCHES[way]
    unit = noise * math.sqrt(math.prod(sides))
    parts = [noisy] if way == "volume" else np.split(noisy, len(noisy))
    return np.concatenate([attend(part, sides, h * unit, alpha) for part in parts])


def nearby(way: str, noisy: np.ndarray, noise: float, h: float) -> np.ndarray:
    """Return scikit-image's non-local means, given the noise; h in its units."""
    side = PATCHES[way][1]
    options = {"patch_size": side, "patch_distance": NEARBY, "h": h * noise, "sigma": noise}
    parts = [noisy] if way == "volume" else list(noisy)
    found = [denoise_nl_means(part, **options) for part in parts]
    return np.reshape(found, noisy.shape).clip(0, 1)


def draw(path: Path, volumes: dict[str, np.ndarray]) -> None:
    """Write three slices of every volume side by side, a row a slice."""
    depth = len(next(iter(volumes.values())))
    slices = sorted({depth // 4, depth // 2, depth * 3 // 4})
    figure, axes = plt.subplots(
        len(slices), len(volumes), figsize=(2.4 * len(volumes), 2.4 * len(slices)), squeeze=False, layout="constrained"
    )
    for row, t in zip(axes, slices, strict=True):
        for axis, (title, volume) in zip(row, volumes.items(), strict=True):
            axis.set_axis_off()
            axis.imshow(volume[t], cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axis.set_title(title if t == slices[0] else "", fontsize=10)
        row[0].text(-0.06, 0.5, f"slice {t}", rotation=90, va="center", ha="right", transform=row[0].transAxes)
    files.save(figure, path, dpi=100)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("volume", nargs="?", default=SAMPLE, help=f"NIfTI, TIFF or .npy ({SAMPLE})")
    parser.add_argument(
        "--size", type=int, nargs=3, default=(16, 48, 48), metavar=("T", "H", "W"), help="of its middle (16 48 48)"
    )
    parser.add_argument("--noise", type=float, default=0.1, help="standard deviation of the noise, voxels in [0, 1]")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--out", type=Path, default=Path("volume.png"), help="the picture to write (volume.png)")
    options = parser.parse_args(arguments)
    if min(options.size) < 3:
        parser.error(f"--size must be at least 3 a side, got {' '.join(map(str, options.size))}")
    if not 0 < options.noise < math.inf:
        parser.error(f"--noise must be > 0 and finite, got {options.noise}")
    if options.seed < 0:
        parser.error(f"--seed must be >= 0, got {options.seed}")
    files.check_out(parser, options.out, *files.FIGURES)
    files.check([options.out], [] if options.volume == SAMPLE else [Path(options.volume)])

    clean, noise = centre(read(options.volume), tuple(options.size)), options.noise
    if min(clean.shape) < 3:
        raise pictures.PictureError(f"{options.volume} must have at least 3 voxels a side, got {list(clean.shape)}")
    noisy = clean + np.random.default_rng(options.seed).normal(0, noise, clean.shape)
    small, small_noisy = centre(clean, TUNING_SIZE), centre(noisy, TUNING_SIZE)
    print(f"{options.volume}, {' x '.join(map(str, clean.shape))} = {clean.size} voxels, noise {noise:g}, ", end="")
    print(f"{torch.get_num_threads()} CPU threads\n")
    results = {"noisy": psnr(clean, noisy.clip(0, 1))}
    shown = {"clean": clean, f"noisy, {results['noisy']:.1f} dB": noisy.clip(0, 1)}
    methods: dict[str, tuple[Callable, list[tuple]]] = {
        "scikit-image": (nearby, [(h,) for h in NEARBY_WIDTHS]),
        "dense attention": (attention, [(h,) for h in WIDTHS]),
        "ASA": (attention, [(h, alpha) for h in WIDTHS for alpha in ALPHAS]),
    }
    print(f"{'':<34}{'PSNR dB':>9}{'seconds':>9}\n{'noisy':<34}{results['noisy']:>9.2f}")
    total = sum(len(settings) for _, settings in methods.values()) * len(PATCHES)
    with tqdm(total=total, desc="tuning", unit="run", leave=False) as bar:
        for name, (method, settings) in methods.items():
            for way in PATCHES:
                setting = best(small, functools.partial(method, way, small_noisy, noise), settings, bar)
                volume, seconds, _ = measured(functools.partial(method, way, noisy, noise, *setting))
                results[f"{name}, {way}"] = psnr(clean, volume)
                bar.clear()
                print(f"{name + ', ' + way:<34}{results[f'{name}, {way}']:>9.2f}{seconds:>9.2f}")
                if name == "ASA":
                    shown[f"ASA, {way}, {results[f'{name}, {way}']:.1f} dB"] = volume
    gain = results["ASA, volume"] - results["ASA, slice by slice"]
    chosen = " x ".join(map(str, small.shape))
    print(f"\nthe third dimension gains {gain:+.2f} dB; h and alpha chosen by PSNR on the middle {chosen}")
    draw(options.out, shown)
    print(f"picture: {options.out}")
    return results


if __name__ == "__main__":
    files.run(main, pictures.PictureError)
