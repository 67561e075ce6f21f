"""Hands messages to gloo in a thread of its own, in the order in which they are posted.

Gloo's device thread holds the lock of a pair of ranks while it moves a large message in or out, and whoever hands over
the next message waits for that lock: at stage 3, a tenth of a training step. The poster waits instead, and the thread
that computes goes on.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any

Message = Callable[[], Any]  # hands one message over; returns gloo's handle of it, None for an empty one


class Posted:
    """The handle of messages that are handed over soon."""

    __slots__ = ("_error", "_gate", "_handles", "_messages")

    def __init__(self, messages: Sequence[Message]) -> None:
        self._messages = messages
        self._handles: deque[Any] = deque()
        self._error: BaseException | None = None
        self._gate = threading.Lock()  # closed until all are handed over
        self._gate.acquire()

    def hand_over(self) -> None:
        try:
            for message in self._messages:
                handle = message()
                if handle is not None:
                    self._handles.append(handle)
        except BaseException as error:  # the thread that waits raises it
            self._error = error
        self._messages = ()
        self._gate.release()

    def wait(self, *limit: Any) -> None:
        """Until all have arrived. Raises what handing them over raised."""
        with self._gate:
            pass
        if self._error is not None:
            raise self._error
        while self._handles:
            self._handles[0].wait(*limit)
            self._handles.popleft()

    def is_completed(self) -> bool:
        return not self._gate.locked() and all(handle.is_completed() for handle in self._handles)


class Poster:
    """One per process. Its thread starts with the first message and ends with the process."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[Posted] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def post(self, messages: Sequence[Message]) -> Posted:
        """Have ``messages`` handed over, after all that were posted before them."""
        if (
            self._thread is None or not self._thread.is_alive()
        ):  # a forked process has no thread but its first
            self._thread = threading.Thread(target=self._run, name="zeropipe poster", daemon=True)
            self._thread.start()
        posted = Posted(messages)
        self._queue.put(posted)
        return posted

    def _run(self) -> None:
        while True:
            self._queue.get().hand_over()
