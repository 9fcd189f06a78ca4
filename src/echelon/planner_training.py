"""Training a planner by itself: on scenes of many worlds and sizes, with executors that need no learning.

First it imitates a planner that is known to be good, then it learns from what its own plans bring. The executors are
classical ones (PIBT), so that what is learnt doesn't depend on any trained team, and a step costs next to nothing; what
costs is the language model, whose passes are few because questions come again (see `llm.policy`).
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from echelon._files import JsonLines, atomic_write_text, lines_of, only_writer, read_json, remove_leftovers
from echelon.algorithms.decisions import Decisions
from echelon.algorithms.himac import HiMAC, HiMACConfig
from echelon.algorithms.hiper import HiPER, HiPERConfig, Turns
from echelon.building import save_planner
from echelon.checkpoints import Checkpoint, newest_checkpoint, save_checkpoint
from echelon.envs import GridConfig, RepairConfig, SearchConfig, WarehouseConfig, env_name, make
from echelon.errors import EchelonError
from echelon.executors import PIBTExecutor
from echelon.growing import (
    FEATURES_OF_A_TURN,
    EpisodeRecorder,
    Lessons,
    TurnRecorder,
    imitation_update,
)
from echelon.llm.distributed import cores, shared_policy
from echelon.llm.policy import ChoicePolicy, PolicyConfig
from echelon.llm.prompts import PromptTemplate
from echelon.planners import make_rule_planner
from echelon.planners.base import Planner
from echelon.planners.llm import LEARNED_PROMPTS, TEMPLATES, LLMPlanner
from echelon.rng import spawn_keys
from echelon.rollout import TeamWorlds, first_episodes
from echelon.rollouts import Watch
from echelon.subgoals import FEATURES, SubgoalConfig

__all__ = ["PRESETS", "PlannerConfig", "PlannerTrainer", "join_turns", "random_scene"]


@dataclass(frozen=True)
class PlannerConfig:
    """How a planner is trained by itself. All defaults are our choice."""

    model: str = "smollm2-135m"
    """The language model to begin with: a known name, or hf:<folder or id>; an adapter goes on from where it is."""
    seed: int = 0
    """The root seed: it alone decides everything."""
    teacher: str = "hungarian"
    """Who is imitated first: random-task, nearest or hungarian."""
    imitation: int = 300
    """Updates by imitation; 0: none."""
    softness: float = 0.5
    """Steps by which two of the teacher's options may differ and still be nearly as good; 0: only the best counts."""
    batch: int = 64
    """Decisions of each of these updates."""
    lessons: int = 72
    """Scenes in which the teacher is watched, 16 worlds each."""
    algorithm: Literal["himac", "hiper", "none"] = "himac"
    """How the planner goes on: comparing its plans of one task (himac), with critics (hiper), or not at all."""
    iterations: int = 30
    """How often it plays and then learns from that."""
    scenes: int = 9
    """Scenes it plays in each time."""
    worlds: int = 192
    """Worlds of each such scene; himac: a multiple of himac.group."""
    review: int = 0
    """As subgoals.review: steps after which the planner may take back a subgoal; hiper's keep and switch. 0: never."""
    min_size: int = 8
    """Smallest side of a map, in cells."""
    max_size: int = 32
    """Largest side."""
    min_agents: int = 2
    """Smallest team."""
    max_agents: int = 16
    """Largest team, where the map has room for it."""
    checkpoint_every: int = 10
    """Updates or iterations between checkpoints."""
    threads: int | None = None
    """Processor threads; default: all cores. Results don't depend on it."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    """What of the model learns."""
    himac: HiMACConfig = field(default_factory=lambda: HiMACConfig(epochs=2))
    """How himac learns."""
    hiper: HiPERConfig = field(default_factory=lambda: HiPERConfig(critic_warmup=2))
    """How hiper learns."""

    def __post_init__(self) -> None:
        for name, good, need in (
            ("seed", self.seed >= 0, "at least 0"),
            ("imitation", self.imitation >= 0, "at least 0"),
            ("softness", self.softness >= 0, "at least 0"),
            ("batch", self.batch >= 1, "at least 1"),
            ("lessons", self.lessons >= 1, "at least 1"),
            ("iterations", self.iterations >= 0, "at least 0"),
            ("scenes", self.scenes >= 1, "at least 1"),
            ("worlds", self.worlds >= 1, "at least 1"),
            ("review", self.review >= 0, "at least 0"),
            ("min_size", self.min_size >= 8, "at least 8"),
            ("max_size", self.max_size >= self.min_size, "at least min_size"),
            ("min_agents", self.min_agents >= 1, "at least 1"),
            ("max_agents", self.max_agents >= self.min_agents, "at least min_agents"),
            ("checkpoint_every", self.checkpoint_every >= 1, "at least 1"),
            ("threads", self.threads is None or self.threads >= 1, "at least 1"),
        ):
            if not good:
                raise EchelonError(f"{name} is {getattr(self, name)}: it must be {need}")
        if self.algorithm == "himac" and self.worlds % self.himac.group:
            raise EchelonError(f"worlds is {self.worlds}: it must be a multiple of himac.group ({self.himac.group})")
        make_rule_planner(self.teacher)


PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "imitation": {"algorithm": "none", "iterations": 0},
    "small": {"imitation": 20, "lessons": 12, "iterations": 4, "worlds": 16},
}
"""What `--preset` sets."""


def random_scene(number: int, config: PlannerConfig, rng: np.random.Generator) -> GridConfig:
    """A world of some kind, size and team; kinds take turns."""
    size = int(rng.integers(config.min_size, config.max_size + 1))
    most = max(config.min_agents, min(config.max_agents, size * size // 24))
    agents = int(rng.integers(config.min_agents, most + 1))
    tasks = int(rng.integers(agents, 3 * agents + 1))
    if number % 3 == 0:
        return WarehouseConfig(size=size, num_agents=agents, num_packages=tasks, num_zones=int(rng.integers(1, 4)))
    if number % 3 == 1:
        return SearchConfig(
            size=size, num_agents=agents, num_targets=int(rng.integers(4, 9)), regions=int(rng.integers(2, 6))
        )
    return RepairConfig(size=size, num_agents=agents, num_machines=tasks, num_tools=int(rng.integers(2, 5)))


def join_turns(parts: list[Turns], rows: list[int]) -> Turns:
    """The turns of several batches; `rows` are how many decisions each batch has."""
    found: dict[str, list[Any]] = {name: [] for name in ("trajectory", "choice", "review")}
    paths = decisions = 0
    for turns, own in zip(parts, rows, strict=True):
        found["trajectory"].append(turns.trajectory + paths)
        for name in ("choice", "review"):
            x = getattr(turns, name)
            found[name].append(np.where(x >= 0, x + decisions, -1))
        paths += len(turns.last)
        decisions += own
    rest = {
        name: np.concatenate([getattr(t, name) for t in parts])
        for name in ("reward", "switch", "done", "before", "after", "last", "discount_steps")
    }
    return Turns(**{name: np.concatenate(x) for name, x in found.items()}, **rest)


class PlannerTrainer:
    """One training of a planner: a folder with its config, metrics, checkpoints, and at last the `planner`.

    Attributes:
        config: its settings.
        folder: where it lives.
        stage: "imitation", "reinforcement" or "done"; step: updates or iterations done in it.
        planner, policy: who learns.
    """

    def __init__(self, config: PlannerConfig, folder: Path) -> None:
        """Prepare it, or go on with what `folder` holds.

        Raises:
            EchelonError: the folder holds another training, a damaged one or one without its checkpoints, or the model
                can't be used.
        """
        self.config, self.folder = config, folder
        identity = json.dumps(dataclasses.asdict(dataclasses.replace(config, threads=None)), sort_keys=True)
        if (folder / "training.json").exists():
            before = read_json(folder / "training.json", "planner training")
            if json.dumps(before.get("config"), sort_keys=True) != identity:
                raise EchelonError(f"{folder} holds a training with other settings: choose another --out")
        done = len(lines_of(folder / "metrics.jsonl"))
        # It saves one after imitation too.
        checkpoint = newest_checkpoint(folder, saved_once=done > min(config.checkpoint_every, config.imitation))
        shared = PromptTemplate.from_file(LEARNED_PROMPTS / TEMPLATES[0]).render()
        # Under torchrun only the leader comes back from here.
        self.policy = shared_policy(
            lambda: ChoicePolicy.load(
                config.model, shared, config.policy, threads=config.threads or cores(), seed=config.seed
            )
        )
        self.planner = LLMPlanner(self.policy, folder=LEARNED_PROMPTS)
        self.learner: HiMAC | HiPER | None = None
        if config.algorithm == "himac":
            self.learner = HiMAC(config.himac, self.policy, config.seed)
        elif config.algorithm == "hiper":
            self.learner = HiPER(config.hiper, self.policy, FEATURES_OF_A_TURN, config.seed)
        self.stage, self.step, self.seconds, self._size = "imitation", 0, 0.0, 0
        self.steps_played = self.decisions_made = 0
        self._lessons: tuple[Decisions, NDArray[Any]] | None = None  # with what imitation of them aims at
        if checkpoint is not None:
            self._load(checkpoint)
        with only_writer(folder):
            remove_leftovers(folder)
            atomic_write_text(folder / "training.json", json.dumps({"config": json.loads(identity)}, indent=1) + "\n")

    def run(
        self,
        report: Callable[[dict[str, Any]], None] = lambda line: None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Train; whether it is done, and not stopped.

        Args:
            report: called with each line of `metrics.jsonl`.
            should_stop: asked after each update or iteration; a checkpoint is then saved.
        """
        c = self.config
        with only_writer(self.folder):
            log = JsonLines(self.folder / "metrics.jsonl", self._size)
            try:
                while self.stage != "done":
                    start = time.perf_counter()
                    line = self._imitate() if self.stage == "imitation" else self._reinforce()
                    self.seconds += time.perf_counter() - start
                    if line is not None:
                        log.write(line)
                        report({**line, "seconds": self.seconds})
                    stop = should_stop()
                    if stop or self.stage == "done" or self.step % c.checkpoint_every == 0:
                        self._size = log.sync()
                        self._save()
                    if stop and self.stage != "done":
                        return False
            finally:
                log.close()
        return True

    # -- imitation -------------------------------------------------------------------------------

    def _imitate(self) -> dict[str, Any] | None:
        """One update by imitation, then on to reinforcement when all are done."""
        c = self.config
        if self.step >= c.imitation:
            self._begin_reinforcement()
            return None
        if self._lessons is None:
            self._lessons = self._watch_teacher()
        key = int(spawn_keys(c.seed, (31,), 1)[0])
        told = imitation_update(self.policy, *self._lessons, self.step, count=c.imitation, batch=c.batch, key=key)
        self.step += 1
        return {"stage": "imitation", "step": self.step, **told}

    def _watch_teacher(self) -> tuple[Decisions, NDArray[Any]]:
        """What the teacher chose in many scenes, and what imitation of it aims at."""
        c = self.config
        lessons = Lessons(make_rule_planner(c.teacher), self.planner)
        self.steps_played = 0  # a training that goes on watches once more
        for k in range(c.lessons):
            rng = self._rng(32, k)
            worlds = self._worlds(random_scene(k, c, rng), 16, rng, lessons)
            worlds.start()
            self._play(worlds)
        if not lessons.choices:
            raise EchelonError(f"lessons is {c.lessons}: {c.teacher} never had a choice in these scenes; watch more")
        return lessons.told(softness=c.softness, reviews=bool(c.review))

    def _begin_reinforcement(self) -> None:
        goes_on = self.learner is not None and self.config.iterations > 0
        self.stage, self.step = "reinforcement" if goes_on else "done", 0
        if self.config.imitation:
            self.save_planner(self.folder / "imitated")
        self._lessons = None
        self.policy.warm_up(0, 0)
        self.policy.anchor()
        self.planner.forget()

    # -- reinforcement ---------------------------------------------------------------------------

    def _reinforce(self) -> dict[str, Any]:
        """Play some scenes, and learn from what the plans brought."""
        c = self.config
        assert self.learner is not None
        parts: list[Decisions] = []
        turns: list[Turns] = []
        episodes, scores, groups, success, makespan, asked = [], [], [], [], [], []
        for k in range(c.scenes):
            number = self.step * c.scenes + k
            rng = self._rng(33, number)
            worlds = self._worlds(random_scene(number, c, rng), c.worlds, rng, self.planner)
            watch = (
                EpisodeRecorder(worlds, self.planner)
                if c.algorithm == "himac"
                else TurnRecorder(worlds, self.planner, c.hiper.gamma)
            )
            watch.begin()
            if isinstance(watch, EpisodeRecorder):
                worlds.begin_together(c.himac.group)
                watch.given()
            else:
                worlds.start()
                watch.settled(np.ones(c.worlds, bool))
            won, took = self._play(worlds, watch)
            success.append(won.mean())
            makespan.append(took.mean())
            if isinstance(watch, EpisodeRecorder):
                decisions, of = watch.finish()
                episodes.append(of + c.worlds * k)
                scores.append(watch.scores)
                groups.append(np.arange(c.worlds) // c.himac.group + c.worlds * k)
            else:
                own, decisions = watch.finish()
                turns.append(own)
            parts.append(decisions)
            asked += [*(x.places for x in watch.choices), *(x.place for x in watch.reviews)]
        self.decisions_made += sum(len(p) for p in parts)
        if isinstance(self.learner, HiMAC):
            told = self.learner.macro(
                Decisions.join(parts), np.concatenate(episodes), np.concatenate(scores), np.concatenate(groups)
            )
        else:
            told = self.learner.update(join_turns(turns, [len(p) for p in parts]), Decisions.join(parts))
        self.planner.forget(asked)
        self.step += 1
        if self.step >= c.iterations:
            self.stage = "done"
        return {"stage": "reinforcement", "step": self.step, "tsr": float(np.mean(success)),
                "makespan": float(np.mean(makespan)), "env_steps": self.steps_played,
                "decisions": self.decisions_made, **told}  # fmt: skip

    def _worlds(self, env: GridConfig, count: int, rng: np.random.Generator, planner: Planner) -> TeamWorlds:
        seed = int(rng.integers(1 << 31))
        worlds = make(env_name(env), env, num_envs=count, seed=seed, extra_features=FEATURES)
        everywhere = [(planner, np.ones(count, bool))]
        config = SubgoalConfig(review=self.config.review)
        return TeamWorlds(worlds, everywhere, config, gamma=0.99, seed=seed)

    def _play(self, worlds: TeamWorlds, watch: Watch | None = None) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
        """Every world's first episode under classical executors: success and makespan (steps) of each."""
        hooks = () if watch is None else (watch.acted, watch.settled)
        won, took = first_episodes(worlds, PIBTExecutor(worlds).act, *hooks)
        self.steps_played += int(took.max()) * len(took)
        return won, took

    def _rng(self, stream: int, number: int) -> np.random.Generator:
        key = int(spawn_keys(self.config.seed, (stream,), 1)[0])
        return np.random.Generator(np.random.Philox(key=key, counter=[0, number, 0, 0]))

    # -- state -------------------------------------------------------------------------------------

    def _save(self) -> None:
        progress = {"stage": self.stage, "step": self.step, "seconds": self.seconds, "size": self._size,
                    "played": self.steps_played, "decisions": self.decisions_made,
                    "planner": self.planner.state_dict()}  # fmt: skip
        tensors = {f"policy.{k}": v for k, v in self.policy.state_dict().items()}
        if self.learner is not None:
            tensors |= {f"learner.{k}": v for k, v in self.learner.state_dict().items()}
        done = self.step + (self.config.imitation if self.stage != "imitation" else 0)
        if self.stage == "done":
            done = self.config.imitation + self.config.iterations
        save_checkpoint(self.folder / "checkpoints", done, Checkpoint(progress, self.planner.arrays(), tensors))
        if self.stage == "done":
            self.save_planner(self.folder / "planner")

    def save_planner(self, folder: Path) -> None:
        """Write the planner's adapter and templates, fit for `--model hf:<folder>`."""
        save_planner(self.policy, self.planner, folder)

    def _load(self, checkpoint: Checkpoint) -> None:
        p = checkpoint.progress
        self.stage, self.step, self.seconds, self._size = p["stage"], p["step"], p["seconds"], p["size"]
        self.steps_played, self.decisions_made = p["played"], p["decisions"]
        self.policy.load_state_dict({k[7:]: v for k, v in checkpoint.algorithm.items() if k.startswith("policy.")})
        if self.learner is not None:
            self.learner.load_state_dict(
                {k[8:]: v for k, v in checkpoint.algorithm.items() if k.startswith("learner.")}
            )
        self.planner.load_state_dict(p["planner"])
        self.planner.load_arrays(checkpoint.worlds)
        if self.stage != "imitation":
            self.policy.warm_up(0, 0)
