"""The whole model, or a module of it, made whole for a while, ahead of time, or for ever."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from zeropipe.comm.leases import LEASES
from zeropipe.errors import UsageError
from zeropipe.runtime.zero.gather.apply import remove_apply
from zeropipe.runtime.zero.gather.coordinator import Coordinator
from zeropipe.runtime.zero.gather.external import hide_external_parameters
from zeropipe.runtime.zero.gather.gather import GatheredParameters
from zeropipe.runtime.zero.gather.shards import Shards, shards_of
from zeropipe.runtime.zero.gather.state_dict import remove_state_dict
from zeropipe.runtime.zero.param import is_trained


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
        for coordinator in _coordinators(gathered.params):
            stack.enter_context(coordinator.silent())
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
    On gloo a gather in two hops is waited for: what this rank does next may be to wait for a rank that needs it.
    """
    found = _shards(module)
    for shards in found:
        shards.start_gather()
        if not shards.pinned:
            shards.pinned = True
            shards.holds += 1
    for shards in found:
        shards.finish_gather(unless_alone=True)
    return Unsharding(module, found)


def reshard(module: torch.nn.Module) -> None:
    """Free what ``unshard`` gathered, unless something else is using it; not collective."""
    for shards in _shards(module):
        if shards.pinned:
            shards.pinned = False
            shards.holds -= 1
            shards.release_if_idle()


def unshard_module(module: torch.nn.Module) -> torch.nn.Module:
    """Make every parameter of ``module`` an ordinary ``nn.Parameter`` with its whole value, for ever. Collective.

    Returns ``module``. Raises UsageError while an engine trains or gathers it: call ``engine.destroy()`` first.
    """
    found = _shards(module)
    for shards in found:
        if is_trained(shards.param) or shards.fetch_for_use is not None:
            raise UsageError(
                f"unshard_module: an engine uses parameter '{shards.name}'. Fix: call engine.destroy() first, or use "
                "'with zero.unsharded(model):'"
            )
    for shards in found:
        param = shards.param
        whole = shards.whole()
        shards.release()
        LEASES.drop(shards)
        param.__class__ = torch.nn.Parameter
        param.data = whole
        del param._zero  # type: ignore[attr-defined]
    for child in module.modules():
        remove_state_dict(child)
        remove_apply(child)
        hide_external_parameters(child)
    return module


def _shards(module: torch.nn.Module) -> list[Shards]:
    found = (shards_of(param) for param in module.parameters())
    return [shards for shards in found if shards is not None]


def _coordinators(params: list[torch.nn.Parameter]) -> list[Coordinator]:
    found: dict[int, Coordinator] = {}
    for param in params:
        shards = shards_of(param)
        owner = getattr(None if shards is None else shards.fetch_for_use, "__self__", None)
        if isinstance(owner, Coordinator):
            found[id(owner)] = owner
    return list(found.values())
