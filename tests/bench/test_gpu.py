"""What the GPU suite makes of tests, logs and measurements. Needs no GPU."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import goals, gpu, measure, record, run, shard
from bench.record import Case, Kernel, Method, Record, Step

# Steps and tests.


def test_steps_share_the_budget_and_what_others_leave():
    steps, left = list(gpu.SECONDS), 540.0
    limits = []
    for i, step in enumerate(steps):
        limits.append(gpu.seconds_for(step, steps[i + 1 :], left))
        left -= limits[-1]
    shares = [540 * share / sum(gpu.SECONDS.values()) for share in gpu.SECONDS.values()]
    assert left == pytest.approx(0) and limits == pytest.approx(shares)
    assert gpu.seconds_for("timings", [], 200) == 200


def line(**event) -> str:
    return json.dumps(event)


def outcome(test: str, outcome: str, message: str = "") -> str:
    return line(event="outcome", test=test, outcome=outcome, seconds=1.0, message=message)


def test_outcomes_are_counted_and_what_never_ended_is_named():
    lines = [line(event="selected", tests=["a", "b"]), line(event="selected", tests=["c", "d", "e"])]
    lines += [line(event="started", test="a"), outcome("a", "passed"), outcome("a", "error", "in teardown")]
    lines += [outcome("b", "passed"), outcome("c", "failed", "wrong"), outcome("d", "skipped", "no GPU")]
    lines += [line(event="started", test="e")]
    counts = gpu.tally(lines)
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
    lines = [line(event="selected", tests=["0", "1"])] + [outcome(str(i), x) for i, x in enumerate(outcomes)]
    assert gpu.status_of_tests(gpu.tally(lines), timed_out) == status


def test_exit_status():
    def status(**steps):
        return gpu.exit_status([Step(step, status, 1.0, "") for step, status in steps.items()])

    assert status(build="skipped", tests="passed", sanitizer="skipped", timings="timed out") == 0
    assert status(tests="passed", timings="failed") == 1
    assert status(tests="timed out", timings="passed") == 1
    assert status(build="passed", sanitizer="skipped") == status() == 1


def test_what_the_sanitizer_said():
    def status(*said):
        return gpu.sanitizer_status("memcheck", *said)

    assert status(0, "========= ERROR SUMMARY: 0 errors")[0] == "passed"
    assert status(9, "========= ERROR SUMMARY: 3 errors") == ("failed", "memcheck, 3 errors, exit status 9")
    assert status(0, "")[0] == "failed"  # it checked nothing
    assert status(1, "========= Error: Device not supported")[0] == "skipped"
    assert status(None, "")[0] == "timed out"
    clean, hazards = (f"========= RACECHECK SUMMARY: {n} hazards displayed ({n} errors, 0 warnings)" for n in (0, 2))
    assert gpu.sanitizer_status("racecheck", 0, clean) == ("passed", "racecheck, 0 errors")
    assert gpu.sanitizer_status("racecheck", 9, hazards)[0] == "failed"


def test_both_tools_of_the_sanitizer_run(monkeypatch, tmp_path):
    """A script in their place, which runs the program that it is given."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text('#!/bin/sh\necho "========= ERROR SUMMARY: 0 errors ($2)"\nshift 4\nexec "$@"\n')
    monkeypatch.setenv("PATH", os.environ["PATH"])
    monkeypatch.setattr(gpu, "SANITIZED", "print('ran')")
    assert gpu.sanitize(60, tmp_path / "log", None) == ("skipped", "compute-sanitizer not found")
    tool.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    tool.parent.joinpath("bin").symlink_to(tmp_path)
    assert gpu.sanitize(60, tmp_path / "log", None) == ("passed", "memcheck, 0 errors; racecheck, 0 errors")
    assert (tmp_path / "racecheck.log").read_text().splitlines()[1:] == ["ran"]
    monkeypatch.setattr(gpu, "SANITIZED", "1 / 0")
    assert gpu.sanitize(60, tmp_path / "log", None)[0] == "failed"


