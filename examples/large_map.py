"""Denoise a picture of any size by non-local means, as in denoise.py, over the processes of one or more machines.

The picture is cut into maps. Each is one exact adaptive sparse attention: a pixel looks at all pixels of its map for
patches like its own, and averages the colours of its reciprocal neighbours. The rows of every map are split over the
processes, which hold theirs alone; the result is the same to the last bit however many there are. The cost of a pixel
grows with the pixels of a map. "--map whole" makes the picture one map: 8 megapixels are 6e13 pairs of pixels.

A process reads the pixels of its rows, and two rows above and below, of uncompressed TIFF pictures; those of all other
kinds it decodes as a whole, and keeps its rows. A TIFF is also written piece by piece, where a PNG is put together in
the memory of the first process.

    python examples/large_map.py                                                    # scikit-image's astronaut
    torchrun --standalone --nproc-per-node 2 examples/large_map.py photo.jpg        # 2 processes
    torchrun --standalone --nproc-per-node 8 examples/large_map.py photo.tif --map 1024 --out denoised.tif
"""

import argparse
import contextlib
import io
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import files
import numpy as np
import pictures
import PIL.Image
import ranks
import tifffile
import torch
import torch.distributed as dist
from patches import PATCH, SAMPLES, patches_of, photograph, query_and_key
from torch import Tensor
from tqdm import tqdm

from asa_ops.distributed import asa_attention

HALO = PATCH // 2  # rows and columns that the patch of a pixel reaches beyond it
KINDS = (".png", ".tif", ".tiff")
CLASSIC = 2**32 - 2**20  # bytes of pixels that a TIFF of 32-bit offsets holds


@dataclass(frozen=True)
class Settings:
    """What decides the result."""

    side: int | None = 96  # of a map, at most; None: the whole picture
    noise: float = 0.1  # its standard deviation, colours in [0, 1]
    seed: int = 0
    h: float = 0.9  # in units of noise * sqrt(values in a patch)
    alpha: float = 1.0


@dataclass(frozen=True)
class Share:
    """Rows of one map, and those that are read for them."""

    begin: int
    end: int
    first: int
    last: int


def cut(n: int, side: int | None) -> list[tuple[int, int]]:
    """Return where the fewest parts of n that are no longer than ``side`` begin and end, about equally long."""
    return split(n, 1 if side is None else math.ceil(n / side))


