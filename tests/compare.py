"""How an implementation is compared with the reference (the mask is discontinuous, so not by one tolerance).

Survivors must be equal wherever the scores are further from every threshold than rounding reaches; outputs and
gradients are compared under the implementation's own survivors, with the error of the same formula in eager PyTorch
at the same precision as the yardstick, both against float64.
"""

import torch
from cases import with_grad
from torch import Tensor

from asa_ops import asa_attention, reciprocal_neighbors
from asa_ops.asa import reference


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


def uncertain_pairs(inputs, options, eps: float) -> tuple[Tensor, Tensor]:
    """Return the float64 survivors, and which pairs rounding at ``eps`` may decide either way."""
    query, key, _, alpha, beta = [x if x is None else x.double() for x in inputs]
    topk, reciprocal = options.get("topk"), options.get("reciprocal", True)
    real_q, real_k = reference.real_positions(query, key, options.get("key_padding_mask"))
    s = reference.scores(query, key, options.get("scale"), real_q, real_k)
    args = (alpha, beta, options.get("grid"), options.get("window", 3), topk, reciprocal)
    found = reference.find_survivors(s, *args, real_q, real_k)
    largest = s.masked_fill(s.isinf(), 0).abs().amax((-2, -1), keepdim=True) if s.numel() else s
    margin = 16 * eps * largest * query.shape[-1] ** 0.5

    def close(threshold):
        return (s - threshold[..., None]).abs() <= margin

    one_way = torch.zeros_like(found.kept)
    if alpha is not None:
        one_way |= close(found.t)
    if topk is not None and topk < s.shape[-1]:
        # The k-th largest equals its threshold by definition; it is uncertain if the next one is as close.
        following = s.topk(topk + 1).values[..., -1]
        one_way |= close(found.kappa) & ((found.kappa - following)[..., None] <= margin)
    uncertain = one_way | one_way.mT if reciprocal else one_way
    if beta is not None:
        uncertain = uncertain | (close(found.u) & found.near)
    return found.kept, uncertain & real_q[:, None, :, None] & real_k[:, None, None, :]


def check_against_reference(impl: str, inputs, options, min_certain: float = 0.99) -> None:
    """Check survivors, output, statistics and the gradients of query, key, value of ``impl``."""
    query, key, value = inputs[:3]
    eps = torch.finfo(query.dtype).eps
    statistic_eps = torch.finfo(torch.promote_types(query.dtype, torch.float32)).eps
    expected, uncertain = uncertain_pairs(inputs, options, statistic_eps)
    kept = survivors(impl, inputs, options)
    assert torch.equal(kept[~uncertain], expected[~uncertain])
    if uncertain.numel():
        assert (~uncertain).double().mean() >= min_certain, "hardly a pair was compared"

    real_q, real_k = reference.real_positions(query, key, options.get("key_padding_mask"))

    def run_reference(dtype):
        q, k, v = (x.detach().to(dtype).requires_grad_() for x in (query, key, value))
        s = reference.scores(q, k, options.get("scale"), real_q, real_k)
        out, lse_kept = reference.attend(s, reference.without_padding(v, real_k).to(s.dtype), kept)
        out = out.to(dtype)
        return out, s.logsumexp(-1), lse_kept, torch.autograd.grad(out, (q, k, v), grad_out.to(dtype))

    ours = [x.detach().clone().requires_grad_() for x in (query, key, value)]
    out, stats = asa_attention(*ours, *inputs[3:], **options, impl=impl, return_stats=True)
    grad_out = torch.randn(out.shape, dtype=torch.float64).to(query)
    grads = torch.autograd.grad(out, ours, grad_out)
    exact_out, exact_lse, exact_lse_kept, exact_grads = run_reference(torch.float64)
    eager_out, _, _, eager_grads = run_reference(query.dtype)
    assert out.dtype == query.dtype and out.is_contiguous()
    names = ("out", "grad of query", "grad of key", "grad of value")
    for name, x, eager, exact in zip(
        names, (out, *grads), (eager_out, *eager_grads), (exact_out, *exact_grads), strict=True
    ):
        check_error(name, x, eager, exact, eps)

    assert torch.equal(stats.survivors, kept.sum(-1))
    rounding = 8 * statistic_eps
    for x, exact in ((stats.lse, exact_lse), (stats.lse_kept, exact_lse_kept)):
        exact = exact.masked_fill(~real_q[:, None], -torch.inf)
        torch.testing.assert_close(x.double(), exact.double(), rtol=rounding, atol=rounding * query.shape[-1])


def check_threshold_gradients(impl: str, inputs, options, band: float = 2.0) -> None:
    """Check the straight-through dalpha and dbeta of ``impl``; no pair may be so close that precision decides it."""
    kept = survivors(impl, inputs, options)
    exact_inputs = [x if x is None else x.double() for x in inputs]
    assert torch.equal(kept, survivors("reference", exact_inputs, options)), "pick another seed"
    grad_out = torch.randn(*inputs[0].shape[:3], inputs[2].shape[3], dtype=torch.float64)

    def run(name, inputs):
        leaves = with_grad(inputs)
        learn = {"threshold_grad": "straight_through", "threshold_band": band}
        out = asa_attention(*leaves, **options, **learn, impl=name)
        return torch.autograd.grad(out, [x for x in leaves[3:] if x is not None], grad_out.to(out.dtype))

    results = run(impl, inputs), run("reference", inputs), run("reference", exact_inputs)
    for ours, eager, exact in zip(*results, strict=True):
        check_error("threshold gradient", ours, eager, exact, torch.finfo(inputs[0].dtype).eps)
        assert exact.numel() == 0 or exact.abs().max() > 0


def check_error(name: str, x: Tensor, eager: Tensor, exact: Tensor, eps: float) -> None:
    """The error rule: at most twice the error of eager PyTorch, plus eps * max|exact|, both against float64."""
    if not exact.numel():
        return
    error, yardstick = ((y.double() - exact).abs().max().item() for y in (x, eager))
    allowed = 2 * yardstick + eps * exact.abs().max().item()
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g} (eager PyTorch {yardstick:.3g})"
