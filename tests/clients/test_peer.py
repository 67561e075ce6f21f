"""Checkpoints go from real DeepSpeed to zeropipe and back, through transformers' Trainer.

    ZEROPIPE_PEER_PYTHON=.venv-peer/bin/python make test-clients ARGS="-m peer"

The peer's environment has transformers, accelerate and deepspeed==0.19.8 (see docs/clients.md).
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.clients.compare import assert_close
from tests.clients.configs import ds_config
from tests.clients.ranks import SETTINGS, Ranks

PEER = os.environ.get("ZEROPIPE_PEER_PYTHON")
SCRIPT = Path(__file__).parent / "launched.py"
# Ours cuts shards at whole cache lines and DeepSpeed's does not, so three steps of Adam may differ by some ulps of
# a weight; Adam's first steps make an ulp of a gradient near eps a small part of the rate of 0.01.
PEER_BOUND = 2e-6

pytestmark = [
    pytest.mark.peer,
    pytest.mark.timeout(900),
    pytest.mark.skipif(PEER is None, reason="clients: ZEROPIPE_PEER_PYTHON names no environment"),
]


def peer(folder: Path, stage: int, checkpoint: str | None = None) -> dict[str, Any]:
    """``trainer_tasks.resume`` under real DeepSpeed, on two ranks."""
    assert PEER is not None
    launch = [PEER, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(SCRIPT)]
    more = [str(folder), str(stage), "resume", *([checkpoint] if checkpoint else [])]
    path = f"{Path(PEER).parent}{os.pathsep}{os.environ['PATH']}"  # its ninja builds its communication once
    env = {**os.environ, **SETTINGS, "PATH": path}
    ended = subprocess.run([*launch, *more], env=env, capture_output=True, text=True, timeout=280)
    assert ended.returncode == 0, ended.stderr[-4000:]
    return torch.load(folder / "found.pt", weights_only=True)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_checkpoints_of_the_peer_resume_here_and_ours_there(ranks: Ranks, tmp_path: Path, stage: int):
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    theirs.mkdir()
    ours.mkdir()
    given = {"config": ds_config(stage), "gradient_accumulation_steps": 1}
    expected = peer(theirs, stage)
    found = ranks.run("trainer_tasks.resume", folder=str(ours), checkpoint=None, **given)[0]
    assert_close(found["weights"], expected["weights"], PEER_BOUND)
    here = ranks.run(
        "trainer_tasks.resume", folder=str(theirs), checkpoint=str(theirs / "checkpoint-3"), **given
    )[0]
    assert_close(here["weights"], expected["weights"], PEER_BOUND)
    there = peer(ours, stage, checkpoint=str(ours / "checkpoint-3"))
    assert_close(there["weights"], expected["weights"], PEER_BOUND)
