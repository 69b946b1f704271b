"""The pairs that survive at some level, at which levels they do, and their weights.

A pair of pixels i <= j is stored once, under the code i * N + j, with what is known of i keeping j ("forward") and of j
keeping i ("backward"). Mutual neighbours have the same levels both ways.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..asa import NeighborGraph
from ..core import checks

LEVELS = 8  # of each threshold: one bit of a byte for each
MAX_PAIRS = 40_000_000  # a page of some 60 MB: no browser on a phone shows it
ROWS = 512  # of scores at a time


class Levels(NamedTuple):
    """The levels of the thresholds, ascending."""

    alpha: list[float]
    beta: list[float]


class Weights(NamedTuple):
    """Logarithms of the softmax weights of pairs, in float64.

    Attributes:
        forward: [pairs], of j in row i; NaN where it is not known, which is where i keeps j at no level.
        backward: [pairs], of i in row j.
        lse: [N], the log-sum-exp of each row.
    """

    forward: Tensor
    backward: Tensor
    lse: Tensor


class Pairs:
    """Pairs and at which levels they survive.

    Attributes:
        n: how many pixels there are.
        codes: int64 [pairs], ascending.
        bits: uint8 [pairs] each, by threshold and direction: bit l is set where the pair survives at level l.
    """

    def __init__(self, n: int) -> None:
        self.n = n
        self.codes = torch.zeros(0, dtype=torch.int64)
        self.bits = {
            (threshold, way): torch.zeros(0, dtype=torch.uint8)
            for threshold in ("alpha", "beta")
            for way in ("forward", "backward")
        }

    @property
    def first(self) -> Tensor:
        """The smaller pixel of every pair."""
        return self.codes // self.n

    @property
    def second(self) -> Tensor:
        """The larger one."""
        return self.codes % self.n

    def add(self, threshold: str, level: int, graph: NeighborGraph) -> None:
        """Note who survives at a level of a threshold.

        Raises:
            ValueError: there are more than MAX_PAIRS pairs.
        """
        check_pairs(len(graph.col_indices) // 2)  # there are no fewer; before all of them are sorted
        codes, forward = self._codes(graph)
        union = torch.cat([self.codes, codes]).unique()
        check_pairs(len(union))
        if len(union) > len(self.codes):
            places = torch.searchsorted(union, self.codes)
            self.bits = {
                which: torch.zeros(len(union), dtype=torch.uint8).index_copy(0, places, bits)
                for which, bits in self.bits.items()
            }
            self.codes = union
        places = torch.searchsorted(union, codes)
        for way, chosen in (("forward", forward), ("backward", ~forward)):
            self.bits[threshold, way][places[chosen]] |= 1 << level  # a graph names no pair twice one way

    def weights_of(self, graph: NeighborGraph, logs: Tensor) -> Weights:
        """Return the weights of pairs from the logarithms of those of each column of a graph."""
        codes, forward = self._codes(graph)
        places = torch.searchsorted(self.codes, codes)
        found = []
        for chosen in (forward, ~forward):
            of_pairs = torch.full((len(self.codes),), torch.nan, dtype=torch.float64)
            of_pairs[places[chosen]] = logs[chosen].double()
            found.append(of_pairs)
        return Weights(found[0], found[1], torch.zeros(self.n, dtype=torch.float64))

    def _codes(self, graph: NeighborGraph) -> tuple[Tensor, Tensor]:
        """Return the code of each column of a graph, and whether its row is the smaller pixel or the same."""
        columns = graph.col_indices.cpu().long()
        rows = torch.arange(self.n).repeat_interleave(graph.row_offsets.cpu().diff())
        forward = rows <= columns
        return torch.where(forward, rows * self.n + columns, columns * self.n + rows), forward


def check_pairs(pairs: int) -> None:
    """Raise ValueError where a page cannot hold so many pairs."""
    if pairs > MAX_PAIRS:
        raise ValueError(
            f"{pairs:,} pairs or more survive, and a page can hold {MAX_PAIRS:,}: explore a smaller map, or raise the "
            "lowest alpha"
        )


def softmax_weights(query: Tensor, key: Tensor, pairs: Pairs, scale: float) -> Weights:
    """Return the softmax weights of pairs, given query [N, D], key [N, D] and the factor of the scores."""
    query, key = query.cpu().double() * scale, key.cpu().double()
    first, second = pairs.first, pairs.second
    lse = torch.cat([(rows @ key.mT).logsumexp(-1) for rows in query.split(ROWS)])
    found = []
    for of_row, of_column in ((first, second), (second, first)):
        logs = torch.empty(len(first), dtype=torch.float64)
        counts = [int(x.sum()) for x in of_row.bincount(minlength=pairs.n).split(ROWS)]
        chosen_of = of_row.argsort(stable=True).split(counts)
        for begin, chosen in zip(range(0, pairs.n, ROWS), chosen_of, strict=True):
            rows, columns = of_row[chosen], of_column[chosen]
            logs[chosen] = (query[begin : begin + ROWS] @ key.mT)[rows - begin, columns] - lse[rows]
        found.append(logs)
    return Weights(found[0], found[1], lse)


def check_graph(graph: NeighborGraph, n: int) -> NeighborGraph:
    """Return a graph whose row offsets and columns are those of ``n`` pixels, on the CPU.

    Raises:
        TypeError: its parts are no tensors of integers.
        ValueError: they are of no graph of ``n`` pixels.
    """
    for name, x in zip(("row_offsets", "col_indices"), graph, strict=True):
        checks.check_tensor(name, x, "[rows + 1]" if name == "row_offsets" else "[nnz]")
        if x.dtype.is_floating_point or x.dtype.is_complex or x.dtype == torch.bool:
            raise TypeError(f"{name} must hold integers, got {checks.describe(x)}")
    offsets, columns = (x.detach().cpu().long() for x in graph)
    if not n or len(offsets) != n + 1:
        raise ValueError(f"row_offsets must have N + 1 = {n + 1} numbers, one map's of N >= 1, got {len(offsets)}")
    if offsets[0] != 0 or offsets[-1] != len(columns) or (offsets.diff() < 0).any():
        raise ValueError(f"row_offsets must ascend from 0 to the number of columns, {len(columns)}")
    rows = torch.arange(n).repeat_interleave(offsets.diff())
    if ((columns < 0) | (columns >= n)).any() or ((rows * n + columns).diff() <= 0).any():
        raise ValueError(f"col_indices must ascend within each row, from 0 to at most N - 1 = {n - 1}")
    return NeighborGraph(offsets, columns)
