"""What a module's state dict is, and how a saved one is taken back: torch's own protocol, where code of a module
takes part in it, and the values alone where none does.

    plain module                      its parameters and buffers, by name: each rank reads what it holds
    hooks, overridden loading or      a *region*: the module and all below it. Saved is what ``state_dict`` gives;
    saving, extra state               a load goes module by module as ``load_state_dict`` does

A sharded parameter that such code uses is gathered until that module is done, and what was written to it is cut again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys

from zeropipe.checkpoint.save.records import ModelState
from zeropipe.checkpoint.saved_module import Regions, Stored, real
from zeropipe.runtime.pipe.module import PipelineModule
from zeropipe.runtime.zero.gather.shards import shards_of
from zeropipe.runtime.zero.gather.state_dict import Fetching, is_ours

_METHODS = (
    "state_dict",
    "_save_to_state_dict",
    "_load_from_state_dict",
    "get_extra_state",
    "set_extra_state",
)
_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
_FIRST_VERSION = {"version": 1}  # what torch's own class says; only others are written


def takes_part(module: nn.Module) -> bool:
    """Whether code of ``module`` itself runs in a save or a load of its state."""
    own = module.__dict__
    if any(name in own or getattr(type(module), name) is not getattr(nn.Module, name) for name in _METHODS):
        return True
    return any(not is_ours(hook) for hooks in _HOOKS for hook in getattr(module, hooks).values())


def regions_of(module: nn.Module) -> tuple[str, ...]:
    """Prefixes of the topmost modules that take part; the whole where the root loads itself."""
    if _overrides_load(module):
        return ("",)
    return tuple(prefix for prefix, found in _walk(module, "") if takes_part(found))


def _overrides_load(module: nn.Module) -> bool:
    return (
        "load_state_dict" in module.__dict__ or type(module).load_state_dict is not nn.Module.load_state_dict
    )


def _walk(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """Every module by its prefix, as in a state dict: one that is there twice comes twice. Not below a region."""
    yield prefix, module
    if not takes_part(module):
        for name, child in module._modules.items():
            if child is not None:
                yield from _walk(child, f"{prefix}{name}.")


def destination(module: nn.Module) -> ModelState:
    """Where a load puts values by their names: the module's own tensors, but for those of its regions."""
    prefixes = regions_of(module)
    inside = frozenset(prefixes)
    first: dict[int, str] = {id(param): name for name, param in module.named_parameters()}
    tensors: dict[str, torch.Tensor] = {}
    tied: dict[str, str] = {}
    buffers: list[str] = []
    for name, param in module.named_parameters(remove_duplicate=False):
        if first[id(param)] != name:
            tied[name] = first[id(param)]
    for prefix, owner in _walk(module, "") if "" not in inside else ():
        if prefix in inside:
            continue
        held: list[tuple[str, torch.Tensor]] = []
        held += [(prefix + n, p) for n, p in owner._parameters.items() if p is not None]
        held += [
            (prefix + n, b)
            for n, b in owner._buffers.items()
            if b is not None and n not in owner._non_persistent_buffers_set
        ]
        for name, value in held:
            known = first.setdefault(id(value), name)
            if known != name:
                tied[name] = known
            if not isinstance(value, nn.Parameter):
                buffers.append(name)
            # One whose first name is in a region is filled all the same.
            if known not in tensors and shards_of(value) is None:
                tensors[name] = value.detach()
    frozen = tuple(name for name, param in module.named_parameters() if not param.requires_grad)
    return ModelState(
        tensors, tuple(buffers), frozen, tied, regions=prefixes, peer_names=_peers(module, first)
    )


