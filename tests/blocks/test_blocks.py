"""The functional ops of the blocks: references against plain loops, ops against references, torch contracts, memory."""

import functools
import itertools
import math

import pytest
import torch
from block_cases import CASES, each_case, flat, make, named, unflat
from compare import check_errors, count_flops
from implementations import slow
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import asa_ops

FULL = [case for case in CASES if "empty" not in case.name]
each_full_case = pytest.mark.parametrize("case", FULL, ids=lambda case: case.name)


EXP_ULPS = 20  # of the exponentials in torch's fused attention on a CPU: exp_u20 in ATen/cpu/vec


def run(function, case, tensors, grad_out=None):
    """Return output and gradients."""
    out = function(**tensors, **case.options)
    leaves = flat(tensors)
    grads = torch.autograd.grad(out, leaves, grad_out.to(out.dtype), allow_unused=True)
    return [out, *(torch.zeros_like(x) if grad is None else grad for x, grad in zip(leaves, grads, strict=True))]


SLOW = (("map", torch.bfloat16), ("tokens", torch.float16), ("map", torch.float16))


@each_case
@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        slow(layout, dtype, id=f"{dtype}-{layout}", when=(layout, dtype) in SLOW)
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
        for layout in ("tokens", "map")
    ],
)
def test_equals_the_reference(case, layout, dtype):
    tensors = make(case, dtype, layout)
    exact_tensors = unflat(case, [x.detach().double().requires_grad_() for x in flat(tensors)])
    out = case.op(**tensors, **case.options)
    grad_out = torch.randn(out.shape, dtype=torch.float64).to(dtype)
    ours = run(case.op, case, tensors, grad_out)
    assert all(x.dtype == dtype for x in ours)
    names = ["out", *(f"grad of {name}" for name in case.tensors for _ in flat({0: tensors[name]}))]
    exact = functools.partial(run, case.reference, case, exact_tensors, grad_out)
    check_errors(names, ours, exact, exp_ulps=EXP_ULPS if case.fused else 0)


def softmax(scores):
    top = max(scores)
    weights = [math.exp(s - top) for s in scores]
    return [w / sum(weights) for w in weights]


def dot(a, b):
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def loop_non_local(q, k, v, mode="gaussian", scale=None, weight=None):
    out = []
    for query in q:
        if mode == "gaussian":
            weights = softmax([dot(query, key) * (len(query) ** -0.5 if scale is None else scale) for key in k])
        else:
            factor = 1 / len(k) if scale is None else scale
            pair = dot if mode == "dot_product" else lambda a, b: max(dot(weight[0], a) + dot(weight[1], b), 0)
            weights = [factor * pair(query, key) for key in k]
        out.append([dot(weights, column) for column in zip(*v, strict=True)])
    return out


def loop_linear(q, k, v, eps=1e-6):
    q, k = ([[a / math.sqrt(dot(x, x)) for a in x] for x in vectors] for vectors in (q, k))
    total = [sum(column) + eps for column in zip(*k, strict=True)]
    return [
        [dot([1 + dot(x, y) for y in k], column) / (len(k) + dot(x, total)) for column in zip(*v, strict=True)]
        for x in q
    ]


def loop_channel(x, eps=1e-6):
    n, channels = len(x), len(x[0])
    u = [[a / math.sqrt(dot(row, row)) for a in row] for row in x]
    out = [[0.0] * channels for _ in x]
    for c in range(channels):
        normaliser = n + sum(u[i][c] * (sum(u[i]) + eps) for i in range(n))
        for i in range(n):
            mixed = sum(u[i][m] * sum(x[j][c] * u[j][m] for j in range(n)) for m in range(channels))
            out[i][c] = (sum(x[i]) + mixed) / normaliser
    return out


def loop_efficient(q, k, v):
    maps = [softmax(column) for column in zip(*k, strict=True)]
    context = [[dot(each, column) for column in zip(*v, strict=True)] for each in maps]
    return [[dot(softmax(x), column) for column in zip(*context, strict=True)] for x in q]


