"""The public functions: checks that all processes agree on, then what computes the rows of this one."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh

from ..asa import api, ops
from ..asa.types import AsaStats, Inputs, NeighborGraph, ThresholdGrad
from ..core import checks
from ..core.contracts import cast_under_autocast
from ..core.dispatch import Impl
from . import collectives

Group = dist.ProcessGroup | DeviceMesh | None


@overload
def asa_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: Tensor | float | None = None,
    beta: Tensor | float | None = None,
    *,
    grid: tuple[int, int] | None = None,
    group: Group = None,
    window: int = 3,
    topk: int | None = None,
    reciprocal: bool = True,
    key_padding_mask: Tensor | None = None,
    scale: float | None = None,
    threshold_grad: ThresholdGrad = None,
    threshold_band: float = 2.0,
    impl: Impl = "auto",
    return_stats: Literal[False] = False,
) -> Tensor: ...


@overload
def asa_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: Tensor | float | None = None,
    beta: Tensor | float | None = None,
    *,
    grid: tuple[int, int] | None = None,
    group: Group = None,
    window: int = 3,
    topk: int | None = None,
    reciprocal: bool = True,
    key_padding_mask: Tensor | None = None,
    scale: float | None = None,
    threshold_grad: ThresholdGrad = None,
    threshold_band: float = 2.0,
    impl: Impl = "auto",
    return_stats: bool,
) -> Tensor | tuple[Tensor, AsaStats]: ...


@torch.compiler.disable  # type: ignore[untyped-decorator]  # processes wait for each other in the middle
def asa_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: Tensor | float | None = None,
    beta: Tensor | float | None = None,
    *,
    grid: tuple[int, int] | None = None,
    group: Group = None,
    window: int = 3,
    topk: int | None = None,
    reciprocal: bool = True,
    key_padding_mask: Tensor | None = None,
    scale: float | None = None,
    threshold_grad: ThresholdGrad = None,
    threshold_band: float = 2.0,
    impl: Impl = "auto",
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, AsaStats]:
    """Attend as :func:`asa_ops.asa_attention` over a map whose tokens are split over the processes of a group.

    Process r holds the r-th part of the tokens in raster order; parts may have different sizes, and be empty. It gets
    its rows of what one process would compute for the whole map, equal to the last bit, and the gradients of its
    tokens. Every process of the group must call this, and run the backward if one does. Where some ``impl`` cannot
    compute a part of the rows, every process computes the whole map.

    Args:
        query: [B, heads, n_q, D], the queries of this process.
        key: [B, key heads, n_k, D], its keys; n_k = n_q unless ``reciprocal=False`` and there is no ``beta``.
        value: [B, key heads, n_k, Dv].
        alpha: threshold multiplier of this process's queries, a number or a tensor that broadcasts to [B, heads, n_q].
        beta: local threshold multiplier, as alpha.
        grid: (H, W) of the whole map, H * W = the sum of n_q.
        group: a process group, a DeviceMesh of one dimension, or None: all processes.
        topk: as of one process, of all keys.
        key_padding_mask: bool [B, n_k], of this process's keys.
        window, reciprocal, scale, threshold_grad, threshold_band, impl, return_stats: as of one process, the same
            everywhere.

    Returns:
        [B, heads, n_q, Dv] in the dtype of ``query``; with ``return_stats`` also the statistics of these rows.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`asa_ops.asa_attention`, on every process if on one; and if they
            were given different options.

    Example (torchrun --nproc-per-node 2):
        >>> import torch, torch.distributed as dist
        >>> from asa_ops import distributed
        >>> dist.init_process_group("gloo")  # doctest: +SKIP
        >>> q, k, v = torch.randn(3, 1, 2, 32 * 16, 64)  # 16 of the 32 rows of a map
        >>> out = distributed.asa_attention(q, k, v, 1.0, grid=(32, 32))  # doctest: +SKIP
    """
    learning = (threshold_grad, threshold_band)
    call, inputs = _agree(
        group, query, key, value, alpha, beta, grid, window, topk, reciprocal, key_padding_mask, scale, impl, learning
    )
    out, *stats = _Attention.apply(call, *inputs)
    return (out, AsaStats(*stats)) if return_stats else out


@torch.compiler.disable  # type: ignore[untyped-decorator]
@torch.no_grad()
def reciprocal_neighbors(
    query: Tensor,
    key: Tensor,
    alpha: Tensor | float | None = None,
    beta: Tensor | float | None = None,
    *,
    grid: tuple[int, int] | None = None,
    group: Group = None,
    window: int = 3,
    topk: int | None = None,
    reciprocal: bool = True,
    key_padding_mask: Tensor | None = None,
    scale: float | None = None,
    impl: Impl = "auto",
) -> NeighborGraph:
    """Return who survives in :func:`asa_attention`: the rows of this process, columns of the whole map.

    Args: as in :func:`asa_attention`.

    Returns:
        :class:`asa_ops.NeighborGraph` of B * heads * n_q rows.

    Raises: as :func:`asa_attention`.
    """
    call, inputs = _agree(
        group, query, key, None, alpha, beta, grid, window, topk, reciprocal, key_padding_mask, scale, impl, (None, 1.0)
    )
    graph = ops.neighbors(call.gather(inputs), call.options, call.impl)
    rows = torch.arange(len(graph.row_offsets) - 1, device=query.device).view(*query.shape[:2], -1)
    rows = call.own(rows, call.n_q).flatten()
    begin, counts = graph.row_offsets[rows], graph.row_offsets.diff()[rows]
    row_offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    # The entries of a row follow each other: its first one, and as many as come after it.
    entries = torch.arange(int(row_offsets[-1]), device=query.device)
    entries += (begin - row_offsets[:-1]).repeat_interleave(counts)
    return NeighborGraph(row_offsets, graph.col_indices[entries])


@dataclass(frozen=True)
class _Call:
    """What all processes know of a call."""

    group: dist.ProcessGroup
    n_q: list[int]  # tokens of every process
    n_k: list[int]
    options: ops.OpOptions
    threshold_grad: ThresholdGrad
    threshold_band: float
    impl: str
    keep: bool  # whether a backward may follow

    def gather(self, inputs: Inputs) -> Inputs:
        """Return the inputs of the whole map."""
        query, key, value, alpha, beta, mask = inputs

        def of_all(x: Tensor | None, sizes: list[int], dim: int = 2) -> Any:
            return None if x is None else collectives.all_gather(self.group, x, sizes, dim)

        tokens = of_all(query, self.n_q), of_all(key, self.n_k), of_all(value, self.n_k)
        return Inputs(*tokens, of_all(alpha, self.n_q), of_all(beta, self.n_q), of_all(mask, self.n_k, 1))

    def own(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """Return this process's rows of a tensor of the whole map [B, heads, N, ..]."""
        return x.split(list(sizes), 2)[dist.get_rank(self.group)].contiguous()


