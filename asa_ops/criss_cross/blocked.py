"""Criss-cross attention by batched products of rows and columns, in PyTorch: any device, any dtype.

O(H W (H + W)) memory for the scores. The row and the column of a pixel share one softmax.
"""

import torch
from torch import Tensor


def fwd(query: Tensor, key: Tensor, value: Tensor, scale: float, out: Tensor, stats: Tensor) -> None:
    """Write into ``out`` and ``stats``."""
    q, k, v = _in_rows(query, key, value)
    scores = _scores(q, k, scale)
    largest = torch.maximum(scores[0].amax(-1), _turn(scores[1].amax(-1)))
    row, column = _exponentials(scores, largest)
    total = row.sum(-1) + _turn(column.sum(-1))
    stats.copy_(torch.stack([largest, total], 1))
    result = row @ v
    result += _turn(column @ _turn(v))
    out.copy_((result / total[..., None]).permute(0, 3, 1, 2))


def bwd(
    do: Tensor, query: Tensor, key: Tensor, value: Tensor, stats: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk, dv."""
    q, k, v, do = _in_rows(query, key, value, do)
    largest, total = stats.unbind(1)
    row, column = _exponentials(_scores(q, k, scale), largest)
    weights = row / total[..., None], column / _turn(total)[..., None]
    products = do @ v.mT, _turn(do) @ _turn(v).mT
    means = [(p * dp).sum(-1) for p, dp in zip(weights, products, strict=True)]
    delta = means[0] + _turn(means[1])
    row, column = (p * (dp - d[..., None]) for p, dp, d in zip(weights, products, (delta, _turn(delta)), strict=True))
    row, column = scale * row, scale * column
    dq = row @ k + _turn(column @ _turn(k))
    dk = row.mT @ q + _turn(column.mT @ _turn(q))
    dv = weights[0].mT @ do + _turn(weights[1].mT @ _turn(do))
    dq, dk, dv = (x.permute(0, 3, 1, 2) for x in (dq, dk, dv))
    return dq, dk, dv


def _in_rows(*maps: Tensor) -> list[Tensor]:
    """Return maps [B, C, H, W] as [B, H, W, C], at least in float32."""
    return [x.permute(0, 2, 3, 1).to(torch.promote_types(x.dtype, torch.float32)) for x in maps]


def _turn(x: Tensor) -> Tensor:
    """Exchange rows and columns of [B, H, W, ...]."""
    return x.transpose(1, 2)


def _scores(q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return scores with the row [B, H, W, W], and with the column without the pixel itself [B, W, H, H]."""
    row, column = scale * (q @ k.mT), scale * (_turn(q) @ _turn(k).mT)
    column.diagonal(dim1=-2, dim2=-1).fill_(-torch.inf)
    return row, column


def _exponentials(scores: tuple[Tensor, Tensor], largest: Tensor) -> tuple[Tensor, Tensor]:
    row, column = scores
    return (row - largest[..., None]).exp(), (column - _turn(largest)[..., None]).exp()