def loop_interlaced(q, k, v, grid, factors, span, scale=None):
    padded = [math.ceil(side / factor) * factor for side, factor in zip(grid, factors, strict=True)]
    before = [(p - side) // 2 for p, side in zip(padded, grid, strict=True)]

    places = list(itertools.product(*map(range, grid)))

    def group(i):
        place = [a + b for a, b in zip(places[i], before, strict=True)]
        return [a % b if span == "long" else a // b for a, b in zip(place, factors, strict=True)]

    out = []
    for i, query in enumerate(q):
        members = [j for j in range(len(k)) if group(j) == group(i)]
        out += loop_non_local([query], [k[j] for j in members], [v[j] for j in members], scale=scale)
    return out


def loop_salient(q, v, topk=8):
    topk = max(len(q) // 16, 1) if topk is None else topk
    salient = sorted(q, key=lambda x: -dot(x, x))[:topk]
    columns = list(zip(*salient, strict=True))
    weights = [softmax([dot(a, b) for b in columns]) for a in columns]
    return [[dot(row, x) for row in weights] for x in v]


LOOPS = {
    "gaussian_short": loop_non_local,
    "gaussian_padded_query": loop_non_local,
    "dot_product": loop_non_local,
    "concatenation": loop_non_local,
    "linear": loop_linear,
    "channel_plain": loop_channel,
    "efficient": loop_efficient,
    "interlaced_long": loop_interlaced,
    "interlaced_short": loop_interlaced,
    "interlaced_long_padded": loop_interlaced,
    "interlaced_short_padded": loop_interlaced,
    "interlaced_sequence": loop_interlaced,
    "interlaced_sequence_short": loop_interlaced,
    "interlaced_video": loop_interlaced,
    "interlaced_video_short": loop_interlaced,
    "salient": loop_salient,
    "salient_adaptive": loop_salient,
}


@pytest.mark.parametrize("name", LOOPS)
@torch.no_grad()
def test_reference_equals_loops(name):
    case = named(name)
    tensors = make(case)
    out = case.reference(**tensors, **case.options)
    shared = {"weight": tensors.pop("weight").tolist()} if "weight" in tensors else {}
    for at in itertools.product(range(2), range(2)):  # image and head
        expected = LOOPS[name](*(x[at].tolist() for x in tensors.values()), **shared, **case.options)
        torch.testing.assert_close(out[at], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)


@torch.no_grad()
def test_channelized_axial_reference_equals_loops():
    case = named("axial")
    tensors = make(case)
    out = case.reference(**tensors)
    gates = {name: [w.tolist() for w in tensors[name]] for name in ("column_gate", "row_gate")}
    height, width = tensors["value"].shape[2:]

    def gated(mean, weights):
        *hidden, last = weights
        for weight in hidden:
            mean = [max(y, 0.2 * y) for y in (dot(row, mean) for row in weight)]
        return [1 / (1 + math.exp(-dot(row, mean))) for row in last]

    for b in range(2):
        p, r, v = (tensors[name][b].permute(1, 2, 0).tolist() for name in ("column", "row", "value"))
        y = [[None] * width for _ in range(height)]
        for w in range(width):
            column = loop_non_local(*([x[h][w] for h in range(height)] for x in (p, p, v)), scale=1.0)
            for h in range(height):
                y[h][w] = column[h]
        for h in range(height):
            gate = gated([sum(c) / height / width for c in zip(*y[h], strict=True)], gates["column_gate"])
            y[h] = loop_non_local(r[h], r[h], [[a * g for a, g in zip(x, gate, strict=True)] for x in y[h]], scale=1.0)
        for w in range(width):
            column = [y[h][w] for h in range(height)]
            gate = gated([sum(c) / height / width for c in zip(*column, strict=True)], gates["row_gate"])
            for h in range(height):
                expected = torch.tensor([a * g for a, g in zip(y[h][w], gate, strict=True)], dtype=torch.float64)
                torch.testing.assert_close(out[b, :, h, w], expected, rtol=0, atol=1e-12)


@torch.no_grad()
def test_axial_attention_over_three_axes_equals_loops():
    """Each step by its words: attend along an axis, then gate a place on it by the mean over everything else."""
    case = named("axial_video")
    tensors = make(case)
    out = case.op(**tensors)
    x = tensors["value"].clone()
    sides = x.shape[2:]
    for axis, name in enumerate(("time", "column", "row")):
        p, y = tensors[name], torch.empty_like(x)
        for b, *at in itertools.product(range(2), *map(range, sides)):
            line = [(b, slice(None), *at[:axis], i, *at[axis + 1 :]) for i in range(sides[axis])]
            scores = [(p[(b, slice(None), *at)] * p[each]).sum().item() for each in line]
            weights = softmax(scores)
            y[(b, slice(None), *at)] = sum(w * x[each] for w, each in zip(weights, line, strict=True))
        first, last = tensors[f"{name}_gate"][0], tensors[f"{name}_gate"][-1]
        for b, i in itertools.product(range(2), range(sides[axis])):
            place = y[b].select(axis + 1, i)  # a view [C, side, side]
            mean = place.mean((1, 2)) / sides[axis]  # of the products, one for each key
            hidden = [mean] if name == "row" else [torch.nn.functional.leaky_relu(first @ mean, 0.2)]
            if name == "column":
                hidden.append(torch.nn.functional.leaky_relu(tensors["column_gate"][1] @ hidden[-1], 0.2))
            place *= (last @ hidden[-1]).sigmoid()[:, None, None]
        x = y
    torch.testing.assert_close(out, x, rtol=0, atol=1e-12)


@torch.no_grad()
def test_squeeze_and_attention_reference_equals_loops():
    for name in ("squeeze", "squeeze_odd", "squeeze_bilinear_odd", "squeeze_sequence", "squeeze_trilinear"):
        case = named(name)
        tensors = make(case)
        out = case.reference(**tensors, **case.options)
        r, a = tensors["residual"], tensors["attention"]
        pool = case.options.get("pool", 2)
        a = a if "activation" in case.options else a.sigmoid()
        for at in itertools.product(*map(range, r.shape[2:])):
            gate = a[(..., *(i // pool for i in at))]
            if "linear" in case.options.get("upsample", ""):  # between the centres, outside them the nearest
                where = [min(max((i + 0.5) / pool - 0.5, 0), n - 1) for i, n in zip(at, a.shape[2:], strict=True)]
                gate = sum(
                    a[(..., *i)] * math.prod(max(1 - abs(x - j), 0) for x, j in zip(where, i, strict=True))
                    for i in itertools.product(*map(range, a.shape[2:]))
                )
            torch.testing.assert_close(out[(..., *at)], gate * r[(..., *at)] + gate, rtol=0, atol=1e-12)


@each_full_case
def test_gradients_are_numerical_ones(case):
    tensors = make(case)
    small = unflat(case, [x[:1].detach().requires_grad_() if x.dim() > 2 else x for x in flat(tensors)])

    def function(*leaves):
        return case.op(**unflat(case, leaves), **case.options)

    torch.autograd.gradcheck(function, flat(small), fast_mode=True)
    if not case.fused:
        torch.autograd.gradgradcheck(function, flat(small), fast_mode=True)


@each_case
def test_autocast(case):
    tensors = make(case, torch.float32)
    exact = case.reference(**unflat(case, [x.double() for x in flat(tensors)]), **case.options)
    rounded = unflat(case, [x.bfloat16() for x in flat(tensors)])
    plain = case.op(**rounded, **case.options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = case.op(**tensors, **case.options)
    assert out.dtype == torch.bfloat16 and torch.equal(out, plain)
    torch.testing.assert_close(out.double(), exact, rtol=0.1, atol=0.1)
    out.sum().backward()
    assert all(x.grad is not None and x.grad.dtype == torch.float32 for x in flat(tensors))


@pytest.mark.parametrize("name", ["linear", "channel_plain"])
def test_a_position_of_zeros_is_finite(name):
    case = named(name)
    tensors = make(case)
    with torch.no_grad():
        for key in {"query", "key", "x"} & set(tensors):
            tensors[key][:, :, 3] = 0
    out, *grads = run(case.op, case, tensors, torch.ones_like(case.op(**tensors)))
    assert all(x.isfinite().all() for x in (out, *grads))
    if "query" in tensors:
        assert not grads[0][:, :, 3].any() and not grads[1][:, :, 3].any()
        mean = tensors["value"].mean(-2)  # a query without direction weighs all keys alike
        torch.testing.assert_close(out[:, :, 3], mean, rtol=1e-5, atol=1e-5)


def test_padding_has_no_part_in_interlaced_attention():
    case = named("interlaced_long_padded")
    tensors = make(case)
    tensors["value"] = torch.ones_like(tensors["value"])
    out = case.op(**tensors, **case.options)
    torch.testing.assert_close(out, torch.ones_like(out))


class _LargestTensor(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        sizes = [x.untyped_storage().nbytes() // x.element_size() for x in tree_leaves(out) if torch.is_tensor(x)]
        self.elements = max([self.elements, *sizes])
        return out


FLOPS = {  # of products, as the folders' __init__ say; two heads and two images
    "gaussian_short": 4 * 2 * 9 * 9 * (6 + 5),
    "dot_product": 4 * 2 * (35 + 17) * 4 * 3,
    "linear": 4 * 4 * 35 * (4 + 1) * 7,
    "channel_plain": 4 * (4 * 35 * 5**2 + 2 * 35 * 5),  # and one row more for the normaliser
    "efficient": 4 * 4 * 35 * 4 * 7,
    "axial_plain": 2 * 2 * 35 * (5 * (3 + 6) + 7 * (2 + 6)),
    "axial_video_plain": 2 * 2 * 6 * (3 * (4 + 6) + 1 * (3 + 6) + 2 * (2 + 6)),
    "interlaced_long": 4 * 2 * 48 * (48 // 6) * (3 + 5),
    "interlaced_short": 4 * 2 * 48 * 6 * (3 + 5),
    "salient": 4 * 2 * (35 + 8) * 5**2,
}


@pytest.mark.parametrize("name", FLOPS)
def test_operations_are_as_stated(name):
    case = named(name)
    assert count_flops(lambda: case.op(**make(case), **case.options)) == FLOPS[name]


N, D = 24 * 30, 8
LARGE = {
    "gaussian": ("non_local_attention", [(1, 1, N, D)] * 3, {}, 4 * N * D),
    "gaussian, unequal": ("non_local_attention", [(1, 1, N, D)] * 2 + [(1, 1, N, 3)], {}, 4 * N * D),
    "dot_product": ("non_local_attention", [(1, 1, N, D)] * 3, {"mode": "dot_product"}, 2 * N * D),
    "concatenation": ("non_local_attention", [(1, 1, N, D)] * 3, {"mode": "concatenation"}, 2 * N * D),
    "linear": ("linear_attention", [(1, 1, N, D)] * 3, {}, 2 * N * D),
    "channel": ("channel_linear_attention", [(1, 1, N, D)], {}, 2 * N * D),
    "efficient": ("efficient_attention", [(1, 1, N, D)] * 3, {}, 2 * N * D),
    "axial": ("channelized_axial_attention", [(1, D, 24, 30)] * 3, {}, N * (24 + 30)),
    "interlaced": (
        "interlaced_sparse_attention",
        [(1, 1, N, D)] * 3,
        {"grid": (24, 30), "factors": (6, 5)},
        N * (N // 30 + D),
    ),
    "salient": ("salient_positions_attention", [(1, 1, N, D)] * 2, {}, 2 * N * D),
}


@pytest.mark.parametrize("name", LARGE)
def test_memory_is_linear(name, monkeypatch):
    monkeypatch.setattr(asa_ops.blocks.softmax_attention, "_FEW_SCORES", 0)  # beyond that many
    function, shapes, options, limit = LARGE[name]
    tensors = [torch.randn(shape, requires_grad=True) for shape in shapes]
    if name == "concatenation":
        options = options | {"weight": torch.randn(2, D)}
    if name == "axial":
        options = {gate: [torch.randn(D, D)] for gate in ("column_gate", "row_gate")}
    with _LargestTensor() as largest:
        getattr(asa_ops, function)(*tensors, **options).sum().backward()
    assert largest.elements <= limit < N * N
