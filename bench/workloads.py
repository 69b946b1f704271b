"""What is measured: an op on an input, ours and what it is compared with.

As a program, for ``measure.bytes_in_fresh_process``, it prints the bytes that one call adds to the peak:

    python bench/workloads.py '{"op": "asa", "size": "64x64", ...}' '"sdpa flash"' true
"""

import ast
import functools
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import eager
import inputs
import measure
import torch
from peers import PEERS, Problem
from torch import Tensor

from asa_ops import asa_attention, criss_cross_attention, nn
from asa_ops.core import dispatch

DTYPES = ("float32", "bfloat16", "float16")
BLOCKS = [name for name in nn.available() if name != "asa"]
OPS = ("asa", "criss_cross_attention", *BLOCKS)
OURS = "asa_ops"  # the name of our method where there is one


@dataclass(frozen=True)
class Spec:
    """One op on one input; ``op`` may carry options of a block, "non_local,mode=gaussian"."""

    op: str
    size: str
    dim: int
    heads: int
    batch: int
    dtype: str
    inputs: str
    alpha: float | None
    device: str

    @property
    def grid(self) -> tuple[int, int]:
        height, width = self.size.split("x")
        return int(height), int(width)

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


@dataclass
class Workload:
    """Tensors, and by name what makes a method ready: a function of the leaves.

    Attributes:
        leaves: get gradients.
        grad_out: of the output.
        prepare: by name; may raise.
        ours: the names that are this library's.
        skipped: why a peer cannot be tried.
        parameters: get gradients too.
        tensors: of "asa", query, key, value, alpha, beta.
    """

    leaves: list[Tensor]
    grad_out: Tensor
    prepare: dict[str, Callable[[], Callable]]
    ours: list[str]
    skipped: dict[str, str] = field(default_factory=dict)
    parameters: list[Tensor] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)

    def call(self, name: str, backward: bool) -> Callable[[], object]:
        """Return a function that runs a method once, with the gradients of everything or without autograd."""
        method = self.prepare[name]()
        leaves = [x.detach().requires_grad_(backward) for x in self.leaves]

        def run():
            with torch.set_grad_enabled(backward):
                # As results, no leaves: FlopCounterMode hooks what modules get, which autograd.grad forbids of leaves.
                out = method(*(x.view_as(x) for x in leaves))
            if not backward:
                return out
            return torch.autograd.grad(out, [*leaves, *self.parameters], self.grad_out, allow_unused=True)

        return run


