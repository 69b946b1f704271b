"""Every process computes the whole map: for implementations that cannot compute some of its rows, and small maps."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..asa import ops
from ..asa.types import Inputs, NeighborGraph
from . import collectives
from .call import Call


class Attention(torch.autograd.Function):
    """Out, lse, lse_kept and survivors of this process's tokens."""

    @staticmethod
    def forward(ctx: Any, call: Call, *tensors: Any) -> Any:
        inputs = call.gather(Inputs(*tensors))
        leaves: list[Any] = [
            x if x is None else x.detach().requires_grad_(mine.requires_grad)
            for x, mine in zip(inputs, tensors, strict=True)
        ]
        with torch.set_grad_enabled(call.keep):
            out, stats = ops.attend(Inputs(*leaves), call.options, call.threshold_grad, call.threshold_band, call.impl)
        ctx.call, ctx.out, ctx.leaves = call, out, leaves
        rows = [call.own(x.detach(), call.n_q) for x in (out, *stats)]
        ctx.mark_non_differentiable(*rows[1:])
        return tuple(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, *_: Any) -> Any:
        call = ctx.call
        grad_out = collectives.all_gather_rows(call.group, [grad_out], call.n_q)[0]
        wanted = [i for i, x in enumerate(ctx.leaves) if x is not None and x.requires_grad]
        gradients = torch.autograd.grad(ctx.out, [ctx.leaves[i] for i in wanted], grad_out, retain_graph=True)
        own: list[Tensor | None] = [None] * len(ctx.leaves)
        for i, gradient in zip(wanted, gradients, strict=True):
            own[i] = call.own(gradient, call.n_k if i in (1, 2) else call.n_q)
        return None, *own


def neighbors(call: Call, tensors: Inputs) -> NeighborGraph:
    """Return the survivors of this process's tokens."""
    graph = ops.neighbors(call.gather(tensors), call.options, call.impl)
    heads = tensors.query.shape[:2]
    rows = torch.arange(len(graph.row_offsets) - 1, device=tensors.query.device).view(*heads, sum(call.n_q))
    rows = call.own(rows, call.n_q).flatten()
    begin, counts = graph.row_offsets[rows], graph.row_offsets.diff()[rows]
    row_offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    # The entries of a row follow each other: its first one, and as many as come after it.
    entries = torch.arange(int(row_offsets[-1]), device=rows.device)
    entries += (begin - row_offsets[:-1]).repeat_interleave(counts)
    return NeighborGraph(row_offsets, graph.col_indices[entries])
