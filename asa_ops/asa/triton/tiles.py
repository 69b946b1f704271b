"""What the kernels of adaptive sparse attention share: tiles of tokens, their products, one bit a pair, the window.

Tokens are arranged (``arrange``): [n_heads * padded, WIDTH], rows in spatial tiles, padded with zeros to whole blocks,
so tiles need no masks. Pairs are words[column // 32, row]: bit column % 32 of an int32.

``BY_ROWS`` and ``BY_COLUMNS`` say how a tile of pairs is read: by the words of its rows, by those of its columns (whose
bits are rows then), or by both, a pair counting if both say so. Mutual neighbours stored as such, M_ij = M_ji, are read
by rows; one-way neighbours A by rows where rows are queries and by columns where rows are keys; A_ij and A_ji by both.

Kernels take structs: NamedTuples of what belongs together. Triton compiles a kernel anew for an integer field that is 1
or a multiple of 16, because ``do_not_specialize`` reaches top-level arguments only. So a struct holds pointers, floats,
compile-time constants (``tl.constexpr``), and only those integers that are multiples of 16 in every call. Sizes that
may be anything are arguments of their own (``SCALARS``), and so are tensor descriptors, which Triton 3.6 does not find
in structs. A field that is None is known at compile time: the kernel does without it.
"""

import functools
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ...core import triton_launch
from .problem import MAX_SPLITS, NOTES, Problem, Tokens

LN_2 = tl.constexpr(0.6931471805599453)
NUMBER_OF_NOTES = tl.constexpr(NOTES)
OF_KEYS = ("dkv", "dk", "dv")  # kernels whose programs own keys
UNROLL = tl.constexpr(3)  # offsets of the window at a time, so that their loads are under way together

# Arguments for which no kernel is compiled anew when they happen to be 1 or a multiple of 16.
SCALARS = [
    "heads", "n_heads", "sharing", "n", "n_keys", "dim", "dim_v", "depth", "height", "width", "extra", "topk",
    "alpha_stride_b", "alpha_stride_h", "alpha_stride_n", "beta_stride_b", "beta_stride_h", "beta_stride_n",
]  # fmt: skip


class Tile(NamedTuple):
    """How a kernel loads and multiplies tiles of two matrices of the same width; compile-time constants."""

    BLOCK_M: int  # rows of the side that a program owns
    BLOCK_N: int  # rows of the other side at a time
    DIM: int  # width of both matrices
    CHUNK: int  # columns at a time; DIM: whole rows stay on chip
    PRECISION: str  # of products of float32
    TMA: bool  # load by tensor descriptors


def constants(struct):
    """Return a struct whose fields are compile-time constants of a kernel: one object for all equal ones."""
    return _constants(type(struct), *struct)


@functools.cache
def _constants(struct: type, *fields):
    return struct(*(constants(x) if isinstance(x, tuple) else tl.constexpr(x) for x in fields))


class TileKernel:
    """A kernel over tiles of tokens: its row of the table, how its work is cut, its operands as it loads them.

    A program owns a block of ``own`` and goes through blocks of the other side: rows and keys, or keys and rows.
    """

    def __init__(self, problem: Problem, tokens: Tokens, name: str):
        self.problem, self.tokens, self.of_keys = problem, tokens, name in OF_KEYS
        self.config = config = problem.config(name)
        self.own = tokens.keys if self.of_keys else tokens.rows
        self.programs = problem.n_heads * self.own.padded // config.block_m
        padded = problem.all_key_padded if self.of_keys else problem.all_padded
        self.programs_of_all = problem.n_heads * padded // config.block_m
        self.columns, self.columns_v = (min(config.columns, width) for width in (problem.width, problem.width_v))
        shape = config.block_m, config.block_n
        chunk_v = config.columns if name == "aggregate" else config.chunk  # which sums values, chunk by chunk
        self.scores, self.values = (
            Tile(*shape, width, min(chunk, width), problem.precision, config.tma)
            for width, chunk in ((problem.width, config.chunk), (problem.width_v, chunk_v))
        )

    def splits(self, chunks: int = 1, limit: int = MAX_SPLITS) -> int:
        """Return into how many parts to cut the other side; ``chunks``: of the columns of the result."""
        return self.problem.splits(self.programs_of_all * chunks, limit)

    def launch(self, kernel, grid: tuple[int, ...], operands: str, *args, **constexprs) -> None:
        """Launch ``kernel``: operands come first, as its tiles ask for them, then the other arguments."""
        tiles = {"SCORES": constants(self.scores)}
        if "v" in operands:
            tiles["VALUES"] = constants(self.values)
        triton_launch.launch(
            kernel, grid, *(self.operand(name, self.tokens) for name in operands.split()), *args, **tiles, **constexprs,
            warps=self.config.warps, stages=self.config.stages, registers=self.config.registers,
        )  # fmt: skip

    def operand(self, name: str, tokens: Tokens | None) -> Tensor | TensorDescriptor | None:
        """Return some tokens as the kernel loads them."""
        if tokens is None:
            return None
        tensor = getattr(tokens, name)
        tile = self.scores if name in ("q", "k") else self.values
        if not tile.TMA:
            return tensor
        is_own = self.of_keys == (name in ("k", "v"))
        return TensorDescriptor.from_tensor(tensor, [tile.BLOCK_M if is_own else tile.BLOCK_N, tile.CHUNK])


