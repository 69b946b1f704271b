"""Squeeze-and-attention in readable PyTorch: the specification. Any dtype, differentiable twice."""

import torch
from torch import Tensor

from ..precision import at_least_float32, outside_autocast


def squeeze_and_attention(
    residual: Tensor,
    attention: Tensor,
    *,
    pool: int = 2,
    activation: str | None = "sigmoid",
    upsample: str = "nearest",
) -> Tensor:
    """Compute :func:`asa_ops.squeeze_and_attention`; see there for the arguments."""
    with outside_autocast(residual.device.type):
        r, a = at_least_float32(residual, attention)
        if activation == "sigmoid":
            a = a.sigmoid()
        for axis, size in ((-2, r.shape[-2]), (-1, r.shape[-1])):
            a = _enlarge(a, axis, size, pool, upsample)
        return (a * r + a).to(residual.dtype)


def _enlarge(a: Tensor, axis: int, size: int, pool: int, upsample: str) -> Tensor:
    """Return ``a`` with ``size`` positions along ``axis``, the window that position i comes from being i // pool."""
    i = torch.arange(size, device=a.device)
    if upsample == "nearest":
        return a.index_select(axis, i // pool)
    last = a.shape[axis] - 1
    centre = ((i.to(a.dtype) + 0.5) / pool - 0.5).clamp(min=0)  # in units of windows
    low = centre.long()
    share = (centre - low).unflatten(0, (-1, *[1] * (-axis - 1)))
    return a.index_select(axis, low) * (1 - share) + a.index_select(axis, (low + 1).clamp(max=last)) * share
