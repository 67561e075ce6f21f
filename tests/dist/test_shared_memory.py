"""Two tensors on one memory: torch trains both through the address, which no layout of ours keeps."""

from __future__ import annotations

import pytest
import torch
from torch.nn.utils import parametrizations

import zeropipe
from zeropipe.errors import UsageError


def tied_by_data() -> torch.nn.Module:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    model[1].weight.data = model[0].weight.data
    return model


def parametrized_after_a_tie() -> torch.nn.Module:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    model[1].weight = model[0].weight
    parametrizations.weight_norm(model[0])
    return model


def with_a_buffer() -> torch.nn.Module:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    model[0].register_buffer("seen", model[0].weight.data[:2])
    return model


def tied_by_name() -> torch.nn.Module:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    model[1].weight = model[0].weight
    return model


def cut_from_one() -> torch.nn.Module:
    base = torch.randn(4, 8)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    model[0].weight.data, model[1].weight.data = base[:, :4], base[:, 4:]
    return model


def frozen() -> torch.nn.Module:
    model = tied_by_data()
    model[0].weight.requires_grad_(False)
    model[1].weight.requires_grad_(False)
    return model


KINDS = {
    "data": (tied_by_data, "'0.weight' and '1.weight'"),
    "parametrized": (parametrized_after_a_tie, "'0.parametrizations.weight.original1' and '1.weight'"),
    "buffer": (with_a_buffer, "'0.seen' and '0.weight'"),
    "name": (tied_by_name, ""),
    "cut": (cut_from_one, ""),
    "frozen": (frozen, ""),
}


def start(rank: int, world: int, kind: str, stage: int, bf16: bool) -> str:
    """The message of the refusal; empty where the model trains."""
    make, _ = KINDS[kind]
    torch.manual_seed(0)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": bf16},
    }
    try:
        engine, *_ = zeropipe.initialize(model=make(), config=config)
    except UsageError as error:
        return str(error)
    engine.backward(engine(torch.ones(2, 4, dtype=torch.bfloat16 if bf16 else None)).float().mean())
    engine.step()
    engine.destroy()
    return ""


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_values_that_would_part_are_refused_by_name(pool, kind: str, stage: int, bf16: bool) -> None:
    """They parted in silence: after a step one had moved and the other had its old value."""
    names = KINDS[kind][1]
    for message in pool(2).run(start, kind, stage, bf16):
        assert bool(message) == bool(names), message
        if names:
            first, _, second = names.replace("'", "").partition(" and ")
            assert f"'{first}'" in message
            assert f"'{second}'" in message
            assert "Fix: tie the object itself" in message


def build(rank: int, world: int) -> str:
    try:
        with zeropipe.zero.Init():
            Both()
    except UsageError as error:
        return str(error)
    return ""


class Both(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Parameter(torch.ones(4))
        self.b = torch.nn.Parameter(self.a.data)


def test_zero_init_refuses_them_too(pool) -> None:
    for message in pool(2).run(build):
        assert "'Both.a' and 'Both.b' are two tensors on one memory" in message
