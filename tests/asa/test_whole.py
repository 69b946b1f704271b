"""The whole op against float64 on every set of kernels on a GPU: head dims, sizes, options, all gradients; repeats.

This is the step "correct" of ``make gpu``: its summary counts what passed by kernels, dtype and head dim, with which
the names of these tests begin. Without a GPU a few small calls run in the emulation of CUDA, so that the file is known
to work.
"""

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from dataclasses import replace

import pytest
import simt
import torch
from cases import Case, make
from compare import call_and_gradients, check_against_reference, check_threshold_gradients, in_gaps

from asa_ops.core import devices
from bench import workloads

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
if ON_GPU:
    pytestmark = pytest.mark.gpu
else:
    emulated = pytest.mark.skipif(not simt.AVAILABLE, reason="no C++ compiler here")
    pytestmark = [emulated, pytest.mark.usefixtures("emulation")]
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
LARGE = 4096  # tokens: such calls take turns, for float64 takes gigabytes

# 1,023 tokens: 16 blocks of 64, the last one not full.
PLAIN = Case("plain", grid=(31, 33), batch=1, heads=2, dim=64, dim_v=64)
ONE_WAY = {"reciprocal": False}
OPTIONS = [
    replace(PLAIN, name="one_way", options=ONE_WAY),
    replace(PLAIN, name="no_beta", beta=None),
    replace(PLAIN, name="no_alpha", alpha=None),
    replace(PLAIN, name="dense", alpha=None, beta=None),
    replace(PLAIN, name="window_1", options={"window": 1}),
    replace(PLAIN, name="window_5", options={"window": 5}),
    replace(PLAIN, name="topk_few", options={"topk": 7}),
    replace(PLAIN, name="topk_many", options={"topk": 100}),
    replace(PLAIN, name="topk_one_way", alpha=None, options={"topk": 20, **ONE_WAY}),
    replace(PLAIN, name="padding", batch=3, padding=True),
    replace(PLAIN, name="padding_dense", batch=2, padding=True, alpha=None, beta=None),
    replace(PLAIN, name="more_keys", n_keys=1500, beta=None, options=ONE_WAY),
    replace(PLAIN, name="fewer_keys", n_keys=333, beta=None, options=ONE_WAY),
    replace(PLAIN, name="head_thresholds", alpha="heads", beta="heads"),
    replace(PLAIN, name="mixed", alpha="mixed", beta="mixed"),
    replace(PLAIN, name="everybody", alpha="zero", beta="zero"),
    replace(PLAIN, name="nobody", alpha="inf", beta="inf"),
    replace(PLAIN, name="scale", options={"scale": 0.11}),
    replace(PLAIN, name="sharp", sharpness=12.0),
    replace(PLAIN, name="four_images", batch=4, heads=1),
]
LEARNING = ("plain", "one_way", "no_beta", "window_5", "padding", "more_keys", "mixed")
# Over few tokens: of many, rounding decides which of two is the k-th, and what that admits if a threshold moves.
TOPK = replace(PLAIN, name="topk", grid=(9, 7), heads=16, options={"topk": 16})
# The error rule compares maxima: over few tokens of more heads.
SIZES = [
    *(replace(PLAIN, grid=grid, heads=512 // (grid[0] * grid[1])) for grid in ((1, 1), (1, 63), (1, 65), (9, 7))),
    replace(PLAIN, grid=(64, 64), heads=1),
]
LARGE_SIZES = [replace(PLAIN, grid=grid, heads=1) for grid in ((97, 97), (128, 128))]
# Where options and sizes are gone through.
MAIN = (("bfloat16", 64), ("bfloat16", 256), ("float16", 128))
FEW = ("one_way", "no_beta", "topk_few", "padding", "more_keys", "sharp")  # of Triton, which compiles for each


def wide(cases: list[Case], dim: int) -> list[Case]:
    return [replace(case, dim=dim, dim_v=dim) for case in cases]


def calls() -> dict[str, list[tuple[str, Case]]]:
    """Return what is compared with float64, (dtype, case) by kernels."""
    if not ON_GPU:
        tiny = replace(PLAIN, grid=(9, 8), dim=8, dim_v=8)
        found = [("bfloat16", tiny), ("float16", replace(tiny, name="one_way", grid=(5, 13), options=ONE_WAY))]
        return {"hopper": found, "cuda": found[:1]}
    every = [(dtype, x) for dtype in DTYPES for dim in (8, 40, 64, 70, 128, 200, 256) for x in wide([PLAIN], dim)]
    every += [(dtype, replace(PLAIN, name="wide_values", dim=72, dim_v=128)) for dtype in DTYPES]
    every += [(dtype, x) for dtype, dim in MAIN for x in wide(OPTIONS + SIZES, dim)]
    every += [(dtype, x) for dtype in DTYPES for x in wide(LARGE_SIZES, 256)]
    triton = [(dtype, x) for dtype in DTYPES for dim in (64, 128, 256) for x in wide([PLAIN], dim)]
    triton += [("bfloat16", x) for x in wide([case for case in OPTIONS if case.name in FEW], 256)]
    return {"hopper": every, "cuda": every, "triton": triton}


def learning() -> dict[str, list[tuple[str, Case]]]:
    """Return the calls whose thresholds learn."""
    if not ON_GPU:
        return {"hopper": [("bfloat16", replace(PLAIN, grid=(9, 8), dim=8, dim_v=8))]}
    chosen = [PLAIN, TOPK, *(case for case in OPTIONS if case.name in LEARNING)]
    every = [(dtype, x) for dtype, dim in MAIN for x in wide(chosen, dim)]
    return {"hopper": every, "cuda": every, "triton": [(dtype, x) for dtype, dim in MAIN for x in wide([PLAIN], dim)]}


def repeated() -> dict[str, list[tuple[str, Case]]]:
    if not ON_GPU:
        return {"hopper": [("float16", replace(PLAIN, grid=(9, 8), dim=8, dim_v=8))]}
    every = [("bfloat16", replace(case, grid=(64, 64))) for case in wide([PLAIN, OPTIONS[0]], 256)]
    every += [
        ("float16", replace(PLAIN, name="topk_few", options={"topk": 7})),
        ("float16", *wide(LARGE_SIZES[:1], 128)),
    ]
    return dict.fromkeys(("hopper", "cuda", "triton"), every)


def each(calls: dict[str, list[tuple[str, Case]]]):
    """Parametrize kernels, dtype and case, kernel by kernel: what hangs stops the calls of its own kernels only."""
    rows = []
    for kernels, dtype, case in ((kernels, *call) for kernels, found in calls.items() for call in found):
        size = "x".join(map(str, case.grid))
        rows.append(pytest.param(kernels, DTYPES[dtype], case, id=f"{kernels}-{dtype}-{case.dim}-{case.name}-{size}"))
    return pytest.mark.parametrize("impl,dtype,case", rows, indirect=["impl"])


@pytest.fixture
def impl(request):
    """Have a set of kernels run, and return what the op calls it."""
    device, kernels = torch.device(DEVICE), request.param
    if kernels == "triton":
        yield "triton"
        return
    reason = devices.why_no_cuda_on("asa", device)
    if reason is None and kernels == workloads.HOPPER:
        reason = workloads.why_no_hopper(device, torch.bfloat16)
    if reason:
        pytest.skip(reason)
    with workloads.kernel_set(kernels):
        yield "cuda"


@contextlib.contextmanager
def in_turn(case: Case) -> Iterator[None]:
    """Let the large calls of a set of kernels run one after another; skip what the memory left does not hold.

    Another set does not wait, for one that hangs would hold up both.
    """
    n = case.grid[0] * case.grid[1]
    if n <= LARGE:
        yield
        return
    kernels = os.environ.get(workloads.HOPPER_VARIABLE, "triton")
    with open(f"{tempfile.gettempdir()}/asa_ops_large_{os.getuid()}_{kernels}", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield
        except torch.OutOfMemoryError:
            pytest.skip(f"too little memory for {n} x {n} numbers in float64")
        finally:
            torch.cuda.empty_cache()


@each(calls())
def test_whole_equals_float64(impl, dtype, case):
    """Survivors, output, statistics and the gradients of query, key and value."""
    with in_turn(case):
        check_against_reference(impl, *make(case, dtype, device=DEVICE))


@each(learning())
def test_whole_thresholds_learn(impl, dtype, case):
    """The straight-through gradients of thresholds, and those beside them."""
    inputs, options = make(case, dtype, device=DEVICE)
    check_threshold_gradients(impl, in_gaps(inputs, options), options, band=1.3, others=True)


@each({name: [x for x in found if x[1].name == "plain"] for name, found in learning().items()})
def test_whole_heads_share_keys(impl, dtype, case):
    """All heads of query one of key and value, whose gradients add up."""
    inputs, options = make(case, dtype, device=DEVICE)
    inputs[1:3] = (x[:, :1].expand_as(x) for x in inputs[1:3])
    inputs = in_gaps(inputs, options)
    inputs[1:3] = (x[:, :1].contiguous() for x in inputs[1:3])
    check_threshold_gradients(impl, inputs, options, band=1.3, others=True)


@each(repeated())
def test_whole_repeats_bitwise(impl, dtype, case):
    """100 calls with all gradients, without waiting for the device between them."""
    inputs, options = make(case, dtype, device=DEVICE)
    first = call_and_gradients(impl, inputs, options, torch.ones_like(inputs[2]))
    differences = torch.zeros((), dtype=torch.long, device=DEVICE)
    for _ in range(100 if ON_GPU else 2):
        again = call_and_gradients(impl, inputs, options, torch.ones_like(inputs[2]))
        differences += sum((x != y).any().long() for x, y in zip(first, again, strict=True))
    assert differences.item() == 0
