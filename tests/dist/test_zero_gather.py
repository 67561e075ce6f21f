"""GatheredParameters: any subset, nested, safe after exceptions; an edit reaches all ranks or raises."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers.data import gpt_batch
from tests.helpers.models import TinyGPT, build
from tests.helpers.pool import RankFailure
from tests.helpers.referee import assert_bitwise
from tests.helpers.train import config

AWAY = 2  # ZeroParamStatus.NOT_AVAILABLE


def pair(**kwargs: Any) -> tuple[nn.Module, nn.Module]:
    """A model in shards and the same one plain."""
    from zeropipe import zero

    torch.manual_seed(5)
    plain = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3), nn.Embedding(11, 7))
    sharded = copy.deepcopy(plain)
    zero.Init(module=sharded, **kwargs)
    return sharded, plain


def away(model: nn.Module) -> bool:
    return all(p.ds_status.value == AWAY and p.numel() == 0 for p in model.parameters())


def forms(rank: int, world: int) -> None:
    from zeropipe import zero
    from zeropipe.comm import record

    sharded, plain = pair()
    weight, expected = sharded[0].weight, plain[0].weight
    other = nn.Parameter(torch.ones(2))
    identity, key = id(weight), hash(weight)
    for params in (
        weight,
        [weight],
        (p for p in [weight, None, other, weight]),
        {weight: 1}.keys(),
        sharded,
        sharded[0],
        [*sharded.parameters(), weight],
    ):
        with zero.GatheredParameters(params):
            assert torch.equal(weight, expected)
            assert weight.shape == expected.shape and weight.ds_status.name == "AVAILABLE"
            assert isinstance(weight, nn.Parameter) and sharded[0].weight is weight
        assert away(sharded)
    assert (id(weight), hash(weight)) == (identity, key)
    with record() as events:
        for nothing in ([], None, [None], other, [other, None], iter(())):
            with zero.GatheredParameters(nothing, modifier_rank=0):
                pass
        with zero.GatheredParameters(weight, enabled=False):
            assert away(sharded)
    assert not events


@pytest.mark.parametrize("world", [1, 3])
def test_any_form_of_parameters(pool, world):
    pool(world).run(forms)


def modified(rank: int, world: int, modifier: int) -> Any:
    from zeropipe import zero

    sharded, plain = pair()
    with zero.GatheredParameters(sharded, modifier_rank=modifier):
        if rank == modifier:
            with torch.no_grad():
                sharded[0].weight.add_(1)
                sharded[1].bias.data = torch.full((3,), 4.0)  # another tensor
                sharded[2].weight.data[3:5] = -1
        elif rank == (modifier + 1) % world:
            sharded[0].bias.data.fill_(99)  # of no rank that counts
    assert away(sharded)
    with torch.no_grad():
        plain[0].weight.add_(1)
        plain[1].bias.fill_(4.0)
        plain[2].weight[3:5] = -1
    return dict(sharded.state_dict()), dict(plain.state_dict())


@pytest.mark.parametrize(("world", "modifier"), [(1, 0), (2, 1), (3, 2)])
def test_the_modifier_ranks_edit_reaches_all(pool, world, modifier):
    for sharded, plain in pool(world).run(modified, modifier):
        assert_bitwise(sharded, plain)


EDITS = {
    "in place": lambda p: p.add_(1),
    "through data": lambda p: p.data.fill_(3),
    "one element": lambda p: p.data.view(-1)[-1].mul_(2),
    "rows swapped": lambda p: p.data.copy_(p.data.flip(0)),
    "other data": lambda p: setattr(p, "data", torch.zeros_like(p.data)),
}


def lost_edit(rank: int, world: int, edit: str, who: int | None, persistent: bool) -> Any:
    from zeropipe import zero
    from zeropipe.errors import DesyncError, UsageError

    sharded, plain = pair()
    sharded[2].weight.ds_persist = persistent
    if persistent:
        sharded[2].weight.all_gather()
    mine = who is None or rank == who
    error, match = (UsageError, "'2.weight'.*modifier_rank=0") if mine else (DesyncError, "2.weight")
    change = EDITS[edit] if mine else (lambda p: None)
    with pytest.raises(error, match=match), zero.GatheredParameters(sharded), torch.no_grad():
        change(sharded[2].weight)
    if persistent:
        assert torch.equal(sharded[2].weight, plain[2].weight)
    else:
        assert away(sharded)
    with zero.GatheredParameters(sharded):
        return dict(copy.deepcopy(sharded).state_dict()), dict(plain.state_dict())


@pytest.mark.parametrize(
    ("edit", "who", "persistent"),
    [
        *((edit, None, False) for edit in EDITS),
        ("in place", 1, False),
        ("through data", 0, True),
        ("other data", None, True),
    ],
)
def test_an_edit_without_a_modifier_rank_raises_and_keeps_the_value(pool, edit, who, persistent):
    for sharded, plain in pool(2).run(lost_edit, edit, who, persistent):
        assert_bitwise(sharded, plain)


def reads(rank: int, world: int) -> None:
    from zeropipe import zero

    sharded, _ = pair()
    with zero.GatheredParameters(sharded):
        x = torch.randn(2, 7)
        y = sharded[1](sharded[0](x))
        y.sum().backward()
        list(sharded.state_dict().values())
        copy.deepcopy(sharded)
        pickle.dumps(sharded[0].weight)
        sharded[0].weight.data.clone().add_(1)
        sharded[0].weight.requires_grad_(False)
        float(sharded[2].weight.norm())
    assert away(sharded)


def test_reading_is_no_edit(pool):
    pool(2).run(reads)


def nested(rank: int, world: int) -> None:
    from zeropipe import zero
    from zeropipe.errors import UsageError

    sharded, plain = pair()
    first, second = sharded[0].weight, sharded[1].weight
    with zero.GatheredParameters(first):
        with zero.GatheredParameters([first, second]):
            assert torch.equal(second, plain[1].weight)
        assert first.ds_status.name == "AVAILABLE" and second.numel() == 0
        with zero.GatheredParameters(first, modifier_rank=0):  # inner edits count
            if rank == 0:
                first.data.fill_(2)
        assert torch.equal(first, torch.full_like(first, 2))
    outer = zero.GatheredParameters(first, modifier_rank=world - 1)
    with outer, zero.GatheredParameters(first):  # the outer answers for the inner
        first.data.fill_(3 if rank == world - 1 else 9)
    with zero.GatheredParameters(first):
        assert torch.equal(first, torch.full_like(first, 3))
    with (
        pytest.raises(UsageError, match="edited"),
        zero.GatheredParameters(first),
        zero.GatheredParameters(first),
    ):
        first.data.fill_(4)
    context = zero.GatheredParameters(sharded)
    for _ in range(2):
        with context, context:
            assert torch.equal(second, plain[1].weight)
        assert away(sharded)


@pytest.mark.parametrize("world", [1, 2])
def test_contexts_nest(pool, world):
    pool(world).run(nested)


def exceptions(rank: int, world: int) -> Any:
    from zeropipe import zero

    sharded, plain = pair()
    for modifier in (None, 0):
        with (
            pytest.raises(RuntimeError, match="invalid for input"),
            zero.GatheredParameters(sharded, modifier_rank=modifier),
        ):
            sharded[0].weight.data.zero_().view(3, 3, 3)
        assert away(sharded)
    return dict(sharded.state_dict()), dict(plain.state_dict())


def test_an_exception_writes_nothing(pool):
    for sharded, plain in pool(2).run(exceptions):
        assert_bitwise(sharded, plain)


def one_raises(rank: int, world: int) -> None:
    from zeropipe import zero

    sharded, _ = pair()
    with zero.GatheredParameters(sharded):
        if rank == 1:
            raise KeyError("only here")


def other_parameters(rank: int, world: int) -> None:
    from zeropipe import zero

    sharded, _ = pair()
    with zero.GatheredParameters(sharded[rank].weight):
        pass


@pytest.mark.parametrize(
    ("task", "words"),
    [
        (one_raises, ["only here", "DesyncError", "GatheredParameters raised KeyError"]),
        (other_parameters, ["DesyncError", "at '0.weight'", "at '1.weight'"]),
    ],
)
def test_ranks_that_differ_are_told(pool, task, words):
    with pytest.raises(RankFailure) as failure:
        pool(2).run(task, timeout=20)
    for word in words:
        assert word in str(failure.value)


def resized(rank: int, world: int, under_init: bool) -> Any:
    """As transformers resizes an embedding under stage 3."""
    from contextlib import nullcontext

    from zeropipe import zero

    torch.manual_seed(8)
    with zero.Init():
        model = TinyGPT(tied=True)
    old = model.tokens
    with zero.GatheredParameters(old.weight):
        count, width = old.weight.size()
        values = old.weight.detach().clone()
    torch.manual_seed(9)
    with zero.Init() if under_init else nullcontext():
        new = nn.Embedding(count + 6, width)
    torch.manual_seed(9)
    expected = nn.Embedding(count + 6, width).weight.detach().clone()
    expected[:count] = values
    with zero.GatheredParameters([old.weight, new.weight], modifier_rank=0):
        if rank == 0:
            new.weight.data[:count] = old.weight.data
    if not under_init:
        new.weight.data[:count] = values
    with zero.GatheredParameters([old.weight, new.weight], modifier_rank=0):
        old.weight = new.weight
        old.num_embeddings = new.weight.data.shape[0]
        model.head.weight = old.weight
        model.head.out_features = old.num_embeddings
    import zeropipe

    engine, *_ = zeropipe.initialize(model=model, config=config(3, world))
    state = engine.module.state_dict()
    assert_bitwise(state["tokens.weight"], expected)
    assert state["head.weight"].data_ptr() == state["tokens.weight"].data_ptr()
    assert engine.module.tokens.num_embeddings == count + 6
    loss = engine(*gpt_batch(0, rank))
    engine.backward(loss)
    engine.step()
    engine.destroy()
    return loss.item()


@pytest.mark.parametrize("under_init", [True, False])
def test_an_embedding_is_resized(pool, under_init):
    assert all(loss > 0 for loss in pool(2).run(resized, under_init))


def masters(rank: int, world: int) -> None:
    """In 16 bits a gather shows rounded values; writing one element must not round the other masters."""
    import zeropipe
    from zeropipe import zero
    from zeropipe.utils import safe_get_full_fp32_param

    settings = config(
        3, world, bf16={"enabled": True}, zero_optimization={"stage3_param_persistence_threshold": 50}
    )
    engine, *_ = zeropipe.initialize(model=build(TinyGPT), config=settings)
    loss = engine(*gpt_batch(0, rank))
    engine.backward(loss)
    engine.step()
    for param in (engine.module.tokens.weight, engine.module.norm.bias):  # away, and gathered at all times
        before = safe_get_full_fp32_param(param)
        with zero.GatheredParameters(param, modifier_rank=0):
            if rank == 0:
                param.data.view(-1)[3] = 5.0
        after = safe_get_full_fp32_param(param)
        expected = before.clone()
        expected.view(-1)[3] = 5.0
        assert_bitwise(after, expected)
        assert not torch.equal(before, before.bfloat16().float())
    with zero.GatheredParameters(engine.module):  # a step inside is no edit
        loss = engine(*gpt_batch(1, rank))
        engine.backward(loss)
        engine.step()
    engine.destroy()


def test_masters_keep_their_bits(pool):
    pool(2).run(masters)


class Borrower(nn.Module):
    """Uses a parameter that another module owns."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.owner = nn.Linear(width, width)
        self.user = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # []
        return (self.user(self.owner(x)) @ self.owner.weight).square().mean()


