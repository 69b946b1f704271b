"""What the Triton and CUDA C++ kernels write into: they leave padding alone, and do not run where there is nothing."""

import torch
from torch import Tensor

from .types import Inputs, NeighborGraph, Saved


def prepare_outputs(inputs: Inputs, saved: Saved) -> bool:
    """Write what kernels leave alone; return whether there is anything left for them."""
    empty = 0, -torch.inf, -torch.inf, 0
    rows, keys = inputs.query.shape[2], inputs.key.shape[2]
    if not keys:  # nobody to attend to
        for x, value in zip(saved[:4], empty, strict=True):
            x.fill_(value)
    elif inputs.key_padding_mask is not None and rows == keys:  # rows that are padding
        for x, value in zip((*saved[:4], saved.local, saved.rest, saved.base2), (*empty, False, 0, 0), strict=True):
            x.fill_(value)
    return saved.lse.numel() > 0 and keys > 0


def new_gradients(
    inputs: Inputs, saved: Saved, band: float | None
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor | None, Tensor | None], bool]:
    """Return room for dq, dk, dv, for dalpha and dbeta where they are asked for, and whether kernels have to run."""
    wanted = saved.lse.numel() > 0 and inputs.key.shape[2] > 0
    new = torch.empty if wanted and inputs.key_padding_mask is None else torch.zeros
    tokens = tuple(new(x.shape, dtype=x.dtype, device=x.device) for x in inputs[:3])
    learns = [x is not None and band is not None for x in (inputs.alpha, inputs.beta)]
    learning = (new(saved.lse.shape, dtype=torch.float32, device=saved.lse.device) if x else None for x in learns)
    return tokens, tuple(learning), wanted


def new_graph(saved: Saved) -> NeighborGraph:
    """Return a graph with room for the survivors; only its offsets are written."""
    row_offsets = torch.nn.functional.pad(saved.survivors.flatten().to(torch.int64).cumsum(0), (1, 0))
    return NeighborGraph(row_offsets, row_offsets.new_empty(int(row_offsets[-1]), dtype=torch.int32))
