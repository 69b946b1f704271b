"""Tokens in the order and form that the other kernels want.

Attention does not care about the order of tokens, skipping does: neighbours on the map are neighbours in memory if the
map is cut into tiles of 8 x 8. Real positions come first, padding is left out; what follows them, up to whole blocks,
is zero.
"""

import triton
import triton.language as tl

from .triton_tiles import SCALARS, image_of


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
    found = 0
    for start in range(tl.program_id(1) * BLOCK, n, tl.num_programs(1) * BLOCK):
        p = start + tl.arange(0, BLOCK)
        token = _token_at(p, height, width)
        inside = p < n
        position = p
        is_real = inside
        if HAS_PADDING:
            is_real = inside & (tl.load(real + image * n + token, mask=inside, other=0) != 0)
            position = found + tl.cumsum(is_real.to(tl.int32), 0) - 1
            found += tl.sum(is_real.to(tl.int32), 0)
        tl.store(order + image * padded + position, token, mask=is_real)
        tl.store(place + image * n + token, tl.where(is_real, position, -1), mask=inside)
    if not HAS_PADDING:
        found = n
    tl.store(counts + image, found)


@triton.jit(do_not_specialize=SCALARS)
def _asa_arrange_kernel(
    x, out, broken, order, stride_b, stride_h, stride_n, stride_d, heads, per_image, padded, dim,
    DIM: tl.constexpr, BLOCK: tl.constexpr, CLEAN: tl.constexpr,
):  # fmt: skip
    """out[z, p] = x[token at p], zeros up to DIM; if CLEAN, 0 for what is not finite, noted in ``broken`` words."""
    blocks = padded // BLOCK
    z = tl.cast(tl.program_id(0) // blocks, tl.int64)
    block = tl.program_id(0) % blocks
    p = block * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(order + image_of(z, heads, per_image) * padded + p).to(tl.int64)
    d = tl.arange(0, DIM)
    there = (token >= 0)[:, None] & (d < dim)[None, :]
    source = x + z // heads * stride_b + z % heads * stride_h
    tile = tl.load(source + token[:, None] * stride_n + d[None, :] * stride_d, mask=there, other=0)
    if CLEAN:
        finite = tl.abs(tile.to(tl.float32)) < float("inf")
        bad = tl.max((finite == 0).to(tl.int32), 1) << (tl.arange(0, BLOCK) % 32)
        group = block * (BLOCK // 32) + tl.arange(0, BLOCK // 32)
        tl.store(broken + z * (padded // 32) + group, tl.sum(tl.reshape(bad, [BLOCK // 32, 32]), 1))
        tile = tl.where(finite, tile, 0)
    tl.store(out + (z * padded + p)[:, None] * DIM + d[None, :], tile)


@triton.jit(do_not_specialize=SCALARS)
def _asa_arrange_gradient_kernel(
    do, out, rest, base2, survivors, order, live, delta, lse_kept2, poisoned,
    stride_b, stride_h, stride_n, stride_d, heads, per_image, n, padded, dim,
    DIM: tl.constexpr, BLOCK: tl.constexpr, HAS_REST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """live = do in order, delta_i = <do_i, out_i>, and lse_kept2 in order.

    What reaches the constant output of a row without survivors ends there, even a NaN, but for the row's thresholds:
    live is 0 and delta NaN then. A row whose output is NaN poisons its image and head.
    """
    blocks = padded // BLOCK
    z = tl.cast(tl.program_id(0) // blocks, tl.int64)
    p = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(order + image_of(z, heads, per_image) * padded + p).to(tl.int64)
    real = token >= 0
    row = z * n + token
    d = tl.arange(0, DIM)
    there = real[:, None] & (d < dim)[None, :]
    source = do + z // heads * stride_b + z % heads * stride_h
    g = tl.load(source + token[:, None] * stride_n + d[None, :] * stride_d, mask=there, other=0)
    o = tl.load(out + row[:, None] * dim + d[None, :], mask=there, other=0)
    spoilt = tl.max((o != o).to(tl.int32), 1) != 0
    finite = tl.abs(g.to(tl.float32)) < float("inf")
    empty = tl.load(survivors + row, mask=real, other=0) == 0
    ended = (empty | spoilt)[:, None] & (finite == 0)
    g = tl.where(ended, 0, g)
    # By a product of tiles, as <do_i, v_j> is: where one survivor is all of a row, the two are to be equal.
    products = tl.dot(g, tl.where(o == o, o, 0).T, input_precision=PRECISION)
    if HAS_REST:
        low = tl.load(rest + row[:, None] * dim + d[None, :], mask=there, other=0)
        products += tl.dot(g, tl.where(low == low, low, 0).T, input_precision=PRECISION)
    i = tl.arange(0, BLOCK)
    of_row = tl.sum(tl.where(i[:, None] == i[None, :], products, 0), 1)
    tl.store(delta + z * padded + p, tl.where(tl.max(ended.to(tl.int32), 1) != 0, float("nan"), of_row))
    tl.store(live + (z * padded + p)[:, None] * DIM + d[None, :], g)
    tl.store(lse_kept2 + z * padded + p, tl.load(base2 + (2 * z + 1) * n + token, mask=real, other=float("inf")))
    tl.atomic_max(poisoned + z, tl.max((spoilt & real).to(tl.int32), 0))
