"""Every implementation against the reference, on the same cases."""

import pytest
import simt
import torch
from cases import CASES, Case, each_case, make, named, with_grad
from compare import check_against_reference, check_threshold_gradients, survivors

from asa_ops import asa_attention
from asa_ops.asa import blocked
from asa_ops.asa.bits import bit_columns, pack_bits, unpack_bits
from asa_ops.core import devices

IMPLEMENTATIONS = ["blocked", "cpu"]
# With a GPU there is test_gpu.py.
INTERPRETED = ["triton"] if devices.triton_is_interpreted() else []
EMULATED = ["cuda"] if simt.AVAILABLE else []
each_impl = pytest.mark.parametrize("impl", IMPLEMENTATIONS)


@pytest.fixture(scope="module", autouse=True)
def emulation():
    if EMULATED:
        simt.load()


def everywhere(names: str = "", values: tuple = (), quick: tuple | None = None):
    """Parametrize ``impl``, with the reference, Triton's interpreter and the emulation of CUDA, and other arguments.

    The interpreter is slow: where ``quick`` is given, `make test` runs Triton on these values only.
    """
    rows = []
    chosen = [x if isinstance(x, tuple) else (x,) for x in quick or ()]
    for impl in ("reference", *IMPLEMENTATIONS, *INTERPRETED, *EMULATED):
        for value in values or ((),):
            value = value if isinstance(value, tuple) else (value,)
            later = impl == "triton" and quick is not None and value not in chosen
            name = "-".join([impl, *map(str, value)])
            rows.append(pytest.param(impl, *value, id=name, marks=[pytest.mark.slow] if later else []))
    return pytest.mark.parametrize(f"impl,{names}" if names else "impl", rows)


DTYPES = [torch.float32, torch.bfloat16, torch.float16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


@each_impl
@each_dtype
@each_case
def test_equals_reference(impl, dtype, case):
    check_against_reference(impl, *make(case, dtype))


@each_impl
@pytest.mark.parametrize("grid", [(17, 97), (1, 1093), (33, 31)], ids=lambda grid: f"{grid[0]}x{grid[1]}")
def test_equals_reference_on_larger_maps(impl, grid):
    """More than one block of rows, none of them full."""
    case = Case("large", grid=grid, batch=1, heads=1, dim=32, dim_v=16, sharpness=3.0)
    check_against_reference(impl, *make(case, torch.float32))


@each_impl
def test_float32_thresholds_beside_bfloat16(impl):
    inputs, options = make(named("plain"), torch.bfloat16)
    inputs[3:] = [x.float() * 1.001 for x in inputs[3:]]
    check_against_reference(impl, inputs, options)


@each_impl
@each_case
@pytest.mark.parametrize("band", [pytest.param(0.7, marks=pytest.mark.slow), 2.0])
def test_float64_equals_reference_threshold_gradients_included(impl, case, band):
    inputs, options = make(case)
    results = []
    for name in (impl, "reference"):
        leaves = with_grad(inputs)
        learn = {"threshold_grad": "straight_through", "threshold_band": band}
        out, stats = asa_attention(*leaves, **options, **learn, impl=name, return_stats=True)
        torch.manual_seed(1)
        out.backward(torch.randn_like(out))
        results.append([out.detach(), *stats, *(x.grad for x in leaves if x is not None)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-12)


@each_impl
@each_case
def test_thresholds_get_zero_gradients_not_none(impl, case):
    inputs, options = make(case, torch.float32)
    *_, alpha, beta = inputs = with_grad(inputs)
    asa_attention(*inputs, **options, impl=impl).sum().backward()
    for x in (alpha, beta):
        assert x is None or torch.equal(x.grad, torch.zeros_like(x))


@each_impl
@pytest.mark.parametrize("name", ["plain", "one_way", "topk", "padding", "mixed", "dense", "beta_only"])
def test_numerical_gradients(impl, name):
    options = {"topk": 3} if "topk" in named(name).options else named(name).options
    inputs, options = make(named(name, grid=(3, 2), heads=1, dim=3, dim_v=2, options=options))
    query, key, value, alpha, beta = with_grad(inputs)

    def run(query, key, value):
        return asa_attention(query, key, value, alpha, beta, **options, impl=impl)

    assert torch.autograd.gradcheck(run, (query, key, value), check_batched_grad=True)


@each_impl
@each_case
def test_repeats_bitwise(impl, case):
    inputs, options = make(case, torch.float32)
    first = None
    for _ in range(20 if case.name in ("plain", "topk", "padding", "mixed") else 4):
        leaves = with_grad(inputs)
        out = asa_attention(*leaves, **options, threshold_grad="straight_through", impl=impl)
        out.square().sum().backward()
        now = [out, *(x.grad for x in leaves if x is not None)]
        first = first or now
        assert all(torch.equal(x, y) for x, y in zip(first, now, strict=True))


@each_impl
def test_thread_count_does_not_change_the_survivors(impl):
    inputs, options = make(Case("large", grid=(33, 31), heads=1, dim=32), torch.float32)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(survivors(impl, inputs, options))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)


@each_impl
@pytest.mark.parametrize("case", [c for c in CASES if c.batch and c.name != "one_token"], ids=lambda case: case.name)
def test_strides_do_not_matter(impl, case):
    """Tokens that are views of a channels-last feature map, expanded thresholds, a transposed gradient."""
    inputs, options = make(case, torch.float32)
    plain, strided = with_grad(inputs), []
    for x in with_grad(inputs):
        if x is None:
            strided.append(None)
        elif x.dim() == 4:
            strided.append(x.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2))
        else:
            strided.append(x.repeat_interleave(2, -1)[..., ::2])
    assert not any(x.is_contiguous() for x in strided if x is not None)
    expected = asa_attention(*plain, **options, impl=impl)
    out = asa_attention(*strided, **options, impl=impl)
    torch.testing.assert_close(out, expected)
    grad_out = torch.randn(*out.shape[:2], out.shape[3], out.shape[2]).mT
    given = [i for i, x in enumerate(inputs) if x is not None]
    grads = torch.autograd.grad(out, [strided[i] for i in given], grad_out)
    expected_grads = torch.autograd.grad(expected, [plain[i] for i in given], grad_out.contiguous())
    for x, y in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(x, y)


