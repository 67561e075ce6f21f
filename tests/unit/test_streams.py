"""The owner of streams and pinned memory, and the checker that the stand-in device is."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from tests.helpers.stand_in import StandIn, stand_in
from zeropipe.errors import OffloadError
from zeropipe.streams import STREAMS, Inline, Side, owner
from zeropipe.streams.driver import register

CPU = torch.device("cpu")


class Runtime:
    """What ``torch.cuda.cudart`` gives, as far as memory is pinned with it."""

    def __init__(self, code: int = 0) -> None:
        self.code = code
        self.pinned: dict[int, int] = {}  # bytes, by address

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        self.pinned[address] = nbytes
        return self.code

    def cudaHostUnregister(self, address: int) -> int:
        del self.pinned[address]
        return 0


def test_pinned_memory_is_as_large_as_was_asked_for(monkeypatch):
    """torch's own allocator gives a power of two: nearly twice as much for 33 of 64."""
    runtime = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    tensor = register(5_000_001)
    assert runtime.pinned == {tensor.data_ptr(): 5_000_001}
    assert not tensor.any()
    view = tensor[8:16]
    del tensor
    gc.collect()
    assert len(runtime.pinned) == 1  # a view holds it
    del view
    gc.collect()
    assert runtime.pinned == {}


def test_memory_that_cannot_be_pinned_is_an_error_that_says_what_to_do(monkeypatch):
    monkeypatch.setattr(torch.cuda, "cudart", lambda: Runtime(code=2))
    with pytest.raises(OffloadError, match=r"1,048,576 bytes .* code 2.*ulimit"):
        register(2**20)


def test_a_cpu_has_nothing_to_order():
    streams = STREAMS.of(CPU)
    assert type(streams) is Inline
    assert streams.beside(Side.IN) is streams.beside(Side.OUT)
    assert streams.mark() is None


def test_a_device_has_one_owner_whatever_it_is_called(monkeypatch):
    monkeypatch.setattr(owner, "Cuda", lambda device: StandIn())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    owners = owner.Owners()
    assert owners.of(torch.device("cuda")) is owners.of(torch.device("cuda:1"))
    assert owners.of(torch.device("cuda:0")) is not owners.of(torch.device("cuda:1"))


class Counting(StandIn):
    """Adds up the pinned memory that it gives."""

    given = 0

    def pinned(self, nbytes: int) -> torch.Tensor:
        self.given += nbytes
        return super().pinned(nbytes)


@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
def test_staging_stays_small_however_much_goes_through_it(wanted):
    device = Counting()
    with STREAMS.driven_by(device) as streams:
        total = streams.zeros(1000, torch.float32)
        device.given = 0
        for at in range(50):
            with streams.beside(Side.OUT):
                streams.add(total, torch.full((1000,), at, dtype=wanted))
        streams.host_turn()
        assert device.given <= 3 * 1000 * wanted.itemsize
        target = torch.empty(1000, dtype=torch.bfloat16)
        for at in range(50):  # rounded on the way
            total.fill_(at + 2**-12)
            streams.bring(target, total)
            assert (target == (at or 2**-12)).all()
        assert device.given <= 3 * 1000 * (wanted.itemsize + 2)


def test_what_waits_for_the_host_comes_before_what_is_copied_over_it():
    with STREAMS.driven_by(StandIn()) as streams:
        place = streams.zeros(10, torch.float32)
        streams.add(place, torch.ones(10))
        streams.copy(place, torch.full((10,), 5.0))
        streams.add(place, torch.ones(10))
        target = torch.empty(10)
        streams.bring(target, place)  # reads it: the sums are made first
        assert target.tolist() == [6.0] * 10


def race(streams: Any, ordered: bool) -> None:
    shared = torch.ones(100)
    with streams.beside(Side.IN):
        shared.mul_(2)
        moment = streams.mark()
    if ordered:
        streams.wait(moment)
    shared.add(1)


@pytest.mark.parametrize("ordered", [True, False])
def test_the_checker_finds_a_race_and_no_other(ordered):
    with stand_in(native=False) as device:
        race(STREAMS.of(CPU), ordered)
    expected = ["IN writes (mul_), then compute reads (add), and nothing orders them"]
    assert list(device.findings) == ([] if ordered else expected)


@pytest.mark.parametrize("ordered", [True, False])
def test_the_checker_finds_memory_that_is_given_back_too_early(ordered):
    with stand_in(native=False) as device:
        streams, gone = STREAMS.of(CPU), torch.ones(100)
        with streams.beside(Side.OUT):
            gone.sum()
            moment = streams.mark()
        if ordered:
            streams.wait(moment)
        del gone
        torch.ones(100)
    assert list(device.findings) == (
        [] if ordered else ["memory of compute given back while OUT reads (sum)"]
    )


def test_ranges_of_one_tensor_do_not_meet():
    with stand_in(native=False) as device:
        shared = torch.ones(100)
        with STREAMS.of(CPU).beside(Side.IN):
            shared[:50].mul_(2)
        shared[50:].mul_(2)
    assert not device.findings
