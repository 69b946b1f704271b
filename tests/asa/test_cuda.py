"""The CUDA kernels of csrc/cuda on the CPU, behind csrc/testing/simt.h: tiny and ragged sizes.

What every implementation must do is in test_implementations.py; here is every case in every precision, what these
kernels are made of, and how they compile.
"""

import functools
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
from cases import Case, make, named, with_grad
from compare import check_against_reference, check_threshold_gradients, survivors
from torch.utils.cpp_extension import get_cxx_compiler

from asa_ops import asa_attention
from asa_ops.asa import ops, reference
from asa_ops.asa.types import Saved

if not simt.AVAILABLE:
    pytest.skip("no C++ compiler here, or a GPU: kernels run there", allow_module_level=True)

LOG2_E = math.log2(math.e)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


@pytest.fixture(scope="module", autouse=True)
def kernels():
    simt.load()


# Against the reference.


def slow_if(slow: bool) -> list:
    return [pytest.mark.slow] if slow else []


WIDE = [(64, 128), (65, 40), (130, 64), (256, 256)]


@each_dtype
@pytest.mark.parametrize("dims", WIDE, ids=str)
@pytest.mark.parametrize(
    "options", [pytest.param({}, marks=pytest.mark.slow), {"reciprocal": False}], ids=["mutual", "one_way"]
)
def test_wide_heads_in_several_tiles(dtype, dims, options):
    dim, dim_v = dims
    case = Case("wide", grid=(9, 15), batch=1, heads=1, dim=dim, dim_v=dim_v, sharpness=3.0, options=options)
    check_against_reference("cuda", *make(case, dtype))


@pytest.mark.parametrize(
    "dtype", [torch.float16, *(pytest.param(x, marks=slow_if(True)) for x in (torch.float32, torch.bfloat16))]
)
@pytest.mark.parametrize("options", [{}, {"reciprocal": False}, {"topk": 20}], ids=["mutual", "one_way", "topk"])
def test_threshold_gradients_of_several_tiles(dtype, options):
    """An offset of the values cancels in what an admitted pair changes."""
    inputs, options = make(Case("tiles", grid=(9, 15), batch=1, heads=4, dim=70, dim_v=66, options=options), dtype)
    inputs[2] += 10
    inputs[3:] = [x.float() for x in inputs[3:]]
    check_threshold_gradients("cuda", inputs, options)


def test_few_neighbours_one_by_one_are_those_of_tiles(monkeypatch):
    """Up to 32 neighbours a row are taken one by one; 33, where more do not reach the threshold, by tiles."""
    case = Case("few", grid=(9, 15), batch=1, heads=2, dim=24, sharpness=9.0)
    inputs, options = make(case, torch.float32)
    results = []
    for topk in (32, 33):
        leaves = with_grad(inputs)
        out, stats = asa_attention(*leaves, **options, topk=topk, impl="cuda", return_stats=True)
        out.square().sum().backward()
        results.append([stats.survivors, out, *(x.grad for x in leaves[:3])])
    assert torch.equal(results[0][0], results[1][0]), "pick other inputs: some row has 33 neighbours"
    for x, y in zip(*(result[1:] for result in results), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
        assert not torch.equal(x, y)  # another way of summing


# The parts, from what a forward pass keeps.


def saved_of(inputs, options, keep_bits=True) -> Saved:
    height, width = options.get("grid", (0, 0))
    scale = options.get("scale") or inputs[0].shape[3] ** -0.5
    rest = options.get("window", 3), options.get("topk", 0), options.get("reciprocal", True), scale
    mask = options.get("key_padding_mask")
    return Saved(*ops.asa_fwd(*inputs, mask, height, width, *rest, False, 2.0, keep_bits, "cuda"))


def scores(inputs, options) -> torch.Tensor:
    """Return the scores in float64, -inf at padding keys."""
    query, key = (x.double() for x in inputs[:2])
    real = reference.real_positions(query, key, options.get("key_padding_mask"))
    return reference.scores(query, key, options.get("scale"), *real)


def kth_largest(inputs, options, topk: int) -> torch.Tensor:
    """Return thresholds in base 2."""
    return saved_of([*inputs[:3], None, None], options | {"topk": topk}).kappa


def check_kth_largest(inputs, options, topk: int) -> None:
    """Exactly the ``topk`` largest scores of every real row reach its threshold, ties of the last included."""
    options = options | {"reciprocal": False}
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


@pytest.mark.parametrize("name", ["padding", "more_keys", "fewer_queries_padded", "one_row", "one_column"])
def test_topk_of_cases(name):
    check_kth_largest(*make(named(name), torch.float32), 6)


@pytest.mark.parametrize("topk", [1, 3, 70, 99, 100, 127, 129])
def test_topk_keeps_ties_and_selects_exactly_whatever_the_scores(topk):
    """Scores are given numbers times 1: huge, tiny, of both signs, and equal ones."""
    values = torch.randn(130) * 10.0 ** torch.randint(-30, 30, (130,))
    values[:8] = torch.tensor([0.0, -0.0, 1e-40, -1e-40, 5.0, 5.0, 5.0, torch.finfo(torch.float32).max / 2])
    query, key = torch.ones(1, 1, 1, 1), values[None, None, :, None]
    kappa = kth_largest([query, key, key], {"scale": 1 / LOG2_E, "reciprocal": False}, topk)
    s2 = values * (torch.tensor(1 / LOG2_E, dtype=torch.float64) * LOG2_E).float()
    expected = s2.topk(topk).values[-1]
    assert torch.equal(s2 >= kappa.item(), s2 >= expected)


def test_topk_of_a_row_with_a_nan_ends():
    inputs, options = make(named("alpha_only", heads=1, batch=1), torch.float32)
    clean = kth_largest(inputs, options, 60)
    inputs[0][0, 0, 5, 1] = math.nan
    kappa = kth_largest(inputs, options, 60)
    other = torch.arange(63) != 5
    assert torch.equal(kappa[..., other], clean[..., other])


WINDOWED = ["plain", "head_thresholds", "padding", "window_1", "window_5", "window_wider_than_map"]
WINDOWED += ["one_token", "one_row", "mixed"]


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.float32, name) for name in WINDOWED] + [(x, "padding") for x in DTYPES[1:]], ids=str
)
def test_window(dtype, name):
    inputs, options = make(named(name), dtype)
    side, (height, width) = options.get("window", 3), options["grid"]
    saved = saved_of(inputs, options)
    log_mean2, local = saved.log_mean, saved.local
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