@everywhere()
def test_query_may_be_key(impl):
    (x, _, value, alpha, beta), options = make(named("plain", heads=1), torch.float32)
    check_against_reference(impl, [x, x, value, alpha, beta], options)


# Bad values are data: they spoil the rows concerned, never another image.


def poisoned_images(spoil, impl, case=None):
    """Return outputs and gradients with image 0 spoilt by ``spoil(inputs, options)``, and those of clean inputs."""
    results = []
    for spoilt in (True, False):
        inputs, options = make(case or named("plain", heads=1), torch.float32)
        if spoilt:
            spoil(inputs, options)
        leaves = with_grad(inputs)
        learn = {"threshold_grad": "straight_through"}
        out = asa_attention(*leaves, **options, **learn, impl=impl)
        out.sum().backward()
        results.append([out.detach(), *(x.grad for x in leaves if x is not None)])
    return results


BAD = [torch.nan, torch.inf, -torch.inf]


@everywhere(
    "which,bad",
    tuple((which, bad) for which in range(5) for bad in BAD),
    quick=((1, torch.nan), (2, torch.inf)),
)
def test_a_bad_number_leaves_other_images_untouched(impl, which, bad):
    def spoil(inputs, options):
        inputs[which][0, 0, 3] = bad

    spoilt, clean = poisoned_images(spoil, impl)
    if (which, bad) not in ((3, torch.inf), (4, torch.inf)):  # an infinite threshold is a good number: it keeps nobody
        assert spoilt[0][0].isnan().any()
    assert not spoilt[0][1].isnan().any()
    for x, y in zip(spoilt, clean, strict=True):
        assert torch.equal(x[1], y[1])


@everywhere("which,bad", tuple((which, bad) for which in (3, 4) for bad in (-1e-3, torch.nan)), quick=((3, -1e-3),))
def test_a_bad_threshold_gives_nan_in_its_row_only(impl, which, bad):
    inputs, options = make(named("plain"), torch.float32)
    inputs[which][0, 0, 3] = bad
    out = asa_attention(*inputs, **options, impl=impl)
    assert out[0, :, 3].isnan().all()
    out[0, :, 3] = 0
    assert not out.isnan().any()


