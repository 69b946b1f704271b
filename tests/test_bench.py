"""The benchmarks compare what they say, count what they say, and write what they can read."""

import dataclasses
import itertools
import json
import math
import time

import accounting
import check
import files
import inputs
import measure
import peers
import pytest
import record
import report
import run
import scaling
import torch
import workloads
from record import Case, Method, Record

from asa_ops import nn
from asa_ops.asa import reference

BLOCKS = [*workloads.BLOCKS, "linear_attention,kind=channel", "efficient_attention,heads=8", "criss_cross_attention"]
BLOCKS += [f"non_local,mode={mode}" for mode in ("gaussian", "dot_product", "concatenation")]


def spec(op: str = "asa", size: str = "16x16", dim: int = 32, kind: str = "iid") -> workloads.Spec:
    return workloads.Spec(op, size, dim, 1, 1, "float32", kind, None, "cpu")


@pytest.mark.parametrize("op", BLOCKS)
def test_eager_forms_equal_the_blocks(op):
    """In the mode of the benchmark, training: batch norm takes the statistics of the batch."""
    assert set(workloads.BLOCKS) == set(nn.available()) - {"asa"}
    workload = workloads.build(spec(op), ["auto"], ["eager"])
    ours, eager = (workload.call(name, False)() for name in (workloads.OURS, "eager"))
    torch.testing.assert_close(ours, eager, rtol=1e-3, atol=1e-4)


def test_dense_operations_are_those_of_the_formula():
    """4 N^2 D forward, 10 N^2 D backward, and 7 units in all."""
    n, dim = 144, 16
    workload = workloads.build(spec(size="12x12", dim=dim, kind="dense"), ["auto"], ["sdpa math"])
    ours = workload.ours[0]
    assert accounting.registered_flops(workload.call(ours, False)) == 4 * n**2 * dim
    assert accounting.registered_flops(workload.call(ours, True)) == 14 * n**2 * dim
    assert accounting.registered_flops(workload.call("sdpa math", False)) == 4 * n**2 * dim
    everybody = accounting.sparsity(workload.tensors, (12, 12))
    assert everybody == accounting.Sparsity(n, 1, 1, 1, 1, 1)
    dense = [accounting.operations(accounting.units("reference", back, everybody), n, dim) for back in (False, True)]
    assert dense == [4 * n**2 * dim, 14 * n**2 * dim]


