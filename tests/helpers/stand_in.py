"""A device that only writes down what it is given: on which stream, after which event, reading or writing which memory.

Its tensors are the CPU's, and every operation is done at once, so numbers are right whatever the order. What is checked
is the order that was asked for. Every stream, and the host, is an actor with a vector clock: what it has been told of
every other one. An event hands the clock of one on to another, and so does a launch (from the host to a stream) and a
wait of the host. Two accesses of the same bytes, one of which writes, are a finding unless the clock of the later one
has the earlier one::

    compute   write w  .......................  read w      finding: compute has not heard of IN's write
    IN                   write w  (no event)

Memory that is given back belongs to the stream that it was made on, whose next allocation may be the same bytes: a
finding unless that stream has by then heard of every use. Memory of the host is checked when it goes.

What tells the two kinds of memory apart on a CPU: ``pinned`` and files are the host's, and what is computed from those
alone; what is made of nothing becomes the host's where it first meets only such; all else is the device's.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from zeropipe.comm import collectives
from zeropipe.comm.native import Native
from zeropipe.comm.record import Call, Work
from zeropipe.streams import STREAMS, Side

HOST, COMPUTE = "host", "compute"
Clock = dict[str, int]
SCALAR_BYTES = 8  # counts and factors: they are their reader's, wherever that is


@dataclass(slots=True)
class Access:
    """Some actor's use of the bytes [start, stop) of one memory."""

    actor: str
    at: int  # of the actor's own clock
    start: int
    stop: int
    writes: bool
    what: str

    def __str__(self) -> str:
        return f"{self.actor} {'writes' if self.writes else 'reads'} ({self.what})"


@dataclass(slots=True)
class Memory:
    """One storage, from its allocation to its end."""

    number: int
    home: str  # the stream that it was made on, or the host
    pinned: bool = False
    decided: bool = True
    accesses: list[Access] = field(default_factory=list)


