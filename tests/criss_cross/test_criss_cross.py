"""criss_cross_attention and its module: the reference, every implementation against it, torch contracts, errors."""

import itertools
import math

import pytest
import torch
from compare import NAMES, check_errors, count_flops, equal
from implementations import DTYPES, IMPLEMENTATIONS, INTERPRETED, each_dtype, each_fast, slow

from asa_ops import criss_cross_attention
from asa_ops.core import extension
from asa_ops.criss_cross import ops, reference
from asa_ops.nn import CrissCrossAttention

KERNELS = [*IMPLEMENTATIONS, *INTERPRETED]
each_kernel = pytest.mark.parametrize("impl", KERNELS)

SIZES = {  # name: (B, D, Dv, H, W)
    "one_pixel": (2, 3, 5, 1, 1),
    "one_row": (1, 4, 6, 1, 37),
    "one_column": (2, 4, 6, 35, 1),
    "small": (2, 8, 5, 5, 4),
    "odd": (2, 7, 33, 9, 11),
    "33x17": (1, 8, 64, 33, 17),
    "16x32": (1, 16, 40, 16, 32),
    "one_channel": (2, 1, 1, 16, 17),
    "long_row": (1, 4, 9, 3, 531),
    "long_column": (1, 4, 9, 531, 3),
    "empty_batch": (0, 3, 5, 4, 6),
}
VOLUMES = [(2, 3, 4, 2, 3, 4), (1, 2, 3, 1, 1, 5), (1, 2, 3, 3, 1, 1), (1, 2, 2, 1, 1, 1)]  # T before H
INTERPRETER_SIZES = ("one_pixel", "one_row", "small", "odd")  # it is slow: the others with `make test-all`


def make(size, dtype=torch.float64, spread=1.0, device="cpu"):
    """Return query, key, value, the same numbers in every dtype up to rounding."""
    batch, dim, dim_v, *sides = SIZES[size] if isinstance(size, str) else size
    generator = torch.Generator().manual_seed(0)
    shapes = ((batch, c, *sides) for c in (dim, dim, dim_v))
    maps = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [(x * by).to(device, dtype) for x, by in zip(maps, (spread, spread, 1), strict=True)]


