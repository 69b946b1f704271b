"""Some rows of a map: what an implementation by tiles computes of them, stage by stage, for one map over processes.

``asa_ops.distributed.tiles`` calls it and makes the exchanges between the stages. Every process has all tokens. The
order of tokens in which an implementation cuts the map into blocks is known everywhere; "positions" are places in it,
"raster" are the numbers of tokens. A range of rows and one of keys are a process's own, whole blocks of positions; they
are equal where there are as many queries as keys.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .types import Inputs, Options

TILE = 64  # positions of a side of the tiles that are flagged
Range = tuple[int, int]  # first and last + 1


class Scan(NamedTuple):
    """What is known of rows before pairs are decided; n_heads is B * heads."""

    numbers: Tensor  # float32 [n_heads, rows, any], thresholds among them: all that is to be known of a row, by anybody
    flags: Tensor  # uint8 [n_heads, row tiles, key tiles] whether a tile reaches a threshold of its rows
    peaks: Tensor | None  # [n_heads, any, rows] what a backward asks for, of own rows only


class Outputs(NamedTuple):
    """What a forward writes, raster, of the whole map: of own rows, padding among them; the others hold anything."""

    out: Tensor  # [B, heads, N_q, Dv]
    lse: Tensor  # [B, heads, N_q]
    lse_kept: Tensor
    survivors: Tensor  # int32


class Gradients(NamedTuple):
    """What a backward writes, in the same way; dk and dv of own keys. None of thresholds that do not learn."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dalpha: Tensor | None  # float32 [B, heads, N_q]
    dbeta: Tensor | None


class Part(Protocol):
    """A pass over own rows. What a forward leaves for a backward goes through ``kept``.

    Args:
        inputs: of the whole map, key and value of all heads, thresholds [B, heads, N_q].
        band: half width of the window in which thresholds learn, 0 if they do not.
        keep: whether a backward may follow.
    """

    block: int  # ranges begin and end at its multiples
    row_order: Tensor  # int32 [1 or B, rows, a multiple of block] token at a position; -2 - token of padding; -1: none
    key_order: Tensor  # the same of keys

    @staticmethod
    def can_run(inputs: Inputs, n_q: int, n_k: int, scale: float) -> bool:
        """Return whether what runs such a call can compute some of its rows; ``inputs``: of some of the tokens."""

    def __init__(self, inputs: Inputs, options: Options, band: float, keep: bool) -> None: ...

    def scan(self, rows: Range) -> Scan | None:
        """Return what is known of own rows; None where no threshold decides about tiles."""

    def attend(self, rows: Range, keys: Range, scan: Scan | None) -> tuple[Outputs, list[Tensor | None]]:
        """Return the outputs of own rows, and what a backward needs.

        ``scan`` has the numbers and flags of all rows. Rows may be others than those scanned, unless it is None.
        """

    def list_survivors(self, rows: Range, row_offsets: Tensor, col_indices: Tensor) -> None:
        """Fill in a graph of the whole map, raster, in which only own rows have neighbours; after :meth:`attend`."""

    def begin_backward(
        self, rows: Range, keys: Range, d_out: Tensor, outputs: Outputs, kept: Sequence[Tensor | None]
    ) -> tuple[list[Tensor], Tensor]:
        """Return what all must know of own rows, [n_heads, rows, any] each, and numbers whose maxima they must know.

        ``d_out`` is raster, of own rows.
        """

    def end_backward(self, rows: Range, keys: Range, of_rows: Sequence[Tensor], largest: Tensor) -> Gradients:
        """Return gradients from what :meth:`begin_backward` returned: of all rows, and the maxima over processes."""


def tokens_at(order: Tensor, rows: Range, n: int) -> Tensor:
    """Return the tokens at positions of an order of n tokens, padding among them: [images, positions that hold one]."""
    tokens = order[:, rows[0] : min(rows[1], n)].long()
    return torch.where(tokens < 0, -2 - tokens, tokens)


def take(x: Tensor, tokens: Tensor, length: int) -> Tensor:
    """Return numbers of a raster [n_heads, n, ..] in order, [n_heads, length, ..], those at no token 0."""
    taken = x.new_zeros(len(x), length, *x.shape[2:])
    heads = len(x) // len(tokens)
    for image, of_image in enumerate(tokens):
        of_heads = slice(image * heads, (image + 1) * heads)
        taken[of_heads, : len(of_image)] = x[of_heads].index_select(1, of_image)
    return taken


def put(x: Tensor, tokens: Tensor, raster: Tensor) -> None:
    """Write numbers in order, [n_heads, length, ..], to a raster [n_heads, n, ..]."""
    heads = len(x) // len(tokens)
    for image, of_image in enumerate(tokens):
        of_heads = slice(image * heads, (image + 1) * heads)
        raster[of_heads].index_copy_(1, of_image, x[of_heads, : len(of_image)])
