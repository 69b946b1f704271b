"""What asa_attention returns beside its output, and what its implementations are given and give back.

The C++ implementations are ops (``asa_ops.asa.ops``). One in Python is a module with three functions, found by
``asa_ops.core.dispatch``::

    fwd(inputs: Inputs, options: Options, saved: Saved, band: float | None) -> None
        Write into ``saved``. ``band``: half width of the window in which thresholds learn, None if they do not.
    bwd(do: Tensor, inputs: Inputs, saved: Saved, options: Options, band: float | None) -> five tensors
        Return dq, dk, dv and, unless ``band`` is None, the straight-through dalpha and dbeta, [B, heads, N_q]. A row
        whose output is NaN makes the gradients of its image and head NaN.
    neighbor_graph(inputs: Inputs, options: Options) -> NeighborGraph
        Return the survivors K.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .bits import bit_columns

ThresholdGrad = Literal["straight_through", None]
Grid = Sequence[int]  # (L,), (H, W) or (T, H, W)
Window = int | Sequence[int]  # of a local block: its side, or one for each side of the grid


class AsaStats(NamedTuple):
    """Per-row statistics, each [B, heads, N_q], detached; at padding positions -inf, -inf, 0.

    Attributes:
        lse: log-sum-exp of the scores over all real keys, in float32 (float64 for float64 inputs); NaN in a row with a
            score of +inf or NaN, which has no softmax, and where lse is not finite lse_kept is the same.
        lse_kept: the same over the survivors; -inf for a row without survivors. exp(lse_kept - lse) is the softmax
            mass that the survivors hold.
        survivors: int32, how many keys survive.
    """

    lse: Tensor
    lse_kept: Tensor
    survivors: Tensor


def log_sum_exp(s: Tensor) -> Tensor:
    """Return the log-sum-exp of each row of scores, NaN where one is +inf or NaN: such a row has no softmax."""
    lse = s.logsumexp(-1)
    return lse.masked_fill(lse == torch.inf, torch.nan)


class NeighborGraph(NamedTuple):
    """A graph in CSR form. Row r = (b * heads + h) * N_q + i holds the survivors of position i, columns ascending.

    Attributes:
        row_offsets: int64 [B * heads * N_q + 1].
        col_indices: int32 [nnz]; those of row r are ``col_indices[row_offsets[r] : row_offsets[r + 1]]``.
    """

    row_offsets: Tensor
    col_indices: Tensor

    @classmethod
    def of_rows(cls, rows: Iterable[Tensor], device: torch.device) -> "NeighborGraph":
        """Return the graph of a boolean matrix, given block of rows by block of rows."""
        counts = [torch.zeros(1, dtype=torch.int64, device=device)]
        columns = [torch.zeros(0, dtype=torch.int32, device=device)]
        for block in rows:
            counts.append(block.sum(-1))
            columns.append(block.nonzero()[:, 1].to(torch.int32))
        return cls(torch.cat(counts).cumsum(0), torch.cat(columns))


class Inputs(NamedTuple):
    """The tensors of a call, as in :func:`asa_ops.asa_attention`."""

    query: Tensor
    key: Tensor
    value: Tensor
    alpha: Tensor | None
    beta: Tensor | None
    key_padding_mask: Tensor | None

    @property
    def precision(self) -> torch.dtype:
        """The dtype in which scores are computed and statistics kept."""
        return torch.promote_types(self.query.dtype, torch.float32)


class Options(NamedTuple):
    """The other arguments of a call, resolved."""

    grid: tuple[int, int, int]  # (T, H, W), sides of 1 before those that it has; a product of 0: none
    window: tuple[int, int, int]  # its sides, odd
    extra: int  # so many tokens stand before the grid: everybody keeps them, and they keep everybody
    topk: int  # 0: none
    reciprocal: bool
    scale: float

    @classmethod
    def of(
        cls, grid: Sequence[int], window: Sequence[int], extra: int, topk: int, reciprocal: bool, scale: float
    ) -> "Options":
        """Return the options from the arguments of an op; csrc/asa.h does the same."""
        if len(grid) > 3 or (grid and len(window) != len(grid)):
            raise RuntimeError(f"asa_attention: a window has a side for each of the grid, got {grid=} and {window=}")
        if not grid:
            return cls((0, 0, 0), (1, 1, 1), extra, topk, reciprocal, scale)
        first = [1] * (3 - len(grid))
        # A window wider than the grid is the grid. Not the builtins: they would have torch.compile ask which is larger.
        sides = [torch.sym_min(x, torch.sym_max(2 * side - 1, 1)) for x, side in zip(window, grid, strict=True)]
        of_grid, of_window = [*first, *grid], [*first, *sides]
        whole_grid, whole_window = ((x[0], x[1], x[2]) for x in (of_grid, of_window))
        return cls(whole_grid, whole_window, extra, topk, reciprocal, scale)

    @property
    def positions(self) -> int:
        """How many positions a window has."""
        return math.prod(self.window)


def places_of(token: Tensor, grid: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return where tokens, in raster order, stand along each side of a grid."""
    _, height, width = (max(side, 1) for side in grid)
    return token // width // height, token // width % height, token % width


