"""The CUDA kernels of csrc/cuda on the CPU, behind csrc/testing/simt.h: tiny and ragged sizes.

What every implementation must do is in test_implementations.py; here is every case in every precision, on both sets
of kernels, and what these are made of. How they compile is in tests/bench/test_cuda_budget.py.
"""

import math
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import simt
import torch
from cases import CASES, Case, make, named, with_grad
from compare import (
    call_and_gradients,
    check_against_reference,
    check_threshold_gradients,
    equal,
    exact_scores,
    survivors,
)
from implementations import DTYPES, SETS, slow
from torch.utils.cpp_extension import get_cxx_compiler

from asa_ops import asa_attention
from asa_ops.asa import ops

if not simt.AVAILABLE:
    pytest.skip("no C++ compiler here, or a GPU: kernels run there", allow_module_level=True)

HALVES = (torch.bfloat16, torch.float16)


def each_set(*dtypes):
    """Parametrize the set of kernels and the dtype; that for compute capability 9.0 takes float32 as TF32."""
    rows = [x if hasattr(x, "marks") else pytest.param(x) for x in dtypes]
    return pytest.mark.parametrize(
        "kernel_set,dtype",
        [
            pytest.param(kernels, *x.values, marks=x.marks, id=f"{kernels}-{str(x.values[0]).removeprefix('torch.')}")
            for x in rows
            for kernels in SETS
        ],
        indirect=["kernel_set"],
    )


each_set_and_dtype = each_set(*DTYPES.values())
both_sets = pytest.mark.parametrize("kernel_set", SETS, indirect=True)
on_hopper = pytest.mark.parametrize("kernel_set", ["hopper"], indirect=True)
each_half = pytest.mark.parametrize("dtype", HALVES, ids=["bfloat16", "float16"])
on_hopper_each_dtype = pytest.mark.parametrize(
    "kernel_set,dtype",
    [slow("hopper", x, id=name, when=x == torch.bfloat16) for name, x in DTYPES.items()],
    indirect=["kernel_set"],
)


@pytest.fixture(scope="module", autouse=True)
def kernels():
    simt.load()


def exactly(kernel_set, inputs) -> tuple[list, dict]:
    """Return inputs that the products of a set take as they are, and what checks are told of these products.

    Numbers of float16 are numbers of TF32, which has as many bits: their scores are exact, weights are rounded.
    """
    if kernel_set == "general" or inputs[0].dtype != torch.float32:
        return inputs, {}
    factors = torch.float16
    return [*(x.to(factors).float() for x in inputs[:3]), *inputs[3:]], {"factors": factors}


# Against the reference.


@each_set_and_dtype
@pytest.mark.parametrize("dims", [(64, 128), slow((65, 40)), slow((130, 64)), (256, 256)], ids=str)
@pytest.mark.parametrize("options", [slow({}), {"reciprocal": False}], ids=["mutual", "one_way"])
def test_wide_heads_in_several_tiles(kernel_set, dtype, dims, options):
    dim, dim_v = dims
    case = Case("wide", grid=(9, 15), batch=1, heads=1, dim=dim, dim_v=dim_v, sharpness=3.0, options=options)
    inputs, options = make(case, dtype)
    inputs, factors = exactly(kernel_set, inputs)
    check_against_reference("cuda", inputs, options, **factors)


OTHERS = (("general", "one_way"), ("general", "topk"))  # test_implementations.py has the like of them


@pytest.mark.parametrize(
    "kernel_set,dtype,options",
    [
        slow(kernels, dtype, options, id=f"{name}-{kernels}-{of}", when=of != "float16" or (kernels, name) in OTHERS)
        for name, options in (("mutual", {}), ("one_way", {"reciprocal": False}), ("topk", {"topk": 20}))
        for of, dtype in DTYPES.items()
        for kernels in SETS
    ],
    indirect=["kernel_set"],
)
def test_threshold_gradients_of_several_tiles(kernel_set, dtype, options):
    """An offset of the values cancels in what an admitted pair changes, but for how matrix units round its weight."""
    inputs, options = make(Case("tiles", grid=(9, 15), batch=1, heads=4, dim=70, dim_v=66, options=options), dtype)
    inputs[2] += 10 if dtype != torch.bfloat16 else 10 / 8  # which has three bits less than float16
    inputs[3:] = [x.float() for x in inputs[3:]]
    inputs, factors = exactly(kernel_set, inputs)
    check_threshold_gradients("cuda", inputs, options, **factors)


