"""What all ranks must know of the gradients before a step: their norm, whether they are finite, and who has none."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from math import frexp, inf, ldexp
from operator import add

import torch

from zeropipe.comm.collectives import all_reduce
from zeropipe.comm.group import Group
from zeropipe.errors import UsageError
from zeropipe.runtime.zero.hold.grads import GradStore
from zeropipe.runtime.zero.hold.partition import Partition
from zeropipe.runtime.zero.hold.policy import StepOptions
from zeropipe.tensor.host import HOST, Number, sent
from zeropipe.tensor.norms import EXACT_BITS, exact_squares, rough_squared_norm, squared_norm

_WORD, _WORDS = 24, 4  # bits of a word of an exact norm, and how many there are below the one with the sign

Unused = Mapping[Partition, Sequence[int]]  # the parameters that no rank gave a gradient


@dataclass(frozen=True, slots=True)
class Figures:
    """Sums over all ranks, known before a step so that they decide alike."""

    square: Number  # squared norm of the scaled gradients
    unseen: float  # parameters without a gradient on some rank, counted there (on a device: on this one)
    woken: float  # parameters that were unfrozen since the last step, counted on each rank
    used: Sequence[float] | None = None  # by parameter, the ranks that gave it a gradient; None: not known


def survey(
    stores: Sequence[GradStore], group: Group, options: StepOptions, own: bool, awake: int | None
) -> Figures:
    """One small collective, one more where other ranks hold other parts of the model.

    ``own``: gradients are each rank's own, for an optimizer that exchanges something else. All ranks still decide on
    overflow and the clip factor together, before anything is exchanged. ``awake``: parameters unfrozen on this rank;
    None: none is frozen.
    """
    device = stores[0].partition.params[0].device if stores else torch.device("cpu")
    if options.exact:
        return _survey_exactly(stores, group, options, awake)
    # A norm that decides nothing, neither a clip factor nor whether the step is taken, may be off by a rounding.
    decides = options.clip > 0 or options.scaler is not None or options.skip_nonfinite
    unseen = 0 if own else sum(len(store.partition.params) - len(store.seen) for store in stores)
    terms: list[Number] = []
    # [1] This rank's share of the sum, so that each element counts once.
    for store in stores:
        partition, counts = store.partition, options.counts
        copies = [i for i, p in enumerate(partition.params) if not counts(p)] if counts else ()
        if own:
            # The norm of the ranks' average is not known without averaging; the root of this mean of squares is never
            # below it. A parameter that was not seen has what an earlier window left.
            for index in range(len(partition.params)):
                if index not in store.seen:
                    store.view(index).zero_()
                elif index in copies:
                    terms.append(-squared_norm(store.view(index).reshape(-1)) / group.size)
            terms.append(squared_norm(store.buffer) / group.size)
        elif (options.replicas if partition.sharded else group).rank == 0:
            square = squared_norm if decides or not HOST.sees(store.shard) else rough_squared_norm
            terms.append(square(store.shard, partition.offload.let_go))
            if copies:
                terms.append(-sum(squared_norm(partition.local(store.shard, i)) for i in copies))
    squares = reduce(add, terms, *([] if terms else [0.0]))
    # [2] Everything that ranks must know alike, in one message.
    if stores and not HOST.sees(device):
        return _survey_afar(stores, group, options, squares, 0 if own else unseen, awake)
    said = options.remark.said()
    if group.size == 1 and options.model_group.size == 1:
        return Figures(float(squares), unseen, awake or 0)
    figures = torch.tensor([0.0, *said, unseen, awake or 0], dtype=torch.float64, device=device)
    figures[0] = squares
    all_reduce(figures, group, label="gradient norm")
    if options.model_group.size > 1:
        all_reduce(figures[: 1 + len(said)], options.model_group, label="gradient norm of all stages")
    square, *heard, unseen, woken = figures.tolist()
    options.remark.hear(heard)
    return Figures(square, unseen, woken)


def _survey_exactly(
    stores: Sequence[GradStore], group: Group, options: StepOptions, awake: int | None
) -> Figures:
    """The same, of a norm that does not show where shards are cut: an integer, in units that follow from the largest
    magnitude of all. So there are two small collectives, and the host reads both."""
    device = stores[0].partition.device if stores else torch.device("cpu")
    unseen = sum(len(store.partition.params) - len(store.seen) for store in stores)
    # What every rank has whole each takes a part of: sums of integers do not show how many did.
    shards = [
        s.shard if s.partition.sharded else s.shard.tensor_split(group.size)[group.rank] for s in stores
    ]
    terms = [(shard, store.partition.offload.let_go) for shard, store in zip(shards, stores, strict=True)]
    # [1] The unit.
    magnitudes = [torch.linalg.vector_norm(x, torch.inf).double() for x, _ in terms if x.numel()]
    largest = (
        torch.stack([m.to(device) for m in magnitudes] or [torch.zeros((), device=device)]).amax().double()
    )
    largest = torch.where(largest.isfinite(), largest, torch.inf)
    for where in (group, options.model_group):
        all_reduce(largest, where, op="max", label="largest gradient")
    _, exponent = frexp(largest.item()) if largest.isfinite() else (0.0, None)
    # [2] Each element once, as in ``survey``.
    total = 0
    for store, (shard, read) in zip(stores, terms, strict=True):
        partition, counts = store.partition, options.counts
        if exponent is None:
            continue
        total += exact_squares(shard, exponent, read)
        if not partition.sharded and group.rank:
            continue
        copies = [i for i, p in enumerate(partition.params) if not counts(p)] if counts else ()
        total -= sum(exact_squares(partition.local(store.shard, i), exponent) for i in copies)
    # In words of fp64 whose sums over ranks do not round; the last has the sign.
    words = [float((total >> _WORD * at) & (1 << _WORD) - 1) for at in range(_WORDS)]
    words.append(float(total >> _WORD * _WORDS))
    others = len(words) + len(said := options.remark.said())
    figures = torch.tensor([*words, *said, unseen, awake or 0], dtype=torch.float64, device=device)
    all_reduce(figures, group, label="gradient norm")
    if options.model_group.size > 1:
        all_reduce(figures[:others], options.model_group, label="gradient norm of all stages")
    told = figures.tolist()
    words, (missing, woken) = told[: len(words)], told[others:]
    options.remark.hear(told[len(words) : others])
    if exponent is None:
        return Figures(inf, missing, woken)
    whole = sum(int(word) << _WORD * at for at, word in enumerate(words))
    return Figures(ldexp(float(whole), 2 * exponent - EXACT_BITS), missing, woken)


def _survey_afar(
    stores: Sequence[GradStore],
    group: Group,
    options: StepOptions,
    squares: Number,
    unseen: int,
    awake: int | None,
) -> Figures:
    """[2] on a device, which the host asks for the sums only where it cannot go on without one of them."""
    # It can where no step is skipped and every parameter has a gradient here: what nobody used, this rank did not use
    # either. Those who lack one look, and see who has it; so all say of each parameter what they have.
    device = stores[0].partition.device
    partitions = [store.partition for store in stores]
    seen = [float(not unseen or i in s.seen) for s in stores for i in range(len(s.partition.params))]
    away = any(partition.master.device != device or partition.offload.pages_state for partition in partitions)
    skips, said = options.scaler is not None or options.skip_nonfinite, options.remark.said()
    if group.size == 1 and options.model_group.size == 1:
        return Figures(float(squares) if skips or away else squares, unseen, awake or 0, seen)
    others = 1 + len(said)  # from here on what only the ranks that hold the same tell each other
    figures = torch.ones(others + 1 + len(seen), dtype=torch.float64, device=device)
    if unseen:
        figures[others + 1 :] = sent(seen, figures.dtype, device)
    # A number that the host has is written by the device; a tensor of the host would be a copy that it waits for.
    square = squares.item() if isinstance(squares, torch.Tensor) and HOST.sees(squares) else squares
    for at, figure in enumerate((square, *said)):
        figures[at] = figure
    if awake is not None:  # else there is none anywhere, and the place means nothing
        figures[others] = awake
    all_reduce(figures, group, label="gradient norm")
    if options.model_group.size > 1:
        all_reduce(figures[:others], options.model_group, label="gradient norm of all stages")
    options.remark.hear(list(figures[1:others]))  # ranks differ in whether they look at the rest
    if not (skips or away or unseen or awake is not None):
        return Figures(figures[0], 0, 0)
    known, woken, *used = (figure for at, figure in enumerate(figures.tolist()) if at not in range(1, others))
    return Figures(known, unseen, 0 if awake is None else woken, used)


def unused_everywhere(
    stores: Sequence[GradStore], group: Group, known: Sequence[float] | None
) -> dict[Partition, list[int]]:
    """The parameters that no rank gave a gradient; collective unless it is ``known`` who did (``Figures.used``)."""
    if known is not None:
        counts = iter(known)
        return _unused((s.partition, [next(counts) for _ in s.partition.params]) for s in stores)
    device = stores[0].partition.params[0].device if stores else torch.device("cpu")
    flags = [index in store.seen for store in stores for index in range(len(store.partition.params))]
    used = torch.tensor(flags, dtype=torch.int32, device=device)
    all_reduce(used, group, op="max", label="used parameters")
    marks = used.split([len(store.partition.params) for store in stores])
    return _unused((store.partition, own.tolist()) for store, own in zip(stores, marks, strict=True))


def _unused(marks: Iterable[tuple[Partition, Sequence[float]]]) -> dict[Partition, list[int]]:
    found = {partition: [index for index, mark in enumerate(own) if not mark] for partition, own in marks}
    return {partition: indices for partition, indices in found.items() if indices}


def refuse(unused: Unused) -> None:
    """Raise UsageError, on every rank alike, for parameters that require a gradient and got none."""
    pairs = [(partition, index) for partition, indices in unused.items() for index in indices]
    names = [f"'{p.names[index]}'" for p, index in pairs if p.params[index].requires_grad]
    if names:
        raise UsageError(
            f"parameters {', '.join(names)} got no gradient on any rank in this step",
            fix="use them in the loss, freeze them with requires_grad_(False), or set "
            "zero_optimization.ignore_unused_parameters to true",
        )
