"""The public function of squeeze-and-attention."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import checks
from ..precision import at_least_float32, cast_under_autocast, outside_autocast


def squeeze_and_attention(
    residual: Tensor,
    attention: Tensor,
    *,
    pool: int = 2,
    activation: str | None = "sigmoid",
    upsample: str = "nearest",
) -> Tensor:
    """Gate a map by a pooled one, and add the gate.

    Formulas: ``asa_ops/squeeze_and_attention/__init__.py``. Source: Zhong et al., CVPR 2020.

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
        a = F.interpolate(a, (expected[2] * pool, expected[3] * pool), mode=upsample)[..., :height, :width]
        return torch.addcmul(a, a, r).to(residual.dtype)
