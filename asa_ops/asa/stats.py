"""What :func:`asa_ops.asa_attention` reports about every row."""

from typing import NamedTuple

from torch import Tensor


class AsaStats(NamedTuple):
    """Per-row statistics, each [B, heads, N_q], detached; at padding positions -inf, -inf, 0.

    Attributes:
        lse: log-sum-exp of the scores over all real keys, in float32 (float64 for float64 inputs).
        lse_kept: the same over the survivors; -inf for a row without survivors. exp(lse_kept - lse) is the softmax
            mass that the survivors hold.
        survivors: int32, how many keys survive.
    """

    lse: Tensor
    lse_kept: Tensor
    survivors: Tensor
