"""What the GPU suite makes of tests, logs and measurements. Needs no GPU."""

import contextlib
import dataclasses
import functools
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import simt
import torch

from bench import accounting, goals, gpu, kernels, measure, progress, record, report, run, shard, timings, workloads
from bench.record import Case, Kernel, Method, Record, Step


def tally(selected: str, *outcomes: tuple[str, ...]) -> record.Tally:
    """Sum up what a share of some tests wrote, with outcomes (test, outcome, message)."""
    events = [{"event": "selected", "items": list(selected)}, *({"event": "started", "item": x} for x in selected)]
    for test, outcome, *message in outcomes:
        told = {"item": test, "outcome": outcome, "seconds": 1.0, "message": "".join(message)}
        events.append({"event": "outcome", **told})
    return gpu.tally(events)


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
    ("steps", "left", "status"),
    [
        ({"build": "skipped", "correct": "passed", "sanitizer": "skipped"}, False, 0),
        ({"correct": "passed", "timings": "failed"}, True, 1),
        ({"correct": "timed out", "timings": "passed"}, True, 3),
        ({"build": "passed", "sanitizer": "skipped"}, False, 1),
        ({}, False, 1),
    ],
)
def test_exit_status(steps, left, status):
    assert gpu.exit_status([Step(step, told, 1.0, "") for step, told in steps.items()], left) == status


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


@pytest.mark.slow
def test_both_tools_of_the_sanitizer_run(monkeypatch, tmp_path):
    """A script in their place, which runs the program that it is given."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text('#!/bin/sh\necho "========= ERROR SUMMARY: 0 errors ($2)"\nshift 4\nexec "$@"\n')
    monkeypatch.setattr(gpu, "SANITIZED", "print('ran')")
    assert gpu.sanitize(tmp_path / "it.jsonl", 60) == ("skipped", "compute-sanitizer not found")
    tool.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    tool.parent.joinpath("bin").symlink_to(tmp_path)
    assert gpu.sanitize(tmp_path / "it.jsonl", 60) == ("passed", "memcheck, 0 errors; racecheck, 0 errors")
    assert (tmp_path / "racecheck.log").read_text().splitlines()[1:] == ["ran"]
    monkeypatch.setattr(gpu, "SANITIZED", "1 / 0")
    assert gpu.sanitize(tmp_path / "it.jsonl", 60)[0] == "failed"


def pytest_in(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", "-p", "bench.shard", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=folder, env=os.environ | {"PYTHONPATH": str(measure.ROOT)}, capture_output=True)


@pytest.mark.slow
def test_a_share_is_every_nth_chosen_test_and_outcomes_are_told_as_they_come(tmp_path):
    """What has ended is left out, and what ended the last process has failed."""
    lines = "import pytest", "def test_other(): pass", "@pytest.mark.parametrize('i', range(5))"
    (tmp_path / "test_file.py").write_text("\n".join([*lines, "def test_some(i): assert i != 3, 'three'"]))
    chosen = "-k", "test_some", "--outcomes=told"
    pytest_in(tmp_path, *chosen, "--shard=1/2")
    selected, *events = progress.read(tmp_path / "told")
    first, second = selected["items"]
    assert [test.split("[")[1] for test in (first, second)] == ["1]", "3]"]
    told = [(event["event"], event["item"], event.get("outcome")) for event in events]
    assert told[:2] == [("started", first, None), ("outcome", first, "passed")]
    assert told[2:] == [("started", second, None), ("outcome", second, "failed")] and "three" in events[-1]["message"]
    progress.append(tmp_path / "told", event="started", item="test_file.py::test_some[2]")
    pytest_in(tmp_path, *chosen, "--shard=0/1")
    events = progress.read(tmp_path / "told")
    ended = {test.split("[")[1][0]: event["outcome"] for test, event in progress.outcomes(events).items()}
    assert ended == {"1": "passed", "3": "failed", "2": "failed", "0": "passed", "4": "passed"}
    assert not progress.left(events) and len([x for x in events if x["event"] == "outcome"]) == 5


def run_tests_of(monkeypatch, folder: Path, lines: list[str]) -> tuple[tuple[str, str], list[dict]]:
    """Return how the tests of a file end, and what was written."""
    (folder / "test_file.py").write_text("\n".join(["import os, time, pytest", "pytestmark = pytest.mark.gpu", *lines]))
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    monkeypatch.setenv("PYTHONPATH", str(measure.ROOT))
    monkeypatch.setattr(gpu, "ROOT", folder)
    monkeypatch.setattr(gpu, "MAX_SHARDS", 1)
    path = folder / "tests.jsonl"
    progress.begin(path, "now")
    return gpu.run_tests(path, 100, "not configuration", [str(folder / "test_file.py")]), progress.read(path)


def test_after_a_lost_device_the_next_process_goes_on_behind_the_test(monkeypatch, tmp_path):
    lost = "raise RuntimeError('CUDA error: an illegal memory access was encountered')"
    bodies = {"first": "pass", "losing": lost, "last": "pytest.skip('no time')"}
    result, events = run_tests_of(monkeypatch, tmp_path, [f"def test_{x}(): {body}" for x, body in bodies.items()])
    assert result == ("failed", "1 of 3 passed")
    found = gpu.tally(events)
    assert (found.selected, found.passed, found.failed, found.skipped, found.unfinished) == (3, 1, 1, 1, [])
    assert [x["test"].split("_")[-1] for x in found.failures] == ["losing"]
    assert "share 0" in (tmp_path / "tests.log").read_text()
    assert gpu.is_done([*events, {"event": "step", "status": "failed"}])


@pytest.mark.slow
def test_kernels_that_end_their_processes_stop_only_their_own_tests(monkeypatch, tmp_path):
    """One crashes; what hangs is ended the same way, by a signal."""
    lines = [
        "@pytest.mark.parametrize('kernels,i', [(x, i) for x in ('hopper', 'triton', 'cuda') for i in range(5)])",
        "def test_it(kernels, i): os.kill(os.getpid(), 14) if kernels == 'hopper' else None",
    ]
    (status, note), events = run_tests_of(monkeypatch, tmp_path, lines)
    assert (status, note) == ("failed", "10 of 15 passed")
    counts = gpu.tally(events)
    assert (counts.failed, counts.skipped, counts.skips) == (shard.HUNG, 5 - shard.HUNG, [shard.NOT_TRIED])
    ended = list(progress.outcomes(events))
    assert "triton" in ended[-1] and "cuda" in ended[-6]
    os.replace(tmp_path / "tests.jsonl", tmp_path / "correct.jsonl")
    assert "ended a process" in gpu.why_not_hopper(tmp_path)


@pytest.mark.slow
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


ROWS = """
import os, sys, time
from pathlib import Path
from bench import progress

