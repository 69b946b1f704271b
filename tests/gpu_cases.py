"""Calls that reach every row of the table of Triton configurations (``asa_ops/asa/triton/configs.py``)."""

import pytest
import torch
from cases import Case

# (head dim of the row, dtype, architecture whose rows are used; None: that of the device)
ROWS = [(dim, torch.bfloat16, arch) for dim in (64, 128, 256) for arch in (None, 80)]
ROWS += [(dim, torch.float32, None) for dim in (64, 256)]
RAGGED = {64: (40, 24), 128: (72, 128), 256: (160, 96)}  # D, Dv that are padded to the head dim of a row
VARIANTS = {
    "plain": {},
    "one_way": {"options": {"reciprocal": False}},
    "topk": {"options": {"topk": 16}},
    "padding": {"batch": 2, "padding": True},
    "dense": {"alpha": None, "beta": None},
    "query_is_key": {"alpha": "heads"},
    "ragged": {},
}


def configured(dim: int, variant: str) -> Case:
    """Return a call of realistic, ragged size: 1,023 tokens in 8 blocks of 128."""
    dim, dim_v = RAGGED[dim] if variant == "ragged" else (dim, dim)
    return Case(variant, **{"grid": (31, 33), "batch": 1, "heads": 2, "dim": dim, "dim_v": dim_v} | VARIANTS[variant])


def name_of(row: tuple) -> str:
    dim, dtype, arch = row
    return f"{dim}-{str(dtype).removeprefix('torch.')}" + (f"-sm_{arch}" if arch else "")


CONFIGURATIONS = [(row, variant) for row in ROWS for variant in VARIANTS]
CONFIGURATIONS += [((dim, torch.float16, None), "plain") for dim in (64, 128, 256)]
each_configuration = pytest.mark.parametrize(
    "row,variant", [pytest.param(row, variant, id=f"{name_of(row)}-{variant}") for row, variant in CONFIGURATIONS]
)
