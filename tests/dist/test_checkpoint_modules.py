"""``load_checkpoint`` gives a module what ``load_state_dict`` would: hooks, overrides, state of its own take part."""

from __future__ import annotations

import copy
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import zeropipe
from tests.helpers.models import build
from tests.helpers.stateful import OLD_SPECTRAL, STATEFUL, WIDTH, Packed, model_of
from zeropipe.checkpoint.convert import convert
from zeropipe.checkpoint.loader import open_source
from zeropipe.checkpoint.sources.dcp import write_dcp
from zeropipe.checkpoint.sources.parallel import weights
from zeropipe.checkpoint.sources.universal import write_universal
from zeropipe.errors import CheckpointError
from zeropipe.pipe import PipelineModule
from zeropipe.utils import safe_get_full_fp32_param

NAMES = [*STATEFUL, "the root"]
IN_SECONDS = 30  # a rank that waits in vain does so for 60
PAIRS = [(0, 0), (0, 3), (2, 1), (3, 0), (1, 3)]


def engine_of(name: str, stage: int, seed: int, **extra: Any) -> Any:
    zero = {"stage": stage} | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {})
    config = {
        "train_micro_batch_size_per_gpu": WIDTH,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "zero_optimization": zero,
    }
    return zeropipe.initialize(model=build(lambda: model_of(name), seed=seed), config=config | extra)[0]


def train(engine: Any, steps: int) -> list[float]:
    losses = []
    for step in range(steps):
        torch.manual_seed(100 + step)
        x = torch.randn(WIDTH, WIDTH).to(torch.bfloat16 if engine.bfloat16_enabled() else torch.float32)
        loss = engine(x).float().square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def values(engine: Any) -> dict[str, Any]:
    state = engine.module.state_dict()
    return {k: v.detach().clone() if torch.is_tensor(v) else copy.deepcopy(v) for k, v in state.items()}


def masters(engine: Any) -> list[torch.Tensor]:
    return [safe_get_full_fp32_param(p).clone() for p in engine.module.parameters()]


def differences(left: dict[str, Any], right: dict[str, Any]) -> list[str]:
    """Keys whose values differ in a bit, a shape or a type, or are on one side only."""
    odd = [key for key in {*left, *right} if key not in left or key not in right]
    for key in left.keys() & right.keys():
        a, b = left[key], right[key]
        same = (
            torch.equal(a, b) and a.dtype == b.dtype if torch.is_tensor(a) else a == b and type(a) is type(b)
        )
        odd += [] if same else [key]
    return odd


def cross(name: str, where: str, pair: tuple[int, int], extra: dict[str, Any]) -> list[str]:
    """What is wrong after a save at one stage and a load at another, into a model of other weights."""
    engine = engine_of(name, pair[0], 0, **extra)
    train(engine, 2)
    right, right_masters = values(engine), masters(engine)
    engine.save_checkpoint(where)
    ahead = train(engine, 2)
    other = engine_of(name, pair[1], 1, **extra)
    if pair[1] % 2:  # also over a state that is not fresh
        train(other, 1)
    other.load_checkpoint(where)
    odd = differences(values(other), right)
    if not all(map(torch.equal, masters(other), right_masters)):
        odd.append("masters")
    if not extra:
        plain = build(lambda: model_of(name), seed=2)
        plain.load_state_dict(right)
        odd += [f"{key}, not even in plain PyTorch" for key in differences(dict(plain.state_dict()), right)]
    module = other.module[0]
    if name == "derived" and not torch.equal(module.norm, masters(other)[0].norm().to(module.norm.dtype)):
        odd.append("what a hook derives")
    if train(other, 2) != ahead:
        odd.append("losses")
    if "extra" in name and module.history != engine.module[0].history:
        odd.append(f"history {module.history}")
    engine.destroy(), other.destroy()
    return odd


def crossed(
    rank: int, world: int, folder: str, pair: tuple[int, int], names: list[str], extra: dict[str, Any]
) -> dict[str, list[str]]:
    found = {}
    for name in names:
        where = os.path.join(folder, name.replace(" ", "_"))
        try:
            found[name] = cross(name, where, pair, extra)
        except Exception as error:
            found[name] = [f"{type(error).__name__}: {error}"]
    return {name: wrong for name, wrong in found.items() if wrong}


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_a_module_gets_what_load_state_dict_gives_it(
    pool: Any, tmp_path: Path, pair: tuple[int, int]
) -> None:
    """Hooks did not run, extra state was saved and never read back, and what overrides made of values was lost."""
    names = [name for name in NAMES if not (3 in pair and name in OLD_SPECTRAL)]
    assert pool(2).run(crossed, str(tmp_path), pair, names, {}) == [{}, {}]