def parse_op(text: str) -> tuple[str, dict]:
    """Return the name and the options of "non_local,mode=gaussian".

    Raises:
        ValueError: no such op, or an option that its module does not take.
    """
    name, *given = text.split(",")
    if name not in OPS:
        raise ValueError(f"unknown op {name!r}, expected one of {', '.join(OPS)}")
    options = {}
    for each in given:
        key, equals, value = each.partition("=")
        if not equals or name not in BLOCKS:
            raise ValueError(f"op {text!r}: expected options of a block as name,key=value,.., got {each!r}")
        try:
            options[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[key] = value
    if options:
        try:
            nn.build(name, 64, **options)
        except (TypeError, ValueError) as error:
            raise ValueError(f"op {text!r}: {error}") from error
    return name, options


def build(spec: Spec, impls: list[str], peers: list[str]) -> Workload:
    """Return what is to be measured.

    Args:
        spec: op and input.
        impls: implementations of "asa" and "criss_cross_attention", "auto" among them.
        peers: names of ``peers.PEERS``; of other ops "eager" alone.
    """
    name, options = parse_op(spec.op)
    if name == "asa":
        return _asa(spec, impls, peers)
    workload = _criss_cross_attention(spec, impls) if name == "criss_cross_attention" else _block(spec, name, options)
    if "eager" not in peers:
        workload.prepare.pop("eager", None)
        workload.skipped.pop("eager", None)
    return workload


def dispatched(spec: Spec) -> dispatch.Call | None:
    """Return what chooses among the implementations of an op, None if it has one only."""
    functions = {
        "asa": ("asa_attention", "asa", spec.dim),
        "criss_cross_attention": ("criss_cross_attention", "criss_cross", _less(spec.dim)),
    }
    if spec.op not in functions:
        return None
    op, stem, dim = functions[spec.op]
    return dispatch.Call(op, stem, torch.device(spec.device), spec.torch_dtype, dim)


def _asa(spec: Spec, impls: list[str], peers: list[str]) -> Workload:
    tensors = inputs.make(spec.inputs, spec.grid, spec.dim, spec.heads, spec.batch, spec.alpha)
    tensors = [x.to(spec.device, spec.torch_dtype if i < 3 else torch.float32) for i, x in enumerate(tensors)]
    *leaves, alpha, beta = tensors
    call = dispatched(spec)

    def ours(impl: str) -> Callable:
        return lambda: lambda q, k, v: asa_attention(q, k, v, alpha, beta, grid=spec.grid, impl=impl)

    names = list(dict.fromkeys(dispatch.resolve(call, impl) for impl in impls))
    prepare = {f"asa {impl}": ours(impl) for impl in names}
    problem, skipped = Problem(tensors, spec.grid), {}
    for name in peers:
        peer = PEERS[name]
        needed, free = peer.matrices * problem.matrix, measure.free_bytes(spec.device)
        if reason := peer.why_not(problem):
            skipped[name] = reason
        elif 2 * needed > free:
            skipped[name] = _too_large(needed, free)
        else:
            prepare[name] = lambda peer=peer: peer.prepare(problem)
    generator = torch.Generator().manual_seed(1)
    grad_out = torch.randn(leaves[2].shape, generator=generator).to(leaves[2])
    return Workload(leaves, grad_out, prepare, [f"asa {impl}" for impl in names], skipped, tensors=tensors)


def _too_large(needed: int, free: int) -> str:
    return f"would need {needed / 1e9:.0f} GB, more than half of the {free / 1e9:.0f} GB that are free"


def _maps(spec: Spec, *channels: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    maps = (torch.randn(spec.batch, size, *spec.grid, generator=generator) for size in channels)
    return [x.to(spec.device, spec.torch_dtype) for x in maps]


def _less(dim: int) -> int:
    """Return the channels of query and key of criss-cross attention whose value has ``dim``."""
    return max(dim // 8, 1)


def _criss_cross_attention(spec: Spec, impls: list[str]) -> Workload:
    less = _less(spec.dim)
    *leaves, grad_out = _maps(spec, less, less, spec.dim, spec.dim)

    def ours(impl: str) -> Callable:
        return lambda: functools.partial(criss_cross_attention, impl=impl)

    names = {OURS if impl == "auto" else f"{OURS} {impl}": ours(impl) for impl in impls}
    return Workload(leaves, grad_out, names | {"eager": lambda: eager.criss_cross_attention}, list(names))


def _block(spec: Spec, name: str, options: dict) -> Workload:
    """A block in training mode, and its published-style form with the same parameters."""
    torch.manual_seed(0)
    block = nn.build(name, spec.dim, **options).to(spec.device, spec.torch_dtype)
    for parameter in block.parameters():
        if not parameter.any():  # a block that is the identity would compare nothing
            torch.nn.init.normal_(parameter, std=0.1)
    x, grad_out = _maps(spec, spec.dim, spec.dim)
    form = getattr(eager, name)
    workload = Workload([x], grad_out, {OURS: lambda: block, "eager": lambda: lambda x: form(block, x)}, [OURS])
    workload.parameters = list(block.parameters())
    # About four tensors of the largest kind are alive in the backward.
    needed = 4 * x.element_size() * spec.batch * eager.largest_tensor(name, options, spec.dim, *spec.grid)
    if 2 * needed > (free := measure.free_bytes(spec.device)):
        workload.skipped["eager"] = _too_large(needed, free)
        del workload.prepare["eager"]
    return workload


def bytes_of(spec: Spec, name: str, backward: bool) -> int:
    """Return the bytes that a call of a method adds to the peak.

    A small call loads code before; what compiles for a shape, and takes more than the call, is called once as it is.
    """
    first, _, impl = name.partition(" ")
    impls, peers = ([impl or "auto"], []) if first in ("asa", OURS) else (["auto"], [name])
    if first != "flex":
        small = replace(spec, size="x".join(str(min(side, 16)) for side in spec.grid))
        build(small, impls, peers).call(name, backward)()
    call = build(spec, impls, peers).call(name, backward)
    if first == "flex":
        call()
    return measure.bytes_added(call, spec.device)


if __name__ == "__main__":
    spec, name, backward = (json.loads(x) for x in sys.argv[1:])
    print(bytes_of(Spec(**spec), name, backward))
