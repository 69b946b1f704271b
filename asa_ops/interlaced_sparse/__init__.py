"""Interlaced sparse attention: dense attention among distant positions, then among neighbouring ones.

Source: L. Huang, Y. Yuan, J. Guo, C. Zhang, X. Chen and J. Wang, Interlaced Sparse Self-Attention for Semantic
Segmentation, arXiv 1907.12273 (2019).

With factors (dh, dw) the map is padded to H' = dh ceil(H / dh) rows, the smaller half of the padding on top, and
likewise to W' columns. Attention runs within groups of real positions::

    span="long"    groups of equal (r mod dh, c mod dw):     dh dw groups of (H' / dh) (W' / dw) positions
    span="short"   groups of equal (r // dh, c // dw):       (H' / dh) (W' / dw) blocks of dh dw positions
    out_i = sum_j softmax_j(scale <q_i, k_j>) v_j            j in the group of i; scale = D**-0.5 by default

The block (:class:`asa_ops.nn.InterlacedSparseAttention`) applies "long" and on its result "short".

How it is computed: tokens are reordered so that a group is contiguous, and the groups are a batch for
``F.scaled_dot_product_attention`` (on a CPU the plain formula where groups are small); padding is masked out.

Cost per head, N' = H' W': 2 N' (N' / (dh dw) + dh dw) (D + Dv) operations for both spans, memory N' (D + Dv) and on a
CPU N' (N' / (dh dw) + dh dw); the block's projections add 8 N (C D + D^2 + C Dv) or so.

``torch.compile`` with symbolic H and W takes most of a minute for a block; ``dynamic=False`` seconds for each size.

What it attends to: a grid of positions dh and dw pixels apart; in the block, through these, every position.

Differences from the published code. It pads with zeros and attends to them: its padding has weights, and after the
first span features of its own, and takes part in the batch statistics. Here padding is nobody's neighbour
(``published=True`` of the block does as published). A factor larger than the map is an error: there the map is then
mostly padding.
"""

from .api import interlaced_sparse_attention

__all__ = ["interlaced_sparse_attention"]
