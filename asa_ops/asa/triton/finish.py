"""Rows and columns come to their end: parts of sums added up, local survivors beside them, results in raster order.

The one visitor of the window is here, :func:`_visit`. Gradients of a head in which an output row is NaN are NaN.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ...core import triton_launch
from ..types import LEAST_MULTIPLIER, Saved
from .arrange import RowGradients
from .problem import Bits, PerHead, Problem, Tokens, Window
from .select import Neighbours
from .sums import Across, Sums
from .thresholds import Thresholds
from .tiles import (
    LN_2,
    SCALARS,
    UNROLL,
    admission_weight,
    back_of,
    bit_at,
    constants,
    exponential,
    in_window,
    multiplier_of,
    nan_note,
    of_head,
    own_rows,
    raster_of,
    rows_of,
    shrink_of,
    step_derivative,
    words_of,
)
from .window import Local

LEAST = tl.constexpr(LEAST_MULTIPLIER)


class Rows(NamedTuple):
    """What the kernels here are compiled for: BLOCK rows a program, widths of tokens, the window; constants."""

    BLOCK: int
    DIM: int
    DIM_V: int
    WINDOW: Window
    MUTUAL: bool
    ONE_WAY_BITS: bool


def _rows(problem: Problem, block: int | None = None) -> Rows:
    widths = problem.width, problem.width_v
    return constants(Rows(block or problem.block, *widths, problem.window, problem.mutual, problem.one_way_bits))


class Multipliers(NamedTuple):
    alpha: Tensor | None
    beta: Tensor | None


class Factors(NamedTuple):
    """What scores, their gradients and thresholds are multiplied by, and the half width of a threshold's slope."""

    scale: float
    scale2: float
    band: float
    multipliers: Multipliers


class Outputs(NamedTuple):
    """What a forward writes of rows, in raster order."""

    out: Tensor
    residual: PerHead  # what rounding takes from out, so that the backward has it to more digits
    lse: Tensor  # read
    lse_kept: Tensor
    base2: PerHead  # for the backward
    survivors: Tensor


class Gradients(NamedTuple):
    """What a backward writes, in raster order; 0 at padding."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dalpha: Tensor | None
    dbeta: Tensor | None


class GradientSums(NamedTuple):
    """Sums over neighbours: dq / scale, -dl/dt, dk / scale and dv."""

    q: Sums
    t: Sums
    k: Sums
    v: Sums


class Visited(NamedTuple):
    """What a visitor of the window knows of an image and head; made within kernels."""

    local: object  # uint8 [n, POSITIONS] local survivors
    words: object  # bits of neighbours by the words of its side, None without any
    back: object  # and by those of the other side
    place: object  # positions of tokens
    n: object
    height: object
    width: object
    extra: object
    own: object  # how many positions its side has, and the other one
    others: object


@triton.jit
def _load_rows(x, at, valid, WIDTH: tl.constexpr):
    """Rows at ``at`` of arranged tokens, float32; 0 where they are not ``valid``, None: all are."""
    rows = x + at[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    if valid is None:
        tile = tl.load(rows)
    else:
        tile = tl.load(rows, mask=valid[:, None], other=0)
    return tile.to(tl.float32)


@triton.jit
def _sum_of_parts(numbers, sums, at, BLOCK: tl.constexpr):
    """The sum of the parts of one number a row, a field of ``sums``."""
    acc = tl.zeros([BLOCK], tl.float32)
    if sums.SPLITS > 0:
        for split in range(sums.SPLITS):
            acc += tl.load(numbers + split * tl.cast(sums.rows, tl.int64) + at)
    return acc


@triton.jit
def _sum_of_wide_parts(sums, at, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The sums of the parts of WIDTH numbers a row."""
    d = tl.arange(0, WIDTH)
    acc = tl.zeros([BLOCK, WIDTH], tl.float32)
    if sums.SPLITS > 0:
        for split in range(sums.SPLITS):
            acc += tl.load(sums.partial + (split * tl.cast(sums.rows, tl.int64) + at)[:, None] * WIDTH + d[None, :])
    return acc


