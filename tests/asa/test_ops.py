"""torch contracts of asa_attention beside what all functions keep to: opcheck, autocast, meta, vmap, FLOPs, errors."""

import sysconfig
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import make, named, op_arguments, saved_of, with_grad
from compare import STRAIGHT_THROUGH, count_flops, equal
from implementations import KERNELS, each_fast, each_kernel, slow
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from asa_ops import asa_attention, nn, reciprocal_neighbors
from asa_ops.asa import ops

pytestmark = pytest.mark.usefixtures("emulation")
EVERY_IMPL = ["reference", *KERNELS]
BFLOAT16 = [impl for impl in EVERY_IMPL if impl != "triton"]  # which Triton's interpreter gets wrong
CONTRACT_CASES = ("plain", "padding", "topk", "one_way", "dense", "more_keys", "alpha_only")
each_contract_case = pytest.mark.parametrize(  # the first two have every kind of argument
    "case", [slow(named(name), id=name, when=i > 1) for i, name in enumerate(CONTRACT_CASES)]
)


def smaller(impl, case):
    """opcheck runs the op a dozen times, too often for more than one small case in Triton's interpreter."""
    if impl == "triton" and case.name != "plain":
        pytest.skip("slow in the interpreter, and to opcheck all cases are alike")
    return replace(case, grid=(3, 2), batch=1, heads=1) if impl == "triton" else case


@each_contract_case
@pytest.mark.parametrize(
    "impl,form",  # what the op is told about a form does not depend on the implementation, so others are slow
    [
        slow(impl, form, when=impl != "blocked" and form != "contiguous")
        for impl in KERNELS
        for form in ("contiguous", "permuted", "requires_grad", "nothing kept")
    ],
)
def test_opcheck_forward(case, impl, form):
    inputs, options = make(smaller(impl, case), torch.float32)
    if form == "permuted":
        inputs = [x if x is None else x.mT.contiguous().mT for x in inputs]
    if form == "requires_grad":
        inputs = with_grad(inputs)
    forward = ops.of(impl, inputs[0].device).fwd
    torch.library.opcheck(forward, op_arguments(inputs, options, keep=form != "nothing kept"))


@each_contract_case
@each_kernel
def test_opcheck_backward(case, impl):
    inputs, options = make(smaller(impl, case), torch.float32)
    *args, keep = op_arguments(inputs, options)
    found = ops.of(impl, inputs[0].device)
    outputs = found.fwd(*args, keep)
    torch.library.opcheck(found.bwd, (torch.randn_like(outputs[0]), *args[:6], *outputs, *args[6:]))


@each_kernel
def test_opcheck_neighbors(impl):
    query, key, _, *rest, _, _ = op_arguments(*make(smaller(impl, named("plain")), torch.float32))
    torch.library.opcheck(ops.asa_neighbors, (query, key, *rest, impl))


def loss_and_grads(function, inputs):
    leaves = with_grad(inputs)
    out = function(*leaves)
    grads = torch.autograd.grad(out.float().square().sum(), [x for x in leaves if x is not None])
    return [out.detach(), *grads]


@pytest.mark.parametrize("impl", [*EVERY_IMPL[:4], *map(slow, EVERY_IMPL[4:])])
def test_compiles_where_no_gradient_is_needed(impl):
    torch._dynamo.reset()
    inputs, options = make(named("plain", batch=1, heads=1), torch.float32)

    def function(*inputs):
        return asa_attention(*inputs, **options, **STRAIGHT_THROUGH, impl=impl)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), function(*inputs))
    with torch.no_grad():
        torch.testing.assert_close(compiled(*with_grad(inputs)), function(*inputs))


def test_compiles_where_query_is_key_and_alpha_is_beta():
    torch._dynamo.reset()
    (query, _, value, alpha, _), options = make(named("plain"), torch.float32)

    def function(query, value, alpha):
        return asa_attention(query, query, value, alpha, alpha, **options, **STRAIGHT_THROUGH)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    inputs = [query, value, alpha]
    torch.testing.assert_close(loss_and_grads(compiled, inputs), loss_and_grads(function, inputs))


