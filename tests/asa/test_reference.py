"""The specification against independent formulations: plain loops, a dense surrogate, numerical gradients."""

import itertools
import math

import hypothesis
import pytest
import torch
from cases import CASES, Case, make, named, with_grad
from compare import STRAIGHT_THROUGH, exact_scores, find_survivors, survivors
from hypothesis import strategies as st

from asa_ops import asa_attention
from asa_ops.asa import reference


def loop_head(s, value, alpha, beta, real_q, real_k, grid=None, window=3, extra_tokens=0, topk=None, reciprocal=True):
    """Return outputs and survivors of one head from its scores, in scalar Python, row after row."""
    columns = [j for j, real in enumerate(real_k) if real]
    features = list(zip(*value, strict=True))

    def total(i, members):
        return math.fsum(math.exp(s[i][m]) for m in members)

    def is_neighbour(i, j):
        if not (real_q[i] and real_k[j]):
            return False
        if min(i, j) < extra_tokens:
            return True
        if alpha is None and topk is None:
            return beta is None
        if alpha and alpha[i] > 0 and not math.exp(s[i][j]) / total(i, columns) > alpha[i] / len(columns):
            return False
        return topk is None or sum(s[i][m] > s[i][j] for m in columns) < topk

    def place(i):
        along, i = [], i - extra_tokens
        for side in reversed(grid):
            i, x = divmod(i, side)
            along.append(x)
        return along[::-1]

    def is_near(i, j):
        if min(i, j) < extra_tokens:
            return False
        sides = window if isinstance(window, tuple) else [window] * len(grid)
        return all(abs(x - y) <= side // 2 for x, y, side in zip(place(i), place(j), sides, strict=True))

    def is_local(i, j):
        if beta is None or not (real_q[i] and real_k[j] and is_near(i, j)):
            return False
        around = [m for m in columns if is_near(i, m)]
        return math.exp(s[i][j]) > (beta[i] * total(i, around) / len(around) if beta[i] > 0 else 0)

    out, survivors = [], []
    for i, row in enumerate(s):
        kept = [
            (is_neighbour(i, j) and (not reciprocal or is_neighbour(j, i))) or is_local(i, j) for j in range(len(row))
        ]
        weights = [math.exp(x) if keep else 0.0 for x, keep in zip(row, kept, strict=True)]
        norm = math.fsum(weights) or 1.0
        out.append([math.fsum(w / norm * x for w, x in zip(weights, column, strict=True)) for column in features])
        survivors.append(kept)
    return out, survivors


def loop_attention(query, key, value, alpha, beta, key_padding_mask=None, scale=None, **options):
    """asa_attention, one image and head after the other."""
    batch, heads, n_q, dim = query.shape
    scale = dim**-0.5 if scale is None else scale
    alpha, beta = (x if x is None else x.expand(batch, heads, n_q).tolist() for x in (alpha, beta))
    out, kept = torch.zeros(batch, heads, n_q, value.shape[3]).double(), torch.zeros(batch, heads, n_q, key.shape[2])
    for b, h in itertools.product(range(batch), range(heads)):
        q, k, v = (x[b, h].tolist() for x in (query, key, value))
        s = [[scale * math.fsum(x * y for x, y in zip(row, column, strict=True)) for column in k] for row in q]
        real_k = [True] * len(k) if key_padding_mask is None else key_padding_mask[b].tolist()
        real_q = real_k if len(q) == len(k) else [True] * len(q)
        thresholds = (x if x is None else x[b][h] for x in (alpha, beta))
        found = loop_head(s, v, *thresholds, real_q, real_k, **options)
        out[b, h], kept[b, h] = (torch.tensor(x, dtype=torch.float64) for x in found)
    return out, kept.bool()


def check_against_loop(case: Case, seed: int) -> None:
    inputs, options = make(case, seed=seed)
    out, stats = reference.asa_attention(*inputs, **options, return_stats=True)
    expected, kept = loop_attention(*inputs, **options)
    assert torch.equal(stats.survivors, kept.sum(-1))
    assert torch.equal(survivors("reference", inputs, options), kept)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["plain", "padding_topk", "fewer_queries_padded", "mixed", "all_empty", "empty_batch"])
