"""The two halves of a backward give what the whole gives, bit for bit, whatever the graph looks like."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from zeropipe.runtime.pipe.executor import Stage
from zeropipe.runtime.pipe.split_backward import Backward
from zeropipe.runtime.pipe.wire import Value, flatten


class Nasty(nn.Module):
    """Weights used twice, shared, transposed, scaled, frozen, unused, and reached without any input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(8), nn.Linear(8, 24)
        self.out = nn.Linear(8, 8, bias=False)
        self.gain = nn.Parameter(torch.ones(8))  # used three times
        self.twice = nn.Linear(8, 8)
        self.scaled = nn.Linear(8, 8)
        self.free = nn.Parameter(torch.randn(3))  # an output that no input reaches
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.dead = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True)) * self.gain
        x = x + torch.tanh(self.twice(torch.tanh(self.twice(x)))) * self.gain
        x = self.frozen(x) * self.gain + self.free.sum()
        return x @ (self.scaled.weight * 2), self.free * 2, x.mean()


def grads_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def wanted(value: Any) -> Value:
    """``value`` as the stage before hands it on, which wants the gradient of every tensor."""
    made = flatten(value, "a value")
    return made._replace(wanted=[True] * len(made.tensors))


def whole(
    model: nn.Module, x: torch.Tensor, seeds: list[torch.Tensor]
) -> tuple[Any, dict[str, torch.Tensor]]:
    x = x.clone().requires_grad_()
    torch.autograd.backward(list(model(x)), seeds)
    found = {name: grad.clone() for name, grad in grads_of(model).items()}
    model.zero_grad()
    return x.grad, found


def split(model: nn.Module, x: torch.Tensor, seeds: list[torch.Tensor]) -> tuple[Any, Callable[[], None]]:
    x = x.clone().requires_grad_()
    halves = Backward([x])
    halves.expect(model(x))
    return halves.first_half(seeds)[0], halves.second_half


@pytest.fixture
def case() -> tuple[nn.Module, torch.Tensor, list[torch.Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(Nasty())
    x = torch.randn(2, 5, 8)
    return model, x, [torch.randn_like(o) for o in model(x)]


def test_both_halves_equal_the_whole(case):
    model, x, seeds = case
    expected_input, expected = whole(model, x, seeds)
    found_input, second = split(model, x, seeds)
    assert grads_of(model) == {}  # the first half touches no weight
    second()
    assert torch.equal(found_input, expected_input)
    assert grads_of(model).keys() == expected.keys()
    assert all(torch.equal(expected[name], grad) for name, grad in grads_of(model).items())


def test_two_micro_batches_may_interleave(case):
    model, x, seeds = case
    _, first = whole(model, x, seeds)
    _, later = whole(model, 2 * x, seeds)
    _, one = split(model, x, seeds)
    _, two = split(model, 2 * x, seeds)
    one()
    two()
    for name, grad in grads_of(model).items():
        assert torch.equal(grad, first[name] + later[name])


def test_hooks_on_parameters_run_in_the_second_half(case):
    model, x, seeds = case
    seen: list[str] = []
    for name, param in model.named_parameters():
        if param.requires_grad:
            param.register_post_accumulate_grad_hook(lambda _, name=name: seen.append(name))
    _, second = split(model, x, seeds)
    assert seen == []
    second()
    assert sorted(seen) == sorted(n for n in grads_of(model))
    assert len(set(seen)) == len(seen)


def test_no_matrix_product_is_computed_twice():
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(16, 16) for _ in range(4)])
    x, counts = torch.randn(8, 16), []
    for run in (whole, split):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            found = run(model, x, [torch.ones(16)] * 8)
            if run is split:
                found[1]()
        model.zero_grad()
        counts.append(sum(e.count for e in profile.key_averages() if e.key in ("aten::mm", "aten::addmm")))
    assert counts[0] == counts[1] == 4 + 2 * 4


def test_a_first_stage_does_everything_in_the_second_half():
    torch.manual_seed(0)
    layer = nn.Embedding(5, 4)
    stage = Stage(0, layer)
    out = stage.begin(0, torch.tensor([[1, 2]]), train=True)
    stage.hold_output(0, [out])
    assert stage.backward(0, [torch.ones_like(out)], half=True) == []
    assert layer.weight.grad is None
    stage.backward_weight(0)
    assert layer.weight.grad.sum() == 8
    assert stage.alive == 0


def test_an_input_that_is_passed_on_and_one_that_is_not_used():
    layer = nn.Linear(4, 4)
    stage = Stage(1, lambda v: (layer(v[0]), v[1]))
    values = (torch.randn(2, 4), torch.randn(2, 4), torch.randn(3))
    out = stage.forward(0, wanted(values), train=True)
    stage.hold_output(0, list(out))
    seeds = [torch.ones(2, 4), torch.full((2, 4), 3.0)]
    first, second, unused = stage.backward(0, seeds, half=True)
    stage.backward_weight(0)
    assert torch.equal(first, seeds[0] @ layer.weight)
    assert torch.equal(second, seeds[1])
    assert torch.equal(unused, torch.zeros(3))
    assert layer.weight.grad is not None


def test_recomputed_layers_do_all_in_the_first_half():
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Dropout(0.5))
    stage = Stage(1, lambda v: checkpoint(layer, v, use_reentrant=False))
    out = stage.forward(0, wanted(torch.randn(2, 4)), train=True)
    stage.hold_output(0, [out])
    stage.backward(0, [torch.ones(2, 4)], half=True)
    assert layer[0].weight.grad is not None
    stage.backward_weight(0)
    assert stage.alive == 0
