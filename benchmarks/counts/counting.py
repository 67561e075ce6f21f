"""Counts what a piece of code asks of a device, on CPUs: every operator that torch dispatches passes by here.

    collectives, bytes   calls of c10d, and the bytes that all ranks share in them
    launches             operators that start a kernel: no views, no empty tensors, nothing that is the host's
    copies               tensors that are copied, cast or cloned, among those
    meetings             reads of a device's values by the host, and copies that the host waits for

All tensors lie on the CPU, so that it must be told which are the host's own: what a factory makes without a ``device``,
what is computed from such tensors alone, and those that are named as ``host``. All others count as a device's.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from math import ceil
from types import TracebackType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# What makes, moves or looks at no element.
_FREE = _names(
    "empty empty_like new_empty empty_strided new_empty_strided resize_ set_ detach detach_ alias lift_fresh "
    "_unsafe_view record_stream _local_scalar_dense is_same_size sym_size sym_stride sym_numel"
)
_COPIES = _names("copy_ _to_copy clone _foreach_copy_ split_with_sizes_copy all_gather_copy_in")
# The host needs a value of each, or a size that is one.
_WAITS = _names(
    "_local_scalar_dense nonzero equal masked_select _unique unique_dim unique_consecutive _unique2"
)
_READS = frozenset({torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu})
_FACTORIES = frozenset(
    getattr(torch, name)
    for name in _names("tensor as_tensor zeros ones full empty arange rand randn eye linspace")
)
# What zeropipe's ranks say to each other goes over gloo, in buffers of host memory that are older than the counting.
_WORDS = "agreement.py"
# Tensors of one multi-tensor kernel, by how many lists of them it reads and writes; large ones take several.
_PER_KERNEL = {1: 110, 2: 64, 3: 48, 4: 36}


@dataclass(slots=True)
class Counts:
    """``where``: of each meeting, what it was and who asked for it."""

    collectives: int = 0
    bytes: int = 0
    launches: int = 0
    copies: int = 0
    meetings: int = 0
    where: list[str] = field(default_factory=list)

    def figures(self) -> dict[str, int]:
        names = ("collectives", "bytes", "launches", "copies", "meetings")
        return {name: getattr(self, name) for name in names}


class Counting:
    """A context inside of which ``counts`` grows. ``host``: tensors that lie in host memory on a GPU run too."""

    def __init__(self, host: Iterable[torch.Tensor] = ()) -> None:
        self.counts = Counts()
        # By address, and held, so that no other memory gets the address meanwhile.
        self._of_host: dict[int, torch.UntypedStorage] = {}
        self.mark(host, True)
        self._modes = ExitStack()

    def __enter__(self) -> Counts:
        self._modes.enter_context(_Functions(self))
        self._modes.enter_context(_Operators(self))
        return self.counts

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._modes.close()

    def is_host(self, tensor: torch.Tensor) -> bool:
        storage = _storage(tensor)
        return storage is not None and storage._cdata in self._of_host

    def mark(self, tensors: Iterable[torch.Tensor], host: bool) -> None:
        for tensor in tensors:
            storage = _storage(tensor)
            if storage is not None and host:
                self._of_host[storage._cdata] = storage
            elif storage is not None:
                self._of_host.pop(storage._cdata, None)

    def met(self, what: str) -> None:
        who = _asked_by()
        if not who.startswith(_WORDS):
            self.counts.meetings += 1
            self.counts.where.append(f"{what} by {who}")

    def collective(self, given: Iterable[Any]) -> None:
        """``given``: its arguments; of inputs and outputs the larger are what all ranks share."""
        self.counts.collectives += 1
        self.counts.bytes += max(
            (sum(tensor.nbytes for tensor in _tensors([arg])) for arg in given), default=0
        )


class _Functions(TorchFunctionMode):
    """What operators do not show: where a tensor is made, and reads that go past the dispatcher on a CPU."""

    def __init__(self, counting: Counting) -> None:
        super().__init__()
        self._counting = counting

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, counting = kwargs or {}, self._counting
        if func in _READS and not counting.is_host(args[0]):
            counting.met(func.__name__)
        made = func(*args, **kwargs)
        if func in _FACTORIES:
            given, numbers = kwargs.get("device"), func in (torch.tensor, torch.as_tensor)
            if numbers and given is not None and not torch.is_tensor(args[0]):
                counting.met(f"{func.__name__}(device=)")
            if not (numbers and torch.is_tensor(args[0])):
                counting.mark([made], host=given is None)
        elif func is torch.Tensor.to and kwargs.get("non_blocking"):
            counting.mark([made], host=False)
        return made


class _Operators(TorchDispatchMode):
    def __init__(self, counting: Counting) -> None:
        super().__init__()
        self._counting = counting

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, counting, counts = kwargs or {}, self._counting, self._counting.counts
        name = func.overloadpacket.__name__
        made = func(*args, **kwargs)
        given = [*_tensors(args), *_tensors(kwargs.values())]
        if func.namespace in ("c10d", "_c10d_functional"):
            if name not in ("wait_tensor", "barrier", "monitored_barrier_"):
                counting.collective(args)
            return made
        results = [*_tensors((made,))]
        host = bool(given) and all(map(counting.is_host, given))
        if given and not func.is_view:
            counting.mark(results, host)
        if host:
            return made
        if name in _WAITS or (name in ("index", "index_put_", "index_put") and _masks(args)):
            counting.met(name)
        elif (
            name == "copy_"
            and not _flag(args, kwargs)
            and counting.is_host(args[0]) != counting.is_host(args[1])
        ):
            counting.met("a blocking copy")
        if not func.is_view and name not in _FREE and any(tensor.numel() for tensor in given or results):
            lists = [arg for arg in args if isinstance(arg, list | tuple) and arg and torch.is_tensor(arg[0])]
            many = name.startswith(("_foreach", "_fused")) and bool(lists)
            counts.launches += ceil(len(lists[0]) / _PER_KERNEL.get(len(lists), 30)) if many else 1
            if name in _COPIES:
                counts.copies += len(results) if results and name == "split_with_sizes_copy" else 1
                counts.copies += len(lists[0]) - 1 if many else 0
        return made


def _masks(args: Any) -> bool:
    """Whether an index is a mask, of which the host must count the elements."""
    return any(t.dtype in (torch.bool, torch.uint8) for t in _tensors(args[1:2]))


def _flag(args: Any, kwargs: Any) -> bool:
    """``non_blocking`` of a copy."""
    return bool(kwargs.get("non_blocking", args[2] if len(args) > 2 else False))


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _storage(tensor: torch.Tensor) -> torch.UntypedStorage | None:
    tensor = getattr(tensor, "_local_tensor", tensor)  # of a DTensor
    try:
        return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):  # a stand-in without memory
        return None


def _asked_by() -> str:
    """The innermost line that is neither torch's nor of this file."""
    frame: Any = sys._getframe()
    while frame is not None:
        file = frame.f_code.co_filename
        if "/torch/" not in file and file != __file__ and "<" not in file:
            return f"{file.rpartition('/')[2]}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"
