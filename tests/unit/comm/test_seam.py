"""What the seam's records say by themselves: runs of a flat, works that begin later, the last calls of a rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.native import compare
from zeropipe.comm import collectives as comm
from zeropipe.comm.group import SELF, Group
from zeropipe.comm.record import SEAM, Call, Later, Run, Work
from zeropipe.errors import CommunicationError, UsageError


@given(shard=st.integers(1, 9), size=st.integers(1, 5), data=st.data())
def test_the_parts_of_a_run_are_its_cuts_at_the_edges_of_shards(
    shard: int, size: int, data: st.DataObject
) -> None:
    flat = torch.arange(shard * size)
    start = data.draw(st.integers(0, shard * size))
    stop = data.draw(st.integers(start, shard * size))
    run = Run(flat[start:stop], start, shard)
    assert [at // shard for at in range(start, stop)] == [
        owner for owner in run.owners for _ in range(run.part(owner).numel())
    ]
    parts = [run.part(owner) for owner in range(size)]
    assert torch.equal(torch.cat(parts), run.whole)
    assert all(part.numel() == 0 or part.untyped_storage().data_ptr() == flat.data_ptr() for part in parts)
    assert [owner for owner in range(size) if parts[owner].numel()] == list(run.owners)


def test_what_begins_later_is_waited_for_by_each_and_named_where_it_never_begins() -> None:
    steps: list[str] = []
    later = Later()
    first, second = Work("the first", [later]), Work("the second", [later])
    assert not first.done()
    with pytest.raises(
        CommunicationError, match="the first did not complete: it was given up before it began"
    ):
        first.wait()
    later.begin(Work("both", finish=lambda: steps.append("over")))
    assert second.done()
    second.wait()
    second.wait()
    assert steps == ["over"]


class _Broken:
    def wait(self) -> None:
        raise RuntimeError("Connection closed\nby peer")


def test_an_error_names_the_last_calls_of_its_rank() -> None:
    for number in range(20):
        Call("all_gather", SELF, f"layer {number}").enter()
    with pytest.raises(CommunicationError) as found:
        Work("[rank 0] a barrier", [_Broken()]).wait()
    text = str(found.value)
    assert text.startswith(
        "[rank 0] a barrier did not complete: Connection closed; found as the last calls here: "
    )
    assert (
        "all_gather 'layer 12', " in text and "all_gather 'layer 19'. Fix:" in text and "layer 11" not in text
    )
    assert SEAM.lately().count(",") == 7


def test_a_tensor_of_another_device_is_refused_on_gloo_with_the_way_out() -> None:
    """gloo would send from the address as if it were host memory; torch names it for every device."""
    on_gpu = torch.empty(2, device="meta")
    group = Group((0, 3), 1, backends=(("cpu", "gloo"), ("meta", "gloo")))
    assert group.backend_for(torch.empty(2)) == "gloo"
    with pytest.raises(
        UsageError, match=r"\[rank 3\] a meta tensor cannot be sent over .*'cpu:gloo,cuda:nccl'"
    ):
        group.backend_for(on_gpu)
    many, few = torch.empty(4, device="meta"), on_gpu
    calls: list[Callable[[], object]] = [
        lambda: comm.all_reduce(few, group),
        lambda: comm.reduce_scatter(few, many, group),
        lambda: comm.reduce_to_owners([(0, few)], [], group),
        lambda: comm.reduce_run(comm.Run(few, 0, 2), few, group),
        lambda: comm.all_gather(many, few, group),
        lambda: comm.all_gather_many([many], [few], group),
        lambda: comm.gather_from_owners([(0, few)], group),
        lambda: comm.broadcast(few, 0, group),
        lambda: comm.all_to_all(few.clone(), few, group),
        lambda: comm.send(few, 0, group),
        lambda: comm.recv(few, 0, group),
        lambda: comm.Messages(group, "stage 1").send(few, 0, 1),
    ]
    for call in calls:
        with pytest.raises(UsageError, match="a meta tensor cannot be sent over"):
            call()


def test_which_groups_need_lanes_and_which_devices_carry() -> None:
    gloo = Group((0, 1), 0, backends=(("cpu", "gloo"), ("cuda", "gloo")))
    both = Group((0, 1), 0, backends=(("cpu", "gloo"), ("cuda", "nccl")))
    gpus = Group((0, 1), 0, backends=(("cuda", "nccl"),))
    assert [group.has_tags for group in (gloo, both, gpus)] == [True, False, False]
    assert [group.speaks for group in (gloo, both, gpus)] == [True, True, False]
    here, there = torch.empty(1), torch.empty(1, device="meta")
    beside = replace(gpus, beside=gloo)
    assert beside.speaks and beside.speaking is gloo
    assert beside.carrying(here) is gloo and beside.carrying(there) is beside
    assert both.carrying(here) is both and replace(both, beside=gloo).carrying(here) is not gloo
    with pytest.raises(UsageError, match="a cpu tensor cannot be sent over nccl"):
        gpus.backend_for(here)


def test_the_log_of_the_native_rung_names_the_first_difference() -> None:
    same = {("0", (0, 1)): [("all_reduce", 8, "torch.float32")]}
    compare([same, dict(same)])
    odd = {("0", (0, 1)): [("all_reduce", 8, "torch.float32"), ("broadcast", 4, "torch.uint8")]}
    with pytest.raises(AssertionError, match=r"communicator 0 of ranks .0, 1.: call 1 differs"):
        compare([same, odd])
    with pytest.raises(AssertionError, match="call 0 differs"):
        compare([same, {}])
