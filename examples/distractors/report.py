"""What came out of the runs: their lines, the table, the plot."""

import math
import statistics
from collections.abc import Iterable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from .. import files, pages
from ..confidence import interval
from .pictures import TILES
from .train import ABLATIONS, FURTHER, LEARNED, RATES, VARIANTS, WITHOUT, Run

KNOWN = {"variant", "optimizer", "rate", "seed", "steps", "distractors", "validation", "test", "survivors", "seconds"}
KNOWN |= {"commit", "processor", "torch"}
Lines = dict[Run, dict]
Chosen = dict[str, tuple[float, dict[int, dict]]]  # by variant its learning rate and by seed its runs


class ResultError(ValueError):
    """A file of results that does not fit; the message names it."""


def read(path: Path) -> Lines:
    """Return by run what a file tells, nothing where there is none.

    Raises:
        FileError: a line that is broken.
        ResultError: a line that is not of this experiment, a run twice, or runs that do not compare.
    """
    found: Lines = {}
    for where, told in files.read_lines(path):
        if lacking := KNOWN - told.keys():
            raise ResultError(f"{where} is not of this experiment: it has no {', '.join(sorted(lacking))}")
        if told["variant"] not in VARIANTS:
            raise ResultError(f"{where} is of {told['variant']!r}, expected one of {', '.join(VARIANTS)}")
        run = Run(**{name: told[name] for name in Run.__dataclass_fields__})
        if run in found:
            raise ResultError(f"{where} has {run} again: remove one")
        for name in ("steps", "distractors"):
            if (first := next(iter(found.values()), told)[name]) != told[name]:
                raise ResultError(f"{where} has {name} {told[name]}, the first line {first}: keep them in other files")
        found[run] = told
    return found


def best_rate(lines: Lines, variant: str, optimizer: str, steps: int) -> tuple[float | None, Run | None]:
    """Return the rate that is best in validation on seed 0 and None, or None and the run that has to come before.

    Best is the mean of all numbers of distractors. What tests is not looked at, nor are other seeds. Ablations have the
    rate of LEARNED.
    """
    variant = LEARNED if variant in ABLATIONS else variant
    rates = RATES[optimizer]
    further = [iter(side) for side in FURTHER[optimizer]]
    while True:
        scores = {}
        for rate in rates:
            if (run := Run(variant, optimizer, rate, 0, steps)) not in lines:
                return None, run
            scores[rate] = statistics.fmean(lines[run]["validation"])
        best = max(scores, key=scores.__getitem__)
        lower = next(further[0], None) if best == rates[0] else None
        higher = next(further[1], None) if best == rates[-1] else None
        if lower is None and higher is None:
            return best, None
        rates = tuple(rate for rate in (lower, *rates, higher) if rate is not None)


def choose(lines: Lines, optimizer: str) -> Chosen:
    """Return the variants of which all rates have run, in the order of VARIANTS."""
    result: Chosen = {}
    steps = next(iter(lines.values()))["steps"]
    for variant in VARIANTS:
        rate, _ = best_rate(lines, variant, optimizer, steps)
        if rate is not None:
            seeds = sorted(run.seed for run in lines if run == Run(variant, optimizer, rate, run.seed, steps))
            if seeds:
                result[variant] = rate, {seed: lines[Run(variant, optimizer, rate, seed, steps)] for seed in seeds}
    return result


def told_in_percent(values: Iterable[float], form: str = ".1f") -> str:
    """Return a mean in per cent with half of its interval, alone where there is one value, "-" for none."""
    values = [100 * x for x in values]
    if not values:
        return "-"
    mean, half = interval(values)
    return f"{mean:{form}}" if math.isnan(half) else f"{mean:{form}} ± {half:.1f}"


def milliseconds(seeds: dict[int, dict]) -> float:
    return 1e3 * statistics.median(told["seconds"] for told in seeds.values())


def table(runs: Chosen, distractors: list[int]) -> str:
    """Return the figures of an optimizer as Markdown."""
    learned = runs.get(LEARNED, (0.0, {}))[1]
    ends = (0, -1)  # the fewest distractors and the most
    header = ["block", "rate", "seeds", *(f"mIoU, {count}" for count in distractors)]
    header += [f"`{LEARNED}` over it, {distractors[end]}" for end in ends]
    header += [f"survivors, {distractors[end]}" for end in ends] + ["ms a step"]
    rows = []
    for variant, (rate, seeds) in runs.items():
        cells = [variant, f"{rate:g}", len(seeds)]
        cells += [told_in_percent(told["test"][i] for told in seeds.values()) for i in range(len(distractors))]
        both = [] if variant == LEARNED else [seed for seed in seeds if seed in learned]
        for end in ends:
            gains = (learned[seed]["test"][end] - seeds[seed]["test"][end] for seed in both)
            cells.append(told_in_percent(gains, "+.1f"))
        kept = [told["survivors"] for told in seeds.values() if told["survivors"]]
        cells += [f"{statistics.fmean(each[end] for each in kept):.0f}" if kept else "-" for end in ends]
        rows.append([*cells, f"{milliseconds(seeds):.1f}"])
    return pages.table(header, rows)


