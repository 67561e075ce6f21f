"""torch's distributed checkpoints: ours become theirs and theirs ours, bit for bit, one tensor in memory at a time."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from typer.testing import CliRunner

from tests.helpers.checkpointing import assert_same_state, make_engine, pieces, train, whole
from tests.helpers.data import token_batch
from tests.helpers.models import MLP, NastyModel, build
from zeropipe.checkpoint.convert import compare, convert
from zeropipe.checkpoint.loader import open_source
from zeropipe.checkpoint.save.records import FlatState, Grid, LocalState, ModelState
from zeropipe.checkpoint.save.saver import Saver
from zeropipe.checkpoint.save.verify import FileState, verify
from zeropipe.checkpoint.sources.dcp import write_dcp
from zeropipe.cli.ckpt import app
from zeropipe.comm.group import SELF
from zeropipe.errors import CheckpointError
from zeropipe.layout.flat import flat_shards

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})
    if result.exception is not None:
        raise result.exception
    return result.output


@pytest.fixture(scope="module", params=[(1, "fp32"), (2, "bf16"), (0, "fp16")], ids=str)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(folder, engine that saved it after 2 steps, stage, precision)."""
    folder = tmp_path_factory.mktemp("saved")
    stage, precision = request.param
    engine = make_engine(stage, precision)
    train(engine, 2, 0)
    engine.save_checkpoint(folder, client_state={"epoch": 1})
    return folder, engine, stage, precision


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_there_and_back_is_the_same_bits(saved: Any, tmp_path: Path, stage: int) -> None:
    folder, engine, first, precision = saved
    run("convert", folder, tmp_path / "dcp", "--to", "dcp")
    run("convert", tmp_path / "dcp", tmp_path / "back", "--to", "deepspeed", "--stage", stage, "--dp", 3)
    there, back = open_source(tmp_path / "dcp"), open_source(tmp_path / "back")
    assert list(compare(open_source(folder), there)) == []
    assert list(compare(open_source(folder), back)) == []
    assert back.train_state(0).client_state["epoch"] == 1
    assert there.train_state(0).per_rank.keys() == open_source(folder).train_state(0).per_rank.keys()
    other = make_engine(first, precision, seed=1)
    other.load_checkpoint(tmp_path / "dcp")  # directly, without a conversion
    assert other.global_steps == 2 and other.get_lr() == engine.get_lr()
    assert_same_state(whole([pieces(engine)]), whole([pieces(other)]))
    for name, value in engine.module.state_dict().items():
        assert torch.equal(value, other.module.state_dict()[name]), name


def test_a_second_conversion_writes_the_same_values(saved: Any, tmp_path: Path) -> None:
    write_dcp(open_source(saved[0]), tmp_path / "a")
    write_dcp(open_source(tmp_path / "a"), tmp_path / "b")
    assert list(compare(open_source(tmp_path / "a"), open_source(tmp_path / "b"))) == []
    assert "equal" in run("diff", tmp_path / "a", tmp_path / "b")
    assert all(f.state is FileState.UNCHECKED for f in verify(tmp_path / "b"))


def model_and_optimizer(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = build(NastyModel, seed=seed)
    decay = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decay}, {"params": plain, "weight_decay": 0.0}]
    return model, torch.optim.AdamW(groups, lr=1e-2)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, count: int) -> list[float]:
    losses = []
    for step in range(first, first + count):
        loss = model(*token_batch(step, 0))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("flatten", [False, True])
