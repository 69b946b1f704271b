"""Squeeze-and-attention: convolutions on a pooled map gate convolutions on the map, and are added to them.

Source: Z. Zhong, Z. Lin, R. Bidart, X. Hu, I. Ben Daya, Z. Li, W.-S. Zheng, J. Li and A. Wong, Squeeze-and-Attention
Networks for Semantic Segmentation, CVPR 2020. The authors published no code that we know of: pooling size and
up-sampling are those of third-party code.

With r the residual branch [C, H, W] and s the attention branch on a map pooled by p x p pixels::

    a = up(sigmoid(s))                   nearest, or bilinear between the centres of the p x p windows
    out = a r + a

The block (:class:`asa_ops.nn.SqueezeAndAttention`) has r = f(x) and s = g(pool(x)), f and g two 3 x 3 convolutions each
with batch norm and ReLU, and mean pooling.

Cost: 2 N C operations and 3 N C memory; the block's convolutions dominate, 18 N (1 + 1 / p^2) (C_in + C) C operations.

What it attends to: what the attention branch's convolutions see, 5 x 5 windows of p x p pixels. The weights are per
channel, and as s comes from a ReLU lie in [0.5, 1).

Differences from the code it is compared with: maps whose sides p does not divide fail there; here the last windows are
smaller. Bilinear up-sampling is ours. Copies without the sigmoid circulate: ``activation=None``.
"""

from .api import squeeze_and_attention

__all__ = ["squeeze_and_attention"]
