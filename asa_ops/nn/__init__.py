"""Attention blocks as modules: a feature map [B, C, H, W] in, one of the same shape out."""

from .asa import AdaptiveSparseAttention

__all__ = ["AdaptiveSparseAttention"]
