"""Everything that needs a GPU, in one command and within minutes: build, tests, checks, timings.

    make gpu                                              # results in build/gpu
    python -m bench.gpu --out results --only tests,timings
    python -m bench.gpu --out results --keep              # also bench/results/<gpu>-summary.*

It uses the Python it is run with, which needs torch, triton, numpy and pytest, installs nothing and takes asa_ops from
this source tree. Steps run one after another, each in processes of its own with a limit, so that one that hangs leaves
time for the others. The folder gets results.json (``record.Record``), summary.md (``goals``) and a log of every step,
rewritten after each. Exit status 1 if something failed, tests did not finish, or nothing ran.
"""

import argparse
import contextlib
import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from examples import files

from . import goals, measure, record, report, shard, workloads
from .measure import ROOT
from .record import Record, Step, Tally

SECONDS = {"build": 60, "tests": 150, "configs": 110, "sanitizer": 60, "timings": 230}  # shares of the budget
MAX_SHARDS = 14  # processes that share the tests: compiling kernels keeps one core each busy
CONFIGURATIONS = "configuration"  # tests with this in their names are the step "configs"
SANITIZED = """
import torch
from asa_ops import asa_attention
from bench import workloads

spec = workloads.Spec("asa", "11x13", 64, 2, 1, "bfloat16", "iid", None)
impls, why_not = workloads.runnable(spec, "cuda", ["triton", "cuda"])
for dtype, dim, options in (
    (torch.bfloat16, 64, {}),
    (torch.bfloat16, 256, {"topk": 9}),
    (torch.float32, 24, {"reciprocal": False}),
    (torch.float16, 128, {"key_padding_mask": torch.rand(1, 143, device="cuda") < 0.8}),
):
    leaves = [torch.randn(1, 2, 143, dim, device="cuda").to(dtype).requires_grad_() for _ in range(3)]
    leaves += [torch.rand(1, 2, 143, device="cuda").add(0.5).requires_grad_() for _ in range(2)]
    for learn in (None, "straight_through"):
        for impl in impls:
            out = asa_attention(*leaves, grid=(11, 13), threshold_grad=learn, impl=impl, **options)
            torch.autograd.grad(out.float().square().sum(), leaves)
torch.cuda.synchronize()
print("the calls ended:", impls, why_not)
"""
PEERS = ("sdpa flash", "sdpa cudnn", "sdpa efficient", "xformers", "eager")
TIMED = "--device cuda --dtype bfloat16 --dim 256 --impl triton cuda --rounds 15 --add"
TIMINGS = [  # what bench.run measures of one image and head, in order of importance
    ("--size 64x128 --inputs labels dense --mode fwd fwd+bwd", (*PEERS, "flex", "flex + mask")),
    ("--size 97x97 --inputs labels dense --mode fwd fwd+bwd", PEERS),
    ("--size 64x128 97x97 --inputs photo iid --mode fwd fwd+bwd", PEERS),
    ("--size 128x128 --inputs labels dense photo near-dense --mode fwd fwd+bwd", PEERS),
    ("--size 97x97 128x128 --inputs labels near-dense --mode mem", PEERS),
    ("--size 64x64 --inputs labels dense --mode fwd fwd+bwd", PEERS),
]


def run_all(commands: list[list[str]], logs: list[Path], shown: list[Path], limit: float, **more: str):
    """Run commands, each into its log, show what ``shown`` get, and return exit statuses: None, the limit ended it."""
    deadline = time.monotonic() + limit
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))  # asa_ops from this tree
    options = {"cwd": ROOT, "env": os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"} | more}
    with contextlib.ExitStack() as stack:
        tail = ["tail", "-q", "-n", "0", "-F", *map(str, shown)]  # what is there was shown before
        stack.callback(end, subprocess.Popen(tail, stderr=subprocess.DEVNULL, start_new_session=True))
        processes = []
        for command, log in zip(commands, logs, strict=True):
            output = stack.enter_context(log.open("ab"))
            process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True, **options)
            stack.callback(end, process)
            processes.append(process)
        while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
            time.sleep(0.5)
        time.sleep(0.2)  # tail shows the rest
        return [process.poll() for process in processes]


