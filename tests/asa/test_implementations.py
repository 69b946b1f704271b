"""Every implementation against the reference, on the same cases; on a GPU, Triton and CUDA C++ there."""

import math
from dataclasses import replace

import pytest
import torch
from cases import CASES, IDS, Case, each_case, make, named, op_arguments, saved_of, with_grad
from compare import (
    STRAIGHT_THROUGH,
    call_and_gradients,
    check_against_reference,
    check_threshold_gradients,
    equal,
    exact_scores,
    survivors,
)
from implementations import (
    DTYPES,
    EMULATED,
    IMPLEMENTATIONS,
    INTERPRETED,
    ON_GPU,
    each_fast,
    each_impl,
    everywhere,
    slow,
)

from asa_ops import asa_attention, reciprocal_neighbors
from asa_ops.asa import blocked, ops
from asa_ops.asa.bits import bit_columns, pack_bits, unpack_bits
from asa_ops.asa.types import PADDED_TO

pytestmark = pytest.mark.usefixtures("emulation")
LOG2_E = math.log2(math.e)


def make_for(impl: str, case: Case, **larger) -> tuple:
    """Return a call in float32; for a GPU on its device in bfloat16, and ``larger``."""
    if impl in ON_GPU:
        return make(replace(case, **larger), torch.bfloat16, device="cuda")
    return make(case, torch.float32)


# Of half precisions what differs from float32, which the CPU's implementations compute in.
HALF = ("plain", "dense", "one_way", "more_keys", "topk", "padding", "padding_topk", "mixed", "sharp", "one_token")
HALF += ("wide_values", "empty_batch", "volume_padding", "extra_padding", "extra_one_way")
# Emulation and the interpreter are slow: in `make test` they run these, every option once; the kernels for compute
# capability 9.0 run the other cases (test_cuda.py).
QUICK = {
    ("cuda", "float32"): (
        *("plain", "alpha_only", "beta_only", "dense", "head_thresholds", "one_way", "more_keys", "topk", "topk_alone"),
        *("padding", "padding_topk", "window_5", "window_wider_than_map", "all_dense", "all_empty", "mixed", "scale"),
        *("sharp", "one_token", "one_column", "wide_values", "empty_batch", "sequence_topk", "volume_padding"),
        *("map_window", "window_of_511", "extra_padding", "extra_blocks"),
    ),
    ("cuda", "half"): ("plain", "topk", "one_way", "padding", "wide_values", "mixed"),
    ("cuda", "learning"): ("plain", "one_way", "more_keys", "padding_topk", "mixed", "extra_padding"),
    ("triton", "float32"): (
        *("plain", "beta_only", "dense", "one_way", "more_keys", "padding_topk", "all_empty", "mixed", "one_token"),
        *("one_column", "volume_padding", "map_window", "extra_padding"),
    ),
    ("triton", "half"): ("plain", "wide_values"),
    ("triton", "learning"): ("plain", "one_way", "more_keys", "padding_topk", "extra_volume"),
}


def emulated(impl: str, kind: str, case: Case, *values, heads: int | None = None):
    """Return the parameters of a test, slow unless they are quick; the interpreter takes one head if not told more."""
    if impl == "triton" and heads is None and case.name not in ("plain", "head_thresholds"):
        heads = 1
    name = "-".join([case.name, *(str(x).removeprefix("torch.") for x in values), impl])
    case = replace(case, heads=heads or case.heads)
    return slow(impl, *values, case, id=name, when=case.name not in QUICK[impl, kind])


@pytest.mark.parametrize(
    "impl,dtype,case",
    [
        pytest.param(impl, dtype, case, id=f"{case.name}-{name}-{impl}", marks=ON_GPU[impl])
        for impl in ON_GPU
        for name, dtype in DTYPES.items()
        for case in CASES
    ]
    + [
        slow(impl, dtype, case, id=f"{case.name}-{name}-{impl}", when=dtype.itemsize == 2 and case.name not in HALF)
        for impl in IMPLEMENTATIONS
        for name, dtype in DTYPES.items()
        for case in CASES
    ]
    + [
        emulated(impl, "float32" if name == "float32" else "half", case, dtype)
        for impl in (*EMULATED, *INTERPRETED)
        for name, dtype in DTYPES.items()
        for case in CASES
        if (impl, name) != ("triton", "bfloat16")  # which the interpreter gets wrong
    ],
)
def test_equals_reference(impl, dtype, case):
    check_against_reference(impl, *make(case, dtype, device="cuda" if impl in ON_GPU else "cpu"))


