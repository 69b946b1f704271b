"""What the benchmarks measure: inputs, peers, and blocks as published, which equal ours."""

import math
import sys
from types import SimpleNamespace

import pytest
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
    for grid, dim in (((8, 9), 5), ((64, 128), 128)):
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
