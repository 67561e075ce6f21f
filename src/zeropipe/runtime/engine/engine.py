"""The training engine: wires a module, its ZeRO optimizer, the clock and the schedule into three calls.

    loss = engine(batch)
    engine.backward(loss)
    engine.step()

It delegates: sharding to ``runtime/zero``, counting and the order of a step to its ``parts``, the factor of the loss to
its ``scaling``; ``face`` has what users ask of it beside these calls.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from zeropipe.errors import UsageError
from zeropipe.given import DataLike
from zeropipe.runtime.dataloader import SlotSampler, ZeroDataLoader
from zeropipe.runtime.engine.checkpoints import Checkpoints
from zeropipe.runtime.engine.dtypes import dtype_of
from zeropipe.runtime.engine.face import Face
from zeropipe.runtime.engine.parts import Parts, Slots, Steps
from zeropipe.runtime.engine.regimes import Regimes
from zeropipe.runtime.engine.report import Reporter
from zeropipe.runtime.engine.scaling import Scaling
from zeropipe.runtime.resilience.copies import Copies
from zeropipe.runtime.resilience.stopping import Stopping
from zeropipe.runtime.zero.hold.offload_states import Offloaded
from zeropipe.runtime.zero.hold.values import RowNorms
from zeropipe.runtime.zero.param import forget_whole, know_whole
from zeropipe.tensor.host import HOST


class DeepSpeedEngine(Face):
    """A module that trains in parallel; everything it does not define itself is the module's.

    Attributes users read: ``module`` (the object passed in), ``optimizer``, ``lr_scheduler`` (assignable; None
    means nobody steps it here), ``training_dataloader``, ``device``, ``clock``.
    """

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.module = parts.module
        self._parts = parts

        # What works on the parts.
        self.report = Reporter(parts, self.pipeline_parallelism)
        remark = None if parts.optimizer is None else parts.optimizer.options.remark
        self.stopping = Stopping(parts.config.checkpoint, remark, later=not HOST.sees(parts.device))
        self.checkpoints = Checkpoints(parts, _each(self.report.saved, self.stopping.saved))
        self.copies = Copies(parts, self.checkpoints)
        self.offload = Offloaded(parts.device)
        self.regimes = Regimes(parts)

        # What stands between the module's parameters and the optimizer.
        know_whole(self.module, parts.group)
        self._scaling = Scaling(lambda: self.loss_scale, lambda: self.clock.divisor)
        self._steps: Steps | None = None
        self._rows: RowNorms | None = None
        self._slots = Slots(parts)
        if parts.optimizer is not None:
            self._steps = Steps(parts, parts.optimizer)
            parts.optimizer.reducer.serve(missing_factor=self._scaling.missing)
            parts.optimizer.serve(lambda loss, retain: self.backward(loss, retain, scale_wrt_gas=False))
            if parts.sharded is None:
                self._rows = RowNorms(parts.module, parts.group)
                parts.optimizer.reducer.serve(at_boundary=self._rows.join)
        # The engine is a module that was made just now; its mode is that of the user's.
        self.train(parts.module.training)

    def __getattr__(self, name: str) -> Any:
        # torch's own look-up among parameters and submodules first, then the user's module.
        try:
            return super().__getattr__(name)
        except AttributeError:
            module = self.__dict__.get("_modules", {}).get("module")
            if module is None or not hasattr(module, name):
                raise AttributeError(f"neither the engine nor its module has an attribute {name!r}") from None
            return getattr(module, name)

    # Training.

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward; whatever it returns is passed through."""
        phase: AbstractContextManager[object] = nullcontext()
        if self.optimizer is not None:
            self.offload.bring_back_for_forward(self.optimizer)
            self.optimizer.wake()
            self._scaling.enter((args, kwargs))
            phase = self.report.phase("forward")
        # After the inputs are known as they are: gradients leave through the user's own tensors, not through copies.
        fp16 = self._parts.config.fp16
        if fp16.enabled and fp16.auto_cast:
            args, kwargs = tree_map_only(
                torch.Tensor, lambda t: t.half() if t.is_floating_point() else t, (args, kwargs)
            )
        if self.training:
            kwargs |= self.regimes.arguments()
        draws = self._slots.drawing() if self.training else nullcontext()
        with phase, self._autocast(), draws:
            return self.module(*args, **kwargs)

    def backward(
        self, loss: torch.Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True
    ) -> torch.Tensor:
        """Run backward on ``loss`` (one element), scaled by the loss scale and by 1 / accumulation steps.

        ``scale_wrt_gas=False``: the caller has divided by the accumulation steps already. Gradients are reduced
        here if a step follows. Returns the loss as the step uses it, divided by the accumulation steps. Raises
        UsageError without an optimizer.
        """
        optimizer = self._parts.need_optimizer("backward")
        if not torch.is_tensor(loss) or loss.numel() != 1:
            found = f"a tensor of shape {tuple(loss.shape)}" if torch.is_tensor(loss) else type(loss).__name__
            raise UsageError("backward: loss", expected="a tensor with one element", found=found)
        if optimizer.turn is not None and not scale_wrt_gas:
            raise UsageError(
                "engine.backward: the loss was divided by the accumulation steps, which ranks decide",
                expected="the mean loss of one slot, as 'reproducible' sums those",
                fix="do not divide it, and leave scale_wrt_gas out; or remove 'reproducible'",
            )
        steps = self.gradient_accumulation_steps() if scale_wrt_gas else 1
        factor = optimizer.loss_scale / (self.clock.divisor if scale_wrt_gas else 1)
        # Told as it is: what is logged is what the user's own loss function says.
        self.report.loss(loss)
        scaling = self._scaling
        with (
            self.report.phase("backward"),
            scaling.running(factor, loss),
            optimizer.reducer.one_pass(),
        ):
            scaling.scaled(loss, factor).backward(retain_graph=retain_graph)
        if self._sharded is not None:
            self._sharded.end_backward()
        return loss if steps == 1 else loss / steps

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        """``loss`` as ``engine.backward`` scales it; ``engine.scale(loss).backward()`` is ``engine.backward(loss)``.

        In fp16 a plain backward needs it: a loss without the loss scale is refused when its gradients arrive.
        """
        self._parts.need_optimizer("scale")
        return self._scaling.scale(loss)

    def step(self, lr_kwargs: dict[str, Any] | None = None) -> None:
        """End the micro-step; at the boundary clip, step the optimizer and the schedule, and clear gradients.

        An overflow skips the step on every rank, and the schedule with it. A step that raised may be called again: it
        goes on where it stopped.
        """
        self._parts.need_optimizer("step")
        self._end_micro_step(lr_kwargs)

    def _end_micro_step(self, lr_kwargs: dict[str, Any] | None = None) -> None:
        assert self._steps is not None, "there is an optimizer"
        # An asynchronous save that failed is told where all ranks are about to meet anyway.
        if self.clock.steps_now:
            self.checkpoints.saver.raise_pending()
            self.copies.settle()
        self.offload.bring_back(self.optimizer, non_blocking=True)
        # Telling may raise too (a full disk under a monitor); the step is not told twice then, nor taken twice.
        with self.report.phase("step"):
            tried = self._steps.end(self.lr_scheduler, lr_kwargs)
        if tried:
            if self.stopping.by_itself:
                self.copies.take()
            self.report.stepped()
            self._steps.told()
            self.stopping.stepped()
            if self.stopping.due and self.stopping.by_itself:
                self.stopping.leave(self.save_checkpoint, self.copies.outlive, self.global_steps)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget every gradient of the window, reduced ones too."""
        if self.optimizer is not None:
            self.optimizer.zero_grad()
        self.module.zero_grad()
        self._slots.restart()

    # The rest of its life.

    def deepspeed_io(
        self,
        dataset: DataLike,
        batch_size: int | None = None,
        route: str = "train",
        pin_memory: bool = False,
        data_sampler: DataLike = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        num_local_io_workers: int | None = None,
    ) -> ZeroDataLoader:
        """A loader of this rank's micro-batches of ``dataset``; shuffled where ``route`` is ``train``."""
        if data_sampler is not None:
            raise UsageError(
                "deepspeed_io: data_sampler is not taken, because the loader deals samples out to ranks and keeps "
                "its position. Fix: use torch.utils.data.DataLoader with your sampler instead"
            )
        parts = self._parts
        return ZeroDataLoader(
            dataset,
            batch_size or parts.clock.batch.micro_batch_size,
            parts.samples.rank,
            parts.samples.size,
            collate_fn or parts.collate_fn,
            num_workers=num_local_io_workers or 0,
            drop_last=parts.config.dataloader_drop_last,
            shuffle=route == "train",
            pin_memory=pin_memory,
            sharing=parts.sharing,
        )

    @property
    def slots(self) -> tuple[int, ...]:
        """This rank's slots of a step, in the order of its micro-steps; one more micro-step has none, and counts for
        nothing. Raises UsageError without 'reproducible.slots'."""
        return self._slots.mine

    def slot_sampler(
        self, dataset: DataLike, shuffle: bool = True, seed: int = 0, drop_last: bool = False
    ) -> SlotSampler:
        """For a DataLoader of your own, whose batch size is the micro-batch: deals samples to slots."""
        return self._slots.sampler(dataset, shuffle, seed, drop_last)

    def compile(
        self, backend: str = "inductor", compile_kwargs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        """Compile the module in place with ``torch.compile``; at stage 3 see docs/zero.md for what is fetched whole."""
        self.module.compile(backend=backend, **(compile_kwargs or {}))
        if self._sharded is not None:
            self._sharded.hooks.compiled.look()

    def destroy(self) -> None:
        """Remove every hook and buffer; the module works on as a plain module. May be called again."""
        parts = self._parts
        self.copies.close()
        # The optimizer gives parameters their values back before what gathers them is gone.
        if parts.optimizer is not None:
            parts.optimizer.destroy()
        if self._rows is not None:
            self._rows.remove_hooks()
        if parts.sharded is not None:
            parts.sharded.destroy()
        forget_whole(self.module)
        if parts.mixed is not None:
            parts.mixed.remove()
        self.report.close()
        self.stopping.close()
        parts.drop()
        # Last, because it raises what a writer has failed with.
        self.checkpoints.saver.wait()

    def _autocast(self) -> AbstractContextManager[Any]:
        # Where torch casts by itself, an error about dtypes has another cause than tensors that the model keeps wide.
        autocast = self._parts.config.torch_autocast
        if not autocast.enabled:
            return self._parts.mixed or nullcontext()
        return torch.autocast(self.device.type, dtype=dtype_of(autocast.dtype))


def _each(*told: Callable[[str, str, float], None]) -> Callable[[str, str, float], None]:
    def tell(folder: str, tag: str, seconds: float) -> None:
        for one in told:
            one(folder, tag, seconds)

    return tell
