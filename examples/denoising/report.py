"""Tables and plots of what the study found."""

import statistics
from collections.abc import Iterable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from .. import files, pages
from ..confidence import interval
from .methods import ATTENTION, METHODS, NETWORK, REFERENCE

Runs = dict[str, dict[int, dict]]  # by method and seed

TITLES = {
    ATTENTION: "Attention alone",
    NETWORK: "A network of about 100,000 parameters (squeeze and attention: 147,000) with one block",
}
BESIDE = ("scikit-image", "BM3D")  # in both tables
NETWORK_REFERENCE = "network, no block"
LEARNED = "ASA, embedding, alpha and h learned"
QUESTIONS = (  # what the study asks: a method, what it is held against
    ("ASA, alpha learned", REFERENCE),
    ("ASA, alpha and h learned", REFERENCE),
    ("ASA, alpha and h learned", "ASA, h learned"),
    ("ASA, alpha and h learned", "dense, h learned"),
    ("ASA, best fixed tail and h", REFERENCE),
    ("ASA, tail and h learned", REFERENCE),
    ("ASA, tail and h learned", "ASA, alpha and h learned"),
    (LEARNED, REFERENCE),
    (LEARNED, "ASA, embedding and h learned"),
    (LEARNED, "dense, embedding and h learned"),
    (LEARNED, "scikit-image"),
    (LEARNED, "BM3D"),
    ("network, asa", NETWORK_REFERENCE),
    ("network, asa", "network, non_local"),
    ("network, asa", "network, efficient_attention"),
    ("network, asa", "network, asa, published"),
    ("network, asa", "BM3D"),
)


def scores(runs: Runs, name: str, noise: str, figure: str) -> np.ndarray:
    """Return a figure of the photographs, [seeds, photographs]."""
    return np.array([list(told["test"][noise][figure].values()) for told in runs[name].values()])


def gains(runs: Runs, name: str, reference: str, noise: str) -> np.ndarray:
    """Return by how many dB a method beats another, photograph by photograph, [seeds that both have, photographs].

    What is not trained is the same for every seed.
    """
    both = runs[name], runs[reference]
    trained = [each for each in both if "curve" in next(iter(each.values()))]
    seeds = [seed for seed in (trained or both)[0] if all(seed in each for each in trained)]
    pairs = [[each.get(seed) or next(iter(each.values())) for each in both] for seed in seeds]
    values = [[list(told["test"][noise]["psnr"].values()) for told in pair] for pair in pairs]
    return np.array([np.subtract(*pair) for pair in values]).reshape(len(pairs), -1)


def plus_minus(values: np.ndarray, form: str = "{:+.2f} ± {:.2f}") -> str:
    return form.format(*interval(values.tolist()))


def milliseconds(seconds: Iterable[float | None]) -> str:
    measured = [1e3 * x for x in seconds if x is not None]
    return f"{statistics.median(measured):.0f}" if measured else "-"


def main_table(runs: Runs, group: str, reference: str) -> str:
    """Return the table of a group of methods, PSNR and gains at every noise level, "" if there is no run of them."""
    names = [name for name in METHODS if name in runs and (METHODS[name].group == group or name in BESIDE)]
    if all(name in BESIDE for name in names):
        return ""
    noises = list(next(iter(next(iter(runs.values())).values()))["test"])
    header = ["method", "seeds"]
    for noise in noises:
        header += [f"PSNR, noise {noise}", "gain, dB", "worst", "SSIM"]
    header += ["survivors a row", "ms a step", "ms a picture"]
    rows = []
    for name in names:
        row: list[object] = [name, len(runs[name]) if "curve" in next(iter(runs[name].values())) else "-"]
        for noise in noises:
            row.append(f"{scores(runs, name, noise, 'psnr').mean():.2f}")
            each = gains(runs, name, reference, noise) if reference in runs else np.empty((0, 0))
            if name == reference or not each.size:
                row += ["-", "-"]
            else:
                row += [plus_minus(each.mean(0)), f"{each.mean(0).min():+.2f}"]
            row.append(f"{scores(runs, name, noise, 'ssim').mean():.3f}")
        every = list(runs[name].values())
        kept = [told["test"][noises[1]]["survivors"] for told in every]
        row.append(f"{statistics.fmean(kept):.0f}" if kept[0] is not None else "-")
        row.append(milliseconds(told.get("step seconds") for told in every))
        row.append(milliseconds(told["test"][noises[1]].get("seconds") for told in every))
        rows.append(row)
    return pages.table(header, rows)


def answers(runs: Runs) -> str:
    """Return the differences that the study asks for, with their intervals over photographs and over seeds."""
    noises = list(next(iter(next(iter(runs.values())).values()))["test"])
    rows = []
    for name, reference in QUESTIONS:
        if name not in runs or reference not in runs:
            continue
        for noise in noises:
            each = gains(runs, name, reference, noise)
            if not len(each):
                continue
            photographs = each.mean(0)
            better = f"{(photographs > 0).sum()} of {photographs.size}"
            seeds = plus_minus(each.mean(1)) if len(each) > 1 else "-"
            cells = (plus_minus(photographs), seeds, better, f"{photographs.min():+.2f}", f"{photographs.max():+.2f}")
            rows.append((name, reference, noise, len(each), *cells))
    header = ("method", "over", "noise", "seeds", "gain, dB: photographs", "seeds", "better on", "worst", "best")
    return pages.table(header, rows)


