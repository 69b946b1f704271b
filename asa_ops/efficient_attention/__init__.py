"""Efficient attention: softmax over positions on the key, over channels on the query, so that the product associates.

Source: Z. Shen, M. Zhang, H. Zhao, S. Yi and H. Li, Efficient Attention: Attention with Linear Complexities, WACV 2021.

Per head, with d the channels of the key and of the query::

    k_jd = exp(key_jd) / sum_j' exp(key_j'd)          softmax over positions: one map per channel
    q_id = exp(query_id) / sum_d' exp(query_id')      softmax over channels
    out_i = sum_d q_id sum_j k_jd v_j                 the weights sum_d q_id k_jd are >= 0 and sum to 1 over j

How it is computed: the context sum_j k_jd v_j [D, Dv] first, all heads at once.

Cost per head: 4 N D Dv operations, N (D + Dv) + D Dv memory; the block's projections add 4 N C (dk + dv), with dk and
dv the channels of keys and values in all heads.

What it attends to: every position, through D maps that are the same for every query; a query chooses their mixture.

Differences from the published code: key and value channels must be divisible by the number of heads. There a remainder
of key channels is silently unused (``published=True`` of :class:`asa_ops.nn.EfficientAttention` does so too), one of
value channels crashes. It has a Python loop over heads. The bias of the keys has no effect, here as there.
"""

from .api import efficient_attention

__all__ = ["efficient_attention"]
