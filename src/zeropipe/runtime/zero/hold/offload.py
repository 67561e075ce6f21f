"""Decides where one engine's masters, moments, gradients and parameter shards live, and makes them there.

                   DEVICE            HOST (on a GPU run)                FILE
masters, moments   with parameters   pinned; steps on the CPU           mapped; stepped piece by piece
gradient shards    with parameters   pinned, copied while backward runs mapped
what gathers read  the masters       a pinned copy in the parameters' dtype, or the masters where they are fp32
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from zeropipe.comm.startup import node_size
from zeropipe.config.schema_zero import ZeroOptimization
from zeropipe.errors import ConfigError
from zeropipe.runtime.zero.hold.offload_files import Arena, Files, check_folder
from zeropipe.runtime.zero.hold.policy import Place, Policy

_COPY_NUMEL = 2**22  # elements that a copy from or to a file holds in memory at a time
_STATE_BYTES = 16  # per element in files: master, gradient and the two moments of an Adam, fp32


class Offload:
    """Makes the tensors of one engine where its policy wants them."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self._state_files = Files(policy.optimizer_folder) if policy.optimizer_place is Place.FILE else None
        self._param_files = self._state_files
        if policy.param_place is not Place.FILE:
            self._param_files = None
        elif self._state_files is None or policy.param_folder != policy.optimizer_folder:
            self._param_files = Files(policy.param_folder)

    @property
    def pages_state(self) -> bool:
        """Whether the optimizer steps piece by piece on files."""
        return self._state_files is not None

    def state(self, numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """A 1-D tensor of zeros for a master, a moment or a gradient shard of parameters on ``device``."""
        return self._zeros(numel, dtype, device, self.policy.optimizer_place, self._state_files)

    def source(self, numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """A 1-D tensor of zeros for what gathers read of parameters on ``device``."""
        return self._zeros(numel, dtype, device, self.policy.param_place, self._param_files)

    def gathers_read_masters(self, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether parameters of ``dtype`` on ``device`` need no copy of their shards beside the masters."""
        places = [self.policy.optimizer_place, self.policy.param_place]
        if device.type == "cpu":
            places = [Place.DEVICE if place is Place.HOST else place for place in places]
        if places[0] is not places[1]:
            return False
        # From afar, moving 16 bits of each element instead of 32 is worth the copy.
        same_folder = places[0] is not Place.FILE or self._param_files is self._state_files
        return same_folder and (places[0] is Place.DEVICE or dtype == torch.float32)

    def in_files(self, tensor: torch.Tensor) -> bool:
        return self._state_files is not None and self._state_files.owns(tensor)

    def is_remote(self, device: torch.device) -> bool:
        """Whether the shards of parameters on ``device`` live elsewhere."""
        place = self.policy.param_place
        return place is Place.FILE or (place is Place.HOST and device.type != "cpu")

    def let_go(self, tensor: torch.Tensor) -> None:
        """The elements of ``tensor`` will not be used for a while."""
        for files in (self._state_files, self._param_files):
            if files is not None:
                files.let_go(tensor)

    def read_ahead(self, tensor: torch.Tensor) -> None:
        """The elements of ``tensor`` will be used soon."""
        if self._param_files is not None:
            self._param_files.read_ahead(tensor)
        if self._state_files is not None and self._state_files is not self._param_files:
            self._state_files.read_ahead(tensor)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """``target.copy_(source)``, 1-D, with little of either in memory at a time where they are in files."""
        if self._state_files is None and self._param_files is None:
            target.copy_(source, non_blocking=True)
            return
        for into, part in zip(target.split(_COPY_NUMEL), source.split(_COPY_NUMEL), strict=True):
            into.copy_(part)
            self.let_go(into)
            self.let_go(part)

    def close(self) -> None:
        for files in (self._state_files, self._param_files):
            if files is not None:
                files.close()

    def _zeros(
        self, numel: int, dtype: torch.dtype, device: torch.device, place: Place, files: Files | None
    ) -> torch.Tensor:
        if files is not None:
            return files.zeros(numel, dtype)
        if place is Place.HOST and device.type != "cpu":
            return torch.zeros(numel, dtype=dtype, pin_memory=self.policy.pin_memory)
        return torch.zeros(numel, dtype=dtype, device=device)


def check_folders(policy: Policy, numels: Mapping[torch.dtype, int], ranks: int) -> None:
    """Raise OffloadError unless the folders of ``policy`` are there and have room for this machine's shards of so
    many trained elements of each dtype among ``ranks`` ranks."""
    here = min(ranks, node_size())
    needs: dict[str, int] = {}
    if policy.optimizer_place is Place.FILE:
        needs[policy.optimizer_folder] = sum(numels.values()) * here // ranks * _STATE_BYTES
    if policy.param_place is Place.FILE:
        # In fp32 gathers read the masters, where those are in files.
        read = {dtype: n for dtype, n in numels.items() if not (needs and dtype == torch.float32)}
        values = sum(n * here // ranks * dtype.itemsize for dtype, n in read.items())
        needs[policy.param_folder] = needs.get(policy.param_folder, 0) + values
    for folder, nbytes in needs.items():
        check_folder(folder, nbytes)


def arena_of(zero: ZeroOptimization | None) -> Arena:
    """Where zero.Init puts shards that live in files. Raises ConfigError where the config names no folder."""
    folder = None if zero is None else zero.offload_param.nvme_path
    if not folder:
        raise ConfigError(
            "zero.Init: remote_device 'nvme' without a folder. Fix: pass config_dict_or_path= a config with "
            "zero_optimization.offload_param.nvme_path"
        )
    return Arena(folder)


class HostCopies:
    """Brings gradients from a GPU to host memory on a stream of its own, beside what the GPU computes."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._device = device
        self._pending = False

    def store(self, place: torch.Tensor, piece: torch.Tensor, add: bool) -> None:
        """``place.copy_(piece)``, or ``place.add_(piece)``, which waits."""
        if add:
            self.wait()
            place.add_(piece.to(place.device, place.dtype))
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            place.copy_(piece, non_blocking=True)
        piece.record_stream(self._stream)
        self._pending = True

    def wait(self) -> None:
        if self._pending:
            self._stream.synchronize()
            self._pending = False