def learning():
    """The error rule compares maxima, which should be taken over many numbers: more heads, and no few rows."""
    for case in CASES:
        if not case.batch or (case.alpha, case.beta) in ((None, None), ("inf", "inf")):
            continue
        if case.name in ("all_dense", "window_only_by_inf", "topk_one_way"):  # a threshold whose gradient is 0
            continue
        for impl in (*EMULATED, *INTERPRETED):
            heads = 8 if case.name in ("sharp", "window_5") else None  # a last bit moves a gradient by 1e-6
            if impl == "cuda":
                heads = 32 if case.n_keys else 8
            if impl == "triton" or case.name != "one_token":
                yield emulated(impl, "learning", case, heads=heads)


@pytest.mark.parametrize("impl,case", learning())
def test_threshold_gradients(impl, case):
    check_threshold_gradients(impl, *make(case, torch.float32), band=1.3)


@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS, *EMULATED, *INTERPRETED])
def test_thresholds_of_about_0_have_no_gradient(impl):
    """A softplus far below 0 underflows: what divides by it would overflow, and make its input's gradient NaN."""
    query, key = (torch.tensor(x)[None, None, :, None] for x in ([200.0, -1.0, 1.0, 0.5], [1.0, 0.512, 0.663, 0.2]))
    value = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 1.0], [-1.0, 1.0]])[None, None]
    below = torch.full((1, 1, 4), -96.0, requires_grad=True)
    options = {"scale": 1.0, "threshold_grad": "straight_through", "threshold_band": 4.0}
    for shift, least in ((0.0, 0.0), (30.0, 1e-3)):
        alpha = torch.nn.functional.softplus(below + shift)
        assert (alpha > 0).all() and (alpha < 2.0**-100).all() == (shift == 0)
        out = asa_attention(query, key, value, alpha, impl=impl, **options)
        expected = asa_attention(query, key, value, alpha, impl="reference", **options)
        (gradient,), (exact,) = (
            torch.autograd.grad(x.square().sum(), below, retain_graph=True) for x in (out, expected)
        )
        torch.testing.assert_close(gradient, exact)
        assert (gradient.abs().amax() > least) == (least > 0)


@pytest.mark.parametrize("impl", [*IMPLEMENTATIONS, *EMULATED, *INTERPRETED])
@pytest.mark.parametrize("which", ["alpha", "beta"])
def test_threshold_gradients_of_a_token_alone(impl, which):
    """Its score, some hundreds, is the lse of its row and of its window: a last bit between them would show."""
    generator = torch.Generator().manual_seed(0)
    images = 4 if impl == "triton" else 16
    query, key, value, grad_out = (torch.randn(images, 1, 1, dim, generator=generator) for dim in (200, 200, 16, 16))
    multiplier = torch.full((images, 1, 1), 1.5, requires_grad=True)  # of which no score is above the mean of one
    options = {"grid": (1, 1), "scale": 30.0, "threshold_band": 1.0, "reciprocal": False}
    out = asa_attention(query, key, value, **{which: multiplier}, **options, **STRAIGHT_THROUGH, impl=impl)
    (gradient,) = torch.autograd.grad(out, multiplier, grad_out)
    expected = -(1 - math.log(1.5)) / 1.5 * (value * grad_out).sum(-1)
    torch.testing.assert_close(gradient, expected)


@each_impl
@pytest.mark.parametrize("grid", [(17, 97), slow((1, 1093)), slow((33, 31)), (1093,), (7, 9, 17)], ids=str)
def test_equals_reference_on_larger_maps(impl, grid):
    """More than one block of rows, none of them full."""
    case = Case("large", grid=grid, batch=1, heads=1, dim=32, dim_v=16, sharpness=3.0)
    check_against_reference(impl, *make(case, torch.float32))


@pytest.mark.parametrize("grid", [(96,), (8, 12)], ids=["sequence", "map"])
@pytest.mark.parametrize(
    "impl,window",
    [
        slow(impl, window, id=f"{impl}-{window}", when=(impl, window) == ("triton", 5))
        for impl in ("reference", *IMPLEMENTATIONS, *INTERPRETED)
        for window in (3, 5)
    ],
)
def test_sides_of_one_change_nothing(impl, window, grid):
    """A volume of one slice is a map, and a map of one row is a sequence, to the last bit."""
    case = Case("flat", grid=grid, options={"threshold_grad": "straight_through"})
    inputs, options = make(replace(case, batch=1, heads=1) if impl == "triton" else case, torch.float32)
    results = []
    for more in range(4 - len(grid)):
        options |= {"grid": (*[1] * more, *grid), "window": window}
        leaves = with_grad(inputs)
        out, stats = asa_attention(*leaves, **options, impl=impl, return_stats=True)
        results.append([out, *stats, *torch.autograd.grad(out.square().sum(), leaves)])
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@each_impl
def test_float32_thresholds_beside_bfloat16(impl):
    inputs, options = make(named("plain"), torch.bfloat16)
    inputs[3:] = [x.float() * 1.001 for x in inputs[3:]]
    check_against_reference(impl, inputs, options)