@triton.jit
def operand(x, PRECISION: tl.constexpr):
    """x in the form that products of tiles take: rounded to TF32, which tensor cores would cut off."""
    if PRECISION == "tf32":
        rounded = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        x = tl.where(tl.abs(x) < float("inf"), rounded, x)
    return x


@triton.jit
def load_tile(x, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILE):
    """x[row : row + ROWS, column : column + COLUMNS]; x is a pointer, or a descriptor of such blocks."""
    if TILE.TMA:
        tile = x.load([row, column])
    else:
        rows = tl.cast(row, tl.int64) + tl.arange(0, ROWS)
        tile = tl.load(x + rows[:, None] * TILE.DIM + (column + tl.arange(0, COLUMNS))[None, :])
    return tile


@triton.jit
def load_whole(x, row, ROWS: tl.constexpr, TILE):
    """Whole rows for :func:`product` to use as often as it likes; nothing if products go chunk by chunk."""
    if TILE.CHUNK == TILE.DIM:
        tile = load_tile(x, row, 0, ROWS, TILE.DIM, TILE)
    else:
        tile = 0
    return tile


@triton.jit
def product(a, a_whole, a_row, b, b_whole, b_row, TILE):
    """<a_i, b_j> for BLOCK_M rows of a and BLOCK_N rows of b, float32."""
    if TILE.CHUNK == TILE.DIM:
        s = tl.dot(a_whole, b_whole.T, input_precision=TILE.PRECISION)
    else:
        s = tl.zeros([TILE.BLOCK_M, TILE.BLOCK_N], tl.float32)
        for c in range(0, TILE.DIM, TILE.CHUNK):
            x = load_tile(a, a_row, c, TILE.BLOCK_M, TILE.CHUNK, TILE)
            y = load_tile(b, b_row, c, TILE.BLOCK_N, TILE.CHUNK, TILE)
            s = tl.dot(x, y.T, s, input_precision=TILE.PRECISION)
    return s


@triton.jit
def products_both_ways(a, b, a_others, b_own, i_row, j_row, BOTH: tl.constexpr, TILE):
    """<a_i, b_j> and, if BOTH, <b_i, a_j>, both laid out [i, j], chunk by chunk.

    Where a holds some rows only and b all of them, a_j and b_i are in ``a_others`` and ``b_own``, otherwise None.
    """
    if a_others is None:
        a_others = a
    if b_own is None:
        b_own = b
    there = tl.zeros([TILE.BLOCK_M, TILE.BLOCK_N], tl.float32)
    back = tl.zeros([TILE.BLOCK_M, TILE.BLOCK_N], tl.float32)
    for c in range(0, TILE.DIM, TILE.CHUNK):
        a_i = load_tile(a, i_row, c, TILE.BLOCK_M, TILE.CHUNK, TILE)
        b_j = load_tile(b, j_row, c, TILE.BLOCK_N, TILE.CHUNK, TILE)
        there = tl.dot(a_i, b_j.T, there, input_precision=TILE.PRECISION)
        if BOTH:
            b_i = load_tile(b_own, i_row, c, TILE.BLOCK_M, TILE.CHUNK, TILE)
            a_j = load_tile(a_others, j_row, c, TILE.BLOCK_N, TILE.CHUNK, TILE)
            back = tl.dot(b_i, a_j.T, back, input_precision=TILE.PRECISION)
    return there, back


@triton.jit
def some_columns(x, whole, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILE):
    """COLUMNS columns of rows that :func:`load_whole` may have loaded already."""
    if TILE.CHUNK == TILE.DIM and COLUMNS == TILE.DIM:
        tile = whole
    else:
        tile = load_tile(x, row, column, ROWS, COLUMNS, TILE)
    return tile


@triton.jit
def own_block(padded, BLOCK: tl.constexpr):
    """The head of a program, and the first of the BLOCK positions that it owns."""
    blocks = padded // BLOCK
    return tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK


