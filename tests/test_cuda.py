"""The CUDA kernels of csrc/cuda on the CPU, behind csrc/testing/simt.h: tiny and ragged sizes."""

import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import simt
import torch
from cases import Case, make, named
from torch.utils.cpp_extension import get_cxx_compiler

from asa_ops.asa import reference

if not shutil.which(shlex.split(get_cxx_compiler())[0]):
    pytest.skip("no C++ compiler here", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("with a GPU kernels run there", allow_module_level=True)

WINDOWED = ["plain", "head_thresholds", "padding", "window_1", "window_5", "window_wider_than_map"]
WINDOWED += ["one_token", "one_row", "mixed"]
LOG2_E = math.log2(math.e)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


@pytest.fixture(scope="module", autouse=True)
def kernels():
    torch.ops.load_library(simt.build())


def scores(inputs, options) -> torch.Tensor:
    """Return the scores in float64, -inf at padding keys."""
    query, key = (x.double() for x in inputs[:2])
    real = reference.real_positions(query, key, options.get("key_padding_mask"))
    return reference.scores(query, key, options.get("scale"), *real)


def scale_of(inputs, options) -> float:
    return options.get("scale") or inputs[0].shape[3] ** -0.5


def kth_largest(inputs, options, topk: int) -> torch.Tensor:
    """Run the kernel; return thresholds in base 2."""
    query, key = inputs[:2]
    kappa = torch.full(query.shape[:3], math.nan)
    mask, grid = options.get("key_padding_mask"), options.get("grid", (0, 0))
    torch.ops.asa_ops.asa_cuda_topk(query, key, mask, *grid, topk, scale_of(inputs, options), kappa)
    return kappa


def check_kth_largest(inputs, options, topk: int) -> None:
    """Exactly the ``topk`` largest scores of every real row reach its threshold, ties of the last included."""
    kappa = kth_largest(inputs, options, topk)
    s2 = scores(inputs, options) * LOG2_E
    real_q, _ = reference.real_positions(*inputs[:2], options.get("key_padding_mask"))
    rows = real_q[:, None].expand(kappa.shape)
    n_real = s2.isfinite().sum(-1)
    expected = s2.topk(topk).values[..., -1]
    few = rows & (n_real <= topk)
    assert (kappa[few] == -math.inf).all()
    margin = 16 * torch.finfo(torch.float32).eps * s2[s2.isfinite()].abs().max()
    reached = (s2 >= kappa[..., None].double()).sum(-1)
    clear = (s2 - expected[..., None]).abs() > margin  # neither the k-th largest nor within rounding of it
    alone = rows & ~few & (clear.sum(-1) == s2.shape[-1] - 1)
    assert alone.sum() >= 0.9 * (rows & ~few).sum()
    assert (reached[alone] == topk).all()
    following = s2.masked_fill(s2 >= expected[..., None] - margin, -math.inf).amax(-1)
    assert ((kappa <= expected + margin) & (kappa >= following - margin))[rows & ~few].all()


@pytest.mark.parametrize("topk", [1, 5, 40])
@each_dtype
def test_topk(dtype, topk):
    inputs, options = make(named("alpha_only", grid=(9, 15), dim=19), dtype)
    check_kth_largest(inputs, options, topk)


@pytest.mark.parametrize("dim", [1, 64, 65, 200, 256])
def test_topk_at_other_head_dims(dim):
    inputs, options = make(Case("wide", grid=(5, 13), batch=1, heads=1, dim=dim), torch.float16)
    check_kth_largest(inputs, options, 7)


@pytest.mark.parametrize(
    "name", ["padding", "more_keys", "fewer_queries_padded", "one_token", "one_row", "one_column", "empty_batch"]
)
def test_topk_of_cases(name):
    case = named(name)
    topk = 1 if name == "one_token" else 6
    inputs, options = make(case, torch.float32)
    if case.batch:
        check_kth_largest(inputs, options, topk)
    else:
        assert kth_largest(inputs, options, topk).shape == (0, 2, 63)


@pytest.mark.parametrize("topk", [1, 3, 70, 99, 100, 127, 130])
def test_topk_keeps_ties_and_selects_exactly_whatever_the_scores(topk):
    """Scores are given numbers times 1: huge, tiny, of both signs, infinite, and equal ones."""
    values = torch.randn(130) * 10.0 ** torch.randint(-30, 30, (130,))
    values[:8] = torch.tensor([0.0, -0.0, 1e-40, -1e-40, 5.0, 5.0, 5.0, torch.finfo(torch.float32).max / 2])
    query, key = torch.ones(1, 1, 1, 1), values[None, None, :, None]
    kappa = torch.empty(1, 1, 1)
    torch.ops.asa_ops.asa_cuda_topk(query, key, None, 0, 0, topk, 1 / LOG2_E, kappa)
    s2 = values * (torch.tensor(1 / LOG2_E, dtype=torch.float64) * LOG2_E).float()
    expected = s2.topk(topk).values[-1]
    assert torch.equal(s2 >= kappa.item(), s2 >= expected)


def test_topk_ignores_what_lies_in_padding():
    inputs, options = make(named("padding", heads=1), torch.float32)
    clean = kth_largest(inputs, options, 6)
    for x in inputs[:2]:
        x.masked_fill_(~options["key_padding_mask"][:, None, :, None], math.nan)
    real = options["key_padding_mask"][:, None]
    assert torch.equal(kth_largest(inputs, options, 6)[real], clean[real])


def test_topk_of_a_row_with_a_nan_ends():
    inputs, options = make(named("alpha_only", heads=1, batch=1), torch.float32)
    clean = kth_largest(inputs, options, 60)
    inputs[0][0, 0, 5, 1] = math.nan
    kappa = kth_largest(inputs, options, 60)
    other = torch.arange(63) != 5
    assert torch.equal(kappa[..., other], clean[..., other])


def window(inputs, options, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the kernel; return log_mean2 and local."""
    query, key, _, _, beta = inputs
    log_mean2 = torch.full(query.shape[:3], math.nan)
    local = torch.ones(*query.shape[:3], side**2, dtype=torch.bool)
    mask, scale = options.get("key_padding_mask"), scale_of(inputs, options)
    torch.ops.asa_ops.asa_cuda_window(query, key, beta.float(), mask, *options["grid"], side, scale, log_mean2, local)
    return log_mean2, local


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.float32, name) for name in WINDOWED] + [(x, "padding") for x in DTYPES[1:]], ids=str
)
def test_window(dtype, name):
    inputs, options = make(named(name), dtype)
    side = options.get("window", 3)
    log_mean2, local = window(inputs, options, side)
    s = scores(inputs, options)
    real_q, real_k = reference.real_positions(*inputs[:2], options.get("key_padding_mask"))
    near = real_q[:, None, :, None] & real_k[:, None, None, :] & reference.in_window(options["grid"], side, s.device)
    near = near.expand(s.shape)
    expected = s.masked_fill(~near, -math.inf).logsumexp(-1) - near.sum(-1).double().log()
    rows = real_q[:, None].expand(log_mean2.shape)
    rounding = 16 * torch.finfo(torch.float32).eps * max(1.0, s[near].abs().max().item())
    torch.testing.assert_close(log_mean2[rows].double() / LOG2_E, expected[rows], rtol=0, atol=rounding)
    cut = inputs[4].double().log()[..., None] + expected[..., None]
    survives = near & (s > cut)
    certain = (s - cut).abs() > 2 * rounding
    # From offsets of the window to pairs.
    height, width = options["grid"]
    token = torch.arange(height * width)
    found = torch.zeros_like(near)
    for offset in range(side**2):
        r, c = token // width + offset // side - side // 2, token % width + offset % side - side // 2
        inside = (r >= 0) & (r < height) & (c >= 0) & (c < width)
        flags = local[..., offset] & rows
        assert not flags[..., ~inside].any()
        found[..., token[inside], (r * width + c)[inside]] = flags[..., inside]
    pairs = near & certain
    assert pairs.sum() > 0.9 * near.sum()
    assert torch.equal(found[pairs], survives[pairs]) and not found[~near].any()


def test_window_gives_nobody_for_a_bad_multiplier():
    inputs, options = make(named("plain"), torch.float32)
    inputs[4][0, 0, 3], inputs[4][0, 0, 4] = -1, math.nan
    _, local = window(inputs, options, 3)
    assert not local[0, :, 3:5].any() and local[0, :, 5:].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32], ids=str)
def test_dtypes_without_kernels_are_refused(dtype):
    x = torch.ones(1, 1, 4, 4, dtype=dtype)
    with pytest.raises(RuntimeError, match="query must be float16, bfloat16 or float32"):
        torch.ops.asa_ops.asa_cuda_topk(x, x, None, 2, 2, 1, 1.0, torch.empty(1, 1, 4))


def nvcc_output(source: Path, architecture: int, cubin: Path) -> str:
    """Compile one file for one architecture, with what the assembler says of registers."""
    flags = ["-std=c++17", "-O3", "--fmad=false", f"-arch=sm_{architecture}", "-Xptxas", "-v", "-cubin"]
    run = subprocess.run(["nvcc", *flags, source, "-o", cubin], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stderr


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc here")
@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("source", [x for x in simt.SOURCES if x.name != "asa.cu"], ids=lambda source: source.stem)
def test_kernels_compile_without_spills(source, architecture, tmp_path):
    cubin = tmp_path / "kernels.cubin"
    told = nvcc_output(source, architecture, cubin)
    spills = [int(number) for number in re.findall(r"(\d+) bytes spill stores", told)]
    assert spills and not any(spills), told
    if source.stem == "asa_topk":
        triton = pytest.importorskip("triton")
        cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        listing = subprocess.run([cuobjdump, "-sass", cubin], check=True, capture_output=True, text=True).stdout
        for kernel in listing.split("Function : ")[1:]:
            name = kernel.split()[0]
            halves = "Half" in name or "BFloat16" in name
            assert ("HMMA" in kernel) == halves and "LDGSTS" in kernel, name


PROGRAM = """
import sys, torch
sys.path.insert(0, {tests!r})
import asa_ops, simt, test_cuda
from cases import make, named
torch.ops.load_library(simt.build(sanitize={sanitize}))
results = []
for dtype in (torch.float32, torch.float16):
    inputs, options = make(named("padding", grid=(9, 15), dim=70), dtype)
    results += [test_cuda.kth_largest(inputs, options, 6), *test_cuda.window(inputs, options, 3)]
    inputs, options = make(named("fewer_queries_padded"), dtype)
    results.append(test_cuda.kth_largest(inputs, options, 9))
torch.save([x.nan_to_num(0) for x in results], {out!r})
"""


def run_elsewhere(out: Path, sanitize: bool = False, **environment: str) -> list[torch.Tensor]:
    """Run both kernels on a few inputs in a process of its own, and return what they gave."""
    program = PROGRAM.format(tests=str(Path(__file__).parent), sanitize=sanitize, out=str(out))
    environment = os.environ | {"PYTHONPATH": str(simt.ROOT)} | environment
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return torch.load(out)


def test_the_order_of_threads_does_not_matter(tmp_path):
    """A missing barrier shows as another result."""
    plain = run_elsewhere(tmp_path / "plain")
    backwards = run_elsewhere(tmp_path / "reversed", ASA_OPS_SIMT_REVERSED="1")
    assert len(plain) == 8 and all(torch.equal(x, y) for x, y in zip(plain, backwards, strict=True))


@pytest.mark.slow
def test_nothing_out_of_bounds_under_sanitizers(tmp_path):
    compiler = shlex.split(get_cxx_compiler())[0]
    libraries = [
        subprocess.run(
            [compiler, f"-print-file-name={x}.so"], check=True, capture_output=True, text=True
        ).stdout.strip()
        for x in ("libasan", "libubsan")
    ]
    simt.build(sanitize=True)
    options = {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0"}
    assert len(run_elsewhere(tmp_path / "sanitized", sanitize=True, **options)) == 8
