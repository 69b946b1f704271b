"""Feature maps as tokens: [B, C, H, W] <-> [B, heads, N, D] with N = H * W in raster order, and windows on the grid."""

from collections.abc import Iterable

import torch
from torch import Tensor


def to_tokens(x: Tensor, heads: int = 1) -> Tensor:
    """Return the feature map ``x`` [B, C, H, W] as tokens [B, heads, H * W, C // heads] (a view where possible)."""
    batch, channels, height, width = x.shape
    return x.reshape(batch, heads, channels // heads, height * width).transpose(-1, -2)


def to_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return tokens [B, heads, H * W, D] as a contiguous feature map [B, heads * D, H, W]."""
    batch, heads, _, dim = tokens.shape
    return tokens.transpose(-1, -2).reshape(batch, heads * dim, *grid).contiguous()


def padding_to_multiples(grid: tuple[int, int], factors: tuple[int, int]) -> list[int]:
    """Return the padding [left, right, top, bottom] that makes the sides of a map multiples of ``factors``, centred."""
    (top, bottom), (left, right) = (
        (-side % factor // 2, (1 + -side % factor) // 2) for side, factor in zip(grid, factors, strict=True)
    )
    return [left, right, top, bottom]


def csr_of_rows(rows: Iterable[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return row_offsets (int64) and col_indices (int32) of a boolean matrix given block of rows by block of rows."""
    counts, columns = (
        [torch.zeros(1, dtype=torch.int64, device=device)],
        [torch.zeros(0, dtype=torch.int32, device=device)],
    )
    for block in rows:
        counts.append(block.sum(-1))
        columns.append(block.nonzero()[:, 1].to(torch.int32))
    return torch.cat(counts).cumsum(0), torch.cat(columns)


def window_columns(grid: tuple[int, int], window: int, rows: slice, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the tokens of the square window around every token in ``rows``.

    Args:
        grid: (H, W) of the token grid.
        window: odd side of the window.
        rows: contiguous range of tokens, in raster order.
        device: where the result lies.

    Returns:
        columns: int64 [rows, window**2], offsets in raster order (the centre in the middle, offset o opposite to offset
            window**2 - 1 - o). Where the window leaves the grid the column is the row's own token.
        inside: bool [rows, window**2], False where the window leaves the grid.
    """
    height, width = grid
    reach = torch.arange(-(window // 2), window // 2 + 1, device=device)
    token = torch.arange(rows.start, rows.stop, device=device)[:, None]
    r = token // width + reach.repeat_interleave(window)
    c = token % width + reach.repeat(window)
    inside = (r >= 0) & (r < height) & (c >= 0) & (c < width)
    return torch.where(inside, r * width + c, token), inside