@each_impl
@each_case
@pytest.mark.parametrize("band", [slow(0.7), 2.0])
def test_float64_equals_reference_threshold_gradients_included(impl, case, band):
    inputs, options = make(case)
    options["threshold_band"] = band
    grad_out = torch.randn(*inputs[0].shape[:3], case.dim_v, dtype=torch.float64)
    results = (call_and_gradients(name, inputs, options, grad_out) for name in (impl, "reference"))
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-12)


@everywhere("name", IDS, kernels=("plain",))
def test_thresholds_get_zero_gradients_not_none(impl, name):
    inputs, options = make(named(name, heads=1) if impl == "triton" else named(name), torch.float32)
    *_, alpha, beta = inputs = with_grad(inputs)
    asa_attention(*inputs, **options, impl=impl).sum().backward()
    for x in (alpha, beta):
        assert x is None or torch.equal(x.grad, torch.zeros_like(x))


@each_fast
@pytest.mark.parametrize("name", ["plain", "one_way", "topk", "padding", "mixed", "dense", "beta_only", "more_keys"])
def test_numerical_gradients(impl, name):
    """Of the reference second ones too."""
    options = {"topk": 3} if "topk" in named(name).options else named(name).options
    batch = 2 if name == "padding" else 1  # of which one is all padding
    n_keys = named(name).n_keys and 5
    case = named(name, grid=(3, 2), n_keys=n_keys, batch=batch, heads=1, dim=3, dim_v=2, options=options)
    inputs, options = make(case)
    query, key, value, alpha, beta = with_grad(inputs)

    def run(query, key, value):
        return asa_attention(query, key, value, alpha, beta, **options, impl=impl)

    assert torch.autograd.gradcheck(run, (query, key, value), check_batched_grad=impl != "reference")
    if impl == "reference":
        assert torch.autograd.gradgradcheck(run, (query, key, value))


@everywhere("name", IDS, kernels=("plain", "topk"), quick=("plain",))
def test_repeats_bitwise(impl, name):
    case = named(name, grid=(9, 15)) if impl == "cuda" else named(name, heads=1) if impl == "triton" else named(name)
    inputs, options = make(case, torch.float16 if impl == "cuda" else torch.float32)
    often = 20 if name in ("plain", "topk", "padding", "mixed") else 4
    first = call_and_gradients(impl, inputs, options)
    for _ in range(1 if impl in ("triton", "cuda") else often - 1):
        assert equal(first, call_and_gradients(impl, inputs, options))


@each_impl
def test_thread_count_does_not_change_the_survivors(impl, with_threads):
    inputs, options = make(Case("large", grid=(33, 31), heads=1, dim=32), torch.float32)
    assert torch.equal(*with_threads(lambda: survivors(impl, inputs, options), (1, 2)))


@everywhere(
    "name",
    [case.name for case in CASES if case.batch and case.name != "one_token"],
    kernels=("plain", "padding", "more_keys"),
    quick=("padding",),
    gpu=True,
)
def test_strides_do_not_matter(impl, name):
    """Tokens that are views of a channels-last feature map, every other threshold, a transposed gradient."""
    inputs, options = make_for(impl, named(name), grid=(33, 31), dim=64, dim_v=64)
    strided = [
        x if x is None else x.mT.contiguous().mT if x.dim() == 4 else x.repeat_interleave(2, -1)[..., ::2]
        for x in inputs
    ]
    assert not any(x.is_contiguous() for x in strided if x is not None)
    batch, heads, n, _ = inputs[0].shape
    grad_out = torch.randn(batch, heads, inputs[2].shape[3], n).to(inputs[0]).mT
    options["threshold_grad"] = None
    results = call_and_gradients(impl, strided, options, grad_out)
    expected = call_and_gradients(impl, inputs, options, grad_out.contiguous())
    torch.testing.assert_close(results, expected)
    assert impl in IMPLEMENTATIONS or impl == "reference" or equal(results, expected)


@pytest.mark.parametrize("impl", [*INTERPRETED, *EMULATED])
def test_threshold_gradients_of_pairs_in_tiles_without_neighbours(impl):
    """One-way bits are needed of every tile with a score in the band, also where no two are each other's neighbours."""
    tokens = [torch.randn(1, 1, 65, 4) * 1.5**0.5 for _ in range(3)]  # the 65th alone in its row and column of tiles
    check_threshold_gradients(impl, [*tokens, torch.full((1, 1, 65), 1.5), None], {})