def right():
    with open("count", "a") as file:
        file.write("x")
    return {"impl": sys.argv[3:]}

def lost():
    raise RuntimeError("CUDA error: misaligned address")

rows = {"first": right, "wrong": lambda: 1 / 0, "lost": lost, "hangs": lambda: time.sleep(99), "last": right}
progress.work(Path(sys.argv[1]), rows, 2)
"""


def test_rows_are_measured_once_whatever_some_of_them_do(monkeypatch, tmp_path):
    (tmp_path / "rows.py").write_text(ROWS)
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(measure.ROOT))
    path = tmp_path / "timings.jsonl"
    progress.begin(path, "now")
    for _ in range(2):
        status, note = gpu.measure_rows(path, 100, "rows")
        assert status == "failed" and note.startswith("2 of 5 rows; wrong: ZeroDivisionError: division by zero; lost: ")
        assert f"hangs: {progress.ENDED}" in note and not progress.left(progress.read(path))
    assert (tmp_path / "count").read_text() == "xx"
    results = {item: x.get("result") for item, x in progress.outcomes(progress.read(path)).items()}
    assert results["last"] == {"impl": list(timings.IMPLS)}
    assert timings.without_what_died(list(timings.IMPLS), path) == ["triton", "cuda"]


def test_rows_left_by_a_limit_are_done_by_the_next_call(monkeypatch, tmp_path):
    """Without the kernels for compute capability 9.0, if the hardware failed."""
    rows = "import time; time.sleep(1)" + ROWS.replace("1 / 0", "0").replace("lost, ", "right, ").replace("99", "0")
    (tmp_path / "rows.py").write_text(rows)
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(measure.ROOT))
    progress.append(tmp_path / "hardware.jsonl", event="step", status="failed")
    path = tmp_path / "timings.jsonl"
    progress.begin(path, "now")
    progress.append(path, event="selected", items=["first", "wrong", "lost", "hangs", "last"])
    progress.append(path, event="outcome", item="first", outcome="passed", seconds=1, message="", result={})
    progress.append(path, event="started", item="wrong")
    status, note = gpu.measure_rows(path, 0, "rows")
    assert status == "timed out" and note.endswith("without the kernels for 9.0: the step hardware failed")
    events = progress.begin(path, "now")
    assert len(progress.left(events)) == 4 and not progress.died(events)
    assert progress.in_order(["first", "wrong", "last"], events) == ["last", "wrong"]  # it may hang
    assert gpu.measure_rows(path, 100, "rows")[0] == "passed"
    assert progress.outcomes(progress.read(path))["last"]["result"] == {"impl": ["triton", "cuda"]}
    assert (tmp_path / "count").read_text() == "xx"
    assert progress.begin(path, "another build") == [{"event": "state", "state": "another build"}]


def test_every_goal_is_measured():
    measured = {
        (row.inputs, row.spec.tokens, row.batch, mode, peer)
        for row in timings.ROWS
        for mode in row.modes
        for peer in row.peers
        if (row.dim, row.dtype) == (256, "bfloat16")
    }
    for goal in goals.GOALS:
        for peer in [x for x in goal.peers if x in timings.SDPA or x not in goals.DENSE] or timings.SDPA:
            assert (goal.inputs, goal.tokens, goal.batch, goal.mode, peer) in measured
    names = [row.name(mode) for row in timings.ROWS for mode in row.modes]
    assert len(set(names)) == len(names) and len(timings.cases(["cuda"])) == len(names)
    for dtype, dim in ((dtype, dim) for dtype in ("bfloat16", "float16") for dim in goals.DIMS):
        assert any((x.dtype, x.dim, x.inputs, x.size) == (dtype, dim, "labels", goals.MAP) for x in timings.ROWS)


def made_up(inputs: str, size: str, mode: str, peers: dict[str, float], **more) -> Case:
    """Return a case in which asa takes 1 ms as called and 0.5 ms in graph replays. Nothing of this was measured."""
    methods = {"asa triton": Method([1e-3, 1.1e-3, 1e-3], graph=[5e-4] * 3)}
    methods |= {x: Method([1e-3 * ms, 1.1e-3 * ms, 1e-3 * ms], graph=[1e-3 * ms] * 3) for x, ms in peers.items()}
    sparsity = {"survivors": 328, "density": 0.04, "active": 0.2}
    case = Case("asa", size, 256, 1, 1, "bfloat16", inputs, None, mode, "", sparsity, ["asa triton"], methods)
    return dataclasses.replace(case, **more)


def verdict(case: Case, text: str = "over the best dense attention") -> goals.Verdict:
    found = [goal for goal in goals.GOALS if goal.text.startswith(text) and goal.inputs == case.inputs]
    wanted = case.tokens, case.mode, case.batch
    return goals.judge(next(x for x in found if (x.tokens, x.mode, x.batch) == wanted), [case])


@pytest.mark.parametrize(("ms", "expected"), [(0.75, "met"), (0.74, "MISSED")])
def test_verdicts_on_ratios(ms, expected):
    """In CUDA graphs, of the fastest of ours to the fastest peer; what failed is not a verdict."""
    case = made_up("labels", "64x128", "fwd", {"sdpa flash": 3.0, "sdpa cudnn": ms})
    case.methods["sdpa efficient"] = Method(error="RuntimeError: no kernel")
    assert verdict(case)[2:] == (f"{2 * ms:.2f} x in CUDA graphs (triton), {ms:.2f} x as called (triton)", expected)
    case.methods["asa hopper"] = Method([2e-3] * 3, graph=[2.5e-4] * 3)
    case.ours.append("asa hopper")
    assert verdict(case)[2:] == (f"{4 * ms:.2f} x in CUDA graphs (hopper), {ms:.2f} x as called (triton)", "met")
    case.ours.pop()
    for name in ("sdpa cudnn", "sdpa flash", "asa triton"):
        case.methods[name] = Method(error=f"RuntimeError: {name}")
    failed = [f"{x}: {case.methods[x].error}" for x in ("asa triton", "sdpa flash", "sdpa cudnn", "sdpa efficient")]
    assert verdict(case).verdict == f"not measured ({'; '.join(failed)})"
    assert goals.judge(goals.GOALS[0], []).verdict == "not measured"


def test_verdicts_tell_batches_dims_and_dtypes_apart_and_take_calls_where_there_are_no_graphs():
    case = made_up("labels", "64x128", "fwd", {"sdpa flash": 0.5}, batch=4)
    assert verdict(case).goal == "over the best dense attention: labels, N = 8192, 4 images, fwd"
    assert verdict(case).verdict == "met"
    for change in ({"batch": 1}, {"dim": 64}, {"dtype": "float16"}):
        goal = next(x for x in goals.GOALS if x.batch == 4 and x.mode == "fwd")
        assert goals.judge(goal, [dataclasses.replace(case, **change)]).verdict == "not measured"
    eager = made_up("labels", "97x97", "fwd", {"eager": 20.0})
    eager.methods["eager"].graph = []
    assert verdict(eager, "over the published")[2:] == ("20.00 x as called (triton)", "met")


def test_verdicts_on_rates():
    kernels = {"dq": Kernel(1e-3, 1, 2 * 10**11), "dk": Kernel(1e-3, 1, 4 * 10**11), "lists": Kernel(1e-3, 2)}
    case = made_up("dense", "64x128", "fwd+bwd", {}, kernels=kernels)
    assert goals.rate(case, goals.BACKWARD) == pytest.approx(300)
    assert verdict(case, "Triton, backward").verdict == "MISSED"
    kernels["dq"] = Kernel(1e-3, 1, 3 * 10**11)
    name = "Triton, backward, TFLOP/s: dense, N = 8192, fwd+bwd"
    assert verdict(case, "Triton, backward") == (name, ">= 350", "350", "met")
    assert verdict(dataclasses.replace(case, kernels={}), "Triton, backward").verdict == "not measured"


def test_summary_names_misses_failures_and_what_is_missing(tmp_path):
    cases = [
        made_up("labels", "64x128", "fwd", {"sdpa flash": 0.4, "eager": 9.0}, kernels={"dq": Kernel(1e-5, 2)}),
        made_up("dense", "64x128", "fwd", {"sdpa flash": 0.7}),
        made_up("labels", "64x128", "fwd", {"flex": 2.0, "flex + mask": 6.0}),
        made_up("labels", "64x128", "fwd", {"sdpa flash": 77.0}, dtype="float16"),
    ]
    cases[0].methods["sdpa cudnn"] = Method(error="RuntimeError: no | kernel")
    results = Record({"device": "Made-up Card", "torch": "0.0"}, {"copy GB/s": 3000.0}, cases, ["how it was measured"])
    results.first_call = {"first forward": 12.345}
    results.steps = [Step("build", "skipped", 1.0, "no C++ extension"), Step("tests", "failed", 99.0, "1 of 3 passed")]
    results.steps.append(Step("timings", "timed out", 99.0, "3 cases"))
    results.left = {"timings": "7 of 10", "sanitizer": "not begun"}
    more = [(str(i), "failed") for i in range(goals.SHOWN)]
    results.tests = {"tests": tally("abc", ("a", "passed"), ("b", "failed", "x | y"), *more)}
    results.write(tmp_path / "results.json")
    text = goals.render(record.read(tmp_path / "results.json"))
    assert text.startswith("# asa_ops on Made-up Card\n")
    head = text.split("\n\n")[1]
    assert "tests failed (1 of 3 passed); timings timed out (3 cases)" in head and "build skipped" in head
    assert "left to another call: timings, sanitizer; goals: 2 met, 1 MISSED, " in head and "not measured" in head
    for part in (
        "- over the best dense attention: labels, N = 8192, fwd: 0.80 x in CUDA graphs (triton), 0.40 x as called",
        "| labels | 64x128 | 256 | fwd | 1.000 | 2.50 (2.50-2.50) | 0.11 (0.11-0.11) | - | - |",
        "| labels | 64x128 | 256 | fwd | 0.500 | 1.25 (1.25-1.25) | 0.06 (0.06-0.06) | - | - |",
        "| labels | 64x128 | 256 | fwd | dq | 2 | 10.0 | - |",
        "- timings: 7 of 10\n- sanitizer: not begun",
    ):
        assert part in text
    assert "- `b`: x | y" in text and "- and 2 more, in results.json" in text
    assert "- sdpa cudnn failed: RuntimeError: no | kernel" in text and "77" not in text.split("## Times")[-1]
    assert "copy GB/s: 3000" in text and "first forward 12.35 s" in text and "how it was measured" in text
    for block in text.split("\n\n"):
        assert not block.startswith("|") or len({row.count("|") for row in block.strip().split("\n")}) == 1, block


def test_what_auto_may_take_is_right_and_fastest_in_both_modes():
    cases = [made_up("labels", "64x128", mode, {}) for mode in ("fwd", "fwd+bwd")]
    for case in cases:
        case.methods["asa hopper"] = Method([1e-3] * 3, graph=[4e-4] * 3)
        case.ours.append("asa hopper")
    counts = {"cases": 9, "passed": 7, "skipped": 2}
    correct = {
        "hopper bfloat16 256": counts,
        "triton bfloat16 256": {**counts, "passed": 6},
        "hopper float16 64": counts,
    }
    results = Record({}, {}, cases, correct=correct)
    right = "hopper: all (7 of 9, 2 skipped), triton: NOT ALL (6 of 9, 2 skipped)"
    times = "hopper, 0.400 ms | hopper, 0.400 ms"
    assert f"| bfloat16 | 256 | {right} | {times} | hopper |" in goals.render(results)
    assert (
        "| float16 | 64 | hopper: all (7 of 9, 2 skipped) | not measured | not measured | no change |"
        in goals.render(results)
    )
    cases[1].methods["asa hopper"].graph = [6e-4] * 3
    assert "| hopper, 0.400 ms | triton, 0.500 ms | no change |" in goals.render(results)
    results.correct["hopper bfloat16 256"] = {**counts, "passed": 0, "skipped": 9}
    assert "| hopper |" not in goals.render(results)


def test_summary_of_nothing():
    assert goals.render(Record({}, {}, [])) == "# asa_ops on no GPU\n\n**no goal was measured.**\n"
    steps = [Step("build", "passed", 1.0, "")]
    assert goals.headline(Record({}, {}, [], steps=steps), []) == "every step passed; no goal was measured"
    some = goals.headline(Record({}, {}, [], steps=steps, left={"tests": "not begun"}), [])
    assert some == "every step that ran passed; left to another call: tests; no goal was measured"
    assert record.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


# The steps, without a GPU.

LINES = ("copies of one barrier ok", "a ring of one slot ok", "a pipeline ok")


@pytest.fixture
def card(monkeypatch, tmp_path):
    """Return a function that has a program stand for nvcc and for what it compiles, on a card of some capability."""

    def card(*body: str, capability: tuple[int, int] = (9, 0), compiles: bool = True) -> Path:
        program = "\n".join(["#!/bin/sh", *body])
        (tmp_path / "compiled").write_text(program)
        copies = f'for out; do :; done; cp {tmp_path}/compiled "$out"; chmod 755 "$out"'
        (tmp_path / "nvcc").write_text("\n".join(["#!/bin/sh", copies if compiles else "exit 1"]))
        (tmp_path / "nvcc").chmod(0o755)
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))
        monkeypatch.setenv("PATH", os.defpath)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        path = tmp_path / "hardware.jsonl"
        (tmp_path / "hardware").unlink(missing_ok=True)
        progress.begin(path, " ".join(body))
        return path

    (tmp_path / "bin").symlink_to(tmp_path)
    return card


def test_the_extension_is_built_if_sources_are_newer_or_it_is_for_another_card(monkeypatch, tmp_path):
    asked, statuses = [], [0, 1, 0, None, 1]
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(
        gpu, "run", lambda command, *args, **more: (asked.append((command[0], more)), statuses.pop(0))[1]
    )
    source, built = tmp_path / "csrc/cuda/op.cu", tmp_path / "asa_ops/_C.abi3.so"
    for path in (source, built):
        path.parent.mkdir(parents=True)
        path.write_text("")
    os.utime(source, (1, 1))
    path = tmp_path / "build.jsonl"
    assert gpu.build(path, 9) == ("passed", "was built before") and asked.pop() == ("-c", {})
    assert gpu.build(path, 9) == ("passed", "")
    assert asked[1:] == [("setup.py", {"ASA_OPS_CUDA_ARCHS": "90a"})]
    os.utime(built, (0, 0))
    assert [gpu.build(path, 9)[0] for _ in range(2)] == ["timed out", "failed"] and len(asked) == 4


@pytest.mark.slow  # it compiles what test_hardware.py does too
def test_what_the_hardware_said(card, monkeypatch):
    printed = [f"echo '{line}'" for line in LINES]
    path = card(*printed)
    assert gpu.hardware(path, 60) == ("passed", "3 of 3 right")
    assert list(progress.outcomes(progress.read(path))) == [line.removesuffix(" ok") for line in LINES]
    compiled = (path.parent / "hardware").stat().st_mtime_ns
    assert gpu.hardware(path, 60)[0] == "passed" and (path.parent / "hardware").stat().st_mtime_ns == compiled
    path = card(*printed, "echo 'm64n64    WRONG'", "exit 1")
    assert gpu.hardware(path, 60) == ("failed", "3 of 4 right, exit status 1: m64n64")
    assert gpu.tally(progress.read(path)).failed == 1
    monkeypatch.setattr(gpu, "HARDWARE_HANGS", 2)
    hung = gpu.hardware(card(*printed, "sleep 60"), 60)
    assert hung == ("failed", "3 of 3 right, then it hung; the last line: a pipeline ok")
    assert gpu.hardware(card("echo no device; exit 1"), 60) == ("failed", "0 of 0 right, exit status 1: no device")
    assert gpu.hardware(card(compiles=False), 60) == ("failed", "it does not compile, see hardware.log")
    assert gpu.hardware(card(capability=(10, 0)), 60) == ("skipped", "it is for compute capability 9.0")


def test_kernels_of_a_profile():
    named = "void asa_ops::cuda::(anonymous namespace)::asa_{}_kernel<__nv_bfloat16, {}>(Problem)".format
    sums = [named("sums", f"256, (asa_ops::cuda::(anonymous namespace)::Form){form}") for form in (0, 1, 2, 2)]
    names = [named("statistics", 256), *sums, "_asa_dkv_kernel", "void at::native::vectorized_elementwise_kernel<4>()"]
    spec = workloads.Spec("asa", "64x128", 256, 1, 1, "bfloat16", "labels", None)
    flops = kernels.operations(spec, accounting.Sparsity(300, 0.04, 0.17, 0.2, 0.1, 0.1))
    found = kernels.by_kernel([(name, 50.0) for name in 2 * names], flops, 2)
    assert set(found) == {"statistics", "values", "dv", "dq, dk", "dkv", kernels.OTHERS}
    assert found["dq, dk"].launches == 2 and found["dq, dk"].seconds == pytest.approx(1e-4)
    assert found["statistics"].flops == 2 * 8192**2 * 256 and found[kernels.OTHERS].flops is None
    assert found["dkv"].flops == pytest.approx(0.17 * 4 * found["statistics"].flops)
    with pytest.raises(RuntimeError, match="the profiler saw no kernels"):
        kernels.by_kernel([], {}, 2)
    profile = record.Profile("labels 64x128, D 256", "asa hopper", found)
    assert "| asa hopper | dq, dk | 2 | 100.0 | 29 % | 350 |" in goals.profiles(Record({}, {}, [], profiles=[profile]))


@pytest.mark.skipif(not simt.AVAILABLE, reason="no C++ compiler here, or a GPU: kernels run there")
def test_timings_and_profiles_of_both_sets_in_the_emulation(monkeypatch, tmp_path, emulation):
    """The rows as on a GPU, tiny and on the CPU, up to the summary; the sets differ in their launches."""
    small = workloads.Spec("asa", "5x13", 8, 1, 1, "bfloat16", "labels", None)
    launches = []

    def counted(call):
        before = simt.launches()
        call()
        launches.append(simt.launches() - before)
        return [("asa_statistics_kernel", 10.0)] * kernels.REPEATS

    for name in ("build", "runnable"):
        function = getattr(workloads, name)
        monkeypatch.setattr(workloads, name, lambda spec, device, *args, f=function: f(spec, "cpu", *args))
    monkeypatch.setattr(kernels, "launched", counted)
    monkeypatch.setattr(kernels, "SPECS", [small])
    monkeypatch.setattr(timings, "ROWS", [timings.Row("labels", "5x13", 8, peers=("sdpa flash",))])
    monkeypatch.setattr(timings, "first_calls", lambda: {"first forward": 1.0})
    monkeypatch.setattr(measure, "ceilings", lambda *args: {"copy GB/s": 1.0})
    monkeypatch.setattr(measure, "in_graphs", lambda calls, rounds: {name: [1e-3] for name in calls})
    real = measure.seconds_of
    monkeypatch.setattr(measure, "seconds_of", lambda call, device, calls: real(call, "cpu"))
    for step, main in (("timings", timings.main), ("profile", kernels.main)):
        progress.begin(tmp_path / f"{step}.jsonl", "now")
        main([str(tmp_path / f"{step}.jsonl"), "--impl", "cuda", "hopper"])
        assert gpu.what_is_left(progress.read(tmp_path / f"{step}.jsonl")) == "not begun"
    results = gpu.gather(tmp_path, {})
    assert [case.mode for case in results.cases] == ["fwd", "fwd+bwd"]
    assert all(case.ours == ["asa cuda", "asa hopper"] and not run.failed(case) for case in results.cases)
    assert results.ceilings == {"copy GB/s": 1.0} and results.first_call == {"first forward": 1.0}
    assert [x.method for x in results.profiles] == ["asa hopper", "asa cuda"] and launches[0] < launches[1]
    assert workloads.HOPPER_VARIABLE not in os.environ
    results.write(tmp_path / "results.json")
    assert "| asa hopper | statistics | 1 | 10.0 |" in goals.render(record.read(tmp_path / "results.json"))


@pytest.fixture
def no_gpu_needed(monkeypatch, tmp_path):
    """Let the command run where there is none; every step takes 10 s and passes. Return their limits."""
    limits: dict[str, float] = {}
    monkeypatch.setattr(time, "monotonic", lambda: 10.0 * len(limits))
    monkeypatch.setattr(report, "FOLDER", tmp_path / "kept")
    report.FOLDER.mkdir()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    monkeypatch.setattr(measure, "environment", lambda device: {"device": "A GPU"})

    def step(name, path, limit):
        limits[name] = limit
        return "passed", "all"

    monkeypatch.setattr(gpu, "RUN", {name: functools.partial(step, name) for name in gpu.STEPS})
    return limits


def status_of(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        gpu.main(list(arguments))
    return ended.value.code


def test_the_command_shares_its_time_writes_after_every_step_and_keeps_the_summary(no_gpu_needed, tmp_path, capsys):
    """What a step leaves, later ones get by their shares; the long ones get what is left behind the first."""
    out = tmp_path / "out"
    assert status_of("--out", str(out), "--only", "timings,build,configs,correct,tests", "--keep") == 0
    assert no_gpu_needed == pytest.approx(
        {
            "build": 295,
            "correct": 285 * 80 / 160,
            "timings": 275,
            "tests": 265 * 150 / 260,
            "configs": 255,
        }
    )
    written = record.read(out / "results.json")
    assert [(x.step, x.status) for x in written.steps] == [
        (name, "passed") for name in ("build", "correct", "timings", "tests", "configs")
    ]
    assert set(written.left.values()) == {"not begun"} and len(written.left) == 4
    assert written.environment["date"].endswith("+00:00")
    assert {path.name for path in report.FOLDER.iterdir()} == {"a-gpu-summary.md", "a-gpu-summary.json"}
    assert (report.FOLDER / "a-gpu-summary.md").read_text() == goals.render(written)
    assert "=== timings passed" in capsys.readouterr().out


def test_a_second_call_goes_on_where_the_first_was_ended(no_gpu_needed, monkeypatch, tmp_path, capsys):
    out = str(tmp_path / "out")
    late = {"correct": ["timed out", "passed"], "blind": ["failed", "passed"]}

    def step(name, path, limit):
        no_gpu_needed[name] = limit
        items = [] if name in ("timings", "profile") else ["first", "second"]
        progress.append(path, event="selected", items=items)
        for item in items[: 1 if name == "correct" and len(late[name]) == 2 else 2]:
            progress.append(path, event="outcome", item=item, outcome="passed", seconds=1, message="")
        return late[name].pop(0) if name in late else "passed", "ran"

    monkeypatch.setattr(gpu, "RUN", {name: functools.partial(step, name) for name in gpu.STEPS})
    assert status_of("--out", out, "--budget-minutes", "1.2") == 1  # blind failed
    assert list(no_gpu_needed) == list(gpu.SECONDS)
    assert "=== tests: no time is left" in capsys.readouterr().out
    written = record.read(tmp_path / "out" / "results.json")
    assert written.left == {"correct": "1 of 2", **dict.fromkeys(gpu.LATER, "not begun")}
    no_gpu_needed.clear()
    assert status_of("--out", out, "--only", "correct,timings") == 0
    assert list(no_gpu_needed) == ["correct"]
    no_gpu_needed.clear()
    assert status_of("--out", out, "--budget-minutes", "0.5") == 1  # as before: blind failed, and all of it ended
    assert list(no_gpu_needed) == ["build"] and "=== hardware: done before" in capsys.readouterr().out
    monkeypatch.setattr(gpu, "state", lambda environment: "another build")
    no_gpu_needed.clear()
    assert status_of("--out", out, "--only", "blind,timings") == 0
    assert list(no_gpu_needed) == ["blind", "timings"]


def test_state_is_that_of_sources_build_and_machine(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    states = [gpu.state({"device": "A GPU"}), gpu.state({"device": "Another"})]
    for name in ("asa_ops/_C.abi3.so", "asa_ops/op.py", "csrc/cuda/op.cu", "tests/test_op.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
        states.append(gpu.state({"device": "A GPU"}))
    (tmp_path / "README.md").write_text("1")
    assert len(set(states)) == 6 and gpu.state({"device": "A GPU"}) == states[-1]


def test_cases_are_counted_as_kernels_pad_them():
    names = ["hopper-bfloat16-8-plain-9x7", "hopper-bfloat16-64-plain-9x7", "cuda-float16-70-topk-31x33"]
    items = [f"tests/asa/test_whole.py::test_whole_equals_float64[{name}]" for name in names]
    events = [{"event": "selected", "items": items}]
    events += [{"event": "outcome", "item": items[0], "outcome": "passed", "seconds": 0, "message": ""}]
    assert gpu.by_kernels(events) == {
        "hopper bfloat16 64": {"cases": 2, "passed": 1, "skipped": 0},
        "cuda float16 128": {"cases": 1, "passed": 0, "skipped": 0},
    }


def test_what_was_changed_blind_has_its_tests():
    written = "".join(Path(path).read_text() for path in gpu.test_files())
    names = [name for chosen in gpu.BLIND for name in re.findall(r"test_\w+", chosen)]
    assert len(names) == 6 and all(f"def {name}(" in written for name in names)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_so(tmp_path, capsys):
    with pytest.raises(SystemExit, match=r"^bench.gpu needs a CUDA device: torch .* finds none$"):
        gpu.main(["--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit, match="2"):
        gpu.main(["--only", "build,magic"])
    assert "got magic" in capsys.readouterr().err
