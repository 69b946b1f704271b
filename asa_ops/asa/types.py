"""What asa_attention returns beside its output, and what its implementations are given and give back."""

from typing import NamedTuple

import torch
from torch import Tensor


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
    rest: Tensor  # [.., N_q, Dv] what rounding took from out
    base2: Tensor  # [.., 3, N_q] in base 2: lse, the largest score of a survivor, the sum of exponentials below it

    @classmethod
    def new(
        cls, inputs: Inputs, options: Options, bits_shape: tuple[int, int], keep_bits: bool, keep_more: bool = False
    ) -> "Saved":
        """Allocate what a forward pass writes; ``bits_shape`` is the implementation's, for one head."""
        query, value = inputs.query, inputs.value
        rows = query.shape[:3]
        strips, columns = bits_shape
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
            rest=query.new_empty(*rows, value.shape[3] if keep_more and query.dtype != inputs.precision else 0),
            base2=query.new_empty(*rows[:2], 3, rows[2] if keep_more else 0, dtype=inputs.precision),
        )
