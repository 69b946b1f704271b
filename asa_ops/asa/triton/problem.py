"""What a call knows before any kernel runs. Nothing here launches a kernel or allocates more than it is asked for."""

import copy
import math
from typing import NamedTuple

import torch
from torch import Tensor

from ...core import triton_launch
from ..types import Inputs, Options, bits_shape
from . import configs

LOG2_E = math.log2(math.e)
MAX_SPLITS = 4  # parts of a sum, each of which takes memory
NOTES = 4  # numbers of a head in ``Orders.notes``


class Window(NamedTuple):
    """The window of a local block, and where it lies; kernels are compiled for it."""

    POSITIONS: int  # 0: no local block
    DEPTH: int  # its sides
    HEIGHT: int
    WIDTH: int
    VOLUME: bool  # on a grid of several slices


NO_WINDOW = Window(0, 1, 1, 1, False)


class Problem:
    """The sizes and options of a call, and which steps it takes.

    Of a part of a call, :meth:`part`, ``padded`` and ``key_padded`` are those of some rows or keys; what depends on how
    much work there is follows the whole call, so that every number is the one that a whole call finds.
    """

    def __init__(self, inputs: Inputs, options: Options, learn_thresholds: bool):
        query, _, value, alpha, beta, key_padding_mask = inputs
        self.inputs, self.options = inputs, options
        self.dtype, self.device = query.dtype, query.device
        batch, self.heads, self.n, self.dim = query.shape
        self.n_keys, self.dim_v = value.shape[2:]
        self.n_heads = batch * self.heads  # of all images
        self.sharing = self.n_heads if key_padding_mask is None else self.heads  # heads whose tokens stand in one order
        self.padded, self.key_padded = (configs.padded_length(n) for n in (self.n, self.n_keys))
        self.all_padded, self.all_key_padded = self.padded, self.key_padded
        self.width, self.width_v = (max(16, 1 << max(d - 1, 0).bit_length()) for d in (self.dim, self.dim_v))
        self.scale, self.scale2 = options.scale, options.scale * LOG2_E
        depth, height, width = options.grid
        self.is_volume = depth > 1
        self.of_grid = max(height, 1), max(width, 1), options.extra or None  # None: kernels do without

        self.has_bits = alpha is not None or options.topk > 0
        self.dense = not self.has_bits and beta is None
        self.has_tiles = self.has_bits or self.dense  # pairs are kept as bits, in tiles
        self.mutual = options.reciprocal
        self.window = NO_WINDOW if beta is None else Window(options.positions, *options.window, self.is_volume)
        self.has_topk = 0 < options.topk < self.n_keys
        # Threshold gradients ask for A_ji where M_ij is 0; without them M itself is stored, which is cheaper to read.
        self.one_way_bits = learn_thresholds and self.mutual and alpha is not None

        self.architecture = triton_launch.architecture(self.device)
        self.precision = triton_launch.precision(self.dtype)
        self.block, self.warps = configs.rows_at_a_time(max(self.width, self.width_v), self.architecture)

    def part(self, rows: int, keys: int) -> "Problem":
        """Return the problem of so many positions of rows and keys."""
        part = copy.copy(self)
        part.padded, part.key_padded = rows, keys
        return part

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.inputs.query.new_empty(shape, dtype=dtype)

    def new_bits(self) -> Tensor:
        """Allocate the bits of all heads where they are not to be kept."""
        return self.new(self.n_heads, *bits_shape("triton", self.n, self.n_keys), dtype=torch.uint8)

    def new_flags(self) -> Tensor:
        """Allocate a flag for every tile of 64 x 64 pairs."""
        return self.new(self.n_heads, self.padded // 64, self.key_padded // 64, dtype=torch.int8)

    def bits(self, buffer: Tensor) -> "Bits":
        """Return the first part of a buffer [n_heads or B, heads, ...], if it holds any."""
        if not buffer.shape[-1]:
            return Bits(None, 0)
        words = buffer.view(self.n_heads, -1).view(torch.int32)
        return Bits(words[:, : self.key_padded // 32 * self.padded], words.stride(0))

    def peaks(self, buffer: Tensor) -> "Peaks":
        """Return the other part of the buffer, if thresholds ask for it."""
        if not self.has_bits:
            return Peaks(None, 0)
        peaks = buffer.view(self.n_heads, -1).view(torch.float16)
        return Peaks(peaks[:, self.key_padded // 16 * self.padded :], peaks.stride(0))

    @property
    def row_programs(self) -> tuple[int]:
        """The grid of a kernel that takes ``block`` rows a program."""
        return (self.n_heads * self.padded // self.block,)

    def config(self, kernel: str) -> configs.Config | None:
        both = self.one_way_bits or (kernel == "mask" and self.has_topk)
        return configs.find(kernel, max(self.width, self.width_v), self.dtype, self.architecture, both)

    @property
    def column_sums(self) -> tuple[str, ...]:
        """The rows of the table by which dk and dv are summed: both at once if it fits, or one by one."""
        fused = self.config("dkv")
        return ("dkv",) if fused is not None and fused.columns >= max(self.width, self.width_v) else ("dk", "dv")

    def splits(self, programs: int, limit: int) -> int:
        """Return into how many parts to cut each program's work so that waves of programs fill the device."""
        slots = triton_launch.processors(self.device)

        def time(parts: int) -> float:
            return math.ceil(programs * parts / slots) / parts + 0.02 * parts

        return min(range(1, limit + 1), key=time)

    def strides(self, multiplier: Tensor | None) -> tuple[int, int, int]:
        """Return the strides of alpha or beta: of images, heads and tokens."""
        if multiplier is None:
            return 0, 0, 0
        return multiplier.stride(0), multiplier.stride(1) if multiplier.shape[1] > 1 else 0, multiplier.stride(2)


class Order(NamedTuple):
    """In which order the tokens of every image stand; the same for all images where there is no padding."""

    order: Tensor  # int32 [images, padded] token at a position; -2 - token of padding, which comes last; -1: none
    place: Tensor  # int32 [images, n] position of a token, -1 for padding
    counts: Tensor  # int32 [images] real tokens
    extra: Tensor | None  # int32 [images] how many of them are extra tokens, which come first; None: no token is
    padded: int  # a multiple of 128


class Orders(NamedTuple):
    """The orders of both sides, one where they have as many tokens, and what a call counts and notes from 0 on."""

    rows: Order  # of query and do
    keys: Order  # of key and value
    # int32 [n_heads, NOTES]. Of every head, of a backward: the largest |v| and the largest sum of |do| of a query,
    # float32 as int32; whether a row has the output NaN. Of all heads, in the first: how many tiles a forward decides.
    notes: Tensor


class Tokens(NamedTuple):
    """Tokens as the kernels read them: [n_heads * padded, width]."""

    rows: Order  # of query and do
    keys: Order  # of key and value
    q: Tensor
    k: Tensor
    v: Tensor  # 0 where it is not finite
    do: Tensor | None  # the gradient of the output, in a backward
    not_finite: Tensor  # int32 [n_heads, key_padded / 32]: bits of the keys whose value is not finite
    bounds: Tensor | None  # the notes, where gradients of scores may overflow: in a backward of float16


class Bits(NamedTuple):
    """Pairs as bits."""

    words: Tensor | None  # int32 [n_heads, key_padded / 32 * padded]
    stride: int  # from head to head, a multiple of 16
    # Of a part of the rows: the same of all rows and the part's own keys, where columns are read beside rows. None: the
    # words above hold them too.
    back: "Bits | None" = None


class Peaks(NamedTuple):
    """Block maxima of the scores."""

    peaks: Tensor | None  # float16 [n_heads, key_padded / 64 * padded]
    stride: int  # from head to head, a multiple of 16


class PerHead(NamedTuple):
    """A piece of what is kept for the backward: the numbers of a head one after another, heads further apart."""

    numbers: Tensor | None  # [n_heads, ..]
    stride: int  # from head to head, a multiple of 16

    @classmethod
    def of(cls, piece: Tensor) -> "PerHead":
        """Return a view [B, heads, ..] of ``Saved.kept`` as kernels take it; None if it holds no numbers."""
        if not piece.numel():
            return cls(None, 0)
        numbers = piece.flatten(0, 1)
        stride = numbers.stride(0) if len(numbers) > 1 else 0  # a single head may have any
        return cls(numbers.view(torch.uint8) if numbers.dtype == torch.bool else numbers, stride)
