"""Linear attention of positions or of channels: the softmax replaced by its first-order Taylor expansion.

Source: R. Li, J. Su, C. Duan and S. Zheng, Linear Attention Mechanism: An Efficient Attention for Semantic
Segmentation, arXiv 2007.14902 (2020).

unit(x) = x / ||x||_2 over the channels of a position, and 0 where x = 0. Position attention, with q = unit(query),
k = unit(key), N keys::

    out_i = sum_j (1 + <q_i, k_j>) v_j / (N + <q_i, sum_j k_j + eps>)        weights >= 0; eps is added to the vector

Channel attention, x_nc channel c of position n, u_n = unit(x_n)::

    out_nc = (sum_c' x_nc' + sum_m u_nm sum_n' u_n'm x_n'c) / (N + sum_n' u_n'c (sum_c' u_n'c' + eps))

How it is computed: the sums over positions first. In position attention a channel of ones, appended to query and key,
carries the 1 of the kernel, and the division is done on the query, so that value and output are each touched once.

Cost per head. Position: 4 N (D + 1) Dv operations, N (D + Dv) + D Dv memory; the block has D = C / 8 and adds
2 N C (C + 2 D) for its projections. Channel: 4 N C^2 operations, N C + C^2 memory, no projections.

What it attends to: every position, more or less evenly: weights lie between 0 and 2 before they are normalised. Where
all keys are opposite to a query they are all 0, and what is left is rounding. Channel attention is no weighted mean (as
published: its normaliser counts positions where channels are summed).

Differences from the published code. A position with all channels 0, usual after a ReLU, gives NaN in the whole image
there, here zero and zero gradients. It reshapes its output as [B, C, W, H]: maps that are not square fail or come out
transposed; here H and W keep their places. Below 8 channels it fails; here a block has at least 1 key channel, but with
one, unit vectors are +-1 and query and key learn nothing (so up to 15 channels).
"""

from .api import channel_linear_attention, linear_attention

__all__ = ["channel_linear_attention", "linear_attention"]
