"""Efficient attention: softmax over positions on the key, over channels on the query, so that the product associates.

Source: Z. Shen, M. Zhang, H. Zhao, S. Yi and H. Li, Efficient Attention: Attention with Linear Complexities, WACV 2021.

Per head, with d the channels of the key and of the query::

    k_jd = exp(key_jd) / sum_j' exp(key_j'd)          softmax over positions: one map per channel
    q_id = exp(query_id) / sum_d' exp(query_id')      softmax over channels
    out_i = sum_d q_id sum_j k_jd v_j                 the weights sum_d q_id k_jd are >= 0 and sum to 1 over j

How it is computed: the context sum_j k_jd v_j [D, Dv] first, all heads at once.

Cost per head: 4 N D Dv operations, N (D + Dv) + D Dv memory; the block's projections add 4 N C (dk + dv), with dk and
dv the channels of keys and values in all heads.

What it attends to: every position, through D maps that are the same for every query; a query chooses their mixture.

Differences from the published code: key and value channels must be divisible by the number of heads. The published
code silently ignores a remainder of key channels (so does ``published=True`` of :class:`asa_ops.nn.EfficientAttention`)
and crashes on one of value channels. It loops over heads in Python. In both, the bias of the keys has no effect.
"""

from torch import Tensor

from ..core import checks
from ..core.contracts import at_least_float32, cast_under_autocast, ignoring_autocast, outside_autocast, takes_dtensors


@takes_dtensors(query="bh..", key="bh..", value="bh..", out="bh..")
def efficient_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend to every position through one map per key channel, in linear time.

    Formulas: ``help(asa_ops.blocks.efficient_attention)``. Source: Shen, Zhang, Zhao, Yi and Li, WACV 2021.

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


@ignoring_autocast
def reference_efficient_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The specification of :func:`efficient_attention`: dense, O(N^2) memory, any dtype, differentiable twice."""
    q, k, v = at_least_float32(query, key, value)
    weights = q.softmax(-1) @ k.softmax(-2).mT
    return (weights @ v).to(query.dtype)
