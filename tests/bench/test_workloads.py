"""What the benchmarks measure: inputs, peers, and blocks as published, which equal ours."""

import sys

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


@pytest.mark.parametrize("kind", inputs.INPUTS)
def test_inputs_are_the_same_every_time(kind):
    torch.manual_seed(len(kind))
    for first, second in zip(inputs.make(kind, (8, 9), 5), inputs.make(kind, (8, 9), 5), strict=True):
        assert first.isfinite().all() and first.equal(second)


def test_a_synthetic_picture_stands_in_for_the_photograph(monkeypatch):
    monkeypatch.setattr(inputs, "skimage", None)
    tensors = inputs.make("photo", (64, 128), 128)
    assert [x.shape[2] for x in tensors] == [8192] * 5
    assert all(x.isfinite().all() for x in tensors) and tensors[0].std() > 0.1


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


class Packages:
    """Stands for packages that are not installed here: attention that gives the value back, in their layouts."""

    @staticmethod
    def adasplash(query, key, value, is_causal):
        assert query.shape == value.shape == (2, 3, 63, 8) and not is_causal
        return value

    @staticmethod
    def memory_efficient_attention(query, key, value):
        assert query.shape == value.shape == (2, 63, 3, 8)
        return value

    @staticmethod
    def na2d(query, key, value, kernel_size):
        assert query.shape == value.shape == (2, 7, 9, 3, 8) and kernel_size == (7, 9)
        return value


@pytest.mark.parametrize(("name", "module"), [("adasplash",) * 2, ("xformers", "xformers.ops"), ("natten",) * 2])
def test_layouts_of_packages(name, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, Packages)
    query, key, value = torch.randn(3, 2, 3, 63, 8)
    attention = peers.PEERS[name].prepare(peers.Problem([query, key, value, None, None], (7, 9)))
    assert attention(query, key, value).equal(value)


def test_eager_allows_tf32_and_takes_it_back():
    before = torch.get_float32_matmul_precision()
    with peers.matmul_precision("high"):
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == before
