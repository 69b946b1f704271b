"""What bench/gpu.py makes of what it measured: tallies, floating point operations, goals, the summary. No torch.

``results`` is the dict that bench/gpu.py writes as results.json:

    environment: {name: value}
    steps:   [{step, status, seconds, note}]    status: passed, failed, timed out, skipped
    tests, configs: what ``tally`` returns
    timings: {ceilings: {gemm_tflops, copy_tbs}, first_call: {name: seconds}, notes: [str], cases: [case]}
    case:    {inputs, N, grid, D, mode, survivors, active, methods: {name: method}, kernels: {name: kernel}}
    method:  {call_ms: [ms of every round], graph_ms: [..]} or {error}
    kernel:  {ms, launches, flops}

``active`` is the fraction of 64 x 64 tiles, in the order of the kernels, that hold a neighbour.
"""

import json
import re
import statistics
from collections.abc import Iterable
from typing import NamedTuple

from record import quartiles

SECONDS = {
    "build": 60,
    "tests": 150,
    "configs": 110,
    "sanitizer": 60,
    "timings": 140,
    "bench": 90,
}  # shares of the budget
DENSE = ("sdpa flash", "sdpa cudnn", "sdpa efficient")
ACTIVE_LIMIT = 0.25  # up to here inputs count as structured in the goals
KERNELS = ("statistics", "mask", "aggregate", "dq", "dk", "dv", "dkv", "dt")  # those with products of tiles
BACKWARD = ("dq", "dk", "dv", "dkv")


def seconds_for(step: str, later: Iterable[str], remaining: float) -> float:
    """Return how long a step may take, so that the later ones keep their shares; what it leaves, they get."""
    return remaining * SECONDS[step] / (SECONDS[step] + sum(SECONDS[name] for name in later))


def tally(lines: Iterable[str]) -> dict:
    """Sum up what gpu_shard wrote: counts, failures, tests without an outcome, the slowest."""
    selected, outcomes = set(), {}
    for line in lines:
        event = json.loads(line)
        if event["event"] == "selected":
            selected.update(event["tests"])
        elif event["event"] == "outcome":
            before = outcomes.get(event["test"])
            if before is None or before["outcome"] in ("passed", "skipped"):  # an error in teardown counts
                outcomes[event["test"]] = event
    counts = {kind: 0 for kind in ("passed", "failed", "error", "skipped")}
    for event in outcomes.values():
        counts[event["outcome"]] += 1
    wrong = [event for event in outcomes.values() if event["outcome"] in ("failed", "error")]
    slowest = sorted(outcomes.values(), key=lambda event: -event["seconds"])[:5]

    def told(events: list[dict], *keys: str) -> list[dict]:
        return [{key: event[key] for key in keys} for event in events]

    return {
        "selected": len(selected),
        **counts,
        "failures": told(wrong, "test", "outcome", "seconds", "message"),
        "unfinished": sorted(selected - set(outcomes)),
        "skips": sorted({event["message"] for event in outcomes.values() if event["outcome"] == "skipped"}),
        "slowest": told(slowest, "test", "seconds"),
    }


def status_of_tests(counts: dict, timed_out: bool) -> str:
    """Return "passed" only if every test selected came to an end, none failed and at least one ran."""
    if counts["failed"] or counts["error"]:
        return "failed"
    if timed_out:
        return "timed out"
    return "passed" if counts["passed"] and not counts["unfinished"] else "failed"


def sanitizer_status(check: str, status: int | None, log: str) -> tuple[str, str]:
    """Return the status and a note from how a ``check`` of compute-sanitizer ended (None: at its limit) and its log."""
    if status is None:
        return "timed out", f"{check}, at its limit"
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)", log)
    if status == 0 and summary and int(summary[-1]) == 0:
        return "passed", f"{check}, 0 errors"
    if re.search(r"Device not supported|not supported on this device|Unable to attach", log):
        return "skipped", "compute-sanitizer does not work on this machine"
    return "failed", f"{check}, {summary[-1] if summary else 'unknown'} errors, exit status {status}"


def exit_status(steps: list[dict]) -> int:
    """Return 0 only if a step beyond the build passed, none failed, and no tests were left unfinished."""
    failed = any(x["status"] == "failed" for x in steps)
    unfinished = any(x["status"] == "timed out" and x["step"] in ("tests", "configs") for x in steps)
    ran = any(x["status"] == "passed" and x["step"] != "build" for x in steps)
    return int(failed or unfinished or not ran)


