"""What users and clients ask an engine for, under the names that they know: each a view, or one call, of a part."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch

from zeropipe.given import DataLike, ScheduleLike
from zeropipe.runtime.curriculum import CurriculumScheduler, ProgressiveLayerDrop
from zeropipe.runtime.engine.checkpoints import Checkpoints
from zeropipe.runtime.engine.module_state import load_weights, module_state, save_weights, whole_weights
from zeropipe.runtime.engine.parts import Clock
from zeropipe.runtime.engine.regimes import Regimes
from zeropipe.runtime.engine.report import MemoryRow, Reporter, memory_report, momenta
from zeropipe.runtime.engine.settings import Settings
from zeropipe.runtime.monitor import MonitorMaster
from zeropipe.runtime.resilience.copies import Copies
from zeropipe.runtime.resilience.resume import Resumed, resume
from zeropipe.runtime.timers import ThroughputTimer
from zeropipe.runtime.zero.gather.sharded_model import ShardedModel
from zeropipe.runtime.zero.hold.offload_states import Offloaded
from zeropipe.runtime.zero.hold.optimizer import ZeroOptimizer
from zeropipe.runtime.zero.hold.reducer import Reducer


class Face(Settings):
    """The engine's interface but for training itself."""

    # Made by the engine itself.
    checkpoints: Checkpoints
    copies: Copies
    offload: Offloaded
    report: Reporter
    regimes: Regimes

    # What it is made of. No setter where an engine cannot work on another.

    @property
    def optimizer(self) -> ZeroOptimizer | None:
        return self._parts.optimizer

    @property
    def lr_scheduler(self) -> Any:
        """Assignable; None means that nobody steps it here."""
        return self._parts.lr_scheduler

    @lr_scheduler.setter
    def lr_scheduler(self, schedule: ScheduleLike) -> None:
        self._parts.take_schedule(schedule)

    @property
    def training_dataloader(self) -> Any:
        return self._parts.training_dataloader

    @training_dataloader.setter
    def training_dataloader(self, loader: DataLike) -> None:
        self._parts.take_loader(loader)

    @property
    def clock(self) -> Clock:
        return self._parts.clock

    @property
    def device(self) -> torch.device:
        return self._parts.device

    @property
    def mpu(self) -> Any:
        return self._parts.mpu

    @property
    def collate_fn(self) -> Any:
        return self._parts.collate_fn

    @property
    def _sharded(self) -> ShardedModel | None:
        return self._parts.sharded

    # What it counts.

    @property
    def global_steps(self) -> int:
        """Optimizer steps tried so far, skipped ones included."""
        return self.clock.global_steps

    @property
    def global_samples(self) -> int:
        return self.clock.global_samples

    @property
    def micro_steps(self) -> int:
        return self.clock.micro_steps

    @property
    def skipped_steps(self) -> int:
        """Steps that an overflow skipped."""
        return self.clock.skipped_steps

    def train_batch_size(self) -> int:
        return self.clock.batch.train_batch_size

    def train_micro_batch_size_per_gpu(self) -> int:
        return self.clock.batch.micro_batch_size

    def gradient_accumulation_steps(self) -> int:
        return self.clock.batch.gradient_accumulation_steps

    def get_batch_info(self) -> tuple[Callable[[], int], Callable[[], int], Callable[[], int]]:
        """Three methods to call: samples of a step, of a micro-step on this rank, and micro-steps of a step."""
        return self.train_batch_size, self.train_micro_batch_size_per_gpu, self.gradient_accumulation_steps

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether the next ``step`` is an optimizer step."""
        return self.clock.is_boundary

    def was_step_applied(self) -> bool:
        """Whether the latest ``step`` changed the parameters (False off the boundary and after an overflow)."""
        return self.clock.last_step_applied

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        """Say whether the coming micro-step ends in an optimizer step, whatever the count says; it stays so."""
        self.clock.force(is_boundary)

    def set_train_batch_size(self, train_batch_size: int) -> None:
        """Change the samples per step by changing the accumulation; micro-batch and ranks stay.

        Raises ConfigError unless it is a multiple of micro-batch x ranks.
        """
        self.clock.set_train_batch_size(train_batch_size)

    def set_train_micro_batch_size(self, micro_batch_size: int) -> None:
        """Change the samples of a micro-step on each rank; accumulation stays. Raises ConfigError below 1."""
        self.clock.set_micro_batch_size(micro_batch_size)

    @property
    def curriculum_scheduler_legacy(self) -> CurriculumScheduler | None:
        """Of the section ``curriculum_learning``: the difficulty, and where a custom schedule is set."""
        return self.regimes.curriculum

    def set_custom_curriculum_learning_schedule(
        self, schedule_func_dict: Mapping[str, Callable[[int], int]]
    ) -> None:
        """By metric of ``data_efficiency``: the difficulty of a step, counted from 1."""
        self.training_dataloader.data_sampler.set_custom_curriculum_learning_schedule(schedule_func_dict)

    @property
    def progressive_layer_drop(self) -> ProgressiveLayerDrop | None:
        """Of the section of that name: the share of layers that the coming step keeps."""
        return self.regimes.layer_drop

    # What the optimizer says.

    @property
    def loss_scale(self) -> float:
        """The current loss scale, 1.0 without scaling."""
        return 1.0 if self.optimizer is None else self.optimizer.loss_scale

    def get_global_grad_norm(self) -> float | None:
        """L2 norm over all parameters of the last step's averaged gradients, before clipping."""
        return None if self.optimizer is None else self.optimizer.grad_norm

    def get_lr(self) -> list[float]:
        """The learning rate of each param group."""
        return [] if self.optimizer is None else [group["lr"] for group in self.optimizer.param_groups]

    def get_mom(self) -> list[Any]:
        """The momentum of each param group, as its optimizer names it: ``betas``, or a number; 0 for none."""
        return [] if self.optimizer is None else momenta(self.optimizer.param_groups)

    def get_type(self) -> str | None:
        """The class name of the torch optimizer."""
        return None if self.optimizer is None else type(self.optimizer.optimizer).__name__

    @property
    def communication_data_type(self) -> torch.dtype | None:
        return None if self.optimizer is None else self.optimizer.policy.reduce_dtype

    def no_sync(self) -> AbstractContextManager[None]:
        """Inside, backward accumulates on this rank only; the next backward or step outside reduces once.

        At stages 2 and 3 the whole local gradients live until then.
        """
        return self._parts.need_optimizer("no_sync").reducer.local_only()

    def coalesce_grad_reduction(self) -> AbstractContextManager[None]:
        """As ``no_sync``, and what the block has left on this rank is reduced, once, when it ends."""
        return _coalesced(self._parts.need_optimizer("coalesce_grad_reduction").reducer)

    def allreduce_gradients(self, bucket_size: int | None = None) -> None:
        """Reduce now what backwards have left on this rank; ``step`` does so anyway. Collective.

        ``bucket_size`` is accepted and changes nothing: the buckets are those of the configuration.
        """
        self._parts.need_optimizer("allreduce_gradients").reducer.reduce_now()

    # Its data.

    def set_data_post_process_func(self, post_process_func: Callable[[Any, dict[str, Any]], Any]) -> None:
        """``post_process_func(batch, state)`` makes what the engine's loader yields; ``state``: the loader's place.

        Raises UsageError where there is no such loader.
        """
        self._parts.post_process(post_process_func)

    # Its weights.

    def module_state_dict(self, exclude_frozen_parameters: bool = False) -> dict[str, Any]:
        """The module's state dict: references, as ``module.state_dict()`` gives them."""
        return module_state(self._parts.module, exclude_frozen_parameters)

    def load_module_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> Any:
        """Load weights (the same on every rank); masters follow, the optimizer's moments stay.

        Returns what ``module.load_state_dict`` returns.
        """
        return load_weights(self._parts, state_dict, strict)

    def save_16bit_model(
        self,
        save_dir: str | os.PathLike[str],
        save_filename: str = "pytorch_model.bin",
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Write the weights, in the precision that the model runs in, as one file for ``torch.load``.

        Collective: rank 0 writes, all return when the file is there. Returns False, and writes nothing, at stage
        3 without ``stage3_gather_16bit_weights_on_model_save``. Raises CheckpointError, on every rank, if the
        file cannot be written.
        """
        return save_weights(self._parts, Path(save_dir) / save_filename, exclude_frozen_parameters)

    save_fp16_model = save_16bit_model  # its older name

    def _zero3_consolidated_16bit_state_dict(self, exclude_frozen_parameters: bool = False) -> dict[str, Any]:
        """The whole state dict in host memory on rank 0, an empty one elsewhere; collective; tied tensors stay tied.

        Empty and not None: clients pass it on to ``save_pretrained(state_dict=...)`` on every rank, which takes None
        for leave to ask the model itself, on these ranks alone.
        """
        return whole_weights(self._parts, exclude_frozen_parameters)

    _consolidated_16bit_state_dict = _zero3_consolidated_16bit_state_dict

    # Its checkpoints.

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

        Returns True; False where the save failed and ``checkpoint.tolerate_failed_saves`` says to go on, after a
        warning. Raises CheckpointError on every rank alike when any rank cannot write or there is no room (before
        anything is written), when ``save_dir`` is empty, or where the client state holds what cannot be saved at all;
        earlier checkpoints are intact then.
        """
        return self.report.files(
            "save_checkpoint",
            lambda: self.checkpoints.save(
                save_dir, tag, client_state, save_latest, exclude_frozen_parameters, async_save
            ),
        )

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
        # The weights alone leave the run where it is: at its step, its rate and its place in the data.
        whole = not load_module_only
        return self.report.files(
            "load_checkpoint",
            lambda: self.checkpoints.load(
                load_dir,
                tag,
                custom_load_fn,
                moments=load_optimizer_states and whole,
                schedule=load_lr_scheduler_states and whole,
                clock=whole,
                strict=load_module_strict,
                verify=verify,
                trust=trust,
            ),
        )

    def resume(
        self,
        folder: str | os.PathLike[str] | None = None,
        client_state: Mapping[str, Any] | None = None,
        *,
        trust: bool = False,
    ) -> Resumed:
        """Go on from the newest good state there is: a copy in memory (``checkpoint.memory``), or a checkpoint in
        ``folder``. Collective; to be called before the first step.

        ``client_state``: of the program; copies in memory hold it as it is when ``step`` returns. What was kept comes
        back in the result. ``trust``: as in ``load_checkpoint``, whose errors it raises too.
        """
        return resume(self.checkpoints, self.copies, folder, client_state, trust=trust)

    def wait_for_checkpoint(self) -> None:
        """Return when an asynchronous save has written this rank's files. Raises its CheckpointError."""
        self.checkpoints.saver.wait()

    def raise_failed_save(self) -> None:
        """Raise on every rank alike what an asynchronous save has failed with; costs nothing without one."""
        self.checkpoints.saver.raise_pending()

    # What it tells, and its memory.

    @property
    def tput_timer(self) -> ThroughputTimer:
        """Samples per second of the steps so far, those of a short warm-up not counted."""
        return self.report.throughput

    @property
    def monitor(self) -> MonitorMaster:
        """Where scalars go that the configuration asks for: ``monitor.write_events([(name, value, samples)])``."""
        return self.report.monitor

    def steps_per_print(self) -> float | None:
        """A line is told every so many steps; None: never."""
        return self.report.steps_per_print

    def memory_report(self) -> tuple[MemoryRow, ...]:
        """Live bytes on this rank against the stage's formula: parameters, gradients, optimizer state."""
        return memory_report(self._parts.module, self.optimizer)

    def offload_states(
        self,
        include: Iterable[object] | None = None,
        device: object = "cpu",
        pin_memory: bool = True,
        non_blocking: bool = False,
    ) -> None:
        """Move parameters, masters, gradients and optimizer state to host memory; not collective.

        ``include``: some of ``optim_states``, ``hp_params``, ``lp_params``, ``lp_grads`` and
        ``contiguous_grad_buffer`` (strings or ``OffloadStateTypeEnum``); default all. A forward or a step that
        needs what is away brings it back. Saving and ``safe_get_*`` work meanwhile. ``device``: only ``cpu``.

        Raises UsageError without an optimizer, and for another device or kind.
        """
        optimizer = self._parts.need_optimizer("offload_states")
        self.offload.send(optimizer, include, device, pin_memory, non_blocking)

    def reload_states(self, non_blocking: bool = False) -> None:
        """Bring back what ``offload_states`` moved away; nothing to do where nothing is."""
        self.offload.bring_back(self.optimizer, non_blocking=non_blocking)


@contextmanager
def _coalesced(reducer: Reducer) -> Iterator[None]:
    with reducer.local_only():
        yield
    reducer.reduce_now()
