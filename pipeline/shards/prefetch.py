"""Fetches things ahead of need in background threads, by a list of what is wanted that changes all the time."""

import os
import threading
from collections.abc import Callable, Sequence

from pipeline.shards.shard_cache import NoRoom


class Prefetcher:
    """Calls `fetch(number, before)` for each wanted number, `before` being those that are wanted sooner.

    Its threads are daemons: a process that ends does not wait for them, and one that was forked starts its own. Errors
    are not kept: whoever needs what could not be fetched fetches it and gets the error first hand.
    """

    def __init__(self, fetch: Callable[[int, Sequence[int]], None]) -> None:
        self._fetch, self._pid = fetch, 0

    def want(self, numbers: Sequence[int], threads: int) -> None:
        """Replaces the list of wanted numbers, the first of them wanted soonest."""
        if self._pid != os.getpid():
            self._pid, self._lock = os.getpid(), threading.Lock()
            self._num_threads, self._busy = 0, set[int]()
        with self._lock:
            self._wanted, self._next = list(numbers), 0
            num_new = max(0, min(threads, len(numbers)) - self._num_threads)
            self._num_threads += num_new
        for _ in range(num_new):
            threading.Thread(target=self._work, name="prefetch", daemon=True).start()

    def _work(self) -> None:
        while task := self._take():
            wanted, index = task
            try:
                self._fetch(wanted[index], wanted[:index])
            except NoRoom:  # nor is there for what is wanted later
                with self._lock:
                    self._next = len(self._wanted) if wanted is self._wanted else self._next
            except (OSError, ValueError):
                pass  # somebody else fetches it, or whoever reads it is told what is wrong
            finally:
                self._busy.discard(wanted[index])

    def _take(self) -> tuple[list[int], int] | None:
        """Returns the list and the index in it of what to fetch next, None where another thread has all in hand."""
        with self._lock:
            while self._next < len(self._wanted):
                index, self._next = self._next, self._next + 1
                if self._wanted[index] not in self._busy:
                    self._busy.add(self._wanted[index])
                    return self._wanted, index
            self._num_threads -= 1
            return None
