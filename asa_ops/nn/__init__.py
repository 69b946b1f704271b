"""Attention blocks as modules: a feature map [B, C, H, W] in, one of the same shape out."""

from .asa import AdaptiveSparseAttention
from .criss_cross import CrissCrossAttention

__all__ = ["AdaptiveSparseAttention", "CrissCrossAttention"]
