"""Adaptive sparse attention in readable PyTorch: the specification.

Dense, O(N^2) memory, any dtype and device, differentiable twice. Every other implementation is compared with this file.
The formulas stand in ``asa_ops/asa/__init__.py``; the names here are theirs. Scores of half-precision inputs are
computed in float32 and the result is rounded once.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core import checks
from ..core.contracts import backward_of, ignoring_autocast
from .types import LEAST_MULTIPLIER, AsaStats, Inputs, NeighborGraph, Options, log_sum_exp


class Survivors(NamedTuple):
    """Who survives, and the thresholds that decided it."""

    adaptive: Tensor  # A   [B, heads, N_q, N_k]: j is an adaptive neighbour of i
    non_local: Tensor  # M   the same, reciprocal
    local: Tensor  # L   the same, of the local block
    in_window: Tensor  # j in W(i)   the same
    kept: Tensor  # K = M or L
    lse: Tensor  # [B, heads, N_q], as the rest
    t: Tensor  # adaptive threshold, a score
    kappa: Tensor  # k-th largest score
    u: Tensor  # local threshold, a score
    nan_rows: Tensor  # rows whose scores or thresholds are no numbers: their output is NaN


@ignoring_autocast
def asa_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    grid: Sequence[int] | None = None,
    window: int | Sequence[int] = 3,
    extra_tokens: int = 0,
    topk: int | None = None,
    reciprocal: bool = True,
    key_padding_mask: Tensor | None = None,
    scale: float | None = None,
    threshold_grad: str | None = None,
    threshold_band: float = 2.0,
    published: bool = False,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, AsaStats]:
    """Compute :func:`asa_ops.asa_attention` densely; see there for the arguments.

    Args:
        published: reproduce two artefacts of the authors' code, so that published checkpoints match: a position exactly
            at its threshold counts 1/2, and rows are normalised by sum + 1e-12. Needs alpha, beta and grid, without
            extra_tokens, topk, reciprocal=False or key_padding_mask. Thresholds get zero gradients.
    """
    real_q, real_k = real_positions(query, key, key_padding_mask)
    s = scores(query, key, scale, real_q, real_k)
    v = without_padding(value, real_k).to(s.dtype)
    alpha, beta = (x if x is None else x.to(s.dtype) for x in (alpha, beta))
    if published:
        plain = topk is None and reciprocal and key_padding_mask is None and not extra_tokens
        if alpha is None or beta is None or grid is None or not plain:
            raise ValueError(
                "published=True needs alpha, beta, grid, and no extra_tokens, topk, reciprocal=False, key_padding_mask"
            )
        out, stats = _published(s, v, alpha, beta, grid, window)
    else:
        survivors = find_survivors(s, alpha, beta, grid, window, extra_tokens, topk, reciprocal, real_q, real_k)
        lse, kept = survivors.lse, survivors.kept
        out, lse_kept = attend(s, v, kept, survivors.nan_rows)
        stats = AsaStats(
            lse.masked_fill(~real_q[:, None], -torch.inf),
            torch.where(lse.isfinite(), lse_kept.detach(), lse),
            kept.sum(-1, dtype=torch.int32),
        )
        learns = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (alpha, beta))
        if threshold_grad == "straight_through" and (learns or not torch.compiler.is_compiling()):
            on_grid = torch.arange(s.shape[-1], device=s.device) >= extra_tokens  # thresholds decide of others only
            pair = real_q[:, None, :, None] & (real_k & on_grid)[:, None, None, :]
            pair = pair & on_grid[:, None] if extra_tokens else pair
            fixed = s, v, lse_kept, pair, *survivors, reciprocal, threshold_band
            out = _StraightThrough.apply(out, alpha, beta, *fixed)
    # Thresholds are constants, but a parameter behind them must get a zero gradient, not None (DDP waits for it).
    for x in (alpha, beta):
        if x is not None:
            out = out + x.masked_fill(torch.ones_like(x, dtype=torch.bool), 0)[..., None]
    out = out.to(query.dtype)
    return (out, stats) if return_stats else out


def real_positions(query: Tensor, key: Tensor, key_padding_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return which queries [B, N_q] and keys [B, N_k] are real. Equal lengths mean the same positions."""
    real_k = key.new_ones(key.shape[0], key.shape[2], dtype=torch.bool)
    if key_padding_mask is not None:
        real_k = key_padding_mask
    same = query.shape[2] == key.shape[2]
    return real_k if same else query.new_ones(query.shape[0], query.shape[2], dtype=torch.bool), real_k


def without_padding(x: Tensor, real: Tensor) -> Tensor:
    """Return ``x`` [B, heads, N, D] with padding positions set to 0, so that nothing in them (NaN) enters a product."""
    return x.masked_fill(~real[:, None, :, None], 0)


