"""Exact adaptive sparse attention with reciprocal nearest neighbours for feature maps, and the blocks beside it."""

from . import nn
from .asa import AsaStats, NeighborGraph, asa_attention, explain, reciprocal_neighbors
from .blocks.channelized_axial import channelized_axial_attention
from .blocks.efficient_attention import efficient_attention
from .blocks.interlaced_sparse import interlaced_sparse_attention
from .blocks.linear_attention import channel_linear_attention, linear_attention
from .blocks.non_local import non_local_attention
from .blocks.salient_positions import salient_positions_attention
from .blocks.squeeze_and_attention import squeeze_and_attention
from .criss_cross import criss_cross_attention

__version__ = "0.1.0"
__all__ = [
    "AsaStats",
    "NeighborGraph",
    "asa_attention",
    "channel_linear_attention",
    "channelized_axial_attention",
    "criss_cross_attention",
    "efficient_attention",
    "explain",
    "interlaced_sparse_attention",
    "linear_attention",
    "nn",
    "non_local_attention",
    "reciprocal_neighbors",
    "salient_positions_attention",
    "squeeze_and_attention",
]


def __dir__() -> list[str]:
    return __all__
