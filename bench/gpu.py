"""Everything that needs a GPU, in steps that go on where an earlier call was ended by its limit.

    make gpu                                              # results in build/gpu, at most 5 minutes
    make gpu                                              # what was left
    python -m bench.gpu --out results --only hardware,correct
    python -m bench.gpu --out results --keep              # also bench/results/<gpu>-summary.*

The steps:

    build       the C++ extension, for this card
    hardware    every wrapper of what compute capability 9.0 has (csrc/testing/hardware.cu) against numbers of the CPU;
                if it fails, later steps leave out the kernels that need it
    correct     the whole op in half precisions against float64, on every set of kernels, and 100 repeats bitwise
    blind       the tests of what was changed without a GPU after a GPU had failed it
    timings     ours, as called and in CUDA graphs, beside dense attention (bench/timings.py)
    profile     every kernel by torch's profiler (bench/kernels.py)
    tests, configs, sanitizer       everything else, in the time that those leave

It uses the Python it is run with, which needs torch, triton, numpy and pytest, installs nothing and takes asa_ops from
this source tree. Steps run one after another, each in processes of its own with a limit, so that one that hangs leaves
time for the others. The folder has a file of what each step did (``progress``; without it, the step is done anew) and
its log, and results.json (``record.Record``) and summary.md (``goals``) of all of them, rewritten after each. Results
of other sources, another build or another machine are not gone on with. Exit status 1 if something failed or nothing
ran, 3 if something is left.
"""

import argparse
import contextlib
import datetime
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from examples import files

from . import goals, measure, progress, record, report, shard, timings, workloads
from . import run as run_cases
from .measure import ROOT
from .record import Case, Profile, Record, Step, Tally

# Shares of the budget: of the first steps, and of those behind them.
SECONDS = {"build": 60, "hardware": 30, "correct": 80, "blind": 30, "timings": 80, "profile": 25}
LATER = {"tests": 150, "configs": 110, "sanitizer": 60}
STEPS = SECONDS | LATER
ENOUGH = 20  # seconds for a later step to begin
HARDWARE_HANGS = 30  # seconds: it takes one
MAX_SHARDS = 14  # processes that share the tests: compiling kernels keeps one core each busy
WHOLE = "tests/asa/test_whole.py"  # the step "correct"
CONFIGURATIONS = "configuration"  # tests with this in their names are the step "configs"
# What a GPU failed in the first run (bench/results/nvidia-h200-summary.md) or reading the code showed, by names.
BLIND = (
    "test_triton_on_a_gpu and float32 and (long_row or long_column)",
    "test_gradients_of_thresholds_in_gaps and cuda and float32 and (one_token or fewer_queries_padded)",
    "test_configuration_tf32",
    "test_configuration and cuda and 256-float32-plain",
    "(test_scores_far_below_zero or test_equals_reference and sharp) and triton",  # bounded sums in the statistics
)
SANITIZED = """
import sys, torch
from asa_ops import asa_attention
from bench import workloads

spec = workloads.Spec("asa", "11x13", 64, 2, 1, "bfloat16", "iid", None)
impls, why_not = workloads.runnable(spec, "cuda", sys.argv[1:])
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
            options["impl"] = "cuda" if impl == workloads.HOPPER else impl
            with workloads.kernel_set(impl):
                out = asa_attention(*leaves, grid=(11, 13), threshold_grad=learn, **options)
                torch.autograd.grad(out.float().square().sum(), leaves)
torch.cuda.synchronize()
print("the calls ended:", impls, why_not)
"""


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


def log_of(path: Path) -> Path:
    """Return the log of a step, beside the file of what it did."""
    return path.with_suffix(".log")


def tool(name: str) -> str | None:
    """Return where a tool of the CUDA toolkit is, wherever that keeps it."""
    roots = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    roots += sorted(Path("/usr/local").glob("cuda*"), reverse=True)
    places = [str(root / folder) for root in roots for folder in ("bin", "compute-sanitizer")]
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), *places]))


def newest(paths: list[Path]) -> float:
    return max(path.stat().st_mtime for path in paths)


