"""impl="cpu" with AMX for half precisions: its kernels in emulation, its instructions by themselves."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import amx
import pytest
import simt
import torch
from cases import CASES, Case, each_case, make, named, with_grad
from compare import call_and_gradients, check_against_reference, check_ranges, equal, survivors
from implementations import slow

from asa_ops import asa_attention
from asa_ops.asa import ops

COMPILER = bool(shutil.which("c++")) and bool(simt.COMPILER)
QUICK = ("plain", "dense", "one_way", "more_keys", "topk", "padding", "window_5", "all_dense", "mixed", "wide_values")
HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
each_half = pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)


def emulated(test):
    """Mark a test of the library with AMX: where AVX-512 is emulated too, it is slow."""
    test = pytest.mark.skipif(not amx.AVAILABLE, reason="needs AVX-512, or AVX2 and Linux, and a C++ compiler")(test)
    return test if amx.AVX512 else pytest.mark.slow(test)


@pytest.fixture
def with_amx(monkeypatch):
    """Let impl="cpu" be the kernels with AMX."""
    amx.load()
    monkeypatch.setitem(ops._OPS, "asa", ops._OPS["asa_amx"])
    monkeypatch.delenv("ASA_OPS_CPU_ISA", raising=False)


@pytest.fixture
def without_amx(with_amx, monkeypatch):
    """Return what runs a function on the same kernels without AMX."""

    def run(function):
        with monkeypatch.context() as patched:
            patched.setenv("ASA_OPS_CPU_ISA", "avx512")
            return function()

    return run


@pytest.mark.slow
@pytest.mark.skipif(amx.AVX512, reason="test_cpu.py runs it on this machine's AVX-512")
@emulated
@each_case
def test_avx512_in_emulation_equals_the_reference(with_amx, monkeypatch, case):
    monkeypatch.setenv("ASA_OPS_CPU_ISA", "avx512")
    check_against_reference("cpu", *make(case, torch.float32))
    torch.testing.assert_close(*(call_and_gradients(impl, *make(case)) for impl in ("cpu", "reference")))


def in_more_blocks(case: Case) -> Case:
    """Up to 64 tokens are a path of their own."""
    grid = (9, 13) if case.grid == (9, 7) else case.grid
    return replace(case, grid=grid, n_keys=case.n_keys and case.n_keys + 60)


# What is emulated is slow: other cases with `make test-all`.
@emulated
@each_half
@pytest.mark.parametrize("case", [slow(x, id=x.name, when=x.name not in QUICK) for x in CASES])
def test_half_precisions_equal_the_reference(with_amx, dtype, case):
    check_against_reference("cpu", *make(in_more_blocks(case), dtype))


@emulated
@each_half
@pytest.mark.parametrize("name", ["plain", "dense", "one_way", "more_keys", "topk", "padding", "wide_values"])
def test_one_block_equals_the_reference(with_amx, dtype, name):
    check_against_reference("cpu", *make(named(name), dtype))


@emulated
@each_half
@pytest.mark.parametrize("name", ["plain", "dense", "one_way", "mixed", "all_dense"])
def test_ranges_of_rows_on_tiles(with_amx, dtype, name):
    check_ranges("asa_amx", *make(named(name, grid=(9, 17), dim=40), dtype), begin_of_second=64)


@emulated
@each_half
@pytest.mark.parametrize("dim", [8, 40, 64, 130])
def test_any_head_dim_on_tiles(with_amx, dtype, dim):
    case = Case("dim", dim=dim, dim_v=dim - 7, grid=(11, 9), batch=1, alpha="mixed", options={"reciprocal": False})
    check_against_reference("cpu", *make(case, dtype))


@emulated
@pytest.mark.parametrize("grid", [(1, n) for n in (31, 32, 33, 64, 65, 257)], ids=lambda grid: str(grid[1]))
@pytest.mark.parametrize("name", ["all_dense", "alpha_only"])
def test_any_number_of_tokens(with_amx, name, grid):
    check_against_reference("cpu", *make(named(name, grid=grid, batch=1), torch.bfloat16))


def rows_of_every_kind(n: int, dim: int, dtype: torch.dtype, dense: float = 0.3) -> list:
    """Stretches of 8 rows: many keep nearly everybody, others few, so that rows of every kind meet in a tile."""
    generator = torch.Generator().manual_seed(n)
    query, key, value = torch.randn(3, 1, 1, n, dim, generator=generator, dtype=torch.float64)
    stretch, random = torch.arange(n) // 8 % 4, torch.rand(n, generator=generator)
    alpha = torch.where(stretch == 3, 2.5 + random, torch.where(stretch == 1, 1.2 * random, dense * random))
    return [x.to(dtype) for x in (query, key, value, alpha[None, None])] + [None]


@emulated
@each_half
@pytest.mark.parametrize("n,dim,reciprocal", [(301, 40, False), (301, 16, True), (1100, 24, False)])
def test_rows_of_every_kind(with_amx, dtype, n, dim, reciprocal):
    """Also more keys and rows than are taken at a time."""
    inputs, options = rows_of_every_kind(n, dim, dtype), {"reciprocal": reciprocal}
    kept = survivors("cpu", inputs, options)[0, 0].double().mean(-1)
    assert (kept > 0.5).any() and (kept < 0.1).any()
    check_against_reference("cpu", inputs, options)


@emulated
@each_half
def test_the_largest_score_may_come_late(with_amx, dtype):
    """Whole rows of more keys than are taken at a time: sums so far shrink with each larger score."""
    sizes = {"grid": (5, 9), "batch": 1, "dim": 16, "dim_v": 8, "n_keys": 1300}
    inputs, options = make(Case("long", alpha=None, beta=None, options={"reciprocal": False}, **sizes), dtype)
    inputs[1] *= torch.linspace(0.2, 1.5, 1300, dtype=dtype)[:, None]
    check_against_reference("cpu", inputs, options)


@emulated
@each_half
def test_near_dense_mutual_neighbours_beside_a_window(with_amx, dtype):
    """A pair in a hundred is no neighbour: what the scan sums of a row is corrected."""
    inputs, options = make(Case("near_dense", grid=(15, 14), batch=1, dim=16, dim_v=12, sharpness=0.5), dtype)
    inputs[3] = torch.full_like(inputs[3], 0.25)
    kept = survivors("cpu", inputs, options).double().mean()
    assert 0.9 < kept < 1
    check_against_reference("cpu", inputs, options)


@emulated
@each_half
def test_strides_and_shared_heads(with_amx, dtype):
    (query, key, value, alpha, _), options = make(named("alpha_only", heads=4), dtype)
    options["reciprocal"] = False
    key, value = (x[:, :2].mT.contiguous().mT for x in (key, value))
    expected = asa_attention(query, *(x.repeat_interleave(2, 1).contiguous() for x in (key, value)), alpha, **options)
    assert torch.equal(asa_attention(query.mT.contiguous().mT, key, value, alpha, **options), expected)


@emulated
@each_half
@pytest.mark.parametrize("name", ["all_dense", "mixed", "topk"])
def test_thread_counts_in_half_precisions(with_amx, with_threads, dtype, name):
    inputs, options = make(in_more_blocks(named(name)), dtype)
    first, *others = with_threads(lambda: call_and_gradients("cpu", inputs, options), (1, 2, 5))
    assert all(equal(first, other) for other in others)


@emulated
def test_thread_counts_on_a_large_map_of_half_precision(with_amx, with_threads):
    """Here the number of threads also decides how many rows one of them takes at a time."""
    inputs, options = rows_of_every_kind(1100, 16, torch.bfloat16), {"reciprocal": False}
    first, *others = with_threads(lambda: call_and_gradients("cpu", inputs, options), (1, 3, 16))
    assert all(equal(first, other) for other in others)


@emulated
@each_half
@pytest.mark.parametrize("name", ["plain", "dense", "all_dense", "topk_alone", "padding", "one block"])
@pytest.mark.parametrize("which", [0, 1, 2], ids=["query", "key", "value"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=["nan", "inf", "-inf"])
def test_what_is_not_finite_spoils_what_it_does_without_amx(without_amx, dtype, name, which, bad):
    inputs, options = make(named("plain") if name == "one block" else in_more_blocks(named(name)), dtype)
    if "topk" in options:
        options["topk"] = 20  # somebody keeps the value
    mask = options.get("key_padding_mask")
    at = 5 if mask is None else int(mask[0].nonzero()[3])
    inputs[which][0, 0, at, 2] = bad
    if mask is not None:  # padding may be anything
        inputs[which][0, 1, int((~mask[0]).nonzero()[0]), 1] = bad
    run = lambda: asa_attention(*inputs, **options, impl="cpu", return_stats=True)  # noqa: E731
    (out, stats), (expected, expected_stats) = run(), without_amx(run)
    assert expected.isfinite().any() and not expected[0, 0].isfinite().all()
    for x, y in ((out, expected), *zip(stats[:2], expected_stats[:2], strict=True)):
        torch.testing.assert_close(x, y, rtol=2e-2, atol=2e-2, equal_nan=True)


@emulated
@each_half
def test_nothing_in_padding_matters_to_tiles(with_amx, dtype):
    results = []
    for bad in (0, torch.inf):
        inputs, options = make(in_more_blocks(named("padding", beta=None)), dtype)
        padding = ~options["key_padding_mask"][:, None].expand(inputs[0].shape[:3])
        for x in inputs[:3]:
            x[padding] = bad
        results.append(call_and_gradients("cpu", inputs, options))
    assert equal(*results)


@emulated
@each_half
def test_an_infinite_gradient_leaves_other_whole_rows(without_amx, dtype):
    inputs, options = make(named("all_dense", batch=1, heads=1, grid=(11, 9)), dtype)

    def gradients(upstream):
        leaves = with_grad(inputs[:3])
        out = asa_attention(*leaves, *inputs[3:], **options, impl="cpu")
        out.backward(torch.full_like(out, 0.01).index_fill(2, torch.tensor([5]), upstream))
        return [x.grad for x in leaves]

    finite, infinite, expected = gradients(1.0), gradients(torch.inf), without_amx(lambda: gradients(torch.inf))
    others = torch.arange(99) != 5
    torch.testing.assert_close(finite[0][:, :, others], infinite[0][:, :, others], rtol=1e-2, atol=1e-3)
    assert not infinite[0][:, :, 5].isfinite().all()
    assert torch.equal(infinite[2], expected[2]) and infinite[2].isinf().all()


@emulated
@each_half
def test_a_nan_row_that_keeps_nobody_has_no_gradients_beside_whole_rows(with_amx, dtype):
    inputs = rows_of_every_kind(96, 16, dtype)
    inputs[0][0, 0, 25, 3] = torch.nan  # of a stretch with lists
    leaves = with_grad(inputs[:3])
    out = asa_attention(*leaves, *inputs[3:], reciprocal=False, impl="cpu")
    assert out[0, 0, 25].isnan().all() and out[0, 0, 26].isfinite().all()
    out.backward(torch.ones_like(out))
    assert leaves[1].grad.isfinite().all() and leaves[2].grad.isfinite().all()


@emulated
@each_half
@pytest.mark.parametrize("name", ["dense", "one_way", "mixed"])
def test_it_runs_for_half_precisions_alone(without_amx, dtype, name):
    """Sums in another order, and rounded weights, show in the last bits."""
    for kind, same in ((torch.float32, True), (torch.float64, True), (dtype, False)):
        inputs, options = make(named(name), kind)
        results = [run(lambda: call_and_gradients("cpu", inputs, options)) for run in (lambda f: f(), without_amx)]  # noqa: B023
        assert equal(*results) == same
    assert torch.ops.asa_ops.asa_amx_isa() == 3


def isa_in_another_process(**environment: str) -> subprocess.CompletedProcess:
    program = "import amx, torch; amx.load(); print(torch.ops.asa_ops.asa_amx_isa())"
    paths = os.pathsep.join([str(simt.ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    environment = {k: v for k, v in os.environ.items() if k != "ASA_OPS_CPU_ISA"} | environment | {"PYTHONPATH": paths}
    return subprocess.run(
        [sys.executable, "-c", program], cwd=simt.ROOT, env=environment, capture_output=True, text=True
    )


@emulated
@pytest.mark.parametrize("trouble", [slow("refused"), slow("absent"), slow("wrong")])
def test_without_it_avx512_is_best(trouble):
    """No unit, no permission, or one whose product is wrong: nothing is said."""
    amx.build()
    trouble = {"ASA_OPS_AMX_TROUBLE": trouble}
    run = isa_in_another_process(**trouble)
    assert (run.stdout, run.stderr) == ("2\n", "")
    run = isa_in_another_process(**trouble, ASA_OPS_CPU_ISA="amx")
    assert run.returncode and "ASA_OPS_CPU_ISA=amx: this machine has avx512 at best" in run.stderr
    assert isa_in_another_process(**trouble, ASA_OPS_CPU_ISA="avx512").stdout == "2\n"


@emulated
def test_it_is_best_where_there_is_one():
    amx.build()
    assert isa_in_another_process().stdout == "3\n"
    assert isa_in_another_process(ASA_OPS_CPU_ISA="amx").stdout == "3\n"
    assert isa_in_another_process(ASA_OPS_CPU_ISA="avx2").stdout == "1\n"


HAS_BF16 = " avx512_bf16" in Path("/proc/cpuinfo").read_text() if sys.platform.startswith("linux") else False


@emulated
@pytest.mark.slow
@pytest.mark.skipif(amx.TRAPS or not HAS_BF16, reason="needs AVX512-BF16")
def test_the_instructions_by_traps():
    """The quick tests above, on kernels as they are shipped."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", __file__]
    run = subprocess.run(command, cwd=simt.ROOT, env=os.environ | {"ASA_OPS_AMX_TRAPS": "1"}, capture_output=True)
    assert run.returncode == 0, run.stdout.decode()


@pytest.mark.skipif(not COMPILER or not sys.platform.startswith("linux"), reason="needs Linux and a C++ compiler")
@pytest.mark.parametrize("test", ["product", "denormals", "order", "rounding"])
def test_the_layer(test):
    """The instructions, by traps where the machine has none, against their emulation and against float64."""
    run = subprocess.run([amx.build_program(), test], capture_output=True, text=True)
    if run.returncode == 77:
        pytest.skip("this machine cannot run it")
    assert run.returncode == 0, run.stderr
