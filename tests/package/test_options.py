"""Options of functions and blocks: numbers from elsewhere are taken as torch's own functions take them, or refused."""

import enum
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

import asa_ops
from asa_ops import nn
from asa_ops.core import checks


class Indexed:
    """What is an integer for its __index__ alone."""

    def __init__(self, x):
        self.x = x

    def __index__(self):
        return self.x


INTEGERS = {
    "int": int,
    "IntEnum": lambda x: enum.IntEnum("Size", {"ours": x}).ours,
    "__index__": Indexed,
    "np.int64": np.int64,
    "np.uint8": np.uint8,
    "np.array": np.array,
    "tensor": torch.tensor,
    "one-element tensor": lambda x: torch.tensor([x], dtype=torch.int32),
}
NO_INTEGERS = [True, np.bool_(True), torch.tensor(True), 3.0, np.float64(3), torch.tensor(3.0), Fraction(3), "3", None]
NUMBERS = {
    "int": lambda x: int(x) if x == int(x) else x,
    "bool": lambda x: True if x == 1 else x,
    "np.float32": np.float32,
    "np.float16": np.float16,
    "np.int64": lambda x: np.int64(x) if x == int(x) else np.float64(x),
    "Fraction": Fraction,
    "tensor": torch.tensor,
    "parameter, detached": lambda x: torch.nn.Parameter(torch.tensor(x)).detach(),
}
NO_NUMBERS = ["2", None, 2j, np.array([2.0]), torch.tensor([2.0]), torch.tensor(2j)]
NO_NUMBERS += [torch.tensor(2.0, requires_grad=True)]
each_integer = pytest.mark.parametrize("integer", INTEGERS.values(), ids=INTEGERS)


def same_kind(x):
    return f"type {type(x).__name__}" if not isinstance(x, torch.Tensor) else f"a {x.dtype} tensor"


@each_integer
def test_integers(integer):
    x = checks.as_int("size", integer(3), at_least=0)
    assert x == 3 and type(x) is int
    with pytest.raises(ValueError, match="size must be >= 4, got size=3"):
        checks.as_int("size", integer(3), at_least=4)


@pytest.mark.parametrize("x", NO_INTEGERS, ids=same_kind)
def test_what_is_no_integer_is_named_with_its_type(x):
    for refuse in (
        lambda: checks.as_positive_int("topk", x),
        lambda: checks.as_window(x, 2),
        lambda: checks.as_grid((4, x), 12, 1, 2, 3),
        lambda: checks.as_tuple("factors", [x, 4], 2),
        lambda: checks.as_each_side("pool", (4, x), 2),
        lambda: checks.as_dims(x),
    ):
        with pytest.raises(TypeError, match=f"integer.*got .*{same_kind(x)}"):
            refuse()


@pytest.mark.parametrize("number", NUMBERS.values(), ids=NUMBERS)
@pytest.mark.parametrize("value", [1.0, -0.5])
def test_numbers(number, value):
    x = checks.as_number("scale", number(value))
    assert x == value and type(x) is float


@pytest.mark.parametrize("x", NO_NUMBERS, ids=same_kind)
def test_what_is_no_number_is_named_with_its_type(x):
    with pytest.raises(TypeError, match=f"scale must be a number, got .*{same_kind(x)}"):
        checks.as_number("scale", x)


def test_a_tensor_whose_gradient_would_be_lost_is_refused():
    with pytest.raises(TypeError, match="that requires a gradient, and would get none"):
        checks.as_number("scale", torch.nn.Parameter(torch.ones(())))


@pytest.mark.parametrize("x", [1, torch.zeros(2), np.zeros((2, 2)), ("gaussian",)], ids=same_kind)
def test_what_is_no_name_is_shown_with_its_type(x):
    with pytest.raises(ValueError, match=rf"mode must be one of \['gaussian'\], got .*{same_kind(x)}"):
        checks.check_choice("mode", x, ("gaussian",))


def test_torch_takes_the_same():
    """The rule stands on what torch's own functions do; should they change, this shows it."""
    image = torch.randn(1, 4, 8, 8)
    for size in (np.int64(3), Indexed(3), torch.tensor(3)):
        F.max_pool2d(image, (size, size))
    for eps in (np.float32(1), torch.tensor(1.0), True):
        F.layer_norm(image, (8,), eps=eps)
    for size in (True, 3.0):
        with pytest.raises(TypeError):
            F.max_pool2d(image, (size, size))
    for eps in ("1", torch.tensor(1.0, requires_grad=True)):
        with pytest.raises(TypeError):
            F.layer_norm(image, (8,), eps=eps)


# ---- every option of every function

TOKENS, MAP = (1, 2, 24, 4), (1, 4, 4, 6)
TRIPLE = ("query", "key", "value")
CALLS = [  # function, tensors, options that are integers, options that are numbers
    ("asa_attention", dict.fromkeys(TRIPLE, TOKENS), {"grid": (4, 6), "window": 5, "topk": 7}, {"scale": 2.0}),
    ("asa_attention", dict.fromkeys(TRIPLE, TOKENS), {}, {"threshold_band": 3.0}),
    ("reciprocal_neighbors", dict.fromkeys(TRIPLE[:2], TOKENS), {"grid": (4, 6), "topk": 7}, {"scale": 2.0}),
    ("criss_cross_attention", dict.fromkeys(TRIPLE, MAP), {}, {"scale": 2.0}),
    ("non_local_attention", dict.fromkeys(TRIPLE, TOKENS), {}, {"scale": 2.0}),
    ("linear_attention", dict.fromkeys(TRIPLE, TOKENS), {}, {"eps": 1.0}),
    ("channel_linear_attention", {"x": TOKENS}, {}, {"eps": 1.0}),
    ("channelized_axial_attention", dict.fromkeys(("column", "row", "value"), MAP), {}, {"negative_slope": 0.5}),
    ("interlaced_sparse_attention", dict.fromkeys(TRIPLE, TOKENS), {"grid": [4, 6], "factors": (3, 4)}, {"scale": 2.0}),
    ("salient_positions_attention", {"query": TOKENS, "value": TOKENS}, {"topk": 5}, {}),
    ("squeeze_and_attention", {"residual": MAP, "attention": (1, 4, 2, 2)}, {"pool": 3}, {}),
]


