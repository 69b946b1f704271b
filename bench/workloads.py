"""What is measured: an op on an input, ours and what it is compared with."""

import ast
import contextlib
import functools
import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from asa_ops import asa_attention, criss_cross_attention, nn
from asa_ops.core import dispatch, extension

from . import eager, inputs
from .peers import PEERS, Problem

DTYPES = ("float32", "bfloat16", "float16")
BLOCKS = [name for name in nn.available() if name != "asa"]
OPS = ("asa", "criss_cross_attention", *BLOCKS)
OURS = "asa_ops"  # the name of our method where there is one
# Of "asa" the kernels of impl="cuda" for compute capability 9.0 are an implementation more: csrc/cuda/asa/arguments.h
# takes them, or those for every GPU, by this variable.
HOPPER, HOPPER_VARIABLE = "hopper", "ASA_OPS_HOPPER"
LEARNING = "learning"  # "auto" with thresholds that learn, as those of a block do by default; others have constant ones
IMPLS = (*dispatch.NAMES, HOPPER, LEARNING)
_NAMED = {HOPPER: "cuda", LEARNING: "auto"}  # what asa_attention is told


@dataclass(frozen=True)
class Spec:
    op: str  # "asa", "criss_cross_attention" or a block, "non_local", "non_local,mode=gaussian"
    size: str  # of the grid, "L", "HxW" or "TxHxW"
    dim: int  # head dim; channels of a block
    heads: int
    batch: int
    dtype: str  # one of DTYPES
    inputs: str  # a name of inputs.INPUTS
    alpha: float | None  # what thresholds were set to, None: the input's own

    def __post_init__(self):
        if not re.fullmatch(r"[1-9]\d{0,4}(x[1-9]\d{0,4}){0,2}", self.size):
            raise ValueError(f"size: expected HxW, as 64x64, or L or TxHxW, got {self.size!r}")
        if len(self.grid) != 2 and self.op != "asa":
            raise ValueError(f"{self.op} is measured on maps, HxW, got {self.size}")

    @property
    def grid(self) -> tuple[int, ...]:
        return tuple(map(int, self.size.split("x")))

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


@dataclass
class Workload:
    """Tensors, and by name what makes a method ready: a function of the leaves."""

    leaves: list[Tensor]  # get gradients
    grad_out: Tensor  # of the output
    prepare: dict[str, Callable[[], Callable]]  # by name; may raise
    ours: list[str]  # the names that are this library's
    skipped: dict[str, str] = field(default_factory=dict)  # why a peer cannot be tried
    parameters: list[Tensor] = field(default_factory=list)  # get gradients too
    tensors: list[Tensor] = field(default_factory=list)  # of "asa", query, key, value, alpha, beta

    def call(self, name: str, backward: bool) -> Callable[[], object]:
        """Return a function that runs a method once, with the gradients of everything or without autograd."""
        method = self.prepare[name]()
        leaves = [x.detach().requires_grad_(backward) for x in self.leaves]

        def run():
            with torch.set_grad_enabled(backward):
                # As results, no leaves: FlopCounterMode hooks what modules get, which autograd.grad forbids of leaves.
                out = method(*(x.view_as(x) for x in leaves))
            every = [*leaves, *self.parameters]
            return torch.autograd.grad(out, every, self.grad_out, allow_unused=True) if backward else out

        if name not in ("asa cuda", f"asa {HOPPER}"):
            return run

        def run_on_a_set():
            with kernel_set(name.removeprefix("asa ")):
                return run()

        return run_on_a_set


@contextlib.contextmanager
def kernel_set(impl: str) -> Iterator[None]:
    """Let the CUDA kernels be those of "hopper" or of "cuda", backward included: the variable is read at every call."""
    before = os.environ.get(HOPPER_VARIABLE)
    os.environ[HOPPER_VARIABLE] = str(int(impl == HOPPER))
    try:
        yield
    finally:
        if before is None:
            del os.environ[HOPPER_VARIABLE]
        else:
            os.environ[HOPPER_VARIABLE] = before


