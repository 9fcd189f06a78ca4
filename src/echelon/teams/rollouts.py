"""What a team of language models does in a task: trees of joint answers to learn from, and plain play to be judged by.

At each joint history every agent writes G replies to its own prompt; together they are joint actions, the task says
what each is worth, and each that is not done becomes a joint history of the next turn (MAGRPO, arXiv 2508.04652). All
histories of a turn, of all items, are written and scored together.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from echelon.advantages import Joint
from echelon.algorithms.teams import TeamNode
from echelon.errors import EchelonError
from echelon.llm.token_policy import TokenPolicy, TokenSample
from echelon.rng import spawn_keys
from echelon.tasks.base import AgentPrompt, Attempt, Scored, TeamTask, Turn

__all__ = ["Game", "Scene", "TeamRolloutConfig", "Tree", "grow", "play"]


@dataclass(frozen=True)
class TeamRolloutConfig:
    """How a team's replies are sampled."""

    group: int = 4
    """Replies of each agent to each prompt, G."""
    turns: int = 1
    """Most turns of an episode. Each turn multiplies the joint actions: G, G², … (cross: G^N, G^2N, …)."""
    temperature: float = 0.7
    """Logits are divided by it before a token is drawn."""
    top_p: float = 1.0
    """Draw from the fewest most probable tokens that have this probability together; 1: from all. Less than 1 draws
    from another distribution than the one that learns (CoMLRL: 0.6)."""
    top_k: int = 0
    """Draw from so many of the most probable tokens; 0: from all (CoMLRL: 50)."""
    max_tokens: int = 128
    """The longest reply, its end included."""
    branch: Literal["every", "first"] = "every"
    """Where joint actions part: in every turn, as published; or in the first alone, whose G joint actions then go on
    by themselves, with G replies an agent and turn however many turns there are (aligned only)."""
    early_stop: float | None = None
    """A joint history whose joint actions bring more than this on average has no next turn (CoMLRL: -0.2)."""
    too_long: Literal["stop", "skip"] = "stop"
    """A prompt that leaves no room for a reply: stop the run, or skip the item, which is told."""

    def __post_init__(self) -> None:
        for name, good, need in (
            ("group", self.group >= 1, "at least 1"),
            ("turns", self.turns >= 1, "at least 1"),
            ("temperature", self.temperature > 0, "above 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("branch", self.branch in ("every", "first"), "every or first"),
            ("branch", self.branch == "every" or self.early_stop is None, "every, or early_stop not be given"),
            ("too_long", self.too_long in ("stop", "skip"), "stop or skip"),
        ):
            if not good:
                raise EchelonError(f"rollout.{name} is {getattr(self, name)}: it must be {need}")


@dataclass
class Scene:
    """A joint history, what was written there and what came of it.

    Attributes:
        item: of the task; path: the joint action of each turn before, that led here; history: those turns.
        prompts: one an agent.
        samples: by agent, G replies; joint: int `(J, N)`, the reply of each agent in each joint action.
        scored: by joint action.
        children: by joint action, the scene that follows, or None.
    """

    item: int
    path: tuple[int, ...] = ()
    history: tuple[Turn, ...] = ()
    prompts: list[AgentPrompt] = field(default_factory=list)
    samples: list[list[TokenSample]] = field(default_factory=list)
    joint: NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 0), np.int64))
    scored: list[Scored] = field(default_factory=list)
    children: list[Scene | None] = field(default_factory=list)

    def completions(self, j: int) -> tuple[str, ...]:
        """What the agents wrote in joint action j."""
        return tuple(own[g].text for own, g in zip(self.samples, self.joint[j].tolist(), strict=True))

    def all(self) -> Iterator[Scene]:
        """This one and all that follow."""
        yield self
        for child in self.children:
            if child is not None:
                yield from child.all()


@dataclass
class Tree:
    """What a team did with some items.

    Attributes:
        roots: the first scene of each item, in the order of the items, skipped ones left out.
        skipped: items that were left out, with the reason.
    """

    roots: list[Scene]
    skipped: list[tuple[int, str]]

    def nodes(self, joint: Joint) -> list[TeamNode]:
        """The trees as an algorithm takes them."""

        def node(scene: Scene) -> TeamNode:
            rewards = np.array([scored.reward for scored in scene.scored])
            group, agents = len(scene.samples[0]), len(scene.samples)
            shape = (group,) if joint == "aligned" else (group,) * agents
            children = [None if child is None else node(child) for child in scene.children]
            return TeamNode(
                [list[Any](own) for own in scene.samples], rewards.reshape(shape), children, len(scene.path)
            )

        return [node(scene) for scene in self.roots]

    def scenes(self) -> Iterator[Scene]:
        """All scenes, an item's one behind the other, parents before children."""
        for root in self.roots:
            yield from root.all()


