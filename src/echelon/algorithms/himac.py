"""HiMAC's macro phase: a planner's policy that learns from blueprints compared with each other, without a critic.

arXiv 2603.00977 (no code was released): of N blueprints for one task, each carried out by an executor that doesn't
change meanwhile, those that scored above their group's mean become more probable. Then the best blueprint is kept
and the executor learns under it (the micro phase): in robot worlds that is a MARL algorithm, and none of this file's
business. A blueprint is all decisions of one episode.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from echelon.advantages import GroupNorm, gigpo, group_relative
from echelon.algorithms.decisions import Decisions, LearnerConfig, improve
from echelon.rng import spawn_keys

if TYPE_CHECKING:
    from echelon.llm.policy import PolicyModel

__all__ = ["HiMAC", "HiMACConfig"]


@dataclass(frozen=True)
class HiMACConfig(LearnerConfig):
    """Hyper-parameters of HiMAC's macro phase (group and KL: second-hand from the paper; the rest: our choice)."""

    group: int = 8
    """N, blueprints a task."""
    normalize: GroupNorm = "std"
    """std: scores minus their group's mean, over its standard deviation; mean: without the division."""
    blueprint: Literal["best", "random"] = "best"
    """Which of its blueprints a task's executor then learns under (random: an ablation)."""
    step_weight: float = 1.0
    """Weight of the step-level part, where there is one (GiGPO's ω)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(
            ("group", self.group >= 2, "at least 2"),
            ("normalize", self.normalize in ("std", "mean"), "std or mean"),
            ("blueprint", self.blueprint in ("best", "random"), "best or random"),
            ("step_weight", self.step_weight >= 0, "at least 0"),
        )


class HiMAC:
    """How a planner's policy learns from groups of blueprints.

    Attributes:
        updates: macro phases so far.
        picks: how often blueprints were picked at random.
    """

    def __init__(self, config: HiMACConfig, policy: PolicyModel, seed: int) -> None:
        """
        Args:
            config: hyper-parameters.
            policy: the model whose decisions improve; its own state belongs to its owner.
            seed: root seed of minibatches and random blueprints.
        """
        self.config, self.policy = config, policy
        self._key, self._pick_key = (int(spawn_keys(seed, (stream,), 1)[0]) for stream in (22, 23))
        self.updates = self.picks = 0

    def advantages(
        self,
        episode: NDArray[np.int64],
        scores: NDArray[np.float32],
        groups: NDArray[np.int64],
        step_returns: NDArray[np.float32] | None = None,
        anchors: NDArray[np.int64] | Sequence[Hashable] | None = None,
    ) -> NDArray[np.float32]:
        """The advantage of each decision, float32 `(n,)`; the arguments are `macro`'s."""
        c = self.config
        if step_returns is None or anchors is None:
            return group_relative(scores, groups, normalize=c.normalize)[episode].astype(np.float32)
        mode: Literal["mean_norm", "mean_std_norm"] = "mean_norm" if c.normalize == "mean" else "mean_std_norm"
        return gigpo(
            step_returns, scores[episode], groups[episode], anchors, mode=mode, step_weight=c.step_weight
        ).astype(np.float32)  # fmt: skip

    def macro(
        self,
        decisions: Decisions,
        episode: NDArray[np.int64],
        scores: NDArray[np.float32],
        groups: NDArray[np.int64],
        *,
        step_returns: NDArray[np.float32] | None = None,
        anchors: NDArray[np.int64] | Sequence[Hashable] | None = None,
    ) -> dict[str, float]:
        """Learn from the blueprints of some tasks; what to log of it.

        Args:
            decisions: n of them, of all blueprints.
            episode: int64 `(n,)`, the episode that each belongs to.
            scores: float32 `(episodes,)`, what its blueprint brought.
            groups: int64 `(episodes,)`, equal where the task was.
            step_returns: float32 `(n,)`, what came after each decision, discounted; with
            anchors: `(n,)`, equal where decisions of one task were made in the same state. With the two, a decision
                is also compared with others in its state (GiGPO).

        Returns:
            `improve`'s numbers; `score` (mean), `score_best` (mean over groups of their best), `score_spread` (mean
            over groups of the population standard deviation), and `informative`, the share of groups whose scores
            aren't all equal: the others teach nothing.

        Raises:
            ValueError: lengths that differ.
        """
        if episode.shape != (len(decisions),) or scores.shape != groups.shape:
            raise ValueError("episode has one entry a decision, scores and groups one an episode")
        weights = self.advantages(episode, scores, groups, step_returns, anchors)
        metrics = improve(self.policy, decisions, weights, self.config, key=self._key, count=self.updates)
        self.updates += 1
        by_group = [scores[groups == g].astype(np.float64) for g in np.unique(groups)]
        if not by_group:
            return metrics
        return metrics | {
            "score": float(np.mean(scores)),
            "score_best": float(np.mean([x.max() for x in by_group])),
            "score_spread": float(np.mean([x.std() for x in by_group])),
            "informative": float(np.mean([x.max() > x.min() for x in by_group])),
        }

    def pick(self, scores: NDArray[np.float32], groups: NDArray[np.int64]) -> NDArray[np.int64]:
        """The episode whose blueprint each group's executor learns under: the best (of equals the first), or any.

        Args:
            scores: float32 `(episodes,)`; groups: int64 `(episodes,)`.

        Returns:
            int64 `(num_groups,)`, episodes, by ascending group.
        """
        members = [np.flatnonzero(groups == g) for g in np.unique(groups)]
        if self.config.blueprint == "best":
            return np.array([own[np.argmax(scores[own])] for own in members], np.int64)
        draws = np.random.Generator(np.random.Philox(key=self._pick_key, counter=[0, self.picks, 0, 0]))
        self.picks += 1
        return np.array([own[draws.integers(len(own))] for own in members], np.int64)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that decides what is learnt and picked next, but for the policy's own, as tensors by name."""
        return {"updates": torch.tensor(self.updates), "picks": torch.tensor(self.picks)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Put back what `state_dict` gave."""
        self.updates, self.picks = int(state["updates"]), int(state["picks"])
