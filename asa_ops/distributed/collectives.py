"""What the processes of a group exchange: errors, sizes, rows of tensors. ``torch.distributed`` carries it."""

import hashlib
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..core.checks import describe

_T = TypeVar("_T")
Found = tuple[_T, list[int], dict[str, object]]
# Its name before torch 2.13.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def as_group(group: object) -> dist.ProcessGroup:
    """Return the process group that ``group`` stands for: itself, that of a mesh of one dimension, or all processes."""
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError("no process group: call torch.distributed.init_process_group first")
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(f"group must be a mesh of one dimension, got {group.ndim} in {group}")
        group = group.get_group()
    group = dist.group.WORLD if group is None else group
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(f"process {dist.get_rank()} is no member of the group")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group must be a process group, a DeviceMesh or None, got {describe(group)}")
    return group


def agree(group: dist.ProcessGroup, look: Callable[[], Found[_T]]) -> tuple[_T, list[list[int]]]:
    """Have every process look at its own arguments; return what this one found, and the sizes of all.

    Args:
        look: returns what its process needs, sizes that may differ between processes, and what must be the same.

    Raises:
        Exception: the same on every process: that of the first whose ``look`` raised one.
        ValueError: processes were given different things.
    """
    error: Exception | None = None
    found: Found[_T] | None = None
    try:
        found = look()
    except Exception as raised:
        error = raised
    _, sizes, same = found or (None, [], {})
    text = repr(sorted(same.items()))
    digest = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")
    everybody = _all_gather_numbers(group, [error is not None, digest, *sizes, *[0] * (_MOST_SIZES - len(sizes))])
    if any(failed for failed, *_ in everybody) or len({digest for _, digest, *_ in everybody}) > 1:
        _raise_everywhere(group, error, same)
    assert found is not None
    return found[0], [numbers[2 : 2 + len(sizes)] for numbers in everybody]


_MOST_SIZES = 2


def _all_gather_numbers(group: dist.ProcessGroup, numbers: Sequence[int]) -> list[list[int]]:
    """Return the numbers of every process; this waits for all of them."""
    backend = dist.get_backend(group)  # "nccl", or "cpu:gloo,cuda:nccl"
    device = torch.device("cuda" if "nccl" in backend and "gloo" not in backend else "cpu")
    mine = torch.tensor([int(x) for x in numbers], dtype=torch.int64, device=device)
    everybody = mine.new_empty(dist.get_world_size(group) * len(numbers))
    _all_gather_single(everybody, mine, group=group)
    return everybody.view(-1, len(numbers)).tolist()


def _raise_everywhere(group: dist.ProcessGroup, error: Exception | None, same: dict[str, object]) -> None:
    kinds = {"TypeError": TypeError, "ValueError": ValueError}
    mine = (None if error is None else type(error).__name__, str(error), same)
    everybody: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everybody, mine, group=group)
    for rank, (kind, message, _) in enumerate(everybody):
        if kind is not None:
            raise kinds.get(kind, RuntimeError)(f"process {rank} of {len(everybody)}: {message}") from error
    first = everybody[0][2]
    for rank, (_, _, other) in enumerate(everybody):
        for name in first:
            if repr(other.get(name)) != repr(first[name]):  # as the digest compares
                raise ValueError(
                    f"every process must be given the same {name}, got {first[name]} in process 0 and "
                    f"{other.get(name)} in process {rank}"
                )
    raise ValueError("every process must be given the same arguments")


