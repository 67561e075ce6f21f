"""The ``deepspeed`` command: every flag becomes torchrun's, or says why not; and it becomes torchrun itself."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from zeropipe.compat import runner
from zeropipe.compat.runner import Launch, Slots, build_parser, parse_cores, plan
from zeropipe.errors import ConfigError

TWO: Slots = {"worker-0": (0, 1, 2, 3), "worker-1": (0, 1, 2, 3)}
SCRIPT = ("train.py", "--local_rank=${local_rank}")


def launch(line: str, hosts: Slots | None = None, devices: int = 0, cores: int = 8) -> Launch:
    return plan(build_parser().parse_args(line.split()), hosts, devices, range(cores))


def arguments(line: str, **where: Any) -> tuple[str, ...]:
    return launch(line, **where).arguments


ONE = ("--nnodes=1", "--nproc-per-node=2", "--standalone")
AT = ("--nnodes=1", "--nproc-per-node=2", "--node-rank=0")
FLAGS = [
    # line, GPUs, torchrun's arguments before the script, CUDA_VISIBLE_DEVICES
    ("", 0, ("--nnodes=1", "--nproc-per-node=1", "--standalone"), None),
    ("", 4, ("--nnodes=1", "--nproc-per-node=4", "--standalone"), None),
    ("--num_gpus 2", 0, ONE, None),
    ("--num_gpus=2", 4, ONE, "0,1"),
    ("--num_accelerators 2", 2, ONE, None),
    ("--num_nodes 1 --num_gpus 2", 2, ONE, None),
    ("--include localhost:1,3", 4, ONE, "1,3"),
    ("-i localhost:0,1", 0, ONE, None),
    ("--exclude localhost:0,2", 4, ONE, "1,3"),
    ("--num_gpus 2 --master_port 1234", 0, (*AT, "--master-addr=127.0.0.1", "--master-port=1234"), None),
    ("--num_gpus 2 --master_addr ::1", 0, (*AT, "--master-addr=::1", "--master-port=29500"), None),
    ("--num_gpus 2 --enable_each_rank_log logs", 0, (*ONE, "--log-dir=logs", "--redirects=3"), None),
    ("--num_gpus 2 --module", 0, (*ONE, "--module"), None),
    ("--num_gpus 2 --no_python", 0, (*ONE, "--no-python"), None),
    ("--num_gpus 2 --bind_cores_to_rank", 2, (*ONE, "--numa-binding=node"), None),
    ("--num_gpus 2 --launcher pdsh --no_ssh_check", 0, ONE, None),
]  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "devices", "expected", "visible"), FLAGS, ids=[f[0] or "none" for f in FLAGS]
)
def test_a_flag_becomes_torchruns(flags: str, devices: int, expected: Any, visible: str | None) -> None:
    found = launch(f"{flags} train.py", devices=devices)
    assert found.arguments == (*expected, *SCRIPT)
    assert found.environment.get("CUDA_VISIBLE_DEVICES") == visible


def test_torchrun_knows_every_argument() -> None:
    from torch.distributed.run import get_args_parser

    for flags, devices, *_ in FLAGS:
        parsed = get_args_parser().parse_args(list(arguments(f"{flags} train.py -x 1", devices=devices)))
        assert parsed.training_script == "train.py"
        assert parsed.training_script_args == ["--local_rank=${local_rank}", "-x", "1"]


def test_the_scripts_arguments_arrive_as_they_are() -> None:
    line = "--num_gpus 2 train.py --b --num_gpus 7 -i x --local $HOME ${local_rank}"
    assert arguments(line)[4:] == (
        "--local_rank=${local_rank}", "--b", "--num_gpus", "7", "-i", "x", "--local", "$$HOME", "$${local_rank}"
    )  # fmt: skip
    assert arguments("--no_local_rank train.py a")[3:] == ("train.py", "a")
    from torch.distributed.elastic.utils.api import macros

    passed = macros.substitute(list(arguments(line)[4:]), "1")
    assert passed[0] == "--local_rank=1" and passed[-2:] == ["$HOME", "${local_rank}"]


def test_several_nodes_each_start_the_command() -> None:
    line = "--no_ssh --node_rank 1 --master_port 1 train.py"
    found = launch(line, hosts=TWO, devices=4)
    assert found.arguments == (
        "--nnodes=2", "--nproc-per-node=4", "--node-rank=1", "--master-addr=worker-0", "--master-port=1", *SCRIPT
    )  # fmt: skip
    assert found.environment == {"LOCAL_SIZE": "4", "CROSS_RANK": "1", "CROSS_SIZE": "2"}
    some = launch(f"--exclude worker-1:0 {line}", hosts=TWO, devices=4)
    assert some.arguments[1] == "--nproc-per-node=3"
    assert some.environment["CUDA_VISIBLE_DEVICES"] == "1,2,3"
    alike = arguments("--num_nodes 3 --num_gpus 2 --no_ssh --node_rank 2 --master_addr a train.py")
    assert alike[:5] == (
        "--nnodes=3", "--nproc-per-node=2", "--node-rank=2", "--master-addr=a", "--master-port=29500"
    )  # fmt: skip
    assert (
        arguments("--force_multi --no_ssh --node_rank 0 train.py", hosts={"far": (0,)})[3]
        == "--master-addr=far"
    )


def test_without_no_ssh_the_lines_to_start_are_given() -> None:
    with pytest.raises(ConfigError) as caught:
        launch("--num_gpus 2 train.py --name 'a", hosts=TWO)
    message = str(caught.value)
    assert (
        "does not log in to other nodes (worker-0, worker-1). Fix: start it on every node with --no_ssh"
        in message
    )
    for rank in (0, 1):
        assert (
            f"worker-{rank}: torchrun --nnodes=2 --node-rank={rank} --nproc-per-node=2 --master-addr=worker-0 "
            "--master-port=29500 train.py '--local_rank=${local_rank}' --name ''\"'\"'a'"
        ) in message
    with pytest.raises(ConfigError, match=r"--master-port=29500 --module package\.train --name a"):
        launch("--num_gpus 2 --module --no_local_rank package.train --name a", hosts=TWO)


def test_binding() -> None:
    assert launch("--num_gpus 2 --bind_cores_to_rank train.py").environment["OMP_NUM_THREADS"] == "4"
    found = launch("--num_gpus 2 --bind_core_list 0-2,5 train.py")
    assert (found.cores, found.environment["OMP_NUM_THREADS"]) == ((0, 1, 2, 5), "2")
    assert launch("--num_gpus 16 --bind_cores_to_rank train.py").environment["OMP_NUM_THREADS"] == "1"
    assert "OMP_NUM_THREADS" not in launch("train.py").environment
    assert parse_cores("") == () and parse_cores("7,1-3,2") == (1, 2, 3, 7)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("--autotuning run train.py", "--autotuning is not part of zeropipe.*Fix"),
        ("--module --no_python train.py", "exclude each other"),
        ("--bind_core_list 3-1 train.py", "--bind_core_list; expected numbers and ranges, found '3-1'"),
        ("--num_gpus 9 train.py", r"--num_gpus; expected 1 to 4 \(slots on localhost\), found 9"),
        ("--num_nodes 2 --no_ssh --master_addr a train.py", "--node_rank; expected 0 to 1.*Fix"),
        ("--num_nodes 2 --no_ssh --node_rank 2 --master_addr a train.py", "--node_rank.*found 2"),
        ("--num_nodes 2 --no_ssh --node_rank 0 train.py", "--master_addr is missing.*Fix"),
    ],
)
def test_what_cannot_be_followed_is_said(line: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        launch(line, devices=4)


def test_the_environment_file_is_read(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    assert runner.read_environment_file([tmp_path, home]) == {}
    (home / runner.DEEPSPEED_ENVIRONMENT_NAME).write_text("A=1\n# B=2\nC=x=y\n\nnonsense\n")
    assert runner.read_environment_file([tmp_path, home]) == {"A": "1", "C": "x=y"}


class Became(Exception):
    """What would have replaced the process."""


@pytest.fixture
def became(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    def execve(path: str, argv: list[str], env: dict[str, str]) -> None:
        raise Became(path, argv, env)

    monkeypatch.setattr(os, "execve", execve)
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cores: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(runner, "DEFAULT_HOSTFILE", str(tmp_path / "no-hostfile"))
    monkeypatch.chdir(tmp_path)

    def run(*argv: str) -> tuple[str, list[str], dict[str, str]]:
        with pytest.raises(Became) as caught:
            runner.main(argv)
        return caught.value.args  # type: ignore[return-value]

    return run


def test_it_becomes_torchrun(became: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, argv, env = became("--num_gpus", "2", "train.py", "a b")
    assert path == argv[0] == sys.executable
    assert argv[1:] == ["-m", "torch.distributed.run", *ONE, *SCRIPT, "a b"]
    assert env["LOCAL_SIZE"] == "2" and env["PATH"] == os.environ["PATH"]
    assert capsys.readouterr() == ("", "")
    (tmp_path / "hosts").write_text("worker-0 slots=1\nworker-1 slots=1\n")
    (tmp_path / runner.DEEPSPEED_ENVIRONMENT_NAME).write_text("ACCELERATE_X=5\n")
    _, argv, env = became(*["--hostfile", "hosts", "--no_ssh", "--node_rank", "1", "--save_pid", "train.py"])
    assert "--node-rank=1" in argv and env["ACCELERATE_X"] == "5"
    assert capsys.readouterr().err.startswith("deepspeed: without effect: --save_pid (")
    became("-q", "--save_pid", "train.py")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--hostfile", "nowhere", "train.py"], "deepspeed: error: --hostfile nowhere cannot be read"),
        (["--autotuning", "run", "train.py"], "deepspeed: error: --autotuning is not part of zeropipe"),
    ],
)
def test_an_error_is_one_sentence(became: Any, argv: list[str], says: str) -> None:
    with pytest.raises(SystemExit) as caught:
        runner.main(argv)
    assert str(caught.value.code).startswith(says)