def kernel_flops(kernel: str, pairs: int, dim: int, dim_v: int, mutual: bool = True, symmetric: bool = False) -> int:
    """Return the floating point operations of a kernel on tiles that hold ``pairs`` pairs, from its products per pair.

    Multiply and add count as two. ``dim`` and ``dim_v`` are what is multiplied, padding included.
    """
    products = {
        "statistics": dim,
        "mask": dim * (2 if mutual and not symmetric else 1),
        "aggregate": dim + dim_v,  # scores, p v
        "dq": 2 * dim + dim_v,  # scores, do v, ds k
        "dk": 2 * dim + dim_v,
        "dv": dim + dim_v,  # scores, p do
        "dkv": 2 * dim + 2 * dim_v,
        "dt": (dim + dim_v) * (2 if mutual else 1),
    }
    return 2 * pairs * products[kernel]


class Ratio(NamedTuple):
    """How many times faster than a peer: medians over rounds with quartiles, as called and in graph replays."""

    peer: str
    call: list[float]  # low, median, high
    graph: list[float] | None


def median(case: dict, method: str, how: str = "call_ms") -> float | None:
    times = case["methods"].get(method, {}).get(how)
    return statistics.median(times) if times else None


def best(case: dict, peers: Iterable[str], how: str = "call_ms") -> str | None:
    """Return the fastest of ``peers`` that ran."""
    times = {peer: median(case, peer, how) for peer in peers}
    ran = {peer: time for peer, time in times.items() if time is not None}
    return min(ran, key=ran.get) if ran else None


def ratio(case: dict, peers: Iterable[str]) -> Ratio | str:
    """Compare the fastest of ``peers`` with asa; or say why that cannot be."""
    asa, peer = case["methods"].get("asa", {}), best(case, peers)
    if "call_ms" not in asa:
        return f"asa failed: {asa.get('error', 'not run')}"
    if peer is None:
        reasons = (case["methods"].get(name, {}).get("error", "not run") for name in peers)
        return f"no peer ran: {'; '.join(dict.fromkeys(reasons))}"

    def over(peer: str, how: str) -> list[float]:
        pairs = zip(case["methods"][peer][how], asa[how], strict=False)  # slow peers have fewer rounds
        return quartiles([theirs / ours for theirs, ours in pairs])

    replayed = best(case, peers, "graph_ms") if asa.get("graph_ms") else None
    return Ratio(peer, over(peer, "call_ms"), over(replayed, "graph_ms") if replayed else None)


def tflops(case: dict, kernels: Iterable[str]) -> float | None:
    """Return the rate of the named kernels together, None if none ran."""
    ran = [case["kernels"][name] for name in kernels if case.get("kernels", {}).get(name, {}).get("flops")]
    return sum(x["flops"] for x in ran) / sum(x["ms"] for x in ran) / 1e9 if ran else None


class Verdict(NamedTuple):
    goal: str
    bound: str
    measured: str
    verdict: str  # "met", "met in graph replay only", "MISSED", or why there is none


class Goal(NamedTuple):
    """At least ``bound``: a ratio to the fastest of ``peers``, or the TFLOP/s of ``kernels``."""

    text: str
    bound: float
    inputs: str
    n: int
    mode: str
    peers: tuple[str, ...] = ()
    kernels: tuple[str, ...] = ()
    structured: bool = False  # applies to inputs with few active tiles only


_OVER_DENSE = "over the best dense SDPA"
_OVER_EAGER = "over the published formula in eager PyTorch"
_OVER_FLEX = "over FlexAttention, its mask built in the call"
_MODES = ("fwd", "fwd+bwd")
_SPARSE = [("fwd", 8192, 1.5), ("fwd", 9409, 1.5), ("fwd", 16384, 1.0), ("fwd+bwd", 8192, 2.0), ("fwd+bwd", 9409, 2.0)]
GOALS = [
    *(
        Goal(_OVER_DENSE, bound, inputs, n, mode, peers=DENSE, structured=True)
        for inputs in ("labels", "photo")
        for mode, n, bound in _SPARSE
    ),
    Goal(_OVER_DENSE, 0.6, "dense", 8192, "fwd", peers=DENSE),
    Goal(_OVER_DENSE, 0.55, "dense", 8192, "fwd+bwd", peers=DENSE),
    *(Goal(_OVER_EAGER, 20.0, "labels", 9409, mode, peers=("eager",)) for mode in _MODES),
    *(Goal(_OVER_EAGER, 7.0, "dense", 9409, mode, peers=("eager",)) for mode in _MODES),
    *(Goal(_OVER_FLEX, 5.0, "labels", 8192, mode, peers=("flex + mask",)) for mode in _MODES),
    *(Goal("pass 1, TFLOP/s", 600, "labels", n, "fwd", kernels=("statistics",)) for n in (8192, 16384)),
    *(
        Goal(text, bound, inputs, n, mode, kernels=kernels)
        for text, bound, mode, kernels in (
            ("aggregate, TFLOP/s", 400, "fwd", ("aggregate",)),
            ("backward, TFLOP/s", 350, "fwd+bwd", BACKWARD),
        )
        for inputs, n in (("labels", 8192), ("dense", 8192), ("dense", 16384))
    ),
]


