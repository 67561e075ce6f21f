"""A script as users start it: ``torchrun --nproc-per-node 2 launched.py FOLDER STAGE``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.clients.configs import ds_config
from tests.clients.trainer_tasks import train

folder, stage = sys.argv[1], int(sys.argv[2])
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
found = train(rank, world, folder=folder, config=ds_config(stage), gradient_accumulation_steps=1)
if rank == 0:
    torch.save(found, f"{folder}/found.pt")
