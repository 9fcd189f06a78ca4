"""A circuit breaker: a server that keeps failing is left alone for a while, so that nobody waits for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

__all__ = ["Breaker"]

_LONGEST = 600.0  # seconds; our choice


class Breaker:
    """Closed (all pass), open (none pass), half-open (one trial passes); after Nygard, "Release It!", 2007, ch. 5.

    After `failures` failures in a row it opens for `seconds`. Then one trial passes: its success closes the breaker,
    its failure opens it for twice as long, up to 10 minutes. Safe to call from several threads.

    Attributes:
        opened: how often it opened; refused: how often nobody was let through.
    """

    def __init__(self, failures: int, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Closed at first; it never opens if `failures` is 0. `clock` gives seconds that never run back."""
        self._limit, self._first, self._clock = failures, seconds, clock
        self._failures, self._pause = 0, seconds
        self._until: float | None = None
        self._trying = False
        self.opened = self.refused = 0
        self.unlock()

    def unlock(self) -> None:
        """Begin with a new lock and no trial under way: for the child of a fork, where no thread is left to end one."""
        self._lock = threading.Lock()
        self._trying = False

    @property
    def is_open(self) -> bool:
        """Whether it lets nobody but a trial through."""
        return self._until is not None

    def enter(self) -> str | None:
        """Ask to pass: "passes", "trial", or None. Who passes must call `leave` with the same word."""
        with self._lock:
            if self._until is None:
                return "passes"
            if self._trying or self._clock() < self._until:
                self.refused += 1
                return None
            self._trying = True
            return "trial"

    def leave(self, how: str, good: bool | None) -> None:
        """Say how it went: True, False, or None if it was broken off and says nothing about the server."""
        with self._lock:
            trial = how == "trial"
            if trial:
                self._trying = False
            if good:
                # Also of one that went out before the breaker opened: the server is alive.
                self._failures, self._until, self._pause = 0, None, self._first
            elif good is False and trial:
                self._pause = min(2 * self._pause, max(_LONGEST, self._first))
                self._open()
            elif good is False and self._until is None:
                self._failures += 1
                if 0 < self._limit <= self._failures:
                    self._open()

    def _open(self) -> None:
        self._failures, self._until = 0, self._clock() + self._pause
        self.opened += 1
