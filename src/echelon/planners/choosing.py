"""How a planner that rates candidates one by one lists them, tells what is around them, and joins a team's choices.

A candidate's question depends on a few small numbers, its place in the table of answers: a row (its kind, in words),
the verdict on the last proposal, its path length, and its context: how many other robots that ask are nearer, the
work that comes with it, and how much there is to be had. Rounding and limits are our choice: few places, few
questions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np
from numpy.typing import NDArray

from echelon.envs.base import SubgoalKind
from echelon.envs.kernels import UNREACHABLE
from echelon.planners.hungarian import assign
from echelon.rng import uniform
from echelon.subgoals import EXCLUSIVE

__all__ = [
    "ABOUT",
    "CONTEXT",
    "CONTEXTS",
    "Choices",
    "Reviews",
    "agree",
    "contexts",
    "draw",
    "draws",
    "list_open",
    "look_up",
    "pack",
    "spread",
    "survey",
    "unpack",
    "words_of_context",
]

CONTEXT = ("nearer", "after", "gain")
"""What is told of the surroundings of a candidate, if a template asks for it."""
AFTER = np.array([0, 4, 8, 16, 24, 32, 48], np.int64)
"""The steps of work that come with a candidate, as `{after}` tells them: rounded up, and the last: or more."""
_NEARER, _GAIN = 3, 5
CONTEXTS = _NEARER * len(AFTER) * _GAIN
"""Contexts that are told apart."""
_TOOL = int(SubgoalKind.TOOL)
_NEVER = np.int64(1) << 40  # what can't be, and, halved, having nothing to do
_STEPS_BITS, _CONTEXT_BITS, _VERDICT_BITS = 16, 16, 4


def _rounded(steps: int) -> int:
    """Path lengths to about a tenth: a step more is much where the way is short."""
    grain = 1
    while steps > 10 * grain:
        grain *= 2
    return round(steps / grain) * grain


ABOUT = np.array([_rounded(steps) for steps in range(1 << 16)], np.int64)
"""Path lengths as `{about}` tells them: exact up to 10, then to multiples of 2, from 20 on of 4, and so on."""


@dataclass(frozen=True)
class Choices:
    """m choices, in the order in which the robots of a world made them.

    Attributes:
        world, agent: int64 `(m,)`.
        places: int64 `(m, K)`, where in the table the options are (see `pack`), -1 past the last.
        open: bool `(m, K)`, options that nobody had taken yet.
        column: int64 `(m,)`, what was chosen.
        logp: float64 `(m,)`, the logarithm of its probability among the open ones.
        liking: float64 `(m, K)`, how much a teacher likes each option, or None.
    """

    world: NDArray[np.int64]
    agent: NDArray[np.int64]
    places: NDArray[np.int64]
    open: NDArray[np.bool_]
    column: NDArray[np.int64]
    logp: NDArray[np.float64]
    liking: NDArray[np.float64] | None = None


@dataclass(frozen=True)
class Reviews:
    """m decisions to keep a subgoal or choose anew.

    Attributes:
        world, agent: int64 `(m,)`.
        place: int64 `(m,)`, where in the table the question is; its odds are those of keeping.
        switch: bool `(m,)`, what was decided.
        logp: float64 `(m,)`, the logarithm of its probability.
    """

    world: NDArray[np.int64]
    agent: NDArray[np.int64]
    place: NDArray[np.int64]
    switch: NDArray[np.bool_]
    logp: NDArray[np.float64]


def pack(
    row: NDArray[np.int64], verdict: NDArray[np.int64], steps: NDArray[np.int64], context: NDArray[np.int64]
) -> NDArray[np.int64]:
    """A place in the table as one number; `unpack` takes it apart."""
    return np.asarray((((row << _VERDICT_BITS | verdict) << _CONTEXT_BITS | context) << _STEPS_BITS) | steps)


def unpack(place: int) -> tuple[int, int, int, int]:
    """Row, verdict, steps and context."""
    rest, steps = divmod(place, 1 << _STEPS_BITS)
    rest, context = divmod(rest, 1 << _CONTEXT_BITS)
    row, verdict = divmod(rest, 1 << _VERDICT_BITS)
    return row, verdict, steps, context


def words_of_context(context: int) -> dict[str, int]:
    """The fields of a template that tell a context."""
    rest, gain = divmod(context, _GAIN)
    nearer, after = divmod(rest, len(AFTER))
    return {"nearer": nearer, "after": int(AFTER[after]), "gain": gain}


@numba.njit(cache=True)
def draws(keys):  # type: ignore[no-untyped-def]
    """A number in [0, 1) for each of some keys."""
    out = np.empty(keys.shape[0])
    for i in range(keys.shape[0]):
        out[i] = uniform(keys[i], np.uint64(7))
    return out


@numba.njit(cache=True)
def contexts(asked, options, count, need, kind, task, distance, after, gain, told, out):  # type: ignore[no-untyped-def]
    """Write the context of each option of the agents `asked`; what isn't `told` (bool `(3,)`) counts as 0."""
    agents, per = kind.shape[1], kind.shape[2]
    tasks = after.shape[1]
    way = np.empty((agents, tasks), np.int64)
    for i in range(asked.shape[0]):
        if not asked[i].any():
            continue
        way[:] = UNREACHABLE
        for b in range(agents):
            if need[i, b]:
                for c in range(per):
                    t = task[i, b, c]
                    if t >= 0 and kind[i, b, c] > 0:
                        way[b, t] = distance[i, b, c]
        for a in range(agents):
            if not asked[i, a]:
                continue
            for k in range(count[i, a]):
                c = options[i, a, k]
                t = task[i, a, c]
                ahead, later, much = 0, 0, 1
                if t >= 0:
                    if told[0] and EXCLUSIVE[kind[i, a, c]]:
                        for b in range(agents):
                            nearer = way[b, t] < way[a, t] or (way[b, t] == way[a, t] and b < a)
                            ahead += b != a and need[i, b] and nearer
                    while told[1] and later < AFTER.shape[0] - 1 and AFTER[later] < after[i, t]:
                        later += 1
                    much = gain[i, t]
                if not told[2]:
                    much = 0
                out[i, a, k] = (min(ahead, _NEARER - 1) * AFTER.shape[0] + later) * _GAIN + min(max(much, 0), _GAIN - 1)