def build(path: Path, limit: float) -> tuple[str, str]:
    """Build the C++ extension in place, for this card; without it only the CUDA C++ kernels are left out."""
    major, minor = torch.cuda.get_device_capability()
    wanted = f"{major}{minor}" + "a" * ((major, minor) == (9, 0))  # kernels of their own, for no other
    there = "from asa_ops.core import extension; import sys; sys.exit({!r} not in extension.cuda_architectures())"
    sources = [x for x in ROOT.glob("csrc/**/*") if x.is_file() and "testing" not in x.parts]
    built = list(ROOT.glob("asa_ops/_C*.so"))
    # What is there may be of other sources.
    if built and newest(built) >= newest(sources) and run(["-c", there.format(wanted)], log_of(path), limit) == 0:
        return "passed", "was built before"
    status = run(["setup.py", "build_ext", "--inplace"], log_of(path), limit, ASA_OPS_CUDA_ARCHS=wanted)
    if status:
        return "failed", "it does not compile, see build.log"
    if status is None:
        return "timed out", "no C++ extension, or an old one"
    if not list(ROOT.glob("asa_ops/_C*.so")):
        return "skipped", "no C++ extension, see build.log"
    return "passed", ""


def hardware(path: Path, limit: float) -> tuple[str, str]:
    """Compile csrc/testing/hardware.cu, unless it was, and run it; every line that it prints is an outcome."""
    nvcc, log = tool("nvcc"), log_of(path)
    if torch.cuda.get_device_capability() != (9, 0):
        return "skipped", "it is for compute capability 9.0"
    if nvcc is None:
        return "skipped", "nvcc not found"
    deadline = time.monotonic() + limit
    source, program = ROOT / "csrc/testing/hardware.cu", path.with_name("hardware")
    if not program.exists() or newest([program]) < newest([source, *ROOT.glob("csrc/**/*.h")]):
        flags = ["-std=c++17", "-O3", "--fmad=false", "-arch=sm_90a"]
        (status,) = run_all([[nvcc, *flags, str(source), "-o", str(program)]], [log], [log], limit)
        if status is None:
            return "timed out", "compiling it"
        if status:
            return "failed", f"it does not compile, see {log.name}"
    printed = path.with_name("hardware_lines.log")
    printed.unlink(missing_ok=True)
    limit = min(deadline - time.monotonic(), HARDWARE_HANGS)
    (status,) = run_all([[str(program)]], [printed], [printed], limit)
    lines = printed.read_text(errors="replace").splitlines()
    found = [line.rsplit(maxsplit=1) for line in lines if line.endswith((" ok", " WRONG"))]
    progress.append(path, event="selected", items=[what for what, _ in found])
    for what, ending in found:
        outcome = "passed" if ending == "ok" else "failed"
        progress.append(path, event="outcome", item=what, outcome=outcome, seconds=0, message=ending)
    wrong = [what for what, ending in found if ending != "ok"]
    note = f"{len(found) - len(wrong)} of {len(found)} right"
    if status is None and limit < HARDWARE_HANGS:
        return "timed out", note
    if status is None:
        return "failed", f"{note}, then it hung; the last line: {(lines or ['none'])[-1]}"
    if status or not found:
        return "failed", f"{note}, exit status {status}: {', '.join(wrong) or (lines or ['no line'])[-1]}"
    return "passed", note


def why_not_hopper(out: Path) -> str | None:
    """Return what an earlier step found that forbids the kernels for compute capability 9.0, None if nothing."""
    for step in (x for x in progress.read(out / "hardware.jsonl") if x["event"] == "step"):
        if step["status"] == "failed":
            return "the step hardware failed"
    for x in progress.outcomes(progress.read(out / "correct.jsonl")).values():
        lost = any(words in x["message"] for words in (progress.ENDED, *progress.FATAL))
        if lost and shard.kernels(x["item"]) == workloads.HOPPER:
            return "they ended a process, or lost it the device, in the step correct"
    return None


