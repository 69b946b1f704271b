"""Semantic segmentation with any of the attention blocks: see README.md."""