def all_gather_rows(group: dist.ProcessGroup, tensors: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
    """Return tensors [B, heads, n, ..] of all processes joined along their rows, in one message.

    Process r has ``sizes[r]`` of them.
    """
    if len(sizes) == 1:
        return list(tensors)
    rows, longest = _pack(tensors), max(sizes)
    padded = rows if len(rows) == longest else torch.nn.functional.pad(rows, (0, 0, 0, longest - len(rows)))
    everybody = padded.new_empty(len(sizes) * longest, rows.shape[1])
    if everybody.numel():
        _all_gather_single(everybody, padded, group=group)
    if min(sizes) < longest:
        everybody = torch.cat([part[:n] for part, n in zip(everybody.split(longest), sizes, strict=True)])
    return _unpack(everybody, tensors)


def redistribute_rows(
    group: dist.ProcessGroup, tensors: Sequence[Tensor], held: Sequence[int], wanted: Sequence[int]
) -> list[Tensor]:
    """Return other rows of tensors [B, heads, n, ..] whose rows are spread over processes, in one message.

    Process r has ``held[r]`` rows, after those of the processes before it, and wants ``wanted[r]``.
    """
    if list(held) == list(wanted):
        return list(tensors)
    rank = dist.get_rank(group)
    to_each, from_each = overlaps(held, wanted, rank), overlaps(wanted, held, rank)
    pieces = list(zip(*(x.split(to_each, 2) for x in tensors), strict=True))  # for each process, of every tensor
    nothing = [x[:, :, :0] for x in tensors]
    packed = [_pack(nothing if r == rank else piece) for r, piece in enumerate(pieces)]
    received = [_unpack(rows, tensors) for rows in all_to_all(group, packed, from_each)]
    received[rank] = list(pieces[rank])  # what stays is copied once
    return [torch.cat(parts, 2) for parts in zip(*received, strict=True)]


def overlaps(mine: Sequence[int], others: Sequence[int], rank: int) -> list[int]:
    """Return how many rows of process ``rank``, split by ``mine``, each process has if they are split by ``others``."""
    begin, end = sum(mine[:rank]), sum(mine[: rank + 1])
    bounds = [0]
    for size in others:
        bounds.append(bounds[-1] + size)
    return [max(0, min(end, b) - max(begin, a)) for a, b in pairwise(bounds)]


def all_to_all(group: dist.ProcessGroup, parts: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
    """Send ``parts[r]`` to process r; return what every process sent here, ``sizes[r]`` rows from process r.

    All have the same dtype and, but for their number of rows, the first dimension, the same shape. What a process keeps
    is not copied.
    """
    rank = dist.get_rank(group)
    counts, lengths = ([0 if r == rank else n for r, n in enumerate(x)] for x in (sizes, [len(x) for x in parts]))
    sent = torch.cat([part[:n] for part, n in zip(parts, lengths, strict=True)])
    received = sent.new_empty(sum(counts), *sent.shape[1:])
    # Bytes: not every backend takes every dtype.
    ins, outs = (x.view(torch.uint8) if x.dim() > 1 else x[:, None].view(torch.uint8) for x in (sent, received))
    dist.all_to_all_single(outs, ins, counts, lengths, group=group)
    return [parts[rank] if r == rank else x for r, x in enumerate(received.split(counts))]


def shift(group: dist.ProcessGroup, sent: Tensor, shape: Sequence[int], to: int, source: int) -> Tensor:
    """Send a contiguous tensor to process ``to``, and return one of ``shape`` that ``source`` sends here."""
    received = sent.new_empty(shape)
    size = dist.get_world_size(group)
    counts, lengths = ([x.numel() * (r == other) for r in range(size)] for x, other in ((received, source), (sent, to)))
    dist.all_to_all_single(received.flatten(), sent.flatten(), counts, lengths, group=group)
    return received


def _pack(tensors: Sequence[Tensor]) -> Tensor:
    """Return the memory of every row of tensors [B, heads, n, ..], uint8 [n, bytes]."""
    return torch.cat([_bytes(x.detach().movedim(2, 0)) for x in tensors], 1)


def _bytes(rows: Tensor) -> Tensor:
    """Return the memory of every row [n, ..], as uint8 [n, bytes]."""
    rows, n = rows.detach().contiguous(), math.prod(rows.shape[1:])
    return rows.as_strided((len(rows), n), (n, 1)).view(torch.uint8)  # dimensions of 1 may have had any stride


def _unpack(rows: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    tensors, begin = [], 0
    for x in like:
        shape = (len(rows), *x.shape[:2], *x.shape[3:])
        end = begin + math.prod(shape[1:]) * x.dtype.itemsize
        numbers = rows[:, begin:end].clone(memory_format=torch.contiguous_format).flatten().view(x.dtype)
        tensors.append(numbers.view(shape).movedim(0, 2).contiguous())
        begin = end
    return tensors
