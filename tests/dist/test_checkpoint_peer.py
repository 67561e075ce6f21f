"""Side by side with real DeepSpeed: it loads what we write and we load what it writes, with the same losses after.

Needs an interpreter that has DeepSpeed (tried: 0.19.8 with torch 2.13.0): set ``ZEROPIPE_PEER_PYTHON`` to it.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

PEER = os.environ.get("ZEROPIPE_PEER_PYTHON", "")
pytestmark = [
    pytest.mark.peer,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not PEER, reason="ZEROPIPE_PEER_PYTHON does not name an interpreter with DeepSpeed"),
]

SCRIPT = """
import sys, torch
import torch.distributed as dist

peer, stage, dtype, load, save = sys.argv[1:6]
if peer == "peer":
    import deepspeed as system
    import deepspeed.comm.torch
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda *a, **k: None  # compiles for minutes, unused here
else:
    import zeropipe as system


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


torch.manual_seed(0)
model = Model()
config = {
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "Adam", "params": {"lr": 1e-2, "torch_adam": True}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 5}},
    "zero_optimization": {"stage": int(stage)},
    "gradient_clipping": 0.0,
    "zero_allow_untested_optimizer": True,
}
if dtype != "fp32":
    config[dtype] = {"enabled": True}
decay = [p for p in model.parameters() if p.ndim > 1 and p.requires_grad]
plain = [p for p in model.parameters() if p.ndim <= 1 and p.requires_grad]
groups = [{"params": decay}, {"params": plain, "weight_decay": 0.0}]
engine, *_ = system.initialize(model=model, config=config, model_parameters=groups)
if load != "-":
    path, client = engine.load_checkpoint(load)
    assert path is not None and client["hello"] == 8, (path, client)
losses = []
for step in range(engine.global_steps, engine.global_steps + 3):
    torch.manual_seed(100 + 2 * step + dist.get_rank())
    loss = engine(torch.randint(0, 11, (2,)), torch.randint(0, 11, (2,)))
    engine.backward(loss)
    engine.step()
    losses.append(loss.item())
if save != "-":
    engine.save_checkpoint(save, client_state={"hello": 8})
print(f"\\nLOSSES {dist.get_rank()} {losses}", flush=True)
dist.barrier()
dist.destroy_process_group()
"""


def run(folder: Path, peer: bool, stage: int, dtype: str, load: Path | None, save: Path | None) -> list[str]:
    script = folder / "train.py"
    script.write_text(SCRIPT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [PEER if peer else sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--master_port", str(port), str(script), "peer" if peer else "ours", str(stage), dtype]
    command += [str(load or "-"), str(save or "-")]
    env = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr[-3000:]
    return sorted(line for line in done.stdout.splitlines() if line.startswith("LOSSES"))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_both_ways(tmp_path: Path, stage: int, dtype: str) -> None:
    if (stage, dtype) == (0, "bf16"):
        pytest.skip("DeepSpeed's own stage 0 in bf16 keeps its state in another format")
    theirs, ours, back = tmp_path / "theirs", tmp_path / "ours", tmp_path / "back"
    run(tmp_path, True, stage, dtype, None, theirs)
    expected = run(tmp_path, True, stage, dtype, theirs, None)
    assert run(tmp_path, False, stage, dtype, theirs, ours) == expected
    later = run(tmp_path, False, stage, dtype, ours, None)
    assert later != expected
    convert = ["ckpt", "convert", str(ours), str(back), "--to", "deepspeed"]
    code = "from zeropipe.cli.main import main; main()"
    subprocess.run([sys.executable, "-c", code, *convert], check=True, capture_output=True)
    assert run(tmp_path, True, stage, dtype, back, None) == later
