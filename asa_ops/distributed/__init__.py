"""Adaptive sparse attention of one map whose tokens are split over the processes of a ``torch.distributed`` group."""

from .asa import asa_attention, reciprocal_neighbors

__all__ = ["asa_attention", "reciprocal_neighbors"]
