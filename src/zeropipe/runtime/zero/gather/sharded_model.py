"""Turns a model into one of stage 3 (every parameter a shard, hooks that gather units as they run), and makes it whole
again: for a while, ahead of time, or for ever."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial

import torch

from zeropipe.comm.collectives import expose
from zeropipe.comm.group import Group
from zeropipe.comm.leases import LEASES
from zeropipe.config.schema_zero import ZeroOptimization
from zeropipe.errors import DesyncError, UsageError
from zeropipe.layout.flat import flat_shards
from zeropipe.runtime.zero.gather.build import Site, cut
from zeropipe.runtime.zero.gather.coordinator import Coordinator
from zeropipe.runtime.zero.gather.fetch_plan import Budget
from zeropipe.runtime.zero.gather.hooks import ModelHooks
from zeropipe.runtime.zero.gather.init import install_apply, remove_apply
from zeropipe.runtime.zero.gather.shards import Shards, shards_among, shards_in, shards_of
from zeropipe.runtime.zero.gather.state_dict import install_state_dict, remove_state_dict
from zeropipe.runtime.zero.gather.whole import GatheredParameters
from zeropipe.runtime.zero.hold.offload import Offload
from zeropipe.runtime.zero.hold.reducer import Reducer
from zeropipe.runtime.zero.marks import hide_external_parameters, leaf_modules
from zeropipe.runtime.zero.param import GATHER, Need, carry, is_trained
from zeropipe.runtime.zero.replication import Replication
from zeropipe.streams import STREAMS
from zeropipe.tensor.memory import FreedMemory

# Elements at least (24 MiB of fp32): with less in flight a rank often waits for a peer.
AUTO_PREFETCH_NUMEL = 3 * 2**21
# Small parameters travel together, in messages of up to so many elements (512 KiB of fp32, from where on a message
# costs what its bytes do), but never so that a large part of a small model is whole at a time.
TOGETHER_NUMEL, TOGETHER_PARTS = 2**17, 16


def budget(zero: ZeroOptimization, model: int, largest_unit: int) -> Budget:
    """In elements, for a model that gathers and frees ``model``. What the user has not chosen follows from it, so that
    little more than two units live."""
    prefetch = zero.chosen("stage3_prefetch_bucket_size")
    prefetch = max(largest_unit, AUTO_PREFETCH_NUMEL) if prefetch is None else prefetch
    live, reuse = zero.chosen("stage3_max_live_parameters"), zero.chosen("stage3_max_reuse_distance")
    return Budget(
        prefetch,
        2**63 - 1 if live is None else live,
        0 if reuse is None else reuse,
        min(TOGETHER_NUMEL, model // TOGETHER_PARTS, prefetch // 2),
    )


class ShardedModel:
    """A module whose parameters are shards, and what gathers them. Collective to make.

    ``group``: the ranks that train together. ``parts``: how they divide into those that share one copy of the
    shards; by default all do.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        group: Group,
        zero: ZeroOptimization,
        device: torch.device,
        dtypes: Mapping[torch.Tensor, torch.dtype] | None = None,
        parts: Replication | None = None,
    ) -> None:
        self.module = module
        self._offload: Offload | None = None
        # [1] Every parameter becomes a shard, of rank 0's value.
        self.parts = Replication(group) if parts is None else parts
        self.group = self.parts.shard
        for part in (self.parts.shard, self.parts.replicas):
            LEASES.hold(part, self)
        self.shards = shard_module(module, Site(group, self.group, device), dtypes or {})
        # [2] Before units are hooked, whose sizes leave out what is gathered once and for all.
        self.persistent = self._persist(zero)
        # [3] Each module with parameters becomes a unit.
        sharded = sum(shards.numel for shards in self.shards if not shards.persist)
        self.coordinator = Coordinator(self.group, budget(zero, sharded, 0), group)
        self.hooks = ModelHooks(module, self.coordinator, leaf_modules(module, zero.leaf_module))
        # [4] Budgets that the user left open follow from the largest unit, and what may be fetched compiled from those.
        largest = max((unit.numel for unit in self.coordinator.units), default=0)
        self.coordinator.budget = budget(zero, sharded, largest)
        self.hooks.compiled.budget_of = partial(budget, zero, sharded)
        self.hooks.compiled.look()
        for child in module.modules():
            (install_apply if zero.override_module_apply else remove_apply)(child)

    def conduct(self, reducer: Reducer) -> None:
        """Let the reductions of gradients and the gathers of parameters take care of each other."""
        # A rank that waits for a reduction while its peer waits for it in a gather would wait for ever: gathers carry
        # how far each rank's reductions are, and the reducer waits for no more.
        reducer.serve(conductor=self.coordinator)
        self.coordinator.reductions = reducer

    def before_write(self) -> None:
        """Shards are about to be written where they lie: return when no rank reads them any more."""
        self.coordinator.peers.drain()

    def end_backward(self) -> None:
        """A whole backward is over."""
        self.coordinator.end_backward()

    def settle(self) -> None:
        """A micro-step ends: free what a finished or failed pass left gathered; every rank does so now."""
        self.coordinator.end_backward(step=True)
        self.coordinator.meet("step")

    def destroy(self) -> None:
        """Remove every hook and end the process groups of this engine; the parameters stay shards, and their group
        with them, until ``zero.unshard_module`` makes them whole."""
        self.hooks.remove()
        self._end_all()
        # What stayed for this engine's sake is freed, unless another or a user's context still holds it.
        for shards in self.persistent:
            shards.stay(False)
            shards.release_if_idle()
        for shards in self.shards:
            if shards.own.exposed is not None:
                shards.live_at(shards.source.clone(), None)
        if self._offload is not None:
            self._offload.close()
        LEASES.drop(self)

    def _end_all(self) -> None:
        # Ranks that have parted, of which an error has told already, leave gathers under way. Each is given up with a
        # word of its own and is then at rest, so this ends.
        while True:
            try:
                self.coordinator.end_backward(step=True)
                return
            except DesyncError:
                pass

    def place(self, offload: Offload) -> None:
        """Put the shards that no optimizer holds where the policy wants what gathers read, or where the ranks of one
        host read each other's; collective."""
        self._offload = offload
        by_dtype: dict[torch.dtype, list[Shards]] = {}
        for shards in self.shards:
            kept = shards.own.master is not None or is_trained(shards.param) or shards.own.exposed is not None
            if not kept and (offload.is_remote(shards.full.device) or shards.full.device.type == "cpu"):
                by_dtype.setdefault(shards.dtype, []).append(shards)
        # One place for all of a dtype: one pinned block, or one file, instead of one for each parameter.
        for dtype, members in by_dtype.items():
            device = members[0].full.device
            layout = flat_shards(((s.name, (s.shard_numel,), "") for s in members), 1)
            if offload.is_remote(device):
                exposed, flat = None, offload.source(layout.numel, dtype, device)
            elif (exposed := expose(layout.numel, dtype, self.group, GATHER)) is not None:
                flat = exposed.own
            else:
                continue
            for index, shards in enumerate(members):
                room = slice(*layout.tensor_range(index))
                offload.copy(flat[room], shards.source, device)
                if exposed is None:
                    shards.live_at(flat[room], None, offload.let_go, offload.read_ahead, remote=True)
                else:
                    shards.live_at(flat[room], None, exposed=(exposed, room))
            STREAMS.of(device).host_turn()

    def _persist(self, zero: ZeroOptimization) -> list[Shards]:
        """Gather the small parameters once and for all, as far as the model's threshold allows."""
        # First come, first served in the order of the model, which is the same on every rank, as a gather needs all.
        chosen, total = [], 0
        for shards in self.shards:
            small = shards.numel <= zero.stage3_param_persistence_threshold
            if small and total + shards.numel <= zero.stage3_model_persistence_threshold:
                total += shards.numel
                chosen.append(shards)
        for shards in chosen:
            shards.stay(True)
            shards.start_gather()
        for shards in chosen:
            shards.finish_gather()
        return chosen


