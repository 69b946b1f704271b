"""Shared fixtures: uninitialised memory is poisoned, so that reading it shows; Triton kernels are interpreted."""

import contextlib
import gc
import importlib.util
import os
import resource
import tempfile

if "PYTEST_XDIST_WORKER" in os.environ:  # a worker for every core: their threads would only wait for each other
    for library in ("OMP", "MKL", "OPENBLAS"):  # before torch and numpy are imported; a test may still ask for threads
        os.environ[f"{library}_NUM_THREADS"] = "1"

if capability := os.environ.get("ATEN_CPU_CAPABILITY"):  # Inductor's cache does not tell instruction sets apart
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/torchinductor_{capability}")

import pytest
import torch

if torch.cuda.is_available():
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic algorithms ask for it
else:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported: it decides what @triton.jit makes

    if importlib.util.find_spec("triton"):
        import interpreter  # noqa: F401  (it changes how products round)

from implementations import INSTRUCTION_SETS
from processes import Processes


def pytest_collection_finish():
    """Let garbage collections pass over what is there by now: all of torch and thousands of tests take them long."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    gc.unfreeze()  # libraries of C++ tell of what is never collected


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fill what torch.empty and its kin return with NaN (integers: the largest)."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def with_threads():
    """Return what runs a function with each of some numbers of threads, and returns the results."""
    before = torch.get_num_threads()

    def run(function, counts: tuple[int, ...]) -> list:
        results = []
        for count in counts:
            torch.set_num_threads(count)
            results.append(function())
        return results

    yield run
    torch.set_num_threads(before)


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request, monkeypatch):
    """Let the kernels of the CPU use one instruction set, and return its name."""
    number, best = INSTRUCTION_SETS.index(request.param), torch.ops.asa_ops.cpu_isa()
    if number > best:
        pytest.skip(f"this machine has {INSTRUCTION_SETS[best]} at best")
    monkeypatch.setenv("ASA_OPS_CPU_ISA", request.param)
    assert torch.ops.asa_ops.cpu_isa() == number
    return request.param


@pytest.fixture(scope="session")
def emulation():
    """Register the CUDA kernels for CPU tensors, where there are a C++ compiler and no GPU."""
    import simt

    if simt.AVAILABLE:
        simt.load()


@pytest.fixture
def kernel_set(request, monkeypatch):
    """Have the CUDA kernels of a set run: "general", or "hopper" for compute capability 9.0, float32 as TF32 then."""
    monkeypatch.setenv("ASA_OPS_HOPPER", str(int(request.param == "hopper")))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if request.param == "hopper" else before)
    yield request.param
    torch.set_float32_matmul_precision(before)


@pytest.fixture(scope="session")
def processes():
    """Processes of a group of torch.distributed; tests that ask for them are of xdist_group("processes")."""
    pool = Processes()
    yield pool
    pool.end()


@pytest.fixture
def full_disk():
    """Return a context in which no file may become longer than 100 bytes, not even what pytest writes to."""

    @contextlib.contextmanager
    def limited():
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited
