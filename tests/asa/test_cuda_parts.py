"""Parts of a map by the CUDA kernels, emulated: one after another in this process they are one call, to the last bit.

Over processes they are in tests/distributed.
"""

import math
import random
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import in_parts
import pytest
import simt
import torch
from cases import CASES, Case, make, named, op_arguments
from implementations import slow
from torch import Tensor

from asa_ops.asa import ops, parts
from asa_ops.asa.cuda_part import Part
from asa_ops.asa.types import Inputs, Options, new_graph

if not simt.AVAILABLE:
    pytest.skip("no C++ compiler here, or a GPU: kernels run there", allow_module_level=True)


@pytest.fixture(scope="module", autouse=True)
def kernels():
    simt.load()


def sizes(n: int, bounds: tuple[float, ...]) -> list[int]:
    """Return how many positions of n tokens parts have; all but the first begin at about these shares of them."""
    blocks = -(-n // Part.block)
    cuts = [0, *(round(x * blocks) for x in bounds), blocks]
    return [(end - begin) * Part.block for begin, end in pairwise(cuts)]


def one_call(arguments: tuple, d_out: Tensor) -> list[Tensor]:
    """Return outputs, gradients and the graph of a whole map."""
    of_map = ops.of("cuda", d_out.device)
    outputs = of_map.fwd(*arguments)
    gradients = of_map.bwd(d_out, *arguments[:6], *outputs, *arguments[6:13])
    graph = new_graph(outputs[3])
    of_map.list_survivors(*arguments[:6], *outputs, *arguments[6:13], *graph)
    return [*outputs[:4], *gradients, graph.col_indices]


def in_ranges(arguments: tuple, d_out: Tensor, bounds: tuple[float, ...], scanned: tuple[float, ...]) -> list[Tensor]:
    """Return the same from parts; ``scanned``: of other parts before thresholds are known, if there are any."""
    given, options, band = Inputs(*arguments[:6]), Options.of(*arguments[6:12]), arguments[12]
    inputs, n_q, n_k = ops.broadcast(given), given.query.shape[2], given.key.shape[2]
    rows, keys = sizes(n_q, bounds), sizes(n_k, bounds)
    if given.alpha is None and not options.topk:
        scanned = bounds
    outputs, found, passes = in_parts.forward(Part, inputs, options, band, sizes(n_q, scanned), rows, keys)
    order, own = passes[0].row_order, in_parts.ranges(rows)
    # Nobody reads what others were to write.
    found = [
        (parts.Outputs(*(own_alone(x, order, positions) for x in mine)), kept)
        for (mine, kept), positions in zip(found, own, strict=True)
    ]
    graph = new_graph(outputs.survivors)
    of_rows = list(graph.col_indices.split(outputs.survivors.flatten().tolist()))
    for part, (mine, _), positions in zip(passes, found, own, strict=True):
        counts = mine.survivors.clamp(min=0)
        alone = new_graph(counts)
        part.list_survivors(positions, *alone)
        for row, columns in enumerate(alone.col_indices.split(counts.flatten().tolist())):
            if len(columns):
                of_rows[row] = columns
    gradients = in_parts.backward(Part, inputs, options, band, rows, keys, found, d_out)
    gradients = [ops.like(dx, x, d_out) for dx, x in zip(gradients, given[:5], strict=True)]
    return [*outputs, *gradients, torch.cat(of_rows)]


def own_alone(x: Tensor, order: Tensor, positions: parts.Range) -> Tensor:
    """Return a tensor [B, heads, n, ..] whose tokens are no numbers but for those at some positions."""
    nothing = torch.full_like(x, math.nan if x.is_floating_point() else -1)
    tokens = parts.tokens_at(order, positions, x.shape[2])
    parts.put(parts.take(x.flatten(0, 1), tokens, tokens.shape[1]), tokens, nothing.flatten(0, 1))
    return nothing


NAMES = ["out", "lse", "lse_kept", "survivors", "dq", "dk", "dv", "dalpha", "dbeta", "columns"]


def check(case: Case, dtype: torch.dtype, bounds: tuple[float, ...], scanned: tuple[float, ...], band: float = 2.0,
          change: Callable | None = None) -> None:  # fmt: skip
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
    replace(
        case, grid=(19, 23), n_keys=case.n_keys and 270 + case.n_keys, heads=1 + ("heads" in (case.alpha, case.beta))
    )
    for case in CASES
    if case.grid == (9, 7) and case.batch
]
LARGE += [named("volume", grid=(5, 11, 7), heads=1), named("volume_padding", grid=(6, 9, 7), heads=1)]
QUICK = {"volume_padding", "padding_topk", "fewer_queries_padded", "beta_only", "extra_topk_alone"}


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
        slow(Case("wide", (1, 300), heads=1, dim=256, dim_v=200, n_keys=150, beta=None, options={"reciprocal": False})),
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
        """Put numbers somewhere that are not finite."""
        x = [*inputs, d_out][where]
        if strange is None or x is None:
            return
        if x.dim() == 4:
            x[:, :, at % x.shape[2], ::2] = strange
        else:
            x[..., at % x.shape[2]] = strange

    bounds, scanned = (tuple(sorted(draw.random() for _ in range(size))) for _ in range(2))
    dtype = choose([torch.float32, torch.bfloat16, torch.float16])
    return {"case": case, "dtype": dtype, "bounds": bounds, "scanned": scanned, "band": choose([0.0, 0.5, 2.0]),
            "change": change}  # fmt: skip


