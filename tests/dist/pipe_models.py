"""Layers for the pipeline tests: small, seeded one by one, with everything that layers may pass to each other."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from zeropipe.runtime.pipe.layers import LayerSpec, TiedLayerSpec

VOCAB, WIDTH, SEQ, BASE_SEED = 13, 8, 5, 1234


class Block(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.gain = nn.Parameter(torch.ones(()))
        self.twice = nn.Linear(WIDTH, WIDTH)
        self.dropout = dropout

    def forward(self, h: torch.Tensor) -> torch.Tensor:  # [batch, seq, width]
        q, k, v = self.qkv(self.norm(h)).chunk(3, -1)
        h = h + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True)) * self.gain
        h = h + torch.tanh(self.twice(torch.tanh(self.twice(h))))
        return F.dropout(h, self.dropout, self.training)


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCAB)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return self.linear(self.norm(h))


def unembed(module: nn.Module, h: torch.Tensor) -> torch.Tensor:
    return F.linear(h, module.weight)


def loss_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def specs(blocks: int = 7, tied: bool = False, dropout: float = 0.0) -> list[Any]:
    """Embedding, ``blocks`` blocks, head."""
    body = [LayerSpec(Block, dropout) for _ in range(blocks)]
    if tied:
        return [
            TiedLayerSpec("embed", nn.Embedding, VOCAB, WIDTH),
            *body,
            TiedLayerSpec("embed", nn.Embedding, VOCAB, WIDTH, forward_fn=unembed),
        ]
    return [LayerSpec(nn.Embedding, VOCAB, WIDTH), *body, LayerSpec(Head)]


def plain(layers: list[Any]) -> tuple[nn.ModuleList, Any]:
    """The same model on one process: its modules by layer number, and its forward."""
    modules, calls, tied = nn.ModuleList(), [], {}
    for index, spec in enumerate(layers):
        torch.manual_seed(BASE_SEED + index)
        module = tied.setdefault(spec.key, None) if isinstance(spec, TiedLayerSpec) else None
        if module is None:
            module = spec.build()
        if isinstance(spec, TiedLayerSpec):
            tied[spec.key] = module
        modules.append(module)
        calls.append((getattr(spec, "forward_fn", None), module))

    def forward(value: Any) -> Any:
        for function, module in calls:
            value = module(value) if function is None else function(module, value)
        return value

    return modules, forward


def batches(count: int, size: int = 2, seed: int = 7) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Micro-batches of (tokens, labels), int64 [size, SEQ]."""
    generator = torch.Generator().manual_seed(seed)
    return [
        tuple(torch.randint(0, VOCAB, (2, size, SEQ), generator=generator).unbind(0))  # type: ignore[misc]
        for _ in range(count)
    ]
