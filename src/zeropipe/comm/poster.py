"""Hands messages to gloo in a thread of its own, in the order in which they are posted.

Gloo's device thread holds the lock of a pair of ranks while it moves a large message in or out, and whoever hands over
the next message waits for that lock: at stage 3, a tenth of a training step. The poster waits instead, and the thread
that computes goes on.
"""

from __future__ import annotations

import atexit
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any

_PATIENCE = 5.0  # seconds at the end of the process for messages that are not handed over yet
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
    """One per process. Its thread starts with the first message and ends before the interpreter does: a thread that
    came back from the transport later would end the process with an abort."""

    def __init__(self) -> None:
        self._start_anew()
        os.register_at_fork(
            after_in_child=self._start_anew
        )  # no thread there, and the messages are the parent's

    def _start_anew(self) -> None:
        self._lock = threading.Lock()
        self._queue: SimpleQueue[Posted | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def post(self, messages: Sequence[Message]) -> Posted:
        """Have ``messages`` handed over, after all that were posted before them."""
        posted = Posted(messages)
        with self._lock:
            if self._thread is None:
                # A daemon, so that one that the transport never lets go does not keep the process.
                self._thread = threading.Thread(target=self._run, name="zeropipe poster", daemon=True)
                self._thread.start()
                atexit.register(self.close)
            self._queue.put(posted)
        return posted

    def close(self) -> None:
        """Hand over what is posted and end the thread, which takes ``_PATIENCE`` at most; a later message starts it
        anew."""
        with self._lock:
            thread, self._thread = self._thread, None
            if thread is not None:
                self._queue.put(None)
        if thread is not None:
            thread.join(_PATIENCE)
        atexit.unregister(self.close)

    def _run(self) -> None:
        while (posted := self._queue.get()) is not None:
            posted.hand_over()
            del posted