def end(process: subprocess.Popen) -> None:
    """End a process and its children: compilers, the sanitized program."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run(command: list[str], log: Path, limit: float, **more: str) -> int | None:
    """Run a command of Python into a log and onto the screen; return its exit status, None if the limit ended it."""
    return run_all([[sys.executable, *command]], [log], [log], limit, **more)[0]


def build(limit: float, log: Path, results: Record) -> tuple[str, str]:
    """Build the C++ extension in place, for this card; without it only the CUDA C++ kernels are left out."""
    major, minor = torch.cuda.get_device_capability()
    wanted = f"{major}{minor}" + "a" * ((major, minor) == (9, 0))  # kernels of their own, for no other
    there = "from asa_ops.core import extension; import sys; sys.exit({!r} not in extension.cuda_architectures())"
    if run(["-c", there.format(wanted)], log, limit) == 0:
        return "passed", "was built before"
    status = run(["setup.py", "build_ext", "--inplace"], log, limit, ASA_OPS_CUDA_ARCHS=wanted)
    if status == 0 and list(ROOT.glob("asa_ops/_C*.so")):
        return "passed", ""
    return "skipped", "no C++ extension: the limit was reached" if status is None else "no C++ extension, see build.log"


def run_tests(step: str, chosen: str, limit: float, log: Path, results: Record) -> tuple[str, str]:
    """Run the tests marked gpu whose names fit ``chosen``, shared out among processes."""
    paths = sorted(ROOT.glob("tests/**/test_*.py"))
    paths = [str(path) for path in paths if re.search(r"mark\.gpu|gpu=True", path.read_text())]  # not what needs more
    shards = max(1, min(MAX_SHARDS, (os.cpu_count() or 1) - 2))
    with tempfile.TemporaryDirectory() as folder:
        outcomes = [Path(folder, f"{i}.jsonl") for i in range(shards)]
        logs = [path.with_suffix(".log") for path in outcomes]
        again = ["sh", "-c", f'while "$@"; status=$?; [ $status = {shard.LOST} ]; do :; done; exit $status', "sh"]
        command = [*again, sys.executable, "-m", "pytest", "-p", "bench.shard", "-p", "no:cacheprovider", "--tb=short"]
        command += ["-m", "gpu", "-k", chosen, *paths]
        commands = [[*command, f"--shard={i}/{shards}", f"--outcomes={path}"] for i, path in enumerate(outcomes)]
        statuses = run_all(commands, logs, outcomes, limit, OMP_NUM_THREADS="2")
        parts = (f"--- share {i} of {shards}\n{x.read_text(errors='replace')}" for i, x in enumerate(logs))
        files.write(log, "".join(parts))
        lines = [line for path in outcomes if path.exists() for line in path.read_text().split("\n")[:-1]]
    results.tests[step] = counts = tally(lines)
    crashed = [s for s in statuses if s not in (0, 1, 5, None)]  # 5: an empty share
    note = f"{counts.passed} of {counts.selected} passed"
    if crashed:
        return "failed", f"{note}; pytest ended with {crashed}, see {log.name}"
    return status_of_tests(counts, timed_out=None in statuses), note


def tally(lines: Iterable[str]) -> Tally:
    """Sum up what ``shard`` wrote."""
    selected, outcomes = set(), {}
    for event in map(json.loads, lines):
        kind, test = event.pop("event"), event.get("test")
        if kind == "selected":
            selected.update(event["tests"])
        elif kind == "outcome" and (test not in outcomes or outcomes[test]["outcome"] in ("passed", "skipped")):
            outcomes[test] = event  # an error in teardown counts
    kinds = {kind: [x for x in outcomes.values() if x["outcome"] == kind] for kind in shard.OUTCOMES}
    slowest = sorted(outcomes.values(), key=lambda x: -x["seconds"])[:5]
    return Tally(
        selected=len(selected),
        **{kind: len(found) for kind, found in kinds.items()},
        failures=[x for x in outcomes.values() if x["outcome"] in ("failed", "error")],
        unfinished=sorted(selected - set(outcomes)),
        skips=sorted({x["message"] for x in kinds["skipped"]}),
        slowest=[{name: x[name] for name in ("test", "seconds")} for x in slowest],
    )


def status_of_tests(counts: Tally, timed_out: bool) -> str:
    """Return "passed" only if every test selected came to an end, none failed and at least one ran."""
    if counts.failed or counts.error:
        return "failed"
    return "timed out" if timed_out else "passed" if counts.passed and not counts.unfinished else "failed"


def sanitize(limit: float, log: Path, results: Record) -> tuple[str, str]:
    """Run a few small calls under compute-sanitizer, wherever a CUDA toolkit keeps it: memcheck, then racecheck."""
    roots = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    roots += sorted(Path("/usr/local").glob("cuda*"), reverse=True)
    places = [str(root / folder) for root in roots for folder in ("bin", "compute-sanitizer")]
    tool = shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), *places]))
    if tool is None:
        return "skipped", "compute-sanitizer not found"
    program = ["-c", SANITIZED]
    deadline = time.monotonic() + limit
    status = run(program, log, limit / 2)  # compiles the kernels, which is slow under the tool
    if status != 0:
        return "timed out" if status is None else "failed", f"the program without the tool, see {log.name}"
    notes = []
    for check in ("memcheck", "racecheck"):
        command = [tool, "--tool", check, "--error-exitcode", "9", sys.executable, *program]
        part = log.with_name(f"{check}.log")
        # Every tensor an allocation of its own, so that a step beyond its end shows.
        alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        (status,) = run_all([command], [part], [part], deadline - time.monotonic(), **alone)
        outcome, note = sanitizer_status(check, status, part.read_text(errors="replace"))
        notes.append(note)
        if outcome != "passed":
            break
    return outcome, "; ".join(notes)


def sanitizer_status(check: str, status: int | None, log: str) -> tuple[str, str]:
    """Return the status and a note from how a ``check`` of compute-sanitizer ended (None: at its limit) and its log."""
    if status is None:
        return "timed out", f"{check}, at its limit"
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)", log)
    if status == 0 and summary and int(summary[-1]) == 0:
        return "passed", f"{check}, 0 errors"
    if re.search(r"Device not supported|not supported on this device|Unable to attach", log):
        return "skipped", "compute-sanitizer does not work on this machine"
    return "failed", f"{check}, {summary[-1] if summary else 'unknown'} errors, exit status {status}"


def time_everything(limit: float, log: Path, results: Record) -> tuple[str, str]:
    """Run bench.run on TIMINGS, and read what it wrote: all of it, or what it had when the limit ended it."""
    deadline = time.monotonic() + limit
    written, first = log.with_name("timings.json"), log.with_name("first_call.log")
    written.unlink(missing_ok=True)
    first.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as cache:  # empty: the first call compiles, what follows profits
        status = run(["-m", "bench.gpu", "--first-call"], first, limit, TRITON_CACHE_DIR=cache)
        last = (first.read_text().strip().splitlines() or ["?"])[-1]
        if status == 0:
            results.first_call = json.loads(last)
        else:
            results.notes.append(f"The first call failed: {last}")
        statuses = []
        for arguments, peers in TIMINGS:
            command = ["-m", "bench.run", *f"{TIMED} {arguments}".split(), "--peers", *peers, "--out", str(written)]
            left = deadline - time.monotonic()
            statuses.append(run(command, log, left, TRITON_CACHE_DIR=cache) if left > 0 else None)
    if written.exists():
        timed = record.read(written)
        results.cases, results.ceilings = timed.cases, timed.ceilings
    note = f"{len(results.cases)} cases"
    if not results.cases or any(statuses):
        return "failed", f"{note}, see {log.name}"
    return "timed out" if None in statuses else "passed", note


def first_call() -> dict[str, float]:
    """Return the seconds of the first calls in this process; of importing asa_ops, in another one."""
    imported = "import time, torch; start = time.perf_counter(); import asa_ops; print(time.perf_counter() - start)"
    spec = workloads.Spec("asa", "64x64", 256, 1, 1, "bfloat16", "labels", None)
    seconds = {"CUDA context": measure.seconds_of(lambda: torch.zeros(1, device="cuda"), "cpu")}
    seconds["import asa_ops"] = float(subprocess.check_output([sys.executable, "-c", imported]))
    workload = workloads.build(spec, "cuda", ["triton"], [])
    both = workload.call("asa triton", True)
    seconds["first forward"] = measure.seconds_of(workload.call("asa triton", False), "cuda")
    seconds["first forward and backward after it"] = measure.seconds_of(both, "cuda")
    return seconds | {"the next": measure.seconds_of(both, "cuda")}


RUN = {
    "build": build,
    "tests": lambda *args: run_tests("tests", f"not {CONFIGURATIONS}", *args),
    "configs": lambda *args: run_tests("configs", CONFIGURATIONS, *args),
    "sanitizer": sanitize,
    "timings": time_everything,
}


def exit_status(steps: list[Step]) -> int:
    """Return 0 only if a step beyond the build passed, none failed, and no tests were left unfinished."""
    failed = any(x.status == "failed" for x in steps)
    unfinished = any(x.status == "timed out" and x.step in ("tests", "configs") for x in steps)
    ran = any(x.status == "passed" and x.step != "build" for x in steps)
    return int(failed or unfinished or not ran)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/gpu"), help="folder for the results")
    parser.add_argument("--only", default=",".join(SECONDS), help=f"comma-separated, of {', '.join(SECONDS)}")
    parser.add_argument("--budget-minutes", type=float, default=9)
    parser.add_argument("--keep", action="store_true", help="copy the summary to bench/results")
    parser.add_argument("--first-call", action="store_true", help="print what a first call takes, as JSON")
    options = parser.parse_args(arguments)
    wanted = options.only.split(",")
    if unknown := set(wanted) - set(SECONDS):
        parser.error(f"--only takes {', '.join(SECONDS)}, got {', '.join(sorted(unknown))}")
    if not torch.cuda.is_available():
        sys.exit(f"bench.gpu needs a CUDA device: torch {torch.__version__} finds none")
    if options.first_call:
        print(json.dumps(first_call()))
        return
    deadline = time.monotonic() + 60 * options.budget_minutes - 5
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the processes of the step too
    out = options.out.resolve()
    files.check([out / "results.json", out / "summary.md"])
    out.mkdir(parents=True, exist_ok=True)
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    more = {"pytest": pytest.__version__, "processors": os.cpu_count(), "date": now}
    results = Record(measure.environment("cuda") | more, {}, [])
    print(json.dumps(results.environment, indent=1), flush=True)
    todo = [step for step in SECONDS if step in wanted]
    for i, step in enumerate(todo):
        # Later steps keep their shares of what is left, and get what this one leaves.
        limit = max(deadline - time.monotonic(), 1) * SECONDS[step] / sum(SECONDS[name] for name in todo[i:])
        print(f"\n=== {step}, at most {limit:.0f} s", flush=True)
        log = out / f"{step}.log"
        log.unlink(missing_ok=True)
        started = time.monotonic()
        status, note = RUN[step](limit, log, results)
        seconds = round(time.monotonic() - started, 1)
        results.steps.append(Step(step, status, seconds, note))
        print(f"=== {step} {status} after {seconds} s. {note}", flush=True)
        results.write(out / "results.json")
        files.write(out / "summary.md", goals.render(results))
    print(f"\n{files.read(out / 'summary.md')}\nin {out}", flush=True)
    for name in ("summary.md", "results.json") if options.keep else ():
        kept = report.FOLDER / f"{record.slug(str(results.environment['device']))}-summary{Path(name).suffix}"
        files.write(kept, files.read(out / name))
        print(f"kept as {kept}")
    sys.exit(exit_status(results.steps))


if __name__ == "__main__":
    files.run(main)
