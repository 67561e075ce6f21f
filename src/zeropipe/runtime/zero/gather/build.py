"""What becomes shards while modules are built: one block of zero.Init, its running constructors and what they use.

    constructor begins   [1] a frame; whatever it uses of shards is gathered, oldest put back beyond a window
    constructor returns  [2] what was written is cut anew
                         [3] the parameters that are still whole are cut and freed
    the block ends       [4] every rank is here; shards are rounded to the run's 16 bits

``init.py`` tells of constructors.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

import torch

from zeropipe.comm.agreement import leave_all, meet
from zeropipe.comm.collectives import broadcast
from zeropipe.comm.group import Group
from zeropipe.comm.leases import LEASES
from zeropipe.errors import UsageError
from zeropipe.runtime.zero.gather.edits import Fingerprint, fingerprint, take_moved
from zeropipe.runtime.zero.gather.parameter import shard_parameter
from zeropipe.runtime.zero.gather.shards import Builder, Hold, Shards, shards_among, shards_of
from zeropipe.runtime.zero.gather.state_dict import install_state_dict
from zeropipe.runtime.zero.hold.offload import Arena
from zeropipe.runtime.zero.param import GATHER, carry
from zeropipe.tensor.memory import FreedMemory
from zeropipe.tensor.model import overlapping, shared_memory, was_prepared, working_dtypes

# Elements that stay gathered after a use; older ones are put back while the constructor runs on.
WINDOW = 2**22
_OWN_REFERENCES = 2  # to a storage: the tensor, and the Python object of the storage itself


# Given all modules that were built, and those whose tensors have memory but no values yet.
Load = Callable[[list[torch.nn.Module], list[torch.nn.Module]], None]


@dataclass(frozen=True, slots=True)
class Site:
    """Where what is built is to lie."""

    group: Group
    within: Group  # the part of ``group`` that shares one copy of the shards
    device: torch.device
    dtype: torch.dtype | None = None  # of parameters, at the end; None: that which each is made with
    remote: bool = False  # in host memory
    arena: Arena | None = None  # in files


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
                "parameters were used, and had been put back by then",
                fix="take param.data anew before writing",
            )


@dataclass(slots=True, eq=False)
class _Frame:
    """One constructor, or one function under ``apply``, that is running."""

    module: torch.nn.Module | None
    built: list[weakref.ref[torch.nn.Module]] = field(default_factory=list)
    fetched: dict[int, _Fetched] = field(default_factory=dict)
    put_back: list[_Fetched] = field(default_factory=list)  # those a view of which lives on


class Build:
    """Shards what is built in one block, in the place where it is built."""

    def __init__(
        self,
        site: Site,
        built: Callable[[torch.nn.Module], None] = lambda _: None,  # told of each module that is
        what: str = "zero.Init",
        load: Load | None = None,  # fills what was built, at the end
    ) -> None:
        self.site, self.what, self._load = site, what, load
        self.active = True
        self._built = built
        self._ids = itertools.count()
        self._freed = FreedMemory()

        # Where weights are loaded: whether a parameter was made in 16 bits, those that were rounded with their module,
        # and modules that nothing has initialized.
        self._prepared = False
        self._unset: list[torch.nn.Module] = []
        self._narrowed: list[tuple[Shards, torch.dtype]] = []

        # What runs, innermost last; the block itself is the first.
        #
        #     with zero.Init():               frame 0
        #         Model()                     frame 1
        #             Linear()                frame 2, at its end its weight is cut
        #             linear.weight.mul_(2)   fetched in frame 1, at its end it is put back
        #                                     at the end of frame 0 all that was built is rounded
        #
        # ``built`` goes to the frame outside with the end of a frame, so a constructor has what its children's have
        # built: what was given memory of another shape after its own module's end is cut with that of an outer one.
        self._frames = [_Frame(None)]

    @contextmanager
    def block(self) -> Iterator[Build]:
        """What is built inside is shards at the end, on every rank; where one raises, the others are told."""
        try:
            yield self
            self._finish()
        except BaseException as error:
            self.abandon(error)
            raise
        finally:
            self.stop()

    def stop(self) -> None:
        """From now on a use of what was built is one outside of any builder."""
        self.active = False

    def frame(self, module: torch.nn.Module | None = None) -> AbstractContextManager[None] | None:
        """Around the constructor of ``module``, or a function under ``apply``. None: around it is a frame already, as
        a class's constructor calls that of its base."""
        if module is not None and any(frame.module is module for frame in self._frames):
            return None
        return self._run(_Frame(module))

    @contextmanager
    def _run(self, frame: _Frame) -> Iterator[None]:
        module = frame.module
        self._frames.append(frame)
        try:
            yield
            if module is not None:
                frame.built.append(weakref.ref(module))
            self._settle(frame)
            self._shard(frame)
            if self._load is not None:
                self._round(_alive(frame.built), prepared=False)
        except BaseException:
            self._drop(frame)
            raise
        finally:
            self._frames.remove(frame)
            self._frames[-1].built.extend(frame.built)
        if module is not None:
            self._built(module)
            self._name(module, lambda name, shards: f"{type(module).__name__}.{name}#{shards.ident}")

    def convert(self, module: torch.nn.Module) -> None:
        """Shard a module that exists, as if it were constructed now, part by part: no more than one part is whole at a
        time of what is on the meta device."""
        made: dict[torch.Tensor, torch.nn.Parameter] = {}  # of one on meta; modules may share it
        for child in module.modules():
            with self._run(_Frame(child)):
                if not _materialize(child, self.site.device, made, needs_values=self._load is None):
                    self._unset.append(child)
        self._name(module, lambda name, _: name)

    def _name(self, module: torch.nn.Module, name_of: Callable[[str, Shards], str]) -> None:
        """Until an engine knows better: names that are unlike those of any other parameter built here."""
        for name, param in module.named_parameters():
            shards = shards_of(param)
            if shards is not None and shards.builder is self:
                shards.own.lay_out(name_of(name, shards), shards.group)

    # ---- [1] a use ----

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

    # ---- [2] what was used is put back ----

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
        if shards.gathered and not (fetched.param.dtype == shards.dtype and take_moved(shards)):
            # It was given memory of another shape: it is whole now, and will be cut anew with those of its module.
            LEASES.drop(shards)
            carry(fetched.param, None)
            return
        if not fetched.before.matches(shards.full):
            # What a constructor writes may be random: the value of rank 0 counts.
            meet(f"{self.what}: {shards.name} was written", shards.group, channel=GATHER)
            broadcast(shards.full, 0, shards.everyone, label=shards.name)
            shards.write_back()
        kept = self._free(shards)
        if kept is not None and _shared(kept):
            fetched.watched = (kept, fingerprint(kept))
            frame.put_back.append(fetched)

    def _free(self, shards: Shards) -> torch.Tensor | None:
        """Unless somebody else needs it; returns the memory, which views of it may keep."""
        if shards.holds or shards.persist:
            return None
        kept = shards.full
        shards.release(leave=True)
        self._freed.add(kept.nbytes)
        return kept

    def _drop(self, frame: _Frame) -> None:
        """After an exception: free what was gathered, unwritten."""
        for fetched in frame.fetched.values():
            fetched.hold.release(free=False)
            self._free(fetched.hold.shards)
        frame.fetched.clear()
        frame.put_back.clear()

    # ---- [3] what was made is cut ----

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
            meet(f"zero.Init: {shapes}", self.site.group, channel=GATHER)
        for name, param in whole.values():
            self._cut(name, param)
        for module in modules:
            if shards_among(module._parameters.values()):
                install_state_dict(module)

    def _cut(self, name: str, param: torch.nn.Parameter) -> None:
        site, ident = self.site, next(self._ids)
        self._prepared |= was_prepared([param])
        shards = cut(param, f"{name}#{ident}", ident, site, self)
        self._freed.add(shards.full.numel() * shards.full.element_size())
        if site.remote:
            shards.live_at(shards.source.cpu(), None, remote=True)  # offload moves it on, to pinned memory
        if site.arena is not None:
            shards.live_at(site.arena.keep(shards.source), None, site.arena.files.let_go)

    # ---- [4] the end ----

    def _finish(self) -> None:
        outermost = self._frames[-1]
        self._settle(outermost)
        self._shard(outermost)
        meet("the end of zero.Init", self.site.group, channel=GATHER)
        built = _alive(outermost.built)
        if self._load is None:
            params = (param for module in built for param in module._parameters.values() if param is not None)
            self._round(built, was_prepared(params))
        else:
            self._widen_again()
            self._load(built, self._unset)
            self._settle(outermost)
        self._freed.give_back()

    def abandon(self, error: BaseException) -> None:
        """The block raised: tell the other ranks, which may be waiting for this one."""
        self.stop()
        for frame in self._frames:
            self._drop(frame)
        said = f"{self.what} raised {type(error).__name__}: {error}"
        leave_all(said, error, [self.site.group], [self.site.group], channel=GATHER)

    def _round(self, modules: list[torch.nn.Module], prepared: bool) -> None:
        """Cast the shards of ``modules`` to what they work in, but for those that an engine has taken over by now, or
        that a constructor outside of a nested context is using."""
        # At the end: half of what constructors make are buffers and intermediate values, and a weight that is
        # initialized once more would be drawn in 16 bits. With each module where weights are loaded: few values stay,
        # and all in fp32 would be twice the shards.
        if self.site.dtype is None:
            return
        arena = self.site.arena
        for param, dtype in working_dtypes(modules, self.site.dtype, prepared).items():
            shards = shards_of(param)
            if shards is None or shards.dtype == dtype or shards.holds or shards.conductor is not None:
                continue
            self._narrowed.append((shards, shards.dtype))
            wide = shards.source
            shards.cast(dtype, shards.full.device)
            self._freed.add(wide.nbytes)
            if arena is not None and dtype.itemsize <= wide.dtype.itemsize:  # it fits where the wide one lay
                shards.live_at(wide.view(dtype)[: shards.shard_numel].copy_(shards.source), None)
            elif arena is not None:
                shards.live_at(arena.keep(shards.source), None)

    def _widen_again(self) -> None:
        """What was rounded with its module, before it was seen that the model has 16-bit parameters and those in fp32
        are so on purpose."""
        for shards, dtype in self._narrowed if self._prepared else ():
            shards.cast(dtype, shards.full.device)


