"""What the GPU suite makes of its results: goals judged, and the summary. Nothing is measured here."""

import collections
import re
from typing import NamedTuple

from . import report
from .peers import DENSE
from .record import MODES, Case, Record, Step

ACTIVE_LIMIT = 0.25  # up to here inputs count as structured
BACKWARD = ("dq", "dk", "dv", "dkv")
MET, IN_GRAPH, MISSED = "met", "met in graph replay only", "MISSED"
SHOWN = 40  # failures, at most


class Goal(NamedTuple):
    """At least ``bound``: how many times faster than the fastest of ``peers``, or the TFLOP/s of ``kernels``."""

    text: str
    bound: float
    inputs: str
    tokens: int
    mode: str
    peers: tuple[str, ...] = ()
    kernels: tuple[str, ...] = ()
    structured: bool = False  # applies to inputs with few active tiles only


class Verdict(NamedTuple):
    goal: str
    bound: str
    measured: str
    verdict: str  # MET, IN_GRAPH, MISSED, or why there is none


_OVER_DENSE = "over the best dense attention"
_OVER_EAGER = "over the published formula in eager PyTorch"
_OVER_FLEX = "over FlexAttention, its mask built in the call"
_SPARSE = [("fwd", 8192, 1.5), ("fwd", 9409, 1.5), ("fwd", 16384, 1.0), ("fwd+bwd", 8192, 2.0), ("fwd+bwd", 9409, 2.0)]
_RATES = [("aggregate", 400, "fwd", ("aggregate",)), ("backward", 350, "fwd+bwd", BACKWARD)]
GOALS = [
    *(
        Goal(_OVER_DENSE, bound, inputs, n, mode, peers=DENSE, structured=True)
        for inputs in ("labels", "photo")
        for mode, n, bound in _SPARSE
    ),
    Goal(_OVER_DENSE, 0.6, "dense", 8192, "fwd", peers=DENSE),
    Goal(_OVER_DENSE, 0.55, "dense", 8192, "fwd+bwd", peers=DENSE),
    *(Goal(_OVER_EAGER, 20.0, "labels", 9409, mode, peers=("eager",)) for mode in MODES[:2]),
    *(Goal(_OVER_EAGER, 7.0, "dense", 9409, mode, peers=("eager",)) for mode in MODES[:2]),
    *(Goal(_OVER_FLEX, 5.0, "labels", 8192, mode, peers=("flex + mask",)) for mode in MODES[:2]),
    *(Goal("pass 1, TFLOP/s", 600, "labels", n, "fwd", kernels=("statistics",)) for n in (8192, 16384)),
    *(
        Goal(f"{text}, TFLOP/s", bound, inputs, n, mode, kernels=kernels)
        for text, bound, mode, kernels in _RATES
        for inputs, n in (("labels", 8192), ("dense", 8192), ("dense", 16384))
    ),
]


def rate(case: Case, kernels: tuple[str, ...]) -> float | None:
    """Return the TFLOP/s of the named kernels together, None if none ran."""
    ran = [kernel for name in kernels if (kernel := case.kernels.get(name)) and kernel.flops]
    return sum(x.flops for x in ran) / sum(x.seconds for x in ran) / 1e12 if ran else None


def judge(goal: Goal, cases: list[Case]) -> Verdict:
    name = f"{goal.text}: {goal.inputs}, N = {goal.tokens}, {goal.mode}"
    bound = f">= {goal.bound:g}" + ("" if goal.kernels else " x")
    wanted = goal.inputs, goal.tokens, goal.mode
    found = [c for c in cases if (c.inputs, c.tokens, c.mode) == wanted]
    ran = (c for c in found if rate(c, goal.kernels) or any(peer in c.methods for peer in goal.peers))
    if not (case := next(ran, None)):
        return Verdict(name, bound, "-", "not measured")
    ours = case.ours[0]
    if goal.kernels:
        reached = rate(case, goal.kernels)
        return Verdict(name, bound, f"{reached:.0f}", MET if reached >= goal.bound else MISSED)
    called, graph = (case.ratio(case.fastest(goal.peers, how), ours, how) for how in ("seconds", "graph"))
    if called is None:
        methods = {x: case.methods[x] for x in (ours, *goal.peers) if x in case.methods and not case.times(x)}
        why = "; ".join(dict.fromkeys(f"{x}: {m.error or m.skipped or 'not run'}" for x, m in methods.items()))
        return Verdict(name, bound, "-", f"not measured ({why})")
    measured = f"{called[1]:.2f} x" + (f", graph {graph[1]:.2f} x" if graph else "")
    active = case.sparsity.get("active", 1)
    if goal.structured and active > ACTIVE_LIMIT:
        return Verdict(name, bound, measured, f"does not apply: {100 * active:.1f} % of the tiles are active")
    replayed = graph and graph[1] >= goal.bound
    return Verdict(name, bound, measured, MET if called[1] >= goal.bound else IN_GRAPH if replayed else MISSED)


def headline(steps: list[Step], judged: list[Verdict]) -> str:
    parts = [f"{x.step} {x.status}" + (f" ({x.note})" if x.note else "") for x in steps if x.status != "passed"]
    if steps and not parts:
        parts.append("every step passed")
    counts = collections.Counter(re.split(r" \(|:", x.verdict)[0] for x in judged)  # without its details
    kinds = MET, IN_GRAPH, MISSED, "not measured", "does not apply"
    verdicts = ", ".join(f"{counts[kind]} {kind.replace('does', 'do')}" for kind in kinds if counts[kind])
    return "; ".join([*parts, f"goals: {verdicts}" if judged else "no goal was measured"])


def tests(results: Record) -> str:
    """Say how the tests went: counts, and a line for each that failed, never ended or was skipped for a reason."""
    blocks = []
    for step, x in results.tests.items():
        counts = f"{x.passed} passed, {x.failed} failed, {x.error} error, {x.skipped} skipped"
        wrong = [f"- `{each['test']}`: {each['message']}" for each in x.failures]
        wrong += [f"- `{test}`: not finished" for test in x.unfinished]
        if len(wrong) > SHOWN:
            wrong = [*wrong[:SHOWN], f"- and {len(wrong) - SHOWN} more, in results.json"]
        lines = "\n".join([*wrong, *(f"- skipped: {reason}" for reason in x.skips)])
        summary = f"{step}: {x.selected} selected, {counts}, {len(x.unfinished)} not finished."
        blocks.append(report.joined(summary, lines))
    return report.joined(*blocks)


def render(results: Record) -> str:
    judged = [judge(goal, results.cases) for goal in GOALS] if results.cases else []
    missed = "\n".join(f"- {x.goal}: {x.measured}, wanted {x.bound}" for x in judged if x.verdict == MISSED)
    facts = results.environment | {name: f"{value:.0f}" for name, value in results.ceilings.items()}
    first = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in results.first_call.items())
    first = first and f"First calls in a fresh process without a compiler cache, D = 256: {first}."
    steps = [(x.step, x.status, f"{x.seconds:.0f}", x.note) for x in results.steps]
    parts = {
        "Steps": report.table(["step", "status", "seconds", "note"], steps),
        "Tests": tests(results),
        "Goals missed": missed or ("None of those measured." if judged else ""),
        "Goals": report.table(["goal", "wanted", "measured", "verdict"], judged),
        "First call, how it was measured": report.joined(first, *results.notes),
    }
    sections = [f"## {name}\n\n{text}" for name, text in parts.items() if text]
    return report.page(f"{headline(results.steps, judged)}.", facts, *sections, report.sections(results))
