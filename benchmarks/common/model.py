"""The GPT that every contender trains: plain PyTorch, shaped like GPT-2, in the sizes that the claims name."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Size:
    layers: int
    width: int
    heads: int
    vocabulary: int
    context: int
    micro_batch: int


SIZES = {
    "34M": Size(layers=8, width=512, heads=8, vocabulary=8192, context=128, micro_batch=2),
    "10M": Size(layers=6, width=320, heads=5, vocabulary=4096, context=128, micro_batch=2),
    "tiny": Size(layers=1, width=32, heads=2, vocabulary=64, context=8, micro_batch=1),
    # GPT-2's smallest, at its own context.
    "125M": Size(layers=12, width=768, heads=12, vocabulary=50304, context=1024, micro_batch=8),
    # For one large GPU: the state of AdamW in bf16 (16 bytes a parameter) is about 20 GB.
    "1.3B": Size(layers=24, width=2048, heads=16, vocabulary=32768, context=1024, micro_batch=4),
}


class Block(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads = size.heads
        self.attention_norm = nn.LayerNorm(size.width)
        self.qkv = nn.Linear(size.width, 3 * size.width)
        self.out = nn.Linear(size.width, size.width)
        self.mlp_norm = nn.LayerNorm(size.width)
        self.up = nn.Linear(size.width, 4 * size.width)
        self.down = nn.Linear(4 * size.width, size.width)

    def forward(self, x: Tensor) -> Tensor:  # [batch, time, width]
        batch, time, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, time, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(batch, time, width))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x)), approximate="tanh"))


class GPT(nn.Module):
    """`model(x, y)` is the mean cross-entropy of int64 tokens [batch, time], a scalar."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.token = nn.Embedding(size.vocabulary, size.width)
        self.position = nn.Embedding(size.context, size.width)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.norm = nn.LayerNorm(size.width)
        self.head = nn.Linear(size.width, size.vocabulary, bias=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.token(x) + self.position(torch.arange(x.shape[1], device=x.device))
        for block in self.blocks:
            h = block(h)
        logits = self.head(self.norm(h)).float()
        return F.cross_entropy(logits.flatten(0, 1), y.flatten())


def batch(size: Size, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random tokens: what is learned does not matter here, only what it costs."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(size.vocabulary, (size.micro_batch, size.context + 1), generator=generator).to(
        device
    )
    return tokens[:, :-1], tokens[:, 1:]
