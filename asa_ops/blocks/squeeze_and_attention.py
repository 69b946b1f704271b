"""Squeeze-and-attention: convolutions on a pooled map gate convolutions on the map, and are added to them.

Source: Z. Zhong, Z. Lin, R. Bidart, X. Hu, I. Ben Daya, Z. Li, W.-S. Zheng, J. Li and A. Wong, Squeeze-and-Attention
Networks for Semantic Segmentation, CVPR 2020. The authors published no code that we know of: pooling size and
up-sampling are those of third-party code.

With r the residual branch [C, H, W] and s the attention branch on a map pooled by p x p pixels::

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

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core import checks
from ..core.contracts import at_least_float32, cast_under_autocast, outside_autocast, takes_dtensors


@takes_dtensors(residual="bh..", attention="bh..", out="bh..")
def squeeze_and_attention(
    residual: Tensor,
    attention: Tensor,
    *,
    pool: int = 2,
    activation: str | None = "sigmoid",
    upsample: str = "nearest",
) -> Tensor:
    """Gate a map by a pooled one, and add the gate.

    Formulas: ``help(asa_ops.blocks.squeeze_and_attention)``. Source: Zhong et al., CVPR 2020.

    Args:
        residual: [B, C, H, W], floating point.
        attention: [B, C, ceil(H / pool), ceil(W / pool)], before its activation; position (r, c) belongs to the window
            of ``pool`` x ``pool`` pixels at (r * pool, c * pool).
        pool: side of a window.
        activation: "sigmoid", or None.
        upsample: "nearest" or "bilinear".

    Returns:
        [B, C, H, W] in the dtype of ``residual``.

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
    checks.check_tensor("residual", residual, "[B, C, H, W]")
    checks.check_floating("residual", residual)
    checks.check_tensor("attention", attention, "[B, C, H / pool, W / pool]")
    checks.check_like("attention", attention, residual, "residual")
    pool = checks.as_positive_int("pool", pool)
    checks.check_choice("activation", activation, ("sigmoid", None))
    checks.check_choice("upsample", upsample, ("nearest", "bilinear"))
    batch, channels, height, width = residual.shape
    expected = batch, channels, -(-height // pool), -(-width // pool)
    if attention.shape != expected:
        raise ValueError(
            f"attention must be [B, C, ceil(H / pool), ceil(W / pool)] = {list(expected)} for pool={pool} and "
            f"{checks.describe(residual)}, got {checks.describe(attention)}"
        )
    with outside_autocast(residual.device.type):
        r, a = at_least_float32(residual, attention)
        if activation == "sigmoid":
            a = a.sigmoid()
        if torch.compiler.is_compiling():  # cutting off what is too much would tie a program to even or odd sizes
            a = _enlarge_both(a, r, pool, upsample)
        else:
            a = F.interpolate(a, (expected[2] * pool, expected[3] * pool), mode=upsample)[..., :height, :width]
        return torch.addcmul(a, a, r).to(residual.dtype)


def reference_squeeze_and_attention(
    residual: Tensor,
    attention: Tensor,
    *,
    pool: int = 2,
    activation: str | None = "sigmoid",
    upsample: str = "nearest",
) -> Tensor:
    """The specification of :func:`squeeze_and_attention`: any dtype, differentiable twice."""
    with outside_autocast(residual.device.type):
        r, a = at_least_float32(residual, attention)
        if activation == "sigmoid":
            a = a.sigmoid()
        a = _enlarge_both(a, r, pool, upsample)
        return (a * r + a).to(residual.dtype)


def _enlarge_both(a: Tensor, r: Tensor, pool: int, upsample: str) -> Tensor:
    for axis, size in ((-2, r.shape[-2]), (-1, r.shape[-1])):
        a = _enlarge(a, axis, size, pool, upsample)
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
