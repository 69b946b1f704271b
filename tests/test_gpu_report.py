"""What the GPU suite makes of its measurements, and that its calls reach all there is to check. Needs no GPU."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import gpu
import gpu_report as report
import gpu_shard
import gpu_timings as timings
import pytest
import record
import torch
from cases import Case, make
from compare import survivors
from gpu_cases import CONFIGURATIONS, configured

from asa_ops import asa_attention
from asa_ops.asa import triton as asa
from asa_ops.asa.triton import configs as triton_configs
from asa_ops.asa.types import Inputs, Options, Saved
from asa_ops.core import devices, triton_launch

BENCH = str(Path(gpu.__file__).parent)
interpreted = pytest.mark.skipif(not devices.triton_is_interpreted(), reason="not in Triton's interpreter")


# Steps and tests.


def test_steps_share_the_budget_and_what_others_leave():
    steps, left = list(report.SECONDS), 540.0
    limits = []
    for i, step in enumerate(steps):
        limits.append(report.seconds_for(step, steps[i + 1 :], left))
        left -= limits[-1]
    shares = [540 * share / sum(report.SECONDS.values()) for share in report.SECONDS.values()]
    assert left == pytest.approx(0) and limits == pytest.approx(shares)
    assert report.seconds_for("timings", [], 200) == 200


def line(**event) -> str:
    return json.dumps(event)


def outcome(test: str, outcome: str, message: str = "") -> str:
    return line(event="outcome", test=test, outcome=outcome, seconds=1.0, message=message)


def test_outcomes_are_counted_and_what_never_ended_is_named():
    lines = [line(event="selected", tests=["a", "b"]), line(event="selected", tests=["c", "d", "e"])]
    lines += [line(event="started", test="a"), outcome("a", "passed"), outcome("a", "error", "in teardown")]
    lines += [outcome("b", "passed"), outcome("c", "failed", "wrong"), outcome("d", "skipped", "no GPU")]
    lines += [line(event="started", test="e")]
    counts = report.tally(lines)
    assert [counts[kind] for kind in ("selected", "passed", "failed", "error", "skipped")] == [5, 1, 1, 1, 1]
    assert counts["unfinished"] == ["e"] and counts["skips"] == ["no GPU"]
    assert [(x["test"], x["message"]) for x in counts["failures"]] == [("a", "in teardown"), ("c", "wrong")]


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
    assert report.status_of_tests(report.tally(lines), timed_out) == status


def test_exit_status():
    def status(**steps):
        return report.exit_status([{"step": step, "status": status} for step, status in steps.items()])

    assert status(build="skipped", tests="passed", sanitizer="skipped", timings="timed out") == 0
    assert status(tests="passed", timings="failed") == 1
    assert status(tests="timed out", timings="passed") == 1
    assert status(build="passed", sanitizer="skipped") == status() == 1


def test_what_the_sanitizer_said():
    def status(*said):
        return report.sanitizer_status("memcheck", *said)

    assert status(0, "========= ERROR SUMMARY: 0 errors")[0] == "passed"
    assert status(9, "========= ERROR SUMMARY: 3 errors") == ("failed", "memcheck, 3 errors, exit status 9")
    assert status(0, "")[0] == "failed"  # it checked nothing
    assert status(1, "========= Error: Device not supported")[0] == "skipped"
    assert status(None, "")[0] == "timed out"
    clean, hazards = (f"========= RACECHECK SUMMARY: {n} hazards displayed ({n} errors, 0 warnings)" for n in (0, 2))
    assert report.sanitizer_status("racecheck", 0, clean) == ("passed", "racecheck, 0 errors")
    assert report.sanitizer_status("racecheck", 9, hazards)[0] == "failed"


def share(folder, outcomes, which="0/1", chosen="test"):
    """Run a share of the tests in a folder; return pytest's exit status and what was told."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "gpu_shard", "-p", "no:cacheprovider", "-k", chosen]
    command += [f"--shard={which}", f"--outcomes={outcomes}", str(folder)]
    environment = os.environ | {"PYTHONPATH": str(Path(gpu.__file__).parent)}
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


def test_after_a_lost_device_the_next_process_goes_on_behind_the_test(tmp_path):
    (tmp_path / "test_file.py").write_text(
        "def test_first():\n    pass\n"
        "def test_losing():\n    raise RuntimeError('CUDA error: an illegal memory access was encountered')\n"
        "def test_last():\n    pass\n"
    )
    outcomes = tmp_path / "outcomes.jsonl"
    status, _ = share(tmp_path, outcomes)
    assert status == gpu_shard.LOST
    status, events = share(tmp_path, outcomes)
    assert status == 0
    told = [(x["test"].split("_")[-1], x["outcome"]) for x in events if x["event"] == "outcome"]
    assert told == [("first", "passed"), ("losing", "failed"), ("last", "passed")]
    assert report.tally(outcomes.read_text().splitlines())["unfinished"] == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match=r"^bench/gpu.py needs a CUDA device: torch .* finds none$"):
        gpu.main()
    assert not (tmp_path / "out").exists()


