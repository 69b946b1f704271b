"""The blocks in the style in which they were published, in eager PyTorch, with a block's own parameters.

Each function maps (block, x) to the block's output; they are what ``run`` compares with. Written from the formulas,
with the intermediate tensors that published code forms.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from asa_ops.blocks.channelized_axial import reference_channelized_axial_attention


def non_local(block: nn.Module, x: Tensor) -> Tensor:
    batch, _, height, width = x.shape
    value = block.value(x).flatten(2).mT
    query, key = (x, x) if block.mode == "gaussian" else (block.query(x), block.key(x))
    query, key = query.flatten(2).mT, key.flatten(2)
    n, n_k = query.shape[1], key.shape[2]
    if block.mode == "concatenation":
        pairs = torch.cat([query.mT[..., None].expand(-1, -1, -1, n_k), key[:, :, None].expand(-1, -1, n, -1)], 1)
        weights = block.pair(pairs)[:, 0].relu() / n_k
    elif block.mode == "dot_product":
        weights = query @ key / n_k
    else:
        weights = query @ key
        if block.use_scale and block.mode == "embedded_gaussian":
            weights = weights / query.shape[2] ** 0.5
        weights = weights.softmax(-1)
    out = (weights @ value).mT.contiguous().view(batch, -1, height, width)
    return x + block.norm(block.proj(out))


def linear_attention(block: nn.Module, x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    n = height * width
    if block.kind == "channel":
        value = x.flatten(2)
        query = value / value.norm(p=2, dim=-2, keepdim=True)
        key = query.permute(0, 2, 1)
        normaliser = 1 / (n + torch.einsum("bcn,bn->bc", query, key.sum(-1) + block.eps))
        total = value.sum(1)[:, None].expand(-1, channels, -1)
        total = total + torch.einsum("bcm,bmn->bcn", torch.einsum("bcn,bnm->bcm", value, key), query)
        out = torch.einsum("bcn,bc->bcn", total, normaliser)
    else:
        query, key, value = (conv(x).flatten(2) for conv in (block.query, block.key, block.value))
        query = (query / query.norm(p=2, dim=-2, keepdim=True)).permute(0, 2, 1)
        key = key / key.norm(p=2, dim=-2, keepdim=True)
        normaliser = 1 / (n + torch.einsum("bnc,bc->bn", query, key.sum(-1) + block.eps))
        total = value.sum(-1)[..., None].expand(-1, -1, n)
        total = total + torch.einsum("bnm,bmc->bcn", query, torch.einsum("bmn,bcn->bmc", key, value))
        out = torch.einsum("bcn,bn->bcn", total, normaliser)
    return x + block.gamma * out.view(batch, channels, height, width)


def efficient_attention(block: nn.Module, x: Tensor) -> Tensor:
    batch, _, height, width = x.shape
    query, key, value = (conv(x).flatten(2) for conv in (block.query, block.key, block.value))
    parts = (each.chunk(block.heads, 1) for each in (query, key, value))
    heads = [(k.softmax(2) @ v.mT).mT @ q.softmax(1) for q, k, v in zip(*parts, strict=True)]
    return x + block.proj(torch.cat(heads, 1).view(batch, -1, height, width))


def channelized_axial(block: nn.Module, x: Tensor) -> Tensor:
    gates = (list(block.column_gate), list(block.row_gate)) if block.channel_attention else ()
    maps = block.column(x), block.row(x), block.value(x)
    return reference_channelized_axial_attention(*maps, *gates)


def squeeze_and_attention(block: nn.Module, x: Tensor) -> Tensor:
    residual = block.residual(x)
    attention = block.attention(F.avg_pool2d(x, block.pool)).sigmoid()
    attention = F.interpolate(attention, scale_factor=block.pool, mode=block.upsample)
    return attention * residual + attention


def interlaced_sparse(block: nn.Module, x: Tensor) -> Tensor:
    (stage,), (factors,) = block.stages, block.factors
    batch, _, height, width = x.shape
    blocks = height // factors[0], width // factors[1]
    context = x.view(batch, -1, blocks[0], factors[0], blocks[1], factors[1])
    context = context.permute(0, 3, 5, 1, 2, 4).reshape(-1, x.shape[1], *blocks)
    context = _attention(stage["long"], context)
    context = context.view(batch, *factors, -1, *blocks).permute(0, 4, 5, 3, 1, 2)
    context = _attention(stage["short"], context.reshape(-1, context.shape[3], *factors))
    context = context.view(batch, *blocks, -1, *factors).permute(0, 3, 1, 4, 2, 5).reshape(batch, -1, height, width)
    return block.dropout(block.proj(torch.cat([x, context], 1)))


def _attention(unit: nn.Module, x: Tensor) -> Tensor:
    query, key, value = unit.query(x).flatten(2).mT, unit.key(x).flatten(2), unit.value(x).flatten(2).mT
    weights = (query.shape[2] ** -0.5 * (query @ key)).softmax(-1)
    return unit.proj((weights @ value).mT.contiguous().view(x.shape[0], -1, *x.shape[2:]))


def salient_positions(block: nn.Module, x: Tensor) -> Tensor:
    batch, _, height, width = x.shape
    query, value = block.query(x).flatten(2), block.value(x).flatten(2)
    salient = query.pow(2).sum(1).topk(block.topk, -1).indices
    query = torch.gather(query, 2, salient[:, None].expand(-1, query.shape[1], -1))
    weights = (query @ query.mT).softmax(-1)
    return x + block.norm(block.proj((weights @ value).view(batch, -1, height, width)))


def criss_cross_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The published way: copies with rows and with columns as the batch, products, one softmax over H + W scores."""
    batch, _, height, width = query.shape

    def columns(x):  # [B * W, H, C]
        return x.permute(0, 3, 2, 1).contiguous().view(batch * width, height, -1)

    def rows(x):  # [B * H, W, C]
        return x.permute(0, 2, 3, 1).contiguous().view(batch * height, width, -1)

    query_h, key_h, value_h = map(columns, (query, key, value))
    query_w, key_w, value_w = map(rows, (query, key, value))
    itself = torch.diag(query.new_full((height,), -torch.inf))
    energy_h = (torch.bmm(query_h, key_h.mT) + itself).view(batch, width, height, height).transpose(1, 2)
    energy_w = torch.bmm(query_w, key_w.mT).view(batch, height, width, width)
    weights = torch.cat([energy_h, energy_w], 3).softmax(3)
    weights_h = weights[..., :height].transpose(1, 2).reshape(batch * width, height, height)
    weights_w = weights[..., height:].reshape(batch * height, width, width)
    out_h = torch.bmm(weights_h, value_h).view(batch, width, height, -1).permute(0, 3, 2, 1)
    out_w = torch.bmm(weights_w, value_w).view(batch, height, width, -1).permute(0, 3, 1, 2)
    return out_h + out_w


def criss_cross(block: nn.Module, x: Tensor) -> Tensor:
    for _ in range(block.recurrence):
        x = x + block.gamma * criss_cross_attention(block.query(x), block.key(x), block.value(x))
    return x


def largest_tensor(name: str, options: dict, channels: int, height: int, width: int) -> int:
    """Return how many elements the largest intermediate of an eager form has, where that is more than O(N C)."""
    n = height * width
    if name == "non_local":
        return n * n * (channels if options.get("mode") == "concatenation" else 1)
    return n * channels * (max(height, width) if name == "channelized_axial" else 1)
