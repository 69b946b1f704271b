"""Did something get slower? A short run against the ratios of a committed page; never absolute times.

    make bench-check                                          # a minute on two cores
    python -m bench.check --against bench/results/some-machine.json

A case has moved where the quartiles of ours / peer and those on file are more than MARGIN apart, and are so again when
it is measured once more. Exit status 1 if a case got slower on the kind of processor that the file is from; on another,
whose ratios may differ, what moved is only reported.
"""

import argparse
import sys
from pathlib import Path

from examples import files

from . import measure, record, report, run
from .record import Case, Record

SUBSET = {"op": "asa", "size": "64x64", "dim": 64, "heads": 1, "batch": 1, "dtype": "float32", "sweep": ""}
PEER = "sdpa flash"
# Quartiles tell how rounds of one process differ. Processes differ by more: alone on the machine, minutes apart, labels
# 64x64, D = 64, fwd+bwd had quartiles of 0.18 to 0.19 and of 0.23 to 0.25 (AMD EPYC).
MARGIN = 1.3


def subset(results: Record) -> list[Case]:
    """Return the cases of a file that a check runs again: those of SUBSET with a time of ours and of PEER."""
    fits = (c for c in results.cases if all(getattr(c, name) == value for name, value in SUBSET.items()))
    return [c for c in fits if c.mode != "mem" and c.ratio(c.ours[0], PEER)]


def verdict(before: list[float], now: list[float]) -> str:
    """Compare quartiles of ratios: "slower", "faster", or "" where they are not further than MARGIN apart."""
    return "slower" if now[0] > MARGIN * before[2] else "faster" if MARGIN * now[2] < before[0] else ""


def compare(case: Case, rounds: int) -> tuple[list[float] | None, str]:
    """Return the quartiles of a case measured anew and a :func:`verdict`, or None and what PEER raised.

    A case that has moved is measured once more: it counts if it moves twice.
    """
    ours, first = case.ours[0], ""
    for _ in range(2):
        now = run.measured(case.spec, case.mode, "cpu", [ours.removeprefix("asa ")], [PEER], rounds)
        if wrong := run.failed(now):
            sys.exit("\n".join(wrong))
        if (after := now.ratio(ours, PEER)) is None:
            return None, f"{PEER}: {now.methods[PEER].error or now.methods[PEER].skipped}"
        moved = verdict(case.ratio(ours, PEER), after)
        if not moved or moved == first:
            return after, moved
        first = moved
    return after, ""


def on_file(folder: Path, device: str) -> Path | None:
    """Return this machine's results, or those of another that have the cases of a check."""
    found = [folder / f"{record.slug(device)}.json", *sorted(folder.glob("*.json"))]
    return next((path for path in found if path.exists() and subset(record.read(path))), None)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="default: this machine's in bench/results, or any there is")
    parser.add_argument("--rounds", type=run.positive, default=15)
    options = parser.parse_args(arguments)
    environment = measure.environment("cpu")
    try:
        against = options.against or on_file(report.FOLDER, str(environment["device"]))
        if against is None:
            parser.error(f"no page in {report.FOLDER}: bench.report makes one")
        known = record.read(against)
    except (OSError, ValueError) as error:
        parser.error(f"--against: {error}")
    cases = subset(known)
    if not cases:
        parser.error(f"--against: {against} has no case with {SUBSET} and a time of {PEER}")
    names = ("device", "instruction set", "threads", "torch")
    pairs = ((name, known.environment.get(name), environment.get(name)) for name in names)
    differs = [f"{name} {there} there, {here} here" for name, there, here in pairs if there != here]
    rows = []
    for case in run.shown(cases):
        now, moved = compare(case, options.rounds)
        ratios = [report.with_quartiles(x) for x in (case.ratio(case.ours[0], PEER), now)]
        rows.append([case.label, *ratios, moved or "within the spread"])
    print(f"\n{report.table(('case, ours / ' + PEER, 'on file', 'now', ''), rows, even=True)}\n")
    print(f"on file: {against.name}, commit {known.environment.get('commit')}; now {environment['commit']}")
    if differs:
        print(f"not the same: {'; '.join(differs)}. Ratios may differ for that alone.")
    sys.exit(int(any(row[-1] == "slower" for row in rows) and not differs))


if __name__ == "__main__":
    files.run(main)
