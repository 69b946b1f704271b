"""Everything that needs a GPU, in one command and within minutes: build, tests, checks, timings.

    make gpu                                              # results in build/gpu
    python bench/gpu.py --out results --only tests,timings
    python bench/gpu.py --out results --keep              # also bench/results/<gpu>*

It uses the Python it is run with, which needs torch, triton and pytest, installs nothing and takes asa_ops from this
source tree. Steps run one after another, each in processes of its own with a limit, so that one that hangs leaves time
for the others. The folder gets results.json (``bench/gpu_report.py`` has the form), summary.md and a log of every
step, rewritten after each. Exit status 1 if something failed, tests did not finish, or nothing ran.
"""

import argparse
import contextlib
import datetime
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import gpu_report
import gpu_shard
import record
import torch
from measure import commit, version
from record import files

ROOT = Path(__file__).resolve().parents[1]
STEPS = tuple(gpu_report.SECONDS)
MAX_SHARDS = 14  # processes that share the tests: compiling kernels keeps one core each busy
CONFIGURATIONS = "configuration"  # tests with this in their names are the step "configs"
SANITIZED = """
import torch
from asa_ops import asa_attention
from asa_ops.core import devices

no_cuda = devices.why_no_cuda_on("asa_cuda_fwd", torch.device("cuda"))

for dtype, dim, options in (
    (torch.bfloat16, 64, {}),
    (torch.bfloat16, 256, {"topk": 9}),
    (torch.float32, 24, {"reciprocal": False}),
    (torch.float16, 128, {"padding": True}),
):
    n = 11 * 13
    options["key_padding_mask"] = torch.rand(1, n, device="cuda") < 0.8 if options.pop("padding", False) else None
    leaves = [torch.randn(1, 2, n, dim, device="cuda").to(dtype).requires_grad_() for _ in range(3)]
    leaves += [torch.rand(1, 2, n, device="cuda").add(0.5).requires_grad_() for _ in range(2)]
    for learn in (None, "straight_through"):
        for impl in ("triton",) if no_cuda else ("triton", "cuda"):
            out = asa_attention(*leaves, grid=(11, 13), threshold_grad=learn, impl=impl, **options)
            torch.autograd.grad(out.float().square().sum(), leaves)
torch.cuda.synchronize()
print("the calls ended;", no_cuda or "with the CUDA C++ kernels")
"""


def environment() -> dict[str, object]:
    """Return what the results depend on: the card, versions, the commit, the date."""
    result: dict[str, object] = {"gpu": None, "driver": driver()}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        result["gpu"] = properties.name
        result["gpu memory"] = f"{properties.total_memory / 2**30:.0f} GiB"
        result["multiprocessors"] = properties.multi_processor_count
        result["compute capability"] = f"{properties.major}.{properties.minor}"
    result["torch"] = torch.__version__
    result["cuda"] = torch.version.cuda
    result |= {package: version(package) for package in ("triton", "pytest")}
    result["python"] = platform.python_version()
    result["processors"] = os.cpu_count()
    result["commit"] = commit()
    result["date"] = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return result


