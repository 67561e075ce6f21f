"""How zero.Init shards what is being built: one entry of the context, its running constructors and what they used.

constructor begins   a frame; whatever it uses of shards is gathered, oldest put back beyond a window
constructor returns  what was written is cut anew; the parameters that are still whole are cut and freed
the end              shards are rounded to the run's 16 bits. Not before: half of what constructors make are buffers and
                     intermediate values, and a weight that is initialized once more would be drawn in 16 bits
"""

from __future__ import annotations

import ctypes
import itertools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import torch

from zeropipe.comm.agreement import leave, meet
from zeropipe.comm.collectives import broadcast
from zeropipe.comm.group import Group
from zeropipe.comm.leases import LEASES
from zeropipe.errors import CommunicationError, DesyncError, UsageError
from zeropipe.runtime.zero.gather.edits import Fingerprint, fingerprint, is_moved, take_moved
from zeropipe.runtime.zero.gather.parameter import shard_parameter
from zeropipe.runtime.zero.gather.shards import Hold, Shards, shards_of
from zeropipe.runtime.zero.gather.state_dict import install_state_dict
from zeropipe.runtime.zero.hold.offload import Arena
from zeropipe.runtime.zero.param import GATHER
from zeropipe.tensor.model import overlapping, shared_memory, was_prepared, working_dtypes

_OWN_REFERENCES = 2  # to a storage: the tensor, and the Python object of the storage itself
# Elements that stay gathered after a use; older ones are put back while the constructor runs on.
WINDOW = 2**22
_FREED_AT_ONCE = 32 * 2**20  # bytes freed before it is worth the walk through the heap


@dataclass(slots=True, eq=False)
class _Fetched:
    """A parameter that a constructor used. ``watched``: a view of it outlived the fetch, and what it showed."""

    param: torch.nn.Parameter
    hold: Hold
    before: Fingerprint
    watched: tuple[torch.Tensor, Fingerprint] | None = None

    @property
    def forgotten(self) -> bool:
        """Whether nobody holds the view any more."""
        return self.watched is None or not _shared(self.watched[0])

    def check(self) -> None:
        """Raise UsageError if the view was written to since the value was put back."""
        assert self.watched is not None
        value, shown = self.watched
        if not shown.matches(value):
            raise UsageError(
                f"parameter '{self.hold.shards.name}' was written through a tensor kept from before other "
                "parameters were used, and had been put back by then. Fix: take param.data anew before writing"
            )


@dataclass(slots=True, eq=False)
class _Frame:
    """One constructor, or one function under ``apply``, that is running."""

    module: torch.nn.Module | None
    built: list[weakref.ref[torch.nn.Module]] = field(default_factory=list)
    fetched: dict[int, _Fetched] = field(default_factory=dict)
    put_back: list[_Fetched] = field(default_factory=list)  # those a view of which lives on


