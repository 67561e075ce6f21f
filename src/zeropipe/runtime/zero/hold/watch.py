"""Notes, gradient by gradient and without waiting for the device, where inf or NaN first appears."""

from __future__ import annotations

from collections.abc import Callable

import torch

from zeropipe.comm.collectives import all_gather_object
from zeropipe.comm.group import Group
from zeropipe.tensor.norms import NonFinite, all_finite, earliest


class Watch:
    """Looks at each local gradient of a window before it is reduced, so that the rank is still known."""

    def __init__(self, group: Group, micro_step: Callable[[], int]) -> None:
        self._group = group
        self._micro_step = micro_step
        self._seen: list[
            tuple[str, int, int, torch.Tensor]
        ] = []  # name, numel, micro-step, (inf, NaN) counts

    def look(self, name: str, grad: torch.Tensor) -> None:
        if grad.is_sparse:
            grad = grad.coalesce().values()  # of an embedding: repeated rows are added first
        if grad.device.type == "cpu" and bool(all_finite(grad)):
            return
        counts = torch.stack([torch.isinf(grad).sum(), torch.isnan(grad).sum()])
        self._seen.append((name, grad.numel(), self._micro_step(), counts))

    def clear(self) -> None:
        self._seen.clear()

    def find(self) -> NonFinite | None:
        """The earliest bad gradient of all ranks in this window; collective, the same on every rank."""
        rank = self._group.ranks[self._group.rank]
        mine = None
        for name, numel, micro_step, counts in self._seen:
            num_inf, num_nan = counts.tolist()
            if num_inf or num_nan:
                mine = NonFinite(name, num_inf, num_nan, numel, rank, micro_step)
                break
        return earliest(all_gather_object(mine, self._group, label="overflow"))