@numba.njit(cache=True)
def _is_open(c, kind, task, distance, refused, taken):  # type: ignore[no-untyped-def]
    t = task[c]
    return kind[c] > 0 and distance[c] != UNREACHABLE and not refused[c] and not (t >= 0 and taken[t])


@numba.njit(cache=True)
def _skips_tools(kind, task, distance, refused, taken):  # type: ignore[no-untyped-def]
    """As for `hungarian`: who can finish something isn't asked about a tool, else robots go from rack to rack."""
    skips = False
    for c in range(kind.shape[0]):
        skips |= kind[c] != _TOOL and _is_open(c, kind, task, distance, refused, taken)
    return skips


@numba.njit(cache=True)
def _give(i, a, c, kind, task, taken, choice):  # type: ignore[no-untyped-def]
    """Let agent `a` of row `i` have the candidate `c` (-1: nothing), and nobody else, if it is for one only."""
    choice[i, a] = c
    if c >= 0 and task[i, a, c] >= 0 and EXCLUSIVE[kind[i, a, c]]:
        taken[i, task[i, a, c]] = True


@numba.njit(cache=True)
def list_open(need, kind, task, distance, refused, taken, spare, options, count, choice):  # type: ignore[no-untyped-def]
    """Write each needing agent's nearest open candidates into `options`, in their order; a single one is chosen."""
    most = options.shape[2]
    for i in range(need.shape[0]):
        for a in range(need.shape[1]):
            if not need[i, a]:
                continue
            args = (kind[i, a], task[i, a], distance[i, a], refused[i, a], taken[i])
            skip = spare and _skips_tools(*args)
            found = options[i, a]
            n = 0
            for c in range(kind.shape[2]):
                if not _is_open(c, *args) or (skip and kind[i, a, c] == _TOOL):
                    continue
                # Sorted by length while they are collected; of equals the first comes first.
                at = min(n, most)
                while at > 0 and distance[i, a, found[at - 1]] > distance[i, a, c]:
                    if at < most:
                        found[at] = found[at - 1]
                    at -= 1
                if at < most:
                    found[at] = c
                    n = min(n + 1, most)
            found[:n].sort()
            count[i, a] = n
            if n == 1:
                _give(i, a, found[0], kind, task, taken, choice)


@numba.njit(cache=True)
def survey(asked, options, count, kind, first):  # type: ignore[no-untyped-def]
    """Write where each kind of option comes up first (row, agent, candidate) into `first`."""
    for i in range(asked.shape[0]):
        for a in range(asked.shape[1]):
            if asked[i, a]:
                for k in range(count[i, a]):
                    c = options[i, a, k]
                    if first[kind[i, a, c], 0] < 0:
                        first[kind[i, a, c]] = i, a, c


@numba.njit(cache=True)
def look_up(asked, options, count, kind, steps, context, rejected, row, odds, logprobs):  # type: ignore[no-untyped-def]
    """Write the log-probabilities of options, proportional to their odds; NaN for agents that lack an answer."""
    for i in range(asked.shape[0]):
        for a in range(asked.shape[1]):
            if not asked[i, a]:
                continue
            most, known, n = -np.inf, True, count[i, a]
            for k in range(n):
                c = options[i, a, k]
                x = odds[row[kind[i, a, c]], rejected[i, a], steps[i, a, k], context[i, a, k]]
                known &= not np.isnan(x)
                logprobs[i, a, k] = x
                most = max(most, x)
            total = 0.0
            for k in range(n):
                total += np.exp(logprobs[i, a, k] - most)
            for k in range(n):
                logprobs[i, a, k] = logprobs[i, a, k] - most - np.log(total) if known else np.nan