class StandIn:
    """A ``Driver``. ``findings``: what no event orders, each once. ``events``: how many marks passed unasked, for
    ``passed`` never says yes: nothing may depend on when the host looks."""

    def __init__(self) -> None:
        self.findings: dict[str, None] = {}
        self.operations = 0
        self.streams: set[str] = {HOST, COMPUTE}  # that did something
        self._clocks: dict[str, Clock] = {HOST: {}, COMPUTE: {}}
        self._current = COMPUTE
        self._known: dict[int, Memory] = {}  # by the storage's address in C++
        self._given_back: dict[str, list[Memory]] = {}  # by home: what its next allocation may be
        self._numbers, self._names = count(), count()

    # ---- the driver ----

    def new_stream(self) -> str:
        name = list(Side)[next(self._names)].name  # the owner's first act is to make one for each
        self._clocks[name] = {}
        return name

    def current(self) -> str:
        return self._current

    @contextmanager
    def on(self, stream: str) -> Iterator[None]:
        before, self._current = self._current, stream
        try:
            yield
        finally:
            self._current = before

    def mark(self) -> Clock:
        return dict(self._launch(self._current))

    def wait(self, moment: Clock) -> None:
        self._hear(self._current, moment)

    def finish(self, moment: Clock) -> None:
        self._hear(HOST, moment)

    def passed(self, moment: Clock) -> bool:
        return False

    def on_host(self, tensor: torch.Tensor) -> bool:
        memory = self._memory(tensor)
        memory.decided = True
        return memory.home == HOST

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        return self._memory(tensor).pinned

    def pinned(self, nbytes: int) -> torch.Tensor:
        with torch._C._DisableTorchDispatch():
            tensor = torch.zeros(nbytes, dtype=torch.uint8)
        self._enter(tensor, HOST, pinned=True)
        return tensor

    # ---- clocks ----

    def _hear(self, actor: str, of: Clock) -> None:
        clock = self._clocks[actor]
        for other, at in of.items():
            clock[other] = max(clock.get(other, 0), at)

    def _launch(self, stream: str) -> Clock:
        """``stream`` is given work now: it comes after all that the host has done, or waited for."""
        if stream != HOST:
            self._hear(stream, self._clocks[HOST])
        return self._clocks[stream]

    def _tick(self, actor: str) -> int:
        clock = self._launch(actor)
        clock[actor] = clock.get(actor, 0) + 1
        self.streams.add(actor)
        return clock[actor]

    # ---- memory ----

    def _enter(self, tensor: torch.Tensor, home: str, pinned: bool = False) -> Memory:
        storage = _storage(tensor)
        key = storage._cdata
        memory = self._known[key] = Memory(next(self._numbers), home, pinned)
        weakref.finalize(storage, self._ended, key, memory).atexit = False
        self._allocated(home)
        return memory

    def _memory(self, tensor: torch.Tensor) -> Memory:
        memory = self._known.get(_storage(tensor)._cdata)
        # Made before the device was there, or by what no operation shows: the model's, or a file's.
        return self._enter(tensor, COMPUTE) if memory is None else memory

    def host_memory(self, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor``, which is the host's and may be paged."""
        self._enter(tensor, HOST)
        return tensor

    def _ended(self, key: int, memory: Memory) -> None:
        if self._known.get(key) is memory:
            del self._known[key]
        self._give_back(memory)

    def _give_back(self, memory: Memory) -> None:
        gone = Memory(memory.number, memory.home, memory.pinned, accesses=memory.accesses)
        memory.accesses = []
        if gone.home == HOST:
            self._check_end(gone, HOST)
        else:
            self._given_back.setdefault(gone.home, []).append(gone)

    def _allocated(self, home: str) -> None:
        """The next bytes of ``home`` may be any that were given back to it."""
        self._launch(home)
        for memory in self._given_back.pop(home, []):
            self._check_end(memory, home)

    def _check_end(self, memory: Memory, home: str) -> None:
        for access in memory.accesses:
            if self._clocks[home].get(access.actor, 0) < access.at and access.actor != home:
                self._find(f"memory of {memory.home} given back while {access}", memory)

    def resized(self, storage: torch.UntypedStorage, nbytes: int) -> None:
        """A storage gives its memory back, or takes some."""
        memory = self._known.get(storage._cdata)
        if memory is None or nbytes == storage.nbytes():
            return
        if storage.nbytes():
            self._give_back(memory)
        if nbytes:
            memory.home = self._current
            self._allocated(self._current)

    def _find(self, what: str, memory: Memory) -> None:
        self.findings.setdefault(what)

    def use(self, actor: str, at: int, tensor: torch.Tensor, writes: bool, what: str) -> None:
        memory = self._memory(tensor)
        start = tensor.storage_offset() * tensor.element_size()
        spans = (step * (size - 1) for size, step in zip(tensor.shape, tensor.stride(), strict=True))
        stop = start + (sum(spans) + 1) * tensor.element_size()
        now, known, kept = Access(actor, at, start, stop, writes, what), self._clocks[actor], []
        for old in memory.accesses:
            heard = old.actor == actor or known.get(old.actor, 0) >= old.at
            if not heard and old.start < stop and start < old.stop and (writes or old.writes):
                self._find(f"{old}, then {now}, and nothing orders them", memory)
            inside = start <= old.start and old.stop <= stop
            if not (heard and inside and (writes or (old.actor == actor and not old.writes))):
                kept.append(old)
        memory.accesses = [*kept, now]

    # ---- operations ----

    def ran(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
        """``func`` was called by the host."""
        name = func._schema.name.split("::")[-1]
        reads, writes = _uses(func, args, kwargs)
        given = {_storage(tensor)._cdata for tensor in (*reads, *writes)}
        made = [t for t in _tensors(out) if _storage(t)._cdata not in given]
        if not made and not writes and _tensors(out):
            return  # a view
        large = [t for t in (*reads, *writes) if _nbytes(t) > SCALAR_BYTES] or [*reads, *writes]
        memories = [self._memory(tensor) for tensor in large]
        sure = [memory for memory in memories if memory.decided]
        host = [memory for memory in sure if memory.home == HOST]
        actor = HOST if host and len(host) == len(sure) else self._current
        for memory in memories if sure else ():
            if not memory.decided:
                memory.home, memory.decided = actor, True
                memory.accesses = [] if actor == HOST else memory.accesses  # they were the host's, too
        mixed = bool(host) and actor != HOST
        if mixed and name != "copy_":  # what a GPU would be asked for in two calls, the first of which waits
            self._hear(HOST, self._clocks[self._current])
        self.operations += 1
        at = self._tick(actor)
        for tensor in made:
            self._enter(tensor, actor).decided = bool(sure)
        if not name.startswith(("empty", "new_empty")):
            pairs = [*((t, False) for t in reads), *((t, True) for t in (*writes, *made))]
            for tensor, wrote in pairs:
                if name == "index_copy_" and tensor is args[0]:  # no more of it than that
                    tensor = tensor[int(args[2].min()) : int(args[2].max()) + 1]
                if tensor.numel() and _nbytes(tensor) > SCALAR_BYTES:
                    self.use(actor, at, tensor, wrote, name)
        # A blocking copy, one of memory that may be paged, and whatever gives the host a value.
        waits = mixed and not (
            name == "copy_" and (kwargs.get("non_blocking") or args[2:3] == (True,)) and host[0].pinned
        )
        if waits or (name in ("_local_scalar_dense", "equal", "nonzero") and sure and actor != HOST):
            self._hear(HOST, self._clocks[self._current])

    def collective(self, call: Call, reads: Sequence[torch.Tensor], writes: Sequence[torch.Tensor]) -> Clock:
        """A backend's call: on its communicator's stream, after what the current one was given."""
        stream = f"backend {call.group.ranks} {call.channel}"
        self._clocks.setdefault(stream, {})
        self._hear(stream, self._launch(self._current))
        at = self._tick(stream)
        for tensors, wrote in ((reads, False), (writes, True)):
            for tensor in tensors:
                if tensor.numel():
                    self._memory(tensor).decided = True
                    self.use(stream, at, tensor, wrote, call.op)
        return dict(self._clocks[stream])


class _Mode(TorchDispatchMode):
    def __init__(self, device: StandIn) -> None:
        super().__init__()
        self._device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace == "aten":
            self._device.ran(func, args, kwargs or {}, out)
        return out


class _Handle:
    """The event at the end of a collective; what gloo does by then is nobody's order."""

    def __init__(self, device: StandIn, end: Clock, handles: Sequence[Any]) -> None:
        self._device, self._end, self._handles = device, end, handles

    def wait(self) -> None:
        with torch._C._DisableTorchDispatch():
            for handle in self._handles:
                handle.wait()
        self._device.wait(self._end)

    def is_completed(self) -> bool:
        return self._device.passed(self._end)


def _moved(name: str, rank: int, args: Sequence[Any]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """(what a collective reads, what it writes)."""
    if name in ("reduce_scatter", "all_to_all", "all_gather"):
        return [args[1]], [args[0]]
    if name == "all_gather_many":
        return list(args[1]), list(args[0])
    if name == "reduce_run":
        return [], [args[0].whole, args[1]]
    cuts = [view for _, view in args[0]] if name in ("reduce_to_owners", "gather_from_owners") else [args[0]]
    return [], cuts + (list(args[1]) if name == "reduce_to_owners" else [])


class Carried:
    """NCCL's path, whose calls the device writes down."""

    in_one = True

    def __init__(self, device: StandIn, inner: Native) -> None:
        self._device, self._inner = device, inner

    def __getattr__(self, name: str) -> Callable[..., Work]:
        def carry(call: Call, *args: Any) -> Work:
            work: Work = getattr(self._inner, name)(call, *args)
            if name != "exchange":
                end = self._device.collective(call, *_moved(name, call.group.rank, args))
                work._handles = [_Handle(self._device, end, work._handles)]
            return work

        return carry


@contextmanager
def stand_in(native: bool) -> Iterator[StandIn]:
    """Inside the block this process has such a device. ``native``: its collectives are a backend's own."""
    device, resize = StandIn(), torch.UntypedStorage.resize_

    def resized(storage: torch.UntypedStorage, nbytes: int) -> Any:
        device.resized(storage, nbytes)
        return resize(storage, nbytes)

    carriers = collectives._CARRIERS
    before = carriers.native, carriers.forced
    torch.UntypedStorage.resize_ = resized  # type: ignore[assignment]
    try:
        if native:
            carried: Any = Carried(device, carriers.native)
            carriers.native, carriers.forced = carried, carried
        with STREAMS.driven_by(device), _Mode(device):
            yield device
    finally:
        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]
        carriers.native, carriers.forced = before


def _storage(tensor: torch.Tensor) -> torch.UntypedStorage:
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.untyped_storage()


def _nbytes(tensor: torch.Tensor) -> int:
    return _storage(tensor).nbytes()


def _tensors(what: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(what) if isinstance(leaf, torch.Tensor)]


def _uses(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    """The tensors that an operation reads, and those that it writes."""
    reads: list[Any] = []
    writes: list[Any] = []
    for at, argument in enumerate(func._schema.arguments):
        value = args[at] if at < len(args) else kwargs.get(argument.name)
        wrote = argument.alias_info is not None and argument.alias_info.is_write
        (writes if wrote else reads).extend(_tensors(value))
    return reads, writes
