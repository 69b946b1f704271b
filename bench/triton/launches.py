"""How asa_ops launches its Triton kernels: the one file of the benchmarks that knows. It needs Triton.

Everything goes through ``intercepted``, which puts a function in the place of ``asa_ops.core.triton_launch.launch``.
"""

import collections
import contextlib
import statistics
from collections.abc import Callable, Iterator
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor

from asa_ops.asa import triton as asa
from asa_ops.asa.triton import configs
from asa_ops.asa.triton.part import Part
from asa_ops.asa.triton.problem import MAX_SPLITS, Problem
from asa_ops.asa.types import Inputs, Options, Saved
from asa_ops.core import triton_launch
from asa_ops.criss_cross import ops
from asa_ops.criss_cross import triton as criss_cross

from ..accounting import kernel_operations

MAX_CYCLES = 1e9  # that the device is kept busy for while launches are queued
# The kernels with products on tensor cores, in the order of a call.
MATRIX_KERNELS = (*configs.KERNELS, "criss_cross_fwd", "criss_cross_dqk", "criss_cross_dv")


class Launch(NamedTuple):
    """One launch: the kernel, its grid, its arguments by position, compiler options and constants by name."""

    kernel: object  # the @triton.jit function
    grid: tuple
    arguments: tuple
    options: dict

    @property
    def given(self) -> dict[str, object]:
        """All arguments by name; the fields of structs as "struct.field"."""
        given = dict(zip(self.kernel.arg_names, self.arguments, strict=False)) | self.options
        while structs := {name: x for name, x in given.items() if isinstance(x, tuple)}:
            for name, x in structs.items():
                del given[name]
                given |= {f"{name}.{field}": value for field, value in x._asdict().items()}
        return {name: getattr(x, "value", x) for name, x in given.items()}  # of compile-time constants

    @property
    def named(self) -> dict[str, object]:
        """The arguments by name that Triton's own launcher takes, compiler options among them."""
        own = ("warps", "stages", "registers")
        compiler = triton_launch.compile_options(**{name: x for name, x in self.options.items() if name in own})
        return {name: x for name, x in self.options.items() if name not in own} | compiler

    @property
    def label(self) -> str:
        """The short name of the kernel; one kernel makes dk, dv, both at once or both by programs of their own."""
        label = self.kernel.__name__.removeprefix("_").removeprefix("asa_").removesuffix("_kernel")
        if label == "dkv" and self.options["CHUNKS_K"]:
            label = "dk_dv"
        elif label == "dkv" and not (self.options["WANT_DK"] and self.options["WANT_DV"]):
            label = "dk" if self.options["WANT_DK"] else "dv"
        return label


@contextlib.contextmanager
def intercepted(
    instead: Callable[[Launch, Callable[[], None]], None], architecture: int | None = None, processors: int = 132
) -> Iterator[None]:
    """Let ``instead(launch, run)`` take the place of every launch; ``run`` makes it.

    With ``architecture``, every device counts as one of it with that many multiprocessors.
    """
    real = triton_launch.launch

    def launch(kernel, grid, *arguments, **options):
        instead(Launch(kernel, grid, arguments, options), lambda: real(kernel, grid, *arguments, **options))

    others = {"architecture": lambda device: architecture, "processors": lambda device: processors}
    with mock.patch.multiple(triton_launch, launch=launch, **others if architecture is not None else {}):
        yield


def _settings(options: dict) -> Options:
    grid = options["grid"]
    return Options.of(grid, [3] * len(grid), 0, options.get("topk", 0), options.get("reciprocal", True), 0.1)


def go_through(tensors: list, options: dict, band: float | None = None, mask: Tensor | None = None) -> None:
    """Make every launch of a forward and a backward call on query, key, value, alpha, beta without memory.

    With the call's ``options`` grid, topk and reciprocal; thresholds learn within a ``band`` around each.
    """
    inputs = Inputs(*tensors, mask)
    settings = _settings(options)
    saved = Saved.new(inputs, settings, "triton", keep=True)
    asa.fwd(inputs, settings, saved, band)
    asa.bwd(torch.empty_like(saved.out), inputs, saved, settings, band)


