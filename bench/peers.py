"""What else computes attention: imported where it is installed, one function a peer.

A peer, made ready for a call, takes query, key, value [B, heads, N, D] and returns [B, heads, N, D]. None of them
computes adaptive sparse attention but "eager" and, given the survivors, "flex".
"""

import contextlib
import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from asa_ops import reciprocal_neighbors
from asa_ops.asa import reference

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


class Problem(NamedTuple):
    tensors: list[Tensor]  # query, key, value, alpha, beta
    grid: tuple[int, ...]


class Peer(NamedTuple):
    prepare: Callable[[Problem], Attention]
    about: str
    matrices: int = 0  # N x N float32 matrices that are alive together in a forward and backward call
    package: str = "torch"  # that it is in
    gpu: bool = False  # runs on a GPU only
    backward_on_cpu: bool = True
    graph: bool = True  # timed in a CUDA graph too

    def why_not(self, problem: Problem) -> str | None:
        """Return why it cannot run a call here, None if it can."""
        if not importlib.util.find_spec(self.package):
            return "not installed"
        return "needs a CUDA device" if self.gpu and not problem.tensors[0].is_cuda else None


def _sdpa(backend: SDPBackend) -> Callable[[Problem], Attention]:
    def attention(query, key, value):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(query, key, value)

    return lambda problem: attention


@contextlib.contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Let products of float32 matrices be of another precision: "high" allows TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _eager(problem: Problem) -> Attention:
    """The published formula, scores in float32; of half precision on a GPU with TF32 allowed, which is faster."""
    query, *_, alpha, beta = problem.tensors
    tf32 = query.is_cuda and query.dtype != torch.float32

    def attention(query, key, value):
        with matmul_precision("high") if tf32 else contextlib.nullcontext():
            return reference.asa_attention(query, key, value, alpha, beta, grid=problem.grid, published=True)

    return attention


@functools.lru_cache(maxsize=1)  # a mask of N x N is enough
def _compiled_flex(shape: tuple[int, ...], device: torch.device) -> tuple[Tensor, Callable, Callable]:
    """Return a dense mask, FlexAttention, and what makes a block mask of the dense one, compiled for a shape."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    dense = torch.zeros(*shape, shape[-1], dtype=torch.bool, device=device)
    create = torch.compile(create_block_mask, dynamic=False)

    def survives(b, h, i, j):  # one function for all masks: another would be compiled again
        return dense[b, h, i, j]

    attention = torch.compile(flex_attention, dynamic=False)
    return dense, attention, lambda: create(survives, *dense.shape, device=device.type)


def _flex(problem: Problem, mask_in_call: bool = False) -> Attention:
    query, key, _, alpha, beta = problem.tensors
    dense, attention, block_mask = _compiled_flex(tuple(query.shape[:3]), query.device)
    graph = reciprocal_neighbors(query, key, alpha, beta, grid=problem.grid)
    rows = torch.arange(len(graph.row_offsets) - 1, device=query.device).repeat_interleave(graph.row_offsets.diff())
    dense.zero_().flatten(0, 2)[rows, graph.col_indices.long()] = True
    if mask_in_call:
        return lambda *tensors: attention(*tensors, block_mask=block_mask())
    return functools.partial(attention, block_mask=block_mask())


def _adasplash(problem: Problem) -> Attention:
    return functools.partial(importlib.import_module("adasplash").adasplash, is_causal=False)


def _xformers(problem: Problem) -> Attention:
    attention = importlib.import_module("xformers.ops").memory_efficient_attention
    return lambda *tensors: attention(*(x.transpose(1, 2) for x in tensors)).transpose(1, 2)


NEIGHBOURHOOD = 13  # side: 169 positions


def _natten(problem: Problem) -> Attention:
    na2d = importlib.import_module("natten").na2d
    side = tuple(min(NEIGHBOURHOOD, s - (s % 2 == 0)) for s in problem.grid)

    def attention(*tensors):
        maps = (x.transpose(1, 2).unflatten(1, problem.grid) for x in tensors)
        return na2d(*maps, kernel_size=side).flatten(1, 2).transpose(1, 2)

    return attention


_FLEX = Peer(_flex, "FlexAttention given our survivors in an N x N mask, neither counted", 1, backward_on_cpu=False)
PEERS: dict[str, Peer] = {
    "sdpa flash": Peer(_sdpa(SDPBackend.FLASH_ATTENTION), "dense, PyTorch"),
    "sdpa cudnn": Peer(_sdpa(SDPBackend.CUDNN_ATTENTION), "dense, PyTorch", gpu=True),
    "sdpa efficient": Peer(_sdpa(SDPBackend.EFFICIENT_ATTENTION), "dense, PyTorch", gpu=True),
    "sdpa math": Peer(_sdpa(SDPBackend.MATH), "dense, PyTorch, stores N x N matrices", matrices=4),
    "eager": Peer(_eager, "the published formula in eager PyTorch", matrices=14, graph=False),
    "flex": _FLEX,
    "flex + mask": _FLEX._replace(
        prepare=functools.partial(_flex, mask_in_call=True),
        about="the same with its block mask built in the call",
        graph=False,
    ),
    "adasplash": Peer(_adasplash, "entmax attention with a sparsity of its own", package="adasplash", gpu=True),
    "xformers": Peer(_xformers, "dense, memory-efficient attention", package="xformers", gpu=True),
    "natten": Peer(_natten, f"the {NEIGHBOURHOOD} x {NEIGHBOURHOOD} pixels around each", package="natten"),
}
DENSE = ("sdpa flash", "sdpa cudnn", "sdpa efficient", "xformers")
INDIFFERENT = (*DENSE, "sdpa math", "eager", "natten")  # cost the same on every input
