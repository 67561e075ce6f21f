"""The device that this process computes on, asked in the words that DeepSpeed users know."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from zeropipe.errors import UsageError
from zeropipe.given import Anything


class Accelerator:
    """The GPU of this process, or the CPU where there is none; what is not here is ``torch.cuda`` or ``torch.cpu``.

    On a CPU memory is that of this process, streams and events do nothing, and random states are the CPU's.
    """

    # What kind of device it is.

    @property
    def _name(self) -> str:
        return "cuda" if torch.cuda.is_available() else "cpu"

    @property
    def _module(self) -> Any:
        """Where torch keeps the words of this device; the CPU's random states are words of torch itself."""
        return torch.cuda if torch.cuda.is_available() else torch.cpu

    @property
    def _random(self) -> Any:
        return torch.cuda if torch.cuda.is_available() else torch

    def is_available(self) -> bool:
        return True

    def device_name(self, device_index: int | str | None = None) -> str:
        """``cuda``, ``cuda:1`` or ``cpu``."""
        if not torch.cuda.is_available():
            return "cpu"
        return "cuda" if device_index is None else f"cuda:{int(device_index)}"

    def device(self, device_index: int | str | None = None) -> torch.device:
        """As a context manager it makes the device the current one, as in torch."""
        return torch.device(self.device_name(device_index))

    def current_device(self) -> int | str:
        """The GPU's index, or ``cpu``."""
        return torch.cuda.current_device() if torch.cuda.is_available() else "cpu"

    def current_device_name(self) -> str:
        """A device string that torch takes."""
        return self.device_name(torch.cuda.current_device() if torch.cuda.is_available() else None)

    def set_device(self, device_index: int | str | torch.device) -> None:
        if torch.cuda.is_available():
            torch.cuda.set_device(device_index)

    def device_count(self) -> int:
        """GPUs of this process; 1 on a CPU."""
        return torch.cuda.device_count() if torch.cuda.is_available() else 1

    def communication_backend_name(self) -> str:
        """The backend of ``torch.distributed`` for this device."""
        return "nccl" if torch.cuda.is_available() else "gloo"

    def communication_backend_version(self) -> str:
        return ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else "unknown"

    def visible_devices_envs(self) -> list[str]:
        """Environment variables that choose among devices."""
        return ["CUDA_VISIBLE_DEVICES"]

    def set_visible_devices_envs(
        self, current_env: dict[str, str], local_accelerator_ids: Sequence[int]
    ) -> None:
        for name in self.visible_devices_envs():
            current_env[name] = ",".join(map(str, local_accelerator_ids))

    def get_compile_backend(self) -> str:
        return "inductor"

    def name(self) -> str:
        return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"

    # What it computes in.

    def is_bf16_supported(self) -> bool:
        return torch.cuda.is_bf16_supported() if torch.cuda.is_available() else True

    def is_fp16_supported(self) -> bool:
        return True

    def is_triton_supported(self) -> bool:
        return torch.cuda.is_available()

    def supported_dtypes(self) -> list[torch.dtype]:
        dtypes = [torch.float32, torch.float16, torch.bfloat16]
        return dtypes if self.is_bf16_supported() else dtypes[:2]

    def amp(self) -> Any:
        return getattr(self._module, "amp", None)

    # When work is done.

    def is_synchronized_device(self) -> bool:
        """Whether work is done when a call returns: true of a CPU."""
        return not torch.cuda.is_available()

    use_host_timers = resolves_data_dependency = handles_memory_backpressure = is_synchronized_device

    def synchronize(self, device_index: int | str | None = None) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize(device_index)

    def Stream(self, *args: Any, **kwargs: Any) -> Any:
        return torch.cuda.Stream(*args, **kwargs) if torch.cuda.is_available() else torch.cpu.Stream()

    def Event(self, **kwargs: Any) -> Any:
        return torch.cuda.Event(**kwargs) if torch.cuda.is_available() else _CpuEvent()

    def default_stream(self, device_index: int | str | None = None) -> Any:
        return (
            torch.cuda.default_stream(device_index)
            if torch.cuda.is_available()
            else torch.cpu.current_stream()
        )

    # Random states: of the current GPU, or of the CPU.

    def random(self) -> Any:
        return torch.random

    def manual_seed(self, seed: int) -> None:
        self._random.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        (torch.cuda.manual_seed_all if torch.cuda.is_available() else torch.manual_seed)(seed)

    def initial_seed(self) -> int:
        return int(self._random.initial_seed())

    def get_rng_state(self, device_index: int | str | None = None) -> torch.Tensor:
        if torch.cuda.is_available():
            return torch.cuda.get_rng_state("cuda" if device_index is None else device_index)
        return torch.get_rng_state()

    def set_rng_state(self, new_state: torch.Tensor, device_index: int | str | None = None) -> None:
        if torch.cuda.is_available():
            torch.cuda.set_rng_state(new_state, "cuda" if device_index is None else device_index)
        else:
            torch.set_rng_state(new_state)

    def default_generator(self, device_index: int) -> torch.Generator:
        return (
            torch.cuda.default_generators[device_index]
            if torch.cuda.is_available()
            else torch.default_generator
        )

    # Memory, in bytes.

    def empty_cache(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def memory_allocated(self, device_index: int | str | None = None) -> int:
        return torch.cuda.memory_allocated(device_index) if torch.cuda.is_available() else _resident()[0]

    def max_memory_allocated(self, device_index: int | str | None = None) -> int:
        return torch.cuda.max_memory_allocated(device_index) if torch.cuda.is_available() else _resident()[1]

    def memory_reserved(self, device_index: int | str | None = None) -> int:
        return torch.cuda.memory_reserved(device_index) if torch.cuda.is_available() else _resident()[0]

    def max_memory_reserved(self, device_index: int | str | None = None) -> int:
        return torch.cuda.max_memory_reserved(device_index) if torch.cuda.is_available() else _resident()[1]

    memory_cached, max_memory_cached = memory_reserved, max_memory_reserved

    def reset_max_memory_allocated(self, device_index: int | str | None = None) -> None:
        """On a CPU the system keeps the most, and nothing is reset."""
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats(device_index)

    reset_peak_memory_stats = reset_max_memory_cached = reset_max_memory_allocated

    def memory_stats(self, device_index: int | str | None = None) -> dict[str, Any]:
        if torch.cuda.is_available():
            return torch.cuda.memory_stats(device_index)
        now, most = _resident()
        return {"allocated_bytes.all.current": now, "allocated_bytes.all.peak": most}

    def total_memory(self, device_index: int | str | None = None) -> int:
        if torch.cuda.is_available():
            return int(torch.cuda.get_device_properties(device_index).total_memory)
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    def available_memory(self, device_index: int | str | None = None) -> int:
        if torch.cuda.is_available():
            return int(torch.cuda.mem_get_info(device_index)[0])
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")

    def pin_memory(self, tensor: torch.Tensor, align_bytes: int = 1) -> torch.Tensor:
        """``tensor`` in page-locked memory; itself where there is no GPU. ``align_bytes`` has no effect."""
        return tensor.pin_memory() if torch.cuda.is_available() else tensor

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        return tensor.is_pinned() if torch.cuda.is_available() else True

    def on_accelerator(self, tensor: torch.Tensor) -> bool:
        return tensor.device.type == torch.device(self.device_name()).type

    # Ranges in a profile.

    def range_push(self, msg: str) -> Any:
        return torch.cuda.nvtx.range_push(msg) if torch.cuda.is_available() else None

    def range_pop(self) -> Any:
        return torch.cuda.nvtx.range_pop() if torch.cuda.is_available() else None

    def lazy_call(self, callback: Callable[[], Any]) -> Any:
        return callback()

    # Graphs: a CPU has none, and what is captured simply runs.

    def create_graph(self) -> Any:
        return torch.cuda.CUDAGraph() if torch.cuda.is_available() else None

    def capture_to_graph(
        self, graph: Anything, pool: Anything = None, stream: Anything = None
    ) -> AbstractContextManager[Any]:
        return torch.cuda.graph(graph, pool, stream) if torch.cuda.is_available() else nullcontext()

    def replay_graph(self, graph: Anything) -> None:
        if graph is not None:
            graph.replay()

    # Operations are not compiled here.

    def op_builder_dir(self) -> str:
        return "deepspeed.ops.op_builder"

    def build_extension(self) -> Any:
        from torch.utils.cpp_extension import BuildExtension

        return BuildExtension

    def export_envs(self) -> list[str]:
        """Beginnings of environment variables that other nodes need."""
        return ["NCCL", "LD_LIBRARY", "PATH"]

    def __getattr__(self, name: str) -> Any:
        # Asked at each call: a process may see its GPU only after it has chosen it.
        # FloatTensor, HalfTensor, ...: classes, for new tensors of this device and for isinstance.
        return getattr(self._random if name.endswith("Tensor") else self._module, name)


class _CpuEvent:
    """A moment in a CPU's work, which is done when it is recorded."""

    def __init__(self) -> None:
        self._at = 0.0

    def record(self, stream: Any = None) -> None:
        self._at = time.perf_counter()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def elapsed_time(self, end: _CpuEvent) -> float:
        """Milliseconds from this one to ``end``."""
        return (end._at - self._at) * 1e3


def _resident() -> tuple[int, int]:
    """Bytes of this process that are in memory: now, and at most so far."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:  # a system without /proc
        return most, most
    now = pages * os.sysconf("SC_PAGE_SIZE")
    return now, max(now, most)  # the system counts the most less often


# One for the process: scripts compare it by identity and hang attributes on it.
_ACCELERATOR = Accelerator()


def get_accelerator() -> Accelerator:
    """The device that this process computes on."""
    return _ACCELERATOR


def set_accelerator(accel_obj: object) -> None:
    """Raises UsageError for any but the accelerator of this process: torch decides which one there is."""
    if accel_obj is not _ACCELERATOR:
        raise UsageError(
            "the accelerator is what torch finds", fix="set CUDA_VISIBLE_DEVICES, empty for the CPU"
        )


def is_current_accelerator_supported() -> bool:
    return True
