"""Attention blocks as modules: a feature map [B, C, H, W] in, one of the same height and width out.

With ``dims=1`` or ``dims=3`` they take sequences [B, C, L] or volumes and videos [B, C, T, H, W].
:class:`AdaptiveSparseSelfAttention` takes and returns tokens [B, N, C]. And what trains and watches thresholds:
:func:`parameter_groups`, :class:`ThresholdSchedule`, :class:`monitor`.
"""

from typing import Any

from torch.nn import Module

from ..core import checks
from .asa import AdaptiveSparseAttention
from .asa_self_attention import AdaptiveSparseSelfAttention
from .channelized_axial import ChannelizedAxialAttention
from .criss_cross import CrissCrossAttention
from .efficient_attention import EfficientAttention
from .interlaced_sparse import InterlacedSparseAttention
from .linear_attention import LinearAttention
from .non_local import NonLocal
from .salient_positions import SalientPositionsAttention
from .squeeze_and_attention import SqueezeAndAttention
from .training import ThresholdSchedule, monitor, parameter_groups

__all__ = [
    "AdaptiveSparseAttention",
    "AdaptiveSparseSelfAttention",
    "ChannelizedAxialAttention",
    "CrissCrossAttention",
    "EfficientAttention",
    "InterlacedSparseAttention",
    "LinearAttention",
    "NonLocal",
    "SalientPositionsAttention",
    "SqueezeAndAttention",
    "ThresholdSchedule",
    "available",
    "build",
    "monitor",
    "parameter_groups",
]

# The names are the stems of the files.
_BLOCKS: dict[str, type[Module]] = {
    "asa": AdaptiveSparseAttention,
    "channelized_axial": ChannelizedAxialAttention,
    "criss_cross": CrissCrossAttention,
    "efficient_attention": EfficientAttention,
    "interlaced_sparse": InterlacedSparseAttention,
    "linear_attention": LinearAttention,
    "non_local": NonLocal,
    "salient_positions": SalientPositionsAttention,
    "squeeze_and_attention": SqueezeAndAttention,
}


def available() -> list[str]:
    """Return the names that :func:`build` takes.

    Example:
        >>> from asa_ops import nn
        >>> "non_local" in nn.available()
        True
    """
    return sorted(_BLOCKS)


def build(name: str, in_channels: int, **options: Any) -> Module:
    """Return the block called ``name``, so that a configuration file can name one.

    Args:
        name: one of :func:`available`.
        in_channels: channels of the feature map.
        options: arguments of the block's class.

    Raises:
        ValueError: ``name`` is not available, or what the class raises.
        TypeError: an option that the class does not have.

    Example:
        >>> from asa_ops import nn
        >>> nn.build("non_local", 64, mode="dot_product").mode
        'dot_product'
    """
    checks.check_choice("name", name, tuple(available()))
    return _BLOCKS[name](in_channels, **options)