@pytest.mark.parametrize("kind", inputs.INPUTS)
@pytest.mark.parametrize("grid", [(16, 16), (9, 21), (8, 40)])
def test_sparsity_equals_a_count_made_from_the_mask(kind, grid):
    tensors = inputs.make(kind, grid, 16, heads=2)
    order = accounting.tile_order(grid)
    if grid == (8, 40):  # a tile that keeps nobody, which others keep: it is in sight of its neighbours only
        tensors[3][..., order[:64]] = torch.inf
    query, key, _, alpha, beta = (x.double() for x in tensors)
    assert query.shape == (1, 2, grid[0] * grid[1], 16) and alpha.shape == (1, 2, grid[0] * grid[1])
    n = query.shape[2]
    real = reference.real_positions(query, key, None)
    s = reference.scores(query, key, None, *real)
    all_of = reference.find_survivors(s, alpha, beta, grid, 3, None, True, *real)
    mask, neighbours, window = all_of.kept[0], all_of.adaptive[0], all_of.in_window[0, 0]
    found = accounting.sparsity(tensors, grid)
    # float32 scores: a pair or two may lie within rounding of a threshold
    assert found.density == pytest.approx(mask.double().mean().item(), abs=4 / n**2)
    assert found.survivors == pytest.approx(found.density * n)
    assert order.sort().values.equal(torch.arange(n))
    active, plausible, candidates = 0, 0, 0
    for kept, chosen in zip(mask, neighbours, strict=True):
        kept, chosen, around = (x[order][:, order] for x in (kept, chosen, window))
        for i, j in itertools.product(range(0, n, 64), repeat=2):
            rows, columns = slice(i, i + 64), slice(j, j + 64)
            pairs = kept[rows, columns].numel()
            active += pairs * bool(kept[rows, columns].any())
            seen = chosen[rows, columns].any() and chosen[columns, rows].any()
            plausible += pairs * bool(seen or around[rows, columns].any())
            candidates += chosen[columns, rows].any(1).sum().item()
    assert found.active == active / (2 * n**2)
    assert found.plausible == plausible / (2 * n**2)
    blocks = -(-n // 64)
    assert found.candidates == pytest.approx(candidates / (2 * blocks * n), abs=4 / (2 * blocks * n))
    assert found.density <= found.active <= found.plausible <= 1 and found.density <= found.strips <= 1


def test_inputs_are_the_same_every_time():
    for kind in inputs.INPUTS:
        torch.manual_seed(len(kind))
        for first, second in zip(inputs.make(kind, (8, 9), 5), inputs.make(kind, (8, 9), 5), strict=True):
            assert first.isfinite().all() and first.equal(second)


@pytest.fixture
def quick(monkeypatch):
    """Leave out the second that the machine's ceilings take."""
    monkeypatch.setattr(measure, "ceilings", lambda device, dtype: {"torch.mm GFLOP/s": 100.0, "copy GB/s": 10.0})


@pytest.mark.slow
def test_run_measures_every_input(tmp_path, capsys):
    out = tmp_path / "out.json"
    arguments = ["--size", "8x8", "--dim", "16", "--inputs", *inputs.INPUTS, "--mode", "fwd", "fwd+bwd"]
    run.main([*arguments, "--rounds", "2", "--peers", "sdpa flash", "eager", "adasplash", "--out", str(out)])
    results = record.read(out)
    assert [(c.inputs, c.mode) for c in results.cases] == [(x, m) for x in inputs.INPUTS for m in ("fwd", "fwd+bwd")]
    for case in results.cases:
        assert set(case.methods) == {case.ours[0], "sdpa flash", "eager", "adasplash"}
        assert case.methods["adasplash"].skipped in ("not installed", "needs a CUDA device")
        assert 1 <= len(case.methods[case.ours[0]].seconds) <= 2 and case.ratio(case.ours[0], "sdpa flash")[1] > 0
    shown = capsys.readouterr().out
    assert all(f"{kind} 8x8, 16 " in shown for kind in inputs.INPUTS)
    assert "candidates" in shown and "skipped adasplash: " in shown
    assert set(results.ceilings) >= {"torch.mm GFLOP/s", "copy GB/s"} and min(results.ceilings.values()) > 0


@pytest.mark.slow
def test_run_measures_bytes(tmp_path, quick):
    out = tmp_path / "out.json"
    run.main(["--size", "32x32", "--inputs", "iid", "--mode", "mem", "--peers", "eager", "--out", str(out)])
    (case,) = record.read(out).cases
    for name in (case.ours[0], "eager"):
        assert set(case.methods[name].memory) == {"fwd", "fwd+bwd"}
    assert case.methods["eager"].memory["fwd"] > 2 * 4 * 1024**2, "at least two matrices of N x N float32"


def test_run_measures_blocks_and_flex(tmp_path, quick):
    out = tmp_path / "out.json"
    arguments = ["--size", "16x16", "--dim", "32", "--mode", "fwd+bwd", "--rounds", "1", "--add", "--out", str(out)]
    run.main(["--op", "efficient_attention,heads=2", "criss_cross_attention", *arguments])
    run.main([*arguments, "--peers", "flex", "sdpa math", "--inputs", "labels", "iid", "--alpha", "2"])
    cases = record.read(out).cases
    assert [case.op for case in cases] == ["efficient_attention,heads=2", "criss_cross_attention", "asa", "asa"]
    assert all(case.ratio("asa_ops", "eager") for case in cases[:2])
    assert {case.alpha for case in cases[2:]} == {2.0}
    assert torch.cuda.is_available() or cases[2].methods["flex"].skipped == run.NO_BACKWARD


# Memory and time.


def test_bytes_added_are_those_allocated():
    """Of 64 MB at the same time, whatever was freed before."""
    torch.ones(2**25)

    def allocate():
        first = torch.ones(2**23)
        del first
        return torch.ones(2**23) + torch.ones(1)  # 32 MB twice

    assert measure.bytes_added(allocate, "cpu") == pytest.approx(2**26, rel=0.05)


def test_traffic_counts_every_tensor_once():
    assert accounting.traffic(100, 64, 2, 4, False) == 4 * (100 * 64 * 2 * 4), "q, k, v, out"
    assert accounting.traffic(100, 64, 2, 4, True) == 8 * (100 * 64 * 2 * 4), "and do, dq, dk, dv"


def test_strips_are_dense_above_a_quarter():
    counts = torch.tensor([8.0] * 8 + [9.0] + [8.0] * 7 + [1, 0, 0, 0])
    assert accounting.strips(counts, 32) == 64 + 8 * 32 + 1


def test_units_are_those_of_the_formulas():
    x = accounting.Sparsity(10, 0.1, 0.3, 0.4, 0.2, 0.15)
    assert accounting.units("cpu", False, x) == pytest.approx(1.3)
    assert accounting.units("cpu", True, x) == pytest.approx(1.3 + 0.75)
    assert accounting.units("triton", True, x, 128, half=True) == pytest.approx(1 + 0.4 + 0.6 + 2.1)
    assert accounting.units("cuda", True, x, 128, half=True) == pytest.approx(1 + 0.4 + 0.6 + 2.4)
    assert accounting.units("triton", True, x) == pytest.approx(1 + 0.4 + 0.6 + 3)


def test_rounds_are_interleaved_and_slow_calls_get_few():
    calls = []

    def slow():
        calls.append("slow")
        time.sleep(0.02)

    times, errors = measure.interleaved({"fast": lambda: calls.append("fast"), "slow": slow}, 5, "cpu")
    assert len(times["fast"]) == 5 and len(times["slow"]) == measure.SLOW_ROUNDS and not errors
    assert calls[:3] == ["fast", "slow", "fast"] and calls.count("slow") == measure.SLOW_ROUNDS + 2


def test_a_first_call_that_compiles_makes_no_method_slow():
    calls = []

    def compiled():
        if not calls:
            time.sleep(0.05)
        calls.append(time.sleep(0.001))

    times, _ = measure.interleaved({"fast": lambda: time.sleep(0.001), "compiled": compiled}, 5, "cpu")
    assert len(times["compiled"]) == 5


# What fails.


def fail(*arguments, **options):
    raise RuntimeError("out of luck\nand more")


def test_a_peer_that_fails_gets_a_row_and_the_run_goes_on(monkeypatch, capsys, quick):
    broken = peers.PEERS["sdpa math"]._replace(prepare=lambda problem: fail)
    monkeypatch.setitem(peers.PEERS, "sdpa math", broken)
    arguments = ["--size", "8x8", "--dim", "16", "--inputs", "iid", "--mode", "fwd", "--rounds", "1"]
    run.main([*arguments, "--peers", "sdpa math", "sdpa flash"])
    lines = [line for line in capsys.readouterr().out.splitlines() if "sdpa" in line]
    assert any("RuntimeError: out of luck" in line for line in lines) and any("sdpa flash" in line for line in lines)


@pytest.mark.parametrize("module", [workloads, accounting])
def test_ours_failing_is_an_error(module, monkeypatch, capsys, quick):
    """In a row of its own, the other cases go on; whether the call fails or counting who survives."""
    monkeypatch.setattr(module, "asa_attention", fail)
    message = r"ours failed:\nasa iid 8x8, 16, fwd: asa .*: RuntimeError: out of luck\nasa labels 8x8"
    with pytest.raises(SystemExit, match=message):
        run.main(["--size", "8x8", "--dim", "16", "--inputs", "iid", "labels", "--mode", "fwd", "--peers"])
    assert "RuntimeError: out of luck" in capsys.readouterr().out


@pytest.mark.parametrize("chosen", [["eager"], []])
def test_eager_that_does_not_fit_in_memory(chosen, monkeypatch):
    monkeypatch.setattr(measure, "free_bytes", lambda device: 2**30)
    workload = workloads.build(spec("non_local,mode=concatenation", "64x64", 64), ["auto"], chosen)
    assert list(workload.prepare) == [workloads.OURS] and list(workload.skipped) == chosen
    assert all("would need 17 GB, more than half of the 1 GB" in reason for reason in workload.skipped.values())


class Packages:
    """Stands for packages that are not installed here: attention that gives the value back, in their layouts."""

    @staticmethod
    def adasplash(query, key, value, is_causal):
        assert query.shape == value.shape == (2, 3, 63, 8) and not is_causal
        return value

    @staticmethod
    def memory_efficient_attention(query, key, value):
        assert query.shape == value.shape == (2, 63, 3, 8)
        return value

    @staticmethod
    def na2d(query, key, value, kernel_size):
        assert query.shape == value.shape == (2, 7, 9, 3, 8) and kernel_size == (7, 9)
        return value


@pytest.mark.parametrize("name", ["adasplash", "xformers", "natten"])
def test_layouts_of_packages(name, monkeypatch):
    monkeypatch.setattr(peers.importlib, "import_module", lambda package: Packages)
    query, key, value = torch.randn(3, 2, 3, 63, 8)
    attention = peers.PEERS[name].prepare(peers.Problem([query, key, value, None, None], (7, 9)))
    assert attention(query, key, value).equal(value)


def test_dtypes_and_implementations(tmp_path, capsys, quick):
    """What is of one dtype stays so; what has one implementation takes no --impl."""
    out = str(tmp_path / "out.json")
    small = ["--size", "8x8", "--dim", "16", "--mode", "fwd", "--rounds", "1", "--out", out, "--add"]
    run.main([*small, "--op", "criss_cross_attention", "--impl", "reference", "cpu", "--peers"])
    run.main([*small, "--impl", "blocked", "cpu", "--inputs", "iid", "--peers", "--batch", "2"])
    results = record.read(tmp_path / "out.json")
    results.environment["commit"] = "an earlier one"
    results.write(tmp_path / "out.json")
    run.main([*small, "--op", "criss_cross_attention", "--impl", "reference", "cpu", "--peers"])
    assert record.read(tmp_path / "out.json").environment["commit"] == f"an earlier one, {measure.commit()}"
    asa, cross = record.read(tmp_path / "out.json").cases
    assert cross.ours == ["asa_ops reference", "asa_ops cpu"] and asa.ours == ["asa blocked", "asa cpu"]
    page = report.render(record.read(tmp_path / "out.json"), [])
    assert "- dtype: float32\n- ASA: blocked, cpu\n" in page
    assert "| iid | 8x8 | 16 x batch 2 | fwd, blocked | " in page
    for arguments, message in (
        (["--dtype", "bfloat16"], f"--add: {out} is of float32, got --dtype bfloat16"),
        (["--op", "efficient_attention", "--impl", "cpu"], "--impl: efficient_attention has one implementation"),
        (["--dim", "64", "512", "--impl", "triton"], "--impl triton: impl='triton' cannot run this asa_attention"),
    ):
        with pytest.raises(SystemExit, match="2"):
            run.main([*small, *arguments])
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "nonlocal"], "unknown op 'nonlocal', expected one of asa, "),
        (["--op", "non_local,mode=sharp"], "op 'non_local,mode=sharp': mode must be"),
        (["--op", "asa,topk=3"], "expected options of a block as name,key=value,.., got 'topk=3'"),
        (["--op", "criss_cross", "--inputs", "photo"], "blocks take --inputs iid"),
        (["--size", "64"], "expected HxW, as 64x64, got '64'"),
        (["--size", "0x4"], "expected HxW, as 64x64, got '0x4'"),
        (["--dim", "-3"], "expected a whole number >= 1, got '-3'"),
        (["--rounds", "many"], "expected a whole number >= 1, got 'many'"),
        (["--alpha", "nan"], "expected a finite number >= 0, got 'nan'"),
        (["--alpha", "inf"], "expected a finite number >= 0, got 'inf'"),
        (["--inputs", "noise"], "invalid choice: 'noise'"),
        (["--mode", "bwd"], "invalid choice: 'bwd'"),
        (["--out", "missing/out.json"], "--out: there is no folder 'missing'"),
        (["--out", "/dev/null"], "/dev/null cannot be written: it is there and no file"),
    ],
)
def test_bad_arguments_are_told_before_any_work(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        files.run(lambda: run.main(arguments))
    assert message in f"{end.value} {capsys.readouterr().err}"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_told(capsys):
    for arguments, message in (
        (["--device", "cuda"], "--device cuda: torch"),
        (["--impl", "cuda"], "--impl cuda: impl='cuda' cannot run"),
    ):
        with pytest.raises(SystemExit, match="2"):
            run.main(arguments)
        assert message in capsys.readouterr().err


# Files, pages, checks.


def stored(**changes) -> Record:
    """Return a record as a run leaves it: a sweep of tokens, a block, and the case of a check."""
    fields = Case("asa", "64x64", 64, 1, 1, "float32", "labels", None, "fwd", "", {}, ["asa cpu"], {})
    sparse = accounting.Sparsity(157, 0.038, 0.23, 0.24, 0.15, 0.04)._asdict()

    def timed(ours: float, dense: float, **other) -> Case:
        methods = {"asa cpu": Method([ours, ours, 1.1 * ours], flops=10**9), "sdpa flash": Method([dense] * 3)}
        methods["natten"] = Method(skipped="not installed")
        return dataclasses.replace(fields, sparsity=sparse, methods=methods, **other)

    cases = [timed(1e-3, 2e-3), timed(3e-3, 2e-3, inputs="near-dense", mode="fwd+bwd")]
    for side, ours, dense in ((32, 4, 2), (64, 16, 32), (128, 256, 512), (256, 4096, 8192)):
        cases.append(timed(1e-3 * ours, 1e-3 * dense, size=f"{side}x{side}", sweep="tokens"))
    used = {"asa cpu": Method(memory={"fwd": 10**6, "fwd+bwd": 2 * 10**6}), "eager": Method(error="RuntimeError: no")}
    cases.append(dataclasses.replace(fields, mode="mem", methods=used))
    block = {"asa_ops": Method([1.0]), "eager": Method([2.0])}
    cases.append(dataclasses.replace(fields, op="criss_cross", inputs="iid", ours=["asa_ops"], methods=block))
    return Record({"device": "A Machine", "commit": "abc"}, {"torch.mm GFLOP/s": 100.0, "copy GB/s": 10.0}, cases)


def test_a_file_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "results.json"
    results = stored()
    results.write(path)
    assert record.read(path) == results
    again = dataclasses.replace(results.cases[0], ours=["sdpa flash"])
    results.add(again)
    assert results.cases[-1] is again and len(results.cases) == len(stored().cases)


def test_a_full_disk_leaves_the_file_that_was(tmp_path, full_disk):
    path = tmp_path / "results.json"
    path.write_text("before")
    with full_disk(), pytest.raises(files.FileError, match=r"results\.json: File too large$"):
        stored().write(path)
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def test_results_are_not_replaced_by_their_page(tmp_path):
    """Whatever they are named; as the page's own file of results they stay what they are."""
    for name in ("a-machine.md", "a-machine-tokens.png", "a-machine.json"):
        path = tmp_path / name
        stored().write(path)
        before = path.read_bytes()
        if name.endswith("json"):
            report.main([str(path), "--folder", str(tmp_path)])
        else:
            with pytest.raises(files.FileError, match=rf"{name} would replace .*{name}, which is read"):
                report.main([str(path), "--folder", str(tmp_path)])
            assert list(tmp_path.iterdir()) == [path]
        assert path.read_bytes() == before
        path.unlink()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.pop("ceilings"), "missing fields ['ceilings'], unknown fields []"),
        (lambda x: x["cases"][0].update(speed=1), "cases[0]: missing fields [], unknown fields ['speed']"),
        (lambda x: x["cases"][1].update(mode="bwd"), "cases[1].mode: expected one of fwd, fwd+bwd, mem, got 'bwd'"),
        (lambda x: x["cases"][0].update(size="64"), "cases[0].size: expected HxW, got '64'"),
        (lambda x: x["cases"][0].update(dim="64"), "cases[0].dim: expected"),
        (lambda x: x["cases"][0].update(dim=True), "cases[0].dim: expected"),
        (lambda x: x["cases"][0].update(ours=["asa"]), "cases[0].ours: asa not among the methods asa cpu, "),
        (
            lambda x: x["cases"][0]["methods"]["asa cpu"].update(seconds=[-1.0]),
            "seconds and bytes must be numbers >= 0",
        ),
        (lambda x: x.update(cases=3), "cases: expected"),
    ],
)
def test_files_of_another_form_are_refused(change, message, tmp_path):
    path = tmp_path / "results.json"
    stored().write(path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError) as caught:
        record.read(path)
    assert str(path) in str(caught.value) and message in str(caught.value)
    path.write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        record.read(path)


