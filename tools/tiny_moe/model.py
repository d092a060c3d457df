"""A small mixture-of-experts language model (decoder only, pre-norm).

Shapes: B sequences, T positions, N = B*T tokens, d channels, E experts, k of
them per token, h channels inside an expert, V tokens in the vocabulary.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class Config:
    vocab: int = 2048
    context: int = 128
    layers: int = 8
    d: int = 128
    heads: int = 4
    experts: int = 32
    top_k: int = 4
    hidden: int = 96


class GroupedMatmul(torch.autograd.Function):
    """rows [R, a] sorted by expert, weight [E, a, b] -> [R, b].

    rows[bounds[e]:bounds[e+1]] meet weight[e]. A loop over the experts with
    plain matrix products: on a CPU the products are large enough, and no row is
    padded. Written by hand because autograd's slices would each clear a
    gradient of the full size.
    """

    @staticmethod
    def forward(ctx, rows, weight, bounds):
        ctx.save_for_backward(rows, weight)
        ctx.bounds = bounds
        out = rows.new_empty(rows.shape[0], weight.shape[2])
        for e, w in enumerate(weight):
            a, b = bounds[e], bounds[e + 1]
            if a < b:
                torch.mm(rows[a:b], w, out=out[a:b])
        return out

    @staticmethod
    def backward(ctx, grad):
        rows, weight = ctx.saved_tensors
        grad_rows = torch.empty_like(rows)
        grad_weight = torch.empty_like(weight)
        for e, w in enumerate(weight):
            a, b = ctx.bounds[e], ctx.bounds[e + 1]
            if a < b:
                torch.mm(grad[a:b], w.t(), out=grad_rows[a:b])
                torch.mm(rows[a:b].t(), grad[a:b], out=grad_weight[e])
            else:
                grad_weight[e].zero_()
        return grad_rows, grad_weight, None


class Norm(nn.Module):
    """Layer norm with a gain and no bias; PyTorch has a fused kernel for it."""

    def __init__(self, d):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(d))

    def forward(self, x):
        return F.layer_norm(x, self.gain.shape, self.gain)


class Attention(nn.Module):
    """Causal self-attention. Returns the output [B, T, d] and the
    probabilities [B, heads, T (query), T (key)]."""

    def __init__(self, c):
        super().__init__()
        self.heads = c.heads
        self.qkv = nn.Linear(c.d, 3 * c.d, bias=False)
        self.out = nn.Linear(c.d, c.d, bias=False)
        mask = torch.full((c.context, c.context), -math.inf).triu(1)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x):
        B, T, d = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) * (d // self.heads) ** -0.5 + self.mask[:T, :T]
        p = scores.softmax(-1)
        y = (p @ v).transpose(1, 2).reshape(B, T, d)
        return self.out(y), p


class MoE(nn.Module):
    """k of E experts per token, each d -> h -> d with a GELU.

    Router: softmax over all E logits, the k largest, renormalised to sum 1.
    The balance loss is Switch's, E * sum_e f_e p_e with f_e the share of the
    choices and p_e the mean probability of expert e; 1 is perfect balance.
    """

    def __init__(self, c):
        super().__init__()
        self.k = c.top_k
        self.gate = nn.Parameter(torch.randn(c.experts, c.d) * c.d ** -0.5)
        self.up = nn.Parameter(torch.randn(c.experts, c.d, c.hidden) * c.d ** -0.5)
        self.down = nn.Parameter(torch.randn(c.experts, c.hidden, c.d)
                                 * (c.hidden * 2 * c.layers) ** -0.5)

    def route(self, x, half):
        """x [N, d] -> logits [N, E], probabilities [N, E], weights and experts [N, k].

        half: round the logits to float16 first and order equal ones by expert,
        so that the routing can be repeated exactly from logits stored as float16.
        """
        logits = x @ self.gate.t()
        if half:
            logits = logits.half().float()
            experts = logits.sort(stable=True, dim=-1, descending=True)[1][:, :self.k]
        else:
            experts = logits.topk(self.k, -1)[1]
        p = logits.softmax(-1)
        weights = p.gather(1, experts)
        return logits, p, weights / weights.sum(-1, keepdim=True), experts

    def forward(self, x, half=False, record=None):
        N, d = x.shape
        E = self.gate.shape[0]
        logits, p, weights, experts = self.route(x, half)
        flat = experts.reshape(-1)                        # [N*k], token-major
        order = flat.argsort()                            # grouped by expert
        load = torch.bincount(flat, minlength=E)
        bounds = [0] + load.cumsum(0).tolist()
        rows = x[order.div(self.k, rounding_mode="floor")]
        out = F.gelu(GroupedMatmul.apply(rows, self.up, bounds))
        out = GroupedMatmul.apply(out, self.down, bounds)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order))
        out = (out[back].view(N, self.k, d) * weights.unsqueeze(-1)).sum(1)
        balance = E * (load / flat.numel() * p.mean(0)).sum()
        if record is not None:
            record.append((x, logits, weights, experts))
        return out, balance, load


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.norm1, self.attention = Norm(c.d), Attention(c)
        self.norm2, self.moe = Norm(c.d), MoE(c)


class Model(nn.Module):
    """Token ids [B, T] -> next-token logits [B, T, V]."""

    def __init__(self, c):
        super().__init__()
        self.config = c
        self.token = nn.Embedding(c.vocab, c.d)
        self.position = nn.Embedding(c.context, c.d)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.norm = Norm(c.d)
        nn.init.normal_(self.token.weight, std=0.02)
        nn.init.normal_(self.position.weight, std=0.02)
        for block in self.blocks:
            nn.init.normal_(block.attention.qkv.weight, std=c.d ** -0.5)
            nn.init.normal_(block.attention.out.weight, std=(c.d * 2 * c.layers) ** -0.5)

    def forward(self, ids, half=False, record=None):
        """-> logits, mean balance loss of the layers, loads [layers][E].

        record: a list that receives one dict per layer (see capture.py).
        """
        B, T = ids.shape
        # scaled to the size of what the layers add, or the token would drown
        x = (self.token(ids) + self.position.weight[:T]) * self.config.d ** 0.5
        balance, loads = 0.0, []
        for block in self.blocks:
            y, attention = block.attention(block.norm1(x))
            x = x + y
            seen = [] if record is not None else None
            y, b, load = block.moe(block.norm2(x).reshape(B * T, -1), half, seen)
            x = x + y.view_as(x)
            balance = balance + b
            loads.append(load)
            if record is not None:
                hidden, logits, weights, experts = seen[0]
                record.append(dict(attention=attention, hidden=hidden, logits=logits,
                                   weights=weights, experts=experts))
        x = self.norm(x)
        return x @ self.token.weight.t(), balance / len(loads), loads


def parameters(model):
    """All parameters, those in experts, and those that one token uses."""
    c = model.config
    total = sum(p.numel() for p in model.parameters())
    experts = sum(b.moe.up.numel() + b.moe.down.numel() for b in model.blocks)
    return {"total": total, "experts": experts,
            "active_per_token": total - experts + experts * c.top_k // c.experts}
