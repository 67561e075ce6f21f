"""The launchers that users have: what they start trains as the ranks of the other tests do."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path

import pytest
import torch

from tests.clients.compare import assert_same_story
from tests.clients.configs import ds_config, offloaded
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


@pytest.mark.parametrize(("how", "precision"), [("numbers", "no"), ("numbers", "bf16"), ("file", "no")])
def test_accelerate_launch_with_a_config_file(ranks: Ranks, tmp_path, how: str, precision: str):
    """``numbers``: the YAML file has DeepSpeed's settings; ``file``: it names a file that has them."""
    settings: dict[str, object] = {"zero3_init_flag": False, "zero3_save_16bit_model": True}
    if how == "file":
        (tmp_path / "ds.json").write_text(json.dumps(ds_config(3, gradient_clipping=0.0, zero=offloaded(3))))
        settings = {"deepspeed_config_file": str(tmp_path / "ds.json"), "zero3_init_flag": False}
    else:
        settings |= {
            "zero_stage": 3,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 1e6,
            "offload_optimizer_device": "cpu",
            "offload_param_device": "cpu",
        }
    config = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "DEEPSPEED",
        "deepspeed_config": settings,
        "machine_rank": 0,
        "main_process_port": free_port(),
        "mixed_precision": precision,
        "num_machines": 1,
        "num_processes": 2,
        "use_cpu": False,
    }
    if how == "file":
        del config["mixed_precision"]  # the file says it
    file = tmp_path / "accelerate.yaml"
    file.write_text(json.dumps(config))  # JSON is YAML
    command = str(Path(sys.executable).parent / "accelerate")
    script = str(SCRIPT.with_name("accelerate_launched.py"))
    ended = python(
        command, "launch", "--config_file", str(file), script, str(tmp_path), env=SETTINGS, timeout=280
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    given = {"stage": None, "folder": str(tmp_path), "precision": "bf16" if precision == "bf16" else "fp32"}
    assert_same_story(found, ranks.run("accelerate_tasks.loop", **given)[0], "losses", "rates")
