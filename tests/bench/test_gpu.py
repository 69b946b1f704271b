"""What the GPU suite makes of tests, logs and measurements. Needs no GPU."""

import contextlib
import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import goals, gpu, measure, record, report, run, shard
from bench.record import Case, Kernel, Method, Record, Step


def tally(selected: str, *outcomes: tuple[str, ...]) -> record.Tally:
    """Sum up what a share of some tests wrote, with outcomes (test, outcome, message)."""
    events = [{"event": "selected", "tests": list(selected)}, *({"event": "started", "test": x} for x in selected)]
    for test, outcome, *message in outcomes:
        told = {"test": test, "outcome": outcome, "seconds": 1.0, "message": "".join(message)}
        events.append({"event": "outcome", **told})
    return gpu.tally(map(json.dumps, events))


def test_outcomes_are_counted_and_what_never_ended_is_named():
    outcomes = [("a", "passed"), ("a", "error", "in teardown"), ("b", "passed")]
    counts = tally("abcde", *outcomes, ("c", "failed", "wrong"), ("d", "skipped", "no GPU"))
    assert (counts.selected, *(getattr(counts, kind) for kind in shard.OUTCOMES)) == (5, 1, 1, 1, 1)
    assert counts.unfinished == ["e"] and counts.skips == ["no GPU"]
    assert [(x["test"], x["message"]) for x in counts.failures] == [("a", "in teardown"), ("c", "wrong")]


@pytest.mark.parametrize(
    ("outcomes", "timed_out", "status"),
    [
        (["passed", "passed"], False, "passed"),
        (["passed", "skipped"], False, "passed"),
        (["passed", "failed"], False, "failed"),
        (["passed"], True, "timed out"),
        (["passed"], False, "failed"),  # the other never ended
        (["skipped", "skipped"], False, "failed"),  # nothing ran
        ([], False, "failed"),
    ],
)
def test_only_a_whole_run_passes(outcomes, timed_out, status):
    assert gpu.status_of_tests(tally("01", *zip("01", outcomes, strict=False)), timed_out) == status


@pytest.mark.parametrize(
    ("steps", "status"),
    [
        ({"build": "skipped", "tests": "passed", "sanitizer": "skipped", "timings": "timed out"}, 0),
        ({"tests": "passed", "timings": "failed"}, 1),
        ({"tests": "timed out", "timings": "passed"}, 1),
        ({"build": "passed", "sanitizer": "skipped"}, 1),
        ({}, 1),
    ],
)
def test_exit_status(steps, status):
    assert gpu.exit_status([Step(step, told, 1.0, "") for step, told in steps.items()]) == status


@pytest.mark.parametrize(
    ("check", "status", "log", "expected"),
    [
        ("memcheck", 0, "= ERROR SUMMARY: 0 errors", ("passed", "memcheck, 0 errors")),
        ("memcheck", 9, "= ERROR SUMMARY: 3 errors", ("failed", "memcheck, 3 errors, exit status 9")),
        ("memcheck", 0, "", ("failed", "memcheck, unknown errors, exit status 0")),  # it checked nothing
        ("memcheck", 1, "Device not supported", ("skipped", "compute-sanitizer does not work on this machine")),
        ("memcheck", None, "", ("timed out", "memcheck, at its limit")),
        ("racecheck", 0, "= RACECHECK SUMMARY: 0 hazards (0 errors, 0 warnings)", ("passed", "racecheck, 0 errors")),
        ("racecheck", 9, "= RACECHECK SUMMARY: 2 hazards", ("failed", "racecheck, 2 errors, exit status 9")),
    ],
)
def test_what_the_sanitizer_said(check, status, log, expected):
    assert gpu.sanitizer_status(check, status, log) == expected


