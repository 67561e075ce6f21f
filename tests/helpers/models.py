"""Test models, the nasty one first: each oddity in it once broke a sharded trainer somewhere.

Nothing here knows zeropipe. Every constructor is deterministic (its own seed, the global one untouched), and
every model runs in whatever dtype it is converted to, so that the same class serves as the fp64 referee.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn


def build(model: Callable[..., nn.Module], *args: object, seed: int = 0, **kwargs: object) -> nn.Module:
    """``model(*args, **kwargs)`` with weights that depend on ``seed`` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model(*args, **kwargs)


class NastyModel(nn.Module):
    """A small language model with every oddity of a parameter that a user may bring.

    Inputs: tokens and targets, int64 [batch, seq], below ``VOCAB``. Returns the mean loss, a scalar, fp32 or
    wider. ``wake_dead=True`` runs the layer that is otherwise never used. ``half=torch.bfloat16`` makes
    one layer 16-bit among the fp32 ones.
    """

    calls: torch.Tensor
    VOCAB = 11
    WIDTH = 6
    FAN = 32

    def __init__(self, half: torch.dtype | None = None) -> None:
        super().__init__()
        width = self.WIDTH
        self.scale = nn.Parameter(torch.tensor(1.5))  # shape []
        self.few = nn.Parameter(torch.randn(3))  # fewer elements than ranks
        self.empty = nn.Parameter(torch.empty(0, 5))  # no elements, but a gradient
        self.embed = nn.Embedding(self.VOCAB, width)
        self.wide = nn.Linear(width, self.FAN * width)  # 1,344 elements: more than all others together
        self.twice = nn.Linear(width, width)  # called twice in one forward
        self.frozen = nn.Linear(width, width, bias=False).requires_grad_(False)
        self.dead = nn.Linear(width, width)  # not called, so its .grad stays None
        self.low = nn.Linear(width, width, dtype=half)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, self.VOCAB, bias=False)
        self.head.weight = self.embed.weight  # tied
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(
        self, tokens: torch.Tensor, targets: torch.Tensor, wake_dead: bool = False
    ) -> torch.Tensor:  # []
        self.calls += 1
        h = self.embed(tokens)  # [batch, seq, width]
        h = h + self.twice(torch.tanh(self.twice(h)))
        h = h + torch.tanh(self.wide(h)).unflatten(-1, (self.FAN, self.WIDTH)).mean(-2)
        h = h + self.frozen(h) + self.low(h.to(self.low.weight.dtype)).to(h.dtype)
        if wake_dead:
            h = h + self.dead(h)
        h = self.norm(h) * self.scale + self.few.sum() + self.empty.sum()
        return F.cross_entropy(self.head(h).flatten(0, 1), targets.flatten())


class MLP(nn.Module):
    """Plain layers. Inputs: x [batch, inputs], y [batch, outputs]; returns the mean squared error, a scalar."""

    def __init__(self, inputs: int = 10, hidden: int = 17, outputs: int = 3, depth: int = 3) -> None:
        super().__init__()
        sizes = [inputs, *[hidden] * (depth - 1), outputs]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))

    def predict(self, x: torch.Tensor) -> torch.Tensor:  # [batch, outputs]
        for layer in self.layers[:-1]:
            x = torch.relu(layer(x))
        return self.layers[-1](x)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:  # []
        return F.mse_loss(self.predict(x), y)


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, h: torch.Tensor) -> torch.Tensor:  # [batch, seq, width]
        q, k, v = self.qkv(self.norm1(h)).chunk(3, -1)
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        h = h + F.dropout(self.out(a), self.dropout, self.training)
        return h + F.dropout(self.down(F.gelu(self.up(self.norm2(h)))), self.dropout, self.training)


class TinyGPT(nn.Module):
    """A GPT of a few thousand parameters. Returns logits [batch, seq, vocab], or the mean loss with targets."""

    def __init__(
        self,
        vocab: int = 64,
        width: int = 32,
        layers: int = 2,
        heads: int = 2,
        seq: int = 16,
        tied: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab, width), nn.Embedding(seq, width)
        self.blocks = nn.ModuleList(_Block(width, heads, dropout) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocab, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        h = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            h = block(h)
        logits = self.head(self.norm(h))
        return logits if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())
