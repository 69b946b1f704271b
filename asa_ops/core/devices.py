"""Which GPU kernels this machine can run: Triton's, and the CUDA C++ ones of the extension.

Every question is answered by None, or by the reason why not. Triton is imported when it is first asked for.
"""

import functools

import torch

from . import extension
from .contracts import constant_under_compile

MIN_TRITON = (3, 6)
MIN_CAPABILITY = (8, 0)


@functools.cache
def why_no_triton() -> str | None:
    """Return None if a usable Triton is installed, otherwise the reason why not."""
    wanted = f"Triton >= {'.'.join(map(str, MIN_TRITON))}"
    try:
        import triton
    except ImportError as error:
        return f"{wanted} is needed, and importing triton fails ({error}): pip install triton"
    found = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return None if found >= MIN_TRITON else f"{wanted} is needed, this is {triton.__version__}"


@functools.cache
def triton_is_interpreted() -> bool:
    """Return whether Triton kernels run in Triton's interpreter, on CPU tensors (TRITON_INTERPRET=1)."""
    if why_no_triton():
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


@constant_under_compile
def why_no_triton_on(device: torch.device) -> str | None:
    """Return None if Triton kernels run on tensors of ``device``, otherwise the reason why not."""
    return _why_no_triton_on(device)


@functools.cache
def _why_no_triton_on(device: torch.device) -> str | None:
    if device.type == "cpu" and triton_is_interpreted():
        return None
    if device.type != "cuda":
        return f"Triton kernels need CUDA tensors, these are on {device.type}"
    if reason := why_no_triton():
        return reason
    if torch.version.hip is None and torch.cuda.is_available():
        found = torch.cuda.get_device_capability(device)
        if found < MIN_CAPABILITY:
            return f"Triton kernels need compute capability >= {MIN_CAPABILITY}, this device has {found}"
    return None


@constant_under_compile
def why_no_cuda_on(stem: str, device: torch.device) -> str | None:
    """Return None if the CUDA kernels of an op run on tensors of ``device``, otherwise the reason why not."""
    if device.type == "cpu" and extension.has(f"{stem}_emulated_fwd", "CPU"):  # loaded by the tests
        return None
    if device.type != "cuda":
        return f"CUDA kernels need CUDA tensors, these are on {device.type}"
    if extension.WHY_MISSING:
        return extension.WHY_MISSING
    if not extension.cuda_architectures():
        return "this build of the extension holds no CUDA kernels (no working nvcc, or ASA_OPS_NO_CUDA set)"
    if not extension.has(f"{stem}_fwd", "CUDA"):
        return f"this build of the extension holds no CUDA kernel asa_ops::{stem}_fwd"
    return _why_no_cuda_on(device)


@functools.cache
def _why_no_cuda_on(device: torch.device) -> str | None:
    if torch.version.hip is not None:
        return "CUDA kernels need an NVIDIA GPU, this torch is built for AMD's"
    if reason := why_no_driver():
        return reason
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA device here"
    return why_no_image(torch.cuda.get_device_capability(device))


def why_no_driver() -> str | None:
    """Return None if the driver runs the CUDA that the kernels were built with, otherwise the reason why not."""
    driver, built = extension.cuda_versions()
    if driver[0] >= built[0]:  # machine code runs on every driver of its major version
        return None
    if driver == (0, 0):
        return "there is no NVIDIA driver here"
    found, wanted = (f"{major}.{minor}" for major, minor in (driver, built))
    return f"the NVIDIA driver here runs CUDA {found} at most, the CUDA kernels were built with {wanted}: update it"


def why_no_image(found: tuple[int, int]) -> str | None:
    """Return None if the extension holds code for a device of compute capability ``found``, otherwise a reason.

    Machine code runs on devices of the same major and no smaller minor version, with a letter on those of the same
    version alone; PTX runs on whatever is no older.
    """
    if found < MIN_CAPABILITY:
        return f"CUDA kernels need compute capability >= {MIN_CAPABILITY}, this device has {found}"
    images = {arch: divmod(int(arch.rstrip("a")), 10) for arch in extension.cuda_architectures()}
    portable = [image for arch, image in images.items() if arch.isdigit()]
    runs = any(found[0] == major and found[1] >= minor for major, minor in portable)
    if runs or found in images.values() or (portable and found >= portable[-1]):
        return None
    held = ", ".join(map(str, images.values())) + (" and newer ones" if portable else "")
    return f"this device has compute capability {found}, this build holds CUDA kernels for {held} only"
