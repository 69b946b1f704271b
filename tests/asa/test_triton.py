"""The Triton kernels in Triton's interpreter: float32 and float16 (it gets bfloat16 wrong), tiny and ragged sizes.

What every implementation must do is in test_implementations.py; here is what these kernels are made of, and every
option against the reference under other block sizes than the interpreter's own.
"""

import ast
import itertools
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cases import Case, make, named, with_grad
from compare import check_against_reference, check_threshold_gradients
from implementations import DTYPES, slow
from torch.utils._python_dispatch import TorchDispatchMode

import asa_ops
from asa_ops import asa_attention, reciprocal_neighbors
from asa_ops.asa.triton import configs as triton_configs
from asa_ops.asa.triton.configs import Config
from asa_ops.asa.types import Inputs, Options, Saved
from asa_ops.core import devices, dispatch, triton_launch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
tiles = pytest.importorskip("asa_ops.asa.triton.tiles")
arrange = pytest.importorskip("asa_ops.asa.triton.arrange")
lists = pytest.importorskip("asa_ops.asa.triton.lists")
call = pytest.importorskip("asa_ops.asa.triton.call")
interpreter = pytest.importorskip("interpreter")
Problem = pytest.importorskip("asa_ops.asa.triton.problem").Problem
pytestmark = pytest.mark.skipif(not devices.triton_is_interpreted(), reason="not in Triton's interpreter")


def test_threshold_gradients_in_half_precision():
    """An offset of the values cancels in what an admitted pair changes: delta must not come from a rounded output."""
    inputs, options = make(named("plain", dim=16, dim_v=8), torch.float16)
    inputs[2] += 10
    check_threshold_gradients("triton", inputs, options)


# Other block sizes: of every kernel, as on a GPU but smaller.

LARGE = Case("large", grid=(9, 15), batch=1, heads=1, dim=19, dim_v=33, sharpness=3.0)
BLOCKS = {
    "whole_rows": Config(64, 64, 4, 1),
    "descriptors": Config(64, 64, 4, 1, tma=True),
    "wide_tiles": Config(128, 128, 4, 1, tma=True),
    "narrow_tiles": Config(128, 32, 4, 1, tma=True),
    "chunks": Config(64, 32, 4, 1, chunk=16, columns=16),
}


@pytest.fixture
def blocks(request, monkeypatch):
    """Run every kernel with one configuration, as nearly as it can."""
    config = BLOCKS[request.param]
    square = config._replace(block_m=min(config.block_m, config.block_n * 2), block_n=max(config.block_n, 64))
    square = square._replace(block_m=square.block_n)

    def find(kernel, *_):
        return {"mask": square, "dt": square, "statistics": config._replace(block_n=square.block_n)}.get(kernel, config)

    monkeypatch.setattr(triton_configs, "find", find)
    return request.param


@pytest.mark.parametrize("blocks", [slow(x, when=x in ("whole_rows", "wide_tiles")) for x in BLOCKS], indirect=True)
def test_any_blocks_give_the_same(blocks):
    check_against_reference("triton", *make(LARGE, torch.float32))


@pytest.mark.parametrize(
    ("blocks", "options"),
    [
        pytest.param("descriptors", {"topk": 9}, id="descriptors-topk"),
        pytest.param("chunks", {"reciprocal": False}, id="chunks-one_way"),
        slow("chunks", {"topk": 9}, id="chunks-topk"),
        slow("descriptors", {"reciprocal": False}, id="descriptors-one_way"),
    ],
    indirect=["blocks"],
)
def test_any_blocks_give_the_same_threshold_gradients(blocks, options):
    case = Case("learning", grid=(9, 8), batch=1, heads=1, dim=17, dim_v=6, options=options)
    check_threshold_gradients("triton", *make(case, torch.float32))


@pytest.mark.parametrize("name", ["plain", slow("dense")])
def test_split_work_gives_the_same(monkeypatch, name):
    """Keys of the statistics, listed blocks of all sums, dealt out among several programs."""
    monkeypatch.setattr(Problem, "splits", lambda self, programs, limit: min(3, limit))
    check_against_reference("triton", *make(named(name, grid=(9, 15), batch=1, heads=1), torch.float32))


