"""What a module's state dict is, and how a saved one is taken back: torch's own protocol, where code of a module
takes part in it, and the values alone where none does.

    plain module                      its parameters and buffers, by name: each rank reads what it holds
    hooks, overridden loading or      a *region*: the module and all below it. Saved is what ``state_dict`` gives;
    saving, extra state               a load goes module by module as ``load_state_dict`` does

A sharded parameter that such code uses is gathered until that module is done, and what was written to it is cut again.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys

from zeropipe.checkpoint.reader import Regions, Stored, real
from zeropipe.checkpoint.save.files import new_file, temporary
from zeropipe.checkpoint.save.records import COMPUTED, ModelState, ModuleRest
from zeropipe.comm.collectives import broadcast_object
from zeropipe.errors import CheckpointError
from zeropipe.runtime.engine.parts import Parts
from zeropipe.runtime.pipe.module import PipelineModule
from zeropipe.runtime.zero.gather.shards import shards_of
from zeropipe.runtime.zero.gather.state_dict import Fetching, is_ours

# By these a module's own code takes part in a save or a load of its state.
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


def _takes_part(module: nn.Module) -> bool:
    own, cls = vars(module), type(module)
    if any(name in own or getattr(cls, name) is not getattr(nn.Module, name) for name in _METHODS):
        return True
    return any(not is_ours(hook) for hooks in _HOOKS for hook in getattr(module, hooks).values())


def _loads_itself(root: nn.Module) -> bool:
    return "load_state_dict" in vars(root) or type(root).load_state_dict is not nn.Module.load_state_dict


def _walk(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module, bool]]:
    """Every module by its prefix, as in a state dict (one that is there twice comes twice), and whether a region begins
    there. Not below a region."""
    takes_part = _takes_part(module)
    yield prefix, module, takes_part
    if not takes_part:
        for name, child in module._modules.items():
            if child is not None:
                yield from _walk(child, f"{prefix}{name}.")


def _outline(module: nn.Module) -> tuple[ModelState, dict[int, str]]:
    """What a save and a load both know of a module before its values, and the first name of each parameter, by id."""
    first = {id(param): name for name, param in module.named_parameters()}
    peers: dict[str, str] = {}
    if isinstance(module, PipelineModule):
        # DeepSpeed calls a tied layer's parameters ``tied_modules.KEY.NAME``.
        for key, layer in module.tied_modules.items():
            for name, param in layer.named_parameters():
                if id(param) in first:
                    peers[f"tied_modules.{key}.{name}"] = first[id(param)]
    # Where the root loads itself, all of it is one region.
    regions = (
        ("",) if _loads_itself(module) else tuple(prefix for prefix, _, begins in _walk(module) if begins)
    )
    kinds = {name: "frozen" for name, param in module.named_parameters() if not param.requires_grad}
    return ModelState({}, kinds, peer_names=peers, regions=regions), first


# ---- a load: values to their names ----


def destination(module: nn.Module) -> ModelState:
    """Where a load puts values by their names: the module's own tensors, but for those of its regions."""
    outline, first = _outline(module)
    tensors: dict[str, torch.Tensor] = {}
    tied = {
        name: first[id(param)]
        for name, param in module.named_parameters(remove_duplicate=False)
        if first[id(param)] != name
    }
    for prefix, owner, region in _walk(module) if outline.regions != ("",) else ():
        if region:
            continue
        persistent = {n: b for n, b in owner._buffers.items() if n not in owner._non_persistent_buffers_set}
        for name, value in (*owner._parameters.items(), *persistent.items()):
            if value is None:
                continue
            key = prefix + name
            known = first.setdefault(id(value), key)
            if known != key:
                tied[key] = known
            # One whose first name is in a region is filled all the same.
            if known not in tensors and shards_of(value) is None:
                tensors[key] = value.detach()
    return replace(outline, tensors=tensors, tied=tied)


# ---- a save: what the state dict holds ----


def capture(module: nn.Module, exclude_frozen: bool = False) -> ModelState:
    """What ``module.state_dict()`` gives, by reference; parameters that are sharded are left to the flats."""
    outline, first = _outline(module)
    state, versions = _state(module, outline.regions)
    tensors: dict[str, torch.Tensor] = {}
    tied: dict[str, str] = {}
    extra: dict[str, Any] = {}
    kinds = dict(outline.kinds)
    excluded: list[str] = []
    names_of_buffers = {name for name, _ in module.named_buffers(remove_duplicate=False)}
    seen = dict(first)
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
            kinds[name] = "buffer" if name in names_of_buffers else COMPUTED
        elif not value.requires_grad and exclude_frozen:
            excluded.append(name)
            continue
        elif shards_of(value) is not None:
            if known != name:
                tied[name] = known  # a hook has renamed it
            continue
        tensors[name] = value.detach()
    inside = Regions(outline.regions)
    hidden = (name for name in first.values() if name not in state and inside.of(name) is not None)
    return replace(
        outline,
        tensors=tensors,
        kinds=kinds,
        tied=tied,
        rest=ModuleRest(extra, versions, frozenset(hidden)),
        excluded=tuple(excluded),
        layers=tuple(_layers(module, tensors, tied)) if isinstance(module, PipelineModule) else (),
    )


