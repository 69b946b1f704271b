"""asa_attention on a GPU beside dense attention, the published eager formula and FlexAttention; a step of bench/gpu.py.

    PYTHONPATH=. python bench/gpu_timings.py --out timings.json --seconds 150

One image, one head, head dim 256, bfloat16. What was measured is written after every case (``bench/gpu_report.py`` has
the form), so that a run cut short has told something; NOTES says how.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from gpu_report import DENSE, best, kernel_flops, median
from record import files
from torch import Tensor

DIM = 256
GRIDS = {8192: (64, 128), 9409: (97, 97), 16384: (128, 128), 4096: (64, 64)}  # in order of importance
KINDS = ("labels", "dense", "photo", "iid")
FLEX = [("labels", 8192), ("dense", 8192), ("labels", 9409)]
EAGER_LIMIT = 9409  # tokens
WARM_UP, ROUNDS, SLOW_ROUNDS, REPLAYS = 3, 15, 4, 5
NOTES = [
    "Times are medians of 15 rounds (eager: 4) between CUDA events. In a round every method runs once, one after the "
    "other, each from an idle device, so launch overhead is in. The inputs fit the L2 cache of a large GPU; it is not "
    "flushed: between two calls of a method all others run. A graph replay is the same call captured in a CUDA graph, "
    "5 replays back to back, without launch overhead.",
    "Ratios are medians of the rounds' ratios. fwd runs without autograd; fwd+bwd returns the gradients of query, key "
    "and value. Survivors: fraction of all pairs. Active tiles: fraction of tiles of 64 x 64 pairs, in the order of "
    "the kernels, with a neighbour in them, counted from the bits.",
    "Dense SDPA computes attention over all pairs with each backend forced. eager is the published formula in PyTorch, "
    "scores in float32 with TF32 allowed. flex is FlexAttention given our survivors as a dense mask; flex + mask "
    "includes create_block_mask (compiled), but not what computes the dense mask.",
    "Kernel times are between CUDA events around every launch, queued behind a spinning kernel so that the device does "
    "not wait for the host; FLOPs count the tiles that were listed, in full.",
]


def stand_in_for_skimage() -> types.ModuleType:
    """Return what ``inputs`` asks of skimage where it is missing: a synthetic picture for the photograph."""

    def astronaut() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        picture = torch.zeros(1, 3, 512, 512)
        for cells in (4, 8, 16, 32, 64, 128):  # from large soft shapes to texture, as in nature
            layer = torch.randn(1, 3, cells, cells, generator=generator) / cells**0.7
            picture += torch.nn.functional.interpolate(layer, (512, 512), mode="bicubic")
        return ((picture - picture.amin()) / (picture.amax() - picture.amin()) * 255)[0].permute(1, 2, 0)

    def resize(image: Tensor, size: tuple[int, int], anti_aliasing: bool):
        x = image.permute(2, 0, 1)[None]
        return (
            torch.nn.functional.interpolate(x, size, mode="bilinear", antialias=anti_aliasing)[0]
            .permute(1, 2, 0)
            .numpy()
        )

    module = types.ModuleType("skimage")
    module.data = types.SimpleNamespace(astronaut=astronaut)
    module.transform = types.SimpleNamespace(resize=resize)
    return module


def make(kind: str, n: int, dim: int, notes: list[str]) -> tuple[list[Tensor], tuple[int, int]]:
    """Return query, key, value, alpha, beta on the CPU, and the grid."""
    try:
        import skimage  # noqa: F401
    except ImportError:
        sys.modules["skimage"] = stand_in_for_skimage()
        notes.append("scikit-image is not installed: photo is a synthetic picture.")
    import inputs

    tensors = inputs.make(kind, GRIDS[n], dim)
    if kind == "iid":
        tensors[3] = torch.ones_like(tensors[3])
    return tensors, GRIDS[n]


# Methods.

OURS = {"asa": "triton", "asa cuda": "cuda"}  # implementation by the name of its column


class Flex:
    """FlexAttention given a dense mask of N x N, compiled for one N."""

    def __init__(self, n: int):
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        self.n, self.dense = n, torch.zeros(n, n, dtype=torch.bool, device="cuda")
        self.attention = torch.compile(flex_attention, dynamic=False)
        self.create = torch.compile(create_block_mask, dynamic=False)
        dense = self.dense

        def survives(b, h, i, j):
            return dense[i, j]

        self.survives = survives  # one function for all masks: a new one would be compiled again

    def block_mask(self):
        return self.create(self.survives, None, None, self.n, self.n, device="cuda")


def attend(name: str, query, key, value, alpha, beta, grid, flex: Flex | None = None, block_mask=None) -> Tensor:
    """Return one attention output by the named method."""
    from asa_ops import asa_attention
    from asa_ops.asa import reference

    if name in OURS:
        return asa_attention(query, key, value, alpha, beta, grid=grid, impl=OURS[name])
    if name == "eager":
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            return reference.asa_attention(query, key, value, alpha, beta, grid=grid, published=True)
        finally:
            torch.set_float32_matmul_precision(before)
    if name in ("flex", "flex + mask"):
        return flex.attention(query, key, value, block_mask=flex.block_mask() if name == "flex + mask" else block_mask)
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backend = {"flash": "FLASH_ATTENTION", "cudnn": "CUDNN_ATTENTION", "efficient": "EFFICIENT_ATTENTION"}
    with sdpa_kernel(getattr(SDPBackend, backend[name.removeprefix("sdpa ")])):
        return torch.nn.functional.scaled_dot_product_attention(query, key, value)


def runner(name: str, tensors, grid, backward: bool, flex: Flex | None) -> Callable:
    """Return a function that runs the named method once."""
    query, key, value, alpha, beta = tensors
    leaves = [x.detach().requires_grad_(backward) for x in (query, key, value)]
    grad_out = torch.randn_like(value)
    block_mask = flex.block_mask() if name == "flex" else None

    def run():
        with torch.set_grad_enabled(backward):
            out = attend(name, *leaves, alpha, beta, grid, flex, block_mask)
        return (out, *torch.autograd.grad(out, leaves, grad_out)) if backward else (out,)

    return run


# Timing.


def milliseconds(run: Callable, calls: int = 1) -> float:
    """Return the time of ``calls`` calls from an idle device, per call."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / calls


