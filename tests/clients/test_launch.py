"""The launchers that users have: what they start trains as the ranks of the other tests do."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest
import torch

from tests.clients.compare import assert_same_story
from tests.clients.configs import ds_config
from tests.clients.ranks import SETTINGS, Ranks
from tests.helpers.launch import python


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


SCRIPT = Path(__file__).parent / "launched.py"
LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"],
    "deepspeed": [
        str(Path(sys.executable).parent / "deepspeed"),
        "--num_gpus",
        "2",
        "--master_port",
        str(free_port()),
    ],
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_script_under_a_launcher(ranks: Ranks, tmp_path, launcher: str):
    ended = python(*LAUNCHERS[launcher], str(SCRIPT), str(tmp_path), "3", env=SETTINGS, timeout=280)
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    given = {"folder": str(tmp_path), "config": ds_config(3), "gradient_accumulation_steps": 1}
    assert_same_story(found, ranks.run("trainer_tasks.train", **given)[0], "losses", "eval", "lrs", "norms")
