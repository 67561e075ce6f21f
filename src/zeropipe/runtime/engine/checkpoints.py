"""Saves and loads of an engine: which parts go out and come back, in which order, and what all ranks say to it."""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from zeropipe.checkpoint.loader import load, nothing_there
from zeropipe.checkpoint.reader import saved_module
from zeropipe.checkpoint.save.contents import look_through
from zeropipe.checkpoint.save.plain import settle
from zeropipe.checkpoint.save.records import LoadedState, ModelState
from zeropipe.checkpoint.save.saver import Saver
from zeropipe.checkpoint.save.tags import latest_universal
from zeropipe.checkpoint.sources import Checkpoint
from zeropipe.checkpoint.utils import clone_tensors_for_torch_save
from zeropipe.comm.collectives import all_gather_object
from zeropipe.comm.group import world
from zeropipe.errors import CheckpointError, DesyncError, UsageError, describe
from zeropipe.runtime.engine import state as translate
from zeropipe.runtime.engine.module_state import Outcome, load_regions
from zeropipe.runtime.engine.parts import Parts
from zeropipe.runtime.utils import collecting_later

# (into, group, optimizer=, moments=): what fills ``into``; None where there is nothing.
Read = Callable[..., tuple[LoadedState, Checkpoint] | None]


class Checkpoints:
    """The checkpoints of one engine. Every call is collective over the ranks that save and load together."""

    def __init__(self, parts: Parts, saved: Callable[[str, str, float], None]) -> None:
        """``saved(folder, tag, seconds)`` is told of each save."""
        self._parts, self._saved = parts, saved
        # With model parallelism a checkpoint is of the whole grid, not of one replica's slice.
        self.group = parts.group if parts.mpu is None else world()
        self.saver = Saver(self.group, parts.config.checkpoint.tolerate_failed_saves)
        self.say = parts.say
        # Paths in the state of which the log has said that only code restores them: each save has them again.
        self._told: set[str] = set()
        self._settle: Callable[[], None] = lambda: None

    def serve(self, settle: Callable[[], None]) -> None:
        """``settle`` is called before a save or a load changes anything of the state."""
        self._settle = settle

    @property
    def step(self) -> int:
        """Optimizer steps that are done."""
        return self._parts.clock.global_steps

    def save(
        self,
        folder: str | os.PathLike[str],
        tag: str | int | None,
        client_state: Mapping[str, Any] | None,
        save_latest: bool,
        exclude_frozen: bool,
        async_save: bool | None,
    ) -> bool:
        """See ``engine.save_checkpoint``."""
        parts = self._parts
        asynchronous = parts.config.checkpoint.async_save if async_save is None else async_save
        self._settle()
        # Values that a user wrote since the last step are saved, and with them the masters that they stand for.
        if parts.optimizer is not None:
            parts.optimizer.check_whole("save_checkpoint")
            parts.optimizer.take_edits()
        local = translate.local_state(parts, client_state, exclude_frozen=exclude_frozen)
        found = look_through(local)
        # [1] One rank that must not save, or that means another folder, would leave the others waiting.
        named = f"global_step{parts.clock.global_steps}" if tag is None else str(tag)
        name = self._agreed(self._asked("save", named, found.refused or _folder_fault(folder)))
        for path, text in found.told.items():
            if path not in self._told:
                self._told.add(path)
                self.say(text)
        # A rehearsal has nothing to save, and would save it over what is there.
        if self.group.imagined:
            return True
        # [2] From here on a failure of any rank is one of all, and the checkpoints that were there stay.
        began = time.perf_counter()
        if self.saver.save(folder, name, local, save_latest=save_latest, async_save=asynchronous) is None:
            return False
        self._saved(str(folder), name, time.perf_counter() - began)
        return True

    def load(
        self,
        folder: str | os.PathLike[str],
        tag: str | int | None,
        custom: Callable[..., Any] | None,
        *,
        moments: bool,  # and all that belongs to them: loss scale, data position, generators
        schedule: bool,
        clock: bool,
        strict: bool,
        verify: bool,
        trust: bool,
    ) -> tuple[str | None, dict[str, Any] | None]:
        """See ``engine.load_checkpoint``."""
        name = None if tag is None else str(tag)
        read = self.on_disk(folder, name, verify=verify, trust=trust)
        back = self.restore(read, custom, moments=moments, schedule=schedule, clock=clock, strict=strict)
        if back is None and not self.group.imagined:
            self.say(nothing_there(folder, name))
        return (None, None) if back is None else back

    def on_disk(
        self,
        folder: str | os.PathLike[str],
        tag: str | None = None,
        *,
        verify: bool = True,
        trust: bool = False,
    ) -> Read:
        """How ``restore`` reads a checkpoint there. Raises on every rank alike what a save has failed with, and where
        ``folder`` is none."""
        self.saver.raise_pending(join=True)
        self._asked("load", "", _folder_fault(folder))
        if tag is None and self._parts.config.checkpoint.load_universal:
            tag = latest_universal(Path(folder))
        return partial(load, folder, tag, verify=verify, trust=trust)

    @collecting_later()
    def restore(
        self,
        read: Read,
        custom: Callable[..., Any] | None = None,
        *,
        moments: bool = True,
        schedule: bool = True,
        clock: bool = True,
        strict: bool = True,
    ) -> tuple[str, dict[str, Any]] | None:
        """Go on from what ``read(into, group, optimizer=, moments=)`` reads; its path and client state, None where it
        finds nothing."""
        parts, optimizer = self._parts, self._parts.optimizer
        if (
            optimizer is not None
            and moments
            and parts.config.precision != "fp32"
            and not parts.config.zero_optimization.load_from_fp32_weights
        ):
            raise UsageError(
                "config key 'zero_optimization.load_from_fp32_weights' is false: masters made of 16-bit weights",
                found="a load that restores masters as they were saved",
                fix="remove the key; or load the weights into the model before initialize",
            )
        # A rehearsal begins at the beginning.
        if self.group.imagined:
            return None
        self._settle()
        if parts.sharded is not None:
            parts.sharded.before_write()
        # [1] What can be read in place is: masters, moments, and what of the module no code takes part in.
        into = translate.local_state(parts, saving=False)
        if custom is not None:
            into = replace(into, model=replace(into.model, tensors={}, regions=()))
        found = read(into, self.group, optimizer=optimizer is not None and custom is None, moments=moments)
        if found is None:
            return None
        loaded, source = found
        for notice in loaded.notices:
            self.say(notice)

        # [2] The module: by the caller's code, by its own where it has some, and its parameters follow the shards.
        if custom is not None:
            custom(src=_whole_module(source), dst=parts.module)
            for partition in optimizer.partitions if optimizer is not None else ():
                partition.values.refresh_master()
        elif into.model.regions:
            translate.show_loaded_shards(parts)
            # Names are judged last: hooks rename keys, so only now is it known what nobody took.
            loaded = self._load_regions(loaded, source, into.model, strict)
            self._check_names(loaded, strict)
        else:
            self._check_names(loaded, strict)
            translate.show_loaded_shards(parts)

        # [3] All that is no value of the module. A step that raised in the middle is over with what it would have used.
        train = loaded.train
        if optimizer is not None:
            optimizer.forget_step()
        if moments and optimizer is not None and loaded.flats:
            translate.adopt_flats(optimizer, loaded.flats)
            current = [dict(group) for group in optimizer.param_groups]
            groups = self._settled(list(loaded.param_groups), current) or ()
            self.say(translate.adopt_groups(optimizer, groups))
            self._restore(optimizer.loss_scaler, train.loss_scaler)
        if schedule and parts.lr_scheduler is not None:
            if train.lr_scheduler is None:
                self.say("the checkpoint holds no state of a schedule: lr_scheduler stays at its start")
            self._restore(parts.lr_scheduler, train.lr_scheduler)
        if moments:
            self._restore(parts.training_dataloader, train.common.get("data"))
            threads, here = train.common.get("threads"), torch.get_num_threads()
            if parts.sharing is not None and threads not in (None, here):
                self.say(
                    f"the run was saved with {threads} thread(s) a rank and goes on with {here}: kernels may add in "
                    f"another order, and bits differ. Fix: set OMP_NUM_THREADS={threads}"
                )
            if "rng" in train.per_rank:
                translate.set_rng_state(train.per_rank["rng"], parts.device)
        if moments and optimizer is not None and loaded.flats:
            self.say(
                translate.adopt_own_state(
                    parts,
                    train.per_rank,
                    lambda: (source.train_state(rank).per_rank for rank in range(source.world)),
                )
            )
        if clock:
            parts.clock.load_state_dict({key: getattr(train, key) for key in parts.clock.state_dict()})
        return loaded.path, self._settled(clone_tensors_for_torch_save(train.client_state), {})

    def _load_regions(
        self, loaded: LoadedState, source: Checkpoint, model: ModelState, strict: bool
    ) -> LoadedState:
        """Let the modules that take part in loading do so; the masters follow what they make of the values."""
        module, optimizer = self._parts.module, self._parts.optimizer
        partitions = optimizer.partitions if optimizer is not None else ()
        for partition in partitions:  # the masters were read: what no key stands for has its value from them
            partition.values.publish()
        fault = ""
        outcome = Outcome()
        try:
            rest = source.rest()
            rest = replace(rest, extra=self._settled(dict(rest.extra)))
            dtypes = {name: param.dtype for name, param in module.named_parameters(remove_duplicate=False)}
            saved = saved_module(source, model, rest, dtypes)
            outcome = load_regions(module, model.regions, saved, rest.versions, strict)
        except Exception as error:
            fault = f"{type(error).__name__}: {error}"
        fault = fault or "; ".join(outcome.errors)
        everyone = all_gather_object(fault, self.group, label="modules loaded")
        faults = zip(self.group.ranks, everyone, strict=True)
        # The cause before what followed from it on others.
        for rank, text in sorted(faults, key=lambda found: found[1].startswith("DesyncError")):
            if text:
                raise CheckpointError(
                    f"{loaded.path} does not go into the module: {text}",
                    rank=rank,
                    fix="the engine's state is mixed now: load another checkpoint before training on",
                )
        for partition in partitions:
            partition.values.take_edits(sure=True)
        missing = (*loaded.missing, *outcome.missing)
        return replace(loaded, missing=missing, unexpected=(*loaded.unexpected, *outcome.unexpected))

    def _restore(self, stateful: Any, saved: Any) -> None:
        """Give ``stateful`` what was saved of it; what the checkpoint does not hold stays as it is."""
        # A user's schedule or loader may have no state; a checkpoint of another run may have none of it.
        if saved is None or not hasattr(stateful, "load_state_dict"):
            return
        state = self._settled(clone_tensors_for_torch_save(saved), stateful.state_dict())
        if state is not None:
            stateful.load_state_dict(state)

    def _settled(self, saved: Any, current: Any = None) -> Any:
        """``saved`` with ``current`` in the place of what only code restores, each of which is named."""
        value, lost = settle(saved, current)
        for absent in lost:
            self.say(
                describe(
                    f"{absent.path} was not restored: it holds a {absent.kind}, which needs code",
                    fix="if you trust whoever wrote the checkpoint, load it with trust=True and with that class "
                    "imported; it stays as it is now",
                )
            )
        return value

    def _asked(self, what: str, tag: str, fault: str) -> list[str]:
        """The tags of all ranks. Raises on every rank alike what any of them has against the save, or the load."""
        everyone = all_gather_object((tag, fault), self.group, label=f"{what} asked for")
        for _, against in everyone:
            if against:
                raise CheckpointError(against)
        return [given for given, _ in everyone]

    def _agreed(self, tags: list[str]) -> str:
        """The tag under which all ranks save."""
        if len(set(tags)) == 1:
            return tags[0]
        ranks = self.group.ranks
        listed = "; ".join(f"rank {rank}: {name!r}" for rank, name in zip(ranks, tags, strict=True))
        text = f"ranks save under different tags: {listed}. Fix: give all the same tag"
        validation = self._parts.config.checkpoint.tag_validation
        if validation == "fail":
            raise DesyncError(text)
        if validation == "warn":
            self.say(f"{text}; that of rank {ranks[0]} is used for all")
        return tags[0]

    def _check_names(self, loaded: LoadedState, strict: bool) -> None:
        missing, unexpected = loaded.missing, loaded.unexpected
        stages = self._parts.stages
        if stages.size > 1:
            # A parameter is strange only if no stage knows it, and an error only if all ranks raise it.
            everyone = all_gather_object((missing, unexpected), stages, label="names")
            missing = tuple(dict.fromkeys(name for absent, _ in everyone for name in absent))
            unexpected = tuple(n for n in unexpected if all(n in strange for _, strange in everyone))
        if not (missing or unexpected):
            return
        text = describe(
            f"{loaded.path} does not hold this model: "
            f"missing {_listed(missing)}; not in the model {_listed(unexpected)}",
            fix="load into the model that was saved, or pass load_module_strict=False",
        )
        if strict:
            raise CheckpointError(text)
        self.say(text)


def _folder_fault(folder: Any) -> str:
    if isinstance(folder, (str, os.PathLike)) and os.fspath(folder):
        return ""
    return describe(
        "the checkpoint's folder",
        expected="a path",
        found=repr(folder),
        fix='give one, such as "checkpoints"',
    )


def _listed(names: tuple[str, ...], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(names[:limit]) + more) if names else "nothing"


def _whole_module(source: Checkpoint) -> dict[str, Any]:
    """The module's state dict, full tensors and extra state, as it was saved; tied names share a tensor."""
    # A value that a module holds, else its master; a frozen one, or one that a hook has hidden, has but one of them.
    rest = source.rest()
    state: OrderedDict[str, Any] = OrderedDict()
    for value in source.module:
        state[value.name] = value.read().clone()
    for name in source.holders:
        flat = source.master(name)
        if flat is not None and name not in state and name not in rest.hidden:
            state[name] = flat.whole(name, flat.value_key or "")
    for other, name in source.tied.items():
        if name in state:
            state[other] = state[name]
    state.update(settle(dict(rest.extra))[0] or {})
    if rest.versions is not None:
        state._metadata = dict(rest.versions)  # type: ignore[attr-defined]
    return state