class Build:
    """One entry of a ``zero.Init``: shards what is built, in the place where it is built."""

    def __init__(
        self,
        group: Group,
        within: Group,  # the part of ``group`` that shares one copy of the shards
        device: torch.device,
        dtype: torch.dtype | None,
        remote: str | None,
        arena: Arena | None,
        built: Callable[[torch.nn.Module], None] = lambda _: None,  # told of each module that is
        what: str = "zero.Init",
    ) -> None:
        self.active = True
        self.what = what
        self._built = built
        self.group = group
        self.within = within
        self.arena = arena
        self.device = device
        self.dtype = dtype
        self.remote = remote
        self._frames = [_Frame(None)]
        self._ids = itertools.count()
        self._freed = FreedMemory()

    # What a ModulePatch tells.

    def begin(self, module: torch.nn.Module) -> bool:
        if any(frame.module is module for frame in self._frames):
            return False
        self._frames.append(_Frame(module))
        return True

    def end(self, module: torch.nn.Module) -> None:
        self._frames[-1].built.append(weakref.ref(module))
        self._close(complete=True)
        self._built(module)
        for name, param in module.named_parameters():
            shards = shards_of(param)
            if shards is not None and shards.builder is self:
                shards.own.lay_out(
                    f"{type(module).__name__}.{name}#{shards.ident}", shards.group
                )  # unlike any other's

    def abort(self, module: torch.nn.Module) -> None:
        self._close(complete=False)

    @contextmanager
    def frame(self) -> Iterator[None]:
        self._frames.append(_Frame(None))
        try:
            yield
        except BaseException:
            self._close(complete=False)
            raise
        self._close(complete=True)

    def fetch(self, shards: Shards) -> None:
        """Gather ``shards`` until the running constructor ends, or until it has used much else."""
        frame = self._frames[-1]
        param = shards.param
        shards.gather()
        frame.fetched[id(shards)] = _Fetched(param, shards.hold(), fingerprint(shards.full))
        # From which another parameter may be made: torch asks for its very class.
        param.__class__ = torch.nn.Parameter
        most = max(WINDOW, shards.numel)
        while len(frame.fetched) > 1 and sum(f.hold.shards.numel for f in frame.fetched.values()) > most:
            self._put_back(frame, frame.fetched.pop(next(iter(frame.fetched))))

    # The end.

    def finish(self) -> None:
        """All is built: cut what is still whole, and make sure that every rank is here."""
        self._settle(self._frames[-1])
        self._shard(self._frames[-1])
        meet("the end of zero.Init", self.group, channel=GATHER)
        self._round(_alive(self._frames[-1].built))
        self._freed.give_back()
        self.active = False

    def abandon(self, error: BaseException) -> None:
        """The block raised: tell the other ranks, which may be waiting for this one."""
        self.active = False
        for frame in self._frames:
            self._drop(frame)
        if not isinstance(error, DesyncError | CommunicationError):
            with suppress(Exception):
                leave(f"{self.what} raised {type(error).__name__}: {error}", self.group, channel=GATHER)

    def convert(self, module: torch.nn.Module) -> None:
        """Shard a module that exists; what is on the meta device is made first, module by module."""
        for child in module.modules():
            _materialize(child, self.device)
            self._frames[-1].built.append(weakref.ref(child))
            self._shard(self._frames[-1])
            self._frames[-1].built.clear()
            self._built(child)
        for name, param in module.named_parameters():
            shards = shards_of(param)
            if shards is not None and shards.builder is self:
                shards.own.lay_out(name, shards.group)
        self._round(list(module.modules()))
        self.active = False

    def _close(self, complete: bool) -> None:
        frame = self._frames[-1]
        try:
            if complete:
                self._settle(frame)
                self._shard(frame)
            else:
                self._drop(frame)
        finally:
            self._frames.remove(frame)
            self._frames[-1].built.extend(frame.built)

    def _settle(self, frame: _Frame) -> None:
        while frame.fetched:
            self._put_back(frame, frame.fetched.pop(next(iter(frame.fetched))))
        for fetched in frame.put_back:
            fetched.check()
        frame.put_back.clear()

    def _put_back(self, frame: _Frame, fetched: _Fetched) -> None:
        # The transport lets go of what it has sent a moment late: what it still held then need not be kept for long.
        for earlier in [one for one in frame.put_back if one.forgotten]:
            earlier.check()
            frame.put_back.remove(earlier)
        shards = fetched.hold.shards
        fetched.hold.release(free=False)
        # It was given other memory: by ``.data = ...``, or by ``set_`` as parametrizations do.
        if shards.gathered and is_moved(shards):
            fits = fetched.param.dtype == shards.dtype and take_moved(shards)
            if not fits:  # another shape: it is whole now, and will be cut anew with those of its module
                LEASES.drop(shards)
                del fetched.param._zero  # type: ignore[attr-defined]
                return
        if not fetched.before.matches(shards.full):
            meet(f"{self.what}: {shards.name} was written", shards.group, channel=GATHER)
            broadcast(shards.full, 0, shards.everyone, label=shards.name)
            shards.write_back()
        if shards.holds or shards.persist:
            return
        kept = shards.full
        shards.release(leave=True)
        self._freed.add(kept.nbytes)
        if _shared(kept):
            fetched.watched = (kept, fingerprint(kept))
            frame.put_back.append(fetched)

    def _drop(self, frame: _Frame) -> None:
        """After an exception: free what was gathered, unwritten."""
        for fetched in frame.fetched.values():
            shards = fetched.hold.shards
            fetched.hold.release(free=False)
            if not shards.holds and not shards.persist:
                shards.release(leave=True)
        frame.fetched.clear()
        frame.put_back.clear()

    def _shard(self, frame: _Frame) -> None:
        """Cut every whole parameter of the modules built in ``frame``; collective."""
        modules = _alive(frame.built)
        whole: dict[int, tuple[str, torch.nn.Parameter]] = {}
        for module in modules:
            for name, param in module._parameters.items():
                if param is not None and shards_of(param) is None and not _deferred(param):
                    whole.setdefault(id(param), (f"{type(module).__name__}.{name}", param))
        for pair in overlapping(whole.values()):
            raise UsageError(shared_memory("zero.Init", pair))
        if whole:
            shapes = ", ".join(f"{name} {tuple(param.shape)}" for name, param in whole.values())
            meet(f"zero.Init: {shapes}", self.group, channel=GATHER)
        for name, param in whole.values():
            self._cut(name, param)
        for module in modules:
            if any(
                param is not None and shards_of(param) is not None for param in module._parameters.values()
            ):
                install_state_dict(module)

    def _cut(self, name: str, param: torch.nn.Parameter) -> None:
        value = param.detach().to(self.device).contiguous()
        broadcast(value, 0, self.group, label=name)
        param.data = value
        ident = next(self._ids)
        shards = shard_parameter(param, f"{name}#{ident}", ident, self.within, self.group, self)
        self._freed.add(value.nbytes)
        if self.remote is not None:
            shards.live_at(shards.source.cpu(), None, remote=True)  # offload moves it on, to pinned memory
        if self.arena is not None:
            shards.live_at(self.arena.keep(shards.source), None, self.arena.files.let_go)

    def _round(self, modules: list[torch.nn.Module]) -> None:
        """Cast the shards of ``modules`` to what they work in, but for those that an engine has taken over by now, or
        that a constructor outside of a nested context is using."""
        if self.dtype is None:
            return
        params = (param for module in modules for param in module._parameters.values() if param is not None)
        for param, dtype in working_dtypes(modules, self.dtype, was_prepared(params)).items():
            shards = shards_of(param)
            if shards is None or shards.dtype == dtype or shards.holds or shards.conductor is not None:
                continue
            place = shards.source
            shards.cast(dtype, shards.full.device)
            self._freed.add(place.nbytes)
            if self.arena is not None and dtype.itemsize <= place.dtype.itemsize:
                shards.live_at(place.view(dtype)[: shards.shard_numel].copy_(shards.source), None)
            elif self.arena is not None:
                shards.live_at(self.arena.keep(shards.source), None)