def judge(goal: Goal, cases: list[dict]) -> Verdict:
    """Compare what was measured with a goal."""
    name = f"{goal.text}: {goal.inputs}, N = {goal.n}, {goal.mode}"
    bound = f">= {goal.bound:g}" + ("" if goal.kernels else " x")
    found = [case for case in cases if (case["inputs"], case["N"], case["mode"]) == (goal.inputs, goal.n, goal.mode)]
    if goal.kernels:
        rates = [rate for case in found if (rate := tflops(case, goal.kernels)) is not None]
        if not rates:
            return Verdict(name, bound, "-", "not measured")
        return Verdict(name, bound, f"{rates[0]:.0f}", "met" if rates[0] >= goal.bound else "MISSED")
    case = next((case for case in found if any(peer in case["methods"] for peer in goal.peers)), None)
    if case is None:
        return Verdict(name, bound, "-", "not measured")
    result = ratio(case, goal.peers)
    if isinstance(result, str):
        return Verdict(name, bound, "-", f"not measured ({result})")
    measured = f"{result.call[1]:.2f} x" + (f", graph {result.graph[1]:.2f} x" if result.graph else "")
    if goal.structured and not (case.get("active") or 1) <= ACTIVE_LIMIT:
        return Verdict(name, bound, measured, f"does not apply: {_percent(case, 'active')} of the tiles are active")
    if result.call[1] >= goal.bound:
        return Verdict(name, bound, measured, "met")
    in_graph = result.graph is not None and result.graph[1] >= goal.bound
    return Verdict(name, bound, measured, "met in graph replay only" if in_graph else "MISSED")


