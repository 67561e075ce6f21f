"""Which parameters Muon takes when a config names it: whole param groups, so that each keeps one kind of state."""

from __future__ import annotations

from typing import Any

import torch

from zeropipe.errors import ConfigError


def split_groups(
    groups: list[Any],
    use_muon: bool | None = None,
    muon_lr: float | None = None,
    adam_lr: float | None = None,
) -> list[dict[str, Any]]:
    """Param groups of matrices only or of others only, in the order given, each with ``use_muon`` set.

    ``groups``: tensors, (name, tensor) pairs, or group dicts. A group's own ``use_muon`` wins over a parameter's
    attribute ``use_muon``, which wins over "at least two dims"; the argument False sends all to AdamW. Of a
    group dict that holds both kinds the matrices stay in the very same dict and the others follow in a copy of
    it. ``muon_lr`` and ``adam_lr`` are the learning rates of groups that give none of their own.

    Raises ConfigError where a group or a parameter asks for Muon and has fewer than two dims.
    """
    listed: list[dict[str, Any]] = groups if groups and isinstance(groups[0], dict) else [{"params": groups}]
    result: list[dict[str, Any]] = []
    for group in listed:
        members = group["params"]
        members = [members] if isinstance(members, torch.Tensor) else list(members)
        settings = {key: value for key, value in group.items() if key != "params"}
        chosen = [_is_muon(member, group.get("use_muon"), use_muon) for member in members]
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