def _agree(
    group: Group,
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    alpha: Tensor | float | None,
    beta: Tensor | float | None,
    grid: tuple[int, int] | None,
    window: int,
    topk: int | None,
    reciprocal: bool,
    key_padding_mask: Tensor | None,
    scale: float | None,
    impl: Impl,
    learning: tuple[ThresholdGrad, float],
) -> tuple[_Call, Inputs]:
    """Check the arguments on every process; return the call and this process's tensors, thresholds of every row."""
    group = collectives.as_group(group)
    threshold_grad, threshold_band = learning

    def look() -> tuple[tuple[Inputs, ops.OpOptions, str], list[int], dict[str, object]]:
        tokens = {"query": query, "key": key} | ({} if value is None else {"value": value})
        q, k, *v = cast_under_autocast(**tokens)
        of_map = topk if topk is None else checks.as_positive_int("topk", topk)  # this process may have fewer keys
        place = None if grid is None else (1, q.shape[2] if isinstance(q, Tensor) and q.dim() == 4 else 0)
        inputs, options = api.check(
            q, k, v[0] if v else k[..., :0], alpha, beta, key_padding_mask, place, window, None, reciprocal, scale
        )
        checks.check_choice("threshold_grad", threshold_grad, (None, "straight_through"))
        checks.as_positive_number("threshold_band", threshold_band)
        alphas, betas = (x if x is None else x.expand(q.shape[:3]) for x in (inputs.alpha, inputs.beta))
        inputs = inputs._replace(alpha=alphas, beta=betas)
        chosen = api.chosen(inputs.query, inputs.value, impl)
        same = {
            "batch, heads and head dims": [x.shape[:2] + x.shape[3:] for x in inputs[:3]],
            "dtypes": [x if x is None else x.dtype for x in inputs],
            "requires_grad": torch.is_grad_enabled() and [x is not None and x.requires_grad for x in inputs],
            "grid": None if grid is None else tuple(grid),
            "window": options[1],
            "topk": of_map,
            "reciprocal": reciprocal,
            "scale": options[4],
            "threshold_grad": threshold_grad,
            "threshold_band": threshold_band,
            "impl": chosen,
        }
        return (inputs, options, chosen), [inputs.query.shape[2], inputs.key.shape[2]], same

    (inputs, (_, sides, _, _, factor), chosen), sizes = collectives.agree(group, look)
    n_q, n_k = ([of[i] for of in sizes] for i in (0, 1))
    if topk is not None and topk > sum(n_k):
        raise ValueError(f"topk must be at most the number of keys, N_k = {sum(n_k)}, got topk={topk}")
    place = [0, 0] if grid is None else list(checks.as_grid(grid, sum(n_q)))
    options = (place, sides, int(topk or 0), reciprocal, factor)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    return _Call(group, n_q, n_k, options, threshold_grad, float(threshold_band), chosen, keep), inputs


class _Attention(torch.autograd.Function):
    """Every process computes the whole map."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Any) -> Any:
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
        grad_out = collectives.all_gather(call.group, grad_out, call.n_q, 2)
        wanted = [i for i, x in enumerate(ctx.leaves) if x is not None and x.requires_grad]
        gradients = torch.autograd.grad(ctx.out, [ctx.leaves[i] for i in wanted], grad_out)
        own: list[Tensor | None] = [None] * len(ctx.leaves)
        for i, gradient in zip(wanted, gradients, strict=True):
            own[i] = call.own(gradient, call.n_k if i in (1, 2) else call.n_q)
        return None, *own
