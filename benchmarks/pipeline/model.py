"""The GPT of the other benchmarks as a list of layers, which every contender cuts in the same places."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common.model import Block, Size


class Enter(nn.Module):
    """Tokens [batch, time] to activations [batch, time, width]."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.token = nn.Embedding(size.vocabulary, size.width)
        self.position = nn.Embedding(size.context, size.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.token(x) + self.position(torch.arange(x.shape[1], device=x.device))


class Leave(nn.Module):
    """Activations to logits [batch, time, vocabulary]."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(size.width)
        self.head = nn.Linear(size.width, size.vocabulary, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        return self.head(self.norm(h)).float()


def classes(size: Size) -> list[type[nn.Module]]:
    """The class of each layer; all are built from ``size`` alone."""
    return [Enter, *[Block] * size.layers, Leave]


def cut(size: Size, stages: int) -> list[int]:
    """Bounds of the stages: the blocks dealt out evenly, the ends with the first and the last."""
    blocks = [round(i * size.layers / stages) for i in range(stages + 1)]
    return [0, *(b + 1 for b in blocks[1:-1]), size.layers + 2]


def loss(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), y.flatten())