def _alive(refs: list[weakref.ref[torch.nn.Module]]) -> list[torch.nn.Module]:
    return [module for module in (ref() for ref in refs) if module is not None]


def _deferred(param: torch.nn.Parameter) -> bool:
    """Whether the value does not exist yet."""
    return torch.nn.parameter.is_lazy(param) or param.is_meta


def _materialize(module: torch.nn.Module, device: torch.device) -> None:
    """Give ``module``'s own tensors on the meta device their memory and first values."""
    own = (*module._parameters.values(), *module._buffers.values())
    if not any(tensor is not None and tensor.is_meta for tensor in own):
        return
    reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
    if reset is None:
        raise UsageError(
            f"zero.Init: a {type(module).__name__} is on the meta device and has no reset_parameters() that would give "
            "it values. Fix: add that method, or build the model inside the context instead of on meta"
        )
    module.to_empty(device=device, recurse=False)
    reset()


def _shared(value: torch.Tensor) -> bool:
    """Whether somebody else holds a tensor on the same storage as ``value``."""
    count = getattr(torch._C, "_storage_Use_Count", None)
    storage = value.untyped_storage()
    return count is not None and count(storage._cdata) > _OWN_REFERENCES


class FreedMemory:
    """Counts what a caller frees in pieces between which it allocates what stays.

    glibc fills the holes of freed blocks only with what fits, and gives back no hole below a block in use: a model cut
    into shards one parameter at a time could so take as much memory as the whole. Other C libraries are left alone.
    """

    def __init__(self) -> None:
        self._trim = _trim_of_glibc()
        self._freed = 0

    def add(self, nbytes: int) -> None:
        """``nbytes`` of host memory were freed; now and then all holes go back to the system."""
        self._freed += nbytes
        if self._freed >= _FREED_AT_ONCE:
            self.give_back()

    def give_back(self) -> None:
        self._freed = 0
        if self._trim is not None:
            self._trim(0)


def _trim_of_glibc() -> Callable[[int], int] | None:
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # another C library
        return None
    trim.argtypes, trim.restype = [ctypes.c_size_t], ctypes.c_int
    return trim  # type: ignore[no-any-return]
