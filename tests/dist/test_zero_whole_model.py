"""A sharded model as if it were whole: state dicts, generation, unsharding, description."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn

from tests.dist.test_data_parallel import gpt, nasty
from tests.helpers.data import gpt_batch, token_batch
from tests.helpers.models import NastyModel, TinyGPT, build
from tests.helpers.pool import RankFailure
from tests.helpers.referee import assert_bitwise
from tests.helpers.train import config
from zeropipe.errors import UnavailableParameterError

THRESHOLD = {
    "zero_optimization": {"stage3_param_persistence_threshold": 40}
}  # some parameters stay, some do not


def make_engine(model: nn.Module, world: int, **extra: Any) -> Any:
    import zeropipe

    return zeropipe.initialize(model=model, config=config(3, world, **{**THRESHOLD, **extra}))[0]


def states(rank: int, world: int, kind: str, trained: bool) -> Any:
    from zeropipe import zero

    factory = gpt if kind == "gpt" else nasty
    plain = factory()
    if trained:
        model = make_engine(factory(), world).module
    else:
        model = factory()
        zero.Init(module=model)
    found, expected = model.state_dict(prefix="p."), plain.state_dict(prefix="p.")
    assert list(found) == list(expected) and found._metadata == expected._metadata
    assert isinstance(found, OrderedDict) and not any(hasattr(v, "ds_id") for v in found.values())
    first, second = ("tokens", "head") if kind == "gpt" else ("embed", "head")
    assert found[f"p.{first}.weight"] is found[f"p.{second}.weight"]  # tied
    kept = model.state_dict(keep_vars=True)
    assert all(kept[name] is param for name, param in model.named_parameters())
    torch.save(found, "/dev/null")
    again = model.state_dict()
    assert again[f"{first}.weight"] is not found[f"p.{first}.weight"]
    return dict(found), dict(expected)


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("kind", ["gpt", "nasty"])
def test_state_dict_is_whole_on_every_rank(pool, world, kind, trained):
    for found, expected in pool(world).run(states, kind, trained):
        assert_bitwise(found, expected)


def loads(rank: int, world: int, trained: bool) -> Any:
    from zeropipe import zero
    from zeropipe.comm import record

    other = build(NastyModel, seed=7)
    with torch.no_grad():
        other.calls += 3
    if trained:
        engine = make_engine(build(NastyModel), world)
        model = engine.module
    else:
        model = build(NastyModel)
        zero.Init(module=model)
    state = other.state_dict()
    before = {name: value.clone() for name, value in state.items()}
    with record() as events:
        result = model.load_state_dict(state)
    assert not events and str(result) == "<All keys matched successfully>"
    assert_bitwise(dict(state), before)  # the caller's dict is as it was
    for name, param in model.named_parameters():
        assert param.ds_persist or param.numel() == 0, name
    outcome = {name: value.clone() for name, value in model.state_dict().items()}
    assert model.head.weight is model.embed.weight
    # The usual errors, with the true shapes, and nothing lost.
    wrong = {**state, "wide.weight": torch.zeros(2, 3), "scale": torch.zeros(2), "unknown": torch.zeros(1)}
    del wrong["norm.bias"]
    with pytest.raises(RuntimeError) as error:
        model.load_state_dict(wrong)
    shapes = "torch.Size([2, 3]) from checkpoint, the shape in current model is torch.Size([192, 6])"
    for words in (
        'Missing key(s) in state_dict: "norm.bias"',
        'Unexpected key(s) in state_dict: "unknown"',
        shapes,
    ):
        assert words in str(error.value), str(error.value)
    missing = model.load_state_dict({"scale": torch.tensor(9.0), "more": torch.ones(1)}, strict=False)
    assert "norm.bias" in missing.missing_keys and missing.unexpected_keys == ["more"]
    assert model.state_dict()["scale"].item() == 9.0
    model.load_state_dict({**state, "scale": torch.tensor([4.0])})  # one element for shape []
    assert model.state_dict()["scale"].item() == 4.0
    model.load_state_dict(copy.deepcopy(state), assign=True)
    assert all(hasattr(param, "ds_id") for param in model.parameters())
    assert_bitwise(dict(model.state_dict()), before)
    if trained:
        from zeropipe.utils import safe_get_full_fp32_param

        assert_bitwise(safe_get_full_fp32_param(model.wide.weight), before["wide.weight"])
        loss = engine(*token_batch(0, rank))
        engine.backward(loss)
        engine.step()
    return outcome, before


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("trained", [False, True])
def test_load_state_dict(pool, world, trained):
    for found, expected in pool(world).run(loads, trained):
        assert_bitwise(found, expected)


def loads_by_client(rank: int, world: int) -> Any:
    """As transformers loads under stage 3: only rank 0 has values, module by module, without load_state_dict."""
    from zeropipe import zero

    values = dict(build(TinyGPT, seed=3).state_dict())
    with zero.Init():
        model = TinyGPT()

    def load(module: nn.Module, prefix: str) -> None:
        own = dict(module.named_parameters(prefix=prefix[:-1], recurse=False))
        with zero.GatheredParameters([own[k] for k in values if k in own], modifier_rank=0):
            if rank == 0:
                module._load_from_state_dict(values, prefix, {}, True, [], [], [])
        for name, child in module.named_children():
            load(child, f"{prefix}{name}.")

    load(model, "")
    outcome = dict(model.state_dict())
    # And on every rank, outside of any context.
    model.norm._load_from_state_dict({"weight": torch.full((32,), 6.0)}, "", {}, False, [], [], [])
    assert torch.equal(model.state_dict()["norm.weight"], torch.full((32,), 6.0))
    return outcome, values


def test_loading_by_hand_on_rank_0(pool):
    for found, expected in pool(2).run(loads_by_client):
        assert_bitwise(found, expected)


def lonely(rank: int, world: int) -> None:
    engine = make_engine(build(TinyGPT), world)
    if rank == 0:
        engine.module.state_dict()
    else:
        engine(*gpt_batch(0, rank))


def test_a_state_dict_on_one_rank_is_an_error(pool):
    with pytest.raises(RankFailure, match="DesyncError"):
        pool(2).run(lonely, timeout=20)


def names_of_a_part(rank: int, world: int) -> None:
    """peft asks a part of the model for its names on the rank that writes, and nowhere else."""
    from zeropipe import zero

    engine = make_engine(build(TinyGPT), world, zero_optimization={"stage3_param_persistence_threshold": 0})
    norm = engine.module.norm
    if rank == 0:
        state = norm.state_dict()
        assert list(state) == [name for name, _ in norm.named_parameters()]
        with pytest.raises(UnavailableParameterError, match=r"'norm\.weight'"):
            state["weight"] + 1
        with pytest.raises(UnavailableParameterError, match="pickling"):
            pickle.dumps(state["weight"])
        for value in (norm.weight, norm.weight.data, norm.weight.detach()):
            with pytest.raises(UnavailableParameterError, match=r"nn\.Parameter.*'norm\.weight'"):
                torch.nn.Parameter(value)
    with zero.GatheredParameters(list(norm.parameters())):
        whole = norm.state_dict()["weight"]
    assert torch.equal(whole, engine.module.state_dict()["norm.weight"])
    assert whole.shape == norm.weight.ds_shape


def test_a_part_of_the_model_tells_its_names_on_one_rank(pool):
    pool(2).run(names_of_a_part)


def lonely_before_a_barrier(rank: int, world: int) -> None:
    """The classic: rank 0 saves, the others wait for it."""
    from datetime import timedelta

    from zeropipe.comm.collectives import barrier
    from zeropipe.comm.group import world as everyone
    from zeropipe.runtime.zero.gather import state_dict

    state_dict.PATIENCE = timedelta(seconds=1)
    engine = make_engine(build(TinyGPT), world)
    if rank == 0:
        engine.module.state_dict()
    barrier(everyone())


def test_a_state_dict_that_others_never_call_gives_up(pool):
    with pytest.raises(RankFailure, match="call it on every rank"):
        pool(2).run(lonely_before_a_barrier, timeout=20)


def generation(rank: int, world: int) -> Any:
    """Ranks generate different numbers of tokens."""
    from zeropipe import zero
    from zeropipe.comm import record

    plain = build(TinyGPT).eval()
    engine = make_engine(build(TinyGPT), world)
    for step in range(2):  # also with a plan from a step before
        tokens = torch.tensor([[1, 2, 3]])
        expected = tokens.clone()
        with torch.no_grad(), zero.unsharded(engine.module) as model:
            with record() as events:
                for _ in range(2 + 3 * rank):
                    tokens = torch.cat([tokens, model(tokens).argmax(-1)[:, -1:]], 1)
            assert not events
        assert all(p.ds_persist or p.numel() == 0 for p in engine.module.parameters())
        if step == 0:
            with torch.no_grad():
                for _ in range(2 + 3 * rank):
                    expected = torch.cat([expected, plain(expected).argmax(-1)[:, -1:]], 1)
            assert torch.equal(tokens, expected)
        engine.train()
        loss = engine(*gpt_batch(step, rank))
        engine.backward(loss)
        engine.step()
    with zero.unsharded(engine.module, modifier_rank=0) as model:
        if rank == 0:
            model.norm.weight.data.fill_(3)
            model.tokens.weight.data.mul_(2)
    state = engine.module.state_dict()
    assert torch.equal(state["norm.weight"], torch.full((32,), 3.0))
    with zero.unsharded(engine.module):  # a whole training step inside
        loss = engine(*gpt_batch(5, rank))
        engine.backward(loss)
        engine.step()
    return dict(engine.module.state_dict())


def test_unsharded_generates_without_communication(pool):
    first, second = pool(2).run(generation)
    assert_bitwise(second, first)


def ahead(rank: int, world: int) -> None:
    from zeropipe import zero
    from zeropipe.comm import record

    plain = build(TinyGPT)
    engine = make_engine(build(TinyGPT), world, zero_optimization={"stage3_param_persistence_threshold": 0})
    block = engine.module.blocks[0]
    for _ in range(2):
        pending = zero.unshard(block)
        zero.unshard(block)
        assert block.qkv.weight.ds_status is not zero.ZeroParamStatus.NOT_AVAILABLE
        assert pending.wait() is block
        assert torch.equal(block.qkv.weight, plain.blocks[0].qkv.weight)
        with record() as events:
            engine.eval()(*gpt_batch(0, rank))
        assert not any(e.label.startswith("blocks.0.") for e in events)
        assert block.qkv.weight.numel()  # still
        zero.reshard(block)
        zero.reshard(block)
        assert not any(p.numel() for p in block.parameters())
    engine.destroy()


def test_unshard_ahead_of_time(pool):
    pool(2).run(ahead)


def plain_again(rank: int, world: int) -> Any:
    from zeropipe import zero
    from zeropipe.errors import UsageError

    engine = make_engine(build(NastyModel), world)
    loss = engine(*token_batch(0, rank))
    engine.backward(loss)
    engine.step()
    expected = dict(engine.module.state_dict())
    model = engine.module
    with pytest.raises(UsageError, match="destroy"):
        zero.unshard_module(model)
    engine.destroy()
    assert zero.unshard_module(model) is model
    for param in model.parameters():
        assert type(param) is nn.Parameter and not hasattr(param, "ds_id")
    assert model.head.weight is model.embed.weight
    assert not model._state_dict_hooks and not hasattr(model, "ds_external_parameters")
    copy.deepcopy(model)(*token_batch(1)).backward()
    return dict(model.state_dict()), expected


@pytest.mark.parametrize("world", [1, 2])
def test_unshard_module_makes_it_plain_for_ever(pool, world):
    for found, expected in pool(world).run(plain_again):
        assert_bitwise(found, expected)


def described(rank: int, world: int) -> str:
    from zeropipe import zero

    model = build(NastyModel)
    assert {row.held_by for row in zero.describe(model)} == {"every rank"}
    engine = make_engine(model, world)
    rows = zero.describe(engine.module)
    assert [row.name for row in rows] == [name for name, _ in model.named_parameters()]
    wide = rows["wide.weight"]
    assert (wide.shape, wide.numel, wide.bytes_whole, wide.bytes_here) == (
        (192, 6),
        1152,
        4608,
        4608 // world,
    )
    assert wide.state is zero.ZeroParamStatus.NOT_AVAILABLE and wide.kind is zero.ZeroParamType.PARTITIONED
    assert (wide.layout, wide.held_by, wide.trained) == ("2 x 576", "ranks 0-1", True)
    assert rows["few"].layout == "2 x 2 (pad 1)" and rows["few"].persistent
    assert not rows["frozen.weight"].trained and rows["scale"].shape == ()
    with pytest.raises(KeyError):
        rows["nothing"]
    with zero.GatheredParameters(model.wide.weight):
        assert zero.describe(model)["wide.weight"].bytes_here == 4608 // world + 4608
    assert len(rows) == len(list(rows)) and rows.bytes_whole > rows.bytes_here - 4000
    return str(rows)


def test_describe(pool):
    text = pool(2).run(described)[0].splitlines()
    assert text[0].split()[:2] == ["parameter", "shape"]
    row = next(line for line in text if line.startswith("wide.weight"))
    assert "192 x 6" in row and "not available" in row and "ranks 0-1" in row and "4.5 KiB" in row


def checkpoints(rank: int, world: int, folder: str) -> None:
    """Saving asks the module for its state too; it must get shards then, and gather nothing."""
    from zeropipe.comm import record

    engine = make_engine(build(TinyGPT), world)
    loss = engine(*gpt_batch(0, rank))
    engine.backward(loss)
    engine.step()
    expected = dict(engine.module.state_dict())
    with record() as events:
        engine.save_checkpoint(folder)
    assert not any(event.op == "all_gather" for event in events)
    other = make_engine(build(TinyGPT, seed=4), world)
    other.load_checkpoint(folder)
    assert_bitwise(dict(other.module.state_dict()), expected)
    assert_bitwise(dict(engine.module_state_dict()), expected)


def test_checkpoints_take_shards(pool, tmp_path):
    pool(2).run(checkpoints, str(tmp_path))
