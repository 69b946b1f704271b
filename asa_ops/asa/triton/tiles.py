"""What the Triton kernels of adaptive sparse attention share: tiles of tokens, their products, one bit a pair.

Tokens are arranged (``arrange``): [Z * padded, WIDTH], Z = B * heads, rows in 8 x 8 spatial tiles, padded with
zeros to whole blocks, so tiles need no masks. Pairs are words[column // 32, row]: bit column % 32 of an int32.

``BY_ROWS`` and ``BY_COLUMNS`` say how a tile of pairs is read: by the words of its rows, by those of its columns (whose
bits are rows then), or by both, a pair counting if both say so. Mutual neighbours stored as such, M_ij = M_ji, are read
by rows; one-way neighbours A by rows where rows are queries and by columns where rows are keys; A_ij and A_ji by both.
"""

import triton
import triton.language as tl

# Arguments for which no kernel is compiled anew when they happen to be 1 or a multiple of 16.
SCALARS = [
    "heads", "zs", "per_image", "n", "n_keys", "dim", "dim_v", "height", "width", "topk", "reach", "splits",
    "tiles", "other_tiles", "blocks", "others", "row_blocks", "column_blocks", "key_blocks", "words_stride",
    "peaks_stride", "alpha_stride_b", "alpha_stride_h", "alpha_stride_n", "beta_stride_b", "beta_stride_h",
    "beta_stride_n",
]  # fmt: skip


@triton.jit
def operand(x, PRECISION: tl.constexpr):
    """x as a product of tiles is to have it: rounded to TF32, which tensor cores would cut off."""
    if PRECISION == "tf32":
        rounded = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        x = tl.where(tl.abs(x) < float("inf"), rounded, x)
    return x


@triton.jit
def load_tile(x, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, TMA: tl.constexpr):
    """x[row : row + ROWS, column : column + COLUMNS]; x is a pointer, or a descriptor of such blocks."""
    if TMA:
        tile = x.load([row, column])
    else:
        rows = tl.cast(row, tl.int64) + tl.arange(0, ROWS)
        tile = tl.load(x + rows[:, None] * WIDTH + (column + tl.arange(0, COLUMNS))[None, :])
    return tile


@triton.jit
def load_whole(x, row, ROWS: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, TMA: tl.constexpr):
    """Whole rows for :func:`product` to use as often as it likes; nothing if products go chunk by chunk."""
    if CHUNK == WIDTH:
        tile = load_tile(x, row, 0, ROWS, WIDTH, WIDTH, TMA)
    else:
        tile = 0
    return tile


@triton.jit
def product(
    a, a_whole, a_row, b, b_whole, b_row,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
    PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """<a_i, b_j> for ROWS rows of a and COLUMNS rows of b, float32."""
    if CHUNK == WIDTH:
        s = tl.dot(a_whole, b_whole.T, input_precision=PRECISION)
    else:
        s = tl.zeros([ROWS, COLUMNS], tl.float32)
        for c in range(0, WIDTH, CHUNK):
            x = load_tile(a, a_row, c, ROWS, CHUNK, WIDTH, TMA)
            s = tl.dot(x, load_tile(b, b_row, c, COLUMNS, CHUNK, WIDTH, TMA).T, s, input_precision=PRECISION)
    return s


@triton.jit
def some_columns(
    x, whole, row, column,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """COLUMNS columns of rows that :func:`load_whole` may have loaded already."""
    if CHUNK == WIDTH and COLUMNS == WIDTH:
        tile = whole
    else:
        tile = load_tile(x, row, column, ROWS, COLUMNS, WIDTH, TMA)
    return tile


@triton.jit
def image_of(z, heads, per_image):
    """Index of a head's image in what may be shared by all images (``per_image`` 0)."""
    return z // heads * per_image


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
    words, row, column, padded,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BY_ROWS: tl.constexpr, BY_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Which pairs of a tile are neighbours, bool [ROWS, COLUMNS]."""
    if BY_ROWS and BY_COLUMNS:
        by_columns = words_by_columns(words, row, column, padded, ROWS, COLUMNS)
        kept = words_by_rows(words, row, column, padded, ROWS, COLUMNS) & by_columns
    elif BY_ROWS:
        kept = words_by_rows(words, row, column, padded, ROWS, COLUMNS)
    else:
        kept = words_by_columns(words, row, column, padded, ROWS, COLUMNS)
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
def window_neighbour(token, offset, height, width, WINDOW: tl.constexpr):
    """The ``offset``-th token of the window around ``token`` (raster order), and whether it lies on the grid."""
    r = token // width + offset // WINDOW - WINDOW // 2
    c = token % width + offset % WINDOW - WINDOW // 2
    return r * width + c, (r >= 0) & (r < height) & (c >= 0) & (c < width)


@triton.jit
def note_largest(bounds, x):
    """Take the largest of finite numbers >= 0 into ``bounds``, as bits, which order as the numbers do."""
    tl.atomic_max(bounds, tl.max(tl.where(x < float("inf"), x, 0), 0).to(tl.int32, bitcast=True), sem="relaxed")


@triton.jit
def shrink_of(bounds, z, zs, SHRINK: tl.constexpr):
    """A power of two by which gradients of a head's scores fit into float16, 1 unless SHRINK.

    They are at most twice the largest sum of |do| of a query times the largest |v|, both in ``bounds``.
    """
    if SHRINK:
        value = tl.load(bounds + z).to(tl.float32, bitcast=True)
        gradient = tl.load(bounds + zs + z).to(tl.float32, bitcast=True)
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
