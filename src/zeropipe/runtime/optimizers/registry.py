"""Optimizers by the name that a config gives, and which of all optimizers may step on a 1-D shard."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal

import torch

from zeropipe.errors import ConfigError, UnsupportedOptimizerError, describe
from zeropipe.names import homes, lazy
from zeropipe.runtime.optimizers.fused import (
    FUSED_DEVICES,
    DeepSpeedCPUAdagrad,
    DeepSpeedCPUAdam,
    DeepSpeedCPULion,
    FusedAdam,
    FusedLamb,
    FusedLion,
    Lion,
    can_fuse,
    held,
    refuse,
)
from zeropipe.runtime.optimizers.muon import Muon, split_groups
from zeropipe.runtime.optimizers.shard_view import ShardAware

Kind = Literal["elementwise", "shard_aware", "whole"]

ELEMENTWISE: tuple[type[torch.optim.Optimizer], ...] = (
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.SGD,
    torch.optim.Adagrad,
    torch.optim.RMSprop,
    torch.optim.Adadelta,
    torch.optim.Adamax,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.ASGD,
    torch.optim.Rprop,
    Lion,
)
# On a shard these compute something else, or fail: known, so no flag lets them pass.
NEEDS_WHOLE: Mapping[str, str] = MappingProxyType(
    {
        "LBFGS": "its line search takes inner products over all parameters",
        "Adafactor": "it factors the second moment by the rows and columns of each matrix",
        "SparseAdam": "it takes sparse gradients only",
        "Muon": "it orthogonalises whole matrices; the optimizer type 'Muon' of the config, or "
        "zeropipe.runtime.optimizers.Muon, does so on shards",
    }
)
# Compressed optimizers are a subject of their own, beside this one in the layers: found when one is asked for.
_find, _ = lazy(__name__)
_COMPRESSED: Mapping[str, str] = MappingProxyType({name.lower(): name for name in homes(__name__)})
_NOT_OF_THE_CLASS = ("self", "params", "model_params")


@dataclass(frozen=True, slots=True)
class Request:
    """An optimizer that a config asks for, on its way to being built."""

    name: str  # as the user wrote it
    params: Mapping[str, Any]  # hyperparameters, without "auto" values
    groups: list[Any]  # tensors, (name, tensor) pairs or param-group dicts

    def without(self, *keys: str) -> Request:
        return replace(self, params={k: v for k, v in self.params.items() if k not in keys})

    def make(self, cls: Callable[..., torch.optim.Optimizer], **extra: Any) -> torch.optim.Optimizer:
        """Raises ConfigError for a hyperparameter that ``cls`` does not have, or a value that it refuses."""
        known = [
            name
            for name, parameter in inspect.signature(cls).parameters.items()
            if name not in _NOT_OF_THE_CLASS and parameter.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        for key in self.params:
            if key not in known:
                raise ConfigError(_unknown(f"optimizer.params.{key}", key, known, f"optimizer {self.name}"))
        try:
            return cls(self.groups, **{**extra, **self.params})
        except ConfigError:
            raise
        except (ValueError, TypeError, RuntimeError) as error:
            raise ConfigError(
                f"optimizer {self.name} refuses its params {dict(self.params)}: {error}",
                fix="change optimizer.params",
            ) from error


def build_optimizer(
    type: str, params: Mapping[str, Any] | None, param_groups: Any, device: torch.device | str | None = None
) -> torch.optim.Optimizer:
    """The optimizer that a config's ``optimizer`` section names, over ``param_groups``.

    ``type``: any case. ``param_groups``: what torch optimizers take; group dicts are used in place, the very
    same objects. ``device``: where steps will run, if not where the parameters are now; it decides whether
    torch's fused kernels can be used. A value ``"auto"`` counts as absent. Muon's groups are split into
    matrices and others (see ``split_groups``).

    Raises ConfigError for a name or hyperparameter that is not known, with the nearest one that is.
    """
    given = {key: value for key, value in (params or {}).items() if value != "auto"}
    request = Request(type, given, held(param_groups))
    name = type.lower().replace("_", "").replace("-", "")
    if name in _COMPRESSED:
        try:
            cls = _find(_COMPRESSED[name])
        except (ImportError, AttributeError) as error:
            raise ConfigError(
                f"optimizer {type} is not part of this installation ({error})", fix="use type Adam"
            ) from error
        return request.make(cls)
    if name in _BUILDERS:
        return _BUILDERS[name](request, _device_types(request.groups, device))
    for candidate, cls in _torch_classes().items():
        if candidate.lower() == name:
            return request.make(cls, **_fused(request, cls, _device_types(request.groups, device)))
    names = sorted({*_NAMES, *_torch_classes()})
    raise ConfigError(_unknown("optimizer.type", type, names, "zeropipe or torch.optim"))


def classify(optimizer: torch.optim.Optimizer) -> Kind:
    """Whether ``optimizer`` can step on 1-D shards: as it is, once bound to them, or not known to be able to.

    A subclass of a known class that brings its own ``step`` counts as unknown, so ``whole``.
    """
    if isinstance(optimizer, ShardAware):
        return "shard_aware"
    for base in ELEMENTWISE:
        if isinstance(optimizer, base) and _same_step(optimizer.__class__, base):
            return "elementwise"
    return "whole"


def require_shardable(optimizer: torch.optim.Optimizer, stage: int, allow_untested: bool = False) -> Kind:
    """What ``classify`` says; raises UnsupportedOptimizerError where sharding would be wrong or is unproved.

    ``allow_untested`` (config key ``zero_allow_untested_optimizer``) lets unknown classes pass, not those known
    to need whole tensors. At stage 0 nothing is sharded, and only what an engine cannot serve at all is refused.
    """
    kind = classify(optimizer)
    _refuse_unservable(optimizer)
    if stage == 0 or kind != "whole":
        return kind
    cls = optimizer.__class__
    full_name = f"{cls.__module__}.{cls.__qualname__}"
    for name, reason in NEEDS_WHOLE.items():
        if isinstance(optimizer, getattr(torch.optim, name, ())):
            raise UnsupportedOptimizerError(
                f"{full_name} cannot step on shards: {reason}",
                expected="an optimizer that can, at zero_optimization.stage " + str(stage),
                fix="use zero_optimization.stage 0, or another optimizer such as type AdamW, Lamb or Muon",
            )
    if allow_untested:
        return kind
    raise UnsupportedOptimizerError(
        f"{full_name} is not known to be right on shards",
        expected="elementwise update or bind_shards, at zero_optimization.stage " + str(stage),
        fix="set zero_allow_untested_optimizer: true if it updates each element by that element's history "
        "alone; give it bind_shards (see docs/optimizers.md) if it needs whole tensors; or use stage 0",
    )


def _refuse_unservable(optimizer: torch.optim.Optimizer) -> None:
    """An engine steps on gradients that it has averaged, dense, once per step."""
    cls = optimizer.__class__
    closure = inspect.signature(inspect.unwrap(cls.step)).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        reason = "its step evaluates the model again, by a closure, while gradients of an engine come before the step"
    elif isinstance(optimizer, torch.optim.SparseAdam):
        reason = "it takes sparse gradients only, and ranks average dense ones"
    else:
        return
    raise UnsupportedOptimizerError(
        f"{cls.__module__}.{cls.__qualname__} cannot step in an engine: {reason}",
        expected="an optimizer that steps on dense gradients that are there, at every stage",
        fix="use another one such as AdamW or SGD (embeddings may keep sparse=True), or train without an engine",
    )


def _same_step(cls: type[torch.optim.Optimizer], base: type[torch.optim.Optimizer]) -> bool:
    # torch wraps step() on first use of each class, so compare what is inside the wrappers.
    return inspect.unwrap(cls.step) is inspect.unwrap(base.step)


def _device_types(groups: list[Any], device: torch.device | str | None) -> frozenset[str]:
    """The device types that fused kernels must exist for, or none where they cannot be used."""
    if device is not None:
        return frozenset({torch.device(device).type})
    return FUSED_DEVICES if can_fuse(groups) else frozenset()


def _fused(request: Request, cls: type, devices: frozenset[str]) -> dict[str, Any]:
    """``fused=True`` where ``cls`` has it, the devices have it, and the user has not decided otherwise."""
    decided = {"fused", "foreach", "capturable", "differentiable"} & set(request.params)
    where = frozenset({"cpu"}) if cls is torch.optim.Adagrad else FUSED_DEVICES
    usable = bool(devices) and devices <= FUSED_DEVICES and can_fuse(request.groups, where)
    has = "fused" in inspect.signature(cls).parameters
    return {"fused": True} if usable and has and not decided else {}


def _adam(request: Request, devices: frozenset[str]) -> torch.optim.Optimizer:
    """Adam and AdamW: decoupled weight decay unless ``adam_w_mode`` is false, which AdamW does not have."""
    decoupled = request.name.lower() == "adamw" or bool(request.params.get("adam_w_mode", True))
    if request.params.get("bias_correction") is False:
        raise refuse(request.name, "bias_correction", False, "leave it out, or use type Lamb, which has it")
    cls = torch.optim.AdamW if decoupled else torch.optim.Adam
    # Without torch_adam, DeepSpeed's own Adam is meant: its weight decay is 0 unless given, AdamW's is 0.01.
    extra = {} if request.params.get("torch_adam") else {"weight_decay": 0.0}
    rest = request.without("adam_w_mode", "torch_adam", "bias_correction", "set_grad_none")
    return rest.make(cls, **extra, **_fused(rest, cls, devices))


def _muon(request: Request, devices: frozenset[str]) -> torch.optim.Optimizer:
    given = request.params
    groups = split_groups(request.groups, given.get("use_muon"), given.get("muon_lr"), given.get("adam_lr"))
    return replace(request.without("muon_lr", "adam_lr", "use_muon"), groups=groups).make(Muon)


def _plain(cls: Callable[..., torch.optim.Optimizer]) -> Callable[..., torch.optim.Optimizer]:
    return lambda request, devices: request.make(cls)


_Builder = Callable[[Request, frozenset[str]], torch.optim.Optimizer]
_NAMES = (
    "Adam",
    "AdamW",
    "FusedAdam",
    "CPUAdam",
    "CPUAdagrad",
    "Lion",
    "FusedLion",
    "CPULion",
    "Lamb",
    "FusedLamb",
    "Muon",
    "OneBitAdam",
    "OneBitLamb",
    "ZeroOneAdam",
)
_BUILDERS: Mapping[str, _Builder] = MappingProxyType(
    {
        "adam": _adam,
        "adamw": _adam,
        "fusedadam": _plain(FusedAdam),
        "cpuadam": _plain(DeepSpeedCPUAdam),
        "deepspeedcpuadam": _plain(DeepSpeedCPUAdam),
        "cpuadagrad": _plain(DeepSpeedCPUAdagrad),
        "deepspeedcpuadagrad": _plain(DeepSpeedCPUAdagrad),
        "lion": _plain(FusedLion),
        "fusedlion": _plain(FusedLion),
        "cpulion": _plain(DeepSpeedCPULion),
        "deepspeedcpulion": _plain(DeepSpeedCPULion),
        "lamb": _plain(FusedLamb),
        "fusedlamb": _plain(FusedLamb),
        "muon": _muon,
    }
)


def _torch_classes() -> dict[str, type[torch.optim.Optimizer]]:
    return {
        name: cls
        for name, cls in vars(torch.optim).items()
        if isinstance(cls, type)
        and issubclass(cls, torch.optim.Optimizer)
        and cls is not torch.optim.Optimizer
    }


def _unknown(where: str, found: str, known: list[str], owner: str) -> str:
    lower = {name.lower(): name for name in known}
    near = difflib.get_close_matches(found.lower(), lower, n=1, cutoff=0.5)
    fix = f"write {lower[near[0]]!r}" if near else f"use one of {', '.join(sorted(known))}"
    return describe(f"{where}: {owner} has no {found!r}", fix=fix)
