"""One map over several processes: what they compute is what one process computes, to the last bit."""

import os
import random
import re
from dataclasses import replace
from datetime import timedelta
from itertools import pairwise

import pytest
import simt
import torch
from cases import CASES, Case, make, named, with_grad
from implementations import EMULATED, INTERPRETED, slow
from processes import Processes

import asa_ops
from asa_ops import distributed
from asa_ops.distributed import collectives, ranges

if INTERPRETED:
    import interpreter  # noqa: F401  (processes import this file: it changes how products round, and takes less time)

pytestmark = pytest.mark.xdist_group("processes")
SPLITS = {1: (1,), 2: (0.4,), 3: (0.0, 0.55), 4: (0.1, 0.1, 0.8)}  # where the parts after the first begin


def parts(n: int, size: int) -> list[slice]:
    """Split n tokens into `size` parts, uneven and empty ones among them."""
    bounds = [0, *(int(x * n) for x in SPLITS[size] if size > 1), n]
    return [slice(a, b) for a, b in pairwise(bounds)]


def load(impl: str | None) -> None:
    """Load what an implementation runs on, in a process."""
    if impl == "cuda":
        simt.load()


def leaves_of(tensors: list, options: dict) -> tuple[list, dict]:
    """Return tensors that get gradients, with ``constant`` tokens alone, and the options of a call."""
    count = 3 if options.get("constant") else len(tensors)
    return with_grad(tensors[:count]) + tensors[count:], {k: x for k, x in options.items() if k != "constant"}


def whole(group, rank: int, case: Case, dtype: torch.dtype, options: dict) -> list:
    """Return outputs, statistics and gradients of one process."""
    load(options.get("impl"))
    inputs, given = make(case, dtype)
    inputs, options = leaves_of(inputs, options)
    out, stats = asa_ops.asa_attention(*inputs, **given, **options, return_stats=True)
    (out * weights(out)).sum().backward()
    return [out.detach(), *stats, *(x if x is None else x.grad for x in inputs)]


def weights(out: torch.Tensor) -> torch.Tensor:
    return torch.linspace(-1, 1, max(out.numel(), 1), dtype=torch.float64)[: out.numel()].view(out.shape).to(out.dtype)


def part_of_process(group, rank: int, case: Case, dtype: torch.dtype, options: dict, cuts: list) -> list:
    """Return the same of this process's tokens."""
    load(options.get("impl"))
    inputs, given = make(case, dtype)
    part, keys = cuts[0][rank], cuts[1][rank]
    mine = [inputs[0][:, :, part], inputs[1][:, :, keys], inputs[2][:, :, keys]]
    shape = inputs[0].shape[:3]
    mine += [x if x is None else x.expand(shape[0], x.shape[1], shape[2])[:, :, part] for x in inputs[3:]]
    if (mask := given.get("key_padding_mask")) is not None:
        given["key_padding_mask"] = mask[:, keys]
    mine, options = leaves_of(mine, options)
    out, stats = distributed.asa_attention(*mine, **given, **options, group=group, return_stats=True)
    (out * weights(inputs[0].new_empty(*shape, inputs[2].shape[-1]))[:, :, part]).sum().backward()
    return [out.detach(), *stats, *(x if x is None else x.grad for x in mine)]


def check(processes, size: int, case: Case, dtype: torch.dtype, **options) -> None:
    (expected,) = processes.run(1, whole, case, dtype, options)
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
@pytest.mark.parametrize("size", [slow(1), 3])
def test_a_small_map_equals_one_process(processes, size, case):
    check(processes, size, case, torch.float32, threshold_grad="straight_through", impl="cpu")


# Seven blocks of tokens, or five of keys.
LARGE = [
    replace(case, grid=(19, 23), n_keys=case.n_keys and 270 + case.n_keys, batch=min(case.batch, 2))
    for case in CASES
    if case.grid == (9, 7)
]
OTHER_GRIDS = {"sequence": (397,), "volume": (5, 11, 7), "volume_padding": (4, 9, 10)}
LARGE += [named(name, grid=grid) for name, grid in OTHER_GRIDS.items()]


@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.name)
@pytest.mark.parametrize("size", [slow(1), 2, 3, slow(4)])
def test_equals_one_process(processes, size, case):
    check(processes, size, case, torch.float32, threshold_grad="straight_through", impl="cpu")


