"""A small byte-level GPT in plain PyTorch: the model that the examples train.

Nothing here knows about zeropipe, and nothing needs to. Two things make it learn quickly on little compute:
rotary positions with normalised queries and keys, and an embedding of the last two and three bytes beside that
of the last one, which costs a table but almost no arithmetic.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BYTES = 256


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of the model; the defaults give a readable sample after three minutes on two cores."""

    layers: int = 3
    width: int = 160
    heads: int = 5
    context: int = 256  # bytes that the model sees at once
    ngram_rows: int = 8192  # rows of the hashed table for the last two, and for the last three bytes


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.scale.shape, self.scale, eps=1e-5)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turn each pair of channels of `x` [batch, heads, time, head] by its position's angle [time, head / 2]."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class Attention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        batch, time, width = x.shape
        qkv = self.qkv(x).view(batch, time, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [batch, heads, time, head]
        q = rotate(F.rms_norm(q, q.shape[-1:]), angles)
        k = rotate(F.rms_norm(k, k.shape[-1:]), angles)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(batch, time, width))


class Block(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.width)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config.width)
        self.up = nn.Linear(config.width, 4 * config.width, bias=False)
        self.down = nn.Linear(4 * config.width, config.width, bias=False)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), angles)
        return x + self.down(F.relu(self.up(self.mlp_norm(x))).square())


class GPT(nn.Module):
    """`model(x)` gives logits [batch, time, 256]; `model(x, y)` the mean cross-entropy in nats, a scalar."""

    def __init__(self, config: GPTConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or GPTConfig()
        self.byte = nn.Embedding(BYTES, config.width)
        self.pair = nn.Embedding(config.ngram_rows, config.width)
        self.triple = nn.Embedding(config.ngram_rows, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width)
        self.head = nn.Linear(config.width, BYTES, bias=False)
        for name, parameter in self.named_parameters():
            if name.endswith(("out.weight", "down.weight", "head.weight")):
                nn.init.zeros_(parameter)  # each block starts as the identity, and every byte as likely
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=config.width**-0.5)

    def angles(self, time: int, device: torch.device) -> Tensor:
        """Rotary angles [time, head / 2]; computed, not stored, so that no dtype conversion blurs them."""
        half = self.config.width // self.config.heads // 2
        speeds = 1000.0 ** -(torch.arange(half, device=device) / half)
        return torch.arange(time, device=device)[:, None] * speeds

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        last, last_two = F.pad(x, (1, 0))[:, :-1], F.pad(x, (2, 0))[:, :-2]
        pair = x + BYTES * last
        triple = pair + BYTES * BYTES * last_two
        rows = self.config.ngram_rows
        h = self.byte(x) + self.pair(pair * 40503 % rows) + self.triple(triple * 48271 % rows)
        angles = self.angles(x.shape[1], x.device)
        for block in self.blocks:
            h = block(h, angles)
        logits = self.head(self.norm(h)).float()
        return logits if y is None else F.cross_entropy(logits.flatten(0, 1), y.flatten())


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """For the optimizer: weight decay for tables and matrices, none for scales."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    return [
        {"params": matrices},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]


@torch.no_grad()
def generate(model: nn.Module, prompt: bytes, count: int, device: torch.device) -> bytes:
    """`count` bytes after `prompt`, each drawn among the ten likeliest; every rank draws the same ones."""
    generator = torch.Generator().manual_seed(0)
    text = list(prompt)
    for _ in range(count):
        x = torch.tensor([text[-GPTConfig.context :]], device=device)
        likeliest, which = model(x)[0, -1].float().cpu().topk(10)
        pick = torch.multinomial(F.softmax(likeliest / 0.5, dim=-1), 1, generator=generator)
        text.append(int(which[pick]))
    return bytes(text)
