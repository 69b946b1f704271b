"""Inputs that look like those of users, and ones that do not: the same for every benchmark, and for the tests.

Each factory returns query, key, value [N, D] and alpha, beta [N], float32, for a grid of one to three sides and a
generator.
"""

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from asa_ops.core.layout import to_tokens
from asa_ops.nn import AdaptiveSparseAttention

try:
    import skimage
except ImportError:  # a GPU machine has torch, Triton and NumPy
    skimage = None


def make(
    kind: str, grid: tuple[int, ...], dim: int, heads: int = 1, batch: int = 1, alpha: float | None = None
) -> list[Tensor]:
    """Return query, key, value [batch, heads, N, dim] and alpha, beta [batch, heads, N] of one kind, float32.

    Every head of every image has a seed of its own. ``alpha`` replaces the thresholds of all pixels.
    """
    parts = [INPUTS[kind](grid, dim, torch.Generator().manual_seed(seed)) for seed in range(batch * heads)]
    tensors = [torch.stack(each).unflatten(0, (batch, heads)) for each in zip(*parts, strict=True)]
    if alpha is not None:
        tensors[3] = torch.full_like(tensors[3], alpha)
    return tensors


def thresholds(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return alpha in [0.8, 2] and beta in [0.5, 1.5]."""
    alpha = torch.empty(n).uniform_(0.8, 2, generator=generator)
    return alpha, torch.empty(n).uniform_(0.5, 1.5, generator=generator)


def photograph(grid: tuple[int, ...]) -> Tensor:
    """Return a photograph [1, 3, H, W], colours in [0, 1]; without scikit-image shapes and texture, as in nature.

    Of three sides, a film of a camera that turns by a pixel from frame to frame [1, 3, T, H, W]; of one, a row.
    """
    if len(grid) == 3:
        frames, height, width = grid
        wide = photograph((height, width + frames - 1))
        return torch.stack([wide[..., t : t + width] for t in range(frames)], 2)
    if len(grid) == 1:
        return photograph((9, *grid))[:, :, 4]
    if skimage:
        image = skimage.transform.resize(skimage.data.astronaut() / 255, grid, anti_aliasing=True)
        return torch.from_numpy(image).float().permute(2, 0, 1)[None]
    generator = torch.Generator().manual_seed(0)
    picture = torch.zeros(1, 3, 512, 512)
    for cells in (4, 8, 16, 32, 64, 128):
        layer = torch.randn(1, 3, cells, cells, generator=generator) / cells**0.7
        picture += F.interpolate(layer, (512, 512), mode="bicubic")
    picture = (picture - picture.amin()) / (picture.amax() - picture.amin())
    return F.interpolate(picture, grid, mode="bilinear", antialias=True)


def labels(grid: tuple[int, ...], dim: int, generator: torch.Generator) -> list[Tensor]:
    """Features of 19 regions, one direction a region and noise on top: 3 to 5 % of all pairs survive.

    The regions are those of a Voronoi map with wobbling borders.
    """
    n, centres = math.prod(grid), torch.rand(19, len(grid), generator=generator) * torch.tensor(grid)
    pixels = torch.cartesian_prod(*map(torch.arange, grid)).view(n, -1)
    pixels = pixels + torch.randn(pixels.shape, generator=generator) * 0.6
    label = torch.cdist(pixels, centres).argmin(-1)
    directions = torch.randn(2, 19, dim, generator=generator) * 0.25
    directions += F.normalize(torch.randn(19, dim, generator=generator), dim=-1) * dim**0.5
    noise = torch.randn(2, n, dim, generator=generator)
    query, key = directions[:, label] * 1.35 + noise * 0.95
    return [query, key, torch.randn(n, dim, generator=generator), *thresholds(n, generator)]


def photo(grid: tuple[int, ...], dim: int, generator: torch.Generator) -> list[Tensor]:
    """Patches of a noisy photograph as queries and keys (non-local means), 5 x 5, or 3 x 3 x 3, with enough channels.

    s_ij = -||p_i - p_j||^2 / h^2 takes two channels besides the patch; of patches that do not fit the principal
    components are taken.
    """
    n, image = math.prod(grid), photograph(grid)
    noise = np.random.default_rng(generator.initial_seed()).normal(0, 0.1, image.shape)
    side = 1 if min(grid) < 3 else 3 if len(grid) == 3 else 5  # reflected borders need pixels
    patches = F.pad(image + torch.from_numpy(noise).float(), [side // 2] * 2 * len(grid), mode="reflect")
    for axis in range(len(grid)):
        patches = patches.unfold(2 + axis, side, 1)
    axes = tuple(range(1, 1 + len(grid)))
    patch = patches[0].movedim(axes, [axis - 1 - len(grid) for axis in axes]).reshape(-1, n).mT
    patch = patch / (0.9 * 0.1 * (3 * side ** len(grid)) ** 0.5)
    patch = patch - patch.mean(0)
    if dim < patch.shape[1] + 2:
        _, _, basis = torch.linalg.svd(patch, full_matrices=False)
        patch = patch @ basis[: max(dim - 2, 0)].mT
    square, one = patch.square().sum(-1, keepdim=True), torch.ones(n, 1)
    query, key = torch.cat([2 * patch, -square, one], -1), torch.cat([patch, one, -square], -1)
    query, key = (F.pad(x, (0, dim - x.shape[1])) for x in (query, key))  # of dim 1, cuts one off
    return [query * dim**0.5, key, torch.randn(n, dim, generator=generator), *thresholds(n, generator)]


def features(grid: tuple[int, ...], channels: int, generator: torch.Generator) -> Tensor:
    """Return features [1, channels, *grid] of a photograph by two random convolutions, each channel normalised."""
    x, sides = photograph(grid) - 0.5, tuple(range(2, 2 + len(grid)))
    convolve = (F.conv1d, F.conv2d, F.conv3d)[len(grid) - 1]
    for inside, outside, side in ((3, 32, 7), (32, channels, 3)):
        kernel = (side,) * len(grid)
        weight = torch.randn(outside, inside, *kernel, generator=generator) / (inside * math.prod(kernel)) ** 0.5
        x = convolve(x, weight, padding=side // 2).relu()
        # Over the map; a map of one pixel has no deviation.
        x = (x - x.mean(sides, keepdim=True)) / (x.std(sides, keepdim=True, correction=0) + 1e-3)
    return x


def conv(grid: tuple[int, ...], dim: int, generator: torch.Generator) -> list[Tensor]:
    """Random-convolution features of a photograph, scores of standard deviation 4, alpha = beta = 1: 2 % survive."""
    x = to_tokens(features(grid, dim, generator))
    first, second, third = torch.randn(3, dim, dim, generator=generator) / dim**0.5
    query, key, value = x @ first, x @ (first + 0.5 * second), x @ third  # alike, as those that match alike things
    sample = query[:, :, :: max(1, query.shape[2] // 512)] @ key.mT * dim**-0.5
    query = query * (4 / (sample.std(correction=0) + 1e-6))
    return [query[0, 0], key[0, 0], value[0, 0], *torch.ones(2, query.shape[2])]


def iid(grid: tuple[int, ...], dim: int, generator: torch.Generator) -> list[Tensor]:
    """Independent normal queries and keys: no structure to find, survivors everywhere."""
    n = math.prod(grid)
    return [*torch.randn(3, n, dim, generator=generator), *thresholds(n, generator)]


def near_dense(grid: tuple[int, ...], dim: int, generator: torch.Generator) -> list[Tensor]:
    """What a module at its default initialisation makes of convolution features: nearly every pair survives."""
    x = features(grid, 2 * dim, generator)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(generator.initial_seed())
        tokens = AdaptiveSparseAttention(2 * dim, dims=len(grid)).tokens(x)
    return [tokens[name][0, 0] for name in ("query", "key", "value", "alpha", "beta")]


def all_dense(grid: tuple[int, ...], dim: int, generator: torch.Generator) -> list[Tensor]:
    """Thresholds of 0: every pair survives."""
    return [x if i < 3 else torch.zeros_like(x) for i, x in enumerate(iid(grid, dim, generator))]


INPUTS = {"photo": photo, "labels": labels, "conv": conv, "iid": iid, "near-dense": near_dense, "dense": all_dense}
