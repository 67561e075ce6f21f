"""A process that ends, or ends torch.distributed, while messages are under way: no abort, nothing left for the next."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.launch import run_torchrun

LEAVE = """
import torch
import zeropipe
from zeropipe.comm.collectives import all_gather
from zeropipe.comm.group import world

zeropipe.init_distributed("gloo")
group, kept = world(), []
for number in range(300):
    out = torch.zeros(2**19)
    work = all_gather(
        out, torch.ones(2**18), group, label=str(number), channel=1, guarded=True, async_op=True
    )
    kept.append((out, work))
print("left", flush=True)
"""

ANEW = """
import os
import sys
import torch
import torch.distributed as dist
import zeropipe

rank, path = int(os.environ["RANK"]), sys.argv[1]
zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
optimizer = {"type": "AdamW", "params": {"lr": 0.1}}
config = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": zero, "optimizer": optimizer}


def fail(module, args):
    if module.training and rank == 0 and fails:
        raise ValueError("on purpose")


def step():
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(4)))
    model[2].register_forward_pre_hook(fail)
    engine, *_ = zeropipe.initialize(model=model, config=config)
    engine.backward(engine(torch.ones(4, 8)).square().mean())
    engine.step()
    return engine


for number, fails in enumerate((True, False)):
    dist.init_process_group("gloo", init_method=f"file://{path}/{number}", rank=rank, world_size=2)
    try:
        step()
        sys.stdout.write("trained\\n")
    except (ValueError, zeropipe.errors.DesyncError) as error:
        sys.stdout.write(type(error).__name__ + "\\n")
    dist.barrier()
    dist.destroy_process_group()
"""

ENDED = """
import os
import sys
import torch
import torch.distributed as dist
import zeropipe
from zeropipe.pipe import PipelineModule


def gloo_threads():
    folder = "/proc/self/task"
    names = [open(f"{folder}/{task}/comm").read() for task in os.listdir(folder)]
    return sum(name.startswith("pt_gloo") for name in names)


zeropipe.init_distributed("gloo")
engines = []
for stage in (1, 3):
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    zero = {"stage": stage, **({"mics_shard_size": 1} if stage == 3 else {})}
    config = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": zero, "optimizer": {"type": "AdamW"}}
    engine, *_ = zeropipe.initialize(model=model, config=config)
    engine.backward(engine(torch.ones(4, 8)).square().mean())
    engine.step()
    engines.append(engine)
loss = lambda out, y: (out - y).square().mean()
module = PipelineModule([torch.nn.Linear(8, 8) for _ in range(2)], num_stages=2, loss_fn=loss)
config["zero_optimization"] = {"stage": 0}
engines.append(zeropipe.initialize(model=module, config=config)[0])
engines[-1].train_batch(iter([(torch.ones(4, 8), torch.ones(4, 8))]))
if sys.argv[1] == "destroy":
    for engine in engines:
        engine.destroy()
assert gloo_threads() > 0
dist.barrier()
dist.destroy_process_group()
sys.stdout.write(f"threads: {gloo_threads()}\\n")
"""


@pytest.mark.parametrize("engines", ["destroy", "keep"])
def test_no_thread_outlives_the_process_groups_though_engines_do(tmp_path: Path, engines: str) -> None:
    """Our groups held process groups that had been destroyed. A thread of gloo that let go of its last tensors while
    the interpreter ended then aborted the process, in one run of 23: ``terminate called without an active exception``.
    """
    script = tmp_path / "ended.py"
    script.write_text(ENDED)
    done = run_torchrun(script, 2, [engines])
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("threads: 0") == 2, done.stdout


def test_a_process_may_end_with_messages_under_way(tmp_path: Path) -> None:
    """The thread that hands them over came back into an interpreter that was ending, in one run of five: SIGABRT."""
    script = tmp_path / "leave.py"
    script.write_text(LEAVE)
    done = run_torchrun(script, 2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("left") == 2


def test_a_new_group_of_the_same_ranks_does_not_hear_the_words_of_one_that_ended(tmp_path: Path) -> None:
    script = tmp_path / "anew.py"
    script.write_text(ANEW)
    done = run_torchrun(script, 2, [str(tmp_path)])
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(done.stdout.split()) == ["DesyncError", "ValueError", "trained", "trained"]
