"""Mutations of the kernels for sm_90a: each wait, fence, arrival and phase left out or wrong in turn, which must show.

One library holds all of them: a copy of the sources in which every such place asks whether it is the one that is
mutated. A mutation runs in a process of its own, in both extremes of the emulation (csrc/testing/hopper.h), and is
found where one of the calls ends in an error, or in other results, to the last bit, than the kernels as they are.

    PYTHONPATH=.:tests .venv/bin/python tests/mutations.py [--only dkv.cu]
"""

import argparse
import ctypes
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import simt
import torch
from cases import Case, make, op_arguments
from torch import Tensor

from asa_ops.asa import ops

FOLDER = simt.ROOT / "build/mutations"
EXTREMES = ("late", "early")
TIMEOUT = 300  # seconds; the emulation tells of threads that wait in vain, so this is for loops without end

# Those that survive are tried again so often: some show only where a few things happen in a certain order, by chance.
ATTEMPTS = 16

# What no emulation of this kind can show: file and change, and why.
EXCEPTIONS = {
    ("device.h", "__threadfence() -> void()"): "there is one memory, and all see what is written to it at once",
    ("sums.cu", "__syncwarp() -> void()"): "it orders memory; the lanes meet in the shuffles that follow, too",
}

# Beside csrc/cuda/asa/hopper: functions that the kernels share with others.
SHARED = {"cuda/asa/lists.h": "sum_before", "cuda/asa/mask.h": "exchange_bits", "cuda/device.h": "arrive_last_of"}


@dataclass(frozen=True)
class Mutation:
    """A place and what becomes of it."""

    number: int
    file: str  # in csrc
    line: int
    kind: str
    code: str

    @property
    def key(self) -> tuple[str, str]:
        return Path(self.file).name, self.code

    def __str__(self) -> str:
        return f"{self.number:3} {Path(self.file).name}:{self.line} {self.kind}: {self.code}"


# Calls that are left out, and kinds of mutations.
CALLS = {
    r"[\w.]+\.wait": "wait",
    r"[\w.]+\.free": "arrival",
    r"[\w.]+\.init": "barriers",
    "barrier_wait": "wait",
    "barrier_arrive": "arrival",
    "barrier_expect": "arrival",
    "barrier_init": "barriers",
    "barrier_init_done": "barriers",
    "products_fence": "fence",
    "products_commit": "commit",
    "products_wait<[^>]*>": "wait",
    "fence_proxy_async": "fence",
    "__threadfence": "fence",
    "fewer_registers<[^>]*>": "registers",
    "more_registers<[^>]*>": "registers",
    "__syncwarp": "threads meet",
    "__syncthreads": "threads meet",
    "named_barrier": "threads meet",
    "sync": "threads meet",  # a named barrier that a function is given
    "named_barrier_any": "threads meet",
    "arrive_last_of": "threads meet",
}
# Arguments of calls that are wrong: which one, the kind, and what stands for it.
ARGUMENTS = {
    r"[\w.]+\.wait": [(0, "position", "({}) + 1")],
    r"[\w.]+\.free": [(0, "position", "({}) + 1")],
    r"[\w.]+\.fill": [(0, "position", "({}) + 1")],
    "barrier_wait": [(1, "phase", "({}) ^ 1")],
    "barrier_expect": [(1, "bytes", "({}) + 16"), (1, "bytes", "({}) - 16")],
    "barrier_init": [(1, "arrivals", "({}) + 1"), (1, "arrivals", "({}) - 1")],
}


HEADER = """#pragma once
extern "C" __attribute__((visibility("default"))) inline int asa_mutation = -1;
inline bool asa_mutated(int number) { return number == asa_mutation; }
"""