@numba.njit(cache=True)
def spread(who, options, count, logprobs, probability):  # type: ignore[no-untyped-def]
    """Write the probabilities of options to where their candidates are."""
    for i in range(who.shape[0]):
        for a in range(who.shape[1]):
            if who[i, a]:
                for k in range(count[i, a]):
                    probability[i, a, options[i, a, k]] = np.exp(logprobs[i, a, k])


@numba.njit(cache=True)
def _surest(left, count, logprobs):  # type: ignore[no-untyped-def]
    """Of the agents `left` (of one world) the one that is surest of its best option, the first of equals; -1: none."""
    best, sure = -1, -np.inf
    for a in range(left.shape[0]):
        if left[a]:
            top = logprobs[a, : count[a]].max()
            if best < 0 or top > sure:
                best, sure = a, top
    return best


@numba.njit(cache=True)
def _nearest_left(kind, task, distance, refused, taken, spare):  # type: ignore[no-untyped-def]
    """An agent's nearest open candidate, -1 if none: for when others took all that it was shown."""
    args = (kind, task, distance, refused, taken)
    skip = spare and _skips_tools(*args)
    pick = -1
    for c in range(kind.shape[0]):
        nearer = pick < 0 or distance[c] < distance[pick]
        if nearer and _is_open(c, *args) and not (skip and kind[c] == _TOOL):
            pick = c
    return pick


@numba.njit(cache=True)
def agree(  # type: ignore[no-untyped-def]
    who, options, count, logprobs, kind, task, distance, refused, taken, spare, choice
):
    """Let the agents `who` choose together: no task twice, as many agents as can be, the greatest sum of `logprobs`.

    That is the most probable of the plans that a team of agents, each of whom draws by its own probabilities, can agree
    on. Who is left over takes the nearest that nobody was asked about, or waits.
    """
    tasks = taken.shape[1]
    for i in range(who.shape[0]):
        asking = np.flatnonzero(who[i])
        n = asking.shape[0]
        if n == 0:
            continue
        # Columns: one a task; then, for each agent, its best option that others may have too, and nothing.
        cost = np.full((n, tasks + 2 * n), _NEVER, np.int64)
        pick = np.full((n, tasks + 2 * n), -1, np.int64)
        for r in range(n):
            a = asking[r]
            cost[r, tasks + n + r] = _NEVER // 2
            for k in range(count[i, a]):
                c = options[i, a, k]
                t = task[i, a, c]
                if t >= 0 and taken[i, t]:
                    continue
                column = t if t >= 0 and EXCLUSIVE[kind[i, a, c]] else tasks + r
                price = np.int64(-logprobs[i, a, k] * 1e6)
                if price < cost[r, column]:
                    cost[r, column], pick[r, column] = price, c
        column = assign(cost)
        for r in range(n):
            _give(i, asking[r], pick[r, column[r]], kind, task, taken, choice)
        for a in asking:
            if choice[i, a] < 0:
                c = _nearest_left(kind[i, a], task[i, a], distance[i, a], refused[i, a], taken[i], spare)
                _give(i, a, c, kind, task, taken, choice)


@numba.njit(cache=True)
def draw(  # type: ignore[no-untyped-def]
    who, options, count, logprobs, kind, task, distance, refused, taken, spare, keys, explore, choice, column, still,
    logp,
):  # fmt: skip
    """Let the agents `who` choose, the surest first (of equals the first agent), so that no task is given twice.

    Each takes the most probable option that is still open or, if it is to `explore`, draws one by the random bits
    `keys`; who finds none open takes the nearest that nobody was asked about, or waits. Writes the option (`column`,
    -1 where there was no choice), the options that were open (`still`) and the chosen one's log-probability among them
    (`logp`). The order of a team's agents is part of what is given, not of what is chosen.
    """
    for i in range(who.shape[0]):
        left = who[i].copy()
        while True:
            a = _surest(left, count[i], logprobs[i])
            if a < 0:
                break
            left[a] = False
            pick, best, n, total = -1, -1, 0, 0.0
            for k in range(count[i, a]):
                t = task[i, a, options[i, a, k]]
                if not (t >= 0 and taken[i, t]):
                    still[i, a, k] = True
                    n += 1
                    total += np.exp(logprobs[i, a, k])
                    if best < 0 or logprobs[i, a, k] > logprobs[i, a, best]:
                        best = k
            if n == 0:
                pick = _nearest_left(kind[i, a], task[i, a], distance[i, a], refused[i, a], taken[i], spare)
            else:
                chosen = best
                if explore and total > 0:
                    # Other bits than those that random planners draw from.
                    rest = uniform(keys[i, a], np.uint64(7)) * total
                    for k in range(count[i, a]):
                        if still[i, a, k]:
                            chosen = k
                            rest -= np.exp(logprobs[i, a, k])
                            if rest < 0:
                                break
                pick = options[i, a, chosen]
                if n > 1 and total > 0:
                    column[i, a] = chosen
                    logp[i, a] = logprobs[i, a, chosen] - np.log(total)
            _give(i, a, pick, kind, task, taken, choice)
