"""A script as users start it: ``torchrun --nproc-per-node 2 launched.py FOLDER STAGE [TASK [CHECKPOINT]]``.

It runs with whichever ``deepspeed`` its environment has, zeropipe's or the real one.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.clients import trainer_tasks
from tests.clients.configs import ds_config

# The command ``deepspeed`` adds --local_rank=N, as DeepSpeed's does.
folder, stage, *more = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
task = more[0] if more else "train"
given = {"checkpoint": more[1] if len(more) > 1 else None} if task == "resume" else {}
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
found = getattr(trainer_tasks, task)(
    rank, world, folder=folder, config=ds_config(int(stage)), gradient_accumulation_steps=1, **given
)
if rank == 0:
    torch.save(found, f"{folder}/found.pt")
