"""A request to stop: SIGTERM, which schedulers send before they take a machine back, or a file in the run folder."""

import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Self

STATUS = 128 + signal.SIGTERM  # what a shell reports of a process that this signal ended
STOP_FILE = "stop"


class StopRequest:
    """Whether somebody asks to stop: by SIGTERM since this context began, or by a file for as long as it is there.

    Only a process's main thread can listen to signals. Elsewhere (a worker of Ray Train) SIGTERM keeps its usual
    effect, and the file is the way. One process looks for it; for the others it is None.
    """

    def __init__(self, file: Path | None) -> None:
        self.file, self._was_asked = file, False

    def __enter__(self) -> Self:
        self._listens = threading.current_thread() is threading.main_thread()
        if self._listens:
            self._before = signal.signal(signal.SIGTERM, self._take)
        return self

    def __exit__(self, *error: object) -> None:
        if self._listens:
            signal.signal(signal.SIGTERM, self._before)

    def ask(self) -> None:
        """Asks from within this process."""
        self._was_asked = True

    def has_come(self) -> bool:
        """Whether somebody asks now."""
        return self._was_asked or self.by_file()

    def by_file(self) -> bool:
        """Whether the file is there; one that cannot be looked for is not."""
        return self.file is not None and os.path.exists(self.file)

    def _take(self, number: int, frame: FrameType | None) -> None:
        self._was_asked = True


def check_no_stop_file(run_dir: Path) -> None:
    """Makes sure that nobody wants this run stopped.

    Raises:
        ValueError: Somebody does.
    """
    if (file := run_dir / STOP_FILE).exists():
        raise ValueError(f"{file} is there, which stops this run; remove it to go on")