@triton.jit
def _window_of_rows(local, bits, tokens, z, image, n, height, width, extra):
    """The windows of rows, among all keys."""
    place, own, others = tokens.keys.place + image * n, tokens.rows.padded, tokens.keys.padded
    return Visited(of_head(local, z), words_of(bits, z), back_of(bits, z), place, n, height, width, extra, own, others)


@triton.jit
def _visit(window, z, p, token, offset, OF_KEYS: tl.constexpr, ALL: tl.constexpr, ROWS):
    """The pairs of the tokens at positions p with the ``offset``-th tokens of their windows.

    The tokens at p are rows and the others keys, or keys and rows if OF_KEYS. Returned are the others and their
    positions, whether there is one, whether the pair survives locally, and its neighbour bits from p to the other and
    back (one where there is one only). Bits are read of pairs that survive locally; if ALL, of all.
    """
    POSITIONS: tl.constexpr = ROWS.WINDOW.POSITIONS
    other, at, there = in_window(
        window.place, token, offset, window.n, window.height, window.width, window.extra, ROWS.WINDOW
    )
    if OF_KEYS:
        flag = window.local + other.to(tl.int64) * POSITIONS + (POSITIONS - 1 - offset)
    else:
        flag = window.local + token.to(tl.int64) * POSITIONS + offset
    survives = tl.load(flag, mask=there, other=0) != 0
    one_way = there & False
    other_way = one_way
    if window.words is not None:
        read = there if ALL else survives
        if OF_KEYS and not ROWS.MUTUAL:
            one_way = bit_at(window.back, at, p, window.others, read)
            other_way = one_way
        else:
            one_way = bit_at(window.words, p, at, window.own, read)
            other_way = one_way
            if ROWS.ONE_WAY_BITS:
                other_way = bit_at(window.back, at, p, window.others, read)
    return other, at, there, survives, one_way, other_way


@triton.jit
def _visit_new(window, z, p, token, offset, OF_KEYS: tl.constexpr, ROWS):
    """Positions of the ``offset``-th tokens of windows, and whether the pairs survive locally only."""
    _, at, _, survives, one_way, other_way = _visit(window, z, p, token, offset, OF_KEYS, False, ROWS)
    return at, survives & ((one_way & other_way) == 0)


