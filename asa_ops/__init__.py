"""Exact adaptive sparse attention with reciprocal nearest neighbours for feature maps, and the blocks beside it."""

from . import nn
from .asa import AsaStats, NeighborGraph, asa_attention, explain, reciprocal_neighbors
from .channelized_axial import channelized_axial_attention
from .criss_cross import criss_cross_attention
from .efficient_attention import efficient_attention
from .interlaced_sparse import interlaced_sparse_attention
from .linear_attention import channel_linear_attention, linear_attention
from .non_local import non_local_attention
from .salient_positions import salient_positions_attention
from .squeeze_and_attention import squeeze_and_attention

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