def split(n: int, count: int) -> list[tuple[int, int]]:
    return list(pairwise(n * i // count for i in range(count + 1)))


def shares(height: int, side: int | None, rank: int, size: int) -> list[Share]:
    """Return the rows of every row of maps that are those of a process."""
    found = []
    for top, bottom in cut(height, side):
        begin, end = (top + x for x in split(bottom - top, size)[rank])
        reach = HALO if begin < end else 0
        found.append(Share(begin, end, max(begin - reach, 0), min(end + reach, height)))
    return found


def mapped(path: Path) -> np.ndarray | None:
    """Return the pixels of a TIFF file without reading them, None if they do not lie there as uint8 [H, W, 3]."""
    try:
        with tifffile.TiffFile(path) as file:
            page = file.pages.first
            upright = "Orientation" not in page.tags or page.tags["Orientation"].value == 1
            plain = page.is_memmappable and page.photometric == tifffile.PHOTOMETRIC.RGB and page.axes == "YXS"
            if upright and plain and page.dtype == np.uint8 and page.shape[2] == 3:
                return np.memmap(path, np.uint8, "r", page.dataoffsets[0], page.shape)
    except (OSError, tifffile.TiffFileError):
        pass  # no file, or no TIFF: whoever reads it otherwise says what is wrong
    return None


def read(name: str, side: int | None, rank: int, size: int) -> tuple[tuple[int, int], list[Share], list[np.ndarray]]:
    """Return a picture's height and width, and the shares of a process with their pixels, uint8 [rows, W, 3]."""
    image = None if name in SAMPLES else mapped(Path(name))
    decoded = image is None
    image = photograph(name) if decoded else image
    if min(image.shape[:2]) < 2 * PATCH:
        height, width = image.shape[:2]
        raise pictures.PictureError(f"{name} must have sides of at least {2 * PATCH} pixels, got {width} x {height}")
    own = shares(image.shape[0], side, rank, size)
    strips = [image[share.first : share.last] for share in own]
    return image.shape[:2], own, [strip.copy() for strip in strips] if decoded else strips


def noise_of(rows: range, width: int, settings: Settings) -> np.ndarray:
    """Return the noise of some rows of the picture, [rows, width, 3]: of each row the same, whoever asks."""
    noise = np.empty((len(rows), width, 3))
    for i, row in enumerate(rows):
        noise[i] = np.random.default_rng([settings.seed, row]).normal(0, settings.noise, (width, 3))
    return noise


def to_bytes(image: np.ndarray) -> np.ndarray:
    return np.rint(image.clip(0, 1) * 255).astype(np.uint8)


def surrounded(noisy: np.ndarray, share: Share) -> Tensor:
    """Return the rows of a share with HALO pixels around them, [1, 3, rows + 2 HALO, W + 2 HALO].

    Beyond the picture they are its mirror image.
    """
    if share.begin == share.end:
        return torch.zeros(1, 3, 2 * HALO, noisy.shape[1] + 2 * HALO)
    above, below = HALO - (share.begin - share.first), HALO - (share.last - share.end)
    image = np.pad(noisy, ((above, below), (HALO, HALO), (0, 0)), mode="reflect")
    return torch.from_numpy(image).float().permute(2, 0, 1)[None]


def denoise_rows(x: Tensor, settings: Settings, device: torch.device, group: dist.ProcessGroup | None) -> Tensor:
    """Return the colours [rows, W, 3] of this process's rows of one map, ``x`` being these with HALO pixels around."""
    height, width = (n - 2 * HALO for n in x.shape[2:])
    # All on the CPU, where a row is the same whatever the number of rows. Less grey, products lose less to rounding.
    patches = patches_of(x - 0.5) if height else x.new_empty(0, x.shape[1] * PATCH**2)
    query, key = query_and_key(patches / (settings.h * settings.noise * math.sqrt(patches.shape[1])))
    value = x[0, :, HALO : HALO + height, HALO : HALO + width].permute(1, 2, 0).reshape(1, 1, -1, 3)
    tokens = (tensor.to(device) for tensor in (query, key, value))
    return asa_attention(*tokens, settings.alpha, scale=1.0, group=group).cpu().view(height, width, 3)


def denoise(
    name: str,
    out: Path,
    settings: Settings,
    device: torch.device | None = None,
    group: dist.ProcessGroup | None = None,
) -> tuple[float, float]:
    """Read a picture, add noise, and write it denoised; return the PSNR before and after, in dB.

    Every process of the group calls this; the first writes.

    Raises:
        PictureError, FileError: in the first process; SystemExit in the others if it is not about writing.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    with agreed(group) as found:
        if rank == 0:
            files.check([out], [] if name in SAMPLES else [Path(name)])
        (height, width), own, strips = read(name, settings.side, rank, size)
        found.shape = height, width
    columns = cut(width, settings.side)
    errors = torch.zeros(2, dtype=torch.int64)  # squared ones before and after; as integers they have no rounding
    bar = tqdm(total=len(own) * len(columns), unit="map", disable=rank > 0)
    with bar, picture(out, height, width) if rank == 0 else contextlib.nullcontext() as write:
        for share, strip in zip(own, strips, strict=True):
            noisy = strip / 255 + noise_of(range(share.first, share.last), width, settings)
            x = surrounded(noisy, share)
            denoised = np.empty((share.end - share.begin, width, 3), np.uint8)
            for left, right in columns:
                tile = x[..., left : right + 2 * HALO]
                denoised[:, left:right] = to_bytes(denoise_rows(tile, settings, device or x.device, group).numpy())
                bar.update()
            rows = slice(share.begin - share.first, share.end - share.first)
            for i, found in enumerate((to_bytes(noisy[rows]), denoised)):
                errors[i] += int(np.square(found.astype(np.int64) - strip[rows]).sum())
            parts = [None] * size if rank == 0 else None
            dist.gather_object(denoised, parts, group=group, group_dst=0)
            if rank == 0:
                write(np.concatenate(parts))
    total = errors.to(device)
    dist.all_reduce(total, group=group)
    before, after = (10 * math.log10(255**2 * 3 * height * width / max(x, 1)) for x in total.tolist())
    return before, after


@contextlib.contextmanager
def agreed(group: dist.ProcessGroup | None) -> Iterator[argparse.Namespace]:
    """Raise what goes wrong in one process in the first, end the others, and see that all read the same picture."""
    found, error = argparse.Namespace(shape=None), None
    try:
        yield found
    except (pictures.PictureError, files.FileError) as raised:
        error = raised
    told = [None] * dist.get_world_size(group)
    dist.all_gather_object(told, (error and str(error), found.shape), group=group)
    errors = [f"process {rank}: {text}" if rank else text for rank, (text, _) in enumerate(told) if text]
    shapes = {shape for _, shape in told}
    if not errors and len(shapes) > 1:
        errors = [f"the processes read pictures of different sizes (H, W): {sorted(shapes)}"]
    if errors:
        raise (SystemExit(1) if dist.get_rank(group) else pictures.PictureError(errors[0])) from error


@contextlib.contextmanager
def picture(path: Path, height: int, width: int) -> Iterator[Callable[[np.ndarray], object]]:
    """Return what takes the rows of a picture uint8 [rows, width, 3], the next ones each time, and writes them."""
    with files.whole(path) as file:
        if path.suffix.lower() == ".png":
            rows = []
            yield rows.append
            PIL.Image.fromarray(np.concatenate(rows)).save(file, format="PNG")
            return
        shape = height, width, 3
        with tifffile.TiffWriter(file, bigtiff=math.prod(shape) > CLASSIC) as tiff:
            offset, _ = tiff.write(None, shape=shape, dtype=np.uint8, photometric="rgb", returnoffset=True)
        file.seek(offset)
        yield lambda strip: file.write(strip.tobytes())


def parse(arguments: list[str] | None, first: bool) -> tuple[str, Path, Settings]:
    """Return the picture, the file to write and the settings; of several processes the first alone says what is wrong.

    The folder of that file need be there for it alone, too.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Settings()
    parser.add_argument("image", nargs="?", default="astronaut", help=f"an image file, or {', '.join(SAMPLES)}")
    parser.add_argument("--out", type=Path, default=Path("large_map.png"), help="the picture to write, .png or .tif")
    parser.add_argument("--map", default=str(default.side), help=f"side of a map, at most, or whole ({default.side})")
    parser.add_argument("--noise", type=float, default=default.noise, help="standard deviation, colours in [0, 1]")
    parser.add_argument("--seed", type=int, default=default.seed, help="of the noise")
    parser.add_argument("--h", type=float, default=default.h, help=f"in units of the noise of a patch ({default.h})")
    parser.add_argument("--alpha", type=float, default=default.alpha, help=f"less smooths more ({default.alpha:g})")
    with contextlib.nullcontext() if first else contextlib.redirect_stderr(io.StringIO()):
        options = parser.parse_args(arguments)
        side = int(options.map) if options.map.isdecimal() else None
        if options.map != "whole" and (side is None or side < 2 * PATCH):
            parser.error(f"--map must be a number of at least {2 * PATCH}, or whole, got {options.map}")
        for name in ("noise", "h"):
            if not 0 < getattr(options, name) < math.inf:
                parser.error(f"--{name} must be > 0 and finite, got {getattr(options, name)}")
        if options.seed < 0 or not options.alpha >= 0:
            parser.error(f"--seed and --alpha must be >= 0, got {options.seed} and {options.alpha}")
        if first:
            files.check_out(parser, options.out, *KINDS)
    return options.image, options.out, Settings(side, options.noise, options.seed, options.h, options.alpha)


def main(arguments: list[str] | None = None) -> None:
    first = int(os.environ.get("RANK", "0")) == 0
    name, out, settings = parse(arguments, first)
    device = ranks.start()
    start = time.perf_counter()
    before, after = denoise(name, out, settings, device)
    if first:
        took, size = time.perf_counter() - start, dist.get_world_size()
        print(f"{name}: PSNR {before:.2f} dB with noise, {after:.2f} dB denoised, {took:.1f} s, {size} processes")
        print(f"picture: {out}")


if __name__ == "__main__":
    files.run(main, pictures.PictureError)
    ranks.leave()