def share(folder, outcomes, which="0/1", chosen="test"):
    """Run a share of the tests in a folder; return pytest's exit status and what was told."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "bench.shard", "-p", "no:cacheprovider", "-k", chosen]
    command += [f"--shard={which}", f"--outcomes={outcomes}", str(folder)]
    environment = os.environ | {"PYTHONPATH": str(measure.ROOT)}
    status = subprocess.run(command, cwd=folder, env=environment, capture_output=True, check=False).returncode
    return status, [json.loads(line) for line in outcomes.read_text().splitlines()]


def test_a_share_is_every_nth_chosen_test_and_outcomes_are_told_as_they_come(tmp_path):
    (tmp_path / "test_file.py").write_text(
        "import pytest\n"
        "def test_other():\n    pass\n"
        "@pytest.mark.parametrize('i', range(5))\n"
        "def test_some(i):\n    assert i != 3, 'three'\n"
    )
    _, events = share(tmp_path, tmp_path / "outcomes.jsonl", "1/2", "test_some")
    assert [event["event"] for event in events] == ["selected", "started", "outcome", "started", "outcome"]
    assert [event["outcome"] for event in events if event["event"] == "outcome"] == ["passed", "failed"]
    assert events[0]["tests"] == [events[1]["test"], events[3]["test"]] and "three" in events[-1]["message"]
    assert [test.split("[")[1] for test in events[0]["tests"]] == ["1]", "3]"]


def test_after_a_lost_device_the_next_process_goes_on_behind_the_test(monkeypatch, tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    (tmp_path / "tests" / "test_file.py").write_text(
        "import pytest\npytestmark = pytest.mark.gpu\n"
        "def test_first():\n    pass\n"
        "def test_losing():\n    raise RuntimeError('CUDA error: an illegal memory access was encountered')\n"
        "def test_last():\n    pytest.skip('no time')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(measure.ROOT))
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "MAX_SHARDS", 1)
    results = Record({}, {}, [])
    assert gpu.run_tests("tests", "not configuration", 100, tmp_path / "log", results) == ("failed", "1 of 3 passed")
    found = results.tests["tests"]
    assert (found.selected, found.passed, found.failed, found.skipped, found.unfinished) == (3, 1, 1, 1, [])
    assert [x["test"].split("_")[-1] for x in found.failures] == ["losing"] and "share 0" in (
        tmp_path / "log"
    ).read_text()


def test_a_limit_ends_a_command_and_its_children(tmp_path, capfd):
    """And what it printed until then is shown."""
    program = "import subprocess, time; print('begun'); p = subprocess.Popen(['sleep', '99']); print(p.pid); p.wait()"
    assert gpu.run(["-c", program], tmp_path / "log", 6) is None
    begun, child = (tmp_path / "log").read_text().split()
    assert begun == "begun" and "begun" in capfd.readouterr().out
    state = Path(f"/proc/{child}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"


# Timings.


def test_timings_are_read_with_what_is_missing(monkeypatch, tmp_path):
    """The second of three runs fails, the third has no time left."""
    timed = Record({}, {"copy GB/s": 1.0}, [made_up("labels", "64x128", "fwd", {"sdpa flash": 3.0})])
    statuses = iter([0, 1, None])

    def instead(command, log, limit, **more):
        log.write_text('compiled\n{"first forward": 2.0}' if "--first-call" in command else "")
        if "--out" in command:
            timed.write(Path(command[command.index("--out") + 1]))
        return 0 if "--first-call" in command else next(statuses)

    monkeypatch.setattr(gpu, "run", instead)
    monkeypatch.setattr(gpu, "TIMINGS", gpu.TIMINGS[:3])
    results = Record({}, {}, [])
    assert gpu.time_everything(100, tmp_path / "timings.log", results) == ("failed", "1 cases, see timings.log")
    assert results.cases == timed.cases and results.ceilings == timed.ceilings
    assert results.first_call == {"first forward": 2.0} and not results.notes
    statuses = iter([0, None, None])
    assert gpu.time_everything(100, tmp_path / "timings.log", results) == ("timed out", "1 cases")
    monkeypatch.setattr(gpu, "run", lambda command, log, limit, **more: log.write_text("no device"))
    assert gpu.time_everything(100, tmp_path / "timings.log", Record({}, {}, [])) == (
        "failed",
        "0 cases, see timings.log",
    )


def test_every_goal_is_measured():
    parser = run.argparse.ArgumentParser()
    run.arguments_of(parser)
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


def verdict(case: Case, text: str) -> goals.Verdict:
    found = [goal for goal in goals.GOALS if goal.text.startswith(text) and goal.inputs == case.inputs]
    return goals.judge(next(x for x in found if (x.tokens, x.mode) == (case.tokens, case.mode)), [case])


DENSE = "over the best dense attention"


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
    """To the fastest peer, rounds compared with each other."""
    case = made_up("labels", "64x128", "fwd", {"sdpa flash": 3.0, "sdpa cudnn": ms}, active)
    case.methods["sdpa efficient"] = Method(error="RuntimeError: no kernel")
    assert verdict(case, DENSE).verdict == expected
    assert verdict(case, DENSE).measured == f"{ms:.2f} x, graph {2 * ms:.2f} x"


def test_what_failed_is_not_a_verdict():
    case = made_up("labels", "64x128", "fwd", {"sdpa flash": 2.0})
    assert goals.judge(goals.GOALS[0], []).verdict == "not measured"
    case.methods["sdpa flash"] = Method(error="RuntimeError: no kernel")
    assert verdict(case, DENSE).verdict == "not measured (sdpa flash: RuntimeError: no kernel)"
    case.methods["asa triton"] = Method(error="RuntimeError: broken")
    assert "asa triton: RuntimeError: broken" in verdict(case, DENSE).verdict


def test_verdicts_on_rates():
    kernels = {"dq": Kernel(1e-3, 1, 2 * 10**11), "dk": Kernel(1e-3, 1, 4 * 10**11), "lists": Kernel(1e-3, 2)}
    case = made_up("dense", "64x128", "fwd+bwd", {}, kernels=kernels)
    assert goals.rate(case, goals.BACKWARD) == pytest.approx(300)
    assert verdict(case, "backward").verdict == "MISSED"
    kernels["dq"] = Kernel(1e-3, 1, 3 * 10**11)
    assert verdict(case, "backward") == ("backward, TFLOP/s: dense, N = 8192, fwd+bwd", ">= 350", "350", "met")
    assert verdict(dataclasses.replace(case, kernels={}), "backward").verdict == "not measured"


def test_summary_names_misses_failures_and_what_is_missing(tmp_path):
    steps = [("build", "skipped", 1.0, "no C++ extension"), ("tests", "failed", 99.0, "1 of 3 passed")]
    tests = [line(event="selected", tests=["a", "b", "c"]), outcome("a", "passed"), outcome("b", "failed", "x | y")]
    cases = [
        made_up("labels", "64x128", "fwd", {"sdpa flash": 0.4, "eager": 9.0}, kernels={"dq": Kernel(1e-5, 2)}),
        made_up("dense", "64x128", "fwd", {"sdpa flash": 0.7}, active=1.0),
        made_up("labels", "64x128", "fwd", {"flex": 2.0, "flex + mask": 6.0}),
    ]
    cases[0].methods["sdpa cudnn"] = Method(error="RuntimeError: no | kernel")
    results = Record({"device": "Made-up Card", "torch": "0.0"}, {"copy GB/s": 3000.0}, cases, ["how it was measured"])
    results.first_call = {"first forward": 12.345}
    results.steps = [Step(*step) for step in [*steps, ("timings", "timed out", 99.0, "3 cases")]]
    results.tests = {"tests": gpu.tally([*tests, *(outcome(f"{i}", "failed") for i in range(goals.SHOWN))])}
    results.write(tmp_path / "results.json")
    text = goals.render(record.read(tmp_path / "results.json"))
    assert text.startswith("# asa_ops on Made-up Card\n")
    head = text.split("\n\n")[1]
    assert "tests failed (1 of 3 passed); timings timed out (3 cases)" in head and "build skipped" in head
    assert "goals: 2 met, 1 MISSED, " in head and "not measured" in head
    assert "- over the best dense attention: labels, N = 8192, fwd: 0.40 x, graph 0.80 x, wanted >= 1.5 x" in text
    assert "- `b`: x | y" in text and "- and 2 more, in results.json" in text
    assert "- sdpa cudnn failed: RuntimeError: no | kernel" in text
    assert "copy GB/s: 3000" in text and "first forward 12.35 s" in text and "how it was measured" in text
    assert "| labels | 64x128 | 256 | fwd | 1.000 | 2.50 (2.50-2.50) | 0.11 (0.11-0.11) | - | - |" in text
    assert "| labels | 64x128 | 256 | fwd | 0.500 | 1.25 (1.25-1.25) | 0.06 (0.06-0.06) | - | - |" in text
    assert "| labels | 64x128 | 256 | fwd | dq | 2 | 10.0 | - |" in text
    for block in text.split("\n\n"):
        if block.startswith("|"):
            assert len({row.count("|") for row in block.strip().split("\n")}) == 1, block


def test_summary_of_nothing():
    assert goals.render(Record({}, {}, [])) == "# asa_ops on no GPU\n\n**no goal was measured.**\n"
    passed = goals.headline([Step("build", "passed", 1.0, "")], [])
    assert passed == "every step passed; no goal was measured"
    assert record.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


# The command.


def test_the_command_writes_after_every_step_and_keeps_the_summary(monkeypatch, tmp_path, capsys):
    kept = tmp_path / "bench" / "results"
    kept.mkdir(parents=True)
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    monkeypatch.setattr(measure, "environment", lambda device: {"device": "A GPU"})
    monkeypatch.setattr(gpu, "RUN", {"build": lambda *args: ("passed", ""), "timings": lambda *args: ("passed", "all")})
    with pytest.raises(SystemExit, match="0"):
        gpu.main(["--out", str(tmp_path / "out"), "--only", "timings,build", "--keep"])
    written = record.read(tmp_path / "out" / "results.json")
    assert [(x.step, x.status) for x in written.steps] == [("build", "passed"), ("timings", "passed")]
    assert written.environment["date"].endswith("+00:00")
    assert {path.name for path in kept.iterdir()} == {"a-gpu-summary.md", "a-gpu-summary.json"}
    assert (kept / "a-gpu-summary.md").read_text() == goals.render(written)
    assert "=== timings passed" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_so(tmp_path, capsys):
    with pytest.raises(SystemExit, match=r"^bench.gpu needs a CUDA device: torch .* finds none$"):
        gpu.main(["--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit, match="2"):
        gpu.main(["--only", "build,magic"])
    assert "got magic" in capsys.readouterr().err
