"""The public functions of adaptive sparse attention: checks, dispatch, nothing else."""

import importlib
import inspect
from typing import Any, Literal, overload

import torch
from torch import Tensor

from ..core import checks, dispatch
from ..core.contracts import cast_under_autocast
from ..core.dispatch import Impl
from . import ops
from .types import AsaStats, Grid, Inputs, NeighborGraph, ThresholdGrad, Window


@overload
def asa_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: Tensor | float | None = None,
    beta: Tensor | float | None = None,
    *,
    grid: Grid | None = None,
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
    window: Window = 3,
    extra_tokens: int = 0,
    topk: int | None = None,
    reciprocal: bool = True,
    key_padding_mask: Tensor | None = None,
    scale: float | None = None,
    threshold_grad: ThresholdGrad = None,
    threshold_band: float = 2.0,
    impl: Impl = "auto",
    return_stats: Literal[True],
) -> tuple[Tensor, AsaStats]: ...


@overload
def asa_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: Tensor | float | None = None,
    beta: Tensor | float | None = None,
    *,
    grid: Grid | None = None,
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


def asa_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: Tensor | float | None = None,
    beta: Tensor | float | None = None,
    *,
    grid: Grid | None = None,
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
    """Attend from every position to its adaptive reciprocal nearest neighbours, exactly, without an N x N matrix.

    A position keeps the positions whose softmax weight exceeds ``alpha`` times the mean weight of its row, if they keep
    it too (non-local block), and those of its spatial window whose weight exceeds ``beta`` times the window's mean
    (local block). Its output is the softmax over these survivors times ``value``; 0 without survivors. With neither
    ``alpha``, ``beta`` nor ``topk`` this is dense attention. Formulas: ``help(asa_ops.asa)``. Source: Sun, Zhang and
    Zhang, J. Electronic Imaging 33(3), 033038 (2024).

    DTensors give DTensors, split by batch, heads or tokens as they are (docs/distributed.md).

    Args:
        query: [B, heads, N_q, D], floating point.
        key: [B, heads, N_k, D]. N_k = N_q unless ``reciprocal=False`` and there is no ``beta``. Fewer heads, of which
            those of ``query`` are a multiple, are shared by as many consecutive ones of ``query`` (not copied by
            "cpu"; by the others in their working memory).
        value: [B, heads, N_k, Dv], as many heads as ``key``.
        alpha: non-local threshold multiplier >= 0, a number or a tensor that broadcasts to [B, heads, N_q], in the
            dtype of ``query`` or float32: 0 keeps every position, inf none. None: no adaptive threshold.
        beta: local threshold multiplier >= 0, as alpha. None: no local block.
        grid: (L,) of a sequence, (H, W) of a map or (T, H, W) of a volume or video, of N - extra_tokens positions, in
            raster order; required by ``beta``.
        window: odd side of the local window, or one for each side of the grid; it is cut at the borders.
        extra_tokens: how many tokens stand before those of the grid, class tokens for example. They keep everybody and
            everybody keeps them, whatever ``topk`` and their own ``alpha`` and ``beta`` are, which get zero gradients.
            Their weights count in the rows of the others, so that alpha keeps its meaning.
            With ``beta`` alone they make a call as long as one with ``alpha``.
        topk: neighbours must also be among the ``topk`` largest scores of their row (ties are all kept).
        reciprocal: keep a pair only if each is the other's neighbour.
        key_padding_mask: bool [B, N_k], True = a real position. Padding is nobody's neighbour; where N_q == N_k padding
            rows give 0.
        scale: factor of the scores, default D**-0.5.
        threshold_grad: None, thresholds are constants with zero gradients (as published); "straight_through", alpha and
            beta learn.
        threshold_band: half width, in logits, of the straight-through window, > 0.
        impl: "auto", or one of "reference", "blocked", "cpu", "triton", "cuda"; an explicit choice never falls back
            (:func:`explain` says what can run). "triton" forms float32 products as torch does
            (``torch.set_float32_matmul_precision``), and runs on CPU tensors in Triton's interpreter only.
        return_stats: also return :class:`AsaStats`.

    Returns:
        [B, heads, N_q, Dv] in the dtype of ``query``; with ``return_stats`` also the statistics of every row.
        A negative or NaN threshold, a score that is NaN or +inf, and a surviving value that is not finite give NaN in
        the rows concerned, never in another image.

    Raises:
        ValueError: shapes, sizes or options that do not fit.
        TypeError: dtypes that do not.
        RuntimeError: ``impl`` cannot run this call here.

    Example:
        >>> import torch
        >>> from asa_ops import asa_attention
        >>> q, k, v = torch.randn(3, 1, 2, 24 * 32, 64)
        >>> alpha = torch.full((1, 1, 24 * 32), 2.0)
        >>> out, stats = asa_attention(q, k, v, alpha, grid=(24, 32), return_stats=True)
        >>> out.shape
        torch.Size([1, 2, 768, 64])
    """
    if type(query) is not Tensor and checks.is_dtensor(query):
        from ..core import dtensors

        given: dict[str, Any] = {"grid": grid, "window": window, "extra_tokens": extra_tokens, "topk": topk}
        given |= {"reciprocal": reciprocal, "scale": scale, "threshold_grad": threshold_grad}
        given |= {"threshold_band": threshold_band, "impl": impl}
        given |= {"key_padding_mask": key_padding_mask, "return_stats": return_stats}
        tensors = (query, key, value, alpha, beta)
        return dtensors.run(asa_attention, _LAYOUTS, "bhn.", tensors, given, _over_tokens)
    query, key, value = cast_under_autocast(query=query, key=key, value=value)  # thresholds keep their dtype
    inputs, options = check(
        query, key, value, alpha, beta, key_padding_mask, grid, window, extra_tokens, topk, reciprocal, scale
    )
    checks.check_choice("threshold_grad", threshold_grad, (None, "straight_through"))
    threshold_band = checks.as_positive_number("threshold_band", threshold_band)
    out, stats = ops.attend(inputs, options, threshold_grad, threshold_band, chosen(query, value, impl))
    return (out, stats) if return_stats else out


