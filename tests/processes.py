"""A few processes of one torch.distributed group that run what a test asks for, again and again."""

import contextlib
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import connection
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SIZE = 4
TIMEOUT = timedelta(seconds=60)


class Processes:
    """Processes, started once."""

    def __init__(self, size: int = SIZE, timeout: timedelta = TIMEOUT) -> None:
        context = mp.get_context("forkserver")  # one process imports what all of them need
        context.set_forkserver_preload(["torch.distributed.tensor", "asa_ops"])
        self.folder = tempfile.TemporaryDirectory()
        self.pipes, self.children = [], []
        for rank in range(size):
            mine, its = context.Pipe()
            address = f"{self.folder.name}/rendezvous"
            child = context.Process(target=_serve, args=(rank, size, address, timeout, its), daemon=True)
            child.start()
            its.close()
            self.pipes.append(mine)
            self.children.append(child)

    def run(self, size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Return what ``function(group, rank, *args)`` returns in each of the first ``size`` processes."""
        for pipe in self.pipes[:size]:
            pipe.send((size, function, args))
        answers: list[Any] = [None] * size
        waiting = {pipe: rank for rank, pipe in enumerate(self.pipes[:size])}
        failures = []  # in their order: the others may only have waited for the first
        while waiting:
            for pipe in connection.wait(list(waiting)):
                rank = waiting.pop(pipe)
                try:
                    failure, answers[rank] = pipe.recv()
                except EOFError:
                    failure = f"process {rank} ended"
                failures += [failure] if failure else []
        if failures:
            raise AssertionError("\n".join(failures))
        return answers

    def end(self) -> None:
        for pipe, child in zip(self.pipes, self.children, strict=True):
            if child.is_alive():
                with contextlib.suppress(OSError):  # it may end this moment
                    pipe.send(None)
        for child in self.children:
            child.join(10)
            child.kill()


def _serve(rank: int, all_of_them: int, rendezvous: str, timeout: timedelta, pipe: Any) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # fills what is not initialised with NaN
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=all_of_them, timeout=timeout
    )
    groups = {size: dist.new_group(list(range(size)), timeout=timeout) for size in range(1, all_of_them + 1)}
    while (job := pipe.recv()) is not None:
        size, function, args = job
        try:
            pipe.send(("", function(groups[size], rank, *args)))
        except BaseException:
            pipe.send((f"process {rank} of {size}:\n{traceback.format_exc()}", None))
    os._exit(0)  # threads of gloo outlive the group, and may abort a process whose Python is torn down