@each_fast
def test_neighbors_compile_and_export(impl):
    class Find(torch.nn.Module):
        def forward(self, query, key, value, alpha, beta):
            return reciprocal_neighbors(query, key, alpha, beta, grid=(9, 7), impl=impl)

    torch._dynamo.reset()
    inputs, _ = make(named("plain"), torch.float32)
    others, _ = make(named("plain"), torch.float32, seed=1)  # of which not as many survive
    compiled = torch.compile(Find(), fullgraph=True, backend="aot_eager")
    exported = torch.export.export(Find(), tuple(inputs)).module()
    for tensors in (inputs, others):
        expected = Find()(*tensors)
        assert equal(compiled(*tensors), expected) and equal(exported(*tensors), expected)


PYTHON_HEADER = Path(sysconfig.get_path("include"), "Python.h")


@pytest.mark.skipif(not PYTHON_HEADER.exists(), reason="Inductor needs Python.h (Debian: apt install python3-dev)")
@pytest.mark.slow
def test_module_compiles_with_inductor():
    torch._dynamo.reset()
    block = nn.AdaptiveSparseAttention(8, threshold_activation="softplus")
    torch.nn.init.normal_(block.proj.weight)
    x = torch.randn(2, 8, 6, 5)
    compiled = torch.compile(block, fullgraph=True)
    results = []
    for function in (block, compiled):
        block.zero_grad()
        out = function(x)
        out.square().sum().backward()
        results.append([out.detach(), *(p.grad.clone() for p in block.parameters())])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("impl", "compiled"),
    [("blocked", False), ("blocked", True), ("reference", False), slow("reference", True)],
    ids=lambda x: {False: "eager", True: "compiled"}.get(x, x),
)
def test_autocast_casts_tokens_but_not_thresholds(impl, compiled):
    torch._dynamo.reset()
    inputs, options = make(named("plain"), torch.float32)
    # In bfloat16 these thresholds would all be 1.
    inputs[3:] = [1 + torch.rand_like(x) * 1e-3 for x in inputs[3:]]

    def function(*inputs):
        return asa_attention(*inputs, **options, **STRAIGHT_THROUGH, impl=impl)

    low = [x.bfloat16() for x in inputs[:3]]
    expected = loss_and_grads(function, [*low, *inputs[3:]])

    def under_autocast(*inputs):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return function(*inputs)

    run = torch.compile(under_autocast, fullgraph=True, backend="aot_eager") if compiled else under_autocast
    results = loss_and_grads(run, inputs)
    assert results[0].dtype == torch.bfloat16
    assert all(x.dtype == torch.float32 for x in results[1:])
    assert equal(results, [y.to(x.dtype) for x, y in zip(results, expected, strict=True)])


@pytest.mark.parametrize("impl", BFLOAT16)
def test_autocast_accepts_the_mixtures_it_makes(impl):
    (query, key, value, alpha, beta), options = make(named("plain"), torch.float32)
    low = torch.bfloat16
    expected = asa_attention(query.to(low), key.to(low), value.to(low), alpha.to(low), beta, **options, impl=impl)
    with torch.autocast("cpu", dtype=low):
        out = asa_attention(query, key, value.to(low), alpha.to(low), beta, **options, impl=impl)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("impl", BFLOAT16)
def test_autocast_neighbors_are_those_attended_to(impl):
    query, key = torch.randn(2, 1, 2, 400, 16) * 2
    alpha = torch.ones(1, 1, 400)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, stats = asa_attention(query, key, key, alpha, impl=impl, return_stats=True)
        graph = reciprocal_neighbors(query, key, alpha, impl=impl)
    assert torch.equal(graph.row_offsets.diff(), stats.survivors.flatten().long())


