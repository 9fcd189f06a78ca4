"""The part `robots` of `team_proof.py`: a planner a robot beside one planner for all, on the same episodes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

from echelon._files import atomic_write_json
from echelon.building import model_of, prompts_of
from echelon.envs.base import SubgoalKind
from echelon.envs.kernels import UNREACHABLE
from echelon.llm.prompts import LETTERS
from echelon.llm.token_policy import TokenPolicy, TokenSample
from echelon.planners import Planner, make_rule_planner
from echelon.planners.base import StatelessPlanner
from echelon.planners.generating import GeneratingPlanner
from echelon.planners.llm import LLMPlanner
from echelon.subgoals import EXCLUSIVE, Plan, PlanRequest
from echelon.tasks import AgentPrompt
from echelon.teams.configs import TeamPolicyConfig, TeamRunConfig, read_team_toml
from echelon.teams.robots import Episode, RobotTask, WarehouseTeamSettings
from echelon.teams.rollouts import TeamRolloutConfig, play
from echelon.teams.training import TeamProgress, TeamTrainer

WRITTEN_ITEMS = 16
"""Episodes of the central model that writes: it takes as long as all else together."""

# The task gives a robot whose reply can't be read what is nearest of all that nobody has: it isn't decentralised then.
RULED = {"no-letter": "each robot: nothing readable", "nearest-letter": "each robot: nearest it is shown",
         "random-letter": "each robot: any letter"}  # fmt: skip
LEARNED = {
    "untouched": "each robot: a model, untouched", "imitated": "… after imitation", "trained": "… and after MAGRPO"
}  # fmt: skip
RULES = {"hungarian": "one for all: optimal assignment", "nearest": "one for all: nearest",
         "random-task": "one for all: random open task"}  # fmt: skip
MODELS = {"rating": "one for all: a model that rates", "writing": "one for all: a model that writes, untouched"}


class Counted(StatelessPlanner):
    """A central planner, and what its decisions took.

    A decision is what a robot's choice is in the task itself: a robot that has more than one thing to do, at a moment
    at which anybody's choice is open.

    Attributes:
        decisions: so many; seconds: in all plans; tokens: of the questions behind them, had no answer been kept.
    """

    needs_distance = True

    def __init__(self, planner: Planner) -> None:
        self.name, self.planner = planner.name, planner
        self.needs_scene = getattr(planner, "needs_scene", False)
        self.decisions, self.seconds, self.tokens = 0, 0.0, 0

    def plan(self, request: PlanRequest) -> Plan:
        """As the planner does."""
        if not request.rejected.any():
            self.decisions += decisions(request)
        start = time.perf_counter()
        plan = self.planner.plan(request)
        self.seconds += time.perf_counter() - start
        if isinstance(self.planner, LLMPlanner) and plan.notes is not None:
            told = [plan.notes(int(i))["agents"] for i in np.flatnonzero(request.need.any(1))]
            self.tokens += sum(agent.get("prompt_tokens", 0) for agents in told for agent in agents.values())
        return plan


def decisions(request: PlanRequest) -> int:
    """How many robots of a request have a choice."""
    assert request.distance is not None
    c = request.candidates
    offered = (c.kind > 0) & (request.distance < UNREACHABLE)
    rows = np.arange(len(request.need))[:, None, None]
    had = EXCLUSIVE[c.kind] & (c.task >= 0) & request.taken[rows, c.task]
    # Who isn't offered to wait has a single thing to do.
    free = request.need & (c.kind == SubgoalKind.WAIT).any(2)
    open_to = ((offered & ~had).any(2) & free).any(1)
    return int((free & offered.any(2) & open_to[:, None]).sum())


class Clocked:
    """A policy, and how long it wrote."""

    def __init__(self, policy: TokenPolicy) -> None:
        self.policy, self.name, self.room, self.seconds = policy, policy.name, policy.room, 0.0

    def sample(self, *args: Any, **settings: Any) -> list[TokenSample]:
        """As the policy does."""
        start = time.perf_counter()
        found = self.policy.sample(*args, **settings)
        self.seconds += time.perf_counter() - start
        return found


def outcome(
    success: Sequence[bool], steps: Sequence[int], decided: int, tokens: float, seconds: float, **more: float
) -> dict[str, Any]:
    """What is told of a team: its successes, its steps (of a failed episode: the limit), what a decision took."""
    done, n = int(sum(success)), len(success)
    low, high = stats.binomtest(done, n).proportion_ci(method="wilson")
    return {
        "items": n, "tsr": done / n, "tsr_low": low, "tsr_high": high, "steps": float(np.mean(steps)),
        "steps_done": float(np.mean([s for s, good in zip(steps, success, strict=True) if good])) if done else None,
        "decisions": decided, "tokens_per_decision": tokens / max(1, decided), "tokens_per_episode": tokens / n,
        "seconds_per_decision": seconds / max(1, decided), **more,
    }  # fmt: skip


def central(task: RobotTask, items: Sequence[int], name: str) -> dict[str, Any]:
    """One planner for all: a rule, or a model that rates or writes."""
    if name not in MODELS:
        planner = Counted(make_rule_planner(name))
    elif name == "rating":
        model = model_of("smollm2-135m-echelon")
        planner = Counted(LLMPlanner(model, folder=prompts_of("smollm2-135m-echelon")))
    else:
        writer = model_of("smollm2-135m").text(batching="free")
        # A robot at a time: a small model writes one short answer better than a list.
        planner = Counted(GeneratingPlanner(writer, ask="agent", max_tokens=24))
    episodes = task.play_planner(items, planner)
    more = {}
    if name == "rating":
        # Its questions come again and again, and their answers are kept in a table: of what a decision takes are told
        # the tokens that went through, and those, with their time, had nothing been kept.
        more["tokens_per_decision_kept"] = float(model.state_dict()["prompt_tokens"]) / planner.decisions
        planner.seconds = float(model.state_dict()["seconds"]) * planner.tokens / model.state_dict()["prompt_tokens"]
    if name == "writing":
        told = writer.state_dict()
        planner.tokens = int(told["prompt_tokens"] + told["completion_tokens"])
    return whole(episodes, planner.decisions, planner.tokens, planner.seconds, **more)


def whole(episodes: Sequence[Episode], decided: int, tokens: float, seconds: float, **more: float) -> dict[str, Any]:
    """`outcome` of episodes that were played to their ends."""
    return outcome([e.success for e in episodes], [e.steps for e in episodes], decided, tokens, seconds, **more)


def letters(task: RobotTask, items: Sequence[int], name: str) -> dict[str, Any]:
    """Robots without a model, each by what it alone is shown: the nearest; any letter, to wait among them; or none."""
    chance, decided = np.random.Generator(np.random.Philox(7)), 0

    def answer(_: int, prompts: list[AgentPrompt]) -> list[str]:
        nonlocal decided
        replies = []
        for own in map(options, prompts):
            decided += len(own) > 1
            # A line ends with the path length, but for "wait".
            lengths = [int(line.split()[-1]) if line[-1].isdigit() else task.limit for line in own]
            place = int(np.argmin(lengths)) if name == "nearest-letter" else int(chance.integers(len(own)))
            replies.append("" if name == "no-letter" else LETTERS[place])
        return replies

    return whole(task.play(items, answer), decided, 0, 0.0)


def options(prompt: AgentPrompt) -> list[str]:
    """The lines of a robot's options: "A. P2 5" and so on."""
    return [line for line in prompt.text.splitlines() if line[:1] in LETTERS and line[1:3] == ". "]