def test_what_torch_saves_goes_on_here(tmp_path: Path, flatten: bool) -> None:
    """Plain PyTorch trains and saves; an engine loads it and its losses are those of plain PyTorch."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    model, optimizer = model_and_optimizer(seed=3)
    steps(model, optimizer, 0, 3)
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    weights, state = get_state_dict(model, optimizer, options=options)
    dcp.save({"model": weights, "optim": state}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    engine = make_engine(2, seed=4, scheduler={"type": None})
    path, _ = engine.load_checkpoint(tmp_path / "dcp")
    assert path is not None
    found = engine.optimizer.param_groups[1]["weight_decay"]
    assert found == 0.0
    engine.clock.global_steps = 3  # DCP has no counter of its own
    assert train(engine, 3, 0) == steps(model, optimizer, 3, 3)


def test_what_we_write_goes_on_in_torch(tmp_path: Path) -> None:
    engine = make_engine(1, seed=3, scheduler={"type": None})
    train(engine, 3, 0)
    engine.save_checkpoint(tmp_path / "ours")
    run("convert", tmp_path / "ours", tmp_path / "dcp", "--to", "dcp")
    model, optimizer = model_and_optimizer(seed=5)
    weights, state = get_state_dict(model, optimizer)  # torch makes the state to ask for
    dcp.load({"model": weights, "optim": state}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    assert steps(model, optimizer, 3, 3) == train(engine, 3, 0)


def test_weights_alone_and_without_a_first_word_load(tmp_path: Path) -> None:
    source = build(MLP, seed=1).state_dict()
    for number, state in enumerate(({"model": source}, dict(source))):
        dcp.save(state, checkpoint_id=tmp_path / str(number), no_dist=True)
        found = open_source(tmp_path / str(number))
        assert {e.name: tuple(e.shape) for e in found.module} == {
            n: tuple(t.shape) for n, t in source.items()
        }
        assert all(torch.equal(e.read(), source[e.name]) for e in found.module)


class Evil:
    def __reduce__(self) -> Any:
        return (open, ("/nonexistent/should/never/be/opened", "w"))


def test_code_is_not_run(tmp_path: Path) -> None:
    dcp.save({"model": {"w": torch.ones(2)}, "x": 1}, checkpoint_id=tmp_path, no_dist=True)
    index = tmp_path / ".metadata"
    held = pickle.loads(index.read_bytes())
    held.planner_data = Evil()
    index.write_bytes(pickle.dumps(held))
    with pytest.raises(CheckpointError, match=r"io\.open|builtins\.open|_io\.open"):
        open_source(tmp_path)


@pytest.mark.parametrize("how", ["index", "truncate", "missing"])
def test_damage_is_named(tmp_path: Path, how: str) -> None:
    dcp.save({"model": {"w": torch.ones(2000)}}, checkpoint_id=tmp_path, no_dist=True)
    data = next(tmp_path.glob("*.distcp"))
    if how == "index":
        (tmp_path / ".metadata").write_bytes((tmp_path / ".metadata").read_bytes()[:-20])
    elif how == "truncate":
        data.write_bytes(data.read_bytes()[:4000])
    else:
        data.unlink()
    name = ".metadata" if how == "index" else data.name

    def read() -> None:
        source = open_source(tmp_path)
        source.module[0].read()

    with pytest.raises(CheckpointError, match=re.escape(name)):
        read()
    bad = [f.file for f in verify(tmp_path) if not f.good]
    assert bad == [name]


@pytest.mark.process
def test_a_conversion_holds_one_tensor_in_memory(tmp_path: Path) -> None:
    """60 tensors of 4 MB each, both ways: the peak is that of a few of them."""
    layout = flat_shards([(f"w{i}", (1024, 1024), "float32") for i in range(60)], 1)
    tensors = {"fp32": torch.ones(layout.shard_numel), "exp_avg": torch.ones(layout.shard_numel)}
    flat = FlatState("g", layout, 0, tensors)
    local = LocalState(Grid(), 2, "float32", ModelState({}), (flat,), param_groups=({"lr": 1.0},))
    Saver(SELF).save(tmp_path, "t", local)
    script = f"""
from zeropipe.checkpoint.loader import open_source
from zeropipe.checkpoint.sources.dcp import write_dcp
from zeropipe.checkpoint.sources.parallel import weights
def anonymous():
    line = next(l for l in open('/proc/self/status') if l.startswith('RssAnon'))
    return int(line.split()[1]) * 1024
source = open_source({str(tmp_path)!r})
import torch.distributed.checkpoint.filesystem
start, seen = anonymous(), []
write_dcp(source, {str(tmp_path / "dcp")!r}, progress=lambda done: seen.append(anonymous()))
seen.append(anonymous())
for weight in weights(open_source({str(tmp_path / "dcp")!r})):
    weight.read()
    seen.append(anonymous())
print(len(seen), max(seen) - start)
"""
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    count, peak = map(int, done.stdout.split())
    assert count == 121
    assert peak < 12 * 4 * 2**20  # of 480 MB
    convert(open_source(tmp_path / "dcp"), tmp_path / "back", stage=1, dp=2)
    assert list(compare(open_source(tmp_path / "t"), open_source(tmp_path / "back"))) == []