# A smaller alpha or beta keeps everybody whatever it is, and has gradient 0 as 0 has: sums over it would overflow.
LEAST_MULTIPLIER = 2.0**-100
PADDED_TO = {"triton": 128, "cuda": 64}  # these pad the tokens of a head to a multiple


def bits_shape(impl: str, n_q: int, n_k: int, one_way: bool = False, peaks: bool = False) -> tuple[int, int]:
    """Return the shape of the bits of one head, in bytes.

    "blocked": the bits of a row in order, lowest first. "cpu": blocks of 64 x 64 pairs, 8 bytes a query. "triton": for
    64 keys and every query, both in arranged order, 64 bits and a float16 that bounds their scores. "cuda": the pieces
    of ``KeptBits`` in csrc/cuda/asa/arguments.h, ``one_way`` bits and ``peaks`` among them where thresholds learn.
    """
    if impl == "blocked":
        return n_q, bit_columns(n_k)
    if impl == "cpu":
        return -(-n_q // 64), -(-n_k // 64) * 64 * 8
    pad = PADDED_TO[impl]
    rows, keys = -(-n_q // pad) * pad, -(-n_k // pad) * pad
    if impl == "triton":
        return keys // 64, rows * (8 + 2)
    by_rows, by_columns = (x // 64 * -(-y // 2048) * 4 for x, y in ((rows, keys), (keys, rows)))
    pairs = keys * rows // 8
    more = pairs + by_rows if one_way else 0
    return 1, pairs + by_rows + by_columns + more + (keys // 64 * rows * 2 if peaks else 0)


class Saved(NamedTuple):
    """What a forward pass writes, the first dimensions [B, heads]."""

    out: Tensor  # [.., N_q, Dv]
    lse: Tensor  # [.., N_q]
    lse_kept: Tensor  # [.., N_q]
    survivors: Tensor  # int32 [.., N_q]
    kept: Tensor  # uint8 [.., bytes] for the backward; the pieces that follow are views of it
    bits: Tensor  # uint8 [.., *bits_shape] adaptive neighbours A, one bit a pair; last dimension 0: not kept
    kappa: (
        Tensor  # [.., N_q] k-th largest score, in base 2 if impl is "triton" or "cuda"; last dimension 0 without topk
    )
    log_mean: Tensor  # [.., N_q] log mean exp of the scores in the window, as kappa in base 2; 0 without beta
    local: Tensor  # bool [.., N_q, positions of the window] local survivors L; last dimension 0 without beta
    # What an implementation keeps for its backward beside these; last dimension 0 where it does not.
    residual: Tensor  # [.., N_q, Dv] what rounding took from out
    base2: Tensor  # [.., 3, N_q] in base 2: lse, the largest score of a survivor, the sum of exponentials below it

    @classmethod
    def new(
        cls, inputs: Inputs, options: Options, impl: str, keep: bool, band: float = 0.0, pairs: bool = True
    ) -> "Saved":
        """Allocate what a forward pass of ``impl`` writes; without ``keep`` only what it needs itself.

        Without ``pairs`` there are no bits, which a part of the rows keeps elsewhere.
        """
        outputs = new_outputs(inputs, kept_bytes(inputs, options, impl, keep, band, pairs))
        return cls.of(inputs, options, impl, keep, *outputs, band=band, pairs=pairs)

    @classmethod
    def of(
        cls,
        inputs: Inputs,
        options: Options,
        impl: str,
        keep: bool,
        *outputs: Tensor,
        band: float = 0.0,
        pairs: bool = True,
    ) -> "Saved":
        """Return the outputs of a forward pass, and what it kept piece by piece."""
        kept, begin, views = outputs[4], 0, []
        for shape, dtype in _pieces(inputs, options, impl, keep, band, pairs):
            end = begin + math.prod(shape) * dtype.itemsize
            # Without numbers there are no strides that another dtype could have.
            piece = kept[..., begin:end].view(dtype) if end > begin else kept.new_empty(0, dtype=dtype)
            views.append(piece.view(*kept.shape[:2], *shape))
            begin = _aligned(end)
        return cls(*outputs, *views)


def _aligned(size: int) -> int:
    return -(-size // 128) * 128


def _pieces(
    inputs: Inputs, options: Options, impl: str, keep: bool, band: float = 0.0, pairs: bool = True
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Return shape and dtype of the fields of Saved after ``kept``, for one head; ``Kept`` of csrc/asa.h in bytes."""
    (n_q, dim_v), n_k = (inputs.query.shape[2], inputs.value.shape[3]), inputs.key.shape[2]
    statistics, halves = inputs.precision, inputs.query.dtype.itemsize == 2
    learns = band > 0 and inputs.alpha is not None
    strips, columns = bits_shape(impl, n_q, n_k, learns and options.reciprocal, learns)
    neighbours = keep and pairs and (inputs.alpha is not None or options.topk > 0)
    more = keep and impl in PADDED_TO
    return [
        ((strips, columns if neighbours else 0), torch.uint8),
        ((n_q if options.topk else 0,), statistics),
        ((0 if inputs.beta is None else n_q,), statistics),
        ((n_q, 0 if inputs.beta is None else options.positions), torch.bool),
        ((n_q, dim_v if more and halves else 0), inputs.query.dtype),
        ((3, n_q if more else 0), statistics),
    ]


def kept_bytes(
    inputs: Inputs, options: Options, impl: str, keep: bool = True, band: float = 0.0, pairs: bool = True
) -> int:
    """Return how many bytes a forward pass of ``impl`` keeps of one head; an expression of symbolic sizes."""
    pieces = _pieces(inputs, options, impl, keep, band, pairs)
    size = sum(_aligned(math.prod(shape) * dtype.itemsize) for shape, dtype in pieces)
    # More says that bits are A, not M, and has a backward refuse those that a forward with another band kept.
    one_way = keep and band > 0 and impl == "triton" and options.reciprocal and inputs.alpha is not None
    return size + 128 if one_way else size


def new_outputs(inputs: Inputs, kept: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Allocate what the op of a forward pass returns, ``kept`` bytes of a head among it."""
    query, (*rows, dim_v) = inputs.query, (*inputs.query.shape[:3], inputs.value.shape[3])
    lse, lse_kept = (query.new_empty(rows, dtype=inputs.precision) for _ in range(2))
    survivors = query.new_empty(rows, dtype=torch.int32)
    return query.new_empty(*rows, dim_v), lse, lse_kept, survivors, query.new_empty(*rows[:2], kept, dtype=torch.uint8)


def prepare_outputs(inputs: Inputs, saved: Saved) -> bool:
    """Write what is known without kernels; return whether there is anything left for them."""
    if not inputs.key.shape[2]:  # nobody to attend to
        for x, value in zip(saved[:4], (0, -torch.inf, -torch.inf, 0), strict=True):
            x.fill_(value)
    return saved.lse.numel() > 0 and inputs.key.shape[2] > 0


def new_gradients(
    inputs: Inputs, saved: Saved, band: float | None
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor | None, Tensor | None], bool]:
    """Return room for dq, dk, dv, for dalpha and dbeta where they are asked for, and whether kernels have to run."""
    wanted = saved.lse.numel() > 0 and inputs.key.shape[2] > 0
    new = torch.empty if wanted else torch.zeros
    dq, dk, dv = (new(x.shape, dtype=x.dtype, device=x.device) for x in inputs[:3])
    learns = [x is not None and band is not None for x in (inputs.alpha, inputs.beta)]
    dalpha, dbeta = (new(saved.lse.shape, dtype=torch.float32, device=saved.lse.device) if x else None for x in learns)
    return (dq, dk, dv), (dalpha, dbeta), wanted


def new_graph(survivors: Tensor) -> NeighborGraph:
    """Return a graph with room for so many survivors in each row; only its offsets are written."""
    row_offsets = torch.nn.functional.pad(survivors.flatten().to(torch.int64).cumsum(0), (1, 0))
    return NeighborGraph(row_offsets, row_offsets.new_empty(int(row_offsets[-1]), dtype=torch.int32))
