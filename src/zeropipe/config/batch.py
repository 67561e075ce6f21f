"""What the number of data-parallel ranks decides: the batch triple, and whether shard groups divide it.

samples per step = micro batch x accumulation steps x ranks
"""

from __future__ import annotations

from dataclasses import dataclass

from zeropipe.config.schema import Config
from zeropipe.errors import ConfigError

TRAIN = "train_batch_size"
MICRO = "train_micro_batch_size_per_gpu"
ACCUMULATION = "gradient_accumulation_steps"


@dataclass(frozen=True, slots=True)
class BatchSizes:
    """The solved triple; ``train_batch_size == micro_batch_size * gradient_accumulation_steps * world``.

    With ``slots`` it is ``micro_batch_size * slots``, and ranks accumulate as often as their share needs.
    """

    train_batch_size: int
    micro_batch_size: int
    gradient_accumulation_steps: int
    world: int
    slots: int | None = None

    def __str__(self) -> str:
        if self.slots is not None:
            return f"{self.train_batch_size} = {self.micro_batch_size} x {self.slots} slots on {self.world} rank(s)"
        return (
            f"{self.train_batch_size} = {self.micro_batch_size} per rank"
            f" x {self.gradient_accumulation_steps} accumulation x {self.world} rank(s)"
        )


def batch_of(config: Config, world: int) -> BatchSizes:
    """The batch sizes of ``config`` on ``world`` data-parallel ranks. Raises ConfigError."""
    train, micro = config.train_batch_size, config.train_micro_batch_size_per_gpu
    gas, slots = config.gradient_accumulation_steps, config.reproducible.slots
    known = train, micro, gas
    return solve_batch(*known, world) if slots is None else solve_slots(*known, slots, world)


def solve_batch(train: int | None, micro: int | None, gas: int | None, world: int) -> BatchSizes:
    """Complete the triple from what is given, for ``world`` data-parallel ranks. One size alone: no accumulation.

    Raises ConfigError naming all four numbers, with numbers that would work.
    """
    sizes = {TRAIN: train, MICRO: micro, ACCUMULATION: gas, "world size": world}
    for name, value in sizes.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ConfigError(
                f"config key {name!r}" if name != "world size" else "world size",
                expected="a whole number of at least 1",
                found=repr(value),
                fix=f"give {name} a value such as 1, or leave it out to have it solved",
            )
    given = ", ".join(f"{name} {'not given' if value is None else value}" for name, value in sizes.items())
    # [1] Nothing that says how many samples.
    if train is None and micro is None:
        if gas is not None:
            raise ConfigError(
                f"{given}: the accumulation alone does not say how many samples",
                fix=f"add {MICRO}, for example 1, which makes {TRAIN} {gas * world}",
            )
        # Engines that only do inference are built without any batch size, and never use it: one sample per rank.
        micro = 1
    # [2] Without the whole there is nothing to contradict.
    if train is None:
        assert micro is not None
        gas = gas or 1
        return BatchSizes(micro * gas * world, micro, gas, world)
    # [3] One or two of the three: what is left must come out even.
    if micro is None or gas is None:
        share, rest = divmod(train, (micro or gas or 1) * world)
        if rest:
            raise _indivisible(given, train, micro, gas, world)
        micro, gas = (share, gas or 1) if micro is None else (micro, share)
    if train != micro * gas * world:
        # Each of the three may be the one that is wrong; those that no whole number mends are left out.
        ways = [f"set {TRAIN} to {micro * gas * world}"]
        for name, other in ((ACCUMULATION, micro), (MICRO, gas)):
            if train % (other * world) == 0:
                ways.append(f"set {name} to {train // (other * world)}")
        raise ConfigError(
            f"the batch sizes disagree: {given}",
            expected=f"{TRAIN} = {micro} x {gas} x {world} = {micro * gas * world}",
            found=train,
            fix=", or ".join(ways) + ", or leave one of the three out",
        )
    return BatchSizes(train, micro, gas, world)


def solve_slots(train: int | None, micro: int | None, gas: int | None, slots: int, world: int) -> BatchSizes:
    """The triple of a step of ``slots`` micro-batches, on any ``world`` data-parallel ranks. Raises ConfigError."""
    if slots < world:
        raise ConfigError(
            "config key 'reproducible.slots'",
            expected=f"at least {world}, the data-parallel ranks",
            found=slots,
            fix=f"set it to {world} or more, or start fewer ranks",
        )
    if gas is not None and gas != -(-slots // world):
        raise ConfigError(
            f"config key {ACCUMULATION!r} says what 'reproducible.slots' {slots} says, for one number of ranks",
            expected=f"{-(-slots // world)} on {world} rank(s)",
            found=gas,
            fix="leave it out: it follows from the slots",
        )
    if micro is None:
        micro, rest = divmod(train or slots, slots)
        if rest or not micro:
            raise ConfigError(
                f"config key {TRAIN!r}",
                expected=f"a multiple of 'reproducible.slots' {slots}",
                found=train,
                fix=f"set it to {max(1, micro) * slots}, or give {MICRO} alone",
            )
    if train not in (None, micro * slots):
        raise ConfigError(
            f"config keys {TRAIN!r}, {MICRO!r} and 'reproducible.slots' disagree",
            expected=f"{micro} x {slots} = {micro * slots}",
            found=train,
            fix=f"set {TRAIN} to {micro * slots}, or leave it out",
        )
    return BatchSizes(micro * slots, micro, -(-slots // world), world, slots)


def _indivisible(text: str, train: int, micro: int | None, gas: int | None, world: int) -> ConfigError:
    given = micro or gas or 1
    step = given * world  # the train batch must be a multiple of this
    near = sorted({max(train // step, 1) * step, -(-train // step) * step})
    ways = [f"set {TRAIN} to {' or '.join(str(n) for n in near)}"]
    if train % world == 0:  # so it was the given one that does not divide
        name, share = (MICRO if micro else ACCUMULATION), train // world
        fitting = max(d for d in range(1, min(given, share) + 1) if share % d == 0)
        ways.append(f"set {name} to {fitting}")
    return ConfigError(
        f"the batch sizes have no solution: {text}",
        expected=f"{TRAIN} to be a multiple of {given} x {world} = {step}",
        found=train,
        fix=", or ".join(ways),
    )


def check_world(config: Config, world: int) -> None:
    """Check what depends on the number of data-parallel ranks. Raises ConfigError."""
    # A parameter's shards are dealt out evenly: a group that is smaller than the others would hold other shards.
    zero = config.zero_optimization
    for name, size, off in (
        ("mics_shard_size", zero.mics_shard_size, -1),
        ("zero_hpz_partition_size", zero.zero_hpz_partition_size, 1),
    ):
        if zero.stage == 3 and size > 0 and size != off and world % size:
            divisors = ", ".join(str(d) for d in range(1, world + 1) if world % d == 0)
            raise ConfigError(
                f"config key 'zero_optimization.{name}'",
                expected=f"a divisor of the world size {world}",
                found=size,
                fix=f"use one of {divisors}",
            )
