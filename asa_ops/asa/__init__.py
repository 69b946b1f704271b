"""Adaptive sparse attention (ASA): softmax over adaptive reciprocal nearest neighbours and a local window.

Source: Z. Sun, C. Zhang and M. Zhang, J. Electronic Imaging 33(3), 033038 (2024): the non-local block (NLSCB) with
adaptive reciprocal nearest neighbours (A-RNN), the local block (LSCB), and thresholds from two small networks (Net 1:
alpha, Net 2: beta). Here alpha and beta are arguments.

With s_ij = scale * <q_i, k_j>, n the number of real positions, lse_i = log sum_j exp s_ij::

    t_i     = lse_i + log(alpha_i / n)               s_ij > t_i <=> softmax weight > alpha_i * mean weight of row i
    kappa_i = k-th largest s_i.                      with topk; ties at the k-th value are all kept
    A_ij    = [s_ij > t_i] and [s_ij >= kappa_i]     j is an adaptive neighbour of i
    M_ij    = A_ij and A_ji                          non-local block; A_ij alone if not reciprocal
    u_i     = log(beta_i) + log mean_{j in W(i)} exp s_ij    W(i): in-bounds window around i, i included
    L_ij    = [j in W(i)] and [s_ij > u_i]           local block
    K_ij    = M_ij or L_ij                           survivors
    out_i   = sum_j K_ij exp(s_ij) v_j / sum_j K_ij exp(s_ij)      0 without survivors

Without alpha and topk, M is empty if there is a beta (the local window alone) and everybody otherwise (dense
attention). alpha_i = 0 keeps every position, alpha_i = inf none, beta_i = 0 the whole window. Padding counts nowhere.
Where i or j is an extra token A_ij is 1, L_ij is 0, and the pair adds nothing to the gradients of thresholds.

Gradients. Survivors are constants: query, key and value get the gradient of a softmax over survivors. With
``threshold_grad="straight_through"`` the step at a threshold gets the derivative d(z) = max(0, 1 - |z| / w) / w, with
w = ``threshold_band``, and lse is held constant::

    G_ij      = c_ij <dO_i, v_j - out_i>      what admitting j to row i would change, to first order;
                                              c_ij = exp(s_ij - lseK_i) for a survivor, sigmoid(s_ij - lseK_i) for the
                                              others, 1 in an empty row; lseK_i = log sum_j K_ij exp s_ij
    dl/dt_i   = - sum_j d(s_ij - t_i) [s_ij >= kappa_i] A_ji [(1 - L_ij) G_ij + (1 - L_ji) G_ji]
    dl/du_i   = - sum_{j in W(i)} d(s_ij - u_i) (1 - M_ij) G_ij
    dl/dalpha_i = dl/dt_i / alpha_i,  dl/dbeta_i = dl/du_i / beta_i,  0 where the multiplier is less than 2^-100

(not reciprocal: without A_ji and the second term). Where an output row is NaN, all gradients of its image and head may
be.

Cost per image and head, one unit being an N x N x D product (2 N^2 D operations): dense attention computes 2 units
forward and 5 backward. ``impl="blocked"`` computes 3 (2 unless reciprocal) and 5; ``impl="cpu"`` 1 + 2 f and 5 f, with
f the fraction of pairs that survive, or 1 in strips of rows where that is more than a quarter. Unless AMX forms scores,
its forward computes 1 + f up to 2,048 tokens (1,448 in float64), whose scores are kept; of more 0.4 units less where
more than a quarter survive. Strips that have 15 of 16 keys as neighbours (an eighth if one-way) take 2 and twice what
is subtracted, unless scores are kept. ``impl="triton"`` and ``"cuda"`` compute 1 + g + 2 f (g / 2 less where query is
key) and 8 f (``"triton"`` 7 f up to D = 128; both 10 f in float32), with f the fraction of blocks of pairs that hold a
neighbour, g that of blocks that might. All in N^2 / 8 bytes (these two: N^2 / 8 + N^2 / 32) plus O(N D); ``impl="cpu"``
holds besides the scores that it keeps, up to 17 MB, and in the backward survivors, up to 16 MB (or those of 256 rows)
at a time. Thresholds that learn cost a backward of ``impl="cpu"`` 2 h units more, with h the fraction of pairs of which
either is a neighbour of the other, or 1 in blocks of 64 x 64 where that is more than a quarter, in maps of one block,
and where neighbours need not be mutual.
"""

from .api import asa_attention, explain, reciprocal_neighbors
from .types import AsaStats, NeighborGraph

__all__ = ["AsaStats", "NeighborGraph", "asa_attention", "explain", "reciprocal_neighbors"]