def by_photograph(runs: Runs, noise: str) -> str:
    """Return the PSNR of every photograph to test on, means over seeds."""
    shown = [name for name in ("scikit-image", "BM3D", REFERENCE, "ASA, alpha and h learned", LEARNED) if name in runs]
    shown += [name for name in ("dense, embedding and h learned", NETWORK_REFERENCE, "network, asa") if name in runs]
    photographs = next(iter(next(iter(runs.values())).values()))["test"][noise]["psnr"]
    columns = [scores(runs, name, noise, "psnr").mean(0) for name in shown]
    rows = [(name, *(f"{column[i]:.2f}" for column in columns)) for i, name in enumerate(photographs)]
    return pages.table(("photograph", *shown), rows)


def section(runs: Runs, group: str, reference: str, *more: str) -> list[str]:
    """Return the paragraphs about a group of methods, none if there is no run of them."""
    table = main_table(runs, group, reference)
    return [f"## {TITLES[group]}", f"Gains are over `{reference}`.", table, *more] if table else []


def page(runs: Runs, tuned: dict, about: dict) -> str:
    """Return the results as Markdown."""
    noises = list(next(iter(next(iter(runs.values())).values()))["test"])
    first = next(iter(next(iter(runs.values())).values()))["test"][noises[0]]["psnr"]
    constants = pages.table(
        ("noise", "dense, h", "ASA, h", "alpha", "ASA, h", "tail", "scikit-image, h / noise"),
        [
            (x, tuned["dense"][x][0], *tuned["asa"][x][:2], *tuned["tail"][x][::2], tuned["nearby"][x][0])
            for x in tuned["asa"]
        ],
    )
    about_constants = "As tuned on the photographs to train on (h in units of noise times 75^0.5, the size of a patch):"
    parts = [
        "# Denoising photographs that nobody has learned from",
        "\n".join(
            [
                f"Means over the crops of {len(first)} photographs that no method was trained or tuned on;"
                f" {about['steps']:,} steps on others, networks four times as many.",
                "Gains are paired, photograph by photograph with the same noise; ± is half of a 95 % confidence",
                "interval (Student's t) over photographs, means over seeds; worst is the photograph that gains least.",
                f"Survivors and milliseconds, of one thread's processor, are those at noise {noises[1]}: a step is of",
                "4 crops of 32 x 32, a picture 48 x 48. Intervals are not corrected for how many there are.",
                f"Processor: {', '.join(about['processors'])}; commits: {', '.join(about['commits'])}.",
            ]
        ),
        "## Answers",
        answers(runs),
        *section(runs, ATTENTION, REFERENCE, about_constants, constants),
        *section(runs, NETWORK, NETWORK_REFERENCE),
        f"## Photograph by photograph, noise {noises[1]}",
        by_photograph(runs, noises[1]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def draw(path: Path, runs: Runs) -> None:
    """Draw the gains of attention, and the quality of the networks against the time of training."""
    noises = list(next(iter(next(iter(runs.values())).values()))["test"])
    networks = [name for name in METHODS if name in runs and METHODS[name].group == NETWORK]
    panels = 2 if networks else 1
    figure, axes = plt.subplots(1, panels, figsize=(7.5 * panels, 6), layout="constrained", squeeze=False)
    gained, trained = axes[0, 0], axes[0, -1]
    names = [name for name in METHODS if name in runs and METHODS[name].group == ATTENTION and name != REFERENCE]
    names += [name for name in BESIDE if name in runs]
    for i, noise in enumerate(noises):
        for y, name in enumerate(reversed(names)):
            if REFERENCE not in runs or not (each := gains(runs, name, REFERENCE, noise)).size:
                continue
            mean, half = interval(each.mean(0).tolist())
            place = y + 0.2 * (1 - i)
            label = f"noise {noise}" if y == 0 else None
            gained.errorbar(mean, place, xerr=np.nan_to_num(half), fmt="o", color=f"C{i}", capsize=3, label=label)
    gained.set_yticks(range(len(names)), reversed(names))
    gained.axvline(0, color="black", linewidth=0.8)
    gained.set_xlabel(f"gain over {REFERENCE}, dB: photographs never seen, 95 % intervals")
    gained.grid(axis="x", alpha=0.3)
    if gained.containers:
        gained.legend()
    if networks:
        trained.set_prop_cycle(color=plt.get_cmap("tab20").colors)
        for name in networks:
            every = list(runs[name].values())
            curve = np.mean([told["curve"] for told in every], 0)
            seconds = statistics.median(told["step seconds"] * told["steps"] for told in every)
            times = seconds * np.arange(1, len(curve) + 1) / len(curve)
            trained.plot(times, curve, ".-", label=name.removeprefix("network, "))
        trained.set(
            xlabel="seconds of training, one thread", ylabel="PSNR of the crops trained on, all noise levels, dB"
        )
        trained.legend()
    files.save(figure, path, dpi=90)
    plt.close(figure)
