"""impl="cpu" in particular: instruction sets, threads, ways to sum rows."""

import shlex
import shutil
import subprocess
from pathlib import Path

import amx
import pytest
import simt
import torch
from cases import Case, each_case, make, named, op_arguments
from compare import call_and_gradients, check_against_reference, check_ranges, equal
from implementations import INSTRUCTION_SETS, slow
from torch.utils.cpp_extension import get_cxx_compiler

import asa_ops
from asa_ops import asa_attention
from asa_ops.core import extension

CPU = extension.has("asa_fwd", "CPU")
pytestmark = pytest.mark.skipif(not CPU, reason=str(extension.WHY_MISSING))
BEST = INSTRUCTION_SETS[torch.ops.asa_ops.cpu_isa()] if CPU else None


def check_equal_to(other: str, inputs, options) -> list[torch.Tensor]:
    """Check float64 results, gradients of thresholds included, and return them."""
    results = call_and_gradients("cpu", inputs, options)
    torch.testing.assert_close(results, call_and_gradients(other, inputs, options), rtol=1e-10, atol=1e-11)
    return results


@each_case
def test_every_instruction_set_equals_the_reference(instruction_set, case):
    check_against_reference("cpu", *make(case, torch.float32))


@each_case
def test_threshold_gradients_of_every_instruction_set(instruction_set, case):
    check_equal_to("reference", *make(case))


@pytest.mark.parametrize("dim", [1, 3, 16, 77, 260, slow(512)])
def test_any_head_dim(instruction_set, dim):
    check_against_reference("cpu", *make(Case("dim", dim=dim, dim_v=dim + 1, grid=(11, 12)), torch.float32))


@pytest.mark.parametrize("name", ["plain", "dense", "one_way", "topk", "padding", "mixed", "all_dense"])
def test_ranges_of_rows_equal_the_whole(instruction_set, name):
    check_ranges("asa", *make(named(name, grid=(11, 23), dim=40), torch.float32), begin_of_second=128)


def test_ranges_whose_neighbours_are_their_own(instruction_set):
    """Rows share half of all keys; of the columns of their range that is all."""
    halves = torch.nn.functional.pad(6 * torch.eye(2).repeat_interleave(256, 0), (0, 14))
    tokens = [*(torch.randn(3, 1, 1, 512, 16) * 0.05 + halves)]
    inputs = [*tokens, torch.ones(1, 1, 512), None]
    assert 200 < asa_attention(*inputs[:4], impl="cpu", return_stats=True)[1].survivors.float().mean() < 300
    check_ranges("asa", inputs, {}, begin_of_second=256)


# It takes long: other sets than this machine's best with `make test-all`.
@pytest.mark.parametrize("instruction_set", [slow(x, when=x != BEST) for x in INSTRUCTION_SETS], indirect=True)
@pytest.mark.parametrize("name,sizes", [slow("plain", {}), slow("mixed", {"dim": 64, "batch": 1, "heads": 1})])
def test_lists_longer_than_a_stretch(instruction_set, name, sizes):
    check_against_reference("cpu", *make(named(name, grid=(46, 47), **sizes), torch.float32))


