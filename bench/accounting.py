"""What a call has to compute: survivors, tiles that hold them, operations (a multiplication and an addition are two).

One unit is a product of all queries with all keys, 2 N^2 D operations per image and head. Dense attention takes 2 units
forward (4 N^2 D) and 5 backward (10 N^2 D).
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from asa_ops import NeighborGraph, reciprocal_neighbors
from asa_ops.asa.blocked import window_columns
from asa_ops.asa.types import Options

from .peers import DENSE
from .record import Case

BLOCK = 64  # side of a tile of pairs: 8 x 8 pixels, or 4 x 4 x 4
STRIP = 8  # rows that impl="cpu" takes together
BEGUN = (15 / 16) ** 2  # density from which it multiplies whole strips while it scans them, about: it counts neighbours
PARTLY_BEGUN = 0.25  # and from which it does so with the keys of blocks scanned before, but for a sixteenth of all
KEPT = 2048  # tokens up to which it keeps the scores of float32
CHUNK = 2**24  # pairs looked at at a time


class Sparsity(NamedTuple):
    """Who survives, as fractions of all pairs (means over images and heads)."""

    survivors: float  # per row, a number of positions
    density: float  # pairs that survive
    active: float  # pairs in tiles of 64 x 64, in the order of tiles, with a survivor
    # Pairs in tiles that hold a neighbour of a row and, the other way round, of a column, or touch the window: what can
    # be known of a tile before its pairs are compared.
    plausible: float
    candidates: float  # pairs (block of 64 rows, column) where the column has a neighbour among the rows
    strips: float  # pairs that impl="cpu" visits: survivors, or all pairs of 8 rows with more than a quarter surviving


def tile_order(grid: tuple[int, ...]) -> Tensor:
    """Return the tokens of a grid [N] in the order of tiles of 64, 8 x 8 or 4 x 4 x 4, smaller at the borders."""
    while len(grid) > 1 and grid[0] == 1:  # a volume of one slice is a map
        grid = grid[1:]
    side = round(BLOCK ** (1 / len(grid)))
    tiles = [torch.arange(math.prod(grid)).view(grid)]
    for axis in range(len(grid)):
        tiles = [part for tile in tiles for part in tile.split(side, axis)]
    return torch.cat([tile.reshape(-1) for tile in tiles])


def sparsity(tensors: list[Tensor], grid: tuple[int, ...], window: int = 3) -> Sparsity:
    """Count who survives of query, key, value [B, heads, N, D] above alpha, beta [B, heads, N] on a grid."""
    query, key, _, alpha, beta = tensors
    given = {"grid": grid, "window": window}
    n, heads, device = query.shape[2], query.shape[0] * query.shape[1], query.device
    blocks = -(-n // BLOCK)
    block = torch.empty(n, dtype=torch.int64, device=device)  # of a token, in the order of tiles
    block[tile_order(grid).to(device)] = torch.arange(n, device=device) // BLOCK
    active, seen, local = (torch.zeros(heads, blocks, blocks, dtype=torch.bool, device=device) for _ in range(3))
    chosen = torch.zeros(heads, n, blocks, dtype=torch.bool, device=device)
    graph = reciprocal_neighbors(query, key, alpha, beta, **given)
    for head, row, column in _pairs(graph, n):
        active[head, block[row], block[column]] = True
    counts = graph.row_offsets.diff().view(heads, n).double()
    # No local survivors above infinite thresholds: the neighbours A_ij.
    graph = reciprocal_neighbors(query, key, alpha, torch.full_like(beta, torch.inf), reciprocal=False, **given)
    for head, row, column in _pairs(graph, n):
        seen[head, block[row], block[column]] = True
        chosen[head, row, block[column]] = True
    options = Options.of(grid, [window] * len(grid), 0, 0, True, 1.0)
    columns, inside = window_columns(options, slice(0, n), device)
    row, offset = inside.nonzero(as_tuple=True)
    local[:, block[row], block[columns[row, offset]]] = True
    sizes = block.bincount(minlength=blocks).double()

    def fraction(tiles: Tensor) -> float:
        return (sizes @ tiles.double() @ sizes).mean().item() / n**2

    return Sparsity(
        survivors=counts.mean().item(),
        density=counts.sum().item() / heads / n**2,
        active=fraction(active),
        plausible=fraction((seen & seen.mT) | local),
        candidates=chosen.double().mean().item(),
        strips=sum(strips(x, n) for x in counts.cpu()) / heads / n**2,
    )


def _pairs(graph: NeighborGraph, n: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield the head, row and column of the pairs of a graph, some at a time."""
    for start in range(0, len(graph.col_indices), CHUNK):
        column = graph.col_indices[start : start + CHUNK].long()
        place = torch.arange(start, start + len(column), device=column.device)
        row = torch.searchsorted(graph.row_offsets, place, right=True) - 1
        yield row // n, row % n, column


