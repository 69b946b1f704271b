"""Whether Triton kernels can run here, and how they are launched. Triton is imported when it is first asked for."""

import functools

import torch

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
def interpreted() -> bool:
    """Return whether Triton kernels run in Triton's interpreter, on CPU tensors (TRITON_INTERPRET=1)."""
    if why_no_triton():
        return False
    import triton

    return triton.knobs.runtime.interpret


def why_not_on(device: torch.device) -> str | None:
    """Return None if Triton kernels run on tensors of ``device``, otherwise the reason why not."""
    return _why_not_on(device)


# To torch.compile the answer is a constant: torch.compiler.assume_constant_result, without importing torch._dynamo.
why_not_on._dynamo_marked_constant = True


@functools.cache
def _why_not_on(device: torch.device) -> str | None:
    if device.type == "cpu" and interpreted():
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


@functools.cache
def architecture(device: torch.device) -> int:
    """Return the row of the configuration tables for ``device``: 80, 90 or 100; 0 for the interpreter."""
    if device.type != "cuda":
        return 0
    if torch.version.hip is not None:
        return 80
    major, _ = torch.cuda.get_device_capability(device)
    return {9: 90, 10: 100}.get(major, 80)


@functools.cache
def processors(device: torch.device) -> int:
    """Return how many programs ``device`` runs side by side, at one a multiprocessor."""
    return 2 if device.type != "cuda" else torch.cuda.get_device_properties(device).multi_processor_count


def compile_options(warps: int = 4, stages: int = 1, registers: int | None = None) -> dict:
    """Return how kernels are compiled.

    Products and sums are never fused: the same score must be the same number in every kernel. ``registers``: as many as
    a thread may use; left to itself, ptxas may spill some to fit a second program.
    """
    return {"num_warps": warps, "num_stages": stages, "maxnreg": registers, "enable_fp_fusion": False}


def precision(dtype: torch.dtype) -> str:
    """How products of float32 are formed: as torch's own, whichever of its settings said so."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def launch(
    kernel, grid: tuple[int, ...], *args, warps: int = 4, stages: int = 1, registers: int | None = None, **constants
) -> None:
    """Launch a Triton kernel: arguments by position, constexprs by name."""
    kernel[grid](*args, **constants, **compile_options(warps, stages, registers))
