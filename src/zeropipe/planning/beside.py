"""A GPU beside a host, of which neither is there: what offload pins in host memory is told apart, and nothing waits."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from zeropipe.planning.dry import reserved
from zeropipe.planning.ledger import HOST, Ledger
from zeropipe.streams import STREAMS, Moment


class _Beside:
    """Streams whose work is done when it is given, and pinned memory that nobody touches (a ``Driver``)."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._stream = object()
        self._pinned: dict[int, weakref.ref[torch.UntypedStorage]] = {}  # by storage

    def new_stream(self) -> object:
        return object()

    def current(self) -> object:
        return self._stream

    def on(self, stream: object) -> AbstractContextManager[None]:
        return nullcontext()

    def mark(self) -> Moment:
        return object()

    def wait(self, moment: Moment) -> None:
        """It has passed."""

    finish = wait

    def passed(self, moment: Moment) -> bool:
        return True

    def on_host(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._pinned

    is_pinned = on_host

    def pinned(self, nbytes: int) -> torch.Tensor:
        tensor = reserved(nbytes)
        storage = tensor.untyped_storage()
        key = storage._cdata
        self._pinned[key] = weakref.ref(storage, lambda _: self._pinned.pop(key))
        with self._ledger.holding(f"{HOST}copies"):
            self._ledger.made(tensor, unknown=True)
        return tensor


@contextmanager
def beside_a_host(kind: str, ledger: Ledger) -> Iterator[None]:
    """Inside, a device of ``kind`` ``cuda`` has streams, and the host a memory of its own."""
    with STREAMS.driven_by(_Beside(ledger)) if kind != "cpu" else nullcontext():
        yield