def rows_of_any_density(n: int, dim: int, dtype: torch.dtype) -> tuple[list, dict]:
    """Every other stretch of 16 rows keeps up to everybody, so whole rows and lists meet in one block."""
    query, key, value = torch.randn(3, 1, 1, n, dim, dtype=torch.float64)
    row = torch.arange(n)
    alpha = torch.where(row // 16 % 2 == 0, 0.3 * torch.rand(n), 1.5 + torch.rand(n))
    return [query.to(dtype), key.to(dtype), value.to(dtype), alpha[None, None].to(dtype), None], {"reciprocal": False}


def fractions_of_rows(inputs, options) -> torch.Tensor:
    _, stats = asa_attention(*inputs, **options, impl="cpu", return_stats=True)
    return stats.survivors[0, 0] / inputs[1].shape[2]


@pytest.mark.parametrize("dim", [16, 33, 96])
def test_dense_rows_beside_sparse_ones(instruction_set, dim):
    inputs, options = rows_of_any_density(301, dim, torch.float32)
    fractions = fractions_of_rows(inputs, options)
    assert (fractions > 0.6).sum() > 100 and (fractions < 0.15).sum() > 100  # whole rows from a quarter on
    check_against_reference("cpu", inputs, options)


def regions(n: int, dim: int, dtype: torch.dtype) -> tuple[list, dict]:
    """Neighbouring rows keep the same keys, a tenth of all, so they share lists; every 40th row is on its own."""
    direction = torch.randn(10, dim, dtype=torch.float64)[torch.arange(n) // 20 % 10]
    direction[::40] = torch.randn(n, dim, dtype=torch.float64)[::40]
    query, key = (3 * direction + torch.randn(n, dim, dtype=torch.float64) * 0.3 for _ in range(2))
    alpha, beta = torch.full((n,), 0.5), torch.full((n,), 0.8)
    return [x[None, None].to(dtype) for x in (query, key, torch.randn(n, dim), alpha, beta)], {"reciprocal": True}


@pytest.mark.parametrize("n,dim", [(301, 20), (520, 64)])
def test_rows_that_share_lists(instruction_set, n, dim):
    inputs, options = regions(n, dim, torch.float32)
    options |= {"grid": (1, n), "window": 3}
    assert 0.02 < fractions_of_rows(inputs, options).mean() < 0.2
    check_against_reference("cpu", inputs, options)
    check_equal_to("reference", [x.double() for x in inputs], options)


def nearly_dense(removed: str, n: int, dtype: torch.dtype) -> tuple[list, dict]:
    """Rows with more than 15 of 16 keys as adaptive neighbours, and what reciprocity ``removed`` of these."""
    query, key, value = torch.randn(3, n, 24, dtype=torch.float64) * 0.3
    alpha, beta = torch.full((n,), 1e-3), torch.full((n,), 0.9)
    if removed == "the same keys":
        alpha[::37] = 1.05
    elif removed == "keys of large values":
        alpha[::37], value[::37] = 50, value[::37] * 1e5
    elif removed == "others in every row":
        query, alpha = query * 5, torch.full((n,), 0.3)
    elif removed == "half of the keys":
        alpha[n // 2 :] = 50
    elif removed in ("most of the mass", "less than half of the mass"):
        share = 9 if removed == "most of the mass" else 0.8
        query[:, 0], key[:, 0] = 5, 0
        key[n // 2, 0] = torch.tensor(share * n).log() * 24**0.5 / 5
        query[n // 2], alpha[n // 2] = 0, 1.5
    return [x[None, None].to(dtype) for x in (query, key, value, alpha, beta)], {"grid": (1, n), "window": 3}


# Tokens of which the scan keeps scores, up to 2,112 in float32 and 1,472 in float64; or begins outputs.
KEPT, BEGUN, BEGUN_IN_FLOAT64 = 333, 2150, 1600


@pytest.mark.parametrize("beta", [False, slow(True)])
@pytest.mark.parametrize(
    "instruction_set, removed, n",
    [
        slow(isa, removed, n, when=n == BEGUN and (isa, removed) != (BEST, "keys of large values"))
        for isa in INSTRUCTION_SETS
        for removed in (
            "nothing",
            "the same keys",
            "keys of large values",
            "others in every row",
            "half of the keys",
            "most of the mass",
            "less than half of the mass",
        )
        for n in (KEPT, BEGUN)
    ],
    indirect=["instruction_set"],
)
def test_nearly_dense(instruction_set, removed, n, beta):
    """What reciprocity removes is left out, or subtracted to the accuracy of a sum over what is left."""
    inputs, options = nearly_dense(removed, n, torch.float32)
    if not beta:
        inputs[4] = None
    _, one_way = asa_attention(*inputs, **options, reciprocal=False, impl="cpu", return_stats=True)
    _, mutual = asa_attention(*inputs, **options, impl="cpu", return_stats=True)
    begun = one_way.survivors > 15 / 16 * n
    assert begun.double().mean() > (0.45 if removed == "half of the keys" else 0.7)
    lost = 1 - (mutual.lse_kept - one_way.lse_kept)[begun].exp()
    if removed == "nothing":
        assert lost.max() < 1e-5
    elif removed == "most of the mass":
        assert lost.median() > 0.5
    elif removed == "less than half of the mass":
        assert 0.3 < lost.median() < 0.5
    else:
        assert 0.005 < lost.mean() < 0.6
    check_against_reference("cpu", inputs, options)
    check_equal_to("reference", [x if x is None else x.double() for x in inputs], options)


def half_dense(survivors: str, n: int, dtype: torch.dtype) -> tuple[list, dict]:
    """Rows that keep a third to two thirds of all keys: those before their own are summed in the scan."""
    query, key, value = torch.randn(3, n, 24, dtype=torch.float64)
    alpha, options = torch.full((n,), 0.4), {"reciprocal": True}
    if survivors == "of little weight":  # the last rows have heavy neighbours, which do not have them
        query, key, alpha = query * 0.3, key * 0.3, None
        query[:, :2], key[:, :2] = 0, 0
        query[-300:, 0], key[-600:-300, 0] = 100, 1
        query[-600:-300, 1], key[-300:, 1] = 200, -1
        options |= {"topk": 7 * n // 10, "scale": 1.0}
    elif survivors == "beside padding":
        options["key_padding_mask"] = torch.rand(1, n) > 0.2
    elif survivors == "of a window":
        options |= {"grid": (5, n // 5), "window": 7}
    beta = torch.full((n,), 0.5) if "window" in options else None
    inputs = (query, key, value, alpha, beta)
    return [x if x is None else x[None, None].to(dtype) for x in inputs], options


@pytest.mark.parametrize("instruction_set", [slow(x, when=x != BEST) for x in INSTRUCTION_SETS], indirect=True)
@pytest.mark.parametrize(
    "survivors, n, dtype",
    [
        ("of equal rank", BEGUN_IN_FLOAT64, torch.float64),
        slow("of equal rank", BEGUN, torch.float32),
        slow("of a window", BEGUN, torch.float32),
        ("of little weight", BEGUN, torch.float32),
        slow("beside padding", BEGUN, torch.float32),
    ],
)
def test_half_dense(instruction_set, with_threads, survivors, n, dtype):
    inputs, options = half_dense(survivors, n, dtype)
    fractions = fractions_of_rows(inputs, options)
    assert fractions[fractions > 0].median() > 0.3 and fractions.max() < 0.8
    if dtype == torch.float32:
        check_against_reference("cpu", inputs, options)
    else:
        check_equal_to("blocked", inputs, options)
    once, *others = with_threads(lambda: [asa_attention(*inputs, **options, impl="cpu")], (1, 2, 16))
    assert all(equal(once, other) for other in others)
    check_ranges("asa", inputs, options, begin_of_second=1024)  # where the scan of a range finds no settled blocks


@pytest.mark.parametrize("wrong", [2, 0.5, torch.nan])
def test_begun_outputs_of_nobody_are_refused(wrong):
    args = list(op_arguments(*half_dense("of equal rank", BEGUN, torch.float32))[:-2])
    args[3] = args[3].expand(args[0].shape[:3])
    ops, rows = torch.ops.asa_ops, [0, BEGUN]
    *found, begun = ops.asa_rows_scan(*args, rows)
    assert set(begun[..., 0].unique().tolist()) == {0, 3}  # put off
    begun[0, 0, 5, 0] = wrong
    with pytest.raises(RuntimeError, match="begun must be what rows_scan returned"):
        ops.asa_rows_fwd(*args, rows, *found, begun, found[1])


def test_half_dense_with_values_that_are_not_finite(instruction_set):
    inputs, options = half_dense("of equal rank", BEGUN, torch.float32)
    inputs[2][..., 5, :], inputs[2][..., BEGUN // 2, 3] = torch.nan, torch.inf
    results = [asa_attention(*inputs, **options, impl=impl) for impl in ("cpu", "blocked")]
    assert 0.3 < results[0].isnan().double().mean() < 0.9
    torch.testing.assert_close(*results, equal_nan=True)


@pytest.mark.parametrize("size", [1e25, -1e25, 0.4])
def test_half_dense_with_equal_scores(instruction_set, size):
    """Tokens of two kinds, each of which keeps its own: a score of ``size``, and that of others is far below."""
    kind = torch.randint(2, (BEGUN,)) * 2.0 - 1
    apart = max(0.5, abs(size))
    query, key = torch.zeros(2, 1, 1, BEGUN, 8)
    query[..., 0], query[..., 1], key[..., 0], key[..., 1] = kind, 1, kind * apart, size - apart
    value = torch.randn(1, 1, BEGUN, 8)
    out, stats = asa_attention(query, key, value, 0.7, scale=1.0, impl="cpu", return_stats=True)
    means = torch.stack([value[0, 0, kind == x].double().mean(0) for x in (-1, 1)]).float()
    torch.testing.assert_close(out[0, 0], means[(kind > 0).long()], rtol=1e-5, atol=1e-6)
    assert torch.equal(stats.survivors[0, 0], (kind[:, None] == kind).sum(1).int())


@pytest.mark.parametrize("n", [KEPT, slow(BEGUN)])
def test_one_value_that_dwarfs_all_others(instruction_set, n):
    """Nobody keeps it. Beside it, what is subtracted seems as small as what is left, and is a million times larger."""
    inputs, options = nearly_dense("keys of large values", n, torch.float32)
    inputs[0][..., 0], inputs[1][..., 0], inputs[1][..., 0, 0] = 5, 0, -200
    inputs[2][..., 0, :] = 1e27
    check_against_reference("cpu", inputs, options)


def test_equal_weights_add_up(instruction_set):
    """1 / N is rounded, always to the same side: long sums must not add that up. All output numbers are 1."""
    query, key = torch.zeros(2, 1, 1, 20000, 16)
    for alpha in (torch.full((1, 1, 16), 0.3), torch.zeros(1, 1, 16)):
        options = {"reciprocal": False, "impl": "cpu", "return_stats": True}
        out, stats = asa_attention(query[:, :, :16], key, torch.ones_like(key), alpha, **options)
        assert (out - 1).abs().max() < 1e-6
        torch.testing.assert_close(stats.lse_kept, stats.lse, rtol=0, atol=1e-6)


@pytest.mark.parametrize("gap", [20, slow(40), slow(60), 80])
def test_first_keys_far_below_the_others(instruction_set, gap):
    query, key = torch.zeros(2, 1, 1, 400, 16)
    query[..., 0], key[..., :48, 0] = 1, -gap
    inputs = [query + 0.1 * torch.randn_like(query), key, torch.randn(1, 1, 400, 16), torch.full((1, 1, 400), 0.3)]
    check_against_reference("cpu", [*inputs, None], {"reciprocal": False, "scale": 1.0})


def test_scores_far_above_those_of_the_first_keys(instruction_set):
    """The sum over a row starts from the largest of the first panel; 2^127 above it a float overflows."""
    query, key, value = torch.randn(3, 1, 1, 200, 16)
    query[..., 0], key[..., :100, 0], key[..., 100:, 0] = 40, 0, 40
    key[..., 150, 0] = 41
    check_against_reference("cpu", [query, key, value, torch.full((1, 1, 200), 0.3), None], {"reciprocal": False})


def test_lists_as_long_as_they_get(instruction_set):
    """A quarter of all keys in every row, the most that lists are made for."""
    inputs = [*torch.randn(3, 1, 1, 1028, 16), None, None]
    options = {"topk": 257, "reciprocal": False}
    assert (fractions_of_rows(inputs, options) == 0.25).double().mean() > 0.9  # but for ties
    check_against_reference("cpu", inputs, options)


@pytest.mark.parametrize("topk", [128, 256])
@pytest.mark.parametrize("reciprocal", [False, True])
def test_threshold_gradients_beside_a_kth_largest_score_near_0(instruction_set, topk, reciprocal):
    query, key, value = torch.randn(3, 1, 1, 512, 64, dtype=torch.float64)
    alpha = 1 + torch.rand(1, 1, 512, dtype=torch.float64)
    check_equal_to("reference", [query, key, value, alpha, None], {"topk": topk, "reciprocal": reciprocal})


def test_gradient_of_an_empty_row_among_dense_ones_goes_nowhere():
    query, key, value = torch.randn(3, 1, 1, 64, 16)
    alpha = torch.zeros(1, 1, 64).index_fill(2, torch.tensor([5]), torch.inf)
    inputs, options = [query, key, value, alpha, None], {"reciprocal": False, "threshold_grad": None}
    results = []
    for upstream in (1.0, torch.nan):
        grad_out = torch.ones_like(value).index_fill(2, torch.tensor([5]), upstream)
        results.append(call_and_gradients("cpu", inputs, options, grad_out))
    assert equal(*results)


def test_a_nan_key_before_a_long_stretch_of_padding_is_seen():
    query, key, value = torch.randn(3, 1, 1, 400, 512)
    key[0, 0, 0] = torch.nan
    mask = torch.ones(1, 400, dtype=torch.bool)
    mask[0, 1:100] = False
    out = asa_attention(query, key, value, torch.ones(1, 1, 400), key_padding_mask=mask, impl="cpu")
    assert torch.equal(out.isnan().any(-1)[0, 0], mask[0])


def test_a_window_that_nobody_uses_costs_nothing():
    inputs = [*torch.randn(3, 1, 1, 64, 16), torch.ones(1, 1, 64), None]
    call_and_gradients("cpu", inputs, {"window": 10**9 + 1})


@pytest.mark.parametrize("reciprocal", [False, slow(True)])
def test_survivors_of_a_backward_in_more_than_one_slab(reciprocal):
    """The backward holds 16 MB of survivors at a time, 0.8 million in float64."""
    inputs, _ = rows_of_any_density(3000, 8, torch.float64)
    _, _, _, counts, *_ = check_equal_to("blocked", inputs, {"reciprocal": reciprocal})
    assert reciprocal or counts.sum() > 3.5e6


def test_unknown_instruction_set_is_refused(monkeypatch):
    monkeypatch.setenv("ASA_OPS_CPU_ISA", "mmx")
    names = f"{', '.join(INSTRUCTION_SETS[:-1])} or {INSTRUCTION_SETS[-1]}"
    with pytest.raises(RuntimeError, match=f"ASA_OPS_CPU_ISA must be {names}, got mmx"):
        torch.ops.asa_ops.cpu_isa()


def check_kernels(folder: Path, name: str, compiler: list[str], emulator: tuple[str, ...] = ()):
    """Run the tests of an instruction set's kernels that need no torch."""
    source, program = simt.ROOT / "csrc/testing/cpu_kernels.cpp", folder / "kernels"
    define = f'-DASA_SOURCE="../cpu/isa_{name}.cpp"'
    subprocess.run([*compiler, "-std=c++20", define, source, "-o", program], check=True)
    run = subprocess.run([*emulator, program], capture_output=True, text=True)
    lines = run.stdout.splitlines()
    wrong = [line for line in lines if not line.endswith(" ok")]
    assert not wrong and run.returncode == 0 and len(lines) > 300, run.stderr


@pytest.mark.slow
@pytest.mark.skipif(not simt.COMPILER, reason="no C++ compiler here")
def test_kernels_by_themselves(instruction_set, tmp_path):
    # Quick to compile; the second flag fuses products and sums, as -O3 does.
    flags = ["-O1", "-fexpensive-optimizations"]
    check_kernels(tmp_path, instruction_set, [*shlex.split(get_cxx_compiler()), *flags])


@pytest.mark.slow
@pytest.mark.skipif(amx.AVX512 or not amx.AVAILABLE, reason="needs AVX2 without AVX-512, and a C++ compiler")
def test_kernels_for_avx512_in_emulation(tmp_path):
    check_kernels(tmp_path, "avx512", [*shlex.split(get_cxx_compiler()), "-O1", *amx.AVX512_EMULATED, *amx.BACK_END])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["portable", "neon"])
def test_kernels_for_arm_in_an_emulator(name, tmp_path):
    compiler = shutil.which("aarch64-linux-gnu-g++")
    emulator = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if not compiler or not emulator:
        pytest.skip("no aarch64-linux-gnu-g++ or no qemu-aarch64 (Debian: g++-aarch64-linux-gnu, qemu-user)")
    check_kernels(tmp_path, name, [compiler, "-static", "-O3", "-Wall", "-Werror"], (emulator,))


def check_bitwise_equal_over_thread_counts(with_threads, inputs, options):
    first, *others = with_threads(lambda: call_and_gradients("cpu", inputs, options), (1, 2, 3, 16))
    assert all(equal(first, other) for other in others)


def test_bitwise_equal_over_thread_counts_on_a_large_map(with_threads):
    """Here the number of threads also decides how many rows one of them takes at a time."""
    check_bitwise_equal_over_thread_counts(with_threads, *rows_of_any_density(4300, 16, torch.float32))


@each_case
def test_bitwise_equal_over_thread_counts(with_threads, case):
    check_bitwise_equal_over_thread_counts(with_threads, *make(case, torch.float32))


def test_auto_prefers_it():
    (query, *_), _ = make(named("plain"), torch.bfloat16)
    assert asa_ops.explain(query).splitlines()[0].endswith(": cpu")


@pytest.mark.slow
def test_agrees_with_blocked_at_65536():
    n = 65536
    query, key = (torch.randn(1, 1, n, 80) * 1.5 for _ in range(2))
    value, alpha = torch.randn(1, 1, n, 3), torch.full((1, 1, n), 4.0)
    results = [asa_attention(query, key, value, alpha, impl=impl, return_stats=True) for impl in ("cpu", "blocked")]
    (out, stats), (expected, expected_stats) = results
    same = stats.survivors == expected_stats.survivors  # rounding decides a few pairs of 4e9
    assert same.double().mean() > 0.98
    torch.testing.assert_close(out[same], expected[same], rtol=1e-4, atol=1e-4 * expected.abs().max().item())
