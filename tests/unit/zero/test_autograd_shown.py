"""What users do to ``.grad`` between backwards is seen, and a stand-in says what to call."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from zeropipe.errors import UsageError
from zeropipe.runtime.zero.hold.autograd import AbsentGradient, Change, Shown

READS: dict[str, Callable[[torch.nn.Parameter], object]] = {
    "clip_grad_norm_": lambda p: torch.nn.utils.clip_grad_norm_([p], 1.0),
    "clip_grad_value_": lambda p: torch.nn.utils.clip_grad_value_([p], 1.0),
    "get_total_norm": lambda p: torch.nn.utils.get_total_norm([p.grad]),
    "mul_": lambda p: p.grad.mul_(0.5),
    "data.div_": lambda p: p.grad.data.div_(2),
    "operator": lambda p: p.grad * 2,
    "foreach": lambda p: torch._foreach_mul_([p.grad], 2),
    "index": lambda p: p.grad[0],
    "isnan": lambda p: p.grad.isnan().any(),
    "copy_": lambda p: p.grad.copy_(torch.ones(2, 3)),
    "clone": lambda p: p.grad.clone(),
    "step": lambda p: torch.optim.SGD([p], lr=0.1).step(),
}


def shown() -> tuple[torch.nn.Parameter, Shown]:
    param = nn.Parameter(torch.ones(2, 3))
    return param, Shown([param], ["layer.weight"])


@pytest.mark.parametrize("name", READS)
def test_a_use_of_a_stand_in_names_the_parameter_and_the_way_out(name: str) -> None:
    """At the stages that shard, .grad was None, and clipping or scaling it did nothing in silence."""
    param, what = shown()
    what.absent([0])
    with pytest.raises(UsageError, match=r"'layer\.weight'.*gradient_clipping.*safe_set_full_grad"):
        READS[name](param)


def test_facts_of_a_stand_in_are_those_of_the_parameter_and_cost_no_memory() -> None:
    param, what = shown()
    what.absent([0])
    grad = param.grad
    assert isinstance(grad, AbsentGradient)
    assert (grad.shape, grad.dtype, grad.device) == (param.shape, param.dtype, param.device)
    assert "layer.weight" in repr(grad) and grad.detach() is not None
    what.absent([0])
    assert param.grad is grad


CLEARS: dict[str, tuple[Callable[[torch.nn.Parameter], object], Change]] = {
    "assignment": (lambda p: setattr(p, "grad", None), Change.DROPPED),
    "module": (lambda p: nn.ParameterList([p]).zero_grad(), Change.DROPPED),
    "optimizer": (lambda p: torch.optim.SGD([p], 0.1).zero_grad(), Change.DROPPED),
    "module, in place": (lambda p: nn.ParameterList([p]).zero_grad(set_to_none=False), Change.ZEROED),
    "optimizer, in place": (lambda p: torch.optim.SGD([p], 0.1).zero_grad(set_to_none=False), Change.ZEROED),
    "foreach": (lambda p: torch._foreach_zero_([p.grad, torch.ones(2)]), Change.ZEROED),
}


@pytest.mark.parametrize("name", CLEARS)
def test_clearing_a_stand_in_is_seen_once(name: str) -> None:
    param, what = shown()
    what.absent([0])
    assert list(what.changes(lift=False)) == []
    clear, change = CLEARS[name]
    clear(param)
    assert [found[:2] for found in what.changes(lift=False)] == [(0, change)]
    assert list(what.changes(lift=True)) == []
    assert param.grad is None  # room for autograd


def test_another_tensor_in_place_of_a_stand_in_is_refused() -> None:
    param, what = shown()
    what.absent([0])
    param.grad = torch.ones(2, 3)
    with pytest.raises(UsageError, match=r"'layer\.weight' was replaced.*safe_set_full_grad"):
        list(what.changes(lift=False))


def test_a_view_shows_edits_and_says_when_another_tensor_took_its_place() -> None:
    param, what = shown()
    buffer = torch.ones(2, 3)
    what.views([buffer], [0])
    assert param.grad is not None
    param.grad.mul_(3)
    assert buffer.eq(3).all() and list(what.changes(lift=True)) == []
    param.grad.data = param.grad.data * 2  # an idiom of old scripts
    (change,) = what.changes(lift=False)
    assert change[1] is Change.REPLACED and change[2] is not None and change[2].eq(6).all()
    what.views([buffer], [0])
    param.grad = param.grad * 2
    (change,) = what.changes(lift=False)
    assert change[1] is Change.REPLACED
    what.views([buffer], [0])
    param.grad = None
    assert [c[:2] for c in what.changes(lift=False)] == [(0, Change.DROPPED)]


def test_autograds_own_gradient_of_a_pass_that_was_not_reduced_is_only_watched() -> None:
    param, what = shown()
    param.grad = torch.ones(2, 3)
    what.absent([0], reduced=False)
    assert param.grad.eq(1).all()
    param.grad = param.grad * 2
    assert list(what.changes(lift=True)) == []
    what.absent([0], reduced=False)
    param.grad = None
    assert [c[:2] for c in what.changes(lift=True)] == [(0, Change.DROPPED)]