def converted(options, convert):
    """Return ``options`` with every number in them given to ``convert``."""
    return {
        name: type(x)(map(convert, x)) if isinstance(x, tuple | list) else convert(x) for name, x in options.items()
    }


def leaves(x):
    return [leaf for each in x for leaf in leaves(each)] if isinstance(x, tuple | list) else [x]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: f"{call[0]}, {', '.join((*call[2], *call[3]))}")
def test_functions_take_numbers_from_elsewhere(call, monkeypatch):
    name, shapes, integers, numbers = call
    function, tensors = getattr(asa_ops, name), {name: torch.randn(shape) for name, shape in shapes.items()}
    seen = []  # by the custom ops, whose schemas want Python's own numbers
    asa, criss_cross = asa_ops.asa.ops, asa_ops.criss_cross.ops
    for ops, inner in ((asa, "attend"), (asa, "neighbors"), (criss_cross, "attend")):
        run = getattr(ops, inner)
        monkeypatch.setattr(ops, inner, lambda *args, run=run: seen.extend(leaves(args)) or run(*args))
    expected = function(**tensors, **integers, **numbers)
    for integer, number in zip(INTEGERS.values(), NUMBERS.values(), strict=True):
        out = function(**tensors, **converted(integers, integer), **converted(numbers, number))
        torch.testing.assert_close(out, expected, rtol=0, atol=0)
    assert {type(x) for x in seen} <= {torch.Tensor, int, float, bool, str, type(None)}


BLOCKS = [  # name, options that are integers, options that are numbers
    ("asa", {"reduction": 4, "window": 5, "topk": 9, "heads": 2}, {"threshold_band": 1.0}),
    ("channelized_axial", {"out_channels": 8, "key_channels": 4, "hidden_layers": 2}, {"hidden_ratio": 0.5}),
    ("criss_cross", {"reduction": 4, "recurrence": 3}, {}),
    ("efficient_attention", {"key_channels": 8, "heads": 2, "value_channels": 4}, {}),
    ("interlaced_sparse", {"out_channels": 8, "key_channels": 4, "factors": [2, 3]}, {"dropout": 0.5}),
    ("interlaced_sparse", {"value_channels": 8, "heads": 2, "factors": (3, 2)}, {}),
    ("linear_attention", {"reduction": 4}, {"eps": 1.0}),
    ("non_local", {"reduction": 4, "heads": 2}, {}),
    ("salient_positions", {"inner_channels": 4, "topk": 5, "heads": 2}, {}),
    ("squeeze_and_attention", {"out_channels": 8, "pool": 3}, {}),
    ("squeeze_and_attention", {"pool": (2, 3), "dims": 2}, {}),
    ("asa", {"window": (3, 5), "dims": 2}, {}),
]


@pytest.mark.parametrize("name, integers, numbers", BLOCKS, ids=str)
def test_blocks_take_numbers_from_elsewhere(name, integers, numbers):
    x = torch.randn(2, 16, 6, 7)
    expected = nn.build(name, 16, **integers, **numbers)
    for integer, number in zip(INTEGERS.values(), NUMBERS.values(), strict=True):
        block = nn.build(name, integer(16), **converted(integers, integer), **converted(numbers, number))
        assert repr(block) == repr(expected)
        for module in block.modules():
            for attribute, value in vars(module).items():
                if not attribute.startswith("_"):
                    assert not isinstance(value, np.generic | np.ndarray | torch.Tensor | Indexed | Fraction), attribute
        block.load_state_dict(expected.state_dict())
        assert torch.equal(block.eval()(x), expected.eval()(x))
    kinds = dict.fromkeys(integers, ".*integer.*got .*") | dict.fromkeys(numbers, "a number, got 'wide' ")
    for option, kind in kinds.items():
        with pytest.raises(TypeError, match=f"{option} must be {kind}of type str"):
            nn.build(name, 16, **(integers | numbers | {option: "wide"}))


# ---- under torch.compile


@pytest.mark.parametrize("topk", [np.int64(5), torch.tensor(5), 5], ids=same_kind)
def test_integers_from_elsewhere_compile(topk):
    torch._dynamo.reset()
    query, value = torch.randn(2, 1, 2, 24, 4)

    def function(query, value):
        return asa_ops.asa_attention(query, query, value, topk=topk, window=topk, grid=(4, 6))

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(query, value), function(query, value))


@pytest.mark.parametrize("option", ["topk", "window"])
def test_symbolic_integers_stay_symbolic(option):
    """One more graph for all values but the first."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    query, value = torch.randn(2, 1, 2, 24, 4)
    beta = torch.ones(1, 1, 24)

    def function(query, value, x):
        return asa_ops.asa_attention(query, query, value, beta=beta, grid=(4, 6), **{option: x})

    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for x in (3, 5, 7, 9):
        torch.testing.assert_close(compiled(query, value, x), function(query, value, x))
    assert counter.frame_count == 2
