"""The public function of salient positions attention."""

from torch import Tensor

from .. import checks
from ..precision import at_least_float32, cast_under_autocast, outside_autocast


def salient_positions_attention(query: Tensor, value: Tensor, *, topk: int | None = 8) -> Tensor:
    """Mix channels by how they agree on the most salient positions.

    Formulas: ``asa_ops/salient_positions/__init__.py``. Source: likyoo, SPANet (github.com/likyoo/SPANet).

    Args:
        query: [B, heads, N, D], floating point; the saliency of a position is the squared length of its query.
        value: [B, heads, N_v, D].
        topk: how many positions, at most N. None: max(N // 16, 1).

    Returns:
        [B, heads, N_v, D] in the dtype of ``query``.

    Raises:
        ValueError: shapes or options that do not fit.
        TypeError: dtypes that do not.

    Example:
        >>> import torch
        >>> from asa_ops import salient_positions_attention
        >>> query, value = torch.randn(2, 1, 2, 24 * 32, 16)
        >>> salient_positions_attention(query, value).shape
        torch.Size([1, 2, 768, 16])
    """
    query, value = cast_under_autocast(query=query, value=value)
    checks.check_tensor("query", query, "[B, heads, N, D]")
    checks.check_floating("query", query)
    checks.check_tensor("value", value, "[B, heads, N_v, D]")
    checks.check_like("value", value, query)
    batch, heads, n, dim = query.shape
    if value.shape[:2] != query.shape[:2] or value.shape[3] != dim:
        expected = f"[B, heads, N_v, D] = [{batch}, {heads}, N_v, {dim}]"
        raise ValueError(f"value must be {expected} like query, got {checks.describe(value)}")
    topk = max(n // 16, 1) if topk is None else checks.as_positive_int("topk", topk)
    checks.check_at_most("topk", topk, n, "the number of positions N")
    with outside_autocast(query.device.type):
        # Tokens of a map are columns in memory: formed as its transpose, the output is a map without a copy.
        q, v = (x.mT for x in at_least_float32(query, value))
        salient = q.detach().square().sum(-2, keepdim=True).topk(topk, sorted=False).indices
        q = q.gather(-1, salient.expand(-1, -1, dim, -1))
        return ((q @ q.mT).softmax(-1) @ v).mT.to(query.dtype)
