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
from zeropipe.given import ParametersLike
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
from zeropipe.runtime.optimizers.muon import Muon
from zeropipe.runtime.optimizers.shard_view import ShardAware
from zeropipe.runtime.optimizers.state_kinds import TORCHS

Kind = Literal["elementwise", "shard_aware", "whole"]

# What the table of state names updates each element by that element's history alone, as our Lion does.
ELEMENTWISE: tuple[type[torch.optim.Optimizer], ...] = (*TORCHS, Lion)
# On a shard these compute something else, or fail: known, so no flag lets them pass.
NEEDS_WHOLE: Mapping[str, str] = MappingProxyType(
    {
        "Adafactor": "it factors the second moment by the rows and columns of each matrix",
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
    device: torch.device | str | None = None  # where steps will run; None: where the parameters are

    def without(self, *keys: str) -> Request:
        return replace(self, params={k: v for k, v in self.params.items() if k not in keys})

    def fused(self, cls: type) -> dict[str, Any]:
        """``fused=True`` where ``cls`` has it, the devices have it, and the user has not decided otherwise."""
        decided = {"fused", "foreach", "capturable", "differentiable"} & set(self.params)
        here = self.device is None or torch.device(self.device).type in FUSED_DEVICES
        # torch has Adagrad's kernel on the CPU alone.
        where = frozenset({"cpu"}) if cls is torch.optim.Adagrad else FUSED_DEVICES
        has = "fused" in inspect.signature(cls).parameters
        return {"fused": True} if has and here and can_fuse(self.groups, where) and not decided else {}

    def make(self, cls: Callable[..., torch.optim.Optimizer], **extra: Any) -> torch.optim.Optimizer:
        """Raises ConfigError for a hyperparameter that ``cls`` does not have, or a value that it refuses."""
        # A name that is not known is told with the nearest one: most are slips of the pen.
        known = [
            name
            for name, parameter in inspect.signature(cls).parameters.items()
            if name not in _NOT_OF_THE_CLASS and parameter.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        for key in self.params:
            if key not in known:
                raise ConfigError(_unknown(f"optimizer.params.{key}", key, known, f"optimizer {self.name}"))
        # What torch itself refuses is an error of the configuration too, and is told as one.
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
    type: str,
    params: Mapping[str, Any] | None,
    param_groups: ParametersLike,
    device: torch.device | str | None = None,
) -> torch.optim.Optimizer:
    """The optimizer that a config's ``optimizer`` section names, over ``param_groups``.

    ``type``: any case. ``param_groups``: what torch optimizers take; group dicts are used in place, the very
    same objects. ``device``: where steps will run, if not where the parameters are now; it decides whether
    torch's fused kernels can be used. A value ``"auto"`` counts as absent. Muon's groups are split into
    matrices and others (see ``split_groups``).

    Raises ConfigError for a name or hyperparameter that is not known, with the nearest one that is.
    """
    # "auto" is what integrations write where their own settings would stand.
    given = {key: value for key, value in (params or {}).items() if value != "auto"}
    request = Request(type, given, held(param_groups), device)
    name = type.lower().replace("_", "").replace("-", "")
    if name in _COMPRESSED:
        try:
            cls = _find(_COMPRESSED[name])
        except (ImportError, AttributeError) as error:
            raise ConfigError(
                f"optimizer {type} is not part of this installation ({error})", fix="use type Adam"
            ) from error
        return request.make(cls)
    if name in _BY_NAME:
        return _BY_NAME[name](request)
    for candidate, cls in _torch_classes().items():
        if candidate.lower() == name:
            return request.make(cls, **request.fused(cls))
    names = sorted({*_BUILDERS, "OneBitAdam", "OneBitLamb", "ZeroOneAdam", *_torch_classes()})
    raise ConfigError(_unknown("optimizer.type", type, names, "zeropipe or torch.optim"))


def classify(optimizer: torch.optim.Optimizer) -> Kind:
    """Whether ``optimizer`` can step on 1-D shards: as it is, once bound to them, or not known to be able to.

    A subclass of a known class that brings its own ``step`` counts as unknown, so ``whole``.
    """
    if isinstance(optimizer, ShardAware):
        return "shard_aware"
    for base in ELEMENTWISE:
        # torch wraps step() on first use of each class, so compare what is inside the wrappers.
        if isinstance(optimizer, base) and inspect.unwrap(type(optimizer).step) is inspect.unwrap(base.step):
            return "elementwise"
    return "whole"


def require_shardable(
    optimizer: torch.optim.Optimizer, stage: int, allow_untested: bool = False, by_slots: bool = False
) -> Kind:
    """What ``classify`` says; raises UnsupportedOptimizerError where sharding would be wrong or is unproved.

    ``allow_untested`` (config key ``zero_allow_untested_optimizer``) lets unknown classes pass, not those known
    to need whole tensors. ``by_slots``: results must not follow the number of shards. At stage 0 nothing is sharded,
    and only what an engine cannot serve at all is refused.
    """
    # Asked at every stage: what no engine can serve does not depend on what is sharded.
    kind = classify(optimizer)
    _refuse_unservable(optimizer)
    if by_slots and stage > 0 and getattr(optimizer, "norms_of_shards", False):
        raise UnsupportedOptimizerError(
            f"config key 'reproducible.slots' with {type(optimizer).__name__}, whose norms are sums over shards",
            expected=f"another optimizer at zero_optimization.stage {stage}",
            fix="use zero_optimization.stage 0, or an optimizer such as AdamW or Muon",
        )
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
    # An engine steps on gradients that it has averaged, dense, once per step.
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


def _adam(request: Request) -> torch.optim.Optimizer:
    """Adam and AdamW: decoupled weight decay unless ``adam_w_mode`` is false, which AdamW does not have."""
    decoupled = request.name.lower() == "adamw" or bool(request.params.get("adam_w_mode", True))
    if request.params.get("bias_correction") is False:
        raise refuse(request.name, "bias_correction", False, "leave it out, or use type Lamb, which has it")
    cls = torch.optim.AdamW if decoupled else torch.optim.Adam
    # Without torch_adam, DeepSpeed's own Adam is meant: its weight decay is 0 unless given, AdamW's is 0.01.
    extra = {} if request.params.get("torch_adam") else {"weight_decay": 0.0}
    rest = request.without("adam_w_mode", "torch_adam", "bias_correction", "set_grad_none")
    return rest.make(cls, **extra, **rest.fused(cls))


def _muon(request: Request) -> torch.optim.Optimizer:
    given = request.params
    groups = split_groups(request.groups, given.get("use_muon"), given.get("muon_lr"), given.get("adam_lr"))
    return replace(request.without("muon_lr", "adam_lr", "use_muon"), groups=groups).make(Muon)


def split_groups(
    groups: list[Any],
    use_muon: bool | None = None,
    muon_lr: float | None = None,
    adam_lr: float | None = None,
) -> list[dict[str, Any]]:
    """Param groups of matrices only or of others only, in the order given, each with ``use_muon`` set.

    ``groups``: tensors, (name, tensor) pairs, or group dicts. A group's own ``use_muon`` wins over a parameter's
    attribute ``use_muon``, which wins over "at least two dims"; the argument False sends all to AdamW, True is as
    None (a configuration's ``use_muon: true`` asserts nothing of a bias). Of a group dict that holds both kinds the
    matrices stay in the very same dict and the others follow in a copy of it. ``muon_lr`` and ``adam_lr`` are the
    learning rates of groups that give none of their own.

    Raises ConfigError where a group or a parameter asks for Muon and has fewer than two dims.
    """
    listed: list[dict[str, Any]] = groups if groups and isinstance(groups[0], dict) else [{"params": groups}]
    result: list[dict[str, Any]] = []
    for group in listed:
        members = group["params"]
        members = [members] if isinstance(members, torch.Tensor) else list(members)
        settings = {key: value for key, value in group.items() if key != "params"}
        chosen = [_is_muon(member, group.get("use_muon"), use_muon) for member in members]
        # The first part stays in the very same dict, which schedulers and users know.
        part: dict[str, Any] = group
        for kind, lr in ((True, muon_lr), (False, adam_lr)):
            mine = [member for member, choice in zip(members, chosen, strict=True) if choice is kind]
            if not mine and (kind or members):
                continue
            part.update(settings, params=mine, use_muon=kind)
            if lr is not None:
                part.setdefault("lr", lr)
            result.append(part)
            part = {}
    return result


def _is_muon(member: Any, of_group: bool | None, of_all: bool | None) -> bool:
    param = member[1] if isinstance(member, tuple) else member
    shape = tuple(getattr(param, "ds_shape", param.shape))  # the true shape, also where it is sharded
    asked = of_group if of_group is not None else getattr(param, "use_muon", None)
    if asked and len(shape) < 2:
        raise ConfigError(
            "use_muon: true was asked of a parameter that is no matrix",
            expected="at least 2 dims",
            found=f"shape {shape}",
            fix="leave use_muon out, so that Muon takes matrices and AdamW the others",
        )
    return len(shape) >= 2 and of_all is not False if asked is None else bool(asked)


def _plain(cls: Callable[..., torch.optim.Optimizer]) -> _Builder:
    return lambda request: request.make(cls)


_Builder = Callable[[Request], torch.optim.Optimizer]
_CPU: Mapping[str, _Builder] = MappingProxyType(
    {
        "CPUAdam": _plain(DeepSpeedCPUAdam),
        "CPUAdagrad": _plain(DeepSpeedCPUAdagrad),
        "CPULion": _plain(DeepSpeedCPULion),
    }
)
_BUILDERS: Mapping[str, _Builder] = MappingProxyType(
    {
        "Adam": _adam,
        "AdamW": _adam,
        "FusedAdam": _plain(FusedAdam),
        "Lion": _plain(FusedLion),
        "FusedLion": _plain(FusedLion),
        "Lamb": _plain(FusedLamb),
        "FusedLamb": _plain(FusedLamb),
        "Muon": _muon,
        **_CPU,
    }
)
# Names that a config may give, in any case: those of the table, and DeepSpeed's for what steps on the host.
_BY_NAME = {name.lower(): build for name, build in _BUILDERS.items()} | {
    f"deepspeed{name.lower()}": build for name, build in _CPU.items()
}


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
