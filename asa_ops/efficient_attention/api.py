"""The public function of efficient attention."""

from torch import Tensor

from .. import checks
from ..precision import at_least_float32, cast_under_autocast, outside_autocast


def efficient_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend to every position through one map per key channel, in linear time.

    Formulas: ``asa_ops/efficient_attention/__init__.py``. Source: Shen, Zhang, Zhao, Yi and Li, WACV 2021.

    Args:
        query: [B, heads, N_q, D], floating point, before its softmax over the D channels.
        key: [B, heads, N_k, D], before its softmax over the N_k positions.
        value: [B, heads, N_k, Dv].

    Returns:
        [B, heads, N_q, Dv] in the dtype of ``query``.

    Raises:
        ValueError: shapes that do not fit.
        TypeError: dtypes that do not.

    Example:
        >>> import torch
        >>> from asa_ops import efficient_attention
        >>> q, k, v = torch.randn(3, 1, 2, 24 * 32, 16)
        >>> efficient_attention(q, k, v).shape
        torch.Size([1, 2, 768, 16])
    """
    query, key, value = cast_under_autocast(query=query, key=key, value=value)
    checks.check_qkv(query, key, value)
    with outside_autocast(query.device.type):
        # Tokens of a map are columns in memory: formed as its transpose, the output is a map without a copy.
        q, k, v = (x.mT for x in at_least_float32(query, key, value))
        return ((v @ k.softmax(-1).mT) @ q.softmax(-2)).mT.to(query.dtype)