def test_a_page_is_made_of_a_stored_file(tmp_path, capsys):
    path = tmp_path / "results.json"
    stored().write(path)
    report.main([str(path), "--folder", str(tmp_path / "page")])
    text = (tmp_path / "page" / "a-machine.md").read_text()
    assert record.read(tmp_path / "page" / "a-machine.json") == stored()
    assert (tmp_path / "page" / "a-machine-tokens.png").stat().st_size > 10_000 and "(a-machine-tokens.png)" in text
    assert "| labels | 64x64 | 64 | fwd | 1.0 | 0.50 (0.50-0.53) |" in text
    assert "slower in 2 of them: near-dense (1 of 1); labels (1 of " in text
    assert "- tokens, fwd: 0.50 to 2.00 of dense; ASA wins above 2048." in text
    assert "| tokens | seconds, fwd | asa cpu | 2.00 | 16384 to 65536 |" in text
    assert "- natten was skipped: not installed" in text and "- eager failed: RuntimeError: no" in text
    assert "| criss_cross | 64x64x64 | fwd | 1000.0 | 2000.0 | 0.50 (0.50-0.50) |" in text
    # 1.08 units of 2 * 4096^2 * 64 at 100 GFLOP/s
    assert "| labels | 64x64 | 64 | fwd | asa cpu | 1.08 | 2319 | 23.2 | 2319 % |" in text
    assert "A Machine" in text and "slower in 2" in capsys.readouterr().out