def run_tests(path: Path, limit: float, chosen: str, paths: list[str]) -> tuple[str, str]:
    """Run the tests marked gpu whose names fit ``chosen``, shared out among processes."""
    shards = max(1, min(MAX_SHARDS, (os.cpu_count() or 1) - 2))
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder, f"{i}.log") for i in range(shards)]
        command = [sys.executable, "-m", "pytest", "-p", "bench.shard", "-p", "no:cacheprovider", "--tb=short"]
        command += ["-m", "gpu", "-k", chosen, "--outcomes", str(path), *paths]
        commands = [progress.again([*command, f"--shard={i}/{shards}"]) for i in range(shards)]
        statuses = run_all(commands, logs, [path], limit, OMP_NUM_THREADS="2")
        parts = (f"--- share {i} of {shards}\n{x.read_text(errors='replace')}" for i, x in enumerate(logs))
        files.write(log_of(path), "".join(parts))
    counts = tally(progress.read(path))
    crashed = [s for s in statuses if s not in (0, 1, 5, None)]  # 5: an empty share
    note = f"{counts.passed} of {counts.selected} passed"
    if crashed:
        return "failed", f"{note}; pytest ended with {crashed}, see {log_of(path).name}"
    return status_of_tests(counts, timed_out=None in statuses), note


def test_files() -> list[str]:
    """Return the files that have tests marked gpu, but for the step "correct"; not what needs more than they do."""
    paths = sorted(ROOT.glob("tests/**/test_*.py"))
    marked = [x for x in paths if re.search(r"mark\.gpu|gpu=True", x.read_text())]
    return [str(x) for x in marked if x != ROOT / WHOLE]


def correct(path: Path, limit: float) -> tuple[str, str]:
    """Compare the whole op with float64."""
    reason = why_not_hopper(path.parent)
    status, note = run_tests(path, limit, "not hopper" if reason else "test", [str(ROOT / WHOLE)])
    return status, f"{note}; without the kernels for 9.0: {reason}" if reason else note


def tally(events: list[dict]) -> Tally:
    """Sum up what ``shard`` wrote."""
    selected = {item for event in events if event["event"] == "selected" for item in event["items"]}
    fields = ("outcome", "seconds", "message")
    ended = [{"test": item} | {x: event[x] for x in fields} for item, event in progress.outcomes(events).items()]
    kinds = {kind: [x for x in ended if x["outcome"] == kind] for kind in shard.OUTCOMES}
    slowest = sorted(ended, key=lambda x: -x["seconds"])[:5]
    return Tally(
        selected=len(selected),
        **{kind: len(found) for kind, found in kinds.items()},
        failures=[x for x in ended if x["outcome"] in ("failed", "error")],
        unfinished=sorted(progress.left(events)),
        skips=sorted({x["message"] for x in kinds["skipped"]}),
        slowest=[{name: x[name] for name in ("test", "seconds")} for x in slowest],
    )


def status_of_tests(counts: Tally, timed_out: bool) -> str:
    """Return "passed" only if every test selected came to an end, none failed and at least one ran."""
    if counts.failed or counts.error:
        return "failed"
    return "timed out" if timed_out else "passed" if counts.passed and not counts.unfinished else "failed"


def sanitize(path: Path, limit: float) -> tuple[str, str]:
    """Run a few small calls under compute-sanitizer, wherever a CUDA toolkit keeps it: memcheck, then racecheck."""
    sanitizer, log = tool("compute-sanitizer"), log_of(path)
    if sanitizer is None:
        return "skipped", "compute-sanitizer not found"
    impls = list(timings.IMPLS) if why_not_hopper(path.parent) is None else list(timings.IMPLS[:2])
    deadline = time.monotonic() + limit
    status = run(["-c", SANITIZED, *impls], log, limit / 2)  # compiles the kernels, which is slow under the tool
    if status != 0:
        return "timed out" if status is None else "failed", f"the program without the tool, see {log.name}"
    notes = []
    for check in ("memcheck", "racecheck"):
        # It is not known that racecheck follows barriers that copies arrive at.
        of_check = [impl for impl in impls if check == "memcheck" or impl != workloads.HOPPER]
        program = [sys.executable, "-c", SANITIZED, *of_check]
        command = [sanitizer, "--tool", check, "--error-exitcode", "9", *program]
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


def measure_rows(path: Path, limit: float, module: str) -> tuple[str, str]:
    """Have a module do what is left of its rows; another process goes on where one ended in a row."""
    reason = why_not_hopper(path.parent)
    impls = [impl for impl in timings.IMPLS if not (reason and impl == workloads.HOPPER)]
    log = log_of(path)
    command = progress.again([sys.executable, "-m", module, str(path), "--impl", *impls])
    (status,) = run_all([command], [log], [log], limit)
    events = progress.read(path)
    ended = progress.outcomes(events)
    failed = [f"{item}: {x['message']}" for item, x in ended.items() if x["outcome"] != "passed"]
    note = "; ".join([f"{len(ended) - len(failed)} of {len(ended) + len(progress.left(events))} rows", *failed[:5]])
    note += f"; without the kernels for 9.0: {reason}" if reason else ""
    if status or (failed and status is not None) or not (ended or status is None):
        return "failed", f"{note}, see {log.name}"
    return "timed out" if status is None else "passed", note