def test_equals_loops(name):
    small = {"grid": (5, 4)} if named(name).n_keys is None else {"grid": (3, 5), "n_keys": 19}
    options = dict(named(name).options)
    if "topk" in options:
        options["topk"] = 7
    check_against_loop(named(name, **small, options=options), seed=1)


@pytest.mark.parametrize(
    "case",
    [case for case in CASES if len(case.grid) != 2 or "extra_tokens" in case.options],
    ids=lambda case: case.name,
)
def test_sequences_volumes_and_extra_tokens_equal_loops(case):
    check_against_loop(case, seed=1)


@st.composite
def any_case(draw) -> Case:
    grid = draw(st.sampled_from([(40,), (7, 6), (5, 3, 4)]))
    grid = tuple(draw(st.integers(1, side)) for side in grid)
    n = math.prod(grid)
    reciprocal = draw(st.booleans())
    kinds = st.sampled_from([None, "spread", "heads", "zero", "inf", "mixed"])
    beta = draw(kinds)
    n_keys = draw(st.none() | st.integers(1, 40)) if not reciprocal and beta is None else None
    side = st.sampled_from([1, 3, 5])
    options = {"reciprocal": reciprocal, "window": draw(side if n_keys else side | st.tuples(*[side] * len(grid)))}
    if n_keys is None and draw(st.booleans()):
        options["extra_tokens"] = draw(st.integers(1, 5))
    if draw(st.booleans()):
        options["topk"] = draw(st.integers(1, n_keys or n))
    if draw(st.booleans()):
        options["scale"] = draw(st.floats(-1, 1).filter(bool))  # of 0 every pair would be a tie
    return Case(
        "any",
        grid=grid,
        batch=draw(st.integers(1, 2)),
        heads=draw(st.integers(1, 2)),
        dim=draw(st.integers(1, 6)),
        dim_v=draw(st.integers(1, 3)),
        n_keys=n_keys,
        alpha=draw(kinds),
        beta=beta,
        padding=draw(st.booleans()),
        sharpness=draw(st.floats(0.1, 4)),
        options=options,
    )


@hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
@hypothesis.given(any_case(), st.integers(0, 10_000))
def test_equals_loops_for_any_shape_and_option(case, seed):
    check_against_loop(case, seed)


@pytest.mark.slow
@hypothesis.settings(max_examples=1000, deadline=None)
@hypothesis.given(any_case(), st.integers(0, 10_000))
def test_equals_loops_at_length(case, seed):
    check_against_loop(case, seed)


def test_constant_map_keeps_everybody_below_alpha_one_and_nobody_above():
    x = torch.ones(1, 1, 16, 4, dtype=torch.float64) * 0.5
    for alpha, expected in ((1 - 1e-9, 16), (1 + 1e-9, 0)):
        alpha = torch.full((1, 1, 16), alpha, dtype=torch.float64)
        _, stats = reference.asa_attention(x, x, x, alpha, return_stats=True)
        assert (stats.survivors == expected).all()


def surrogate_threshold_gradients(inputs, options, grad_out, band):
    """Autograd through a dense relaxation: every admission indicator gets a straight-through derivative by t and u."""
    _, _, value, alpha, beta = inputs
    s, (real_q, real_k) = exact_scores(inputs, options)
    found = find_survivors(s, inputs, options, (real_q, real_k))
    out, lse_kept = reference.attend(s, value, found.kept)
    s = s.masked_fill(~real_k[:, None, None, :], 0)  # any finite score: such pairs are never used below
    gap = s - lse_kept[..., None]
    c = torch.where(found.kept, gap.exp(), gap.sigmoid())
    c = torch.where((~found.kept.any(-1))[..., None], torch.ones_like(c), c)
    on_grid = torch.arange(s.shape[-1]) >= options.get("extra_tokens", 0)  # no threshold decides of the others
    pair = (real_q[:, None, :, None] & real_k[:, None, None, :]) & on_grid
    if "extra_tokens" in options:
        pair &= on_grid[:, None]

    def moving(threshold, x):  # the threshold as a function of its multiplier, lse held constant
        threshold = torch.where(real_q[:, None], threshold, torch.zeros_like(threshold))
        return threshold + (x.log() - x.log().detach()).expand_as(threshold)

    def step(threshold):  # value 0 everywhere, derivative -d(s - t) by t
        z = s - threshold[..., None]
        slope = torch.relu(1 - z.detach().abs() / band) / band
        return torch.where(pair, slope * (z - z.detach()), torch.zeros_like(z))

    change = torch.zeros_like(s)
    if alpha is not None:
        admitted = step(moving(found.t, alpha)) * (s >= found.kappa[..., None])
        if options.get("reciprocal", True):
            both = admitted * found.adaptive.mT
            admitted = both + both.mT
        change = change + torch.where(found.local, 0, 1) * admitted
    if beta is not None:
        change = change + torch.where(found.non_local, 0, 1) * found.in_window * step(moving(found.u, beta))
    relaxed = out + (change * c) @ value - (change * c).sum(-1, keepdim=True) * out
    thresholds = [x for x in (alpha, beta) if x is not None]
    return torch.autograd.grad(relaxed, thresholds, grad_out)


