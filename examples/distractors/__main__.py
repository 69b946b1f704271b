"""Segmentation in which attention must choose: every block, against the number of distractors.

    python -m examples.distractors                  # what is missing of all runs, then the table and the plot
    python -m examples.distractors --report         # the table and the plot of the runs that there are
    python -m examples.distractors --variants none asa --seeds 1 --steps 100 --out quick.jsonl

Runs differ in the block, the optimizer, its learning rate and the seed alone; a seed gives all of them the same
pictures in the same order. With seed 0 several rates run, with others the one that is best on the validation pictures
of seed 0; ablations have the rate of "asa", which runs before them. Each run adds a line to --out when it is done, and
the same command goes on where it stopped.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from .. import files, machine
from . import pictures, report
from .train import ABLATIONS, RATES, VARIANTS, Run, run

DISTRACTORS = [0, 25, 50, 100, 200]
VALIDATION, TEST = 100, 250  # pictures for each of these


def missing(lines: report.Lines, options: argparse.Namespace) -> Iterator[Run]:
    """Yield the runs that are not there yet, seed by seed; ``lines`` must grow by each, for it chooses the rates."""
    for seed in range(options.seeds):
        for optimizer in options.optimizers:
            for variant in sorted(options.variants, key=ABLATIONS.__contains__):  # whose rate is another's
                best, before = report.best_rate(lines, variant, optimizer, options.steps)
                while before is not None:
                    yield before
                    best, before = report.best_rate(lines, variant, optimizer, options.steps)
                if (run_of_seed := Run(variant, optimizer, best, seed, options.steps)) not in lines:
                    yield run_of_seed


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="distractors", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    variants, optimizers = list(VARIANTS), list(RATES)
    parser.add_argument(
        "--variants", nargs="+", choices=variants, default=variants, help="in this order, ablations last (all)"
    )
    parser.add_argument("--optimizers", nargs="+", choices=optimizers, default=optimizers, help="in this order (all)")
    parser.add_argument("--seeds", type=int, default=5, help="how many (5)")
    parser.add_argument("--steps", type=int, default=600, help="of training (600)")
    parser.add_argument("--distractors", type=int, nargs="+", default=DISTRACTORS, help=f"to test with ({DISTRACTORS})")
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/distractors.jsonl"),
        help="the runs (runs/distractors.jsonl); the table and the plot go beside it, as .md and .png",
    )
    options = parser.parse_args(arguments)
    for name in ("seeds", "steps"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    for count in options.distractors:
        if not 0 <= count <= pictures.MOST:
            parser.error(f"--distractors must be from 0 to {pictures.MOST}, got {count}")
    if options.out.suffix in (".md", ".png"):
        parser.error(f"--out is of runs, the table and the plot go beside it: got {str(options.out)!r}")
    page, plot = (options.out.with_suffix(suffix) for suffix in (".md", ".png"))
    files.check([options.out, page, plot])
    lines = report.read(options.out)
    if not options.report:
        for name in ("steps", "distractors"):
            there, asked = next(iter(lines.values()), vars(options))[name], getattr(options, name)
            if there != asked:
                raise report.ResultError(f"{options.out} has {name} {there}, not {asked}: name another --out")
        options.out.parent.mkdir(parents=True, exist_ok=True)
        torch.set_num_threads(1)
        environment = machine.environment()
        with tqdm(missing(lines, options), unit="run") as bar:
            for each in bar:
                bar.set_postfix_str(f"{each.variant}, {each.optimizer} {each.rate:g}, seed {each.seed}")
                told = run(each, options.distractors, VALIDATION, TEST) | environment
                files.append(options.out, json.dumps(told) + "\n")
                lines[each] = told
    if not lines:
        raise report.ResultError(f"{options.out} has no runs")
    text = report.page(lines)
    print(text)
    files.write(page, text)
    report.draw(plot, lines)


if __name__ == "__main__":
    files.run(main, report.ResultError)
