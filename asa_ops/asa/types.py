"""What asa_attention returns beside its output, and what its implementations are given and give back.

An implementation is a module with three functions, found by ``asa_ops.core.dispatch``::

    fwd(inputs: Inputs, options: Options, saved: Saved, band: float | None) -> None
        Write into ``saved``. ``band``: half width of the window in which thresholds learn, None if they do not.
    bwd(do: Tensor, inputs: Inputs, saved: Saved, options: Options, band: float | None) -> five tensors
        Return dq, dk, dv and, unless ``band`` is None, the straight-through dalpha and dbeta, [B, heads, N_q]. A row
        whose output is NaN makes the gradients of its image and head NaN.
    neighbor_graph(inputs: Inputs, options: Options) -> NeighborGraph
        Return the survivors K.
"""

from collections.abc import Iterable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .bits import bit_columns

ThresholdGrad = Literal["straight_through", None]


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

    grid: tuple[int, int]  # (0, 0): none
    window: int
    topk: int  # 0: none
    reciprocal: bool
    scale: float

    def numbers(self, band: float | None = None) -> list[float]:
        """Return them, and the half width of the window in which thresholds learn, as ``Options`` of csrc/asa.h."""
        return [*map(float, (*self.grid, self.window, self.topk, self.reciprocal, self.scale, band or 0))]


PADDED_TO = {"triton": 128, "cuda": 64}  # these pad the tokens of a head to a multiple


def bits_shape(impl: str, n_q: int, n_k: int) -> tuple[int, int]:
    """Return the shape of the neighbour bits of one head, in bytes.

    "blocked": the bits of a row in order, lowest first. "cpu": blocks of 64 x 64 pairs, 8 bytes a query. "triton" and
    "cuda": for 64 keys and every query, both in arranged order, 64 bits and a float16 that bounds their scores.
    """
    if impl == "blocked":
        return n_q, bit_columns(n_k)
    if impl == "cpu":
        return -(-n_q // 64), -(-n_k // 64) * 64 * 8
    pad = PADDED_TO[impl]
    return -(-n_k // pad) * pad // 64, -(-n_q // pad) * pad * (8 + 2)


class Saved(NamedTuple):
    """What a forward pass writes, the first dimensions [B, heads]."""

    out: Tensor  # [.., N_q, Dv]
    lse: Tensor  # [.., N_q]
    lse_kept: Tensor  # [.., N_q]
    survivors: Tensor  # int32 [.., N_q]
    kappa: Tensor  # [.., N_q] k-th largest score, in base 2 if impl is "triton" or "cuda"; -inf without topk
    log_mean: Tensor  # [.., N_q] log mean exp of the scores in the window, as kappa in base 2; -inf without beta
    bits: Tensor  # uint8 [.., *bits_shape] adaptive neighbours A, one bit a pair; last dimension 0: not kept
    local: Tensor  # bool [.., N_q, window**2] local survivors L; last dimension 0 without beta
    # What an implementation keeps for its backward beside these; last dimension 0 where it does not.
    residual: Tensor  # [.., N_q, Dv] what rounding took from out
    base2: Tensor  # [.., 3, N_q] in base 2: lse, the largest score of a survivor, the sum of exponentials below it

    @classmethod
    def new(cls, inputs: Inputs, options: Options, impl: str, keep_bits: bool) -> "Saved":
        """Allocate what a forward pass of ``impl`` writes; a backward pass needs ``keep_bits``."""
        query, value = inputs.query, inputs.value
        rows = query.shape[:3]
        strips, columns = bits_shape(impl, query.shape[2], inputs.key.shape[2])
        keep_more = keep_bits and impl in PADDED_TO
        keep_bits = keep_bits and (inputs.alpha is not None or options.topk > 0)
        window = 0 if inputs.beta is None else options.window**2
        return cls(
            out=query.new_empty(*rows, value.shape[3]),
            lse=query.new_empty(rows, dtype=inputs.precision),
            lse_kept=query.new_empty(rows, dtype=inputs.precision),
            survivors=query.new_empty(rows, dtype=torch.int32),
            kappa=query.new_full(rows, -torch.inf, dtype=inputs.precision),
            log_mean=query.new_full(rows, -torch.inf, dtype=inputs.precision),
            bits=query.new_empty(*rows[:2], strips, columns if keep_bits else 0, dtype=torch.uint8),
            local=query.new_empty(*rows, window, dtype=torch.bool),
            residual=query.new_empty(*rows, value.shape[3] if keep_more and query.dtype != inputs.precision else 0),
            base2=query.new_empty(*rows[:2], 3, rows[2] if keep_more else 0, dtype=inputs.precision),
        )


def prepare_outputs(inputs: Inputs, saved: Saved) -> bool:
    """Write what the GPU kernels leave alone, padding; return whether there is anything left for them."""
    empty = (0, -torch.inf, -torch.inf, 0)
    rows, keys = inputs.query.shape[2], inputs.key.shape[2]
    if not keys:  # nobody to attend to
        for x, value in zip(saved[:4], empty, strict=True):
            x.fill_(value)
    elif inputs.key_padding_mask is not None and rows == keys:  # rows that are padding
        for x, value in zip((*saved[:4], saved.local, saved.residual, saved.base2), (*empty, False, 0, 0), strict=True):
            x.fill_(value)
    return saved.lse.numel() > 0 and keys > 0


def new_gradients(
    inputs: Inputs, saved: Saved, band: float | None
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor | None, Tensor | None], bool]:
    """Return room for dq, dk, dv, for dalpha and dbeta where they are asked for, and whether kernels have to run."""
    wanted = saved.lse.numel() > 0 and inputs.key.shape[2] > 0
    new = torch.empty if wanted and inputs.key_padding_mask is None else torch.zeros
    dq, dk, dv = (new(x.shape, dtype=x.dtype, device=x.device) for x in inputs[:3])
    learns = [x is not None and band is not None for x in (inputs.alpha, inputs.beta)]
    dalpha, dbeta = (new(saved.lse.shape, dtype=torch.float32, device=saved.lse.device) if x else None for x in learns)
    return (dq, dk, dv), (dalpha, dbeta), wanted


def new_graph(saved: Saved) -> NeighborGraph:
    """Return a graph with room for the survivors; only its offsets are written."""
    row_offsets = torch.nn.functional.pad(saved.survivors.flatten().to(torch.int64).cumsum(0), (1, 0))
    return NeighborGraph(row_offsets, row_offsets.new_empty(int(row_offsets[-1]), dtype=torch.int32))