def why_no_hopper(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why the kernels for compute capability 9.0 cannot run a call that impl="cuda" can, None if they can."""
    if dtype not in (torch.float16, torch.bfloat16):
        return "the kernels for compute capability 9.0 take half precisions"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) != (9, 0):
        return "the kernels for compute capability 9.0 run on no other"
    if device.type == "cuda" and "90a" not in extension.cuda_architectures():
        return "the extension was not built for 90a"
    return None


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
        options[key] = value
        with contextlib.suppress(ValueError, SyntaxError):
            options[key] = ast.literal_eval(value)
    if options:
        try:
            nn.build(name, 64, **options)
        except (TypeError, ValueError) as error:
            raise ValueError(f"op {text!r}: {error}") from error
    return name, options


def build(spec: Spec, device: str, impls: list[str], peers: list[str]) -> Workload:
    """Return what is to be measured: of ours ``impls``, "auto" among them; of other ops than "asa" the peer "eager"."""
    name, options = parse_op(spec.op)
    if name == "asa":
        return _asa(spec, device, impls, peers)
    if name == "criss_cross_attention":
        workload = _criss_cross_attention(spec, device, impls)
    else:
        workload = _block(spec, device, name, options)
    # About four tensors of the largest kind are alive in the backward.
    needed = 4 * spec.torch_dtype.itemsize * spec.batch * eager.largest_tensor(name, options, spec.dim, *spec.grid)
    reason = _too_large(needed, device)
    if reason or "eager" not in peers:
        del workload.prepare["eager"]
        workload.skipped = {"eager": reason} if "eager" in peers else {}
    return workload


def runnable(spec: Spec, device: str, impls: list[str]) -> tuple[list[str], dict[str, str]]:
    """Return which implementations of an op run a call, "auto" by its name, and why the others do not.

    Raises:
        ValueError: the op has one implementation only, and others than "auto" are asked for.
    """
    kind = torch.device(device), spec.torch_dtype
    if spec.op == "asa":
        call = dispatch.Call("asa_attention", "asa", *kind, spec.dim)
    elif spec.op == "criss_cross_attention":
        call = dispatch.Call("criss_cross_attention", "criss_cross", *kind, _less(spec.dim))
    elif set(impls) != {"auto"}:
        raise ValueError(f"{spec.op} has one implementation")
    else:
        return impls, {}
    found, why_not = {}, {}  # names, in order
    for impl in impls:
        try:
            ran = dispatch.resolve(call, _NAMED.get(impl, impl))
        except RuntimeError as error:
            why_not[impl] = str(error)
            continue
        if impl == HOPPER and (reason := why_no_hopper(*kind)):
            why_not[impl] = reason
        else:
            found[impl if impl in _NAMED else ran] = None
    return list(found), why_not


def free_bytes(device: str) -> int:
    if device != "cpu":  # what torch keeps and does not use is free too
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    try:
        return 1024 * int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0])
    except OSError:
        return 2**62


def _too_large(needed: int, device: str) -> str | None:
    """Return None if there is room for twice as many bytes, otherwise why a method is skipped."""
    free = free_bytes(device)
    reason = f"would need {needed / 1e9:.0f} GB, more than half of the {free / 1e9:.0f} GB that are free"
    return reason if 2 * needed > free else None


def _asa(spec: Spec, device: str, impls: list[str], peers: list[str]) -> Workload:
    tensors = inputs.make(spec.inputs, spec.grid, spec.dim, spec.heads, spec.batch, spec.alpha)
    tensors = [x.to(device, spec.torch_dtype if i < 3 else torch.float32) for i, x in enumerate(tensors)]
    *leaves, alpha, beta = tensors

    learning = [x.clone().requires_grad_() for x in (alpha, beta)]

    def ours(impl: str) -> Callable:
        call = functools.partial(asa_attention, grid=spec.grid, impl=_NAMED.get(impl, impl))
        if impl != LEARNING:
            return lambda: lambda q, k, v: call(q, k, v, alpha, beta)
        return lambda: lambda q, k, v: call(q, k, v, *learning, threshold_grad="straight_through")

    found, why_not = runnable(spec, device, impls)
    prepare = {f"asa {impl}": ours(impl) for impl in found}
    skipped = {f"asa {impl}": reason for impl, reason in why_not.items()}
    names, problem = list(prepare), Problem(tensors, spec.grid)
    matrix = 4 * spec.batch * spec.heads * spec.tokens**2  # bytes of one of N x N, float32
    for name in peers:
        peer = PEERS[name]
        if reason := peer.why_not(problem) or _too_large(peer.matrices * matrix, device):
            skipped[name] = reason
        else:
            prepare[name] = functools.partial(peer.prepare, problem)
    generator = torch.Generator().manual_seed(1)
    grad_out = torch.randn(leaves[2].shape, generator=generator).to(leaves[2])
    parameters = learning if f"asa {LEARNING}" in prepare else []
    return Workload(leaves, grad_out, prepare, names, skipped, parameters, tensors)


def _maps(spec: Spec, device: str, *channels: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    maps = (torch.randn(spec.batch, size, *spec.grid, generator=generator) for size in channels)
    return [x.to(device, spec.torch_dtype) for x in maps]


def _less(dim: int) -> int:
    """Return the channels of query and key of criss-cross attention whose value has ``dim``."""
    return max(dim // 8, 1)


def _criss_cross_attention(spec: Spec, device: str, impls: list[str]) -> Workload:
    less = _less(spec.dim)
    *leaves, grad_out = _maps(spec, device, less, less, spec.dim, spec.dim)
    methods = {impl: functools.partial(criss_cross_attention, impl=impl) for impl in impls}
    ours = {f"{OURS} {impl}".removesuffix(" auto"): lambda x=method: x for impl, method in methods.items()}
    return Workload(leaves, grad_out, ours | {"eager": lambda: eager.criss_cross_attention}, list(ours))


def _block(spec: Spec, device: str, name: str, options: dict) -> Workload:
    """A block in training mode, and its published-style form with the same parameters."""
    torch.manual_seed(0)
    block = nn.build(name, spec.dim, **options).to(device, spec.torch_dtype)
    for parameter in block.parameters():
        if not parameter.any():  # a block that is the identity would compare nothing
            torch.nn.init.normal_(parameter, std=0.1)
    x, grad_out = _maps(spec, device, spec.dim, spec.dim)
    form = getattr(eager, name)
    prepare = {OURS: lambda: block, "eager": lambda: functools.partial(form, block)}
    return Workload([x], grad_out, prepare, [OURS], parameters=list(block.parameters()))