def shard_module(
    module: torch.nn.Module, site: Site, dtypes: Mapping[torch.Tensor, torch.dtype]
) -> list[Shards]:
    """Make every parameter of ``module`` a shard at ``site``, with rank 0's values; collective.

    Parameters that zero.Init made shards already keep their values; ``dtypes``: what parameters work in, where it may
    not be their own dtype. Returns the shards in the order of ``named_parameters``.
    """
    group, within = site.group, site.within
    made, freed = list[Shards](), FreedMemory()
    for ident, (name, param) in enumerate(module.named_parameters()):
        nbytes = param.nbytes
        shards = shards_of(param) or cut(param, name, ident, site)
        freed.add(nbytes)
        if shards.group.ranks != within.ranks:
            raise UsageError(
                f"parameter '{name}' was made shards of other ranks",
                rank=group.ranks[group.rank],
                expected=f"ranks {list(within.ranks)}",
                found=f"ranks {list(shards.group.ranks)}",
                fix="give zero.Init (or MiCS_Init) the configuration that initialize gets, and around a "
                "PipelineModule also mpu=PipelineParallelGrid(topology)",
            )
        # Also those of zero.Init, which could not know the model's names.
        shards.adopt(name, ident, within, group)
        shards.cast(dtypes.get(param, shards.dtype), site.device)
        made.append(shards)
    freed.give_back()
    for child in module.modules():
        install_state_dict(child)
    return made


