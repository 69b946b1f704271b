"""Tokens in the order and form that the other kernels want.

Attention does not care about the order of tokens, skipping does: neighbours on the map are neighbours in memory if the
map is cut into tiles of 8 x 8. Real positions come first, padding is left out; what follows them, up to whole blocks,
is zero.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ...core import triton_launch
from ...core.triton_launch import top_of
from ..types import Inputs, Options, Saved, bits_shape
from . import configs
from .configs import PAD, padded_length
from .tiles import SCALARS, image_of, note_largest, operand


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


@triton.jit
def _arrange(
    x, out, broken, bounds, order, stride_b, stride_h, stride_n, stride_d, heads, zs, per_image, padded, dim,
    DIM: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr, CLEAN: tl.constexpr, BOUND: tl.constexpr,
):  # fmt: skip
    """out[z, p] = x[token at p], zeros up to DIM; if CLEAN, 0 for what is not finite, noted in ``broken`` words.

    BOUND: the largest number of a head is noted in ``bounds``.
    """
    blocks = padded // BLOCK
    if tl.program_id(0) < zs * blocks:
        z = tl.cast(tl.program_id(0) // blocks, tl.int64)
        block = tl.program_id(0) % blocks
        p = block * BLOCK + tl.arange(0, BLOCK)
        token = tl.load(order + image_of(z, heads, per_image) * padded + p).to(tl.int64)
        d = tl.arange(0, DIM)
        there = (token >= 0)[:, None] & (d < dim)[None, :]
        source = x + z // heads * stride_b + z % heads * stride_h
        tile = tl.load(source + token[:, None] * stride_n + d[None, :].to(tl.int64) * stride_d, mask=there, other=0)
        if CLEAN:
            finite = tl.abs(tile.to(tl.float32)) < float("inf")
            bad = tl.max((finite == 0).to(tl.int32), 1) << (tl.arange(0, BLOCK) % 32)
            group = block * (BLOCK // 32) + tl.arange(0, BLOCK // 32)
            tl.store(broken + z * (padded // 32) + group, tl.sum(tl.reshape(bad, [BLOCK // 32, 32]), 1))
            tile = tl.where(finite, tile, 0)
        if BOUND:
            note_largest(bounds + z, tl.max(tl.abs(tile.to(tl.float32)), 1))
        tl.store(out + (z * padded + p)[:, None] * DIM + d[None, :], operand(tile, PRECISION))


@triton.jit(do_not_specialize=SCALARS)
def _asa_arrange_kernel(
    query, q, key, k, value, v, broken, bounds, row_order, order,
    q_stride_b, q_stride_h, q_stride_n, q_stride_d, k_stride_b, k_stride_h, k_stride_n, k_stride_d,
    v_stride_b, v_stride_h, v_stride_n, v_stride_d, heads, zs, per_image, padded, key_padded, dim, dim_v,
    DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr, BOUND: tl.constexpr,
):  # fmt: skip
    """Tokens in order. Axis 1 of the grid: query, value, and key if it is not query."""
    which = tl.program_id(1)
    if which == 0:
        _arrange(query, q, broken, bounds, row_order, q_stride_b, q_stride_h, q_stride_n, q_stride_d,
                 heads, zs, per_image, padded, dim, DIM, BLOCK, PRECISION, False, False)  # fmt: skip
    elif which == 1:
        _arrange(value, v, broken, bounds, order, v_stride_b, v_stride_h, v_stride_n, v_stride_d,
                 heads, zs, per_image, key_padded, dim_v, DIM_V, BLOCK, PRECISION, True, BOUND)  # fmt: skip
    else:
        _arrange(key, k, broken, bounds, order, k_stride_b, k_stride_h, k_stride_n, k_stride_d,
                 heads, zs, per_image, key_padded, dim, DIM, BLOCK, PRECISION, False, False)  # fmt: skip


@triton.jit(do_not_specialize=SCALARS)
def _asa_arrange_gradient_kernel(
    do, out, rest, base2, survivors, order, live, delta, top, share, lse_kept2, poisoned, bounds,
    stride_b, stride_h, stride_n, stride_d, heads, zs, per_image, n, padded, dim,
    DIM: tl.constexpr, BLOCK: tl.constexpr, HAS_REST: tl.constexpr, PRECISION: tl.constexpr, BOUND: tl.constexpr,
):  # fmt: skip
    """live = do in order, delta_i = <do_i, out_i>, and the rest of RowGradients.

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
    g = tl.load(source + token[:, None] * stride_n + d[None, :].to(tl.int64) * stride_d, mask=there, other=0)
    o = tl.load(out + row[:, None] * dim + d[None, :], mask=there, other=0)
    spoilt = tl.max((o != o).to(tl.int32), 1) != 0
    finite = tl.abs(g.to(tl.float32)) < float("inf")
    empty = tl.load(survivors + row, mask=real, other=0) == 0
    ended = (empty | spoilt)[:, None] & (finite == 0)
    g = tl.where(ended, 0, g)
    if BOUND:
        note_largest(bounds + zs + z, tl.sum(tl.abs(g.to(tl.float32)), 1))
    g = operand(g, PRECISION)
    # By a product of tiles, as <do_i, v_j> is: where one survivor is all of a row, the two are to be equal.
    products = tl.dot(g, operand(tl.where(o == o, o, 0), PRECISION).T, input_precision=PRECISION)
    if HAS_REST:
        low = tl.load(rest + row[:, None] * dim + d[None, :], mask=there, other=0)
        products += tl.dot(g, tl.where(low == low, low, 0).T, input_precision=PRECISION)
    i = tl.arange(0, BLOCK)
    of_row = tl.sum(tl.where(i[:, None] == i[None, :], products, 0), 1)
    tl.store(delta + z * padded + p, tl.where(tl.max(ended.to(tl.int32), 1) != 0, float("nan"), of_row))
    tl.store(live + (z * padded + p)[:, None] * DIM + d[None, :], g)
    largest = tl.load(base2 + (3 * z + 1) * n + token, mask=real, other=float("inf"))
    total = tl.load(base2 + (3 * z + 2) * n + token, mask=real, other=1)
    tl.store(top + z * padded + p, tl.where(real, top_of(largest), largest))
    tl.store(share + z * padded + p, 1 / total)
    tl.store(lse_kept2 + z * padded + p, largest + tl.log2(total))
    tl.atomic_max(poisoned + z, tl.max((spoilt & real).to(tl.int32), 0), sem="relaxed")