def scores(query: Tensor, key: Tensor, scale: float | None, real_q: Tensor, real_k: Tensor) -> Tensor:
    """Return s_ij = scale * <q_i, k_j>  [B, heads, N_q, N_k], at least in float32; -inf at padding keys."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    dtype = torch.promote_types(query.dtype, torch.float32)
    q, k = without_padding(query, real_q).to(dtype), without_padding(key, real_k).to(dtype)
    return (scale * (q @ k.mT)).masked_fill(~real_k[:, None, None, :], -torch.inf)


@torch.no_grad()
def find_survivors(
    s: Tensor,
    alpha: Tensor | None,
    beta: Tensor | None,
    grid: Sequence[int] | None,
    window: int | Sequence[int],
    extra_tokens: int,
    topk: int | None,
    reciprocal: bool,
    real_q: Tensor,
    real_k: Tensor,
) -> Survivors:
    """Find the survivors of the scores ``s`` [B, heads, N_q, N_k]; formula for formula as in ``asa_ops.asa``."""
    pair = real_q[:, None, :, None] & real_k[:, None, None, :]
    n = real_k.sum(-1)[:, None, None]
    lse = log_sum_exp(s)

    # Differences of scores are compared, not sums of scores and logarithms, which large scores would swallow.
    t = kappa = u = torch.full_like(lse, -torch.inf)
    adaptive = pair.expand_as(s)
    if topk is not None:
        kappa = s.topk(topk).values[..., -1]
        adaptive = adaptive & (s >= kappa[..., None])
    if alpha is not None:
        log_alpha = alpha.log() - n.clamp(min=1).to(s.dtype).log()
        t = lse + log_alpha
        adaptive = adaptive & (s - lse[..., None] > log_alpha[..., None])
    elif topk is None and beta is not None:
        adaptive = torch.zeros_like(adaptive)
    # Extra tokens keep everybody and are kept by everybody, whatever the thresholds are.
    is_extra = torch.arange(s.shape[-2], device=s.device) < extra_tokens
    if extra_tokens:
        adaptive = adaptive | (pair & (is_extra[:, None] | is_extra))
    non_local = adaptive & adaptive.mT if reciprocal else adaptive

    inside = local = torch.zeros_like(adaptive)
    if beta is not None:
        assert grid is not None
        inside = pair & in_window(grid, window, s.device, extra_tokens)
        log_mean = s.masked_fill(~inside, -torch.inf).logsumexp(-1) - inside.sum(-1).to(s.dtype).log()
        u = (beta.log() + log_mean).masked_fill(~inside.any(-1), -torch.inf)  # padding has no window
        local = inside & (s - log_mean[..., None] > beta.log()[..., None])

    # A row of scores with NaN or +inf has no softmax, a negative threshold no logarithm.
    nan_rows = (real_q & real_k.any(-1, keepdim=True))[:, None] & ~lse.isfinite()
    for x in (alpha, beta):
        if x is not None:
            nan_rows = nan_rows | ((real_q & ~is_extra)[:, None] & ~(x >= 0))
    return Survivors(adaptive, non_local, local, inside, non_local | local, lse, t, kappa, u, nan_rows)


def neighbor_graph(inputs: Inputs, options: Options) -> NeighborGraph:
    """Return the survivors K."""
    query, key, _, alpha, beta, key_padding_mask = inputs
    real_q, real_k = real_positions(query, key, key_padding_mask)
    s = scores(query, key, options.scale, real_q, real_k)
    alpha, beta = (x if x is None else x.to(s.dtype) for x in (alpha, beta))
    grid, window, extra, topk, reciprocal, _ = options
    kept = find_survivors(s, alpha, beta, grid, window, extra, topk or None, reciprocal, real_q, real_k).kept
    return NeighborGraph.of_rows(kept.flatten(0, 1), query.device)


def in_window(grid: Sequence[int], window: int | Sequence[int], device: torch.device, extra_tokens: int = 0) -> Tensor:
    """Return [N, N] bool: j lies in the window around i, of a side for every side of the grid; no extra token does."""
    inside = torch.ones(1, 1, dtype=torch.bool, device=device)
    for side, of_window in zip(grid, checks.as_window(window, len(grid)), strict=True):
        place = torch.arange(side, device=device)
        near = (place[:, None] - place).abs() <= of_window // 2
        inside = (inside[:, None, :, None] & near[:, None]).flatten(2).flatten(0, 1)
    return torch.nn.functional.pad(inside, (extra_tokens, 0, extra_tokens, 0))


def attend(s: Tensor, v: Tensor, kept: Tensor, nan_rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the softmax of ``s`` over the pairs ``kept``, times ``v``, and its log-sum-exp.

    A row without survivors gives 0 and -inf, with zero gradients. ``nan_rows``, and rows that keep a value that is not
    finite, give NaN.
    """
    empty = ~kept.any(-1, keepdim=True)
    # Mask before exp, not after: where(kept, exp(s), 0) has NaN gradients. An empty row is given any finite scores.
    logits = s.masked_fill(~kept, -torch.inf).masked_fill(empty, 0)
    p = logits.softmax(-1).masked_fill(~kept, 0)
    lse_kept = logits.logsumexp(-1).masked_fill(empty[..., 0], -torch.inf)
    # 0 * NaN is NaN, so a value that is not finite may not meet the weight 0 of a non-survivor.
    not_finite = ~v.isfinite()
    is_nan = (kept.to(v.dtype) @ not_finite.any(-1, keepdim=True).to(v.dtype)) > 0
    if nan_rows is not None:
        is_nan = is_nan | nan_rows[..., None]
    p = p * torch.where(is_nan, torch.nan, 1.0).to(p.dtype)
    out = (p @ v.masked_fill(not_finite, 0)).masked_fill(empty & ~is_nan, 0)  # an empty row passes no gradient on
    return out, lse_kept


