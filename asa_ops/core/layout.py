"""Feature maps as tokens: [B, C, H, W] <-> [B, heads, N, D] with N = H * W in raster order."""

from collections.abc import Sequence

import torch
from torch import Tensor


def to_tokens(x: Tensor, heads: int = 1) -> Tensor:
    """Return the feature map ``x`` [B, C, H, W] as tokens [B, heads, H * W, C // heads] (a view where possible)."""
    batch, channels, height, width = x.shape
    return _no_view(x.reshape(batch, heads, channels // heads, height * width).transpose(-1, -2))


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


def padding_to_multiples(grid: tuple[int, int], factors: tuple[int, int]) -> list[int]:
    """Return the padding [left, right, top, bottom] that makes the sides of a map multiples of ``factors``, centred."""
    (top, bottom), (left, right) = (
        (-side % factor // 2, (1 + -side % factor) // 2) for side, factor in zip(grid, factors, strict=True)
    )
    return [left, right, top, bottom]
