"""Plans under way: asked for, not yet here, while the executors go on."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from echelon.planners.base import Asking, ModelPlanner

__all__ = ["PendingPlans", "Ticket"]


@dataclass(frozen=True, eq=False)
class Ticket:
    """One planning round that a model works on.

    Attributes:
        number: its place in the order of asking.
        tick: the step at which it was asked.
        asking: what was asked.
        future: the model's answers.
        asked: when, in seconds of `time.perf_counter`.
    """

    number: int
    tick: int
    asking: Asking
    future: Future[Any]
    asked: float


class PendingPlans:
    """The planning rounds of one planner that are being worked on in threads beside the simulation.

    With a `lag`, a plan is used exactly so many steps after it was asked for, and waited for if it isn't there: what
    happens doesn't depend on how fast the model is. Without one it is used at the first step that finds it ready, and
    while the model is busy it isn't asked: a plan that waits in a queue is outdated before it is made.

    Attributes:
        planner: who plans.
        waits: int64 `(W, A)`, the number of the ticket whose plan an agent waits for, or -1.
    """

    def __init__(
        self, planner: ModelPlanner, shape: tuple[int, int], *, lag: int | None, threads: int = 1, most: int = 16
    ) -> None:
        """Plan for `(worlds, agents)`, at most `threads` rounds at a time.

        Args:
            planner: who plans.
            shape: worlds and agents.
            lag: steps until a plan is used, or None.
            threads: rounds that the model can work on side by side.
            most: worlds in a round, where there is no lag.
        """
        self.planner, self.lag, self.threads, self.most = planner, lag, threads, most
        self.waits = np.full(shape, -1, np.int64)
        self._tickets: list[Ticket] = []
        self._number = 0
        self._next = 0
        self._turn = np.zeros(0, np.int64)
        self._pool: ThreadPoolExecutor | None = None

    @property
    def busy(self) -> bool:
        """Whether the model has all that it can work on now."""
        return self.lag is None and sum(not t.future.done() for t in self._tickets) >= self.threads

    def turn(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Split worlds that need plans (ascending) into those that the model may be asked about now and the others."""
        if self.lag is not None or len(rows) <= self.most:
            self._turn = rows
            return rows, rows[:0]
        ahead = np.roll(rows, -int(np.searchsorted(rows, self._next)))
        self._turn, self._next = np.sort(ahead[: self.most]), int(ahead[self.most - 1]) + 1
        return self._turn, np.sort(ahead[self.most :])

    def has_turn(self, rows: NDArray[np.int64]) -> bool:
        """Whether these worlds are those that the model may be asked about now."""
        return np.array_equal(rows, self._turn)

    def ask(self, asking: Asking, tick: int) -> None:
        """Let the model work on what `asking` leaves open; those agents wait for it."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="planner")
        i, a = np.nonzero(asking.open)
        self.waits[asking.request.rows[i], a] = self._number
        self._tickets.append(Ticket(self._number, tick, asking, self._pool.submit(_guarded, asking.work),
                                    time.perf_counter()))  # fmt: skip
        self._number += 1

    def due(self, tick: int, *, everything: bool = False) -> list[Ticket]:
        """Take the tickets whose plans are to be used now, in the order of asking; `everything`: wait for all."""
        if everything:
            taken, self._tickets = self._tickets, []
        elif self.lag is not None:
            taken = [t for t in self._tickets if t.tick + self.lag <= tick]
            self._tickets = self._tickets[len(taken) :]
        else:
            ready = [t.future.done() for t in self._tickets]
            taken = [t for t, done in zip(self._tickets, ready, strict=True) if done]
            self._tickets = [t for t, done in zip(self._tickets, ready, strict=True) if not done]
        return taken

    def waiting(self, ticket: Ticket) -> NDArray[np.bool_]:
        """Which of a ticket's agents still wait for it, bool `(n, A)`; afterwards none does."""
        rows = ticket.asking.request.rows
        still = np.asarray(ticket.asking.open & (self.waits[rows] == ticket.number))
        i, a = np.nonzero(still)
        self.waits[rows[i], a] = -1
        return still

    def close(self) -> None:
        """End the threads; what they work on is lost. Asked again, it begins anew."""
        self._tickets.clear()
        self.waits[:] = -1
        if self._pool is not None:
            # Nobody waits for these answers any more, nor for a server that hangs.
            hurry = getattr(self.planner.model, "hurry", lambda seconds: None)
            hurry(0.2)
            self._pool.shutdown(cancel_futures=True)
            hurry(None)
            self._pool = None


def _guarded(work: Callable[[], Any]) -> Any:
    """The work's answers; what it raises is one, so that a ticket never fails."""
    try:
        return work()
    except Exception as error:  # a user's planner may raise anything
        return error