def test_bits_and_peaks_lie_where_the_next_call_reads_them():
    """Sharp scores: some tiles hold no bit. Every bit is the reference's, every peak at least its tile's score."""
    case = Case("large", grid=(20, 20), batch=1, heads=1, dim=8, sharpness=6.0, beta=None)
    inputs, options = make(case, torch.float32)
    saved = saved_of(inputs, options)
    blocks, padded = 7, 448  # 400 tokens
    memory = saved.bits.flatten()
    words = memory[: padded // 8 * padded].view(torch.int32).view(padded // 32, padded)
    kept = (words[:, :, None] >> torch.arange(32) & 1).bool().movedim(0, 1).reshape(padded, padded)
    assert torch.equal(kept, kept.mT) and not kept[400:].any()
    # Where tokens stand: tiles of 8 x 8 of the map, and in each of them rows.
    token = torch.arange(400).view(20, 20)
    order = torch.cat([token[r : r + 8, c : c + 8].flatten() for r in (0, 8, 16) for c in (0, 8, 16)])
    expected = survivors("reference", inputs, options)[0, 0][order][:, order]
    assert torch.equal(kept[:400, :400], expected)
    tiles = kept.unflatten(0, (blocks, 64)).unflatten(-1, (blocks, 64)).any(-1).any(1)
    assert tiles.any() and not tiles.all()
    peaks = memory[padded // 8 * padded :].view(torch.float16).view(blocks, padded)[:, :400].float()
    s2 = scores(inputs, options)[0, 0][order][:, order] * LOG2_E
    s2 = torch.nn.functional.pad(s2, (0, padded - 400), value=-math.inf).unflatten(-1, (blocks, 64)).amax(-1).mT
    assert ((peaks >= s2) & (peaks - s2 < 0.1)).all()


def test_a_bad_threshold_gives_nan_where_an_image_has_no_keys_too():
    query, key, mask = torch.randn(2, 1, 5, 4), torch.randn(2, 1, 7, 4), torch.zeros(2, 7, dtype=torch.bool)
    mask[0] = True
    alpha = torch.ones(2, 1, 5)
    alpha[1, 0, 2] = -1
    out = asa_attention(query, key, key, alpha, reciprocal=False, key_padding_mask=mask, impl="cuda")
    assert out[1, 0, 2].isnan().all() and (out[1, 0, [0, 1, 3, 4]] == 0).all() and out[0].isfinite().all()


# Whoever calls the ops directly.


def test_nobody_is_mutual_without_neighbours():
    """Dense attention to more keys, `reciprocal` or not: the public function does not let the first pass."""
    query, key = torch.randn(1, 1, 70, 4, requires_grad=True), torch.randn(1, 1, 130, 4, requires_grad=True)
    rest = 0, 0, 3, 0
    results = []
    for reciprocal in (True, False):
        out, *_ = ops.asa_fwd(query, key, key, None, None, None, *rest, reciprocal, 0.5, False, 2.0, True, "cuda")
        results.append([out, *torch.autograd.grad(out.square().sum(), (query, key))])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


# How the kernels compile.


@functools.cache
def cuobjdump() -> Path:
    """Return the disassembler that Triton's package brings along."""
    triton = pytest.importorskip("triton")
    return Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


# Bytes that kernels of float32 may spill: wide sums of products that no tensor core forms. Half precisions: none.
SINGLE_SPILLS = 32
FUSED = ("asa_topk", "asa_statistics", "asa_mask", "asa_sums", "asa_dt")  # kernels with tiles
KERNEL_SOURCES = [x for x in simt.SOURCES if x.name != "call.cu"]


def check_budget(source: Path, told: str, compiled: Path) -> None:
    """Check registers and spills, and tensor cores and asynchronous copies in kernels with tiles."""
    reports = re.findall(r"Compiling entry function '(\S+)'.*?(\d+) bytes spill stores.*?Used (\d+)", told, re.S)
    for name, spilt, registers in reports:
        halves = "Half" in name or "BFloat16" in name
        assert int(spilt) <= (0 if halves else SINGLE_SPILLS) and int(registers) <= 255, (name, spilt, registers)
    listing = subprocess.run([cuobjdump(), "-sass", compiled], check=True, capture_output=True, text=True).stdout
    names = [kernel.split()[0] for kernel in listing.split("Function : ")[1:]]
    assert sorted(names) == sorted(name for name, *_ in reports) and names
    kernels = [x for x in listing.split("Function : ")[1:] if any(f"{name}_kernel" in x.split()[0] for name in FUSED)]
    assert len(kernels) >= 3 * (source.stem in ("scores", "select", "sums"))
    for kernel in kernels:
        name = kernel.split()[0]
        assert ("HMMA" in kernel) == ("Half" in name or "BFloat16" in name) and "LDGSTS" in kernel, name


@pytest.mark.parametrize("source", KERNEL_SOURCES, ids=lambda source: source.stem)
def test_built_kernels_keep_to_their_budget(source):
    """As they were compiled with the extension, for one architecture."""
    built = [folder for folder in (simt.ROOT / "build/cuda").glob("*") if folder.name.isdigit()]
    if not built:
        pytest.skip("the extension was built without CUDA kernels, or for several architectures")
    for folder in built:
        compiled = folder / source.relative_to(simt.ROOT / "csrc/cuda").with_suffix(".o")
        check_budget(source, compiled.with_suffix(".registers").read_text(), compiled)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc here")
@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("source", KERNEL_SOURCES, ids=lambda source: source.stem)
def test_kernels_keep_to_their_budget(source, architecture, tmp_path):
    flags = ["-std=c++17", "-O3", "--fmad=false", f"-arch=sm_{architecture}", "-Xptxas", "-v", "-cubin"]
    run = subprocess.run(["nvcc", *flags, source, "-o", tmp_path / "kernels.cubin"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    check_budget(source, run.stderr, tmp_path / "kernels.cubin")


# In processes of their own.

PROGRAM = """
import sys, torch
sys.path.insert(0, {tests!r})
import asa_ops, simt
from cases import make, named, with_grad
simt.load(sanitize={sanitize})
results = []
names = ["padding", "padding_topk", "topk", "one_way", "fewer_queries_padded", "dense", "beta_only"]
for dtype in (torch.float32, torch.float16):
    for name in names:
        changes = dict(dim=70, dim_v=200) if name == "padding" else dict(batch=1) if "padd" not in name else dict()
        changes |= {{}} if "fewer" in name else dict(grid=(9, 8))
        inputs, options = make(named(name, heads=1, **changes), dtype)
        leaves = with_grad(inputs)
        learn = None if name == "padding_topk" else "straight_through"
        out = asa_ops.asa_attention(*leaves, **options, threshold_grad=learn, impl="cuda")
        out.square().sum().backward()
        graph = asa_ops.reciprocal_neighbors(*inputs[:2], *inputs[3:], **options, impl="cuda")
        results += [out.detach(), *graph, *(x.grad for x in leaves if x is not None)]
torch.save(results, {out!r})
"""


def run_elsewhere(out: Path, sanitize: bool = False, **environment: str) -> list[torch.Tensor]:
    """Run a few calls in a process of its own, and return what they gave."""
    program = PROGRAM.format(tests=str(Path(__file__).parents[1]), sanitize=sanitize, out=str(out))
    environment = os.environ | {"PYTHONPATH": str(simt.ROOT)} | environment
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return torch.load(out)


@pytest.mark.slow
def test_the_order_of_threads_does_not_matter(tmp_path):
    """A missing barrier shows as another result."""
    plain = run_elsewhere(tmp_path / "plain")
    backwards = run_elsewhere(tmp_path / "reversed", ASA_OPS_SIMT_REVERSED="1")
    assert len(plain) > 80 and all(torch.equal(x, y) for x, y in zip(plain, backwards, strict=True))


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
    assert len(run_elsewhere(tmp_path / "sanitized", sanitize=True, **options)) > 80