class Source:
    """A file, and the changes to be made to it."""

    def __init__(self, file: str, function: str | None, first: int):
        self.file, self.text = file, (simt.ROOT / "csrc" / file).read_text()
        code = re.sub(r"//.*|^#.*", lambda x: " " * len(x[0]), self.text, flags=re.M)
        self.without_comments = code
        begin = re.search(rf"\b{function}\(", code).start() if function else 0
        self.code = " " * begin + code[begin : code.index("\n}\n", begin) if function else None]
        self.first, self.mutations, self.inserted = first, [], []
        self._calls()
        self._counters()

    def _add(self, begin: int, end: int, kind: str, instead: str) -> None:
        """Let a stretch be ``instead``, in which {} is what stands there."""
        number, now = self.first + len(self.mutations), self.code[begin:end]
        line = " ".join(now.split())
        code = f"{line} -> {instead.format(line)}"
        self.mutations.append(Mutation(number, self.file, self.text.count("\n", 0, begin) + 1, kind, code))
        # In the stretch others may be: of those that begin or end together the longer one is outside.
        before, after = f"(asa_mutated({number}) ? {instead.format(now)} : ", ")"
        self.inserted += [(begin, 1, begin - end, -number, before), (end, 0, end - begin, number, after)]

    def _calls(self) -> None:
        names = "|".join(sorted(CALLS | ARGUMENTS, key=len, reverse=True))
        for call in re.finditer(rf"(?<![\w.:])({names})\(", self.code):
            before = self.without_comments[: call.start()].rstrip()
            if re.search(r"[\w*&>]$", before) and not before.endswith(("return", "else", "&&")):
                continue  # a definition
            name = next(x for x in CALLS | ARGUMENTS if re.fullmatch(x, call[1]))
            *arguments, end = self._arguments(call.end())
            if name in CALLS:
                instead = {"named_barrier_any": self.code[slice(*arguments[-1])], "arrive_last_of": "true"}
                self._add(call.start(), end[1], CALLS[name], instead.get(name, "void()"))
            if pending := re.fullmatch("products_wait<(.*)>", call[1]):
                self._add(call.start(), end[1], "batches", f"products_wait<{pending[1]} + 1>()")
            for which, kind, instead in ARGUMENTS.get(name, []):
                self._add(*arguments[which], kind, instead)

    def _arguments(self, at: int) -> Iterator[tuple[int, int]]:
        """Yield where the arguments of a call are, and at last where its end is."""
        depth, begin = 1, at
        while depth:
            depth += (self.code[at] in "({[") - (self.code[at] in ")}]")
            if depth == 0 or (depth == 1 and self.code[at] == ","):
                yield begin, at
                begin = at + 1
            at += 1
        yield at, at

    def _counters(self) -> None:
        """Positions and turns, whose parity is a phase."""
        declared = re.findall(r"\buint32_t ([^;(]+);", self.code)
        for name in dict.fromkeys(re.findall(r"\b(\w+) = 0\b", ", ".join(declared))):
            advance = rf"\b{name}\+\+|\+\+{name}\b|\b{name} \+= [^;,){{}}]+|\b{name} = \w+ \+ \w+(?=;)"
            for place in re.finditer(advance, self.code):
                self._add(place.start(), place.end(), "phase", name)

    def mutated(self) -> str:
        text, done = "", 0
        for at, *_, more in sorted(self.inserted):
            text, done = text + self.text[done:at] + more, at
        return text + self.text[done:]


def sources() -> list[Source]:
    """Return what is mutated, numbered throughout."""
    csrc = simt.ROOT / "csrc"
    files = {str(x.relative_to(csrc)): None for x in sorted((csrc / "cuda/asa/hopper").glob("*.*"))}
    found: list[Source] = []
    for file, function in (files | SHARED).items():
        found.append(Source(file, function, sum(len(x.mutations) for x in found)))
    return found


def build(mutated: list[Source]) -> Path:
    """Return the library of all mutations, built anew if a source is newer."""
    library = FOLDER / "libasa_mutations.so"

    def make() -> None:
        shutil.rmtree(FOLDER / "csrc", ignore_errors=True)
        shutil.copytree(simt.ROOT / "csrc", FOLDER / "csrc")
        for source in mutated:
            (FOLDER / "csrc" / source.file).write_text(source.mutated())
        (FOLDER / "csrc/mutated.h").write_text(HEADER)
        simt.compile_all(library, ["-include", str(FOLDER / "csrc/mutated.h"), "-w"], FOLDER / "csrc")

    return simt.up_to_date(library, [*simt.SOURCES, Path(__file__)], make)


# Calls that reach every place.


