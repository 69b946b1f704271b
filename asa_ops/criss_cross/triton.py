"""Criss-cross attention on the GPU: the Triton kernels, on copies of the maps with channels last.

Forward: every column's own softmax, then rows, which merge theirs with it (``triton_fwd``). Backward (``triton_bwd``):
columns leave their part of every gradient, rows add theirs. Every program owns what it sums, in a fixed order: results
repeat bitwise. Only what is imported within functions here imports triton.
"""

import torch
from torch import Tensor


def fwd(query: Tensor, key: Tensor, value: Tensor, scale: float, out: Tensor, stats: Tensor) -> None:
    """Write into ``out`` and ``stats``."""
    from . import triton_fwd

    with torch.cuda.device_of(query):  # which Triton launches on
        triton_fwd.forward(query, key, value, scale, out, stats)


def bwd(
    do: Tensor, query: Tensor, key: Tensor, value: Tensor, stats: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk, dv."""
    from . import triton_bwd

    with torch.cuda.device_of(query):
        return triton_bwd.backward(do, query, key, value, stats, scale)
