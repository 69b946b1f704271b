"""The Triton and CUDA C++ kernels on a GPU: what the CPU cannot show. Run by ``make gpu``, skipped without a GPU.

bfloat16 and TF32, every row of the table of configurations against float64, sizes beyond the range of 32-bit indices
and of a grid's second axis, memory, bitwise repeats, CUDA graphs, streams, host synchronisation.
"""

import functools
import math
from dataclasses import replace
from unittest import mock

import in_parts
import pytest
import torch
from cases import CASES, Case, make, named, with_grad
from compare import (
    NAMES,
    call_and_gradients,
    check_against_reference,
    check_errors,
    check_threshold_gradients,
    equal,
    exact_results,
    in_gaps,
    survivors,
    uncertain_pairs,
)
from gpu_cases import configured, each_configuration

import asa_ops
from asa_ops import asa_attention, reciprocal_neighbors
from asa_ops.asa import reference
from asa_ops.core import devices, triton_launch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICE = "cuda"
# More heads: the error rule compares maxima, which should be taken over many numbers, hundreds of rows at least.
LEARNING = [
    replace(case, heads=case.heads * max(4, 512 // (case.batch * case.heads * math.prod(case.grid))))
    for case in CASES
    if case.batch and (case.alpha or case.beta)
]


@pytest.fixture(params=["triton", "cuda"])
def impl(request):
    if request.param == "cuda" and (reason := devices.why_no_cuda_on("asa", torch.device(DEVICE))):
        pytest.skip(reason)
    return request.param


def attend(impl, *inputs, **options):
    return asa_attention(*inputs, **options, impl=impl)


# Parts of a map.


@pytest.mark.parametrize("variant", ["plain", "one_way", "topk", "padding", "dense"])
@pytest.mark.parametrize(
    ("dim", "dtype", "band"),
    [(64, torch.bfloat16, 2.0), (128, torch.bfloat16, 0.0), (256, torch.bfloat16, 2.0), (64, torch.float32, 2.0),
     (64, torch.float16, 0.0)],
    ids=str,
)  # fmt: skip
def test_parts_are_one_call_on_a_gpu(dim, dtype, band, variant):
    """As processes of one kind of GPU compute them, to the last bit: eight blocks of 128 rows, over four."""
    from asa_ops.asa.triton.part import Part

    inputs, options = in_parts.arguments(configured(dim, variant), dtype, DEVICE)
    scanned, rows = [128, 512, 0, 384], [256, 128, 640, 0]
    in_parts.check(Part, in_parts.triton_call, inputs, options, band, scanned, rows, rows)


# Against the reference.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("case", LEARNING, ids=lambda case: case.name)
def test_gradients_of_thresholds_in_gaps(impl, dtype, case):
    inputs, options = make(case, dtype, device=DEVICE)
    check_threshold_gradients(impl, in_gaps(inputs, options), options, band=1.3, others=True)


def check_query_is_key(impl, inputs, options) -> None:
    """Check a call that is given one tensor for both, whose gradient is the sum of two; survivors are certain."""
    _, _, value, alpha, beta = inputs
    grad_out = torch.randn(value.shape, dtype=torch.float64).to(value)

    def run(name, dtype):
        x, v = (y.detach().to(dtype).requires_grad_() for y in (inputs[0], value))
        thresholds = [y if dtype == value.dtype else y.double() for y in (alpha, beta)]
        out = asa_attention(x, x, v, *thresholds, **options, impl=name)
        return out.detach(), *torch.autograd.grad(out, (x, v), grad_out.to(dtype))

    names = ("out", "grad of query and key", "grad of value")
    check_errors(names, run(impl, value.dtype), lambda: run("reference", torch.float64), torch.float32)


@each_configuration
def test_configuration(impl, row, variant, monkeypatch):
    dim, dtype, arch = row
    if arch and impl == "cuda":
        pytest.skip("this row is of Triton's table")
    if arch:
        monkeypatch.setattr(triton_launch, "architecture", lambda device: arch)
    inputs, options = make(configured(dim, variant), dtype, device=DEVICE)
    if variant == "query_is_key":
        inputs[1] = inputs[0]
    check_against_reference(impl, inputs, options)
    if variant != "dense":
        inputs = in_gaps(inputs, options)
        check_threshold_gradients(impl, inputs, options, others=True)
    if variant == "query_is_key":
        check_query_is_key(impl, inputs, options)


@pytest.fixture
def tf32():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


TF32_EPS = 2.0**-10


@pytest.mark.parametrize("variant", ["plain", "one_way", "topk", "dense", "ragged"])
@pytest.mark.parametrize("dim", [64, 256])
def test_configuration_tf32(dim, variant, tf32):
    """The error rule with TF32 as the precision of all steps."""
    inputs, options = make(configured(dim, variant), torch.float32, device=DEVICE)
    kept = survivors("triton", inputs, options)
    # Operands are cut to 11 bits: scores are off by about 2^-10 of themselves. 16 sqrt(D) is the margin's own factor.
    expected, uncertain = uncertain_pairs(inputs, options, TF32_EPS / (4 * inputs[0].shape[-1] ** 0.5))
    assert torch.equal(kept[~uncertain], expected[~uncertain])
    assert (~uncertain).double().mean() > 0.8
    leaves = with_grad(inputs[:3])
    grad_out = torch.randn(*leaves[0].shape[:3], leaves[2].shape[3]).to(DEVICE)
    torch.set_float32_matmul_precision("high")
    out = attend("triton", *leaves, *inputs[3:], **options)
    ours = out, *torch.autograd.grad(out, leaves, grad_out)
    exact = functools.partial(exact_results, inputs, options, kept, grad_out)
    check_errors(NAMES, ours, lambda: exact()[: len(ours)], torch.float16)  # which rounds to the 11 bits of TF32
    if variant != "dense":
        gradients = call_and_gradients("triton", inputs, options)[4:]
        assert all(x.isfinite().all() and x.any() for x in gradients)


# Large sizes.


def test_more_pairs_than_a_32_bit_index_can_name(impl):
    """N = 46,400: N^2 exceeds 2^31. Sampled rows against float64; only these have an incoming gradient."""
    height, width, dim = 200, 232, 32
    n = height * width
    generator = torch.Generator(DEVICE).manual_seed(0)

    def normal(size):
        return (torch.randn(1, 1, n, dim, device=DEVICE, generator=generator) * size).bfloat16()

    query, key, value = normal(1.3), normal(1.3), normal(1.0)
    alpha = torch.empty(1, 1, n, device=DEVICE).uniform_(0.8, 2, generator=generator)
    beta = torch.empty(1, 1, n, device=DEVICE).uniform_(0.5, 1.5, generator=generator)
    leaves = with_grad([query, key, value])
    out, stats = attend(impl, *leaves, alpha, beta, grid=(height, width), return_stats=True)

    q, k = query[0, 0].double(), key[0, 0].double()
    lse = torch.cat([(q[i : i + 1024] @ k.mT * dim**-0.5).logsumexp(-1) for i in range(0, n, 1024)])
    torch.testing.assert_close(stats.lse[0, 0].double(), lse, rtol=1e-6, atol=1e-5)

    rows = torch.randint(n, (396,), device=DEVICE, generator=generator).tolist()
    rows = torch.tensor(sorted({0, 1, n - 2, n - 1, *rows}), device=DEVICE)
    s, back = q[rows] @ k.mT * dim**-0.5, k[rows] @ q.mT * dim**-0.5
    margin = 16 * torch.finfo(torch.float32).eps * max(s.abs().max(), back.abs().max()) * dim**0.5
    log_alpha, log_beta = (alpha[0, 0].double() / n).log(), beta[0, 0].double().log()
    token = torch.arange(n, device=DEVICE)
    near = ((rows // width)[:, None] - token // width).abs() <= 1
    near &= ((rows % width)[:, None] - token % width).abs() <= 1
    log_mean = s.masked_fill(~near, -torch.inf).logsumexp(-1) - near.sum(-1).double().log()
    above = (
        s - (lse + log_alpha)[rows, None],
        back - (lse + log_alpha)[None, :],
        s - (log_mean + log_beta[rows])[:, None],
    )
    expected = ((above[0] > 0) & (above[1] > 0)) | (near & (above[2] > 0))
    uncertain = (above[0].abs() <= margin) | (above[1].abs() <= margin) | (near & (above[2].abs() <= margin))

    offsets, columns = reciprocal_neighbors(query, key, alpha, beta, grid=(height, width), impl=impl)
    assert torch.equal(offsets.diff(), stats.survivors.flatten().long())
    kept = torch.zeros_like(expected)
    for i, row in enumerate(rows.tolist()):
        kept[i, columns[offsets[row] : offsets[row + 1]].long()] = True
    assert torch.equal(kept.sum(-1), stats.survivors[0, 0, rows].long())
    assert torch.equal(kept[~uncertain], expected[~uncertain]) and (~uncertain).double().mean() > 0.99
    assert 0.001 < kept.double().mean() < 0.5

    grad_rows = torch.randn(1, 1, len(rows), dim, device=DEVICE, generator=generator).bfloat16()
    grad_out = torch.zeros_like(out)
    grad_out[:, :, rows] = grad_rows
    ours = out[:, :, rows], *torch.autograd.grad(out, leaves, grad_out)
    everybody = torch.ones(1, n, dtype=torch.bool, device=DEVICE)

    def exact():
        q, k, v = (x.detach().double().requires_grad_() for x in (query, key, value))
        s = reference.scores(q[:, :, rows], k, None, everybody[:, rows], everybody)
        out, _ = reference.attend(s, v, kept[None, None])
        return out.detach(), *torch.autograd.grad(out, (q, k, v), grad_rows.double())

    check_errors(NAMES, ours, exact, torch.float32)


def test_more_heads_than_a_grid_axis_takes(impl):
    """70,000 heads: the second and third axis of a grid end at 65,535."""
    case = Case("heads", grid=(4, 4), batch=2, heads=35_000, dim=16, dim_v=16)
    inputs, options = make(case, torch.bfloat16, device=DEVICE)
    check_against_reference(impl, inputs, options)
    assert all(x.isfinite().all() for x in call_and_gradients(impl, inputs, options)[4:])


# Memory.


def extra_memory(impl, n: int, heads: int, dim: int, backward: bool, learn: bool) -> tuple[int, int]:
    """Return the bytes that a call takes at its peak beside inputs, output and gradients: held, and asked for."""
    side = int(n**0.5)
    query, key, value = torch.randn(3, 1, heads, n, dim, device=DEVICE).bfloat16()
    thresholds = [torch.full((1, heads, n), 1.5, device=DEVICE) for _ in range(2)]
    leaves = [x.clone().requires_grad_(backward) for x in (query, key, value)]
    leaves += [x.requires_grad_(learn) for x in thresholds]
    grad_out = torch.randn_like(value)
    wanted = [x for x in leaves if x.requires_grad]
    options = {"grid": (side, side), "threshold_grad": "straight_through" if learn else None}

    def run():
        out = attend(impl, *leaves, **options)
        return (out, *torch.autograd.grad(out, wanted, grad_out)) if wanted else (out,)

    returned = sum(x.numel() * x.element_size() for x in run())  # which also compiles
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_stats()["requested_bytes.all.current"]
    run()
    after = torch.cuda.max_memory_allocated(), torch.cuda.memory_stats()["requested_bytes.all.peak"]
    return after[0] - before[0] - returned, after[1] - before[1] - returned


def bytes_of_a_token(dim: int) -> int:
    """Return the constant of the cap's O(N D): what is held for a token of a head beside bits and maxima, bfloat16.

    Parts of sums in float32, at most 4 each of dq, dk and dv (the backward; the forward has those of out). Tokens in
    order: q, k, v, do. What rounding took from the output. Sums of exponentials and maxima of at most 8 parts, lse,
    thresholds, counts, orders, local survivors of a 3 x 3 window and so on, single numbers: less than 256 bytes.
    """
    return 4 * 3 * 4 * dim + 2 * 4 * dim + 2 * dim + 256


@pytest.mark.parametrize("mode", ["forward", "backward", "learning"])
@pytest.mark.parametrize(("n", "heads", "dim"), [(4096, 1, 256), (9409, 1, 256), (9409, 3, 64), (16384, 1, 64)])
def test_memory_stays_below_the_cap(impl, n, heads, dim, mode):
    """N^2 / 8 bytes of bits, N^2 / 32 of block maxima, and O(N D), for every head and image."""
    held, asked_for = extra_memory(impl, n, heads, dim, backward=mode != "forward", learn=mode == "learning")
    padded = (n + 127) // 128 * 128
    rounding = 30 * 2**20  # the allocator may hand out up to 1 MiB more than it is asked for, about 30 times
    cap = heads * (padded**2 / 8 + padded**2 / 32 + padded * bytes_of_a_token(dim))
    assert 0 < asked_for <= cap, f"{asked_for / 1e6:.1f} MB, the cap is {cap / 1e6:.1f} MB"
    assert held <= cap + rounding, f"{held / 1e6:.1f} MB, the cap is {cap / 1e6:.1f} MB"


@pytest.mark.parametrize("mode", ["forward", "backward", "learning"])
def test_memory_quadratic_in_n_is_bits_and_maxima(mode):
    """From two sizes, exactly: what is linear in N cancels if no work is split, whatever the device."""
    with mock.patch.object(triton_launch, "processors", lambda device: 1):
        settings = {"heads": 2, "dim": 32, "backward": mode != "forward", "learn": mode == "learning"}
        small, large = (extra_memory("triton", n, **settings)[1] for n in (64**2, 128**2))
    quadratic = (large - 4 * small) / 2 / (128**4 - 4 * 64**4)
    linear = (small / 2 - quadratic * 64**4) / 64**2
    # Lists and flags of tiles of 64 x 64 and more pairs take a few bytes each, N^2 / 512 at most.
    assert quadratic <= 1 / 8 + 1 / 32 + 1 / 512, f"{quadratic:.5f} N^2 + {linear:.0f} N bytes a head"
    assert linear <= bytes_of_a_token(32)


# Repeats, graphs, streams.


def moderate(grid=(33, 31), heads=2, dim=64, dtype=torch.bfloat16):
    return make(Case("moderate", grid=grid, batch=1, heads=heads, dim=dim, dim_v=dim), dtype, device=DEVICE)


def differences(first, again):
    """Count, without waiting for the device, in how many tensors a bit differs."""
    return sum((x != y).any().long() for x, y in zip(first, again, strict=True))


@pytest.mark.parametrize("busy", [False, True], ids=["alone", "beside_other_work"])
@pytest.mark.parametrize(("grid", "heads", "dim", "times"), [((33, 31), 2, 64, 1000), ((64, 64), 1, 256, 200)])
def test_repeats_bitwise_beside_other_work(impl, grid, heads, dim, times, busy):
    inputs, options = moderate(grid, heads, dim)
    first = call_and_gradients(impl, inputs, options, torch.ones_like(inputs[2]))
    other = torch.cuda.Stream()
    a = torch.randn(2048, 2048, device=DEVICE, dtype=torch.bfloat16)
    count = torch.zeros((), dtype=torch.long, device=DEVICE)
    torch.cuda.synchronize()
    for i in range(times // 4 if busy else times):
        if busy:  # work of changing length, so that programs end in changing order
            with torch.cuda.stream(other):
                for _ in range(1 + i % 3):
                    torch.mm(a, a)
        count += differences(first, call_and_gradients(impl, inputs, options, torch.ones_like(inputs[2])))
    torch.cuda.synchronize()
    assert count.item() == 0


THRESHOLDS = ["spread", "zero", "inf", "mixed"]  # from everybody to nobody: the graph must hold them all


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("name", ["plain", "topk", "one_way", "padding", "dense"])
def test_cuda_graph_replays_with_changed_inputs(impl, name, backward):
    changes = {"grid": (33, 31), "dim": 64, "dim_v": 64}

    def fresh(seed):
        case = named(name, **changes)
        if case.alpha is not None:
            case = named(name, **changes, alpha=THRESHOLDS[seed % 4], beta=THRESHOLDS[seed % 3])
        return make(case, torch.bfloat16, seed, DEVICE)

    static, options = fresh(0)

    def run(inputs):
        if backward:
            return call_and_gradients(impl, inputs, options, torch.ones_like(inputs[2]))
        return [attend(impl, *inputs, **options)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(static)
    for seed in range(1, 6):
        values, fresh_options = fresh(seed)
        if "key_padding_mask" in options:
            options["key_padding_mask"].copy_(fresh_options["key_padding_mask"])
        for x, y in zip(static, values, strict=True):
            if x is not None:
                x.copy_(y)
        graph.replay()
        torch.cuda.synchronize()
        assert equal(captured, run(values)), f"replay {seed}"


def test_runs_on_the_current_stream(impl):
    inputs, options = moderate()
    expected = attend(impl, *inputs, **options)
    late = [torch.zeros_like(x) for x in inputs]
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # inputs arrive when a call on another stream would be over
        for x, y in zip(late, inputs, strict=True):
            x.copy_(y)
        out = attend(impl, *late, **options)
    stream.synchronize()
    assert torch.equal(out, expected)


@pytest.mark.parametrize("name", ["plain", "topk", "one_way", "padding", "dense", "beta_only", "all_empty"])
def test_never_waits_for_the_device(impl, name):
    """Forward, statistics and backward enqueue work and return."""
    inputs, options = make(named(name), torch.bfloat16, device=DEVICE)
    call_and_gradients(impl, inputs, options)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        call_and_gradients(impl, inputs, options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# With the rest of PyTorch.


def test_auto_takes_triton():
    inputs, options = moderate()
    assert ": triton" in asa_ops.explain(inputs[0]).splitlines()[0]
    assert torch.equal(asa_attention(*inputs, **options), attend("triton", *inputs, **options))


def test_what_it_cannot_run_is_named(impl):
    x = torch.randn(1, 1, 9, 8, device=DEVICE, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="float64"):
        attend(impl, x, x, x)
    wide = torch.randn(1, 1, 9, 257, device=DEVICE)
    with pytest.raises(RuntimeError, match="head dims up to 256, got 257"):
        attend(impl, wide, wide, wide)
    for y in (x, wide):  # without an explicit choice something else runs
        torch.testing.assert_close(asa_attention(y, y, y), asa_attention(y, y, y, impl="reference"))
    with pytest.raises(ValueError, match="device of query"):
        attend(impl, x.float(), x.float().cpu(), x.float())


def test_misaligned_views_give_the_same(impl):
    """Tensors that start between multiples of 16 bytes, which kernels compiled for aligned pointers may not read."""
    inputs, options = moderate()
    expected = attend(impl, *inputs, **options)

    def shifted(x):
        flat = x.new_empty(x.numel() + 1)
        flat[1:] = x.flatten()
        return flat[1:].view(x.shape)

    moved = [shifted(x) for x in inputs]
    assert all(x.data_ptr() % 16 for x in moved)
    assert torch.equal(attend(impl, *moved, **options), expected)


def test_compiles_without_a_graph_break(impl):
    inputs, options = moderate(dtype=torch.float32)

    def step(query, key, value, alpha, beta):
        out = attend(impl, query, key, value, alpha.exp(), beta.exp(), **options, threshold_grad="straight_through")
        return out.square().sum()

    results = []
    for run in (step, torch.compile(step, fullgraph=True)):
        leaves = with_grad(inputs)
        loss = run(*leaves)
        loss.backward()
        results.append([loss.detach(), *(x.grad for x in leaves)])
    torch.testing.assert_close(*results)


def test_autocast_casts_tokens_and_keeps_thresholds(impl):
    inputs, options = moderate(dtype=torch.float32)
    leaves = with_grad(inputs)
    with torch.autocast(DEVICE, torch.bfloat16):
        out = attend(impl, *leaves, **options)
    tokens = with_grad([x.bfloat16() for x in inputs[:3]])
    expected = attend(impl, *tokens, *inputs[3:], **options)
    assert out.dtype == torch.bfloat16 and torch.equal(out, expected)
    grad_out = torch.randn_like(out)
    grads = torch.autograd.grad(out, leaves[:3], grad_out)
    for x, y in zip(grads, torch.autograd.grad(expected, tokens, grad_out), strict=True):
        assert x.dtype == torch.float32 and torch.equal(x, y.float())
