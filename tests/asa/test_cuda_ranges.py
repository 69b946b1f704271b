"""Ranges of the rows of a map by the CUDA kernels, emulated: one after another in this process, to the last bit one call.

How processes exchange what passes between the stages is in tests/distributed.
"""

import itertools
import math
import random
from dataclasses import replace

import pytest
import simt
import torch
from cases import CASES, Case, make, op_arguments
from implementations import slow

from asa_ops.asa import cuda_part, ops
from asa_ops.asa.types import Inputs, Options
from asa_ops.asa.parts import Outputs, Scan

if not simt.AVAILABLE:
    pytest.skip("no C++ compiler here, or a GPU: kernels run there", allow_module_level=True)

BLOCK = cuda_part.Part.block


@pytest.fixture(scope="module", autouse=True)
def kernels():
    simt.load()


def ranges(padded: int, bounds: tuple[float, ...]) -> list[tuple[int, int]]:
    """Cut positions in whole blocks, at about these shares of them."""
    cuts = [0, *(round(x * padded / BLOCK) * BLOCK for x in bounds), padded]
    return list(itertools.pairwise(cuts))


def one_call(arguments: tuple, d_out: torch.Tensor) -> list:
    """Return outputs, gradients and the graph of all rows together."""
    forward = ops.of("cuda", d_out.device)
    outputs = forward.fwd(*arguments)
    band = arguments[11]
    gradients = list(forward.bwd(d_out, *arguments[:6], *outputs, *arguments[6:11], band))
    offsets = torch.nn.functional.pad(outputs[3].flatten().long().cumsum(0), (1, 0))
    columns = torch.empty(int(offsets[-1]), dtype=torch.int32)
    forward.list_survivors(*arguments[:6], *outputs, *arguments[6:12], offsets, columns)
    return [*outputs[:4], *gradients, columns]


def in_ranges(arguments: tuple, d_out: torch.Tensor, bounds: tuple[float, ...], scanned: tuple[float, ...]) -> list:
    """Return the same, range by range; scanned by other ranges, if there are thresholds."""
    inputs, options, (band, _) = Inputs(*arguments[:6]), Options.of(*arguments[6:11]), arguments[11:]

    def begin() -> cuda_part.Part:
        return cuda_part.Part(ops.broadcast(inputs), options, band, True)

    first = begin()
    n_rows, n_keys = first.row_order.shape[1], first.key_order.shape[1]
    rows, keys = ranges(n_rows, bounds), ranges(n_keys, bounds)
    has_thresholds = inputs.alpha is not None or options.topk > 0
    processes = [begin() for _ in rows]
    scans = [x.scan(y) for x, y in zip(processes, ranges(n_rows, scanned) if has_thresholds else rows, strict=True)]
    assert all((x is not None) == has_thresholds for x in scans)

    attended, columns = [], []
    for part, x, y in zip(processes, rows, keys, strict=True):
        outputs, kept = part.attend(x, y, whole(scans, x) if has_thresholds else None)
        poisoned = [poison(z, part.row_order, x) for z in outputs]
        attended.append((Outputs(*poisoned), kept))
        counts = gather_home([poisoned[3]], part.row_order, [x], torch.zeros_like(poisoned[3]))
        offsets = torch.nn.functional.pad(counts.flatten().long().cumsum(0), (1, 0))
        columns.append((counts, torch.empty(int(offsets[-1]), dtype=torch.int32)))
        part.list_survivors(x, offsets, columns[-1][1])

    begun, passes = [], []
    for x, y, (outputs, kept) in zip(rows, keys, attended, strict=True):
        passes.append(begin())
        mine = poison(d_out.clone(), first.row_order, x)
        begun.append(passes[-1].begin_backward(x, y, mine, outputs, kept))
    of_rows = [torch.cat(x, 1) for x in zip(*(x for x, _ in begun), strict=True)]
    largest = torch.stack([x for _, x in begun]).amax(0)
    ended = [x.end_backward(y, z, of_rows, largest) for x, y, z in zip(passes, rows, keys, strict=True)]

    results = [
        gather_home([x[0][i] for x in attended], first.row_order, rows, torch.empty_like(attended[0][0][i]))
        for i in range(4)
    ]
    for i, x in enumerate(inputs[:5]):
        order, cuts = (first.key_order, keys) if i in (1, 2) else (first.row_order, rows)
        of_ranges = [gradients[i] for gradients in ended]
        dx = None if of_ranges[0] is None else gather_home(of_ranges, order, cuts, torch.empty_like(of_ranges[0]))
        results.append(ops.like(dx, x, d_out))
    return [*results, sort_columns(columns)]


def whole(scans: list[Scan], rows: tuple[int, int]) -> Scan:
    """Return what is known of all rows, and the peaks of some."""
    numbers, flags = (torch.cat(x, 1) for x in list(zip(*scans, strict=True))[:2])
    peaks = None if scans[0].peaks is None else torch.cat([x.peaks for x in scans], 2)[:, :, slice(*rows)]
    return Scan(numbers, flags, peaks)


def tokens_of(order: torch.Tensor, image: int, positions: tuple[int, int]) -> torch.Tensor:
    """Return the tokens at some positions, padding among them."""
    tokens = order[image % len(order), slice(*positions)].long()
    return torch.where(tokens < -1, -2 - tokens, tokens)[tokens != -1]


def gather_home(parts: list, order: torch.Tensor, cuts: list, out: torch.Tensor) -> torch.Tensor:
    """Write what each range has of its tokens into ``out``."""
    for part, positions in zip(parts, cuts, strict=True):
        for image in range(out.shape[0]):
            tokens = tokens_of(order, image, positions)
            out[image][:, tokens] = part[image][:, tokens]
    return out


