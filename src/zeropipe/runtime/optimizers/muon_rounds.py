"""Muon's arithmetic on one matrix, and how the pieces of a cut one get together.

The arithmetic is the same calls whether the matrix was ever cut or not. Who orthogonalises which matrix, and in which
rounds, is a plan of pure integers, the same on every rank:

    shards      |      0      |      1      |      2      |
    matrices    |--a--|----b----|-----c-----|---d---|
                       b: 0 and 1 hold it    c: 1 and 2 hold it

A matrix inside one shard needs nobody else. A cut one goes to the holder with most of it, or, among equals, to
the one with the least to do so far. In each round every holder first sends its pieces, then gets the result's
pieces back; both phases go through the matrices, and the holders of each, in this plan's order. As that order
is total and shared, the exchange cannot deadlock, even where a backend runs one message at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import prod, sqrt
from typing import Any

import torch

from zeropipe.comm import collectives
from zeropipe.comm.collectives import Work
from zeropipe.comm.group import Group
from zeropipe.layout.flat import FlatShards, Piece
from zeropipe.runtime.optimizers.shard_view import ShardView

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

    def piece_of(self, shard: int) -> Piece | None:
        return next((piece for piece in self.pieces if piece.shard == shard), None)


def plan_rounds(
    layouts: Sequence[FlatShards], matrices: Sequence[Iterable[int]], max_owned: int = MAX_OWNED
) -> tuple[tuple[CutMatrix, ...], ...]:
    """The cut matrices of ``layouts`` (``matrices``: the tensors of each that are matrices), in rounds.

    A round ends before any owner would gather more than ``max_owned`` elements in it; a single larger matrix
    has a round to itself there.
    """
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


def adjusted_lr(lr: float, shape: Sequence[int], adjust_lr_fn: str) -> float:
    rows, cols = rows_and_cols(shape)
    if adjust_lr_fn == "match_rms_adamw":
        return lr * 0.2 * sqrt(max(rows, cols))
    return lr * sqrt(max(1.0, rows / cols))


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
        """What of the momentum goes into the iteration: elementwise, so pieces equal the whole."""
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
        shape = self.view.layout.tensors[tensor].shape
        lr = adjusted_lr(float(self.group["lr"]), shape, self.group["adjust_lr_fn"])
        self.value[run].add_(result, alpha=-lr)


_TO_OWNER, _BACK = 1, 2  # message tags, so that the two phases never match each other


def exchange_round(
    slots: Sequence[MatrixSlot], cuts: Sequence[CutMatrix], group: Group
) -> Callable[[], None]:
    """Start sending the pieces of ``cuts``; the function that is returned finishes the round.

    Every member of the group calls both, with the same ``cuts``. A member that holds no piece of them does
    nothing. Messages are posted in the plan's order; see above for why that cannot deadlock.
    """
    me = group.rank
    mine = [(cut, piece) for cut in cuts if (piece := cut.piece_of(me)) is not None]
    buffers: list[torch.Tensor] = []  # per cut of mine: the whole direction if owned, else this rank's piece
    works: list[list[Work]] = []
    for cut, piece in mine:
        own = slots[cut.slot].direction(_run(piece))
        if cut.owner != me:
            buffers.append(own)
            works.append([_send(own, cut.owner, group, _TO_OWNER)])
            continue
        matrix = torch.empty(cut.numel, dtype=NS_DTYPE, device=own.device)
        _part(matrix, piece).copy_(own)
        buffers.append(matrix)
        others = [other for other in cut.pieces if other.shard != me]
        works.append([_recv(_part(matrix, other), other.shard, group, _TO_OWNER) for other in others])

    def finish() -> None:
        returns: list[Work | None] = []
        sent: list[Work] = []
        kept: list[torch.Tensor] = []  # results must outlive their sends
        for (cut, piece), buffer, pending in zip(mine, buffers, works, strict=True):
            for work in pending:
                work.wait()
            if cut.owner != me:
                returns.append(_recv(buffer, cut.owner, group, _BACK))
                continue
            slot = slots[cut.slot]
            result = slot.orthogonal(cut.tensor, buffer)
            kept.append(result)
            sent += [
                _send(_part(result, other), other.shard, group, _BACK)
                for other in cut.pieces
                if other.shard != me
            ]
            slot.apply(cut.tensor, _run(piece), _part(result, piece))
            returns.append(None)
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


def _send(tensor: torch.Tensor, member: int, group: Group, tag: int) -> Work:
    return collectives.send(tensor, member, group, tag=tag, label="muon", async_op=True)


def _recv(tensor: torch.Tensor, member: int, group: Group, tag: int) -> Work:
    return collectives.recv(tensor, member, group, tag=tag, label="muon", async_op=True)
