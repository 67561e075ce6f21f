"""Scripts as users have them, unchanged: each is rehearsed, or told which of its lines cannot be and what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.unit.cli.test_planning import _run, _script

pytestmark = pytest.mark.process
CONFIG = """{"train_micro_batch_size_per_gpu": 2, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}"""
TRAINS = f"""
model = torch.nn.Sequential(*(torch.nn.Linear(256, 256) for _ in range(2))).to(device)
engine, *_ = zeropipe.initialize(model=model, config={CONFIG})
while True:
    loss = engine(torch.randn(256, 256, device=device)).square().mean()
    engine.backward(loss)
    engine.step()
"""

# The parts of a launched script for GPUs: it joins the world itself, talks to the others, and asks for its device.
OWN_WORLD = """
import argparse, datetime, os
import torch, torch.distributed as dist
import zeropipe
parser = argparse.ArgumentParser()
parser.add_argument("--local_rank", type=int, default=int(os.environ["LOCAL_RANK"]))
args = parser.parse_args()
torch.cuda.set_device(args.local_rank)
assert torch.cuda.is_available() and torch.cuda.device_count() == torch.cuda.current_device() + 1 == 1
assert torch.cuda.get_device_properties(0).total_memory == 10**9
dist.init_process_group("nccl", timeout=datetime.timedelta(minutes=1))
dist.init_process_group(backend="nccl", init_method="env://", world_size=int(os.environ["WORLD_SIZE"]))
world, rank = dist.get_world_size(), dist.get_rank()
gloo = dist.new_group(list(range(world)), backend="gloo")
everyone, first, mine = [None] * world, [{"seed": rank}], [None]
dist.all_gather_object(everyone, rank, group=gloo)
dist.broadcast_object_list(first, src=0)
dist.gather_object(rank, everyone if rank == 0 else None)
dist.scatter_object_list(mine, everyone)
dist.monitored_barrier(gloo)
assert everyone == [rank] * world and first == [{"seed": rank}] and mine == [rank]
ready = torch.ones(1, device="cuda")
dist.all_reduce(ready)
start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
start.record(), end.record(), torch.cuda.synchronize()
assert start.elapsed_time(end) == 0.0
with torch.cuda.stream(torch.cuda.Stream()), torch.autocast("cuda"):
    assert torch.nn.functional.linear(ready, ready.view(1, 1)).dtype == torch.float16
assert torch.empty(3, pin_memory=True).pin_memory().cuda(non_blocking=True).numel() == 3
device = torch.device("cuda", args.local_rank)
"""
WITH_WORKERS = """
import torch, zeropipe
class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 24
    def __getitem__(self, index):
        return torch.randn(256, 256)
model = torch.nn.Linear(256, 256)
config = {"train_micro_batch_size_per_gpu": 2, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}
engine, _, loader, _ = zeropipe.initialize(model=model, config=config, training_data=Data())
own = torch.utils.data.DataLoader(Data(), batch_size=2, num_workers=2, pin_memory=True, persistent_workers=True)
for x, y in zip(own, loader):
    engine.backward(engine(x.to(engine.device) + y.to(engine.device)).square().mean())
    engine.step()
"""


def test_a_script_that_joins_the_world_itself_and_wants_a_gpu(tmp_path: Path) -> None:
    found, options = tmp_path / "plan.json", ["--world", 3, "--device", tmp_path / "one.json"]
    options[-1].write_text(json.dumps({"name": "one", "kind": "cuda", "memory": 10**9, "ranks_per_node": 1}))
    code, text = _run("plan", *options, "--json", found, _script(tmp_path, OWN_WORLD + TRAINS))
    assert code == 0, text
    assert json.loads(found.read_text())["links"].keys() == {"between nodes"}
    assert torch.cuda.is_available.__module__ == "torch.cuda"  # nothing of it is left


def test_a_loader_with_workers(tmp_path: Path) -> None:
    code, text = _run("plan", "--world", 2, _script(tmp_path, WITH_WORKERS))
    assert code == 0, text


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("open('/data/tokens.bin')", "make_batch does"),
        ("loss.item()", "--assume"),
        ("torch.unique(x)", "its shape depends on them"),
        ("x[x > 0]", "its shape depends on them"),
        ("torch.cuda.get_gencode_flags() + torch.cuda.nccl.version()", "what only a device can answer"),
        (
            "dist.init_process_group('nccl', world_size=5)",
            "another world_size than is planned; expected 1, found 5",
        ),
        ("raise KeyError('tokens')", "does it run on one rank"),
        ("os._exit(7)", "exit status 7, after goodbye"),
    ],
)
def test_what_a_rehearsal_cannot_do_is_named_with_its_line(tmp_path: Path, line: str, said: str) -> None:
    text = f"""
import os, sys
import torch, torch.distributed as dist
import zeropipe
model = torch.nn.Linear(256, 256)
engine, *_ = zeropipe.initialize(model=model, config={CONFIG})
x = engine(torch.randn(256, 256))
loss = x.square().mean()
print("goodbye", file=sys.stderr)
{line}  # here
"""
    code, found = _run("plan", _script(tmp_path, text))
    assert code == 1
    assert said in found
    assert "train.py:10" in found or "exit" in line or "init" in line