@contextmanager
def unsharded(
    model: torch.nn.Module, modifier_rank: int | None = None, enabled: bool = True
) -> Iterator[torch.nn.Module]:
    """``model`` with every parameter whole on every rank: gathered once, freed on exit. Collective, at both ends.

    Inside, its forward communicates nothing, so ranks may run it a different number of times (generation).
    Memory: the whole model in its working precision. Edits: as in ``GatheredParameters``.
    """
    gathered = GatheredParameters(model, modifier_rank, enabled=enabled)
    with ExitStack() as stack:
        stack.enter_context(gathered)
        # No gather will follow in which a rank that runs other modules would be missed: words are left unsaid.
        for conductor in dict.fromkeys(shards.conductor for shards in shards_among(gathered.params)):
            if conductor is not None:
                stack.enter_context(conductor.silent())
        yield model


class Unsharding:
    """Gathers under way. ``wait`` returns when the parameters may be read."""

    def __init__(self, module: torch.nn.Module, shards: list[Shards]) -> None:
        self.module = module
        self._shards = shards

    def wait(self) -> torch.nn.Module:
        for shards in self._shards:
            shards.finish_gather()
        return self.module


def unshard(module: torch.nn.Module) -> Unsharding:
    """Start to gather every parameter of ``module`` and keep them until ``reshard``. Collective; does not wait.

        ahead = zero.unshard(block)     # beside other work
        ...
        ahead.wait()

    Repeating it changes nothing. Edits are dropped by ``reshard``: edit inside ``GatheredParameters``.
    """
    found = shards_in(module)
    for shards in found:
        shards.start_gather()
        shards.pin(True)
    # On gloo a gather in two hops is waited for: what this rank does next may be to wait for a rank that needs it.
    for shards in found:
        shards.finish_gather(unless_alone=True)
    return Unsharding(module, found)


def reshard(module: torch.nn.Module) -> None:
    """Free what ``unshard`` gathered, unless something else is using it; not collective."""
    for shards in shards_in(module):
        if shards.needs[Need.PIN]:
            shards.pin(False)
            shards.release_if_idle()


def unshard_module(module: torch.nn.Module) -> torch.nn.Module:
    """Make every parameter of ``module`` an ordinary ``nn.Parameter`` with its whole value, for ever. Collective.

    Returns ``module``. Raises UsageError while an engine trains or gathers it: call ``engine.destroy()`` first.
    """
    found = shards_in(module)
    for shards in found:
        if is_trained(shards.param) or shards.conductor is not None:
            raise UsageError(
                f"unshard_module: an engine uses parameter '{shards.name}'",
                fix="call engine.destroy() first, or use 'with zero.unsharded(model):'",
            )
    # One by one, so that no more than one parameter is there twice.
    for shards in found:
        param = shards.param
        whole = shards.whole()
        shards.release()
        LEASES.drop(shards)
        param.__class__ = torch.nn.Parameter
        param.data = whole
        carry(param, None)
    # All that stands on modules themselves; the hooks of units went with their engine.
    for child in module.modules():
        remove_state_dict(child)
        remove_apply(child)
        hide_external_parameters(child)
    return module
