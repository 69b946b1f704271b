"""impl="cpu" in particular: instruction sets, threads, and entry points that refuse what they cannot read."""

import pytest
import torch
from cases import Case, each_case, make, named, with_grad
from compare import check_against_reference

from asa_ops import asa_attention
from asa_ops.asa import cpu
from asa_ops.asa.types import Inputs, Options, Saved
from asa_ops.core import extension

CPU = extension.has("asa_cpu_fwd", "CPU")
pytestmark = pytest.mark.skipif(not CPU, reason=str(extension.WHY_MISSING))
SETS = ["portable", "avx2", "avx512"]


def best_only(test):
    """Run a test that takes long on this machine's best instruction set only, the others with `make test-all`."""
    best = torch.ops.asa_ops.cpu_isa() if CPU else 0
    sets = [pytest.param(x, marks=[] if i == best else [pytest.mark.slow]) for i, x in enumerate(SETS)]
    return pytest.mark.parametrize("instruction_set", sets, indirect=True)(test)


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


@best_only
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(named("plain", grid=(40, 47)), id="plain", marks=pytest.mark.slow),
        pytest.param(named("mixed", grid=(40, 47), dim=64, batch=1, heads=1), id="mixed"),
    ],
)
def test_lists_longer_than_a_stretch(instruction_set, case):
    check_against_reference("cpu", *make(case, torch.float32))


def rows_of_any_density(n: int, dim: int, dtype: torch.dtype) -> tuple[list, dict]:
    """Every other stretch of 16 rows keeps up to everybody, so whole rows and lists meet in one block."""
    query, key, value = torch.randn(3, 1, 1, n, dim, dtype=torch.float64)
    row = torch.arange(n)
    alpha = torch.where(row // 16 % 2 == 0, 0.3 * torch.rand(n), 1.5 + torch.rand(n))
    return [query.to(dtype), key.to(dtype), value.to(dtype), alpha[None, None].to(dtype), None], {"reciprocal": False}


def fractions_of_rows(inputs, options) -> torch.Tensor:
    _, stats = asa_attention(*inputs, **options, impl="cpu", return_stats=True)
    return stats.survivors[0, 0] / inputs[1].shape[2]


@pytest.mark.parametrize("dim", [16, 33, 96])
def test_dense_rows_beside_sparse_ones(instruction_set, dim):
    inputs, options = rows_of_any_density(301, dim, torch.float32)
    fractions = fractions_of_rows(inputs, options)
    assert (fractions > 0.6).sum() > 100 and (fractions < 0.15).sum() > 100  # whole rows from a quarter on
    check_against_reference("cpu", inputs, options)


def test_lists_as_long_as_they_get(instruction_set):
    """A quarter of all keys in every row, the most that lists are made for."""
    inputs = [*torch.randn(3, 1, 1, 1028, 16), None, None]
    options = {"topk": 257, "reciprocal": False}
    assert (fractions_of_rows(inputs, options) == 0.25).double().mean() > 0.9  # but for ties
    check_against_reference("cpu", inputs, options)


@pytest.mark.parametrize("topk", [128, 256])
@pytest.mark.parametrize("reciprocal", [False, True])
def test_threshold_gradients_beside_a_kth_largest_score_near_0(instruction_set, topk, reciprocal):
    query, key, value = torch.randn(3, 1, 1, 512, 64, dtype=torch.float64)
    inputs = [query, key, value, 1 + torch.rand(1, 1, 512, dtype=torch.float64), None]
    options = {"topk": topk, "reciprocal": reciprocal, "threshold_grad": "straight_through"}
    gradients = []
    for impl in ("cpu", "reference"):
        leaves = with_grad(inputs)
        asa_attention(*leaves, **options, impl=impl).square().sum().backward()
        gradients.append(leaves[3].grad)
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-11)


