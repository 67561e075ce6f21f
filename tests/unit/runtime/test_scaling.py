"""Engines know the factor of a backward, their own and another's, and take it off what is outside of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from zeropipe.errors import UsageError
from zeropipe.runtime.engine.scaling import BACKWARDS, Scaling


def scaling(scale: float = 1.0, steps: int = 1) -> Scaling:
    return Scaling(lambda: scale, lambda: steps)


def missing_in(owner: Scaling, loss: torch.Tensor) -> float:
    """What ``owner`` finds missing while ``loss.backward()`` runs."""
    found: list[float] = []
    leaf = torch.ones(1, requires_grad=True)
    leaf.register_hook(lambda grad: found.append(owner.missing()))
    (loss * leaf).sum().backward()
    return found[0]


def test_a_plain_backward_lacks_the_accumulation() -> None:
    assert missing_in(scaling(steps=4), torch.ones(1)) == 0.25
    assert missing_in(scaling(), torch.ones(1)) == 1.0


def test_in_fp16_it_is_an_error_that_says_what_to_call() -> None:
    with pytest.raises(UsageError, match=r"engine\.scale\(loss\)"):
        missing_in(scaling(1024.0), torch.ones(1))


def test_an_engines_own_backward_lacks_nothing() -> None:
    own = scaling(1024.0, 3)
    with own.running(1024.0 / 3):
        assert own.missing() == 1.0
    with own.running(1024.0):  # the caller divided the loss
        assert own.missing() == 1.0
    assert BACKWARDS.latest() is None


def test_another_engines_factor_is_exchanged_for_the_own_one() -> None:
    own, other = scaling(16.0, 2), scaling(4.0)
    with other.running(4.0):
        assert own.missing() == 2.0
    with scaling(steps=2).running(0.5), pytest.raises(UsageError, match="without loss scale"):
        own.missing()


def leaf_loss() -> tuple[torch.Tensor, torch.Tensor]:
    leaf = torch.full((1,), 3.0, requires_grad=True)
    return leaf, (leaf * 2).sum()


def test_scale_gives_the_scaled_loss_and_says_so_until_its_backward_ends() -> None:
    own, other = scaling(8.0, 2), scaling(2.0)
    leaf, loss = leaf_loss()
    seen: list[float] = []
    leaf.register_hook(lambda grad: seen.extend([own.missing(), other.missing()]))
    scaled = own.scale(loss)
    assert scaled.item() == 24.0
    scaled *= 1  # as the output of any operation, it may be changed in place
    scaled.backward()
    assert leaf.grad is not None and leaf.grad.item() == 8.0
    assert seen == [1.0, 0.5]
    assert BACKWARDS.latest() is None


def test_a_backward_that_raised_is_no_longer_under_way() -> None:
    own = scaling(8.0)
    leaf, loss = leaf_loss()

    def fail(grad: torch.Tensor) -> None:
        raise ValueError("out of memory")

    handle = leaf.register_hook(fail)
    with pytest.raises(ValueError) as kept:
        own.scale(loss).backward(retain_graph=True)
    with pytest.raises(ValueError) as kept_too, own.running(8.0):
        loss.backward()
    assert BACKWARDS.latest() is None
    handle.remove()
    del kept, kept_too


def test_a_loss_is_scaled_once() -> None:
    own, other = scaling(8.0), scaling(4.0)
    _, loss = leaf_loss()
    with pytest.raises(UsageError, match="scaled twice"), own.running(8.0, own.scale(loss)):
        pass
    with pytest.raises(UsageError, match="different factors"):
        (own.scale(leaf_loss()[1]) + other.scale(leaf_loss()[1])).backward()
    (own.scale(leaf_loss()[1]) + own.scale(leaf_loss()[1])).backward()


def test_an_engine_without_scale_runs_through_one_with_it_by_that_ones_scale() -> None:
    plain, half = scaling(steps=2), scaling(16.0)
    leaf, loss = leaf_loss()
    seen: list[float] = []
    leaf.register_hook(lambda grad: seen.extend([plain.missing(), half.missing()]))
    scaled = half.scale(loss)
    with plain.running(0.5, scaled):
        (scaled * 0.5).backward()
    assert leaf.grad is not None and leaf.grad.item() == 16.0
    assert seen == [1 / 16, 2.0]


def test_what_is_outside_of_all_engines_gets_true_gradients() -> None:
    own, layer, before = scaling(4.0, 2), nn.Linear(3, 3), nn.Linear(3, 3)
    x = torch.randn(2, 3, requires_grad=True)
    layer(before(x)).sum().backward()
    expected = before.weight.grad.clone(), x.grad.clone()
    for scaled in (lambda loss: own.scale(loss).backward(), lambda loss: loss.backward()):
        before.zero_grad()
        x.grad = None
        hidden = before(x)
        for _ in range(2):  # two calls, one hook
            own.enter({"hidden": [hidden], "none": None})
        scaled(layer(hidden).sum())
        assert torch.equal(before.weight.grad, expected[0])
        assert torch.equal(x.grad, expected[1])


def test_functional_transforms_are_left_alone() -> None:
    own = scaling(4.0, 2)

    def through(x: torch.Tensor) -> torch.Tensor:
        own.enter((x,))
        return x.square().sum()

    x = torch.randn(3)
    assert torch.equal(torch.func.grad(through)(x), 2 * x)
    assert torch.equal(
        torch.func.vmap(torch.func.grad(through))(torch.stack([x, x])), 2 * torch.stack([x, x])
    )