def test_exponents_are_fitted():
    xs = [100.0, 200.0, 400.0]
    assert report.fit(xs, [3 * x**2 for x in xs]) == (pytest.approx(2), pytest.approx(0, abs=1e-6))
    slope, error = report.fit(xs, [1.0, 4.0, 15.0])
    assert slope == pytest.approx(math.log2(15) / 2) and error > 0
    assert report.crossing([(100, 2), (400, 0.5), (1600, 2)]) == [
        (pytest.approx(200), "wins above"),
        (pytest.approx(800), "wins below"),
    ]


@pytest.mark.slow
def test_scaling_sweeps_what_it_says(tmp_path, capsys, monkeypatch, quick):
    monkeypatch.setattr(scaling, "DIMS", [8, 16])
    monkeypatch.setattr(scaling, "ALPHAS", [0.0, 4.0])
    out = tmp_path / "out.json"
    small = ["--size", "8x8", "16x16", "--rounds", "1", "--peers", "sdpa flash", "--out", str(out)]
    monkeypatch.setattr(run, "_bytes", lambda *args: 1000)
    scaling.main(small)
    cases = record.read(out).cases
    assert {(c.sweep, report.position(c)) for c in cases} >= {("tokens", 64), ("tokens", 256), ("dim", 8), ("dim", 16)}
    dense, sparse = (c.sparsity["survivors"] for c in report.of(cases, "survivors", "fwd")[::-1])
    assert dense == 4096 and sparse < 400
    assert "- tokens, fwd: " in capsys.readouterr().out