@pytest.mark.parametrize("seed", [*range(1, 6), *(slow(x) for x in range(6, 200))])
def test_random_ranges(seed, monkeypatch):
    monkeypatch.setenv("ASA_OPS_SIMT_PROCESSORS", str((1, 7, 20, 132)[seed % 4]))
    check(**random_call(seed))


@pytest.mark.parametrize("name", [slow("plain"), "beta_only"])
def test_a_backward_may_run_twice(name):
    """Of a window alone it writes what others tell of theirs."""
    inputs, options = make(next(case for case in LARGE if case.name == name), torch.float32)
    arguments = op_arguments(inputs, options)
    given, settings = ops.broadcast(Inputs(*arguments[:6])), Options.of(*arguments[6:12])
    rows = sizes(given.query.shape[2], (0.5,))
    outputs, found, _ = in_parts.forward(Part, given, settings, 2.0, rows, rows, rows)
    once, twice = (in_parts.backward(Part, given, settings, 2.0, rows, rows, found, outputs.out) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(once, twice, strict=True) if x is not None)


def part_of(n: int, rows: parts.Range, keep: bool, band: float = 2.0, **options) -> tuple[Part, Tensor]:
    """Return a part of a map of n tokens in a row, and what it keeps."""
    query, alpha = torch.randn(1, 1, n, 8), torch.ones(1, 1, n)
    inputs, settings = Inputs(query, query, query, alpha, None, None), Options((1, 1, n), (1, 1, 1), 0, 0, True, 0.3)
    part = Part(inputs, settings._replace(**options), band, keep)
    scan = part.scan(rows)
    numbers = scan.numbers.new_zeros(1, part.row_order.shape[1], scan.numbers.shape[2])
    flags = scan.flags.new_zeros(1, numbers.shape[1] // 64, numbers.shape[1] // 64)
    part.attend(rows, rows, parts.Scan(numbers, flags, scan.peaks))
    return part, part.saved[4]


@pytest.mark.parametrize("rows", [(0, 64), (128, 320), (192, 192)], ids=str)
def test_bits_are_those_of_own_pairs(rows):
    """Of own rows with all keys; for a backward of all rows with own keys, and these one way if thresholds learn."""
    n = 640
    pairs, own = n * (rows[1] - rows[0]) // 8, (rows[1] - rows[0]) // 64
    for keep, band, several, tiles in ((False, 0.0, 1, 2), (True, 0.0, 2, 2), (True, 2.0, 3, 3)):
        _, kept = part_of(n, rows, keep, band)
        of_rows = 3 * 4 * n if keep else 0
        bits = several * pairs + tiles * own * 4
        assert kept.shape[2] == -(-bits // 128) * 128 + of_rows


def stages() -> dict[str, dict]:
    """Return arguments, by their names, of every op on a part of a map."""
    part, _ = part_of(200, (64, 128), True)
    names = ("query", "key", "value", "alpha", "beta", "key_padding_mask")
    given = dict(zip(names, part.inputs, strict=True))
    names = ("grid", "window", "extra_tokens", "topk", "reciprocal", "scale", "band")
    options = dict(zip(names, part.options, strict=True))
    given |= options | {"rows": [64, 128]}
    numbers, flags = torch.zeros(1, 256, 5), torch.zeros(1, 4, 4, dtype=torch.uint8)
    saved = dict(zip(("out", "lse", "lse_kept", "survivors", "kept"), part.saved, strict=True)) | {"keys": [64, 128]}
    of_rows = {"arranged": torch.zeros(1, 256, 64), "of_rows": torch.zeros(5, 1, 256)}
    of_rows |= {"noted": torch.zeros(3, 1, dtype=torch.int32), "peaks": torch.zeros(1, 4, 64, dtype=torch.float16)}
    graph = {"row_offsets": torch.zeros(201, dtype=torch.int64), "col_indices": torch.zeros(0, dtype=torch.int32)}
    return {
        "scan": given,
        "attend": given | {"keep": True, "keys": [64, 128], "numbers": numbers, "flags": flags},
        "list_survivors": given | saved | graph | {"keep": True},
        "begin_bwd": given | saved | {"grad_out": torch.zeros(1, 1, 200, 8)},
        "end_bwd": given | saved | of_rows | {"numbers": None},
    }


@pytest.mark.parametrize(
    "op,argument,change,message",
    [
        ("scan", "rows", lambda x: [0, 65], "rows must be of whole blocks of 64 positions"),
        ("scan", "rows", lambda x: [0, 320], r"rows must be \[begin, end\] among the positions"),
        ("scan", "rows", lambda x: [128, 64], r"rows must be \[begin, end\] among the positions"),
        ("scan", "rows", lambda x: [64], r"rows must be \[begin, end\]"),
        ("scan", "query", lambda x: x[:, :, :9], r"alpha must be \[B, heads, N_q\]"),
        ("scan", "band", lambda x: -1.0, "band must be at least 0"),
        ("attend", "keys", lambda x: [0, 64], "keys must be the range of rows, if neighbours must be mutual"),
        ("attend", "keys", lambda x: [0, 32], "keys must be of whole blocks"),
        ("attend", "numbers", lambda x: x[:, :64].contiguous(), "numbers must be of the shape expected"),
        ("attend", "flags", lambda x: x.int(), "flags must be of the dtype expected"),
        ("attend", "flags", lambda x: x.expand(1, 4, 4)[:, :, :3], "flags must be of the shape expected"),
        ("list_survivors", "kept", lambda x: x[..., :128].contiguous(), "kept must be of the shape expected"),
        ("list_survivors", "row_offsets", lambda x: x[1:], "row_offsets must be of the shape expected"),
        ("begin_bwd", "grad_out", lambda x: x[..., :4], "grad_out must be of the shape expected"),
        ("begin_bwd", "rows", lambda x: [64, 192], "keys must be the range of rows"),
        ("begin_bwd", "out", lambda x: x.double(), "out must be of the dtype expected"),
        ("end_bwd", "peaks", lambda x: None, "peaks must be given where alpha learns"),
        ("end_bwd", "peaks", lambda x: x[:, :3].contiguous(), "peaks must be of the shape expected"),
        ("end_bwd", "numbers", lambda x: torch.zeros(1, 256, 5), "numbers must be given for a window alone"),
        ("end_bwd", "arranged", lambda x: x[..., :8].contiguous(), "arranged must be of the shape expected"),
        ("end_bwd", "of_rows", lambda x: x[:4].contiguous(), "of_rows must be of the shape expected"),
        ("end_bwd", "noted", lambda x: x.long(), "noted must be of the dtype expected"),
        ("end_bwd", "kept", lambda x: x[..., :0], "kept must be what a forward pass kept"),
    ],
)
def test_ops_refuse(op, argument, change, message):
    arguments = stages()[op]
    run = getattr(torch.ops.asa_ops, f"asa_emulated_tiles_{op}")
    if op != "list_survivors":
        run(**arguments)
    arguments[argument] = change(arguments[argument])
    with pytest.raises(RuntimeError, match=message):
        run(**arguments)


def test_kernels_for_compute_capability_90_have_no_parts(monkeypatch):
    query = torch.randn(1, 1, 70, 8, dtype=torch.float16)
    inputs = Inputs(query, query, query, None, None, None)
    assert Part.can_run(inputs, 140, 140, 0.3)
    monkeypatch.setenv("ASA_OPS_HOPPER", "1")
    assert not Part.can_run(inputs, 140, 140, 0.3)
    single = Inputs(*(x.float() for x in inputs[:3]), *inputs[3:])
    assert Part.can_run(single, 140, 140, 0.3)  # they take float32 as TF32 only
