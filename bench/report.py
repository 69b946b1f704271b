"""One page of what was measured: tables, and plots beside it.

    python -m bench.report results.json                       # bench/results/<machine>.md, .json and pictures
    python -m bench.report results.json --folder build/bench

The file is what ``bench.run`` wrote. Nothing is measured here.
"""

import argparse
import collections
import itertools
import math
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from string import Template
from typing import NamedTuple

import numpy as np

from examples import files
from examples.pages import table

from . import accounting, record
from .peers import DENSE, PEERS
from .record import MODES, Case, Record

FOLDER = Path(__file__).with_name("results")
PAGE = Path(__file__).with_name("page.md")
SWEEPS = {"tokens": "tokens", "survivors": "survivors a row", "dim": "head dim D"}
LAUNCHES = (
    " From an idle device to an idle device: what launching kernels costs the host is in all of them, and most of what "
    "small calls take. `make gpu` also times replays of CUDA graphs, without it: the page named -summary."
)
NAME = "inputs", "map", "D"  # over the cells that name a case, _name
Curves = dict[str, list[tuple[float, float]]]  # by method, (what a sweep varies, value)


def fit(xs: list[float], ys: list[float]) -> tuple[float, float]:
    """Return the exponent e of y ~ x^e by least squares of the logarithms, and its standard error."""
    if len(xs) < 3:
        return np.polyfit(np.log(xs), np.log(ys), 1)[0], math.nan
    (slope, _), covariance = np.polyfit(np.log(xs), np.log(ys), 1, cov=True)
    return slope, math.sqrt(covariance[0, 0])


def of(cases: Iterable[Case], sweep: str, mode: str) -> list[Case]:
    """Return the cases of a sweep in one mode, in the order of what it varies."""
    return sorted((c for c in cases if c.sweep == sweep and c.mode == mode), key=position)


def position(case: Case) -> float:
    """Return what a case's sweep varies."""
    return {"tokens": case.tokens, "dim": case.dim}.get(case.sweep, case.sparsity.get("survivors", 0))


def curves(cases: list[Case], value: Callable[[Case, str], float | None]) -> Curves:
    """Return by method the points (what is varied, value)."""
    names = dict.fromkeys(name for case in cases for name in case.methods)
    found = {name: [(position(c), y) for c in cases if (y := value(c, name))] for name in names}
    return {name: points for name, points in found.items() if points}


def ratio_to_dense(case: Case) -> list[float] | None:
    """Return the quartiles of the rounds' ratios, ours to the fastest dense method."""
    return case.ratio(case.ours[0], case.fastest(DENSE))


def _ratios(cases: list[Case]) -> list[tuple[float, float]]:
    return [(position(c), r[1]) for c in cases if (r := ratio_to_dense(c))]