def driver() -> str | None:
    """Return the version of the GPU driver."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, check=True, capture_output=True, text=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


# Processes.


def child_environment(**more: str) -> dict[str, str]:
    """Return the environment of every process: asa_ops from this tree, no output held back."""
    path = os.pathsep.join(filter(None, (str(ROOT), str(ROOT / "bench"), os.environ.get("PYTHONPATH"))))
    return os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"} | more


def run_all(
    commands: list[list[str]], logs: list[Path], limit: float, watch: Callable, **more: str
) -> list[int | None]:
    """Run commands side by side, each into its log; return their exit statuses, None for those that the limit ended.

    ``watch`` is called every half second or so, and once at the end.
    """
    deadline = time.monotonic() + limit
    with contextlib.ExitStack() as stack:
        processes = []
        for command, log in zip(commands, logs, strict=True):
            output = stack.enter_context(log.open("ab"))
            process = subprocess.Popen(
                command, cwd=ROOT, env=child_environment(**more), stdout=output, stderr=output, start_new_session=True
            )
            processes.append(process)
        try:
            while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
                time.sleep(0.5)
                watch()
            return [process.poll() for process in processes]
        finally:
            for process in processes:
                if process.poll() is None:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)  # its children too: compilers, the sanitized program
                    process.wait()
            watch()


class Follower:
    """Prints what a growing file gets."""

    def __init__(self, path: Path, form: Callable[[str], str | None] = str):
        self.path, self.form, self.at, self.rest = path, form, 0, ""

    def __call__(self) -> None:
        if not self.path.exists():
            return
        with self.path.open(errors="replace") as file:
            file.seek(self.at)
            text = self.rest + file.read()
            self.at = file.tell()
        *lines, self.rest = text.split("\n")
        for line in lines:
            shown = self.form(line)
            if shown is not None:
                print(shown, flush=True)


def run(command: list[str], log: Path, limit: float, **more: str) -> int | None:
    """Run one command into a log and onto the screen; return its exit status, None if the limit ended it."""
    return run_all([command], [log], limit, Follower(log), **more)[0]


def outcome_line(line: str) -> str | None:
    event = json.loads(line)
    if event["event"] != "outcome":
        return None
    told = f"{event['outcome'].upper():8} {event['seconds']:6.1f} s  {event['test']}"
    return told if event["outcome"] in ("passed", "skipped") else f"{told}\n         {event['message']}"


# Steps: each returns its status and a note, and may leave more in ``results``.


def build(limit: float, log: Path, results: dict) -> tuple[str, str]:
    """Build the C++ extension in place, for this card; without it only the CUDA C++ kernels are left out."""
    major, minor = torch.cuda.get_device_capability()
    there = "from asa_ops import extension; import sys; sys.exit({} not in extension.cuda_architectures())"
    if run([sys.executable, "-c", there.format(10 * major + minor)], log, limit) == 0:
        return "passed", "was built before"
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    status = run(command, log, limit, ASA_OPS_CUDA_ARCHS=f"{major}{minor}")
    if status == 0 and list(ROOT.glob("asa_ops/_C*.so")):
        return "passed", ""
    return "skipped", "no C++ extension: the limit was reached" if status is None else "no C++ extension, see build.log"


def run_tests(step: str, chosen: str, limit: float, log: Path, results: dict) -> tuple[str, str]:
    """Run the tests marked gpu whose names fit ``chosen``, shared out among processes."""
    files = [str(path) for path in sorted(ROOT.glob("tests/**/test_*.py")) if "mark.gpu" in path.read_text()]
    shards = max(1, min(MAX_SHARDS, (os.cpu_count() or 1) - 2))
    with tempfile.TemporaryDirectory() as folder:
        outcomes = [Path(folder, f"{shard}.jsonl") for shard in range(shards)]
        logs = [Path(folder, f"{shard}.log") for shard in range(shards)]
        command = [sys.executable, "-m", "pytest", "-p", "gpu_shard", "-p", "no:cacheprovider", "--tb=short"]
        command += ["-m", "gpu", "-k", chosen, *files]
        again = ["sh", "-c", f'while "$@"; status=$?; [ $status = {gpu_shard.LOST} ]; do :; done; exit $status', "sh"]
        commands = [
            [*again, *command, f"--shard={i}/{shards}", f"--outcomes={path}"] for i, path in enumerate(outcomes)
        ]
        followers = [Follower(path, outcome_line) for path in outcomes]

        def watch():
            for follow in followers:
                follow()

        statuses = run_all(commands, logs, limit, watch, OMP_NUM_THREADS="2")
        parts = (f"--- share {i} of {shards}\n{x.read_text(errors='replace')}" for i, x in enumerate(logs))
        files.write(log, "".join(parts))
        lines = [line for path in outcomes if path.exists() for line in path.read_text().split("\n")[:-1]]
    results[step] = counts = gpu_report.tally(lines)
    status = gpu_report.status_of_tests(counts, timed_out=None in statuses)
    crashed = [s for s in statuses if s not in (0, 1, 5, None)]  # 5: an empty share
    note = f"{counts['passed']} of {counts['selected']} passed"
    if crashed:
        return "failed", f"{note}; pytest ended with {crashed}, see {log.name}"
    return status, note


def find_sanitizer() -> str | None:
    """Return the path of compute-sanitizer, wherever a CUDA toolkit keeps it."""
    if found := shutil.which("compute-sanitizer"):
        return found
    roots = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    roots += sorted(Path("/usr/local").glob("cuda*"), reverse=True)
    places = [root / folder / "compute-sanitizer" for root in roots for folder in ("bin", "compute-sanitizer")]
    return next((str(path) for path in places if path.is_file() and os.access(path, os.X_OK)), None)


def sanitize(limit: float, log: Path, results: dict) -> tuple[str, str]:
    """Run a few small calls under compute-sanitizer: memcheck, then racecheck."""
    tool = find_sanitizer()
    if tool is None:
        return "skipped", "compute-sanitizer not found"
    program = [sys.executable, "-c", SANITIZED]
    started = time.monotonic()
    status = run(program, log, limit / 2)  # compiles the kernels, which is slow under the tool
    if status != 0:
        return "timed out" if status is None else "failed", f"the program without the tool, see {log.name}"
    notes = []
    for check in ("memcheck", "racecheck"):
        command = [tool, "--tool", check, "--error-exitcode", "9", *program]
        part = log.with_name(f"{check}.log")
        # Every tensor an allocation of its own, so that a step beyond its end shows.
        status = run(command, part, limit - (time.monotonic() - started), PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        outcome, note = gpu_report.sanitizer_status(check, status, part.read_text(errors="replace"))
        notes.append(note)
        if outcome != "passed":
            break
    return outcome, "; ".join(notes)


def time_everything(limit: float, log: Path, results: dict) -> tuple[str, str]:
    """Run bench/gpu_timings.py and read what it wrote, all of it or what it had when the limit ended it."""
    seconds = max(limit - 25, 10)  # a case that starts then has time to end
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder, "timings.json")
        command = [sys.executable, "bench/gpu_timings.py", "--out", str(written), "--seconds", f"{seconds:.0f}"]
        status = run(command, log, limit)
        if written.exists():
            results["timings"] = json.loads(written.read_text())
    cases = len(results.get("timings", {}).get("cases", []))
    note = f"{cases} cases"
    if status is None:
        return "timed out", note
    return ("passed" if status == 0 and cases else "failed"), note if status == 0 else f"{note}, see {log.name}"


BENCH = ["--device", "cuda", "--dtype", "bfloat16", "--dim", "256", "--size", "97x97", "128x128"]


def run_bench(limit: float, log: Path, results: dict) -> tuple[str, str]:
    """Run bench/run.py and make its page, of all cases or of those that were done when the limit ended it."""
    written = log.with_name("bench.json")
    written.unlink(missing_ok=True)
    status = run([sys.executable, "bench/run.py", *BENCH, "--out", str(written)], log, limit - 15)
    if not written.exists():
        return "timed out" if status is None else "failed", f"no case, see {log.name}"
    drawn = run([sys.executable, "bench/report.py", str(written), "--folder", str(log.parent / "bench")], log, 15)
    note = f"{len(record.read(written).cases)} cases"
    if drawn != 0:
        return "failed", f"{note}, no page, see {log.name}"
    return "timed out" if status is None else "passed" if status == 0 else "failed", note


RUN = {
    "build": build,
    "tests": lambda *args: run_tests("tests", f"not {CONFIGURATIONS}", *args),
    "configs": lambda *args: run_tests("configs", CONFIGURATIONS, *args),
    "sanitizer": sanitize,
    "timings": time_everything,
    "bench": run_bench,
}


def report(out: Path, results: dict) -> str:
    """Write results.json and summary.md; return the summary."""
    summary = gpu_report.render(results)
    files.write(out / "results.json", json.dumps(results, indent=1) + "\n")
    files.write(out / "summary.md", summary)
    return summary


def keep(out: Path, results: dict) -> None:
    """Copy the summary, the results and the page of the benchmarks to bench/results, named after the card."""
    stem = record.slug(str(results["environment"]["gpu"]))
    folder = ROOT / "bench" / "results"
    for source, suffix in (("summary.md", "-summary.md"), ("results.json", "-summary.json")):
        files.write(folder / (stem + suffix), files.read(out / source))
    page = list(out.glob(f"bench/{stem}*"))
    for source in page:
        with files.whole(folder / source.name) as file:
            file.write(source.read_bytes())
    if page:  # its sweeps may be fewer
        for old in set(folder.glob(f"{stem}-*.png")) - {folder / source.name for source in page}:
            old.unlink()
    print(f"kept as bench/results/{stem}*")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/gpu"), help="folder for the results")
    parser.add_argument("--only", default=",".join(STEPS), help=f"comma-separated, of {', '.join(STEPS)}")
    parser.add_argument("--budget-minutes", type=float, default=9)
    parser.add_argument("--keep", action="store_true", help="copy the summary to bench/results")
    options = parser.parse_args()
    wanted = options.only.split(",")
    if unknown := set(wanted) - set(STEPS):
        parser.error(f"--only takes {', '.join(STEPS)}, got {', '.join(sorted(unknown))}")
    if not torch.cuda.is_available():
        sys.exit(f"bench/gpu.py needs a CUDA device: torch {torch.__version__} finds none")
    deadline = time.monotonic() + 60 * options.budget_minutes - 5
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the processes of the step too
    out = options.out.resolve()
    files.check([out / "results.json", out / "summary.md"])
    out.mkdir(parents=True, exist_ok=True)
    results: dict = {"environment": environment(), "steps": []}
    print(json.dumps(results["environment"], indent=1), flush=True)
    todo = [step for step in STEPS if step in wanted]
    for i, step in enumerate(todo):
        limit = gpu_report.seconds_for(step, todo[i + 1 :], max(deadline - time.monotonic(), 1))
        print(f"\n=== {step}, at most {limit:.0f} s", flush=True)
        log = out / f"{step}.log"
        log.unlink(missing_ok=True)
        started = time.monotonic()
        status, note = RUN[step](limit, log, results)
        seconds = round(time.monotonic() - started, 1)
        results["steps"].append({"step": step, "status": status, "seconds": seconds, "note": note})
        print(f"=== {step} {status} after {seconds} s. {note}", flush=True)
        summary = report(out, results)
    print(f"\n{summary}\nin {out}", flush=True)
    if options.keep:
        keep(out, results)
    sys.exit(gpu_report.exit_status(results["steps"]))


if __name__ == "__main__":
    files.run(main)