@everywhere("name", ("plain", "alpha_only", "dense", "topk_alone", "beta_only"), quick=("plain", "dense"))
def test_a_nan_score_gives_nan_in_its_row_only(impl, name):
    inputs, options = make(named(name), torch.float32)
    inputs[0][0, 1, 5, 2] = torch.nan
    out = asa_attention(*inputs, **options, impl=impl)
    assert out[0, 1, 5].isnan().all()
    out[0, 1, 5] = 0
    assert not out.isnan().any()


@everywhere(
    "bad,expected",
    ((torch.inf, torch.nan), (torch.nan, torch.nan), (-torch.inf, -torch.inf)),
    quick=((torch.inf, torch.nan),),
)
def test_statistics_of_a_row_without_a_softmax(impl, bad, expected):
    """Its scores are all +inf, NaN or -inf; lse and lse_kept are the same in every implementation."""
    for name in ("plain", "dense", "topk_alone"):
        inputs, options = make(named(name, heads=1), torch.float32)
        inputs[1].abs_()
        inputs[0][0, 0, 5] = torch.eye(1, 8)[0]
        inputs[0][0, 0, 5, 0] = bad
        out, stats = asa_attention(*inputs, **options, impl=impl, return_stats=True)
        assert out[0, 0, 5].isnan().all()
        for x in (stats.lse, stats.lse_kept):
            torch.testing.assert_close(x[0, 0, 5].item(), expected, equal_nan=True)


@everywhere()
def test_float16_gradients_overflow_as_in_pytorch(impl):
    """Gradients of scores beyond 65,504 do no harm where those of query are finite; those of key are infinite."""
    inputs, options = make(named("alpha_only", batch=1, heads=1), torch.float16)
    inputs[1] *= 1e-3
    inputs[2] *= 1e3
    leaves = with_grad(inputs[:3])
    exact = with_grad([x.double() for x in inputs[:3]])
    grad_out = torch.full_like(inputs[2], 3e4) * torch.randn(inputs[2].shape).sign()
    for tensors, thresholds, name in ((leaves, inputs[3:], impl), (exact, [inputs[3].double(), None], "reference")):
        out = asa_attention(*tensors, *thresholds, **options, impl=name)
        out.backward(grad_out.to(out.dtype))
    for ours, truth in zip((x.grad for x in leaves), (x.grad for x in exact), strict=True):
        most = torch.finfo(torch.float16).max
        within = truth.abs() < 0.99 * most
        rounding = 2 * torch.finfo(torch.float16).eps * truth.abs().max().item()
        torch.testing.assert_close(ours.double()[within], truth[within], rtol=0, atol=rounding)
        beyond = truth.abs() > 1.01 * most
        assert torch.equal(ours.double()[beyond], torch.inf * truth[beyond].sign())
    assert exact[0].grad.abs().max() < most and (exact[1].grad.abs() > most).any()


@everywhere()
def test_an_infinite_gradient_of_one_row_leaves_those_of_others(impl):
    """As an overflow under a loss scale: what other queries get in float16 is what they get without it."""
    inputs, options = make(named("alpha_only", batch=1, heads=1), torch.float16)
    grads = []
    for upstream in (1.0, torch.inf):
        leaves = with_grad(inputs[:3])
        out = asa_attention(*leaves, *inputs[3:], **options, impl=impl)
        out.backward(torch.full_like(out, 0.01).index_fill(2, torch.tensor([5]), upstream))
        grads.append(leaves[0].grad)
    others = torch.arange(63) != 5
    assert torch.equal(grads[0][:, :, others], grads[1][:, :, others]) and not grads[1][:, :, 5].isfinite().all()


