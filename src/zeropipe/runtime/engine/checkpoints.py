"""``save_checkpoint`` and ``load_checkpoint`` of the engine: which parts go out and come back, in which order."""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from zeropipe.checkpoint.loader import load, nothing_there
from zeropipe.checkpoint.plain import Absent, settle
from zeropipe.checkpoint.saved_module import saved_module
from zeropipe.checkpoint.saver import Saver
from zeropipe.checkpoint.sources.data import Checkpoint
from zeropipe.checkpoint.state import LoadedState, ModelState, look_through
from zeropipe.checkpoint.tags import latest_universal
from zeropipe.checkpoint.utils import clone_tensors_for_torch_save
from zeropipe.comm.collectives import all_gather_object
from zeropipe.comm.group import Group, world
from zeropipe.errors import CheckpointError, DesyncError, describe
from zeropipe.runtime.engine import state as translate
from zeropipe.runtime.engine.flats import adopt_flats
from zeropipe.runtime.engine.module_state import Outcome, load_regions
from zeropipe.runtime.utils import collecting_later

if TYPE_CHECKING:
    from zeropipe.runtime.engine.engine import DeepSpeedEngine

_log = logging.getLogger("zeropipe")


class EngineCheckpoint:
    """The checkpoint half of an engine's interface."""

    _saver: Saver | None = None
    _told: set[str]  # paths in the state of which the log has said that only code restores them

    def save_checkpoint(
        self,
        save_dir: str | os.PathLike[str],
        tag: str | int | None = None,
        client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
        *,
        async_save: bool | None = None,
    ) -> bool:
        """Write the checkpoint ``save_dir/tag`` (default tag ``global_step{N}``). Every rank must call it.

        ``client_state``: anything. Values, tensors, arrays and containers of them come back as they were; what only
        code can restore comes back with ``trust=True`` and is named in the log, once. Ranks that give different
        tags: ``checkpoint.tag_validation`` decides; rank 0's is taken unless it is "fail".
        ``async_save`` (default: the config's ``checkpoint.async_save``): return after the copy to host memory;
        the next save or ``destroy`` waits for the files, and an error of the writer is raised then.

        Returns True. Raises CheckpointError on every rank alike when any rank cannot write, when ``save_dir`` is
        empty, or where the client state holds what cannot be saved at all; earlier checkpoints are intact then.
        """
        engine = cast("DeepSpeedEngine", self)
        asynchronous = engine._config.checkpoint.async_save if async_save is None else async_save
        if engine.optimizer is not None:
            engine.optimizer.check_whole("save_checkpoint")
            engine.optimizer.take_edits()
        local = translate.local_state(engine, client_state, exclude_frozen=exclude_frozen_parameters)
        name = f"global_step{engine.clock.global_steps}" if tag is None else str(tag)
        found = look_through(local)
        name = self._agreed(save_dir, name, found.refused)
        for path, text in found.told.items():
            if path not in self._told:
                self._told.add(path)
                self._say(text)
        self._get_saver().save(save_dir, name, local, save_latest=save_latest, async_save=asynchronous)
        return True

    @collecting_later()
    def load_checkpoint(
        self,
        load_dir: str | os.PathLike[str],
        tag: str | int | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Callable[..., Any] | None = None,
        *,
        verify: bool = True,
        trust: bool = False,
    ) -> tuple[str | None, dict[str, Any] | None]:
        """Restore what was saved at any stage and number of ranks; every rank must call it.

        Args:
            load_dir: the folder that was saved to; one that DeepSpeed wrote works too.
            tag: default the one in ``latest``, or the newest complete checkpoint where that is damaged.
            load_module_strict: missing or unexpected parameters are an error.
            load_optimizer_states: False leaves moments, loss scale and data position as they are.
            load_lr_scheduler_states: False leaves the schedule.
            load_module_only: only the weights; the clock too stays as it is.
            custom_load_fn: called as ``fn(src=state_dict, dst=module)`` in place of the weights' own loading.
            verify: check every file's checksum first, each on one rank.
            trust: also unpickle objects, which runs code of whoever wrote the file.

        Returns:
            ``(path, client_state)``, or ``(None, None)`` with a logged line where there is no checkpoint.

        Raises:
            CheckpointError: on every rank alike; damaged or foreign files, other shapes, missing parameters.
        """
        engine = cast("DeepSpeedEngine", self)
        if self._saver is not None:
            self._saver.raise_pending(join=True)
        group = self._checkpoint_group()
        self._check_folder(load_dir, group)
        name = None if tag is None else str(tag)
        if name is None and engine._config.checkpoint.load_universal:
            name = latest_universal(Path(load_dir))
        with_optimizer = load_optimizer_states and not load_module_only
        into = translate.local_state(engine, saving=False)
        if custom_load_fn is not None:
            into = replace(into, model=replace(into.model, tensors={}, regions=()))
        found = load(
            load_dir,
            name,
            into,
            group,
            optimizer=engine.optimizer is not None and custom_load_fn is None,
            moments=with_optimizer,
            verify=verify,
            trust=trust,
        )
        if found is None:
            self._say(nothing_there(load_dir, name))
            return None, None
        loaded, source = found
        for notice in loaded.notices:
            self._say(notice)
        if custom_load_fn is not None:
            custom_load_fn(src=_whole_module(source), dst=engine.module)
            if engine.optimizer is not None:
                translate.masters_from_values(engine.optimizer)
        else:
            if not into.model.regions:
                self._check_names(loaded, load_module_strict)
            translate.show_loaded_shards(engine)
            if into.model.regions:
                loaded = self._load_regions(engine, loaded, source, into.model, load_module_strict)
                self._check_names(loaded, load_module_strict)
        self._adopt(engine, loaded, with_optimizer, load_lr_scheduler_states and not load_module_only)
        if with_optimizer and engine.optimizer is not None and loaded.flats:
            self._say(
                translate.adopt_own_state(
                    engine,
                    loaded.train.per_rank,
                    lambda: [source.train_state(rank).per_rank for rank in range(source.world)],
                )
            )
        if not load_module_only:
            translate.adopt_clock(engine, loaded)
        return loaded.path, self._settled(clone_tensors_for_torch_save(loaded.train.client_state), {})

    def wait_for_checkpoint(self) -> None:
        """Return when an asynchronous save has written this rank's files. Raises its CheckpointError."""
        if self._saver is not None:
            self._saver.wait()

    def raise_failed_save(self) -> None:
        """Raise on every rank alike what an asynchronous save has failed with; costs nothing without one."""
        if self._saver is not None:
            self._saver.raise_pending()

    def _load_regions(
        self,
        engine: DeepSpeedEngine,
        loaded: LoadedState,
        source: Checkpoint,
        model: ModelState,
        strict: bool,
    ) -> LoadedState:
        """Let the modules that take part in loading do so; the masters follow what they make of the values."""
        partitions = engine.optimizer.partitions if engine.optimizer is not None else ()
        for partition in partitions:  # the masters were read: what no key stands for has its value from them
            partition.values.publish()
        fault = ""
        outcome = Outcome()
        try:
            rest = source.rest()
            values, lost = settle(dict(rest.extra))
            dtypes = {
                name: param.dtype for name, param in engine.module.named_parameters(remove_duplicate=False)
            }
            saved = saved_module(source, model, replace(rest, extra=values), dtypes)
            outcome = load_regions(engine.module, model.regions, saved, rest.versions, strict)
            self._tell(lost)
        except Exception as error:
            fault = f"{type(error).__name__}: {error}"
        fault = fault or "; ".join(outcome.errors)
        group = self._checkpoint_group()
        faults = zip(group.ranks, all_gather_object(fault, group, label="modules loaded"), strict=True)
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

    def _adopt(self, engine: DeepSpeedEngine, loaded: LoadedState, optimizer: bool, schedule: bool) -> None:
        train = loaded.train
        inner = engine.optimizer
        if inner is not None:
            inner.forget_step()
        if optimizer and inner is not None and loaded.flats:
            adopt_flats(inner, loaded.flats)
            current = [dict(group) for group in inner.param_groups]
            groups = self._settled(list(loaded.param_groups), current) or ()
            reason = translate.adopt_groups(inner, tuple(groups))
            if reason:
                self._say(reason)
            if train.loss_scaler is not None:
                self._restore(inner.loss_scaler, train.loss_scaler)
        if schedule and engine.lr_scheduler is not None:
            if train.lr_scheduler is None:
                self._say("the checkpoint holds no state of a schedule: lr_scheduler stays at its start")
            self._restore(engine.lr_scheduler, train.lr_scheduler)
        if not optimizer:
            return
        self._restore(engine.training_dataloader, train.common.get("data"))
        if "rng" in train.per_rank:
            translate.set_rng_state(train.per_rank["rng"], engine.device)

    def _restore(self, stateful: Any, saved: Any) -> None:
        """Give ``stateful`` what was saved of it; what the checkpoint does not hold stays as it is."""
        if saved is None or not hasattr(stateful, "load_state_dict"):
            return
        state = self._settled(clone_tensors_for_torch_save(saved), stateful.state_dict())
        if state is not None:
            stateful.load_state_dict(state)

    def _settled(self, saved: Any, current: Any) -> Any:
        value, lost = settle(saved, current)
        self._tell(lost)
        return value

    def _tell(self, lost: list[Absent]) -> None:
        """Name what was not restored."""
        for absent in lost:
            self._say(
                describe(
                    f"{absent.path} was not restored: it holds a {absent.kind}, which needs code",
                    fix="if you trust whoever wrote the checkpoint, load it with trust=True and with that class "
                    "imported; it stays as it is now",
                )
            )

    def _agreed(self, folder: Any, tag: str, refused: str) -> str:
        """The tag under which all ranks save. Raises on every rank alike what any of them has against the save."""
        engine = cast("DeepSpeedEngine", self)
        group = self._checkpoint_group()
        everyone = all_gather_object((tag, refused or _folder_fault(folder)), group, label="save asked for")
        faults = [fault for _, fault in everyone if fault]
        if faults:
            raise CheckpointError(faults[0])
        tags = [given for given, _ in everyone]
        if len(set(tags)) == 1:
            return tag
        listed = "; ".join(f"rank {rank}: {name!r}" for rank, name in zip(group.ranks, tags, strict=True))
        text = f"ranks save under different tags: {listed}. Fix: give all the same tag"
        validation = engine._config.checkpoint.tag_validation
        if validation == "fail":
            raise DesyncError(text)
        if validation == "warn":
            self._say(f"{text}; that of rank {group.ranks[0]} is used for all")
        return tags[0]

    def _check_folder(self, folder: Any, group: Group) -> None:
        """Raises CheckpointError on every rank alike where any gave no folder."""
        for fault in all_gather_object(_folder_fault(folder), group, label="load asked for"):
            if fault:
                raise CheckpointError(fault)

    def _check_names(self, loaded: LoadedState, strict: bool) -> None:
        lost = list(loaded.missing)
        if not (lost or loaded.unexpected):
            return
        text = describe(
            f"{loaded.path} does not hold this model: "
            f"missing {_listed(lost)}; not in the model {_listed(loaded.unexpected)}",
            fix="load into the model that was saved, or pass load_module_strict=False",
        )
        if strict:
            raise CheckpointError(text)
        self._say(text)

    def _checkpoint_group(self) -> Group:
        """The ranks that save and load together."""
        engine = cast("DeepSpeedEngine", self)
        return engine._group if engine.mpu is None else world()

    def _get_saver(self) -> Saver:
        if self._saver is None:
            self._saver = Saver(self._checkpoint_group())
        return self._saver

    def _say(self, text: str) -> None:
        engine = cast("DeepSpeedEngine", self)
        if text and engine._group.ranks[engine._group.rank] == 0:
            _log.warning(text)


def _folder_fault(folder: Any) -> str:
    if isinstance(folder, (str, os.PathLike)) and os.fspath(folder):
        return ""
    return describe(
        "the checkpoint's folder",
        expected="a path",
        found=repr(folder),
        fix='give one, such as "checkpoints"',
    )


def _listed(names: Any, limit: int = 5) -> str:
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(names[:limit]) + more) if names else "nothing"


def _whole_module(source: Checkpoint) -> dict[str, Any]:
    """The module's state dict, full tensors and extra state, as it was saved; tied names share a tensor."""
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
