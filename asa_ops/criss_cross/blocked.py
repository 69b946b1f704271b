"""Criss-cross attention by batched products of rows and columns, in PyTorch: any device, any dtype.

O(H W (H + W)) memory for the scores, in three dimensions O(N (T + H + W)). The lines through a pixel share one softmax.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor


def fwd(query: Tensor, key: Tensor, value: Tensor, scale: float, out: Tensor, stats: Tensor) -> None:
    """Write into ``out`` and ``stats``."""
    q, k, v = map(_turns, _channels_last(query, key, value))
    scores = _scores(q, k, scale)
    largest = _join((line.amax(-1, keepdim=True) for line in scores), torch.maximum)
    lines = _exponentials(scores, largest)
    total = _join(line.sum(-1, keepdim=True) for line in lines)
    stats.copy_(torch.cat([largest, total], -1).movedim(-1, 1))
    out.copy_((_join(_products(lines, v)) / total).movedim(-1, 1))


def bwd(
    do: Tensor, query: Tensor, key: Tensor, value: Tensor, stats: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk, dv."""
    q, k, v, do_lines = map(_turns, _channels_last(query, key, value, do))
    largest, total = stats.movedim(1, -1).split(1, -1)
    exponentials = _exponentials(_scores(q, k, scale), largest)
    weights = [line / n for line, n in zip(exponentials, _turns(total), strict=True)]
    products = list(_products(do_lines, [x.mT for x in v]))
    delta = _turns(_join((p * dp).sum(-1, keepdim=True) for p, dp in zip(weights, products, strict=True)))
    ds = [scale * (p * (dp - d)) for p, dp, d in zip(weights, products, delta, strict=True)]
    dq = _join(_products(ds, k))
    dk = _join(_products([line.mT for line in ds], q))
    dv = _join(_products([line.mT for line in weights], do_lines))
    return dq.movedim(-1, 1), dk.movedim(-1, 1), dv.movedim(-1, 1)


def _channels_last(*maps: Tensor) -> list[Tensor]:
    """Return maps [B, C, H, W] as [B, H, W, C], at least in float32."""
    return [x.movedim(1, -1).to(torch.promote_types(x.dtype, torch.float32)) for x in maps]


def _turns(x: Tensor) -> list[Tensor]:
    """Return a map [B, H, W, C] once for each side, the last first, turned so that lines along that side are rows."""
    return [x.movedim(-2 - i, -2) for i in range(x.dim() - 2)]


def _join(turns: Iterable[Tensor], join: Callable[[Tensor, Tensor], Tensor] = torch.add) -> Tensor:
    """Turn maps, one for each side, back, and return what ``join`` makes of them."""
    turns = iter(turns)  # one at a time: they may be large
    joined = next(turns)
    for i, x in enumerate(turns, 1):
        joined = join(joined, x.movedim(-2, -2 - i))
    return joined


def _products(left: Sequence[Tensor], right: Sequence[Tensor]) -> Iterable[Tensor]:
    return (x @ y for x, y in zip(left, right, strict=True))


def _scores(q: Sequence[Tensor], k: Sequence[Tensor], scale: float) -> list[Tensor]:
    """Return scores with the row [B, H, W, W], and with the column [B, W, H, H], in it without the pixel itself."""
    scores = [scale * (x @ y.mT) for x, y in zip(q, k, strict=True)]
    for line in scores[1:]:
        line.diagonal(dim1=-2, dim2=-1).fill_(-torch.inf)
    return scores


def _exponentials(scores: Sequence[Tensor], largest: Tensor) -> list[Tensor]:
    return [(line - x).exp() for line, x in zip(scores, _turns(largest), strict=True)]
