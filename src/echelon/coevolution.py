"""A planner that learns and its executors, growing together: what one update of such a run is.

HiPER: a window of rollouts in which the planner draws its subgoals, then it learns from the turns. HiMAC: a macro
phase, in which groups of worlds play the same episode under plans that the planner draws, executors as they are and
greedy; then a micro phase, in which executors learn under the best plan of each group (`GrowthConfig` sets the
schedule). Before anything else the planner imitates one that is known to be good.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from echelon.algorithms.himac import HiMAC, HiMACConfig
from echelon.algorithms.hiper import HiPER, HiPERConfig
from echelon.building import build_worlds, prompts_of
from echelon.configs import RunConfig
from echelon.errors import EchelonError
from echelon.executors import PIBTExecutor
from echelon.growing import (
    FEATURES_OF_A_TURN,
    Blueprints,
    EpisodeRecorder,
    Lessons,
    TurnRecorder,
    imitation_update,
)
from echelon.llm import locate
from echelon.llm.policy import LearningChoice
from echelon.planners import make_rule_planner
from echelon.planners.llm import LLMPlanner
from echelon.rng import spawn_keys
from echelon.rollout import PlanTrace
from echelon.rollouts import Clock, Rollouts

__all__ = ["GrowingRollouts"]


class GrowingRollouts(Rollouts):
    """Rollouts in which the planner learns, too.

    Attributes:
        warmed: updates by imitation done.
        planner, policy: who plans, and its model.
        learner: how it learns.
    """

    def __init__(
        self,
        config: RunConfig,
        on_plan: Callable[[PlanTrace], None] | None = None,
        on_subgoals: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        """Build everything.

        Raises:
            EchelonError: a setting, map or model can't be used.
        """
        super().__init__(config, on_plan, on_subgoals)
        config = self.config
        planner = self.worlds.planners[0][0]
        assert isinstance(planner, LLMPlanner) and isinstance(planner.model, LearningChoice)
        self.planner, self.policy = planner, planner.model
        if not planner.reviews:
            raise EchelonError(
                f"method {config.method} trains its planner: its prompt (planning.prompts) must be about one option, "
                f"and tell {{nearer}}, {{after}} or {{gain}}"
            )
        self.learner: HiPER | HiMAC
        if isinstance(config.learner, HiPERConfig):
            self.learner = HiPER(config.learner, self.policy, FEATURES_OF_A_TURN, config.seed)
            self.passes = config.growth.window
        else:
            assert isinstance(config.learner, HiMACConfig)
            self.learner = HiMAC(config.learner, self.policy, config.seed)
            self._macro = -(-self.worlds.env.limit // self.buffer.steps)
            plays = {"alternate": self._macro + config.growth.practice, "executor": config.growth.practice}
            self.passes = plays.get(config.growth.schedule, self._macro)
        self.steps_per_update *= self.passes
        self.updates = self.warmed = 0
        self._warm = False

    def start(self) -> None:
        """Plan the first subgoals; before that let the planner imitate, if it has not."""
        if not self._warm:
            self.warm_up()
        self.worlds.start()

    def warm_up(
        self,
        report: Callable[[int, int], None] = lambda done, total: None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Let the planner imitate another, whether it is done.

        The reference that the planner is later held to is what this made of it.

        Args:
            report: called with the updates done and wanted.
            should_stop: asked after each; called again, also in another process with this state, it goes on.
        """
        c = self.config
        teacher = c.growth.warm_start
        if teacher == "auto":
            teacher = "off" if prompts_of(c.model_spec) == locate(c.model_spec) else "hungarian"
        if teacher != "off" and c.growth.warm_updates:
            seed = int(spawn_keys(c.seed, (34,), 1)[0] >> np.uint64(33))
            lessons = Lessons(make_rule_planner(teacher), self.planner)
            worlds = build_worlds(c, num_envs=64, seed=seed, training=False, planner=lessons)
            executor = PIBTExecutor(worlds)
            worlds.start()
            for _ in range(c.growth.warm_steps):
                worlds.advance(executor.act(worlds))
                worlds.settle()
            decisions, targets = lessons.told(softness=c.growth.warm_softness, reviews=bool(c.subgoals.review))
            key = int(spawn_keys(c.seed, (35,), 1)[0])
            count = c.growth.warm_updates if len(decisions) else 0
            while self.warmed < count:
                imitation_update(self.policy, decisions, targets, self.warmed, count=count, batch=c.growth.warm_batch,
                                 key=key)  # fmt: skip
                self.warmed += 1
                report(self.warmed, count)
                if self.warmed < count and should_stop():
                    return False
        self.policy.warm_up(0, 0)
        self.policy.anchor()
        self.planner.forget()
        self._warm = True
        return True

    def update(self) -> tuple[Clock, dict[str, float]]:
        """One update of planner, executors or both, as the schedule says: where its time went, and what to log."""
        clock = Clock()
        learnt = self._himac(clock) if isinstance(self.learner, HiMAC) else self._hiper(clock)
        self.updates += 1
        return clock, learnt

    def _hiper(self, clock: Clock) -> dict[str, float]:
        schedule = self.config.growth.schedule
        planner = schedule in ("joint", "planner") or (schedule == "alternate" and self.updates % 2 == 1)
        executors = schedule in ("joint", "executor") or (schedule == "alternate" and self.updates % 2 == 0)
        told: dict[str, float] = {}
        assert isinstance(self.learner, HiPER)
        watch = TurnRecorder(self.worlds, self.planner, self.learner.config.gamma) if planner else None
        if watch is not None:
            watch.begin()
        self._watch = watch
        for _ in range(self.passes):
            self.collect(clock)
            if executors:
                told |= self.learn(clock)
        self._watch = None
        if watch is not None:
            told |= self._named(self.learner.update(*watch.finish()))
            watch.renew()
            clock.lap("planner")
        return told

    def _himac(self, clock: Clock) -> dict[str, float]:
        assert isinstance(self.learner, HiMAC)
        schedule, worlds, env = self.config.growth.schedule, self.worlds, self.worlds.env
        group, W = self.learner.config.group, env.num_envs
        first = env.counters.reshape(-1, group).max(1).repeat(group)
        told: dict[str, float] = {}
        # Executors that learn from these steps too must not idle through the rest of them.
        watch = EpisodeRecorder(worlds, self.planner, rest=schedule != "joint")
        watch.begin()
        self.planner.explore = schedule != "executor"
        worlds.begin_together(group)
        watch.given()
        if schedule == "executor":
            watch.stop()
            worlds.active = np.ones(W, bool)
        else:
            self._watch = watch
            for _ in range(self._macro):
                self.collect(clock, greedy=schedule != "joint")
                if schedule == "joint":
                    told |= self.learn(clock)
            self._watch = None
            decisions, of = watch.finish()
            groups = np.arange(W) // group
            told |= self._named(self.learner.macro(decisions, of, watch.scores, groups))
            best = self.learner.pick(watch.scores, groups)
            watch.renew()
            clock.lap("planner")
        if schedule in ("alternate", "executor"):
            mine = worlds.planners[0][1]
            if schedule == "alternate":
                blueprints = Blueprints(self.planner, watch.blueprint[best[groups]], worlds)
                worlds.planners[0] = (blueprints, mine)
                worlds.plan_time[blueprints.name] = worlds.plan_time[self.planner.name]
                # The task of the macro phase once more, and again when it is done.
                env.counters[:] = worlds.repeat = first
                worlds.begin_together(group)
                self._watch = blueprints
            for _ in range(self.config.growth.practice):
                self.collect(clock)
                told |= self.learn(clock)
            worlds.planners[0], worlds.repeat, self._watch = (self.planner, mine), None, None
        return told

    def _named(self, told: dict[str, float]) -> dict[str, float]:
        return {f"planner_{name}": value for name, value in told.items()}

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Everything that learns, as tensors by name."""
        state = {f"policy.{k}": v for k, v in self.policy.state_dict().items()}
        state |= {f"learner.{k}": v for k, v in self.learner.state_dict().items()}
        return (
            super().state_dict()
            | state
            | {
                "growth.updates": torch.tensor(self.updates),
                "growth.warmed": torch.tensor(self.warmed),
            }
        )

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Put back what `state_dict` gave."""

        def part(prefix: str) -> dict[str, torch.Tensor]:
            return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}

        own = ("policy.", "learner.", "growth.")
        super().load_state_dict({k: v for k, v in state.items() if not k.startswith(own)})
        self.policy.load_state_dict(part("policy."))
        self.policy.warm_up(0, 0)
        self.learner.load_state_dict(part("learner."))
        self.updates, self.warmed = int(state["growth.updates"]), int(state["growth.warmed"])
