"""Adaptive sparse attention in plain PyTorch, row block by row block: any device, any N, no N x N tensor.

Forward: pass 1 forms the scores of a block of rows, takes the thresholds from them and stores one bit per pair, "j is
an adaptive neighbour of i". Reciprocity then needs no second product: the mutual neighbours of a block are its bits and
the transposed bits of its columns. Pass 2 forms the scores again and aggregates over the survivors. The backward reads
the same bits, so it cannot disagree with the forward about a borderline pair.

Extra memory: N^2 / 8 bytes of neighbour bits per image and head, and a few [rows, N] blocks.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..layout import window_columns

# Scores held at once, in elements: small enough to stay near the caches, large enough for the products to run at speed.
_BLOCK_ELEMENTS = 2**20
_MIN_ROWS = 64

_on_rows: Callable[[int], None] | None = None


@contextlib.contextmanager
def progress(on_rows: Callable[[int], None]) -> Iterator[None]:
    """Call ``on_rows(count)`` after every block of rows of a pass, to drive a progress bar.

    A forward pass over B images and heads reports ``passes * B * heads * N`` rows in all, two passes if reciprocal.
    """
    global _on_rows
    before, _on_rows = _on_rows, on_rows
    try:
        yield
    finally:
        _on_rows = before


def _row_blocks(n_rows: int, n_columns: int) -> Iterator[slice]:
    """Cut rows into blocks whose starts are multiples of 8, the pairs in one byte of bits."""
    size = max(_MIN_ROWS, _BLOCK_ELEMENTS // max(n_columns, 1) // 8 * 8)
    for start in range(0, n_rows, size):
        rows = slice(start, min(start + size, n_rows))
        yield rows
        if _on_rows is not None:
            _on_rows(rows.stop - rows.start)


# Bits. Eight booleans are one int64 with bytes 0 or 1; one multiplication gathers them into its top byte, the first in
# the lowest bit. _SPREAD repeats a byte eight times, _SELECT keeps bit k of byte k. (Little-endian machines only.)
_GATHER, _SPREAD, _SELECT = 0x0102040810204080, 0x0101010101010101, 0x8040201008040201 - 2**64


def bit_columns(n: int) -> int:
    """Return how many bytes hold n bits."""
    return (n + 7) // 8


def pack_bits(mask: Tensor) -> Tensor:
    """Pack bool [..., n] into uint8 [..., bit_columns(n)], first column in the lowest bit, padded with 0."""
    mask = torch.nn.functional.pad(mask, (0, -mask.shape[-1] % 8)).unflatten(-1, (-1, 8)).contiguous()
    return (mask.view(torch.uint8).view(torch.int64) * _GATHER >> 56).to(torch.uint8)[..., 0]


def unpack_bits(bits: Tensor, n: int) -> Tensor:
    """Undo :func:`pack_bits`."""
    return ((bits.to(torch.int64) * _SPREAD & _SELECT).view(torch.uint8) != 0)[..., :n]


@dataclass
class _Head:
    """One head of one image: q [N_q, D], k [N_k, D], thresholds [N_q], real positions, and its survivors once known."""

    q: Tensor
    k: Tensor
    alpha: Tensor | None
    beta: Tensor | None
    real_q: Tensor | None  # None: all positions are real
    real_k: Tensor | None
    grid: tuple[int, int] | None
    window: int
    topk: int | None
    reciprocal: bool
    scale: float
    bits: Tensor | None = None  # uint8 [N_q, bit_columns(N_k)], adaptive neighbours A; None if alpha and topk are None
    local: Tensor | None = None  # bool [N_q, window**2], local survivors L; None without beta

    @property
    def blocks(self) -> Iterator[slice]:
        return _row_blocks(self.q.shape[0], self.k.shape[0])

    @property
    def thresholded(self) -> bool:
        """Whether there are adaptive neighbours at all, not just everybody or the window."""
        return self.alpha is not None or self.topk is not None

    def scores(self, rows: slice) -> Tensor:
        """s_ij for i in rows [rows, N_k], -inf at padding keys."""
        s = (self.q[rows] @ self.k.mT).mul_(self.scale)
        return s if self.real_k is None else s.masked_fill_(~self.real_k, -torch.inf)

    def scores_back(self, rows: slice) -> Tensor:
        """s_ji for i in rows [rows, N_q]: the scores that all queries give to the keys of these rows."""
        return (self.k[rows] @ self.q.mT).mul_(self.scale)

    def real_pairs(self, rows: slice) -> Tensor | None:
        if self.real_k is None:
            return None
        return self.real_k if self.real_q is None else self.real_q[rows, None] & self.real_k

    def adaptive(self, rows: slice) -> Tensor:
        """A_ij for i in rows."""
        return unpack_bits(self.bits[rows], self.k.shape[0])

    def adaptive_back(self, rows: slice) -> Tensor:
        """A_ji for i in rows."""
        columns = self.bits[:, rows.start // 8 : bit_columns(rows.stop)]
        return unpack_bits(columns, rows.stop - rows.start).mT

    def non_local(self, rows: slice) -> Tensor:
        """M_ij for i in rows."""
        if self.thresholded:
            return self.adaptive(rows) & self.adaptive_back(rows) if self.reciprocal else self.adaptive(rows)
        shape = (rows.stop - rows.start, self.k.shape[0])
        everybody = torch.full(shape, self.beta is None, dtype=torch.bool, device=self.q.device)
        pairs = self.real_pairs(rows)
        return everybody if pairs is None else everybody & pairs

    def near(self, rows: slice) -> tuple[Tensor, Tensor]:
        """The window around i in rows: its columns and which of them are real neighbours, both [rows, window**2]."""
        columns, inside = window_columns(self.grid, self.window, rows, self.q.device)
        if self.real_k is not None:
            inside = inside & self.real_k[columns] & self.real_q[rows, None]
        return columns, inside

    def local_pairs(self, rows: slice) -> Tensor | None:
        """L_ij for i in rows [rows, N_k]; None without a local block."""
        if self.local is None:
            return None
        columns, inside = window_columns(self.grid, self.window, rows, self.q.device)
        return self._scatter_window(columns, inside, self.local[rows])

    def local_pairs_back(self, rows: slice) -> Tensor | None:
        """L_ji for i in rows [rows, N_q]; None without a local block."""
        if self.local is None:
            return None
        columns, inside = window_columns(self.grid, self.window, rows, self.q.device)
        opposite = torch.arange(self.window**2 - 1, -1, -1, device=self.q.device)
        return self._scatter_window(columns, inside, self.local[columns, opposite])

    def _scatter_window(self, columns: Tensor, inside: Tensor, flags: Tensor) -> Tensor:
        # Columns outside the grid repeat the row's own token, so they must write what its own place writes.
        centre = self.window**2 // 2
        flags = torch.where(inside, flags, flags[:, centre : centre + 1])
        return flags.new_zeros(flags.shape[0], self.k.shape[0]).scatter_(-1, columns, flags)

    def kept(self, rows: slice) -> Tensor:
        """K_ij for i in rows [rows, N_k]."""
        return _either(self.non_local(rows), self.local_pairs(rows))


def _either(mask: Tensor, other: Tensor | None) -> Tensor:
    return mask if other is None else mask | other


def _heads(q, k, alpha, beta, key_padding_mask, *options) -> Iterator[tuple[tuple[int, int], _Head]]:
    """Yield ((image, head), its problem), at least in float32, padding set to 0: no NaN in it may enter a product."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    for b in range(q.shape[0]):
        real_k = None if key_padding_mask is None else key_padding_mask[b]
        real_q = real_k if q.shape[2] == k.shape[2] else None

        def clean(x, real):
            x = x.to(dtype)
            return x if real is None else x.masked_fill(~real[:, None], 0)

        for h in range(q.shape[1]):
            a, be = (x if x is None else x[b, h % x.shape[1]].to(dtype) for x in (alpha, beta))
            yield (b, h), _Head(clean(q[b, h], real_q), clean(k[b, h], real_k), a, be, real_q, real_k, *options)