# What the general set is enough for in `make test`, in test_implementations.py.
GENERAL = ("alpha_only", "head_thresholds", "topk_alone", "window_5", "window_wider_than_map", "all_dense", "all_empty")
GENERAL += ("scale", "one_column", "empty_batch", "sequence_topk", "volume_padding", "map_window", "window_of_511")


@on_hopper  # the general set does so in test_implementations.py
@pytest.mark.parametrize("dtype", [torch.float16, slow(torch.bfloat16), slow(torch.float32)], ids=str)
@pytest.mark.parametrize("case", [slow(case, id=case.name, when=case.name in GENERAL) for case in CASES])
def test_hopper_equals_reference(kernel_set, dtype, case):
    inputs, options = make(case, dtype)
    inputs, factors = exactly(kernel_set, inputs)
    check_against_reference("cuda", inputs, options, **factors)


LONG = Case("long", grid=(20, 29), batch=1, heads=2, dim=64, sharpness=3.0)  # ten blocks, the last one of four tokens


SHARED = {
    "plain": LONG,
    "wide": replace(LONG, dim=100, heads=1),
    "wider": replace(LONG, dim=200, heads=1),
    "dense": replace(LONG, alpha=None, beta=None),
    "sharp": replace(LONG, sharpness=20.0),  # most lists are short, some are empty
    "padding": replace(LONG, padding=True, batch=2),
    "one_way": replace(LONG, options={"reciprocal": False}),
    "fewer_keys": replace(LONG, n_keys=333, beta=None, options={"reciprocal": False}),
}
IN_TEST = {(torch.bfloat16, "wide")}


@on_hopper
@pytest.mark.parametrize(
    "dtype,case",
    [
        slow(dtype, case, id=f"{name}-{str(dtype).removeprefix('torch.')}", when=(dtype, name) not in IN_TEST)
        for name, case in SHARED.items()
        for dtype in DTYPES.values()
    ],
)
def test_lists_that_programs_share(kernel_set, dtype, case, monkeypatch):
    """Parts of a list are added up by the last program to come; rings of slots are used many times."""
    inputs, options = make(case, dtype)
    inputs, factors = exactly(kernel_set, inputs)
    check_against_reference("cuda", inputs, options, **factors)
    monkeypatch.setenv("ASA_OPS_SIMT_PROCESSORS", "100")
    check_against_reference("cuda", inputs, options, **factors)
    once, again = (call_and_gradients("cuda", inputs, options) for _ in range(2))
    assert equal(once, again)