def _threshold_gradients(
    do: Tensor,
    out: Tensor,
    alpha: Tensor | None,
    beta: Tensor | None,
    s: Tensor,
    v: Tensor,
    lse_kept: Tensor,
    pair: Tensor,
    *survivors_and_options: Any,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the straight-through gradients of alpha and beta (``asa_ops.asa``, "Gradients")."""
    *tensors, reciprocal, band = survivors_and_options
    survivors = Survivors(*tensors)
    gap = s - lse_kept[..., None]
    c = torch.where(survivors.kept, gap.exp(), gap.sigmoid()).masked_fill(~survivors.kept.any(-1, keepdim=True), 1)
    # <do_i, v_j - out_i>, finite values only: a value that is not finite has no gradient
    g = c * (do @ v.nan_to_num(0, 0, 0).mT - (do * out).sum(-1, keepdim=True))
    g = g.masked_fill(~pair, 0)
    real = pair.any(-1)

    def step_derivative(threshold: Tensor) -> Tensor:
        z = s - threshold[..., None]
        return ((1 - z.abs() / band).clamp(min=0) / band).masked_fill(~pair | ~z.isfinite(), 0)

    def by_multiplier(gradient: Tensor, x: Tensor) -> Tensor:
        return (gradient / x).masked_fill((x < LEAST_MULTIPLIER) | ~real, 0).sum_to_size(x.shape)

    dalpha = dbeta = None
    if alpha is not None:
        offer = g.masked_fill(survivors.local, 0)
        if reciprocal:
            offer = (offer + offer.mT).masked_fill(~survivors.adaptive.mT, 0)
        offer = offer.masked_fill(s < survivors.kappa[..., None], 0)
        dalpha = by_multiplier(-(step_derivative(survivors.t) * offer).sum(-1), alpha)
    if beta is not None:
        offer = g.masked_fill(survivors.non_local | ~survivors.in_window, 0)
        dbeta = by_multiplier(-(step_derivative(survivors.u) * offer).sum(-1), beta)
    return dalpha, dbeta


_ThresholdGradients = backward_of(
    _threshold_gradients,
    "asa_attention: straight-through gradients have no double backward, use threshold_grad=None",
)


class _StraightThrough(torch.autograd.Function):
    """The identity on ``out``, with the straight-through gradients of alpha and beta."""

    @staticmethod
    def forward(out: Tensor, *others: Any) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.reciprocal, ctx.band = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> Any:
        # torch.compile cannot trace a Function in a Function's backward, and has no double backward to refuse.
        run = _threshold_gradients if torch.compiler.is_compiling() else _ThresholdGradients.apply
        dalpha, dbeta = run(do, *ctx.saved_tensors, ctx.reciprocal, ctx.band)
        return do, dalpha, dbeta, *[None] * 16


def _published(
    s: Tensor, v: Tensor, alpha: Tensor, beta: Tensor, grid: Sequence[int], window: int | Sequence[int]
) -> tuple[Tensor, AsaStats]:
    """The authors' code: weights in the domain of probabilities, and its + 1e-12."""
    weight = published_mask(s, alpha, beta, grid, window)
    kept = weight * s.softmax(-1)
    total = kept.sum(-1)
    epsilon = torch.full_like(total, 1e-12)  # the exporter to ONNX drops a sum with the number, taking it for 0
    out = (kept / (total + epsilon)[..., None]) @ v
    out = out.masked_fill(~((alpha >= 0) & (beta >= 0))[..., None], torch.nan)
    lse = s.logsumexp(-1).detach()
    return out, AsaStats(lse, lse + total.detach().log(), (weight > 0).sum(-1, dtype=torch.int32))


@torch.no_grad()
def published_mask(s: Tensor, alpha: Tensor, beta: Tensor, grid: Sequence[int], window: int | Sequence[int]) -> Tensor:
    """Return the authors' mask [B, heads, N, N]: 0, 1, or 1/2 where a probability equals its threshold exactly.

    Outside the window the local block compares 0 with beta_i times the window's mean: where the product is 0 (beta_i
    clipped by the ReLU, or every probability of the window underflowed), a row keeps every position with weight 1/2.
    """

    def step(x: Tensor) -> Tensor:
        return (1 + x.sign()) / 2

    p = s.softmax(-1)
    inside = in_window(grid, window, s.device).to(s.dtype)
    above = step(p - alpha[..., None] * p.mean(-1, keepdim=True))
    local_mean = (inside * p).sum(-1) / inside.sum(-1)
    return torch.maximum(above * above.mT, step(inside * p - (beta * local_mean)[..., None]))
