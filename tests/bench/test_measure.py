"""Seconds, bytes, who survives and how many operations that takes."""

import dataclasses
import functools
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from bench_cases import stand_in_for_cuda, stored, tiles

from asa_ops.asa import reference
from bench import accounting, inputs, measure, workloads
from examples import memory


def test_dense_operations_are_those_of_the_formula():
    """4 N^2 D forward, 10 N^2 D backward, and 7 units in all."""
    n, dim = 144, 16
    spec = workloads.Spec("asa", "12x12", dim, 1, 1, "float32", "dense", None)
    workload = workloads.build(spec, "cpu", ["auto"], ["sdpa math"])
    ours = workload.ours[0]
    calls = [workload.call(*call) for call in ((ours, False), (ours, True), ("sdpa math", False))]
    assert [accounting.registered_flops(x) / (n**2 * dim) for x in calls] == [4, 14, 4]
    everybody = accounting.sparsity(workload.tensors, (12, 12))
    assert everybody == accounting.Sparsity(n, 1, 1, 1, 1, 1)
    unit = accounting.operations_of_a_unit(dataclasses.replace(stored().cases[0], size="12x12", dim=dim)) / (n**2 * dim)
    assert [unit * accounting.units("reference", backward, everybody) for backward in (False, True)] == [4, 14]


@pytest.mark.parametrize("kind", inputs.INPUTS)
@pytest.mark.parametrize("grid", [(16, 16), (9, 21), (8, 40)])
def test_sparsity_equals_a_count_made_from_the_mask(kind, grid, monkeypatch):
    monkeypatch.setattr(accounting, "CHUNK", 1000)
    tensors = inputs.make(kind, grid, 16, heads=2)
    order = accounting.tile_order(grid)
    if grid == (8, 40):  # a tile that keeps nobody, which others keep: it is in sight of its neighbours only
        tensors[3][..., order[:64]] = torch.inf
    query, key, _, alpha, beta = (x.double() for x in tensors)
    n = math.prod(grid)
    assert query.shape == (1, 2, n, 16) and alpha.shape == (1, 2, n)
    real = reference.real_positions(query, key, None)
    s = reference.scores(query, key, None, *real)
    all_of = reference.find_survivors(s, alpha, beta, grid, 3, 0, None, True, *real)
    mask, neighbours, window = all_of.kept[0], all_of.adaptive[0], all_of.in_window[0, 0]
    found = accounting.sparsity(tensors, grid)
    # float32 scores: a pair or two may lie within rounding of a threshold
    assert found.density == pytest.approx(mask.double().mean().item(), abs=4 / n**2)
    assert found.survivors == pytest.approx(found.density * n)
    assert order.sort().values.equal(torch.arange(n))
    kept, chosen, around = (tiles(x, grid) for x in (mask, neighbours, window))
    sizes = torch.tensor([len(block) for block in order.split(64)], dtype=torch.double)
    pairs = 2 * n**2  # of both heads
    assert found.active == (sizes @ kept.double() @ sizes).sum() / pairs
    assert found.plausible == (sizes @ (chosen & chosen.mT | around).double() @ sizes).sum() / pairs
    candidates = torch.stack([neighbours[..., block].any(-1) for block in order.split(64)]).double().mean().item()
    assert found.candidates == pytest.approx(candidates, abs=4 / (2 * len(sizes) * n))
    assert found.density <= found.active <= found.plausible <= 1 and found.density <= found.strips <= 1


def test_units_are_those_of_the_formulas():
    units = functools.partial(accounting.units, sparsity=accounting.Sparsity(10, 0.1, 0.3, 0.4, 0.2, 0.15))
    assert [units("cpu", x) for x in (False, True)] == pytest.approx([1.3, 1.3 + 0.75])
    assert [units("cpu", x, tokens=2048) for x in (False, True)] == pytest.approx([1.15, 1.15 + 0.75])
    half_dense = accounting.Sparsity(30, 0.5, 1, 1, 1, 1)
    assert accounting.units("cpu", False, half_dense, 4096) == pytest.approx(3 - sum(range(60)) / 64**2, rel=5e-3)
    near_dense = accounting.Sparsity(95, 0.95, 1, 1, 1, 1)
    assert [accounting.units("cpu", x, near_dense) for x in (False, True)] == [2, 7]
    half = [units(impl, True, dim=128, half=True) for impl in ("triton", "cuda", "hopper")]
    assert [*half, units("triton", True)] == pytest.approx([1 + 0.4 + 0.6 + x for x in (2.1, 2.4, 2.1, 3)])
    assert units("blocked", True) == 8
    counts = torch.tensor([8.0] * 8 + [9.0] + [8.0] * 7 + [1, 0, 0, 0])
    assert accounting.strips(counts, 32) == 64 + 8 * 32 + 1, "dense above a quarter"
    case = dataclasses.replace(stored().cases[0], size="10x10", heads=2, batch=3)
    assert accounting.traffic(case) == 4 * (100 * 64 * 2 * 3 * 4), "q, k, v, out"
    case = dataclasses.replace(case, mode="fwd+bwd", dtype="bfloat16")
    assert accounting.traffic(case) == 8 * (100 * 64 * 2 * 3 * 2), "and do, dq, dk, dv"