def fwd(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: Tensor | None,
    beta: Tensor | None,
    key_padding_mask: Tensor | None,
    grid: tuple[int, int] | None,
    window: int,
    topk: int | None,
    reciprocal: bool,
    scale: float,
    saved: tuple[Tensor, ...],
) -> None:
    """Write out, lse, lse_kept, survivors, kappa, u, bits, local of ``asa_ops::asa_fwd`` into ``saved``."""
    out, lse, lse_kept, survivors, kappa, u, bits, local = saved
    options = (grid, window, topk, reciprocal, scale)
    for at, head in _heads(query, key, alpha, beta, key_padding_mask, *options):
        v, broken = _finite(value[at], head.real_k)
        if head.thresholded:
            shape = (query.shape[2], bit_columns(key.shape[2]))
            head.bits = bits[at] if bits.shape[-1] else bits.new_empty(shape)
        if beta is not None:
            head.local = local[at]
        one_pass = not (reciprocal and head.thresholded)
        for rows in head.blocks:
            s = head.scores(rows)
            lse[at][rows] = s.logsumexp(-1)
            _find(head, rows, s, lse[at][rows], kappa[at][rows], u[at][rows])
            if one_pass:
                _aggregate(head, rows, s, v, broken, out[at], lse[at], lse_kept[at], survivors[at])
        if not one_pass:
            for rows in head.blocks:
                _aggregate(head, rows, head.scores(rows), v, broken, out[at], lse[at], lse_kept[at], survivors[at])
        if head.real_q is not None:
            lse[at].masked_fill_(~head.real_q, -torch.inf)