@torch.no_grad()
def reciprocal_neighbors(
    query: Tensor,
    key: Tensor,
    alpha: Tensor | float | None = None,
    beta: Tensor | float | None = None,
    *,
    grid: Grid | None = None,
    window: Window = 3,
    extra_tokens: int = 0,
    topk: int | None = None,
    reciprocal: bool = True,
    key_padding_mask: Tensor | None = None,
    scale: float | None = None,
    impl: Impl = "auto",
) -> NeighborGraph:
    """Return who survives in :func:`asa_attention` (local survivors included) as a sparse graph.

    Args: as in :func:`asa_attention`. Memory: N^2 / 8 bytes per image and head (``impl="reference"``: dense), and the
    graph. Its size depends on the data: on an accelerator this synchronises.

    Returns:
        :class:`NeighborGraph`, tokens in raster order.

    Raises: as :func:`asa_attention`, and TypeError for DTensors.

    Example:
        >>> import torch
        >>> from asa_ops import reciprocal_neighbors
        >>> q = torch.eye(4)[None, None] * 9
        >>> row_offsets, col_indices = reciprocal_neighbors(q, q, torch.ones(1, 1, 4))
        >>> col_indices.tolist()
        [0, 1, 2, 3]
    """
    if type(query) is not Tensor and checks.is_dtensor(query):
        raise TypeError(
            "a graph is no DTensor: pass query.to_local() and the like for the graph of this process, or to "
            "asa_ops.distributed.reciprocal_neighbors where tokens are split"
        )
    query, key = cast_under_autocast(query=query, key=key)
    value = key[..., :0]  # nobody's values are asked for
    inputs, options = check(
        query, key, value, alpha, beta, key_padding_mask, grid, window, extra_tokens, topk, reciprocal, scale
    )
    return ops.neighbors(inputs, options, chosen(query, query, impl))


def explain(query: Tensor, *args: Any, impl: Impl = "auto", **options: Any) -> str:
    """Say which implementation of :func:`asa_attention` would run this call, and why the others would not.

    Args: as in :func:`asa_attention`; only ``query`` and ``impl`` matter, the rest may be left out.

    Example:
        >>> import torch, asa_ops
        >>> print(asa_ops.explain(torch.randn(1, 1, 64, 32)).splitlines()[0])  # doctest: +ELLIPSIS
        asa_attention on cpu, torch.float32, impl='auto': ...
    """
    inspect.signature(asa_attention).bind_partial(query, *args, impl=impl, **options)
    checks.check_tensor("query", query, "[B, heads, N_q, D]")
    return dispatch.explain(dispatch.Call(*_OP, query.device, query.dtype, query.shape[-1]), impl)


