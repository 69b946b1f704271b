"""One map over several processes: what they compute is what one process computes, to the last bit."""

from itertools import pairwise

import pytest
import torch
from cases import CASES, Case, make, with_grad

import asa_ops
from asa_ops import distributed

pytestmark = pytest.mark.xdist_group("processes")
SPLITS = {1: (1,), 2: (0.4,), 3: (0.0, 0.55), 4: (0.1, 0.1, 0.8)}  # where the parts after the first begin


def parts(n: int, size: int) -> list[slice]:
    """Split n tokens into `size` parts, uneven and empty ones among them."""
    bounds = [0, *(int(x * n) for x in SPLITS[size] if size > 1), n]
    return [slice(a, b) for a, b in pairwise(bounds)]


def whole(case: Case, dtype: torch.dtype, options: dict) -> list:
    """Return outputs, statistics and gradients of one process."""
    inputs, given = make(case, dtype)
    inputs = with_grad(inputs)
    out, stats = asa_ops.asa_attention(*inputs, **given, **options, return_stats=True)
    (out * weights(out)).sum().backward()
    return [out.detach(), *stats, *(x if x is None else x.grad for x in inputs)]


def weights(out: torch.Tensor) -> torch.Tensor:
    return torch.linspace(-1, 1, max(out.numel(), 1), dtype=torch.float64)[: out.numel()].view(out.shape).to(out.dtype)


def part_of_process(group, rank: int, case: Case, dtype: torch.dtype, options: dict, cuts: list) -> list:
    """Return the same of this process's tokens."""
    inputs, given = make(case, dtype)
    rows, keys = cuts[0][rank], cuts[1][rank]
    mine = [inputs[0][:, :, rows], inputs[1][:, :, keys], inputs[2][:, :, keys]]
    shape = inputs[0].shape[:3]
    mine += [x if x is None else x.expand(shape[0], x.shape[1], shape[2])[:, :, rows] for x in inputs[3:]]
    if (mask := given.get("key_padding_mask")) is not None:
        given["key_padding_mask"] = mask[:, keys]
    mine = with_grad(mine)
    out, stats = distributed.asa_attention(*mine, **given, **options, group=group, return_stats=True)
    (out * weights(inputs[0].new_empty(*shape, inputs[2].shape[-1]))[:, :, rows]).sum().backward()
    return [out.detach(), *stats, *(x if x is None else x.grad for x in mine)]


def check(processes, size: int, case: Case, dtype: torch.dtype, **options) -> None:
    expected = whole(case, dtype, options)
    n_q, n_k = expected[0].shape[2], case.n_keys or expected[0].shape[2]
    cuts = [parts(n, size) for n in (n_q, n_k)]
    answers = processes.run(size, part_of_process, case, dtype, options, cuts)
    for i, x in enumerate(expected):
        if x is None:
            assert all(answer[i] is None for answer in answers)
            continue
        found = torch.cat([answer[i] for answer in answers], 2)
        assert torch.equal(found, x) or torch.equal(found.nan_to_num(7), x.nan_to_num(7)), (i, found - x)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_equals_one_process(processes, size, case):
    check(processes, size, case, torch.float32, threshold_grad="straight_through", impl="cpu")