@pytest.mark.parametrize("dtype", [torch.float16, slow(torch.bfloat16)], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("processors", [slow(7), 20, slow(132)])
def test_programs_without_work_are_not_waited_for(dtype, processors, monkeypatch):
    """One list has all entries but those that empty ones count as: fewer than programs, which share it."""
    monkeypatch.setenv("ASA_OPS_SIMT_PROCESSORS", str(processors))
    short, few = make(Case("short", (16, 32), 1, 1, 64, 64, beta=None, options={"reciprocal": False}), dtype)
    query, key, _, alpha, _ = short
    alpha.fill_(math.inf)
    alpha[0, 0, 130], query[0, 0, 130, 0], key[0, 0, [3, 70], 0] = 1, 40, 4
    dense, padded = make(replace(LONG, heads=1, alpha=None, beta=None), dtype)
    padded["key_padding_mask"] = torch.arange(580)[None] < 128  # one list has entries
    for inputs, options in ((short, few), (dense, padded)):
        results = []
        for asked in "01":
            monkeypatch.setenv("ASA_OPS_HOPPER", asked)
            results.append(call_and_gradients("cuda", inputs, options))
        assert torch.equal(results[0][3], results[1][3])  # survivors
        for general, hopper in zip(*results, strict=True):
            torch.testing.assert_close(hopper, general, rtol=0.01, atol=1e-3)


@each_half
def test_a_backward_of_one_set_follows_a_forward_of_the_other(dtype, monkeypatch):
    """What a forward keeps is the same: a process may be told otherwise in between."""
    inputs, options = make(replace(LONG, heads=1, grid=(9, 15)), dtype)
    results = []
    for forward, backward in (("1", "1"), ("1", "0"), ("0", "1")):
        monkeypatch.setenv("ASA_OPS_HOPPER", forward)
        leaves = with_grad(inputs)
        out = asa_attention(*leaves, **options, threshold_grad="straight_through", impl="cuda")
        monkeypatch.setenv("ASA_OPS_HOPPER", backward)
        results.append(torch.autograd.grad(out.float().square().sum(), leaves))
    for others in results[1:]:
        for x, y in zip(results[0], others, strict=True):
            torch.testing.assert_close(x, y, rtol=0.05, atol=0.02 * float(x.abs().max()))


@on_hopper_each_dtype
@pytest.mark.parametrize("learns", [False, slow(True)])
def test_no_product_decides_tiles_of_which_all_pairs_are_neighbours(kernel_set, dtype, learns):
    """With alpha 0 only the last blocks, which are not full, need any."""
    case = replace(LONG, heads=1, alpha="zero", beta=None)
    options = {"threshold_grad": "straight_through" if learns else None}

    def products(alpha: float) -> int:
        inputs, others = make(case, dtype)
        inputs[3].fill_(alpha)
        before = simt.products()
        asa_attention(*inputs, **others, **options, impl="cuda")
        return simt.products() - before

    inputs, options_ = make(case, dtype)
    inputs, factors = exactly(kernel_set, inputs)
    check_against_reference("cuda", inputs, options_, **factors)
    # Ten blocks: pass 1 takes 5 x 5 tiles of 128 x 128, aggregation all of 10 x 10, with steps of 32 bytes each.
    tiles, steps = 10 * 10, 2 * dtype.itemsize
    without_mask = 5 * 5 * 2 * steps + tiles * 2 * steps
    decided = 10  # tiles of the last block, two products each
    assert products(0.0) == without_mask + decided * 2 * steps
    assert products(1e-30) == products(0.0)


def test_few_neighbours_one_by_one_are_those_of_tiles():
    """Up to 32 neighbours a row are taken one by one; 33, where more do not reach the threshold, by tiles."""
    case = Case("few", grid=(9, 15), batch=1, heads=2, dim=24, sharpness=9.0)
    inputs, options = make(case, torch.float32)
    options["threshold_grad"] = None
    one_by_one, tiles = (call_and_gradients("cuda", inputs, options | {"topk": topk}) for topk in (32, 33))
    assert torch.equal(one_by_one[3], tiles[3]), "pick other inputs: some row has 33 neighbours"
    for x, y in zip(one_by_one, tiles, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
    assert not any(map(torch.equal, (one_by_one[0], *one_by_one[4:7]), (tiles[0], *tiles[4:7])))  # summed another way


# TF32.


def in_tf32(x: torch.Tensor) -> torch.Tensor:
    """Return float32 rounded to the nearest TF32, ties away from zero."""
    return ((x.contiguous().view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)


SHORT = replace(LONG, grid=(12, 17), heads=1)
TF32_CASES = [SHORT, replace(SHORT, dim=100), named("dense"), named("padding_topk"), named("beta_only")]
each_tf32_case = pytest.mark.parametrize("case", TF32_CASES, ids=["long", "wide", "dense", "topk", "window"])


@on_hopper
@each_tf32_case
def test_tokens_are_rounded_to_tf32(kernel_set, case):
    """Those of the output's gradient too. All kernels of the set read the same numbers."""
    inputs, options = make(case, torch.float32)
    grad_out = torch.randn(*inputs[0].shape[:3], inputs[2].shape[3])
    rounded = [*map(in_tf32, inputs[:3]), *inputs[3:]]
    assert not any(map(torch.equal, inputs[:3], rounded[:3]))
    results = call_and_gradients("cuda", inputs, options, grad_out)
    assert equal(results, call_and_gradients("cuda", rounded, options, in_tf32(grad_out)))


@on_hopper
def test_the_largest_numbers_stay_finite_in_tf32(kernel_set):
    """The nearest TF32 of the largest float32 would be infinite."""
    query, key, value = torch.randn(3, 1, 1, 70, 8).unbind()
    value[0, 0, 3, 2] = torch.finfo(torch.float32).max
    out = asa_attention(query, key, value, impl="cuda", reciprocal=False)
    assert out.isfinite().all() and out[..., 2].abs().min() > 1e30


@on_hopper
@each_tf32_case
def test_float32_takes_the_general_set_where_torch_forbids_tf32(kernel_set, case, monkeypatch):
    inputs, options = make(case, torch.float32)
    coarse = call_and_gradients("cuda", inputs, options)
    torch.set_float32_matmul_precision("highest")
    before = simt.products()
    exact = call_and_gradients("cuda", inputs, options)
    assert simt.products() == before and not equal(coarse, exact)
    monkeypatch.setenv("ASA_OPS_HOPPER", "0")
    assert equal(exact, call_and_gradients("cuda", inputs, options))


@on_hopper
@pytest.mark.parametrize("dims", [(129, 40), (40, 129)], ids=str)
def test_float32_takes_the_general_set_where_its_tiles_would_not_fit(kernel_set, dims, monkeypatch):
    case = Case("wide", grid=(5, 13), batch=1, heads=1, dim=dims[0], dim_v=dims[1])
    inputs, options = make(case, torch.float32)
    before = simt.products()
    results = call_and_gradients("cuda", inputs, options)
    assert simt.products() == before
    monkeypatch.setenv("ASA_OPS_HOPPER", "0")
    assert equal(results, call_and_gradients("cuda", inputs, options))


@on_hopper
def test_a_backward_takes_tf32_where_its_forward_did(kernel_set):
    inputs, options = make(named("plain"), torch.float32)

    def run(forward: str, backward: str) -> list[torch.Tensor]:
        leaves = with_grad(inputs)
        torch.set_float32_matmul_precision(forward)
        out = asa_attention(*leaves, **options, impl="cuda")
        torch.set_float32_matmul_precision(backward)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves[:3])]

    for first, second in (("high", "highest"), ("highest", "high")):
        assert equal(run(first, second), run(first, first))
        assert not equal(run(first, first), run(second, second))


@on_hopper
def test_compiled_calls_follow_the_setting(kernel_set):
    def attend(query, key, value):
        return asa_attention(query, key, value, reciprocal=False, impl="cuda")

    tensors = torch.randn(3, 1, 1, 70, 8).unbind()
    compiled = torch.compile(attend, fullgraph=True, backend="eager")
    results = []
    for setting in ("highest", "high", "highest"):
        torch.set_float32_matmul_precision(setting)
        results.append(compiled(*tensors))
        assert torch.equal(results[-1], attend(*tensors))
    assert torch.equal(results[0], results[2]) and not torch.equal(results[0], results[1])


# The parts: the k-th largest score, the window.


def check_topk(inputs, options, topk: int, **factors) -> None:
    """Exactly the ``topk`` largest scores of every real row survive, but for ties of the last."""
    inputs, options = [*inputs[:3], None, None], options | {"topk": topk, "reciprocal": False}
    check_against_reference("cuda", inputs, options, **factors)
    s, (real_q, _) = exact_scores(inputs, options)
    counts, expected = survivors("cuda", inputs, options).sum(-1), s.isfinite().sum(-1).clamp(max=topk)
    rows = real_q[:, None].expand(counts.shape)
    assert (counts >= expected)[rows].all() and (counts == expected)[rows].double().mean() > 0.99


@pytest.mark.parametrize("topk", [1, 5, 40])
@each_set(torch.float32, slow(torch.bfloat16), torch.float16)
def test_topk(kernel_set, dtype, topk):
    inputs, options = make(named("alpha_only", grid=(9, 15), batch=1, dim=19), dtype)
    inputs, factors = exactly(kernel_set, inputs)
    check_topk(inputs, options, topk, **factors)


@pytest.mark.parametrize("dim", [1, 64, 65, 200, 256])
def test_topk_at_other_head_dims(dim):
    inputs, options = make(Case("wide", grid=(5, 13), batch=1, heads=1, dim=dim), torch.float16)
    check_topk(inputs, options, 7)


@pytest.mark.parametrize("name", ["padding", "more_keys", "fewer_queries_padded", "one_row", "one_column"])
def test_topk_of_cases(name):
    check_topk(*make(named(name), torch.float32), 6)


def test_topk_of_a_row_with_a_nan_ends():
    inputs, _ = make(named("topk_alone", heads=1, batch=1), torch.float32)
    options = {"topk": 60, "reciprocal": False}
    clean = survivors("cuda", inputs, options)
    inputs[0][0, 0, 5, 1] = math.nan
    other = torch.arange(63) != 5
    assert torch.equal(survivors("cuda", inputs, options)[:, :, other], clean[:, :, other])


WINDOWED = ["plain", "head_thresholds", "padding", "window_1", "window_5", "window_wider_than_map"]
WINDOWED += ["one_token", "one_row", "mixed"]


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.float32, name) for name in WINDOWED] + [(x, "padding") for x in HALVES], ids=str
)
def test_window(dtype, name):
    check_against_reference("cuda", *make(named(name, alpha=None), dtype))


