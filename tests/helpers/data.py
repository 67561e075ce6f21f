"""Batches that depend only on (step, rank, micro-step), so that any process can make any rank's data."""

from __future__ import annotations

from collections.abc import Callable

import torch

Batch = tuple[torch.Tensor, ...]
MakeBatch = Callable[[int, int, int], Batch]  # (step, rank, micro) -> the model's arguments


def generator(*key: int) -> torch.Generator:
    """A random generator that is a function of ``key`` alone."""
    seed = 17
    for part in key:
        seed = (seed * 1_000_003 + part + 1) % (2**63 - 1)
    return torch.Generator().manual_seed(seed)


def token_batch(
    step: int, rank: int = 0, micro: int = 0, *, batch: int = 4, seq: int = 5, vocab: int = 11
) -> Batch:
    """Tokens and targets, int64 [batch, seq]; the defaults suit ``NastyModel``."""
    tokens = torch.randint(vocab, (batch, seq + 1), generator=generator(step, rank, micro))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def gpt_batch(step: int, rank: int = 0, micro: int = 0) -> Batch:
    """Tokens and targets for ``TinyGPT()``."""
    return token_batch(step, rank, micro, batch=2, seq=16, vocab=64)


def mlp_batch(
    step: int, rank: int = 0, micro: int = 0, *, batch: int = 4, inputs: int = 10, outputs: int = 3
) -> Batch:
    """x [batch, inputs] and a smooth target y [batch, outputs], fp32; the defaults suit ``MLP``."""
    x = torch.randn(batch, inputs, generator=generator(step, rank, micro))
    return x, torch.sin(x[:, :outputs] * 2) + x[:, -1:]


def global_batches(make: MakeBatch, step: int, world: int, micros: int = 1) -> list[Batch]:
    """All micro-batches of one optimizer step, in the order in which one process would accumulate them."""
    return [make(step, rank, micro) for micro in range(micros) for rank in range(world)]
