"""THE dispatch: where each implementation is, which one runs a call, and why the others do not.

``IMPLEMENTATIONS`` is the table. Every implementation has one predicate that returns None if it can run the call, or
the reason why it cannot. ``impl="auto"`` takes the first that can, in the order of the table, or of "triton" and "cuda"
the one measured faster; an explicit ``impl`` never falls back.
"""

import functools
import importlib
import warnings
from dataclasses import dataclass
from types import ModuleType
from typing import Literal, NamedTuple, get_args

import torch

from . import checks, devices, extension
from .contracts import NAMESPACE, constant_under_compile

# For every op, by the stem of its folder and kernels, where each implementation is: a folder of C++, whose ops the
# extension holds, or a module of the package, loaded when it is first used.
IMPLEMENTATIONS = {
    "asa": {
        "cpu": "csrc/cpu/asa",
        "triton": ".asa.triton",
        "cuda": "csrc/cuda/asa",
        "blocked": ".asa.blocked",
        "reference": ".asa.reference",
    },
    "criss_cross": {
        "cpu": ".criss_cross.cpu",
        "triton": ".criss_cross.triton",
        "blocked": ".criss_cross.blocked",
        "reference": ".criss_cross.reference",
    },
}
Impl = Literal["auto", "cpu", "triton", "cuda", "blocked", "reference"]
NAMES = get_args(Impl)
_MAX_DIM = 256


@functools.cache
def load(stem: str, impl: str) -> ModuleType:
    """Return the module of an implementation in Python."""
    return importlib.import_module(IMPLEMENTATIONS[stem][impl], NAMESPACE)


class Call(NamedTuple):
    """What the predicates need to know about a call."""

    op: str  # public name, "asa_attention"
    stem: str  # key of IMPLEMENTATIONS, "asa"
    device: torch.device
    dtype: torch.dtype
    dim: int  # the largest head dim of its tensors
    no_kernels: str | None = None  # why PyTorch's own operations alone can run it


def _no_triton(call: Call) -> str | None:
    return devices.why_no_triton_on(call.device) or _no_tiles(call, "Triton")


def _no_cuda(call: Call) -> str | None:
    return devices.why_no_cuda_on(call.stem, call.device) or _no_tiles(call, "CUDA")


def _no_tiles(call: Call, kind: str) -> str | None:
    """What kernels on the matrix units of a GPU do not take."""
    if call.dtype == torch.float64:
        return f"{kind} kernels take float16, bfloat16 and float32, not float64: impl='reference' does"
    if call.dim > _MAX_DIM:
        return f"{kind} kernels take head dims up to {_MAX_DIM}, got {call.dim}: impl='blocked' takes any"
    return None


def _no_cpu(call: Call) -> str | None:
    if call.device.type != "cpu":
        return f"C++ kernels need CPU tensors, these are on {call.device.type}"
    if extension.WHY_MISSING:
        return extension.WHY_MISSING
    if not any(extension.has(f"{call.stem}{kind}_fwd", "CPU") for kind in ("", "_cpu")):
        return f"this build of the extension holds no cpu kernel for {call.op}"
    return None


_PREDICATES = {
    "cpu": _no_cpu,
    "triton": _no_triton,
    "cuda": _no_cuda,
    "blocked": lambda call: None,
    "reference": lambda call: None,
}


def _why_not(name: str, call: Call) -> str | None:
    """Return None if the implementation ``name`` can run ``call``, otherwise the reason why not."""
    if name not in IMPLEMENTATIONS[call.stem]:
        return f"asa_ops has no {name} kernels for {call.op}"
    if call.no_kernels and name not in ("blocked", "reference"):
        return call.no_kernels
    return _PREDICATES[name](call)


def _able(call: Call) -> list[str]:
    return [name for name in _PREDICATES if _why_not(name, call) is None]


def resolve(call: Call, impl: str) -> str:
    """Return the implementation that runs ``call``.

    Raises:
        ValueError: ``impl`` is no known name.
        RuntimeError: the explicit ``impl`` cannot run this call; the message says why and what can.
    """
    if impl == "auto":
        able = [name for name in _able(call) if not _for_tests(name, call)]
        if "triton" in able and "cuda" in able:
            return _faster(call.stem, call.dim, call.dtype, call.device)
        return able[0]
    checks.check_choice("impl", impl, NAMES)
    if reason := _why_not(impl, call):
        raise RuntimeError(f"impl={impl!r} cannot run this {call.op} call: {reason}. Available here: {_able(call)}")
    return impl


def choose(call: Call, impl: str) -> str:
    """Return the implementation that runs ``call``, for the call itself: as :func:`resolve`.

    Warns:
        UserWarning: once, if plain PyTorch runs what the compiled extension would, were it there.
    """
    chosen, missing = resolve(call, impl), extension.WHY_MISSING
    if missing and impl == "auto" and chosen == "blocked" and missing in [_why_not(name, call) for name in _PREDICATES]:
        _warn_of_missing_extension()
    return chosen


# It is asked once for each kind of call.
remembered = functools.cache(choose)


@constant_under_compile
def _warn_of_missing_extension() -> None:
    _warn_once(f"asa_ops runs in plain PyTorch, which is slower: {extension.WHY_MISSING}. impl='blocked' asks for it")


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)


def _for_tests(name: str, call: Call) -> bool:
    """Triton's interpreter and the emulation of CUDA kernels run only when they are asked for."""
    return name in ("triton", "cuda") and call.device.type == "cpu"


@dataclass(frozen=True)
class Measurement:
    """Which of Triton's and the CUDA C++ kernels was measured faster, and where to read it."""

    faster: str  # "triton" or "cuda"
    results: str  # file in bench/results
    commit: str  # of this repository, that was measured


# (kernel stem, head dim, dtype, (major, minor) compute capability). By the time on the device, in CUDA graphs: small
# calls, which launching costs most, are faster in CUDA C++ as called.
MEASUREMENTS: dict[tuple[str, int, torch.dtype, tuple[int, int]], Measurement] = {
    ("asa", 256, torch.bfloat16, (9, 0)): Measurement("triton", "nvidia-h200-summary.json", "37018a8"),
}


@constant_under_compile
def _faster(stem: str, dim: int, dtype: torch.dtype, device: torch.device) -> str:
    """Return "triton" or "cuda"; "triton" where nothing was measured.

    A head dim counts as the next larger one of 64, 128 and 256: kernels work on padded tiles.
    """
    padded = next(size for size in (64, 128, 256) if dim <= size)
    measurement = MEASUREMENTS.get((stem, padded, dtype, torch.cuda.get_device_capability(device)))
    return measurement.faster if measurement else "triton"


def explain(call: Call, impl: str) -> str:
    """Say in a few lines which implementation would run ``call``, and for each other one why it would not."""
    try:
        chosen, first = resolve(call, impl), ""
    except (RuntimeError, ValueError) as error:
        chosen, first = None, f"\n  {error}"
    lines = [f"{call.op} on {call.device.type}, {call.dtype}, impl={impl!r}: {chosen or 'an error'}{first}"]
    for name in _PREDICATES:
        reason = _why_not(name, call) or ("runs" if name == chosen else "could run, not chosen")
        lines.append(f"  {name:<10} {reason}")
    return "\n".join(lines)