@everywhere()
def test_query_may_be_key(impl):
    (x, _, value, alpha, beta), options = make(named("plain", heads=1), torch.float32)
    check_against_reference(impl, [x, x, value, alpha, beta], options)


# Bad values are data: they spoil the rows concerned, never another image.


def spoilt_and_clean(spoil, impl, make=make_for, case=None):
    """Return outputs, statistics and gradients with inputs changed by ``spoil(inputs, options)``, and of clean ones."""
    results = []
    for spoilt in (True, False):
        inputs, options = make(impl, case or named("plain", heads=1))
        if spoilt:
            spoil(inputs, options)
        results.append(call_and_gradients(impl, inputs, options))
    return results


BAD = [torch.nan, torch.inf, -torch.inf]


@everywhere(
    "which,bad",
    tuple((which, bad) for which in range(5) for bad in BAD),
    quick=((1, torch.nan), (2, torch.inf)),
    gpu=True,
)
def test_a_bad_number_leaves_other_images_untouched(impl, which, bad):
    def spoil(inputs, options):
        inputs[which][0, 0, 3] = bad

    def single(impl, case):
        return make(named("plain", grid=(13, 11)), torch.float32, device="cuda")

    for make_case in (make_for, *([single] if impl in ON_GPU else [])):
        spoilt, clean = spoilt_and_clean(spoil, impl, make_case)
        if which < 3 or bad != torch.inf:  # an infinite threshold is good: nobody passes
            assert spoilt[0][0].isnan().any()
        assert not spoilt[0][1].isnan().any()
        for x, y in zip(spoilt, clean, strict=True):
            assert torch.equal(x[1], y[1])


@everywhere(
    "name,which,bad",
    (
        *((name, 0, torch.nan) for name in ("plain", "alpha_only", "dense", "topk_alone", "beta_only")),
        *(("plain", which, bad) for which in (3, 4) for bad in (-1e-3, torch.nan)),
    ),
    quick=(("plain", 0, torch.nan), ("dense", 0, torch.nan), ("plain", 3, -1e-3)),
    gpu=True,
)
def test_a_nan_score_or_a_bad_threshold_gives_nan_in_its_row_only(impl, name, which, bad):
    inputs, options = make_for(impl, named(name))
    at, row = ((0, 1, 5, 2), (0, 1, 5)) if which == 0 else ((0, 0, 3), (0, slice(None), 3))
    inputs[which][at] = bad
    out = asa_attention(*inputs, **options, impl=impl)
    assert out[row].isnan().all()
    out[row] = 0
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


@everywhere("bad", tuple(BAD), quick=(torch.nan,), gpu=True)
def test_a_bad_value_spoils_only_rows_that_keep_it(impl, bad):
    inputs, options = make_for(impl, named("plain"))
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
    gpu=True,
)
def test_nothing_in_padding_matters(impl, name, bad):
    def spoil(inputs, options):
        padding = ~options["key_padding_mask"]
        for i, x in enumerate(inputs):
            if x is not None and x.shape[2] == padding.shape[1]:
                x[padding[:, None].expand(x.shape[:3])] = bad if i < 3 else -1

    case = named(name) if impl in ON_GPU else named(name, heads=1)
    for i, (x, y) in enumerate(zip(*spoilt_and_clean(spoil, impl, case=case), strict=True)):
        assert torch.equal(x, y) and (i in (1, 2) or x.isfinite().all())  # of no score the log-sum-exp is -inf


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


@everywhere()
def test_a_nan_threshold_has_a_nan_gradient(impl):
    inputs, options = make(named("plain", batch=1, heads=1), torch.float32)
    for x in inputs[3:]:
        x[0, 0, 5] = torch.nan
    leaves = with_grad(inputs)
    out = asa_attention(*leaves, **options, threshold_grad="straight_through", impl=impl)
    for gradient in torch.autograd.grad(out.square().sum(), leaves[3:]):
        assert gradient[0, 0, 5].isnan()


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
    """A window of one position: its score is its window's mean, and weight > beta * mean is strict.

    On a map of several blocks and on one of a single block. Who survives alone copies its value.
    """
    (query, key, value, _, beta), options = make(named("beta_only"), torch.float32)
    for n, grid in ((query.shape[2], options["grid"]), (42, (6, 7))):
        for factor, expected in ((1.0, 0), (1 - 1e-3, 1)):
            inputs = [x[:, :, :n] for x in (query, key, value)]
            threshold = torch.full_like(beta[..., :n], factor)
            on_map = {**options, "grid": grid, "window": 1, "impl": impl}
            out, stats = asa_attention(*inputs, None, threshold, **on_map, return_stats=True)
            assert (stats.survivors == expected).all()
            assert torch.equal(out, inputs[2] * expected)


