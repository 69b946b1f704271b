"""Channelized axial attention: attention along columns, then along rows, each with a gate per channel.

Source: Y. Huang, D. Kang, W. Jia, X. He and L. Liu, Channelized Axial Attention, AAAI 2022.

p and r are the maps ``column`` and ``row``, each query and key at once, without a scale; v is the value, c a channel::

    A_w;hk = softmax_k <p_hw, p_kw>     O_hwc = sum_k A_w;hk v_kwc     s_hc = sum_w O_hwc / (H W)
    O'_hwc = O_hwc gate_column(s_h)_c                                  one gate per row of pixels and channel
    B_h;wl = softmax_l <r_hw, r_hl>     Z_hwc = sum_l B_h;wl O'_hlc    t_wc = sum_h Z_hwc / (H W)
    out_hwc = Z_hwc gate_row(t_w)_c                                    one gate per column of pixels and channel
    gate(s) = sigmoid(D_L lrelu(... lrelu(D_1 s)))                     no biases; slope of the leaky ReLU 0.2

How it is computed: exactly like that. The published code forms every product A_w;hk v_kwc first, [B, C, H, W, H], gates
the products and then sums them; but the gate does not depend on k and a mean of sums is a sum of means, so the sums can
come first.

Cost, D channels of p and r, C of v: 2 N (H + W) (D + C) operations, N (H + W + 2 D + 3 C) memory instead of
N (H + W) C; the block's projections add 2 N C (2 D + C) operations, the gates next to nothing.

What it attends to: the pixels of its column, and through them, row by row, every pixel.

Differences from the published code. With its channel attention on it raises a TypeError (an argument in the wrong
place); here the activation is the intended leaky ReLU (in the block with the published slope, 0.2 rounded to float32).
Its loop over groups of queries, meant to save memory, computes a group for nothing or divides by zero: here there are
no groups. As published, a gate's input is 1 / H of a mean (or 1 / W): it shrinks as the map grows.
"""

from .api import channelized_axial_attention

__all__ = ["channelized_axial_attention"]