def table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    lines = [list(header)]
    lines += [["---"] * len(lines[0]), *([str(cell).replace("|", "/") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _with_quartiles(values: list[float] | None) -> str:
    return f"{values[1]:.2f} ({values[0]:.2f}-{values[2]:.2f})" if values else "-"


def _percent(case: dict, name: str) -> str:
    return f"{100 * case[name]:.1f} %" if case.get(name) is not None else "-"


def _timing_row(case: dict) -> list[str]:
    dense, eager = ratio(case, DENSE), ratio(case, ("eager",))
    peer, call, graph = ("-", None, None) if isinstance(dense, str) else dense
    replayed = best(case, DENSE, "graph_ms")
    return [
        case["inputs"],
        str(case["N"]),
        case["mode"],
        _percent(case, "survivors"),
        _percent(case, "active"),
        _ms(median(case, "asa")),
        f"{_ms(median(case, peer))} {peer.removeprefix('sdpa ')}",
        _with_quartiles(call),
        _ms(median(case, "asa", "graph_ms")),
        _ms(median(case, replayed, "graph_ms") if replayed else None),
        _with_quartiles(graph),
        "-" if isinstance(eager, str) else f"{eager.call[1]:.1f}",
    ]


def _section(title: str, text: str) -> list[str]:
    return [f"## {title}", text] if text else []


def _tests(results: dict) -> str:
    blocks = []
    for step in ("tests", "configs"):
        counts = results.get(step)
        if not counts:
            continue
        text = ", ".join(f"{counts[kind]} {kind}" for kind in ("passed", "failed", "error", "skipped"))
        blocks.append(f"{step}: {counts['selected']} selected, {text}, {len(counts['unfinished'])} not finished.")
        wrong = [f"- `{x['test']}`: {x['message']}" for x in counts["failures"]]
        wrong += [f"- `{test}`: not finished" for test in counts["unfinished"]]
        if len(wrong) > 40:
            wrong = [*wrong[:40], f"- and {len(wrong) - 40} more, in results.json"]
        wrong += [f"- skipped: {reason}" for reason in counts["skips"]]
        if wrong:
            blocks.append("\n".join(wrong))
    return "\n\n".join(blocks)


def _timings(timings: dict) -> list[str]:
    cases = timings.get("cases", [])
    dense = [case for case in cases if any(name in case["methods"] for name in DENSE)]
    columns = ["inputs", "N", "mode", "survivors", "active tiles", "asa ms", "best dense ms", "dense / asa (quartiles)"]
    columns += ["asa ms, graph", "best dense, graph", "dense / asa, graph", "eager / asa"]
    sections = _section("Timings", table(columns, map(_timing_row, dense)) if dense else "")

    names = list(dict.fromkeys(name for case in cases for name in case["methods"]))
    every = [
        [case["inputs"], case["N"], case["mode"], *(_ms(median(case, name)) for name in names)]
        for case in cases
        if case["methods"]
    ]
    sections += _section("Every method, ms as called", table(["inputs", "N", "mode", *names], every) if every else "")
    errors = {(name, m["error"]): None for case in cases for name, m in case["methods"].items() if "error" in m}
    sections += ["\n".join(f"- {name} did not run: {error}" for name, error in errors)] if errors else []

    kernels = []
    for case in cases:
        for name, kernel in case.get("kernels", {}).items():
            rate = tflops(case, (name,))
            told = f"{1e3 * kernel['ms']:.1f}", "-" if rate is None else f"{rate:.0f}"
            kernels.append([case["inputs"], case["N"], case["mode"], name, kernel["launches"], *told])
    columns = ["inputs", "N", "mode", "kernel", "launches", "microseconds", "TFLOP/s"]
    sections += _section("Kernels", table(columns, kernels) if kernels else "")

    lines = []
    if ceilings := timings.get("ceilings"):
        lines.append(
            f"Ceilings on this card: {ceilings['gemm_tflops']:.0f} TFLOP/s (bfloat16 8192 x 8192 x 8192 product), "
            f"{ceilings['copy_tbs']:.2f} TB/s (copy, bytes read and written)."
        )
    if first := timings.get("first_call"):
        told = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in first.items())
        lines.append(f"First calls in a fresh process without a compiler cache, D = 256: {told}.")
    lines += timings.get("notes", [])
    return sections + _section("Ceilings, first call, how it was measured", "\n\n".join(lines))


def verdicts(results: dict) -> list[Verdict]:
    cases = results.get("timings", {}).get("cases", [])
    return [judge(goal, cases) for goal in GOALS] if cases else []


def headline(results: dict) -> str:
    """Say in one line how it went."""
    steps = results.get("steps", [])
    parts = [
        f"{step['step']} {step['status']}" + (f" ({step['note']})" if step.get("note") else "")
        for step in steps
        if step["status"] != "passed"
    ]
    if steps and not parts:
        parts.append("every step passed")
    judged = [x.verdict for x in verdicts(results)]
    if judged:
        counts = {name: judged.count(name) for name in ("met", "met in graph replay only", "MISSED")}
        counts["not measured"] = sum(verdict.startswith("not measured") for verdict in judged)
        counts["do not apply"] = sum(verdict.startswith("does not apply") for verdict in judged)
        parts.append("goals: " + ", ".join(f"{count} {name}" for name, count in counts.items() if count))
    else:
        parts.append("no goal was measured")
    return "; ".join(parts)


def render(results: dict) -> str:
    """Return the summary as Markdown."""
    environment = results.get("environment", {})
    lines = [f"# asa_ops on {environment.get('gpu') or 'no GPU'}", f"**{headline(results)}.**"]
    lines.append("\n".join(f"- {name}: {value}" for name, value in environment.items()))
    steps = [[x["step"], x["status"], f"{x['seconds']:.0f}", x.get("note", "")] for x in results.get("steps", [])]
    lines += _section("Steps", table(["step", "status", "seconds", "note"], steps) if steps else "")
    lines += _section("Tests", _tests(results))
    judged = verdicts(results)
    if judged:
        missed = [f"- {x.goal}: {x.measured}, wanted {x.bound}" for x in judged if x.verdict == "MISSED"]
        lines += _section("Goals missed", "\n".join(missed) or "None of those measured.")
        lines += _section("Goals", table(["goal", "wanted", "measured", "verdict"], judged))
    return "\n\n".join(lines + _timings(results.get("timings", {}))) + "\n"
