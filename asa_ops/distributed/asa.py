"""The public functions: checks that all processes agree on, then what computes the rows of this one."""

from types import ModuleType
from typing import Literal, overload

import torch
from torch import Tensor

from ..asa.types import AsaStats, Grid, Inputs, NeighborGraph, ThresholdGrad, Window
from ..core.dispatch import Impl
from . import rows, tiles, whole
from .call import Call, Group, agree


@overload
def asa_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: Tensor | float | None = None,
    beta: Tensor | float | None = None,
    *,
    grid: Grid | None = None,
    group: Group = None,
    window: Window = 3,
    extra_tokens: int = 0,
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
    grid: Grid | None = None,
    group: Group = None,
    window: Window = 3,
    extra_tokens: int = 0,
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
    grid: Grid | None = None,
    group: Group = None,
    window: Window = 3,
    extra_tokens: int = 0,
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
        grid: (L,), (H, W) or (T, H, W) of the whole map: as many positions as all n_q, but for extra tokens.
        group: a process group, a DeviceMesh of one dimension, or None: all processes.
        extra_tokens: as of one process, the first tokens of all.
        topk: as of one process, of all keys.
        key_padding_mask: bool [B, n_k], of this process's keys.
        window, reciprocal, scale, threshold_grad, threshold_band, impl, return_stats: as of one process, the same
            everywhere.

    Source and formulas: ``help(asa_ops.asa)``.

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
    call, inputs = agree(
        group,
        query,
        key,
        value,
        alpha,
        beta,
        grid,
        window,
        extra_tokens,
        topk,
        reciprocal,
        key_padding_mask,
        scale,
        impl,
        learning,
    )
    out, *stats = _computing(call, inputs).Attention.apply(call, *inputs)
    return (out, AsaStats(*stats)) if return_stats else out


@torch.compiler.disable  # type: ignore[untyped-decorator]
@torch.no_grad()
def reciprocal_neighbors(
    query: Tensor,
    key: Tensor,
    alpha: Tensor | float | None = None,
    beta: Tensor | float | None = None,
    *,
    grid: Grid | None = None,
    group: Group = None,
    window: Window = 3,
    extra_tokens: int = 0,
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

    Example (torchrun --nproc-per-node 2):
        >>> import torch
        >>> from asa_ops import distributed
        >>> q, k = torch.randn(2, 1, 2, 32 * 16, 64)  # 16 of the 32 rows of a map
        >>> row_offsets, columns = distributed.reciprocal_neighbors(q, k, 1.0, grid=(32, 32))  # doctest: +SKIP
    """
    options = grid, window, extra_tokens, topk, reciprocal, key_padding_mask, scale, impl, (None, 1.0)
    call, inputs = agree(group, query, key, None, alpha, beta, *options, has_values=False)
    return _computing(call, inputs).neighbors(call, inputs)


def _computing(call: Call, inputs: Inputs) -> ModuleType:
    """Return what computes the call: some rows in each process, or all of them where that is not known how."""
    return next((x for x in (rows, tiles) if x.can_run(call, inputs)), whole)
