"""One page of what was measured: tables, and plots beside it.

    python bench/report.py results.json                       # bench/results/<machine>.md, .json and pictures
    python bench/report.py results.json --folder build/bench

The file is what ``bench/run.py`` and ``bench/scaling.py`` wrote, with --add into one. Nothing is measured here.
"""

import argparse
import collections
import dataclasses
import itertools
import math
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path

import accounting
import matplotlib
import record
from peers import DENSE, PEERS
from record import Case, Record, files

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FOLDER = Path(__file__).with_name("results")
SWEEPS = {"tokens": "tokens", "survivors": "survivors a row", "dim": "head dim D"}
LAUNCHES = (
    " From an idle device to an idle device: what launching kernels costs the host is in all of them, and most of what "
    "small calls take. `make gpu` also times replays of CUDA graphs, without it: the page named -summary."
)
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}


# Numbers.


def ours(case: Case) -> str:
    """Return the name of our method, the first where several were measured."""
    return case.ours[0]


def dense(case: Case) -> str | None:
    """Return the fastest dense method that was timed, None if none was."""
    times = {name: case.median(name) for name in DENSE if case.median(name)}
    return min(times, key=times.get) if times else None


def fit(xs: list[float], ys: list[float]) -> tuple[float, float]:
    """Return the exponent e of y ~ x^e by least squares of the logarithms, and its standard error."""
    xs, ys = [math.log(x) for x in xs], [math.log(y) for y in ys]
    slope, intercept = statistics.linear_regression(xs, ys)
    if len(xs) < 3:
        return slope, math.nan
    left = sum((y - slope * x - intercept) ** 2 for x, y in zip(xs, ys, strict=True))
    spread = sum((x - statistics.fmean(xs)) ** 2 for x in xs)
    return slope, math.sqrt(left / (len(xs) - 2) / spread)


def of(cases: Iterable[Case], sweep: str, mode: str) -> list[Case]:
    """Return the cases of a sweep in one mode, in the order of what it varies."""
    return sorted((c for c in cases if c.sweep == sweep and c.mode == mode), key=position)


def position(case: Case) -> float:
    """Return what a case's sweep varies."""
    return {"tokens": case.tokens, "dim": case.dim}.get(case.sweep, case.sparsity.get("survivors", 0))


def curves(cases: list[Case], value: Callable[[Case, str], float | None]) -> dict[str, list[tuple[float, float]]]:
    """Return by method the points (what is varied, value)."""
    found: dict[str, list[tuple[float, float]]] = {}
    for case in cases:
        for name in case.methods:
            if (y := value(case, name)) is not None:
                found.setdefault(name, []).append((position(case), y))
    return found


def _seconds(case: Case, name: str) -> float | None:
    return case.median(name)


def _bytes(mode: str) -> Callable[[Case, str], float | None]:
    return lambda case, name: case.methods[name].memory.get(mode) or None