def grow(
    task: TeamTask,
    policies: Sequence[TokenPolicy],
    items: Sequence[int],
    config: TeamRolloutConfig,
    *,
    joint: Joint = "aligned",
    seed: int,
    stream: Sequence[int],
) -> Tree:
    """Grow a tree of joint answers for each item.

    Args:
        task: what the team works on.
        policies: one an agent; the same object several times shares its weights.
        items: of the task.
        config: how replies are sampled.
        joint: how replies make joint actions: the g-th of all agents together, or every one with every other.
        seed, stream: what every draw is a function of (see `echelon.rng.spawn_keys`).

    Raises:
        EchelonError: a prompt without room for a reply (unless such items are skipped), a task whose prompts or
            scores don't fit its agents, a reward that is not finite, a model that breaks.
    """
    agents = len(policies)
    if len(task.roles) != agents:
        raise EchelonError(f"task {task.name} has {len(task.roles)} agents, and there are {agents} models")
    G = config.group
    axes = 1 if joint == "aligned" else agents
    every = np.indices((G,) * axes).reshape(axes, -1).T
    plan = np.ascontiguousarray(np.broadcast_to(every, (len(every), agents)))
    roots = [Scene(int(item)) for item in items]
    skipped: list[tuple[int, str]] = []
    front = roots
    for turn in range(config.turns):
        front = _ask(task, policies, front, config, skipped)
        if not front:
            break
        keys = spawn_keys(seed, (*stream, turn), len(front) * agents).reshape(len(front), agents)
        _write(policies, front, keys, G, config)
        for scene in front:
            scene.joint = plan
        _score(task, front)
        following: list[Scene] = []
        for scene in front:
            stop = turn + 1 == config.turns or (
                config.early_stop is not None and np.mean([s.reward for s in scene.scored]) > config.early_stop
            )
            scene.children = []
            for j, scored in enumerate(scene.scored):
                if stop or scored.done:
                    scene.children.append(None)
                    continue
                history = (*scene.history, Turn(scene.completions(j), scored))
                scene.children.append(Scene(scene.item, (*scene.path, j), history))
                following.append(scene.children[-1])  # type: ignore[arg-type]
        front = following
    out = {item for item, _ in skipped}
    return Tree([root for root in roots if root.item not in out], skipped)


def play(
    task: TeamTask,
    policies: Sequence[TokenPolicy],
    items: Sequence[int],
    samples: int,
    config: TeamRolloutConfig,
    *,
    seed: int,
    stream: Sequence[int],
) -> Game:
    """Play each item to its end, `samples` times, each time on a path of its own: what a team is judged by.

    Args and errors: as `grow`.
    """
    agents = len(policies)
    skipped: list[tuple[int, str]] = []
    scenes = [Scene(int(item)) for item in items for _ in range(samples)]
    paths: list[list[Scene]] = [[scene] for scene in scenes]
    front = list(range(len(scenes)))
    for turn in range(config.turns):
        asked = {id(s) for s in _ask(task, policies, [paths[k][-1] for k in front], config, skipped)}
        front = [k for k in front if id(paths[k][-1]) in asked]
        if not front:
            break
        now = [paths[k][-1] for k in front]
        keys = spawn_keys(seed, (*stream, turn), len(scenes) * agents).reshape(len(scenes), agents)[front]
        _write(policies, now, keys, 1, config)
        for scene in now:
            scene.joint = np.zeros((1, agents), np.int64)
        _score(task, now)
        going = []
        for k, scene in zip(front, now, strict=True):
            if turn + 1 < config.turns and not scene.scored[0].done:
                history = (*scene.history, Turn(scene.completions(0), scene.scored[0]))
                paths[k].append(Scene(scene.item, (*scene.path, 0), history))
                going.append(k)
        front = going
    out = {item for item, _ in skipped}
    return Game([path for path in paths if path[0].item not in out], skipped)


