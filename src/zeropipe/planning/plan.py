"""``zeropipe.plan``: what a run needs before it runs, from rehearsals of some of its ranks."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from zeropipe.config.parse import Source, parse_config
from zeropipe.given import Json, Tree
from zeropipe.planning.devices import GIVE_BACK, Device, Seconds, device_of, parse_bytes, seconds
from zeropipe.planning.ledger import BUILDING, DISK, ELSEWHERE, HOST
from zeropipe.planning.piping import played
from zeropipe.planning.rehearse import Place, Rehearsal, rehearse
from zeropipe.reporting import in_words
from zeropipe.runtime.engine.engine import DeepSpeedEngine
from zeropipe.runtime.pipe.simulate import Simulation


@dataclass(frozen=True)
class Plan:
    """What a run at one configuration needs: one rehearsal for each rank that was played."""

    rehearsals: tuple[Rehearsal, ...]
    device: Device
    memory: int  # bytes that a device has

    @property
    def fullest(self) -> Rehearsal:
        """The rank that needs the most memory."""
        return max(self.rehearsals, key=lambda one: one.peak.peak)

    @property
    def peak(self) -> int:
        """Bytes that the fullest of the ranks has at once, with what its process takes by itself."""
        return self.fullest.peak.peak + self.device.base

    @property
    def kept(self) -> int:
        """Bytes that the heap of a rank may keep beyond what is alive: none where freed memory goes back at once."""
        return max(self.device.keeps(one.passing) for one in self.rehearsals)

    @property
    def needed(self) -> int:
        """Bytes that a device must have."""
        return self.peak + self.kept

    @property
    def fits(self) -> bool:
        return self.needed <= self.memory

    @cached_property
    def _played(self) -> tuple[Seconds, Simulation] | None:
        return played(self.rehearsals, self.device)

    @property
    def bubble(self) -> float | None:
        """Of a pipeline: the time that its ranks wait over the time that they compute, in a batch."""
        return None if self._played is None else self._played[1].bubble

    @cached_property
    def seconds(self) -> Seconds:
        """Of one optimizer step, on the rank that takes longest."""
        found = max(
            (seconds(one.kernels, one.traffic, self.device) for one in self.rehearsals),
            key=lambda one: one.total,
        )
        if self._played is not None:
            found = self._played[0]
        if self.away:
            sending = {**found.sending, "host": max(map(self._beside, self.rehearsals))}
            found = replace(found, sending=sending)
        return found

    def _beside(self, one: Rehearsal) -> float:
        away = {
            kind.partition(": ")[2]: size
            for kind, size in one.resting.items()
            if kind.startswith((HOST, DISK))
        }
        return self.device.beside(away, one.micro_steps)

    @property
    def away(self) -> int:
        """Bytes that a rank has in host memory or files."""
        return max(
            sum(size for kind, size in one.resting.items() if kind.startswith((HOST, DISK)))
            for one in self.rehearsals
        )

    @property
    def resting(self) -> int:
        """Bytes that the fullest of the ranks has on its device between two steps."""
        return self.device.base + max(
            sum(size for kind, size in one.resting.items() if not kind.startswith((HOST, DISK, ELSEWHERE)))
            for one in self.rehearsals
        )

    @property
    def throughput(self) -> float:
        """Samples a second, of all ranks."""
        total = self.seconds.total
        return self.fullest.samples / total if total else 0.0

    def verdict(self) -> str:
        """Fits, or by how much not, and what to change first."""
        kept = f" and at most {in_words(self.kept)} that the heap keeps" if self.kept else ""
        left = self.memory - self.needed
        if left >= 0:
            return f"fits: {in_words(self.peak)}{kept} of {in_words(self.memory)}, {in_words(left)} left"
        size, more = f"{in_words(self.peak)}{kept} of {in_words(self.memory)}", in_words(-left)
        if self.peak <= self.memory:
            return (
                f"may not fit: {size}, {more} too much. Run it, and plan it, with {GIVE_BACK}=65536 in the "
                "environment: then freed memory goes back at once, for some time in each step"
            )
        return f"does not fit: {size}, {more} too much. {self.advice()}"

    def advice(self) -> str:
        """What to change first where it does not fit."""
        kinds = self.fullest.peak.kinds
        most = max(kinds, key=lambda kind: kinds[kind], default="")
        if self.device.base > self.memory:
            return f"The process alone takes {in_words(self.device.base)}, before there is a model"
        if self.fullest.peak is self.fullest.built and most in (BUILDING, "parameters"):
            return "It is the model while it is built: build it under zeropipe.zero.Init, at stage 3"
        settings = self.fullest.settings
        stage = int(settings.get("zero_optimization.stage", 0))
        sharded = {"moments": 1, "masters": 1, "gradients": 2, "parameters": 3}
        if most in sharded and stage < sharded[most]:
            return f"Most of it are {most}: ZeRO stage {sharded[most]} shards them"
        if most in sharded:
            offload = ("offload_optimizer", "offload_param")
            off = [name for name in offload if not settings.get(f"zero_optimization.{name}.device")]
            ways = ", or ".join(["use more devices", *([" / ".join(off)] if off else [])])
            return f"Most of it are {most}, sharded already: {ways}"
        if most in ("activations", "temporary"):
            return "Most of it are activations: recompute them, or take a smaller micro-batch and accumulate more"
        if most == "gathered units":
            return "Most of it are gathered parameters: lower stage3_prefetch_bucket_size, stage3_max_live_parameters"
        return f"Most of it is {most}"

    def links(self) -> dict[str, int]:
        """Bytes that a rank sends and receives in a step, inside its node and between nodes."""
        found: Counter[str] = Counter()
        size = self.device.ranks_per_node
        for (op, _, nbytes, ranks, _), count in self.fullest.traffic.items():
            if len(ranks) > 1:
                where = "inside a node" if len({rank // size for rank in ranks}) == 1 else "between nodes"
                share = (len(ranks) - 1) / len(ranks) if op not in ("send", "recv") else 1
                found[where] += int(count * nbytes * share * (2 if op == "all_reduce" else 1))
        return dict(found)

    def to_json(self) -> Json:
        """The plan as JSON has it, for programs and for the report."""
        return {
            "world": self.fullest.place.world,
            "device": self.device.name,
            "memory": self.memory,
            "fits": self.fits,
            "verdict": self.verdict(),
            "peak": self.peak,
            "kept": self.kept,
            "seconds": self.seconds.total,
            "bubble": self.bubble,
            "samples_per_second": self.throughput,
            "parameters": self.fullest.parameters,
            "settings": {key: _plain(value) for key, value in self.fullest.settings.items()},
            "links": self.links(),
            "ranks": [
                {
                    "rank": one.place.rank,
                    "peak": one.peak.peak,
                    "moment": one.peak.moment,
                    "kinds": one.peak.kinds,
                    "resting": one.resting,
                    "curve": one.trained.curve,
                    "traffic": [
                        {
                            "op": op,
                            "label": label,
                            "bytes": nbytes,
                            "ranks": len(ranks),
                            "phase": phase,
                            "calls": n,
                        }
                        for (op, label, nbytes, ranks, phase), n in one.traffic.items()
                    ],
                }
                for one in self.rehearsals
            ],
        }


def plan(
    make_model: Callable[[], torch.nn.Module],
    make_batch: Callable[[], Tree],
    config: Source,
    *,
    world: int,
    loss: Callable[[Any, Any], torch.Tensor] | None = None,
    device: str = "cpu",
    device_memory: str | int | None = None,
    ranks: Sequence[int] | None = None,
    steps: int = 3,
    assume: float | None = None,
) -> Plan:
    """What a run of ``world`` ranks needs; nothing is computed, and nothing real is allocated.

    Args:
        make_model: builds the model; under ``zero.Init`` where the configuration says stage 3.
        make_batch: one micro-batch of one rank: a tensor, or a tuple or dict of arguments for the model.
        config: as ``initialize`` takes it.
        loss: ``loss(output, batch)``; by default the output's ``loss``, or the mean of the output.
        device: ``h200``, ``h100``, ``a100``, ``cpu`` or a JSON file with a device's keys.
        device_memory: bytes or words such as ``80GB``; by default the device's.
        ranks: which to rehearse; by default the first, a middle and the last.
        steps: optimizer steps to rehearse; the first makes the optimizer's state.
        assume: what a program gets that asks for a value that is not there (``loss.item()``).

    Raises:
        UsageError: what is given fails, asks for values, or ends early; it names the line.
        ConfigError: a wrong configuration, device or size.
    """
    return rehearse_all(
        program_from(make_model, make_batch, config, loss),
        world,
        device=device,
        device_memory=device_memory,
        ranks=ranks,
        steps=steps,
        assume=assume,
    )


def program_from(
    make_model: Callable[[], torch.nn.Module],
    make_batch: Callable[[], Tree],
    config: Source,
    loss: Callable[[Any, Any], torch.Tensor] | None,
) -> Callable[[], None]:
    """A program that builds the model, under ``zero.Init`` at stage 3, and trains it."""
    under_init = parse_config(config).zero_optimization.stage == 3

    def program() -> None:
        import zeropipe
        from zeropipe.runtime.zero.gather.init import Init

        with Init(config_dict_or_path=config, enabled=under_init):
            model = make_model()
        engine, *_ = zeropipe.initialize(model=model, config=config)
        del model
        train(engine, make_batch, loss)

    return program


def train(
    engine: DeepSpeedEngine, make_batch: Callable[[], Tree], loss: Callable[[Any, Any], torch.Tensor] | None
) -> None:
    """Micro-steps without an end: who watches ends it."""
    batches = getattr(type(engine), "train_batch", None)  # pipelines have it
    while batches is not None:
        batches(engine, (make_batch() for _ in itertools.count()))
    while True:
        batch = make_batch()
        if isinstance(batch, dict):
            output = engine(**batch)
        else:
            output = engine(*batch) if isinstance(batch, tuple | list) else engine(batch)
        value = loss(output, batch) if loss is not None else getattr(output, "loss", output)
        if value.numel() != 1:
            value = value.float().mean()
        del output
        engine.backward(value)
        del value
        engine.step()


def rehearse_all(
    program: Callable[[], object],
    world: int,
    *,
    config: Source | None = None,
    device: str = "cpu",
    device_memory: str | int | None = None,
    ranks: Sequence[int] | None = None,
    steps: int = 3,
    assume: float | None = None,
) -> Plan:
    """``plan`` for any program that calls ``initialize`` and trains; ``config`` replaces the one that it gives."""
    profile = device_of(device)
    memory = parse_bytes(device_memory) if isinstance(device_memory, str) else device_memory
    chosen = sorted({0, world // 2, world - 1}) if ranks is None else ranks
    memory = profile.memory if memory is None else memory
    places = [Place(rank, world, profile.ranks_per_node, profile.kind, steps, memory) for rank in chosen]
    found = tuple(rehearse(program, place, config=config, assume=assume) for place in places)
    return Plan(found, profile, memory)


def _plain(value: Any) -> Any:
    return value if isinstance(value, bool | int | float | str | type(None)) else str(value)
