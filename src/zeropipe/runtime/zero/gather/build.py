"""How zero.Init shards what is being built: one entry of the context, its running constructors and what they used.

constructor begins   a frame; whatever it uses of shards is gathered, oldest put back beyond a window
constructor returns  what was written is cut anew; the parameters that are still whole are cut and freed
the end              shards are rounded to the run's 16 bits. Not before: half of what constructors make are buffers and
                     intermediate values, and a weight that is initialized once more would be drawn in 16 bits
"""

from __future__ import annotations

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
from zeropipe.runtime.zero.fingerprint import Fingerprint, fingerprint
from zeropipe.runtime.zero.gather.host_memory import FreedMemory
from zeropipe.runtime.zero.gather.sharded_parameter import mark_available
from zeropipe.runtime.zero.gather.shards import GATHER, Shards, shard_parameter, shards_of
from zeropipe.runtime.zero.gather.state_dict import install_state_dict
from zeropipe.runtime.zero.hold.offload import Arena
from zeropipe.runtime.zero.status import ZeroParamStatus, ZeroParamType
from zeropipe.tensor.model import overlapping, shared_memory, was_prepared, working_dtypes

# Elements that stay gathered after a use; older ones are put back while the constructor runs on.
WINDOW = 2**22


@dataclass(slots=True, eq=False)
class _Fetched:
    """A parameter that a constructor used. ``watched``: a view of it outlived the fetch, and what it showed."""

    param: torch.nn.Parameter
    shards: Shards
    before: Fingerprint
    watched: tuple[torch.Tensor, Fingerprint] | None = None

    @property
    def forgotten(self) -> bool:
        """Whether nobody holds the view any more."""
        return self.watched is None or not _shared(self.watched[0])

    @property
    def moved(self) -> bool:
        """Whether the parameter was given other memory: ``.data = ...``, or ``set_`` as parametrizations do."""
        here = self.param.detach()
        same = (here.shape, here.dtype, here.data_ptr()) == (
            self.shards.shape,
            self.shards.dtype,
            self.shards.full.data_ptr(),
        )
        return not same and self.shards.status is ZeroParamStatus.AVAILABLE

    def take_moved(self) -> bool:
        """Take the value over from the other memory; False where it does not fit the shards."""
        here, full = self.param.detach(), self.shards.full
        if (here.shape, here.dtype) != (self.shards.shape, self.shards.dtype):
            return False
        full[: self.shards.numel].copy_(here.reshape(-1))
        mark_available(self.param, full[: self.shards.numel].view(self.shards.shape))
        return True

    def check(self) -> None:
        """Raise UsageError if the view was written to since the value was put back."""
        assert self.watched is not None
        value, shown = self.watched
        if not shown.matches(value):
            raise UsageError(
                f"parameter '{self.shards.name}' was written through a tensor kept from before other "
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
                shards.name = f"{type(module).__name__}.{name}#{shards.ident}"  # unlike any other's

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
        shards.holds += 1
        frame.fetched[id(shards)] = _Fetched(param, shards, fingerprint(shards.full))
        param.__class__ = (
            torch.nn.Parameter
        )  # from which another parameter may be made: torch asks for its very class
        while len(frame.fetched) > 1 and sum(f.shards.numel for f in frame.fetched.values()) > max(
            WINDOW, shards.numel
        ):
            oldest = next(iter(frame.fetched))
            self._put_back(frame, frame.fetched.pop(oldest))

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
                shards.name = name
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
        shards = fetched.shards
        shards.holds -= 1
        if fetched.moved and not fetched.take_moved():
            self._give_up(fetched)
            return
        if not fetched.before.matches(shards.full):
            meet(f"{self.what}: {shards.name} was written", shards.group, channel=GATHER)
            broadcast(shards.full, 0, shards.everyone, label=shards.name)
            shards.write_back()
        if shards.holds or shards.persist:
            return
        kept = shards.full
        shards.leave()
        self._freed.add(kept.nbytes)
        if _shared(kept):
            fetched.watched = (kept, fingerprint(kept))
            frame.put_back.append(fetched)

    def _give_up(self, fetched: _Fetched) -> None:
        """The parameter has another shape now: it is whole, and will be cut anew with those of its module."""
        LEASES.drop(fetched.shards)
        del fetched.param._zero  # type: ignore[attr-defined]

    def _drop(self, frame: _Frame) -> None:
        """After an exception: free what was gathered, unwritten."""
        for fetched in frame.fetched.values():
            fetched.shards.holds -= 1
            if not fetched.shards.holds and not fetched.shards.persist:
                fetched.shards.leave()
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
        shards = shard_parameter(param, f"{name}#{ident}", ident, self.within)
        shards.everyone = self.group
        shards.builder = self
        self._freed.add(2 * value.nbytes)  # the value and its padded copy
        if self.remote is not None:
            shards.kind = ZeroParamType.REMOTE
            shards.source = shards.source.cpu()  # offload moves it on, to pinned memory
        if self.arena is not None:
            shards.source, shards.let_go = self.arena.keep(shards.source), self.arena.files.let_go

    def _round(self, modules: list[torch.nn.Module]) -> None:
        """Cast the shards of ``modules`` to what they work in, but for those that an engine has taken over by now, or
        that a constructor outside of a nested context is using."""
        if self.dtype is None:
            return
        params = (param for module in modules for param in module._parameters.values() if param is not None)
        for param, dtype in working_dtypes(modules, self.dtype, was_prepared(params)).items():
            shards = shards_of(param)
            if shards is None or shards.dtype == dtype or shards.holds or shards.fetch_for_use is not None:
                continue
            place = shards.source
            shards.cast(dtype, shards.full.device)
            self._freed.add(place.nbytes)
            if self.arena is not None and dtype.itemsize <= place.dtype.itemsize:
                shards.source = place.view(dtype)[: shards.shard_numel].copy_(shards.source)
            elif self.arena is not None:
                shards.source = self.arena.keep(shards.source)


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


_OWN_REFERENCES = 2  # the tensor and the Python object of its storage