def strips(counts: Tensor, n: int) -> float:
    """Return how many pairs impl="cpu" visits, from the survivors of every row [N]."""
    sums = [(len(strip), strip.sum().item()) for strip in counts.split(STRIP)]
    return sum(rows * n if 4 * kept > STRIP * n else kept for rows, kept in sums)


def units(
    impl: str, backward: bool, sparsity: Sparsity, tokens: float = math.inf, dim: int = 64, half: bool = False
) -> float:
    """Return the units that an implementation computes in a call, with its backward or without.

    As ``asa_ops/asa/__init__.py`` states them, for reciprocal attention where query is not key.
    """
    if impl == "cpu":
        again = 0.0 if tokens <= KEPT or sparsity.density >= BEGUN else 1.0  # of the visited pairs forms a second score
        if again and sparsity.density >= PARTLY_BEGUN:
            again -= (15 / 16) ** 2 / 2
        return 1 + (1 + again + 5 * backward) * sparsity.strips
    if impl in ("triton", "cuda", "hopper"):
        dkv = impl == "hopper" or (impl == "triton" and dim <= 128)  # in one kernel, which forms scores once
        of_backward = 10 if not half else 7 if dkv else 8
        return 1 + sparsity.plausible + (2 + of_backward * backward) * sparsity.active
    return (3 if impl == "blocked" else 2) + 5 * backward  # 2: dense, the reference and the peers


def operations_of(case: Case, method: str) -> float | None:
    """Return the operations that a method computes in a timed case; None where they are not known.

    Of ASA and dense attention what they visit of all pairs (:func:`units`), else what FlopCounterMode counted.
    """
    impl = method.removeprefix("asa ") if method.startswith("asa ") else "dense" if method in DENSE else None
    if impl == "learning":
        return None  # of how many pairs either is a neighbour of the other is not known
    if impl is None or set(case.sparsity) != set(Sparsity._fields):
        return case.methods[method].flops
    half = case.dtype != "float32"
    number = units(impl, case.mode == "fwd+bwd", Sparsity(**case.sparsity), case.tokens, case.dim, half)
    return number * operations_of_a_unit(case)


def operations_of_a_unit(case: Case) -> int:
    """Return the floating point operations of a unit, of all heads of all images together."""
    return 2 * case.tokens**2 * case.dim * case.heads * case.batch


def kernel_operations(kernel: str, pairs: int, dim: int, dim_v: int, mutual: bool = True, symmetric: bool = False):
    """Return the operations of a Triton kernel on tiles that hold ``pairs`` pairs, from its products per pair.

    ``dim`` and ``dim_v`` are what is multiplied, padding included.
    """
    products = {
        "statistics": dim,
        "mask": dim * (2 if mutual and not symmetric else 1),
        "aggregate": dim + dim_v,  # scores, p v
        "dq": 2 * dim + dim_v,  # scores, do v, ds k
        "dk": 2 * dim + dim_v,
        "dv": dim + dim_v,  # scores, p do
        "dk_dv": 3 * dim + 2 * dim_v,
        "dkv": 2 * dim + 2 * dim_v,
        "dt": (dim + dim_v) * (2 if mutual else 1),
    }
    return 2 * pairs * products[kernel]


def traffic(case: Case) -> int:
    """Return the bytes that a call must move at least: inputs, outputs and gradients, each read or written once."""
    tensors = 8 if case.mode == "fwd+bwd" else 4
    return tensors * case.tokens * case.dim * case.heads * case.batch * case.torch_dtype.itemsize


def registered_flops(call: Callable) -> int:
    """Return what FlopCounterMode counts in a call, by the formulas that operators are registered with."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()