def decentralised(trainer: TeamTrainer, items: Sequence[int]) -> dict[str, Any]:
    """The team as it is now, every reply the most probable one, every episode to its end."""
    task: RobotTask = trainer.task  # type: ignore[assignment]
    policies: list[Any] = [Clocked(policy) for policy in trainer.policies]
    longest = trainer.config.rollout.max_tokens
    rollout = TeamRolloutConfig(group=1, turns=task.limit, top_k=1, max_tokens=longest)
    game = play(task, policies, items, 1, rollout, seed=0, stream=(0,))
    scored = [[scene.scored[0] for scene in path] for path in game.episodes]
    steps = [round(-task.limit * sum(one.parts["time"] for one in own)) for own in scored]
    scenes = list(game.scenes())
    written = [sample for scene in scenes for own in scene.samples for sample in own]
    cost = {name: 0.0 - sum(s.scored[0].parts[name] for s in scenes) for name in ("invalid", "conflicts")}
    decided = sum(len(options(prompt)) > 1 for scene in scenes for prompt in scene.prompts)
    return outcome(
        [task.solved(own) for own in scored], steps, decided,
        sum(len(sample.prompt_ids) + len(sample.reply_ids) for sample in written),
        sum(policy.seconds for policy in policies), replies=len(written),
        unreadable=cost["invalid"] / task.settings.invalid_cost / len(written),
        conflicts=cost["conflicts"] / task.settings.conflict_cost / len(game.episodes),
        **{"return": float(game.returns().mean())},
    )  # fmt: skip


