"""What a call has to compute: survivors, tiles that hold them, operations.

One unit is a product of all queries with all keys, 2 N^2 D operations per image and head. Dense attention takes 2 units
forward (4 N^2 D) and 5 backward (10 N^2 D).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from peers import DENSE
from record import Case
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from asa_ops import asa_attention
from asa_ops.asa.blocked import window_columns

BLOCK = 64  # side of a tile of pairs, and 8 x 8 pixels
STRIP = 8  # rows that impl="cpu" takes together
CHUNK = 2**25  # pairs held at a time


class Sparsity(NamedTuple):
    """Who survives, as fractions of all pairs (means over images and heads).

    Attributes:
        survivors: per row, a number of positions.
        density: pairs that survive.
        active: pairs in tiles of 64 x 64, in 8 x 8 order, with a survivor.
        plausible: pairs in tiles that hold a neighbour of a row and, the other way round, of a column, or touch the
            window: what can be known of a tile before its pairs are compared.
        candidates: pairs (block of 64 rows, column) where the column has a neighbour among the rows.
        strips: pairs that impl="cpu" visits: survivors, or all pairs of 8 rows of which more than a quarter survive.
    """

    survivors: float
    density: float
    active: float
    plausible: float
    candidates: float
    strips: float


def tile_order(grid: tuple[int, int]) -> Tensor:
    """Return the tokens of a grid [N] in the order of 8 x 8 tiles, smaller at the borders."""
    height, width = grid
    tokens = torch.arange(height * width).view(height, width)
    tiles = [tile.reshape(-1) for band in tokens.split(8) for tile in band.split(8, 1)]
    return torch.cat(tiles)


def _any_in_blocks(x: Tensor, dim: int) -> Tensor:
    """Return whether a block of 64 along a dimension holds a True."""
    padding = [0, 0] * (x.ndim - 1 - dim % x.ndim) + [0, -x.shape[dim] % BLOCK]
    return torch.nn.functional.pad(x, padding).unflatten(dim, (-1, BLOCK)).any(dim + 1 if dim >= 0 else dim)


def sparsity(tensors: list[Tensor], grid: tuple[int, int], window: int = 3) -> Sparsity:
    """Count who survives in a reciprocal call of :func:`asa_ops.asa_attention`, some rows at a time.

    Args:
        tensors: query, key, value [B, heads, N, D], alpha, beta [B, heads, N].
        grid: (H, W).
        window: of the local block.
    """
    query, key, _, alpha, beta = (x.flatten(0, 1).float() for x in tensors)
    _, stats = asa_attention(*tensors, grid=grid, window=window, return_stats=True)
    lse = stats.lse.flatten(0, 1)
    heads = [_of_head(*each, grid, window) for each in zip(query, key, alpha, beta, lse, strict=True)]
    n = query.shape[1]
    mean = [sum(each) / len(heads) for each in zip(*heads, strict=True)]
    return Sparsity(mean[0] * n, *mean)


def _of_head(query, key, alpha, beta, lse, grid, window) -> list[float]:
    """Return the fractions of Sparsity for one head: query, key [N, D], alpha, beta, lse [N]."""
    n, dim = query.shape
    order = tile_order(grid).to(query.device)
    place = torch.empty_like(order)
    place[order] = torch.arange(n, device=order.device)  # of a token in the 8 x 8 order
    scaled = query * dim**-0.5
    threshold = lse + (alpha / n).log()
    counts, local_pairs = torch.zeros(n), []
    blocks = -(-n // BLOCK)
    seen, local_tiles, survives = (torch.zeros(blocks, blocks, dtype=torch.bool) for _ in range(3))
    candidates = 0
    step = max(BLOCK, CHUNK // n // BLOCK * BLOCK)
    for start in range(0, n, step):
        rows = order[start : start + step]
        s = scaled[rows] @ key.mT
        neighbours = s > threshold[rows, None]  # A_ij
        columns, inside = _window(grid, window, rows)
        local = s.gather(1, columns).masked_fill(~inside, -torch.inf)
        limit = beta[rows].log() + local.logsumexp(1) - inside.sum(1).log()
        local = inside & (local > limit[:, None])  # L_ij of the window
        chosen_by = key[rows] @ scaled.mT > threshold[None]  # A_ji
        kept = neighbours & chosen_by
        row, offset = local.nonzero(as_tuple=True)
        kept[row, columns[row, offset]] = True
        counts[rows.cpu()] = kept.sum(1).float().cpu()
        blocks_here = slice(start // BLOCK, -(-(start + len(rows)) // BLOCK))
        candidates += _any_in_blocks(chosen_by, 0).sum().item()
        survives[blocks_here] = _tiles(kept, order)
        seen[blocks_here] = _tiles(neighbours, order)
        row, offset = inside.nonzero(as_tuple=True)
        local_pairs.append(torch.stack([start + row, place[columns[row, offset]]]).cpu() // BLOCK)
    local_tiles[tuple(torch.cat(local_pairs, 1))] = True
    plausible = (seen & seen.mT) | local_tiles
    return [
        counts.double().mean().item() / n,
        _pairs(survives, n),
        _pairs(plausible, n),
        candidates / (blocks * n),
        strips(counts, n) / n**2,
    ]


def _window(grid, window: int, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the window's tokens around every token of ``rows``, and which lie on the grid."""
    columns, inside = window_columns(grid, window, slice(0, grid[0] * grid[1]), rows.device)
    return columns[rows], inside[rows]