RUN: dict[str, Callable[[Path, float], tuple[str, str]]] = {
    "build": build,
    "hardware": hardware,
    "correct": correct,
    "blind": lambda *args: run_tests(*args, " or ".join(f"({x})" for x in BLIND), test_files()),
    "timings": partial(measure_rows, module="bench.timings"),
    "profile": partial(measure_rows, module="bench.kernels"),
    "tests": lambda *args: run_tests(*args, f"not {CONFIGURATIONS}", test_files()),
    "configs": lambda *args: run_tests(*args, CONFIGURATIONS, test_files()),
    "sanitizer": sanitize,
}


def state(environment: dict[str, object]) -> str:
    """Return what tells apart results that may not be put together: sources, the build, the machine."""
    digest = hashlib.sha256()
    paths = [x for folder in ("asa_ops", "bench", "tests") for x in ROOT.glob(f"{folder}/**/*.py")]
    paths += [*ROOT.glob("asa_ops/_C*.so"), *(x for x in ROOT.glob("csrc/**/*") if x.is_file())]
    for path in sorted(paths):
        digest.update(f"{path.relative_to(ROOT)} {path.stat().st_size} ".encode() + path.read_bytes())
    machine = [str(environment.get(name)) for name in ("device", "driver", "torch", "triton", "python")]
    return ", ".join([digest.hexdigest()[:16], *machine])


def begin(out: Path, environment: dict[str, object]) -> None:
    """Prepare the files of all steps for the current state: what is there of another goes."""
    current = state(environment)
    for step in STEPS:
        progress.begin(out / f"{step}.jsonl", current)


def what_is_left(events: list[dict]) -> str:
    """Return what is left to a further call of a step, "" if nothing."""
    calls = [x for x in events if x["event"] == "step"]
    if not calls:
        return "not begun"
    if left := progress.left(events):
        return f"{len(left)} of {len(progress.outcomes(events)) + len(left)}"
    return "not finished" if calls[-1]["status"] == "timed out" else ""


def is_done(events: list[dict]) -> bool:
    """Return whether a further call of a step would find nothing new: what failed before it did anything may."""
    calls = [x for x in events if x["event"] == "step"]
    if not calls or what_is_left(events):
        return False
    return calls[-1]["status"] == "passed" or bool(progress.outcomes(events))


def gather(out: Path, environment: dict[str, object]) -> Record:
    """Return everything that the steps' files say."""
    results = Record(environment, {}, [])
    for step in STEPS:
        events = progress.read(out / f"{step}.jsonl")
        if left := what_is_left(events):
            results.left[step] = left
        if calls := [x for x in events if x["event"] == "step"]:
            seconds = round(sum(x["seconds"] for x in calls), 1)
            results.steps.append(Step(step, calls[-1]["status"], seconds, calls[-1]["note"]))
        ended = progress.outcomes(events)
        if step in ("timings", "profile"):
            found = {item: x["result"] for item, x in ended.items() if x["outcome"] == "passed"}
            results.ceilings |= found.pop(timings.CEILINGS, {})
            results.first_call |= found.pop(timings.FIRST_CALL, {})
            if step == "profile":
                results.profiles = [record.of(Profile, result) for result in found.values()]
                continue
            for case in (record.of(Case, result) for result in found.values()):
                # Beside more peers, one of which may have spoilt it.
                if not (run_cases.failed(case) and case.key in {each.key for each in results.cases}):
                    results.add(case)
        elif ended:
            results.tests[step] = tally(events)
        if step == "correct":
            results.correct = by_kernels(events)
    return results


