"""A rehearsed program has the shapes, the views and the small values of a real one, and none of its large memory."""

from __future__ import annotations

import resource

import pytest
import torch
from torch import nn

from zeropipe.errors import UsageError
from zeropipe.planning.dry import Dry
from zeropipe.planning.ledger import Ledger
from zeropipe.planning.work import Work


@pytest.fixture
def ledger():
    ledger = Ledger()
    with Dry(ledger, Work()):
        yield ledger


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.view(*x.shape[:2], 4, 16).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


MODELS = {
    "linear": lambda: (nn.Sequential(nn.Linear(64, 512), nn.GELU(), nn.LayerNorm(512)), torch.randn(128, 64)),
    "conv": lambda: (
        nn.Sequential(nn.Conv2d(3, 16, 3, stride=2), nn.BatchNorm2d(16)),
        torch.randn(8, 3, 64, 64),
    ),
    "attention": lambda: (Attention(), torch.randn(8, 96, 64)),
    "embedding": lambda: (nn.Embedding(1000, 64), torch.randint(0, 1000, (64, 600))),
    "lstm": lambda: (nn.LSTM(32, 64, batch_first=True), torch.randn(16, 40, 32)),
    "dropout": lambda: (
        nn.Sequential(nn.Linear(64, 700), nn.Dropout(0.1), nn.Softmax(-1)),
        torch.randn(99, 64),
    ),
}


def _walk(name: str) -> list[tuple[object, ...]]:
    model, x = MODELS[name]()
    out = model(x)
    out = out[0] if isinstance(out, tuple) else out
    out.square().mean().backward()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    optimizer.step()
    tensors = [out, *model.parameters(), *(p.grad for p in model.parameters()), *model.buffers()]
    return [(tuple(t.shape), t.stride(), t.dtype, t.requires_grad) for t in tensors]


@pytest.mark.parametrize("name", MODELS)
def test_shapes_strides_and_dtypes_are_those_of_a_run(name: str) -> None:
    real = _walk(name)
    with Dry(Ledger(), Work()):
        assert _walk(name) == real


def test_what_is_large_costs_address_space_alone(ledger: Ledger) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    layer = nn.Linear(1 << 14, 1 << 14)  # 1 GB
    layer(torch.randn(64, 1 << 14)).sum().backward()
    assert layer.weight.grad is not None
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB
    assert ledger.usage().peak > 2 << 30  # the weight and its gradient


def test_small_values_are_true(ledger: Ledger) -> None:
    counts = torch.zeros(4, dtype=torch.int64)
    counts[2] = 7
    assert counts.sum().item() == 7
    assert torch.arange(5).tolist() == [0, 1, 2, 3, 4]
    # What a message would have filled holds nothing, so that a sum over ranks is this rank's own.
    for _ in range(20):
        assert not torch.full((64,), 3.0).new_empty(64).any()
        assert not torch.empty_like(counts).any()


def test_a_view_shares_and_a_resized_storage_counts_once(ledger: Ledger) -> None:
    flat = torch.empty(1 << 20)
    part = flat[: 1 << 10].view(32, 32)
    assert part.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()
    assert sum(ledger.resting().values()) == 4 << 20
    flat.untyped_storage().resize_(0)
    assert not ledger.resting()
    flat.untyped_storage().resize_(4 << 20)
    assert sum(ledger.resting().values()) == 4 << 20


def test_what_is_given_back_is_gone_and_the_peak_remembers_it(ledger: Ledger) -> None:
    ledger.say("first")
    one = torch.empty(3 << 20)
    del one
    ledger.say("second")
    two = torch.empty(2 << 20)
    usage = ledger.usage()
    assert (usage.peak, usage.moment) == (12 << 20, "first")
    assert sum(ledger.resting().values()) == two.untyped_storage().nbytes() == 8 << 20


def test_a_program_that_asks_for_a_value_is_told_where() -> None:
    loss = lambda: nn.Linear(512, 512)(torch.randn(512, 512)).mean()  # noqa: E731
    with Dry(Ledger(), Work()), pytest.raises(UsageError, match=r"not computed; found .*test_dry.py:\d+"):
        loss().item()
    with Dry(Ledger(), Work(), assume=2.5):
        assert loss().item() == 2.5


def test_a_shape_that_depends_on_values_is_refused() -> None:
    with Dry(Ledger(), Work()), pytest.raises(UsageError, match="nonzero"):
        torch.randn(512, 512).nonzero()


def test_version_counters_move_so_that_autograd_sees_an_edit(ledger: Ledger) -> None:
    x = torch.randn(1 << 16, requires_grad=True)
    y = x.exp()
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