@pytest.fixture
def launches(monkeypatch):
    """The names of the kernels launched, and their SYMMETRIC, in order; a test may clear the list."""
    found, launch = [], triton_launch.launch

    def spy(kernel, *args, **constants):
        found.append((kernel.__name__.removeprefix("_asa_").removesuffix("_kernel"), constants.get("SYMMETRIC")))
        launch(kernel, *args, **constants)

    monkeypatch.setattr(triton_launch, "launch", spy)
    return found


def test_query_is_key_takes_one_product(launches):
    (x, other, value, alpha, beta), options = make(named("plain", batch=1, heads=1), torch.float32)
    asa_attention(x, x, value, alpha, beta, **options, impl="triton")
    assert True in {symmetric for _, symmetric in launches}
    launches.clear()
    asa_attention(x, other, value, alpha, beta, **options, impl="triton")
    assert {symmetric for _, symmetric in launches} == {None, False}


def test_nothing_is_found_or_listed_twice(launches):
    """The graph reuses the order of the forward and arranges nothing; kernels that cut the map alike share lists."""
    inputs, options = make(named("plain", batch=1, heads=1, dim=40), torch.float32)
    reciprocal_neighbors(*inputs[:2], *inputs[3:], grid=options["grid"], impl="triton")
    names = [name for name, _ in launches]
    assert [names.count(name) for name in ("order", "arrange", "neighbors")] == [1, 1, 1] and names[-1] == "neighbors"
    leaves = with_grad(inputs)
    out = asa_attention(*leaves, **options, threshold_grad="straight_through", impl="triton")
    launches.clear()
    out.sum().backward()
    names = [name for name, _ in launches]
    assert names.count("dq") == 2 and names.count("dkv") == 1, "what delta misses, dq, dk and dv"
    assert names.count("lists") == 1, "of rows as of keys, and of the thresholds"


class Writes(TorchDispatchMode):
    """Adds to a list the operations of torch that fill, copy or compute, each a launch on a GPU."""

    FREE = ("empty", "new_empty", "view", "slice", "expand", "detach", "unsafe_view", "as_strided")

    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__.strip("_")
        if not name.startswith(self.FREE):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


SINGLE = {"dtype": torch.float32}
DENSE = {"alpha": False, "beta": False}
LAUNCHES = {  # of a forward and of a backward
    "plain": ({}, 9, 7),
    "plain_at_head_dim_64": ({"dim": 64}, 9, 6),
    "float16": ({"dtype": torch.float16}, 9, 7),
    "no_beta": ({"beta": False}, 9, 7),
    "no_alpha": ({"alpha": False}, 6, 3),
    "sequence": ({"grid": (4096,)}, 9, 7),
    "volume": ({"grid": (16, 16, 16)}, 9, 7),
    "padding": ({"padding": True}, 9, 7),
    "few": ({"topk": 16}, 9, 7),
    "many": ({"topk": 400}, 9, 7),
    "one_way": ({"reciprocal": False}, 9, 7),
    "more_keys": ({"reciprocal": False, "beta": False, "n_keys": 5000, "padding": True}, 9, 7),
    "learning": ({"band": 2.0}, 9, 8),
    "learning_one_way": ({"band": 2.0, "reciprocal": False}, 9, 8),
    "float32": (SINGLE, 9, 8),
    "float32_learning": (SINGLE | {"band": 2.0, "topk": 16, "padding": True}, 9, 9),
    "dense": (DENSE, 8, 8),
    "dense_with_padding": (DENSE | {"padding": True}, 8, 8),
    "float32_dense": (SINGLE | DENSE, 8, 9),
}