@everywhere("bad", tuple(BAD), quick=(torch.nan,))
def test_a_bad_value_spoils_only_rows_that_keep_it(impl, bad):
    inputs, options = make(named("plain"), torch.float32)
    kept = survivors(impl, inputs, options)[0, 1, :, 7]
    assert kept.any() and not kept.all()
    clean = asa_attention(*inputs, **options, impl=impl)
    inputs[2][0, 1, 7, 2] = bad
    out = asa_attention(*inputs, **options, impl=impl)
    assert not out[0, 1, kept].isfinite().all(-1).any()
    assert torch.equal(out[0, 1, ~kept], clean[0, 1, ~kept])
    assert torch.equal(out[:, 0], clean[:, 0])


@everywhere(
    "name,bad",
    tuple((name, bad) for name in ("padding", "padding_topk", "padding_dense", "fewer_queries_padded") for bad in BAD),
    quick=(("padding", torch.nan), ("fewer_queries_padded", torch.inf)),
)
def test_nothing_in_padding_matters(impl, name, bad):
    def spoil(inputs, options):
        hidden = ~options["key_padding_mask"][:, None]
        for i, x in enumerate(inputs):
            if x is not None and x.shape[2] == hidden.shape[2]:
                x[hidden] = bad if i < 3 else -1

    spoilt, clean = poisoned_images(spoil, impl, named(name, heads=1))
    for x, y in zip(spoilt, clean, strict=True):
        assert torch.equal(x, y) and x.isfinite().all()


@everywhere()
def test_padding_rows_and_empty_rows_are_zero(impl):
    inputs, options = make(named("padding"), torch.float32)
    out, stats = asa_attention(*inputs, **options, impl=impl, return_stats=True)
    padding = ~options["key_padding_mask"][:, None].expand(-1, 2, -1)
    assert (out[padding] == 0).all() and (stats.survivors[padding] == 0).all()
    assert (stats.lse[padding] == -torch.inf).all() and (stats.lse_kept[padding] == -torch.inf).all()
    assert (out[~padding] != 0).any()
    inputs, options = make(named("all_empty"), torch.float32)
    out, stats = asa_attention(*inputs, **options, impl=impl, return_stats=True)
    assert (out == 0).all() and (stats.lse_kept == -torch.inf).all() and stats.lse.isfinite().all()


@everywhere()
def test_gradients_end_at_empty_and_padding_rows(impl):
    """Their output is the constant 0: even a NaN that arrives there goes nowhere."""
    inputs, options = make(named("padding", beta=None), torch.float32)
    inputs[3][:, :, 5] = torch.inf
    leaves = with_grad(inputs)
    out, stats = asa_attention(*leaves, **options, impl=impl, return_stats=True)
    dead = (stats.survivors == 0)[..., None]
    assert dead[0].any() and not dead[0].all()
    out.backward(torch.ones_like(out).masked_fill(dead, torch.nan))
    assert all(x.grad.isfinite().all() for x in leaves if x is not None)


@everywhere()
def test_a_bad_threshold_in_padding_has_no_gradient(impl):
    inputs, options = make(named("padding", heads=1), torch.float32)
    padding = ~options["key_padding_mask"][:, None]
    for x in inputs[3:]:
        x[padding] = torch.nan
    leaves = with_grad(inputs)
    asa_attention(*leaves, **options, threshold_grad="straight_through", impl=impl).square().sum().backward()
    for x in leaves[3:]:
        assert (x.grad[padding] == 0).all() and x.grad.isfinite().all() and (x.grad != 0).any()


@everywhere("size", (1e4, 1e6, 1e9), quick=(1e9,))
def test_large_scores_empty_no_row(impl, size):
    """A row's largest score always exceeds alpha times the mean for alpha < 1, however large the scores are."""
    inputs, options = make(Case("large", batch=1, beta="spread", options={"reciprocal": False}), torch.float32)
    query, key, value, _, beta = inputs
    alpha, beta = torch.full_like(beta, 0.01), torch.full_like(beta, 0.5)
    for thresholds in ((alpha, None), (None, beta)):
        out, stats = asa_attention(query * size, key, value, *thresholds, **options, impl=impl, return_stats=True)
        assert (stats.survivors > 0).all() and out.isfinite().all()