def capture(module: nn.Module, exclude_frozen: bool = False) -> ModelState:
    """What ``module.state_dict()`` gives, by reference; parameters that are sharded are left to the flats."""
    params = dict(module.named_parameters())
    first = {id(p): name for name, p in params.items()}
    tensors: dict[str, torch.Tensor] = {}
    tied: dict[str, str] = {}
    extra: dict[str, Any] = {}
    kinds: dict[str, list[str]] = {"buffer": [], "computed": [], "excluded": []}
    prefixes = regions_of(module)
    state, versions = _state(module, prefixes)
    names_of_buffers = {name for name, _ in module.named_buffers(remove_duplicate=False)}
    seen: dict[int, str] = dict(first)
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            extra[name] = value
            continue
        # A tied parameter is saved under the first of its names, which is the one that the optimizer knows.
        known = seen.setdefault(id(value), name)
        if known != name and known in state:
            tied[name] = known
            continue
        if id(value) not in first:
            kinds["buffer" if name in names_of_buffers else "computed"].append(name)
        elif not value.requires_grad and exclude_frozen:
            kinds["excluded"].append(name)
            continue
        elif shards_of(value) is not None:
            if known != name:
                tied[name] = known  # a hook has renamed it
            continue
        tensors[name] = value.detach()
    inside = Regions(prefixes)
    hidden = (n for n in params if n not in state and inside.of(n) is not None)
    model = ModelState(
        tensors,
        tuple(kinds["buffer"]),
        tuple(name for name, param in params.items() if not param.requires_grad),
        tied,
        excluded=tuple(kinds["excluded"]),
        extra=extra,
        peer_names=_peers(module, first),
        regions=prefixes,
        computed=tuple(kinds["computed"]),
        hidden=tuple(hidden),
        versions=versions,
    )
    return (
        replace(model, layers=tuple(_layers(module, model))) if isinstance(module, PipelineModule) else model
    )


def _layers(module: PipelineModule, model: ModelState) -> Iterator[tuple[int, str, str]]:
    """The tensors that go to files by layer; a tied one is in several."""
    by_module: dict[str, list[tuple[str, str]]] = {}
    for name, known in [(n, n) for n in model.tensors] + list(model.tied.items()):
        head, _, key = name.partition(".")
        if known in model.tensors:
            by_module.setdefault(head, []).append((key, known))
    heads = {id(child): name for name, child in reversed(module._modules.items())}
    for layer in module.local_layers():
        child = module.layer_module(layer)
        for key, name in by_module.get(heads[id(child)], ()) if child is not None else ():
            yield layer, key, name


def _peers(module: nn.Module, first: Mapping[int, str]) -> dict[str, str]:
    """DeepSpeed calls a tied layer's parameters ``tied_modules.KEY.NAME``."""
    if not isinstance(module, PipelineModule):
        return {}
    return {
        f"tied_modules.{key}.{name}": first[id(param)]
        for key, layer in module.tied_modules.items()
        for name, param in layer.named_parameters()
        if id(param) in first
    }