def test_what_is_kept_is_the_page_and_its_pictures(monkeypatch, tmp_path, capsys):
    """Whatever else lies there; old pictures go where there is a new page."""
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    out, kept = tmp_path, tmp_path / "bench" / "results"  # --out is the source tree itself
    kept.mkdir(parents=True)
    pictures = ("bench/results/a-gpu-dim.png", "bench/results/b-gpu-dim.png")
    for path in ("summary.md", "results.json", "bench/run.py", *pictures):
        (tmp_path / path).write_text(path)
    gpu.keep(out, {"environment": {"gpu": "A GPU"}})
    names = {"a-gpu-summary.md", "a-gpu-summary.json", "b-gpu-dim.png"}
    assert {path.name for path in kept.iterdir()} == names | {"a-gpu-dim.png"}
    for path in ("a-gpu.md", "a-gpu-tokens.png"):
        (tmp_path / "bench" / path).write_text(path)
    gpu.keep(out, {"environment": {"gpu": "A GPU"}})
    assert {path.name for path in kept.iterdir()} == names | {"a-gpu.md", "a-gpu-tokens.png"}
    assert (kept / "a-gpu.md").read_text() == "a-gpu.md" and (kept / "a-gpu-summary.md").read_text() == "summary.md"


def test_environment_is_recorded_without_git_or_driver(monkeypatch):
    found = gpu.environment()
    assert found["torch"] == torch.__version__ and found["python"] and found["date"].endswith("+00:00")
    json.dumps(found)

    def missing(*args, **options):
        raise FileNotFoundError

    monkeypatch.setattr(subprocess, "run", missing)
    assert gpu.environment()["commit"] == "unknown" and gpu.environment()["driver"] is None


# Operations and tiles.


def test_operations_of_kernels():
    flops = report.kernel_flops
    assert flops("statistics", 100, 64, 32) == 2 * 100 * 64
    assert flops("mask", 100, 64, 32) == 2 * 100 * 128
    assert flops("mask", 100, 64, 32, symmetric=True) == flops("mask", 100, 64, 32, mutual=False) == 2 * 100 * 64
    assert flops("aggregate", 100, 64, 32) == flops("dv", 100, 64, 32) == 2 * 100 * 96
    assert flops("dq", 100, 64, 32) == flops("dk", 100, 64, 32) == 2 * 100 * 160
    assert flops("dkv", 100, 64, 32) == 2 * 100 * 192  # scores once for both
    assert flops("dt", 100, 64, 32) == 2 * flops("dt", 100, 64, 32, mutual=False) == 2 * 100 * 192


def test_active_tiles_are_read_from_the_bits():
    pairs = torch.zeros(2, 256, 128, dtype=torch.bool)  # head, row, column
    for head, row, column in ((0, 0, 0), (0, 63, 64), (0, 200, 127), (1, 64, 31), (1, 65, 32)):
        pairs[head, row, column] = True
    weights = 2 ** torch.arange(32, dtype=torch.int64)
    words = (pairs.mT.unflatten(1, (4, 32)) * weights[:, None]).sum(2)  # [head, column // 32, row]
    words = words.to(torch.int32).flatten(1)
    words = torch.cat([words, torch.full((2, 9), -1, dtype=torch.int32)], 1)  # other things lie behind them
    expected = pairs.unflatten(1, (4, 64)).unflatten(3, (2, 64)).any(4).any(2)
    assert torch.equal(timings.active_tiles(words, 256, 128), expected.mT)
    assert expected.sum() == 4


@interpreted
def test_a_call_is_counted():
    """In the interpreter: labels, tiles and operations of the launches of a real call, backward included."""
    from asa_ops.asa.triton import arrange as triton_arrange

    grid, n = (3, 45), 135
    case = Case("small", grid=grid, batch=1, heads=1, dim=16, dim_v=16, sharpness=9.0, beta=None)
    inputs, options = make(case, torch.float32)
    inputs[3][..., 90:] = torch.inf  # some tiles are empty
    leaves = [x.requires_grad_() for x in inputs[:3]]

    def run():
        out = asa_attention(*leaves, inputs[3], **options, impl="triton")
        torch.autograd.grad(out.sum(), leaves)

    flops, active = timings.count(run, n)
    assert {"statistics", "mask", "aggregate", "dq"} < set(flops) <= set(report.KERNELS)
    assert "dkv" in flops or ("dk" in flops and "dv" in flops)
    assert flops["statistics"] == 2 * n * n * 16
    kept = survivors("reference", inputs, options)[0, 0]
    order = triton_arrange.Order.new(n, grid, None, inputs[0]).order[0, :n].long()
    kept = torch.nn.functional.pad(kept[order][:, order], (0, 192 - n, 0, 192 - n))
    tiles = kept.unflatten(0, (3, 64)).unflatten(2, (3, 64)).any(3).any(1)
    assert active == pytest.approx(tiles.double().mean().item()) and not tiles.all()
    assert flops["aggregate"] == 2 * (16 + 16) * 64**2 * tiles.sum()  # the interpreter's blocks are 64 rows