def _layers(
    module: PipelineModule, tensors: Mapping[str, torch.Tensor], tied: Mapping[str, str]
) -> Iterator[tuple[int, str, str]]:
    """The tensors that go to files by layer; a tied one is in several."""
    by_module: dict[str, list[tuple[str, str]]] = {}
    for name, known in [*((n, n) for n in tensors), *tied.items()]:
        head, _, key = name.partition(".")
        if known in tensors:
            by_module.setdefault(head, []).append((key, known))
    heads = {id(child): name for name, child in reversed(module._modules.items())}
    for layer in module.local_layers():
        child = module.layer_module(layer)
        for key, name in by_module.get(heads[id(child)], ()) if child is not None else ():
            yield layer, key, name


def _state(module: nn.Module, regions: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The state dict with the parameters themselves in it, and its metadata where that is not the usual."""
    state: Any = OrderedDict()
    with torch.no_grad():
        if not regions:
            state = module.state_dict(keep_vars=True)
        else:
            # As ``state_dict`` does it, with what code of single modules has gathered freed after each of them.
            state._metadata = OrderedDict()
            with Fetching(module) as fetching:
                for prefix, part, region in _walk(module):
                    if not region:
                        state._metadata[prefix[:-1]] = {"version": part._version}
                        part._save_to_state_dict(state, prefix, True)
                        continue
                    given = part.state_dict(destination=state, prefix=prefix, keep_vars=True)
                    if given is not None and given is not state:  # a hook, or an override, made another dict
                        state.clear()
                        state.update(given)
                    fetching.keep_copies(state)
                    fetching.let_go()
    versions = getattr(state, "_metadata", None) or {}
    return state, {key: dict(value) for key, value in versions.items() if value != _FIRST_VERSION}


# ---- a load of regions: by their own code ----


@dataclass(slots=True)
class Outcome:
    """What ``load_state_dict`` would report; all of it by the whole model's names."""

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    versions: Mapping[str, Mapping[str, Any]] | None = None  # the saved metadata; None where nobody knows it

    def metadata(self, name: str) -> dict[str, Any]:
        return {} if self.versions is None else dict(self.versions.get(name, _FIRST_VERSION))


def load_regions(
    module: nn.Module,
    regions: tuple[str, ...],
    saved: Mapping[str, Any],
    versions: Mapping[str, Mapping[str, Any]] | None,
    strict: bool,
) -> Outcome:
    """Load the regions of ``module`` from ``saved`` as ``module.load_state_dict`` would; collective at stage 3."""
    outcome = Outcome(versions=versions)
    inside = Regions(regions)
    parts: dict[str, OrderedDict[str, Any]] = {prefix: OrderedDict() for prefix in regions}
    for key, value in saved.items():
        prefix = inside.of(key)
        if prefix is not None:
            parts[prefix][key] = value
    with Fetching(module) as fetching:
        if _loads_itself(module):
            _load_whole(module, parts[""], strict, outcome)
        else:
            for prefix, found, region in _walk(module):
                if region:
                    _load_part(found, parts[prefix], prefix, outcome, fetching)
    return outcome


def _load_whole(module: nn.Module, saved: OrderedDict[str, Any], strict: bool, outcome: Outcome) -> None:
    """By the module's own ``load_state_dict``."""
    prefixes = (name for name, _ in module.named_modules(remove_duplicate=False))
    saved._metadata = {name: outcome.metadata(name) for name in prefixes}  # type: ignore[attr-defined]
    with _staying(*module.modules()):
        try:
            found = module.load_state_dict(saved, strict=strict)
        except RuntimeError as error:
            if not str(error).startswith("Error(s) in loading"):
                raise
            outcome.errors.append(str(error))
            return
    if isinstance(found, tuple) and len(found) == 2:
        outcome.missing += found[0]
        outcome.unexpected += found[1]


def _load_part(
    module: nn.Module, saved: OrderedDict[str, Any], prefix: str, out: Outcome, fetching: Fetching
) -> None:
    """As the function of that purpose inside of ``load_state_dict``, for ``module`` and those below it."""
    takes_part = _takes_part(module)
    if takes_part:  # it may keep what it is given
        own = {k: v for k, v in saved.items() if isinstance(v, Stored) and "." not in k[len(prefix) :]}
        saved.update({key: real(value) for key, value in own.items()})
    with _staying(*[module] if takes_part else []):
        module._load_from_state_dict(
            saved, prefix, out.metadata(prefix[:-1]), True, out.missing, out.unexpected, out.errors
        )
    below: dict[str, OrderedDict[str, Any]] = {}
    for key, value in saved.items():  # which hooks may have changed by now
        if key.startswith(prefix):
            name, dot, _ = key[len(prefix) :].partition(".")
            if dot:
                below.setdefault(name, OrderedDict())[key] = value
    for name, child in module._modules.items():
        if child is not None:
            _load_part(child, below.pop(name, OrderedDict()), f"{prefix}{name}.", out, fetching)
    for hook in module._load_state_dict_post_hooks.values():
        hook(module, _IncompatibleKeys(out.missing, out.unexpected))
    if takes_part:
        fetching.let_go()


@contextmanager
def _staying(*modules: nn.Module) -> Iterator[None]:
    """Parameters stay the objects, in the memory, that the optimizer knows: what is put in their place is copied in."""
    before = [
        (owner, name, param, param.data if shards_of(param) is None else None)
        for owner in modules
        for name, param in owner._parameters.items()
        if param is not None and not nn.parameter.is_lazy(param)
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for owner, name, param, data in before:
                now = owner._parameters.get(name)
                if now is not None and now is not param:
                    param.copy_(now.detach())
                    owner._parameters[name] = param
                elif data is not None and param.data_ptr() != data.data_ptr() and param.shape == data.shape:
                    data.copy_(param.data)
                    param.data = data
            # What it keeps beside them is read before the checkpoint's files are closed.
            for owner in modules:
                for held in (owner._buffers, vars(owner)):
                    held.update(
                        {name: real(value) for name, value in held.items() if isinstance(value, Stored)}
                    )


# ---- the weights alone ----


def load_weights(parts: Parts, state: Mapping[str, Any], strict: bool) -> Any:
    """See ``engine.load_module_state_dict``."""
    outcome = parts.module.load_state_dict(state, strict=strict)
    for partition in parts.optimizer.partitions if parts.optimizer is not None else ():
        partition.values.refresh_master()
    return outcome


def module_state(module: nn.Module, exclude_frozen: bool) -> dict[str, Any]:
    """References; without the parameters that do not require gradients where they are not wanted (buffers stay)."""
    state = module.state_dict()
    if not exclude_frozen:
        return state
    frozen = {name for name, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad}
    return {name: value for name, value in state.items() if name not in frozen}


def whole_weights(parts: Parts, exclude_frozen: bool) -> dict[str, Any]:
    """In host memory on the first rank, each tensor with a storage of its own size; empty on the others; collective."""
    state = module_state(parts.module, exclude_frozen)
    copies: dict[tuple[Any, ...], torch.Tensor] = {}

    def copy(value: Any) -> Any:
        if not torch.is_tensor(value):
            return value
        # Tied tensors stay tied: a file holds them once. Empty ones have no address to be told apart by.
        where = (value.data_ptr(), value.dtype, tuple(value.shape), value.stride())
        if value.numel() == 0 or where not in copies:
            copies[where] = value.detach().cpu().clone()
        return copies[where]

    return {name: copy(value) for name, value in state.items()} if parts.first else {}


def save_weights(parts: Parts, target: Path, exclude_frozen: bool) -> bool:
    """See ``engine.save_16bit_model``."""
    zero = parts.config.zero_optimization
    if zero.stage == 3 and not zero.stage3_gather_16bit_weights_on_model_save:
        parts.say(
            "save_16bit_model wrote nothing: at stage 3 it needs the config key "
            "zero_optimization.stage3_gather_16bit_weights_on_model_save: true"
        )
        return False
    state = whole_weights(parts, exclude_frozen)
    problem = None
    if parts.first and not parts.group.imagined:  # a rehearsal has nothing to save
        draft = temporary(target)
        # Under a temporary name first, so that a kill leaves no half file.
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with new_file(draft) as file:
                torch.save(state, file)  # type: ignore[arg-type]
            os.replace(draft, target)
        except OSError as error:
            problem = str(error)
            with suppress(OSError):  # the error to tell is the first
                draft.unlink()
    problem = broadcast_object(problem, 0, parts.group, label="save_16bit_model")
    if problem is not None:
        raise CheckpointError(
            f"the weights cannot be written: {problem}", fix="free space there, or save elsewhere"
        )
    return True
