"""Criss-cross attention: every pixel attends to its row and its column.

Source: Z. Huang et al., CCNet: Criss-Cross Attention for Semantic Segmentation, ICCV 2019 and TPAMI 2020. With
s(p, r) = scale * <q_p, k_r> (the paper's scale is 1)::

    R(h, w) = {(h, j): j = 1..W}                    the row, the pixel itself included
    C(h, w) = {(i, w): i = 1..H, i != h}            the column without it: it counts once
    a(p, r) = exp s(p, r) / sum_{t in R(p) or C(p)} exp s(p, t)
    out_p   = sum_{r in R(p) or C(p)} a(p, r) v_r

One softmax over H + W - 1 pixels. Applied twice with the same weights (recurrent criss-cross attention), every pixel
reaches every other: :class:`asa_ops.nn.CrissCrossAttention`.

In three dimensions, of a volume or a video, the same over the three lines through a position (ours; the paper's C^3 is
2-D)::

    R(t, h, w) = {(t, h, j)}     C(t, h, w) = {(t, i, w): i != h}     L(t, h, w) = {(s, h, w): s != t}

T + H + W - 2 positions: the position itself, on all three lines, counts once. Every position reaches every other in
three applications. Along a sequence, in one dimension, there is one line: this is dense attention.

Gradients, with do the gradient of out::

    delta_p   = sum_{r in R(p) or C(p)} a(p, r) <do_p, v_r>      which is <do_p, out_p>
    ds(p, r)  = a(p, r) (<do_p, v_r> - delta_p)
    dq_p      = scale * sum_{r in R(p) or C(p)} ds(p, r) k_r
    dk_r      = scale * sum_{p: r in R(p) or C(p)} ds(p, r) q_p
    dv_r      = sum_{p: r in R(p) or C(p)} a(p, r) do_p

Cost per image: 2 H W (H + W) (D + Dv) operations forward, 2 H W (H + W) (3 D + 2 Dv) backward; ``impl="triton"``, which
takes the values in c parts of 64 or 128 channels, c D + Dv and (5 + c) D + 4 Dv instead. From forward to backward 2 H W
numbers are kept. ``impl="cpu"`` works on the maps as they are, in scratch for some lines, and in the backward on H W^2
numbers; ``impl="triton"`` on copies with channels last; ``impl="blocked"`` on the H W (H + W) scores. None copies the
values for every pixel that attends to them. Three dimensions have ``impl="blocked"`` alone, on the N (T + H + W)
scores, N = T H W, with 2 N (T + H + W) (D + Dv) operations.

Differences from the authors' code: any number of channels (theirs needs 8), any device, a ``scale``. Their order of
the softmax's terms (first the column, then the row) does not show.
"""

from .api import criss_cross_attention

__all__ = ["criss_cross_attention"]
