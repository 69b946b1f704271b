"""Adaptive sparse attention of one map whose tokens are split over the processes of a ``torch.distributed`` group."""

from .asa import asa_attention, reciprocal_neighbors
from .block import parallelize

__all__ = ["asa_attention", "parallelize", "reciprocal_neighbors"]