def cut(
    param: torch.nn.Parameter, name: str, ident: int, site: Site, builder: Builder | None = None
) -> Shards:
    """Make ``param`` shards of rank 0's value; collective."""
    value = param.detach().to(site.device).contiguous()
    broadcast(value, 0, site.group, label=name)
    param.data = value
    return shard_parameter(param, name, ident, site.within, site.group, builder)


def _alive(refs: list[weakref.ref[torch.nn.Module]]) -> list[torch.nn.Module]:
    return [module for ref in refs if (module := ref()) is not None]


def _deferred(param: torch.nn.Parameter) -> bool:
    """Whether the value does not exist yet."""
    return torch.nn.parameter.is_lazy(param) or param.is_meta


def _materialize(
    module: torch.nn.Module,
    device: torch.device,
    made: dict[torch.Tensor, torch.nn.Parameter],
    needs_values: bool,
) -> bool:
    """Give ``module``'s own tensors on the meta device their memory and first values; False: it could not say these."""
    own = (*module._parameters.values(), *module._buffers.values())
    if not any(tensor is not None and tensor.is_meta for tensor in own):
        return True
    reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
    if reset is None and needs_values:
        raise UsageError(
            f"zero.Init: a {type(module).__name__} is on the meta device and has no reset_parameters() that would give "
            "it values",
            fix="add that method, name files with weights=, or build the model inside the context instead of on meta",
        )
    before = {
        name: param for name, param in module._parameters.items() if param is not None and param.is_meta
    }
    module.to_empty(device=device, recurse=False)
    for name, param in before.items():
        now = module._parameters[name]
        assert now is not None
        module._parameters[name] = made.setdefault(param, now)
    if reset is not None:
        reset()
    return reset is not None


def _shared(value: torch.Tensor) -> bool:
    """Whether somebody else holds a tensor on the same storage as ``value``."""
    count = getattr(torch._C, "_storage_Use_Count", None)
    storage = value.untyped_storage()
    return count is not None and count(storage._cdata) > _OWN_REFERENCES