@pytest.mark.parametrize(
    ("name", "alpha"),
    [("one_way", "spread"), ("alpha_only", "halves"), ("plain", "low"), slow("plain", "zero"), slow("plain", "spread")],
)
@pytest.mark.parametrize("size", [slow(2), 3])
def test_a_large_map_equals_one_process(processes, size, name, alpha):
    """So large that no scores are kept: but for the last the scan begins outputs, of halves for rows that move."""
    case = named(name, grid=(44, 50), batch=1, heads=1, alpha=alpha)
    check(processes, size, case, torch.float32, impl="cpu")


@pytest.mark.parametrize("impl", INTERPRETED)
@pytest.mark.parametrize(
    "name", ["alpha_only", *map(slow, ("plain", "more_keys", "padding", "beta_only", "dense", "extra"))]
)
def test_tiles_equal_one_process(processes, name, impl):
    """Two blocks of 128 positions: over two processes."""
    case = named(name, grid=(9, 15), batch=1, heads=1)
    case = replace(case, n_keys=case.n_keys and 150)
    check(processes, 2, case, torch.float32, threshold_grad="straight_through", impl=impl)


@pytest.mark.parametrize("impl", ["cpu", *(slow(impl) for impl in INTERPRETED)])
def test_constant_thresholds_equal_one_process(processes, impl):
    """They do not learn, though straight-through gradients are asked for."""
    case = named("alpha_only", grid=(9, 15), batch=1, heads=1)
    check(processes, 2, case, torch.float32, threshold_grad="straight_through", impl=impl, constant=True)


@pytest.mark.slow
@pytest.mark.parametrize("impl", INTERPRETED)
@pytest.mark.parametrize(
    ("size", "case"),
    [pytest.param(3, case, id=case.name) for case in LARGE] + [(1, LARGE[0]), (2, LARGE[0]), (4, LARGE[0])],
)
def test_more_tiles_equal_one_process(processes, size, case, impl):
    case = replace(case, heads=1)
    check(processes, size, case, torch.float32, threshold_grad="straight_through", impl=impl)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["plain", "more_keys"])
def test_other_dtypes(processes, name, dtype):
    case = next(case for case in LARGE if case.name == name)
    check(processes, 3, case, dtype, threshold_grad="straight_through", impl="cpu")


@pytest.mark.parametrize("impl", ["reference", "blocked", pytest.param("triton", marks=pytest.mark.slow)])
def test_where_every_process_computes_the_map(processes, impl):
    case = replace(CASES[0], batch=1, grid=(9, 9))
    check(processes, 3, case, torch.float32, threshold_grad="straight_through", impl=impl)


