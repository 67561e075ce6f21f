"""Also train a model whose parameters alone are larger than the memory that each process may have."""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common.rounds import ROOT

MARK = "LIMITED "
WIDTH, LAYERS, STEPS = 1024, 192, 2  # matrices of 4 MiB in fp32: 805 MB of parameters, 3.2 GB of state
RANKS = 2
ALLOWANCE = 600e6  # bytes that a process may grow by, once everything is imported: less than the parameters
TIME_LIMIT = 900  # seconds
# glibc keeps freed tensors for later unless it is told a fixed size from which on blocks go back at once.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


@dataclass(frozen=True)
class Outcome:
    """One attempt: `how` it was built, whether it ended well, and the loss or the error."""

    how: str
    trained: bool
    said: str

    def numbers(self) -> dict[str, Any]:
        return asdict(self) | {"parameter_bytes": WIDTH * WIDTH * LAYERS * 4, "allowance": ALLOWANCE}


class Tower(nn.Module):
    """Square layers in a row: its whole size is in matrices that can be fetched one at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x.square().mean()


def play() -> list[Outcome]:
    """The same training under the same limit: whole on every rank, which must fail, and offloaded to a disk."""
    return [_attempt(how) for how in ("plain", "offload")]


def table(outcomes: list[Outcome]) -> str:
    size = WIDTH * WIDTH * LAYERS * 4 / 1e6
    lines = [
        f"A model of {size:.0f} MB of parameters (AdamW: {4 * size:.0f} MB of state) on {RANKS} ranks, each of "
        f"which may grow by {ALLOWANCE / 1e6:.0f} MB:\n",
        "| built | trained | |",
        "|---|---|---|",
        *(f"| {o.how} | {'yes' if o.trained else 'no'} | {o.said} |" for o in outcomes),
    ]
    return "\n".join(lines)


def _attempt(how: str) -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        job = subprocess.run(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"),
                *("-m", "benchmarks.zero3.limited", how, folder),
            ],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **GIVE_BACK},
            capture_output=True,
            text=True,
            timeout=TIME_LIMIT,
        )
    for line in job.stdout.splitlines():
        if line.startswith(MARK):
            return Outcome(how, True, json.loads(line.removeprefix(MARK)))
    errors = [line for line in job.stderr.splitlines() if "Error:" in line and "ChildFailed" not in line]
    return Outcome(how, False, (errors or [f"exit status {job.returncode}"])[0][:200])


def _limit_data() -> None:
    """Let the process's own memory (heap and private mappings; not files) grow by ALLOWANCE and no more."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmData:"):
            now = int(line.split()[1]) * 1024
            resource.setrlimit(resource.RLIMIT_DATA, (int(now + ALLOWANCE),) * 2)


def _train_plain() -> float:
    _limit_data()
    model = Tower()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    loss = torch.zeros(())
    for _ in range(STEPS):
        loss = model(torch.ones(4, WIDTH))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def _train_offloaded(folder: str) -> float:
    import zeropipe

    zeropipe.init_distributed("gloo")
    _limit_data()
    offload = {"device": "nvme", "nvme_path": folder}
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
        "zero_optimization": {"stage": 3, "offload_param": offload, "offload_optimizer": offload},
    }
    with zeropipe.zero.Init(config_dict_or_path=config):
        model = Tower()
    engine, *_ = zeropipe.initialize(model=model, config=config)
    loss = torch.zeros(())
    for _ in range(STEPS):
        loss = engine(torch.ones(4, WIDTH))
        engine.backward(loss)
        engine.step()
    return loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("how", choices=("plain", "offload"))
    parser.add_argument("folder")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    loss = _train_plain() if args.how == "plain" else _train_offloaded(args.folder)
    if os.environ["RANK"] == "0":
        print(MARK + json.dumps(f"loss {loss:.6f} after {STEPS} steps"), flush=True)
    sys.stdout.flush()
    os._exit(0)  # not one more allocation


if __name__ == "__main__":
    main()
