"""What layers need of the other processes where each holds a strip of rows of one map; all with gradients."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..core.contracts import at_least_float32
from . import collectives


def with_halo(x: Tensor, group: dist.ProcessGroup, rows: Sequence[int]) -> Tensor:
    """Return the strip ``x`` [B, C, rows, W] between the rows above and below it, zeros beyond the map.

    Args:
        x: of this process.
        group: of all processes that hold a strip, in the order of the map.
        rows: how many each has.

    Returns:
        [B, C, rows + 2, W].
    """
    return _Halo.apply(x, group, rows)


class _Halo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, rows: Sequence[int]) -> Tensor:
        ctx.group, ctx.rows = group, rows
        above, below = _exchange(group, rows, x[:, :, :1], x[:, :, -1:])
        return torch.cat([above, x, below], 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        own = grad[:, :, 1:-1].clone()
        above, below = _exchange(ctx.group, ctx.rows, grad[:, :, :1], grad[:, :, -1:])
        own[:, :, :1] += above
        own[:, :, -1:] += below
        return own, None, None


def _exchange(group: dist.ProcessGroup, rows: Sequence[int], first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """Send a row [B, C, 1, W] to the strips above and below; return theirs, zeros beyond the map.

    A process without rows sends nothing, and is passed over.
    """
    rank, ranks = dist.get_rank(group), range(len(rows))
    above = next((r for r in reversed(ranks[:rank]) if rows[r] and rows[rank]), None)
    below = next((r for r in ranks[rank + 1 :] if rows[r] and rows[rank]), None)
    (batch, channels, _, width), to = first.shape, {above: first, below: last}
    nothing = first.new_zeros(batch, channels, 1, width)
    if not batch:  # so everywhere
        return nothing, nothing
    pieces = [[to[r] if r in to else nothing[:, :, :0]] for r in ranks]
    (received,) = collectives.exchange_rows(group, pieces, [piece.shape[2] for (piece,) in pieces])
    received = iter(received.split(1, 2))
    return (nothing if above is None else next(received)), (nothing if below is None else next(received))


def batch_norm(norm: nn.Module, x: Tensor, group: dist.ProcessGroup, rows: int) -> Tensor:
    """Return ``norm`` of a strip ``x`` [B, C, n, W] of a map of ``rows`` rows.

    In training ``BatchNorm2d`` uses, and remembers, the mean and variance of the whole map: torch's ``SyncBatchNorm``
    does so on GPUs alone. Anything else is applied to the strip as it is.
    """
    if not isinstance(norm, nn.BatchNorm2d) or not (norm.training or norm.running_mean is None):
        return norm(x)
    n = x.shape[0] * rows * x.shape[3]
    (y,) = at_least_float32(x)
    mean = _Sum.apply(y.sum((0, 2, 3)), group) / n
    y = y - mean[:, None, None]
    variance = _Sum.apply(y.square().sum((0, 2, 3)), group) / n
    if norm.training and norm.running_mean is not None and norm.running_var is not None:
        assert norm.num_batches_tracked is not None  # as of every norm that remembers
        with torch.no_grad():
            norm.num_batches_tracked += 1
            weight = 1 / norm.num_batches_tracked.item() if norm.momentum is None else norm.momentum
            norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), weight)
            norm.running_var.lerp_((variance * (n / max(n - 1, 1))).to(norm.running_var.dtype), weight)
    y = y * (variance + norm.eps).rsqrt()[:, None, None]
    if norm.affine:
        y = y * norm.weight[:, None, None] + norm.bias[:, None, None]
    return y.to(x.dtype)


class _Sum(torch.autograd.Function):
    """The sum of a tensor of every process."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = x.detach().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        total = grad.contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None