def by_kernels(events: list[dict]) -> dict[str, dict[str, int]]:
    """Count the outcomes of the step "correct" by kernels, dtype and the head dim that kernels pad to."""
    counts: dict[str, dict[str, int]] = {}
    ended = progress.outcomes(events)
    for item in dict.fromkeys([*progress.left(events), *ended]):
        if found := re.search(r"\[(\w+)-(\w+)-(\d+)-", item):
            padded = next(size for size in goals.DIMS if int(found[3]) <= size)
            of_all = counts.setdefault(f"{found[1]} {found[2]} {padded}", {"cases": 0, "passed": 0, "skipped": 0})
            of_all["cases"] += 1
            outcome = ended.get(item, {}).get("outcome")
            if outcome in of_all:
                of_all[outcome] += 1
    return counts


def exit_status(steps: list[Step], left: bool) -> int:
    """Return 1 if a step failed or none beyond the build passed, 3 if something is left of those wanted."""
    if any(x.status == "failed" for x in steps):
        return 1
    if not left and not any(x.status == "passed" and x.step != "build" for x in steps):
        return 1
    return 3 if left else 0


def shares(todo: list[str]) -> float:
    """Return which part of the time that is left the first of some steps gets: later ones keep their shares."""
    group = LATER if todo[0] in LATER else SECONDS
    return group[todo[0]] / sum(group[step] for step in todo if step in group)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/gpu"), help="folder for the results")
    parser.add_argument("--only", default=",".join(STEPS), help=f"comma-separated, of {', '.join(STEPS)}")
    parser.add_argument("--budget-minutes", type=float, default=5)
    parser.add_argument("--keep", action="store_true", help="copy the summary to bench/results")
    options = parser.parse_args(arguments)
    wanted = options.only.split(",")
    if unknown := set(wanted) - set(STEPS):
        parser.error(f"--only takes {', '.join(STEPS)}, got {', '.join(sorted(unknown))}")
    if not torch.cuda.is_available():
        sys.exit(f"bench.gpu needs a CUDA device: torch {torch.__version__} finds none")
    deadline = time.monotonic() + 60 * options.budget_minutes - 5
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the processes of the step too
    out = options.out.resolve()
    files.check([out / "results.json", out / "summary.md"])
    out.mkdir(parents=True, exist_ok=True)
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    environment = measure.environment("cuda") | {
        "pytest": pytest.__version__,
        "processors": os.cpu_count(),
        "date": now,
    }
    print(json.dumps(environment, indent=1), flush=True)
    todo = [step for step in STEPS if step in wanted]
    begin(out, environment)
    results = gather(out, environment)
    for i, step in enumerate(todo):
        path, left = out / f"{step}.jsonl", deadline - time.monotonic()
        if left < (ENOUGH if step in LATER else 1):
            print(f"\n=== {step}: no time is left", flush=True)
            continue
        # The build is of no use to others before it is done, and cheap to ask for again.
        if step != "build" and is_done(progress.read(path)):
            print(f"\n=== {step}: done before", flush=True)
            continue
        to_do = [x for x in todo[i:] if not is_done(progress.read(out / f"{x}.jsonl"))]
        limit = left if step == "build" else left * shares(to_do)
        print(f"\n=== {step}, at most {limit:.0f} s", flush=True)
        log_of(path).unlink(missing_ok=True)
        started = time.monotonic()
        try:
            status, note = RUN[step](path, limit)
        except Exception as error:  # other steps can do without it
            status, note = "failed", progress.describe(error)
        seconds = round(time.monotonic() - started, 1)
        if step == "build":
            begin(out, environment)
        progress.append(path, event="step", status=status, seconds=seconds, note=note)
        print(f"=== {step} {status} after {seconds} s. {note}", flush=True)
        results = gather(out, environment)
        results.write(out / "results.json")
        files.write(out / "summary.md", goals.render(results))
    results.write(out / "results.json")
    files.write(out / "summary.md", goals.render(results))
    title, verdict, *_ = (summary := files.read(out / "summary.md")).split("\n\n")
    print(f"\n{summary}\n{title} in {out}\n{verdict}", flush=True)  # again where the last lines are all that is seen
    for name in ("summary.md", "results.json") if options.keep else ():
        kept = report.FOLDER / f"{record.slug(str(results.environment['device']))}-summary{Path(name).suffix}"
        files.write(kept, files.read(out / name))
        print(f"kept as {kept}")
    sys.exit(exit_status([x for x in results.steps if x.step in wanted], any(x in results.left for x in wanted)))


if __name__ == "__main__":
    files.run(main)