@pytest.mark.parametrize("impl", ["blocked", "cpu"])
def test_raw_op_ignores_autocast(impl):
    args = op_arguments(*make(named("plain"), torch.float32))
    forward = ops.of(impl, args[0].device).fwd
    expected = forward(*args)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = forward(*args)
    assert equal(results[:4], expected[:4])


@each_contract_case
def test_meta_tensors_have_the_real_shapes(case):
    inputs, options = make(case, torch.bfloat16)
    out, stats = asa_attention(*inputs, **options, return_stats=True)
    inputs, options = tree_map(lambda x: x.to("meta") if isinstance(x, torch.Tensor) else x, (inputs, options))
    meta_out, meta_stats = asa_attention(*inputs, **options, return_stats=True)
    for x, y in zip((out, *stats), (meta_out, *meta_stats), strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype and x.stride() == y.stride()


@pytest.mark.parametrize("impl", [*KERNELS[:3], *map(slow, KERNELS[3:])])
def test_jacobian_of_one_image(impl):
    """vmap over the gradient alone: what the forward saved is expanded, and must not be read as if it were not."""
    case = named("plain", grid=(2, 2), batch=1, dim=3, dim_v=2)
    (query, key, value, alpha, _), _ = make(case, torch.float32)

    def jacobian(impl):
        return torch.func.jacrev(lambda q: asa_attention(q, key, value, alpha, impl=impl))(query)

    torch.testing.assert_close(jacobian(impl), jacobian("reference"), rtol=1e-4, atol=1e-5)


def test_vmap_over_nothing():
    inputs, options = make(named("plain"))
    none = inputs[0].new_empty(0, *inputs[0].shape)
    assert torch.func.vmap(lambda q: asa_attention(q, *inputs[1:], **options))(none).shape == (0, 2, 2, 63, 5)


def test_vmap_over_thresholds_alone():
    inputs, options = make(named("plain"))
    alphas = torch.stack([inputs[3], inputs[3] * 2])

    def attend(alpha):
        return asa_attention(*inputs[:3], alpha, inputs[4], **options)

    torch.testing.assert_close(torch.func.vmap(attend)(alphas), torch.stack([attend(alpha) for alpha in alphas]))


@pytest.mark.parametrize("impl", EVERY_IMPL)
def test_threshold_gradients_have_no_silent_second_derivative(impl):
    inputs, options = make(named("plain", batch=1, heads=1), torch.float32)
    inputs = with_grad(inputs)
    out = asa_attention(*inputs, **options, **STRAIGHT_THROUGH, impl=impl)
    grads = torch.autograd.grad(out.sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="no double backward"):
        sum(g.sum() for g in grads).backward()


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("case", ["plain", "dense"])
def test_backward_of_a_forward_that_kept_nothing_says_so(impl, case):
    if case == "dense" and impl in ("cpu", "blocked"):
        pytest.skip("needs nothing of it")
    inputs, options = make(named(case, grid=(2, 2)), torch.float32)
    out, *_ = ops.of(impl, inputs[0].device).fwd(*op_arguments(with_grad(inputs), options, keep=False))
    with pytest.raises(RuntimeError, match="ran with keep=False, so it has no backward"):
        out.sum().backward()


@pytest.mark.skipif("triton" not in KERNELS, reason="no Triton interpreter here")
def test_triton_refuses_bits_of_another_band():
    """With thresholds that learn they are one-way, otherwise mutual."""
    *args, band, keep = op_arguments(*make(named("plain", grid=(3, 2), batch=1, heads=1), torch.float32))
    found = ops.of("triton", args[0].device)
    outputs = found.fwd(*args, band, keep)
    with pytest.raises(RuntimeError, match=r"kept must be of .* bytes a head, got"):
        found.bwd(torch.ones_like(outputs[0]), *args[:6], *outputs, *args[6:], 0.0)


class Bands(TorchDispatchMode):
    """Notes the band of every backward of ASA."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.name().endswith("_bwd"):
            self.seen.append(args[18])
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("impl", KERNELS)
def test_constant_thresholds_cost_no_gradient_of_theirs(impl):
    (*tokens, alpha, beta), options = make(named("plain", grid=(3, 2), batch=1, heads=1), torch.float32)
    tokens = with_grad(tokens)
    with Bands() as bands:
        for learning in ([], [alpha], [beta], [alpha, beta]):
            thresholds = [x.clone().requires_grad_(any(x is y for y in learning)) for x in (alpha, beta)]
            asa_attention(*tokens, *thresholds, **options, **STRAIGHT_THROUGH, impl=impl).sum().backward()
    assert bands.seen == [0.0, 2.0, 2.0, 2.0]


def test_exported_thresholds_may_learn_though_those_of_the_example_did_not():
    class Attend(torch.nn.Module):
        def forward(self, query, key, value, alpha):
            return asa_attention(query, key, value, alpha, **STRAIGHT_THROUGH, impl="blocked")

    (*tokens, alpha, _), _ = make(named("plain", grid=(3, 2), batch=1, heads=1), torch.float32)
    tokens = with_grad(tokens)
    exported = torch.export.export(Attend(), (*tokens, alpha)).module()
    alpha.requires_grad_()
    found, expected = (torch.autograd.grad(f(*tokens, alpha).sum(), alpha) for f in (exported, Attend()))
    torch.testing.assert_close(found, expected)
    assert expected[0].any()


def test_backward_makes_no_gradients_of_statistics():
    """Autograd would materialise zeros for every output, what is kept included."""
    inputs, options = make(named("plain"))
    seen = []
    out = asa_attention(*with_grad(inputs), **options)
    out.grad_fn.register_prehook(lambda grads: seen.append([g is None for g in grads]))
    out.sum().backward()
    assert seen[0] == [False] + [True] * 4


@pytest.mark.parametrize("requires_grad", [False, True])
def test_forward_mode_is_a_clear_error_not_a_zero_tangent(requires_grad):
    (query, *rest), options = make(named("plain"))
    query.requires_grad_(requires_grad)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        asa_attention(forward_ad.make_dual(query, query.detach()), *rest, **options)


def test_only_out_requires_grad():
    inputs, options = make(named("plain"))
    out, stats = asa_attention(*with_grad(inputs), **options, return_stats=True)
    assert out.requires_grad and not any(x.requires_grad for x in stats)


@pytest.mark.parametrize("impl", KERNELS)
def test_inference_keeps_nothing(impl):
    inputs, options = make(named("plain"), torch.float32)
    forward = ops.of(impl, inputs[0].device).fwd
    assert forward(*op_arguments(inputs, options, keep=False))[4].shape == (2, 2, 0)
    saved = saved_of(inputs, options, impl)
    assert saved.bits.shape[-1] == {"blocked": 8, "cpu": 512, "triton": 1280, "cuda": 1164}[impl]
    assert saved.local.shape[-1] == 9


def test_flops_are_those_of_dense_attention():
    (query, key, value, *_), _ = make(named("dense", grid=(8, 8), dim=16, dim_v=16, batch=1, heads=1))
    query, key, value = with_grad([query, key, value])
    out = asa_attention(query, key, value)
    assert count_flops(lambda: asa_attention(query, key, value)) == 4 * 64**2 * 16
    assert count_flops(out.sum().backward) == 10 * 64**2 * 16
    assert count_flops(lambda: reciprocal_neighbors(query, key)) == 2 * 64**2 * 16
    assert ops.flops(query.shape, key.shape, value.shape, pairs=100) == 2 * 64**2 * 16 + 2 * 100 * 16
    # The reference counts its products, and one [N, N] x [N, 1] for values that are not finite.
    assert count_flops(lambda: asa_attention(query, key, value, impl="reference")) == 4 * 64**2 * 16 + 2 * 64**2
