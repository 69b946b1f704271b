"""Tokens in the order and form in which the other kernels read them.

Attention does not depend on the order of tokens, but skipping does: tokens that are neighbours on the grid become
neighbours in memory when it is cut into tiles, a map into 8 x 8 and a volume into 4 x 4 x 4. Real positions come first
and padding is left out; zeros follow, up to whole blocks.

What does not depend on each other is one launch, in which programs do different things: tokens are arranged beside what
a forward clears, or beside all that a backward can begin with.
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
from .lists import note_occupied
from .problem import LOG2_E, NOTES, Bits, Order, Orders, Peaks, PerHead, Problem, Tokens
from .select import NO_NEIGHBOURS, Neighbours
from .thresholds import Thresholds, flag_tiles, thresholds_of_rows
from .tiles import (
    NUMBER_OF_NOTES,
    SCALARS,
    clear,
    constants,
    gradient_note,
    nan_note,
    note_largest,
    of_head,
    operand,
    rows_of,
    value_note,
)

BLOCKS_A_TIME = tl.constexpr(16)  # of 64 keys, that a program of a backward flags


@triton.jit
def _side(position, area, length, SIDE: tl.constexpr):
    """Cut a ``length`` with ``area`` tokens each, which stand in a row, into pieces of SIDE, the last one smaller.

    Returned are where the piece of a position begins, the position in it, and how long the piece is.
    """
    piece = position // (SIDE * area)
    return SIDE * piece, position - piece * SIDE * area, tl.maximum(tl.minimum(SIDE, length - SIDE * piece), 1)


@triton.jit
def _token_at(position, depth, height, width, extra, VOLUME: tl.constexpr):
    """The token at a position, in tiles of 8 x 8, or 4 x 4 x 4; those at the borders are smaller, no position is empty.

    A volume is cut into slabs of slices, and these, or a map, into bands of rows, and a band into tiles. ``extra``
    tokens come before the grid.
    """
    SIDE: tl.constexpr = 4 if VOLUME else 8
    of_all = position
    if extra is not None:
        position = tl.maximum(position - extra, 0)
    slab, deep = 0, 1
    if VOLUME:
        slab, position, deep = _side(position, height * width, depth, SIDE)
    band, position, tall = _side(position, deep * width, height, SIDE)
    tile, position, wide = _side(position, deep * tall, width, SIDE)
    row = position // wide
    if VOLUME:
        row = (slab + row // tall) * height + row % tall
    token = (band + row) * width + tile + position % wide
    if extra is not None:
        token = tl.where(of_all < extra, of_all, extra + token)
    return token


@triton.jit
def _order(real, out, depth, height, width, extra, n, VOLUME: tl.constexpr, BLOCK: tl.constexpr):
    """Find the order of n tokens of an image, with padding where ``real`` says so. Axis 0 of the grid: images.

    One program an image if there is padding, which takes its blocks one after another.
    """
    image = tl.cast(tl.program_id(0), tl.int64)
    padded = out.padded
    placed, placed_extra = 0, 0
    for start in range(tl.program_id(1) * BLOCK, padded, tl.num_programs(1) * BLOCK):
        p = start + tl.arange(0, BLOCK)
        token = _token_at(p, depth, height, width, extra, VOLUME)
        inside = p < n
        position = p
        is_real = inside
        if real is not None:
            is_real = inside & (tl.load(real + image * n + token, mask=inside, other=0) != 0)
            up_to_here = placed + tl.cumsum(is_real.to(tl.int32), 0)
            # Padding fills the places up to n from the last one on.
            position = tl.where(inside, tl.where(is_real, up_to_here - 1, n - 1 - (p - up_to_here)), p)
            placed += tl.sum(is_real.to(tl.int32), 0)
            if extra is not None:
                placed_extra += tl.sum((is_real & (token < extra)).to(tl.int32), 0)
        found = tl.where(is_real, token, tl.where(inside, -2 - token, -1))
        tl.store(out.order + image * padded + position, found, mask=p < padded)
        tl.store(out.place + image * n + token, tl.where(is_real, position, -1), mask=inside)
    if real is None:
        placed, placed_extra = n, extra
    tl.store(out.counts + image, placed)
    if extra is not None:
        tl.store(out.extra + image, placed_extra)


@triton.jit(do_not_specialize=SCALARS)
def _asa_order_kernel(
    real, orders, depth, height, width, extra, n, n_keys, n_heads, VOLUME: tl.constexpr, BLOCK: tl.constexpr
):
    """The order of keys and, axis 2 of the grid, that of rows where it is another; notes are 0."""
    if tl.program_id(2) == 0:
        _order(real, orders.keys, depth, height, width, extra, n_keys, VOLUME, BLOCK)
    else:
        _order(None, orders.rows, 1, 1, n, None, n, False, BLOCK)
    if tl.program_id(0) + tl.program_id(1) + tl.program_id(2) == 0:
        clear(orders.notes, 0, n_heads * NUMBER_OF_NOTES)


class Source(NamedTuple):
    """Tokens as they are given, [B, heads, n, width], with their strides."""

    numbers: Tensor
    image: int
    head: int
    token: int
    channel: int

    @classmethod
    def of(cls, x: Tensor) -> "Source":
        return cls(x, *x.stride())


class Cut(NamedTuple):
    """What the kernels that arrange are compiled for; constants."""

    BLOCK: int  # tokens of a program
    DIM: int
    DIM_V: int
    PRECISION: str
    GRADIENTS: int  # gradients of tokens of a program


@triton.jit
def _load_source(x, z, token, d, heads, there):
    """Columns d of tokens of a head, 0 where they are not ``there``."""
    source = x.numbers + z // heads * x.image + z % heads * x.head
    return tl.load(source + token[:, None] * x.token + d[None, :].to(tl.int64) * x.channel, mask=there, other=0)


@triton.jit
def _arrange(
    program, x, out, not_finite, bounds, order, heads, sharing, dim,
    DIM: tl.constexpr, CLEAN: tl.constexpr, CUT,
):  # fmt: skip
    """out[z, p] = x[token at p], zeros up to DIM; if CLEAN, 0 for what is not finite, noted in words ``not_finite``.

    The largest number of a head is noted in ``bounds`` then, if there are some.
    """
    BLOCK: tl.constexpr = CUT.BLOCK
    z, p = rows_of(program, order.padded, BLOCK)
    token = tl.load(order.order + z // sharing * order.padded + p).to(tl.int64)
    d = tl.arange(0, DIM)
    tile = _load_source(x, z, token, d, heads, (token >= 0)[:, None] & (d < dim)[None, :])
    if CLEAN:
        finite = tl.abs(tile.to(tl.float32)) < float("inf")
        bits = tl.max((finite == 0).to(tl.int32), 1) << (tl.arange(0, BLOCK) % 32)
        group = program * (BLOCK // 32) + tl.arange(0, BLOCK // 32)
        tl.store(not_finite + group, tl.sum(tl.reshape(bits, [BLOCK // 32, 32]), 1))
        tile = tl.where(finite, tile, 0)
        if bounds is not None:
            note_largest(value_note(bounds, z), tl.max(tl.abs(tile.to(tl.float32)), 1))
    tl.store(out + (z * order.padded + p)[:, None] * DIM + d[None, :], operand(tile, CUT.PRECISION))


@triton.jit
def _programs(tokens, query, key, n_heads, CUT):
    """How many programs arrange queries, and with values, and with keys, which come last; none without queries."""
    of_rows = n_heads * (tokens.rows.padded // CUT.BLOCK)
    of_keys = n_heads * (tokens.keys.padded // CUT.BLOCK)
    end = of_rows + of_keys
    if key is not None:
        end += of_keys
    if query is None:
        end = 0
    return of_rows, of_rows + of_keys, end


@triton.jit
def _arrange_some(query, key, value, tokens, heads, sharing, n_heads, dim, dim_v, CUT):
    """Arrange the tokens of this program: queries, values, or keys where those are not the queries."""
    program = tl.program_id(0)
    of_queries, of_values, _ = _programs(tokens, query, key, n_heads, CUT)
    if query is None:
        tl.static_assert(key is None)
    elif program < of_queries:
        _arrange(program, query, tokens.q, None, None, tokens.rows, heads, sharing, dim, CUT.DIM, False, CUT)
    elif program < of_values:
        _arrange(program - of_queries, value, tokens.v, tokens.not_finite, tokens.bounds, tokens.keys, heads, sharing,
                 dim_v, CUT.DIM_V, True, CUT)  # fmt: skip
    elif key is not None:
        _arrange(program - of_values, key, tokens.k, None, None, tokens.keys, heads, sharing, dim, CUT.DIM, False, CUT)


@triton.jit(do_not_specialize=SCALARS)
def _asa_arrange_kernel(query, key, value, tokens, neighbours, heads, sharing, n_heads, dim, dim_v, CUT):
    """Tokens in order; and, where pairs will be decided, nobody has a neighbour yet."""
    _, _, end = _programs(tokens, query, key, n_heads, CUT)
    program = tl.program_id(0) - end
    if program < 0:
        _arrange_some(query, key, value, tokens, heads, sharing, n_heads, dim, dim_v, CUT)
    elif neighbours.occupied is not None:
        padded = tokens.rows.padded
        z, p = rows_of(program, padded, CUT.BLOCK)
        tl.store(neighbours.stats.largest + z * padded + p, tl.full([CUT.BLOCK], -float("inf"), tl.float32))
        tl.store(neighbours.stats.counts + z * padded + p, tl.zeros([CUT.BLOCK], tl.int32))
        tl.store(neighbours.stats.not_finite + z * padded + p, tl.zeros([CUT.BLOCK], tl.int32))
        words = tokens.keys.padded // 32 * CUT.BLOCK
        of_head = program % (padded // CUT.BLOCK)
        clear(neighbours.bits.words + z * neighbours.bits.stride, tl.cast(of_head, tl.int64) * words, words)
        flags = tokens.keys.padded // 128 * (CUT.BLOCK // 32)
        clear(neighbours.occupied, tl.cast(program, tl.int64) * flags, flags)


class RowGradients(NamedTuple):
    """What the backward needs to know of rows, arranged: [n_heads, padded]."""

    delta: Tensor  # <do_i, out_i>
    top: Tensor  # score in base 2 from which on exponentials are 1: -inf without survivors, inf at padding
    share: Tensor  # 1 over the sum of these exponentials
    lse_kept2: Tensor  # log-sum-exp over survivors in base 2, in terms of the largest instead of top
    notes: Tensor  # of heads


class Kept(NamedTuple):
    """What a forward kept of rows, in raster order."""

    out: Tensor
    residual: PerHead
    base2: PerHead
    survivors: Tensor
    kappa: PerHead


@triton.jit
def _arrange_gradient(program, d_out, kept, tokens, rows, heads, sharing, n, dim, CUT):
    """tokens.do = the gradient of out in order, delta_i = <do_i, out_i>, and the other fields of ``rows``.

    A gradient that reaches the constant output of a row without survivors ends there, even a NaN, but for the row's
    thresholds: do is 0 and delta NaN then. A row whose output is NaN marks its image and head.
    """
    BLOCK: tl.constexpr = CUT.GRADIENTS
    z, p = rows_of(program, tokens.rows.padded, BLOCK)
    at = z * tokens.rows.padded + p
    token = tl.load(tokens.rows.order + z // sharing * tokens.rows.padded + p).to(tl.int64)
    real = token >= 0
    row = z * n + token
    # Chunk by chunk: every warp holds all that a product of so few rows multiplies.
    CHUNK: tl.constexpr = CUT.DIM_V if CUT.DIM_V < 128 else 128
    nan_row = tl.zeros([BLOCK], tl.int32)
    for c in tl.static_range(0, CUT.DIM_V, CHUNK):
        d = c + tl.arange(0, CHUNK)
        o = tl.load(kept.out + row[:, None] * dim + d[None, :], mask=real[:, None] & (d < dim)[None, :], other=0)
        nan_row |= tl.max((o != o).to(tl.int32), 1)
    empty = tl.load(kept.survivors + row, mask=real, other=0) == 0
    ends = empty | (nan_row != 0)
    ended = tl.zeros([BLOCK], tl.int32)
    size = tl.zeros([BLOCK], tl.float32)
    products = tl.zeros([BLOCK, BLOCK], tl.float32)
    of_residual = tl.zeros([BLOCK, BLOCK], tl.float32)
    for c in tl.static_range(0, CUT.DIM_V, CHUNK):
        d = c + tl.arange(0, CHUNK)
        there = real[:, None] & (d < dim)[None, :]
        g = _load_source(d_out, z, token, d, heads, there)
        o = tl.load(kept.out + row[:, None] * dim + d[None, :], mask=there, other=0)
        finite = tl.abs(g.to(tl.float32)) < float("inf")
        stops = ends[:, None] & (finite == 0)
        ended |= tl.max(stops.to(tl.int32), 1)
        g = operand(tl.where(stops, 0, g), CUT.PRECISION)
        tl.store(tokens.do + at[:, None] * CUT.DIM_V + d[None, :], g)
        size += tl.sum(tl.abs(g.to(tl.float32)), 1)
        # By products of tiles, as <do_i, v_j> is: where one survivor is all of a row, the two are to be equal.
        o = operand(tl.where(o == o, o, 0), CUT.PRECISION)
        products = tl.dot(g, o.T, products, input_precision=CUT.PRECISION)
        if kept.residual.numbers is not None:
            low = tl.load(of_head(kept.residual, z) + token[:, None] * dim + d[None, :], mask=there, other=0)
            of_residual = tl.dot(g, tl.where(low == low, low, 0).T, of_residual, input_precision=CUT.PRECISION)
    if tokens.bounds is not None:
        note_largest(gradient_note(tokens.bounds, z), size)
    i = tl.arange(0, BLOCK)
    of_row = tl.sum(tl.where(i[:, None] == i[None, :], products + of_residual, 0), 1)
    tl.store(rows.delta + at, tl.where(ended != 0, float("nan"), of_row))
    largest = tl.load(of_head(kept.base2, z) + n + token, mask=real, other=float("inf"))
    total = tl.load(of_head(kept.base2, z) + 2 * n + token, mask=real, other=1)
    tl.store(rows.top + at, tl.where(real, top_of(largest), largest))
    tl.store(rows.share + at, 1 / total)
    tl.store(rows.lse_kept2 + at, largest + tl.log2(total))
    tl.atomic_max(nan_note(rows.notes, z), tl.max(tl.where(real, nan_row, 0), 0), sem="relaxed")


@triton.jit(do_not_specialize=SCALARS)
def _asa_arrange_backward_kernel(
    query, key, value, d_out, tokens, kept, rows, bits, occupied, alpha, peaks, thresholds,
    alpha_stride_b, alpha_stride_h, alpha_stride_n, heads, sharing, n_heads, n, dim, dim_v, band2, CUT,
):  # fmt: skip
    """Tokens and gradients of the output in order; tiles of pairs that hold bits, and those that thresholds reach.

    Tokens are in order already if ``query`` is None.
    """
    _, _, end = _programs(tokens, query, key, n_heads, CUT)
    of_gradients = n_heads * (tokens.rows.padded // CUT.GRADIENTS)
    program = tl.program_id(0) - end
    if program < 0:
        _arrange_some(query, key, value, tokens, heads, sharing, n_heads, dim, dim_v, CUT)
    elif program < of_gradients:
        _arrange_gradient(program, d_out, kept, tokens, rows, heads, sharing, n, dim_v, CUT)
    elif occupied is not None:
        BLOCK_J: tl.constexpr = BLOCKS_A_TIME
        padded = tokens.rows.padded
        key_blocks = tokens.keys.padded // 64
        chunks = tl.cdiv(key_blocks, BLOCK_J)
        block = (program - of_gradients) // chunks
        first = (program - of_gradients) % chunks * BLOCK_J
        z, p = rows_of(block, padded, 64)
        note_occupied(bits, occupied, z, p, block, first, padded, key_blocks, BLOCK_J)
        if thresholds.flags is not None:
            lse2, cut2, kth = thresholds_of_rows(
                None, None, kept.base2, alpha, None, kept.kappa, tokens, thresholds, z, p, first == 0,
                alpha_stride_b, alpha_stride_h, alpha_stride_n, heads, sharing, n, 0, 64,
            )  # fmt: skip
            flag_tiles(peaks, thresholds.flags, tokens, z, sharing, p, block, first, lse2, cut2 - band2, kth, True,
                       64, BLOCK_J)  # fmt: skip


def find_orders(problem: Problem) -> Orders:
    """Find the orders of rows and of keys, of every image where some keys are padding, and clear the notes."""
    query, real, grid = problem.inputs.query, problem.inputs.key_padding_mask, problem.options.grid
    images, extra = 1 if real is None else query.shape[0], problem.options.extra

    def new(n: int) -> Order:
        padded = padded_length(n)
        order, place, counts, count_extra = (
            problem.new(*shape, dtype=torch.int32) for shape in ((images, padded), (images, n), (images,), (images,))
        )
        return Order(order, place, counts, count_extra if extra else None, padded)

    keys = new(problem.n_keys)
    rows = keys if problem.n == problem.n_keys else new(problem.n)
    orders = Orders(rows, keys, problem.new(problem.n_heads, NOTES, dtype=torch.int32))
    sides = grid if 0 not in grid else (1, 1, problem.n_keys - extra)
    # With padding, one program an image counts the real tokens.
    programs, block = (max(rows.padded, keys.padded) // PAD, PAD) if real is None else (1, 1024)
    triton_launch.launch(
        _asa_order_kernel, (images, programs, 1 if rows is keys else 2),
        None if real is None else real.contiguous().view(torch.uint8), orders, *sides, extra or None,
        problem.n, problem.n_keys, problem.n_heads, VOLUME=problem.is_volume, BLOCK=block,
    )  # fmt: skip
    return orders


def _one_tensor(x: Tensor, y: Tensor) -> bool:
    """Whether x and y are the same numbers in memory (autograd may hand one tensor over as two objects)."""
    return x is y or (x.data_ptr() == y.data_ptr() != 0 and x.shape == y.shape and x.stride() == y.stride())


class _Arranging:
    """Room for the tokens of a call in order, and the arguments of the kernels that fill it."""

    def __init__(self, problem: Problem, orders: Orders, backward: bool, with_do: bool = True):
        rows, keys, notes = orders
        query, key, value = problem.inputs[:3]
        one, dtype = _one_tensor(query, key), problem.dtype
        rooms = [(rows, problem.width), (keys, problem.width), (keys, problem.width_v), (rows, problem.width_v)]
        q, k, v, do = (
            None if skipped else problem.new(problem.n_heads * order.padded, width, dtype=dtype)
            for skipped, (order, width) in zip((False, one, False, not (backward and with_do)), rooms, strict=True)
        )
        not_finite = problem.new(problem.n_heads, keys.padded // 32, dtype=torch.int32)
        bounds = notes if backward and dtype == torch.float16 else None
        self.tokens = Tokens(rows, keys, q, q if one else k, v, do, not_finite, bounds)
        self.sources = [Source.of(query), None if one else Source.of(key), Source.of(value)]
        self.cut = _cut(problem)
        sides = [rows, keys] if one else [rows, keys, keys]
        self.programs = problem.n_heads * sum(side.padded // self.cut.BLOCK for side in sides)


def _cut(problem: Problem) -> Cut:
    return Cut(max(problem.block, 32), problem.width, problem.width_v, problem.precision, problem.block)


def arrange_tokens(
    problem: Problem, orders: Orders, neighbours: Neighbours = NO_NEIGHBOURS, backward: bool = False
) -> Tokens:
    """Arrange query, key and value; clear what will be known of ``neighbours``."""
    arranging = _Arranging(problem, orders, backward, with_do=False)
    tokens, cut = arranging.tokens, arranging.cut
    clearing = 0 if neighbours.occupied is None else problem.n_heads * (tokens.rows.padded // cut.BLOCK)
    triton_launch.launch(
        _asa_arrange_kernel, (arranging.programs + clearing,), *arranging.sources, tokens, neighbours, problem.heads,
        problem.sharing, problem.n_heads, problem.dim, problem.dim_v, CUT=constants(cut), warps=problem.warps,
    )  # fmt: skip
    return tokens


def arrange_backward(
    problem: Problem, orders: Orders, do: Tensor, saved: Saved, bits: Bits, peaks: Peaks, occupied: Tensor | None,
    thresholds: Thresholds, band: float | None, arranged: Tokens | None = None,
) -> tuple[Tokens, RowGradients]:  # fmt: skip
    """Arrange tokens and the gradient of the output; return them and what the backward needs to know of rows.

    Beside it flag the tiles that are ``occupied``, and those within ``band`` of ``thresholds``, each if asked for.
    Tokens that are ``arranged`` already, of which rows may be some, only get ``do``.
    """
    cut, alpha = _cut(problem), problem.inputs.alpha
    if arranged is None:
        arranging = _Arranging(problem, orders, backward=True)
        tokens, sources, programs = arranging.tokens, arranging.sources, arranging.programs
    else:
        do_room = problem.new(problem.n_heads * arranged.rows.padded, problem.width_v, dtype=problem.dtype)
        tokens, sources, programs = arranged._replace(do=do_room), [None, None, None], 0
    delta, top, share, lse_kept2 = (problem.new(problem.n_heads, tokens.rows.padded) for _ in range(4))
    rows = RowGradients(delta, top, share, lse_kept2, orders.notes)
    kept = Kept(saved.out, PerHead.of(saved.residual), PerHead.of(saved.base2), saved.survivors,
                PerHead.of(saved.kappa))  # fmt: skip
    programs += problem.n_heads * tokens.rows.padded // cut.GRADIENTS
    if occupied is not None:
        programs += occupied.shape[0] * occupied.shape[1] * triton.cdiv(occupied.shape[2], BLOCKS_A_TIME.value)
    triton_launch.launch(
        _asa_arrange_backward_kernel, (programs,), *sources, Source.of(do), tokens, kept, rows, bits,
        occupied, alpha, peaks, thresholds, *problem.strides(alpha), problem.heads, problem.sharing, problem.n_heads,
        problem.n, problem.dim, problem.dim_v, (band or 0.0) * LOG2_E, CUT=constants(cut), warps=problem.warps,
        registers=128 if max(problem.width, problem.width_v) <= 64 else None,
    )  # fmt: skip
    return tokens, rows
