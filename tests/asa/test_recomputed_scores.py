"""Scores that a later kernel forms again, and that differ in their last bits from what an earlier one saw.

On a GPU they may: tiles of another shape add in another order. Triton's interpreter and the emulation of CUDA are made
to round so here (``interpreter.perturbed``, ``ASA_OPS_SIMT_ULPS``): every product and sum is off by up to four units in
the last place. Whatever the size of the scores, nothing may overflow, no row may lose its only survivor, and no pair
may be kept by one step and dropped by another.
"""

import contextlib
import functools
import os

import pytest
import torch
from cases import Case, make, named, with_grad
from compare import call_and_gradients, check_against_reference, check_threshold_gradients, exact_scores, survivors
from implementations import everywhere, slow

from asa_ops import asa_attention, criss_cross_attention
from asa_ops.asa import reference
from asa_ops.core import devices

ULPS = 4
FORMED = 3  # times that a score is formed, each time off by as much: statistics, neighbours, backward
pytestmark = pytest.mark.usefixtures("emulation")


each = functools.partial(everywhere, others=())


@contextlib.contextmanager
def perturbed():
    triton = contextlib.nullcontext()
    if devices.triton_is_interpreted():
        import interpreter

        triton = interpreter.perturbed(ULPS)
    os.environ["ASA_OPS_SIMT_ULPS"] = "1"  # of every term of a product
    try:
        with triton:
            yield
    finally:
        del os.environ["ASA_OPS_SIMT_ULPS"]


@each("name", ["plain", "one_way", "topk", "padding", "dense", "beta_only", "sharp"], quick=("plain", "sharp"))
def test_results_are_those_of_the_reference(impl, name):
    """By the error rule, with as many units in the last place more for every operation."""
    case = named(name, heads=1)
    with perturbed():
        check_against_reference(impl, *make(case, torch.float32), ulps=FORMED * ULPS)


@each("name", ["plain", "one_way", "padding_topk"], quick=("padding_topk",))
def test_threshold_gradients_are_those_of_the_reference(impl, name):
    inputs, options = make(named(name, heads=1), torch.float32)
    with perturbed():
        check_threshold_gradients(impl, inputs, options, band=1.3, ulps=FORMED * ULPS)


THRESHOLDS = {
    "alpha": (0.01, None, {}),
    "beta": (None, 0.5, {}),
    "wide": (None, 0.5, {"window": 7}),
    "topk": (None, None, {"topk": 1}),
}


def large(size, thresholds, dtype=torch.float32):
    """Return inputs whose scores are about ``size``, and whose largest score of a row always survives."""
    alpha, beta, options = THRESHOLDS[thresholds]
    case = Case("large", batch=1, heads=2, alpha=None, beta=None, options={"reciprocal": False} | options)
    (query, key, value, *_), options = make(case, dtype)
    rows = torch.ones(1, 1, query.shape[2])
    alpha, beta = (x if x is None else x * rows for x in (alpha, beta))
    return [query * size, key, value, alpha, beta], options


def check_within(out, value, dims):
    low, high = value.amin(dims, keepdim=True), value.amax(dims, keepdim=True)
    assert ((out >= low - 1e-5) & (out <= high + 1e-5)).all()


def check_weights(weights, size):
    """What a gradient of 1 gives back to the values: weights of a row sum to 1, as far as its last bits allow."""
    assert ((weights - 1).abs() < (1e-3 if size < 1e3 else 0.5)).all(), weights


@pytest.mark.parametrize("thresholds", THRESHOLDS)
@each("size", [1e2, 1e5, 1e7, 1e9, 1e25], quick=(1e9,))
def test_scores_of_any_size_leave_no_row_empty(impl, thresholds, size):
    """The largest score of a row exceeds alpha times the mean for alpha < 1."""
    inputs, options = large(size, thresholds)
    with perturbed():
        results = call_and_gradients(impl, inputs, options, torch.ones_like(inputs[2]))
        kept = survivors(impl, inputs, options)  # checks the form of the graph
    assert all(x.isfinite().all() for x in results)
    out, _, _, counts, _, _, dv, *_ = results
    assert (counts > 0).all() and kept.any(-1).all()
    check_weights(dv.mean((2, 3)), size)
    check_within(out, inputs[2], 2)


@each("thresholds", list(THRESHOLDS), quick=("alpha", "beta", "topk"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_a_single_survivor_holds_all_the_weight(impl, thresholds, dtype):
    """Scores so large that one is all of its row, by more than rounding: so it is in output and gradient."""
    inputs, options = large(2.0**10, thresholds, dtype)
    s, _ = exact_scores(inputs, options)
    if inputs[4] is not None:
        s = s.masked_fill(~reference.in_window(options["grid"], options.get("window", 3), s.device), -torch.inf)
    (first, second), at = s.topk(2).values.unbind(-1), s.argmax(-1)
    clear = first - second > 30
    assert clear.double().mean() > 0.8
    leaves = with_grad(inputs)
    with perturbed():
        out, stats = asa_attention(*leaves, **options, impl=impl, return_stats=True)
        (grad,) = torch.autograd.grad(out, leaves[2], clear[..., None].to(out.dtype).expand_as(out))
    expected = inputs[2].gather(2, at[..., None].expand(*at.shape, out.shape[-1]))
    torch.testing.assert_close(out[clear], expected[clear], rtol=1e-4 + torch.finfo(dtype).eps, atol=0)
    counts = torch.zeros_like(first).scatter_add_(-1, at, clear.double())[..., None].expand_as(grad)
    last_bits = first.abs().max().item() * 2.0**-19 + torch.finfo(dtype).eps
    torch.testing.assert_close(grad.double(), counts, rtol=last_bits, atol=1e-9)
    if inputs[4] is None:
        assert (stats.survivors[clear] == 1).all()


@each("k", [1, 5], quick=(1,))
def test_equal_scores_are_all_kept(impl, k):
    """Ties at the k-th largest, alpha = 1/2 of equal weights: no rounding may empty a row."""
    query, key = torch.full((1, 1, 70, 8), 300.0), torch.full((1, 1, 70, 8), 299.0)
    value, alpha = torch.randn(1, 1, 70, 8), torch.full((1, 1, 70), 0.5)
    with perturbed():
        for thresholds, options in (((alpha,), {}), ((), {"topk": k})):
            out, stats = asa_attention(query, key, value, *thresholds, **options, impl=impl, return_stats=True)
            assert (stats.survivors > 0).all() and out.isfinite().all()


@pytest.mark.skipif(not devices.triton_is_interpreted(), reason="not in Triton's interpreter")
@pytest.mark.parametrize("size", [*map(slow, (1.0, 1e5, 1e25)), 1e9])
def test_criss_cross_attention(size):
    query, key, value = torch.randn(3, 2, 8, 5, 7)
    leaves = [x.requires_grad_() for x in (query * size, key, value)]
    with perturbed():
        out = criss_cross_attention(*leaves, impl="triton")
        grads = torch.autograd.grad(out.sum(), leaves)
    assert out.isfinite().all() and all(x.isfinite().all() for x in grads)
    check_within(out, value, (2, 3))
    check_weights(grads[2].mean((1, 2, 3)), size)
