"""What every block, and every part of adaptive sparse attention, does for `shapes`: the paper's ablation, and more.

    python -m examples.segmentation.ablation                       # every variant, 5 seeds: an hour or two on two cores
    python -m examples.segmentation.ablation --variants none asa --seeds 2 --steps 50 --out quick

Variants differ in the block, or in how fast its thresholds learn, alone; a seed gives all of them the same pictures in
the same order. Each run is a process of one thread and leaves a file, so that an interrupted command goes on where it
was. What is in --out is gathered in `ablation.json`, of which the table and the plot, `ablation.md` and `ablation.png`,
are made.

The paper (Table 3) has 43.59 -> 44.12 -> 44.38 mIoU on ADE20K and 77.05 -> 77.68 -> 78.01 on PASCAL VOC 2012 for no
attention, NLSCB, NLSCB and LSCB. Here are made pictures; nothing below says anything about those data sets.
"""

import argparse
import concurrent.futures
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from asa_ops import asa_attention
from asa_ops.nn import AdaptiveSparseAttention

from .. import files, memory, pages
from ..confidence import interval
from .cli import main_of
from .config import NO_BLOCK, Config, ConfigError
from .train import train

BANDS = (0.5, 1.0, 4.0)  # 2 is the default
RATES = (0.1, 0.01, 0.001)  # of learning thresholds, over the learning rate of the rest; 1 is the default


def _asa(rate: float = 1.0, **options) -> dict:
    return {"block": "asa", "block_options": options, "threshold_rate": rate}


VARIANTS: dict[str, dict] = {  # name: settings
    "none": {"block": NO_BLOCK},
    "non_local": {"block": "non_local"},
    "asa, published": _asa(published=True),
    "asa, no gradient": _asa(threshold_grad=None),
    "asa, NLSCB alone": _asa(local=False),
    "asa": _asa(),
    **{f"asa, band {band:g}": _asa(threshold_band=band) for band in BANDS},
    **{f"asa, rate {rate:g}": _asa(rate) for rate in RATES},
    **{f"asa, band {band:g}, rate 0.1": _asa(0.1, threshold_band=band) for band in BANDS},
    "asa, softplus": _asa(threshold_activation="softplus"),
    "asa, softplus, no gradient": _asa(threshold_activation="softplus", threshold_grad=None),
    **{f"asa, softplus, rate {rate:g}": _asa(rate, threshold_activation="softplus") for rate in RATES},
    "linear_attention": {"block": "linear_attention"},
    "efficient_attention": {"block": "efficient_attention"},
    "criss_cross": {"block": "criss_cross"},
    "channelized_axial": {"block": "channelized_axial"},
    "squeeze_and_attention": {"block": "squeeze_and_attention"},
    "interlaced_sparse": {"block": "interlaced_sparse", "block_options": {"factors": [4, 4]}},
    "salient_positions": {"block": "salient_positions"},
}
REFERENCE = "asa, no gradient"  # what the others' gains are measured from, seed by seed
SOFTPLUS = "asa, softplus"  # thresholds start elsewhere, so variants of it have their own reference
SOFTPLUS_REFERENCE = "asa, softplus, no gradient"
SAMPLES = 20  # points of a curve of survivors
DIGITS = 5  # significant ones of what is gathered


