"""Adaptive sparse attention in plain PyTorch, row block by row block: any device, any N, no N x N tensor.

Forward: pass 1 forms the scores of a block of rows, takes the thresholds from them and stores one bit per pair, "j is
an adaptive neighbour of i". Reciprocity then needs no second product: the mutual neighbours of a block are its bits and
the transposed bits of its columns. Pass 2 forms the scores again and aggregates over the survivors. The backward reads
the same bits, so it cannot disagree with the forward about a borderline pair.

Extra memory per image and head: N^2 / 8 bytes of neighbour bits, a byte a row and position of the window, and a few
[rows, N] blocks of scores.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .bits import bit_columns, pack_bits, unpack_bits
from .types import LEAST_MULTIPLIER, Inputs, NeighborGraph, Options, Saved, bits_shape, log_sum_exp, places_of

# Scores held at once, in elements: small enough to stay near the caches, large enough for the products to run at speed.
_BLOCK_ELEMENTS = 2**20
_MIN_ROWS = 64


def window_columns(options: Options, rows: slice, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the tokens of the window around every token in ``rows``.

    Args:
        options: grid, window and how many tokens stand before the grid; these have no window.
        rows: contiguous range of tokens, in raster order.
        device: where the result lies.

    Returns:
        columns: int64 [rows, positions], offsets in raster order (the centre in the middle, offset o opposite to offset
            positions - 1 - o). Where the window leaves the grid the column is the row's own token.
        inside: bool [rows, positions], False where the window leaves the grid.
    """
    offsets = torch.cartesian_prod(
        *(torch.arange(-(side // 2), side // 2 + 1, device=device) for side in options.window)
    ).T
    token = torch.arange(rows.start, rows.stop, device=device)
    places = torch.stack(places_of(token - options.extra, options.grid))[:, :, None] + offsets[:, None, :]
    sides = torch.tensor(options.grid, device=device)[:, None, None]
    inside = ((places >= 0) & (places < sides)).all(0) & (token >= options.extra)[:, None]
    columns = (places[0] * options.grid[1] + places[1]) * options.grid[2] + places[2] + options.extra
    return torch.where(inside, columns, token[:, None]), inside


def _row_blocks(n_rows: int, n_columns: int) -> Iterator[slice]:
    """Cut rows into blocks whose starts are multiples of 8, the pairs in one byte of bits."""
    size = max(_MIN_ROWS, _BLOCK_ELEMENTS // max(n_columns, 1) // 8 * 8)
    for start in range(0, n_rows, size):
        yield slice(start, min(start + size, n_rows))


@dataclass
class _Head:
    """One head of one image: its tokens, thresholds and real positions, and its survivors once they are known."""

    q: Tensor  # [N_q, D], as k and v at least float32, 0 at padding
    k: Tensor  # [N_k, D]
    v: Tensor  # [N_k, Dv], 0 also where it was not finite,
    not_finite: Tensor  # bool [N_k], which is noted here
    alpha: Tensor | None  # [N_q]
    beta: Tensor | None
    real_q: Tensor | None  # bool [N_q]; None: all positions are real
    real_k: Tensor | None
    options: Options
    bits: Tensor | None  # uint8 [N_q, bit_columns(N_k)], A; None without alpha and topk
    local: Tensor | None  # bool [N_q, positions], L; None without beta

    @property
    def blocks(self) -> Iterator[slice]:
        return _row_blocks(self.q.shape[0], self.k.shape[0])

    def scores(self, rows: slice) -> Tensor:
        """s_ij for i in rows [rows, N_k], -inf at padding keys."""
        s = (self.q[rows] @ self.k.mT).mul_(self.options.scale)
        return s if self.real_k is None else s.masked_fill_(~self.real_k, -torch.inf)

    def scores_back(self, rows: slice) -> Tensor:
        """s_ji for i in rows [rows, N_q]: the scores that all queries give to the keys of these rows."""
        return (self.k[rows] @ self.q.mT).mul_(self.options.scale)

    def above_alpha(self, rows: slice, s: Tensor, lse: Tensor) -> Tensor:
        """s_ij - t_i for i in rows. Large scores would swallow the logarithms, so lse comes off first."""
        n = self.q.new_full((), self.k.shape[0]) if self.real_k is None else self.real_k.sum().clamp(min=1).to(s.dtype)
        return (s - lse[:, None]).sub_((self.alpha[rows].log() - n.log())[:, None])

    def above_beta(self, rows: slice, s: Tensor, log_mean: Tensor) -> Tensor:
        """s_ij - u_i for i in rows."""
        return (s - log_mean[:, None]).sub_(self.beta[rows].log()[:, None])

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
        if self.bits is not None:
            return self.adaptive(rows) & self.adaptive_back(rows) if self.options.reciprocal else self.adaptive(rows)
        shape = (rows.stop - rows.start, self.k.shape[0])
        everybody = torch.full(shape, self.beta is None, dtype=torch.bool, device=self.q.device)
        pairs = self.real_pairs(rows)
        return everybody if pairs is None else everybody & pairs

    def in_window(self, rows: slice) -> tuple[Tensor, Tensor]:
        """The window around i in rows: its columns and which of them are real neighbours, both [rows, positions]."""
        columns, inside = window_columns(self.options, rows, self.q.device)
        if self.real_k is not None:
            inside = inside & self.real_k[columns] & self.real_q[rows, None]
        return columns, inside

    def local_pairs(self, rows: slice) -> Tensor | None:
        """L_ij for i in rows [rows, N_k]; None without a local block."""
        return None if self.local is None else self._scatter_window(rows, lambda columns: self.local[rows])

    def local_pairs_back(self, rows: slice) -> Tensor | None:
        """L_ji for i in rows [rows, N_q]; None without a local block."""
        opposite = torch.arange(self.options.positions - 1, -1, -1, device=self.q.device)
        return None if self.local is None else self._scatter_window(rows, lambda columns: self.local[columns, opposite])

    def _scatter_window(self, rows: slice, flags_of: Callable[[Tensor], Tensor]) -> Tensor:
        columns, inside = window_columns(self.options, rows, self.q.device)
        flags = flags_of(columns)
        # Columns outside the grid repeat the row's own token, so they must write what its own place writes.
        centre = self.options.positions // 2
        flags = torch.where(inside, flags, flags[:, centre : centre + 1])
        return flags.new_zeros(flags.shape[0], self.k.shape[0]).scatter_(-1, columns, flags)

    def kept(self, rows: slice) -> Tensor:
        """K_ij for i in rows [rows, N_k]."""
        return _either(self.non_local(rows), self.local_pairs(rows))

    def nan_rows(self, rows: slice, lse: Tensor) -> Tensor:
        """Rows whose scores have no softmax or whose threshold has no logarithm; never a padding row."""
        is_nan = ~lse.isfinite()
        if self.real_k is not None:
            is_nan = is_nan & self.real_k.any()
        for x in (self.alpha, self.beta):
            if x is not None:
                is_nan = is_nan | ~(x[rows] >= 0)
        return is_nan if self.real_q is None else is_nan & self.real_q[rows]


def _either(mask: Tensor, other: Tensor | None) -> Tensor:
    return mask if other is None else mask | other


def _heads(inputs: Inputs, options: Options, saved: Saved) -> Iterator[tuple[tuple[int, int], _Head]]:
    """Yield ((image, head), its problem)."""
    query, key, value, alpha, beta, key_padding_mask = inputs
    dtype = inputs.precision
    thresholded = alpha is not None or options.topk > 0
    for b in range(query.shape[0]):
        real_k = None if key_padding_mask is None else key_padding_mask[b]
        real_q = real_k if query.shape[2] == key.shape[2] else None

        def clean(x: Tensor, real: Tensor | None) -> Tensor:
            x = x.to(dtype)
            return x if real is None else x.masked_fill(~real[:, None], 0)

        for h in range(query.shape[1]):
            v = clean(value[b, h], real_k)
            a, be = (x if x is None else x[b, h % x.shape[1]].to(dtype) for x in (alpha, beta))
            bits = local = None
            if thresholded:
                bits = saved.bits[b, h]
                bits = bits if bits.shape[-1] else bits.new_empty(bits_shape("blocked", query.shape[2], key.shape[2]))
            if beta is not None:
                local = saved.local[b, h]
            tokens = clean(query[b, h], real_q), clean(key[b, h], real_k), v.nan_to_num(0, 0, 0)
            yield (b, h), _Head(*tokens, ~v.isfinite().all(-1), a, be, real_q, real_k, options, bits, local)


def fwd(inputs: Inputs, options: Options, saved: Saved, band: float | None) -> None:
    """Write into ``saved``; thresholds that learn, within ``band``, need no more of it."""
    if not inputs.key.shape[2]:  # nobody to attend to
        for x, empty in zip(saved[:4], (0, -torch.inf, -torch.inf, 0), strict=True):
            x.fill_(empty)
        return
    for at, head in _heads(inputs, options, saved):
        mine = Saved(*(x[at] for x in saved))
        one_pass = not (options.reciprocal and head.bits is not None)
        for rows in head.blocks:
            s = head.scores(rows)
            mine.lse[rows] = log_sum_exp(s)
            _find(head, rows, s, mine)
            if one_pass:
                _aggregate(head, rows, s, mine)
        if not one_pass:
            for rows in head.blocks:
                _aggregate(head, rows, head.scores(rows), mine)
        if head.real_q is not None:
            mine.lse.masked_fill_(~head.real_q, -torch.inf)


def _find(head: _Head, rows: slice, s: Tensor, saved: Saved) -> None:
    """Pass 1: from the scores of ``rows`` to thresholds, neighbour bits and window bits."""
    if head.bits is not None:
        if head.alpha is None:
            neighbours = torch.ones_like(s, dtype=torch.bool)
        else:
            neighbours = head.above_alpha(rows, s, saved.lse[rows]) > 0
        if head.options.topk:
            saved.kappa[rows] = s.topk(head.options.topk).values[:, -1]
            neighbours &= s >= saved.kappa[rows, None]
        neighbours[:, : head.options.extra] = True
        neighbours[: max(head.options.extra - rows.start, 0)] = True
        if (pairs := head.real_pairs(rows)) is not None:
            neighbours &= pairs
        head.bits[rows] = pack_bits(neighbours)
    if head.beta is not None:
        columns, inside = head.in_window(rows)
        s_window = s.gather(-1, columns).masked_fill_(~inside, -torch.inf)
        log_mean = s_window.logsumexp(-1) - inside.sum(-1).to(s.dtype).log()
        saved.log_mean[rows] = log_mean.masked_fill_(~inside.any(-1), -torch.inf)  # padding has no window
        head.local[rows] = inside & (head.above_beta(rows, s_window, log_mean) > 0)


def _aggregate(head: _Head, rows: slice, s: Tensor, saved: Saved) -> None:
    """Pass 2: the softmax over the survivors of ``rows``, times v."""
    kept = head.kept(rows)
    saved.survivors[rows] = kept.sum(-1, dtype=torch.int32)
    empty = saved.survivors[rows] == 0
    logits = _logits(s, kept)
    p = logits.softmax(-1)
    # The largest probability is exp(largest score - lse).
    lse_kept = (logits.amax(-1) - p.amax(-1).log()).masked_fill_(empty, -torch.inf)
    saved.lse_kept[rows] = torch.where(saved.lse[rows].isfinite(), lse_kept, saved.lse[rows])
    out = (p @ head.v).masked_fill_(empty[:, None], 0)
    # v has 0 for values that are not finite: 0 * NaN is NaN, and only a survivor may make its row NaN.
    nan_rows = (kept & head.not_finite).any(-1) | head.nan_rows(rows, saved.lse[rows])
    saved.out[rows] = out.masked_fill_(nan_rows[:, None], torch.nan)


def _logits(s: Tensor, kept: Tensor) -> Tensor:
    """Scores whose softmax is 0 outside ``kept``; the floor is finite, so an empty row has weights, dropped later."""
    return torch.where(kept, s, torch.finfo(s.dtype).min)


def neighbor_graph(inputs: Inputs, options: Options) -> NeighborGraph:
    """Return the survivors K."""
    saved = Saved.new(inputs, options, "blocked", keep=False)

    def rows_of_heads() -> Iterator[Tensor]:
        for at, head in _heads(inputs, options, saved):
            mine = Saved(*(x[at] for x in saved))
            for rows in head.blocks:
                s = head.scores(rows)
                mine.lse[rows] = log_sum_exp(s)
                _find(head, rows, s, mine)
            for rows in head.blocks:
                yield head.kept(rows)

    return NeighborGraph.of_rows(rows_of_heads(), inputs.query.device)


def bwd(
    do: Tensor, inputs: Inputs, saved: Saved, options: Options, band: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return dq, dk, dv and, unless ``band`` is None, the straight-through dalpha and dbeta, [B, heads, N_q].

    A row whose output is NaN makes the gradients of its image and head NaN.
    """
    dq, dk, dv = (x.new_zeros(x.shape) for x in inputs[:3])
    learning = [x if band is not None else None for x in (inputs.alpha, inputs.beta)]
    dalpha, dbeta = (x if x is None else saved.lse.new_zeros(saved.lse.shape) for x in learning)
    if not inputs.key.shape[2]:
        return dq, dk, dv, dalpha, dbeta
    for at, head in _heads(inputs, options, saved):
        mine = Saved(*(x[at] for x in saved))
        do_, out = do[at].to(head.q.dtype), mine.out.to(head.q.dtype)
        if head.real_q is not None:  # their output is the constant 0
            do_ = do_.masked_fill(~head.real_q[:, None], 0)
        do_ = do_.masked_fill(out.isnan().any(-1, keepdim=True), torch.nan)
        delta = torch.empty_like(mine.lse)  # <do_i, out_i>, not from out: it may be rounded to half precision
        dk_, dv_ = torch.zeros_like(head.k), torch.zeros_like(head.v)
        for rows in head.blocks:
            s = head.scores(rows)
            empty = (mine.survivors[rows] == 0)[:, None]
            p = _logits(s, head.kept(rows)).softmax(-1)
            do_rows = do_[rows].masked_fill(empty, 0)
            dv_.addmm_(p.mT, do_rows)
            dp = do_rows @ head.v.mT
            delta[rows] = torch.linalg.vecdot(p, dp)
            ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype).mul_(options.scale)
            dq[at][rows] = (ds @ head.k).to(dq.dtype)
            dk_.addmm_(ds.mT, head.q[rows])
        if band is not None:
            for rows in head.blocks:
                _threshold_gradients(head, at, rows, mine, band, do_, delta, dalpha, dbeta)
        dk[at].copy_(dk_)
        dv[at].copy_(dv_)
        if head.real_k is not None:
            dk[at].masked_fill_(~head.real_k[:, None], 0)
            dv[at].masked_fill_(~head.real_k[:, None], 0)
        if head.real_q is not None:
            dq[at].masked_fill_(~head.real_q[:, None], 0)
            for x in (dalpha, dbeta):
                if x is not None:
                    x[at].masked_fill_(~head.real_q, 0)
    return dq, dk, dv, dalpha, dbeta


def _threshold_gradients(
    head: _Head,
    at: tuple[int, int],
    rows: slice,
    saved: Saved,
    band: float,
    do: Tensor,
    delta: Tensor,
    dalpha: Tensor | None,
    dbeta: Tensor | None,
) -> None:
    """Write the straight-through gradients of ``rows`` (``asa_ops.asa``, "Gradients") into dalpha and dbeta."""
    s = head.scores(rows)
    non_local, local = head.non_local(rows), head.local_pairs(rows)
    g = _admission_weight(s, saved.lse_kept[rows, None], _either(non_local, local))
    g.mul_((do[rows] @ head.v.mT).sub_(delta[rows, None]))
    if head.alpha is not None:
        offer = g if local is None else g.masked_fill(local, 0)
        if head.options.reciprocal:
            local_back = head.local_pairs_back(rows)
            kept_back = _either(non_local, local_back)  # M is symmetric
            g_back = _admission_weight(head.scores_back(rows), saved.lse_kept, kept_back)
            g_back.mul_((head.v[rows] @ do.mT).sub_(delta))
            offer = offer + (g_back if local_back is None else g_back.masked_fill_(local_back, 0))
            offer.masked_fill_(~head.adaptive_back(rows), 0)
        if head.options.topk:  # a neighbour is among the k largest, whatever the last bits of its score are here
            offer = offer.masked_fill((s < saved.kappa[rows, None]) & ~head.adaptive(rows), 0)
        offer[:, : head.options.extra] = 0  # whoever keeps extra tokens, thresholds are not why
        step = _step_derivative(head.above_alpha(rows, s, saved.lse[rows]), band)
        dalpha[at][rows] = _by_multiplier(step.mul_(offer), head.alpha[rows])
    if head.beta is not None:
        columns, inside = head.in_window(rows)
        offer = g.gather(-1, columns).masked_fill_(non_local.gather(-1, columns) | ~inside, 0)
        step = _step_derivative(head.above_beta(rows, s.gather(-1, columns), saved.log_mean[rows]), band)
        dbeta[at][rows] = _by_multiplier(step.mul_(offer), head.beta[rows])


def _admission_weight(s: Tensor, lse_kept: Tensor, kept: Tensor) -> Tensor:
    """c_ij: to first order, the weight that pair (i, j) has, or would have if admitted."""
    gap = s - lse_kept
    return torch.where(kept, gap.clamp(max=0).exp(), gap.sigmoid()).masked_fill_(lse_kept == -torch.inf, 1)


def _step_derivative(z: Tensor, band: float) -> Tensor:
    """d(z): a triangle of half width ``band`` and area 1; 0 at infinite distance (padding)."""
    return z.abs().div_(-band).add_(1).clamp_(min=0).div_(band).masked_fill_(~z.isfinite(), 0)


def _by_multiplier(terms: Tensor, multiplier: Tensor) -> Tensor:
    """Gradient by a multiplier from the terms of that by its threshold, -sum / multiplier; 0 where it is about 0."""
    return (-terms.sum(-1) / multiplier).masked_fill_(multiplier < LEAST_MULTIPLIER, 0)