# Goals and the summary, from made-up numbers.


def made_up(inputs: str, n: int, mode: str, peers: dict[str, float], **more) -> dict:
    """Return a case in which asa takes 1 ms as called and 0.5 ms in graph replays. Nothing of this was measured."""
    methods = {"asa": {"call_ms": [1.0, 1.1, 1.0], "graph_ms": [0.5] * 3}}
    methods |= {name: {"call_ms": [ms, 1.1 * ms, ms], "graph_ms": [ms] * 3} for name, ms in peers.items()}
    case = {"inputs": inputs, "N": n, "grid": [1, n], "D": 256, "mode": mode, "survivors": 0.04, "active": 0.2}
    return case | {"methods": methods, "kernels": {}} | more


def verdict(case: dict, text: str) -> report.Verdict:
    goals = [goal for goal in report.GOALS if goal.text.startswith(text) and goal.inputs == case["inputs"]]
    goal = next(goal for goal in goals if (goal.n, goal.mode) == (case["N"], case["mode"]))
    return report.judge(goal, [case])


DENSE = "over the best dense SDPA"


def test_the_fastest_peer_counts_and_rounds_are_compared_with_each_other():
    case = made_up("labels", 8192, "fwd", {"sdpa flash": 3.0, "sdpa cudnn": 1.6})
    case["methods"]["sdpa efficient"] = {"error": "RuntimeError: no kernel"}
    found = report.ratio(case, report.DENSE)
    assert (
        found.peer == "sdpa cudnn" and found.call == pytest.approx([1.6] * 3) and found.graph[1] == pytest.approx(3.2)
    )
    assert verdict(case, DENSE).verdict == "met"


@pytest.mark.parametrize(
    ("ms", "more", "expected"),
    [
        (1.5, {}, "met"),
        (1.49, {}, "met in graph replay only"),
        (0.5, {}, "MISSED"),
        (0.5, {"active": 0.77}, "does not apply: 77.0 % of the tiles are active"),
    ],
)
def test_verdicts_on_ratios(ms, more, expected):
    assert verdict(made_up("labels", 8192, "fwd", {"sdpa flash": ms}, **more), DENSE).verdict == expected


def test_what_failed_is_not_a_verdict():
    case = made_up("labels", 8192, "fwd", {"sdpa flash": 2.0})
    goal = next(goal for goal in report.GOALS if goal.n == 8192)
    assert report.judge(goal, []).verdict == "not measured"
    case["methods"]["sdpa flash"] = {"error": "RuntimeError: no kernel"}
    assert "RuntimeError: no kernel" in report.judge(goal, [case]).verdict
    case["methods"]["asa"] = {"error": "RuntimeError: broken"}
    assert report.judge(goal, [case]).verdict == "not measured (asa failed: RuntimeError: broken)"


def test_verdicts_on_rates():
    kernels = {name: {"ms": 1.0, "launches": 1, "flops": flops} for name, flops in (("dq", 2e11), ("dk", 4e11))}
    kernels["lists"] = {"ms": 1.0, "launches": 2}
    case = made_up("dense", 8192, "fwd+bwd", {}, kernels=kernels)
    assert report.tflops(case, report.BACKWARD) == pytest.approx(300)
    assert verdict(case, "backward").verdict == "MISSED"
    kernels["dq"]["flops"] = 3e11
    assert verdict(case, "backward") == ("backward, TFLOP/s: dense, N = 8192, fwd+bwd", ">= 350", "350", "met")


def test_every_goal_is_measured():
    measured = {(kind, n, "fwd+bwd" if backward else "fwd", flex) for kind, n, backward, flex in timings.cases()}
    for goal in report.GOALS:
        assert (goal.inputs, goal.n, goal.mode, "flex + mask" in goal.peers) in measured
        assert goal.peers != ("eager",) or goal.n <= timings.EAGER_LIMIT


