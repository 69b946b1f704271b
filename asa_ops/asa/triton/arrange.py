"""Tokens in the order and form in which the other kernels read them.

Attention does not depend on the order of tokens, but skipping does: tokens that are neighbours on the map become
neighbours in memory when the map is cut into tiles of 8 x 8. Real positions come first and padding is left out; zeros
follow, up to whole blocks.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core import triton_launch
from ...core.triton_launch import top_of
from ..types import Saved
from .configs import PAD, padded_length
from .problem import Order, PerHead, Problem, Tokens
from .tiles import SCALARS, note_largest, of_head, operand, own_rows


@triton.jit
def _token_at(position, height, width):
    """The token at a position of the 8 x 8 order; tiles at the borders are smaller, no position is empty."""
    band = position // (8 * width)
    in_band = position - band * 8 * width
    tall = tl.maximum(tl.minimum(8, height - 8 * band), 1)
    tile = in_band // (8 * tall)
    in_tile = in_band - tile * 8 * tall
    wide = tl.maximum(tl.minimum(8, width - 8 * tile), 1)
    return (8 * band + in_tile // wide) * width + 8 * tile + in_tile % wide


@triton.jit(do_not_specialize=SCALARS)
def _asa_order_kernel(
    real, order, place, counts, height, width, n, padded, HAS_PADDING: tl.constexpr, BLOCK: tl.constexpr
):
    """order[p]: the token at position p (left as it is where there is none); place[token]: its position, or -1.

    One program an image if there is padding, which takes its blocks one after another.
    """
    image = tl.cast(tl.program_id(0), tl.int64)
    placed = 0
    for start in range(tl.program_id(1) * BLOCK, n, tl.num_programs(1) * BLOCK):
        p = start + tl.arange(0, BLOCK)
        token = _token_at(p, height, width)
        inside = p < n
        position = p
        is_real = inside
        if HAS_PADDING:
            is_real = inside & (tl.load(real + image * n + token, mask=inside, other=0) != 0)
            position = placed + tl.cumsum(is_real.to(tl.int32), 0) - 1
            placed += tl.sum(is_real.to(tl.int32), 0)
        tl.store(order + image * padded + position, token, mask=is_real)
        tl.store(place + image * n + token, tl.where(is_real, position, -1), mask=inside)
    if not HAS_PADDING:
        placed = n
    tl.store(counts + image, placed)


@triton.jit
def _arrange(
    x, out, not_finite, bounds, order, stride_b, stride_h, stride_n, stride_d, heads, sharing, n_heads, dim,
    DIM: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr, CLEAN: tl.constexpr,
):  # fmt: skip
    """out[z, p] = x[token at p], zeros up to DIM; if CLEAN, 0 for what is not finite, noted in words ``not_finite``.

    The largest number of a head is noted in ``bounds`` then, if there are some.
    """
    if tl.program_id(0) < n_heads * (order.padded // BLOCK):
        z, p = own_rows(order.padded, BLOCK)
        token = tl.load(order.order + z // sharing * order.padded + p).to(tl.int64)
        d = tl.arange(0, DIM)
        there = (token >= 0)[:, None] & (d < dim)[None, :]
        source = x + z // heads * stride_b + z % heads * stride_h
        tile = tl.load(source + token[:, None] * stride_n + d[None, :].to(tl.int64) * stride_d, mask=there, other=0)
        if CLEAN:
            finite = tl.abs(tile.to(tl.float32)) < float("inf")
            bits = tl.max((finite == 0).to(tl.int32), 1) << (tl.arange(0, BLOCK) % 32)
            group = tl.program_id(0) * (BLOCK // 32) + tl.arange(0, BLOCK // 32)
            tl.store(not_finite + group, tl.sum(tl.reshape(bits, [BLOCK // 32, 32]), 1))
            tile = tl.where(finite, tile, 0)
            if bounds is not None:
                note_largest(bounds + 2 * z, tl.max(tl.abs(tile.to(tl.float32)), 1))
        tl.store(out + (z * order.padded + p)[:, None] * DIM + d[None, :], operand(tile, PRECISION))


@triton.jit(do_not_specialize=SCALARS)
def _asa_arrange_kernel(
    query, key, value, tokens,
    q_stride_b, q_stride_h, q_stride_n, q_stride_d, k_stride_b, k_stride_h, k_stride_n, k_stride_d,
    v_stride_b, v_stride_h, v_stride_n, v_stride_d, heads, sharing, n_heads, dim, dim_v,
    DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Tokens in order. Axis 1 of the grid: query, value, and key if it is not query."""
    which = tl.program_id(1)
    if which == 0:
        _arrange(query, tokens.q, None, None, tokens.rows, q_stride_b, q_stride_h, q_stride_n, q_stride_d,
                 heads, sharing, n_heads, dim, DIM, BLOCK, PRECISION, False)  # fmt: skip
    elif which == 1:
        _arrange(value, tokens.v, tokens.not_finite, tokens.bounds, tokens.keys, v_stride_b, v_stride_h, v_stride_n,
                 v_stride_d, heads, sharing, n_heads, dim_v, DIM_V, BLOCK, PRECISION, True)  # fmt: skip
    else:
        _arrange(key, tokens.k, None, None, tokens.keys, k_stride_b, k_stride_h, k_stride_n, k_stride_d,
                 heads, sharing, n_heads, dim, DIM, BLOCK, PRECISION, False)  # fmt: skip