def interleaved(runs: dict[str, Callable], slow: tuple[str, ...], calls: int = 1) -> dict[str, list[float]]:
    """Return the times of every method in every round."""
    times = {name: [] for name in runs}
    for i in range(WARM_UP + ROUNDS):
        for name, run in runs.items():
            if name in slow and not WARM_UP <= i < WARM_UP + SLOW_ROUNDS:
                continue
            time_of_call = milliseconds(run, calls)
            if i >= WARM_UP:
                times[name].append(time_of_call)
    return times


def capture(run: Callable) -> torch.cuda.CUDAGraph:
    """Return a CUDA graph of one call."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def attempt(run: Callable, *args):
    """Return the result and None, or None and what went wrong: a peer that cannot run a call is a finding."""
    try:
        result = run(*args)
        torch.cuda.synchronize()
    except Exception as error:
        return None, f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
    return result, None


def measure(names: list[str], tensors, grid, backward: bool, flex: Flex | None) -> dict[str, dict]:
    """Return the times of every method as called and in graph replays; of one that fails, its error."""
    methods: dict[str, dict] = {name: {} for name in names}
    runs, replays = {}, {}
    for name in names:
        run, error = attempt(runner, name, tensors, grid, backward, flex)
        _, error = (None, error) if error else attempt(run)
        if error:
            methods[name]["error"] = error
        else:
            runs[name] = run
    for name, times in interleaved(runs, slow=("eager",)).items():
        methods[name]["call_ms"] = times
    for name in runs:
        if name not in ("eager", "flex + mask"):
            graph, error = attempt(capture, runs[name])
            if error:
                methods[name]["graph_error"] = error
            else:
                replays[name] = graph.replay
    for name, times in interleaved(replays, slow=(), calls=REPLAYS).items():
        methods[name]["graph_ms"] = times
    return methods


# Kernel by kernel.


def label_of(kernel: str, constants: dict) -> str:
    """Return the short name of a launch; one kernel makes dk, dv or both."""
    label = kernel.removeprefix("_asa_").removesuffix("_kernel")
    if label == "dkv" and not (constants["WANT_DK"] and constants["WANT_DV"]):
        label = "dk" if constants["WANT_DK"] else "dv"
    return label


def given_to(kernel, args: tuple, constants: dict) -> dict:
    """Return what a launch gives its kernel, by name; fields of structs as ``struct.field``."""
    given = dict(zip(kernel.arg_names, args, strict=False)) | constants
    while structs := {name: x for name, x in given.items() if isinstance(x, tuple)}:
        for name, x in structs.items():
            del given[name]
            given |= {f"{name}.{field}": value for field, value in x._asdict().items()}
    return {name: getattr(x, "value", x) for name, x in given.items()}  # of compile-time constants


def pairs_listed(label: str, given: dict, n: int) -> int | None:
    """Return how many pairs of n tokens, or of tiles, a launch visits; None of kernels without products of tiles."""
    if label == "statistics":  # by tokens, not by what they are padded to
        return given["statistics.largest"].shape[1] * n * n
    if label == "mask":
        return given["count"].sum().item() * given["SCORES.BLOCK_M"] ** 2
    if label in ("aggregate", "dq", "dk", "dv", "dkv", "dt"):
        return given["lists.lengths"].sum().item() * given["SCORES.BLOCK_M"] * max(given["SCORES.BLOCK_N"], 64)
    return None


def active_tiles(words: Tensor, padded: int, key_padded: int) -> Tensor:
    """Return which tiles of 64 x 64 pairs hold a bit, bool [Z, key blocks, row blocks].

    ``words``: int32 [Z, ..], of every head first words[column // 32, row].
    """
    words = words[:, : key_padded // 32 * padded].reshape(-1, key_padded // 64, 2, padded // 64, 64)
    return (words != 0).any(4).any(2)


def _patched(launch: Callable):
    from asa_ops.core import triton_launch

    return mock.patch.object(triton_launch, "launch", launch)


def count(run: Callable, n: int) -> tuple[dict[str, int], float | None]:
    """Return the floating point operations of every kernel in a call, and the fraction of active tiles."""
    from asa_ops.core.triton_launch import launch

    flops: dict[str, int] = {}
    active = None

    def counting(kernel, grid, *args, **options):
        nonlocal active
        launch(kernel, grid, *args, **options)
        given = given_to(kernel, args, options)
        label = label_of(kernel.__name__, given)
        pairs = pairs_listed(label, given, n)
        if pairs is None:
            return
        kind = {"mutual": given.get("MUTUAL", True), "symmetric": given.get("SYMMETRIC", False)}
        dim = given["SCORES.DIM"]
        flops[label] = flops.get(label, 0) + kernel_flops(label, pairs, dim, given.get("VALUES.DIM", dim), **kind)
        if label == "aggregate":
            found = active_tiles(given["bits.words"], given["tokens.rows.padded"], given["tokens.keys.padded"])
            blocks = -(-n // 64)
            active = found.sum().item() / (len(found) * blocks**2)

    with _patched(counting):
        run()
    return flops, active


def kernel_times(run: Callable, repeats: int = 5) -> dict[str, dict]:
    """Return the median time of every kernel in a call, and how often it is launched."""
    from asa_ops.core.triton_launch import launch

    events: list[tuple] = []

    def timed(kernel, grid, *args, **options):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        launch(kernel, grid, *args, **options)
        end.record()
        events.append((label_of(kernel.__name__, options), start, end))

    times: dict[str, list[float]] = {}
    launches: dict[str, int] = {}
    cycles = 40_000_000  # about 20 ms
    with _patched(timed):
        for _ in range(repeats):
            while True:
                events.clear()
                queued = torch.cuda.Event()
                torch.cuda._sleep(cycles)
                queued.record()
                run()
                device_waited = queued.query()
                torch.cuda.synchronize()
                if not device_waited or cycles > 1e9:
                    break
                cycles *= 2
            total: dict[str, float] = {}
            launches = {}
            for label, start, end in events:
                total[label] = total.get(label, 0) + start.elapsed_time(end)
                launches[label] = launches.get(label, 0) + 1
            for label, time_of_kernel in total.items():
                times.setdefault(label, []).append(time_of_kernel)
    return {label: {"ms": statistics.median(x), "launches": launches[label]} for label, x in times.items()}


# What there is to measure.


def case(kind: str, n: int, backward: bool, flex: Flex | None, notes: list[str]) -> dict:
    """Measure one case; with ``flex`` beside FlexAttention, otherwise beside dense attention and the eager formula."""
    from asa_ops import reciprocal_neighbors

    tensors, grid = make(kind, n, DIM, notes)
    query, key, value, alpha, beta = tensors = [x.cuda() for x in tensors]
    tensors[:3] = query, key, value = [x.bfloat16() for x in (query, key, value)]
    result = {"inputs": kind, "N": n, "grid": grid, "D": DIM, "mode": "fwd+bwd" if backward else "fwd", "kernels": {}}
    names = [*OURS, "flex", "flex + mask"] if flex else [*OURS, *DENSE, *(["eager"] if n <= EAGER_LIMIT else [])]
    graph, error = attempt(lambda: reciprocal_neighbors(query, key, alpha, beta, grid=grid, impl="triton"))
    if error:
        result["methods"] = {"asa": {"error": error}}
        return result
    result["survivors"] = len(graph.col_indices) / n**2
    if flex:
        rows = torch.arange(n, device="cuda").repeat_interleave(graph.row_offsets.diff())
        flex.dense.zero_()
        flex.dense[rows, graph.col_indices.long()] = True
    result["methods"] = measure(names, tensors, grid, backward, flex)
    if not flex and "error" not in result["methods"]["asa"]:
        run = runner("asa", tensors, grid, backward, None)
        flops, result["active"] = count(run, n)
        result["kernels"] = kernel_times(run)
        for label, number in flops.items():
            result["kernels"][label]["flops"] = number
    return result


def ceilings() -> dict[str, float]:
    """Return what the card does at most, measured: a large matrix product and a large copy."""
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    source = torch.empty(2**30, dtype=torch.float32, device="cuda").normal_()
    target = torch.empty_like(source)
    best_of = {}
    for name, run in {"gemm": lambda: a @ b, "copy": lambda: target.copy_(source)}.items():
        milliseconds(run, 3)
        best_of[name] = statistics.median(milliseconds(run, 5) for _ in range(5))
    return {
        "gemm_tflops": 2 * 8192**3 / best_of["gemm"] / 1e9,
        "copy_tbs": 2 * source.numel() * source.element_size() / best_of["copy"] / 1e9,
    }


def first_call() -> dict[str, float]:
    """Return the seconds of the first calls in this process: to import, to the first output, to the first gradients."""
    seconds, started = {}, time.perf_counter()

    def lap(name: str) -> None:
        nonlocal started
        torch.cuda.synchronize()
        seconds[name] = time.perf_counter() - started
        started = time.perf_counter()

    torch.zeros(1, device="cuda")
    lap("CUDA context")
    import asa_ops  # noqa: F401

    lap("import asa_ops")
    tensors, grid = make("labels", 4096, DIM, [])
    tensors = [x.bfloat16().cuda() if i < 3 else x.cuda() for i, x in enumerate(tensors)]
    run = runner("asa", tensors, grid, True, None)
    started = time.perf_counter()
    with torch.no_grad():
        attend("asa", *tensors, grid)
    lap("first forward")
    run()
    lap("first forward and backward after it")
    run()
    lap("the next")
    return seconds


def write(path: Path, timings: dict) -> None:
    """Write the file whole or not at all."""
    files.write(path, json.dumps(timings, indent=1) + "\n")


def cases() -> list[tuple[str, int, bool, bool]]:
    """Return (kind, N, backward, beside FlexAttention) in order of importance."""
    todo = [
        (kind, n, backward, False) for n in (8192, 9409) for kind in ("labels", "dense") for backward in (False, True)
    ]
    todo += [(kind, n, backward, True) for kind, n in FLEX[:1] for backward in (False, True)]
    todo += [(kind, n, backward, False) for n in GRIDS for kind in KINDS for backward in (False, True)]
    todo += [(kind, n, backward, True) for kind, n in FLEX[1:] for backward in (False, True)]
    return list(dict.fromkeys(todo))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("timings.json"))
    parser.add_argument("--seconds", type=float, default=150, help="no case starts after that")
    parser.add_argument("--first-call", action="store_true", help="print what a first call takes, as JSON")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench/gpu_timings.py needs a CUDA device")
    if options.first_call:
        print(json.dumps(first_call()))
        return
    files.check_out(parser, options.out)
    files.check([options.out])
    deadline = time.monotonic() + options.seconds
    timings = {"notes": [*NOTES], "cases": []}
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # empty: the first call compiles, what follows profits
        command = [sys.executable, __file__, "--first-call"]
        first = subprocess.run(command, capture_output=True, text=True)
        if first.returncode:
            timings["notes"].append(f"The first call failed: {(first.stderr.strip().splitlines() or ['?'])[-1]}")
        else:
            timings["first_call"] = json.loads(first.stdout.strip().splitlines()[-1])
        timings["ceilings"] = ceilings()
        torch.cuda.empty_cache()
        print(timings.get("first_call"), timings["ceilings"], flush=True)
        write(options.out, timings)
        failed = measure_all(cases(), deadline, timings, options.out)
    write(options.out, timings)
    sys.exit(f"asa failed in {failed} cases" if failed else 0)


def measure_all(todo: list[tuple], deadline: float, timings: dict, out: Path) -> int:
    """Measure until the time is over; return in how many cases asa failed."""
    flexes: dict[int, Flex] = {}
    failed = 0
    for i, (kind, n, backward, beside_flex) in enumerate(todo):
        if time.monotonic() > deadline:
            left = ", ".join(f"{kind} {n}{' flex' * flex}{' fwd+bwd' * back}" for kind, n, back, flex in todo[i:])
            timings["notes"].append(f"No time was left for: {left}.")
            break
        try:
            if beside_flex and n not in flexes:
                flexes[n] = Flex(n)
            result = case(kind, n, backward, flexes[n] if beside_flex else None, timings["notes"])
        except Exception as error:  # of what comes with the timings; the other cases go on
            timings["notes"].append(f"{kind} {n}{' fwd+bwd' * backward} failed: {type(error).__name__}: {error}"[:300])
            failed += 1
            continue
        failed += "error" in result["methods"]["asa"]
        timings["cases"].append(result)
        write(out, timings)
        told = {name: median(result, name) or method.get("error") for name, method in result["methods"].items()}
        print(kind, n, result["mode"], result.get("active"), told, best(result, DENSE), flush=True)
        torch.cuda.empty_cache()
    return failed


if __name__ == "__main__":
    files.run(main)
