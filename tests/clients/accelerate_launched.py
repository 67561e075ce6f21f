"""A script for ``accelerate launch --config_file FILE accelerate_launched.py FOLDER``, which trains as the tests do."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.clients import accelerate_tasks

rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
precision = {"no": "fp32"}.get(
    os.environ["ACCELERATE_MIXED_PRECISION"], os.environ["ACCELERATE_MIXED_PRECISION"]
)
found = accelerate_tasks.loop(rank, world, stage=3, folder=sys.argv[1], how="launch", precision=precision)
if rank == 0:
    torch.save(found, f"{sys.argv[1]}/found.pt")