def table_without(runs: Chosen, distractors: list[int]) -> str:
    """Return what trained networks of an optimizer are without something as Markdown, "" where none was tested so."""
    rows = []
    for variant, (_, seeds) in runs.items():
        tested = [told for told in seeds.values() if told.get("without")]
        for name in WITHOUT if tested else ():
            losses = ([told["without"][name][i] - told["test"][i] for told in tested] for i in range(len(distractors)))
            rows.append([variant, name, len(tested), *(told_in_percent(each, "+.1f") for each in losses)])
    return pages.table(["block", "without", "seeds", *map(str, distractors)], rows)


def page(lines: Lines) -> str:
    """Return all figures as a page."""
    first = next(iter(lines.values()))
    machines = {f"{told['processor']}, torch {told['torch']}, commit {told['commit']}" for told in lines.values()}
    what = (
        f"mIoU in per cent by number of distractors, on test pictures, after {first['steps']} steps; ± is half of a",
        "95 % confidence interval over seeds (Student's t), a single seed has none. Of three learning rates, and the",
        "next, at most two on a side, while the best is the least or the largest, the one that is best on validation",
        "pictures with seed 0; ablations have that of `asa`. Gains are paired by seeds. Survivors of a row, of",
        f"{TILES}, on test pictures, a mean over seeds; milliseconds of one thread for a step, the median of steps and",
        "seeds. Trained networks are tested without something of their block too, its reciprocity (a neighbour need",
        "not choose back) or its thresholds (everybody is kept): by what mIoU changes.",
    )
    found = {optimizer: runs for optimizer in RATES if (runs := choose(lines, optimizer))}
    if not found:
        raise ResultError("no block has run with all its rates yet")
    parts = ["\n".join(what)]
    for optimizer, runs in found.items():
        tables = [form(runs, first["distractors"]) for form in (table, table_without)]
        parts += [f"## {optimizer}", *filter(None, tables)]
        if left_out := {run.variant for run in lines if run.optimizer == optimizer} - runs.keys():
            parts.append(f"Not all learning rates have run of {', '.join(sorted(left_out))}: left out.")
    return "\n\n".join([*parts, "Runs: " + "; ".join(sorted(machines)) + "."]) + "\n"


def draw(path: Path, lines: Lines) -> None:
    """Draw mIoU of the blocks against distractors, and at the most of them against the time of a step.

    A row for each optimizer; ablations are left out.
    """
    found = {}
    for optimizer in RATES:
        runs = {variant: x for variant, x in choose(lines, optimizer).items() if variant not in ABLATIONS}
        found |= {optimizer: runs} if runs else {}
    figure, axes = plt.subplots(len(found), 2, figsize=(14, 5.5 * len(found)), layout="constrained", squeeze=False)
    distractors = next(iter(lines.values()))["distractors"]
    for (left, right), (optimizer, runs) in zip(axes, found.items(), strict=True):
        for variant, (_, seeds) in runs.items():
            index = list(VARIANTS).index(variant)
            style = {"color": f"C{index}" if index < 10 else "black", "marker": "osD^v"[index % 5], "capsize": 2}
            by_count = zip(*(told["test"] for told in seeds.values()), strict=True)
            mean, half = np.array([interval([100 * x for x in values]) for values in by_count]).T
            half = np.nan_to_num(half)
            left.errorbar(distractors, mean, half, label=f"{variant} ({len(seeds)})", **style)
            right.errorbar(milliseconds(seeds), mean[-1], half[-1], **style)
            right.annotate(variant, (milliseconds(seeds), mean[-1]), (6, 3), textcoords="offset points", fontsize=8)
        left.set(title=optimizer, xlabel="distractors", ylabel="mIoU, %: mean of seeds, 95 % confidence interval")
        left.legend(title="block (seeds)", fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
        right.set(
            title=f"{distractors[-1]} distractors", xlabel="ms a step, one thread", ylabel="mIoU, %", xlim=(0, None)
        )
        for each in (left, right):
            each.grid(alpha=0.3)
    files.save(figure, path, dpi=90)
    plt.close(figure)
