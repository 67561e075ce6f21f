"""What ``initialize`` and ``zero.Init`` both ask of a model's tensors: the dtype they work in, and who shares memory.

In a 16-bit run parameters are cast, but for those that somebody kept as they are on purpose:

    wide beside 16-bit ones    fp32 adapters on a 16-bit base, norms or a head that a recipe put back in fp32: a model
                               that holds 16-bit parameters was prepared, one that is fp32 throughout was not
    marked                     the module has a ``KeepsDtype`` hook, as ``fp16_utils.convert_network`` leaves it
    batch norm                 its statistics are buffers, which stay, and torch refuses 16-bit weights beside them
    codes                      fewer than 16 bits: rounding up would free them of the scale that goes with them

Buffers stay as the model makes them, but for those that torch multiplies a weight with before a layer uses it (masks of
pruning, the vectors of spectral norm, what a parametrization holds): these go with their weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm

from zeropipe.errors import UsageError, describe

HALVES = (torch.float16, torch.bfloat16)


class KeepsDtype:
    """A forward pre-hook of this class says that its module's own tensors are in the dtype that they shall have."""


def keeps_dtype(module: torch.nn.Module) -> bool:
    return any(isinstance(hook, KeepsDtype) for hook in module._forward_pre_hooks.values())


def was_prepared(params: Iterable[torch.nn.Parameter]) -> bool:
    """Whether the model holds 16-bit parameters, so that those it has in fp32 are in fp32 on purpose."""
    return any(param.dtype in HALVES for param in params)


def working_dtypes(
    modules: Iterable[torch.nn.Module], dtype: torch.dtype, prepared: bool, buffers: torch.dtype | None = None
) -> dict[torch.nn.Parameter, torch.dtype]:
    """The dtype of every floating-point parameter that ``modules`` hold themselves, in a run of precision ``dtype``.

    ``prepared``: see ``was_prepared``. ``buffers``: what floating-point buffers are cast to; None: nothing.
    """
    wanted: dict[torch.nn.Parameter, torch.dtype] = {}
    halves = dtype in HALVES
    for module in modules:
        marked = halves and keeps_dtype(module)
        statistics = _wide_statistics(module, buffers) if halves else None
        for param in module._parameters.values():
            if param is None or not param.dtype.is_floating_point:
                continue
            wide = halves and prepared and param.dtype not in HALVES
            if marked or wide or param.dtype.itemsize == 1:
                wanted[param] = param.dtype
            elif statistics is not None:
                wanted[param] = statistics
            else:
                # A module that shares it may have kept it.
                wanted.setdefault(param, dtype)
    return wanted


def _wide_statistics(module: torch.nn.Module, buffers: torch.dtype | None) -> torch.dtype | None:
    """The dtype of a batch norm's statistics, unless they are in 16 bits."""
    mean = module.running_mean if isinstance(module, _BatchNorm) else None
    if mean is None:
        return None
    dtype = mean.dtype if buffers is None else buffers
    return None if dtype in HALVES else dtype


def buffers_of_weights(
    modules: Iterable[torch.nn.Module], wanted: Mapping[torch.nn.Parameter, torch.dtype]
) -> dict[torch.Tensor, torch.dtype]:
    """The floating-point buffers that go with a weight, and its dtype among ``wanted``."""
    found: dict[torch.Tensor, torch.dtype] = {}

    def go_with(weight: object, buffers: Iterable[torch.Tensor | None]) -> None:
        if isinstance(weight, torch.nn.Parameter) and weight in wanted:
            tensors = (t for t in buffers if t is not None and t.dtype.is_floating_point)
            found.update(dict.fromkeys(tensors, wanted[weight]))

    # Each of torch's three ways keeps its buffers elsewhere, and names none of them alike.
    for module in modules:
        if isinstance(module, ParametrizationList):
            go_with(getattr(module, "original", getattr(module, "original0", None)), module.buffers())
        for hook in module._forward_pre_hooks.values():
            name = getattr(hook, "_tensor_name", None) or getattr(hook, "name", None)
            if isinstance(hook, BasePruningMethod):
                go_with(module._parameters.get(f"{name}_orig"), [module._buffers.get(f"{name}_mask")])
            elif isinstance(hook, SpectralNorm):
                pair = [module._buffers.get(f"{name}_{part}") for part in "uv"]
                go_with(module._parameters.get(f"{name}_orig"), pair)
    return found


