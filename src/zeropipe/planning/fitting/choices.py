"""What a run may choose for one global batch, as data: how to shard, cut, recompute and offload, written into a
configuration that keeps all else of the user's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from zeropipe.config.batch import ACCUMULATION, MICRO, TRAIN
from zeropipe.config.parse import modernize
from zeropipe.runtime.pipe.schedule import KINDS, find_kind

ZERO, PIPELINE = "zero_optimization", "pipeline"
NONE, OPTIMIZER, ALL = OFFLOADS = (
    "none",
    "optimizer",
    "all",
)  # each holds less on the device than the one before
_SECTIONS = ("offload_optimizer", "offload_param")
_MOST_CHUNKS = 2
_MOST_PACKS = 4  # micro-batches of a pipeline for each of its ranks: with more the bubble hardly shrinks


@dataclass(frozen=True, slots=True)
class Cut:
    """A pipeline: its ranks, the schedule that they keep, and the stages of each."""

    ranks: int
    schedule: str
    chunks: int

    def __str__(self) -> str:
        return self.schedule + (f" x {self.chunks}" if self.chunks > 1 else "")


@dataclass(frozen=True, slots=True)
class Choice:
    """One configuration of those that train the same global batch."""

    stage: int
    micro: int  # samples of a rank at once
    accumulation: int  # micro-steps, or micro-batches of a pipeline
    shard: int = 0  # ranks that hold one copy (MiCS, stage 3); 0: all of them
    recompute: bool = False
    offload: str = NONE  # what lies in host memory
    cut: Cut | None = None

    @property
    def family(self) -> Choice:
        """What it shares with those that differ only in how the batch is cut."""
        return replace(self, micro=0, accumulation=0)

    @property
    def states(self) -> str:
        """How what lies between steps is dealt out, in words."""
        words = [f"{self.cut.ranks} pipeline ranks"] if self.cut else []
        words.append(f"stage {self.stage}" + (f" over {self.shard} ranks" if self.shard else ""))
        return ", ".join((*words, *_SECTIONS[: OFFLOADS.index(self.offload)]))

    def __str__(self) -> str:
        words = [self.states, f"{self.micro} x {self.accumulation} samples"] if self.micro else [self.states]
        words += [str(self.cut)] if self.cut else []
        return ", ".join((*words, *["recompute"] * self.recompute))

    def written(self, source: Mapping[str, Any], ranks: int) -> dict[str, Any]:
        """``source`` with what this chooses: its keys under their present names, no default made visible.

        ``ranks``: those that train other samples.
        """
        config, _ = modernize(dict(source))
        zero = dict(config.get(ZERO) or {})
        zero["stage"] = self.stage
        if self.shard or "mics_shard_size" in zero:
            zero["mics_shard_size"] = self.shard or -1
        zero.pop("zero_hpz_partition_size", None)  # another name of the same
        for section, away in zip(_SECTIONS, (self.offload != NONE, self.offload == ALL), strict=True):
            there = dict(zero.get(section) or {})
            if away:
                # Where the user has named files, files it is.
                device = "nvme" if there.get("device") == "nvme" else "cpu"
                zero[section] = {**there, "device": device}
            elif there:
                zero[section] = {**there, "device": "none"}
        config |= {ZERO: zero, MICRO: self.micro, ACCUMULATION: self.accumulation}
        if TRAIN in config:
            config[TRAIN] = self.micro * self.accumulation * ranks
        if self.cut:
            pipeline = {
                **(config.get(PIPELINE) or {}),
                "schedule": self.cut.schedule,
                "stages": self.cut.ranks,
            }
            if self.cut.chunks > 1 or "num_chunks" in pipeline:
                pipeline["num_chunks"] = self.cut.chunks
            if self.recompute or "activation_checkpoint_interval" in pipeline:
                pipeline["activation_checkpoint_interval"] = int(self.recompute)
            config[PIPELINE] = pipeline
        return config


@dataclass(frozen=True, slots=True)
class Space:
    """What may be chosen for a global ``batch`` on ``world`` ranks, ``apart`` of which train other samples.

    ``batch``: samples of a step; ``sizes``, ``shards``, ``cuts``: None for all that come out even.
    """

    batch: int
    apart: int
    node: int  # ranks of one
    stages: tuple[int, ...] = (0, 1, 2, 3)
    sizes: tuple[int, ...] | None = None
    shards: tuple[int, ...] | None = None
    recompute: tuple[bool, ...] = (False, True)
    offload: tuple[str, ...] = OFFLOADS
    cuts: tuple[Cut | None, ...] = (None,)

    def choices(self) -> list[Choice]:
        """All of them, none twice."""
        return list(dict.fromkeys(self._choices()))

    def _choices(self) -> Iterator[Choice]:
        for cut, stage, recompute, offload in product(self.cuts, self.stages, self.recompute, self.offload):
            if (offload != NONE and stage == 0) or (offload == ALL and stage < 3):
                continue
            ranks, rest = divmod(self.apart, cut.ranks if cut else 1)
            share, uneven = divmod(self.batch, max(ranks, 1))
            if rest or uneven:
                continue
            shards = self._shards(ranks) if self.shards is None else self.shards
            if ranks == 1 and stage and offload == NONE and 0 in self.stages:
                continue  # nobody is there to shard with
            sizes = divisors(share) if self.sizes is None else self.sizes
            for micro, shard in product(sizes, shards if stage == 3 else (0,)):
                if share % micro == 0 and not (
                    cut and share // micro > _MOST_PACKS * cut.ranks and not self.sizes
                ):
                    yield Choice(stage, micro, share // micro, shard, recompute, offload, cut)

    def _shards(self, ranks: int) -> tuple[int, ...]:
        """All ranks, or such as a node comes out even with: groups that lie across nodes anyhow gain nothing."""
        even = (n for n in divisors(ranks) if 1 < n < ranks)
        return (0, *(n for n in even if n % self.node == 0 or self.node % n == 0))


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def cuts(world: int, layers: int, ranks: tuple[int, ...] | None = None) -> tuple[Cut, ...]:
    """Pipelines of ``layers`` on ``world`` ranks by every schedule; ``ranks``: of so many pipeline ranks alone."""
    found = [Cut(1, "1f1b", 1)] if ranks is None or 1 in ranks else []
    for number in divisors(world) if ranks is None else ranks:
        for kind in KINDS:
            for chunks in range(kind.chunks[0], min(kind.chunks[1], _MOST_CHUNKS) + 1):
                # One chunk of what interleaves is what does not; 1F1B takes the time of GPipe, and less memory.
                needless = chunks < kind.default_chunks or kind.name == "gpipe"
                if kind.trains and number > 1 and number * chunks <= layers and not needless:
                    found.append(Cut(number, kind.name, chunks))
    return tuple(found)


def alike(ranks: int, schedule: str, chunks: int) -> tuple[Cut, ...]:
    """The schedules that deal out the stages of a module as ``schedule`` does, which a configuration may choose."""
    own = find_kind(schedule)
    return tuple(
        Cut(ranks, kind.name, chunks)
        for kind in KINDS
        if kind.trains
        and kind.chunks[0] <= chunks <= kind.chunks[1]
        and (kind.placement is own.placement or chunks == 1)
    )
