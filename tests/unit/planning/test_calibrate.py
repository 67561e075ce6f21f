"""A device that was measured explains what was measured, and its profile is one that ``--device`` takes."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from zeropipe.cli.main import app
from zeropipe.comm.collectives import all_reduce
from zeropipe.comm.group import world
from zeropipe.errors import UsageError
from zeropipe.planning.calibrate import _Found, device_from
from zeropipe.planning.crew import crew
from zeropipe.planning.devices import device_of
from zeropipe.planning.work import Kernel

pytestmark = pytest.mark.process
MB = 2**20


@pytest.fixture(autouse=True)
def _no_world() -> None:
    """Ranks are forked from a process that has joined no world, and other tests of this one have left theirs."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _sum(rank: int) -> float:
    tensor = torch.full((3,), float(rank + 1))
    all_reduce(tensor, world()).wait()
    return tensor[0].item()


def test_ranks_are_a_world() -> None:
    assert crew(_sum, 3) == [6.0, 6.0, 6.0]


def _one_fails(rank: int) -> None:
    if rank == 1:
        raise ValueError("no such thing")
    time.sleep(60)


def _one_dies(rank: int) -> None:
    if rank == 0:
        os._exit(1)
    time.sleep(60)


@pytest.mark.parametrize(("task", "says"), [(_one_fails, "no such thing"), (_one_dies, "rank 0. died")])
def test_a_rank_that_fails_ends_all(task: object, says: str) -> None:
    began = time.monotonic()
    with pytest.raises(UsageError, match=says):
        crew(task, 2)  # type: ignore[arg-type]
    assert time.monotonic() - began < 20


def _found(slow: float = 1.0) -> _Found:
    """What a rank of a machine with round figures would measure."""
    kernels = [
        (Kernel("", "mm", 10**9, MB, "float32"), 0.01 * slow),
        (Kernel("", "mm", 10**9, MB, "bfloat16"), 0.002 * slow),
        (Kernel("", "add", 0, 10**7, "float32"), 0.001 * slow),
        (Kernel("", "gelu", 0, 10**7, "float32"), 0.004 * slow),
        (Kernel("", "gelu", 0, 10**7, "bfloat16"), 0.005 * slow),
    ]
    links = {"all_gather": 0.0101, "reduce_scatter": 0.0202, "all_reduce": 0.0303, "send": 0.02}
    small = {f"small {op}": 1e-4 for op in links}
    return _Found(kernels, 2e-5, 1e-4, links | small, 0.5, 300 * MB, 8 << 30)


def test_the_device_explains_what_was_measured() -> None:
    found = device_from([_found(), _found(0.5)], "cpu", 2, "round")
    assert found.flops["float32"] == pytest.approx(1e11)
    assert found.flops["bfloat16"] == pytest.approx(5e11)
    assert found.bandwidth == pytest.approx(1e10)
    for kernel, took in _found().kernels:
        assert found.seconds_of(kernel) == pytest.approx(took + found.launch, rel=0.01)
    for op in ("all_gather", "reduce_scatter", "all_reduce", "send"):
        assert found.sends(op, 2**24, (0, 1)) == pytest.approx(_found().links[op], rel=0.02)
    assert (found.overlap, found.base, found.memory) == (0.5, 300 * MB, 8 << 30)


def test_a_rank_alone_has_no_links_to_measure() -> None:
    alone = _found()
    alone.links = {}
    assert device_from([alone], "cpu", 1, "alone").inside == device_of("cpu").inside


def test_this_machine(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    done = CliRunner().invoke(app, ["plan", "calibrate", "-o", str(path), "--steps", "2"])
    assert done.exit_code == 0, done.output
    found = device_of(str(path))
    assert found.name == "mine"
    assert min(found.bandwidth, found.launch, found.inside, *found.flops.values()) > 0
    assert found.memory > found.base > 100 * MB
    assert "_fused_adamw_ float32" in json.loads(path.read_text())["slower"]
    assert "GFLOP/s" in done.output


def test_where_the_profile_cannot_be_written_nothing_is_measured(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["plan", "calibrate", "-o", str(tmp_path / "no" / "mine.json")])
    assert done.exit_code == 1
    done = CliRunner().invoke(app, ["plan", "calibrate", "--speed", "3"])
    assert done.exit_code == 2
