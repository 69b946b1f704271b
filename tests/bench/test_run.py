"""Runs, and checks of what got slower."""

import pytest
import torch
from bench_cases import stored

from asa_ops import asa_attention
from asa_ops.core import extension
from bench import accounting, check, measure, peers, record, report, run, workloads
from examples import files


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Return a function that runs bench.run and returns its cases, without the second that ceilings take."""
    monkeypatch.setattr(measure, "ceilings", lambda device, dtype: {"torch.mm GFLOP/s": 100.0, "copy GB/s": 10.0})
    out = tmp_path / "out.json"

    def cases(*arguments: str) -> list[record.Case]:
        run.main([*arguments, "--out", str(out)])
        return record.read(out).cases

    return cases


def fail(*arguments, **options):
    raise RuntimeError("out of luck\nand more")


SMALL = ["--size", "8x8", "--dim", "16", "--rounds", "1"]
no_device = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


@pytest.mark.slow
def test_run_measures_blocks_and_flex(tmp_path, quick, monkeypatch):
    monkeypatch.setattr(measure, "bytes_once", fail)
    arguments = ["--size", "16x16", "--dim", "32", "--rounds", "1", "--add"]
    quick("--op", "efficient_attention,heads=2", "criss_cross_attention", *arguments, "--mode", "fwd+bwd")
    flex = ["--peers", "flex", "sdpa math", "--inputs", "labels", "iid", "--alpha", "2", "--mode", "fwd+bwd"]
    cases = quick(*arguments, *flex)
    assert [case.op for case in cases] == ["efficient_attention,heads=2", "criss_cross_attention", "asa", "asa"]
    assert all(case.ratio("asa_ops", "eager") for case in cases[:2])
    assert {case.alpha for case in cases[2:]} == {2.0}
    assert torch.cuda.is_available() or cases[2].methods["flex"].skipped == run.NO_BACKWARD
    with pytest.raises(SystemExit, match=r"ours failed:\s.*out of luck"):
        quick(*arguments, "--inputs", "iid", "--mode", "mem", "--peers", "flex")
    assert "RuntimeError: out of luck" in record.read(tmp_path / "out.json").cases[-1].methods["flex"].error


def test_a_peer_that_fails_gets_a_row_and_the_run_goes_on(monkeypatch, capsys, quick):
    """One that is not installed gets a line."""
    for name, prepare in (("sdpa math", lambda problem: fail), ("eager", fail)):
        monkeypatch.setitem(peers.PEERS, name, peers.PEERS[name]._replace(prepare=prepare))
    chosen = ["sdpa math", "eager", "sdpa flash", "adasplash"]
    cases = quick(*SMALL, "--rounds", "2", "--inputs", "iid", "photo", "--mode", "fwd", "fwd+bwd", "--peers", *chosen)
    assert [(c.inputs, c.mode) for c in cases] == [(x, m) for x in ("iid", "photo") for m in ("fwd", "fwd+bwd")]
    for case in cases:
        assert set(case.methods) == {case.ours[0], *chosen} and case.ratio(case.ours[0], "sdpa flash")[1] > 0
        assert 1 <= len(case.methods[case.ours[0]].seconds) <= 2
        assert case.methods["adasplash"].skipped in ("not installed", "needs a CUDA device")
    shown = capsys.readouterr().out
    lines = [line for line in shown.splitlines() if line.startswith("|")]
    assert sum("RuntimeError: out of luck" in line for line in lines) == 2 * len(cases)
    assert any("sdpa flash" in line for line in lines) and "candidates" in lines[0]
    assert all(case.label in shown for case in cases) and "- adasplash was skipped: " in shown


def test_thresholds_that_learn_are_a_method_beside_constant_ones(monkeypatch, quick):
    learning = []

    def attention(*args, **options):
        learning.append((options.get("threshold_grad"), args[3].requires_grad))
        return asa_attention(*args, **options)

    monkeypatch.setattr(workloads, "asa_attention", attention)
    (case,) = quick(*SMALL, "--inputs", "iid", "--mode", "fwd+bwd", "--impl", "auto", "learning", "--peers")
    assert set(learning) == {(None, False), ("straight_through", True)}
    assert case.ours[1] == "asa learning" and case.median("asa learning") > 0


@pytest.mark.parametrize(("module", "name"), [(workloads, "asa_attention"), (accounting, "reciprocal_neighbors")])
def test_ours_failing_is_an_error(module, name, monkeypatch, capsys, quick):
    """In a row of its own, the other cases go on; whether the call fails or counting who survives."""
    monkeypatch.setattr(module, name, fail)
    message = r"ours failed:\nasa iid 8x8, 16, fwd: asa .*: RuntimeError: out of luck\nasa labels 8x8"
    with pytest.raises(SystemExit, match=message):
        run.main([*SMALL, "--inputs", "iid", "labels", "--mode", "fwd", "--peers"])
    assert "RuntimeError: out of luck" in capsys.readouterr().out


def test_dtypes_and_implementations(tmp_path, capsys, quick):
    """What is of one dtype stays so; what has one implementation takes no --impl."""
    out, small = tmp_path / "out.json", [*SMALL, "--mode", "fwd", "--add"]
    cross = [*small, "--op", "criss_cross_attention", "--impl", "reference", "cpu", "--peers"]
    quick(*cross)
    quick(*small, "--impl", "blocked", "cpu", "--inputs", "iid", "--peers", "--batch", "2")
    results = record.read(out)
    results.environment["commit"] = "an earlier one"
    results.ceilings["copy GB/s"] = 20.0
    results.write(out)
    quick(*cross)
    results = record.read(out)
    assert results.environment["commit"] == f"an earlier one, {measure.commit()}"
    assert results.ceilings == {"torch.mm GFLOP/s": 100.0, "copy GB/s": 20.0}
    asa, cross = results.cases
    assert cross.ours == ["asa_ops reference", "asa_ops cpu"] and asa.ours == ["asa blocked", "asa cpu"]
    page = report.render(results)
    assert "- dtype: float32\n- ASA: blocked, cpu\n" in page and "| 8x8 | 16 x batch 2 | fwd, blocked | " in page
    results.environment["threads"] = 999
    results.write(tmp_path / "other.json")
    (tmp_path / "none.json").write_text("{")
    for arguments, message in (
        (["--dtype", "bfloat16"], f"--add: {out} is of float32, got --dtype bfloat16"),
        (["--out", str(tmp_path / "other.json")], "has threads = 999, here it is "),
        (["--out", str(tmp_path / "none.json")], "not JSON"),
    ):
        with pytest.raises(SystemExit, match="2"):
            run.main([*small, "--out", str(out), *arguments])
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "nonlocal"], "unknown op 'nonlocal', expected one of asa, "),
        (["--op", "non_local,mode=sharp"], "op 'non_local,mode=sharp': mode must be"),
        (["--op", "asa,topk=3"], "expected options of a block as name,key=value,.., got 'topk=3'"),
        (["--op", "criss_cross", "--inputs", "photo"], "blocks take --inputs iid"),
        (["--op", "efficient_attention", "--impl", "cpu"], "--impl: efficient_attention has one implementation"),
        (["--size", "64x"], "expected HxW, as 64x64, or L or TxHxW, got '64x'"),
        (["--size", "0x4"], "expected HxW, as 64x64, or L or TxHxW, got '0x4'"),
        (["--op", "criss_cross", "--size", "4x4x4"], "criss_cross is measured on maps, HxW, got 4x4x4"),
        (["--dim", "-3"], "expected a whole number >= 1, got '-3'"),
        (["--dim", "64", "512", "--impl", "triton"], "--impl triton: impl='triton' cannot run this asa_attention"),
        (["--rounds", "many"], "expected a whole number >= 1, got 'many'"),
        (["--alpha", "nan"], "expected a finite number >= 0, got 'nan'"),
        (["--alpha", "inf"], "expected a finite number >= 0, got 'inf'"),
        (["--alpha", "high"], "expected a finite number >= 0, got 'high'"),
        (["--inputs", "noise"], "invalid choice: 'noise'"),
        (["--mode", "bwd"], "invalid choice: 'bwd'"),
        (["--sweep", "dim", "--inputs", "iid"], "--sweep fixes --inputs"),
        (["--out", "missing/out.json"], "--out: there is no folder 'missing'"),
        (["--out", "/dev/null"], "/dev/null cannot be written: it is there and no file"),
        pytest.param(["--device", "cuda"], "--device cuda: torch", marks=no_device),
        pytest.param(["--impl", "cuda"], "--impl cuda: impl='cuda' cannot run", marks=no_device),
    ],
)
def test_bad_arguments_are_told_before_any_work(arguments, message, capsys, monkeypatch):
    """Without an emulation of CUDA kernels, which another test may have loaded."""
    has = extension.has
    monkeypatch.setattr(extension, "has", lambda op, key: "emulated" not in op and has(op, key))
    with pytest.raises(SystemExit) as end:
        files.run(lambda: run.main(arguments))
    assert message in (capsys.readouterr().err if end.value.code == 2 else end.value.code)


@pytest.mark.slow
def test_sweeps_vary_what_they_say(capsys, monkeypatch, quick):
    for name, value in (("DIMS", [8, 16]), ("ALPHAS", [0.0, 4.0]), ("LARGE", 100)):
        monkeypatch.setattr(run, name, value)
    monkeypatch.setattr(measure, "bytes_once", lambda *args: 1000)
    sweeps = ["--sweep", "tokens", "survivors", "dim", "--size", "8x8", "16x16"]
    cases = quick(*sweeps, "--rounds", "2", "--peers", "sdpa flash")
    assert {(c.sweep, report.position(c)) for c in cases} >= {("tokens", 64), ("tokens", 256), ("dim", 8), ("dim", 16)}
    dense, sparse = (c.sparsity["survivors"] for c in report.of(cases, "survivors", "fwd")[::-1])
    assert dense == 4096 and sparse < 400
    assert [len(c.times("sdpa flash")) for c in report.of(cases, "tokens", "fwd")] == [2, 1]
    (used,) = {tuple((name, *x.memory) for name, x in c.methods.items()) for c in cases if c.mode == "mem"}
    assert used == ((cases[0].ours[0], "fwd", "fwd+bwd"), ("sdpa flash", "fwd", "fwd+bwd"))
    assert "- tokens, fwd: " in capsys.readouterr().out


def test_the_cost_of_a_call_is_a_table(monkeypatch, quick):
    monkeypatch.setattr(run, "CALLS", run.CALLS[:1])
    cases = quick("--sweep", "calls", "--rounds", "2", "--peers", "sdpa flash")
    assert [(c.sweep, c.tokens, c.alpha, c.mode) for c in cases] == [
        ("calls", 16, 1.0, mode) for mode in record.MODES[:2]
    ]
    rows = report.calls_table(cases).splitlines()[2:]
    assert [row.split(" | ")[:2] for row in rows] == [["| 1 x 1 x 16 x 64", mode] for mode in record.MODES[:2]]
    assert all(1 < float(row.split(" | ")[2]) < 1e6 for row in rows)  # microseconds


@pytest.mark.slow
def test_a_check_tells_what_moved(tmp_path, capsys, monkeypatch):
    assert check.verdict([0.4, 0.5, 0.6], [0.79, 0.8, 0.9]) == "slower"
    assert check.verdict([0.4, 0.5, 0.6], [0.2, 0.25, 0.3]) == "faster"
    assert check.verdict([0.4, 0.5, 0.6], [0.77, 0.8, 0.9]) == check.verdict([0.4, 0.5, 0.6], [0.2, 0.3, 0.32]) == ""
    path = tmp_path / "a-machine.json"
    results = stored()
    results.environment = measure.environment("cpu")
    results.cases = results.cases[:1]  # half the time of dense attention

    def checked(status: int, *arguments: str) -> str:
        results.write(path)
        with pytest.raises(SystemExit, match=str(status)):
            check.main([*arguments, "--rounds", "3"])
        return "".join(capsys.readouterr())

    results.cases[0].methods["sdpa flash"].seconds = [1000.0] * 3
    assert "slower" in checked(1, "--against", str(path))
    monkeypatch.setattr(report, "FOLDER", tmp_path)
    results.environment["threads"] = 999
    assert "threads 999 there" in checked(0)
    monkeypatch.setitem(peers.PEERS, check.PEER, peers.PEERS[check.PEER]._replace(package="not_here"))
    assert f"{check.PEER}: not installed" in checked(0)
    monkeypatch.setattr(workloads, "asa_attention", fail)
    assert checked("asa labels 64x64.*out of luck", "--against", str(path)) is not None
    results.cases = []
    assert "has no case with" in checked(2, "--against", str(path))
    assert "no page in" in checked(2)
    assert "--against: " in checked(2, "--against", str(tmp_path / "missing.json"))


def test_what_moves_once_has_not_moved(monkeypatch):
    """Measured twice: "slower" and then as before."""
    case = stored().cases[0]
    slow, same = (stored().cases[0] for _ in range(2))
    slow.methods["asa cpu"].seconds = [1.0] * 3
    again = iter([slow, same])
    monkeypatch.setattr(run, "measured", lambda *args: next(again))
    assert check.compare(case, 3) == (same.ratio("asa cpu", check.PEER), "")