HALF = ["BatchNorm", "packed", "transposed", "assigned", "extra state, words", "the root"]


@pytest.mark.parametrize("pair", [(0, 3), (2, 2), (3, 1)], ids=str)
def test_masters_keep_their_bits_where_code_gave_the_value_back(
    pool: Any, tmp_path: Path, pair: tuple[int, int]
) -> None:
    """In 16 bits code sees the rounded value: the master behind it is the saved one, not the rounded one."""
    half = {"bf16": {"enabled": True}}
    assert pool(2).run(crossed, str(tmp_path), pair, HALF, half) == [{}, {}]


class Halving(nn.Linear):
    """From the second version on the weight is half of what the first one kept, under the same name."""

    _version = 2

    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, *rest: Any) -> None:
        if metadata.get("version", 1) < 2:
            state[f"{prefix}weight"] = state[f"{prefix}weight"] / 2
        super()._load_from_state_dict(state, prefix, metadata, *rest)


class Upgraded(nn.Sequential):
    def __init__(self, first: Any = Halving) -> None:
        super().__init__(first(WIDTH, WIDTH) if first is nn.Linear else first())


def upgraded(rank: int, world: int, folder: str, stage: int, extra: dict[str, Any]) -> list[str]:
    config = {
        "train_micro_batch_size_per_gpu": WIDTH,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    } | extra
    old = zeropipe.initialize(model=build(lambda: Upgraded(nn.Linear)), config=config)[0]
    train(old, 1)
    old.save_checkpoint(folder)
    right = masters(old)[0] / 2
    wrong = []
    for _ in range(2):  # what the upgraded module saves is of its own version
        new = zeropipe.initialize(model=build(Upgraded, seed=3), config=config)[0]
        new.load_checkpoint(folder)
        value = values(new)["0.weight"].float()
        wrong += [] if torch.equal(value, right.to(value.dtype).to(new_dtype(extra)).float()) else ["value"]
        wrong += (
            []
            if torch.equal(masters(new)[0].to(new_dtype(extra)), right.to(new_dtype(extra)))
            else ["master"]
        )
        new.save_checkpoint(folder)
    return wrong


def new_dtype(extra: dict[str, Any]) -> torch.dtype:
    return torch.bfloat16 if extra else torch.float32


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_the_version_of_each_module_is_saved_and_masters_follow_an_upgrade(
    pool: Any, tmp_path: Path, stage: int
) -> None:
    """Versions were not saved: code that upgrades old values did so again with every load."""
    for name, extra in (("full", {}), ("half", {"bf16": {"enabled": True}})):
        assert pool(2).run(upgraded, str(tmp_path / name), stage, extra) == [[], []]


class Failing(nn.Linear):
    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)
        self.fails = False
        self.register_load_state_dict_pre_hook(self._maybe)

    @staticmethod
    def _maybe(module: Any, *_: Any) -> None:
        if module.fails:
            raise ValueError("this hook raises")
        module.weight.sum()  # gathers at stage 3


