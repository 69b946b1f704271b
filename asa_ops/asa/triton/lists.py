"""Which blocks of the other side a block of rows or of keys visits: those with a tile that holds a bit."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core import triton_launch
from .problem import Problem, Tokens
from .tiles import OF_KEYS, SCALARS


@triton.jit
def note_occupied(bits, occupied, z, p, block, first, padded, key_blocks, BLOCK_J: tl.constexpr):
    """Flag which of BLOCK_J tiles of 64 x 64 pairs hold a bit; ``block``: that of the rows p, of all heads."""
    c = 2 * first + tl.arange(0, 2 * BLOCK_J)
    word = tl.load(bits.words + z * bits.stride + tl.cast(c, tl.int64)[None, :] * padded + p[:, None],
                   mask=(c < 2 * key_blocks)[None, :], other=0)  # fmt: skip
    holds = tl.max(tl.reshape(tl.max((word != 0).to(tl.int32), 0), [BLOCK_J, 2]), 1)
    j = first + tl.arange(0, BLOCK_J)
    tl.store(occupied + tl.cast(block, tl.int64) * key_blocks + j, holds.to(tl.int8), mask=j < key_blocks)


@triton.jit
def _list(cut, padded, key_padded, n_heads, BLOCK_J: tl.constexpr):
    """For every block of ROWS rows the blocks of COLUMNS columns that hold an active tile, ascending.

    A tile (I, J) of 64 x 64 is active if by_rows[I, J] and by_columns[J, I] say so, each if asked for. Rows are keys
    and columns queries if OF_KEYS.
    """
    if cut.OF_KEYS:
        own, other = key_padded, padded
    else:
        own, other = padded, key_padded
    blocks, others = own // cut.ROWS, other // cut.COLUMNS
    if tl.program_id(0) < n_heads * blocks:
        z = tl.cast(tl.program_id(0) // blocks, tl.int64)
        block = tl.program_id(0) % blocks
        offset = z * (own // 64) * (other // 64)
        SUB_I: tl.constexpr = cut.ROWS // 64
        SUB_J: tl.constexpr = cut.COLUMNS // 64
        length = 0
        for start in range(0, others, BLOCK_J):
            j = start + tl.arange(0, BLOCK_J)
            there = j < others
            active = tl.zeros([BLOCK_J], tl.int32)
            for a in tl.static_range(SUB_I):
                for b in tl.static_range(SUB_J):
                    i, jj = block * SUB_I + a, j * SUB_J + b
                    flag = there.to(tl.int32)
                    if cut.by_rows is not None:
                        at = offset + i * (other // 64) + jj
                        flag &= tl.load(cut.by_rows + at, mask=there, other=0).to(tl.int32)
                    if cut.by_columns is not None:
                        at = offset + jj * (own // 64) + i
                        flag &= tl.load(cut.by_columns + at, mask=there, other=0).to(tl.int32)
                    active |= flag
            slot = length + tl.cumsum(active, 0) - 1
            number = j.to(cut.lists.dtype.element_ty)
            tl.store(cut.lists + (z * blocks + block) * others + slot, number, mask=active != 0)
            length += tl.sum(active, 0)
        tl.store(cut.lengths + z * blocks + block, length)


@triton.jit(do_not_specialize=SCALARS)
def _asa_lists_kernel(first, second, third, fourth, padded, key_padded, n_heads, BLOCK_J: tl.constexpr):
    """Up to four lists of blocks, axis 1 of the grid."""
    if tl.program_id(1) == 0:
        _list(first, padded, key_padded, n_heads, BLOCK_J)
    elif tl.program_id(1) == 1:
        if second is not None:
            _list(second, padded, key_padded, n_heads, BLOCK_J)
    elif tl.program_id(1) == 2:
        if third is not None:
            _list(third, padded, key_padded, n_heads, BLOCK_J)
    elif fourth is not None:
        _list(fourth, padded, key_padded, n_heads, BLOCK_J)


class Lists(NamedTuple):
    """For every block of rows, or of keys, the blocks of the other side to visit."""

    lists: Tensor  # [n_heads, blocks, others], ascending
    lengths: Tensor  # int32 [n_heads, blocks]


class ListCut(NamedTuple):
    """A list to be made, how it is cut and what from."""

    lists: Tensor
    lengths: Tensor
    by_rows: Tensor | None
    by_columns: Tensor | None
    ROWS: tl.constexpr
    COLUMNS: tl.constexpr
    OF_KEYS: tl.constexpr


class Listing:
    """The blocks that ``kernels``, rows of the table, visit; listed at once, and once for all that visit the same.

    Blocks of rows visit the tiles (I, J) of 64 x 64 pairs that are ``occupied``, those of keys the tiles (J, I); both
    must be where neighbours must be mutual. "dt" visits tiles that reach thresholds instead, by the flags ``reached``.
    Of a part of the rows: ``back`` has the tiles (J, I) of all rows J and its own keys I.
    """

    def __init__(
        self,
        problem: Problem,
        tokens: Tokens,
        occupied: Tensor,
        kernels: tuple[str, ...],
        reached: Tensor | None = None,
        back: Tensor | None = None,
    ):
        self.problem, self.tokens, self.occupied, self.reached = problem, tokens, occupied, reached
        self.back = occupied if back is None else back
        self.cuts: dict[tuple[bool, bool, int, int], ListCut] = {}
        for name in kernels:
            key = self._key(name)
            if key not in self.cuts:
                self.cuts[key] = self._cut(*key)
        cuts = list(self.cuts.values())
        programs = max(cut.lengths.numel() for cut in cuts)
        triton_launch.launch(
            _asa_lists_kernel, (programs, len(cuts)), *cuts, *[None] * (4 - len(cuts)), tokens.rows.padded,
            tokens.keys.padded, problem.n_heads, BLOCK_J=128,
        )  # fmt: skip

    def of(self, name: str) -> Lists:
        cut = self.cuts[self._key(name)]
        return Lists(cut.lists, cut.lengths)

    def _key(self, name: str) -> tuple[bool, bool, int, int]:
        config = self.problem.config(name)
        of_keys = name in OF_KEYS and not self.problem.mutual  # if mutual, rows and keys have one list
        return name == "dt", of_keys, config.block_m, max(config.block_n, 64)

    def _cut(self, by_thresholds: bool, of_keys: bool, own_size: int, other_size: int) -> ListCut:
        problem, own, other = self.problem, self.tokens.rows, self.tokens.keys
        if of_keys:
            own, other = other, own
        by_rows = None if of_keys else self.reached if by_thresholds else self.occupied
        by_columns = self.back if of_keys or problem.mutual else None
        blocks, others = own.padded // own_size, other.padded // other_size
        # Up to three lists are there at once: numbers as short as they may be.
        number = torch.int16 if others <= 2**15 else torch.int32
        lists = problem.new(problem.n_heads, blocks, others, dtype=number)
        lengths = problem.new(problem.n_heads, blocks, dtype=torch.int32)
        return ListCut(lists, lengths, by_rows, by_columns, *map(tl.constexpr, (own_size, other_size, of_keys)))
