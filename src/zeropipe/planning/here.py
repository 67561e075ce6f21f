"""What a program sees that looks for a GPU: one that answers, and whose memory is this machine's address space.

A plan for GPUs shows the program as many as a node has, so that it takes the way that it takes there. The engine
and torch still compute "on a CPU", since what their kernels would do is left out (``dry.py``).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode


class Here(TorchFunctionMode):
    """Inside the block every device is this one, and pinned memory is memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.Tensor.cuda, torch.Tensor.pin_memory):
            return args[0]
        device = kwargs.get("device")
        if device is not None and not _is_here(device):
            kwargs = {**kwargs, "device": "cpu"}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        if func is torch.Tensor.to and len(args) > 1 and isinstance(args[1], str | int | torch.device):
            args = (args[0], args[1] if _is_here(args[1]) else "cpu", *args[2:])
        return func(*args, **kwargs)


def _is_here(device: Any) -> bool:
    return not isinstance(device, int) and torch.device(device).type in ("cpu", "meta")


class _Silent:
    """A stream, an event, a range: it does nothing, and no time passes in it."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __enter__(self) -> _Silent:
        return self

    def __exit__(self, *error: Any) -> None:
        pass

    def elapsed_time(self, end: Any) -> float:
        return 0.0

    def query(self) -> bool:
        return True

    def record(self, *_: Any, **__: Any) -> None:
        pass

    wait = synchronize = wait_stream = wait_event = record_event = record


@contextmanager
def gpus(kind: str, local: int, count: int, memory: int) -> Iterator[None]:
    """Inside, ``torch.cuda`` answers for ``count`` GPUs of ``memory`` bytes, of which ``local`` is this rank's.

    ``kind``: ``cuda``, or ``cpu`` where a program finds none, as it would there; what it asks of them all the same is
    answered.
    """
    properties = SimpleNamespace(
        name="a rehearsed GPU", major=9, minor=0, total_memory=memory, multi_processor_count=132
    )
    numbers = dict.fromkeys(
        ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"), 0
    )
    nothing = dict.fromkeys(
        (
            "set_device",
            "synchronize",
            "empty_cache",
            "ipc_collect",
            "init",
            "manual_seed",
            "manual_seed_all",
            "reset_peak_memory_stats",
            "reset_max_memory_allocated",
        )
    )
    answers: dict[str, Any] = {
        **{name: _always(value) for name, value in (numbers | nothing).items()},
        "current_device": _always(local),
        "device_count": _always(count),
        "get_device_name": _always(properties.name),
        "get_device_capability": _always((properties.major, properties.minor)),
        "get_device_properties": _always(properties),
        "mem_get_info": _always((memory, memory)),
        "is_bf16_supported": _always(True),
        "is_available": lambda: kind == "cuda" and _asked_by_the_program(),
        "current_stream": _Silent,
        "default_stream": _Silent,
        **dict.fromkeys(("Event", "Stream", "stream", "device"), _Silent),
    }
    with ExitStack() as changes:
        for name, answer in answers.items():
            changes.enter_context(patch.object(torch.cuda, name, answer))
        changes.enter_context(patch.object(torch.autocast, "__init__", _autocast(torch.autocast.__init__)))
        yield


def _always(value: Any) -> Callable[..., Any]:
    return lambda *_, **__: value


def _autocast(begin: Any) -> Any:
    """torch switches ``autocast("cuda")`` off where it has no GPU, and the program would compute in fp32."""

    def __init__(self: Any, device_type: str, dtype: Any = None, **more: Any) -> None:
        if device_type == "cuda":
            device_type, dtype = "cpu", torch.float16 if dtype is None else dtype
        begin(self, device_type, dtype=dtype, **more)

    return __init__


def _asked_by_the_program() -> bool:
    """The engine and torch itself are told the truth: on a GPU that does not compute they would take other ways."""
    asks = sys._getframe(2).f_globals.get("__name__", "").partition(".")[0]
    return asks not in ("torch", str(__package__).partition(".")[0])