def test_a_bad_threshold_gives_nan_where_an_image_has_no_keys_too():
    query, key, mask = torch.randn(2, 1, 5, 4), torch.randn(2, 1, 7, 4), torch.zeros(2, 7, dtype=torch.bool)
    mask[0] = True
    alpha = torch.ones(2, 1, 5)
    alpha[1, 0, 2] = -1
    out = asa_attention(query, key, key, alpha, reciprocal=False, key_padding_mask=mask, impl="cuda")
    assert out[1, 0, 2].isnan().all() and (out[1, 0, [0, 1, 3, 4]] == 0).all() and out[0].isfinite().all()


# Whoever calls the ops directly.


def test_nobody_is_mutual_without_neighbours():
    """Dense attention to more keys, `reciprocal` or not: the public function does not let the first pass."""
    query, key = torch.randn(1, 1, 70, 4, requires_grad=True), torch.randn(1, 1, 130, 4, requires_grad=True)
    forward, results = ops.of("cuda", query.device).fwd, []
    for reciprocal in (True, False):
        out, *_ = forward(query, key, key, None, None, None, [], [3, 3], 0, 0, reciprocal, 0.5, 0.0, True)
        results.append([out, *torch.autograd.grad(out.square().sum(), (query, key))])
    assert equal(*results)