@dataclass
class Game:
    """Episodes that a team played.

    Attributes:
        episodes: their turns, one scene each; those of an item side by side.
        skipped: items that were left out, with the reason.
    """

    episodes: list[list[Scene]]
    skipped: list[tuple[int, str]]

    def scenes(self) -> Iterator[Scene]:
        """All scenes, an episode's one behind the other."""
        return itertools.chain.from_iterable(self.episodes)

    def nodes(self, group: int, discount: float) -> list[TeamNode]:
        """The episodes as an algorithm takes them: those of an item are compared turn by turn.

        A node is a turn of the `group` episodes of an item, whose rewards are what each brought from there on; an
        episode that is over has replies without tokens and a return of 0.
        """
        found = []
        for start in range(0, len(self.episodes), group):
            paths = self.episodes[start : start + group]
            for turn in range(max(len(path) for path in paths)):
                samples = [
                    [path[turn].samples[agent][0] if turn < len(path) else _nothing(path[-1].samples[agent][0])
                     for path in paths]
                    for agent in range(len(paths[0][0].samples))
                ]  # fmt: skip
                returns = [
                    sum(discount**t * scene.scored[0].reward for t, scene in enumerate(path[turn:])) for path in paths
                ]
                found.append(TeamNode(list[list[Any]](samples), np.array(returns, np.float64), [], turn))
        return found

    def returns(self, discount: float = 1.0) -> NDArray[np.float64]:
        """Discounted return of each episode, `(E,)`."""
        return np.array([sum(discount**t * s.scored[0].reward for t, s in enumerate(path)) for path in self.episodes])


def _nothing(sample: TokenSample) -> TokenSample:
    """A reply without tokens to the prompt of `sample`."""
    none = np.zeros(0, np.float32)
    return dataclasses.replace(sample, reply_ids=(), text="", ended=True, logp=none, behaviour_logp=none)


# -- one turn -------------------------------------------------------------------------------------


def _ask(
    task: TeamTask,
    policies: Sequence[TokenPolicy],
    scenes: list[Scene],
    config: TeamRolloutConfig,
    skipped: list[tuple[int, str]],
) -> list[Scene]:
    """Give the scenes their prompts; those whose item has to be left out are left out."""
    out = {item for item, _ in skipped}
    for scene in scenes:
        scene.prompts = task.prompts(scene.item, scene.history)
        if len(scene.prompts) != len(policies):
            raise EchelonError(f"task {task.name} asks {len(scene.prompts)} agents, and there are {len(policies)}")
        if scene.item in out:
            continue
        for agent, (policy, prompt) in enumerate(zip(policies, scene.prompts, strict=True)):
            if (room := policy.room(prompt)) < 1:
                told = (
                    f"item {scene.item} of {task.name}, turn {len(scene.path) + 1}: the prompt of agent {agent} "
                    f"({task.roles[agent]}) is {1 - room} tokens too long for {policy.name}"
                )
                if config.too_long == "stop":
                    raise EchelonError(f"{told}: shorten it, or set rollout.too_long to skip")
                skipped.append((scene.item, told))
                out.add(scene.item)
                break
    return [scene for scene in scenes if scene.item not in out]


def _write(
    policies: Sequence[TokenPolicy],
    scenes: Sequence[Scene],
    keys: NDArray[np.uint64],
    n: int,
    config: TeamRolloutConfig,
) -> None:
    """Let every agent write `n` replies in every scene: one batch for each distinct model."""
    for scene in scenes:
        scene.samples = [[] for _ in policies]
    for policy in dict.fromkeys(policies):
        mine = [agent for agent, own in enumerate(policies) if own is policy]
        asked = [(s, agent) for s in range(len(scenes)) for agent in mine]
        replies = policy.sample(
            [scenes[s].prompts[agent] for s, agent in asked], n, temperature=config.temperature, top_p=config.top_p,
            top_k=config.top_k, max_tokens=config.max_tokens, keys=[int(keys[s, agent]) for s, agent in asked],
        )  # fmt: skip
        for k, (s, agent) in enumerate(asked):
            scenes[s].samples[agent] = replies[k * n : (k + 1) * n]


def _score(task: TeamTask, scenes: Sequence[Scene]) -> None:
    """What all joint actions of the scenes are worth."""
    attempts = [
        Attempt(scene.item, scene.history, scene.completions(j)) for scene in scenes for j in range(len(scene.joint))
    ]
    scored = task.score(attempts)
    if len(scored) != len(attempts):
        raise EchelonError(f"task {task.name} scored {len(scored)} of {len(attempts)} answers")
    for attempt, one in zip(attempts, scored, strict=True):
        if not np.isfinite(one.reward):
            raise EchelonError(f"task {task.name}: the reward of item {attempt.item} is {one.reward}")
    at = 0
    for scene in scenes:
        scene.scored = scored[at : at + len(scene.joint)]
        at += len(scene.joint)