@everywhere()
def test_an_exact_tie_is_no_survivor(impl):
    """A window of one position: its score is its window's mean, and weight > beta * mean is strict."""
    (query, key, value, _, beta), options = make(named("beta_only"), torch.float32)
    for factor, expected in ((1.0, 0), (1 - 1e-3, 1)):
        threshold = torch.full_like(beta, factor)
        _, stats = asa_attention(query, key, value, None, threshold, **options, window=1, impl=impl, return_stats=True)
        assert (stats.survivors == expected).all()


@everywhere()
def test_tiny_thresholds_do_not_underflow(impl):
    s = torch.tensor([0.0, -80.0, -101.0])[None, None, :, None]
    alpha = torch.full((1, 1, 1), 1e-40)  # log(alpha / 3) = -93.2
    query = torch.ones(1, 1, 1, 1)
    _, stats = asa_attention(query, s, s, alpha, reciprocal=False, scale=1, impl=impl, return_stats=True)
    assert stats.survivors.item() == 2


@everywhere("size,reciprocal", ((10.0, True), (10.0, False), (300.0, True), (300.0, False)), quick=((300.0, True),))
def test_scores_far_below_zero(impl, size, reciprocal):
    """Equal scores weigh the same wherever they lie: here -283 and -254,558, below whatever stands for no score."""
    query = torch.full((1, 1, 70, 8), size)
    value, alpha = torch.randn_like(query), torch.full((1, 1, 70), 0.5)
    out, stats = asa_attention(query, -query, value, alpha, reciprocal=reciprocal, impl=impl, return_stats=True)
    assert (stats.survivors == 70).all()
    torch.testing.assert_close(out, value.mean(2, keepdim=True).expand_as(out))


@everywhere()
def test_no_keys_give_zeros(impl):
    query, key = torch.randn(2, 2, 5, 4, requires_grad=True), torch.randn(2, 2, 0, 4)
    out, stats = asa_attention(query, key, key, torch.ones(2, 1, 5), reciprocal=False, impl=impl, return_stats=True)
    assert out.shape == (2, 2, 5, 4) and (out == 0).all()
    assert (stats.lse == -torch.inf).all() and (stats.lse_kept == -torch.inf).all() and (stats.survivors == 0).all()
    out.sum().backward()
    assert (query.grad == 0).all()


@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS])
def test_a_window_wider_than_the_map_is_the_map(impl):
    inputs, options = make(named("plain"), torch.float32)
    huge, whole = (asa_attention(*inputs, **options, window=w, impl=impl) for w in (10**9 + 1, 17))
    assert torch.equal(huge, whole)


@each_impl
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("offset", [pytest.param(0, marks=pytest.mark.slow), 10])
@pytest.mark.parametrize("band", [0.7, 2.0])
def test_threshold_gradients_in_low_precision(impl, dtype, offset, band):
    """Under the error rule: an offset of the values cancels in what an admitted pair changes."""
    case = Case("low", batch=1, heads=8, grid=(12, 11), dim=16, dim_v=8)
    inputs, options = make(case, dtype)
    inputs[2] += offset
    check_threshold_gradients(impl, inputs, options, band)


# The blocked implementation in particular.


def test_bits_round_trip():
    for n in (0, 1, 7, 8, 9, 63, 64, 65, 1000):
        mask = torch.rand(3, n) < 0.5
        bits = pack_bits(mask)
        assert bits.shape == (3, bit_columns(n)) and torch.equal(unpack_bits(bits, n), mask)
    assert pack_bits(torch.tensor([[True, False, False, True]])).item() == 0b1001


def test_blocks_do_not_change_the_result(monkeypatch):
    inputs, options = make(named("topk", grid=(13, 11)), torch.float64)
    results = []
    for elements, rows in ((2**20, 64), (1, 8), (1, 16)):
        monkeypatch.setattr(blocked, "_BLOCK_ELEMENTS", elements)
        monkeypatch.setattr(blocked, "_MIN_ROWS", rows)
        leaves = with_grad(inputs)
        out = asa_attention(*leaves, **options, threshold_grad="straight_through", impl="blocked")
        out.square().sum().backward()
        results.append([out.detach(), *(x.grad for x in leaves)])
    for other in results[1:]:
        for x, y in zip(results[0], other, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-12)