def test_gradient_of_an_empty_row_among_dense_ones_goes_nowhere():
    query, key, value = torch.randn(3, 1, 1, 64, 16)
    alpha = torch.zeros(1, 1, 64).index_fill(2, torch.tensor([5]), torch.inf)
    gradients = []
    for upstream in (1.0, torch.nan):
        leaves = with_grad([query, key, value])
        out = asa_attention(*leaves, alpha, reciprocal=False, impl="cpu")
        out.backward(torch.ones_like(out).index_fill(2, torch.tensor([5]), upstream))
        gradients.append([x.grad for x in leaves])
    assert all(torch.equal(x, y) for x, y in zip(*gradients, strict=True))


def test_a_nan_key_before_a_long_stretch_of_padding_is_seen():
    query, key, value = torch.randn(3, 1, 1, 400, 512)
    key[0, 0, 0] = torch.nan
    mask = torch.ones(1, 400, dtype=torch.bool)
    mask[0, 1:100] = False
    out = asa_attention(query, key, value, torch.ones(1, 1, 400), key_padding_mask=mask, impl="cpu")
    assert torch.equal(out.isnan().any(-1)[0, 0], mask[0])


def test_a_window_that_nobody_uses_costs_nothing():
    inputs = with_grad([*torch.randn(3, 1, 1, 64, 16), torch.ones(1, 1, 64)])
    out = asa_attention(*inputs, window=10**9 + 1, threshold_grad="straight_through", impl="cpu")
    out.sum().backward()


@pytest.mark.parametrize("reciprocal", [False, True])
def test_survivors_of_a_backward_in_more_than_one_slab(reciprocal):
    """The backward holds 64 MB of survivors at a time, 3.4 million in float64."""
    inputs, _ = rows_of_any_density(3000, 8, torch.float64)
    options = {"reciprocal": reciprocal, "threshold_grad": "straight_through"}
    gradients = []
    for impl in ("cpu", "blocked"):
        leaves = with_grad(inputs)
        out, stats = asa_attention(*leaves, **options, impl=impl, return_stats=True)
        out.square().sum().backward()
        gradients.append([x.grad for x in leaves if x is not None])
    assert reciprocal or stats.survivors.sum() > 3.5e6
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-11)


def test_unknown_instruction_set_is_refused(monkeypatch):
    monkeypatch.setenv("ASA_OPS_CPU_ISA", "mmx")
    with pytest.raises(RuntimeError, match="ASA_OPS_CPU_ISA must be portable, avx2 or avx512, got mmx"):
        torch.ops.asa_ops.cpu_isa()


def test_bitwise_equal_over_thread_counts_on_a_large_map():
    """Here the number of threads also decides how many rows one of them takes at a time."""
    check_bitwise_equal_over_thread_counts(*rows_of_any_density(4300, 16, torch.float32))


@each_case
def test_bitwise_equal_over_thread_counts(case):
    check_bitwise_equal_over_thread_counts(*make(case, torch.float32))


def check_bitwise_equal_over_thread_counts(inputs, options):
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 16):
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
    saved = Saved.new(inputs, options, "cpu", keep_bits=True)
    schema = torch.ops.asa_ops.asa_cpu_fwd.default._schema
    values = [*cpu._prepare(inputs), options.numbers(), list(saved)]
    return dict(zip([argument.name for argument in schema.arguments], values, strict=True))