def neighbor_rows(query, key, alpha, beta, key_padding_mask, grid, window, topk, reciprocal, scale) -> Iterator[Tensor]:
    """Yield the survivors K, bool [rows, N_k], block of rows by block of rows, head by head, image by image."""
    options = (grid, window, topk, reciprocal, scale)
    for _, head in _heads(query, key, alpha, beta, key_padding_mask, *options):
        n = head.q.shape[0]
        if head.thresholded:
            head.bits = head.q.new_empty(n, bit_columns(head.k.shape[0]), dtype=torch.uint8)
        if beta is not None:
            head.local = head.q.new_empty(n, window**2, dtype=torch.bool)
        for rows in head.blocks:
            s = head.scores(rows)
            _find(head, rows, s, s.logsumexp(-1), head.q.new_empty(s.shape[0]), head.q.new_empty(s.shape[0]))
        for rows in head.blocks:
            yield head.kept(rows)


def _finite(value: Tensor, real_k: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return ``value`` [N_k, Dv] with 0 for what is not finite or padding, and which real rows had such a value."""
    dtype = torch.promote_types(value.dtype, torch.float32)
    broken = ~value.isfinite().all(-1)
    if real_k is not None:
        broken = broken & real_k
        value = value.masked_fill(~real_k[:, None], 0)
    return value.to(dtype).nan_to_num(0, 0, 0), broken


def _find(head: _Head, rows: slice, s: Tensor, lse: Tensor, kappa: Tensor, u: Tensor) -> None:
    """Pass 1: from the scores of ``rows`` to thresholds, neighbour bits and window bits."""
    if head.thresholded:
        near = None
        if head.alpha is not None:
            near = s > _adaptive_threshold(head, rows, lse)[:, None]
        if head.topk is not None:
            kappa.copy_(s.topk(head.topk).values[:, -1])
            near = (s >= kappa[:, None]) & (True if near is None else near)
        pairs = head.real_pairs(rows)
        head.bits[rows] = pack_bits(near if pairs is None else near & pairs)
    if head.beta is not None:
        columns, inside = head.near(rows)
        s_near = s.gather(-1, columns).masked_fill_(~inside, -torch.inf)
        log_mean = s_near.logsumexp(-1) - inside.sum(-1).log()
        u.copy_((head.beta[rows].log() + log_mean).masked_fill_(~inside.any(-1), -torch.inf))  # padding: no window
        head.local[rows] = inside & (s_near > u[:, None])


def _adaptive_threshold(head: _Head, rows: slice, lse: Tensor) -> Tensor:
    n = head.k.shape[0] if head.real_k is None else head.real_k.sum().clamp(min=1)
    return lse + (head.alpha[rows] / n).log()


def _aggregate(head, rows, s, v, broken, out, lse, lse_kept, survivors) -> None:
    """Pass 2: the softmax over the survivors of ``rows``, times v."""
    kept = head.kept(rows)
    survivors[rows] = kept.sum(-1, dtype=torch.int32)
    empty = survivors[rows] == 0
    logits = _logits(s, kept)
    p = logits.softmax(-1)
    # The largest probability is exp(largest score - lse).
    lse_kept[rows] = (logits.amax(-1) - p.amax(-1).log()).masked_fill_(empty, -torch.inf)
    o = (p @ v).masked_fill_(empty[:, None], 0)
    # Broken values were left out of v: 0 * NaN is NaN, and only a survivor may spoil its row.
    spoilt = (kept & broken).any(-1)
    out[rows] = o.masked_fill_((spoilt | _invalid(head, rows, lse[rows]))[:, None], torch.nan)


def _logits(s: Tensor, kept: Tensor) -> Tensor:
    """Scores whose softmax is 0 outside ``kept``; the floor is finite, so an empty row has weights, dropped later."""
    return torch.where(kept, s, torch.finfo(s.dtype).min)


def _invalid(head: _Head, rows: slice, lse: Tensor) -> Tensor:
    """Rows whose scores have no softmax or whose threshold has no logarithm; never a padding row."""
    invalid = ~lse.isfinite()
    for x in (head.alpha, head.beta):
        if x is not None:
            invalid = invalid | ~(x[rows] >= 0)
    if head.real_q is not None:
        return invalid & head.real_q[rows]
    return invalid if head.real_k is None else invalid & head.real_k.any()


def bwd(
    do: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: Tensor | None,
    beta: Tensor | None,
    key_padding_mask: Tensor | None,
    saved: tuple[Tensor, ...],
    grid: tuple[int, int] | None,
    window: int,
    topk: int | None,
    reciprocal: bool,
    scale: float,
    learn_thresholds: bool,
    band: float,
    grads: tuple[Tensor, ...],
) -> None:
    """Write dq, dk, dv of ``asa_ops::asa_bwd`` into ``grads``, add dalpha and dbeta to the zeros there."""
    out, lse, lse_kept, kappa, u, bits, local = saved
    dq, dk, dv, dalpha, dbeta = grads
    dtype = lse.dtype
    options = (grid, window, topk, reciprocal, scale)
    for at, head in _heads(query, key, alpha, beta, key_padding_mask, *options):
        head.bits = bits[at] if head.thresholded else None
        head.local = local[at] if beta is not None else None
        v, _ = _finite(value[at], head.real_k)
        do_, out_ = do[at].to(dtype), out[at].to(dtype)
        if head.real_q is not None:  # their output is the constant 0
            do_ = do_.masked_fill(~head.real_q[:, None], 0)
        do_ = do_.masked_fill(out_.isnan().any(-1, keepdim=True), torch.nan)  # a spoilt row spoils what it touches
        delta = (do_ * out_).sum(-1)
        dk_, dv_ = torch.zeros_like(head.k), torch.zeros_like(v)
        for rows in head.blocks:
            s, kept = head.scores(rows), head.kept(rows)
            empty = (lse_kept[at][rows] == -torch.inf)[:, None]
            p = _logits(s, kept).softmax(-1)
            dv_.addmm_(p.mT, do_[rows].masked_fill(empty, 0))
            dp = do_[rows] @ v.mT
            # Not dp - delta: what a row loses to its own mean cancels exactly only against these very products.
            ds = torch.ops.aten._softmax_backward_data(dp, p, -1, dtype).mul_(scale)
            dq[at][rows] = (ds @ head.k).masked_fill_(empty, 0).to(dq.dtype)
            dk_.addmm_(ds.mT, head.q[rows].masked_fill(empty, 0))
            if learn_thresholds:
                saved_rows = (lse[at], lse_kept[at], kappa[at], u[at])
                _add_threshold_gradients(head, at, rows, s, dp, v, do_, delta, saved_rows, band, dalpha, dbeta)
        dk[at].copy_(dk_)
        dv[at].copy_(dv_)
        if head.real_k is not None:
            dk[at].masked_fill_(~head.real_k[:, None], 0)
            dv[at].masked_fill_(~head.real_k[:, None], 0)
        if head.real_q is not None:
            dq[at].masked_fill_(~head.real_q[:, None], 0)


def _add_threshold_gradients(head, at, rows, s, dp, v, do, delta, saved_rows, band, dalpha, dbeta) -> None:
    """Add the straight-through gradients of ``rows`` (``asa_ops.asa``, "Gradients") to dalpha and dbeta."""
    lse, lse_kept, kappa, u = saved_rows
    non_local, local = head.non_local(rows), head.local_pairs(rows)
    g = _admission_weight(s, lse_kept[rows, None], _either(non_local, local)).mul_(dp.sub_(delta[rows, None]))
    if head.alpha is not None:
        offer = g if local is None else g.masked_fill(local, 0)
        if head.reciprocal:
            local_back = head.local_pairs_back(rows)
            kept_back = _either(non_local, local_back)  # M is symmetric
            g_back = _admission_weight(head.scores_back(rows), lse_kept, kept_back)
            g_back.mul_((v[rows] @ do.mT).sub_(delta))
            offer = offer + (g_back if local_back is None else g_back.masked_fill_(local_back, 0))
            offer.masked_fill_(~head.adaptive_back(rows), 0)
        if head.topk is not None:
            offer = offer.masked_fill(s < kappa[rows, None], 0)
        t = _adaptive_threshold(head, rows, lse[rows])
        _add_row_gradient(dalpha, at, rows, head.alpha, _step_derivative(s, t, band).mul_(offer))
    if head.beta is not None:
        columns, inside = head.near(rows)
        offer = g.gather(-1, columns).masked_fill_(non_local.gather(-1, columns) | ~inside, 0)
        step = _step_derivative(s.gather(-1, columns), u[rows], band)
        _add_row_gradient(dbeta, at, rows, head.beta, step.mul_(offer))


def _admission_weight(s: Tensor, lse_kept: Tensor, kept: Tensor) -> Tensor:
    """c_ij: to first order, the weight that pair (i, j) has, or would have if admitted."""
    gap = s - lse_kept
    return torch.where(kept, gap.exp(), gap.sigmoid()).masked_fill_(lse_kept == -torch.inf, 1)


def _step_derivative(s: Tensor, threshold: Tensor, band: float) -> Tensor:
    """d(s_ij - threshold_i): a triangle of half width ``band`` and area 1; 0 at infinite distance (padding)."""
    z = s - threshold[:, None]
    return z.abs().div_(-band).add_(1).clamp_(min=0).div_(band).masked_fill_(~z.isfinite(), 0)


def _add_row_gradient(dx: Tensor, at: tuple[int, int], rows: slice, x: Tensor, terms: Tensor) -> None:
    """Add d(loss)/d(multiplier) of one head: minus the sum of ``terms``, by log, 0 where the multiplier is 0."""
    gradient = (-terms.sum(-1) / x[rows]).masked_fill_(x[rows] == 0, 0)
    dx[at[0], at[1] % dx.shape[1], rows] += gradient
