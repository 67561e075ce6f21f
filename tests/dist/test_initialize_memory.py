"""``initialize`` takes the model's bytes and one tensor more, beside what the engine then holds: in resident memory,
and on a device, where an allocation is whole at once."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import zeropipe
from tests.dist.test_memory import live_tensor_bytes
from tests.helpers.train import config
from zeropipe.comm.group import SELF
from zeropipe.runtime.zero.gather.parameter import shard_parameter
from zeropipe.runtime.zero.hold.offload import Offload
from zeropipe.runtime.zero.hold.policy import Policy
from zeropipe.runtime.zero.hold.shard_values import ShardValues
from zeropipe.runtime.zero.hold.values import FlatValues
from zeropipe.tensor.memory import moving

MIB = 2**20
# Holes are given back when there are 32 MiB of them; the rest is what an engine's own objects take.
SLACK = 44 * MIB


def layers() -> nn.Module:
    return nn.ModuleList(nn.Linear(1024, 1024 + 64 * (i % 3), bias=False) for i in range(28))


def one_large() -> nn.Module:
    return nn.ModuleList([nn.Embedding(60_000, 400), *(nn.Linear(512, 512) for _ in range(20))])


def many() -> nn.Module:
    return nn.ModuleList(nn.Linear(160, 160, bias=False) for _ in range(1000))


def transposed() -> nn.Module:
    return nn.ParameterList(nn.Parameter(torch.randn(1024, 768).t()) for _ in range(36))


def status(key: str) -> int:
    """Bytes that the system counts for this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024


def peak(rank: int, world: int, make: Callable[[], nn.Module], settings: dict[str, Any]) -> list[int]:
    """(the most that initialize took, more than there was or is; the largest tensor; the model), in bytes."""
    zeropipe.initialize(model=nn.Linear(4, 4), config=settings)[0].destroy()  # what the first one costs
    model = make().to(torch.bfloat16 if "bf16" in settings else torch.float32)
    sizes = [param.nbytes for param in model.parameters()]
    ctypes.CDLL(None).malloc_trim(0)
    live, before = live_tensor_bytes(), status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the system forgets the most so far
    engine, *_ = zeropipe.initialize(model=model, config=settings)
    most = status("VmHWM")
    more = max(live_tensor_bytes() - live, 0)
    engine.destroy()
    return [most - before - more, max(sizes), sum(sizes)]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from /proc")
@pytest.mark.parametrize(
    ("world", "stage", "make", "dtype"),
    [
        (1, 0, many, "fp32"),
        (2, 1, layers, "bf16"),
        (1, 2, transposed, "fp32"),
        (1, 2, one_large, "fp32"),
        (1, 3, layers, "fp32"),
        (1, 3, many, "fp32"),
        (2, 3, one_large, "bf16"),
    ],
)
def test_no_more_than_one_tensor_is_in_memory_twice(pool, world, stage, make, dtype):
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    extra = {} if dtype == "fp32" else {"bf16": {"enabled": True}}
    settings = config(stage, world, zero_optimization=zero, optimizer={"type": "SGD"}, **extra)
    for over, largest, whole in pool(world).run(peak, make, settings):
        assert over < largest + SLACK, f"{over / MIB:.0f} MiB over, of a model of {whole / MIB:.0f}"


class Device(TorchDispatchMode):
    """The meta device plays a GPU: its tensors have a size and no memory. Counts the bytes that live on it.

    ``room``: what it has; an allocation that does not fit raises.
    """

    def __init__(self) -> None:
        super().__init__()
        self.room: int | None = None
        self.most = 0
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    @property
    def now(self) -> int:
        """Bytes that are alive; a storage may have been resized, of which no operation tells."""
        alive = [ref() for ref in self._storages.values()]
        return sum(storage.nbytes() for storage in alive if storage is not None)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and args[0].is_meta and str(kwargs.get("device")) == "cpu":
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        made = func(*args, **kwargs)
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                storage = tensor.untyped_storage()
                self._storages[storage._cdata] = weakref.ref(storage)
        self.most = max(self.most, self.now)
        if self.room is not None and self.now > self.room:
            made = tensor = storage = None  # a device that has no room gives nothing
            raise torch.OutOfMemoryError
        return made


def on_device(dtype: torch.dtype, count: int = 12) -> list[nn.Parameter]:
    shapes = [(64, 64 + 16 * (at % 3)) for at in range(count)]
    return [nn.Parameter(torch.empty(shape, dtype=dtype, device="meta")) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stage", [1, 3])
def test_a_device_holds_no_value_twice(stage: int, dtype: torch.dtype) -> None:
    """A flat buffer is one allocation, so all that is to lie in it leaves the device first."""
    with Device() as device:
        params = on_device(dtype)
        whole, names = device.now, [str(at) for at in range(len(params))]
        largest = max(param.numel() for param in params) * 4  # bytes of it in fp32
        values: FlatValues | ShardValues
        policy = Policy(stage=stage)
        if stage == 3:
            for at, param in enumerate(params):
                shard_parameter(param, names[at], at, SELF)
            assert device.most <= whole + 2 * largest  # what is cut, and its shard: of one rank as large
            device.most = device.now
            values = ShardValues(params, SELF, SELF, Offload(policy))
        else:
            values = FlatValues(names, params, SELF, policy)
        kept = values.master.nbytes + (0 if stage == 3 or dtype == torch.float32 else whole)
    assert whole > 5 * largest / 2
    assert device.most <= max(whole, kept) + largest


def test_where_the_device_has_no_room_the_parameters_are_what_they_were() -> None:
    with Device() as device:
        params = on_device(torch.float32)
        shapes, device.room = [param.shape for param in params], 2 * device.now
        with pytest.raises(torch.OutOfMemoryError), moving(params) as values:
            assert device.now == 0
            params[0].data = next(values).to("meta")
            torch.empty(2**20, device="meta")
        device.room = None
    assert [param.shape for param in params] == shapes
    assert all(param.is_meta for param in params)


def test_where_the_host_has_no_room_the_values_are_what_they_were() -> None:
    first, second = torch.arange(4.0), torch.arange(6.0).view(2, 3)
    with pytest.raises(MemoryError), moving([first, second]) as values:
        first.data = next(values) + 1
        next(values)
        raise MemoryError
    assert torch.equal(first, torch.arange(1.0, 5.0))
    assert torch.equal(second, torch.arange(6.0).view(2, 3))
