"""What asa_ops launches its CUDA kernels with: threads and shared memory, as small calls in the emulation ask for them.

The compiler knows neither. They come from the code that launches on a GPU too, so they are what runs.
"""

import itertools
import os
import re
import subprocess
from typing import NamedTuple
from unittest import mock

import torch

from asa_ops import asa_attention, reciprocal_neighbors
from asa_ops.asa.cuda_part import Part
from asa_ops.asa.types import Inputs, Options
from tests import simt

from ..peers import matmul_precision

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
WIDTHS = (64, 128, 256)  # of heads, as kernels are compiled for


class Launch(NamedTuple):
    threads: int
    shared: int  # bytes


def recorded() -> dict[str, list[Launch]]:
    """Return the launches of every kernel, of both sets, by its ``label``."""
    simt.load()
    for hopper, dtype, dim, dim_v in itertools.product("01", DTYPES, WIDTHS, WIDTHS):
        # The set for compute capability 9.0 takes float32 as TF32.
        precision = "high" if hopper == "1" else "highest"
        with mock.patch.dict(os.environ, ASA_OPS_HOPPER=hopper), matmul_precision(precision):
            _call(dtype, dim, dim_v)
    programs = simt.programs()
    found: dict[str, list[Launch]] = {}
    for name, (_, *numbers) in zip(labels([name for name, *_ in programs]), programs, strict=True):
        found.setdefault(name, []).append(Launch(*numbers))
    return found


def _call(dtype: torch.dtype, dim: int, dim_v: int) -> None:
    """Launch what there is for one width: thresholds that learn, a graph, more neighbours than are taken one by one."""
    query, key, value = (torch.randn(1, 1, 40, x, dtype=dtype, requires_grad=True) for x in (dim, dim, dim_v))
    threshold = torch.ones(1, 1, 40, requires_grad=True)
    options = {"grid": (5, 8), "topk": 33, "impl": "cuda"}
    out = asa_attention(query, key, value, threshold, threshold, threshold_grad="straight_through", **options)
    out.sum().backward()
    reciprocal_neighbors(query, key, threshold, threshold, **options)
    inputs = Inputs(*(x.detach() for x in (query, key, value, threshold, threshold)), None)
    part = Part(inputs, Options((1, 5, 8), (1, 3, 3), 0, 33, True, 0.1), 0.0, False)
    part.attend((0, 64), (0, 64), part.scan((0, 64)))  # of what they launch more


def labels(mangled: list[str]) -> list[str]:
    """Return the names of kernels as C++ writes them, without the namespaces of all and without arguments."""
    run = subprocess.run(["c++filt"], input="\n".join(mangled), check=True, capture_output=True, text=True)
    whole = run.stdout.replace("asa_ops::cuda::", "").replace("(anonymous namespace)::", "").splitlines()
    return [re.match(r"(?:void )?([\w:]+(?:<.*?>(?=\())?)", name)[1] for name in whole]