_OP = ("asa_attention", "asa")  # the names of the op and of its kernels
_LAYOUTS = {"query": "bhn.", "key": "bgm.", "value": "bgm.", "alpha": "BHN", "beta": "BHN", "key_padding_mask": "bm"}


def _over_tokens(*args: Any, **options: Any) -> Any:
    """Call :func:`asa_ops.distributed.asa_attention`, which imports this module."""
    return importlib.import_module("..distributed", __package__).asa_attention(*args, **options)


def chosen(query: Tensor, value: Tensor, impl: str) -> str:
    """Return the implementation that runs the call."""
    dim = max(query.shape[-1], value.shape[-1])
    # Sizes may be symbols, or, under torch.jit.trace, tensors; and what is remembered cannot be traced.
    plain = type(dim) is int and isinstance(impl, str) and not torch.compiler.is_compiling()
    choose = dispatch.remembered if plain else dispatch.choose
    return choose(dispatch.Call(*_OP, query.device, query.dtype, dim), impl)


def check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: Tensor | float | None,
    beta: Tensor | float | None,
    key_padding_mask: Tensor | None,
    grid: Grid | None,
    window: Window,
    extra_tokens: int,
    topk: int | None,
    reciprocal: bool,
    scale: float | None,
) -> tuple[Inputs, ops.OpOptions]:
    """Check what :func:`asa_attention` and :func:`reciprocal_neighbors` have in common; return what the ops take."""
    checks.check_qkv(query, key, value, grouped=True)
    inputs = Inputs(
        query,
        key,
        value,
        checks.as_threshold("alpha", alpha, query),
        checks.as_threshold("beta", beta, query),
        key_padding_mask,
    )
    checks.check_padding_mask(key_padding_mask, query, key)
    if not isinstance(reciprocal, bool):
        raise TypeError(f"reciprocal must be True or False, got {checks.describe(reciprocal)}")
    n_q, n_k = query.shape[2], key.shape[2]
    extra_tokens = checks.as_int("extra_tokens", extra_tokens, at_least=0)
    if n_q != n_k and (reciprocal or beta is not None or grid is not None or extra_tokens):
        given = f"{grid=}" if grid is not None else f"{extra_tokens=}"
        given = "reciprocal=True" if reciprocal else "beta" if beta is not None else given
        raise ValueError(f"{given} needs as many queries as keys, got N_q = {n_q} and N_k = {n_k}")
    if extra_tokens > n_q:
        raise ValueError(f"extra_tokens must be at most N = {n_q}, got {extra_tokens=}")
    if beta is not None and grid is None:
        raise ValueError(f"beta needs grid=(L,), (H, W) or (T, H, W) with the product N = {n_q}, got grid=None")
    # AOTInductor of torch 2.13 loses an empty list.
    sides = [0, 0] if grid is None else list(checks.as_grid(grid, n_q, 1, 2, 3, extra_tokens=extra_tokens))
    if grid is None and isinstance(window, tuple | list):
        raise ValueError(f"a window with a side for each of the grid needs a grid, got grid=None and window={window}")
    windows = list(checks.as_window(window, len(sides)))
    if topk is not None:
        topk = checks.as_positive_int("topk", topk)
        if topk > n_k:
            raise ValueError(f"topk must be at most the number of keys, N_k = {n_k}, got topk={topk}")
    options = ops.OpOptions(sides, windows, extra_tokens, topk or 0, reciprocal, checks.as_scale(scale, query))
    return with_extra_tokens(inputs, options), options


def with_extra_tokens(inputs: Inputs, options: ops.OpOptions, first: int = 0) -> Inputs:
    """Return the inputs with the thresholds of extra tokens, which keep everybody; ``first``: number of the first row.

    Without adaptive neighbours beside a local block nobody on the grid has any.
    """
    query, _, _, alpha, beta, _ = inputs
    if not options.extra_tokens or (alpha is None and beta is None):
        return inputs
    is_extra = torch.arange(first, first + query.shape[2], device=query.device) < options.extra_tokens
    if alpha is None and not options.topk:
        alpha = query.new_full((1, 1, 1), torch.inf, dtype=inputs.precision)
    alpha, beta = (x if x is None else x.masked_fill(is_extra, 0) for x in (alpha, beta))
    return inputs._replace(alpha=alpha, beta=beta)
