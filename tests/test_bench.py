"""The benchmarks compare what they say, count what they say, and write what they can read."""

import sys
from pathlib import Path

import pytest
import torch

from asa_ops import nn
from asa_ops.asa import reference

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import accounting
import inputs
import record
import run
import workloads

BLOCKS = [*workloads.BLOCKS, "linear_attention,kind=channel", "efficient_attention,heads=8", "criss_cross_attention"]
BLOCKS += [f"non_local,mode={mode}" for mode in ("gaussian", "dot_product", "concatenation")]


def spec(op: str = "asa", size: str = "16x16", dim: int = 32, kind: str = "iid") -> workloads.Spec:
    return workloads.Spec(op, size, dim, 1, 1, "float32", kind, None, "cpu")


@pytest.mark.parametrize("op", BLOCKS)
def test_eager_forms_equal_the_blocks(op):
    """In the mode of the benchmark, training: batch norm takes the statistics of the batch."""
    assert set(workloads.BLOCKS) == set(nn.available()) - {"asa"}
    workload = workloads.build(spec(op), ["auto"], ["eager"])
    ours, eager = (workload.call(name, False)() for name in (workloads.OURS, "eager"))
    torch.testing.assert_close(ours, eager, rtol=1e-3, atol=1e-4)


def test_dense_operations_are_those_of_the_formula():
    """4 N^2 D forward, 10 N^2 D backward, and 7 units in all."""
    n, dim = 144, 16
    workload = workloads.build(spec(size="12x12", dim=dim, kind="dense"), ["auto"], ["sdpa math"])
    ours = workload.ours[0]
    assert accounting.registered_flops(workload.call(ours, False)) == 4 * n**2 * dim
    assert accounting.registered_flops(workload.call(ours, True)) == 14 * n**2 * dim
    assert accounting.registered_flops(workload.call("sdpa math", False)) == 4 * n**2 * dim
    everybody = accounting.sparsity(workload.tensors, (12, 12))
    assert everybody == accounting.Sparsity(n, 1, 1, 1, 1, 1)
    dense = [accounting.operations(accounting.units("reference", back, everybody), n, dim) for back in (False, True)]
    assert dense == [4 * n**2 * dim, 14 * n**2 * dim]


@pytest.mark.parametrize("kind", inputs.INPUTS)
@pytest.mark.parametrize("grid", [(16, 16), (9, 21)])
def test_sparsity_equals_a_count_made_from_the_mask(kind, grid):
    tensors = inputs.make(kind, grid, 16, heads=2)
    query, key, _, alpha, beta = (x.double() for x in tensors)
    assert query.shape == (1, 2, grid[0] * grid[1], 16) and alpha.shape == (1, 2, grid[0] * grid[1])
    n = query.shape[2]
    real = reference.real_positions(query, key, None)
    s = reference.scores(query, key, None, *real)
    mask = reference.find_survivors(s, alpha, beta, grid, 3, None, True, *real).kept[0]
    found = accounting.sparsity(tensors, grid)
    # float32 scores: a pair or two may lie within rounding of a threshold
    assert found.density == pytest.approx(mask.double().mean().item(), abs=4 / n**2)
    assert found.survivors == pytest.approx(found.density * n)
    order = accounting.tile_order(grid)
    assert order.sort().values.equal(torch.arange(n))
    visited = 0
    for head in mask[:, order][:, :, order]:
        for i in range(0, n, 64):
            for j in range(0, n, 64):
                tile = head[i : i + 64, j : j + 64]
                visited += tile.numel() * bool(tile.any())
    assert found.active == pytest.approx(visited / (2 * n**2), abs=64**2 / n**2)
    assert found.density <= found.active <= found.plausible <= 1 and found.density <= found.strips <= 1


def test_inputs_are_the_same_every_time():
    for kind in inputs.INPUTS:
        torch.manual_seed(len(kind))
        for first, second in zip(inputs.make(kind, (8, 9), 5), inputs.make(kind, (8, 9), 5), strict=True):
            assert first.isfinite().all() and first.equal(second)


@pytest.mark.parametrize("kind", inputs.INPUTS)
def test_run_measures_every_input(kind, tmp_path, capsys):
    out = tmp_path / "out.json"
    arguments = ["--size", "8x8", "--dim", "16", "--inputs", kind, "--mode", "fwd", "fwd+bwd", "--rounds", "2"]
    run.main([*arguments, "--peers", "sdpa flash", "eager", "adasplash", "--out", str(out)])
    results = record.read(out)
    assert [case.mode for case in results.cases] == ["fwd", "fwd+bwd"]
    for case in results.cases:
        assert set(case.methods) == {case.ours[0], "sdpa flash", "eager", "adasplash"}
        assert case.methods["adasplash"].skipped in ("not installed", "needs a CUDA device")
        assert 1 <= len(case.methods[case.ours[0]].seconds) <= 2 and case.ratio(case.ours[0], "sdpa flash")[1] > 0
    shown = capsys.readouterr().out
    assert kind in shown and "candidates" in shown and "skipped: " in shown


def test_run_measures_bytes(tmp_path):
    out = tmp_path / "out.json"
    run.main(["--size", "32x32", "--inputs", "iid", "--mode", "mem", "--peers", "eager", "--out", str(out)])
    (case,) = record.read(out).cases
    for name in (case.ours[0], "eager"):
        assert set(case.methods[name].memory) == {"fwd", "fwd+bwd"}
    eager = case.methods["eager"].memory
    assert eager["fwd"] > 4 * 1024**2 * 2, "at least two matrices of N x N float32"