def test_operations_of_kernels():
    flops = accounting.kernel_operations
    assert flops("statistics", 100, 64, 32) == 2 * 100 * 64
    assert flops("mask", 100, 64, 32) == 2 * 100 * 128
    assert flops("mask", 100, 64, 32, symmetric=True) == flops("mask", 100, 64, 32, mutual=False) == 2 * 100 * 64
    assert flops("aggregate", 100, 64, 32) == flops("dv", 100, 64, 32) == 2 * 100 * 96
    assert flops("dq", 100, 64, 32) == flops("dk", 100, 64, 32) == 2 * 100 * 160
    assert flops("dkv", 100, 64, 32) == 2 * 100 * 192  # scores once for both
    assert flops("dt", 100, 64, 32) == 2 * flops("dt", 100, 64, 32, mutual=False) == 2 * 100 * 192


ROOT = Path(__file__).parents[2]
ALLOCATING = """
import torch
from bench import measure

torch.ones(2**25)

def allocate():
    torch.ones(2**24)  # freed at once
    return torch.ones(2**24) + torch.ones(1)  # 64 MB twice

# Pages that the system took away before, and this process touches again meanwhile, count too.
print(min(measure.bytes_added(allocate, "cpu") for _ in range(3)))
"""


def test_bytes_added_are_those_allocated():
    """Of 128 MB at the same time, whatever was freed before: in a process of its own, for tests before leave traces."""
    run = subprocess.run([sys.executable, "-c", ALLOCATING], cwd=ROOT, capture_output=True, text=True)
    assert int(run.stdout or -1) == pytest.approx(2**27, rel=0.05), run.stderr


def test_memory_where_the_system_tells_less(monkeypatch):
    """Without leave to start the peak anew the bytes above it count; outside Linux there are none."""
    figures = {"VmRSS": 10, "VmHWM": 30}
    monkeypatch.setattr(memory, "resident", figures.get)
    monkeypatch.setattr(Path, "write_text", mock.Mock(side_effect=[1, PermissionError, PermissionError]))
    assert memory.added(lambda: figures.update(VmHWM=42) or "result") == ("result", 32)
    assert memory.added(lambda: figures.update(VmHWM=50)) == (None, 8)
    assert memory.added(lambda: figures.update(VmHWM=20)) == (None, 0)
    monkeypatch.undo()
    monkeypatch.setattr(Path, "read_text", mock.Mock(side_effect=FileNotFoundError))
    assert memory.added(lambda: "result") == ("result", None)
    with pytest.raises(RuntimeError, match="on Linux alone"):
        measure.bytes_added(list, "cpu")


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("asa cpu", measure.bytes_of),
        ("eager", measure.bytes_once),
        pytest.param("flex", measure.bytes_of, marks=pytest.mark.slow),  # torch compiles it first
    ],
)
def test_bytes_of_a_call(name, count):
    """Two matrices of N x N float32 at least of the published formula, far less of ours."""
    spec = workloads.Spec("asa", "32x32", 8, 1, 1, "float32", "iid", None)
    # Pages that the system took away before, and this process touches again meanwhile, count too.
    found = min(count(spec, "cpu", name, False) for _ in range(3))
    assert found > 2 * 4 * 1024**2 if name == "eager" else found < 4 * 1024**2


@pytest.fixture
def sleep(monkeypatch):
    """Return a function that takes time by a clock of its own, whatever else the machine does."""
    taken = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: sum(taken))
    return taken.append


def test_rounds_are_interleaved_and_slow_calls_get_few(sleep):
    """But not one whose first call alone is slow, as that of what compiles."""
    calls = []

    def call(name: str, seconds: float, first: float = 0.0) -> None:
        sleep(seconds if name in calls else seconds + first)
        calls.append(name)

    given = {"fast": (0.001,), "slow": (0.02,), "compiled": (0.001, 0.05)}
    methods = {name: functools.partial(call, name, *taken) for name, taken in given.items()}
    times, errors = measure.interleaved(methods, 5, "cpu")
    assert {name: len(x) for name, x in times.items()} == {"fast": 5, "slow": measure.SLOW_ROUNDS, "compiled": 5}
    assert calls[:4] == [*given, "fast"] and calls.count("slow") == measure.SLOW_ROUNDS + 2 and not errors
    times, _ = measure.interleaved({"repeated": lambda: calls.append("again")}, 2, "cpu", repeats=5)
    assert len(times["repeated"]) == 2 and calls.count("again") == 5 * 4


def test_calls_on_a_gpu_are_timed_as_called_and_in_graphs(monkeypatch, sleep):
    """With what stands for torch.cuda; of a call that cannot be captured there is no time in a graph."""
    replay = stand_in_for_cuda(monkeypatch)
    assert measure.seconds_of(lambda: sleep(0.01), "cuda", 2) == pytest.approx(0.01)
    calls = []
    times = measure.in_graphs({"fast": lambda: calls.append(1), "synchronises": lambda: 1 / 0}, 3)
    assert set(times) == {"fast"} and len(times["fast"]) == 3
    assert len(calls) == measure.WARM_UP + 1 and replay.call_count == (measure.WARM_UP + 3) * measure.REPLAYS


def test_what_the_machine_does_at_most_is_measured():
    found = measure.ceilings("cpu", torch.float32, side=64)
    assert set(found) >= {"torch.mm GFLOP/s", "copy GB/s"} and found["torch.mm GFLOP/s"] > 0


def test_environment_is_told_without_git_driver_or_scikit_image(monkeypatch):
    found = measure.environment("cpu")
    assert found["torch"] == torch.__version__ and found["python"] and "photo" not in found
    json.dumps(found)
    monkeypatch.setattr(subprocess, "run", mock.Mock(side_effect=FileNotFoundError))
    monkeypatch.setattr(inputs, "skimage", None)
    found = measure.environment("cpu")
    assert found["commit"] == "unknown" and "synthetic" in found["photo"]
    monkeypatch.setenv("ASA_OPS_COMMIT", "abc")
    assert measure.commit() == "abc"
