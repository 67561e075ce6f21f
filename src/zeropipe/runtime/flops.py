"""How much a model computes, and where: operations, parameters and time of each module in one forward.

Operations are counted by the formulas of torch's own counter (``torch.utils.flop_counter``): matrix products,
convolutions and attention, two for each multiply-add. What is done element by element counts nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from zeropipe.errors import UsageError
from zeropipe.given import Anything, Tree
from zeropipe.runtime.timers import synchronizing_clock

_BACKWARD_PER_FORWARD = 2  # products for the gradients of inputs and of weights


@dataclass(frozen=True, slots=True)
class ModuleProfile:
    """What one module did in the forwards that were profiled, its submodules included."""

    name: str  # dotted, "" for the model
    kind: str  # its class
    parameters: int  # elements; a parameter of stage 3 counts whole
    flops: int
    seconds: float
    calls: int

    @property
    def macs(self) -> int:
        """Multiply-adds."""
        return self.flops // 2

    @property
    def depth(self) -> int:
        return self.name.count(".") + 1 if self.name else 0


def _attention_on_cpu(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Tree, **__: Tree
) -> int:
    """Query times key and the result times value; all ``[batch, heads, length, width]``. torch's table lacks it."""
    batch, heads, length, width = query.shape
    return 2 * batch * heads * length * key.shape[2] * (width + value.shape[3])