def _tiles(pairs: Tensor, order: Tensor) -> Tensor:
    """Return which tiles of rows in 8 x 8 order and columns in raster order hold a True."""
    return _any_in_blocks(_any_in_blocks(pairs, 0)[:, order], 1).cpu()


def _pairs(tiles: Tensor, n: int) -> float:
    """Return the fraction of pairs that lie in tiles; the last row and column of tiles are smaller."""
    sizes = torch.full((len(tiles),), float(BLOCK))
    sizes[-1] = n - BLOCK * (len(tiles) - 1)
    return (sizes @ tiles.float() @ sizes).item() / n**2


def strips(counts: Tensor, n: int) -> float:
    """Return how many pairs impl="cpu" visits, from the survivors of every row [N]."""
    of_strip = torch.nn.functional.pad(counts, (0, -len(counts) % STRIP)).view(-1, STRIP).sum(1)
    rows = torch.full((len(of_strip),), float(STRIP))
    rows[-1] = len(counts) - STRIP * (len(of_strip) - 1)
    return torch.where(4 * of_strip > STRIP * n, rows * n, of_strip).sum().item()


def units(impl: str, backward: bool, sparsity: Sparsity, dim: int = 64, half: bool = False) -> float:
    """Return the units that an implementation computes in a call, with its backward or without.

    As ``asa_ops/asa/__init__.py`` states them, for reciprocal attention where query is not key.
    """
    if impl == "cpu":
        visited = sparsity.strips
        return 1 + 2 * visited + (5 * visited if backward else 0)
    if impl in ("triton", "cuda"):
        forward = 1 + sparsity.plausible + 2 * sparsity.active
        of_backward = 10 if not half else 7 if impl == "triton" and dim <= 128 else 8
        return forward + (of_backward * sparsity.active if backward else 0)
    if impl == "blocked":
        return 3 + (5 if backward else 0)
    return 2 + (5 if backward else 0)  # dense: the reference and the peers


def operations(units: float, n: int, dim: int, heads: int = 1) -> float:
    """Return the floating point operations of some units; heads of all images counted together."""
    return units * 2 * n**2 * dim * heads


def implementation(method: str) -> str | None:
    """Return whose units a method computes, for :func:`units`; None where they are not known."""
    return method.removeprefix("asa ") if method.startswith("asa ") else "dense" if method in DENSE else None


def operations_of(case: Case, method: str) -> float | None:
    """Return the operations that a method computes in a timed case of "asa"; None where they are not known."""
    impl = implementation(method)
    if impl is None or not case.sparsity or case.mode == "mem":
        return None
    half = case.dtype != "float32"
    number = units(impl, case.mode == "fwd+bwd", Sparsity(**case.sparsity), case.dim, half)
    return operations(number, case.tokens, case.dim, case.heads * case.batch)


def traffic(n: int, dim: int, heads: int, itemsize: int, backward: bool) -> int:
    """Return the bytes that a call must move at least: every input read and every output written once.

    Forward query, key, value and the output; with the backward also its gradient and those of query, key, value.
    """
    return (8 if backward else 4) * n * dim * heads * itemsize


def registered_flops(call: Callable) -> int:
    """Return what FlopCounterMode counts in a call, by the formulas that operators are registered with."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()
