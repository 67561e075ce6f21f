"""``zeropipe.fit``: the fastest configuration of a program that fits its devices, found by rehearsals of a few."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from zeropipe.config.batch import TRAIN, solve_batch
from zeropipe.config.parse import Source, parse_config, read_source
from zeropipe.config.schema import Config
from zeropipe.errors import ConfigError, ZeropipeError
from zeropipe.given import Tree
from zeropipe.planning.devices import Device, device_of, parse_bytes
from zeropipe.planning.fitting.choices import (
    ALL,
    NONE,
    OFFLOADS,
    OPTIMIZER,
    Choice,
    Cut,
    Space,
    alike,
    cuts,
    divisors,
)
from zeropipe.planning.fitting.search import Refusal, Search, Seen
from zeropipe.planning.plan import Plan, program_from, rehearse_all
from zeropipe.reporting import in_words
from zeropipe.runtime.zero.replication import shard_size

PARTS = (
    "stage",
    "micro",
    "shard",
    "recompute",
    "offload",
    "pipeline",
)  # of a choice, each may be kept as it is
_PLAYED = 3  # micro-steps of a step: a first, a middle and a last; all others are as the middle one


# Makes the program of a choice, whose configuration stands beside it: ``initialize`` gets the same.
Program = Callable[[Choice, dict[str, Any]], Callable[[], object]]


@dataclass(frozen=True, slots=True)
class Follows:
    """Which parts of a choice a program follows that no configuration tells it."""

    micro: bool | None = None  # None: it is tried
    recompute: bool = False
    pipeline: bool = False


@dataclass(frozen=True, slots=True)
class Fit:
    """The configuration that was found. ``choice``, ``config`` and ``plan`` are None where none fits."""

    choice: Choice | None
    config: dict[str, Any] | None  # the user's, with what was chosen
    plan: Plan | None
    given: Choice  # what the user's configuration says, and the plan of that
    before: Plan
    refused: list[Refusal]  # what would have been faster, and why not
    looks: int
    choices: int
    kept: dict[str, str]  # parts that were not searched, and why


def fit(
    make_model: Callable[..., torch.nn.Module],
    make_batch: Callable[..., Tree],
    config: Source,
    *,
    world: int,
    loss: Callable[[Any, Any], torch.Tensor] | None = None,
    device: str = "cpu",
    device_memory: str | int | None = None,
    host_memory: str | int | None = None,
    keep: Collection[str] = (),
    steps: int = 3,
    assume: float | None = None,
) -> Fit:
    """The fastest configuration for the same global batch that fits the device; nothing is computed.

    Args:
        make_model: as for ``plan``. Where it takes ``recompute``, it is called with False and True; where it takes
            ``stages``, ``schedule`` and ``chunks``, it builds a ``PipelineModule`` with these.
        make_batch: as for ``plan``. Where it takes ``micro``, it makes that many samples, and micro-batches are
            searched.
        host_memory: bytes of a node, in words or a number; by default offload may take any.
        keep: parts that stay as the configuration has them: ``stage``, ``micro``, ``shard`` (MiCS), ``recompute``,
            ``offload``, ``pipeline``.

    Raises:
        UsageError, ConfigError: as ``plan`` does, for the configuration as it is given.
    """
    model_takes, batch_takes = (inspect.signature(made).parameters for made in (make_model, make_batch))

    def program(choice: Choice, made: dict[str, Any]) -> Callable[[], object]:
        said: dict[str, Any] = {"recompute": choice.recompute}
        if choice.cut:
            said |= {"stages": choice.cut.ranks, "schedule": choice.cut.schedule, "chunks": choice.cut.chunks}
        model = partial(make_model, **{name: value for name, value in said.items() if name in model_takes})
        batch = partial(make_batch, micro=choice.micro) if "micro" in batch_takes else make_batch
        return program_from(model, batch, made, loss)

    follows = Follows("micro" in batch_takes, "recompute" in model_takes, "stages" in model_takes)
    return fit_program(
        program,
        config,
        world,
        follows=follows,
        device=device,
        device_memory=device_memory,
        host_memory=host_memory,
        keep=keep,
        steps=steps,
        assume=assume,
    )


def fit_program(
    program: Program,
    config: Source,
    world: int,
    *,
    follows: Follows,
    device: str = "cpu",
    device_memory: str | int | None = None,
    host_memory: str | int | None = None,
    keep: Collection[str] = (),
    steps: int = 3,
    assume: float | None = None,
    told: Callable[[Choice, Plan | ZeropipeError], None] = lambda choice, found: None,
) -> Fit:
    """``fit`` for any program; ``told`` is called after each look."""
    wrong = [part for part in keep if part not in PARTS]
    if wrong:
        raise ConfigError("keep", expected=f"some of {', '.join(PARTS)}", found=wrong[0])
    host = parse_bytes(host_memory) if isinstance(host_memory, str) else host_memory
    rehearsing = partial(
        rehearse_all, world=world, device=device, device_memory=device_memory, steps=steps, assume=assume
    )
    looker = _Looker(program, read_source(config), device_of(device), world, host, rehearsing, told)
    # What is given is played first: what fails with it is no matter of choice.
    given, before = looker.begin(_given(config, world))
    space, kept = _space(given, looker, before.fullest.pipeline, follows, keep)
    every = space.choices()
    search = Search(every, before.memory, looker.look)
    while (choice := search.run()) is not None:
        found = looker.played(choice, every_rank=True)
        if found.fits:
            break
        search.refuse(choice, looker.seen(choice, found))
    else:
        return Fit(None, None, None, given, before, search.refusals(None), looker.looks, len(every), kept)
    return Fit(
        choice,
        choice.written(looker.config, looker.ranks(choice)),
        found,
        given,
        before,
        search.refusals(choice),
        looker.looks,
        len(every),
        kept,
    )


class _Looker:
    """Rehearses choices of one program."""

    def __init__(
        self,
        program: Program,
        config: dict[str, Any],
        device: Device,
        world: int,
        host: int | None,
        rehearsing: Callable[..., Plan],
        told: Callable[[Choice, Plan | ZeropipeError], None],
    ) -> None:
        self._program, self.config, self.device, self._world = program, config, device, world
        self._host, self._rehearsing, self._told = host, rehearsing, told
        self.looks = 0

        # Known once what is given was played: samples of a step, and ranks that would train others without a pipeline.
        self.batch, self.apart = 0, world

    def ranks(self, choice: Choice) -> int:
        return self.apart // (choice.cut.ranks if choice.cut else 1)

    def begin(self, given: Choice) -> tuple[Choice, Plan]:
        """Play what is given; its engine says how many ranks train other samples, and which pipeline it has."""
        found = self.played(given)
        one = found.fullest
        ranks = one.samples // (given.micro * one.micro_steps)
        if one.pipeline:
            given = replace(given, cut=Cut(*one.pipeline[:3]))
        self.batch, self.apart = (
            given.micro * given.accumulation * ranks,
            ranks * (given.cut.ranks if given.cut else 1),
        )
        # Only now it is known that all micro-batches of a pipeline are to be played.
        return given, self.played(given) if given.cut else found

    def played(self, choice: Choice, every_rank: bool = False) -> Plan:
        """The plan of ``choice``, from few micro-steps; raises what its program raises."""
        short = replace(choice, accumulation=min(choice.accumulation, _PLAYED)) if not choice.cut else choice
        made = short.written(self.config, self.ranks(choice))
        made.pop(TRAIN, None)  # the other two say it, for any number of ranks
        # Ranks are alike but for what is padded, and for a pipeline's stages.
        ranks = None if every_rank or choice.cut else (0,)
        self.looks += 1
        try:
            found = self._rehearsing(self._program(short, made), config=made, ranks=ranks)
        except ZeropipeError as error:
            self._told(choice, error)
            raise
        longer = tuple(one if one.pipeline else one.longer(choice.accumulation) for one in found.rehearsals)
        found = replace(found, rehearsals=longer)
        self._told(choice, found)
        return found

    def look(self, choice: Choice) -> Seen:
        try:
            return self.seen(choice, self.played(choice))
        except ZeropipeError as error:
            return Seen(0, 0, 0.0, f"it cannot be run: {error}", fails=True)

    def seen(self, choice: Choice, found: Plan) -> Seen:
        away = found.away * min(self.device.ranks_per_node, self._world)
        if self._host is not None and away > self._host:
            why = f"{in_words(away)} of {in_words(self._host)} that a node has for offload"
            return Seen(0, 0, 0.0, why, fails=True)
        more = found.needed - found.memory
        why = f"{in_words(found.needed)}, {in_words(max(more, 0))} too much. {found.advice()}"
        return Seen(found.needed, found.resting, found.seconds.total, why)


def _given(config: Source, world: int) -> Choice:
    parsed = parse_config(config)
    zero = parsed.zero_optimization
    away = (zero.offload_optimizer.device != "none", zero.offload_param.device != "none")
    _searchable(parsed, away)
    apart = world // max(parsed.sequence_parallel_size, 1)
    sizes = solve_batch(
        parsed.train_batch_size,
        parsed.train_micro_batch_size_per_gpu,
        parsed.gradient_accumulation_steps,
        apart,
    )
    offload = ALL if all(away) else OPTIMIZER if away[0] else NONE
    shard = (shard_size(zero) or 0) if zero.stage == 3 else 0
    return Choice(
        zero.stage, sizes.micro_batch_size, sizes.gradient_accumulation_steps, shard, offload=offload
    )


def _searchable(parsed: Config, away: tuple[bool, bool]) -> None:
    """Raise ConfigError where a search would change what it says that it keeps."""
    if parsed.train_batch_size is parsed.train_micro_batch_size_per_gpu is None:
        raise ConfigError(
            "--fit keeps the samples of a step",
            expected=f"a number for {TRAIN}",
            found="none, or 'auto'",
            fix=f"write {TRAIN} into the configuration",
        )
    if parsed.reproducible.slots is not None:
        raise ConfigError(
            "--fit does not search with reproducible.slots, for which the micro-batch is a part of the result",
            fix="search without it, with --keep micro, and take the stage and the offload that it finds",
        )
    if away == (False, True):
        raise ConfigError(
            "--fit offloads parameters with the optimizer's states only",
            expected="offload_optimizer beside offload_param",
            found="offload_param alone",
            fix="add offload_optimizer, or leave out offload_param: the search may choose it",
        )


def _space(
    given: Choice,
    looker: _Looker,
    pipeline: tuple[int, str, int, int] | None,
    follows: Follows,
    keep: Collection[str],
) -> tuple[Space, dict[str, str]]:
    """What is searched, and what not with the reason."""
    kept = dict.fromkeys(keep, "as it was asked")
    space = Space(looker.batch, looker.apart, looker.device.ranks_per_node)
    if looker.device.kind == "cpu":
        kept.setdefault("offload", "on a CPU host memory is the device's")
    if pipeline is None:
        kept.setdefault("pipeline", "the model is no PipelineModule")
        if not follows.recompute:
            kept.setdefault("recompute", "the program does not take it")
    else:
        ranks, schedule, chunks, layers = pipeline
        # Beyond stage 1 each micro-batch gathers or reduces anew.
        stages = tuple(sorted({0, 1, given.stage}))
        space = replace(space, cuts=alike(ranks, schedule, chunks), stages=stages)
        if follows.pipeline:
            space = replace(space, cuts=cuts(looker.apart, layers))
    if "micro" not in kept and (
        follows.micro is False or (follows.micro is None and not _listens(given, looker))
    ):
        kept["micro"] = "the program makes batches of one size, whatever the configuration says"
    fixed: dict[str, dict[str, Any]] = {
        "stage": {"stages": (given.stage,)},
        "micro": {"sizes": (given.micro,)},
        "shard": {"shards": (given.shard,)},
        "recompute": {"recompute": (given.recompute,)},
        "offload": {"offload": OFFLOADS[: OFFLOADS.index(given.offload) + 1][-1:]},
        "pipeline": {"cuts": (given.cut,)},
    }
    for part in kept:
        space = replace(space, **fixed[part])
    return space, kept


def _listens(given: Choice, looker: _Looker) -> bool:
    """Whether the program's micro-batch is that of its configuration: with another one, other kernels run."""
    share = looker.batch // looker.ranks(given)
    others = [size for size in divisors(share) if size != given.micro]
    if not others:
        return True
    other = replace(given, micro=others[0], accumulation=share // others[0])

    def forward(choice: Choice) -> float:
        one = looker.played(choice).rehearsals[0]
        return (
            sum(kernel[3] * n for kernel, n in one.kernels.items() if kernel[0] == "forward")
            / one.micro_steps
        )

    return forward(given) != forward(other)