def blocks_that_meet(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Return tokens of which those of one block of 64 like those of some others only: lists leave blocks out."""
    blocks = -(-shape[-2] // 64)
    meet = torch.rand(*shape[:-2], blocks, blocks, generator=generator) < 0.3
    directions = 12 * (meet | meet.mT)[..., : shape[-1]].float()
    directions = torch.nn.functional.pad(directions, (0, shape[-1] - directions.shape[-1]))
    return directions.repeat_interleave(64, -2)[..., : shape[-2], :]


@dataclass
class Call:
    """A call, and what the kernels as they are make of it."""

    arguments: tuple  # of the forward op
    tf32: bool
    grad_out: Tensor
    forward: list[Tensor]
    backward: list[Tensor]

    @classmethod
    def of(cls, case: Case) -> "Call":
        tf32 = case.name.endswith("tf32")
        (query, key, value, alpha, beta), options = make(case, torch.float32 if tf32 else torch.bfloat16)
        generator = torch.Generator().manual_seed(1)
        if case.name.startswith("sparse"):
            query += blocks_that_meet(query.shape, generator)
            blocks = torch.arange(key.shape[2]) // 64
            key += 12 * torch.nn.functional.one_hot(blocks, case.dim)
        if case.name == "one_tensor":
            query = key
        arguments = op_arguments([query, key, value, alpha, beta], options, band=0.0)
        grad_out = torch.randn(*query.shape[:3], case.dim_v, generator=generator).to(query.dtype)
        call = cls(arguments, tf32, grad_out, [], [])
        call.forward = call.run_forward()
        call.backward = call.run_backward()
        return call

    def run_forward(self) -> list[Tensor]:
        return list(ops.of("cuda", self.grad_out.device).fwd(*self.arguments, self.tf32))

    def run_backward(self) -> list[Tensor]:
        """Return the gradients, from what a forward kept as it should."""
        backward = ops.of("cuda", self.grad_out.device).bwd
        options = (*self.arguments[6:13], self.tf32)
        return list(backward(self.grad_out, *self.arguments[:6], *self.forward, *options))


ONE_WAY = {"reciprocal": False}
CASES = [
    Case("mutual", grid=(15, 28), batch=1, dim=64, dim_v=64),
    Case("one_way", grid=(12, 25), n_keys=500, batch=1, heads=1, dim=256, dim_v=256, beta=None, options=ONE_WAY),
    Case("dense", grid=(10, 20), n_keys=330, batch=1, heads=3, dim=128, dim_v=64, alpha=None, beta=None),
    Case("sparse", grid=(1, 1131), batch=1, dim=64, dim_v=64, beta=None),
    Case("sparse_wide", grid=(1, 700), batch=1, heads=1, dim=256, dim_v=256, beta=None),
    Case("padding", grid=(19, 36), batch=2, heads=1, dim=64, dim_v=64, padding=True),
    Case("one_tensor", grid=(15, 28), batch=1, dim=128, dim_v=128),
    Case("wide", grid=(15, 28), batch=1, heads=1, dim=256, dim_v=256),
    Case("sparse_tf32", grid=(1, 1131), batch=1, heads=1, dim=64, dim_v=64, beta=None),
    Case("wide_tf32", grid=(15, 28), batch=1, heads=1, dim=128, dim_v=128),
]


def same(xs: list[Tensor], ys: list[Tensor]) -> bool:
    """Return whether tensors have the same bytes; NaN is NaN."""
    pairs = zip(xs, ys, strict=True)
    return all(torch.equal(*(tensor.flatten().view(torch.uint8) for tensor in pair)) for pair in pairs)


# Runs.


FORWARD, BACKWARD = ("scores.cu", "select.cu", "sums.cu", "mask.h"), ("dq.cu", "dkv.cu")


def tells(file: str, calls: list[Call]) -> str:
    """Return what tells of a mutation in a file, that is made in this process; "" if nothing does."""
    try:
        for call in calls:
            if file not in BACKWARD and not same(call.run_forward(), call.forward):
                return "other results of a forward"
            if file not in FORWARD and not same(call.run_backward(), call.backward):
                return "other gradients"
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return ""


def elsewhere(function: Callable[[], str]) -> str:
    """Run a function in a copy of this process, and return what it returns, or what became of the process."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(write, function().encode()[:4000])
        finally:
            os._exit(0)
    os.close(write)
    with open(read, "rb") as pipe:
        told = pipe.read().decode() if select.select([pipe], [], [], TIMEOUT)[0] else "no end"
    if told == "no end":
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return told or (f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else "")


def run_here(library: Path, mutations: list[Mutation], attempts: int) -> dict[int, str]:
    """Return what tells of every mutation, in the extreme that this process was started for."""
    torch.set_num_threads(1)  # processes are copied
    torch.use_deterministic_algorithms(True)  # memory that nobody wrote is NaN
    simt.load(library=library)
    number = ctypes.c_int.in_dll(ctypes.CDLL(str(library)), "asa_mutation")
    calls = [Call.of(case) for case in CASES]

    def one(which: int, file: str) -> str:
        number.value = which
        return tells(file, calls * attempts)

    error = elsewhere(lambda: one(-1, ""))
    if error:
        raise AssertionError(f"without a mutation: {error}")
    told = {}
    for x in mutations:
        begin = time.monotonic()
        told[x.number] = elsewhere(lambda x=x: one(x.number, Path(x.file).name))
        print(f"{time.monotonic() - begin:5.1f} s {x}: {told[x.number] or 'SURVIVES'}", file=sys.stderr, flush=True)
    return told


def run_elsewhere(mutations: list[Mutation], extreme: str, attempts: int = 1) -> dict[int, str]:
    """Do so in another process."""
    environment = os.environ | {"ASA_OPS_HOPPER": "1", "PYTHONPATH": f"{simt.ROOT}:{simt.ROOT / 'tests'}"}
    environment.pop("ASA_OPS_SIMT_REVERSED", None)
    environment |= {"ASA_OPS_SIMT_REVERSED": "1"} if extreme == "early" else {}
    numbers = ",".join(str(x.number) for x in mutations)
    command = [sys.executable, __file__, "--numbers", numbers, "--attempts", str(attempts)]
    with open(FOLDER / f"{extreme}_{mutations[0].number}_{attempts}.log", "w+") as log:
        run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=log, text=True)
        log.seek(0)
        assert run.returncode == 0, log.read()[-3000:]
    return {int(number): told for number, told in json.loads(run.stdout).items()}


