"""The loop that trains a team of language models on one joint reward, and makes it survive anything.

A run is a folder: `config.toml`, `versions.json`, `metrics.jsonl` and `evaluations.jsonl` (bit-identical for a seed),
`dialogues.jsonl` (what was asked, written and earned), `timings.jsonl`, `checkpoints/`, and at last the `team`. Work
between two checkpoints is done again after a crash and comes out the same.
"""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from echelon._files import JsonLines, atomic_write_json, atomic_write_text, lines_of, only_writer, remove_leftovers
from echelon.algorithms.decisions import learn
from echelon.algorithms.teams import TeamAlgorithm, team_algorithms
from echelon.checkpoints import Checkpoint, newest_checkpoint, save_checkpoint
from echelon.errors import EchelonError
from echelon.llm.teams import load_team, load_team_state, save_team, team_state
from echelon.llm.token_policy import TokenPolicy, TokenSample
from echelon.rollouts import Clock
from echelon.runs import versions
from echelon.tasks import OwnTask, Solvable, Teaching, TeamTask, build_task
from echelon.teams.configs import TeamRunConfig, read_team_toml, team_to_toml
from echelon.teams.rollouts import Game, Scene, Tree, grow, play

__all__ = ["TeamProgress", "TeamTrainer"]

_ITEMS, _GROWN, _JUDGED, _TAUGHT = 81, 82, 83, 84  # streams of the root seed
_LOGS = ("imitation.jsonl", "metrics.jsonl", "evaluations.jsonl", "dialogues.jsonl", "timings.jsonl")


@dataclass(frozen=True)
class TeamProgress:
    """Where a run is, for whoever shows it.

    Attributes:
        update, updates: done and wanted.
        metrics: the newest line of `metrics.jsonl` (before the first update: empty).
        evaluation: the newest evaluation, or None.
        shares: the share of the last update's time by stage.
        notes: what a person must know: items that were left out, answers that couldn't be scored.
        imitating: while the team imitates, updates by imitation done and wanted.
    """

    update: int
    updates: int
    metrics: dict[str, Any]
    evaluation: dict[str, Any] | None
    shares: dict[str, float]
    notes: tuple[str, ...] = ()
    imitating: tuple[int, int] | None = None


