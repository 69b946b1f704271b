"""What tests of the benchmarks share: a file of results as a run leaves it, and what stands for torch.cuda."""

import dataclasses
import time
from unittest import mock

import torch
from torch import Tensor

from bench import accounting
from bench.record import Case, Method, Record


class Event:
    """Stands for torch.cuda.Event, on a CPU."""

    def __init__(self, enable_timing: bool = False):
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, other: "Event") -> float:
        return 1e3 * (other.at - self.at)

    def query(self) -> bool:
        return False


def stand_in_for_cuda(monkeypatch) -> mock.Mock:
    """Replace what times calls on a GPU and counts their bytes, 2000; return what replays graphs."""
    graph = mock.Mock()
    for name in ("Stream", "current_stream", "stream", "graph", "synchronize", "empty_cache", "_sleep"):
        monkeypatch.setattr(torch.cuda, name, mock.MagicMock())
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", mock.Mock())
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 1000)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3000)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    return graph.replay


def tiles(pairs: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return which tiles of 64 x 64 have any of the pairs [..., N, N], in the order of 8 x 8 pixels."""
    order = accounting.tile_order(grid)
    pairs = torch.nn.functional.pad(pairs[..., order, :][..., order], (0, -len(order) % 64) * 2)
    return pairs.unflatten(-1, (-1, 64)).unflatten(-3, (-1, 64)).any(-1).any(-2)


def stored() -> Record:
    """Return a record of a sweep of tokens, a block, and the case of a check."""
    fields = Case("asa", "64x64", 64, 1, 1, "float32", "labels", None, "fwd", "", {}, [], {})
    sparse = accounting.Sparsity(157, 0.038, 0.23, 0.24, 0.15, 0.04)._asdict()

    def timed(ours: float, dense: float, **other) -> Case:
        methods = {"asa cpu": Method([ours, ours, 1.1 * ours], flops=10**9), "sdpa flash": Method([dense] * 3)}
        methods["natten"] = Method(skipped="not installed")
        return dataclasses.replace(fields, sparsity=sparse, ours=["asa cpu"], methods=methods, **other)

    cases = [timed(1e-3, 2e-3), timed(3e-3, 2e-3, inputs="near-dense", mode="fwd+bwd")]
    for side, ours, dense in ((32, 4, 2), (64, 16, 32), (128, 256, 512), (256, 4096, 8192)):
        cases.append(timed(1e-3 * ours, 1e-3 * dense, size=f"{side}x{side}", sweep="tokens"))
    used = {"asa cpu": Method(memory={"fwd": 10**6, "fwd+bwd": 2 * 10**6}), "eager": Method(error="RuntimeError: no")}
    cases.append(dataclasses.replace(fields, mode="mem", ours=["asa cpu"], methods=used))
    block = {"asa_ops": Method([1.0]), "eager": Method([2.0])}
    cases.append(dataclasses.replace(fields, op="criss_cross", inputs="iid", ours=["asa_ops"], methods=block))
    return Record({"device": "A Machine", "commit": "abc"}, {"torch.mm GFLOP/s": 100.0, "copy GB/s": 10.0}, cases)