@pytest.mark.parametrize(
    "kernel_set,name,forward,backward",
    [
        ("general", "plain", 6, 6),
        ("general", "alpha_only", 6, 6),
        ("general", "dense", 5, 6),
        ("general", "topk", 6, 3),
        ("general", "one_way", 6, 6),
        ("hopper", "plain", 5, 3),
        ("hopper", "dense", 2, 3),
        ("hopper", "topk", 6, 3),
        ("hopper", "topk_one_way", 6, 3),
        ("hopper", "padding", 5, 3),
        ("hopper", "one_way", 5, 3),
    ],
    indirect=["kernel_set"],
)
@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["float16", "float32"])
def test_launches_of_a_call(kernel_set, name, forward, backward, dtype, learns):
    """What launching costs the host is most of a small call; thresholds that learn take one launch more."""
    if kernel_set == "general" and dtype == torch.float32:
        backward += 2 - (name == "topk")  # sums that correct delta
    inputs, options = make(named(name, batch=1, heads=1), dtype)
    options["threshold_grad"] = "straight_through" if learns else None
    learns = learns and inputs[3:] != [None, None]
    counts = [simt.launches()]
    out = asa_attention(*with_grad(inputs), **options, impl="cuda")
    counts.append(simt.launches())
    out.sum().backward()
    counts.append(simt.launches())
    assert (counts[1] - counts[0], counts[2] - counts[1]) == (forward, backward + learns)


