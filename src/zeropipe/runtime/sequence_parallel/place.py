"""Which ranks share a sequence, and who is asked for it: an ``mpu`` of ours, and the one of this process.

Consecutive ranks share one. All ranks hold the same parameters, so gradients are averaged over all of them, while only
ranks that are in the same place of different sequences count as different data::

    rank              0     1     2     3         4 ranks, 2 to a sequence
    sequence          a     a     b     b         exchanges of attention: {0 1} {2 3}
    its tokens       1st   2nd   1st   2nd  half
    gradients         ------ averaged ------      over all four; a batch counts 2 samples per micro-batch of 1
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from zeropipe.comm.group import SELF, Group, init_distributed, new_groups, world
from zeropipe.errors import UsageError
from zeropipe.given import Anything, Mpu, ProcessGroup


class SequenceParallel:
    """The places of this rank; pass it to ``initialize(mpu=...)``.

    ``sequence_group``: the ranks of this rank's sequence. ``data_group``: those that hold the same parameters, all of
    them. ``samples_group``: those in the same place of other sequences.
    """

    def __init__(self, sequence: Group, everyone: Group, samples: Group) -> None:
        self.sequence_group, self.data_group, self.samples_group = sequence, everyone, samples

    # The words of an mpu.

    def get_sequence_parallel_group(self) -> Any:
        return self.sequence_group.pg

    def get_sequence_parallel_world_size(self) -> int:
        return self.sequence_group.size

    def get_sequence_parallel_rank(self) -> int:
        return self.sequence_group.rank

    def get_sequence_data_parallel_group(self) -> Any:
        return self.data_group.pg

    def get_sequence_data_parallel_world_size(self) -> int:
        return self.data_group.size

    def get_sequence_data_parallel_rank(self) -> int:
        return self.data_group.rank

    def get_data_parallel_group(self) -> Any:
        return self.samples_group.pg

    def get_data_parallel_world_size(self) -> int:
        return self.samples_group.size

    def get_data_parallel_rank(self) -> int:
        return self.samples_group.rank

    # Nothing else is divided.

    def get_model_parallel_rank(self) -> int:
        return 0

    def get_model_parallel_world_size(self) -> int:
        return 1


@dataclass
class Current:
    """What the module functions below answer from."""

    mpu: Any = None  # ours, or one that a user gave ``initialize``
    attention: Any = None  # what exchanges in models of transformers (``UlyssesSPAttentionHF``)
    made: dict[int, SequenceParallel] = field(default_factory=dict)  # by the number of ranks to a sequence


# State of the process, as its world is: clients ask functions, such as ``groups._get_sequence_parallel_rank()``.
CURRENT = Current()


def initialize_sequence_parallel(sequence_parallel_size: int) -> SequenceParallel:
    """Divide the world into groups of ``sequence_parallel_size`` consecutive ranks. Collective over the world.

    A size of 1 ends it: the functions below answer as before, and models of transformers exchange nothing. Raises
    UsageError unless the size divides the number of ranks.
    """
    init_distributed()
    everyone, size = world(), sequence_parallel_size
    if size < 1 or everyone.size % size:
        divisors = ", ".join(str(d) for d in range(1, everyone.size + 1) if everyone.size % d == 0)
        raise UsageError(
            "sequence_parallel_size",
            expected=f"a divisor of the {everyone.size} ranks",
            found=size,
            fix=f"use one of {divisors}",
        )
    if size == 1:
        CURRENT.mpu = CURRENT.attention = None
        return SequenceParallel(SELF, everyone, everyone)
    # Groups of a world that has ended are of no use in the next one.
    made = CURRENT.made.get(size)
    if made is None or made.data_group.started != everyone.started or made.sequence_group.pg is None:
        runs = [range(start, start + size) for start in range(0, everyone.size, size)]
        places = [range(place, everyone.size, size) for place in range(size)]
        made = SequenceParallel(new_groups(runs), everyone, new_groups(places))
        CURRENT.made[size] = made
    CURRENT.mpu = made
    return made


def ranks_of_a_sequence(mpu: Mpu) -> int:
    """How many ranks share a sequence, as ``mpu`` says; 1 where it says nothing."""
    ask = getattr(mpu, "get_sequence_parallel_world_size", None)
    return 1 if ask is None else int(ask())


def exchange_with(attention: Anything) -> None:
    """``attention`` exchanges in models of transformers from now on, in place of an earlier one."""
    CURRENT.attention = attention


def take(mpu: Mpu, module: torch.nn.Module) -> None:
    """An engine of ``module`` whose ranks share sequences as ``mpu`` says: the functions here answer from it."""
    # It may be this module, which would then ask itself.
    if CURRENT.mpu is None or CURRENT.mpu.get_sequence_parallel_group() != mpu.get_sequence_parallel_group():
        CURRENT.mpu = mpu
    if CURRENT.attention is not None:
        CURRENT.attention.prepare(module)


def get_sequence_parallel_group() -> ProcessGroup:
    """The process group of the ranks that share this rank's sequence. Raises UsageError where none do."""
    if CURRENT.mpu is None:
        raise UsageError(
            "sequences are not divided among ranks",
            fix="call initialize_sequence_parallel(size), or set sequence_parallel_size in the configuration",
        )
    return CURRENT.mpu.get_sequence_parallel_group()


def get_sequence_parallel_world_size() -> int:
    return ranks_of_a_sequence(CURRENT.mpu)


def get_sequence_parallel_rank() -> int:
    """This rank's place in its sequence; 0 where sequences are not divided."""
    return 0 if CURRENT.mpu is None else int(CURRENT.mpu.get_sequence_parallel_rank())


# Ranks that share a sequence, as those that do not, hold the same parameters: gradients are averaged over the world.


def get_sequence_data_parallel_group() -> ProcessGroup:
    """The process group of the ranks that hold the same parameters: all."""
    return world().pg


def get_sequence_data_parallel_world_size() -> int:
    return world().size


def get_sequence_data_parallel_rank() -> int:
    return world().rank


def get_data_parallel_group() -> ProcessGroup:
    """The process group of the ranks that see other samples than this one: all, where sequences are not divided."""
    return world().pg if CURRENT.mpu is None else CURRENT.mpu.get_data_parallel_group()


def get_data_parallel_world_size() -> int:
    return world().size if CURRENT.mpu is None else int(CURRENT.mpu.get_data_parallel_world_size())


def get_data_parallel_rank() -> int:
    return world().rank if CURRENT.mpu is None else int(CURRENT.mpu.get_data_parallel_rank())
