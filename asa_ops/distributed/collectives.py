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


def any_process(group: dist.ProcessGroup, here: bool) -> bool:
    """Return whether it is so in any process."""
    return any(there for (there,) in _all_gather_numbers(group, [here]))


def all_gather_rows(group: dist.ProcessGroup, tensors: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
    """Return tensors [B, heads, n, ..] of all processes joined along their rows, in one message.

    Process r has ``sizes[r]`` of them.
    """
    if len(sizes) == 1:
        return list(tensors)
    lengths = [_message_bytes(tensors, n) for n in sizes]
    message, longest = _pack(tensors), max(lengths)
    if len(message) < longest:
        message = torch.nn.functional.pad(message, (0, longest - len(message)))
    everybody = message.new_empty(len(sizes) * longest)
    if longest:
        _all_gather_single(everybody, message, group=group)
    messages = [everybody[r * longest :][:length] for r, length in enumerate(lengths)]
    return _unpack(messages, tensors, sizes)


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
    return exchange_rows(group, pieces, from_each)


def exchange_rows(group: dist.ProcessGroup, pieces: Sequence[Sequence[Tensor]], sizes: Sequence[int]) -> list[Tensor]:
    """Send tensors [B, heads, n, ..] to every process, ``pieces[r]`` to process r; return what came, joined.

    ``sizes[r]`` rows come from process r. What a process keeps is copied once.
    """
    rank = dist.get_rank(group)
    like = pieces[rank]
    messages = [_pack([x[:, :, :0] for x in piece] if r == rank else piece) for r, piece in enumerate(pieces)]
    received = all_to_all(group, messages, [_message_bytes(like, n) for n in sizes])
    return _unpack(received, like, sizes, rank)


def overlaps(mine: Sequence[int], others: Sequence[int], rank: int) -> list[int]:
    """Return how many rows of process ``rank``, split by ``mine``, each process has if they are split by ``others``."""
    begin, end = sum(mine[:rank]), sum(mine[: rank + 1])
    bounds = [0]
    for size in others:
        bounds.append(bounds[-1] + size)
    return [max(0, min(end, b) - max(begin, a)) for a, b in pairwise(bounds)]


def all_to_all(group: dist.ProcessGroup, messages: Sequence[Tensor], lengths: Sequence[int]) -> list[Tensor]:
    """Send ``messages[r]``, uint8 [bytes], to process r; return those of every process, ``lengths[r]`` bytes of it.

    What a process keeps is not copied.
    """
    rank = dist.get_rank(group)
    counts, parts = ([0 if r == rank else n for r, n in enumerate(x)] for x in (lengths, map(len, messages)))
    sent = torch.cat([message[:n] for message, n in zip(messages, parts, strict=True)])
    received = sent.new_empty(sum(counts))
    dist.all_to_all_single(received, sent, counts, parts, group=group)
    return [messages[rank] if r == rank else x for r, x in enumerate(received.split(counts))]


def shift(group: dist.ProcessGroup, sent: Tensor, shape: Sequence[int], to: int, source: int) -> Tensor:
    """Send a contiguous tensor to process ``to``, and return one of ``shape`` that ``source`` sends here."""
    received = sent.new_empty(shape)
    size = dist.get_world_size(group)
    counts, lengths = ([x.numel() * (r == other) for r in range(size)] for x, other in ((received, source), (sent, to)))
    dist.all_to_all_single(received.flatten(), sent.flatten(), counts, lengths, group=group)
    return received


def _bytes(x: Tensor) -> Tensor:
    """Return the memory of a tensor [B, heads, n, ..] as uint8 [B * heads, n * bytes of a row]."""
    x, of_head = x.detach().contiguous(), math.prod(x.shape[2:])
    # Dimensions of 1 may have had any stride.
    return x.as_strided((math.prod(x.shape[:2]), of_head), (of_head, 1)).view(torch.uint8)


def _message_bytes(tensors: Sequence[Tensor], n: int) -> int:
    """Return the bytes of n rows of tensors."""
    return n * sum(math.prod(x.shape[:2] + x.shape[3:]) * x.dtype.itemsize for x in tensors)


def _pack(tensors: Sequence[Tensor]) -> Tensor:
    """Return the memory of tensors [B, heads, n, ..] one after another, uint8 [bytes]."""
    return torch.cat([_bytes(x).flatten() for x in tensors])


def _unpack(
    messages: Sequence[Tensor], like: Sequence[Tensor], sizes: Sequence[int], own: int | None = None
) -> list[Tensor]:
    """Return tensors whose rows came in several messages, ``sizes[r]`` in the r-th; of message ``own``, ``like``."""
    joined = [x.new_empty(*x.shape[:2], sum(sizes), *x.shape[3:]) for x in like]
    read = [0] * len(messages)
    for x, given in zip(joined, like, strict=True):
        rows, row, begin = _bytes(x), math.prod(x.shape[3:]) * x.dtype.itemsize, 0
        for r, n in enumerate(sizes):
            end, last = begin + n * row, read[r] + len(rows) * n * row
            part = _bytes(given) if r == own else messages[r][read[r] : last].view(len(rows), n * row)
            rows[:, begin:end] = part
            begin, read[r] = end, last
    return joined