def failing(rank: int, world: int, folder: str, stage: int, odd: int | None) -> tuple[str, bool]:
    config = {
        "train_micro_batch_size_per_gpu": WIDTH,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    model = build(lambda: nn.Sequential(Failing(), nn.Linear(WIDTH, WIDTH)))
    engine = zeropipe.initialize(model=model, config=config)[0]
    train(engine, 1)
    engine.save_checkpoint(folder)
    right = values(engine)
    model[0].fails = odd is None or rank == odd
    begin = time.monotonic()
    try:
        engine.load_checkpoint(folder)
    except CheckpointError as error:
        text = str(error)
    model[0].fails = False
    train(engine, 1)
    engine.load_checkpoint(folder)
    assert time.monotonic() - begin < IN_SECONDS, "a rank waited for what another never sent"
    return text, differences(values(engine), right) == []


@pytest.mark.parametrize("odd", [None, 1])
@pytest.mark.parametrize("stage", [0, 3])
def test_a_hook_that_raises_is_told_to_every_rank_and_a_retry_is_right(
    pool: Any, tmp_path: Path, stage: int, odd: int | None
) -> None:
    """Where one raises while others are inside a gather, their messages are on their way for ever: nothing that comes
    later may meet them."""
    for text, right in pool(2).run(failing, str(tmp_path), stage, odd):
        assert "this hook raises" in text and right


def strict(rank: int, world: int, folder: str, stage: int) -> list[Any]:
    engine = engine_of("packed", stage, 0)
    engine.save_checkpoint(folder)
    right = values(engine)
    found: list[Any] = []
    for strictly in (True, False):
        other = engine_of("packed", stage, 1)
        other.module[0].add_module("more", nn.BatchNorm1d(WIDTH))
        for hook in list(other.module[0]._load_state_dict_pre_hooks.values()):
            if getattr(hook, "hook", None) is Packed._unpack or "_unpack" in repr(hook):
                other.module[0]._load_state_dict_pre_hooks.clear()
        try:
            other.load_checkpoint(folder, load_module_strict=strictly)
            found.append(differences({k: v for k, v in values(other).items() if k.startswith("1.")},
                                     {k: v for k, v in right.items() if k.startswith("1.")}))  # fmt: skip
        except CheckpointError as error:
            found.append(str(error))
    return found


def test_missing_and_unexpected_keys_are_those_of_load_state_dict(pool: Any, tmp_path: Path) -> None:
    """``load_module_strict`` means what ``strict`` means, with the keys that the module's own code knows."""
    for text, rest in pool(2).run(strict, str(tmp_path), 2):
        for key in ("0.q.weight", "0.k.weight", "0.more.running_mean", "0.packed"):
            assert key in text
        assert rest == []


PIPE = ["extra state, words", "packed", "BatchNorm", "extra state, bytes", "renamed", "transposed"]


def pipeline(stages: int, stage: int, seed: int) -> Any:
    torch.manual_seed(seed)
    layers = [STATEFUL[name]() for name in PIPE]
    module = PipelineModule(layers, num_stages=stages, loss_fn=nn.MSELoss(), partition_method="uniform")
    config = {
        "train_micro_batch_size_per_gpu": WIDTH,
        "gradient_accumulation_steps": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "zero_optimization": {"stage": stage},
    }
    return zeropipe.initialize(model=module, config=config)[0]


def everywhere(engine: Any) -> dict[str, Any]:
    """The state of all layers, from all ranks."""
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, values(engine))
    return {key: value for part in everyone for key, value in part.items()}


def piped(rank: int, world: int, folder: str, cut: tuple[int, int], stages: tuple[int, int]) -> Any:
    engine = pipeline(cut[0], stages[0], 0)
    x = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(5))
    for _ in range(2):
        engine.train_batch(iter([(x, x)] * 2))
    engine.save_checkpoint(folder)
    right = everywhere(engine)
    other = pipeline(cut[1], stages[1], 1)
    other.load_checkpoint(folder)
    found = differences(everywhere(other), right)
    engine.destroy(), other.destroy()
    return found


@pytest.mark.parametrize("stages", [(0, 1), (1, 0)], ids=str)
@pytest.mark.parametrize("cut", [(2, 2), (2, 1), (1, 2)], ids=str)
def test_layers_of_a_pipeline_too_at_any_cut(
    pool: Any, tmp_path: Path, cut: tuple[int, int], stages: tuple[int, int]
) -> None:
    assert pool(2).run(piped, str(tmp_path), cut, stages) == [[], []]


def test_tools_see_the_state_dict_that_the_module_gives(pool: Any, tmp_path: Path) -> None:
    """Beside a packed tensor an export had the parts as well, which are no keys of the state dict."""
    for stage in (0, 1, 3):
        where = tmp_path / str(stage)
        (right,) = pool(1).run(save_packed, str(where), stage)
        source = open_source(where)
        assert differences({w.name: w.read() for w in weights(source)}, right) == []
        convert(source, where / "ds", stage=3 - stage, dp=2)
        write_universal(source, where / "uni")
        write_dcp(source, where / "dcp")
        for name in ("ds", "uni", "dcp"):
            assert pool(1).run(load_packed, str(where / name), 1) == [differences({}, {})], name


def save_packed(rank: int, world: int, folder: str, stage: int) -> dict[str, Any]:
    engine = engine_of("packed", stage, 0)
    train(engine, 1)
    engine.save_checkpoint(folder)
    return values(engine)


def load_packed(rank: int, world: int, folder: str, stage: int) -> list[str]:
    engine = engine_of("packed", stage, 0)
    train(engine, 1)
    right = values(engine)
    other = engine_of("packed", stage, 1)
    other.load_checkpoint(folder)
    return differences(values(other), right)
