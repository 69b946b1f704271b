"""Salient positions attention: the channels attend to each other, as they agree on the k most salient positions.

Source: likyoo, SPANet (github.com/likyoo/SPANet).

With q the query [N, D] (the code's theta), v the value [N_v, D] (its g)::

    saliency_n = sum_c q_nc^2;  T = the k positions of largest saliency (which of equal ones is not defined)
    F_cd = sum_{n in T} q_nc q_nd                  [D, D], symmetric
    A_cd = softmax_d F_cd                          no scale
    out_nc = sum_d A_cd v_nd

Without k it is max(N // 16, 1). T is constant: the query gets a gradient at these positions only.

Cost per head: 2 N D^2 + 2 k D^2 operations, N D + D^2 memory; the block's projections add 6 N C C'.

What it attends to: the same k positions for every query; they choose how channels are mixed at every position.

Differences from the published code: its third projection, phi, is never used; here there is none
(:meth:`asa_ops.nn.SalientPositionsAttention.from_upstream` leaves it out). It sub-samples maps of even sides only;
here the last window may be smaller. Its adaptive k overwrites the option k at every call. k above N is an error, here
one that says so.
"""

from .api import salient_positions_attention

__all__ = ["salient_positions_attention"]