@everywhere("topk", (1, 3, 70, 99, 100, 127, 129), quick=(3, 100))
def test_topk_whatever_the_scores(impl, topk):
    """Scores are given numbers times 1: huge, tiny, of both signs, and equal ones."""
    values = torch.randn(130) * 10.0 ** torch.randint(-30, 30, (130,))
    values[:8] = torch.tensor([0.0, -0.0, 1e-40, -1e-40, 5.0, 5.0, 5.0, torch.finfo(torch.float32).max / 2])
    query, key = torch.ones(1, 1, 1, 1), values[None, None, :, None]
    options = {"topk": topk, "scale": 1 / LOG2_E, "reciprocal": False}
    kept = survivors(impl, [query, key, key, None, None], options)[0, 0, 0]
    assert torch.equal(kept, values >= values.topk(topk).values[-1])


@everywhere("topk", (1, 7, 100), quick=(7, 100))
def test_topk_keeps_all_ties(impl, topk):
    """Small integers: many scores tie, and all that tie with the k-th largest are kept."""
    query, key = torch.randint(-3, 4, (2, 1, 1, 100, 4)).float()
    options = {"topk": topk, "reciprocal": False, "scale": 1.0}
    s = query @ key.mT
    assert torch.equal(survivors(impl, [query, key, key, None, None], options), s >= s.topk(topk).values[..., -1:])


@everywhere()
def test_top_one_of_adjacent_floats(impl):
    """No float lies between the two largest: the threshold must be the larger of them, to the last bit."""
    key = torch.tensor([1.0, 1.0 + 2**-23, -1.0, 0.5])[None, None, :, None]
    query = torch.rand(1, 1, 64, 1) + 0.5
    options = {"topk": 1, "reciprocal": False, "scale": 1.0}
    assert survivors(impl, [query, key, key, None, None], options).any(-1).all()


@everywhere()
def test_tiny_thresholds_do_not_underflow(impl):
    s = torch.tensor([0.0, -80.0, -101.0])[None, None, :, None]
    alpha = torch.full((1, 1, 1), 1e-40)  # log(alpha / 3) = -93.2
    query = torch.ones(1, 1, 1, 1)
    _, stats = asa_attention(query, s, s, alpha, reciprocal=False, scale=1, impl=impl, return_stats=True)
    assert stats.survivors.item() == 2


@everywhere(
    "size,reciprocal",
    ((10.0, True), (10.0, False), (300.0, True), (300.0, False)),
    quick=((300.0, True),),
    gpu=True,
)
def test_scores_far_below_zero(impl, size, reciprocal):
    """Equal scores weigh the same wherever they lie: here -283 and -254,558, below whatever stands for no score."""
    query = torch.full((1, 1, 70, 8), size, device="cuda" if impl in ON_GPU else "cpu")
    value, alpha = torch.randn_like(query), torch.full_like(query[..., 0], 0.5)
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


@each_impl
@pytest.mark.parametrize("alpha", [0.0, 0.1])
def test_no_values_have_no_gradients(impl, alpha):
    """Where most pairs survive: kernels take whole rows there."""
    tokens, options = make_for(impl, named("alpha_only", dim_v=0))
    leaves = with_grad([*tokens[:3], torch.full_like(tokens[3], alpha)])
    out = asa_attention(*leaves, **options, **STRAIGHT_THROUGH, impl=impl)
    assert out.shape[-1] == 0
    out.sum().backward()
    assert all((x.grad == 0).all() for x in leaves)


@each_impl
def test_nothing_but_extra_tokens_is_dense(impl):
    (query, key, value, alpha, beta), options = make_for(impl, named("plain", grid=(23,)))
    given = options | {"grid": (0,), "extra_tokens": 23, "topk": 1, "impl": impl}
    out = asa_attention(query, key, value, alpha, beta, **given)
    dense = asa_attention(query, key, value, impl=impl)
    torch.testing.assert_close(out, dense, rtol=0, atol=4 * torch.finfo(out.dtype).eps)


@each_impl
def test_thresholds_of_extra_tokens_do_not_matter(impl):
    (*tokens, alpha, beta), options = make_for(impl, named("extra"))
    expected = asa_attention(*tokens, alpha, beta, **options, impl=impl)
    alpha[..., 0], beta[..., 0] = torch.nan, -1
    leaves = with_grad([*tokens, alpha, beta])
    out = asa_attention(*leaves, **options, **STRAIGHT_THROUGH, impl=impl)
    assert torch.equal(out, expected)
    out.sum().backward()
    assert all(x.grad.isfinite().all() and (x.grad[..., 0] == 0).all() for x in leaves[3:])