def test_both_tools_of_the_sanitizer_run(monkeypatch, tmp_path):
    """A script in their place, which runs the program that it is given."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text('#!/bin/sh\necho "========= ERROR SUMMARY: 0 errors ($2)"\nshift 4\nexec "$@"\n')
    monkeypatch.setattr(gpu, "SANITIZED", "print('ran')")
    assert gpu.sanitize(60, tmp_path / "log", None) == ("skipped", "compute-sanitizer not found")
    tool.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    tool.parent.joinpath("bin").symlink_to(tmp_path)
    assert gpu.sanitize(60, tmp_path / "log", None) == ("passed", "memcheck, 0 errors; racecheck, 0 errors")
    assert (tmp_path / "racecheck.log").read_text().splitlines()[1:] == ["ran"]
    monkeypatch.setattr(gpu, "SANITIZED", "1 / 0")
    assert gpu.sanitize(60, tmp_path / "log", None)[0] == "failed"


def test_a_share_is_every_nth_chosen_test_and_outcomes_are_told_as_they_come(tmp_path):
    lines = "import pytest", "def test_other(): pass", "@pytest.mark.parametrize('i', range(5))"
    (tmp_path / "test_file.py").write_text("\n".join([*lines, "def test_some(i): assert i != 3, 'three'"]))
    command = [sys.executable, "-m", "pytest", "-p", "bench.shard", "-k", "test_some", "--shard=1/2", "--outcomes=told"]
    subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(measure.ROOT)}, capture_output=True)
    selected, *events = map(json.loads, (tmp_path / "told").read_text().splitlines())
    assert [test.split("[")[1] for test in selected["tests"]] == ["1]", "3]"]
    told = [(event["event"], event["test"], event.get("outcome")) for event in events]
    first, second = selected["tests"]
    assert told[:2] == [("started", first, None), ("outcome", first, "passed")]
    assert told[2:] == [("started", second, None), ("outcome", second, "failed")] and "three" in events[-1]["message"]


def test_after_a_lost_device_the_next_process_goes_on_behind_the_test(monkeypatch, tmp_path):
    lost = "raise RuntimeError('CUDA error: an illegal memory access was encountered')"
    bodies = {"first": "pass", "losing": lost, "last": "pytest.skip('no time')"}
    lines = [
        "import pytest",
        "pytestmark = pytest.mark.gpu",
        *(f"def test_{x}(): {body}" for x, body in bodies.items()),
    ]
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_file.py").write_text("\n".join(lines))
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    monkeypatch.setenv("PYTHONPATH", str(measure.ROOT))
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "MAX_SHARDS", 1)
    results, log = Record({}, {}, []), tmp_path / "log"
    assert gpu.run_tests("tests", "not configuration", 100, log, results) == ("failed", "1 of 3 passed")
    found = results.tests["tests"]
    assert (found.selected, found.passed, found.failed, found.skipped, found.unfinished) == (3, 1, 1, 1, [])
    assert [x["test"].split("_")[-1] for x in found.failures] == ["losing"] and "share 0" in log.read_text()


def test_a_limit_ends_a_command_and_its_children(tmp_path, capfd):
    """And what it printed until then is shown."""
    program = "import subprocess, time; print('begun'); p = subprocess.Popen(['sleep', '99']); print(p.pid); p.wait()"
    assert gpu.run(["-c", program], tmp_path / "log", 6) is None
    begun, child = (tmp_path / "log").read_text().split()
    assert begun == "begun" and "begun" in capfd.readouterr().out
    state = Path(f"/proc/{child}/stat")
    for _ in range(100):  # killed, it dies when it is next scheduled
        with contextlib.suppress(OSError):
            if state.read_text().split()[2] != "Z":
                time.sleep(0.1)
                continue
        return
    pytest.fail(state.read_text())


def test_timings_are_read_with_what_is_missing(monkeypatch, tmp_path):
    """The second of three runs fails, the third has no time left; then none fails; then the first call does."""
    timed = Record({}, {"copy GB/s": 1.0}, [made_up("labels", "64x128", "fwd", {"sdpa flash": 3.0})])

    def timings(results: Record, *statuses: int | None, first: int = 0) -> tuple[str, str]:
        left = iter(statuses)

        def instead(command, log, limit, **more):
            if "--first-call" in command:
                log.write_text('compiled\n{"first forward": 2.0}' if first == 0 else "no device")
                return first
            if first == 0:
                timed.write(Path(command[command.index("--out") + 1]))
            return next(left)

        monkeypatch.setattr(gpu, "run", instead)
        return gpu.time_everything(100, tmp_path / "timings.log", results)

    monkeypatch.setattr(gpu, "TIMINGS", gpu.TIMINGS[:3])
    results = Record({}, {}, [])
    assert timings(results, 0, 1, None) == ("failed", "1 cases, see timings.log")
    assert results.cases == timed.cases and results.ceilings == timed.ceilings
    assert results.first_call == {"first forward": 2.0} and not results.notes
    assert timings(results, 0, None, None) == ("timed out", "1 cases")
    assert timings(broken := Record({}, {}, []), 1, 1, 1, first=1) == ("failed", "0 cases, see timings.log")
    assert broken.notes == ["The first call failed: no device"]


def test_every_goal_is_measured():
    parser = run.arguments()
    measured = set()
    for arguments, peers in gpu.TIMINGS:
        options = parser.parse_args([*f"{gpu.TIMED} {arguments}".split(), "--peers", *peers])
        measured |= {(x.inputs, x.tokens, mode, peer) for _, x, mode in run.to_do(parser, options) for peer in peers}
        assert options.dim == [256] and options.dtype == "bfloat16" and options.impl == ["triton", "cuda"]
    for goal in goals.GOALS:
        for peer in goal.peers or gpu.PEERS:
            assert (goal.inputs, goal.tokens, goal.mode, peer) in measured


def made_up(inputs: str, size: str, mode: str, peers: dict[str, float], active: float = 0.2, **more) -> Case:
    """Return a case in which asa takes 1 ms as called and 0.5 ms in graph replays. Nothing of this was measured."""
    methods = {"asa triton": Method([1e-3, 1.1e-3, 1e-3], graph=[5e-4] * 3)}
    methods |= {x: Method([1e-3 * ms, 1.1e-3 * ms, 1e-3 * ms], graph=[1e-3 * ms] * 3) for x, ms in peers.items()}
    sparsity = {"survivors": 328, "density": 0.04, "active": active}
    return Case("asa", size, 256, 1, 1, "bfloat16", inputs, None, mode, "", sparsity, ["asa triton"], methods, **more)


def verdict(case: Case, text: str = "over the best dense attention") -> goals.Verdict:
    found = [goal for goal in goals.GOALS if goal.text.startswith(text) and goal.inputs == case.inputs]
    return goals.judge(next(x for x in found if (x.tokens, x.mode) == (case.tokens, case.mode)), [case])


@pytest.mark.parametrize(
    ("ms", "active", "expected"),
    [
        (1.5, 0.2, "met"),
        (1.49, 0.2, "met in graph replay only"),
        (0.5, 0.2, "MISSED"),
        (0.5, 0.77, "does not apply: 77.0 % of the tiles are active"),
    ],
)
def test_verdicts_on_ratios(ms, active, expected):
    """To the fastest peer, rounds compared with each other; what failed is not a verdict."""
    case = made_up("labels", "64x128", "fwd", {"sdpa flash": 3.0, "sdpa cudnn": ms}, active)
    case.methods["sdpa efficient"] = Method(error="RuntimeError: no kernel")
    assert verdict(case)[2:] == (f"{ms:.2f} x, graph {2 * ms:.2f} x", expected)
    for name in ("sdpa cudnn", "sdpa flash", "asa triton"):
        case.methods[name] = Method(error=f"RuntimeError: {name}")
    failed = [f"{x}: {case.methods[x].error}" for x in ("asa triton", "sdpa flash", "sdpa cudnn", "sdpa efficient")]
    assert verdict(case).verdict == f"not measured ({'; '.join(failed)})"
    assert goals.judge(goals.GOALS[0], []).verdict == "not measured"


def test_verdicts_on_rates():
    kernels = {"dq": Kernel(1e-3, 1, 2 * 10**11), "dk": Kernel(1e-3, 1, 4 * 10**11), "lists": Kernel(1e-3, 2)}
    case = made_up("dense", "64x128", "fwd+bwd", {}, kernels=kernels)
    assert goals.rate(case, goals.BACKWARD) == pytest.approx(300)
    assert verdict(case, "backward").verdict == "MISSED"
    kernels["dq"] = Kernel(1e-3, 1, 3 * 10**11)
    assert verdict(case, "backward") == ("backward, TFLOP/s: dense, N = 8192, fwd+bwd", ">= 350", "350", "met")
    assert verdict(dataclasses.replace(case, kernels={}), "backward").verdict == "not measured"


def test_summary_names_misses_failures_and_what_is_missing(tmp_path):
    cases = [
        made_up("labels", "64x128", "fwd", {"sdpa flash": 0.4, "eager": 9.0}, kernels={"dq": Kernel(1e-5, 2)}),
        made_up("dense", "64x128", "fwd", {"sdpa flash": 0.7}, active=1.0),
        made_up("labels", "64x128", "fwd", {"flex": 2.0, "flex + mask": 6.0}),
    ]
    cases[0].methods["sdpa cudnn"] = Method(error="RuntimeError: no | kernel")
    results = Record({"device": "Made-up Card", "torch": "0.0"}, {"copy GB/s": 3000.0}, cases, ["how it was measured"])
    results.first_call = {"first forward": 12.345}
    results.steps = [Step("build", "skipped", 1.0, "no C++ extension"), Step("tests", "failed", 99.0, "1 of 3 passed")]
    results.steps.append(Step("timings", "timed out", 99.0, "3 cases"))
    more = [(str(i), "failed") for i in range(goals.SHOWN)]
    results.tests = {"tests": tally("abc", ("a", "passed"), ("b", "failed", "x | y"), *more)}
    results.write(tmp_path / "results.json")
    text = goals.render(record.read(tmp_path / "results.json"))
    assert text.startswith("# asa_ops on Made-up Card\n")
    head = text.split("\n\n")[1]
    assert "tests failed (1 of 3 passed); timings timed out (3 cases)" in head and "build skipped" in head
    assert "goals: 2 met, 1 MISSED, " in head and "not measured" in head
    for part in (
        "- over the best dense attention: labels, N = 8192, fwd: 0.40 x, graph 0.80 x, wanted >= 1.5 x",
        "| labels | 64x128 | 256 | fwd | 1.000 | 2.50 (2.50-2.50) | 0.11 (0.11-0.11) | - | - |",
        "| labels | 64x128 | 256 | fwd | 0.500 | 1.25 (1.25-1.25) | 0.06 (0.06-0.06) | - | - |",
        "| labels | 64x128 | 256 | fwd | dq | 2 | 10.0 | - |",
    ):
        assert part in text
    assert "- `b`: x | y" in text and "- and 2 more, in results.json" in text
    assert "- sdpa cudnn failed: RuntimeError: no | kernel" in text
    assert "copy GB/s: 3000" in text and "first forward 12.35 s" in text and "how it was measured" in text
    for block in text.split("\n\n"):
        assert not block.startswith("|") or len({row.count("|") for row in block.strip().split("\n")}) == 1, block


def test_summary_of_nothing():
    assert goals.render(Record({}, {}, [])) == "# asa_ops on no GPU\n\n**no goal was measured.**\n"
    passed = goals.headline([Step("build", "passed", 1.0, "")], [])
    assert passed == "every step passed; no goal was measured"
    assert record.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


def test_the_command_shares_its_time_writes_after_every_step_and_keeps_the_summary(monkeypatch, tmp_path, capsys):
    """Every step takes 10 s here: what it leaves, later ones get by their shares."""
    limits = {}
    monkeypatch.setattr(time, "monotonic", lambda: 10.0 * len(limits))
    monkeypatch.setattr(report, "FOLDER", tmp_path / "kept")
    report.FOLDER.mkdir()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    monkeypatch.setattr(measure, "environment", lambda device: {"device": "A GPU"})

    def step(name, limit, log, results):
        assert len(results.steps) == len(limits)
        limits[name] = limit
        return "passed", "all"

    monkeypatch.setattr(gpu, "RUN", {name: functools.partial(step, name) for name in gpu.SECONDS})
    with pytest.raises(SystemExit, match="0"):
        gpu.main(["--out", str(tmp_path / "out"), "--only", "timings,build,tests", "--keep"])
    assert limits == {"build": 535 * 60 / 440, "tests": 525 * 150 / 380, "timings": 515}
    written = record.read(tmp_path / "out" / "results.json")
    assert [(x.step, x.status) for x in written.steps] == [(name, "passed") for name in ("build", "tests", "timings")]
    assert written.environment["date"].endswith("+00:00")
    assert {path.name for path in report.FOLDER.iterdir()} == {"a-gpu-summary.md", "a-gpu-summary.json"}
    assert (report.FOLDER / "a-gpu-summary.md").read_text() == goals.render(written)
    assert "=== timings passed" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_so(tmp_path, capsys):
    with pytest.raises(SystemExit, match=r"^bench.gpu needs a CUDA device: torch .* finds none$"):
        gpu.main(["--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit, match="2"):
        gpu.main(["--only", "build,magic"])
    assert "got magic" in capsys.readouterr().err
