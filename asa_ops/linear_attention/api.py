"""The public functions of linear attention. All sums run over columns: tokens of a map are columns in memory."""

import torch
from torch import Tensor

from .. import checks
from ..precision import at_least_float32, cast_under_autocast, outside_autocast
from .reference import unit


def linear_attention(query: Tensor, key: Tensor, value: Tensor, *, eps: float = 1e-6) -> Tensor:
    """Attend from every position to every position with weights 1 + cosine(query, key), in linear time.

    Formulas: ``asa_ops/linear_attention/__init__.py``. Source: Li, Su, Duan and Zheng, arXiv 2007.14902 (2020).

    Args:
        query: [B, heads, N_q, D], floating point; need not be normalised.
        key: [B, heads, N_k, D], the same.
        value: [B, heads, N_k, Dv].
        eps: added to every channel of the sum of keys in the normaliser.

    Returns:
        [B, heads, N_q, Dv] in the dtype of ``query``.

    Raises:
        ValueError: shapes that do not fit.
        TypeError: dtypes that do not.

    Example:
        >>> import torch
        >>> from asa_ops import linear_attention
        >>> q, k, v = torch.randn(3, 1, 2, 24 * 32, 16)
        >>> linear_attention(q, k, v).shape
        torch.Size([1, 2, 768, 16])
    """
    query, key, value = cast_under_autocast(query=query, key=key, value=value)
    checks.check_qkv(query, key, value)
    eps = checks.as_number("eps", eps)
    with outside_autocast(query.device.type):
        q, k, v = at_least_float32(query, key, value)
        q, k, v = unit(q).mT, unit(k).mT, v.mT
        normaliser = k.shape[-1] + ((k.sum(-1, keepdim=True) + eps) * q).sum(-2, keepdim=True)
        k = torch.cat([k, torch.ones_like(k[..., :1, :])], -2)
        q = torch.cat([q, torch.ones_like(q[..., :1, :])], -2) / normaliser
        return ((v @ k.mT) @ q).mT.to(query.dtype)


def channel_linear_attention(x: Tensor, *, eps: float = 1e-6) -> Tensor:
    """Attend from every channel to every channel, without a softmax.

    Formulas: ``asa_ops/linear_attention/__init__.py``. Source: Li, Su, Duan and Zheng, arXiv 2007.14902 (2020).

    Args:
        x: [B, heads, N, C], floating point: query, key and value at once.
        eps: as in :func:`linear_attention`.

    Returns:
        [B, heads, N, C] in the dtype of ``x``.

    Raises:
        ValueError: shapes that do not fit.
        TypeError: dtypes that do not.

    Example:
        >>> import torch
        >>> from asa_ops import channel_linear_attention
        >>> channel_linear_attention(torch.randn(1, 2, 24 * 32, 16)).shape
        torch.Size([1, 2, 768, 16])
    """
    (x,) = cast_under_autocast(x=x)
    checks.check_tensor("x", x, "[B, heads, N, C]")
    checks.check_floating("x", x)
    eps = checks.as_number("eps", eps)
    with outside_autocast(x.device.type):
        (values,) = at_least_float32(x)
        u, values = unit(values).mT, values.mT
        normaliser = x.shape[-2] + u @ (u.sum(-2, keepdim=True) + eps).mT
        out = (values @ u.mT / normaliser) @ u
        return torch.addcmul(out, values.sum(-2, keepdim=True), 1 / normaliser).mT.to(x.dtype)
