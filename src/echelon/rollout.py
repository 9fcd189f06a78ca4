"""The loop's inner half: worlds, planner and subgoals joined into one thing that executors act in."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from echelon.envs.base import GridEnv, SubgoalKind, subgoal_text
from echelon.pending import PendingPlans, Ticket
from echelon.planners.base import ModelPlanner, Planner
from echelon.planners.nearest import nearest_choice
from echelon.planners.recorded import RecordedPlanner
from echelon.shaping import PotentialShaper, TermSet
from echelon.subgoals import Counts, Plan, PlanRequest, SubgoalConfig, SubgoalTracker, Verdict

__all__ = ["Episodes", "PlanTrace", "Reviewer", "TeamWorlds", "first_episodes"]


@runtime_checkable
class Reviewer(Protocol):
    """What else a planner has that can be asked to keep a subgoal or take it back."""

    @property
    def reviews(self) -> bool:
        """Whether it can be, as it is set up."""
        ...

    def review(
        self, request: PlanRequest, kind: NDArray[np.int8], task: NDArray[np.int16], keys: NDArray[np.uint64]
    ) -> NDArray[np.bool_]:
        """Which of the agents `request.need` are to choose a subgoal anew, bool `(n, A)`.

        Args:
            request: as for a plan, with path lengths.
            kind, task: int8 and int16 `(n, A)`, the subgoals in flight.
            keys: uint64 `(n, A)`, random bits.
        """
        ...


@dataclass
class PlanTrace:
    """One planning round in one world, as it is recorded: who planned, for whom, what came of it.

    Attributes:
        world, step: where and when (the step of the world's episode).
        planner: the planner's name.
        agents: one entry an agent that wanted a subgoal: what it got, as `agent`, `kind`, `target` (row, column),
            `task` (or None) and `subgoal` (words); `verdict` on the planner's last proposal ("accepted", or
            "fallback" with the rejection's name as `refused`) and its `reason` (or None); `tries`, how many of its
            proposals were rejected; and, where the planner told them, `options` with `text` and `probability`,
            and `chosen`.
        note: what else the planner told (prompt, reply, tokens), JSON-able.
        latency_ms: time that the planner took for the whole round, shared by its worlds.
    """

    world: int
    step: int
    planner: str
    agents: list[dict[str, Any]]
    note: dict[str, Any]
    latency_ms: float


@dataclass
class Episodes:
    """Sums over finished episodes, taken by `TeamWorlds.take_episodes`.

    `own_count` and `own_success` are of the worlds that the first planner plans: the method's own, where a cheaper
    one plans the rest. `shaping_return` is what potentials added to the team's reward.
    """

    count: int = 0
    success: int = 0
    length_of_success: int = 0
    task_return: float = 0.0
    intrinsic_return: float = 0.0
    shaping_return: float = 0.0
    collisions: int = 0
    own_count: int = 0
    own_success: int = 0


@dataclass
class PlanTime:
    """Seconds and planning rounds of each planner."""

    seconds: float = 0.0
    rounds: int = 0


class TeamWorlds:
    """A batch of worlds whose agents carry out subgoals (or none: a flat team).

    Attributes:
        env: the worlds.
        tracker: the subgoals in flight; None for a flat team.
        obs: int8 `(W, A, D)`, what executors see now; mask: uint8 `(W, A, 5)`.
        obs_scale: float32 `(D,)`.
        reward: float32 `(W, A)`, each executor's reward of the last step.
        cut: bool `(W, A)`, where an executor's own task ended with its subgoal in the last step.
        begins: bool `(W,)`, worlds whose episode began with the last step.
        active: bool `(W,)`, the worlds that are planned for at all; change it to leave some out.
        traced: only worlds below this index are traced, except for planners whose every plan is; None: all.
        repeat: uint64 `(W,)`, where worlds take up their random numbers again when an episode ends, so that they play
            the same one once more; None: they go on to another.
        pending: the plans of the first planner that are made beside the simulation, or None.
        team_reward: whether all agents of a team always get the same reward.
        shaper: adds extra reward from potentials, or None. With one:
        unshaped: float32 `(W,)`, the team's reward of the last step without it.
        phi: float32 `(W, K)`, the terms of the state before the last step, from `settle` on of the present one.
        next_phi: float32 `(W, K)`, the terms of the last step's true next states.
    """

    def __init__(
        self,
        env: GridEnv[Any],
        planners: Sequence[tuple[Planner, NDArray[np.bool_]]],
        config: SubgoalConfig,
        *,
        gamma: float,
        seed: int,
        collision_cost: float = 0.0,
        on_plan: Callable[[PlanTrace], None] | None = None,
        trace_all: bool = False,
        on_subgoals: Callable[[dict[str, Any]], None] | None = None,
        beside: bool = False,
        lag: int | None = None,
        threads: int = 1,
        batch: int = 16,
        shaping: tuple[TermSet, PotentialShaper] | None = None,
    ) -> None:
        """Join worlds and planners.

        Args:
            env: worlds; built with `extra_features=subgoals.FEATURES` unless `planners` is empty.
            planners: which planner plans which worlds (bool `(W,)`), a partition; empty for a flat team.
            config: triggers and rewards.
            gamma: the executor's discount.
            seed: root seed of what planners draw.
            collision_cost: taken from an executor's reward for a move that another agent prevented; in a flat
                team, whose reward is the team's, shared by all.
            on_plan: called with each planning round of planners that cost model time (or all: `trace_all`).
            trace_all: trace the plans of cheap planners too.
            on_subgoals: called with a line of the record for each step at which planners that cost model time were
                asked, or their late plans used: what a run needs to be repeated without them.
            beside: let the first planner's model work beside the simulation: agents that wait for it do what is
                nearest meanwhile. `lag`, `threads`, `batch` (its `most`): see `PendingPlans`.
            shaping: the worlds' potential terms, and what makes extra reward of them; of a flat team alone.
        """
        self.env, self.config, self.planners = env, config, list(planners)
        self.on_plan, self.trace_all, self.collision_cost = on_plan, trace_all, collision_cost
        W, A = env.num_envs, env.num_agents
        self.tracker = SubgoalTracker(env, config, gamma, seed) if planners else None
        self.obs, self.mask = env.obs_buffer, env.action_mask
        scale = env.obs_scale
        self.obs_scale = np.concatenate([scale, SubgoalTracker.scale]) if planners else scale
        self.team_reward = not planners
        assert shaping is None or not planners, "only a flat team's reward is shaped"
        self._terms = shaping[0] if shaping is not None else None
        self.shaper = shaping[1] if shaping is not None else None
        self.num_terms = len(self.shaper.names) if self.shaper is not None else 0
        self.unshaped = np.zeros(W, np.float32)
        self.phi, self.next_phi = np.zeros((2, W, self.num_terms), np.float32)
        self._added = np.zeros(W)
        self.reward = np.zeros((W, A), np.float32)
        self.cut = np.zeros((W, A), bool)
        self.begins = np.ones(W, bool)
        self.active = np.ones(W, bool)
        self.traced: int | None = None
        self._sums = np.zeros((3, W))
        self.repeat: NDArray[np.uint64] | None = None
        self._together, self._spare = False, np.zeros(W, bool)
        self.episodes = Episodes()
        self.plan_time = {p.name: PlanTime() for p, _ in self.planners}
        self.on_subgoals = on_subgoals
        first = self.planners[0][0] if planners else None
        self.pending: PendingPlans | None = None
        if beside and isinstance(first, ModelPlanner):
            self.pending = PendingPlans(first, (W, A), lag=lag, threads=threads, most=batch)

    def start(self) -> None:
        """Plan the first subgoals: once, before the first step (not after `load_state_dict`)."""
        self._begin_shaping(np.ones(self.env.num_envs, bool))
        self.replan()

    def begin_together(self, group: int) -> None:
        """Begin an episode in every world, the same in each group of `group` neighbours; see `GridEnv.share_episodes`.

        Episodes that were under way are dropped and counted nowhere. Of those that follow only each world's first is
        counted: the quickest worlds play more before they begin together again, and those would tell too well of all.
        """
        self.env.share_episodes(group)
        self.begins = np.ones(self.env.num_envs, bool)
        self._sums[:] = 0
        self._begin_shaping(self.begins)
        self._together, self._spare[:] = True, False
        if self.tracker is not None:
            self.tracker.forget(self.begins)
            if self.pending is not None:
                self.pending.waits[:] = -1
            self.replan()

    def advance(self, actions: NDArray[np.int8]) -> None:
        """Step all worlds up to the true next states: rewards, cuts and `obs` are those of the step's end.

        Args:
            actions: int8 `(W, A)`.
        """
        env, tracker = self.env, self.tracker
        if tracker is None:
            env.advance(actions)
            team = env.reward - self.collision_cost * env.bumped.mean(1, dtype=np.float32)
            self.reward[:] = (team if self.shaper is None else self._shaped(team))[:, None]
        else:
            tracker.before()
            env.advance(actions)
            tracker.advance()
            c = self.config
            np.multiply(tracker.reward, c.intrinsic_weight, out=self.reward)
            self.reward -= self.collision_cost * env.bumped
            if c.task_weight:
                self.reward += c.task_weight * env.reward[:, None]
            # An executor's task ends with its subgoal. With task reward mixed in, its worth goes on.
            self.cut[:] = tracker.ended & (c.task_weight == 0)
            self._sums[1] += tracker.reward.mean(1)
        self._sums[0] += env.reward
        self._sums[2] += env.collisions

    def settle(self) -> NDArray[np.bool_]:
        """Reset finished worlds, then plan for whoever needs it; which worlds were finished, bool `(W,)`."""
        env = self.env
        if (done := env.terminated | env.truncated).any():
            self._count_episodes(done & ~self._spare)
            self._sums[:, done] = 0
            self._spare |= done & self._together
            if self.repeat is not None:
                env.counters[done] = self.repeat[done]
        env.autoreset()
        self.begins = done
        if self.shaper is not None:
            self.phi[:] = self.next_phi
            if done.any():
                self._begin_shaping(done)
        if self.tracker is not None:
            if done.any():
                self.tracker.forget(done)
                if self.pending is not None:
                    self.pending.waits[done] = -1
            self.replan()
        return done

    def _shaped(self, team: NDArray[np.float32]) -> NDArray[np.float32]:
        """The team's reward `(W,)` of the step just made, with what potentials add."""
        assert self.shaper is not None and self._terms is not None
        self.unshaped[:] = team
        self._terms.terms(self.env, out=self.next_phi)
        extra = self.shaper.step(self.next_phi, self.env.terminated)
        self._added += extra
        return team + extra

    def _begin_shaping(self, which: NDArray[np.bool_]) -> None:
        """Episodes begin in the worlds `which` (bool `(W,)`): what their first states are worth."""
        if self.shaper is not None and self._terms is not None:
            self._terms.terms(self.env, which, self.phi)
            self.shaper.begin(self.phi, which)
            self._added[which] = 0

    def _count_episodes(self, done: NDArray[np.bool_]) -> None:
        e, env = self.episodes, self.env
        e.count += int(done.sum())
        success = env.terminated & done
        e.success += int(success.sum())
        own = self.planners[0][1] if self.planners else np.ones(len(done), bool)
        e.own_count += int((done & own).sum())
        e.own_success += int((success & own).sum())
        e.length_of_success += int(env.steps[success].sum())
        task, intrinsic, collisions = self._sums[:, done].sum(1)
        e.task_return += float(task)
        e.intrinsic_return += float(intrinsic)
        e.shaping_return += float(self._added[done].sum())
        e.collisions += int(collisions)

    @property
    def task_return(self) -> NDArray[np.float64]:
        """The task reward of each world's episode so far, float64 `(W,)`."""
        return np.asarray(self._sums[0])

    def take_episodes(self) -> Episodes:
        """The sums over episodes that finished since the last call."""
        taken, self.episodes = self.episodes, Episodes()
        return taken

    # -- planning ------------------------------------------------------------------------------

    def replan(self) -> None:
        """Use the plans that came, then ask the planners for the agents that need a subgoal."""
        tracker = self.tracker
        if tracker is None:
            return
        self._use_late()
        if self.config.review:
            self._review()
        needing = tracker.need.any(1) & self.active
        if not needing.any():
            return
        for planner, mine in self.planners:
            rows = np.flatnonzero(needing & mine)
            if self.pending is not None and planner is self.pending.planner:
                # Few at a time, each world in its turn: a plan for many comes when they all have moved on.
                some, rows = self.pending.turn(rows)
                if len(some):
                    self._plan(planner, some)
            if len(rows):
                self._plan(planner, rows)
        tracker.write_features(needing)

    def _review(self) -> None:
        """Let planners that can tell take back subgoals that have been in flight for a while."""
        env, tracker = self.env, self.tracker
        assert tracker is not None
        agents = np.arange(env.num_agents)
        old = (tracker.age > 0) & (tracker.age % self.config.review == 0) & (tracker.kind > 0) & ~tracker.need
        for planner, mine in self.planners:
            if isinstance(planner, Reviewer) and planner.reviews:
                rows = np.flatnonzero((old & self.active[:, None]).any(1) & mine)
                if len(rows):
                    request = tracker.request(rows, distance=True, again=old[rows])
                    # Bits of their own: what planners draw later doesn't depend on whether there are reviews.
                    keys = tracker.keys[rows, None] ^ (tracker.tick[rows, None] * env.num_agents + agents).astype(
                        np.uint64
                    )
                    tracker.need[rows] |= planner.review(request, tracker.kind[rows], tracker.task[rows], keys)

    def finish_plans(self) -> None:
        """Wait for all plans under way, if they have a lag, and use them: nothing is left that a checkpoint lacks.

        Plans without a lag go on: a run that resumes from a checkpoint asks anew.
        """
        if self.tracker is not None and (self.pending is None or self.pending.lag is not None):
            self._use_late(everything=True)

    def flush(self) -> None:
        """Write what planners keep on the disk."""
        for planner, _ in self.planners:
            if isinstance(planner, ModelPlanner):
                planner.flush()

    def close(self) -> None:
        """End the threads that plan beside the simulation, and write what planners keep on the disk."""
        if self.pending is not None:
            self.pending.close()
        self.flush()

    def _plan(self, planner: Planner, rows: NDArray[np.int64]) -> None:
        tracker = self.tracker
        assert tracker is not None
        start = time.perf_counter()
        before = _told(tracker.counts)
        # The fallback needs path lengths too, but only when it is asked.
        request = tracker.request(rows, distance=planner.needs_distance)
        settled = Plan.empty(request)
        if self.pending is not None and planner is self.pending.planner:
            rounds, todo, tries = self._plan_beside(self.pending, request, settled)
        else:
            rounds, todo, tries = self._plan_now(planner, request, settled)
        tracker.assign(request, settled, request.need)
        took = time.perf_counter() - start
        spent = self.plan_time[planner.name]
        spent.seconds += took
        spent.rounds += len(rows)
        self._log(planner, rows, settled, request.need, before)
        if self.on_plan is not None and (self.trace_all or planner.cost == "model"):
            for i, w in enumerate(rows.tolist()):
                if self._tells(w, i, *(plan for plan, _, _ in rounds)):
                    self.on_plan(self._trace(planner, request, rounds, settled, todo, tries, i, w, took))

    def _tells(self, world: int, i: int, *plans: Plan) -> bool:
        """Whether the round of this world, row `i` of these plans, is traced."""
        return self.traced is None or world < self.traced or any(p.told is not None and p.told[i] for p in plans)

    def _plan_now(self, planner: Planner, request: PlanRequest, settled: Plan) -> _Told:
        """Ask, check, send back what was refused, then fall back; into `settled`."""
        tracker = self.tracker
        assert tracker is not None
        todo = request.need.copy()
        verdict = np.zeros(todo.shape, np.int8)
        tries = np.zeros(todo.shape, np.int8)
        rounds: list[tuple[Plan, NDArray[np.bool_], NDArray[np.int8]]] = []
        for attempt in range(self.config.retries + 1):
            if attempt:
                tracker.counts.retried += int(todo.sum())
            request.rejected[:] = verdict
            plan = planner.plan(_narrow(request, todo))
            verdict = tracker.check(request, plan, todo)
            accepted = todo & (verdict == Verdict.ACCEPTED)
            _merge(settled, plan, accepted)
            rounds.append((plan, todo.copy(), verdict.copy()))
            tracker.counts.add(plan.counts)
            todo &= ~accepted
            tries += todo
            if not todo.any():
                break
            _mark_refused(request, plan, todo)
        if todo.any():
            tracker.counts.fallback += int(todo.sum())
            self._fall_back(request, settled, todo)
        return rounds, todo, tries

    def _plan_beside(self, pending: PendingPlans, request: PlanRequest, settled: Plan) -> _Told:
        """Settle who needs no model, give the others something to do, and let the model work on their plans."""
        tracker = self.tracker
        assert tracker is not None
        i, a = np.nonzero(request.need)
        pending.waits[request.rows[i], a] = -1
        busy = pending.busy or not pending.has_turn(request.rows)
        asking = pending.planner.begin(request, split=True, busy=busy)
        now = request.need & ~asking.open
        verdict = tracker.check(request, asking.plan, now)
        refused = now & (verdict != Verdict.ACCEPTED)
        _merge(settled, asking.plan, now & ~refused)
        tracker.counts.fallback += int(refused.sum())
        tracker.counts.provisional += int(asking.open.sum())
        if busy:
            tracker.counts.skipped += int(asking.open.sum())
        elif asking.asks:
            pending.ask(asking, request.tick)
        if (todo := refused | asking.open).any():
            self._fall_back(request, settled, todo)
        return [(asking.plan, now, verdict)], refused, refused.astype(np.int8)

    def _use_late(self, *, everything: bool = False) -> None:
        """Check the plans that came against the scene of now, and put the good ones in the place of what agents do."""
        tracker, pending = self.tracker, self.pending
        assert tracker is not None
        tick = int(tracker.tick[0])
        for planner, _ in self.planners:
            if isinstance(planner, RecordedPlanner):
                for rows, plan, which in planner.late(tick, tracker.kind.shape[1], after=everything):
                    self._replace(planner, rows, plan, which)
        for ticket in pending.due(tick, everything=everything) if pending is not None else ():
            self._use(ticket, tick)

    def _use(self, ticket: Ticket, tick: int) -> None:
        pending, tracker = self.pending, self.tracker
        assert pending is not None and tracker is not None
        start, answers = time.perf_counter(), ticket.future.result()
        spent = self.plan_time[pending.planner.name]
        before = _told(tracker.counts)
        asked, still = ticket.asking.request, pending.waiting(ticket)
        tracker.counts.late_outdated += int((ticket.asking.open & ~still).sum())
        if isinstance(answers, Exception):
            tracker.counts.late_refused += int(still.sum())
            still[:] = False
            plan = Plan.empty(asked)
        else:
            plan = pending.planner.end(ticket.asking, answers)
        tracker.counts.late_steps += (tick - ticket.tick) * int(still.sum())
        verdict = self._replace(pending.planner, asked.rows, plan, still, before)
        spent.seconds += time.perf_counter() - start
        if self.on_plan is not None:
            for i in np.flatnonzero(ticket.asking.open.any(1)).tolist():
                if self._tells(int(asked.rows[i]), i, plan):
                    self.on_plan(self._late_trace(ticket, plan, still, verdict, i, tick))

    def _replace(
        self,
        planner: Planner,
        rows: NDArray[np.int64],
        plan: Plan,
        which: NDArray[np.bool_],
        before: dict[str, int] | None = None,
    ) -> NDArray[np.int8]:
        """Give the agents `which` (bool `(n, A)`) of the worlds `rows` their late plan, where it fits the scene.

        Returns:
            int8 `(n, A)`, the `Verdict` on each one's.
        """
        tracker = self.tracker
        assert tracker is not None
        before = _told(tracker.counts) if before is None else before
        put, verdicts = np.zeros_like(which), np.zeros(which.shape, np.int8)
        if which.any():
            # The check writes path fields, which who keeps what it has still needs.
            i, a = np.nonzero(which)
            fields = tracker.field[rows[i], a].copy()
            # Who is refused keeps its task, which another may have been given for it: so once more without it.
            good, asked = which, int(which.sum())
            while good.any():
                request = tracker.request(rows, distance=False, again=good)
                verdict = tracker.check(request, plan, good)
                verdicts[good] = verdict[good]
                if not (refused := good & (verdict != Verdict.ACCEPTED)).any():
                    had = (tracker.kind[rows], tracker.cell[rows], tracker.task[rows])
                    # Who does it already goes on as it is, with the time that is left.
                    put = good & ~((had[0] == plan.kind) & (had[1] == plan.cell) & (had[2] == plan.task))
                    break
                good = good & ~refused
            kept = ~put[i, a]
            tracker.field[rows[i[kept]], a[kept]] = fields[kept]
            if put.any():
                tracker.assign(request, plan, put)
                changed = np.zeros(len(tracker.kind), bool)
                changed[rows[put.any(1)]] = True
                tracker.write_features(changed)
            tracker.counts.late += int(good.sum())
            tracker.counts.late_refused += asked - int(good.sum())
        tracker.counts.add(plan.counts)
        self._log(planner, rows, plan, put, before, late=True)
        return verdicts

    def _log(
        self,
        planner: Planner,
        rows: NDArray[np.int64],
        plan: Plan,
        which: NDArray[np.bool_],
        before: dict[str, int],
        *,
        late: bool = False,
    ) -> None:
        """A line of the record: who got what, and what was counted on the way."""
        tracker = self.tracker
        assert tracker is not None
        if self.on_subgoals is None or planner.cost != "model":
            return
        i, a = np.nonzero(which)
        got = (rows[i], a, plan.kind[i, a], plan.cell[i, a], plan.task[i, a])
        packed = np.stack([np.asarray(x, "<i4") for x in got], 1)
        counted = {k: v - before[k] for k, v in _told(tracker.counts).items() if v != before[k]}
        if late and not counted:
            return
        line = {"tick": int(tracker.tick[0]), "subgoals": base64.b64encode(packed.tobytes()).decode("ascii")}
        self.on_subgoals(line | ({"late": True} if late else {}) | ({"counts": counted} if counted else {}))

    def _fall_back(self, request: PlanRequest, settled: Plan, todo: NDArray[np.bool_]) -> None:
        """For agents whom no planner gave anything: the nearest open candidate, else wait."""
        tracker = self.tracker
        assert tracker is not None
        lengths = request.distance
        if lengths is None:
            lengths = tracker.distances(request, todo)
        choice = np.full(todo.shape, -1, np.int64)
        c = request.candidates
        nearest_choice(todo, c.kind, c.task, lengths, request.taken.copy(), choice)
        plan = Plan.chosen(request, choice)
        refused = todo & (tracker.check(request, plan, todo) != Verdict.ACCEPTED)
        _merge(settled, plan, todo & ~refused)
        if refused.any():
            wait = Plan.empty(request)
            tracker.check(request, wait, refused)
            _merge(settled, wait, refused)

    def _trace(
        self,
        planner: Planner,
        request: PlanRequest,
        rounds: list[tuple[Plan, NDArray[np.bool_], NDArray[np.int8]]],
        settled: Plan,
        fallback: NDArray[np.bool_],
        tries: NDArray[np.int8],
        i: int,
        world: int,
        took: float,
    ) -> PlanTrace:
        tracker, env = self.tracker, self.env
        assert tracker is not None
        agents = []
        note: dict[str, Any] = {}
        told = [plan.notes(i) if plan.notes is not None else {} for plan, _, _ in rounds]
        for a in np.flatnonzero(request.need[i]):
            entry: dict[str, Any] = {"agent": int(a), "tries": int(tries[i, a])}
            for (_, asked, verdict), words in zip(rounds, told, strict=True):
                if asked[i, a]:
                    v = Verdict(int(verdict[i, a]))
                    entry["verdict"], entry["reason"] = v.name.lower(), None if v == 0 else v.reason
                    entry.update(words.get("agents", {}).get(int(a), {}))
            if "verdict" not in entry:
                # Its plan is being made: till then it does what the fallback says.
                entry |= {"verdict": "fallback", "refused": "awaited", "reason": "the model's answer is awaited"}
            elif fallback[i, a]:
                entry["refused"], entry["verdict"] = entry["verdict"], "fallback"
            kind, task = SubgoalKind(int(settled.kind[i, a])), int(settled.task[i, a])
            target = env.row_col(int(settled.cell[i, a]))
            entry.update(
                kind=kind.name.lower(), target=list(target), task=task if task >= 0 else None,
                subgoal=subgoal_text(kind, target, task),
            )  # fmt: skip
            agents.append(entry)
        for words in told:
            note.update({k: v for k, v in words.items() if k != "agents"})
        if len(told) > 1 and any("reply" in words for words in told):
            note["rounds"] = [{k: v for k, v in words.items() if k != "agents"} for words in told]
        return PlanTrace(world, int(env.steps[world]), planner.name, agents, note, 1000 * took)

    def _late_trace(
        self, ticket: Ticket, plan: Plan, still: NDArray[np.bool_], verdict: NDArray[np.int8], i: int, tick: int
    ) -> PlanTrace:
        """What the model said, and what came of it: only what was used is accepted."""
        assert self.pending is not None
        told = dict(plan.notes(i)) if plan.notes is not None else {}
        entries, agents = told.pop("agents", {}), []
        world = int(ticket.asking.request.rows[i])
        for a in np.flatnonzero(ticket.asking.open[i]).tolist():
            entry: dict[str, Any] = {"agent": a, "tries": int(verdict[i, a] > 0), "reason": None, **entries.get(a, {})}
            entry["verdict"] = "accepted" if still[i, a] and not verdict[i, a] else "fallback"
            if verdict[i, a]:
                said = Verdict(int(verdict[i, a]))
                entry |= {"refused": said.name.lower(), "reason": said.reason}
            elif not still[i, a]:
                entry |= {"refused": "outdated", "reason": "the robot had moved on"}
            agents.append(entry | self._subgoal_of(world, a))
        told["late"] = tick - ticket.tick
        latency = 1000 * (time.perf_counter() - ticket.asked)
        return PlanTrace(world, int(self.env.steps[world]), self.pending.planner.name, agents, told, latency)

    def _subgoal_of(self, world: int, agent: int) -> dict[str, Any]:
        """What an agent does now, in words."""
        assert self.tracker is not None
        doing = self.tracker.subgoal(world, agent)
        if doing is None:
            return {"kind": "wait", "target": list(self.env.row_col(int(self.env.pos[world, agent]))), "task": None,
                    "subgoal": "wait"}  # fmt: skip
        return {"kind": doing.kind.name.lower(), "target": list(doing.target), "task": doing.task,
                "subgoal": doing.text}  # fmt: skip

    # -- the whole state, for checkpoints --------------------------------------------------------

    def state_dict(self) -> dict[str, NDArray[Any]]:
        """Everything that decides what happens next, as arrays by dotted names."""
        state = {f"env.{k}": v for k, v in self.env.state_dict().items()}
        if self.tracker is not None:
            state |= {f"tracker.{k}": v for k, v in self.tracker.state_dict().items()}
        for n, (planner, _) in enumerate(self.planners):
            state |= {f"planner.{n}.{k}": v for k, v in planner.arrays().items()}
        if self.shaper is not None:
            state |= {f"shaping.{k}": v for k, v in self.shaper.state_dict().items()}
            state |= {"shaping.phi": self.phi.copy(), "shaping.added": self._added.copy()}
        return state | {"begins": self.begins.copy(), "sums": self._sums.copy()}

    def load_state_dict(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Put back what `state_dict` gave."""
        self.env.load_state_dict({k[4:]: v for k, v in state.items() if k.startswith("env.")})
        if self.tracker is not None:
            self.tracker.load_state_dict({k[8:]: v for k, v in state.items() if k.startswith("tracker.")})
        if self.shaper is not None:
            self.shaper.load_state_dict({k[8:]: v for k, v in state.items() if k.startswith("shaping.")})
            self.phi[:], self._added[:] = state["shaping.phi"], state["shaping.added"]
        self.begins = state["begins"].copy()
        self._sums[:] = state["sums"]
        for n, (planner, _) in enumerate(self.planners):
            own = {k.removeprefix(f"planner.{n}."): v for k, v in state.items() if k.startswith(f"planner.{n}.")}
            if own:
                planner.load_arrays(own)


def first_episodes(
    worlds: TeamWorlds,
    act: Callable[[TeamWorlds], NDArray[np.int8]],
    acted: Callable[[], None] = lambda: None,
    settled: Callable[[NDArray[np.bool_]], None] = lambda ended: None,
) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Play the first episode of each world; nobody plans any more for worlds whose episode is over.

    Args:
        worlds: episodes begin now: behind `start` or `begin_together`.
        act: moves for all agents of all worlds, int8 `(W, A)`.
        acted: called after each `worlds.advance`, when `worlds.active` are still those that took this step.
        settled: called after each `worlds.settle` with the worlds that it found finished, bool `(W,)`; `worlds.active`
            are then those that play on.

    Returns:
        Whether all tasks were done in time, bool `(W,)`, and the steps that the episode took, int64 `(W,)`.
    """
    env = worlds.env
    running, success = np.ones(env.num_envs, bool), np.zeros(env.num_envs, bool)
    steps = np.zeros(env.num_envs, np.int64)
    while running.any():
        worlds.advance(act(worlds))
        acted()
        ended = running & (env.terminated | env.truncated)
        success[ended], steps[ended] = env.terminated[ended], env.steps[ended]
        running &= ~ended
        worlds.active = running.copy()
        settled(worlds.settle())
    return success, steps


_Told = tuple[list[tuple[Plan, NDArray[np.bool_], NDArray[np.int8]]], NDArray[np.bool_], NDArray[np.int8]]
"""How a round went: each plan with who was asked and the verdicts, who got the fallback, how many tries each took."""


def _told(counts: Counts) -> dict[str, int]:
    """The counts that only planning changes and that a record must tell, by name."""
    rejected = {f"rejected_{k}": v for k, v in counts.rejected.items()}
    return {k: v for k, v in vars(counts).items() if k not in _OWN} | rejected


# What a repeated run counts by itself.
_OWN = frozenset({"given", "reached", "failed", "timed_out", "rejected"})


def _mark_refused(request: PlanRequest, plan: Plan, which: NDArray[np.bool_]) -> None:
    """Note which candidates the rejected proposals were."""
    c = request.candidates
    same = (c.kind == plan.kind[..., None]) & (c.cell == plan.cell[..., None]) & (c.task == plan.task[..., None])
    request.refused[:] |= same & which[..., None]


def _narrow(request: PlanRequest, todo: NDArray[np.bool_]) -> PlanRequest:
    """The request for the agents that are still to be settled."""
    if (todo == request.need).all():
        return request
    return replace(request, need=todo)


def _merge(into: Plan, plan: Plan, which: NDArray[np.bool_]) -> None:
    into.kind[which] = plan.kind[which]
    into.cell[which] = plan.cell[which]
    into.task[which] = plan.task[which]
