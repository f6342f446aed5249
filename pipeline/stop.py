"""A request to stop: SIGTERM, which schedulers send before they take a machine back."""

import signal
import threading
from types import FrameType
from typing import Self

STATUS = 128 + signal.SIGTERM  # what a shell reports of a process that this signal ended


class StopRequest:
    """Whether SIGTERM has come since this context began; the signal itself does nothing more.

    Only a process's main thread can listen. Elsewhere (a worker of Ray Train) the signal keeps its usual effect.
    """

    def __init__(self) -> None:
        self.has_come = False

    def __enter__(self) -> Self:
        self._listens = threading.current_thread() is threading.main_thread()
        if self._listens:
            self._before = signal.signal(signal.SIGTERM, self._take)
        return self

    def __exit__(self, *error: object) -> None:
        if self._listens:
            signal.signal(signal.SIGTERM, self._before)

    def _take(self, number: int, frame: FrameType | None) -> None:
        self.has_come = True
