"""Adaptive sparse attention on the GPU: the Triton kernels. ``call`` shows the order in which they run, step by step.

``problem`` holds what a call knows, ``configs`` how kernels are cut into blocks, ``tiles`` what they share. The steps:
``arrange`` puts tokens in 8 x 8 tiles of the map; ``scores`` forms every score once, for lse and block maxima;
``thresholds`` finds from these the tiles in which neighbours can be; ``select`` decides every pair there and stores it
as a bit; ``lists`` lists blocks with neighbours; ``sums`` sums over the listed blocks, forward and backward; ``window``
finds the local survivors; ``finish`` adds them and ends every row and column.

Besides inputs and outputs a call holds N^2 / 8 bytes of bits, N^2 / 32 of block maxima (both until the backward), and
copies and parts of sums of O(N D).
"""

from .call import bwd, fwd, neighbor_graph

__all__ = ["bwd", "fwd", "neighbor_graph"]
