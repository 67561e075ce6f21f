"""The example of a run that survives, under torchrun itself: ranks die, hosts come and go, and it ends."""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.helpers.launch import ROOT, Started, start

pytestmark = [pytest.mark.soak, pytest.mark.timeout(600)]
SCRIPT = ROOT / "examples" / "train_elastic.py"
PATIENCE = 120.0  # s for the next line of a busy machine


@pytest.fixture
def options(tmp_path: Path) -> list[str]:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"the {n}th line says {n * n}\n" for n in range(4000)))
    return [
        os.fspath(SCRIPT),
        f"--folder={tmp_path / 'run'}",
        f"--text={text}",
        "--save-every=2",
        "--say-every=1",
    ]


@pytest.fixture
def hosts() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def torchrun(stack: ExitStack, launcher: list[str], options: list[str]) -> Started:
    # Shared, the store of the first round is not told to hosts that come later, and both sides wait (torch 2.13).
    apart = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return stack.enter_context(
        start([sys.executable, "-m", "torch.distributed.run", *launcher, *options], env=apart)
    )


def wait_for(any_of: list[Started], text: str) -> None:
    end = time.monotonic() + PATIENCE
    while not any(text in one.stdout() for one in any_of):
        assert time.monotonic() < end, "\n".join(one.stdout() + one.stderr() for one in any_of)
        time.sleep(0.1)


def processes(started: Started) -> list[int]:
    """The ranks' processes of the newest life, by rank."""
    found = re.findall(r"rank (\d+) of (\d+) is process (\d+)", started.stdout())
    return [int(pid) for _, _, pid in found[-int(found[-1][1]) :]]


def steps(started: Started) -> list[int]:
    return [int(step) for step in re.findall(r"^step (\d+):", started.stdout(), re.MULTILINE)]


def test_one_host_whose_ranks_die(options: list[str], hosts: ExitStack) -> None:
    started = torchrun(
        hosts, ["--standalone", "--nproc-per-node=2", "--max-restarts=3"], [*options, "--steps=9"]
    )
    for until in (3, 6):
        assert started.wait_for(f"step {until}:", PATIENCE), started.stderr()
        os.kill(processes(started)[1], signal.SIGKILL)
        assert started.wait_for("failed (exitcode: -9)", PATIENCE), started.stderr()
    assert started.wait(PATIENCE), started.stdout()
    done = started.completed()
    assert done.returncode == 0, done.stderr
    assert "done: 9 steps are in" in done.stdout
    begins = [int(step) for step in re.findall(r"rank 0 of 2 .* begins at step (\d+)", done.stdout)]
    assert begins[0] == 0 and begins[1] in (2, 3) and begins[2] in (4, 5, 6)


def test_a_run_that_is_stopped_and_goes_on_with_another_number_of_ranks(
    options: list[str], hosts: ExitStack
) -> None:
    launcher = ["--standalone", "--max-restarts=3", "--nproc-per-node"]
    first = torchrun(hosts, [*launcher, "2"], [*options, "--steps=7"])
    assert first.wait_for("step 3:", PATIENCE), first.stderr()
    first.signal(signal.SIGTERM)
    assert first.wait(PATIENCE)
    assert "the run is stopped by SIGTERM" in first.stderr()
    saved = int(re.findall(r"step (\d+) is saved in", first.stderr())[0])
    second = torchrun(hosts, [*launcher, "3"], [*options, "--steps=7"])
    assert second.wait(PATIENCE), second.stderr()
    assert f"rank 0 of 3 is process {processes(second)[0]}, and begins at step {saved}" in second.stdout()
    assert steps(second) == list(range(saved + 1, 8)), second.stderr()


def test_hosts_that_come_and_go(options: list[str], hosts: ExitStack) -> None:
    """Three agents stand for hosts, of which one to three may be there."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    conf = "last_call_timeout=3,keep_alive_interval=2,keep_alive_max_attempt=5"
    launcher = [
        "--nnodes=1:3", "--nproc-per-node=1", "--max-restarts=9", "--rdzv-backend=c10d", "--rdzv-id=elastic",
        f"--rdzv-endpoint=127.0.0.1:{port}", f"--rdzv-conf={conf}", "--local-addr=127.0.0.1",
    ]  # fmt: skip
    options = [*options, "--steps=40"]
    first = torchrun(hosts, launcher, options)
    wait_for([first], "rank 0 of 1 is process")
    # A host comes: the ranks are told to end, save, and meet the newcomer.
    second = torchrun(hosts, launcher, options)
    wait_for([first, second], "rank 0 of 2 is process")
    assert "the run is stopped by SIGTERM" in first.stderr(), "nothing is lost where a host comes"
    third = torchrun(hosts, launcher, options)
    wait_for([first, second, third], "3 ranks")
    # A host is lost, with its agent.
    third.kill()
    for host in (first, second):
        assert host.wait(2 * PATIENCE), host.stdout() + host.stderr()
        assert host.completed().returncode == 0, host.stderr()
    told = first.stdout() + second.stdout()
    assert "done: 40 steps are in" in told
    worlds = {int(step): int(ranks) for step, ranks in re.findall(r"step (\d+): .* (\d) ranks", told)}
    assert worlds[40] == 2 and worlds[1] == 1, told