def exponents(cases: list[Case]) -> str:
    """Return the table of exponents, fitted to the upper half of the sweeps over tokens and head dims."""
    lines = []
    for sweep in ("tokens", "dim"):
        sources = [(f"seconds, {mode}", of(cases, sweep, mode), Case.median) for mode in MODES[:2]]
        sources += [(f"bytes, {mode}", of(cases, sweep, "mem"), partial(Case.bytes, mode=mode)) for mode in MODES[:2]]
        for label, chosen, value in sources:
            for name, points in curves(chosen, value).items():
                upper = points[len(points) // 2 :]
                if len(upper) >= 2:
                    slope, error = fit(*map(list, zip(*upper, strict=True)))
                    exponent = f"{slope:.2f}" + ("" if math.isnan(error) else f" ± {error:.2f}")
                    lines.append([SWEEPS[sweep], label, name, exponent, f"{upper[0][0]:g} to {upper[-1][0]:g}"])
    return table(["cost against", "of", "method", "exponent", "fitted from"], lines)


def crossing(points: list[tuple[float, float]]) -> list[tuple[float, str]]:
    """Return where a curve of ratios, ours over dense, crosses 1: the place, and "wins above" or "wins below" it."""
    found = []
    for (x, y), (next_x, next_y) in itertools.pairwise(points):
        if (y < 1) != (next_y < 1):
            place = x * (next_x / x) ** (math.log(y) / math.log(y / next_y))
            found.append((place, "wins above" if next_y < 1 else "wins below"))
    return found


def crossings(cases: list[Case]) -> str:
    """Say for every sweep where ours overtakes the fastest dense method."""
    lines = []
    for (sweep, label), mode in itertools.product(SWEEPS.items(), MODES[:2]):
        if points := _ratios(of(cases, sweep, mode)):
            ratios = [y for _, y in points]
            always = f"{'below' if max(ratios) < 1 else 'above'} it from {points[0][0]:.0f} to {points[-1][0]:.0f}"
            where = ", ".join(f"ASA {verdict} {place:.0f}" for place, verdict in crossing(points)) or always
            lines.append(f"- {label}, {mode}: {min(ratios):.2f} to {max(ratios):.2f} of dense; {where}.")
    return "\n".join(lines)


def with_quartiles(values: list[float] | None) -> str:
    return f"{values[1]:.2f} ({values[0]:.2f}-{values[2]:.2f})" if values else "-"


def number(value: float | None, factor: float = 1e3, digits: int = 1, missing: str = "-") -> str:
    """Return a number times a factor, seconds in milliseconds, or ``missing`` if it was not measured."""
    return missing if value is None else f"{factor * value:.{digits}f}"


def percent(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{100 * value:.{digits}f} %"


def _name(case: Case) -> list[str]:
    return [case.inputs if case.alpha is None else f"{case.inputs}, alpha {case.alpha:g}", case.size, case.shape]


def inputs_table(cases: list[Case], even: bool = False) -> str:
    seen: dict[tuple, dict[str, float]] = collections.defaultdict(dict)
    for c in (c for c in cases if c.sparsity):
        seen[tuple(_name(c))] |= c.sparsity
    fractions = "density", "active", "candidates"
    rows = [[*key, f"{x['survivors']:.0f}", *(percent(x.get(name)) for name in fractions)] for key, x in seen.items()]
    return table([*NAME, "survivors a row", "of all pairs", "active tiles", "candidates"], rows, even)


def methods_table(cases: list[Case]) -> str:
    """Return a row for every method of every case: what a run prints."""
    rows, before = [], None
    for c, name in [(x, name) for x in cases for name, method in x.methods.items() if not method.skipped]:
        middle, operations = c.median(name), accounting.operations_of(c, name)
        cells = [number(middle), number(c.median(name, "graph"), digits=3)]
        cells.append("-" if name in c.ours else with_quartiles(c.ratio(c.ours[0], name)))
        cells += [number(c.bytes(name, mode), 1e-6) for mode in MODES[:2]]
        cells.append(f"{operations / middle / 1e9:.0f}" if middle and operations else "-")
        rows.append([c.label if c.label != before else "", name, *cells, c.methods[name].error or ""])
        before = c.label
    header = ["case", "method", "ms", "in a graph", "ours / it (quartiles)", "MB", "MB with backward", "GFLOP/s", ""]
    return table(header, rows, even=True)


def times_table(cases: list[Case], how: str = "seconds") -> str:
    """Return ours in milliseconds, and ours over every peer; as called, or in a CUDA "graph"."""
    timed = [c for c in cases if c.mode != "mem" and (how == "seconds" or any(c.times(m, how) for m in c.methods))]
    peers = [name for name in PEERS if any(c.times(name, how) for c in timed)]
    digits = 3 if any(c.times(name, "graph") for c in timed for name in c.ours) else 1
    rows = []
    for c, name in [(x, name) for x in timed for name in x.ours]:
        mode = c.mode if len(c.ours) == 1 else f"{c.mode}, {name.removeprefix('asa ')}"
        cells = [with_quartiles(c.ratio(name, peer, how)) for peer in peers]
        rows.append([*_name(c), mode, number(c.median(name, how), 1e3, digits, "failed"), *cells])
    return table([*NAME, "mode", "ASA, ms", *peers], rows)


def calls_table(cases: list[Case]) -> str:
    """Return ours and dense attention in microseconds, of calls so small that the host's share shows."""
    rows = []
    for c in cases:
        times = (number(c.median(name), 1e6, 0) for name in (c.ours[0], "sdpa flash"))
        ratio = with_quartiles(c.ratio(c.ours[0], "sdpa flash"))
        rows.append([f"{c.batch} x {c.heads} x {c.tokens} x {c.dim}", c.mode, *times, ratio])
    return table(["B x heads x N x D", "mode", "ASA, us", "sdpa flash, us", "ratio"], rows)


class Bound(NamedTuple):
    """What ASA may take of the time of torch's flash attention on a CPU, at most: forward, and with its backward."""

    text: str
    forward: float
    both: float
    fits: Callable[[Case], bool]


def _is(inputs: str, **fields: object) -> Callable[[Case], bool]:
    """Return whether a case has these inputs and fields; one head of one image in float32, in no sweep, if not said."""
    wanted = {"dtype": "float32", "sweep": "", "batch": 1, "heads": 1} | fields
    return lambda case: case.inputs in inputs.split() and all(getattr(case, x) == y for x, y in wanted.items())


def bounds(instruction_set: str) -> list[Bound]:
    """Return the goals on CPUs; without AVX-512 torch loses less to kernels that need it."""
    structured = (0.65, 0.30) if instruction_set == "AVX2" else (0.50, 0.20)
    on_map = {"size": "64x64"}
    return [
        *(
            Bound(f"structured inputs, N = 4,096, D = {d}", *structured, _is("labels photo conv", dim=d, **on_map))
            for d in (64, 256)
        ),
        Bound("near dense and dense, D = 64", 0.95, 1.0, _is("near-dense dense", dim=64, **on_map)),
        Bound("near dense and dense, D = 256", 1.05, 1.0, _is("near-dense dense", dim=256, **on_map)),
        Bound("independent inputs, every density", 1.0, 0.9, _is("iid", sweep="survivors")),
        *(
            Bound(f"label map, {dtype}", 0.6, 0.3, _is("labels", dtype=dtype, dim=64, **on_map))
            for dtype in ("bfloat16", "float16")
        ),
        Bound("label map, N = 65,536", 0.6, 0.25, _is("labels", size="256x256", sweep="tokens")),
        Bound("512 images, 8 heads, N = 49", 0.8, 0.9, _is("iid", size="7x7", sweep="calls", batch=512, heads=8)),
        Bound("64 heads, N = 256", 0.8, 0.9, _is("iid", size="16x16", sweep="calls", heads=64)),
    ]


def goals_table(cases: list[Case], instruction_set: object) -> str:
    """Return the largest ratio to flash attention of the cases that each bound is about; "" but for CPUs."""
    rows = []
    for bound in bounds(str(instruction_set)) if instruction_set else []:
        cells = []
        for mode, most in zip(MODES[:2], bound[1:3], strict=True):
            ratios = [r for c in cases if c.mode == mode and bound.fits(c) if (r := c.ratio(c.ours[0], "sdpa flash"))]
            worst = max(ratios, key=lambda r: r[1], default=None)
            verdict = "" if worst is None else "met" if worst[1] <= most else "MISSED"
            cells += [f"<= {most:.2f}", with_quartiles(worst), verdict]
        if any(cell != "-" for cell in cells[1::3]):
            rows.append([bound.text, *cells])
    return table(["inputs", "forward", "measured", "", "with backward", "measured", ""], rows)


def bytes_table(cases: list[Case]) -> str:
    measured = [c for c in cases if c.mode == "mem"]
    names = list(dict.fromkeys(name for c in measured for name, m in c.methods.items() if m.memory))
    every = itertools.product(measured, MODES[:2])
    rows = [[*_name(c), mode, *(number(c.bytes(name, mode), 1e-6) for name in names)] for c, mode in every]
    return table([*NAME, "mode", *names], rows)


def roof_table(cases: list[Case], ceilings: dict[str, float]) -> str:
    """Return ours and the fastest dense method against what the machine can do at most.

    The floor: operations at the best rate of products, or bytes at that of copies, whichever takes longer.
    """
    rows = []
    products = max((value for key, value in ceilings.items() if key.endswith("GFLOP/s")), default=0)
    for c, name in [(x, name) for x in cases for name in (*x.ours, x.fastest(DENSE)) if name]:
        seconds, operations = c.median(name), accounting.operations_of(c, name)
        if not seconds or operations is None or not products:
            continue
        floor = max(operations / products, accounting.traffic(c) / ceilings["copy GB/s"]) / 1e9
        units = operations / accounting.operations_of_a_unit(c)
        cells = f"{units:.2f}", f"{operations / seconds / 1e9:.0f}", number(floor), percent(floor / seconds, 0)
        rows.append([*_name(c), c.mode, name, *cells])
    return table([*NAME, "mode", "method", "units", "GFLOP/s", "floor, ms", "floor / time"], rows)


def kernels_table(cases: list[Case]) -> str:
    rows = []
    for c, name, kernel in [(x, *item) for x in cases for item in x.kernels.items()]:
        rate = kernel.flops and kernel.flops / kernel.seconds
        rows.append([*_name(c), c.mode, name, kernel.launches, number(kernel.seconds, 1e6), number(rate, 1e-12, 0)])
    return table([*NAME, "mode", "kernel", "launches", "microseconds", "TFLOP/s"], rows)


def blocks_table(cases: list[Case]) -> str:
    rows = []
    memory = {(c.op, c.size, c.dim, c.batch): c for c in reversed(cases) if c.mode == "mem"}
    for c in (c for c in cases if c.mode != "mem"):
        name, measured = c.ours[0], memory.get((c.op, c.size, c.dim, c.batch), c)
        used = [measured.bytes(method, c.mode) for method in (name, "eager")]
        cells = [number(c.median(name), missing="failed"), number(c.median("eager"))]
        cells += [with_quartiles(c.ratio(name, "eager")), *(number(x, 1e-6) for x in used)]
        cells.append(f"{used[0] / used[1]:.2f}" if used[0] is not None and used[1] else "-")
        rows.append([c.op.replace(",", ", "), f"{c.size}x{c.shape}", c.mode, *cells])
    return table(["block", "map", "mode", "ms", "eager ms", "ours / eager", "MB", "eager MB", "ours / eager"], rows)


def absent(cases: list[Case]) -> str:
    lines = []
    for name, method in (item for c in cases for item in c.methods.items()):
        lines += [f"- {name} failed: {method.error}"] if method.error else []
        lines += [f"- {name} was skipped: {method.skipped}"] if method.skipped else []
    return "\n".join(dict.fromkeys(lines))


def headline(cases: list[Case]) -> str:
    found = [(r[1], c) for c in cases if c.sparsity and (r := ratio_to_dense(c))]
    if not found:
        return "ASA was not timed beside dense attention."
    (low, best), (high, worst) = (extreme(found, key=lambda x: x[0]) for extreme in (min, max))
    verdict = f"ASA takes {low:.2f} ({best.label}) to {high:.2f} ({worst.label}) of the time of "
    verdict += f"the fastest dense attention here, over {len(found)} cases"
    all_of = collections.Counter(_name(c)[0] for _, c in found)
    lost = collections.Counter(_name(c)[0] for ratio, c in found if ratio > 1)
    if lost.total() in (0, len(found)):
        return f"{verdict}, and {'more' if lost else 'less'} than it in all of them."
    where = "; ".join(f"{inputs} ({count} of {all_of[inputs]})" for inputs, count in lost.items())
    return f"{verdict}. It is slower in {lost.total()} of them: {where}."


def joined(*parts: str) -> str:
    """Return the parts that are not empty, as paragraphs."""
    return "\n\n".join(filter(None, parts))


def sections(results: Record, pictures: Iterable[str] = ()) -> str:
    """Return the sections of bench/page.md that have something to show of a file of results."""
    asa = [c for c in results.cases if c.op == "asa"]
    single = [c for c in asa if not c.sweep]
    ran = [name for name in PEERS if any(c.median(name) for c in results.cases)]
    values = {
        "inputs": inputs_table(single),
        "goals": goals_table(asa, results.environment.get("instruction set")),
        "times": times_table(single),
        "launches": LAUNCHES if "cuda" in results.environment else "",
        "graphs": times_table(single, "graph"),
        "calls": calls_table([c for c in asa if c.sweep == "calls"]),
        "kernels": kernels_table(single),
        "bytes": bytes_table(single),
        "scaling": joined(*(f"![{name}]({name})" for name in pictures), crossings(asa), exponents(asa)),
        "ceilings": ", ".join(f"{name} {value:.0f}" for name, value in results.ceilings.items()),
        "roofline": roof_table([c for c in asa if c.mode != "mem"], results.ceilings),
        "blocks": blocks_table([c for c in results.cases if c.op != "asa"]),
        "peers": joined(absent(results.cases), "\n".join(f"- {name}: {PEERS[name].about}" for name in ran)),
    }
    parts = [part.strip() for part in files.read(PAGE).split("## ")[1:]]
    return joined(*(Template(f"## {part}").substitute(values) for part in parts if values[part.split("$")[-1]]))


def page(headline: str, facts: dict[str, object], *sections: str) -> str:
    """Return a page as Markdown; ``facts`` are its environment and more."""
    listed = "\n".join(f"- {name}: {value}" for name, value in facts.items() if value)
    return joined(f"# asa_ops on {facts.get('device') or 'no GPU'}", f"**{headline}**", listed, *sections) + "\n"


def render(results: Record, pictures: Iterable[str] = ()) -> str:
    asa = [c for c in results.cases if c.op == "asa"]
    facts = results.environment | {
        "dtype": ", ".join(sorted({c.dtype for c in results.cases})),
        "ASA": ", ".join(sorted({name.removeprefix("asa ") for c in asa for name in c.ours})),
    }
    return page(headline(asa), facts, sections(results, pictures))


def plots(results: Record, folder: Path, stem: str) -> list[str]:
    """Draw every sweep, panels side by side on logarithmic axes; return the names of the files."""
    from matplotlib.figure import Figure  # a GPU machine may lack it, and measures without

    written = []
    for sweep, label in SWEEPS.items():
        cases = {mode: of(results.cases, sweep, mode) for mode in MODES}
        panels = [(f"time, {mode}", "seconds", curves(cases[mode], Case.median)) for mode in MODES[:2]]
        panels.append(("time against dense", "ASA / dense", {mode: _ratios(cases[mode]) for mode in MODES[:2]}))
        panels.append(("memory, fwd+bwd", "bytes added", curves(cases["mem"], partial(Case.bytes, mode="fwd+bwd"))))
        panels = [panel for panel in panels if any(len(points) > 1 for points in panel[2].values())]
        if not panels:
            continue
        figure = Figure(figsize=(5 * len(panels), 4), layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for axis, (title, y_label, found) in zip(axes, panels, strict=True):
            for name, points in found.items():
                axis.plot(*zip(*points, strict=True), "o-", label=name, markersize=4)
            axis.set(title=title, xlabel=label, ylabel=y_label, xscale="log", yscale="log")
            if y_label == "ASA / dense":
                axis.axhline(1, color="black", linewidth=0.8, linestyle=":")
            axis.grid(which="both", alpha=0.25)
            axis.legend(fontsize=8)
        written.append(f"{stem}-{sweep}.png")
        files.save(figure, folder / written[-1], dpi=100)
    return written


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="what bench.run --out wrote")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the page goes (bench/results)")
    options = parser.parse_args(arguments)
    try:
        results = record.read(options.results)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    stem = record.slug(str(results.environment.get("device", "unknown")))
    written, kept = options.folder / f"{stem}.md", options.folder / f"{stem}.json"
    outputs = [written, *(options.folder / f"{stem}-{sweep}.png" for sweep in SWEEPS)]
    if is_new := files.identity(kept) != files.identity(options.results):
        outputs.append(kept)
    files.check(outputs, [options.results])
    options.folder.mkdir(parents=True, exist_ok=True)
    files.write(written, render(results, plots(results, options.folder, stem)))
    if is_new:
        files.write(kept, files.read(options.results))
    print(f"{written} and {kept.name}\n\n{headline([c for c in results.cases if c.op == 'asa'])}")


if __name__ == "__main__":
    files.run(main)
