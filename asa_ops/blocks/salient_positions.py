"""Salient positions attention: channels attend to each other by how well they agree on the k most salient positions.

Source: likyoo, SPANet (github.com/likyoo/SPANet).

With q the query [N, D] (the code's theta), v the value [N_v, D] (its g)::

    saliency_n = sum_c q_nc^2;  T = the k positions of largest saliency (which of equal ones is not defined)
    F_cd = sum_{n in T} q_nc q_nd                  [D, D], symmetric
    A_cd = softmax_d F_cd                          no scale
    out_nc = sum_d A_cd v_nd

Without k it is max(N // 16, 1). T is constant: the query gets a gradient at these positions only.

Cost per head: 2 N D^2 + 2 k D^2 operations, N D + D^2 memory; the block's projections add 6 N C C'.

What it attends to: the same k positions for every query; they choose how channels are mixed at every position.

Differences from the published code: its third projection, phi, is never used; here there is none
(:meth:`asa_ops.nn.SalientPositionsAttention.from_upstream` leaves it out). It sub-samples maps of even sides only;
here the last window may be smaller. Its adaptive k overwrites the option k at every call. k above N is an error
in both; here it says so.
"""

import torch
from torch import Tensor

from ..core import checks
from ..core.contracts import at_least_float32, cast_under_autocast, ignoring_autocast, outside_autocast, takes_dtensors


@takes_dtensors(query="bh..", value="bh..", out="bh..")
def salient_positions_attention(query: Tensor, value: Tensor, *, topk: int | None = 8) -> Tensor:
    """Mix channels by how they agree on the most salient positions.

    Formulas: ``help(asa_ops.blocks.salient_positions)``. Source: likyoo, SPANet (github.com/likyoo/SPANet).

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


@ignoring_autocast
def reference_salient_positions_attention(query: Tensor, value: Tensor, *, topk: int | None = 8) -> Tensor:
    """The specification of :func:`salient_positions_attention`: any dtype, differentiable twice."""
    q, v = at_least_float32(query, value)
    topk = max(q.shape[-2] // 16, 1) if topk is None else topk
    saliency = q.square().sum(-1)
    salient = torch.zeros_like(saliency).scatter(-1, saliency.topk(topk).indices, 1)
    agreement = torch.einsum("...nc,...nd,...n->...cd", q, q, salient)
    weights = agreement.softmax(-1)
    return torch.einsum("...cd,...nd->...nc", weights, v).to(query.dtype)