def test_summary_names_misses_failures_and_what_is_missing():
    results = {
        "environment": {"gpu": "Made-up Card", "torch": "0.0", "commit": None},
        "steps": [
            {"step": "build", "status": "skipped", "seconds": 1.0, "note": "no C++ extension"},
            {"step": "tests", "status": "failed", "seconds": 99.0, "note": "1 of 3 passed"},
            {"step": "timings", "status": "timed out", "seconds": 99.0, "note": "3 cases"},
        ],
        "tests": report.tally(
            [line(event="selected", tests=["a", "b", "c"]), outcome("a", "passed"), outcome("b", "failed", "x | y")]
        ),
        "timings": {
            "ceilings": {"gemm_tflops": 700.0, "copy_tbs": 3.0},
            "first_call": {"first forward": 12.345},
            "notes": ["how it was measured"],
            "cases": [
                made_up("labels", 8192, "fwd", {"sdpa flash": 0.4, "eager": 9.0}),
                made_up("dense", 8192, "fwd", {"sdpa flash": 0.7}, active=1.0),
                made_up("labels", 8192, "fwd", {"flex": 2.0, "flex + mask": 6.0}, active=None),
            ],
        },
    }
    results["timings"]["cases"][0]["methods"]["sdpa cudnn"] = {"error": "RuntimeError: no | kernel"}
    json.dumps(results)
    text = report.render(results)
    assert text.startswith("# asa_ops on Made-up Card\n")
    head = text.split("\n\n")[1]
    assert "tests failed (1 of 3 passed); timings timed out (3 cases)" in head and "build skipped" in head
    assert "goals: 2 met, 1 MISSED" in head and "not measured" in head
    assert "- over the best dense SDPA: labels, N = 8192, fwd: 0.40 x, graph 0.80 x, wanted >= 1.5 x" in text
    assert "- `b`: x | y" in text and "- `c`: not finished" in text
    assert "- sdpa cudnn did not run: RuntimeError: no | kernel" in text
    assert "700 TFLOP/s" in text and "first forward 12.35 s" in text and "how it was measured" in text
    for block in text.split("\n\n"):
        if block.startswith("|"):
            assert len({row.count("|") for row in block.strip().split("\n")}) == 1, block


def test_summary_of_nothing():
    assert report.render({}) == "# asa_ops on no GPU\n\n**no goal was measured.**\n\n\n"
    assert record.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


# What the suite reaches.


@interpreted
def test_configurations_reach_every_row_of_the_table(monkeypatch):
    """The launches of the calls in test_gpu.py, on tensors without memory, choose every row on a Hopper GPU."""
    used = set()

    class Recording(dict):
        def __getitem__(self, row):
            used.add(row)
            return super().__getitem__(row)

    monkeypatch.setattr(triton_configs, "_TABLE", Recording(triton_configs._TABLE))
    monkeypatch.setattr(triton_launch, "launch", lambda *args, **constants: None)
    monkeypatch.setattr(triton_launch, "processors", lambda device: 132)
    made = functools.cache(lambda dim, variant: make(configured(dim, variant), device="meta"))
    for (dim, dtype, arch), variant in CONFIGURATIONS:
        monkeypatch.setattr(triton_launch, "architecture", lambda device, arch=arch: arch or 90)
        inputs, options = made(dim, variant)
        call_without_memory([x if x is None else x.to(dtype) for x in inputs], options)
    assert used == set(triton_configs._TABLE)


def call_without_memory(inputs: list, options: dict) -> None:
    inputs = Inputs(*inputs, options.get("key_padding_mask"))
    options = Options(options["grid"], 3, options.get("topk", 0), options.get("reciprocal", True), 0.1)
    for learn in (False, True):
        saved = Saved.new(inputs, options, "triton", keep_bits=True)
        asa.fwd(inputs, options, saved, learn)
        asa.bwd(torch.empty_like(saved.out), inputs, saved, options, 2.0 if learn else None)


def test_a_synthetic_picture_stands_in_for_the_photograph():
    with mock.patch.dict(sys.modules, {"skimage": timings.stand_in_for_skimage()}):
        sys.modules.pop("inputs", None)
        notes = []
        tensors, grid = timings.make("photo", 8192, 128, notes)
        sys.modules.pop("inputs")
    assert grid == (64, 128) and [x.shape[2] for x in tensors] == [8192] * 5 and notes == []
    assert all(x.isfinite().all() for x in tensors) and tensors[0].std() > 0.1


def test_a_case_that_cannot_be_measured_is_told_and_the_others_go_on(monkeypatch, tmp_path):
    def fail(kind, n, *others):
        raise RuntimeError(f"no {kind} of {n}")

    monkeypatch.setattr(timings, "case", fail)
    told = {"notes": [], "cases": []}
    todo = [("labels", 64, False, False), ("iid", 81, True, False)]
    assert timings.measure_all(todo, float("inf"), told, tmp_path / "out.json") == 2
    assert told["notes"] == [
        "labels 64 failed: RuntimeError: no labels of 64",
        "iid 81 fwd+bwd failed: RuntimeError: no iid of 81",
    ]
