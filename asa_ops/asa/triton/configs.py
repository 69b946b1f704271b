"""How each Triton kernel is cut into blocks, from one table: no tuning at the first call.

Keyed by kernel, head dim (64 stands for all smaller ones), kind of number and architecture. ``make kernels`` compiles
every row and reports registers, spills and shared memory. Rows of 80 serve every architecture without rows of its own
and keep to 99 KB of shared memory, what consumer cards have.
"""

from typing import NamedTuple

import torch

from ..types import PADDED_TO

PAD = PADDED_TO["triton"]  # tokens of a head are padded to a multiple of this


class Config(NamedTuple):
    """One row. ``block_m``: rows that a program owns; ``block_n``: rows of the other side at a time."""

    block_m: int
    block_n: int
    warps: int
    stages: int
    tma: bool = False  # load tiles by tensor descriptors
    chunk: int = 256  # columns of a product's operands at a time, at most; whole rows stay on chip
    columns: int = 256  # columns of the result that a program owns, at most
    registers: int | None = None  # of a thread, at most, so that more programs run side by side


KERNELS = ("statistics", "topk", "mask", "aggregate", "dq", "dkv", "dk", "dv", "dt")
HALF, FLOAT16, SINGLE = "half", "float16", "float32"

_TABLE = {
    # Hopper: tiles by tensor descriptors, wgmma. A result of 128 rows needs 8 warps, one of 64 rows 4.
    ("statistics", 256, HALF, 90): Config(128, 64, 8, 4, tma=True),
    ("statistics", 128, HALF, 90): Config(128, 128, 8, 3, tma=True),
    ("statistics", 64, HALF, 90): Config(64, 128, 4, 3, tma=True),
    ("topk", 256, HALF, 90): Config(128, 64, 8, 2, tma=True),
    ("topk", 128, HALF, 90): Config(128, 64, 8, 3, tma=True),
    ("topk", 64, HALF, 90): Config(128, 64, 8, 3, tma=True),
    ("mask", 256, HALF, 90): Config(64, 64, 4, 3, tma=True, chunk=64),
    ("mask", 128, HALF, 90): Config(128, 128, 8, 3, tma=True, chunk=64),
    ("mask", 64, HALF, 90): Config(64, 64, 4, 2, tma=True, chunk=32),
    ("aggregate", 256, HALF, 90): Config(128, 64, 8, 2, tma=True),
    ("aggregate", 128, HALF, 90): Config(128, 64, 8, 3, tma=True),
    ("aggregate", 64, HALF, 90): Config(64, 64, 4, 5, tma=True),
    ("dq", 256, HALF, 90): Config(64, 64, 4, 2, tma=True),
    ("dq", 128, HALF, 90): Config(128, 64, 8, 2, tma=True),
    ("dq", 64, HALF, 90): Config(128, 64, 8, 3, tma=True),
    ("dk", 256, HALF, 90): Config(64, 64, 4, 2, tma=True),
    ("dv", 256, HALF, 90): Config(128, 64, 8, 2, tma=True),
    ("dkv", 128, HALF, 90): Config(128, 32, 8, 2, tma=True),
    ("dkv", 64, HALF, 90): Config(128, 64, 8, 2, tma=True),
    ("dt", 256, HALF, 90): Config(64, 64, 4, 2, tma=True, chunk=64),
    ("dt", 128, HALF, 90): Config(64, 64, 4, 2, tma=True, chunk=64),
    ("dt", 64, HALF, 90): Config(64, 64, 8, 2, tma=True, chunk=64),
    # Bits stored and read both ways (thresholds that learn), or a second threshold, take registers: smaller tiles.
    ("mask_both", 256, HALF, 90): Config(64, 64, 4, 2, tma=True, chunk=128),
    ("mask_both", 128, HALF, 90): Config(64, 64, 4, 2, tma=True, chunk=128),
    ("aggregate_both", 256, HALF, 90): Config(64, 32, 4, 2, tma=True),
    ("dq_both", 256, HALF, 90): Config(64, 32, 4, 1, tma=True),
    ("dk_both", 256, HALF, 90): Config(64, 32, 4, 1, tma=True),
    ("dv_both", 256, HALF, 90): Config(64, 32, 4, 2, tma=True),
    ("dkv_both", 64, HALF, 90): Config(64, 64, 4, 2, tma=True),
    # Float16 bounds the gradients of scores, which would overflow: registers again.
    ("dq", 256, FLOAT16, 90): Config(64, 32, 4, 2, tma=True),
    ("dk", 256, FLOAT16, 90): Config(64, 32, 4, 2, tma=True),
    # Float32: operands in chunks, pointers.
    ("statistics", 256, SINGLE, 80): Config(64, 64, 4, 2, chunk=32),
    ("topk", 256, SINGLE, 80): Config(64, 64, 4, 2, chunk=32),
    ("mask", 256, SINGLE, 80): Config(64, 64, 8, 2, chunk=32),
    ("aggregate", 256, SINGLE, 80): Config(64, 32, 4, 2, chunk=32, columns=128),
    ("dq", 256, SINGLE, 80): Config(64, 32, 4, 2, chunk=32, columns=128),
    ("dk", 256, SINGLE, 80): Config(64, 32, 4, 2, chunk=32, columns=128),
    ("dv", 256, SINGLE, 80): Config(64, 32, 4, 2, chunk=32, columns=128),
    ("dt", 256, SINGLE, 80): Config(64, 32, 8, 2, chunk=32),
    # Ampere and whatever has no rows of its own.
    ("statistics", 256, HALF, 80): Config(128, 64, 8, 2),
    ("statistics", 128, HALF, 80): Config(128, 64, 8, 2),
    ("statistics", 64, HALF, 80): Config(128, 64, 4, 3),
    ("topk", 256, HALF, 80): Config(128, 64, 8, 2),
    ("topk", 128, HALF, 80): Config(128, 64, 8, 2),
    ("topk", 64, HALF, 80): Config(128, 64, 8, 2),
    ("mask", 256, HALF, 80): Config(64, 64, 4, 2, chunk=64),
    ("mask", 128, HALF, 80): Config(64, 64, 4, 2, chunk=64),
    ("mask", 64, HALF, 80): Config(64, 64, 4, 2, chunk=64),
    ("aggregate", 256, HALF, 80): Config(64, 32, 4, 2),
    ("aggregate", 128, HALF, 80): Config(64, 64, 4, 2),
    ("aggregate", 64, HALF, 80): Config(128, 64, 8, 2),
    ("dq", 256, HALF, 80): Config(64, 32, 4, 1),
    ("dq", 128, HALF, 80): Config(64, 64, 4, 1),
    ("dq", 64, HALF, 80): Config(64, 64, 4, 2),
    ("dk", 256, HALF, 80): Config(64, 32, 4, 1),
    ("dv", 256, HALF, 80): Config(64, 32, 4, 1),
    ("dkv", 128, HALF, 80): Config(64, 32, 4, 2),
    ("dkv", 64, HALF, 80): Config(64, 32, 4, 2),
    ("dq_both", 128, HALF, 80): Config(64, 32, 4, 2),
    ("dt", 256, HALF, 80): Config(64, 32, 4, 2, chunk=64),
    ("dt", 128, HALF, 80): Config(64, 32, 4, 2, chunk=64),
    ("dt", 64, HALF, 80): Config(64, 32, 4, 2, chunk=64),
}

