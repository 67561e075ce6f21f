"""The device that this process computes on, asked in the words that DeepSpeed users know."""

from __future__ import annotations

from typing import Any

import torch


class Accelerator:
    """The GPU of this process, or the CPU where there is none; what is not here is ``torch.cuda`` or ``torch.cpu``."""

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

    def communication_backend_name(self) -> str:
        """The backend of ``torch.distributed`` for this device."""
        return "nccl" if torch.cuda.is_available() else "gloo"

    def is_bf16_supported(self) -> bool:
        return torch.cuda.is_bf16_supported() if torch.cuda.is_available() else True

    def is_fp16_supported(self) -> bool:
        return True

    def supported_dtypes(self) -> list[torch.dtype]:
        dtypes = [torch.float32, torch.float16, torch.bfloat16]
        return dtypes if self.is_bf16_supported() else dtypes[:2]

    def is_synchronized_device(self) -> bool:
        """Whether work is done when a call returns: true of a CPU."""
        return not torch.cuda.is_available()

    def on_accelerator(self, tensor: torch.Tensor) -> bool:
        return tensor.device.type == torch.device(self.device_name()).type

    def pin_memory(self, tensor: torch.Tensor, align_bytes: int = 1) -> torch.Tensor:
        """``tensor`` in page-locked memory; itself where there is no GPU. ``align_bytes`` has no effect."""
        return tensor.pin_memory() if torch.cuda.is_available() else tensor

    # Asked at each call: a process may see its GPU only after it has chosen it.
    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda if torch.cuda.is_available() else torch.cpu, name)


def get_accelerator() -> Accelerator:
    """The device that this process computes on."""
    return Accelerator()