class RowGradients(NamedTuple):
    """What the backward needs to know of rows, arranged: [n_heads, padded], ``not_finite`` [n_heads]."""

    delta: Tensor  # <do_i, out_i>
    top: Tensor  # score in base 2 from which on exponentials are 1: -inf without survivors, inf at padding
    share: Tensor  # 1 over the sum of these exponentials
    lse_kept2: Tensor  # log-sum-exp over survivors in base 2, in terms of the largest instead of top
    not_finite: Tensor  # int32, not 0 if a row of the head has the output NaN


@triton.jit(do_not_specialize=SCALARS)
def _asa_arrange_gradient_kernel(
    do, out, residual, base2, survivors, tokens, rows, stride_b, stride_h, stride_n, stride_d, heads, sharing, n, dim,
    DIM: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """tokens.do = do in order, delta_i = <do_i, out_i>, and the other fields of RowGradients, ``rows``.

    A gradient that reaches the constant output of a row without survivors ends there, even a NaN, but for the row's
    thresholds: do is 0 and delta NaN then. A row whose output is NaN marks its image and head.
    """
    z, p = own_rows(tokens.rows.padded, BLOCK)
    at = z * tokens.rows.padded + p
    token = tl.load(tokens.rows.order + z // sharing * tokens.rows.padded + p).to(tl.int64)
    real = token >= 0
    row = z * n + token
    d = tl.arange(0, DIM)
    there = real[:, None] & (d < dim)[None, :]
    source = do + z // heads * stride_b + z % heads * stride_h
    g = tl.load(source + token[:, None] * stride_n + d[None, :].to(tl.int64) * stride_d, mask=there, other=0)
    o = tl.load(out + row[:, None] * dim + d[None, :], mask=there, other=0)
    nan_row = tl.max((o != o).to(tl.int32), 1) != 0
    finite = tl.abs(g.to(tl.float32)) < float("inf")
    empty = tl.load(survivors + row, mask=real, other=0) == 0
    ended = (empty | nan_row)[:, None] & (finite == 0)
    g = tl.where(ended, 0, g)
    g = operand(g, PRECISION)
    tl.store(tokens.do + at[:, None] * DIM + d[None, :], g)
    if tokens.bounds is not None:
        note_largest(tokens.bounds + 2 * z + 1, tl.sum(tl.abs(g.to(tl.float32)), 1))
    # By a product of tiles, as <do_i, v_j> is: where one survivor is all of a row, the two are to be equal.
    products = tl.dot(g, operand(tl.where(o == o, o, 0), PRECISION).T, input_precision=PRECISION)
    if residual.numbers is not None:
        low = tl.load(of_head(residual, z) + token[:, None] * dim + d[None, :], mask=there, other=0)
        products += tl.dot(g, tl.where(low == low, low, 0).T, input_precision=PRECISION)
    i = tl.arange(0, BLOCK)
    of_row = tl.sum(tl.where(i[:, None] == i[None, :], products, 0), 1)
    tl.store(rows.delta + at, tl.where(tl.max(ended.to(tl.int32), 1) != 0, float("nan"), of_row))
    largest = tl.load(of_head(base2, z) + n + token, mask=real, other=float("inf"))
    total = tl.load(of_head(base2, z) + 2 * n + token, mask=real, other=1)
    tl.store(rows.top + at, tl.where(real, top_of(largest), largest))
    tl.store(rows.share + at, 1 / total)
    tl.store(rows.lse_kept2 + at, largest + tl.log2(total))
    tl.atomic_max(rows.not_finite + z, tl.max((nan_row & real).to(tl.int32), 0), sem="relaxed")


def find_order(n: int, grid: tuple[int, int], real: Tensor | None, like: Tensor) -> Order:
    """Find the order of n tokens on a map, of every image where some are not ``real``, bool [B, n]."""
    images = 1 if real is None else real.shape[0]
    height, width = grid if 0 not in grid else (1, n)
    padded = padded_length(n)
    order = like.new_full((images, padded), -1, dtype=torch.int32)
    place = like.new_empty((images, n), dtype=torch.int32)
    counts = like.new_empty((images,), dtype=torch.int32)
    mask = None if real is None else real.contiguous().view(torch.uint8)
    programs = (images, 1) if real is not None else (1, padded // PAD)
    triton_launch.launch(
        _asa_order_kernel, programs, mask, order, place, counts, height, width, n, padded,
        HAS_PADDING=real is not None, BLOCK=1024 if real is not None else PAD,
    )  # fmt: skip
    return Order(order, place, counts, padded)


def find_orders(problem: Problem) -> tuple[Order, Order]:
    """Find the orders of rows and of keys, one where they are as many."""
    query, key, real = problem.inputs.query, problem.inputs.key, problem.inputs.key_padding_mask
    keys = find_order(problem.n_keys, problem.options.grid, real, key)
    if problem.n == problem.n_keys:
        return keys, keys
    rows = find_order(problem.n, (0, 0), None, query)
    if real is not None:  # one order of rows for every image, where kernels expect one each
        order, place, counts = (x.expand(query.shape[0], *x.shape[1:]).contiguous() for x in rows[:3])
        rows = Order(order, place, counts, rows.padded)
    return rows, keys


def _one_tensor(x: Tensor, y: Tensor) -> bool:
    """Whether x and y are the same numbers in memory (autograd may hand one tensor over as two objects)."""
    return x is y or (x.data_ptr() == y.data_ptr() != 0 and x.shape == y.shape and x.stride() == y.stride())


def arrange_tokens(problem: Problem, orders: tuple[Order, Order], backward: bool = False) -> Tokens:
    """Arrange query, key and value; ``backward``: note too what gradients of scores are bounded by."""
    query, key, value = problem.inputs[:3]
    rows, keys = orders
    one = _one_tensor(query, key)
    halves = backward and problem.dtype == torch.float16
    q = problem.new(problem.n_heads * rows.padded, problem.width, dtype=problem.dtype)
    tokens = Tokens(
        rows, keys, q,
        k=q if one else problem.new(problem.n_heads * keys.padded, problem.width, dtype=problem.dtype),
        v=problem.new(problem.n_heads * keys.padded, problem.width_v, dtype=problem.dtype),
        do=None,
        not_finite=problem.new(problem.n_heads, keys.padded // 32, dtype=torch.int32),
        bounds=query.new_zeros((problem.n_heads, 2), dtype=torch.int32) if halves else None,
    )  # fmt: skip
    block = max(problem.block, 32)
    triton_launch.launch(
        _asa_arrange_kernel, (problem.n_heads * max(rows.padded, keys.padded) // block, 2 if one else 3),
        query, key, value, tokens, *query.stride(), *key.stride(), *value.stride(), problem.heads, problem.sharing,
        problem.n_heads, problem.dim, problem.dim_v, DIM=problem.width, DIM_V=problem.width_v, BLOCK=block,
        PRECISION=problem.precision, warps=problem.warps,
    )  # fmt: skip
    return tokens


def arrange_gradient(problem: Problem, tokens: Tokens, do: Tensor, saved: Saved) -> tuple[Tokens, RowGradients]:
    """Arrange the gradient of the output; return tokens with it, and what the backward needs to know of rows."""
    arranged = problem.new(problem.n_heads * tokens.rows.padded, problem.width_v, dtype=problem.dtype)
    tokens = tokens._replace(do=arranged)
    not_finite = do.new_zeros((problem.n_heads,), dtype=torch.int32)
    delta, top, share, lse_kept2 = (problem.new(problem.n_heads, tokens.rows.padded) for _ in range(4))
    rows = RowGradients(delta, top, share, lse_kept2, not_finite)
    triton_launch.launch(
        _asa_arrange_gradient_kernel, (problem.n_heads * tokens.rows.padded // problem.block,), do, saved.out,
        PerHead.of(saved.residual), PerHead.of(saved.base2), saved.survivors, tokens, rows, *do.stride(), problem.heads,
        problem.sharing, problem.n, problem.dim_v, DIM=problem.width_v, BLOCK=problem.block,
        PRECISION=problem.precision, warps=problem.warps,
    )  # fmt: skip
    return tokens, rows
