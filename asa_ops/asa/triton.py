"""Adaptive sparse attention on the GPU: the Triton kernels, in the order in which a call runs them.

Forward: arrange tokens in 8 x 8 tiles of the map; every score once (``statistics``); from block maxima the tiles in
which neighbours can be (``plan``); there every pair is decided and stored as a bit (``mask``); blocks with neighbours
are listed and summed (``aggregate``); the local block and the end of every row (``window``). The backward lists blocks
from the same bits. Everything runs on the device in one stream: no size depends on the data, nothing is read back.

Besides inputs and outputs a call holds N^2 / 8 bytes of bits, N^2 / 32 of block maxima (both until the backward), and
copies and parts of sums of O(N D).
"""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..triton_support import architecture, launch, processors
from . import triton_configs
from .types import Inputs, NeighborGraph, Options, Saved

_PAD = 128  # tokens of a head are padded to a multiple of this
_TILE = 64  # side of the tiles that plans speak of
_LOG2_E = math.log2(math.e)
_MAX_SPLITS = 4


def _padded(n: int) -> int:
    return (n + _PAD - 1) // _PAD * _PAD


def bits_shape(n_q: int, n_k: int) -> tuple[int, int]:
    """Shape of one head's bits: for 64 keys and every query, in arranged order, 64 bits and a float16 maximum."""
    return _padded(n_k) // _TILE, _padded(n_q) * 10


def _kernels():
    """Import what imports triton."""
    from . import triton_arrange, triton_bwd, triton_fwd, triton_graph, triton_plan, triton_window, triton_window_bwd

    return triton_arrange, triton_plan, triton_fwd, triton_window, triton_bwd, triton_window_bwd, triton_graph


def _precision(dtype: torch.dtype) -> str:
    """How products of float32 are formed: as torch's own."""
    return "tf32" if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest" else "ieee"


def _on_its_device(function):
    """Run with the device of the inputs current, which Triton launches on."""

    @functools.wraps(function)
    def run(*args):
        inputs = next(x for x in args if isinstance(x, Inputs))
        with torch.cuda.device_of(inputs.query):
            return function(*args)

    return run


def _one_tensor(x: Tensor, y: Tensor) -> bool:
    """Whether x and y are the same numbers in memory (autograd may hand one tensor over as two objects)."""
    return x is y or (x.data_ptr() == y.data_ptr() != 0 and x.shape == y.shape and x.stride() == y.stride())


