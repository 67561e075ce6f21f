"""Train the small GPT through whatever happens to its ranks: kill one, stop the run, start it again on more or fewer.

    torchrun --standalone --nproc_per_node 2 --max-restarts 9 examples/train_elastic.py

It says the processes' numbers; `kill -9` one of them, or `kill` torchrun and type the command again, with
`--nproc_per_node 3` for example. Over several hosts, from one to four of which may be there:

    torchrun --nnodes 1:4 --nproc_per_node 2 --max-restarts 99 \\
        --rdzv_backend c10d --rdzv_endpoint HOST:29400 examples/train_elastic.py
"""

import argparse
import logging
import os
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

import zeropipe
from gpt import GPT, GPTConfig, parameter_groups
from support.text import Text, read_text

CONTEXT = GPTConfig.context
CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "reproducible": {"slots": 12},  # the batch, and the same weights at the end, whatever the number of ranks
    "checkpoint": {"memory": {"every": 1}},  # where ranks that are started anew go on
    "gradient_clipping": 1.0,
    "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "betas": [0.9, 0.95], "weight_decay": 0.1}},
    "zero_optimization": {"stage": 2},
}


class Windows(Dataset):
    """A text cut into windows of the model's context: the inputs, and the bytes that follow them."""

    def __init__(self, text: Text) -> None:
        self.bytes = text.train

    def __len__(self) -> int:
        return (len(self.bytes) - 1) // CONTEXT

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        window = self.bytes[number * CONTEXT : (number + 1) * CONTEXT + 1].long()
        return window[:-1], window[1:]


def train(run: zeropipe.Run) -> None:
    text = read_text(args.text, CONTEXT)
    torch.manual_seed(0)  # the same weights on every rank
    model = GPT()
    engine, *_ = zeropipe.initialize(
        model=model, model_parameters=parameter_groups(model), training_data=Windows(text), config=CONFIG
    )
    rank, ranks = zeropipe.comm.get_rank(), zeropipe.comm.get_world_size()
    said = -1
    for x, y in run.batches(engine, until=args.steps):
        if said < 0:
            said = engine.global_steps
            source, pid = run.resumed.source, os.getpid()
            say(f"rank {rank} of {ranks} is process {pid}, and begins at step {said} ({source})")
        loss = engine(x.to(engine.device), y.to(engine.device))
        engine.backward(loss)
        engine.step()
        if rank == 0 and engine.global_steps >= said + args.say_every:
            said = engine.global_steps
            say(f"step {said}: loss {loss.item():.3f}, {ranks} ranks")
    if rank == 0:
        say(f"done: {engine.global_steps} steps are in {args.folder}")


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")  # in one piece: the ranks share a terminal
    sys.stdout.flush()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/elastic"), help="of the checkpoints")
    parser.add_argument(
        "--text", type=Path, default=None, help="a file or folder; default the standard library"
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--save-every", type=int, default=20)
    parser.add_argument("--say-every", type=int, default=10)
    args = parser.parse_args()
    logging.basicConfig(format="%(message)s")
    zeropipe.run(train, args.folder, save_every=args.save_every)
