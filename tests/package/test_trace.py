"""torch.jit.trace: functions and blocks give on other numbers what they give untraced, with gradients; traces save."""

import io

import block_cases
import cases
import pytest
import torch
from implementations import each_fast

from asa_ops import asa_attention, criss_cross_attention, nn, reciprocal_neighbors

pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit:DeprecationWarning")


def saved_and_loaded(traced):
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    return torch.jit.load(file)


def results(function, inputs):
    """Return the outputs, and the gradients of the first by all inputs that have one."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if not outputs[0].requires_grad:
        return outputs
    return *outputs, *torch.autograd.grad(outputs[0].square().sum(), leaves, materialize_grads=True)


def check(function, example, others, grad=True):
    """Trace ``function`` with ``example``, with or without gradients; compare on others, before and after saving."""
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(function, tuple(example))
    for run in (traced, saved_and_loaded(traced)):
        for inputs in (example, others):  # from the second call on the executor may compute otherwise
            for x, y in zip(results(run, inputs), results(function, inputs), strict=True):
                torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


BLOCKS = [row[:2] for row in block_cases.MODULES]
BLOCKS += [("asa", {"mode": "gaussian", "window": 5, "topk": 9, "impl": "blocked"})]  # whose thresholds learn there


@pytest.mark.parametrize("name, options", BLOCKS, ids=str)
def test_blocks(name, options):
    block = nn.build(name, 16, **options).double().train("dropout" not in options)
    for parameter in block.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter)
    x, other = torch.randn(2, 2, 16, 5, 7, dtype=torch.float64)
    check(block, [x], [other], grad=name != "asa")  # which has to run with gradients even if traced without


# For a gate's leaky ReLU with a slope that float32 holds: torch.jit rounds it in the gradient of a loaded trace.
@pytest.mark.parametrize("case", ["axial_slope" if case == "axial" else case for case in block_cases.CONTRACT_CASES])
def test_functions_of_the_blocks(case):
    case = block_cases.named(case)
    example, other = (block_cases.flat(block_cases.make(case, seed=seed)) for seed in (0, 1))
    check(lambda *tensors: case.op(**block_cases.unflat(case, tensors), **case.options), example, other)


@each_fast
def test_criss_cross_attention(impl):
    example, other = torch.randn(2, 3, 1, 4, 3, 2, dtype=torch.float64)
    check(lambda *maps: criss_cross_attention(*maps, scale=0.5, impl=impl), example, other)


@each_fast
@pytest.mark.parametrize("name", ["plain", "topk", "padding", "more_keys"])
def test_adaptive_sparse_attention(name, impl):
    (inputs, options), (others, _) = (cases.make(cases.named(name), seed=seed) for seed in (0, 1))
    given = [i for i, x in enumerate(inputs) if x is not None]

    def complete(tensors):
        return [tensors[given.index(i)] if i in given else None for i in range(5)]

    def attend(*tensors):
        out, stats = asa_attention(*complete(tensors), **options, impl=impl, return_stats=True)
        return out, *stats

    def find(*tensors):
        query, key, _, alpha, beta = complete(tensors)
        return tuple(reciprocal_neighbors(query, key, alpha, beta, **options, impl=impl))

    example, other = ([x for x in tensors if x is not None] for tensors in (inputs, others))
    check(attend, example, other)
    check(find, example, other)  # as many survivors as there are, not as in the example


@pytest.mark.parametrize("name, options", [("asa", {}), ("interlaced_sparse", {"factors": (1, 1)})])
def test_a_map_of_another_shape_is_an_error_where_the_grid_is_part_of_the_trace(name, options):
    traced = torch.jit.trace(nn.build(name, 16, **options), (torch.randn(1, 16, 5, 7),))
    for size in ((7, 5), (6, 7)):
        with pytest.raises(RuntimeError):
            traced(torch.randn(1, 16, *size))