def externals(rank: int, world: int) -> None:
    import zeropipe
    from zeropipe import zero
    from zeropipe.errors import UsageError

    model = Borrower()
    zero.register_external_parameter(model.user, model.owner.weight)
    zero.register_external_parameter(model.user, model.owner.weight)
    settings = config(3, world, zero_optimization={"stage3_param_persistence_threshold": 0})
    engine, *_ = zeropipe.initialize(model=model, config=settings)
    assert [name for name, _ in model.user.ds_external_parameters()] == ["owner.weight"]
    assert list(model.ds_external_parameters()) == []
    seen = []
    model.user.register_forward_pre_hook(lambda *_: seen.append(model.owner.weight.numel()))
    engine(torch.ones(2, 6))
    zero.unregister_external_parameter(model.user, model.owner.weight)
    with pytest.raises(UsageError):
        zero.unregister_external_parameter(model.user, model.owner.weight)
    with pytest.raises(UsageError):
        zero.register_external_parameter(model.user, torch.ones(2))
    with zero.GatheredParameters(model.owner.bias, fwd_module=model.user):
        pass
    assert [p is model.owner.bias for _, p in model.user.ds_external_parameters()] == [True]
    assert seen == [36]
    engine.destroy()


def test_external_parameters(pool):
    pool(2).run(externals)