# In the interpreter: small blocks, so that small inputs have several, and chunks smaller than rows.
_INTERPRETED = Config(64, 32, 4, 1, chunk=32, columns=32)
_INTERPRETED_TILES = Config(64, 64, 4, 1, chunk=32, columns=32)


def find(kernel: str, dim: int, dtype: torch.dtype, architecture: int, both: bool = False) -> Config | None:
    """Return the row for head dim ``dim`` (the larger of D and Dv, at most 256); None if there is none.

    ``both``: the rows for bits stored and read both ways. Architectures without rows of their own take those of the
    next lower one.
    """
    if architecture == 0:
        return _INTERPRETED_TILES if kernel in ("statistics", "mask") else _INTERPRETED
    kind = SINGLE if dtype == torch.float32 else HALF
    kinds = (FLOAT16, HALF) if dtype == torch.float16 else (kind,)
    head_dim = max(64, 1 << (dim - 1).bit_length())
    names = (f"{kernel}_both", kernel) if both else (kernel,)
    dims = (head_dim, 256) if kind == SINGLE else (head_dim,)  # float32 goes chunk by chunk, whatever the head dim
    candidates = (
        (n, d, k, arch) for arch in (90, 80) if arch <= architecture for n in names for k in kinds for d in dims
    )
    return next((_TABLE[row] for row in candidates if row in _TABLE), None)


def rows_at_a_time(width: int, architecture: int) -> tuple[int, int]:
    """Return how many rows of ``width`` numbers a program of the kernels without tiles takes, and its warps."""
    return (128, 4) if architecture == 0 else (16, 8) if width > 128 else (16, 4)


def padded_length(n: int) -> int:
    """Return how many positions n tokens take."""
    return (n + PAD - 1) // PAD * PAD
