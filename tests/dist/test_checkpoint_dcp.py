"""What FSDP saves through torch's DCP on several ranks goes on here at another number of them, and back again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers.models import MLP, build

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def loss_of(model: nn.Module, step: int) -> torch.Tensor:
    """The same batch on every rank, so that losses do not depend on their number."""
    generator = torch.Generator().manual_seed(step)
    return model(torch.randn(8, 10, generator=generator), torch.randn(8, 3, generator=generator))


def sharded(seed: int, ranks: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = build(MLP, seed=seed)
    mesh = init_device_mesh("cpu", (ranks,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, count: int) -> list[float]:
    losses = []
    for step in range(first, first + count):
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def fsdp_saves(rank: int, world: int, folder: str) -> list[float]:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    model, optimizer = sharded(0, world)
    steps(model, optimizer, 0, 3)
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optim": state}, checkpoint_id=folder)
    return steps(model, optimizer, 3, 3)


def ours_goes_on(rank: int, world: int, folder: str, stage: int, saves: str) -> list[float]:
    import zeropipe

    config = {
        "train_micro_batch_size_per_gpu": 8,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "zero_optimization": {"stage": stage},
    }
    engine = zeropipe.initialize(model=build(MLP, seed=1), config=config)[0]
    path, _ = engine.load_checkpoint(folder)
    assert path is not None
    losses = []
    for step in range(3, 6):
        loss = loss_of(engine, step)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    engine.save_checkpoint(saves)
    return losses


def fsdp_goes_on(rank: int, world: int, folder: str) -> list[float]:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model, optimizer = sharded(2, world)
    weights, state = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optim": state}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    return steps(model, optimizer, 6, 3)


@pytest.mark.parametrize(("ranks", "stage"), [(3, 2), (1, 1), (2, 3)])
def test_from_fsdp_and_back(pool: Any, tmp_path: Path, ranks: int, stage: int) -> None:
    from zeropipe.checkpoint.loader import open_source
    from zeropipe.checkpoint.sources.dcp import write_dcp

    expected = pool(2).run(fsdp_saves, str(tmp_path / "fsdp"))[0]
    assert len(list((tmp_path / "fsdp").glob("*.distcp"))) == 2  # both ranks wrote shards
    found = pool(ranks).run(ours_goes_on, str(tmp_path / "fsdp"), stage, str(tmp_path / "ours"))
    # Averages of equal gradients over three ranks round; everything else is the same arithmetic.
    assert all(losses == pytest.approx(expected, rel=1e-6) for losses in found)
    write_dcp(open_source(tmp_path / "ours"), tmp_path / "dcp")
    back = pool(2).run(fsdp_goes_on, str(tmp_path / "dcp"))
    assert back[0] == back[1]
    again = pool(1).run(ours_goes_on_from, str(tmp_path / "ours"))[0]
    assert again == pytest.approx(back[0], rel=1e-6)


def ours_goes_on_from(rank: int, world: int, folder: str) -> list[float]:
    import zeropipe

    config = {
        "train_micro_batch_size_per_gpu": 8,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
    }
    engine = zeropipe.initialize(model=build(MLP, seed=1), config=config)[0]
    engine.load_checkpoint(folder)
    losses = []
    for step in range(6, 9):
        loss = loss_of(engine, step)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses
