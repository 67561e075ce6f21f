"""The end of the outermost backward is told once, however many run inside of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from zeropipe.runtime.zero.hold.autograd import at_end_of_backward


class Seen:
    """Asks for the end at the first gradient, and notes how many gradients had come by then."""

    def __init__(self, model: nn.Module) -> None:
        self.gradients = 0
        self.ends: list[int] = []
        self.gone: list[bool] = []
        self.ending: object = None
        for param in model.parameters():
            param.register_post_accumulate_grad_hook(self.arrived)

    def ended(self) -> None:
        self.ends.append(self.gradients)

    def arrived(self, _: torch.nn.Parameter) -> None:
        if self.gradients == 0:
            self.ending = at_end_of_backward(self.ended, lambda: self.gone.append(True))
        self.gradients += 1


def nested(model: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    return checkpoint(lambda y: checkpoint(model[0], y, use_reentrant=True), x, use_reentrant=True)


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_the_end_comes_after_all_gradients(depth: int) -> None:
    """Re-entrant checkpoints: the reduction of the whole model was ended once per segment."""
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(4)])
    seen = Seen(model)
    x = torch.randn(2, 4, requires_grad=True)
    for layer in model:
        if depth == 0:
            x = layer(x)
        elif depth == 1:
            x = checkpoint(layer, x, use_reentrant=True)
        else:
            x = nested(nn.Sequential(layer), x)
    x.sum().backward()
    assert seen.ends == [8] and seen.gone == [True]


def test_a_backward_that_raises_leaves_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    seen = Seen(model)

    def fail(_: torch.nn.Parameter) -> None:
        raise ValueError("out of memory")

    model[0].weight.register_post_accumulate_grad_hook(fail)
    with pytest.raises(ValueError):
        model(torch.randn(2, 4)).sum().backward()
    assert seen.ends == [] and seen.gone == [True]
    assert callable(seen.ending)
    assert seen.ending() is None