# In processes of their own.

PROGRAM = """
import sys, torch
sys.path.insert(0, {tests!r})
import asa_ops, in_parts, simt
torch.set_float32_matmul_precision({precision!r})
from asa_ops.asa import cuda_part, ops, types
from cases import make, named, op_arguments
from compare import call_and_gradients
simt.load(sanitize={sanitize})
results = []
names = ["padding", "padding_topk", "topk", "one_way", "fewer_queries_padded", "dense", "beta_only"]
for dtype in (torch.float32, torch.float16):
    for name in names:
        changes = dict(dim=70, dim_v=200) if name == "padding" else dict(batch=1) if "padd" not in name else dict()
        changes |= {{}} if "fewer" in name else dict(grid=(9, 8))
        inputs, options = make(named(name, heads=1, **changes), dtype)
        results += asa_ops.reciprocal_neighbors(*inputs[:2], *inputs[3:], **options, impl="cuda")
        options["threshold_grad"] = None if name == "padding_topk" else "straight_through"
        results += call_and_gradients("cuda", inputs, options)
        *given, band, _ = op_arguments(inputs, options)
        of_map, settings = ops.broadcast(types.Inputs(*given[:6])), types.Options.of(*given[6:])
        blocks = [[64] * (-(-x.shape[2] // 64)) for x in inputs[:2]]
        rows, keys = (x + [0] * (max(map(len, blocks)) - len(x)) for x in blocks)
        outputs, found, _ = in_parts.forward(cuda_part.Part, of_map, settings, band, rows, rows, keys)
        gradients = in_parts.backward(cuda_part.Part, of_map, settings, band, rows, keys, found, outputs.out)
        results += [*outputs, *(x for x in gradients if x is not None)]
torch.save(results, {out!r})
"""


def run_elsewhere(out: Path, sanitize: bool = False, **environment: str) -> list[torch.Tensor]:
    """Run a few calls in a process of its own, and return what they gave; by the set of kernels that runs here."""
    precision = torch.get_float32_matmul_precision()
    tests = str(Path(__file__).parents[1])
    program = PROGRAM.format(tests=tests, precision=precision, sanitize=sanitize, out=str(out))
    environment = os.environ | {"PYTHONPATH": str(simt.ROOT)} | environment
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return torch.load(out)


@pytest.mark.slow
@both_sets
def test_the_order_of_threads_does_not_matter(kernel_set, tmp_path):
    """A missing barrier shows as another result."""
    plain = run_elsewhere(tmp_path / "plain")
    backwards = run_elsewhere(tmp_path / "reversed", ASA_OPS_SIMT_REVERSED="1")
    assert len(plain) > 80 and equal(plain, backwards)


@pytest.mark.slow
@both_sets
def test_nothing_out_of_bounds_under_sanitizers(kernel_set, tmp_path):
    compiler = shlex.split(get_cxx_compiler())[0]
    commands = [[compiler, f"-print-file-name={x}.so"] for x in ("libasan", "libubsan")]
    libraries = [subprocess.run(x, check=True, capture_output=True, text=True).stdout.strip() for x in commands]
    simt.build(sanitize=True)
    options = {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0"}
    assert len(run_elsewhere(tmp_path / "sanitized", sanitize=True, **options)) > 80
