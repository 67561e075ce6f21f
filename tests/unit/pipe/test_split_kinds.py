"""Kinds of user code under a backward in two halves: bits, calls and buffers of the undivided backward.

Three micro-batches go forward, then their backwards, then (divided) their second halves: state that a function keeps
from one call to the next meets the others, as in a schedule.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers.backward_kinds import KINDS, W
from tests.unit.pipe.test_split_backward import wanted
from zeropipe.errors import UsageError
from zeropipe.runtime.pipe.executor import Stage
from zeropipe.runtime.pipe.split_backward import Backward

MICRO = 3
DIVIDED = {  # kinds whose weights must still wait for the second half
    "linear", "hook on an activation", "hook on a node's input", "parameter hook, used twice",
    "derived weight with a hook", "custom function of a weight alone", "recurrent", "convolution", "attention",
    "elementwise", "parametrized", "autocast", "broadcast",
}  # fmt: skip


def run(name: str, divided: bool) -> tuple[list[Any], dict[str, Any], list[Any], bool]:
    """Gradients of the inputs; those of the parameters, and buffers; what was seen; did weights wait."""
    torch.manual_seed(0)
    torch.compiler.reset()
    seen: list[Any] = []
    model = KINDS[name](seen)
    xs = [torch.randn(5, W) for _ in range(MICRO)]
    stage = Stage(1, model)
    outs = []
    for i, x in enumerate(xs):
        outs.append(stage.forward(i, wanted(x), train=True))
        stage.hold_output(i, [outs[-1]])
    found, waited = [], True
    for i, out in enumerate(outs):
        seed = torch.sin(torch.arange(out.numel(), dtype=torch.float32).view(out.shape) + i)
        found += stage.backward(i, [seed], half=divided)
        waited &= model.last.bias.grad is None
    if divided:
        for i in range(MICRO):
            stage.backward_weight(i)
    state = {n: p.grad for n, p in model.named_parameters()} | dict(model.named_buffers())
    assert stage.alive == 0
    return found, state, seen, waited


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_two_halves_give_what_the_undivided_backward_gives(name: str) -> None:
    inputs, state, seen, _ = run(name, divided=False)
    found_inputs, found, found_seen, waited = run(name, divided=True)
    assert all(torch.equal(a, b) for a, b in zip(inputs, found_inputs, strict=True))
    assert found.keys() == state.keys()
    for key, value in state.items():
        assert (value is None) == (found[key] is None), key
        assert value is None or torch.equal(value, found[key]), key
    assert sorted(found_seen) == sorted(seen)
    assert waited == (name in DIVIDED)


def test_a_hook_that_changes_a_gradient_in_place_too_late_is_an_error():
    """What has been noted for a weight would no longer be what arrived there."""
    torch.manual_seed(0)
    lower, p = nn.Linear(4, 4), nn.Parameter(torch.randn(2, 4))
    x = torch.randn(2, 4, requires_grad=True)
    mid = torch.tanh(lower(x))
    mid.register_hook(lambda g: (g.mul_(2), None)[1])
    out = mid + p
    halves = Backward([x])
    halves.expect([out])
    halves.first_half([torch.ones(2, 4)])
    with pytest.raises(UsageError, match="changed in place"):
        halves.second_half()


def test_the_input_s_gradient_may_be_written_by_whoever_gets_it():
    """A stage on the same rank gets the tensor itself, and its functions may write into it."""
    x, p = torch.randn(2, 4, requires_grad=True), nn.Parameter(torch.randn(2, 4))
    out = x + p
    halves = Backward([x])
    halves.expect([out])
    (grad,) = halves.first_half([torch.ones(2, 4)])
    grad.zero_()
    halves.second_half()
    assert torch.equal(p.grad, torch.ones(2, 4))


def test_a_layer_may_change_its_input_in_place_first():
    """``nn.ReLU(inplace=True)`` as the first layer of a stage: an error about leaves."""
    for divided in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4))
        value = torch.randn(3, 4)
        plain = value.clone().requires_grad_()
        want = torch.autograd.grad(model(plain * 1).sum(), plain)[0]
        stage = Stage(1, model)
        out = stage.forward(0, wanted(value.clone()), train=True)
        stage.hold_output(0, [out])
        grads = [torch.ones_like(out)]
        (found,) = stage.backward(0, grads, half=divided)
        assert torch.equal(found, want)