LOG2_E = math.log2(math.e)
MAX_SPLITS = 4  # parts of a sum, each of which takes memory


def _one_tensor(x: Tensor, y: Tensor) -> bool:
    """Whether x and y are the same numbers in memory (autograd may hand one tensor over as two objects)."""
    return x is y or (x.data_ptr() == y.data_ptr() != 0 and x.shape == y.shape and x.stride() == y.stride())


@dataclass
class Order:
    """In which order the tokens of every image stand; the same for all images where there is no padding."""

    n: int
    padded: int
    order: Tensor  # int32 [images, padded] token at a position, -1 where there is none
    place: Tensor  # int32 [images, n] position of a token, -1 for padding
    counts: Tensor  # int32 [images] real tokens
    per_image: int  # 1: images differ, 0: one for all

    @classmethod
    def new(cls, n: int, grid: tuple[int, int], real: Tensor | None, like: Tensor) -> "Order":
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
        return cls(n, padded, order, place, counts, int(real is not None))


class Problem:
    """A call: its tensors as the kernels want them, and what all launches have in common."""

    def __init__(self, inputs: Inputs, options: Options, learn_thresholds: bool, backward: bool = False):
        query, key, value, alpha, beta, key_padding_mask = inputs
        self.inputs, self.options = inputs, options
        self.heads, self.dtype, self.device = query.shape[1], query.dtype, query.device
        self.zs = query.shape[0] * query.shape[1]
        self.dim, self.dim_v = query.shape[3], value.shape[3]
        self.width, self.width_v = (max(16, 1 << max(d - 1, 0).bit_length()) for d in (self.dim, self.dim_v))
        self.scale, self.scale2 = options.scale, options.scale * LOG2_E
        self.has_bits = alpha is not None or options.topk > 0
        self.dense = not self.has_bits and beta is None
        self.mutual = options.reciprocal
        self.window = 0 if beta is None else options.window
        self.has_topk = 0 < options.topk < key.shape[2]
        # Threshold gradients ask for A_ji where M_ij is 0; without them M itself is stored, which is cheaper to read.
        self.one_way_bits = learn_thresholds and self.mutual and alpha is not None
        self.strides = [(0, 0, 0) if x is None else self._threshold_strides(x) for x in (alpha, beta)]

        head_dim = max(self.width, self.width_v)
        self.block, self.warps = configs.rows_at_a_time(head_dim, triton_launch.architecture(self.device))

        self.keys = Order.new(key.shape[2], options.grid, key_padding_mask, query)
        same = query.shape[2] == key.shape[2]
        self.rows = self.keys if same else Order.new(query.shape[2], (0, 0), None, query)
        if not same and self.keys.per_image:  # one order of rows for every image, where kernels expect one each
            rows, batch = self.rows, query.shape[0]
            each = (x.expand(batch, *x.shape[1:]).contiguous() for x in (rows.order, rows.place, rows.counts))
            self.rows = Order(rows.n, rows.padded, *each, 1)
        self.per_image = self.keys.per_image
        self.do = None
        self.broken = query.new_empty((self.zs, self.keys.padded // 32), dtype=torch.int32)
        # Of every head the largest |v| and the largest sum of |do| of a query, where gradients of scores may overflow.
        halves = backward and query.dtype == torch.float16
        self.bounds = query.new_zeros((2, self.zs), dtype=torch.int32) if halves else None
        one = same and _one_tensor(query, key)
        self.q = query.new_empty((self.zs * self.rows.padded, self.width))
        self.k = self.q if one else query.new_empty((self.zs * self.keys.padded, self.width))
        self.v = value.new_empty((self.zs * self.keys.padded, self.width_v))
        block = max(self.block, 32)
        triton_launch.launch(
            _asa_arrange_kernel, (self.zs * max(self.rows.padded, self.keys.padded) // block, 2 if one else 3),
            query, self.q, key, self.k, value, self.v, self.broken, self.bounds, self.rows.order, self.keys.order,
            *query.stride(), *key.stride(), *value.stride(), self.heads, self.zs, self.per_image, self.rows.padded,
            self.keys.padded, self.dim, self.dim_v, DIM=self.width, DIM_V=self.width_v, BLOCK=block,
            PRECISION=triton_launch.precision(self.dtype), BOUND=self.bounds is not None, warps=self.warps,
        )  # fmt: skip

    def _threshold_strides(self, x: Tensor) -> tuple[int, int, int]:
        return x.stride(0), x.stride(1) if x.shape[1] > 1 else 0, x.stride(2)

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.q.new_empty(shape, dtype=dtype)

    def row_programs(self, order: Order) -> tuple[int]:
        """Return the grid of a kernel that takes ``block`` rows a program."""
        return (self.zs * order.padded // self.block,)

    def config(self, kernel: str) -> configs.Config | None:
        dim, arch = max(self.width, self.width_v), triton_launch.architecture(self.device)
        both = self.one_way_bits or (kernel == "mask" and self.has_topk)
        return configs.find(kernel, dim, self.dtype, arch, both)

    def tiles(self, config: configs.Config, **columns: int):
        """Return arranged tensors as a kernel loads them: q=(rows, columns) and so on, by descriptor or by pointer."""
        tensors = {"q": self.q, "k": self.k, "v": self.v, "do": self.do}
        if not config.tma:
            return [tensors[name] for name in columns]
        return [TensorDescriptor.from_tensor(tensors[name], list(block)) for name, block in columns.items()]

    def splits(self, programs: int, limit: int) -> int:
        """Return into how many parts to cut each program's work so that waves of programs fill the device."""
        slots = triton_launch.processors(self.device)

        def time(parts: int) -> float:
            return math.ceil(programs * parts / slots) / parts + 0.02 * parts

        return min(range(1, limit + 1), key=time)

    def common(self, config: configs.Config) -> dict:
        return {
            "PRECISION": triton_launch.precision(self.dtype),
            "TMA": config.tma,
            "warps": config.warps,
            "stages": config.stages,
            "registers": config.registers,
        }

    def new_bits(self) -> Tensor:
        """Allocate the bits of all heads where they are not to be kept."""
        return self.new(self.zs, *bits_shape("triton", self.rows.n, self.keys.n), dtype=torch.uint8)

    def bits(self, memory: Tensor) -> "Bits":
        """Return bits [zs or B, heads, ...] in their parts."""
        flat = memory.view(self.zs, -1)
        size = self.keys.padded // 8 * self.rows.padded
        words, peaks = flat.view(torch.int32), flat[:, size:].view(torch.float16)
        return Bits(words[:, : size // 4], words.stride(0), peaks, peaks.stride(0))

    def arrange_gradient(self, do: Tensor, saved: Saved) -> "RowGradients":
        """Arrange the gradient of the output, as ``self.do``, and what goes with it."""
        self.do = self.q.new_empty((self.zs * self.rows.padded, self.width_v))
        delta, *weights = (self.new(self.zs, self.rows.padded) for _ in range(4))
        poisoned = self.q.new_zeros((self.zs,), dtype=torch.int32)
        triton_launch.launch(
            _asa_arrange_gradient_kernel, (self.zs * self.rows.padded // self.block,), do, saved.out, saved.rest,
            saved.base2, saved.survivors, self.rows.order, self.do, delta, *weights, poisoned,
            self.bounds, *do.stride(), self.heads, self.zs, self.per_image, self.rows.n, self.rows.padded, self.dim_v,
            DIM=self.width_v, BLOCK=self.block, HAS_REST=saved.rest.shape[-1] > 0,
            PRECISION=triton_launch.precision(self.dtype), BOUND=self.bounds is not None, warps=self.warps,
        )  # fmt: skip
        return RowGradients(delta, *weights, poisoned)


class Bits(NamedTuple):
    """Pairs as bits, and block maxima of the scores, each with its stride from head to head."""

    words: Tensor  # int32 [zs, keys / 32 * rows]
    stride: int
    peaks: Tensor  # float16
    peaks_stride: int


NO_BITS = Bits(None, 0, None, 0)


class RowFindings(NamedTuple):
    """What rows know of their neighbours, arranged, [zs, padded]."""

    largest: Tensor  # largest score of a neighbour, base 2; -inf without any
    count: Tensor  # int32
    broken: Tensor  # int32, not 0 if the value of a neighbour is not finite


class RowGradients(NamedTuple):
    """What the backward needs to know of rows, arranged: [zs, padded], ``poisoned`` [zs]."""

    delta: Tensor  # <do_i, out_i>
    top: Tensor  # score in base 2 from which on exponentials are 1: -inf without survivors, inf at padding
    share: Tensor  # 1 over the sum of these exponentials
    lse_kept2: Tensor  # log-sum-exp over survivors in base 2, in terms of the largest instead of top
    poisoned: Tensor  # whether a row of the head has the output NaN