def test_every_committed_page_says_what_its_file_says():
    pages = sorted(report.FOLDER.glob("*.md"))
    assert any(check.subset(record.read(page.with_suffix(".json"))) for page in pages)
    for page in pages:
        if page.stem.endswith("-summary"):
            continue  # bench/gpu_report.py's
        pictures = [f"{page.stem}-{sweep}.png" for sweep in report.SWEEPS]
        pictures = [name for name in pictures if (page.parent / name).exists()]
        assert page.read_text() == report.render(record.read(page.with_suffix(".json")), pictures)


def test_a_check_tells_what_moved(tmp_path, capsys, quick):
    assert check.verdict([0.4, 0.5, 0.6], [0.79, 0.8, 0.9]) == "slower"
    assert check.verdict([0.4, 0.5, 0.6], [0.2, 0.25, 0.3]) == "faster"
    assert check.verdict([0.4, 0.5, 0.6], [0.77, 0.8, 0.9]) == check.verdict([0.4, 0.5, 0.6], [0.2, 0.3, 0.32]) == ""
    path = tmp_path / "known.json"
    results = stored()
    results.environment = measure.environment("cpu")
    results.cases = results.cases[:1]  # half the time of dense attention
    results.cases[0].methods["sdpa flash"].seconds = [1000.0] * 3
    results.write(path)
    with pytest.raises(SystemExit, match="1"):
        check.main(["--against", str(path), "--rounds", "3"])
    assert "slower" in capsys.readouterr().out
    results.environment["threads"] = 999
    results.write(path)
    with pytest.raises(SystemExit, match="0"):
        check.main(["--against", str(path), "--rounds", "3"])
    assert "threads 999 there" in capsys.readouterr().out
    results.cases = []
    results.write(path)
    with pytest.raises(SystemExit, match="2"):
        check.main(["--against", str(path)])
    assert "has no case with" in capsys.readouterr().err
