"""How much memory of this process a call takes.

From /proc: psutil has no peak on Linux, and that of ``resource`` counts the parent's too and cannot start anew.
"""

import contextlib
import ctypes
from collections.abc import Callable
from pathlib import Path


def resident(name: str) -> int | None:
    """Return a figure of this process in bytes, "VmRSS" now or "VmHWM" at most, None outside Linux."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return 1024 * int(status.split(f"{name}:")[1].split()[0])


def added(call: Callable[[], object]) -> tuple[object, int | None]:
    """Return what a call returns, and the bytes by which it raises the peak of this process, None outside Linux."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before is given back, so that using it again counts
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = resident("VmRSS")
    except OSError:
        before = resident("VmHWM")
    result = call()
    return result, None if before is None else max(resident("VmHWM") - before, 0)