def run(mutations: list[Mutation]) -> dict[Mutation, tuple[str, str]]:
    """Return what tells of every mutation, in either extreme."""
    build(sources())
    shares = max((os.cpu_count() or 1) // 2, 1)
    told: dict[str, dict[int, str]] = {extreme: {} for extreme in EXTREMES}

    def run_all(chosen: list[Mutation], attempts: int) -> None:
        jobs = [(part, extreme) for i in range(shares) if (part := chosen[i::shares]) for extreme in EXTREMES]
        with ThreadPoolExecutor(len(EXTREMES) * shares) as pool:
            for (_, extreme), some in zip(jobs, pool.map(lambda job: run_elsewhere(*job, attempts), jobs), strict=True):
                told[extreme] |= some

    run_all(mutations, 1)
    survive = [x for x in mutations if not any(told[extreme][x.number] for extreme in EXTREMES)]
    run_all([x for x in survive if x.key not in EXCEPTIONS], ATTEMPTS)
    return {x: tuple(told[extreme][x.number] for extreme in EXTREMES) for x in mutations}


def report(results: dict[Mutation, tuple[str, str]]) -> Iterator[str]:
    kinds: dict[str, Counter] = {}
    for x, told in results.items():
        found = "both" if all(told) else f"{EXTREMES[0] if told[0] else EXTREMES[1]} only" if any(told) else "survive"
        kinds.setdefault(x.kind, Counter())[found] += 1
    columns = ("both", *(f"{extreme} only" for extreme in EXTREMES), "survive")
    yield f"{'found in':14}{''.join(f'{x:>12}' for x in columns)}"
    for kind, counts in (kinds | {"all": sum(kinds.values(), Counter())}).items():
        yield f"{kind:14}{''.join(f'{counts[x]:12}' for x in columns)}"
    first = Counter(re.sub(r"^\w+(<\w+>)?: ", "", next(filter(None, told), "survives")) for told in results.values())
    yield from (f"{count:5} {what}" for what, count in first.most_common())
    yield from (f"SURVIVES {x} ({EXCEPTIONS.get(x.key, 'WHY?')})" for x, told in results.items() if not any(told))


def all_mutations() -> list[Mutation]:
    return [x for source in sources() for x in source.mutations]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="", help="a regular expression: those whose line in the report has it")
    parser.add_argument("--numbers", help="run these here, and write what tells of them")
    parser.add_argument("--attempts", type=int, default=1)
    arguments = parser.parse_args()
    library = build(sources())
    if arguments.numbers:
        chosen = {int(x) for x in arguments.numbers.split(",")}
        told = run_here(library, [x for x in all_mutations() if x.number in chosen], arguments.attempts)
        print(json.dumps(told))
    else:
        print(*report(run([x for x in all_mutations() if re.search(arguments.only, str(x))])), sep="\n")


if __name__ == "__main__":
    main()
