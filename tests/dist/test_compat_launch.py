"""The ``deepspeed`` command really starts the ranks, and a script written for DeepSpeed trains under it unchanged."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path

import pytest

from tests.helpers.launch import python, start

SCRIPT = """
import argparse, json, sys
from zeropipe.compat import install_as_deepspeed
install_as_deepspeed()  # what the distribution compat/deepspeed does for every process

import torch
import deepspeed
from deepspeed.ops.adam import FusedAdam
from deepspeed.utils import RepeatingLoader
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

parser = argparse.ArgumentParser()
parser.add_argument("--local_rank", type=int, required=True)
parser.add_argument("--out")
args = deepspeed.add_config_arguments(parser).parse_args()

deepspeed.init_distributed()
torch.manual_seed(0)
with deepspeed.zero.Init(config_dict_or_path=args.deepspeed_config):
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
assert model[0].weight.ds_status is ZeroParamStatus.NOT_AVAILABLE
engine, optimizer, _, _ = deepspeed.initialize(
    args=args, model=model, optimizer=FusedAdam(model.parameters(), lr=0.05)
)
assert type(optimizer.optimizer) is FusedAdam and isinstance(engine, deepspeed.DeepSpeedEngine)
rank = deepspeed.comm.get_rank()
assert args.local_rank == rank
batches = RepeatingLoader([torch.randn(4, 8, generator=torch.Generator().manual_seed(rank)) for _ in range(2)])
losses = []
for _, x in zip(range(12), batches):
    loss = (engine(x).squeeze(-1) - x.sum(-1)).square().mean()
    engine.backward(loss)
    engine.step()
    losses.append(loss.item())
with deepspeed.zero.GatheredParameters(model.parameters()):
    total = sum(p.sum().item() for p in model.parameters())
with open(f"{args.out}.{rank}", "w") as file:
    json.dump({"losses": losses, "total": total, "world": deepspeed.comm.get_world_size()}, file)
"""


@pytest.mark.slow
def test_a_script_for_deepspeed_trains_under_the_command(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    (tmp_path / "ds.json").write_text(json.dumps(config))
    command = ["-m", "zeropipe.compat.runner", "--num_gpus", "2", "train.py", "--deepspeed_config", "ds.json"]
    done = python(*command, "--out", "result", cwd=tmp_path, timeout=240)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"result.{rank}").read_text()) for rank in (0, 1))
    assert first["world"] == second["world"] == 2
    assert first["total"] == second["total"]
    for found in (first, second):
        assert found["losses"][-1] < 0.5 * found["losses"][0]


def test_the_exit_code_of_a_failing_script_is_the_commands(tmp_path: Path) -> None:
    (tmp_path / "fail.py").write_text("raise SystemExit(3)\n")
    done = python("-m", "zeropipe.compat.runner", "fail.py", cwd=tmp_path)
    assert done.returncode == 1 and "exitcode" in done.stderr


NODE = """
import json, os, sys
import torch.distributed as dist
dist.init_process_group("gloo")
names = [None] * dist.get_world_size()
dist.all_gather_object(names, (os.environ["CROSS_RANK"], os.environ["LOCAL_RANK"], sys.argv[1:]))
if dist.get_rank() == 0:
    with open("seen.json", "w") as file:
        json.dump(names, file)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_nodes_each_start_the_command(tmp_path: Path) -> None:
    (tmp_path / "node.py").write_text(NODE)
    (tmp_path / "hosts").write_text("localhost slots=1\n127.0.0.1 slots=2\n")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = f"--hostfile hosts --no_ssh --master_port {port} --node_rank"
    command = [sys.executable, "-m", "zeropipe.compat.runner", *flags.split()]
    with (
        start([*command, "0", "node.py", "x"], cwd=tmp_path) as first,
        start([*command, "1", "node.py", "x"], cwd=tmp_path) as second,
    ):
        for node in (first, second):
            assert node.wait(120), node.stderr()
            assert node.completed().returncode == 0, node.stderr()
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert seen == [[n, r, [f"--local_rank={r}", "x"]] for n, r in (("0", "0"), ("1", "0"), ("1", "1"))]
