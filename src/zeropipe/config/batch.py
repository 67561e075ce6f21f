"""Solves the batch triple: samples per step = micro batch x accumulation steps x data-parallel ranks."""

from __future__ import annotations

from dataclasses import dataclass

from zeropipe.errors import ConfigError, describe

TRAIN = "train_batch_size"
MICRO = "train_micro_batch_size_per_gpu"
ACCUMULATION = "gradient_accumulation_steps"


@dataclass(frozen=True, slots=True)
class BatchSizes:
    """The solved triple; ``train_batch_size == micro_batch_size * gradient_accumulation_steps * world``."""

    train_batch_size: int
    micro_batch_size: int
    gradient_accumulation_steps: int
    world: int

    def __str__(self) -> str:
        return (
            f"{self.train_batch_size} = {self.micro_batch_size} per rank"
            f" x {self.gradient_accumulation_steps} accumulation x {self.world} rank(s)"
        )


def solve_batch(train: int | None, micro: int | None, gas: int | None, world: int) -> BatchSizes:
    """Complete the triple from what is given, for ``world`` data-parallel ranks.

    One size alone means no accumulation. Nothing at all means one sample per rank: engines that only do inference
    are built from configurations without any batch size, and never use it.
    Raises ConfigError naming all four numbers, with numbers that would work.
    """
    for name, value in ((TRAIN, train), (MICRO, micro), (ACCUMULATION, gas), ("world size", world)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ConfigError(
                f"config key {name!r}" if name != "world size" else "world size",
                expected="a whole number of at least 1",
                found=repr(value),
                fix=f"give {name} a value such as 1, or leave it out to have it solved",
            )
    if train is None and micro is None:
        if gas is not None:
            raise ConfigError(
                f"{_given(train, micro, gas, world)}: the accumulation alone does not say how many samples",
                fix=f"add {MICRO}, for example 1, which makes {TRAIN} {gas * world}",
            )
        micro = 1
    if train is None:
        assert micro is not None
        gas = gas or 1
        return BatchSizes(micro * gas * world, micro, gas, world)
    if micro is None or gas is None:
        unknown, rest = divmod(train, (micro or gas or 1) * world)
        if rest:
            raise ConfigError(_indivisible(train, micro, gas, world))
        if micro is None:
            micro, gas = unknown, gas or 1
        else:
            gas = unknown
    if train != micro * gas * world:
        raise ConfigError(_mismatch(train, micro, gas, world))
    return BatchSizes(train, micro, gas, world)


def _given(train: int | None, micro: int | None, gas: int | None, world: int) -> str:
    def shown(value: int | None) -> str:
        return "not given" if value is None else str(value)

    return f"{TRAIN} {shown(train)}, {MICRO} {shown(micro)}, {ACCUMULATION} {shown(gas)}, world size {world}"


def _mismatch(train: int, micro: int, gas: int, world: int) -> str:
    ways = [f"set {TRAIN} to {micro * gas * world}"]
    if train % (micro * world) == 0:
        ways.append(f"set {ACCUMULATION} to {train // (micro * world)}")
    if train % (gas * world) == 0:
        ways.append(f"set {MICRO} to {train // (gas * world)}")
    return describe(
        f"the batch sizes disagree: {_given(train, micro, gas, world)}",
        expected=f"{TRAIN} = {micro} x {gas} x {world} = {micro * gas * world}",
        found=train,
        fix=", or ".join(ways) + ", or leave one of the three out",
    )


def _indivisible(train: int, micro: int | None, gas: int | None, world: int) -> str:
    given = micro or gas or 1
    step = given * world  # the train batch must be a multiple of this
    near = sorted({max(train // step, 1) * step, -(-train // step) * step})
    ways = [f"set {TRAIN} to {' or '.join(str(n) for n in near)}"]
    if train % world == 0:  # so it was the given one that does not divide
        name, share = (MICRO if micro else ACCUMULATION), train // world
        fitting = max(d for d in range(1, min(given, share) + 1) if share % d == 0)
        ways.append(f"set {name} to {fitting}")
    return describe(
        f"the batch sizes have no solution: {_given(train, micro, gas, world)}",
        expected=f"{TRAIN} to be a multiple of {given} x {world} = {step}",
        found=train,
        fix=", or ".join(ways),
    )
