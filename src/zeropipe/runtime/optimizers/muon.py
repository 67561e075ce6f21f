"""Muon on 1-D shards: each matrix is put together once, by one owner, and comes out the same bits as unsharded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import sqrt
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import Optimizer, ParamsT

from zeropipe.comm.group import Group
from zeropipe.errors import ConfigError, UsageError
from zeropipe.layout.flat import FlatShards
from zeropipe.runtime.optimizers.muon_rounds import (
    NS_COEFFICIENTS,
    CutMatrix,
    MatrixSlot,
    exchange_round,
    is_matrix,
    merged_runs,
    plan_rounds,
)
from zeropipe.runtime.optimizers.shard_view import (
    ShardView,
    check_betas,
    check_bound,
    check_not_negative,
    flat,
    gradient,
    put_back,
    view_or_whole,
)

_Rounds = tuple[tuple[CutMatrix, ...], ...]
_Plan = tuple[tuple[tuple[FlatShards, ...], tuple[tuple[int, ...], ...]], _Rounds]  # what it is for, and it


class Muon(Optimizer):
    """Momentum, orthogonalised (K. Jordan, https://kellerjordan.github.io/posts/muon), for matrices; AdamW else.

    ``m = lerp(m, g, 1 - momentum)``; ``o = NewtonSchulz(nesterov ? lerp(g, m, momentum) : m)``, in bfloat16;
    ``x = (1 - lr weight_decay) x - lr adjust o``. ``adjust_lr_fn``: ``original`` is ``sqrt(max(1, rows / cols))``,
    ``match_rms_adamw`` is ``0.2 sqrt(max(rows, cols))`` (arXiv 2502.16982, section 2.2). A tensor of more than
    two dims is taken as (first dim, all others).

    Which tensors are matrices is said by the param group's ``use_muon``: None takes those with at least two
    dims, False none (AdamW with ``betas`` and ``eps``), True asserts that all are. Set it to False on embeddings
    and output heads, which None would take. State: ``momentum_buffer`` where a group has matrices, ``exp_avg``
    and ``exp_avg_sq`` where it has others, each with the parameter's shape; ``step``.

    Raises ValueError for values out of range; ``step`` raises UsageError for a tensor of fewer than two dims
    under ``use_muon: True``.
    """

    per_element_state = ("momentum_buffer", "exp_avg", "exp_avg_sq")  # see state_kinds.py

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        nesterov: bool = True,
        ns_steps: int = 5,
        ns_coefficients: tuple[float, float, float] = NS_COEFFICIENTS,
        ns_eps: float = 1e-7,
        adjust_lr_fn: str = "original",
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        use_muon: bool | None = None,
    ) -> None:
        check_not_negative(lr=lr, weight_decay=weight_decay, eps=eps, ns_eps=ns_eps, ns_steps=ns_steps)
        check_betas(betas)
        check_betas((momentum, 0.0))
        if adjust_lr_fn not in ("original", "match_rms_adamw"):
            raise ValueError(f"adjust_lr_fn is 'original' or 'match_rms_adamw', found {adjust_lr_fn!r}")
        if len(ns_coefficients) != 3:
            raise ValueError(f"ns_coefficients are three numbers, found {ns_coefficients}")
        self._views: dict[nn.Parameter, ShardView] = {}
        self._whole: dict[torch.Tensor, ShardView] = {}
        self._plans: dict[Group, _Plan] = {}
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "weight_decay": weight_decay,
                "nesterov": nesterov,
                "ns_steps": ns_steps,
                "ns_coefficients": tuple(ns_coefficients),
                "ns_eps": ns_eps,
                "adjust_lr_fn": adjust_lr_fn,
                "betas": tuple(betas),
                "eps": eps,
                "use_muon": use_muon,
            },
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copied or unpickled optimizer is unbound, as a process group cannot be copied; load_state_dict passes
        # here too, and stays bound.
        super().__setstate__(state)
        for name in ("_views", "_whole", "_plans"):
            self.__dict__.setdefault(name, {})

    def bind_shards(self, views: Mapping[nn.Parameter, ShardView]) -> None:
        """Step on these 1-D masters as shards from now on, too; see ShardAware."""
        check_bound(views)
        self._views.update(views)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        slots = [
            slot
            for group in self.param_groups
            for param in group["params"]
            if (slot := self._slot(param, group)) is not None
        ]
        self._step_others(slots)
        by_group: dict[Group, list[MatrixSlot]] = {}
        for slot in slots:
            if slot.momentum is not None:
                by_group.setdefault(slot.view.group, []).append(slot)
        for members, together in by_group.items():
            self._step_matrices(together, members)
        for slot in slots:
            put_back(slot.param, slot.value)
        return loss

    def _slot(self, param: torch.Tensor, group: dict[str, Any]) -> MatrixSlot | None:
        view = view_or_whole(param, self._views, self._whole)
        grad = gradient(param, "Muon")
        if grad is None:
            return None
        tensors = view.layout.tensors
        matrices = frozenset(i for i, spec in enumerate(tensors) if is_matrix(spec.shape, group["use_muon"]))
        if group["use_muon"] and len(matrices) < len(tensors):
            odd = next(spec for i, spec in enumerate(tensors) if i not in matrices)
            raise UsageError(
                f"use_muon: True on parameter {odd.name!r}",
                expected="at least 2 dims",
                found=f"shape {odd.shape}",
                fix="put it in a param group of its own, or leave use_muon out",
            )
        # What state exists follows from the whole layout, not from this shard: it is the same on every rank.
        names = (["momentum_buffer"] if matrices else []) + (
            ["exp_avg", "exp_avg_sq"] if len(matrices) < len(tensors) else []
        )
        state = self.state[param]
        if "step" not in state:
            state["step"] = torch.tensor(0.0)
        for name in names:
            if name not in state:
                state[name] = torch.zeros_like(param, memory_format=torch.contiguous_format)
        state["step"] += 1
        momentum = state["momentum_buffer"].view(-1) if matrices else None
        return MatrixSlot(param, view, group, matrices, flat(param), grad, momentum)

    def _step_others(self, slots: Sequence[MatrixSlot]) -> None:
        """AdamW (arXiv 1711.05101, Algorithm 2) on the runs that hold no matrices; elementwise."""
        for slot in slots:
            _, runs = merged_runs(slot.view.pieces(), slot.matrices)
            if not runs:
                continue
            state, group = self.state[slot.param], slot.group
            mean, square = state["exp_avg"].view(-1), state["exp_avg_sq"].view(-1)
            lr, step = float(group["lr"]), float(state["step"])
            first, second = group["betas"]
            for run in runs:
                x, g, m, v = slot.value[run], slot.grad[run], mean[run], square[run]
                x.mul_(1.0 - lr * group["weight_decay"])
                m.lerp_(g, 1.0 - first)
                v.mul_(second).addcmul_(g, g, value=1.0 - second)
                scale = v.sqrt().div_(sqrt(1.0 - second**step)).add_(group["eps"])
                x.addcdiv_(m, scale, value=-lr / (1.0 - first**step))

    def _step_matrices(self, slots: list[MatrixSlot], members: Group) -> None:
        for slot in slots:
            assert slot.momentum is not None
            for run in merged_runs(slot.view.pieces(), slot.matrices)[0]:
                slot.momentum[run].lerp_(slot.grad[run], 1.0 - slot.group["momentum"])
                slot.value[run].mul_(1.0 - float(slot.group["lr"]) * slot.group["weight_decay"])
        if members.size == 1:
            _step_own(slots)
            return
        rounds = self._rounds(slots, members)
        waiting = exchange_round(slots, rounds[0], members) if rounds else None
        _step_own(slots)  # while the first round's pieces travel
        if waiting is not None:
            waiting()
        for cuts in rounds[1:]:
            exchange_round(slots, cuts, members)()

    def _rounds(self, slots: list[MatrixSlot], members: Group) -> _Rounds:
        """The plan for ``slots``, kept as long as the same masters take part."""
        layouts = tuple(slot.view.layout for slot in slots)
        matrices = tuple(tuple(sorted(slot.matrices)) for slot in slots)
        known = self._plans.get(members)
        if known is None or known[0] != (layouts, matrices):
            known = self._plans[members] = ((layouts, matrices), plan_rounds(layouts, matrices))
        return known[1]


def _step_own(slots: Sequence[MatrixSlot]) -> None:
    """The matrices that lie wholly in this shard: no communication."""
    for slot in slots:
        for piece in slot.view.pieces():
            if piece.tensor in slot.matrices and piece.numel == slot.view.layout.tensors[piece.tensor].numel:
                run = slice(piece.offset, piece.offset + piece.numel)
                slot.apply(piece.tensor, run, slot.orthogonal(piece.tensor, slot.direction(run)))


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