def poison(x: torch.Tensor, order: torch.Tensor, positions: tuple[int, int]) -> torch.Tensor:
    """Return a tensor of rows whose other tokens are no numbers."""
    nothing = torch.full_like(x, math.nan if x.is_floating_point() else -(2**31))
    return gather_home([x], order, [positions], nothing)


def sort_columns(parts: list) -> torch.Tensor:
    """Return the columns of all rows from those that ranges list of theirs."""
    rows: list[torch.Tensor] = [torch.empty(0, dtype=torch.int32)] * parts[0][0].numel()
    for counts, columns in parts:
        for row, of_row in enumerate(columns.split(counts.flatten().tolist())):
            rows[row] = of_row if len(of_row) else rows[row]
    return torch.cat(rows)


NAMES = ["out", "lse", "lse_kept", "survivors", "dq", "dk", "dv", "dalpha", "dbeta", "columns"]


def check(case: Case, dtype: torch.dtype, bounds: tuple[float, ...], scanned: tuple[float, ...], band=2.0, change=None) -> None:
    inputs, options = make(case, dtype)
    d_out = torch.randn(*inputs[0].shape[:3], case.dim_v, generator=torch.Generator().manual_seed(1)).to(dtype)
    if change is not None:
        change(inputs, d_out)
    arguments = op_arguments(inputs, options, band=band)
    expected, found = one_call(arguments, d_out), in_ranges(arguments, d_out, bounds, scanned)
    for name, x, y in zip(NAMES, expected, found, strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape, name
        assert torch.equal(x.isnan(), y.isnan()) and torch.equal(x.nan_to_num(7), y.nan_to_num(7)), name


# Seven blocks of tokens, or five of keys.
LARGE = [
    replace(case, grid=(19, 23), n_keys=case.n_keys and 270 + case.n_keys, batch=min(case.batch, 2))
    for case in CASES
    if case.grid == (9, 7) and case.batch
]
QUICK = {"plain", "padding_topk", "fewer_queries_padded", "beta_only"}


@pytest.mark.parametrize("case", [slow(x, id=x.name, when=x.name not in QUICK) for x in LARGE])
def test_ranges_equal_one_call(case):
    check(case, torch.float32, (0.3, 0.3, 0.7), (0.5, 0.6, 0.6))


@pytest.mark.parametrize("dtype", [torch.float16, slow(torch.bfloat16)], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case("mutual", grid=(16, 16), batch=1, dim=64, dim_v=64),
        slow(Case("one_way", grid=(13, 17), batch=1, dim=65, dim_v=40, options={"reciprocal": False})),
        slow(Case("few", grid=(13, 17), batch=1, dim=130, dim_v=70, options={"topk": 9})),
        slow(Case("wide", grid=(1, 300), n_keys=150, heads=1, dim=256, dim_v=200, beta=None, options={"reciprocal": False})),
    ],
    ids=lambda case: case.name,
)
def test_ranges_in_half_precisions(case, dtype):
    check(case, dtype, (0.4,), (0.6,))


def random_call(seed: int) -> dict:
    """Return arguments of ``check``."""
    draw = random.Random(seed)
    choose = draw.choice
    grid = choose([1, 3, 8, 13, 17, 24]), choose([5, 8, 19, 23, 31])
    kinds = [None, "spread", "spread", "heads", "zero", "inf", "mixed"]
    case = Case(
        f"random {seed}", grid, batch=choose([1, 2]), heads=choose([1, 2]), dim=choose([1, 16, 40, 64, 130]),
        dim_v=choose([1, 16, 48, 64, 130]), alpha=choose(kinds), beta=choose(kinds), padding=draw.random() < 0.3,
        sharpness=choose([0.01, 0.5, 1.5, 6.0, 20.0]),
        options={"reciprocal": draw.random() < 0.7, "window": choose([1, 3, 5, 9])},
    )  # fmt: skip
    if case.beta is None and not case.options["reciprocal"]:
        case = replace(case, n_keys=choose([None, 7, 64, 300]))
    topk = choose([None, None, 3, 20, 40])
    if topk and topk <= (case.n_keys or grid[0] * grid[1]):
        case.options["topk"] = topk
    size, strange = draw.randrange(4), choose([None, None, math.nan, math.inf, -math.inf])
    where, at = draw.randrange(6), draw.randrange(grid[0] * grid[1])

    def change(inputs, d_out):
        """Put a number that is not finite somewhere, or one that is large."""
        x = [*inputs, d_out][where]
        if strange is not None and x is not None:
            x[..., at % x.shape[-1] if x.dim() == 3 else slice(None, None, 7)] = strange if x.dim() == 3 else x.new_tensor(1.0)
            if x.dim() == 4:
                x[:, :, at % x.shape[2]] = strange

    bounds, scanned = (tuple(sorted(draw.random() for _ in range(size))) for _ in range(2))
    dtype = choose([torch.float32, torch.bfloat16, torch.float16])
    return {"case": case, "dtype": dtype, "bounds": bounds, "scanned": scanned, "band": choose([0.0, 0.5, 2.0]),
            "change": change}  # fmt: skip


@pytest.mark.parametrize("seed", [*range(6), *(slow(x) for x in range(6, 200))])
def test_random_ranges(seed, monkeypatch):
    monkeypatch.setenv("ASA_OPS_SIMT_PROCESSORS", str((1, 7, 20, 132)[seed % 4]))
    check(**random_call(seed))