class _Counter(TorchDispatchMode):
    """Adds up the operations of everything that torch runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self._formulas: dict[Any, Callable[..., int]] = {
            **flop_registry,
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_on_cpu,
        }

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        formula = self._formulas.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=found)
        return found


class _Visit:
    """The sums of one module."""

    def __init__(self) -> None:
        self.flops = self.calls = 0
        self.seconds = 0.0
        self.begun: list[tuple[int, float]] = []  # innermost last: a module may call itself


class FlopsProfiler:
    """Counts between ``start_profile`` and ``stop_profile``; what was counted stays until ``end_profile``.

    ``ds_engine`` is taken for its device and batch; ``recompute_fwd_factor``: how much of a forward the backward does
    again (activation checkpointing), 0 to 1.
    """

    def __init__(
        self, model: torch.nn.Module, ds_engine: Anything = None, recompute_fwd_factor: float = 0.0
    ) -> None:
        self.model, self.ds_engine, self.recompute_fwd_factor = model, ds_engine, recompute_fwd_factor
        self.started = False
        self._visits: dict[str, _Visit] = {}
        self._active = ExitStack()

    def start_profile(self, ignore_list: Iterable[type[torch.nn.Module]] | None = None) -> None:
        """Begin anew. Modules of the classes in ``ignore_list`` are part of their parents."""
        self.stop_profile()
        self._visits = {}
        ignored = tuple(ignore_list or ())
        tensor = next((p for p in self.model.parameters()), None)
        clock = synchronizing_clock("cpu" if tensor is None else tensor.device, time.perf_counter)
        counter = _Counter()
        with counter:  # the first use imports what the formulas need
            torch.mm(torch.ones(1, 1), torch.ones(1, 1))
        counter.flops = 0
        for name, module in self.model.named_modules():
            if type(module) not in ignored or not name:
                visit = self._visits[name] = _Visit()
                self._watch(module, visit, counter, clock)
        self._active.enter_context(counter)
        self.started = True

    def _watch(
        self, module: torch.nn.Module, visit: _Visit, counter: _Counter, clock: Callable[[], float]
    ) -> None:
        def enter(*_: Any) -> None:
            visit.begun.append((counter.flops, clock()))

        def leave(*_: Any) -> None:
            flops, since = visit.begun.pop()
            visit.calls += 1
            if not visit.begun:  # an inner call of itself is part of the outer one
                visit.flops += counter.flops - flops
                visit.seconds += clock() - since

        # First and last of a module's hooks, so that what others do in theirs (stage 3 gathers) is its time.
        for handle in (
            module.register_forward_pre_hook(enter, prepend=True),
            module.register_forward_hook(leave, always_call=True),
        ):
            self._active.callback(handle.remove)

    def stop_profile(self) -> None:
        """Count no more. May be called again."""
        self._active.close()
        self.started = False

    def reset_profile(self) -> None:
        """Forget what was counted."""
        for name in self._visits:
            self._visits[name] = _Visit()

    def end_profile(self) -> None:
        """Count no more, and forget what was counted."""
        self.stop_profile()
        self._visits = {}

    def rows(self) -> tuple[ModuleProfile, ...]:
        """Each module, parents before children."""
        return tuple(self._rows())

    def _rows(self) -> Iterator[ModuleProfile]:
        modules = dict(self.model.named_modules())
        for name, visit in self._visits.items():
            module = modules[name]
            numel = sum(int(getattr(param, "ds_numel", param.numel())) for param in module.parameters())
            flops, seconds, calls = visit.flops, visit.seconds, visit.calls
            if not calls:
                # A container whose forward nobody calls (a list, a pipeline's stage) did what its children did.
                inside = [self._visits[child] for child in self._outermost(name)]
                flops = sum(one.flops for one in inside)
                seconds = sum(one.seconds for one in inside)
            yield ModuleProfile(name, type(module).__name__, numel, flops, seconds, calls)

    def _outermost(self, name: str) -> Iterator[str]:
        """The modules below ``name`` that were called, but for those inside of others that were."""
        prefix, within = f"{name}." if name else "", "\0"
        for child, visit in self._visits.items():
            if child != name and child.startswith(prefix) and visit.calls and not child.startswith(within):
                within = f"{child}."
                yield child

    def _total(self) -> ModuleProfile:
        for row in self._rows():
            return row
        raise UsageError("nothing was profiled", fix="call start_profile(), run the model, then ask")

    def get_total_flops(self, as_string: bool = False) -> int | str:
        """Operations of the forwards that were profiled. Raises UsageError before ``start_profile``."""
        return flops_to_string(self._total().flops) if as_string else self._total().flops

    def get_total_macs(self, as_string: bool = False) -> int | str:
        return macs_to_string(self._total().macs) if as_string else self._total().macs

    def get_total_duration(self, as_string: bool = False) -> float | str:
        """Seconds."""
        return duration_to_string(self._total().seconds) if as_string else self._total().seconds

    def get_total_params(self, as_string: bool = False) -> int | str:
        return params_to_string(self._total().parameters) if as_string else self._total().parameters

    def print_model_profile(
        self,
        profile_step: int = 1,
        module_depth: int = -1,
        top_modules: int = 1,
        detailed: bool = True,
        output_file: str | None = None,
    ) -> None:
        """Print the profile, or write it to ``output_file``.

        ``detailed``: a line for each module down to ``module_depth`` (-1: all); else the ``top_modules`` classes of
        each depth that compute most.
        """
        text = describe_profile(
            self.rows(), profile_step, module_depth, top_modules, detailed, self.recompute_fwd_factor
        )
        tell(text, output_file)

    def print_model_aggregated_profile(self, module_depth: int = -1, top_modules: int = 1) -> None:
        """Print the ``top_modules`` classes of each depth down to ``module_depth`` (-1: all) that compute most."""
        tell("\n".join(_by_depth(self.rows(), module_depth, top_modules)), None)


def tell(text: str, output_file: str | None) -> None:
    """Print what a user asked for, or write it to the file that he named."""
    if output_file:
        path = Path(output_file)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n", encoding="utf-8")
    else:
        Console(soft_wrap=True, markup=False, highlight=False).print(text)


def describe_profile(
    rows: Sequence[ModuleProfile],
    step: int,
    module_depth: int = -1,
    top_modules: int = 1,
    detailed: bool = True,
    recompute: float = 0.0,
) -> str:
    """The profile as text. ``rows``: those of one model, itself first."""
    total = rows[0]
    speed = total.flops / total.seconds if total.seconds else 0.0
    whole = round(total.flops * (1 + recompute + _BACKWARD_PER_FORWARD))
    lines = [
        f"FLOPs profile of {total.kind} at step {step}",
        f"parameters                {params_to_string(total.parameters)}",
        f"forward MACs              {macs_to_string(total.macs)}",
        f"forward FLOPs             {flops_to_string(total.flops)}",
        f"forward and backward      {flops_to_string(whole)}",
        f"forward latency           {duration_to_string(total.seconds)}",
        f"forward FLOPs per second  {flops_to_string(speed)}",
        "",
        *_by_depth(rows, module_depth, top_modules),
    ]
    if detailed:
        shown = [row for row in rows if module_depth < 0 or row.depth <= module_depth]
        lines += [
            "",
            "module: class, parameters, MACs, share of them, latency, share of it, FLOPs per second",
        ]
        lines += [f"{'  ' * row.depth}{_line(row, total)}" for row in shown]
    return "\n".join(lines)


def _line(row: ModuleProfile, total: ModuleProfile) -> str:
    speed = row.flops / row.seconds if row.seconds else 0.0
    called = "" if row.calls == 1 else f", {row.calls} calls"
    return (
        f"{row.name.rpartition('.')[2] or 'model'}: {row.kind}, {params_to_string(row.parameters)}, "
        f"{macs_to_string(row.macs)}, {_share(row.macs, total.macs)}, {duration_to_string(row.seconds)}, "
        f"{_share(row.seconds, total.seconds)}, {flops_to_string(speed)}{called}"
    )


def _share(part: float, whole: float) -> str:
    return f"{part / whole if whole else 0.0:.1%}"


def _by_depth(rows: Sequence[ModuleProfile], module_depth: int, top: int) -> Iterator[str]:
    """For each depth the classes that compute most, that hold most and that take longest."""
    deepest = max((row.depth for row in rows), default=0)
    for depth in range((deepest if module_depth < 0 else min(module_depth, deepest)) + 1):
        kinds: dict[str, list[ModuleProfile]] = {}
        for row in rows:
            if row.depth == depth:
                kinds.setdefault(row.kind, []).append(row)

        def best(
            of: Callable[[ModuleProfile], float], kinds: dict[str, Any] = kinds
        ) -> list[tuple[str, Any]]:
            sums = {kind: sum(map(of, found)) for kind, found in kinds.items()}
            return sorted(sums.items(), key=lambda item: -item[1])[:top]

        parts = (
            ", ".join(f"{kind} {word(value)}" for kind, value in best(of))
            for of, word in (
                (lambda row: row.parameters, params_to_string),
                (lambda row: row.macs, macs_to_string),
                (lambda row: row.seconds, duration_to_string),
            )
        )
        yield f"depth {depth}: {' | '.join(parts)}"


def get_model_profile(
    model: torch.nn.Module,
    input_shape: Sequence[int] | None = None,
    args: Sequence[Tree] = (),
    kwargs: dict[str, Tree] | None = None,
    print_profile: bool = True,
    detailed: bool = True,
    module_depth: int = -1,
    top_modules: int = 1,
    warm_up: int = 1,
    as_string: bool = True,
    output_file: str | None = None,
    ignore_modules: Iterable[type[torch.nn.Module]] | None = None,
    mode: str = "forward",
) -> tuple[int | str, int | str, int | str]:
    """(FLOPs, MACs, parameters) of one forward of ``model``, or of ``generate`` where ``mode`` says so.

    ``input_shape``: of one tensor of ones that is its only input, batch included; or give ``args`` and ``kwargs``.
    ``warm_up``: forwards before the one that counts. The model runs in eval mode and without gradients, and gets its
    mode back. Raises UsageError for another ``mode``, and where a shape stands beside arguments.
    """
    if mode not in ("forward", "generate"):
        raise UsageError("get_model_profile: mode", expected="'forward' or 'generate'", found=repr(mode))
    inputs = tuple(args)
    if input_shape is not None:
        if inputs or kwargs:
            raise UsageError("get_model_profile: input_shape beside args or kwargs", fix="give one of them")
        like = next(model.parameters(), torch.empty(0))
        inputs = (torch.ones(tuple(input_shape), dtype=like.dtype, device=like.device),)
    run: Any = model if mode == "forward" else model.generate
    profiler, training = FlopsProfiler(model), model.training
    model.eval()
    try:
        with torch.no_grad():
            for _ in range(warm_up):
                run(*inputs, **(kwargs or {}))
            profiler.start_profile(ignore_modules)
            run(*inputs, **(kwargs or {}))
    finally:
        profiler.stop_profile()
        model.train(training)
    if print_profile:
        profiler.print_model_profile(0, module_depth, top_modules, detailed, output_file)
    return (
        profiler.get_total_flops(as_string),
        profiler.get_total_macs(as_string),
        profiler.get_total_params(as_string),
    )


# Numbers as words.


def number_to_string(num: float, units: str | None = None, precision: int = 2) -> str:
    """``1.5 M`` for 1,500,000; ``units``: one of ``T G M K m u``, else the one that fits."""
    scales = {"T": 1e12, "G": 1e9, "M": 1e6, "K": 1e3, "": 1.0, "m": 1e-3, "u": 1e-6}
    size = abs(num)
    fitting = next((unit for unit, scale in scales.items() if size >= scale), "u") if num else ""
    unit = fitting if units is None else units
    return f"{round(num / scales[unit], precision):.15g} {unit}"


def flops_to_string(flops: float, units: str | None = None, precision: int = 2) -> str:
    return f"{number_to_string(flops, units, precision)}FLOPS"


def macs_to_string(macs: float, units: str | None = None, precision: int = 2) -> str:
    return f"{number_to_string(macs, units, precision)}MACs"


def params_to_string(params_num: float, units: str | None = None, precision: int = 2) -> str:
    return number_to_string(params_num, units, precision).rstrip()


def duration_to_string(duration: float, units: str | None = None, precision: int = 2) -> str:
    """``duration``: seconds."""
    return f"{number_to_string(duration, units, precision)}s"