SAVED = {name: i for i, name in enumerate(Saved._fields)}
OPTIONS = {"height": 0, "window": 2, "topk": 3, "reciprocal": 4, "band": 6}
REFUSED = {
    "dtype": ("query", lambda x: x.half(), "query must be float32 or float64"),
    "other dtype": ("value", lambda x: x.double(), "value must be of the dtype expected"),
    "rank": ("key", lambda x: x[0], r"must be \[B, heads, N, D\]"),
    "rows": ("value", lambda x: x[:, :, :9].contiguous(), "value must be of the shape expected"),
    "heads": ("key", lambda x: x[:, :1].contiguous(), "key must be of the shape expected"),
    "strides": ("query", lambda x: x.mT.contiguous().mT, "query must be contiguous"),
    "alpha": ("alpha", lambda x: x[..., :9].contiguous(), "alpha must be of the shape expected"),
    "beta dtype": ("beta", lambda x: x.double(), "beta must be of the dtype expected"),
    "options": ("options", lambda x: x[:6], "options must be height, width, window"),
    "grid": ("height", lambda x: x + 1, r"height \* width must be N"),
    "half a pixel": ("height", lambda x: x + 0.5, "height must be a whole number"),
    "window": ("window", lambda x: 2, "window must be odd"),
    "topk": ("topk", lambda x: 25, "topk must be between 0 and N_k"),
    "negative topk": ("topk", lambda x: -1, "topk must be a whole number of at least 0"),
    "reciprocal": ("reciprocal", lambda x: 0.5, "reciprocal must be 0 or 1"),
    "band": ("band", lambda x: torch.nan, "band must be at least 0"),
    "saved": ("saved", lambda x: x[:9], "saved must be the ten tensors"),
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
    given, key = call, argument
    for part, places in (("saved", SAVED), ("options", OPTIONS)):
        if argument in places:
            given, key = call[part], places[argument]
    given[key] = change(given[key])
    with pytest.raises(RuntimeError, match=message):
        torch.ops.asa_ops.asa_cpu_fwd(**call)


def test_backward_and_neighbors_refuse_numbers_that_do_not_fit():
    """They say where survivors are written, so wrong ones would write out of bounds."""
    call = kernel_call()
    torch.ops.asa_ops.asa_cpu_fwd(**call)
    given = [value for name, value in call.items() if name not in ("not_finite", "saved")]
    saved = Saved(*call["saved"])
    offsets = torch.nn.functional.pad(saved.survivors.flatten().long().cumsum(0), (1, 0))
    columns = torch.empty(int(offsets[-1]), dtype=torch.int32)
    gradients = [torch.empty_like(x) for x in given[:3]]

    def neighbors(offsets, saved=saved):
        torch.ops.asa_ops.asa_cpu_neighbors(*given, list(saved), offsets, columns)

    def backward(survivors):
        kept = list(saved._replace(survivors=survivors))
        torch.ops.asa_ops.asa_cpu_bwd(torch.ones_like(saved.out), *given, kept, *gradients, None, None)

    neighbors(offsets)
    backward(saved.survivors)
    with pytest.raises(RuntimeError, match="bits must be those of a forward pass that kept them"):
        neighbors(offsets, saved._replace(bits=saved.bits[..., :0]))
    with pytest.raises(RuntimeError, match="numbers of survivors"):
        neighbors(torch.cat([offsets[:1], offsets[1:-1] + 1, offsets[-1:]]))
    with pytest.raises(RuntimeError, match="numbers of survivors"):
        backward(saved.survivors + 1)
    with pytest.raises(RuntimeError, match="row_offsets must be ascending from 0"):
        neighbors(torch.cat([offsets[:1], -offsets[1:-1], offsets[-1:]]))
    with pytest.raises(RuntimeError, match="survivors must be between 0 and N_k"):
        backward(saved.survivors - 100)
    with pytest.raises(RuntimeError, match="survivors must be of the shape expected"):
        backward(saved.survivors[:1].contiguous())
    with pytest.raises(RuntimeError, match="dalpha and dbeta must be given with alpha and beta only"):
        torch.ops.asa_ops.asa_cpu_bwd(
            torch.ones_like(saved.out), *given[:3], None, *given[4:], list(saved), *gradients, given[3].clone(), None
        )
    with pytest.raises(RuntimeError, match="band must be positive where a threshold learns"):
        torch.ops.asa_ops.asa_cpu_bwd(
            torch.ones_like(saved.out), *given, list(saved), *gradients, given[3].clone(), None
        )


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
