"""Boolean matrices at one bit an element.

Eight booleans are one int64 with bytes 0 or 1; one multiplication gathers them into its top byte, the first in the
lowest bit. Little-endian machines only.
"""

import torch
from torch import Tensor

_GATHER = 0x0102040810204080
_REPEAT = 0x0101010101010101  # a byte times this stands in all eight bytes
_SELECT = 0x8040201008040201 - 2**64  # bit k of byte k


def bit_columns(n: int) -> int:
    """Return how many bytes hold n bits."""
    return (n + 7) // 8


def pack_bits(mask: Tensor) -> Tensor:
    """Pack bool [..., n] into uint8 [..., bit_columns(n)], first column in the lowest bit, padded with 0."""
    mask = torch.nn.functional.pad(mask, (0, -mask.shape[-1] % 8)).unflatten(-1, (-1, 8)).contiguous()
    return (mask.view(torch.uint8).view(torch.int64) * _GATHER >> 56).to(torch.uint8)[..., 0]


def unpack_bits(bits: Tensor, n: int) -> Tensor:
    """Undo :func:`pack_bits`."""
    return ((bits.to(torch.int64) * _REPEAT & _SELECT).view(torch.uint8) != 0)[..., :n]
