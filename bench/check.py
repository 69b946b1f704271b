"""Did something get slower? A short run against the ratios of a committed page; never absolute times.

    make bench-check                                          # a minute on two cores
    python bench/check.py --against bench/results/some-machine.json

A case has moved where the quartiles of ours / peer and those on file are more than MARGIN apart, and are so again when
it is measured once more. Exit status 1 if a case got slower on the kind of processor that the file is from; on another,
whose ratios may differ, what moved is only told.
"""

import argparse
import sys
from pathlib import Path

import measure
import record
import report
import run
from record import Case, Record, files
from tqdm import tqdm
from workloads import Spec

SUBSET = {"op": "asa", "size": "64x64", "dim": 64, "heads": 1, "batch": 1, "dtype": "float32", "sweep": ""}
PEER = "sdpa flash"
# Quartiles tell how rounds of one process differ. Processes differ by more: alone on the machine, minutes apart, labels
# 64x64, D = 64, fwd+bwd had quartiles of 0.18 to 0.19 and of 0.23 to 0.25 (AMD EPYC).
MARGIN = 1.3


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
    """Compare quartiles of ratios: "slower", "faster", or "" where they are not further than MARGIN apart."""
    if now[0] > MARGIN * before[2]:
        return "slower"
    return "faster" if MARGIN * now[2] < before[0] else ""


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
            now, moved = compare(case, options.rounds, bar.set_postfix_str)
            slower += moved == "slower"
            told = [report.with_quartiles(x) for x in (case.ratio(report.ours(case), PEER), now)]
            rows.append([case.label, *told, moved or "within the spread"])
    print(f"\n{run.table(('case, ours / ' + PEER, 'on file', 'now', ''), rows)}\n")
    print(f"on file: {against.name}, commit {known.environment.get('commit')}; now {environment['commit']}")
    if differs:
        print(f"not the same: {'; '.join(differs)}. Ratios may differ for that alone.")
    sys.exit(int(slower > 0 and not differs))


def compare(case: Case, rounds: int, tell) -> tuple[list[float] | None, str]:
    """Measure a case anew, and once more if it has moved: it counts if it moves twice.

    Returns:
        The quartiles of the ratios, None if PEER failed; and a :func:`verdict`, or what PEER raised.
    """
    before, first = case.ratio(report.ours(case), PEER), ""
    for _ in range(2):
        now = again(case, rounds, tell)
        if error := now.methods[report.ours(now)].error:
            sys.exit(f"{now.label}: {error}")
        if (after := now.ratio(report.ours(now), PEER)) is None:
            return None, f"{PEER}: {now.methods[PEER].error or now.methods[PEER].skipped}"
        moved = verdict(before, after)
        if not moved or moved == first:
            return after, moved
        first = moved
    return after, ""


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
        except (OSError, ValueError):  # of another program
            return False

    own = folder / f"{record.slug(device)}.json"
    return next((path for path in (own, *sorted(folder.glob("*.json"))) if path.exists() and holds_cases(path)), None)


if __name__ == "__main__":
    files.run(main)
