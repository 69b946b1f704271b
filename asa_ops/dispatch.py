"""THE dispatch: which implementation runs a call, and why the others do not.

Every implementation is one predicate that returns None if it can run the call, or the reason why it cannot.
``impl="auto"`` takes the first that can, in the order of ``_PREDICATES``, or of "triton" and "cuda" the one measured
faster; an explicit ``impl`` never falls back.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from . import checks, cuda_support, extension, measured, triton_support

# Looked up once: a call must not touch the file system (torch.compile traces it).
_MAX_DIM = 256
_WITH_TRITON = {path.parent.name for path in Path(__file__).parent.glob("*/triton_fwd.py")}


@dataclass(frozen=True)
class Call:
    """What the predicates need to know about a call."""

    op: str  # public name, "asa_attention"
    stem: str  # folder and kernel name, "asa"
    device: torch.device
    dtype: torch.dtype
    dim: int  # the largest head dim of its tensors


def _no_triton(call: Call) -> str | None:
    if call.stem not in _WITH_TRITON:
        return f"this version of asa_ops holds no Triton kernels for {call.op}"
    if reason := triton_support.why_not_on(call.device):
        return reason
    return _no_tiles(call, "Triton")


def _no_cuda(call: Call) -> str | None:
    return cuda_support.why_not_on(f"{call.stem}_cuda_fwd", call.device) or _no_tiles(call, "CUDA")


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
    if not extension.has(f"{call.stem}_cpu_fwd", "CPU"):
        return f"this build of the extension holds no cpu kernel for {call.op}"
    return None


_PREDICATES = {
    "cpu": _no_cpu,
    "triton": _no_triton,
    "cuda": _no_cuda,
    "blocked": lambda call: None,
    "reference": lambda call: None,
}
NAMES = ("auto", *_PREDICATES)


def resolve(call: Call, impl: str) -> str:
    """Return the implementation that runs ``call``.

    Raises:
        ValueError: ``impl`` is no known name.
        RuntimeError: the explicit ``impl`` cannot run this call; the message says why and what can.
    """
    if impl == "auto":
        able = [name for name, why_not in _PREDICATES.items() if why_not(call) is None and not _for_tests(name, call)]
        if "triton" in able and "cuda" in able:
            return measured.faster(call.stem, call.dim, call.dtype, call.device)
        return able[0]
    checks.check_choice("impl", impl, NAMES)
    if reason := _PREDICATES[impl](call):
        able = [name for name, why_not in _PREDICATES.items() if why_not(call) is None]
        raise RuntimeError(f"impl={impl!r} cannot run this {call.op} call: {reason}. Available here: {able}")
    return impl


def _for_tests(name: str, call: Call) -> bool:
    """Triton's interpreter and the emulation of CUDA kernels run only when they are asked for."""
    return name in ("triton", "cuda") and call.device.type == "cpu"


def explain(call: Call, impl: str) -> str:
    """Say in a few lines which implementation would run ``call``, and for each other one why it would not."""
    try:
        chosen, first = resolve(call, impl), ""
    except (RuntimeError, ValueError) as error:
        chosen, first = None, f"\n  {error}"
    lines = [f"{call.op} on {call.device.type}, {call.dtype}, impl={impl!r}: {chosen or 'an error'}{first}"]
    for name, why_not in _PREDICATES.items():
        reason = why_not(call) or ("runs" if name == chosen else "could run, not chosen")
        lines.append(f"  {name:<10} {reason}")
    return "\n".join(lines)
