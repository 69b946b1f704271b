"""Parts of a map, as processes compute them, one after another: together they are one call, to the last bit."""

from dataclasses import replace

import in_parts
import pytest
import torch
from cases import CASES, Case
from implementations import INTERPRETED, slow
from in_parts import BAND
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from asa_ops.asa.parts import Scan
from asa_ops.asa.types import Inputs, Options
from asa_ops.core import triton_launch

if not INTERPRETED:
    pytest.skip("Triton is not interpreted here", allow_module_level=True)

from asa_ops.asa.triton import configs
from asa_ops.asa.triton.part import Part

CASES = [case for case in CASES if case.grid == (9, 7)]
VOLUME = Case("extra_volume", grid=(3, 5, 9), batch=1, heads=1, options={"window": (3, 1, 3), "extra_tokens": 2})
# Two blocks of 128 positions; and four, or three of keys.
SMALL, LARGE = (
    [
        replace(case, grid=grid, n_keys=case.n_keys and more + case.n_keys, batch=1 + case.padding, heads=1)
        for case in CASES
    ]
    for grid, more in (((9, 15), 120), ((19, 23), 270))
)
QUICK = ("more_keys", "extra_volume")
# How many positions parts scan, how many they compute where what is known by then moves them, and their own keys where
# those are not their rows.
SPLITS = {2: ([128, 128], [0, 256], [128, 128]), 4: ([128, 256, 0, 128], [256, 0, 128, 128], [0, 256, 0, 128])}


def check(case: Case, dtype: torch.dtype = torch.float32, band: float = BAND) -> None:
    inputs, options = in_parts.arguments(case, dtype)
    split = SPLITS[configs.padded_length(inputs.query.shape[2]) // 128]
    in_parts.check(Part, in_parts.triton_call, inputs, options, band, *split, backwards=1 + (len(split[0]) > 2))


def named(name: str, cases: list[Case] = LARGE) -> Case:
    return next(case for case in cases if case.name == name)


@pytest.mark.parametrize("case", [slow(x, when=x.name not in QUICK, id=x.name) for x in (*SMALL, VOLUME)])
def test_parts_are_one_call(case):
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.name)
def test_more_parts_are_one_call(case):
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "one_way", "dense", "padding_topk"])
def test_without_thresholds_that_learn(name):
    check(named(name), band=0.0)


@pytest.mark.slow
def test_query_is_key():
    """One tensor in a call, whose copies processes gather."""
    inputs, options = in_parts.arguments(named("plain"), torch.float32)

    def one_call(inputs, *rest):
        return in_parts.triton_call(inputs._replace(key=inputs.query), *rest)

    in_parts.check(Part, one_call, inputs._replace(key=inputs.query.clone()), options, BAND, *SPLITS[4])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "one_way"])
def test_float16(name):
    """Whose gradients of scores are bounded by numbers of all rows."""
    check(named(name), torch.float16)


# Blocks of every kernel, as on a GPU but of other sizes.
BLOCKS = {
    "descriptors": configs.Config(64, 64, 4, 1, tma=True),
    "wide": configs.Config(128, 128, 4, 1, tma=True),
    "chunks": configs.Config(64, 64, 4, 1, chunk=16, columns=16),
}


@pytest.mark.slow
@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("name", ["plain", "topk", "one_way"])
def test_other_blocks(monkeypatch, blocks, name):
    monkeypatch.setattr(configs, "find", lambda *_: BLOCKS[blocks])
    check(replace(named(name), dim=19, dim_v=33))


class Allocated(TorchDispatchMode):
    """Counts the bytes of new tensors, all and the largest."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        new = [x for x in (result if isinstance(result, (list, tuple)) else [result]) if isinstance(x, Tensor)]
        if not function._schema.is_mutable and all(x._base is None for x in new):
            self.sizes += [x.untyped_storage().nbytes() for x in new]
        return result


@pytest.mark.parametrize(("reciprocal", "band"), [(True, 0.0), (True, BAND), (False, 0.0)])
def test_memory_is_that_of_own_pairs(monkeypatch, reciprocal, band):
    """On tensors without memory: bits of own rows and all keys, of all rows and own keys where they are read too."""
    n, size, dim = 2**17, 16, 16
    monkeypatch.setattr(triton_launch, "launch", lambda *_, **__: None)
    query, key, value = (torch.empty(1, 1, n, dim, device="meta") for _ in range(3))
    alpha, beta = torch.empty(1, 1, n, device="meta"), torch.empty(1, 1, n, device="meta") if reciprocal else None
    inputs, options = (
        Inputs(query, key, value, alpha, beta, None),
        Options.of([256, 512], [3, 3], 0, 0, reciprocal, 0.1),
    )
    own, bits, of_tokens = (n // size, 2 * n // size), n * n // size // 8, n * dim * 4
    with Allocated() as forward:
        part = Part(inputs, options, band, True)
        numbers, flags, peaks = part.scan(own)
        numbers = numbers.new_empty(1, n, numbers.shape[2])
        flags = flags.new_empty(1, n // 64, n // 64)
        outputs, kept = part.attend(own, own, Scan(numbers, flags, peaks))
    with Allocated() as backward:
        part = Part(inputs, options, band, True)
        of_rows, largest = part.begin_backward(own, own, torch.empty_like(outputs.out), outputs, kept)
        part.end_backward(own, own, [x.new_empty(1, n, *x.shape[2:]) for x in of_rows], largest)
    sizes = forward.sizes, backward.sizes, [x.nbytes for x in kept if x is not None]
    assert max(map(max, sizes)) == bits
    several = 2 if band else 1
    assert [sum(x == bits for x in of) for of in sizes] == [several, 0 if reciprocal else 1, several]
    # Beside bits, a quarter of them of peaks, a few percent of lists and flags, and numbers of tokens.
    beside = [sum(x for x in of if x != bits) for of in sizes]
    assert beside[0] < 0.3 * bits + 30 * of_tokens and beside[1] < 0.1 * bits + 30 * of_tokens
    assert beside[2] < (0.3 if band else 0.05) * bits