def _state(module: nn.Module, prefixes: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The state dict with the parameters themselves in it, and its metadata where that is not the usual."""
    with torch.no_grad():
        if not prefixes:
            state: Any = module.state_dict(keep_vars=True)
        else:
            state = OrderedDict()
            state._metadata = OrderedDict()
            with Fetching(module) as fetching:
                _save(module, state, "", fetching)
    versions = getattr(state, "_metadata", None) or {}
    return state, {key: dict(value) for key, value in versions.items() if value != _FIRST_VERSION}


def _save(module: nn.Module, state: Any, prefix: str, fetching: Fetching) -> None:
    """``module.state_dict``, with what code of single modules has gathered freed after each of them."""
    if not takes_part(module):
        state._metadata[prefix[:-1]] = {"version": module._version}
        module._save_to_state_dict(state, prefix, True)
        for name, child in module._modules.items():
            if child is not None:
                _save(child, state, f"{prefix}{name}.", fetching)
        return
    given = module.state_dict(destination=state, prefix=prefix, keep_vars=True)
    if given is not None and given is not state:  # a hook, or an override, made another dict
        state.clear()
        state.update(given)
    fetching.keep_copies(state)
    fetching.let_go()


@dataclass(slots=True)
class Outcome:
    """What ``load_state_dict`` would report; all of it by the whole model's names."""

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


def load_regions(
    module: nn.Module,
    prefixes: tuple[str, ...],
    saved: Mapping[str, Any],
    versions: Mapping[str, Mapping[str, Any]] | None,
    strict: bool,
) -> Outcome:
    """Load the regions of ``module`` from ``saved`` as ``module.load_state_dict`` would; collective at stage 3."""
    outcome = Outcome()
    inside = Regions(prefixes)
    parts: dict[str, OrderedDict[str, Any]] = {prefix: OrderedDict() for prefix in prefixes}
    for key, value in saved.items():
        prefix = inside.of(key)
        if prefix is not None:
            parts[prefix][key] = value
    with Fetching(module) as fetching:
        loading = _Loading(outcome, versions, fetching)
        if _overrides_load(module):
            loading.whole(module, parts[""], strict)
        else:
            for prefix, found in _walk(module, ""):
                if prefix in parts:
                    loading.module(found, parts[prefix], prefix)
    return outcome


class _Loading:
    def __init__(
        self, outcome: Outcome, versions: Mapping[str, Mapping[str, Any]] | None, fetching: Fetching
    ) -> None:
        self._outcome = outcome
        self._versions = versions
        self._fetching = fetching

    def whole(self, module: nn.Module, saved: OrderedDict[str, Any], strict: bool) -> None:
        """By the module's own ``load_state_dict``."""
        prefixes = (name for name, _ in module.named_modules(remove_duplicate=False))
        saved._metadata = {name: self._metadata(name) for name in prefixes}  # type: ignore[attr-defined]
        with _Kept(module, list(module.modules())):
            try:
                found = module.load_state_dict(saved, strict=strict)
            except RuntimeError as error:
                if not str(error).startswith("Error(s) in loading"):
                    raise
                self._outcome.errors.append(str(error))
                return
        if isinstance(found, tuple) and len(found) == 2:
            self._outcome.missing += found[0]
            self._outcome.unexpected += found[1]

    def module(self, module: nn.Module, saved: OrderedDict[str, Any], prefix: str) -> None:
        """As the function of that purpose inside of ``load_state_dict``, for ``module`` and those below it."""
        special = takes_part(module)
        if special:  # it may keep what it is given
            saved.update(
                {k: real(v) for k, v in saved.items() if "." not in k[len(prefix) :] and _is_stored(v)}
            )
        out = self._outcome
        with _Kept(module, [module] if special else []):
            module._load_from_state_dict(
                saved, prefix, self._metadata(prefix[:-1]), True, out.missing, out.unexpected, out.errors
            )
        below: dict[str, OrderedDict[str, Any]] = {}
        for key, value in saved.items():  # which hooks may have changed by now
            if key.startswith(prefix):
                name, dot, _ = key[len(prefix) :].partition(".")
                if dot:
                    below.setdefault(name, OrderedDict())[key] = value
        for name, child in module._modules.items():
            if child is not None:
                self.module(child, below.pop(name, OrderedDict()), f"{prefix}{name}.")
        for hook in module._load_state_dict_post_hooks.values():
            hook(module, _IncompatibleKeys(out.missing, out.unexpected))
        if special:
            self._fetching.let_go()

    def _metadata(self, name: str) -> dict[str, Any]:
        if self._versions is None:
            return {}
        return dict(self._versions.get(name, _FIRST_VERSION))


class _Kept:
    """Parameters stay the objects, in the memory, that the optimizer knows: what is put in their place is copied in."""

    def __init__(self, root: nn.Module, modules: list[nn.Module]) -> None:
        self._before = [
            (owner, name, param, param.data if shards_of(param) is None else None)
            for owner in modules
            for name, param in owner._parameters.items()
            if param is not None and not nn.parameter.is_lazy(param)
        ]
        self._modules = modules

    def __enter__(self) -> None:
        pass

    @torch.no_grad()
    def __exit__(self, *_: object) -> None:
        for owner, name, param, data in self._before:
            now = owner._parameters.get(name)
            if now is not None and now is not param:
                param.copy_(now.detach())
                owner._parameters[name] = param
            elif data is not None and param.data_ptr() != data.data_ptr() and param.shape == data.shape:
                data.copy_(param.data)
                param.data = data
        for owner in self._modules:
            for held in (owner._buffers, owner.__dict__):
                for name, value in list(held.items()):
                    if isinstance(value, Stored):
                        held[name] = real(value)


def _is_stored(value: Any) -> bool:
    return isinstance(value, Stored)