@everywhere(quick=())
@pytest.mark.parametrize("reciprocal", [True, False])
def test_extra_tokens_keep_tokens_without_a_score(impl, reciprocal):
    """And are kept by them, where thresholds decide nothing: comparisons with NaN are false, and so is -inf > -inf."""
    (query, key, value, alpha, beta), options = make(named("extra", options={"extra_tokens": 3}), torch.float32)
    query[:, :, 9], query[:, :, 1, 4], key[:, :, 30, 4] = torch.nan, -1, torch.inf
    inputs, options = [query, key, value, alpha, beta], options | {"reciprocal": reciprocal}
    kept = survivors(impl, inputs, options)
    assert kept[:, :, :3].all() and kept[..., :3].all() and not kept[:, :, 9, 3:].any()
    out = asa_attention(*inputs, **options, impl=impl)
    expected = asa_attention(*inputs, **options, impl="reference")
    torch.testing.assert_close(out[:, :, 1], expected[:, :, 1], rtol=1e-4, atol=1e-5)
    assert out[:, :, 1].isfinite().all() and out[:, :, 9].isnan().all()


@each_fast
def test_a_window_wider_than_the_map_is_the_map(impl):
    inputs, options = make(named("plain"), torch.float32)
    huge, whole = (asa_attention(*inputs, **options, window=w, impl=impl) for w in (10**9 + 1, 17))
    assert torch.equal(huge, whole)


@each_impl
@pytest.mark.parametrize(
    ("dtype", "band"),
    [
        slow(dtype, band, id=f"{band}-{name}", when=band == 0.7 and name != "float32")
        for name, dtype in DTYPES.items()
        for band in (0.7, 2.0)
    ],
)
@pytest.mark.parametrize("offset", [slow(0), 10])
def test_threshold_gradients_in_low_precision(impl, dtype, offset, band):
    """Under the error rule: an offset of the values cancels in what an admitted pair changes."""
    case = Case("low", batch=1, heads=8, grid=(12, 11), dim=16, dim_v=8)
    inputs, options = make(case, dtype)
    inputs[2] += offset
    check_threshold_gradients(impl, inputs, options, band)


