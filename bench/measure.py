"""Seconds and bytes of calls, the machine they ran on, and what it can do at most."""

import contextlib
import dataclasses
import functools
import gc
import importlib.metadata
import itertools
import multiprocessing
import platform
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from asa_ops import asa_attention
from asa_ops.core import extension
from examples import memory
from examples.machine import commit, output_of, processor

from . import inputs, progress, workloads
from .workloads import Spec

ROOT = Path(__file__).resolve().parents[1]
WARM_UP = 2
SLOW = 10  # times the fastest method: such a one is timed in few rounds
SLOW_ROUNDS = 2
REPLAYS = 5  # of a CUDA graph, back to back
PEERS = ("xformers", "natten", "adasplash")


def environment(device: str) -> dict[str, object]:
    """Return what results depend on; runs may be put into one file, with all commits, where all else agrees."""
    found = importlib.metadata.distributions()
    versions = {x.name: x.version for x in reversed([*found])}  # of a name, the first counts
    result: dict[str, object] = {"commit": commit()}
    if device == "cpu":
        x86 = ["portable", "AVX2", "AVX-512", "AMX"]
        names = ["portable", "NEON"] if platform.machine() in ("aarch64", "arm64") else x86
        isa = names[torch.ops.asa_ops.cpu_isa()] if not extension.WHY_MISSING else "none"
        result |= {"device": processor(), "instruction set": isa, "threads": torch.get_num_threads()}
    else:
        properties = torch.cuda.get_device_properties(0)
        result |= {"device": properties.name, "memory": f"{properties.total_memory / 2**30:.0f} GiB"}
        result["compute capability"] = f"{properties.major}.{properties.minor}"
        result["multiprocessors"] = properties.multi_processor_count
        result["driver"] = output_of("nvidia-smi", "--id=0", "--query-gpu=driver_version", "--format=csv,noheader")
        result |= {"cuda": torch.version.cuda, "triton": versions.get("triton")}
    result |= {"torch": torch.__version__, "python": platform.python_version()}
    if not inputs.skimage:
        result["photo"] = "a synthetic picture: scikit-image is not installed"
    return result | {name: versions[name] for name in PEERS if name in versions}


def seconds_of(call: Callable, device: str, calls: int = 1) -> float:
    """Return the seconds of a call, from an idle device until it is idle again; of several back to back, their mean."""
    if device == "cpu":
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - start) / calls
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / calls / 1e3


def interleaved(
    calls: dict[str, Callable], rounds: int, device: str, repeats: int = 1
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Time every call, ``repeats`` times, once a round, so that a slow moment of the machine meets all of them.

    Two more rounds warm up, the first one for what compiles. A call that the second finds slower than SLOW times the
    fastest is timed in SLOW_ROUNDS rounds only, enough for its ratio. Also returns, by name, what the calls that failed
    raised; these have no seconds.
    """
    times, errors, warm = {name: [] for name in calls}, {}, {}
    for i, (name, call) in itertools.product(range(WARM_UP + rounds), calls.items()):
        if name in errors or (i >= WARM_UP + SLOW_ROUNDS and warm[name] > SLOW * min(warm.values())):
            continue
        try:
            taken = seconds_of(call, device, repeats)
        except Exception as error:  # whatever a method raises is the finding
            errors[name], times[name] = progress.describe(error), []
            warm.pop(name, None)
            continue
        if i < WARM_UP:
            warm[name] = taken
        else:
            times[name].append(taken)
    return times, errors


def in_graphs(calls: dict[str, Callable], rounds: int) -> dict[str, list[float]]:
    """Time replays of every call captured in a CUDA graph, without what launching costs; none of what has no graph."""
    replays, stream = {}, torch.cuda.Stream()
    for name, call in calls.items():
        with contextlib.suppress(Exception):  # a peer that synchronises, for one, cannot be captured
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    call()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                call()
            replays[name] = graph.replay
    times, _ = interleaved(replays, rounds, "cuda", REPLAYS)
    replays.clear()
    torch.cuda.empty_cache()  # what the graphs held
    return times


def bytes_added(call: Callable, device: str) -> int:
    """Return the bytes by which a call raises the peak of memory, on a CPU of this process (Linux)."""
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    _, added = memory.added(call)
    if added is None:
        raise RuntimeError("bytes of a process are measured on Linux alone")
    return added


def bytes_of(spec: Spec, device: str, name: str, backward: bool) -> int:
    """Return the bytes that a call of a method adds to the peak.

    A small call loads code before; what compiles for a shape, and takes more than the call, is called once as it is.
    """
    first, _, impl = name.partition(" ")
    impls, peers = ([impl or "auto"], []) if first in ("asa", workloads.OURS) else (["auto"], [name])
    if first != "flex":
        small = dataclasses.replace(spec, size="x".join(str(min(side, 16)) for side in spec.grid))
        workloads.build(small, device, impls, peers).call(name, backward)()
    call = workloads.build(spec, device, impls, peers).call(name, backward)
    if first == "flex":
        call()
    return bytes_added(call, device)


@functools.cache
def bytes_once(spec: Spec, device: str, name: str, backward: bool) -> int:
    """Return, or raise, what :func:`bytes_of` does: on a CPU in a process of its own, and of equal calls once."""
    if device != "cpu":
        return bytes_of(spec, device, name, backward)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(bytes_of, spec, device, name, backward).result()


def ceilings(device: str, dtype: torch.dtype, side: int = 2048) -> dict[str, float]:
    """Return what the machine does at most, measured: large matrix products of ``dtype`` and a large copy.

    Of products on a CPU there are two, torch's own and this library's; the second is what pass 1 of attention, with
    thresholds that nobody passes, takes more at twice the head dim.
    """
    side = side if device == "cpu" else 4 * side
    a, b = torch.randn(2, side, side, device=device, dtype=dtype)
    source = torch.empty(side * side * 16, device=device, dtype=torch.float32).normal_()
    target = torch.empty_like(source)
    calls = {"torch.mm": lambda: a @ b, "copy": lambda: target.copy_(source)}
    if device == "cpu" and not extension.WHY_MISSING:
        for dim in (256, 512):
            query, nobody = torch.randn(1, 1, side, dim, dtype=dtype), torch.full((1, 1, side), torch.inf)
            calls[f"pass 1, {dim}"] = lambda q=query, t=nobody: asa_attention(q, q.clone(), q, t, impl="cpu")
    times, errors = interleaved(calls, 9, device)
    if errors:
        raise RuntimeError(f"the machine's ceilings could not be measured: {errors}")
    best = {name: min(x) for name, x in times.items()}
    result = {
        "torch.mm GFLOP/s": 2 * side**3 / best["torch.mm"] / 1e9,
        "copy GB/s": 2 * source.nbytes / best["copy"] / 1e9,
    }
    if "pass 1, 256" in best:
        more = best["pass 1, 512"] - best["pass 1, 256"]
        result["asa_ops product GFLOP/s"] = 2 * side**2 * 256 / more / 1e9
    return result
