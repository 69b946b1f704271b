"""Denoise photographs that nobody has learned from: what do thresholds that learn gain?

Every method is trained on some photographs of a set and tested on the others; a seed gives all of them the same crops
and noise to train on, and the noise of the test is that of all seeds. Each run adds a line to a file, so that the same
command goes on where it was interrupted. --report writes the tables and the plot of what is there.

    python -m examples.photographs build/photographs --list examples/photographs.csv     # the set; see there
    python -m examples.denoising                        # 5 seeds of everything: most of a day on one thread
    python -m examples.denoising --report --out examples/results/denoising.jsonl         # docs/evidence.md's tables
    python -m examples.denoising --methods "ASA, alpha and h learned" "dense, h learned" --seeds 1 --out quick.jsonl
"""

import argparse
import json
import zlib
from dataclasses import astuple
from pathlib import Path

import torch
from tqdm import tqdm

from .. import files, machine
from ..photographs import Photographs, PhotographsError
from . import methods, report, study
from .attention import Constants
from .methods import METHODS

FIRST = ("photographs", "steps", "tuned")  # in the first line of a file of results
ENTRIES = ("method", "seed", "test")  # in the others
DEFAULT = Path("runs/denoising.jsonl")


class StudyError(Exception):
    """A file of results that cannot be gone on with; the message says why."""


def fingerprint(photographs: Photographs) -> str:
    """Return what tells sets of photographs apart."""
    parts = (photographs.train, photographs.test)
    return f"{zlib.crc32(b''.join(part.crops.numpy().tobytes() for part in parts)):08x}"


def read(path: Path) -> tuple[dict | None, report.Runs]:
    """Return the first line of a file of results, None if there is none, and its runs by method and seed.

    Raises:
        FileError: a line is broken.
        StudyError: a line is not of this study, or of a run that is there already.
    """
    first, runs = None, {name: {} for name in METHODS}
    for where, told in files.read_lines(path):
        if lacking := set(FIRST if first is None else ENTRIES) - told.keys():
            raise StudyError(f"{where} is not of this study: it has {', '.join(told)}, and no {', '.join(lacking)}")
        if first is None:
            first = told
            if lacking := set(methods.KINDS) - told["tuned"].keys():
                raise StudyError(f"{where} has no constants of {', '.join(lacking)}: begin another file")
        elif (name := told["method"]) not in METHODS or told["seed"] in runs[name]:
            raise StudyError(f"{where} {name!r} of seed {told['seed']}, is of no method, or there before: remove it")
        else:
            runs[name][told["seed"]] = told
    return first, {name: seeds for name, seeds in runs.items() if seeds}


def constants(tuned: dict) -> dict:
    """Return what was tuned, as a file has it, as the study has it."""
    return {
        kind: {float(noise): Constants(*values) for noise, values in levels.items()} for kind, levels in tuned.items()
    }


def trains(name: str, tuned: methods.Tuned) -> bool:
    """Return whether a method learns; what does not needs one seed."""
    method = METHODS[name]
    return method.group != methods.PEER and study.is_trained(method.build(tuned))


def render(path: Path) -> None:
    """Write the tables and the plot of a file of results."""
    first, runs = read(path)
    if first is None or not runs:
        raise StudyError(f"{path} holds no results yet")
    every = [told for seeds in runs.values() for told in seeds.values()]
    about = {"steps": first["steps"]}
    about |= {f"{name}s": sorted({told[name] for told in every}) for name in ("processor", "commit")}
    text = report.page(runs, first["tuned"], about)
    print(text)
    files.write(path.with_suffix(".md"), text)
    report.draw(path.with_suffix(".png"), runs)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="denoising", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Path("build/photographs.npz")
    parser.add_argument("--photographs", type=Path, default=default, help=f"the set ({default})")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: all")
    parser.add_argument("--seeds", type=int, default=5, help="how many (5)")
    parser.add_argument("--steps", type=int, default=600, help="of training; networks four times as many (600)")
    parser.add_argument("--out", type=Path, default=DEFAULT, help="results; a .md and a .png are written beside them")
    parser.add_argument("--report", action="store_true", help="run nothing, write the tables and the plot of --out")
    options = parser.parse_args(arguments)
    for name in ("seeds", "steps"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    if options.out == DEFAULT:
        DEFAULT.parent.mkdir(exist_ok=True)
    files.check_out(parser, options.out, ".jsonl")
    files.check([options.out, *(options.out.with_suffix(x) for x in (".md", ".png"))], [options.photographs])
    if options.report:
        render(options.out)
        return
    torch.set_num_threads(1)  # results repeat bitwise

    photographs = Photographs.load(options.photographs)
    if (side := photographs.train.crops.shape[-1]) < study.SIDE:
        raise StudyError(f"{options.photographs} has crops of {side} pixels, expected at least {study.SIDE}")
    asked = {"photographs": fingerprint(photographs), "steps": options.steps}
    where, (first, runs) = machine.environment(), read(options.out)
    if "BM3D" in options.methods and "BM3D" not in runs:
        METHODS["BM3D"].build({})  # tells if the package is missing
    if first is None:
        print("tuning h, alpha and tail, minutes", flush=True)
        tuned = study.tune(photographs)
        plain = {kind: {f"{x:g}": astuple(value) for x, value in levels.items()} for kind, levels in tuned.items()}
        first = asked | {"tuned": plain}
        if options.out.exists():
            raise StudyError(f"{options.out} was begun by another run meanwhile: give the command again")
        files.write(options.out, json.dumps(first) + "\n")
    for name, value in asked.items():
        if first[name] != value:
            raise StudyError(f"{options.out} is of {name} {first[name]!r}, not {value!r}: name another with --out")
    tuned = constants(first["tuned"])
    todo = [
        (name, seed)
        for seed in range(options.seeds)
        for name in options.methods
        if seed not in runs.get(name, {}) and (seed == 0 or trains(name, tuned))
    ]
    with tqdm(total=options.steps * sum(METHODS[name].longer for name, _ in todo), unit="step", smoothing=0.05) as bar:
        for name, seed in todo:
            bar.set_description(f"{name}, seed {seed}")
            done = bar.n
            told = study.run(name, seed, photographs, tuned, options.steps, bar.update)
            bar.update(done + options.steps * METHODS[name].longer - bar.n)
            files.append(options.out, json.dumps(study.rounded(told | where)) + "\n")
    render(options.out)


if __name__ == "__main__":
    files.run(main, PhotographsError, StudyError, ModuleNotFoundError)