@pytest.mark.parametrize("impl", [*EMULATED, *INTERPRETED])
def test_bits_and_peaks_lie_where_the_next_call_reads_them(impl):
    """Sharp scores: some tiles hold no bit. Every bit is the reference's, every peak at least its tile's score."""
    case = Case("large", grid=(20, 20), batch=1, heads=1, dim=8, sharpness=6.0, beta=None)
    inputs, options = make(case, torch.float32)
    band = 1.0 if impl == "cuda" else 0.0  # it keeps peaks where thresholds learn
    memory = saved_of(inputs, options, impl, band=band).bits.flatten()
    padded = -(-400 // PADDED_TO[impl]) * PADDED_TO[impl]
    pairs = padded // 8 * padded
    words = memory[:pairs].view(torch.int32).view(padded // 32, padded)
    kept = (words[:, :, None] >> torch.arange(32) & 1).bool().movedim(0, 1).reshape(padded, padded)
    at = 2 * pairs if impl == "cuda" else pairs
    if impl == "cuda":  # bits of other tiles were never written
        occupied = memory[at + padded**2 // 32 :][: padded // 16].view(torch.int32)[:, None] >> torch.arange(7) & 1
        kept &= occupied.bool().repeat_interleave(64, 0).repeat_interleave(64, 1)
    assert torch.equal(kept, kept.mT) and not kept[400:].any()
    # Where tokens stand: tiles of 8 x 8 of the map, and in each of them rows.
    token = torch.arange(400).view(20, 20)
    order = torch.cat([token[r : r + 8, c : c + 8].flatten() for r in (0, 8, 16) for c in (0, 8, 16)])
    assert torch.equal(kept[:400, :400], survivors("reference", inputs, options)[0, 0][order][:, order])
    tiles = kept.unflatten(0, (-1, 64)).unflatten(-1, (-1, 64)).any(-1).any(1)
    assert tiles.any() and not tiles[:7, :7].all()
    peaks = memory[at : at + padded**2 // 32].view(torch.float16).view(-1, padded)[:7, :400].float()
    s2 = exact_scores(inputs, options)[0][0, 0][order][:, order] * LOG2_E
    s2 = torch.nn.functional.pad(s2, (0, 448 - 400), value=-torch.inf).unflatten(-1, (7, 64)).amax(-1).mT
    assert ((peaks >= s2) & (peaks - s2 < 0.1)).all()


# Entry points of the extension refuse what they cannot read.


def kernel_call(impl: str) -> dict:
    """Return a valid call of the op of a forward pass as a dict of its arguments."""
    inputs, options = make(named("plain", grid=(4, 6), dim=16, dim_v=32), torch.float32)
    options["key_padding_mask"] = torch.ones(2, 24, dtype=torch.bool)
    names = [x.name for x in ops.of(impl, inputs[0].device).fwd._schema.arguments]
    return dict(zip(names, op_arguments(inputs, options), strict=False))


REFUSED = [  # argument, what it is made, message
    ("query", lambda x: x[0], r"query must be \[B, heads, N, D\]"),
    ("key", lambda x: x[0], r"key must be \[B, heads, N, D\]"),
    ("key", lambda x: x[:, :1], "value must be of the shape expected"),
    ("key", lambda x: torch.cat([x, x[:, :1]], 1), "heads of query must be a multiple of those of key"),
    ("key", lambda x: x[:, :, :9], "value must be of the shape expected"),
    ("value", lambda x: x[:, :, :9], "value must be of the shape expected"),
    ("value", lambda x: x.double(), "value must be of the dtype expected"),
    ("query", lambda x: x.double(), "key must be of the dtype expected"),
    ("query", lambda x: x[..., :0], "key must be of the shape expected"),
    ("alpha", lambda x: x[..., :9], r"alpha must be \[B, heads, N_q\], or 1 of each"),
    ("alpha", lambda x: x[0], r"alpha must be \[B, heads, N_q\]"),
    ("alpha", lambda x: x.double(), "alpha must be of query's dtype or float32"),
    ("beta", lambda x: x.double(), "beta must be of query's dtype or float32"),
    ("beta", lambda x: torch.cat([x, x, x], 1), r"beta must be \[B, heads, N_q\], or 1 of each"),
    ("key_padding_mask", lambda x: x[:, :9], "key_padding_mask must be of the shape expected"),
    ("key_padding_mask", lambda x: x.float(), "key_padding_mask must be of the dtype expected"),
    ("grid", lambda x: [x[0] + 1, x[1]], r"grid must be of N positions"),
    ("grid", lambda x: [-4, -6], r"grid must be of sides from 0 to 2\^31 - 1"),
    ("grid", lambda x: [1, 1, *x], r"grid must be \[L\], \[H, W\], \[T, H, W\]"),
    ("window", lambda x: [2, 2], "window must be of odd sides"),
    ("window", lambda x: [3], "window must be one odd side for each"),
    ("window", lambda x: [], "window must be one odd side for each"),
    ("topk", lambda x: 25, "topk must be between 0 and N_k"),
    ("topk", lambda x: -1, "topk must be at least 0"),
    ("band", lambda x: torch.nan, "band must be at least 0"),
]


@pytest.mark.parametrize(
    "impl,argument,change,message",
    [
        pytest.param(impl, argument, change, message, id=f"{impl}-{argument}-{message}")
        for impl in ("cpu", *EMULATED)
        for argument, change, message in REFUSED
    ],
)
def test_entry_points_refuse(impl, argument, change, message):
    call = kernel_call(impl)
    forward = ops.of(impl, call["query"].device).fwd
    forward(**call)
    call[argument] = change(call.get(argument))
    with pytest.raises(RuntimeError, match=message):
        forward(**call)


@pytest.mark.parametrize("impl", ["cpu", *EMULATED])
def test_backward_and_neighbors_refuse_what_does_not_fit(impl):
    """Numbers of survivors say where they are written, so wrong ones would write out of bounds."""
    call = kernel_call(impl)
    found = ops.of(impl, call["query"].device)
    saved = dict(zip(("out", "lse", "lse_kept", "survivors", "kept"), found.fwd(**call), strict=True))
    del call["keep"]
    call |= saved
    offsets = torch.nn.functional.pad(saved["survivors"].flatten().long().cumsum(0), (1, 0))
    columns = torch.empty(int(offsets[-1]), dtype=torch.int32)

    def neighbors(offsets=offsets, **changes):
        found.list_survivors(**call | changes, row_offsets=offsets, col_indices=columns)

    def backward(**changes):
        found.bwd(**{"grad_out": torch.ones_like(saved["out"])} | call | changes)

    neighbors()
    thresholds = {name: call[name] for name in ("alpha", "beta", "key_padding_mask", "scale")}
    graph = reciprocal_neighbors(call["query"], call["key"], grid=(4, 6), impl=impl, **thresholds)
    assert equal((offsets, columns), graph)
    backward()
    first, inner, last = offsets[:1], offsets[1:-1], offsets[-1:]
    survivors, out = saved["survivors"], saved["out"]
    wrong = [
        ("this one ran with keep=False, so it has no backward", neighbors, {"kept": saved["kept"][..., :0]}),
        ("kept must be of the shape expected", backward, {"kept": saved["kept"][..., :128].contiguous()}),
        ("survivors must be of the shape expected", backward, {"survivors": survivors[:1].contiguous()}),
        ("survivors must be of the dtype expected", backward, {"survivors": survivors.long()}),
        ("out must be of the dtype expected", backward, {"out": out.double()}),
        ("out must be contiguous", backward, {"out": out.mT.contiguous().mT}),
        ("lse must be of the shape expected", backward, {"lse": saved["lse"][..., :9].contiguous()}),
        ("grad_out must be of the shape expected", backward, {"grad_out": out[..., :2]}),
    ]
    if impl != "cpu":  # what bits mean there depends on it
        wrong.append(("kept must be of the shape expected", backward, {"band": 0.0}))
    if impl == "cpu":  # a GPU does not read them back
        wrong += [
            ("numbers of survivors", neighbors, {"offsets": torch.cat([first, inner + 1, last])}),
            ("numbers of survivors", backward, {"survivors": survivors + 1}),
            ("row_offsets must be ascending from 0", neighbors, {"offsets": torch.cat([first, -inner, last])}),
            ("survivors must be between 0 and N_k", backward, {"survivors": survivors - 100}),
        ]
    for message, function, changes in wrong:
        with pytest.raises(RuntimeError, match=message):
            function(**changes)


# Friendlier calls.


@everywhere(quick=())
def test_query_heads_share_keys(impl):
    """As if each key head stood there for every query head of its group; gradients of a shared one add up."""
    dtype = torch.float32 if impl in ("triton", "cuda") else torch.float64
    grid = (3, 4) if impl == "triton" else (7, 10)
    n = grid[0] * grid[1]
    query, alpha = torch.randn(2, 6, n, 5, dtype=dtype), torch.rand(2, 6, n, dtype=dtype) + 0.5
    key, value = torch.randn(2, 2, n, 5, dtype=dtype), torch.randn(2, 2, n, 7, dtype=dtype)

    def attend(query, key, value, alpha):
        return asa_attention(query, key, value, alpha, 0.8, grid=grid, impl=impl, **STRAIGHT_THROUGH)

    leaves = with_grad([query, key, value, alpha])
    out = attend(*leaves)
    grad_out = torch.randn_like(out)
    whole = with_grad([query, *(x.repeat_interleave(3, 1) for x in (key, value)), alpha])
    expected = attend(*whole)
    torch.testing.assert_close(out, expected)
    gradients = list(torch.autograd.grad(expected, whole, grad_out))
    gradients[1:3] = [x.unflatten(1, (2, 3)).sum(2) for x in gradients[1:3]]
    torch.testing.assert_close(torch.autograd.grad(out, leaves, grad_out), tuple(gradients))
    graphs = [reciprocal_neighbors(query, x, alpha, impl=impl) for x in (key, key.repeat_interleave(3, 1))]
    assert equal(*graphs)


@everywhere("shape", [((),), ((12,),), ((3, 1),), ((2, 1, 1),), ((1, 3, 12),)], quick=[((3, 1),)])
def test_thresholds_broadcast(impl, shape):
    dtype = torch.float32 if impl in ("triton", "cuda") else torch.float64
    images = 1 if impl == "triton" and len(shape) < 3 else 2
    tokens = torch.randn(3, images, 3, 12, 4, dtype=dtype).unbind()
    alpha = torch.rand(shape, dtype=dtype) + 0.6
    results = []
    for threshold in (alpha, alpha.expand(images, 3, 12).contiguous()):
        leaf = threshold.clone().requires_grad_()
        out = asa_attention(*tokens, leaf, 0.9, grid=(3, 4), impl=impl, **STRAIGHT_THROUGH)
        (gradient,) = torch.autograd.grad(out.square().sum(), leaf)
        assert gradient.shape == threshold.shape
        results.append((out, gradient.sum_to_size(shape)))
    torch.testing.assert_close(*results)
    if not shape:
        assert torch.equal(asa_attention(*tokens, alpha.item(), 0.9, grid=(3, 4), impl=impl), results[0][0])


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
        results.append(call_and_gradients("blocked", inputs, options))
    for other in results[1:]:
        torch.testing.assert_close(results[0], other, rtol=1e-11, atol=1e-12)