def uses_while_away(rank: int, world: int) -> None:
    from zeropipe.errors import UnavailableParameterError

    sharded, plain = pair()
    weight = sharded[0].weight
    for use in (
        lambda: weight + 1,
        lambda: weight.T,
        lambda: weight[0],
        lambda: nn.init.normal_(weight),
        lambda: weight.data.fill_(1),
        lambda: weight.detach().zero_(),
        lambda: weight.data.__setitem__(0, 1),
        lambda: weight.data.norm(),
        lambda: torch.linalg.vector_norm(weight.detach()),
        lambda: weight.data.isnan().any(),
        lambda: weight.detach().numpy(),
        lambda: torch.nn.utils.parameters_to_vector(sharded.parameters()),
        lambda: pickle.dumps(weight),
        lambda: list(weight),
        lambda: weight.tolist(),
        lambda: sharded[0](torch.ones(1, 7)),
    ):
        with pytest.raises(UnavailableParameterError, match=r"GatheredParameters"), torch.no_grad():
            use()
    with pytest.raises(UnavailableParameterError, match=r"0\.weight.*\(5, 7\)"):
        weight.sum()
    # Facts and bookkeeping work.
    assert (
        weight.shape == (0,) and weight.numel() == 0 and weight.data.shape == (0,) and weight.size() == (0,)
    )
    assert weight.ds_shape == (5, 7) and weight.ds_numel == 35
    assert (weight.dtype, weight.device.type, weight.requires_grad, weight.grad, weight.is_leaf) == (
        torch.float32, "cpu", True, None, True
    )  # fmt: skip
    assert "'0.weight' (5, 7)" in repr(weight) and "away" in f"{weight}"
    assert len({weight, sharded[0].weight}) == 1 and weight in set(sharded.parameters())
    weight.requires_grad_(False).requires_grad_(True)
    optimizer = torch.optim.AdamW(sharded.parameters(), lr=0.1)
    optimizer.step()
    optimizer.zero_grad()
    assert torch.nn.utils.clip_grad_norm_(sharded.parameters(), 1.0) == 0
    clone = copy.deepcopy(sharded)  # shards of its own
    assert away(clone) and clone[0].weight.ds_tensor.data_ptr() != weight.ds_tensor.data_ptr()
    assert_bitwise(dict(clone.state_dict()), dict(plain.state_dict()))
    sharded.to("cpu").half()
    assert weight.dtype == torch.float16 and weight.ds_tensor.dtype == torch.float16
    assert_bitwise(dict(sharded.state_dict()), dict(plain.half().state_dict()))