def heads_of_process(group, rank: int, size: int, threads: int) -> list:
    """Four heads over two of keys, thresholds that heads or images share, and a backward that runs twice."""
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    n = 19 * 23

    def tensor(*shape):
        return torch.randn(*shape, generator=generator)

    whole_map = [
        tensor(2, 4, n, 16),
        tensor(2, 2, n, 16),
        tensor(2, 2, n, 8),
        tensor(1, 4, n).exp(),
        tensor(2, 1, n).exp(),
    ]
    own = slice(n * rank // size, n * (rank + 1) // size)
    mine = [x[:, :, own].clone().requires_grad_() for x in whole_map]
    options = {"grid": (19, 23), "threshold_grad": "straight_through", "impl": "cpu", "group": group}
    out = distributed.asa_attention(*mine, **options)
    for _ in range(2):
        out.square().sum().backward(retain_graph=True)
    with torch.no_grad():
        again = distributed.asa_attention(*mine, **options)
    torch.set_num_threads(1)
    assert torch.equal(again, out)
    return [out.detach(), *(x.grad for x in mine)]


@pytest.mark.parametrize("threads", [1, 2])
def test_shared_heads_and_thresholds(processes, threads):
    (expected,) = processes.run(1, heads_of_process, 1, 1)
    answers = processes.run(2, heads_of_process, 2, threads)
    for x, of_processes in zip(expected, zip(*answers, strict=True), strict=True):
        assert torch.equal(torch.cat(of_processes, 2), x)


def twice_of_process(group, rank: int) -> list:
    tokens = [torch.randn(1, 1, 10, 4, requires_grad=True) for _ in range(3)]
    out = distributed.asa_attention(*tokens, 1.0, group=group)
    out.sum().backward(retain_graph=True)
    once = tokens[0].grad.clone()
    out.sum().backward()
    return [once, tokens[0].grad]


def test_a_small_map_has_a_second_backward(processes):
    for once, twice in processes.run(2, twice_of_process):
        assert torch.equal(2 * once, twice)


def isa_of_process(group, rank: int) -> str:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("ASA_OPS_CPU_ISA", ("avx2", "portable")[rank])
        return error_of_process(group, rank, "")


def test_processes_of_different_instruction_sets_are_refused(processes):
    for message in processes.run(2, isa_of_process):
        assert message.startswith("ValueError: every process must be given the same instruction set"), message


def random_call(seed: int) -> tuple[Case, int, torch.dtype, dict]:
    """Return a case, a number of processes, a dtype and options."""
    choose = random.Random(seed).choice
    grid = choose([1, 3, 8, 13, 17, 24]), choose([5, 8, 19, 23, 31, 40])
    kinds = [None, "spread", "heads", "zero", "inf", "mixed"]
    case = Case(
        f"random {seed}", grid, batch=choose([1, 2]), heads=choose([1, 2, 3]), dim=choose([1, 8, 16, 40, 64, 130]),
        dim_v=choose([1, 5, 16, 48, 64]), alpha=choose(kinds), beta=choose(kinds), padding=choose([True, False, False]),
        sharpness=choose([0.01, 0.1, 0.5, 1.5, 6.0]),
        options={"reciprocal": choose([True, True, False]), "window": choose([1, 3, 5, 9])},
    )  # fmt: skip
    if case.beta is None and not case.options["reciprocal"]:
        case = replace(case, n_keys=choose([None, 7, 64, 300]))
    topk = choose([None, None, 3, 20])
    if topk and topk <= (case.n_keys or grid[0] * grid[1]):
        case.options["topk"] = topk
    learning = {"threshold_grad": choose([None, "straight_through"]), "threshold_band": choose([0.5, 2.0])}
    dtype = choose([torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16])
    return case, choose([1, 2, 3, 4]), dtype, learning


@pytest.mark.parametrize("seed", [*range(20), *(pytest.param(x, marks=pytest.mark.slow) for x in range(20, 400))])
def test_random_calls(processes, seed):
    case, size, dtype, learning = random_call(seed)
    check(processes, size, case, dtype, **learning, impl="cpu")


@pytest.mark.parametrize("impl", EMULATED)
@pytest.mark.parametrize("case", [slow(x, id=x.name, when=x.name != "padding") for x in LARGE])
@pytest.mark.parametrize("size", [2, *map(slow, (1, 3, 4))])
def test_blocks_of_cuda_equal_one_process(processes, size, case, impl):
    check(processes, size, case, torch.float32, threshold_grad="straight_through", impl=impl)


@pytest.mark.slow
@pytest.mark.parametrize("impl", EMULATED)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_where_kernels_take_whole_maps_alone(processes, impl, dtype):
    """Those for compute capability 9.0."""
    case, options = named("plain", grid=(9, 15), batch=1, heads=1), {"threshold_grad": "straight_through", "impl": impl}
    (expected,) = processes.run(1, on_hopper, "1", whole, case, dtype, options)
    cuts = [parts(9 * 15, 2)] * 2
    answers = processes.run(2, on_hopper, "11", part_of_process, case, dtype, options, cuts)
    for x, of_processes in zip(expected, zip(*answers, strict=True), strict=True):
        assert torch.equal(torch.cat(of_processes, 2), x)


def on_hopper(group, rank: int, asked: str, function, *args) -> list:
    """Call a function where a process asks for the kernels for compute capability 9.0, or not, as ``asked`` says."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("ASA_OPS_HOPPER", asked[rank])
        return function(group, rank, *args)


@pytest.mark.parametrize("impl", EMULATED)
def test_processes_that_run_other_kernels_are_refused(processes, impl):
    case, cuts = named("plain", grid=(9, 15), batch=1, heads=1), [parts(9 * 15, 2)] * 2
    with pytest.raises(AssertionError, match="every process must be given the same ASA_OPS_HOPPER"):
        processes.run(2, on_hopper, "01", part_of_process, case, torch.float16, {"impl": impl}, cuts)


@pytest.mark.slow
@pytest.mark.parametrize("impl", [*INTERPRETED, *EMULATED])
@pytest.mark.parametrize("seed", range(1000, 1040))
def test_random_calls_by_tiles(processes, seed, impl):
    case, size, dtype, learning = random_call(seed)
    case = replace(case, batch=min(case.batch, 1 + case.padding), heads=1 + seed % 2, dim=min(case.dim, 40))
    dtype = torch.float16 if dtype == torch.float16 else torch.float32
    check(processes, size, case, dtype, **learning, impl=impl)


def neighbors_of_process(group, rank: int, case: Case, cuts: list, impl: str = "auto") -> list:
    load(impl)
    inputs, options = make(case, torch.float32)
    query, key, _, alpha, beta = inputs
    part = cuts[rank]
    alpha, beta = (x if x is None else x[:, :, part] for x in (alpha, beta))
    tokens = query[:, :, part], key[:, :, part]
    if (mask := options.get("key_padding_mask")) is not None:
        options["key_padding_mask"] = mask[:, part]
    row_offsets, columns = distributed.reciprocal_neighbors(*tokens, alpha, beta, **options, group=group, impl=impl)
    return [x.tolist() for x in columns.split(row_offsets.diff().tolist())]


def check_neighbors(processes, size: int, case: Case, impl: str) -> None:
    load(impl)
    (query, key, _, alpha, beta), options = make(case, torch.float32)
    row_offsets, columns = asa_ops.reciprocal_neighbors(query, key, alpha, beta, **options, impl=impl)
    n, heads = query.shape[2], case.batch * case.heads
    expected = [x.tolist() for x in columns.split(row_offsets.diff().tolist())]
    cuts = parts(n, size)
    answers = processes.run(size, neighbors_of_process, case, cuts, impl)
    found = []
    for head in range(heads):
        for part, answer in zip(cuts, answers, strict=True):
            count = part.stop - part.start
            found += answer[head * count : (head + 1) * count]
    assert found == expected


@pytest.mark.parametrize("grid", [(9, 7), (19, 23)], ids=str)
@pytest.mark.parametrize("size", [1, 3, 4])
@pytest.mark.parametrize("name", ["plain", "one_way", "topk_alone", "padding", "beta_only", "empty_batch", "extra"])
def test_neighbors_of_one_process(processes, name, size, grid):
    check_neighbors(processes, size, named(name, grid=grid), "auto")


@pytest.mark.parametrize("impl", [*INTERPRETED, *EMULATED])
@pytest.mark.parametrize("size", [slow(1), 2, slow(3)])
@pytest.mark.parametrize(
    "name", ["plain", *map(slow, ("padding", "one_way", "topk_alone", "beta_only", "dense", "extra"))]
)
def test_neighbors_by_tiles(processes, name, size, impl):
    case = named(name, grid=(9, 15), heads=1)
    check_neighbors(processes, size, replace(case, batch=1 + case.padding), impl)


def error_of_process(group, rank: int, change: str) -> str:
    q = torch.randn(1, 2, 40, 8)
    arguments = {"query": q, "key": q, "value": q, "alpha": 1.0, "grid": (8, 10), "group": group}
    if change == "shape" and rank == 1:
        arguments["key"] = q[..., :7]
    elif change == "dtype" and rank == 1:
        arguments |= dict.fromkeys(("query", "key", "value"), q.double())
    elif change == "option" and rank == 1:
        arguments["window"] = 5
    elif change == "gradient" and rank == 1:
        arguments["query"] = q.clone().requires_grad_()
    elif change == "thresholds" and rank == 1:
        arguments["alpha"] = torch.ones(1, 2, 40)
    elif change == "value" and rank == 1:
        arguments["value"] = None
    elif change == "sides" and rank == 1:
        arguments["grid"] = (8.0, 10.0)
    elif change == "grid":
        arguments["grid"] = (9, 9)
    elif change == "topk":
        arguments["topk"] = 81
    elif change == "precision":
        arguments["impl"] = "triton"
        torch.backends.cuda.matmul.fp32_precision = ("ieee", "tf32")[rank]
    elif change == "group":
        arguments["group"] = "world"
    elif change == "mesh":
        from torch.distributed.device_mesh import DeviceMesh

        arguments["group"] = DeviceMesh("cpu", [[0, 1], [2, 3]])
    try:
        distributed.asa_attention(**arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        torch.backends.cuda.matmul.fp32_precision = "ieee"
    return "no error"


@pytest.mark.parametrize(
    "change,message",
    [
        ("shape", "ValueError: process 1 of 2: key must have the head dim of query, D = 8, got D = 7"),
        ("dtype", "ValueError: every process must be given the same dtypes, got "),
        ("option", r"ValueError: every process must be given the same window, got \[3, 3\] in process 0 and \[5, 5\]"),
        ("gradient", "ValueError: every process must be given the same requires_grad, got "),
        ("thresholds", "ValueError: every process must be given the same batch, heads and head dims, got "),
        ("value", "TypeError: process 1 of 2: value must be a tensor, got None"),
        ("sides", r"TypeError: process 1 of 2: grid must hold integers .*, got 8.0 of type float"),
        ("grid", r"ValueError: grid must be \(H, W\) with H \* W = N = 80, got 9 \* 9 = 81"),
        ("topk", "ValueError: topk must be at most the number of keys, N_k = 80, got topk=81"),
        ("group", "TypeError: group must be a process group, a DeviceMesh or None, got 'world' of type str"),
        *[("precision", r"ValueError: every process must be given the same torch\.backends.*fp32_precision, got")]
        * bool(INTERPRETED),
    ],
)
def test_every_process_raises_the_same_error(processes, change, message):
    first, second = processes.run(2, error_of_process, change)
    assert first == second and re.match(message, first), first


def test_a_mesh_of_two_dimensions_is_refused(processes):
    answers = processes.run(4, error_of_process, "mesh")
    assert all(x.startswith("ValueError: group must be a mesh of one dimension, got 2 in") for x in answers), answers


def test_without_a_group():
    with pytest.raises(RuntimeError, match=r"call torch\.distributed\.init_process_group first"):
        distributed.asa_attention(*torch.randn(3, 1, 1, 4, 2))


def die_or_wait(group, rank: int) -> None:
    q = torch.randn(1, 1, 100, 8)
    if rank == 1:
        os._exit(1)
    distributed.asa_attention(q, q, q, 1.0, group=group)


@pytest.mark.slow
def test_a_process_that_dies_ends_the_others():
    pool = Processes(2, timedelta(seconds=10))
    with pytest.raises(AssertionError, match="process 1 ended") as raised:
        pool.run(2, die_or_wait)
    assert "process 0 of 2:" in str(raised.value) and "RuntimeError" in str(raised.value)
    pool.end()


def bytes_of_process(group, rank: int, n: int, dim: int) -> tuple[int, int, int]:
    """Return how many bytes a forward and a backward receive from other processes, but for the first few numbers."""
    received = []
    gather, exchange = collectives._all_gather_single, torch.distributed.all_to_all_single

    def count_gather(out, mine, group):
        received.append(out.nbytes - mine.nbytes)
        gather(out, mine, group=group)

    def count_exchange(out, mine, sizes, parts, group):
        received.append(out.nbytes)
        exchange(out, mine, sizes, parts, group=group)

    collectives._all_gather_single, torch.distributed.all_to_all_single = count_gather, count_exchange
    own = n // torch.distributed.get_world_size(group)
    tokens = [torch.randn(1, 1, own, dim, requires_grad=True) for _ in range(3)]
    out = distributed.asa_attention(*tokens, torch.zeros(1, 1, own), group=group, impl="cpu")
    forward = sum(received[1:])
    received.clear()
    out.sum().backward()
    collectives._all_gather_single, torch.distributed.all_to_all_single = gather, exchange
    return forward, sum(received)


@pytest.mark.parametrize("size", [2, 4])
def test_bytes_received(processes, size):
    """Everybody keeps everybody, so the rows of equal work are those of the tokens."""
    n, dim = 1024, 16
    others = n - n // size
    tokens = others * (3 * dim + 1) * 4  # query, key, value, alpha
    bits, work = others * (n // size) // 8, others // 64 * 8  # neighbours of blocks
    begun = (size - 1) * 8  # whether outputs are
    of_output, flags = others * dim * 4, others * (4 + 4 + 1)  # survivors, lse_kept, whether a row is NaN
    softmax, groups = others * 3 * 4, others * 3 * 4
    for forward, backward in processes.run(size, bytes_of_process, n, dim):
        assert forward == tokens + begun + work + bits
        assert backward == of_output + flags + softmax + groups


def test_rows_of_equal_work():
    assert ranges.ranges(1000, 4) == [256, 256, 256, 232]
    assert ranges.ranges(130, 4) == [64, 64, 0, 2]
    assert ranges.ranges(1024, 2, [1] * 8 + [9] * 8) == [768, 256]  # 44 and 36; even rows have 8 and 72
    assert ranges.ranges(1024, 3, [0] * 15 + [1]) == [960, 0, 64]
    work = [1] * 8 + [9] * 8
    assert ranges.imbalance(work, [8, 8]) == 1.8 and ranges.imbalance(work, [12, 4]) == 1.1
    # At most twice as many rows as if they were even, though all work is in one block.
    assert max(ranges.ranges_of_equal_work(4096, [16] * 4, [10**6] + [0] * 63, 1)) == 2048
    assert ranges.ranges_of_equal_work(4096, [16] * 4, [100] * 64, 1) is None
