"""Exact adaptive sparse attention with reciprocal nearest neighbours for feature maps."""

from . import nn
from .asa import AsaStats, NeighborGraph, asa_attention, explain, reciprocal_neighbors
from .criss_cross import criss_cross_attention

__all__ = [
    "AsaStats",
    "NeighborGraph",
    "asa_attention",
    "criss_cross_attention",
    "explain",
    "nn",
    "reciprocal_neighbors",
]