@dataclass
class _Order:
    """In which order the tokens of every image stand; the same for all images where there is no padding."""

    n: int
    padded: int
    order: Tensor  # int32 [images, padded] token at a position, -1 where there is none
    place: Tensor  # int32 [images, n] position of a token, -1 for padding
    counts: Tensor  # int32 [images] real tokens
    per_image: int  # 1: images differ, 0: one for all

    @classmethod
    def new(cls, n: int, grid: tuple[int, int], real: Tensor | None, like: Tensor) -> "_Order":
        images = 1 if real is None else real.shape[0]
        height, width = grid if 0 not in grid else (1, n)
        padded = _padded(n)
        order = like.new_full((images, padded), -1, dtype=torch.int32)
        place = like.new_empty((images, n), dtype=torch.int32)
        counts = like.new_empty((images,), dtype=torch.int32)
        arrange, *_ = _kernels()
        mask = None if real is None else real.contiguous().view(torch.uint8)
        programs = (images, 1) if real is not None else (1, padded // _PAD)
        launch(
            arrange._asa_order_kernel, programs, mask, order, place, counts, height, width, n, padded,
            HAS_PADDING=real is not None, BLOCK=1024 if real is not None else _PAD,
        )  # fmt: skip
        return cls(n, padded, order, place, counts, int(real is not None))


class _Problem:
    """A call: its tensors as the kernels want them, and what all launches have in common."""

    def __init__(self, inputs: Inputs, options: Options, learn_thresholds: bool):
        query, key, value, alpha, beta, key_padding_mask = inputs
        self.inputs, self.options = inputs, options
        self.heads, self.dtype, self.device = query.shape[1], query.dtype, query.device
        self.zs = query.shape[0] * query.shape[1]
        self.dim, self.dim_v = query.shape[3], value.shape[3]
        self.width, self.width_v = (max(16, 1 << max(d - 1, 0).bit_length()) for d in (self.dim, self.dim_v))
        self.scale, self.scale2 = options.scale, options.scale * _LOG2_E
        self.has_bits = alpha is not None or options.topk > 0
        self.dense = not self.has_bits and beta is None
        self.mutual = options.reciprocal
        self.window = 0 if beta is None else options.window
        self.has_topk = 0 < options.topk < key.shape[2]
        # Threshold gradients ask for A_ji where M_ij is 0; without them M itself is stored, which is cheaper to read.
        self.one_way_bits = learn_thresholds and self.mutual and alpha is not None
        self.strides = [(0, 0, 0) if x is None else self._threshold_strides(x) for x in (alpha, beta)]

        self.block, self.warps = triton_configs.rows_at_a_time(max(self.width, self.width_v), architecture(self.device))

        self.keys = _Order.new(key.shape[2], options.grid, key_padding_mask, query)
        same = query.shape[2] == key.shape[2]
        self.rows = self.keys if same else _Order.new(query.shape[2], (0, 0), None, query)
        if not same and self.keys.per_image:  # one order of rows for every image, where kernels expect one each
            rows, batch = self.rows, query.shape[0]
            each = (x.expand(batch, *x.shape[1:]).contiguous() for x in (rows.order, rows.place, rows.counts))
            self.rows = _Order(rows.n, rows.padded, *each, 1)
        self.per_image = self.keys.per_image
        self.broken = query.new_empty((self.zs, self.keys.padded // 32), dtype=torch.int32)
        self.q = self._arrange(query, self.rows, self.width)
        self.k = self.q if same and _one_tensor(query, key) else self._arrange(key, self.keys, self.width)
        self.v = self._arrange(value, self.keys, self.width_v, clean=True)

    def _threshold_strides(self, x: Tensor) -> tuple[int, int, int]:
        return x.stride(0), x.stride(1) if x.shape[1] > 1 else 0, x.stride(2)

    def _arrange(self, x: Tensor, order: _Order, width: int, clean: bool = False) -> Tensor:
        arrange, *_ = _kernels()
        out = x.new_empty((self.zs * order.padded, width))
        block = max(self.block, 32)
        launch(
            arrange._asa_arrange_kernel, (self.zs * order.padded // block,), x, out, self.broken, order.order,
            *x.stride(), self.heads, order.per_image, order.padded, x.shape[3], DIM=width, BLOCK=block, CLEAN=clean,
            warps=self.warps,
        )  # fmt: skip
        return out

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.q.new_empty(shape, dtype=dtype)

    def config(self, kernel: str) -> triton_configs.Config | None:
        dim, arch = max(self.width, self.width_v), architecture(self.device)
        return triton_configs.find(kernel, dim, self.dtype, arch, self.one_way_bits)

    def tiles(self, config: triton_configs.Config, **columns: int):
        """Return arranged tensors as a kernel loads them: q=(rows, columns) and so on, by descriptor or by pointer."""
        tensors = {"q": self.q, "k": self.k, "v": self.v, "do": getattr(self, "do", None)}
        if not config.tma:
            return [tensors[name] for name in columns]
        from triton.tools.tensor_descriptor import TensorDescriptor

        return [TensorDescriptor.from_tensor(tensors[name], list(block)) for name, block in columns.items()]

    def splits(self, programs: int, limit: int) -> int:
        """Return into how many parts to cut each program's work so that waves of programs fill the device."""
        slots = processors(self.device)

        def time(parts: int) -> float:
            return math.ceil(programs * parts / slots) / parts + 0.02 * parts

        return min(range(1, limit + 1), key=time)

    def common(self, config: triton_configs.Config) -> dict:
        return {"PRECISION": _precision(self.dtype), "TMA": config.tma, "warps": config.warps, "stages": config.stages}

    def words_and_peaks(self, bits: Tensor) -> tuple[Tensor, int, Tensor, int]:
        """Return bits [B, heads, ...] as int32 words and float16 peaks, each with its stride from head to head."""
        flat = bits.view(self.zs, -1)
        size = self.keys.padded // 8 * self.rows.padded
        words, peaks = flat.view(torch.int32), flat[:, size:].view(torch.float16)
        return words, words.stride(0), peaks, peaks.stride(0)


@_on_its_device
def fwd(inputs: Inputs, options: Options, saved: Saved, learn_thresholds: bool) -> None:
    """Write into ``saved``."""
    if not saved.lse.numel():
        return
    if not inputs.key.shape[2]:  # nobody to attend to
        for x, empty in zip(saved[:4], (0, -torch.inf, -torch.inf, 0), strict=True):
            x.fill_(empty)
        return
    problem = _Problem(inputs, options, learn_thresholds)
    if inputs.key_padding_mask is not None and problem.rows is problem.keys:  # kernels leave padding rows alone
        empty = (0, -torch.inf, -torch.inf, 0)
        for x, value in zip((*saved[:4], saved.local, saved.rest), (*empty, False, 0), strict=True):
            x.fill_(value)
    _forward(problem, saved)


def _forward(problem: _Problem, saved: Saved) -> Tensor:
    """Run a forward pass; return the bits."""
    _, _, kernels, window, *_ = _kernels()
    inputs, options, rows, keys = problem.inputs, problem.options, problem.rows, problem.keys
    zs, heads, per_image = problem.zs, problem.heads, problem.per_image
    alpha, beta = inputs.alpha, inputs.beta
    bits = saved.bits
    if not bits.shape[-1] and (problem.has_bits or problem.dense):
        bits = bits.new_empty(*bits.shape[:2], *bits_shape(rows.n, keys.n))
    words, words_stride, peaks, peaks_stride = problem.words_and_peaks(bits) if bits.shape[-1] else (None, 0, None, 0)

    config = problem.config("statistics")
    blocks = rows.padded // config.block_m
    stat_splits = problem.splits(zs * blocks, min(8, keys.padded // config.block_n))
    largest, total = (problem.new(stat_splits, zs, rows.padded) for _ in range(2))
    chunk = min(config.chunk, problem.width)
    launch(
        kernels._asa_statistics_kernel, (zs * blocks, stat_splits),
        *problem.tiles(config, q=(config.block_m, chunk), k=(config.block_n, chunk)), largest, total, peaks,
        keys.counts, peaks_stride, problem.scale2, heads, zs, per_image, rows.padded, keys.padded, stat_splits,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, DIM=problem.width, CHUNK=chunk, HAS_PEAKS=problem.has_bits,
        **problem.common(config),
    )  # fmt: skip
    if problem.has_topk:
        config = problem.config("topk")
        chunk = min(config.chunk, problem.width)
        launch(
            kernels._asa_topk_kernel, (zs * (rows.padded // config.block_m),),
            *problem.tiles(config, q=(config.block_m, chunk), k=(config.block_n, chunk)), rows.order, rows.counts,
            keys.counts, saved.kappa, problem.scale2, options.topk, heads, per_image, rows.n, rows.padded, keys.padded,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, DIM=problem.width, CHUNK=chunk, CUTS=8,
            **problem.common(config),
        )  # fmt: skip
    thresholds = _thresholds(problem, saved, largest, total, stat_splits, peaks, peaks_stride)

    row_largest = problem.q.new_full((zs, rows.padded), -torch.inf, dtype=torch.float32)
    row_count, row_broken = problem.q.new_zeros((2, zs, rows.padded), dtype=torch.int32)
    partial = sums = None
    splits = 0
    if problem.has_bits:
        words[:, : keys.padded // 32 * rows.padded].zero_()
        _mask(problem, thresholds, words, words_stride, row_largest, row_count, row_broken)
    elif problem.dense:
        launch(
            kernels._asa_everybody_kernel, (zs * rows.padded // _PAD,), words, largest, problem.broken, rows.counts,
            keys.counts, row_largest, row_count, row_broken, words_stride, heads, zs, per_image, rows.padded,
            keys.padded, SPLITS=stat_splits, BLOCK=_PAD,
        )  # fmt: skip
    if bits.shape[-1]:
        config = problem.config("aggregate")
        blocks = rows.padded // config.block_m
        chunk, columns = min(config.chunk, problem.width), min(config.columns, problem.width_v)
        flags = _occupied(problem, words, words_stride)
        lists, lengths, others = _lists(problem, flags, flags, config, rows=True)
        parts = problem.width_v // columns
        splits = problem.splits(zs * blocks * parts, _MAX_SPLITS)
        partial = problem.new(splits, zs * rows.padded, problem.width_v)
        sums = problem.new(splits, zs, rows.padded)
        q, k, v = problem.tiles(
            config, q=(config.block_m, chunk), k=(config.block_n, chunk), v=(config.block_n, columns)
        )
        launch(
            kernels._asa_aggregate_kernel, (zs * blocks, splits, parts), q, k, v, lists, lengths, words, row_largest,
            partial, sums, words_stride, problem.scale2, zs, rows.padded, keys.padded, others, splits,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, DIM=problem.width, DIM_V=problem.width_v, CHUNK=chunk,
            CHUNK_V=columns, BY_COLUMNS=problem.one_way_bits, **problem.common(config),
        )  # fmt: skip
    height, width = options.grid
    local = saved.local.view(torch.uint8)
    if beta is not None:
        launch(
            window._asa_window_kernel, (zs * rows.padded // problem.block,), problem.q, problem.k, rows.order,
            rows.place, beta, saved.log_mean, local, *problem.strides[1], problem.scale2, heads, per_image, rows.n,
            rows.padded, height, width, DIM=problem.width, WINDOW=problem.window, BLOCK=problem.block,
            warps=problem.warps,
        )  # fmt: skip
    launch(
        window._asa_combine_kernel, (zs * rows.padded // problem.block,), partial, sums, row_largest, row_count,
        row_broken, words, problem.q, problem.k, problem.v, problem.broken, rows.order, rows.place, keys.counts, local,
        saved.lse, alpha, beta, saved.out, saved.rest, saved.lse_kept, saved.base2, saved.survivors,
        *problem.strides[0], *problem.strides[1], words_stride, problem.scale2, heads, zs, per_image, rows.n,
        rows.padded, height, width, problem.dim_v, SPLITS=splits, DIM=problem.width, DIM_V=problem.width_v,
        WINDOW=problem.window, HAS_BITS=problem.has_bits, ONE_WAY_BITS=problem.one_way_bits,
        HAS_ALPHA=alpha is not None, HAS_BETA=beta is not None, HAS_REST=saved.rest.shape[-1] > 0,
        FOR_BACKWARD=saved.base2.shape[-1] > 0, BLOCK=problem.block, warps=problem.warps,
    )  # fmt: skip
    return bits


@dataclass
class _Thresholds:
    """In base 2 and arranged order, [zs, padded]: a pair is a neighbour if s2 - lse2 > cut2 and s2 >= kappa2."""

    lse2: Tensor
    cut2: Tensor
    kappa2: Tensor
    flags: Tensor | None  # int8 [zs, row blocks, key blocks]: tiles that reach a threshold of their rows


def _thresholds(
    problem: _Problem, saved: Saved, largest, total, splits: int, peaks, peaks_stride: int, band: float = 0.0
) -> _Thresholds:
    _, plan, *_ = _kernels()
    rows, keys, alpha = problem.rows, problem.keys, problem.inputs.alpha
    lse2, cut2, kappa2 = (problem.new(problem.zs, rows.padded) for _ in range(3))
    row_blocks, key_blocks = rows.padded // _TILE, keys.padded // _TILE
    flags = problem.new(problem.zs, row_blocks, key_blocks, dtype=torch.int8) if problem.has_bits else None
    launch(
        plan._asa_flags_kernel, (problem.zs * row_blocks,), largest, total, saved.lse, saved.base2, alpha, saved.kappa,
        rows.order, rows.counts, keys.counts, peaks, lse2, cut2, kappa2, flags, *problem.strides[0], peaks_stride,
        problem.heads, problem.zs, problem.per_image, rows.n, rows.padded, key_blocks, band * _LOG2_E, SPLITS=splits,
        HAS_ALPHA=alpha is not None, HAS_TOPK=problem.has_topk, HAS_FLAGS=problem.has_bits,
        HAS_BASE2=saved.base2.shape[-1] > 0, BLOCK_J=32,
    )  # fmt: skip
    return _Thresholds(lse2, cut2, kappa2, flags)


def _mask(problem: _Problem, thresholds: _Thresholds, words, words_stride: int, *row_statistics: Tensor) -> None:
    """Decide the pairs of all tiles that reach thresholds."""
    _, plan, kernels, *_ = _kernels()
    config = problem.config("mask")
    rows, keys, tile = problem.rows, problem.keys, config.block_m
    tiles, other_tiles = rows.padded // tile, keys.padded // tile
    capacity = problem.zs * (tiles * (tiles + 1) // 2 if problem.mutual else tiles * other_tiles)
    pairs = problem.new(capacity, dtype=torch.int64)
    count = problem.q.new_zeros((1,), dtype=torch.int32)
    launch(
        plan._asa_pairs_kernel, (problem.zs * tiles,), thresholds.flags, pairs, count, rows.padded // _TILE,
        keys.padded // _TILE, tiles, other_tiles, TILE=tile, MUTUAL=problem.mutual, BLOCK_J=128,
    )  # fmt: skip
    chunk = min(config.chunk, problem.width)
    launch(
        kernels._asa_mask_kernel, (min(capacity, 2 * processors(problem.device)),),
        *problem.tiles(config, q=(tile, chunk), k=(tile, chunk)), pairs, count, thresholds.lse2, thresholds.cut2,
        thresholds.kappa2, keys.counts, problem.broken, words, *row_statistics, words_stride, problem.scale2,
        problem.heads, problem.per_image, rows.padded, keys.padded, tiles, other_tiles, TILE=tile, DIM=problem.width,
        CHUNK=chunk, MUTUAL=problem.mutual, SYMMETRIC=problem.mutual and problem.k is problem.q,
        ONE_WAY_BITS=problem.one_way_bits, HAS_TOPK=problem.has_topk, **problem.common(config),
    )  # fmt: skip


def _occupied(problem: _Problem, words: Tensor, words_stride: int) -> Tensor:
    """Return flags int8 [zs, row blocks, key blocks] of the tiles that hold a bit."""
    _, plan, *_ = _kernels()
    row_blocks, key_blocks = problem.rows.padded // _TILE, problem.keys.padded // _TILE
    flags = problem.new(problem.zs, row_blocks, key_blocks, dtype=torch.int8)
    launch(
        plan._asa_occupied_kernel, (problem.zs * row_blocks,), words, flags, words_stride, problem.rows.padded,
        key_blocks, BLOCK_J=16,
    )  # fmt: skip
    return flags


def _lists(
    problem: _Problem, by_rows: Tensor, by_columns: Tensor, config: triton_configs.Config, rows: bool
) -> tuple[Tensor, Tensor, int]:
    """List, for every block of rows (of keys if not ``rows``), the blocks of the other side in active tiles.

    Returns: lists int32 [zs, blocks, others], lengths int32 [zs, blocks], others.
    """
    _, plan, *_ = _kernels()
    own, other = (problem.rows, problem.keys) if rows else (problem.keys, problem.rows)
    size = max(config.block_n, _TILE)
    blocks, others = own.padded // config.block_m, other.padded // size
    lists = problem.new(problem.zs, blocks, others, dtype=torch.int32)
    lengths = problem.new(problem.zs, blocks, dtype=torch.int32)
    launch(
        plan._asa_lists_kernel, (problem.zs * blocks,), by_rows, by_columns, lists, lengths, blocks, others,
        *by_rows.shape[1:], ROWS=config.block_m, COLUMNS=size, BY_ROWS=rows or problem.mutual,
        BY_COLUMNS=problem.mutual or not rows, BLOCK_J=128,
    )  # fmt: skip
    return lists, lengths, others


@_on_its_device
def bwd(
    do: Tensor, inputs: Inputs, saved: Saved, options: Options, band: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return dq, dk, dv and, unless ``band`` is None, the straight-through dalpha and dbeta, [B, heads, N_q].

    A row whose output is NaN makes the gradients of its image and head NaN.
    """
    padding = inputs.key_padding_mask is not None
    new = torch.zeros if padding or not inputs.key.shape[2] else torch.empty  # kernels leave padding alone
    dq, dk, dv = (new(x.shape, dtype=x.dtype, device=x.device) for x in inputs[:3])
    learning = [x if band is not None else None for x in (inputs.alpha, inputs.beta)]
    dalpha, dbeta = (x if x is None else new(saved.lse.shape, dtype=torch.float32, device=x.device) for x in learning)
    if saved.lse.numel() and inputs.key.shape[2]:
        problem = _Problem(inputs, options, band is not None)
        _backward(problem, do, saved, band, dq, dk, dv, dalpha, dbeta)
    return dq, dk, dv, dalpha, dbeta


def _backward(problem: _Problem, do, saved: Saved, band: float | None, dq, dk, dv, dalpha, dbeta) -> None:
    arrange, _, kernels, _, _, finish, _ = _kernels()
    inputs, options, rows, keys = problem.inputs, problem.options, problem.rows, problem.keys
    zs, heads, per_image = problem.zs, problem.heads, problem.per_image
    height, width = options.grid
    problem.do = problem.q.new_empty((zs * rows.padded, problem.width_v))
    delta, lse_kept2 = (problem.new(zs, rows.padded) for _ in range(2))
    poisoned = problem.q.new_zeros((zs,), dtype=torch.int32)
    launch(
        arrange._asa_arrange_gradient_kernel, (zs * rows.padded // problem.block,), do, saved.out, saved.rest,
        saved.base2, saved.survivors, rows.order, problem.do, delta, lse_kept2, poisoned, *do.stride(), heads,
        per_image, rows.n, rows.padded, problem.dim_v, DIM=problem.width_v, BLOCK=problem.block,
        HAS_REST=saved.rest.shape[-1] > 0, PRECISION=_precision(problem.dtype), warps=problem.warps,
    )  # fmt: skip

    def settle(residual: Tensor | None, parts: int) -> None:
        launch(
            finish._asa_settle_delta_kernel, (zs * rows.padded // problem.block,), residual, problem.q, problem.k,
            problem.v, problem.do, words, lse_kept2, delta, rows.order, rows.place, local, words_stride, problem.scale2,
            heads, zs, per_image, rows.n, rows.padded, height, width, SPLITS=parts, DIM=problem.width,
            DIM_V=problem.width_v, WINDOW=problem.window, HAS_BITS=problem.has_bits, ONE_WAY_BITS=problem.one_way_bits,
            BLOCK=problem.block, warps=problem.warps,
        )  # fmt: skip

    bits = saved.bits
    splits_q = splits_k = splits_t = 0
    partial_q = partial_k = partial_v = partial_t = words = thresholds = None
    words_stride = 0
    local = saved.local.view(torch.uint8)
    if problem.dense:
        bits = bits.new_empty(*bits.shape[:2], *bits_shape(rows.n, keys.n))
    if bits.shape[-1]:
        words, words_stride, peaks, peaks_stride = problem.words_and_peaks(bits)
        if problem.dense:
            unused = problem.q.new_empty((3, zs, rows.padded), dtype=torch.int32)
            launch(
                kernels._asa_everybody_kernel, (zs * rows.padded // _PAD,), words, delta, problem.broken, rows.counts,
                keys.counts, unused[0].view(torch.float32), unused[1], unused[2], words_stride, heads, zs, per_image,
                rows.padded, keys.padded, SPLITS=0, BLOCK=_PAD,
            )  # fmt: skip
        flags = _occupied(problem, words, words_stride)
        common = (words, lse_kept2, delta)
        if problem.dtype == torch.float32:
            settle(*_row_products(problem, flags, words_stride, common, residual=True))
        partial_q, splits_q = _row_products(problem, flags, words_stride, common)
        partial_k, partial_v, splits_k = _column_products(problem, flags, words_stride, common)
        if dalpha is not None:
            thresholds = _thresholds(problem, saved, None, None, 0, peaks, peaks_stride, band)
            partial_t, splits_t = _threshold_products(problem, flags, words_stride, common, thresholds, band)
    elif problem.dtype == torch.float32:
        settle(None, 0)
    t = thresholds or _Thresholds(None, None, None, None)
    launch(
        finish._asa_finish_rows_kernel, (zs * rows.padded // problem.block,), partial_q, partial_t, problem.q,
        problem.k, problem.v, problem.do, words, t.lse2, t.cut2, t.kappa2, lse_kept2, delta, poisoned, rows.order,
        rows.place, local, saved.log_mean, inputs.alpha, inputs.beta, dq, dalpha, dbeta, *problem.strides[0],
        *problem.strides[1], words_stride, problem.scale, problem.scale2, band or 1.0, heads, zs, per_image, rows.n,
        rows.padded, height, width, problem.dim, SPLITS=splits_q, T_SPLITS=splits_t, DIM=problem.width,
        DIM_V=problem.width_v, WINDOW=problem.window, HAS_BITS=problem.has_bits, ONE_WAY_BITS=problem.one_way_bits,
        MUTUAL=problem.mutual, HAS_TOPK=problem.has_topk, LEARN_ALPHA=dalpha is not None, LEARN_BETA=dbeta is not None,
        BLOCK=problem.block, warps=problem.warps,
    )  # fmt: skip
    launch(
        finish._asa_finish_columns_kernel, (zs * keys.padded // problem.block,), partial_k, partial_v, problem.q,
        problem.k, problem.v, problem.do, words, lse_kept2, delta, poisoned, keys.order, keys.place, local, dk, dv,
        words_stride, problem.scale, problem.scale2, heads, zs, per_image, keys.n, keys.padded, height, width,
        problem.dim, problem.dim_v, SPLITS=splits_k, DIM=problem.width, DIM_V=problem.width_v, WINDOW=problem.window,
        HAS_BITS=problem.has_bits, ONE_WAY_BITS=problem.one_way_bits, BLOCK=problem.block, warps=problem.warps,
    )  # fmt: skip


def _row_products(problem: _Problem, flags, words_stride: int, common, residual: bool = False) -> tuple[Tensor, int]:
    """Return the parts [splits, zs * padded, D] of dq / scale over neighbours, and how many parts.

    ``residual``: those [splits, zs * padded] of what delta misses instead.
    """
    *_, kernels, _, _ = _kernels()
    rows, keys, zs = problem.rows, problem.keys, problem.zs
    config = problem.config("dq")
    blocks = rows.padded // config.block_m
    chunk, chunk_v = min(config.chunk, problem.width), min(config.chunk, problem.width_v)
    columns = min(config.columns, problem.width)
    lists, lengths, others = _lists(problem, flags, flags, config, rows=True)
    parts = 1 if residual else problem.width // columns
    splits = problem.splits(zs * blocks * parts, _MAX_SPLITS)
    partial = problem.new(splits, zs * rows.padded, *(() if residual else (problem.width,)))
    m, n = config.block_m, config.block_n
    launch(
        kernels._asa_dq_kernel, (zs * blocks, splits, parts),
        *problem.tiles(config, q=(m, chunk), k=(n, chunk), v=(n, chunk_v), do=(m, chunk_v)), lists, lengths, *common,
        partial, words_stride, problem.scale2, zs, rows.padded, keys.padded, others, splits, BLOCK_M=m, BLOCK_N=n,
        DIM=problem.width, DIM_V=problem.width_v, CHUNK=chunk, CHUNK_V=chunk_v, COLUMNS=columns,
        BY_COLUMNS=problem.one_way_bits, RESIDUAL=residual, **problem.common(config),
    )  # fmt: skip
    return partial, splits


def _column_products(problem: _Problem, flags, words_stride: int, common) -> tuple[Tensor, Tensor, int]:
    """Return the parts [splits, zs * padded, D or Dv] of dk / scale and dv over neighbours, and how many parts."""
    *_, kernels, _, _ = _kernels()
    rows, keys, zs = problem.rows, problem.keys, problem.zs
    fused = problem.config("dkv")
    fused = fused is not None and fused.columns >= max(problem.width, problem.width_v)
    partial_k = partial_v = None
    most_splits = None
    for name in ("dkv",) if fused else ("dk", "dv"):
        config = problem.config(name)
        blocks = keys.padded // config.block_m
        m, n = config.block_m, config.block_n
        chunk, chunk_v = min(config.chunk, problem.width), min(config.chunk, problem.width_v)
        columns, columns_v = min(config.columns, problem.width), min(config.columns, problem.width_v)
        parts = {"dkv": 1, "dk": problem.width // columns, "dv": problem.width_v // columns_v}[name]
        lists, lengths, others = _lists(problem, flags, flags, config, rows=False)
        splits = most_splits or problem.splits(zs * blocks * parts, _MAX_SPLITS)
        most_splits = splits  # both in as many parts, whoever sums them
        if "k" in name:
            partial_k = problem.new(splits, zs * keys.padded, problem.width)
        if "v" in name:
            partial_v = problem.new(splits, zs * keys.padded, problem.width_v)
        launch(
            kernels._asa_dkv_kernel, (zs * blocks, splits, parts),
            *problem.tiles(config, q=(n, chunk), k=(m, chunk), v=(m, chunk_v), do=(n, chunk_v)), lists, lengths,
            *common, partial_k, partial_v, words_stride, problem.scale2, zs, rows.padded, keys.padded, others, splits,
            BLOCK_M=m, BLOCK_N=n, DIM=problem.width, DIM_V=problem.width_v, CHUNK=chunk, CHUNK_V=chunk_v,
            COLUMNS=columns, COLUMNS_V=columns_v, BY_ROWS=problem.mutual,
            BY_COLUMNS=problem.one_way_bits or not problem.mutual, WANT_DK="k" in name, WANT_DV="v" in name,
            **problem.common(config),
        )  # fmt: skip
    return partial_k, partial_v, splits


def _threshold_products(problem: _Problem, flags, words_stride: int, common, t: _Thresholds, band: float):
    """Return the parts [splits, zs, padded] of -dl/dt over pairs outside the window, and how many parts."""
    *_, kernels, _, _ = _kernels()
    rows, keys, zs = problem.rows, problem.keys, problem.zs
    config = problem.config("dt")
    m, n = config.block_m, config.block_n
    blocks = rows.padded // m
    chunk, chunk_v = min(config.chunk, problem.width), min(config.chunk, problem.width_v)
    # Tiles with a score in the band below or above their rows' thresholds, and a neighbour the other way.
    lists, lengths, others = _lists(problem, t.flags, flags, config, rows=True)
    splits = problem.splits(zs * blocks, _MAX_SPLITS)
    partial = problem.new(splits, zs, rows.padded)
    words, lse_kept2, delta = common
    launch(
        kernels._asa_dt_kernel, (zs * blocks, splits),
        *problem.tiles(config, q=(m, chunk), k=(n, chunk), v=(n, chunk_v), do=(m, chunk_v)), lists, lengths, words,
        t.lse2, t.cut2, t.kappa2, lse_kept2, delta, rows.order, keys.counts, partial, words_stride, problem.scale2,
        band, problem.heads, zs, problem.per_image, rows.padded, keys.padded, others, splits,
        max(problem.options.grid[1], 1), problem.window // 2, BLOCK_M=m, BLOCK_N=n, DIM=problem.width,
        DIM_V=problem.width_v, CHUNK=chunk, CHUNK_V=chunk_v, MUTUAL=problem.mutual, HAS_TOPK=problem.has_topk,
        HAS_WINDOW=problem.window > 0, **problem.common(config),
    )  # fmt: skip
    return partial, splits


@_on_its_device
def neighbor_graph(inputs: Inputs, options: Options) -> NeighborGraph:
    """Return the survivors K."""
    *_, graph = _kernels()
    saved = Saved.new(inputs, options, bits_shape(inputs.query.shape[2], inputs.key.shape[2]), keep_bits=True)
    fwd(inputs, options, saved, False)
    row_offsets = torch.nn.functional.pad(saved.survivors.flatten().to(torch.int64).cumsum(0), (1, 0))
    col_indices = row_offsets.new_empty(int(row_offsets[-1]), dtype=torch.int32)
    if not len(col_indices):
        return NeighborGraph(row_offsets, col_indices)
    problem = _Problem(inputs, options, False)
    rows, keys = problem.rows, problem.keys
    words, words_stride = None, 0
    if saved.bits.shape[-1]:
        words, words_stride, _, _ = problem.words_and_peaks(saved.bits)
    block = 16
    launch(
        graph._asa_neighbors_kernel, (problem.zs * math.ceil(rows.n / block),), words, saved.local.view(torch.uint8),
        rows.place, keys.place, row_offsets, col_indices, words_stride, problem.heads, problem.per_image, rows.n,
        keys.n, rows.padded, max(options.grid[1], 1), HAS_BITS=problem.has_bits, DENSE=problem.dense,
        WINDOW=problem.window, BLOCK=block, BLOCK_J=64,
    )  # fmt: skip
    return NeighborGraph(row_offsets, col_indices)