def exponents(cases: list[Case]) -> str:
    """Return the table of exponents, fitted to the upper half of the sweeps over tokens and head dims."""
    lines = []
    for sweep in ("tokens", "dim"):
        sources = [(f"seconds, {mode}", of(cases, sweep, mode), _seconds) for mode in record.MODES[:2]]
        sources += [(f"bytes, {mode}", of(cases, sweep, "mem"), _bytes(mode)) for mode in record.MODES[:2]]
        for label, chosen, value in sources:
            for name, points in curves(chosen, value).items():
                upper = points[len(points) // 2 :]
                if len(upper) >= 2:
                    slope, error = fit(*map(list, zip(*upper, strict=True)))
                    told = f"{slope:.2f}" + ("" if math.isnan(error) else f" ± {error:.2f}")
                    lines.append([SWEEPS[sweep], label, name, told, f"{upper[0][0]:g} to {upper[-1][0]:g}"])
    return table(["cost against", "of", "method", "exponent", "fitted from"], lines) if lines else ""


def crossing(points: list[tuple[float, float]]) -> list[tuple[float, str]]:
    """Return where a curve of ratios, ours over dense, crosses 1: the place, and "wins above" or "wins below" it."""
    found = []
    for (x, y), (next_x, next_y) in itertools.pairwise(points):
        if (y < 1) != (next_y < 1):
            share = math.log(y) / (math.log(y) - math.log(next_y))
            place = math.exp(math.log(x) + share * (math.log(next_x) - math.log(x)))
            found.append((place, "wins above" if next_y < 1 else "wins below"))
    return found


def crossings(cases: list[Case]) -> str:
    """Say for every sweep where ours overtakes the fastest dense method."""
    lines = []
    for sweep, label in SWEEPS.items():
        for mode in record.MODES[:2]:
            points = [(position(c), r[1]) for c in of(cases, sweep, mode) if (r := ratio_to_dense(c))]
            if not points:
                continue
            ratios = [y for _, y in points]
            told = f"{label}, {mode}: {min(ratios):.2f} to {max(ratios):.2f} of dense"
            where = [f"ASA {verdict} {place:.0f}" for place, verdict in crossing(points)]
            if not where:
                where = [f"{'below' if max(ratios) < 1 else 'above'} it from {points[0][0]:.0f} to {points[-1][0]:.0f}"]
            lines.append(f"- {told}; {', '.join(where)}.")
    return "\n".join(lines)


def ratio_to_dense(case: Case) -> list[float] | None:
    """Return the quartiles of the rounds' ratios to the fastest dense method."""
    peer = dense(case)
    return case.ratio(ours(case), peer) if peer else None


@dataclasses.dataclass
class Roof:
    """One call against the ceilings of the machine: what it computes, how fast, and what the floor would be."""

    units: float
    rate: float  # GFLOP/s
    floor: float  # seconds: operations at the best rate of products, or bytes at that of copies, whichever is longer
    seconds: float


def roof(case: Case, name: str, ceilings: dict[str, float]) -> Roof | None:
    """Return it for one method that was timed; None of methods whose operations are not known."""
    seconds, operations = case.median(name), accounting.operations_of(case, name)
    products = [value for key, value in ceilings.items() if key.endswith("GFLOP/s")]
    if not seconds or operations is None or not products:
        return None
    heads = case.heads * case.batch
    moved = accounting.traffic(case.tokens, case.dim, heads, ITEMSIZE[case.dtype], case.mode == "fwd+bwd")
    floor = max(operations / max(products), moved / ceilings["copy GB/s"]) / 1e9
    one = accounting.operations(1, case.tokens, case.dim, heads)
    return Roof(operations / one, operations / seconds / 1e9, floor, seconds)


# The page.


def table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    lines = [list(header)]
    lines += [["---"] * len(lines[0]), *([str(cell).replace("|", "/") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def with_quartiles(values: list[float] | None) -> str:
    """Return the median and, in brackets, the quartiles."""
    return f"{values[1]:.2f} ({values[0]:.2f}-{values[2]:.2f})" if values else "-"


def _inputs(case: Case) -> str:
    return case.inputs if case.alpha is None else f"{case.inputs}, alpha {case.alpha:g}"


def _shape(case: Case) -> str:
    """Return the head dim, and heads and batch where there are more than one."""
    heads = f" x {case.heads} heads" if case.heads > 1 else ""
    return f"{case.dim}{heads}" + (f" x batch {case.batch}" if case.batch > 1 else "")


def inputs_table(cases: list[Case]) -> str:
    seen = {(_inputs(c), c.size, _shape(c)): c.sparsity for c in cases if c.sparsity}
    rows = [
        [*key, f"{x['survivors']:.0f}", *(f"{100 * x[name]:.1f} %" for name in ("density", "active", "candidates"))]
        for key, x in seen.items()
    ]
    header = ["inputs", "map", "D", "survivors a row", "of all pairs", "active tiles", "candidates"]
    return table(header, rows) if rows else ""


def times_table(cases: list[Case]) -> str:
    """Return ours in milliseconds, and ours over every peer."""
    timed = [c for c in cases if c.mode != "mem"]
    peers = [name for name in PEERS if any(c.median(name) for c in timed)]
    rows = []
    for c, name in ((case, name) for case in timed for name in case.ours):
        middle = c.median(name)
        cells = [with_quartiles(c.ratio(name, peer)) for peer in peers]
        mode = c.mode if len(c.ours) == 1 else f"{c.mode}, {name.removeprefix('asa ')}"
        rows.append([_inputs(c), c.size, _shape(c), mode, f"{1e3 * middle:.1f}" if middle else "failed", *cells])
    return table(["inputs", "map", "D", "mode", "ASA, ms", *peers], rows) if rows else ""


def bytes_table(cases: list[Case]) -> str:
    measured = [c for c in cases if c.mode == "mem"]
    names = list(dict.fromkeys(name for c in measured for name, m in c.methods.items() if m.memory))
    rows = []
    for c in measured:
        for mode in record.MODES[:2]:
            used = [c.methods[name].memory.get(mode) if name in c.methods else None for name in names]
            cells = ["-" if x is None else f"{x / 1e6:.1f}" for x in used]
            rows.append([_inputs(c), c.size, _shape(c), mode, *cells])
    return table(["inputs", "map", "D", "mode", *names], rows) if rows else ""


def roof_table(cases: list[Case], ceilings: dict[str, float]) -> str:
    rows = []
    for c in cases:
        for name in (*c.ours, dense(c)):
            found = roof(c, name, ceilings) if name else None
            if found:
                cells = f"{found.units:.2f}", f"{found.rate:.0f}", f"{1e3 * found.floor:.1f}"
                rows.append(
                    [_inputs(c), c.size, _shape(c), c.mode, name, *cells, f"{100 * found.floor / found.seconds:.0f} %"]
                )
    header = ["inputs", "map", "D", "mode", "method", "units", "GFLOP/s", "floor, ms", "floor / time"]
    return table(header, rows) if rows else ""


def _same_block(a: Case, b: Case) -> bool:
    return all(getattr(a, name) == getattr(b, name) for name in ("op", "size", "dim", "batch"))


def blocks_table(cases: list[Case]) -> str:
    rows = []
    for c in cases:
        if c.mode == "mem":
            continue
        name, middle, eager = ours(c), c.median(ours(c)), c.median("eager")
        memory = next((x for x in cases if x.mode == "mem" and _same_block(x, c)), None)
        used = [
            memory.methods[m].memory.get(c.mode) if memory and m in memory.methods else None for m in (name, "eager")
        ]
        rows.append(
            [
                c.op.replace(",", ", "),
                f"{c.size}x{_shape(c)}",
                c.mode,
                f"{1e3 * middle:.1f}" if middle else "failed",
                f"{1e3 * eager:.1f}" if eager else "-",
                with_quartiles(c.ratio(name, "eager")),
                *("-" if x is None else f"{x / 1e6:.1f}" for x in used),
                f"{used[0] / used[1]:.2f}" if used[0] is not None and used[1] else "-",
            ]
        )
    header = ["block", "map", "mode", "ms", "eager ms", "ours / eager", "MB", "eager MB", "ours / eager"]
    return table(header, rows) if rows else ""


def absent(cases: list[Case]) -> str:
    """Say which methods were skipped or failed, and why."""
    told = {}
    for c in cases:
        for name, method in c.methods.items():
            if method.error:
                told[f"- {name} failed: {method.error}"] = None
            elif method.skipped:
                told[f"- {name} was skipped: {method.skipped}"] = None
    return "\n".join(told)


def headline(cases: list[Case]) -> str:
    """Say what comes out, with where ASA loses."""
    found = [(r[1], c) for c in cases if c.sparsity and (r := ratio_to_dense(c))]
    if not found:
        return "ASA was not timed beside dense attention."
    (low, best), (high, worst) = min(found, key=lambda x: x[0]), max(found, key=lambda x: x[0])
    told = (
        f"ASA takes {low:.2f} ({best.label}) to {high:.2f} ({worst.label}) of the time of the fastest dense attention "
        f"here, over {len(found)} cases"
    )
    all_of = collections.Counter(_inputs(c) for _, c in found)
    lost = collections.Counter(_inputs(c) for ratio, c in found if ratio > 1)
    if not lost:
        return f"{told}, and less than it in all of them."
    if lost.total() == len(found):
        return f"{told}, and more than it in all of them."
    where = "; ".join(f"{inputs} ({count} of {all_of[inputs]})" for inputs, count in lost.items())
    return f"{told}. It is slower in {lost.total()} of them: {where}."


def plot(path: Path, panels: list[tuple[str, str, str, dict[str, list[tuple[float, float]]]]]) -> bool:
    """Draw panels (title, x label, y label, curves) side by side on logarithmic axes; return whether there are any."""
    panels = [panel for panel in panels if any(len(points) > 1 for points in panel[3].values())]
    if not panels:
        return False
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 4), layout="constrained", squeeze=False)
    for axis, (title, x_label, y_label, found) in zip(axes[0], panels, strict=True):
        for name, points in found.items():
            axis.plot(*zip(*points, strict=True), "o-", label=name, markersize=4)
        axis.set(title=title, xlabel=x_label, ylabel=y_label, xscale="log", yscale="log")
        if "/ dense" in y_label:
            axis.axhline(1, color="black", linewidth=0.8, linestyle=":")
        axis.grid(which="both", alpha=0.25)
        axis.legend(fontsize=8)
    files.save(figure, path, dpi=100)
    plt.close(figure)
    return True


def plots(results: Record, folder: Path, stem: str) -> list[str]:
    """Draw every sweep; return the names of the files."""
    written = []

    def ratios(chosen: list[Case]) -> list[tuple[float, float]]:
        return [(position(c), r[1]) for c in chosen if (r := ratio_to_dense(c))]

    for sweep, label in SWEEPS.items():
        panels = [
            (f"time, {mode}", label, "seconds", curves(of(results.cases, sweep, mode), _seconds))
            for mode in record.MODES[:2]
        ]
        panels.append(
            (
                "time against dense",
                label,
                "ASA / dense",
                {mode: ratios(of(results.cases, sweep, mode)) for mode in record.MODES[:2]},
            )
        )
        memory = of(results.cases, sweep, "mem")
        panels += [
            (f"memory, {mode}", label, "bytes added", curves(memory, _bytes(mode)))
            for mode in record.MODES[1:2]
            if memory
        ]
        name = f"{stem}-{sweep}.png"
        if plot(folder / name, panels):
            written.append(name)
    return written


def render(results: Record, pictures: list[str]) -> str:
    """Return the page as Markdown."""
    asa = [c for c in results.cases if c.op == "asa"]
    single = [c for c in asa if not c.sweep]
    lines = [f"# asa_ops on {results.environment.get('device')}", f"**{headline(asa)}**"]
    facts = results.environment | {
        "dtype": ", ".join(sorted({c.dtype for c in results.cases})),
        "ASA": ", ".join(sorted({name.removeprefix("asa ") for c in asa for name in c.ours})),
    }
    lines.append("\n".join(f"- {name}: {value}" for name, value in facts.items() if value))
    sections = {
        "Inputs": (
            inputs_table(single),
            "Fractions of all pairs: survivors; those in tiles of 64 x 64, in the order of 8 x 8 pixels, with a "
            "survivor; candidates, those of a column and 64 rows one of which it keeps (`bench/inputs.py`).",
        ),
        "Time": (
            times_table(single),
            "ASA's time over that of each peer: medians of the ratios of interleaved rounds, with quartiles; of two "
            "rounds where a method takes more than ten times as long as the fastest. fwd runs without autograd, "
            "fwd+bwd returns the gradients of query, key and value."
            + (LAUNCHES if "cuda" in results.environment else ""),
        ),
        "Memory": (bytes_table(single), "Megabytes that one call adds to the peak, inputs not included."),
        "Scaling": (
            "\n\n".join(filter(None, [*(f"![{name}]({name})" for name in pictures), crossings(asa), exponents(asa)])),
            "tokens: label maps, D = 64. survivors: independent normal inputs, 64 x 64, one threshold for all, D = 64. "
            "head dim: label maps, 64 x 64. From 20,000 tokens on, one round.",
        ),
        "Roofline": (
            roof_table([c for c in asa if c.mode != "mem"], results.ceilings),
            "A unit is a product of all queries with all keys, 2 N^2 D operations; units are what an implementation "
            "computes by its plan (`asa_ops/asa/__init__.py`), of dense attention 2 and 7. The floor is that many "
            "operations at the best rate of products measured here, or each input and output moved once at the rate of "
            "a copy, whichever is longer: "
            + ", ".join(f"{name} {value:.0f}" for name, value in results.ceilings.items())
            + ".",
        ),
        "Other blocks": (
            blocks_table([c for c in results.cases if c.op != "asa"]),
            "Each beside the same block in its published style (`bench/eager.py`), in training mode; map is HxWxC.",
        ),
        "Peers": (
            "\n\n".join(filter(None, [absent(results.cases), _peers(results.cases)])),
            "",
        ),
    }
    for title, (text, note) in sections.items():
        if text:
            lines += [f"## {title}", *filter(None, [note, text])]
    return "\n\n".join(lines) + "\n"


def _peers(cases: list[Case]) -> str:
    ran = [name for name in PEERS if any(c.median(name) for c in cases)]
    return "\n".join(f"- {name}: {PEERS[name].about}" for name in ran)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="what bench/run.py --out wrote")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the page goes (bench/results)")
    options = parser.parse_args(arguments)
    try:
        results = record.read(options.results)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    stem = record.slug(str(results.environment.get("device", "unknown")))
    page, kept = options.folder / f"{stem}.md", options.folder / f"{stem}.json"
    outputs = [page, *(options.folder / f"{stem}-{sweep}.png" for sweep in SWEEPS)]
    if is_new := files.identity(kept) != files.identity(options.results):
        outputs.append(kept)
    files.check(outputs, [options.results])
    options.folder.mkdir(parents=True, exist_ok=True)
    files.write(page, render(results, plots(results, options.folder, stem)))
    if is_new:
        files.write(kept, files.read(options.results))
    print(f"{page} and {kept.name}\n\n{headline([c for c in results.cases if c.op == 'asa'])}")


if __name__ == "__main__":
    files.run(main)