def with_gradients(impl, inputs, grad_out=None, autocast=False, **options):
    """Return the output and the gradient of every input, of the sum of the output if not told otherwise."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = criss_cross_attention(*leaves, **options, impl=impl)
    grad_out = torch.ones_like(out) if grad_out is None else grad_out.to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad_out)]


def check_against_reference(impl, inputs, **options):
    """The error rule of compare.py, for output and every gradient."""
    grad_out = torch.randn(inputs[2].shape, dtype=torch.float64).to(inputs[2])
    ours = with_gradients(impl, inputs, grad_out, **options)
    assert ours[0].dtype == inputs[0].dtype and all(x.is_contiguous() for x in ours)
    exact_inputs = [x.double() for x in inputs]
    precision = torch.promote_types(inputs[0].dtype, torch.float32)
    check_errors(NAMES, ours, lambda: with_gradients("reference", exact_inputs, grad_out, **options), precision)


# ---- the reference


@pytest.mark.parametrize("size", ["one_pixel", "small", (1, 2, 3, 1, 5), (1, 2, 3, 4, 1), *VOLUMES], ids=str)
def test_reference_equals_plain_loops(size):
    query, key, value = make(size)
    out = reference.criss_cross_attention(query, key, value, scale=0.7)
    batch, _, *sides = query.shape
    everywhere = list(itertools.product(*map(range, sides)))
    for b, at in itertools.product(range(batch), everywhere):
        # The lines through a position are what differs from it in one coordinate at most: itself is there once.
        seen = [to for to in everywhere if sum(i != j for i, j in zip(at, to, strict=True)) <= 1]
        assert len(seen) == sum(sides) - len(sides) + 1
        weights = [math.exp(0.7 * (query[(b, slice(None), *at)] @ key[(b, slice(None), *to)]).item()) for to in seen]
        values = sum(x * value[(b, slice(None), *to)] for x, to in zip(weights, seen, strict=True))
        torch.testing.assert_close(out[(b, slice(None), *at)], values / sum(weights), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", ["odd", (2, 3, 4, 2, 3, 4)], ids=str)
def test_weights_sum_to_one_and_nobody_is_counted_twice(size):
    query, key, _ = make(size)
    weights = reference.attention(query, key)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    *others, _ = weights.split(query.shape[2:], -1)
    for axis, line in enumerate(others, 1):
        assert (line.diagonal(dim1=axis, dim2=-1) == 0).all()
        assert (line > 0).sum() == line.numel() - weights[..., 0].numel()


@each_fast  # Triton takes no float64
def test_gradcheck(impl):
    inputs = [x.requires_grad_() for x in make((2, 2, 3, 3, 4))]
    assert torch.autograd.gradcheck(lambda *x: criss_cross_attention(*x, scale=0.8, impl=impl), inputs)
    if impl == "reference":
        assert torch.autograd.gradgradcheck(lambda *x: criss_cross_attention(*x, impl=impl), inputs)


@pytest.mark.parametrize("impl", ["reference", "blocked"])
def test_gradcheck_of_volumes(impl):
    inputs = [x.requires_grad_() for x in make((1, 2, 3, 2, 3, 2))]
    assert torch.autograd.gradcheck(lambda *x: criss_cross_attention(*x, scale=0.8, impl=impl), inputs)


# ---- every implementation against the reference


def every_size():
    for impl, (name, dtype), size in itertools.product(KERNELS, (DTYPES | {"float64": torch.float64}).items(), SIZES):
        if impl == "triton" and (name in ("float64", "bfloat16") or size.startswith("long")):
            continue  # takes no float64; the interpreter gets bfloat16 wrong, and takes minutes for long rows
        late = size not in INTERPRETER_SIZES or (name == "float16" and size in ("odd", "one_row"))
        if impl != "triton":  # half precisions are computed in float32: what size changes shows there
            late = dtype.itemsize == 2 and size not in INTERPRETER_SIZES
            late |= impl == "blocked" and size.startswith("long")  # operations of torch, of which size changes nothing
        yield slow(impl, dtype, size, id=f"{impl}-{name}-{size}", when=late)


@pytest.mark.parametrize("impl,dtype,size", every_size())
def test_equals_reference(impl, dtype, size):
    check_against_reference(impl, make(size, dtype))


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES.values()], ids=str)
@pytest.mark.parametrize("size", [*VOLUMES[:2], (1, 8, 9, 4, 5, 6), (0, 2, 3, 2, 3, 4)], ids=str)
def test_volumes_equal_reference(size, dtype):
    inputs = make(size, dtype)
    check_against_reference("blocked", inputs)
    assert torch.equal(criss_cross_attention(*inputs), criss_cross_attention(*inputs, impl="blocked"))


def test_volumes_under_torchs_contracts():
    inputs = make((2, 2, 3, 2, 3, 4), torch.float32)
    torch.library.opcheck(ops.criss_cross_fwd, (*inputs, 0.5, "blocked"))
    many = [torch.stack([x, 2 * x]) for x in inputs]
    torch.testing.assert_close(torch.func.vmap(criss_cross_attention)(*many)[0], criss_cross_attention(*inputs))
    pairs = 2 * 24 * (2 + 3 + 4)
    for impl in ("blocked", "reference"):
        assert count_flops(lambda: criss_cross_attention(*inputs, impl=impl)) == 2 * pairs * (2 + 3)  # noqa: B023
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(criss_cross_attention(*inputs), criss_cross_attention(*(x.bfloat16() for x in inputs)))


@pytest.mark.parametrize("impl", ["cpu", "triton"])
def test_volumes_have_no_kernels(impl):
    message = (
        rf"impl='{impl}' cannot .* kernels for maps \[B, D, H, W\] only. Available here: \['blocked', 'reference'\]"
    )
    with pytest.raises(RuntimeError, match=message):
        criss_cross_attention(*make(VOLUMES[0]), impl=impl)


@each_kernel
@pytest.mark.parametrize("spread,scale", [(1.0, 0.3), (3.0, 1.0), (1.0, -1.0), (1.0, 0.0)])
def test_scale_and_sharp_scores(impl, spread, scale):
    size = (1, 4, 5, 3, 4) if impl == "triton" else "33x17"  # few sharp rows are not enough to compare errors
    check_against_reference(impl, make(size, torch.float32, spread), scale=scale)


@pytest.mark.parametrize("size", ["one_pixel", "odd", "33x17", slow("long_row"), slow("long_column")])
def test_every_instruction_set(instruction_set, size):
    for dtype in (torch.float32, torch.float64):
        check_against_reference("cpu", make(size, dtype))


@each_kernel
@pytest.mark.parametrize("form", ["channels_last", "turned", "strided", "expanded"])
def test_any_strides(impl, form):
    change = {
        "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
        "turned": lambda x: x.mT.contiguous().mT,
        "strided": lambda x: x.repeat_interleave(2, 1)[:, ::2],
        "expanded": lambda x: x[:1].expand(3, -1, -1, -1),
    }[form]
    inputs = make("small", torch.float32)
    expected = criss_cross_attention(*inputs, impl="reference")
    inputs, expected = [change(x) for x in inputs], change(expected)
    torch.testing.assert_close(criss_cross_attention(*inputs, impl=impl), expected)
    if form != "expanded":
        check_against_reference(impl, inputs)


@pytest.mark.parametrize(
    "impl,bad",
    [
        slow(impl, bad, when=impl == "triton" and bad != torch.inf)
        for impl in ("reference", *KERNELS)
        for bad in (torch.nan, torch.inf, -torch.inf)
    ],
)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_what_is_not_finite_stays_in_its_cross(impl, bad, which):
    height, width = (3, 4) if impl == "triton" else (5, 6)
    inputs = make((2, 4, 5, height, width), torch.float32)
    expected = with_gradients(impl, inputs)
    inputs[which][0, 0, 1, 2] = bad
    results = with_gradients(impl, inputs)
    assert equal([x[1] for x in results], [x[1] for x in expected])
    out = results[0][0]
    touched = torch.zeros(height, width, dtype=torch.bool)
    touched[1, 2] = True
    if which > 0:  # of key and value: by the whole cross
        touched[1], touched[:, 2] = True, True
    assert torch.equal(out[:, ~touched], expected[0][0][:, ~touched])
    if bad != bad:
        assert out[0][touched].isnan().all()
    else:
        reached = criss_cross_attention(*inputs, impl="reference")[0]
        assert torch.equal(out.isfinite(), reached.isfinite())


@each_kernel
def test_repeats_bitwise(impl, with_threads):
    inputs = make((2, 3, 4, 3, 4) if impl == "triton" else "33x17", torch.float32)
    counts = (1, 2, 3, 3) if impl == "cpu" else (1, 1, 1, 1)
    first, *others = with_threads(lambda: with_gradients(impl, inputs), counts)
    assert all(equal(first, other) for other in others)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@each_dtype
@pytest.mark.parametrize("size", [*SIZES, (2, 64, 512, 97, 97), (1, 128, 1024, 33, 65), (1, 256, 40, 31, 64)], ids=str)
def test_triton_on_a_gpu(dtype, size):
    """Every row of the table of configurations."""
    inputs = make(size, dtype, 0.5, device="cuda")
    check_against_reference("triton", inputs)
    assert equal(*(with_gradients("triton", inputs, inputs[2]) for _ in range(2)))


# ---- torch contracts


@pytest.mark.parametrize(
    "impl,form",
    [
        slow(impl, form, when=impl == "triton" and form != "channels_last")
        for impl in KERNELS
        for form in ("contiguous", "channels_last", "requires_grad")
    ],
)
def test_opcheck(impl, form):
    inputs = make((1, 2, 3, 2, 3), torch.float32)
    if form == "channels_last":
        inputs = [x.contiguous(memory_format=torch.channels_last) for x in inputs]
    if form == "requires_grad":
        inputs = [x.requires_grad_() for x in inputs]
    torch.library.opcheck(ops.criss_cross_fwd, (*inputs, 0.5, impl))
    if form != "requires_grad":
        saved = ops.criss_cross_fwd(*inputs, 0.5, impl)
        torch.library.opcheck(ops.criss_cross_bwd, (torch.randn_like(saved[0]), *inputs, saved[1], 0.5, impl))


@each_fast  # Triton's interpreter gets bfloat16 wrong
def test_autocast(impl):
    inputs = make("odd", torch.float32)
    low = [x.bfloat16() for x in inputs]
    grad_out = torch.randn_like(inputs[2])
    expected = with_gradients(impl, low, grad_out)
    results = with_gradients(impl, [*inputs[:2], low[2]], grad_out, autocast=True)
    assert [x.dtype for x in results] == [torch.bfloat16, torch.float32, torch.float32, torch.bfloat16]
    assert equal(results, [y.to(x.dtype) for x, y in zip(results, expected, strict=True)])


def test_raw_op_ignores_autocast():
    inputs = make("small", torch.float32)
    expected = ops.criss_cross_fwd(*inputs, 1.0, "blocked")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = ops.criss_cross_fwd(*inputs, 1.0, "blocked")
    assert equal(results, expected)


def test_meta_tensors_have_the_real_shapes():
    inputs = make("odd", torch.bfloat16)
    out, meta = (criss_cross_attention(*(x.to(device) for x in inputs)) for device in ("cpu", "meta"))
    assert meta.shape == out.shape and meta.dtype == out.dtype and meta.stride() == out.stride()


def test_flops():
    inputs = [x.requires_grad_() for x in make((2, 4, 6, 5, 7))]
    pairs = 2 * 35 * 12
    for impl in ("blocked", "reference"):
        assert count_flops(lambda: criss_cross_attention(*inputs, impl=impl)) == 2 * pairs * (4 + 6)  # noqa: B023
    out = criss_cross_attention(*inputs, impl="blocked")
    assert count_flops(out.sum().backward) == 2 * pairs * (3 * 4 + 2 * 6)


def test_auto_takes_the_kernels_of_the_cpu(monkeypatch):
    inputs = make("small", torch.float32)
    expected = criss_cross_attention(*inputs, impl="cpu")
    assert torch.equal(criss_cross_attention(*inputs), expected)
    monkeypatch.setattr(extension, "WHY_MISSING", "it was never built")
    assert torch.equal(criss_cross_attention(*inputs), criss_cross_attention(*inputs, impl="blocked"))
    with pytest.raises(RuntimeError, match="cannot run this criss_cross_attention call: it was never built"):
        criss_cross_attention(*inputs, impl="cpu")


# ---- calls that kernels refuse


@pytest.mark.skipif(not INTERPRETED, reason="not in Triton's interpreter")
def test_what_triton_does_not_take():
    with pytest.raises(RuntimeError, match="not float64: impl='reference' does"):
        criss_cross_attention(*make("small"), impl="triton")
    with pytest.raises(RuntimeError, match="head dims up to 256, got 257: impl='blocked' takes any"):
        criss_cross_attention(*make((1, 257, 2, 1, 2), torch.float32), impl="triton")
    assert criss_cross_attention(*make((1, 2, 257, 1, 2), torch.float32), impl="triton").shape[1] == 257


def test_entry_points_refuse_what_they_cannot_read():
    query, key, value = make("small", torch.float32)
    out, stats = torch.empty_like(value), query.new_empty(2, 2, 5, 4)
    fwd, bwd = torch.ops.asa_ops.criss_cross_cpu_fwd, torch.ops.asa_ops.criss_cross_cpu_bwd
    fwd(query, key, value, 1.0, out, stats)
    wrong = {
        "q must be float32 or float64": (query.half(), key, value, 1.0, out, stats),
        "k must be of the dtype": (query, key.double(), value, 1.0, out, stats),
        "k must be of the shape": (query, key[:, :7].contiguous(), value, 1.0, out, stats),
        "v must be contiguous": (query, key, value.mT.contiguous().mT, 1.0, out, stats),
        "out must be of the shape": (query, key, value, 1.0, out[:, :2].contiguous(), stats),
        "stats must be of the rank": (query, key, value, 1.0, out, stats[0]),
        "at least one channel": (query[:, :0], key[:, :0], value, 1.0, out, stats),
    }
    for message, arguments in wrong.items():
        with pytest.raises(RuntimeError, match=message):
            fwd(*arguments)
    bwd(out, query, key, value, stats, 1.0, query.clone(), key.clone(), value.clone())
    with pytest.raises(RuntimeError, match="dq must be like q"):
        bwd(out, query, key, value, stats, 1.0, query[:, :7].clone(), key[:, :7].clone(), value.clone())


# ---- the module


def test_twice_reaches_the_whole_map():
    def reach(recurrence):
        block = CrissCrossAttention(8, recurrence=recurrence).double()
        torch.nn.init.ones_(block.gamma)
        x = torch.randn(1, 8, 5, 6, dtype=torch.float64, requires_grad=True)
        block(x)[0, :, 1, 2].sum().backward()
        return (x.grad != 0).any(1)[0]

    cross = torch.zeros(5, 6, dtype=torch.bool)
    cross[1], cross[:, 2] = True, True
    assert torch.equal(reach(1), cross) and reach(2).all()


def test_upstream_keys():
    block = CrissCrossAttention(16)
    published = {name.replace(".", "_conv."): torch.randn_like(x) for name, x in block.state_dict().items()}
    block.load_state_dict(CrissCrossAttention.from_upstream(published))
    assert torch.equal(block.value.weight, published["value_conv.weight"])
    gamma = published.pop("gamma")
    block.load_state_dict(CrissCrossAttention.from_upstream(published | {"gamma.scale": torch.tensor(0.3)}))  # mmcv
    assert block.gamma.shape == gamma.shape and block.gamma.item() == torch.tensor(0.3).item()