def go_through_part(tensors: list, options: dict, band: float | None = None) -> None:
    """The same of the call of a process that computes half of the rows."""
    inputs, n = Inputs(*tensors, None), tensors[0].shape[2]
    settings = _settings(options)
    own = n // 2, n
    part = Part(inputs, settings, band or 0.0, True)
    if (scan := part.scan(own)) is not None:
        numbers, flags = (x.new_empty(len(x), 2 * x.shape[1], x.shape[2]) for x in scan[:2])
        scan = scan._replace(numbers=numbers, flags=flags)
    outputs, kept = part.attend(own, own, scan)
    part = Part(inputs, settings, band or 0.0, True)
    of_rows, largest = part.begin_backward(own, own, torch.empty_like(outputs.out), outputs, kept)
    part.end_backward(own, own, [x.new_empty(len(x), n, *x.shape[2:]) for x in of_rows], largest)


def go_through_criss_cross(query: Tensor, value: Tensor) -> None:
    """The same for criss_cross_attention, maps [B, C, H, W]."""
    saved = ops.criss_cross_fwd(query, query, value, 1.0, "triton")
    criss_cross.fwd(query, query, value, 1.0, *saved)
    criss_cross.bwd(value, query, query, value, saved[1], 1.0)


def configuration(kernel: str, dim: int, architecture: int):
    """Return the row of a kernel for half precision, None if there is none."""
    return configs.find(kernel, dim, torch.bfloat16, architecture)


@contextlib.contextmanager
def configured(kernel: str, dim: int, architecture: int, row, splits: int | None = None) -> Iterator[None]:
    """Let ``row`` be that of a kernel for half precision, and ``splits`` into how many parts its work is cut."""
    library = Problem.splits

    def parts(call, programs, limit):
        return splits if splits is not None and limit == MAX_SPLITS else library(call, programs, limit)

    key = (kernel, max(64, dim), configs.HALF, architecture)
    with mock.patch.dict(configs._TABLE, {key: row}), mock.patch.object(Problem, "splits", parts):
        yield


def operations(call: Callable, tokens: int) -> dict[str, int]:
    """Return the floating point operations of every kernel of a call that multiplies tiles."""
    flops: collections.Counter[str] = collections.Counter()

    def count(launch: Launch, run: Callable) -> None:
        run()
        label, given = launch.label, launch.given
        if label == "statistics":  # by tokens, not by what they are padded to
            pairs = given["statistics.largest"].shape[1] * tokens**2
        elif label == "mask":
            pairs = given["notes"][0, -1].item() * given["SCORES.BLOCK_M"] ** 2
        elif label in ("aggregate", "dq", "dk", "dv", "dk_dv", "dkv", "dt"):
            pairs = given["lists.lengths"].sum().item() * given["SCORES.BLOCK_M"] * max(given["SCORES.BLOCK_N"], 64)
        else:  # no products of tiles
            return
        kind = {"mutual": given.get("MUTUAL", True), "symmetric": given.get("SYMMETRIC", False)}
        dim = given["SCORES.DIM"]
        flops[label] += kernel_operations(label, pairs, dim, given.get("VALUES.DIM", dim), **kind)

    with intercepted(count):
        call()
    return flops


def kernel_seconds(call: Callable, repeats: int = 5) -> dict[str, tuple[float, int]]:
    """Return the median seconds of every kernel in a call on a GPU, and how often it is launched.

    Between events around every launch, queued behind a spinning kernel so that the device does not wait for the host.
    """
    events: list[tuple] = []

    def timed(launch: Launch, run: Callable) -> None:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        events.append((launch.label, start, end))

    seconds: dict[str, list[float]] = collections.defaultdict(list)
    cycles = 40_000_000  # about 20 ms
    with intercepted(timed):
        for _ in range(repeats):
            while True:
                events.clear()
                queued = torch.cuda.Event()
                torch.cuda._sleep(cycles)
                queued.record()
                call()
                device_waited = queued.query()
                torch.cuda.synchronize()
                if not device_waited or cycles > MAX_CYCLES:
                    break
                cycles *= 2
            total: collections.Counter[str] = collections.Counter()
            for label, start, end in events:
                total[label] += start.elapsed_time(end) / 1e3
            for label, x in total.items():
                seconds[label].append(x)
    count = collections.Counter(label for label, *_ in events)
    return {label: (statistics.median(x), count[label]) for label, x in seconds.items()}
