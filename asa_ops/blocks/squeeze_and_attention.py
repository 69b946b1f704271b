"""Squeeze-and-attention: convolutions on a pooled map gate convolutions on the map, and are added to them.

Source: Z. Zhong, Z. Lin, R. Bidart, X. Hu, I. Ben Daya, Z. Li, W.-S. Zheng, J. Li and A. Wong, Squeeze-and-Attention
Networks for Semantic Segmentation, CVPR 2020. The authors published no code that we know of: pooling size and
up-sampling are those of third-party code.

With r the residual branch [C, H, W] and s the attention branch on a map pooled by p x p pixels (or, in one dimension or
three, by intervals or boxes)::

    a = up(sigmoid(s))                   nearest, or bilinear between the centres of the p x p windows
    out = a r + a

The block (:class:`asa_ops.nn.SqueezeAndAttention`) has r = f(x) and s = g(pool(x)), f and g two 3 x 3 convolutions each
with batch norm and ReLU, and mean pooling.

Cost: 2 N C operations and 3 N C memory; the block's convolutions dominate, 18 N (1 + 1 / p^2) (C_in + C) C operations.

What it attends to: what the attention branch's convolutions see, 5 x 5 windows of p x p pixels. The weights are per
channel, and as s comes from a ReLU lie in [0.5, 1).

Differences from the code it is compared with: maps whose sides p does not divide fail there; here the last windows are
smaller. Bilinear up-sampling is ours. Copies without the sigmoid circulate: ``activation=None``.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core import checks
from ..core.contracts import at_least_float32, cast_under_autocast, outside_autocast, takes_dtensors
from ..core.layout import LINEAR


def check_upsample(upsample: str, dims: int) -> None:
    """Check how a map of ``dims`` dimensions is to be enlarged."""
    checks.check_choice("upsample", upsample, ("nearest", LINEAR[dims]))


@takes_dtensors(residual="bh", attention="bh", out="bh")
def squeeze_and_attention(
    residual: Tensor,
    attention: Tensor,
    *,
    pool: int | Sequence[int] = 2,
    activation: str | None = "sigmoid",
    upsample: str = "nearest",
) -> Tensor:
    """Gate a map by a pooled one, and add the gate.

    Formulas: ``help(asa_ops.blocks.squeeze_and_attention)``. Source: Zhong et al., CVPR 2020.

    Args:
        residual: [B, C, H, W], floating point; or [B, C, L] or [B, C, T, H, W].
        attention: [B, C, ceil(H / pool), ceil(W / pool)], before its activation; position (r, c) belongs to the window
            of ``pool`` x ``pool`` pixels at (r * pool, c * pool).
        pool: side of a window, or one for each side of the map.
        activation: "sigmoid", or None.
        upsample: "nearest" or "bilinear"; "linear" in one dimension, "trilinear" in three.

    Returns:
        The shape and the dtype of ``residual``.

    Raises:
        ValueError: shapes or options that do not fit.
        TypeError: dtypes that do not.

    Example:
        >>> import torch
        >>> from asa_ops import squeeze_and_attention
        >>> squeeze_and_attention(torch.randn(1, 16, 25, 32), torch.randn(1, 16, 13, 16)).shape
        torch.Size([1, 16, 25, 32])
    """
    residual, attention = cast_under_autocast(residual=residual, attention=attention)
    dims = checks.as_map_dims("residual", residual, 1, 2, 3)
    checks.check_floating("residual", residual)
    names = checks.SIDES[dims]
    checks.check_tensor("attention", attention, f"[B, C, {', '.join(f'{side} / pool' for side in names)}]")
    checks.check_like("attention", attention, residual, "residual")
    pools = checks.as_each_side("pool", pool, dims)
    checks.check_choice("activation", activation, ("sigmoid", None))
    check_upsample(upsample, dims)
    batch, channels, *grid = residual.shape
    windows = [-(-side // p) for side, p in zip(grid, pools, strict=True)]
    if attention.shape != (batch, channels, *windows):
        raise ValueError(
            f"attention must be [B, C, {', '.join(f'ceil({side} / pool)' for side in names)}] = "
            f"{[batch, channels, *windows]} for pool={pool} and {checks.describe(residual)}, "
            f"got {checks.describe(attention)}"
        )
    with outside_autocast(residual.device.type):
        r, a = at_least_float32(residual, attention)
        if activation == "sigmoid":
            a = a.sigmoid()
        if torch.compiler.is_compiling():  # cutting off what is too much would tie a program to even or odd sizes
            a = _enlarge_all(a, r, pools, upsample)
        else:
            a = F.interpolate(a, [n * p for n, p in zip(windows, pools, strict=True)], mode=upsample)
            inside: Any = map(slice, grid)
            a = a[(..., *inside)]
        return torch.addcmul(a, a, r).to(residual.dtype)


def reference_squeeze_and_attention(
    residual: Tensor,
    attention: Tensor,
    *,
    pool: int | Sequence[int] = 2,
    activation: str | None = "sigmoid",
    upsample: str = "nearest",
) -> Tensor:
    """The specification of :func:`squeeze_and_attention`: any dtype, differentiable twice."""
    with outside_autocast(residual.device.type):
        r, a = at_least_float32(residual, attention)
        if activation == "sigmoid":
            a = a.sigmoid()
        a = _enlarge_all(a, r, checks.as_each_side("pool", pool, r.dim() - 2), upsample)
        return (a * r + a).to(residual.dtype)


def _enlarge_all(a: Tensor, r: Tensor, pools: Sequence[int], upsample: str) -> Tensor:
    for axis, pool in zip(range(-len(pools), 0), pools, strict=True):
        a = _enlarge(a, axis, r.shape[axis], pool, upsample)
    return a


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
