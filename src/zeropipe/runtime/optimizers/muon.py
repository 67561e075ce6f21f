"""Muon on 1-D shards: each matrix is put together once, by one owner, and comes out the same bits as unsharded.

Who orthogonalises which matrix, and in which rounds, is a plan of pure integers, the same on every rank:

    shards      |      0      |      1      |      2      |
    matrices    |--a--|----b----|-----c-----|---d---|
                       b: 0 and 1 hold it    c: 1 and 2 hold it

The arithmetic is the same calls whether the matrix was ever cut or not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import prod, sqrt
from typing import Any

import torch
from torch.optim.optimizer import ParamsT

from zeropipe.comm.collectives import Messages, Work
from zeropipe.comm.group import Group
from zeropipe.errors import UsageError
from zeropipe.layout.flat import FlatShards, Piece
from zeropipe.runtime.optimizers.shard_view import (
    OnShards,
    ShardView,
    check_betas,
    check_not_negative,
    flat,
    put_back,
)

MAX_OWNED = 2**26  # elements that one rank gathers in one round: bounds memory, 128 MiB in bf16


@dataclass(frozen=True, slots=True)
class CutMatrix:
    """A matrix whose pieces lie in several shards."""

    slot: int  # index into the layouts that the plan was made for
    tensor: int  # index into that layout's tensors
    owner: int  # the shard that orthogonalises it
    pieces: tuple[Piece, ...]  # at most one per shard

    @property
    def numel(self) -> int:
        return sum(piece.numel for piece in self.pieces)


_Rounds = tuple[tuple[CutMatrix, ...], ...]


def plan_rounds(
    layouts: Sequence[FlatShards], matrices: Sequence[Iterable[int]], max_owned: int = MAX_OWNED
) -> _Rounds:
    """The cut matrices of ``layouts`` (``matrices``: the tensors of each that are matrices), in rounds.

    A round ends before any owner would gather more than ``max_owned`` elements in it; a single larger matrix
    has a round to itself there.
    """
    # A matrix inside one shard needs nobody else. A cut one goes to the holder with most of it, so that least travels,
    # or, among equals, to the one with the least to do so far.
    work: dict[int, int] = {}  # shard -> elements to orthogonalise, of all rounds
    load: dict[int, int] = {}  # shard -> elements, of this round
    rounds: list[list[CutMatrix]] = [[]]
    for slot, (layout, tensors) in enumerate(zip(layouts, matrices, strict=True)):
        for tensor in tensors:
            pieces = layout.tensor_pieces(tensor)
            if len(pieces) < 2:
                continue
            most = max(piece.numel for piece in pieces)
            owner = min(
                (p.shard for p in pieces if p.numel == most), key=lambda shard: (work.get(shard, 0), shard)
            )
            cut = CutMatrix(slot, tensor, owner, pieces)
            if load.get(owner, 0) and load[owner] + cut.numel > max_owned:
                rounds.append([])
                load = {}
            rounds[-1].append(cut)
            load[owner] = load.get(owner, 0) + cut.numel
            work[owner] = work.get(owner, 0) + cut.numel
    return tuple(tuple(cuts) for cuts in rounds if cuts)


def is_matrix(shape: Sequence[int], use_muon: bool | None) -> bool:
    """Whether Muon orthogonalises a tensor of this shape; ``use_muon`` None decides by the number of dims."""
    return use_muon is not False and len(shape) >= 2


def merged_runs(pieces: Iterable[Piece], matrices: frozenset[int]) -> tuple[list[slice], list[slice]]:
    """The runs of a shard that hold matrices, and those that hold the rest, neighbours merged."""
    runs: tuple[list[slice], list[slice]] = ([], [])
    for other, kin in groupby(pieces, key=lambda piece: piece.tensor not in matrices):
        together = list(kin)
        last = together[-1]
        runs[other].append(slice(together[0].offset, last.offset + last.numel))
    return runs


NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # steepest slope at 0 that still lands near 1, by K. Jordan
# The iteration is stable in it, so pieces travel in it too: half the bytes, same bits.
NS_DTYPE = torch.bfloat16


def newton_schulz(
    matrix: torch.Tensor, steps: int, coefficients: Sequence[float], eps: float
) -> torch.Tensor:
    """Approximately ``U V^T`` of ``matrix = U S V^T`` (2-D, any dtype): same shape, ``NS_DTYPE``.

    The quintic iteration ``X = a X + (b A + c A A) X`` with ``A = X X^T``, started at unit Frobenius norm
    (K. Jordan, https://kellerjordan.github.io/posts/muon). It runs on the wide side up, where ``A`` is smaller.
    """
    # Every operation is one call on the whole matrix, so the bits do not tell where it was cut.
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.to(NS_DTYPE)
    x = x.mT if tall else x
    x = x / x.norm().clamp(min=eps)
    a, b, c = coefficients
    for _ in range(steps):
        gram = x @ x.mT
        mix = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.addmm(x, mix, x, beta=a)
    return x.mT if tall else x


def rows_and_cols(shape: Sequence[int]) -> tuple[int, int]:
    """The matrix that a tensor of at least two dims is taken as: first dim by all others."""
    return shape[0], prod(shape[1:])


@dataclass(slots=True)
class MatrixSlot:
    """One parameter (or master) in the middle of a step."""

    param: torch.Tensor
    view: ShardView
    group: dict[str, Any]
    matrices: frozenset[int]  # tensors of the layout that Muon takes; AdamW takes the others
    value: torch.Tensor  # 1-D, the parameter's elements
    grad: torch.Tensor  # 1-D, the same elements
    momentum: torch.Tensor | None  # 1-D; None where nothing in the layout is a matrix

    def direction(self, run: slice) -> torch.Tensor:  # 1-D, NS_DTYPE
        # What of the momentum goes into the iteration: elementwise, so pieces equal the whole.
        assert self.momentum is not None
        momentum = self.momentum[run]
        if self.group["nesterov"]:
            momentum = self.grad[run].lerp(momentum, self.group["momentum"])
        return momentum.to(NS_DTYPE)

    def orthogonal(self, tensor: int, direction: torch.Tensor) -> torch.Tensor:  # 1-D, NS_DTYPE
        """The orthogonalised whole of ``tensor``, from its whole ``direction`` (1-D)."""
        matrix = direction.view(rows_and_cols(self.view.layout.tensors[tensor].shape))
        result = newton_schulz(
            matrix, self.group["ns_steps"], self.group["ns_coefficients"], self.group["ns_eps"]
        )
        return result.reshape(-1)

    def apply(self, tensor: int, run: slice, result: torch.Tensor) -> None:
        """Step the elements ``run`` of the shard, which are ``tensor``'s, along ``result`` (1-D, as long)."""
        rows, cols = rows_and_cols(self.view.layout.tensors[tensor].shape)
        lr = float(self.group["lr"])
        if self.group["adjust_lr_fn"] == "match_rms_adamw":
            lr = lr * 0.2 * sqrt(max(rows, cols))
        else:
            lr = lr * sqrt(max(1.0, rows / cols))
        self.value[run].add_(result, alpha=-lr)


_TO_OWNER, _BACK = 1, 2  # message tags, so that the two phases never match each other


def exchange_round(
    slots: Sequence[MatrixSlot], cuts: Sequence[CutMatrix], group: Group
) -> Callable[[], None]:
    """Start sending the pieces of ``cuts``; the function that is returned finishes the round.

    Every member of the group calls both, with the same ``cuts``. A member that holds no piece of them does
    nothing.
    """
    # Every holder first sends its pieces, then gets the result's pieces back; both phases go through the matrices, and
    # the holders of each, in the plan's order. As that order is total and shared, the exchange cannot deadlock, even
    # where a backend runs one message at a time; without tags each phase is one call.
    there, back_again, me = Messages(group, "muon"), Messages(group, "muon"), group.rank
    mine = [(cut, piece) for cut in cuts for piece in cut.pieces if piece.shard == me]
    buffers: list[torch.Tensor] = []  # per cut of mine: the whole direction if owned, else this rank's piece
    works: list[list[Work]] = []
    # Elementwise work is done by who holds the elements, so only directions travel, never gradients and momenta.
    for cut, piece in mine:
        own = slots[cut.slot].direction(_run(piece))
        if cut.owner != me:
            buffers.append(own)
            works.append([there.send(own, cut.owner, _TO_OWNER)])
            continue
        matrix = torch.empty(cut.numel, dtype=NS_DTYPE, device=own.device)
        _part(matrix, piece).copy_(own)
        buffers.append(matrix)
        others = [other for other in cut.pieces if other.shard != me]
        works.append([there.recv(_part(matrix, other), other.shard, _TO_OWNER) for other in others])
    there.begin()

    def finish() -> None:
        # [1] What is complete is orthogonalised and sent back, [2] what was sent back is applied, [3] and only then are
        # the sends waited for: a peer may be in [1] still.
        returns: list[Work | None] = []
        sent: list[Work] = []
        kept: list[torch.Tensor] = []  # results must outlive their sends
        for (cut, piece), buffer, pending in zip(mine, buffers, works, strict=True):
            for work in pending:
                work.wait()
            if cut.owner != me:
                returns.append(back_again.recv(buffer, cut.owner, _BACK))
                continue
            slot = slots[cut.slot]
            result = slot.orthogonal(cut.tensor, buffer)
            kept.append(result)
            others = [other for other in cut.pieces if other.shard != me]
            sent += [back_again.send(_part(result, other), other.shard, _BACK) for other in others]
            slot.apply(cut.tensor, _run(piece), _part(result, piece))
            returns.append(None)
        back_again.begin()
        for (cut, piece), buffer, back in zip(mine, buffers, returns, strict=True):
            if back is not None:
                back.wait()
                slots[cut.slot].apply(cut.tensor, _run(piece), buffer)
        for work in sent:
            work.wait()

    return finish


def _run(piece: Piece) -> slice:
    return slice(piece.offset, piece.offset + piece.numel)


def _part(whole: torch.Tensor, piece: Piece) -> torch.Tensor:
    return whole[piece.start : piece.start + piece.numel]


class Muon(OnShards):
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
        self._plans: dict[Group, tuple[object, _Rounds]] = {}  # (what a plan is for, the plan)
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
        super().__setstate__(state)
        self.__dict__.setdefault("_plans", {})

    def _update(self) -> None:
        slots = [self._slot(*stepped) for stepped in self._stepped()]
        self._step_others(slots)
        by_group: dict[Group, list[MatrixSlot]] = {}
        for slot in slots:
            if slot.momentum is not None:
                by_group.setdefault(slot.view.group, []).append(slot)
        for members, together in by_group.items():
            self._step_matrices(together, members)
        for slot in slots:
            put_back(slot.param, slot.value)

    def _slot(self, param: torch.Tensor, grad: torch.Tensor, group: dict[str, Any]) -> MatrixSlot:
        view = self._view(param)
        tensors = view.layout.tensors
        matrices = frozenset(i for i, spec in enumerate(tensors) if is_matrix(spec.shape, group["use_muon"]))
        others = len(matrices) < len(tensors)
        if group["use_muon"] and others:
            odd = next(spec for i, spec in enumerate(tensors) if i not in matrices)
            raise UsageError(
                f"use_muon: True on parameter {odd.name!r}",
                expected="at least 2 dims",
                found=f"shape {odd.shape}",
                fix="put it in a param group of its own, or leave use_muon out",
            )
        # What state exists follows from the whole layout, not from this shard: it is the same on every rank, so that a
        # checkpoint has the same tensors whoever writes it.
        names = ["momentum_buffer"] * bool(matrices) + ["exp_avg", "exp_avg_sq"] * others
        state = self._counted(param, names)
        momentum = state["momentum_buffer"].view(-1) if matrices else None
        return MatrixSlot(param, view, group, matrices, flat(param), grad, momentum)

    def _step_others(self, slots: Sequence[MatrixSlot]) -> None:
        # AdamW (arXiv 1711.05101, Algorithm 2) on the runs that hold no matrices; elementwise.
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
        rounds = self._rounds(slots, members) if members.size > 1 else ()
        waiting = exchange_round(slots, rounds[0], members) if rounds else None
        self._step_own(slots)  # while the first round's pieces travel
        if waiting is not None:
            waiting()
        for cuts in rounds[1:]:
            exchange_round(slots, cuts, members)()

    def _rounds(self, slots: list[MatrixSlot], members: Group) -> _Rounds:
        # The plan is kept as long as the same masters take part.
        layouts = tuple(slot.view.layout for slot in slots)
        matrices = tuple(tuple(sorted(slot.matrices)) for slot in slots)
        known = self._plans.get(members)
        if known is None or known[0] != (layouts, matrices):
            known = self._plans[members] = ((layouts, matrices), plan_rounds(layouts, matrices))
        return known[1]

    def _step_own(self, slots: Sequence[MatrixSlot]) -> None:
        # The matrices that lie wholly in this shard: no communication.
        for slot in slots:
            tensors = slot.view.layout.tensors
            for piece in slot.view.pieces():
                if piece.tensor in slot.matrices and piece.numel == tensors[piece.tensor].numel:
                    result = slot.orthogonal(piece.tensor, slot.direction(_run(piece)))
                    slot.apply(piece.tensor, _run(piece), result)
