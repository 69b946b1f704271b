"""Which rows each process computes: ranges of whole blocks, even or of equal work."""

import bisect
from itertools import accumulate, pairwise

BLOCK = 64
MOST_ROWS = 2  # times as many as if rows were even, whatever their work: their bits take memory
WORTH_MOVING = 1.05  # an imbalance from which on rows change hands


def ranges(n: int, size: int, work: list[int] | None = None, block: int = BLOCK) -> list[int]:
    """Return how many of n tokens each of ``size`` processes computes: whole blocks, of about as much work each."""
    blocks = -(-n // block)
    done = [0, *accumulate(work or [1] * blocks)]

    def nearest(target: float) -> int:
        i = bisect.bisect_left(done, target)
        return i - (i > 0 and target - done[i - 1] < done[i] - target)

    bounds = [min(nearest(done[-1] * r / size), blocks - 1) * block for r in range(size)]
    return [end - begin for begin, end in pairwise([*bounds, n])]


def blocks_of(rows: list[int], block: int = BLOCK) -> list[int]:
    """Return how many blocks ranges of rows have."""
    return [-(-n // block) for n in rows]


def imbalance(work: list[int], blocks: list[int]) -> float:
    """Return the largest work of a process over the mean, where process r has ``blocks[r]`` blocks."""
    ends = list(accumulate(blocks))
    of_processes = [sum(work[end - n : end]) for n, end in zip(blocks, ends, strict=True)]
    return max(of_processes) * len(blocks) / sum(work)


def ranges_of_equal_work(
    n: int, blocks: list[int], work: list[int], least: int, block: int = BLOCK
) -> list[int] | None:
    """Return how many of n rows each process computes, by the work of every block of rows; None: as many as now.

    ``blocks`` are those that each process has; every block takes ``least`` beside its work.
    """
    of_blocks = [x + least for x in work]
    if imbalance(of_blocks, blocks) < WORTH_MOVING:
        return None
    size, most = len(blocks), MOST_ROWS * -(-len(work) // len(blocks))
    rows = ranges(n, size, of_blocks, block)
    while max(blocks_of(rows, block)) > most:  # make work more even until they are few enough
        of_blocks = [x + least for x in of_blocks]
        least *= 2
        rows = ranges(n, size, of_blocks, block)
    return rows
