"""Feature maps as tokens: [B, C, H, W] <-> [B, heads, N, D] with N = H * W in raster order.

And [B, C, L], N = L, and [B, C, T, H, W], N = T * H * W.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}  # torch's names of linear interpolation, by dimensions


def to_tokens(x: Tensor, heads: int = 1) -> Tensor:
    """Return the feature map ``x`` [B, C, H, W] as tokens [B, heads, H * W, C // heads] (a view where possible)."""
    batch, channels, *grid = x.shape
    return _no_view(x.reshape(batch, heads, channels // heads, math.prod(grid)).transpose(-1, -2))


def to_map(tokens: Tensor, grid: Sequence[int]) -> Tensor:
    """Return tokens [B, heads, H * W, D] as a contiguous feature map [B, heads * D, H, W]."""
    batch, heads, _, dim = tokens.shape
    return _no_view(tokens).transpose(-1, -2).reshape(batch, heads * dim, *grid).contiguous()


def _no_view(tokens: Tensor) -> Tensor:
    """Return the tokens, under torch.compile not as a view of a transposed map.

    torch 2.13 cannot compile the training of a 1x1 convolution before or after such a view if sizes are variables, and
    a traced function cannot ask whether they are.
    """
    return tokens.contiguous() if torch.compiler.is_compiling() else tokens


def padding_to_multiples(grid: Sequence[int], factors: Sequence[int]) -> list[tuple[int, int]]:
    """Return the padding of each side, before and after, that makes it a multiple of its factor, centred."""
    return [(-side % factor // 2, (1 + -side % factor) // 2) for side, factor in zip(grid, factors, strict=True)]


def pad(x: Tensor, around: Sequence[tuple[int, int]]) -> Tensor:
    """Return ``x`` with zeros around its last dimensions, so many before and after each."""
    return F.pad(x, [size for side in reversed(around) for size in side])


def crop(x: Tensor, around: Sequence[tuple[int, int]], grid: Sequence[int]) -> Tensor:
    """Return what :func:`pad` padded, whose last dimensions have the sides ``grid``."""
    inside: Any = [slice(before, before + side) for (before, _), side in zip(around, grid, strict=True)]
    return x[(..., *inside)]
