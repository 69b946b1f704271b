"""Did something get slower? A short run against the ratios of a committed page; never absolute times.

    make bench-check                                          # a minute on two cores
    python bench/check.py --against bench/results/some-machine.json

A case has moved where the quartiles of ours / peer do not overlap those on file. Exit status 1 if a case got slower on
the kind of processor that the file is from; on another, whose ratios may differ, what moved is only told.
"""

import argparse
import sys
from pathlib import Path

import measure
import record
import report
import run
from record import Case, Record
from tqdm import tqdm
from workloads import Spec

SUBSET = {"op": "asa", "size": "64x64", "dim": 64, "heads": 1, "batch": 1, "dtype": "float32", "sweep": ""}
PEER = "sdpa flash"


def subset(results: Record) -> list[Case]:
    """Return the cases of a file that a check runs again: those of SUBSET with a time of ours and of PEER."""
    return [
        case
        for case in results.cases
        if all(getattr(case, name) == value for name, value in SUBSET.items())
        and case.mode != "mem"
        and case.ratio(report.ours(case), PEER)
    ]


def verdict(before: list[float], now: list[float]) -> str:
    """Compare quartiles of ratios: "slower", "faster", or "" where they overlap."""
    if now[0] > before[2]:
        return "slower"
    return "faster" if now[2] < before[0] else ""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="default: this machine's in bench/results, or any there is")
    parser.add_argument("--rounds", type=run.positive, default=15)
    options = parser.parse_args(arguments)
    environment = measure.environment("cpu")
    against = options.against or on_file(report.FOLDER, str(environment["device"]))
    if against is None:
        parser.error(f"no page in {report.FOLDER}: bench/report.py makes one")
    try:
        known = record.read(against)
    except (OSError, ValueError) as error:
        parser.error(f"--against: {error}")
    cases = subset(known)
    if not cases:
        parser.error(f"--against: {against} has no case with {SUBSET} and a time of {PEER}")
    differs = [
        f"{name} {known.environment.get(name)} there, {environment.get(name)} here"
        for name in ("device", "instruction set", "threads", "torch")
        if known.environment.get(name) != environment.get(name)
    ]
    rows, slower = [], 0
    with tqdm(cases, desc="cases", unit="case", file=sys.stdout) as bar:
        for case in bar:
            now = again(case, options.rounds, bar.set_postfix_str)
            if error := now.methods[report.ours(now)].error:
                sys.exit(f"{now.label}: {error}")
            before, after = (x.ratio(report.ours(x), PEER) for x in (case, now))
            moved = verdict(before, after)
            slower += moved == "slower"
            told = [f"{middle:.2f} ({low:.2f}-{high:.2f})" for low, middle, high in (before, after)]
            rows.append([case.label, *told, moved or "within the spread"])
    print(f"\n{run.table(('case, ours / ' + PEER, 'on file', 'now', ''), rows)}\n")
    print(f"on file: {against.name}, commit {known.environment.get('commit')}; now {environment['commit']}")
    if differs:
        print(f"not the same: {'; '.join(differs)}. Ratios may differ for that alone.")
    sys.exit(int(slower > 0 and not differs))


def again(case: Case, rounds: int, tell) -> Case:
    """Measure a case anew."""
    fields = (case.op, case.size, case.dim, case.heads, case.batch, case.dtype, case.inputs, case.alpha)
    impl = report.ours(case).removeprefix("asa ")
    return run.measured(Spec(*fields, "cpu"), case.mode, [impl], [PEER], rounds, tell)


def on_file(folder: Path, device: str) -> Path | None:
    """Return this machine's results, or those of another that have the cases of a check."""

    def holds_cases(path: Path) -> bool:
        try:
            return bool(subset(record.read(path)))
        except ValueError:  # of another program
            return False

    own = folder / f"{record.slug(device)}.json"
    return next((path for path in (own, *sorted(folder.glob("*.json"))) if path.exists() and holds_cases(path)), None)


if __name__ == "__main__":
    main()
