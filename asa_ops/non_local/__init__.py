"""Non-local attention: every position attends to every position, or to every position of a coarser map.

Source: X. Wang, R. Girshick, A. Gupta and K. He, Non-local Neural Networks, CVPR 2018; published code: mmcv,
``NonLocal2d``.

With s_ij = <q_i, k_j> and N_k keys (theta, phi and g are the paper's names of query, key and value)::

    gaussian        w_ij = softmax_j(scale * s_ij)                  scale = D**-0.5 by default
    dot_product     w_ij = scale * s_ij                             scale = 1 / N_k by default
    concatenation   w_ij = scale * relu(<w1, q_i> + <w2, k_j>)      scale = 1 / N_k by default
    out_i = sum_j w_ij v_j

"embedded_gaussian" is "gaussian" with a projected query and key; the block (:class:`asa_ops.nn.NonLocal`) has both.

How it is computed. gaussian: ``F.scaled_dot_product_attention``; where D and Dv differ the shorter is padded with
zeros, without which it would store the N_q x N_k matrix (so the block's "gaussian", D = 2 Dv, takes a third more time
on a CPU, forward and backward, than the formula that stores it); up to 256 keys, on a CPU, the plain formula.
dot_product: by associativity, q_i (sum_j k_j v_j^T). concatenation: w_ij is positive for the keys whose b_j = <w2, k_j>
exceeds -a_i = -<w1, q_i>; with the keys sorted by b they come first, so that out_i = scale * (a_i sum v_j +
sum b_j v_j) over a prefix, and the prefix sums of all lengths are formed once (in float64).

Cost per head, N queries and N_k keys, forward:

    =============  =============================  ===================
    mode           operations                     memory
    =============  =============================  ===================
    gaussian       4 N N_k max(D, Dv)             N + N_k rows
    dot_product    2 (N + N_k) D Dv               N + N_k rows, D Dv
    concatenation  O((N + N_k) (D + Dv)), a sort  N + N_k rows
    =============  =============================  ===================

The projections of the block add 8 N C C'.

Differences from the published code. It stores N x N_k weights in every mode, and for concatenation 2 C' x N x N_k
inputs: here neither. Its concatenation mode cannot be trained with current torch (it divides the output of a ReLU in
place). Its sub-sampling drops the last row and column of a map of odd size, and fails where H or W is 1: here a last
window is smaller instead, unless ``published=True``.
"""

from .api import non_local_attention

__all__ = ["non_local_attention"]