@triton.jit
def rows_of(program, padded, BLOCK: tl.constexpr):
    """The head of a program, in 64 bits, and the BLOCK positions that it owns."""
    blocks = padded // BLOCK
    return tl.cast(program // blocks, tl.int64), program % blocks * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def own_rows(padded, BLOCK: tl.constexpr):
    """:func:`rows_of` this program, where all programs of a kernel do the same."""
    return rows_of(tl.program_id(0), padded, BLOCK)


@triton.jit
def clear(x, first, count):
    """Make ``count`` numbers 0, from ``first`` on."""
    for start in range(0, count, 1024):
        i = start + tl.arange(0, 1024)
        tl.store(x + first + i, tl.zeros([1024], x.dtype.element_ty), mask=i < count)


@triton.jit
def raster_of(token):
    """The tokens at positions of an order, those of padding too; below 0 where there is none."""
    return tl.where(token >= 0, token, -2 - token)


@triton.jit
def of_head(piece, z):
    """Where the numbers of a head begin in a :class:`PerHead` that has some."""
    return piece.numbers + tl.cast(z, tl.int64) * piece.stride


@triton.jit
def multiplier_of(x, z, token, real, heads, stride_b, stride_h, stride_n):
    """alpha or beta of tokens, float32; 0 where they are not ``real``."""
    row = x + z // heads * stride_b + z % heads * stride_h
    return tl.load(row + token.to(tl.int64) * stride_n, mask=real, other=0).to(tl.float32)


@triton.jit
def words_of(bits, z):
    """The bits of a head; None without any."""
    words = bits.words
    if words is not None:
        words += tl.cast(z, tl.int64) * bits.stride
    return words


@triton.jit
def back_of(bits, z):
    """The bits of a head from which columns are read; None without any."""
    if bits.back is None:
        words = words_of(bits, z)
    else:
        words = words_of(bits.back, z)
    return words


@triton.jit
def words_by_rows(words, row, column, padded, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS] bool from words[column // 32, row]."""
    at = tl.cast(column // 32, tl.int64) * padded + row + tl.arange(0, ROWS)
    j = tl.arange(0, COLUMNS)
    word = tl.load(words + at)[:, None]
    for c in tl.static_range(1, COLUMNS // 32):
        word = tl.where(j[None, :] < 32 * c, word, tl.load(words + at + c * padded)[:, None])
    return ((word >> (j % 32)[None, :]) & 1) != 0


@triton.jit
def words_by_columns(words, row, column, padded, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS] bool from words[row // 32, column]."""
    at = tl.cast(row // 32, tl.int64) * padded + column + tl.arange(0, COLUMNS)
    i = tl.arange(0, ROWS)
    word = tl.load(words + at)[None, :]
    for r in tl.static_range(1, ROWS // 32):
        word = tl.where(i[:, None] < 32 * r, word, tl.load(words + at + r * padded)[None, :])
    return ((word >> (i % 32)[:, None]) & 1) != 0


@triton.jit
def pairs_of_tile(
    bits, z, row, column, own, others,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BY_ROWS: tl.constexpr, BY_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Which pairs of a tile are neighbours, bool [ROWS, COLUMNS]; there are ``own`` rows and ``others`` columns."""
    if BY_ROWS and BY_COLUMNS:
        by_columns = words_by_columns(back_of(bits, z), row, column, others, ROWS, COLUMNS)
        kept = words_by_rows(words_of(bits, z), row, column, own, ROWS, COLUMNS) & by_columns
    elif BY_ROWS:
        kept = words_by_rows(words_of(bits, z), row, column, own, ROWS, COLUMNS)
    else:
        kept = words_by_columns(back_of(bits, z), row, column, others, ROWS, COLUMNS)
    return kept


@triton.jit
def bit_at(words, row, column, padded, valid):
    """Bit of the pairs (row, column), for tensors of equal shape; False where not ``valid``."""
    word = tl.load(words + tl.cast(column // 32, tl.int64) * padded + row, mask=valid, other=0)
    return ((word >> (column % 32)) & 1) != 0


@triton.jit
def pack_rows(pairs, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Words [ROWS, COLUMNS // 32] of a bool tile."""
    bit = tl.full([COLUMNS], 1, tl.int32) << (tl.arange(0, COLUMNS) % 32)
    bits = tl.where(pairs, bit[None, :], 0)
    return tl.sum(tl.reshape(bits, [ROWS, COLUMNS // 32, 32]), 2)


@triton.jit
def pack_columns(pairs, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Words [ROWS // 32, COLUMNS] of the transposed bool tile."""
    bit = tl.full([ROWS], 1, tl.int32) << (tl.arange(0, ROWS) % 32)
    bits = tl.where(pairs, bit[:, None], 0)
    return tl.sum(tl.reshape(bits, [ROWS // 32, 32, COLUMNS]), 1)


@triton.jit
def first_bits(n):
    """Words whose lowest n bits are set, n clamped to 0..32."""
    partial = (tl.full(n.shape, 1, tl.int32) << tl.maximum(tl.minimum(n, 31), 0)) - 1
    return tl.where(n >= 32, -1, partial)


@triton.jit
def count_bits(x):
    """Number of set bits of int32 words (the shifts are arithmetic; the masks drop what they bring in)."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    x = x + (x >> 8)
    return (x + (x >> 16)) & 0x3F


@triton.jit
def place_of(token, height, width, extra, WINDOW):
    """Slice, row and column of tokens; the slice is 0 without several. ``extra`` tokens before the grid have none."""
    if extra is not None:
        token -= extra
    row, column = token // width, token % width
    t = tl.zeros_like(row)
    if WINDOW.VOLUME:
        t = row // height
        row -= t * height
    return t, row, column


@triton.jit
def in_window(place, token, offset, n, height, width, extra, WINDOW):
    """The ``offset``-th token of the windows around tokens (raster order), its position, and whether it is a real one.

    ``place``: positions of the n tokens of an image. Tokens below 0, and ``extra`` ones, have no window.
    """
    offset = tl.cast(offset, tl.int32)  # in the interpreter it is an integer of Python
    t, row, column = place_of(token, height, width, extra, WINDOW)
    line = offset // WINDOW.WIDTH
    column += offset % WINDOW.WIDTH - WINDOW.WIDTH // 2
    if WINDOW.DEPTH > 1:
        row += line % WINDOW.HEIGHT
        t += line // WINDOW.HEIGHT - WINDOW.DEPTH // 2
    else:
        row += line
    row -= WINDOW.HEIGHT // 2
    on_grid = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    other = (t * height + row) * width + column
    first = 0
    if extra is not None:
        first = extra
        other += extra
    if WINDOW.DEPTH > 1:
        on_grid &= (t >= 0) & (other < n)
    at = tl.load(place + other, mask=(token >= first) & on_grid, other=-1)
    return other, tl.maximum(at, 0), at >= 0


@triton.jit
def value_note(notes, z):
    """Where the largest |v| of a head is noted; see ``Orders.notes``."""
    return notes + z * NUMBER_OF_NOTES


@triton.jit
def gradient_note(notes, z):
    """Where the largest sum of |do| of a query of a head is."""
    return notes + z * NUMBER_OF_NOTES + 1


@triton.jit
def nan_note(notes, z):
    """Where it stands that a row of a head has the output NaN."""
    return notes + z * NUMBER_OF_NOTES + 2


@triton.jit
def tile_count(notes):
    """Where the tiles that a forward decides are counted."""
    return notes + 3


@triton.jit
def note_largest(note, x):
    """Take the largest of finite numbers >= 0 into a note, as bits, which order as the numbers do."""
    tl.atomic_max(note, tl.max(tl.where(x < float("inf"), x, 0), 0).to(tl.int32, bitcast=True), sem="relaxed")


@triton.jit
def shrink_of(bounds, z):
    """A power of two by which gradients of a head's scores fit into float16, 1 without ``bounds``.

    They are at most twice the largest sum of |do| of a query times the largest |v|, both in ``bounds``.
    """
    if bounds is not None:
        value = tl.load(value_note(bounds, z)).to(tl.float32, bitcast=True)
        gradient = tl.load(gradient_note(bounds, z)).to(tl.float32, bitcast=True)
        beyond = tl.ceil(tl.log2(value * gradient)) + (1 - 15)
        shrink = tl.exp2(-tl.minimum(tl.maximum(beyond, 0), 27))  # 27: what float16 can reach at head dim 256
    else:
        shrink = 1.0
    return shrink


@triton.jit
def exponential(gap2, kept):
    """exp s_ij / exp top_i of a survivor from the difference in base 2, 0 of others."""
    return tl.exp2(tl.where(kept, tl.minimum(gap2, 0), -float("inf")))


@triton.jit
def admission_weight(gap2, kept, empty):
    """c_ij of ``asa_ops.asa`` from s_ij - lse_kept_i in base 2: to first order the weight a pair has or would have."""
    below = tl.exp2(-tl.abs(gap2))
    weight = tl.where(gap2 > 0, 1, below)  # of a survivor; others get the logistic function
    return tl.where(empty, 1, tl.where(kept, weight, weight / (1 + below)))


@triton.jit
def step_derivative(z, band):
    """d(z): a triangle of half width ``band`` and area 1; 0 at infinite distance."""
    height = 1 - tl.abs(z) / band
    return tl.where(height > 0, height, 0) / band
