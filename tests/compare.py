"""How an implementation is compared with the reference (the mask is discontinuous, so not by one tolerance).

Survivors must be equal wherever the scores are further from every threshold than rounding reaches; outputs and
gradients are compared under the implementation's own survivors, by one rule for every op: :func:`check_errors`.
"""

import functools
from collections.abc import Callable, Sequence

import rounding
import torch
from cases import op_arguments, with_grad
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from asa_ops import asa_attention, reciprocal_neighbors
from asa_ops.asa import reference

STRAIGHT_THROUGH = {"threshold_grad": "straight_through"}


def equal(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> bool:
    """Return whether two lists of tensors are the same, to the last bit."""
    return all(torch.equal(x, y) for x, y in zip(xs, ys, strict=True))


def dense(graph, batch: int, heads: int, n_q: int, n_k: int) -> Tensor:
    """Return a NeighborGraph as bool [B, heads, N_q, N_k], checking its form on the way."""
    offsets, columns = graph
    assert offsets.dtype == torch.int64 and columns.dtype == torch.int32
    assert offsets.shape == (batch * heads * n_q + 1,) and offsets[0] == 0 and offsets[-1] == len(columns)
    counts = offsets.diff()
    rows = torch.arange(len(counts), device=offsets.device).repeat_interleave(counts)
    ascending = (columns.diff() > 0) | (rows.diff() > 0)
    assert ascending.all()
    kept = torch.zeros(batch * heads * n_q, n_k, dtype=torch.bool, device=offsets.device)
    kept[rows, columns.long()] = True
    return kept.view(batch, heads, n_q, n_k)


def survivors(impl: str, inputs, options) -> Tensor:
    query, key, _, alpha, beta = inputs
    graph = reciprocal_neighbors(query, key, alpha, beta, **options, impl=impl)
    return dense(graph, *query.shape[:3], key.shape[2])


def call_and_gradients(impl: str, inputs, options, grad_out: Tensor | None = None) -> list[Tensor]:
    """Return output, statistics and all gradients of a call whose thresholds learn, of out.square().sum() if not given.

    The inputs are taken as they are, strides included, and not written to.
    """
    leaves = [x if x is None else x.detach().requires_grad_() for x in inputs]
    out, stats = asa_attention(*leaves, **STRAIGHT_THROUGH | options, impl=impl, return_stats=True)
    grad_out = 2 * out.detach() if grad_out is None else grad_out
    return [out.detach(), *stats, *torch.autograd.grad(out, [x for x in leaves if x is not None], grad_out)]


def exact_scores(inputs, options) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Return the scores in float64, and which queries and keys are no padding."""
    query, key = (x.double() for x in inputs[:2])
    real = reference.real_positions(query, key, options.get("key_padding_mask"))
    return reference.scores(query, key, options.get("scale"), *real), real


def find_survivors(s: Tensor, inputs, options, real):
    """Return what the reference finds from scores."""
    given = {"grid": None, "window": 3, "extra_tokens": 0, "topk": None, "reciprocal": True}
    return reference.find_survivors(s, *inputs[3:], *(options.get(name, x) for name, x in given.items()), *real)


def in_gaps(inputs, options):
    """Return inputs with float32 thresholds that lie in the middle of gaps between scores.

    No pair is then near its threshold, so that survivors are the same in every precision of the products.
    """
    query, key, value, alpha, beta = inputs
    s, (_, real_k) = exact_scores(inputs, options)
    if alpha is not None:
        alpha = _in_gaps(s, alpha, s.isfinite())
    if beta is not None:
        of_grid = options["grid"], options.get("window", 3), s.device, options.get("extra_tokens", 0)
        near = real_k[:, None, None, :] & reference.in_window(*of_grid)
        beta = _in_gaps(s.masked_fill(~near, -torch.inf), beta, near)
    return [query, key, value, alpha, beta]


def _in_gaps(s, multiplier, member):
    """Move the thresholds lse + log(multiplier / members) of ``s`` to the middle of the widest gap nearby."""
    if s.shape[-1] < 2:
        return multiplier.float()
    count = member.sum(-1)
    lse, log_n = s.logsumexp(-1), count.clamp(min=1).double().log()
    threshold = lse + multiplier.double().log() - log_n
    ordered = s.sort(-1, descending=True).values
    above = (s > threshold[..., None]).sum(-1)  # this many are above: the gaps nearby end at these ranks
    ranks = above[..., None] + torch.arange(-8, 9, device=s.device)
    inside = (ranks >= 1) & (ranks < count[..., None])
    ranks = ranks.clamp(1, s.shape[-1] - 1)
    upper, lower = ordered.gather(-1, ranks - 1), ordered.gather(-1, ranks)
    gap = torch.where(inside, upper - lower, -1.0)
    widest = gap.argmax(-1, keepdim=True)
    middle = ((upper + lower) / 2).gather(-1, widest)[..., 0]
    moved = (middle - lse + log_n).exp()
    usable = inside.any(-1) & threshold.isfinite() & moved.isfinite()
    return torch.where(usable, moved, multiplier.double()).float()


def exact_results(inputs, options, kept: Tensor, grad_out: Tensor) -> list[Tensor]:
    """Return output, gradients of query, key and value, and log-sum-exps in float64 with these survivors."""
    leaves = with_grad([x.double() for x in inputs[:3]])
    s, (real_q, real_k) = exact_scores(leaves, options)
    out, lse_kept = reference.attend(s, reference.without_padding(leaves[2], real_k), kept)
    statistics = (x.detach().masked_fill(~real_q[:, None], -torch.inf) for x in (s.logsumexp(-1), lse_kept))
    return [out.detach(), *torch.autograd.grad(out, leaves, grad_out.double()), *statistics]


def uncertain_pairs(inputs, options, eps: float) -> tuple[Tensor, Tensor]:
    """Return the float64 survivors, and which pairs rounding at ``eps`` may decide either way."""
    inputs = [x if x is None else x.double() for x in inputs]
    s, (real_q, real_k) = exact_scores(inputs, options)
    found = find_survivors(s, inputs, options, (real_q, real_k))
    topk = options.get("topk")
    largest = s.masked_fill(s.isinf(), 0).abs().amax((-2, -1), keepdim=True) if s.numel() else s
    margin = 16 * eps * largest * inputs[0].shape[-1] ** 0.5

    def close(threshold):
        return (s - threshold[..., None]).abs() <= margin

    one_way = torch.zeros_like(found.kept)
    if inputs[3] is not None:
        one_way |= close(found.t)
    if topk is not None and topk < s.shape[-1]:
        # The k-th largest equals its threshold by definition; it is uncertain if the next one is as close.
        following = s.topk(topk + 1).values[..., -1]
        one_way |= close(found.kappa) & ((found.kappa - following)[..., None] <= margin)
    uncertain = one_way | one_way.mT if options.get("reciprocal", True) else one_way
    if inputs[4] is not None:
        uncertain = uncertain | (close(found.u) & found.in_window)
    return found.kept, uncertain & real_q[:, None, :, None] & real_k[:, None, None, :]


def check_errors(
    names: Sequence[str],
    ours: Sequence[Tensor],
    compute: Callable[[], Sequence[Tensor]],
    precision: torch.dtype | None = None,
    dtype: torch.dtype | None = None,
    exp_ulps: int = 0,
    ulps: int = 0,
) -> None:
    """The error rule: at most twice what rounding may do, plus a unit in the last place of the largest number.

    ``compute`` returns the exact results, in float64. What rounding may do is the largest error, over all numbers of a
    result, of four evaluations of the same formula with every operation rounded at random (``rounding.evaluations``)
    and the result rounded to ``dtype``: the same on every machine. Twice, for ours is another draw of the same
    kind, by an order of sums and by elementary functions of its own. The unit is for what the formula does not round:
    parts of a result that are put together, weights that matrix units take in ``dtype``.

    Args:
        precision: that of the computation, float32 for half-precision tensors of most ops (default: that of ours).
        dtype: of the tensors that ours is computed from (default: that of each result).
        exp_ulps, ulps: see :func:`rounding.evaluations`.
    """
    exact = compute()
    kinds = [dtype or x.dtype for x in ours]
    errors, units = [], []
    for x, truth, kind in zip(ours, exact, kinds, strict=True):
        assert x.shape == truth.shape
        errors.append(_largest_error(x, truth))
        units.append(torch.finfo(kind).eps * _largest(truth.masked_fill(truth.isinf(), 0)))
    by_rounding = [0.0] * len(exact)
    draws = rounding.evaluations(compute, precision or ours[0].dtype, exp_ulps, ulps)

    def allowed(i: int) -> float:
        return 2 * by_rounding[i] + units[i]

    def too_large() -> list[int]:
        return [i for i, error in enumerate(errors) if not error <= allowed(i)]

    while (left := too_large()) and (draw := next(draws, None)):  # each takes as long as all the rest
        for i in left:
            by_rounding[i] = max(by_rounding[i], _largest_error(draw[i].to(kinds[i]), exact[i]))
    assert not left, "; ".join(
        f"{names[i]}: error {errors[i]:.3g}, allowed {allowed(i):.3g} (by rounding {by_rounding[i]:.3g})" for i in left
    )


def _largest_error(x: Tensor, truth: Tensor) -> float:
    return _largest(torch.where(x == truth, 0, x.double() - truth))  # where both are infinite they are equal


def _largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def count_flops(function: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


NAMES = ("out", "grad of query", "grad of key", "grad of value")


def check_against_reference(impl: str, inputs, options, ulps: int = 0, factors: torch.dtype | None = None) -> None:
    """Check survivors, output, statistics and the gradients of query, key, value of ``impl``.

    Args:
        ulps: by how many units in the last place its products and sums are off, beside rounding.
        factors: what products take numbers as, if that is coarser than the inputs, which are of that kind.
    """
    precision = torch.promote_types(inputs[0].dtype, torch.float32)
    expected, uncertain = uncertain_pairs(inputs, options, torch.finfo(precision).eps * (1 + ulps))
    kept = survivors(impl, inputs, options)
    assert torch.equal(kept[~uncertain], expected[~uncertain])
    if uncertain.numel():
        assert (~uncertain).double().mean() >= 0.99, "hardly a pair was compared"

    leaves = with_grad(inputs[:3])
    out, stats = asa_attention(*leaves, *inputs[3:], **options, impl=impl, return_stats=True)
    assert out.dtype == inputs[0].dtype and out.is_contiguous()
    if not ulps:  # the same numbers at every call
        assert torch.equal(stats.survivors, kept.sum(-1))
    grad_out = torch.randn(out.shape, dtype=torch.float64).to(factors or out.dtype).to(out)
    results = out, *torch.autograd.grad(out, leaves, grad_out), stats.lse, stats.lse_kept
    exact = functools.partial(exact_results, inputs, options, kept, grad_out)
    names = (*NAMES, "lse", "lse_kept")
    if factors is None:
        check_errors(names, results, exact, precision, ulps=ulps)
    else:
        sums, statistics = slice(len(NAMES)), slice(len(NAMES), None)
        check_errors(names[sums], results[sums], lambda: exact()[sums], precision, factors, ulps=ulps)
        check_errors(names[statistics], results[statistics], lambda: exact()[statistics], precision, ulps=ulps)


def check_threshold_gradients(
    impl: str,
    inputs,
    options,
    band: float = 2.0,
    others: bool = False,
    ulps: int = 0,
    factors: torch.dtype | None = None,
) -> None:
    """Check the straight-through dalpha and dbeta of ``impl``; no pair may be so close that precision decides it.

    Args:
        others: also the gradients beside them, of query, key and value.
        ulps, factors: see :func:`check_against_reference`.
    """
    factors = factors or inputs[0].dtype
    kept = survivors(impl, inputs, options)
    exact_inputs = [x if x is None else x.double() for x in inputs]
    assert torch.equal(kept, survivors("reference", exact_inputs, options)), "pick another seed"
    grad_out = torch.randn(*inputs[0].shape[:3], inputs[2].shape[3], dtype=torch.float64).to(factors).to(inputs[0])
    wanted = [i for i, x in enumerate(inputs) if x is not None and (others or i > 2)]
    names = [f"grad of {('query', 'key', 'value', 'alpha', 'beta')[i]}" for i in wanted]

    def run(name, inputs):
        leaves = with_grad(inputs)
        out = asa_attention(*leaves, **options, **STRAIGHT_THROUGH, threshold_band=band, impl=name)
        return torch.autograd.grad(out, [leaves[i] for i in wanted], grad_out.to(out.dtype))

    ours = run(impl, inputs)
    precision = torch.promote_types(inputs[0].dtype, torch.float32)
    check_errors(names, ours, lambda: run("reference", exact_inputs), precision, factors, ulps=ulps)
    for i, x in zip(wanted, ours, strict=True):
        assert x.dtype == inputs[i].dtype and (not x.numel() or x.abs().max() > 0)


def by_ranges(stem: str, inputs: list, options: dict, d_out: Tensor, begin_of_second: int) -> list[Tensor]:
    """Return out, lse, lse_kept, survivors, dq, dk, dv of the C++ ops ``stem`` for two ranges of rows, joined.

    What two processes would send each other is cut and joined here.
    """
    args = list(op_arguments(inputs, options)[:-2])
    args[3:5] = (x if x is None else x.expand(args[0].shape[:3]) for x in args[3:5])

    def op(name):
        return getattr(torch.ops.asa_ops, f"{stem}_{name}")

    n, cut = args[0].shape[2], begin_of_second
    rows = [[0, cut], [cut, n]]
    blocks = [slice(0, cut // 64), slice(cut // 64, None)]
    scans = [op("rows_scan")(*args, each) for each in rows]
    thresholded = scans[0][1].numel() > 0
    backs = [None, None]
    if thresholded:
        backs = [torch.cat([scan[1][:, :, :, of] for scan in scans], 2).contiguous() for of in blocks]
    mutual = backs if args[10] else [None, None]
    parts = [op("rows_fwd")(*args, each, *scan, back) for each, scan, back in zip(rows, scans, mutual, strict=True)]
    out, lse_kept, survivors = (torch.cat(x, 2) for x in zip(*parts, strict=True))
    lse = torch.cat([scan[0] for scan in scans], 2)
    local = torch.cat([scan[4] for scan in scans], 2)
    given = d_out, out.isnan().any(-1), survivors, *args
    gradients = [
        op("rows_bwd")(*given, each, *scan[1:5], back) for each, scan, back in zip(rows, scans, mutual, strict=True)
    ]
    dq = torch.cat([x[0] for x in gradients], 2)
    softmax, groups = (torch.cat([x[i] for x in gradients], 3).contiguous() for i in (1, 2))
    columns = [
        op("columns_bwd")(*given, each, scan[1] if args[10] and thresholded else None, local, back, softmax, groups)
        for each, scan, back in zip(rows, scans, backs, strict=True)
    ]
    return [out, lse, lse_kept, survivors, dq, *(torch.cat(x, 2) for x in zip(*columns, strict=True))]


def check_ranges(stem: str, inputs: list, options: dict, begin_of_second: int) -> None:
    """Check that two ranges of rows give what the whole does, to the last bit."""
    args = op_arguments(inputs, options, band=0.0)
    outputs = getattr(torch.ops.asa_ops, f"{stem}_fwd")(*args)
    d_out = torch.randn_like(outputs[0])
    gradients = getattr(torch.ops.asa_ops, f"{stem}_bwd")(d_out, *args[:6], *outputs, *args[6:-1])
    found = by_ranges(stem, inputs, options, d_out, begin_of_second)
    assert equal([x.nan_to_num(7) for x in found], [x.nan_to_num(7) for x in (*outputs[:4], *gradients[:3])])