@pytest.mark.parametrize("name", LAUNCHES)
def test_a_call_is_at_most_nine_launches(monkeypatch, name):
    """What launching costs the host is most of a small call: kernels, and whatever torch does beside them.

    As on Hopper at head dim 256, where most sums are kernels of their own; on tensors without memory.
    """
    given, *expected = LAUNCHES[name]
    dim, dtype = given.get("dim", 256), given.get("dtype", torch.bfloat16)
    n, n_keys, band = 4096, given.get("n_keys", 4096), given.get("band")
    query, key, value = (torch.empty(2, 2, x, dim, dtype=dtype, device="meta") for x in (n, n_keys, n_keys))
    thresholds = [torch.empty(2, 2, n, device="meta") if given.get(x, True) else None for x in ("alpha", "beta")]
    real = torch.empty(2, n_keys, dtype=torch.bool, device="meta") if given.get("padding") else None
    inputs = Inputs(query, key, value, *thresholds, real)
    grid = given.get("grid", (64, 64))
    options = Options.of(grid, [3] * len(grid), 0, given.get("topk", 0), given.get("reciprocal", True), 0.1)
    saved = Saved.new(inputs, options, "triton", keep=True, band=band or 0.0)
    found = []
    monkeypatch.setattr(triton_launch, "architecture", lambda device: 90)
    monkeypatch.setattr(triton_launch, "launch", lambda kernel, *_, **__: found.append(kernel.__name__))
    counts = []
    with Writes(found):
        call.fwd(inputs, options, saved, band)
        counts.append(len(found))
        call.bwd(torch.empty_like(saved.out), inputs, saved, options, band)
        counts.append(len(found) - counts[0])
    assert counts == expected and max(counts) <= 9, found
    assert all(x.startswith("_asa_") for x in found), "torch does nothing"


def test_thresholds_that_do_not_learn_take_one_launch():
    """For the zeros that are the gradients of both."""
    leaves = with_grad(make(named("plain", grid=(3, 3), batch=1, heads=1), torch.float32)[0])
    out = asa_attention(*leaves, grid=(3, 3), impl="triton")
    with torch.profiler.profile() as profile:
        out.sum().backward()
    names = [event.name for event in profile.events()]
    assert names.count("aten::_foreach_zero_") == 1 and "aten::new_zeros" not in names
    assert all((x.grad == 0).all() for x in leaves[3:])


# The parts.


def test_a_product_of_the_interpreter_is_one_number_per_element():
    """Whatever the shape of its block, on every processor: the terms added in float64, in order, and rounded once."""
    a, b = torch.randn(64, 48).numpy(), torch.randn(48, 32).numpy()
    whole = interpreter.product(a, b)
    for rows, columns in ((1, 1), (16, 16), (64, 8)):
        for i, j in itertools.product(range(0, 64, rows), range(0, 32, columns)):
            part = interpreter.product(a[i : i + rows], b[:, j : j + columns])
            assert (part == whole[i : i + rows, j : j + columns]).all()
    in_order = 0.0
    for x, y in zip(a[3].tolist(), b[:, 5].tolist(), strict=True):
        in_order += x * y
    assert whole[3, 5] == torch.tensor(in_order, dtype=torch.float64).float().item()


def problem_of(case):
    inputs, options = make(case, torch.float32)
    settings = Options.of(case.grid, [3] * len(case.grid), 0, 0, True, 1.0)
    return Problem(Inputs(*inputs, options.get("key_padding_mask")), settings, False)


def tokens_of(problem):
    return arrange.arrange_tokens(problem, arrange.find_orders(problem))


MAPS = [(1, 1), (8, 8), (9, 7), (17, 19), (40, 3), (3, 40), (1, 130)]
VOLUMES = [(4, 4, 4), (9, 7, 5), (2, 17, 6), (5, 1, 11), (130, 1, 1), (1, 9, 7)]


