"""Inputs that look like those of users, and ones that do not: the same for every benchmark.

Each factory returns query, key, value [1, 1, N, D] and alpha, beta [1, 1, N], float32, for a square grid.
"""

import numpy as np
import skimage
import torch
from torch import Tensor

SIDES = {4096: 64, 9409: 97, 16384: 128}


def thresholds(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return alpha in [0.8, 2] and beta in [0.5, 1.5]."""
    alpha = torch.empty(1, 1, n).uniform_(0.8, 2, generator=generator)
    beta = torch.empty(1, 1, n).uniform_(0.5, 1.5, generator=generator)
    return alpha, beta


def label_map(side: int, regions: int, generator: torch.Generator) -> Tensor:
    """Return labels [side * side] of a Voronoi map with wobbling borders."""
    centres = torch.rand(regions, 2, generator=generator) * side
    r, c = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    pixels = torch.stack([r, c], -1).reshape(-1, 2) + torch.randn(side * side, 2, generator=generator) * 0.6
    return torch.cdist(pixels.float(), centres).argmin(-1)


def labels(n: int, dim: int, seed: int = 0) -> list[Tensor]:
    """Features of 19 regions, one direction a region and noise on top: 3 to 5 % of all pairs survive."""
    generator = torch.Generator().manual_seed(seed)
    label = label_map(SIDES[n], 19, generator)
    directions = torch.randn(2, 19, dim, generator=generator) * 0.25
    directions += torch.nn.functional.normalize(torch.randn(19, dim, generator=generator), dim=-1) * dim**0.5
    noise = torch.randn(2, n, dim, generator=generator)
    query, key = (directions[i][label] * 1.35 + noise[i] * 0.95 for i in range(2))
    value = torch.randn(n, dim, generator=generator)
    return [query[None, None], key[None, None], value[None, None], *thresholds(n, generator)]


def photo(n: int, dim: int, seed: int = 0) -> list[Tensor]:
    """Patches of a photograph as queries and keys (non-local means), in ``dim`` channels by a random rotation."""
    generator = torch.Generator().manual_seed(seed)
    side = SIDES[n]
    image = skimage.transform.resize(skimage.data.astronaut() / 255, (side, side), anti_aliasing=True)
    image = torch.from_numpy(image + np.random.default_rng(seed).normal(0, 0.1, image.shape)).float()
    padded = torch.nn.functional.pad(image.permute(2, 0, 1)[None], [2] * 4, mode="reflect")
    patch = torch.nn.functional.unfold(padded, 5)[0].mT / (0.9 * 0.1 * 75**0.5)
    patch = patch - patch.mean(0)
    square, one = patch.square().sum(-1, keepdim=True), torch.ones(n, 1)
    query, key = torch.cat([2 * patch, -square, one], -1), torch.cat([patch, one, -square], -1)
    if dim < 77:
        _, _, basis = torch.linalg.svd(patch, full_matrices=False)
        patch = patch @ basis[: dim - 2].mT
        query, key = torch.cat([2 * patch, -square, one], -1), torch.cat([patch, one, -square], -1)
    query, key = (torch.nn.functional.pad(x, (0, dim - x.shape[1])) for x in (query, key))
    value = torch.randn(n, dim, generator=generator)
    return [query[None, None] * dim**0.5, key[None, None], value[None, None], *thresholds(n, generator)]


def iid(n: int, dim: int, seed: int = 0) -> list[Tensor]:
    """Independent normal queries and keys: no structure to find."""
    generator = torch.Generator().manual_seed(seed)
    return [*torch.randn(3, 1, 1, n, dim, generator=generator), *thresholds(n, generator)]


def all_dense(n: int, dim: int, seed: int = 0) -> list[Tensor]:
    """Thresholds of 0: every pair survives."""
    return [x if i < 3 else torch.zeros_like(x) for i, x in enumerate(iid(n, dim, seed))]


def a_third(n: int, dim: int, seed: int = 0) -> list[Tensor]:
    """Thresholds of 0.5: a third of all pairs survive, too many for lists and few for whole rows."""
    query, key, value, alpha, beta = iid(n, dim, seed)
    return [query, key, value, torch.full_like(alpha, 0.5), torch.ones_like(beta)]


INPUTS = {"labels": labels, "photo": photo, "iid": iid, "third": a_third, "dense": all_dense}
