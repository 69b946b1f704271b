"""Which tiles of a volume or a film, and which order of its tokens, leave the fewest active tiles of pairs.

    python -m bench.tiles                                    # nibabel's MRI
    python -m bench.tiles film.mp4 volume.npy --size 16 48 64

GPU kernels put 64 tokens that are neighbours on the grid into a tile, and skip the pairs of two tiles of which none
survives. For each input the table has the share of tiles of 64 x 64 pairs that are left, for tiles of several sides,
and for an order by content: the keys split in halves along their first principal component, again and again.
"""

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from asa_ops import reciprocal_neighbors
from examples import files

from .report import table

SAMPLE = "nibabel's MRI"
TILES = ((1, 1, 64), (1, 8, 8), (2, 4, 8), (4, 4, 4), (4, 2, 8), (8, 2, 4), (8, 8, 1), (16, 2, 2))
BLOCK = 64
DIM = 64
NOISE = 0.05


def read(name: str, size: tuple[int, ...]) -> Tensor:
    """Return the middle of a volume, or the first frames of a film made smaller, [C, T, H, W] in [0, 1]."""
    if name == SAMPLE or name.endswith(".npy"):
        if name == SAMPLE:
            import nibabel

            file = Path(nibabel.__file__).parent / "tests/data/example4d.nii.gz"
            volume = np.asarray(nibabel.load(file).dataobj)[..., 0].T  # slices come first then
        else:
            with files.named(Path(name)):
                volume = np.load(name, allow_pickle=False)
        if volume.ndim != 3 or volume.dtype.kind not in "biuf":
            raise files.FileError(f"{name} must hold a volume [T, H, W], got {volume.dtype} {list(volume.shape)}")
        most = np.percentile(volume, 99.9)
        if not most > 0:
            raise files.FileError(f"{name} must hold numbers above 0")
        begins = [(n - min(n, side)) // 2 for n, side in zip(volume.shape, size, strict=True)]
        x = volume[tuple(slice(begin, begin + side) for begin, side in zip(begins, size, strict=True))]
        return torch.from_numpy(x / most).float().clamp(0, 1)[None]
    import av  # pip install av

    frames = []
    with files.named(Path(name)), av.open(name) as film:
        for frame in film.decode(video=0):
            frames.append(torch.from_numpy(frame.to_ndarray(format="rgb24")))
            if len(frames) == size[0]:
                break
    if not frames:
        raise files.FileError(f"{name} must hold frames, got none")
    film = torch.stack(frames).permute(0, 3, 1, 2) / 255
    return F.interpolate(film, size[1:], mode="bilinear", antialias=True).transpose(0, 1).contiguous()


def patches(volume: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, float, float]:
    """Return noisy patches of 3 x 3 x 3 as query and key [1, 1, N, .], the scale of scores, and alpha."""
    x = F.pad(volume + NOISE * torch.randn(volume.shape, generator=generator), [1] * 6, mode="replicate")
    for axis in (1, 2, 3):
        x = x.unfold(axis, 3, 1)
    patch = x.permute(1, 2, 3, 0, 4, 5, 6).reshape(volume[0].numel(), -1)
    patch = patch / (0.9 * NOISE * patch.shape[1] ** 0.5)
    patch = patch - patch.mean(0)
    if patch.shape[1] > DIM - 2:
        _, _, basis = torch.linalg.svd(patch[::7], full_matrices=False)
        patch = patch @ basis[: DIM - 2].mT
    square, one = patch.square().sum(-1, keepdim=True), torch.ones(len(patch), 1)
    query, key = torch.cat([2 * patch, -square, one], -1), torch.cat([patch, one, -square], -1)
    return query[None, None], key[None, None], 1.0, 1.5


def features(volume: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, float, float]:
    """Return features by two random convolutions likewise, scores of standard deviation 4."""
    x = volume[None] - 0.5
    for inside, outside, side in ((len(volume), 32, 5), (32, DIM, 3)):
        weight = torch.randn(outside, inside, side, side, side, generator=generator) / (inside * side**3) ** 0.5
        x = F.conv3d(x, weight, padding=side // 2).relu()
        x = (x - x.mean((2, 3, 4), keepdim=True)) / (x.std((2, 3, 4), keepdim=True) + 1e-3)
    x = x[0].flatten(1).mT
    first, second = torch.randn(2, DIM, DIM, generator=generator) / DIM**0.5
    query, key = x @ first, x @ (first + 0.5 * second)
    query = query * (4 / (query[::97] @ key.mT * DIM**-0.5).std())
    return query[None, None], key[None, None], DIM**-0.5, 1.0


INPUTS = {"patches": patches, "features": features}


def by_tiles(grid: tuple[int, ...], tile: tuple[int, ...]) -> Tensor:
    """Return the tokens of a grid in the order of tiles."""
    place = torch.cartesian_prod(*map(torch.arange, grid)) // torch.tensor(tile)
    _, down, across = (math.ceil(side / of) for side, of in zip(grid, tile, strict=True))
    return ((place[:, 0] * down + place[:, 1]) * across + place[:, 2]).argsort(stable=True)


def by_content(key: Tensor) -> Tensor:
    """Return the tokens in the order of halves along principal components of the keys [N, D]."""

    def split(tokens: Tensor) -> list[Tensor]:
        if len(tokens) <= BLOCK:
            return [tokens]
        x = key[tokens] - key[tokens].mean(0)
        _, vectors = torch.linalg.eigh(x.mT @ x)
        half = math.ceil(len(tokens) / 2 / BLOCK) * BLOCK
        ordered = tokens[(x @ vectors[:, -1]).argsort()]
        return split(ordered[:half]) + split(ordered[half:])

    return torch.cat(split(torch.arange(len(key))))


def active(rows: Tensor, columns: Tensor, order: Tensor) -> float:
    """Return the share of tiles of pairs that hold one of the pairs (rows, columns)."""
    block = torch.empty_like(order)
    block[order] = torch.arange(len(order)) // BLOCK
    blocks = math.ceil(len(order) / BLOCK)
    tiles = torch.zeros(blocks**2, dtype=torch.bool).index_fill_(0, block[rows] * blocks + block[columns], True)
    return tiles.float().mean().item()


def main(arguments: list[str] | None = None) -> list[list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="*", default=[SAMPLE], help=".npy volumes, or films (pip install av)")
    parser.add_argument(
        "--size",
        type=int,
        nargs=3,
        default=(16, 48, 64),
        metavar=("T", "H", "W"),
        help="taken of each input (16 48 64)",
    )
    options = parser.parse_args(arguments)
    if min(options.size) < 1:
        parser.error(f"--size must be at least 1 a side, got {options.size}")
    rows = []
    for name in options.inputs:
        volume = read(name, tuple(options.size))
        for kind, make in INPUTS.items():
            query, key, scale, alpha = make(volume, torch.Generator().manual_seed(0))
            graph = reciprocal_neighbors(query, key, alpha, scale=scale)
            n, columns = key.shape[2], graph.col_indices.long()
            of = torch.arange(n).repeat_interleave(graph.row_offsets.diff())
            orders = [by_tiles(tuple(volume.shape[1:]), tile) for tile in TILES] + [by_content(key[0, 0])]
            shares = [f"{active(of, columns, order):.2f}" for order in orders]
            rows.append([f"{Path(name).stem}, {kind}", f"{len(columns) / n**2:.1%}", *shares])
    print(table(["inputs", "survivors", *(" x ".join(map(str, tile)) for tile in TILES), "by content"], rows))
    return rows


if __name__ == "__main__":
    files.run(main)