@pytest.mark.parametrize("grid", [(1,), (130,), *MAPS, *VOLUMES], ids=str)
def test_order_cuts_the_grid_into_tiles(grid):
    order = arrange.find_orders(problem_of(Case("order", grid=grid, batch=1, heads=1))).keys
    n = math.prod(grid)
    tokens = order.order[0, :n].long()
    assert sorted(tokens.tolist()) == list(range(n)) and (order.order[0, n:] == -1).all()
    assert torch.equal(order.place[0, tokens], torch.arange(n, dtype=torch.int32)) and order.counts.item() == n
    grid = grid[1:] if len(grid) == 3 and grid[0] == 1 else grid  # a volume of one slice is a map
    side = {1: 64, 2: 8, 3: 4}[len(grid)]
    tiles = [tuple(x // side for x in place) for place in torch.stack(torch.unravel_index(tokens, grid), 1).tolist()]
    runs = [tile for tile, previous in zip(tiles, [None, *tiles], strict=False) if tile != previous]
    assert len(runs) == len(set(tiles)) == math.prod(-(-x // side) for x in grid)  # each tile in one run


@pytest.mark.slow
def test_windows_of_hundreds_of_positions():
    """More than a kernel holds the scores of; every window is the whole grid."""
    case = Case("wide", grid=(2, 8, 6), batch=1, heads=1, options={"window": (3, 15, 11)})
    check_against_reference("triton", *make(case, torch.float32))


def test_order_has_padding_last():
    """Where the kernels that finish rows find it, to write what it gets."""
    case = named("padding", grid=(40, 33))
    problem = problem_of(case)
    order = arrange.find_orders(problem).keys
    real = problem.inputs.key_padding_mask
    assert order.counts.tolist() == real.sum(-1).tolist()
    assert torch.equal(order.place >= 0, real)
    for tokens, is_real in zip(order.order, real, strict=True):
        count = int(is_real.sum())
        assert torch.equal(tokens[:count].long().sort().values, is_real.nonzero()[:, 0])
        padding = -2 - tokens[count : len(is_real)].long()
        assert torch.equal(padding.sort().values, (~is_real).nonzero()[:, 0])
        assert (tokens[len(is_real) :] == -1).all()


def test_arranged_tokens_are_padded_with_zeros():
    problem = problem_of(named("plain", dim=5))
    tokens = tokens_of(problem)
    q = tokens.q.view(2, 2, problem.padded, problem.width)
    order = tokens.rows.order[0, :63].long()
    assert torch.equal(q[:, :, :63, :5], problem.inputs.query[:, :, order])
    assert q[:, :, 63:].abs().max() == 0 and q[..., 5:].abs().max() == 0


def test_arranged_tokens_are_rounded_where_products_take_tf32(monkeypatch):
    """To the nearest number of 11 significant bits; what is not finite stays what it is."""
    inputs, _ = make(named("plain", grid=(3, 3), batch=1, heads=1), torch.float32)
    inputs[0][0, 0, 4, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    exact = inputs[0][0, 0]
    mantissa, exponent = torch.frexp(exact.double())
    expected = torch.ldexp((mantissa * 2**11).round() / 2**11, exponent)
    expected = torch.where(exact.isfinite(), expected, exact.double()).float()
    monkeypatch.setattr(triton_launch, "precision", lambda dtype: "tf32")
    tokens = tokens_of(Problem(Inputs(*inputs, None), Options.of((3, 3), [3, 3], 0, 0, True, 1.0), False))
    found = tokens.q[tokens.rows.place[0].long(), : exact.shape[1]]
    assert torch.equal(found.nan_to_num(7), expected.nan_to_num(7)) and not torch.equal(expected, exact)


@pytest.mark.parametrize("block", [64, slow(128)])
def test_occupied_tiles_are_those_with_bits(monkeypatch, block):
    """As the forward flags them when it decides pairs, and the backward when it reads the bits."""
    find, listings = triton_configs.find, []
    square = find("mask", 8, torch.float32, 0)._replace(block_m=block, block_n=block)
    monkeypatch.setattr(triton_configs, "find", lambda kernel, *x: square if kernel == "mask" else find(kernel, *x))
    monkeypatch.setattr(call, "Listing", lambda *args: listings.append(lists.Listing(*args)) or listings[-1])
    problem = problem_of(Case("large", grid=(20, 20), batch=1, heads=1, dim=8, sharpness=4.0, beta=None))
    saved = Saved.new(problem.inputs, problem.options, "triton", keep=True)
    call.fwd(problem.inputs, problem.options, saved, None)
    call.bwd(torch.ones_like(saved.out), problem.inputs, saved, problem.options, None)
    tiles = (problem.bits(saved.bits).words.view(8, 2, 8, 64) != 0).any(3).any(1)
    assert len(listings) == 2 and tiles.any() and not tiles[:7, :7].all()
    for listing in listings:
        assert torch.equal(listing.occupied[0] != 0, tiles.T)


@pytest.mark.parametrize("scale", [-0.4, slow(0.0)])
def test_scales_that_are_not_positive(scale):
    inputs, options = make(named("plain", heads=1), torch.float32)
    check_against_reference("triton", inputs, options | {"scale": scale})


@triton.jit
def round_trip(pairs, rows, columns, counts, back, other, N: tl.constexpr, M: tl.constexpr):
    at = tl.arange(0, N)[:, None] * M + tl.arange(0, M)[None, :]
    kept = tl.load(pairs + at) != 0
    of_rows = tiles.pack_rows(kept, N, M)
    tl.store(rows + tl.arange(0, M // 32)[None, :] * N + tl.arange(0, N)[:, None], of_rows)
    tl.store(counts + tl.arange(0, N), tl.sum(tiles.count_bits(of_rows), 1))
    of_columns = tiles.pack_columns(kept, N, M)
    tl.store(columns + tl.arange(0, N // 32)[:, None] * M + tl.arange(0, M)[None, :], of_columns)
    tl.store(back + at, tiles.words_by_rows(rows, 0, 0, N, N, M).to(tl.uint8))
    tl.store(other + at, tiles.words_by_columns(columns, 0, 0, M, N, M).to(tl.uint8))


def test_bits_are_packed_and_counted():
    """32 x 64 random pairs to words of rows and of columns, and back."""
    pairs = (torch.rand(32, 64) < 0.5).to(torch.uint8)
    rows, columns = torch.zeros(2, 32, dtype=torch.int32), torch.zeros(1, 64, dtype=torch.int32)
    counts, back, other = torch.zeros(32, dtype=torch.int32), torch.zeros_like(pairs), torch.zeros_like(pairs)
    round_trip[(1,)](pairs, rows, columns, counts, back, other, N=32, M=64)
    assert torch.equal(back, pairs) and torch.equal(other, pairs)
    assert torch.equal(counts, pairs.sum(-1, dtype=torch.int32))


def test_no_queries_have_zero_gradients():
    query, key = torch.randn(1, 1, 0, 4, requires_grad=True), torch.randn(1, 1, 5, 4, requires_grad=True)
    asa_attention(query, key, key, reciprocal=False, impl="triton").sum().backward()
    assert (key.grad == 0).all()


@pytest.mark.parametrize("setting", ["ieee", "tf32"])
def test_products_follow_either_setting_of_torch(monkeypatch, setting):
    monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", setting)
    assert triton_launch.precision(torch.float32) == setting and triton_launch.precision(torch.float16) == "ieee"


# Which calls they take, and what is said of the others.


def test_float64_and_large_head_dims_are_refused():
    x = torch.randn(1, 1, 9, 8)
    with pytest.raises(RuntimeError, match=r"not float64: impl='reference' does"):
        asa_attention(x.double(), x.double(), x.double(), impl="triton")
    wide = torch.randn(1, 1, 9, 257)
    for tensors in ((wide, wide, x), (x, x, wide)):
        with pytest.raises(RuntimeError, match="head dims up to 256, got 257"):
            asa_attention(*tensors, impl="triton")


@pytest.mark.parametrize("state", ["missing", "old"])
def test_a_missing_or_old_triton_is_named(monkeypatch, state):
    """As on a CUDA machine: tensors there cannot be had here, so the call is made of its description."""
    if state == "missing":
        monkeypatch.setitem(sys.modules, "triton", None)
        expected = r"Triton >= 3.6 is needed, and importing triton fails \(.*\): pip install triton"
    else:
        monkeypatch.setattr(triton, "__version__", "3.4.0")
        expected = "Triton >= 3.6 is needed, this is 3.4.0"
    for cached in (devices.why_no_triton, devices.triton_is_interpreted, devices._why_no_triton_on):
        monkeypatch.setattr(devices, cached.__name__, cached.__wrapped__)
    call = dispatch.Call("asa_attention", "asa", torch.device("cuda"), torch.bfloat16, 64)
    with pytest.raises(RuntimeError, match=expected):
        dispatch.resolve(call, "triton")
    assert dispatch.resolve(call, "auto") == "blocked"


def test_every_kernel_has_a_configuration_everywhere():
    dims = (1, 16, 64, 65, 128, 129, 256)
    for arch, dtype, dim in itertools.product((80, 90, 100), DTYPES.values(), dims):
        found = {kernel: triton_configs.find(kernel, dim, dtype, arch) for kernel in triton_configs.KERNELS}
        assert found.pop("dkv") or (found["dk"] and found["dv"])
        assert all(found[k] for k in found if k not in ("dk", "dv")), (arch, dtype, dim)
        for kernel, config in found.items():
            if config is None:
                continue
            assert 64 <= config.block_m <= 128 and 128 % config.block_n == 0
            assert config.block_n >= 64 or kernel not in ("statistics", "topk")
            # One descriptor serves both sides of such tiles, and whole rows.
            assert config.block_m == config.block_n or kernel not in ("mask", "dt") or not config.tma
            assert config.block_m == config.block_n or kernel != "mask"
            assert not config.tma or config.chunk >= 256 or kernel in ("mask", "dt")


PACKAGE = Path(asa_ops.__file__).parent


def test_every_kernel_can_be_read_at_once():
    """At most 25 parameters, structs counting one, and 70 lines, documentation included."""
    kernels = []
    for path in (*PACKAGE.glob("asa/triton/*.py"), PACKAGE / "criss_cross/triton.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.startswith(("_asa_", "_criss_cross_")):
                assert len(node.args.args) <= 25, node.name
                assert node.end_lineno - node.lineno < 70, node.name
                kernels.append(node.name)
    assert {"_asa_mask_kernel", "_asa_finish_gradients_kernel", "_criss_cross_fwd_kernel"} < set(kernels)


def run_compiler(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Run Python outside the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    command = [sys.executable, *arguments]
    run = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-5000:]
    return run


def compile_kernels(*options: str) -> str:
    """Run what `make kernels` does; return its output."""
    return run_compiler("-m", "bench.triton.budget", *options).stdout


COMPILE_SOME = """
import sys, triton
from asa_ops.core import triton_launch
from bench.triton import budget

triton_launch.SLOW = float(sys.argv[1])
missed = []
triton.knobs.compilation.listener.others = lambda cache_hit, **_: missed.append(not cache_hit)
for source in budget.sources((90,), (64,), ("bfloat16",), ("order", "lists", "arrange_backward")):
    triton.compile(source.text, target=budget.GPUTarget("cuda", 90, 32), options=vars(source.options))
print(len(missed), sum(missed))
"""


@pytest.mark.slow
def test_compiling_is_told_and_done_once_for_all_processes(tmp_path):
    """Nothing in a kernel's key changes from process to process, and a process that compiles nothing is silent."""
    told = "asa_ops: Triton compiles kernels"
    cold, warm = (run_compiler("-c", COMPILE_SOME, "0", TRITON_CACHE_DIR=str(tmp_path)) for _ in range(2))
    (looked_up, compiled), again = map(int, cold.stdout.split()), warm.stdout.split()
    assert compiled > 3 and cold.stderr.count(told) == 1
    assert again == [str(looked_up), "0"] and told not in warm.stderr


def test_compiling_is_told_after_two_seconds(caplog):
    """Of our kernels, compiled and not found in Triton's cache; whoever listened before still hears of all."""
    heard = []
    listener = triton_launch.CompileListener(lambda **given: heard.append(given["cache_hit"]))

    def compile_for(seconds, cache_hit=False, module="asa_ops.asa.triton.sums"):
        kernel, times = SimpleNamespace(__module__=module), SimpleNamespace(total=1e6 * seconds)
        listener(src=SimpleNamespace(fn=kernel), metadata={}, metadata_group={}, times=times, cache_hit=cache_hit)
        return len(caplog.messages)

    assert [compile_for(9, cache_hit=True), compile_for(9, module="somebody"), compile_for(1.5)] == [0, 0, 0]
    assert [compile_for(1), compile_for(3)] == [1, 1] and caplog.messages[0].endswith(" 2 s so far.")
    assert heard == [True, False, False, False, False]


@pytest.mark.slow
def test_kernels_keep_to_their_budget_at_head_dim_256_on_hopper():
    assert "\nOK: " in compile_kernels("--quick")


@pytest.mark.slow
def test_all_kernels_keep_to_their_budget():
    assert "\nOK: " in compile_kernels()