class Watch:
    """Looks at the block every now and then: seconds of a step, survivors a row, thresholds."""

    def __init__(self, steps: int):
        self.every, self.seconds, self.curve = max(steps // SAMPLES, 1), [], []
        self.last: float | None = None
        self.input: torch.Tensor | None = None

    def __call__(self, step: int, model: nn.Module) -> None:
        now = time.perf_counter()
        if self.last is not None:
            self.seconds.append(now - self.last)
        else:
            model.head.block.register_forward_pre_hook(self.keep)
        block = model.head.block
        if self.input is not None and isinstance(block, AdaptiveSparseAttention) and step % self.every == 0:
            self.curve.append([step, *figures(block, self.input)])
        self.last = time.perf_counter()

    def keep(self, block: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        self.input = inputs[0].detach()


@torch.no_grad()
def figures(block: AdaptiveSparseAttention, x: torch.Tensor) -> tuple[float, float, float, float]:
    """Return the survivors a row and the quartiles of alpha, for features [B, C, H, W]."""
    tokens = block.tokens(x)
    _, stats = asa_attention(**tokens, return_stats=True)
    quartiles = tokens["alpha"].float().cpu().quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
    return stats.survivors.double().mean().item(), *quartiles


def run(name: str, seed: int, steps: int | None, path: Path) -> None:
    """Train one variant and write what it did."""
    settings = VARIANTS[name] | {"seed": seed} | ({"steps": steps} if steps else {})
    config = Config.load("shapes").replace(**settings)
    watch, before = Watch(config.steps), memory.resident("VmHWM")
    with tempfile.TemporaryDirectory() as folder:
        result = train(config, Path(folder), after_step=watch)
    told = {
        "variant": name,
        "seed": seed,
        "steps": config.steps,
        "miou": result.report.miou,
        "iou": result.report.iou.tolist(),
        "loss": statistics.fmean(result.losses[-max(config.steps // 10, 1) :]),
        "seconds": statistics.median(watch.seconds) if watch.seconds else None,
        "bytes": None if before is None else memory.resident("VmHWM") - before,
        "curve": watch.curve,
    }
    files.write(path, json.dumps(told) + "\n")


def run_in_process(name: str, seed: int, steps: int | None, path: Path) -> str | None:
    """Run in a process of its own, on one thread of a CPU, for its memory; return what went wrong."""
    command = [sys.executable, "-m", "examples.segmentation.ablation"]
    command += ["--one", name, str(seed), "--out", str(path.parent)]
    command += ["--steps", str(steps)] if steps else []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if result.returncode == 0:
        return None
    return f"{name}, seed {seed}: {(result.stderr.strip().splitlines() or ['no message'])[-1]}"


def path_of(folder: Path, name: str, seed: int) -> Path:
    return folder / f"{name.replace(', ', '-').replace(' ', '_')}-{seed}.json"


# What came out.


def read(folder: Path) -> dict[str, dict[int, dict]]:
    """Return by variant and seed what the runs wrote.

    Raises:
        ConfigError: a file that is not of a run, two that disagree about one, or runs of different lengths.
    """
    found: dict[str, dict[int, dict]] = {}
    lengths = {}
    for path in sorted(folder.glob("*.json")):
        for told in read_file(path):
            before = found.setdefault(told["variant"], {}).setdefault(told["seed"], told)
            if rounded(before) != rounded(told):
                raise ConfigError(
                    f"{path} has another {told['variant']!r} of seed {told['seed']} than a file beside it"
                )
            lengths[told["steps"]] = path.name
    if len(lengths) > 1:
        raise ConfigError(f"{folder} has runs of different lengths, {lengths}: remove some, or name another --out")
    return {name: found[name] for name in VARIANTS if name in found}


def read_file(path: Path) -> list[dict]:
    """Return the runs of a file, which has one or a list of them."""
    try:
        told = json.loads(files.read(path))
    except ValueError as error:
        raise ConfigError(f"{path} is broken ({error}): remove it") from error
    told = told if isinstance(told, list) else [told]
    if not all(isinstance(each, dict) and {"variant", "seed", "steps"} <= each.keys() for each in told):
        raise ConfigError(f"{path} is not of this experiment: remove it")
    if unknown := [each["variant"] for each in told if each["variant"] not in list(VARIANTS)]:
        raise ConfigError(f"{path} has a run of {unknown[0]!r}, expected one of {', '.join(VARIANTS)}: remove it")
    return told


def rounded(x: object) -> object:
    """Return what is gathered of a run, with DIGITS digits."""
    if isinstance(x, dict):
        return {name: rounded(each) for name, each in x.items()}
    if isinstance(x, list):
        return [rounded(each) for each in x]
    return float(f"{x:.{DIGITS}g}") if isinstance(x, float) else x


def gather(folder: Path, runs: dict[str, dict[int, dict]]) -> None:
    """Put all runs into one file, a line each, instead of one file each."""
    lines = [json.dumps(rounded(told)) for seeds in runs.values() for _, told in sorted(seeds.items())]
    files.write(folder / "ablation.json", "[\n" + ",\n".join(lines) + "\n]\n")
    for name, seeds in runs.items():
        for seed in seeds:
            path_of(folder, name, seed).unlink(missing_ok=True)


def reference_of(name: str) -> str:
    """Return the variant that the gain of another is measured from."""
    return SOFTPLUS_REFERENCE if name.startswith(SOFTPLUS) and name != SOFTPLUS_REFERENCE else REFERENCE


def gains(runs: dict[str, dict[int, dict]], name: str) -> list[float]:
    """Return by how many points of mIoU a variant beats its reference, for the seeds that both have."""
    reference = runs.get(reference_of(name), {})
    return [100 * (told["miou"] - reference[seed]["miou"]) for seed, told in runs[name].items() if seed in reference]


def positions(config: Config) -> int:
    """Return the number of positions of the block's map in training."""
    return math.prod(length // config.output_stride for length in config.crop)


def table(runs: dict[str, dict[int, dict]]) -> str:
    """Return the figures as Markdown."""

    def told(values: list[float], form: str = "{:.2f} ± {:.2f}") -> str:
        return form.format(*interval(values)) if values else "-"

    config = Config.load("shapes")
    steps = next(iter(next(iter(runs.values())).values()))["steps"]
    size, pictures = (config.data_options[name] for name in ("size", "pictures"))
    lines = [
        f"`shapes`, {size} x {size}, {steps} steps, validated on {pictures} pictures; ± is half of a 95 % confidence",
        f"interval (Student's t). Gains are paired, seed by seed, over `{REFERENCE}`, of learning with softplus over",
        f"`{SOFTPLUS_REFERENCE}`. Survivors a row, of {positions(config)},",
        "at the first and the last of the samples taken in training, means over seeds; the quartiles of alpha, and",
        "milliseconds and memory of a step on one CPU thread, medians over seeds.",
        "",
    ]
    header = ["block", "seeds", "mIoU, %", "gain", "survivors, first", "last"]
    header += ["alpha, last (quartiles)", "ms a step", "MB"]
    rows = []
    for name, seeds in runs.items():
        curves = [told["curve"] for told in seeds.values() if told["curve"]]
        first, last = ([curve[i][1] for curve in curves] for i in (0, -1))
        alpha = np.median([curve[-1][2:] for curve in curves], 0) if curves else None
        taken = [x["bytes"] for x in seeds.values() if x["bytes"] is not None]
        seconds = [x["seconds"] for x in seeds.values() if x["seconds"] is not None]
        cells = [
            name,
            len(seeds),
            told([100 * x["miou"] for x in seeds.values()]),
            "-" if name == REFERENCE else told(gains(runs, name), "{:+.2f} ± {:.2f}"),
            f"{statistics.fmean(first):.0f}" if first else "-",
            f"{statistics.fmean(last):.0f}" if last else "-",
            "-" if alpha is None else "{1:.2f} ({0:.2f} to {2:.2f})".format(*alpha),
            f"{1e3 * statistics.median(seconds):.0f}" if seconds else "-",
            f"{statistics.median(taken) / 1e6:.0f}" if taken else "-",
        ]
        rows.append(cells)
    return "\n".join([*lines, pages.table(header, rows)]) + "\n"


def draw(path: Path, runs: dict[str, dict[int, dict]]) -> None:
    """Draw mIoU of every variant and seed, and survivors over training."""
    figure, axes = plt.subplots(1, 2, figsize=(15, 5), layout="constrained")
    for y, seeds in enumerate(reversed(runs.values())):
        scores = [100 * x["miou"] for x in seeds.values()]
        mean, half = interval(scores)
        axes[0].plot(scores, [y] * len(scores), ".", color="C7")
        axes[0].errorbar(mean, y, xerr=np.nan_to_num(half), fmt="o", color="C0", capsize=3)
    axes[0].set_yticks(range(len(runs)), reversed(runs))
    axes[0].set_xlabel("mIoU, %: seeds, mean, 95 % confidence interval")
    axes[0].grid(axis="x", alpha=0.3)
    axes[1].set_prop_cycle(color=plt.get_cmap("tab20").colors)
    for name, seeds in runs.items():
        curves = [x["curve"] for x in seeds.values() if x["curve"]]
        if curves:
            steps = [point[0] for point in curves[0]]
            axes[1].plot(steps, np.mean([[point[1] for point in curve] for curve in curves], 0), ".-", label=name)
    axes[1].set(xlabel="step", ylabel=f"survivors a row, of {positions(Config.load('shapes'))}, mean of seeds")
    if axes[1].lines:
        axes[1].legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    files.save(figure, path, dpi=90)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="ablation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="default: all")
    parser.add_argument("--seeds", type=int, default=5, help="how many (5)")
    parser.add_argument("--steps", type=int, help="of training (as in configs/shapes.json)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at a time (one per core)")
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"), help="folder to write (runs/ablation)")
    parser.add_argument("--one", nargs=2, metavar=("VARIANT", "SEED"), help="run this one here, and nothing else")
    options = parser.parse_args(arguments)
    for name in ("seeds", "jobs", "steps"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    if options.one:
        name, seed = options.one
        if name not in VARIANTS or not seed.isdecimal():
            parser.error(f"--one takes a variant and a seed, got {name!r} {seed!r}")
        torch.set_num_threads(1)
        path = path_of(options.out, name, int(seed))
        files.check([path])
        options.out.mkdir(parents=True, exist_ok=True)
        run(name, int(seed), options.steps, path)
        return
    there = read(options.out)
    steps = options.steps or Config.load("shapes").steps
    if lengths := {told["steps"] for seeds in there.values() for told in seeds.values()} - {steps}:
        raise ConfigError(f"{options.out} has runs of {lengths.pop()} steps, not {steps}: give --steps or an --out")
    todo = [
        (name, seed, options.steps, path_of(options.out, name, seed))
        for seed in range(options.seeds)
        for name in options.variants
        if seed not in there.get(name, {})
    ]
    gathered = [options.out / f"ablation.{suffix}" for suffix in ("json", "md", "png")]
    others = [path for path in options.out.glob("*.json") if path not in gathered]
    files.check([*gathered, *(path for *_, path in todo)], others)
    options.out.mkdir(parents=True, exist_ok=True)
    wrong = []
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool, tqdm(total=len(todo), unit="run") as bar:
        for error in pool.map(lambda each: run_in_process(*each), todo):
            bar.update()
            if error:
                wrong.append(error)
                bar.write(error)
    if runs := read(options.out):
        gather(options.out, runs)
        runs = read(options.out)  # rounded, as whoever reads the file sees them
        text = table(runs)
        print(text)
        files.write(options.out / "ablation.md", text)
        draw(options.out / "ablation.png", runs)
    if wrong:
        raise SystemExit(f"error: {len(wrong)} of {len(todo)} runs failed")


if __name__ == "__main__":
    main_of(main)
