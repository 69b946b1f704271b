"""impl="cpu" in particular: instruction sets, threads, and entry points that refuse what they cannot read."""

import pytest
import torch
from cases import Case, each_case, make, named, with_grad
from compare import check_against_reference

from asa_ops import asa_attention, extension
from asa_ops.asa import cpu
from asa_ops.asa.types import Inputs, Options, Saved

pytestmark = pytest.mark.skipif(not extension.has("asa_cpu_fwd"), reason=str(extension.WHY_MISSING))
SETS = ["portable", "avx2", "avx512"]


@pytest.fixture(params=SETS)
def instruction_set(request, monkeypatch):
    best = torch.ops.asa_ops.cpu_isa()
    if SETS.index(request.param) > best:
        pytest.skip(f"this machine has {SETS[best]} at best")
    monkeypatch.setenv("ASA_OPS_CPU_ISA", request.param)
    assert torch.ops.asa_ops.cpu_isa() == SETS.index(request.param)


@each_case
def test_every_instruction_set_equals_the_reference(instruction_set, case):
    check_against_reference("cpu", *make(case, torch.float32))


@each_case
def test_threshold_gradients_of_every_instruction_set(instruction_set, case):
    inputs, options = make(case)
    results = []
    for impl in ("cpu", "reference"):
        leaves = with_grad(inputs)
        asa_attention(*leaves, **options, threshold_grad="straight_through", impl=impl).square().sum().backward()
        results.append([x.grad for x in leaves if x is not None])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("dim", [1, 3, 16, 77, 512])
def test_any_head_dim(instruction_set, dim):
    check_against_reference("cpu", *make(Case("dim", dim=dim, dim_v=dim + 1, grid=(11, 12)), torch.float32))


@pytest.mark.parametrize(
    "case", [named("plain", grid=(40, 47)), named("mixed", grid=(40, 47), dim=64)], ids=["plain", "mixed"]
)
def test_lists_longer_than_a_chunk(instruction_set, case):
    check_against_reference("cpu", *make(case, torch.float32))


def test_unknown_instruction_set_is_refused(monkeypatch):
    monkeypatch.setenv("ASA_OPS_CPU_ISA", "mmx")
    with pytest.raises(RuntimeError, match="ASA_OPS_CPU_ISA must be portable, avx2 or avx512, got mmx"):
        torch.ops.asa_ops.cpu_isa()


@each_case
def test_bitwise_equal_over_thread_counts(case):
    inputs, options = make(case, torch.float32)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            leaves = with_grad(inputs)
            learn = {"threshold_grad": "straight_through"}
            out, stats = asa_attention(*leaves, **options, **learn, impl="cpu", return_stats=True)
            out.square().sum().backward()
            results.append([out.detach(), *stats, *(x.grad for x in leaves if x is not None)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def kernel_call():
    """Return a valid call of asa_cpu_fwd as a dict of its arguments."""
    inputs, options = make(named("plain", grid=(4, 6), dim=16, dim_v=32), torch.float32)
    inputs = Inputs(*inputs, None)
    options = Options(options["grid"], 3, 0, True, 0.3)
    saved = Saved.new(inputs, options, cpu.bits_shape(24, 24), keep_bits=True)
    prepared = cpu._prepare(inputs)
    schema = torch.ops.asa_ops.asa_cpu_fwd.default._schema
    values = [*prepared, *cpu._scalars(options), *saved]
    return dict(zip([argument.name for argument in schema.arguments], values, strict=True))


REFUSED = {
    "dtype": ("q", lambda x: x.half(), "q must be float32 or float64"),
    "other dtype": ("v", lambda x: x.double(), "v must be of the dtype expected"),
    "rank": ("k", lambda x: x[0], r"must be \[B, heads, N, D\]"),
    "rows": ("v", lambda x: x[:, :, :9].contiguous(), "v must be of the shape expected"),
    "heads": ("k", lambda x: x[:, :1].contiguous(), "k must be of the shape expected"),
    "strides": ("q", lambda x: x.mT.contiguous().mT, "q must be contiguous"),
    "alpha": ("alpha", lambda x: x[..., :9].contiguous(), "alpha must be of the shape expected"),
    "beta dtype": ("beta", lambda x: x.double(), "beta must be of the dtype expected"),
    "grid": ("height", lambda x: x + 1, r"height \* width must be N"),
    "window": ("window", lambda x: 2, "window must be odd"),
    "topk": ("topk", lambda x: 25, "topk must be between 0 and N_k"),
    "out": ("out", lambda x: x[..., :2].contiguous(), "out must be of the shape expected"),
    "survivors": ("survivors", lambda x: x.long(), "survivors must be of the dtype expected"),
    "bits": ("bits", lambda x: x[..., :24].contiguous(), "bits must be of the shape expected"),
    "local": ("local", lambda x: x[..., :4].contiguous(), "local must be of the shape expected"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_entry_point_refuses(name):
    argument, change, message = REFUSED[name]
    call = kernel_call()
    torch.ops.asa_ops.asa_cpu_fwd(**call)
    call[argument] = change(call[argument])
    with pytest.raises(RuntimeError, match=message):
        torch.ops.asa_ops.asa_cpu_fwd(**call)


def test_auto_prefers_it():
    (query, *_), _ = make(named("plain"), torch.bfloat16)
    import asa_ops

    assert asa_ops.explain(query).splitlines()[0].endswith(": cpu")


@pytest.mark.slow
def test_agrees_with_blocked_at_65536():
    n = 65536
    query, key = (torch.randn(1, 1, n, 80) * 1.5 for _ in range(2))
    value, alpha = torch.randn(1, 1, n, 3), torch.full((1, 1, n), 4.0)
    results = [asa_attention(query, key, value, alpha, impl=impl, return_stats=True) for impl in ("cpu", "blocked")]
    (out, stats), (expected, expected_stats) = results
    same = stats.survivors == expected_stats.survivors  # rounding decides a few pairs of 4e9
    assert same.double().mean() > 0.98
    torch.testing.assert_close(out[same], expected[same], rtol=1e-4, atol=1e-4 * expected.abs().max().item())
