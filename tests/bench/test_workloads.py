"""What the benchmarks measure: inputs, peers, and blocks as published, which equal ours."""

import dataclasses
import math
import os
import sys
from types import SimpleNamespace

import pytest
import simt
import torch

from asa_ops import nn
from bench import inputs, peers, workloads

BLOCKS = [*workloads.BLOCKS, "linear_attention,kind=channel", "efficient_attention,heads=8", "criss_cross_attention"]
BLOCKS += [f"non_local,mode={mode}" for mode in ("gaussian", "dot_product", "concatenation")]


@pytest.mark.parametrize("op", BLOCKS)
def test_eager_forms_equal_the_blocks(op):
    """In the mode of the benchmark, training: batch norm takes the statistics of the batch."""
    assert set(workloads.BLOCKS) == set(nn.available()) - {"asa"}
    spec = workloads.Spec(op, "16x16", 32, 1, 1, "float32", "iid", None)
    workload = workloads.build(spec, "cpu", ["auto"], ["eager"])
    ours, eager = (workload.call(name, False)() for name in (workloads.OURS, "eager"))
    torch.testing.assert_close(ours, eager, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", [*inputs.INPUTS, "photo without scikit-image"])
def test_inputs_are_the_same_every_time(kind, monkeypatch):
    """A synthetic picture stands in for the photograph."""
    torch.manual_seed(len(kind))
    if kind not in inputs.INPUTS:
        monkeypatch.setattr(inputs, "skimage", None)
    for grid, dim in (((8, 9), 5), ((64, 128), 128), ((40,), 8), ((3, 5, 8), 8)):
        made = [inputs.make(kind.split()[0], grid, dim) for _ in range(2)]
        assert [x.shape[2] for x in made[0]] == [math.prod(grid)] * 5
        assert made[0][0].std() > (0.01 if kind == "near-dense" else 0.1)
        assert all(first.isfinite().all() and first.equal(second) for first, second in zip(*made, strict=True))


@pytest.mark.parametrize("chosen", [["eager"], []])
def test_eager_that_does_not_fit_in_memory(chosen, monkeypatch):
    monkeypatch.setattr(workloads, "free_bytes", lambda device: 2**30)
    spec = workloads.Spec("non_local,mode=concatenation", "64x64", 64, 1, 1, "float32", "iid", None)
    workload = workloads.build(spec, "cpu", ["auto"], chosen)
    assert list(workload.prepare) == [workloads.OURS] and list(workload.skipped) == chosen
    assert all("would need 17 GB, more than half of the 1 GB" in reason for reason in workload.skipped.values())


def test_implementations_that_cannot_run_are_skipped():
    spec = workloads.Spec("asa", "8x8", 512, 1, 1, "float32", "iid", None)
    workload = workloads.build(spec, "cpu", ["triton", "blocked"], [])
    assert workload.ours == ["asa blocked"] and "impl='triton' cannot run" in workload.skipped["asa triton"]


@pytest.mark.skipif(not simt.AVAILABLE, reason="no C++ compiler here, or a GPU: kernels run there")
def test_kernels_for_compute_capability_9_are_an_implementation_more(emulation, monkeypatch):
    """Of half precisions; in a call with its backward they run in both, and nowhere else."""
    spec = workloads.Spec("asa", "5x13", 8, 1, 1, "bfloat16", "iid", None)
    monkeypatch.setenv(workloads.HOPPER_VARIABLE, "as before")
    workload = workloads.build(spec, "cpu", ["cuda", "hopper"], ["sdpa flash"])
    launches = []
    for name in workload.prepare:
        before = simt.launches()
        workload.call(name, True)()
        launches.append(simt.launches() - before)
        assert os.environ[workloads.HOPPER_VARIABLE] == "as before"
    assert workload.ours == ["asa cuda", "asa hopper"] and launches[0] > launches[1] > launches[2] == 0
    single = workloads.build(dataclasses.replace(spec, dtype="float32"), "cpu", ["hopper"], [])
    assert not single.ours and "half precisions" in single.skipped["asa hopper"]
    device, half = torch.device("cuda"), torch.bfloat16
    for capability, built, reason in (((8, 0), ("90a",), "run on no other"), ((9, 0), ("90",), "not built for 90a")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, x=capability: x)
        monkeypatch.setattr(workloads.extension, "cuda_architectures", lambda x=built: x)
        assert reason in workloads.why_no_hopper(device, half)
    monkeypatch.setattr(workloads.extension, "cuda_architectures", lambda: ("90a",))
    assert workloads.why_no_hopper(device, half) is None


@pytest.mark.parametrize(
    ("name", "module", "function", "layout", "options"),
    [
        ("adasplash", "adasplash", "adasplash", (2, 3, 54, 8), {"is_causal": False}),
        ("xformers", "xformers.ops", "memory_efficient_attention", (2, 54, 3, 8), {}),
        ("natten", "natten", "na2d", (2, 6, 9, 3, 8), {"kernel_size": (5, 9)}),
    ],
)
def test_layouts_of_packages(name, module, function, layout, options, monkeypatch):
    """With attention that gives the value back in place of packages that are not installed here."""

    def attention(query, key, value, **given):
        assert query.shape == key.shape == value.shape == layout and given == options
        return value

    monkeypatch.setitem(sys.modules, module, SimpleNamespace(**{function: attention}))
    query, key, value = torch.randn(3, 2, 3, 54, 8)
    prepared = peers.PEERS[name].prepare(peers.Problem([query, key, value, None, None], (6, 9)))
    assert prepared(query, key, value).equal(value)


def test_eager_allows_tf32_and_takes_it_back():
    before = torch.get_float32_matmul_precision()
    with peers.matmul_precision("high"):
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == before