@triton.jit
def _add_local_survivors(acc, summed, m, count, nan_row, tokens, window, z, p, token, scale2, ROWS):
    """Add the pairs that survive locally only to a row's sums of values and weights, largest score and count."""
    q_i = _load_rows(tokens.q, z * window.own + p, None, ROWS.DIM)
    for offset in range(ROWS.WINDOW.POSITIONS):  # unrolled it needs so many registers that it is slower
        at, new = _visit_new(window, z, p, token, offset, False, ROWS)
        at_key = z * window.others + at
        s = tl.sum(q_i * _load_rows(tokens.k, at_key, new, ROWS.DIM), 1) * scale2
        s = tl.where(new, s, -float("inf"))
        m_new = tl.maximum(m, s)
        base = tl.where(m_new == -float("inf"), 0, m_new)
        shrink, weight = tl.exp2(m - base), tl.exp2(s - base)
        acc = acc * shrink[:, None] + weight[:, None] * _load_rows(tokens.v, at_key, new, ROWS.DIM_V)
        summed = summed * shrink + weight
        not_finite = tl.load(tokens.not_finite + z * (window.others // 32) + at // 32, mask=new, other=0)
        nan_row |= ((not_finite >> (at % 32)) & 1) != 0
        count += new.to(tl.int32)
        m = m_new
    return acc, summed, m, count, nan_row


@triton.jit(do_not_specialize=SCALARS)
def _asa_finish_out_kernel(
    sums, neighbours, tokens, local, outputs, multipliers, alpha_stride_b, alpha_stride_h, alpha_stride_n,
    beta_stride_b, beta_stride_h, beta_stride_n, scale2, heads, sharing, n, height, width, extra, dim_v, ROWS,
):  # fmt: skip
    """Finish rows: the parts of the sum over neighbours, the local survivors beside them, output and statistics.

    Those of padding are 0, -inf and 0.
    """
    stats, bits = neighbours.stats, neighbours.bits
    padded = tokens.rows.padded
    z, p = own_rows(padded, ROWS.BLOCK)
    image = z // sharing
    token = tl.load(tokens.rows.order + image * padded + p)
    real = token >= 0
    at_row = z * padded + p
    acc = _sum_of_wide_parts(sums, at_row, ROWS.DIM_V, ROWS.BLOCK)
    summed = _sum_of_parts(sums.total, sums, at_row, ROWS.BLOCK)
    m = tl.full([ROWS.BLOCK], -float("inf"), tl.float32)
    if stats.largest is not None:
        m = tl.load(stats.largest + at_row)
    count = tl.zeros([ROWS.BLOCK], tl.int32)
    nan_row = count != 0
    if ROWS.WINDOW.POSITIONS > 0:
        window = _window_of_rows(local, bits, tokens, z, image, n, height, width, extra)
        acc, summed, m, count, nan_row = _add_local_survivors(
            acc, summed, m, count, nan_row, tokens, window, z, p, token, scale2, ROWS
        )
    # Neighbours are counted after the window: held through it, the two numbers would spill.
    if stats.largest is not None:
        count += tl.load(stats.counts + at_row)
        nan_row |= tl.load(stats.not_finite + at_row) != 0
    written, in_raster = token != -1, raster_of(token)
    row = z * n + in_raster
    row_lse = tl.load(outputs.lse + row, mask=real, other=-float("inf"))
    empty = count == 0
    summed = tl.where(empty, 1, summed)
    acc = tl.where(empty[:, None], 0, acc / summed[:, None])
    # A row of scores with NaN or +inf has no softmax, a negative threshold no logarithm.
    finite = tl.abs(row_lse) < float("inf")
    undefined = finite == 0
    if multipliers.alpha is not None:
        alpha = multiplier_of(multipliers.alpha, z, token, real, heads, alpha_stride_b, alpha_stride_h, alpha_stride_n)
        undefined |= (alpha >= 0) == 0
    if multipliers.beta is not None:
        beta = multiplier_of(multipliers.beta, z, token, real, heads, beta_stride_b, beta_stride_h, beta_stride_n)
        undefined |= (beta >= 0) == 0
    undefined &= tl.load(tokens.keys.counts + image) > 0
    acc = tl.where((real & (nan_row | undefined))[:, None], float("nan"), acc)
    tl.store(outputs.lse + row, row_lse, mask=written & (real == 0))
    tl.store(outputs.lse_kept + row, tl.where(finite, (m + tl.log2(summed)) * LN_2, row_lse), mask=written)
    tl.store(outputs.survivors + row, count, mask=written)
    rounded = acc.to(outputs.out.dtype.element_ty)
    d_v = tl.arange(0, ROWS.DIM_V)
    at_out = in_raster.to(tl.int64)[:, None] * dim_v + d_v[None, :]
    there = written[:, None] & (d_v < dim_v)[None, :]
    tl.store(outputs.out + z * n * dim_v + at_out, rounded, mask=there)
    if outputs.base2.numbers is not None:
        base2 = of_head(outputs.base2, z) + in_raster
        tl.store(base2, 0.0, mask=written & (real == 0))
        tl.store(base2 + n, tl.where(real, m, 0), mask=written)
        tl.store(base2 + 2 * n, tl.where(real, summed, 0), mask=written)
    if outputs.residual.numbers is not None:
        residual = (acc - rounded.to(tl.float32)).to(outputs.out.dtype.element_ty)
        tl.store(of_head(outputs.residual, z) + at_out, residual, mask=there)


def finish_out(problem: Problem, tokens: Tokens, saved: Saved, neighbours: Neighbours, sums: Sums) -> None:
    """Write the output and its statistics to ``saved``."""
    alpha, beta = problem.inputs[3:5]
    residual, base2 = PerHead.of(saved.residual), PerHead.of(saved.base2)
    outputs = Outputs(saved.out, residual, saved.lse, saved.lse_kept, base2, saved.survivors)
    triton_launch.launch(
        _asa_finish_out_kernel, problem.row_programs, sums, neighbours, tokens, PerHead.of(saved.local), outputs,
        Multipliers(alpha, beta), *problem.strides(alpha), *problem.strides(beta), problem.scale2, problem.heads,
        problem.sharing, problem.n, *problem.of_grid, problem.dim_v, ROWS=_rows(problem), warps=problem.warps,
    )  # fmt: skip


@triton.jit
def _gradient_of_score(q_i, do_i, k_j, v_j, new, top_i, share_i, delta_i, scale2):
    """Weights of pairs that survive locally only, and the gradients of their scores; 0 of other pairs."""
    weight = exponential(tl.sum(q_i * k_j, 1) * scale2 - top_i, new) * share_i
    return weight, tl.where(new, weight * (tl.sum(do_i * v_j, 1) - delta_i), 0)


@triton.jit(do_not_specialize=SCALARS)
def _asa_correct_delta_kernel(sums, bits, tokens, local, row, scale2, sharing, n, height, width, extra, ROWS):
    """Add to delta what is missing until sum_j p_ij (<do_i, v_j> - delta_i) is 0, neighbours' parts given.

    delta comes from the output; its rounding reaches every pair of a row with the same sign. In float32 that is the
    largest error of the gradients where many survive, in half precisions it is below the rounding of the weights.
    """
    padded = tokens.rows.padded
    z, p = own_rows(padded, ROWS.BLOCK)
    at_row = z * padded + p
    delta_i = tl.load(row.delta + at_row)
    missing = _sum_of_parts(sums.partial, sums, at_row, ROWS.BLOCK)
    if ROWS.WINDOW.POSITIONS > 0:
        token = tl.load(tokens.rows.order + z // sharing * padded + p)
        window = _window_of_rows(local, bits, tokens, z, z // sharing, n, height, width, extra)
        q_i = _load_rows(tokens.q, at_row, None, ROWS.DIM)
        do_i = _load_rows(tokens.do, at_row, None, ROWS.DIM_V)
        top_i, share_i = tl.load(row.top + at_row), tl.load(row.share + at_row)
        for offset in tl.range(ROWS.WINDOW.POSITIONS, loop_unroll_factor=UNROLL):
            at, new = _visit_new(window, z, p, token, offset, False, ROWS)
            at_key = z * tokens.keys.padded + at
            k_j = _load_rows(tokens.k, at_key, new, ROWS.DIM)
            v_j = _load_rows(tokens.v, at_key, new, ROWS.DIM_V)
            _, ds = _gradient_of_score(q_i, do_i, k_j, v_j, new, top_i, share_i, delta_i, scale2)
            missing += ds
    tl.store(row.delta + at_row, delta_i + missing)


def correct_delta(
    problem: Problem, tokens: Tokens, saved: Saved, bits: Bits, row: RowGradients, delta_error: Sums
) -> None:
    """Correct delta in place by what it misses over neighbours, ``delta_error``, and over local survivors."""
    triton_launch.launch(
        _asa_correct_delta_kernel, problem.row_programs, delta_error, bits, tokens, PerHead.of(saved.local), row,
        problem.scale2, problem.sharing, problem.n, *problem.of_grid, ROWS=_rows(problem), warps=problem.warps,
    )  # fmt: skip


@triton.jit
def _alpha_term(
    offer, s2, other, offset, at_row, at_key, there, survives, one_way, other_way,
    tokens, thresholds, row, across, window, z, factors, ROWS,
):  # fmt: skip
    """What a pair of the window adds to -dl/dt; ``offer``: what admitting it would change."""
    lse_i, cut_i = tl.load(thresholds.lse2 + at_row), tl.load(thresholds.cut2 + at_row)
    step = step_derivative(((s2 - lse_i) - cut_i) * LN_2, factors.band)
    counts = there & (step > 0)
    if thresholds.kappa2 is not None:
        counts &= s2 >= tl.load(thresholds.kappa2 + at_row)
    offer = tl.where(survives, 0, offer)
    if ROWS.ONE_WAY_BITS:  # as they are where neighbours must be mutual and alpha learns
        counts &= other_way
        POSITIONS: tl.constexpr = ROWS.WINDOW.POSITIONS
        flag = window.local + other.to(tl.int64) * POSITIONS + (POSITIONS - 1 - offset)
        back_survives = tl.load(flag, mask=there, other=0) != 0
        if across is not None:  # at_row is among its own keys, at_key among all rows
            tokens = across.tokens
            row = across.row
        k_i, q_j = _load_rows(tokens.k, at_row, None, ROWS.DIM), _load_rows(tokens.q, at_key, there, ROWS.DIM)
        back2 = tl.sum(k_i * q_j, 1) * factors.scale2
        v_i, do_j = _load_rows(tokens.v, at_row, None, ROWS.DIM_V), _load_rows(tokens.do, at_key, there, ROWS.DIM_V)
        dp_back = tl.sum(v_i * do_j, 1) - tl.load(row.delta + at_key)
        kept_j = tl.load(row.lse_kept2 + at_key)
        weight = admission_weight(back2 - kept_j, one_way & other_way, kept_j == -float("inf"))
        offer += tl.where(back_survives, 0, weight * dp_back)
    return tl.where(counts, step * offer, 0)


@triton.jit
def _add_window_gradients(
    acc, dt, du, tokens, thresholds, row, across, window, log_mean2, log_beta2, z, p, token, factors,
    LEARN_ALPHA: tl.constexpr, LEARN_BETA: tl.constexpr, ROWS,
):  # fmt: skip
    """Add the pairs of the window to dq / scale, -dl/dt and -dl/du."""
    scale2 = factors.scale2
    at_row = z * window.own + p
    LEARN: tl.constexpr = LEARN_ALPHA or LEARN_BETA
    q_i, do_i = _load_rows(tokens.q, at_row, None, ROWS.DIM), _load_rows(tokens.do, at_row, None, ROWS.DIM_V)
    top_i, share_i, delta_i = tl.load(row.top + at_row), tl.load(row.share + at_row), tl.load(row.delta + at_row)
    if LEARN_BETA:
        mean_i = tl.load(of_head(log_mean2, z) + token, mask=token >= 0, other=0)
    # Both directions of a pair take so many registers that three pairs at a time would spill.
    AT_A_TIME: tl.constexpr = 1 if ROWS.ONE_WAY_BITS else UNROLL
    for offset in tl.range(ROWS.WINDOW.POSITIONS, loop_unroll_factor=AT_A_TIME):
        other, at, there, survives, one_way, other_way = _visit(window, z, p, token, offset, False, LEARN, ROWS)
        neighbour = one_way & other_way
        new = survives & (neighbour == 0)
        used = there if LEARN else new
        at_key = z * window.others + at
        k_j, v_j = _load_rows(tokens.k, at_key, used, ROWS.DIM), _load_rows(tokens.v, at_key, used, ROWS.DIM_V)
        s2 = tl.sum(q_i * k_j, 1) * scale2
        dp = tl.sum(do_i * v_j, 1) - delta_i
        ds = tl.where(new, exponential(s2 - top_i, new) * share_i * dp, 0)
        acc += ds[:, None] * k_j
        if LEARN:
            kept_i = tl.load(row.lse_kept2 + at_row)
            offer = admission_weight(s2 - kept_i, survives | neighbour, kept_i == -float("inf")) * dp
        if LEARN_BETA:
            # In the forward's terms: a score that is its window's mean is so here too, to the last bit.
            step = step_derivative(((s2 - mean_i) - log_beta2) * LN_2, factors.band)
            du += tl.where(there & (neighbour == 0) & (step > 0), step * offer, 0)
        if LEARN_ALPHA:
            dt += _alpha_term(
                offer, s2, other, offset, at_row, at_key, there, survives, one_way, other_way, tokens, thresholds, row,
                across, window, z, factors, ROWS,
            )  # fmt: skip
    return acc, dt, du


@triton.jit
def _store_threshold_gradient(out, at, negative, multiplier, not_finite, real, written):
    """Store dl/dalpha from -dl/dt, or dl/dbeta from -dl/du; 0 where the multiplier is about 0, as it is of padding."""
    zero = multiplier < LEAST
    gradient = tl.where(zero, 0, -negative / tl.where(zero, 1, multiplier))
    tl.store(out + at, tl.where(not_finite & real, float("nan"), gradient), mask=written)


@triton.jit
def _finish_dq(
    program, sums, bits, tokens, thresholds, row, across, local, gradients, factors,
    alpha_stride_b, alpha_stride_h, alpha_stride_n, beta_stride_b, beta_stride_h, beta_stride_n,
    heads, sharing, n, height, width, extra, dim, ROWS,
):  # fmt: skip
    """dq, dalpha and dbeta of BLOCK rows."""
    padded = tokens.rows.padded
    z, p = rows_of(program, padded, ROWS.BLOCK)
    token = tl.load(tokens.rows.order + z // sharing * padded + p)
    real = token >= 0
    at_row = z * padded + p
    LEARN_ALPHA: tl.constexpr = gradients.dalpha is not None
    LEARN_BETA: tl.constexpr = gradients.dbeta is not None
    acc = _sum_of_wide_parts(sums.q, at_row, ROWS.DIM, ROWS.BLOCK)
    acc /= shrink_of(tokens.bounds, z)
    dt = _sum_of_parts(sums.t.partial, sums.t, at_row, ROWS.BLOCK)  # -dl/dt
    du = tl.zeros([ROWS.BLOCK], tl.float32)  # -dl/du
    if ROWS.WINDOW.POSITIONS > 0:
        log_beta2 = du
        if LEARN_BETA:
            log_beta2 = tl.log2(multiplier_of(
                factors.multipliers.beta, z, token, real, heads, beta_stride_b, beta_stride_h, beta_stride_n
            ))  # fmt: skip
        window = _window_of_rows(local.survives, bits, tokens, z, z // sharing, n, height, width, extra)
        acc, dt, du = _add_window_gradients(
            acc, dt, du, tokens, thresholds, row, across, window, local.log_mean2, log_beta2, z, p, token, factors,
            LEARN_ALPHA, LEARN_BETA, ROWS,
        )  # fmt: skip
    not_finite = tl.load(nan_note(row.notes, z)) != 0
    acc = tl.where(real[:, None], tl.where(not_finite, float("nan"), acc * factors.scale), 0)
    d = tl.arange(0, ROWS.DIM)
    written, at = token != -1, z * n + raster_of(token)
    there = written[:, None] & (d < dim)[None, :]
    tl.store(gradients.dq + at[:, None] * dim + d[None, :], acc.to(gradients.dq.dtype.element_ty), mask=there)
    if LEARN_ALPHA:
        alpha = factors.multipliers.alpha
        alpha = multiplier_of(alpha, z, token, real, heads, alpha_stride_b, alpha_stride_h, alpha_stride_n)
        _store_threshold_gradient(gradients.dalpha, at, dt, alpha, not_finite, real, written)
    if LEARN_BETA:
        beta = factors.multipliers.beta
        beta = multiplier_of(beta, z, token, real, heads, beta_stride_b, beta_stride_h, beta_stride_n)
        _store_threshold_gradient(gradients.dbeta, at, du, beta, not_finite, real, written)


@triton.jit
def _finish_dkv(
    program, sums, bits, tokens, local, row, gradients, scale, scale2, sharing, n, height, width, extra, dim, dim_v,
    ROWS,
):  # fmt: skip
    """dk and dv of BLOCK keys; in the window of a key are the queries whose windows hold it."""
    padded = tokens.keys.padded
    z, p = rows_of(program, padded, ROWS.BLOCK)
    token = tl.load(tokens.keys.order + z // sharing * padded + p)
    real = token >= 0
    at_key = z * padded + p
    acc_k = _sum_of_wide_parts(sums.k, at_key, ROWS.DIM, ROWS.BLOCK)
    acc_k /= shrink_of(tokens.bounds, z)
    acc_v = _sum_of_wide_parts(sums.v, at_key, ROWS.DIM_V, ROWS.BLOCK)
    if ROWS.WINDOW.POSITIONS > 0:
        place, others = tokens.rows.place + z // sharing * n, tokens.rows.padded
        words, back = words_of(bits, z), back_of(bits, z)
        window = Visited(of_head(local, z), words, back, place, n, height, width, extra, padded, others)
        k_j = _load_rows(tokens.k, at_key, None, ROWS.DIM)
        v_j = _load_rows(tokens.v, at_key, None, ROWS.DIM_V)
        for offset in range(ROWS.WINDOW.POSITIONS):
            at, new = _visit_new(window, z, p, token, offset, True, ROWS)
            at_row = z * others + at
            q_i = _load_rows(tokens.q, at_row, new, ROWS.DIM)
            do_i = _load_rows(tokens.do, at_row, new, ROWS.DIM_V)
            top_i, share_i = tl.load(row.top + at_row), tl.load(row.share + at_row)
            delta_i = tl.load(row.delta + at_row)
            weight, ds = _gradient_of_score(q_i, do_i, k_j, v_j, new, top_i, share_i, delta_i, scale2)
            acc_k += ds[:, None] * q_i
            acc_v += weight[:, None] * do_i
    not_finite = tl.load(nan_note(row.notes, z)) != 0
    acc_k = tl.where(real[:, None], tl.where(not_finite, float("nan"), acc_k * scale), 0)
    acc_v = tl.where(real[:, None], tl.where(not_finite, float("nan"), acc_v), 0)
    written, at = token != -1, z * n + raster_of(token)
    d, d_v = tl.arange(0, ROWS.DIM), tl.arange(0, ROWS.DIM_V)
    there = written[:, None] & (d < dim)[None, :]
    tl.store(gradients.dk + at[:, None] * dim + d[None, :], acc_k.to(gradients.dk.dtype.element_ty), mask=there)
    there = written[:, None] & (d_v < dim_v)[None, :]
    tl.store(gradients.dv + at[:, None] * dim_v + d_v[None, :], acc_v.to(gradients.dv.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=SCALARS)
def _asa_finish_gradients_kernel(
    sums, bits, tokens, thresholds, row, across, local, gradients, factors,
    alpha_stride_b, alpha_stride_h, alpha_stride_n, beta_stride_b, beta_stride_h, beta_stride_n,
    heads, sharing, n, n_keys, height, width, extra, dim, dim_v, ROWS,
):  # fmt: skip
    """All gradients: some programs finish BLOCK rows each, the others BLOCK keys each, of ``across`` if given."""
    keys = tokens.keys.padded
    if across is not None:
        keys = across.tokens.keys.padded
    of_rows = tokens.rows.padded // ROWS.BLOCK  # programs, of a head
    program = tl.program_id(0) - tl.num_programs(0) // (of_rows + keys // ROWS.BLOCK) * of_rows
    if program < 0:
        _finish_dq(
            tl.program_id(0), sums, bits, tokens, thresholds, row, across, local, gradients, factors,
            alpha_stride_b, alpha_stride_h, alpha_stride_n, beta_stride_b, beta_stride_h, beta_stride_n,
            heads, sharing, n, height, width, extra, dim, ROWS,
        )  # fmt: skip
    elif across is None:
        _finish_dkv(
            program, sums, bits, tokens, local.survives, row, gradients, factors.scale, factors.scale2, sharing,
            n_keys, height, width, extra, dim, dim_v, ROWS,
        )  # fmt: skip
    else:
        _finish_dkv(
            program, sums, across.bits, across.tokens, local.survives, across.row, gradients, factors.scale,
            factors.scale2, sharing, n_keys, height, width, extra, dim, dim_v, ROWS,
        )  # fmt: skip


def finish_gradients(
    problem: Problem, tokens: Tokens, saved: Saved, bits: Bits, row: RowGradients, thresholds: Thresholds,
    band: float | None, sums: GradientSums, gradients: Gradients, across: Across | None = None,
) -> None:  # fmt: skip
    """Write all gradients, of thresholds where they are asked for; of a part of the rows, keys are those ``across``."""
    alpha, beta = problem.inputs[3:5]
    factors = Factors(problem.scale, problem.scale2, band or 1.0, Multipliers(alpha, beta))
    # Rows take more registers than keys, most where thresholds learn and in float32. Small programs leave room for more
    # of them side by side: three on a multiprocessor where a thread has at most 168.
    block, learns = problem.block // (problem.warps // 4), band is not None
    keys = (tokens if across is None else across.tokens).keys.padded
    triton_launch.launch(
        _asa_finish_gradients_kernel, (problem.n_heads * (tokens.rows.padded + keys) // block,), sums,
        bits, tokens, thresholds, row, across, Local(PerHead.of(saved.log_mean), PerHead.of(saved.local)),
        gradients, factors, *problem.strides(alpha), *problem.strides(beta), problem.heads,
        problem.sharing, problem.n, problem.n_keys, *problem.of_grid, problem.dim, problem.dim_v,
        ROWS=_rows(problem, block), registers=255 if learns or problem.dtype.itemsize == 4 else 168,
    )  # fmt: skip
