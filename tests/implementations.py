"""The implementations that tests run: those of the CPU, of GPUs in emulation or on a GPU; and how tests name them."""

import platform

import pytest
import simt
import torch

from asa_ops.core import devices

IMPLEMENTATIONS = ["blocked", "cpu"]
INTERPRETED = ["triton"] if devices.triton_is_interpreted() else []
EMULATED = ["cuda"] if simt.AVAILABLE else []
KERNELS = [*IMPLEMENTATIONS, *EMULATED, *INTERPRETED]
ON_GPU = {impl: [pytest.mark.gpu] for impl in ("triton", "cuda") if torch.cuda.is_available()}  # their marks
if ON_GPU and (reason := devices.why_no_cuda_on("asa", torch.device("cuda"))):
    ON_GPU["cuda"].append(pytest.mark.skip(reason))
DTYPES = {str(x).removeprefix("torch."): x for x in (torch.float32, torch.bfloat16, torch.float16)}
each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
each_impl = pytest.mark.parametrize("impl", IMPLEMENTATIONS)
each_fast = pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS])
each_kernel = pytest.mark.parametrize("impl", KERNELS)


# Of the CPU kernels, in the order of the numbers that torch.ops.asa_ops.cpu_isa() returns.
ARM = platform.machine() in ("aarch64", "arm64")
INSTRUCTION_SETS = ["portable", "neon"] if ARM else ["portable", "avx2", "avx512", "amx"]
SETS = ("general", "hopper")  # of CUDA kernels: those for compute capability 9.0 take half precisions and TF32


def slow(*values, when: bool = True, **options):
    """Return arguments of a test that are left to `make test-all`, if ``when``."""
    return pytest.param(*values, marks=[pytest.mark.slow] * when, **options)


def everywhere(
    names: str = "", values=((),), quick=None, kernels=None, gpu: bool = False, others=("reference", *IMPLEMENTATIONS)
):
    """Parametrize ``impl``, with the reference, Triton's interpreter and the emulation of CUDA, and other arguments.

    Args:
        quick: the interpreter is slow: where given, `make test` runs Triton on these values only.
        kernels: values for Triton and CUDA where they are others than for the rest.
        gpu: run on a GPU too, where there is one.
        others: the implementations beside Triton and CUDA.
    """

    def row(impl: str, value, marks: list):
        value = value if isinstance(value, tuple) else (value,)
        return pytest.param(impl, *value, id="-".join([impl, *map(str, value)]), marks=marks)

    kernels = values if kernels is None else kernels
    rows = [row(impl, x, []) for impl in others for x in values]
    for impl in (*INTERPRETED, *EMULATED):
        slow = [x for x in kernels if impl == "triton" and quick is not None and x not in quick]
        rows += [row(impl, x, [pytest.mark.slow] if x in slow else []) for x in kernels]
    rows += [row(impl, x, marks) for impl, marks in ON_GPU.items() if gpu for x in kernels]
    return pytest.mark.parametrize(f"impl,{names}" if names else "impl", rows)
