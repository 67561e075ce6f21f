"""Runs one training script under zeropipe or under real DeepSpeed, from and to checkpoints, in its own processes.

Needs an interpreter that has DeepSpeed (tried: 0.19.8 with torch 2.13.0): set ``ZEROPIPE_PEER_PYTHON`` to it.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PEER = os.environ.get("ZEROPIPE_PEER_PYTHON", "")
MARKS = [
    pytest.mark.peer,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not PEER, reason="ZEROPIPE_PEER_PYTHON does not name an interpreter with DeepSpeed"),
]

SCRIPT = """
import json, sys, torch
import torch.distributed as dist

job = json.loads(sys.argv[1])
if job["peer"]:
    import deepspeed as system
    import deepspeed.comm.torch
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda *a, **k: None  # compiles for minutes, unused here
    from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
else:
    import zeropipe as system
    from zeropipe.pipe import LayerSpec, PipelineModule, TiedLayerSpec


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = torch.nn.Embedding(11, 6)
        self.one = torch.nn.Linear(6, 7)
        self.frozen = torch.nn.Linear(7, 7).requires_grad_(False)
        self.two = torch.nn.Linear(7, 6, bias=False)
        self.out = torch.nn.Linear(6, 11, bias=False)
        self.out.weight = self.emb.weight
        self.register_buffer("count", torch.arange(5.0))

    def forward(self, x, y):
        h = self.two(torch.tanh(self.frozen(torch.tanh(self.one(self.emb(x))))))
        return torch.nn.functional.cross_entropy(self.out(h).float(), y)


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(6, 6)

    def forward(self, x):
        return x + torch.tanh(self.linear(x))


def unembed(module, h):
    return torch.nn.functional.linear(h, module.weight)


def pipeline():
    embed = (torch.nn.Embedding, 11, 6)
    if job["pipe"] == "tied":
        layers = [TiedLayerSpec("embed", *embed), *[LayerSpec(Block)] * 3]
        layers.append(TiedLayerSpec("embed", *embed, forward_fn=unembed))
    else:
        layers = [LayerSpec(*embed), *[LayerSpec(Block)] * 3, LayerSpec(torch.nn.Linear, 6, 11)]
    return PipelineModule(
        layers, num_stages=job["stages"], loss_fn=torch.nn.CrossEntropyLoss(), partition_method="uniform",
        seed_layers=True,
    )


system.init_distributed("gloo")
torch.manual_seed(0)
model = pipeline() if job["pipe"] else Model()
config = {
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "Adam", "params": {"lr": 1e-2, "torch_adam": True}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 5}},
    "zero_optimization": {"stage": job["stage"]},
    "gradient_clipping": 0.0,
    "zero_allow_untested_optimizer": True,
    "checkpoint": {"load_universal": job["universal"]},
}
if job["dtype"] != "fp32":
    config[job["dtype"]] = {"enabled": True}
if job["pipe"]:
    config["gradient_accumulation_steps"] = 2
    groups = [p for p in model.parameters()]
else:
    decay = [p for p in model.parameters() if p.ndim > 1 and p.requires_grad]
    plain = [p for p in model.parameters() if p.ndim <= 1 and p.requires_grad]
    groups = [{"params": decay}, {"params": plain, "weight_decay": 0.0}]
engine, *_ = system.initialize(model=model, config=config, model_parameters=groups)
if job["load"]:
    path, client = engine.load_checkpoint(job["load"])
    assert path is not None and client["hello"] == 8, (path, client)


def batch(seed):
    torch.manual_seed(seed)
    return torch.randint(0, 11, (2,)), torch.randint(0, 11, (2,))


losses = []
for step in range(engine.global_steps, engine.global_steps + 3):
    if job["pipe"]:
        losses.append(engine.train_batch(iter([batch(100 + 2 * step + i) for i in range(2)])).item())
        continue
    loss = engine(*batch(100 + 2 * step + (dist.get_rank() if job["apart"] else 0)))
    engine.backward(loss)
    engine.step()
    losses.append(loss.item())
if job["save"]:
    engine.save_checkpoint(job["save"], client_state={"hello": 8})
print(f"\\nLOSSES {dist.get_rank()} {losses}", flush=True)
dist.barrier()
dist.destroy_process_group()
"""


def run(
    folder: Path,
    peer: bool,
    stage: int = 1,
    dtype: str = "fp32",
    load: Path | None = None,
    save: Path | None = None,
    *,
    ranks: int = 2,
    pipe: str = "",
    stages: int = 1,
    universal: bool = False,
    apart: bool = True,
) -> list[str]:
    """Three steps; ``LOSSES rank [...]`` of each rank. ``apart``: ranks get different batches."""
    script = folder / "train.py"
    script.write_text(SCRIPT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job: dict[str, Any] = {"peer": peer, "stage": stage, "dtype": dtype, "pipe": pipe, "stages": stages}
    job |= {"load": str(load or ""), "save": str(save or ""), "universal": universal, "apart": apart}
    command = [
        PEER if peer else sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        str(ranks),
    ]
    command += ["--master_port", str(port), str(script), json.dumps(job)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr[-3000:]
    return sorted(line for line in done.stdout.splitlines() if line.startswith("LOSSES"))


def peer_tool(module: str, *arguments: object) -> None:
    """One of DeepSpeed's command-line tools."""
    command = [PEER, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr[-3000:]


def peer_fp32(folder: Path, output: Path) -> None:
    """What DeepSpeed's ``zero_to_fp32`` finds, in one file; its command would also need huggingface_hub."""
    code = "import sys, torch; from deepspeed.utils.zero_to_fp32 import *; "
    code += "torch.save(get_fp32_state_dict_from_zero_checkpoint(sys.argv[1]), sys.argv[2])"
    command = [PEER, "-c", code, str(folder), str(output)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr[-3000:]


def zeropipe_tool(*arguments: object) -> None:
    code = "from zeropipe.cli.main import main; main()"
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