def kept(path: Path, name: str, find: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What was found in an earlier call, else what is found now."""
    if not path.exists():
        start = time.time()
        found = find()
        atomic_write_json(path, found)
        told = f"TSR {found['tsr']:.3f}, steps {found['steps']:.1f}, {found['tokens_per_decision']:.0f} tokens"
        print(f"{name}: {told} a decision; {time.time() - start:.0f} s", flush=True)
    found = json.loads(path.read_text())
    return dict(found)


def begun(folder: Path, seed: int, imitation: int, updates: int) -> TeamTrainer:
    """A team's training, new or as it was left."""
    if (folder / "config.toml").exists():
        return TeamTrainer.resume(folder)
    config = TeamRunConfig(
        method="magrpo", env=WarehouseTeamSettings(), seed=seed, updates=updates, batch=1, imitation=imitation,
        imitation_batch=6, lessons=128, eval_every=0, checkpoint_every=10, threads=1,
        # An update of the top third of the layers takes three fifths of the time of one of all.
        policy=TeamPolicyConfig(layers=10, lr=5e-4),
    )  # fmt: skip
    return TeamTrainer(config, folder)


def learned(folder: Path, seed: int, imitation: int, updates: int, chosen: Sequence[int]) -> dict[str, dict[str, Any]]:
    """One team: after imitation, and after MAGRPO."""
    trainer: Any = None if (folder / "trained.json").exists() else begun(folder, seed, imitation, updates)
    found = {}
    start = time.time()

    def report(progress: TeamProgress) -> None:
        at = progress.imitating or (progress.update, progress.updates)
        stage, value = ("imitation", "loss") if progress.imitating else ("magrpo", "return")
        if at[0] % 5 == 0 or not progress.imitating:
            told = f"{value} {progress.metrics.get(value, 0):.3f}"
            print(f"seed {seed} {stage} {at[0]}/{at[1]}: {told}, {time.time() - start:.0f} s", flush=True)

    for stage in ("imitated", "trained"):
        if stage == "imitated" and trainer is not None and trainer.imitated < trainer.config.imitation:
            trainer.run(report, lambda: trainer.imitated == trainer.config.imitation)
        if stage == "trained" and trainer is not None:
            trainer.run(report)
        found[stage] = kept(folder / f"{stage}.json", f"seed {seed} {stage}", lambda: decentralised(trainer, chosen))
    return found


def robots(out: Path, seeds: int, updates: int, *, imitation: int = 40, items: int = 32) -> dict[str, Any]:
    """All teams on the same episodes; each result, and each run, is taken up where an earlier call left it."""
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    task = RobotTask(WarehouseTeamSettings())
    chosen = [int(i) for i in task.items("eval")[:items]]
    teams: dict[str, list[dict[str, Any]]] = {}
    for name in (*RULES, "rating"):
        teams[name] = [kept(out / f"robots-{name}.json", name, lambda n=name: central(task, chosen, n))]
    for name in RULED:
        teams[name] = [kept(out / f"robots-{name}.json", name, lambda n=name: letters(task, chosen, n))]
    new = out / "robots-untouched"
    teams["untouched"] = [
        kept(new.with_suffix(".json"), "untouched", lambda: decentralised(begun(new, 0, imitation, updates), chosen))
    ]
    for seed in range(seeds):
        for stage, found in learned(out / f"robots-{seed}", seed, imitation, updates, chosen).items():
            teams.setdefault(stage, []).append(found)
    some = chosen[:WRITTEN_ITEMS]
    teams["writing"] = [kept(out / "robots-writing.json", "writing", lambda: central(task, some, "writing"))]
    run = read_team_toml(out / "robots-0" / "config.toml")
    return {"updates": run.updates, "imitation": run.imitation, "limit": task.limit, "teams": teams}


def robots_table(cell: dict[str, Any], interval: Callable[[list[float]], str]) -> list[str]:
    """The figures as a Markdown table.

    Args:
        cell: what `robots` gave.
        interval: tells mean and interval of some runs; of a single one stands Wilson's interval over its episodes.
    """
    names = {**RULES, **MODELS, **RULED, **LEARNED}
    lines = ["## Robots", "", "| who plans | TSR | steps | unreadable | tokens a decision | s a decision |",
             "| --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for name in names:
        runs = cell["teams"][name]
        mean = {k: float(np.mean([run[k] for run in runs])) for k in runs[0] if None not in [run[k] for run in runs]}
        if len(runs) > 1:
            tsr = f"{interval([run['tsr'] for run in runs])} ({', '.join(format(run['tsr'], '.3f') for run in runs)})"
        else:
            tsr = f"{mean['tsr']:.3f} [{mean['tsr_low']:.3f}, {mean['tsr_high']:.3f}]"
        tokens = f"{mean['tokens_per_decision']:.0f}"
        if "tokens_per_decision_kept" in mean:
            tokens += f" ({mean['tokens_per_decision_kept']:.1f} with answers kept)"
        unreadable = f"{mean['unreadable']:.1%}" if "unreadable" in mean else ""
        said = names[name] + (f" ({runs[0]['items']} episodes)" if name == "writing" else "")
        cells = (said, tsr, f"{mean['steps']:.1f}", unreadable, tokens, f"{mean['seconds_per_decision']:.3f}")
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]