class TeamTrainer:
    """One run: samples, scores, learns, logs, checkpoints, resumes.

    A task of one's own takes three functions (see `echelon.tasks.FunctionTask`):

        task = FunctionTask(dataset, reward_func, formatters)
        TeamTrainer(TeamRunConfig(method="magrpo"), Path("runs/mine"), task=task).run()

    Attributes:
        config, folder: of the run.
        task: what the team works on.
        policies: one an agent; algorithm: how they learn.
        imitated, update: updates done, by imitation and after it.
    """

    def __init__(self, config: TeamRunConfig, folder: Path, *, task: TeamTask | None = None) -> None:
        """Prepare a new run; nothing is written before everything could be built.

        Args:
            config: its settings.
            folder: where it is to live.
            task: what the team works on, if that is a task of your own; None: `config.env`.

        Raises:
            EchelonError: there is a run in `folder`; a setting, task or model can't be used.
        """
        _require_free(folder)
        if task is not None:
            config = dataclasses.replace(config, env=OwnTask())
        self._build(config, folder, task)
        with only_writer(folder):
            _require_free(folder)  # once more: another process may have begun a run here meanwhile
            atomic_write_json(folder / "versions.json", versions())
            # The config last: a folder that has one is a run.
            atomic_write_text(folder / "config.toml", team_to_toml(config))

    def _build(self, config: TeamRunConfig, folder: Path, task: TeamTask | None) -> None:
        self.config, self.folder = config, folder
        torch.set_num_threads(config.threads or os.cpu_count() or 1)
        self.task = build_task(config.env) if task is None else task
        agents = len(self.task.roles)
        if len(set(self.task.roles)) < agents:
            raise EchelonError(f"the roles of task {self.task.name} name one agent twice: {', '.join(self.task.roles)}")
        if config.share == "weights" and len(config.model) > 1:
            raise EchelonError("--share weights: one model plays all agents, so name one")
        self._train, self._eval = self.task.items("train"), self.task.items("eval")
        if not len(self._train):
            raise EchelonError(f"task {self.task.name} has no items to train on")
        models = config.model[0] if len(config.model) == 1 else list(config.model)
        settings = dataclasses.asdict(config.policy)
        self.policies: list[TokenPolicy] = load_team(
            models, agents=agents, share=config.share, seed=config.seed, **settings
        )
        build = team_algorithms()[config.method][0]
        self.algorithm: TeamAlgorithm = build(config.algorithm, self.policies, config.seed)
        if config.imitation and not isinstance(self.task, Teaching):
            raise EchelonError(f"imitation is {config.imitation}, and task {self.task.name} has no teacher: leave it 0")
        self.imitated = self.update = self.samples = self.tokens = 0
        self._lessons: list[list[TokenSample]] | None = None
        self.seconds = 0.0
        self.evaluation: dict[str, Any] | None = None
        self._sizes = dict.fromkeys(_LOGS, 0)

    @classmethod
    def resume(cls, folder: Path, *, task: TeamTask | None = None, updates: int | None = None) -> TeamTrainer:
        """A run as its newest checkpoint left it.

        Args:
            folder: the run.
            task: as it was given when the run began.
            updates: train up to so many instead of what the run was started with.

        Raises:
            EchelonError: no run there, damaged files, checkpoints that are gone, or more updates done than asked for.
        """
        if not (folder / "config.toml").exists():
            raise EchelonError(f"{folder} is no run: it has no config.toml")
        config = read_team_toml(folder / "config.toml")
        if updates is not None:
            config = dataclasses.replace(config, updates=updates)
        imitated, learnt, judged = (len(lines_of(folder / f"{name}.jsonl"))
                                    for name in ("imitation", "metrics", "evaluations"))  # fmt: skip
        # It saves one at update 0 too, after the evaluation there.
        due = 0 if judged and not config.imitation else config.checkpoint_every
        checkpoint = newest_checkpoint(folder, saved_once=imitated + learnt > due)
        for place in (folder, folder / "checkpoints"):
            remove_leftovers(place)
        trainer = cls.__new__(cls)
        trainer._build(config, folder, task)
        if checkpoint is not None:
            trainer._load(checkpoint)
        if trainer.update > config.updates:
            raise EchelonError(f"{folder} has {trainer.update} updates already: ask for more than {config.updates}")
        return trainer

    # -- the loop ------------------------------------------------------------------------------

    def run(
        self,
        report: Callable[[TeamProgress], None] = lambda progress: None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Train up to the configured number of updates; whether all are done.

        Args:
            report: called after each update and evaluation.
            should_stop: asked after each; the run then saves a checkpoint and returns.

        Raises:
            EchelonError: the disk is full, the model went astray, the task is broken; the newest checkpoint is whole.
        """
        c = self.config
        with only_writer(self.folder):
            atomic_write_text(self.folder / "config.toml", team_to_toml(c))
            logs = {name: JsonLines(self.folder / name, size) for name, size in self._sizes.items()}
            try:
                while self._owes() or self.update < c.updates:
                    if self.imitated < c.imitation:
                        self._imitate(logs, report)
                    elif self._owes():
                        self._judge(logs, report)
                    else:
                        self._learn(logs, report)
                    done, stop = self.update == c.updates and not self._owes(), should_stop()
                    if stop or done or (self.imitated + self.update) % c.checkpoint_every == 0:
                        self._save(logs)
                    if stop and not done:
                        return False
                if not (self.folder / "team").is_dir():
                    save_team(self.policies, self.folder / "team")
            finally:
                for log in logs.values():
                    log.close()
        return True

    def _owes(self) -> bool:
        """Whether an evaluation is due that has not been made; a run that was stopped before makes it when it goes
        on."""
        c = self.config
        due = c.eval_every and len(self._eval) and (self.update % c.eval_every == 0 or self.update == c.updates)
        return bool(due) and (self.evaluation is None or self.evaluation["update"] != self.update)

    def _imitate(self, logs: dict[str, JsonLines], report: Callable[[TeamProgress], None]) -> None:
        """One update by imitation: each agent's replies as probable as a teacher's."""
        c, n = self.config, self.imitated
        if self._lessons is None:
            self._lessons = self._watch_teacher()
        told: dict[str, float] = {}
        for place, policy in enumerate(dict.fromkeys(self.policies)):
            own = self._lessons[place]
            batch = range(n * c.imitation_batch, (n + 1) * c.imitation_batch)
            chosen = [own[self._order(_TAUGHT, k // len(own), len(own))[k % len(own)]] for k in batch]
            found = learn(policy, chosen, lambda numbers: (-numbers[:, 0].mean(), {}))
            told |= {f"loss_{place}": found["loss"], f"grad_norm_{place}": found["grad_norm"]}
        self.imitated += 1
        if self.imitated == c.imitation:
            self._lessons = None
            for policy in dict.fromkeys(self.policies):
                policy.anchor()  # what they are now is what later learning is held to
        loss = float(np.mean([value for name, value in told.items() if name.startswith("loss")]))
        line = {"update": self.imitated, "loss": loss, **told}
        logs["imitation.jsonl"].write(line)
        report(TeamProgress(0, c.updates, line, None, {}, imitating=(self.imitated, c.imitation)))

    def _watch_teacher(self) -> list[list[TokenSample]]:
        """By policy, what its agents would have replied."""
        assert isinstance(self.task, Teaching)
        distinct = list(dict.fromkeys(self.policies))
        found: list[list[TokenSample]] = [[] for _ in distinct]
        heat = self.config.rollout.temperature
        for agent, prompt, reply in self.task.lessons(self._train[: self.config.lessons]):
            policy = self.policies[agent]
            found[distinct.index(policy)].append(policy.written(prompt, reply, temperature=heat))
        if not all(found):
            raise EchelonError(f"the teacher of {self.task.name} has no reply for some agents in {self.config.lessons}"
                               " items: let lessons be more")  # fmt: skip
        return found

    def _learn(self, logs: dict[str, JsonLines], report: Callable[[TeamProgress], None]) -> None:
        """One update: grow trees, learn from them, log."""
        c, clock, began = self.config, Clock(), time.perf_counter()
        items, stream = self.items(self.update), (_GROWN, self.update)
        played: Tree | Game
        if c.rollout.branch == "first":
            played = play(self.task, self.policies, items, c.rollout.group, c.rollout, seed=c.seed, stream=stream)
            nodes = played.nodes(c.rollout.group, c.algorithm.discount)
        else:
            joint = c.algorithm.joint
            played = grow(self.task, self.policies, items, c.rollout, joint=joint, seed=c.seed, stream=stream)
            nodes = played.nodes(joint)
        clock.lap("play")
        learnt = self.algorithm.update(nodes) if nodes else {}
        clock.lap("learn")
        if wrong := [f"{name} is {value}" for name, value in learnt.items() if not math.isfinite(value)]:
            raise EchelonError(f"training diverged at update {self.update} ({wrong[0]}): lower policy.lr")
        self.update += 1
        told = _summary(list(played.scenes()), self.task.roles)
        self.samples += told.pop("new_samples")
        self.tokens += told.pop("new_tokens")
        metrics = {"update": self.update, "samples": self.samples, "tokens": self.tokens,
                   "skipped": len(played.skipped), **told, **learnt}  # fmt: skip
        logs["metrics.jsonl"].write(metrics)
        for scene in played.scenes():
            logs["dialogues.jsonl"].write({"update": self.update, "kind": "train", **_told(scene, self.task.roles)})
        seconds = time.perf_counter() - began
        self.seconds += seconds
        shares = clock.shares()
        logs["timings.jsonl"].write({"update": self.update, "seconds": self.seconds, **shares})
        report(TeamProgress(self.update, c.updates, metrics, self.evaluation, shares, self._notes(played)))

    def _judge(self, logs: dict[str, JsonLines], report: Callable[[TeamProgress], None]) -> None:
        """Play the items kept for evaluation, and log what that brought."""
        c = self.config
        game = self.evaluate()
        self.evaluation = {"update": self.update, **summary(game, self.task, c.algorithm.discount)}
        logs["evaluations.jsonl"].write(self.evaluation)
        for scene in game.scenes():
            logs["dialogues.jsonl"].write({"update": self.update, "kind": "eval", **_told(scene, self.task.roles)})
        report(TeamProgress(self.update, c.updates, {}, self.evaluation, {}, self._notes(game)))

    def evaluate(self, items: Sequence[int] | None = None, samples: int | None = None) -> Game:
        """Play items that training never saw; always the same draws.

        Args:
            items: which ones; default: the first `eval_items` of those kept for evaluation.
            samples: episodes of each; default: `eval_samples`.
        """
        c = self.config
        if items is None:
            items = [int(i) for i in (self._eval[: c.eval_items] if c.eval_items else self._eval)]
        return play(
            self.task, self.policies, items, samples or c.eval_samples, c.rollout, seed=c.seed, stream=(_JUDGED,)
        )

    def judge(self, name: str, *, items: int = 0, samples: int | None = None) -> dict[str, Any]:
        """Evaluate, and write the result to `<name>.json` and what was said to `<name>.dialogues.jsonl`.

        Args:
            name: of the files.
            items: how many of those kept for evaluation; 0: all.
            samples: episodes of each; default: `eval_samples`.
        """
        chosen = [int(i) for i in (self._eval[:items] if items else self._eval)]
        game = self.evaluate(chosen, samples)
        result = {"update": self.update, **summary(game, self.task, self.config.algorithm.discount)}
        with only_writer(self.folder):
            log = JsonLines(self.folder / f"{name}.dialogues.jsonl")
            try:
                for scene in game.scenes():
                    log.write({"update": self.update, "kind": "eval", **_told(scene, self.task.roles)})
            finally:
                log.close()
            atomic_write_json(self.folder / f"{name}.json", result)
        return result

    def items(self, update: int) -> list[int]:
        """The items of an update: all of them once before any comes again."""
        batch, count = self.config.batch, len(self._train)
        places = range(update * batch, (update + 1) * batch)
        return [int(self._train[self._order(_ITEMS, place // count, count)[place % count]]) for place in places]

    def _order(self, stream: int, epoch: int, count: int) -> NDArray[np.int64]:
        """Places 0 to count - 1 in an order that only the seed, the stream and the epoch decide."""
        sequence = np.random.SeedSequence(self.config.seed, spawn_key=(stream, epoch))
        return np.random.Generator(np.random.Philox(sequence)).permutation(count)

    def _notes(self, played: Tree | Game) -> tuple[str, ...]:
        notes = [told for _, told in played.skipped]
        wrong = [scored.error for scene in played.scenes() for scored in scene.scored if scored.error]
        if wrong:
            notes.append(f"{len(wrong)} answers could not be scored: {wrong[0]}")
        return tuple(dict.fromkeys(notes))

    # -- state -----------------------------------------------------------------------------------

    def _save(self, logs: dict[str, JsonLines]) -> None:
        self._sizes = {name: log.sync() for name, log in logs.items()}
        progress = {"imitated": self.imitated, "update": self.update, "samples": self.samples,
                    "tokens": self.tokens, "seconds": self.seconds,
                    "evaluation": self.evaluation, "sizes": self._sizes}  # fmt: skip
        tensors = {f"team.{name}": x for name, x in team_state(self.policies).items()}
        tensors |= {f"algorithm.{name}": x for name, x in self.algorithm.state_dict().items()}
        if self.update == self.config.updates:
            save_team(self.policies, self.folder / "team")
        save_checkpoint(self.folder / "checkpoints", self.imitated + self.update, Checkpoint(progress, {}, tensors))

    def _load(self, checkpoint: Checkpoint) -> None:
        p = checkpoint.progress
        self.update, self.samples, self.tokens, self.seconds = (
            p["update"], p["samples"], p["tokens"], p["seconds"]
        )  # fmt: skip
        self.imitated, self.evaluation, self._sizes = p["imitated"], p["evaluation"], p["sizes"]

        def part(prefix: str) -> dict[str, torch.Tensor]:
            return {k.removeprefix(prefix): x for k, x in checkpoint.algorithm.items() if k.startswith(prefix)}

        load_team_state(self.policies, part("team."))
        self.algorithm.load_state_dict(part("algorithm."))


def summary(game: Game, task: TeamTask, discount: float = 1.0) -> dict[str, Any]:
    """What a team's play is worth: mean return with its standard error over items, its parts, lengths, errors."""
    scenes = list(game.scenes())
    if not scenes:
        return {"episodes": 0}
    told = _summary(scenes, task.roles)
    del told["new_samples"], told["new_tokens"]
    returns = game.returns(discount)
    by_item: dict[int, list[float]] = {}
    for path, value in zip(game.episodes, returns.tolist(), strict=True):
        by_item.setdefault(path[0].item, []).append(value)
    means = np.array([np.mean(own) for own in by_item.values()])
    spread = float(means.std(ddof=1) / len(means) ** 0.5) if len(means) > 1 else None
    if isinstance(task, Solvable):
        told = {"success": float(np.mean([task.solved([s.scored[0] for s in path]) for path in game.episodes])), **told}
    return {"episodes": len(returns), "items": len(means), "return": float(returns.mean()), "return_se": spread,
            "turns": len(scenes) / len(returns), **told}  # fmt: skip


def _summary(scenes: Iterable[Scene], roles: Sequence[str]) -> dict[str, Any]:
    """Means over the joint actions of some scenes, and counts of what was written."""
    scenes = list(scenes)
    scored = [one for scene in scenes for one in scene.scored]
    told: dict[str, Any] = {"new_samples": 0, "new_tokens": 0}
    if not scored:
        return told
    told |= {"reward": float(np.mean([one.reward for one in scored])), "errors": sum(bool(s.error) for s in scored)}
    names = dict.fromkeys(name for one in scored for name in one.parts)
    told |= {f"part_{name}": float(np.mean([one.parts.get(name, 0.0) for one in scored])) for name in names}
    for agent, _ in enumerate(roles):
        own = [sample for scene in scenes for sample in scene.samples[agent]]
        told[f"length_{agent}"] = float(np.mean([len(s.reply_ids) for s in own]))
        told[f"ended_{agent}"] = float(np.mean([s.ended for s in own]))
        told[f"empty_{agent}"] = float(np.mean([not s.text.strip() for s in own]))
        told["new_samples"] += len(own)
        told["new_tokens"] += sum(len(s.reply_ids) for s in own)
    return told


def _told(scene: Scene, roles: Sequence[str]) -> dict[str, Any]:
    """A scene for the log: who was asked what, what each joint action said, and what it earned."""
    answers = []
    for j, scored in enumerate(scene.scored):
        said = dict(zip(roles, scene.completions(j), strict=True))
        picked = [own[g] for own, g in zip(scene.samples, scene.joint[j].tolist(), strict=True)]
        answer: dict[str, Any] = {
            "said": said, "tokens": [len(s.reply_ids) for s in picked], "ended": [s.ended for s in picked],
            "reward": scored.reward, "parts": dict(scored.parts), "done": scored.done,
        }  # fmt: skip
        if scored.feedback:
            answer["feedback"] = scored.feedback
        if scored.error:
            answer["error"] = scored.error
        answers.append(answer)
    prompts = {role: {"system": p.system, "text": p.text} for role, p in zip(roles, scene.prompts, strict=True)}
    return {"item": scene.item, "path": list(scene.path), "prompts": prompts, "answers": answers}


def _require_free(folder: Path) -> None:
    if (folder / "config.toml").exists():
        raise EchelonError(f"there is a run in {folder}: choose another folder, or go on with it (--resume)")