def free_tensors(module: torch.nn.Module) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The floating-point parameters, and buffers, whose dtype may show in activations: that of a batch norm, or of a
    module that ``fp16_utils`` converted, does not."""
    owners = [one for one in module.modules() if not isinstance(one, _NormBase) and not keeps_dtype(one)]
    kinds = (
        (t for one in owners for t in one._parameters.values()),
        (t for one in owners for t in one._buffers.values()),
    )
    params, buffers = (
        [t for t in kind if t is not None and t.dtype.is_floating_point and t.dtype.itemsize > 1]
        for kind in kinds
    )
    return params, buffers


def overlapping(tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, str]]:
    """The names of each two that share an element: a tie that torch keeps by address, lost where values are laid anew.

    What has no memory to speak of does not count: empty, on meta, sparse, subclasses that wrap others.
    """
    # One pass over the tensors in the order of their addresses, so 10,000 take milliseconds.
    spans = []
    for name, tensor in tensors:
        plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
        if plain and tensor.numel() and not tensor.is_meta:
            last = sum(
                (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
            )
            first = tensor.data_ptr()
            spans.append((str(tensor.device), first, first + (last + 1) * tensor.itemsize, name, tensor))
    spans.sort(key=lambda span: span[:3])
    # Those that reach beyond the start of the next: few, and none in an ordinary model.
    reaching: list[tuple[str, int, int, str, torch.Tensor]] = []
    for span in spans:
        reaching = [other for other in reaching if other[0] == span[0] and other[2] > span[1]]
        for other in reaching:
            if _share_an_element(other[4], span[4], span[1] - other[1]):
                yield other[3], span[3]
        reaching.append(span)


def shared_memory(where: str, pair: tuple[str, str]) -> str:
    """The message for two tensors that would part."""
    return describe(
        f"{where}: '{pair[0]}' and '{pair[1]}' are two tensors on one memory, as an assignment to .data makes them",
        expected="one Parameter under both names, or memory for each",
        fix="tie the object itself (b.weight = a.weight), or part them (b.weight.data = b.weight.data.clone())",
    )


def _share_an_element(a: torch.Tensor, b: torch.Tensor, apart: int) -> bool:
    """For tensors whose ranges of addresses overlap, ``b`` starting ``apart`` bytes behind ``a``.

    The columns of a matrix, cut in two, overlap as ranges and share nothing.
    """
    # Not if only one is contiguous: it may lie in a hole of the other, as a single element does between two.
    if (a.is_contiguous() and b.is_contiguous()) or a.itemsize != b.itemsize or apart % a.itemsize:
        return True
    # Marked element by element: strides may interleave in any way, and these few are small or odd.
    start = apart // a.itemsize
    ends = [sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) + 1 for t in (a, b)]
    taken = torch.zeros(max(ends[0], start + ends[1]), dtype=torch.bool)
    taken.as_strided(a.shape, a.stride()).fill_(True)
    return bool(taken.as_strided(b.shape, b.stride(), start).any())


class Places:
    """Where a module's parameters are: a check before each step that none became one that nobody trains."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module
        self._names = {param: name for name, param in module.named_parameters()}
        self._look()

    def _look(self) -> None:
        # Each step from the root to a parameter, to be taken again: a look-up each, and no call of Python.
        self._steps: list[tuple[Mapping[str, object], str, object]] = []
        for one in self._module.modules():
            self._steps += [(one._modules, name, child) for name, child in one._modules.items()]
            self._steps += [
                (one._parameters, name, p) for name, p in one._parameters.items() if p is not None
            ]

    def check(self, trained: Callable[[], Iterable[torch.nn.Parameter]]) -> None:
        """Raise UsageError where the module has lost one of the ``trained`` parameters and got one that was not there.

        What is left out, or put elsewhere (a wrapper, a parametrization), is no fault, nor is what is only added.
        """
        for within, name, there in self._steps:
            if within.get(name) is not there:
                break
        else:
            return
        here = {param: name for name, param in self._module.named_parameters()}
        lost = [self._names[param] for param in trained() if param not in here]
        new = [name for param, name in here.items() if param.requires_grad and param not in self._names]
        if lost and new:
            raise UsageError(
                f"parameters {_listed(lost)} are trained and no longer in the model; nobody trains {_listed(new)}, "
                "which came since initialize",
                fix="write values into the parameter (with torch.no_grad(): param.copy_(value)) in place of a new one, "
                "or call engine.destroy(), change the model, and initialize again",
            )
        self._look()


def _listed(names: list[str]) -> str:
    return ", ".join(f"'{name}'" for name in names[:5]) + (f" and {len(names) - 5} more" if names[5:] else "")