LEARNING = [c for c in CASES if (c.alpha or c.beta) and not {c.alpha, c.beta} & {"zero", "inf", "mixed"} and c.batch]


@pytest.mark.parametrize("case", LEARNING, ids=lambda case: case.name)
@pytest.mark.parametrize("band", [0.5, 2.0])
def test_straight_through_gradients_equal_a_dense_surrogate(case, band):
    inputs, options = make(case)
    if case.padding:
        options["key_padding_mask"][-1] = True  # an image of padding has no scores to relax
    inputs = with_grad(inputs)
    out = reference.asa_attention(*inputs, **options, **STRAIGHT_THROUGH, threshold_band=band)
    grad_out = torch.randn_like(out)
    thresholds = [x for x in inputs[3:] if x is not None]
    grads = torch.autograd.grad(out, thresholds, grad_out)
    expected = surrogate_threshold_gradients(inputs, options, grad_out, band)
    assert any(g.abs().max() > 1e-3 for g in expected)
    torch.testing.assert_close(grads, expected, rtol=1e-10, atol=1e-12)


def test_straight_through_gradient_is_the_change_of_the_loss():
    """A threshold just above one key: its gradient is the step's slope times what admitting that key changes."""
    query, band = torch.ones(1, 1, 1, 1, dtype=torch.float64), 0.05
    key = torch.randn(1, 1, 8, 1, dtype=torch.float64)
    value = torch.randn(1, 1, 8, 3, dtype=torch.float64)
    s = key.flatten()
    j = s.argsort()[4]

    def run(distance, **options):  # threshold at s_j + distance
        alpha = (8 * (s[j] + distance - s.logsumexp(0)).exp()).view(1, 1, 1).requires_grad_()
        return alpha, reference.asa_attention(query, key, value, alpha, reciprocal=False, **options)

    alpha, out = run(0.01, threshold_grad="straight_through", threshold_band=band)
    _, admitted = run(-0.01)
    grad_out = torch.randn_like(out)
    (grad,) = torch.autograd.grad(out, alpha, grad_out)
    slope = (1 - 0.01 / band) / band
    expected = -slope * (grad_out * (admitted - out)).sum() / alpha
    torch.testing.assert_close(grad, expected.detach(), rtol=1e-9, atol=0)


def test_zero_and_infinite_multipliers_get_zero_gradients():
    inputs, options = make(named("mixed"))
    *_, alpha, beta = inputs = with_grad(inputs)
    reference.asa_attention(*inputs, **options, threshold_grad="straight_through").square().sum().backward()
    for x in (alpha, beta):
        fixed = (x == 0) | x.isinf()
        assert fixed.any() and (x.grad[fixed] == 0).all() and x.grad.isfinite().all() and (x.grad[~fixed] != 0).any()


def test_published_mode_rejects_what_the_published_code_has_not():
    inputs, options = make(named("topk"))
    with pytest.raises(ValueError, match="published=True needs"):
        reference.asa_attention(*inputs, **options, published=True)


def test_dense_is_scaled_dot_product_attention():
    (query, key, value, _, _), _ = make(named("dense"))
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(asa_attention(query, key, value, impl="reference"), expected)