def test_a_parameter_that_is_away(pool):
    pool(2).run(uses_while_away)


class _Recomputes(torch.autograd.Function):
    """Gathers in its backward what it keeps for it, as fused losses do (TRL's log-probabilities)."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(hidden, weight)
        return hidden @ weight.t()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        from zeropipe import zero

        hidden, weight = ctx.saved_tensors
        with zero.GatheredParameters([weight]):
            return grad @ weight, grad.t() @ hidden


class _FusedHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(32, 32)
        self.head = nn.Linear(32, 16, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        from zeropipe import zero

        hidden = self.body(x)
        with zero.GatheredParameters([self.head.weight]):
            return _Recomputes.apply(hidden, self.head.weight).square().mean()


def gathers_in_a_custom_backward(rank: int, world: int, stage: int) -> dict[str, torch.Tensor]:
    import zeropipe

    sizes = {"stage": stage, "stage3_param_persistence_threshold": 0}
    model = build(_FusedHead)
    engine = zeropipe.initialize(model=model, config=config(stage, world, zero_optimization=sizes))[0]
    for step in range(3):
        torch.manual_seed(world * step + rank)
        engine.backward(engine(torch.randn(4, 32)))
        assert stage < 3 or model.head.weight.ds_status.value == AWAY
        engine.step()
    return {name: value.clone() for name, value in engine.module.state_dict().items()}


def test_a_custom_function_that_gathers_in_its_backward(pool):
    for found, expected in zip(
        pool(2).run(gathers_in_a_custom_backward, 3),
        pool(2).run(gathers_in_a_custom_backward, 0),
        strict=True,
    ):
        assert_bitwise(found, expected)
