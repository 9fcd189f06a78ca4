"""GRPO for a team: PPO's step without a critic, by comparing teams that played the same episode.

Group-relative policy optimisation (Shao et al. 2024, "DeepSeekMath", section 4.1; arXiv 2402.03300) as in HiMAC's
ablation without a hierarchy, carried over to worlds of robots. Worlds come in groups that play the same episode from
the same start; what a team achieved, compared with the others of its group, is the advantage of every move that it
made. The policy is MAPPO's: shared, decentralised. Our choice: how an episode is scored, an entropy bonus in the
place of the KL to a reference policy (a policy that starts from nothing has none), and that each step weighs the same,
not each episode.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from echelon.advantages import GroupNorm, group_relative
from echelon.algorithms.actor import SharedActor
from echelon.algorithms.base import AlgorithmConfig
from echelon.buffers import RolloutBuffer

__all__ = ["GRPO", "GRPOConfig", "first_episodes"]


@dataclass(frozen=True)
class GRPOConfig(AlgorithmConfig):
    """Hyper-parameters of GRPO (group size: HiMAC; clip: PPO; the rest: our choice, by trials)."""

    gamma: float = 0.99
    """Discount a step of an episode's score: of equal teams the faster one scores higher; 1: plain sums."""
    rollout: int = 200
    """Most steps of each world between updates, never more than the world's time limit; all worlds begin an episode
    with it, and nothing is learnt from what comes after that episode."""
    group: int = 8
    """Worlds that play the same episode and are compared; num_envs must be a multiple of it."""
    normalize: GroupNorm = "std"
    """std: scores minus their group's mean, over its standard deviation; mean: without the division."""
    lr: float = 2e-3
    """Adam's step size."""
    clip: float = 0.2
    """PPO's clip range ε."""
    entropy: float = 0.003
    """Weight of the entropy bonus."""
    epochs: int = 4
    """Passes over each rollout."""
    minibatches: int = 4
    """Minibatches a pass."""
    max_grad_norm: float = 0.5
    """Gradients are scaled down to this norm."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(
            ("group", self.group >= 2, "at least 2"),
            ("normalize", self.normalize in ("std", "mean"), "std or mean"),
            ("lr", self.lr > 0, "above 0"),
            ("clip", self.clip > 0, "above 0"),
            ("entropy", self.entropy >= 0, "at least 0"),
            ("epochs", self.epochs >= 1, "at least 1"),
            ("minibatches", self.minibatches >= 1, "at least 1"),
            ("max_grad_norm", self.max_grad_norm > 0, "above 0"),
        )


class GRPO(SharedActor):
    """A team's shared policy, and how it learns from groups of episodes.

    Attributes:
        group: each rollout must begin with an episode in every world, the same in worlds k * group to
            (k + 1) * group - 1; whoever collects rollouts reads this and sees to it.
        seconds: what the last `update` took: "advantages", "learn" (forward and backward) and "optimise" (clipping
            and Adam).
    """

    def __init__(
        self,
        config: GRPOConfig,
        *,
        num_envs: int,
        num_agents: int,
        obs_scale: NDArray[np.float32],
        state_scale: NDArray[np.float32],
        num_actions: int,
        team_reward: bool,
        seed: int,
        threads: int = 1,
    ) -> None:
        """A fresh network.

        Args:
            config: hyper-parameters.
            num_envs, num_agents: W and A of the arrays.
            obs_scale: float32 `(D,)`, brings int8 observations to about ±1.
            state_scale, team_reward: unused: there is no critic, and a team is scored as a whole.
            num_actions: primitive moves.
            seed: root seed of initial weights, actions and minibatches.
            threads: how many threads to compute with; they don't change the result.
        """
        super().__init__(
            num_envs=num_envs, num_agents=num_agents, obs_scale=obs_scale, num_actions=num_actions,
            hidden=config.hidden, recurrent=config.recurrent, precision=config.precision, lr=config.lr, seed=seed,
            threads=threads,
        )  # fmt: skip
        self.config = config
        self.group = config.group
        self.seconds: dict[str, float] = {}

    def update(self, buffer: RolloutBuffer) -> dict[str, float]:
        """Learn from one rollout; what to log of it.

        Returns:
            policy_loss, entropy, approx_kl, clipped: means over minibatches; score: mean over episodes, score_best
            and score_spread: means over groups of their best and of their (population) standard deviation;
            informative: the share of groups whose scores aren't all equal (the others teach nothing); played: the
            share of the rollout's steps that was learnt from.

        Raises:
            ValueError: a world doesn't begin an episode with the rollout, or the worlds are no whole number of groups.
        """
        c = self.config
        start = time.perf_counter()
        scores, played = first_episodes(buffer, c.gamma)
        by_group = scores.reshape(-1, c.group)
        relative = group_relative(scores, np.arange(len(scores)) // c.group, normalize=c.normalize)
        advantages = np.empty((buffer.steps, *self.shape), np.float32)
        advantages[:] = relative[:, None]
        began = time.perf_counter()
        self._optimise = 0.0
        policy, steps = np.zeros(4), 0
        for rows, worlds in self._minibatches(buffer.steps, c.epochs, c.minibatches, played):
            policy += self._actor_step(buffer, rows, worlds, advantages, clip=c.clip, entropy=c.entropy,
                                       max_grad_norm=c.max_grad_norm)  # fmt: skip
            steps += 1
        learnt = time.perf_counter() - began - self._optimise
        self.seconds = {"advantages": began - start, "learn": learnt, "optimise": self._optimise}
        return {
            "policy_loss": policy[0] / steps,
            "entropy": policy[1] / steps,
            "approx_kl": policy[2] / steps,
            "clipped": policy[3] / steps,
            "score": float(scores.mean()),
            "score_best": float(by_group.max(1).mean()),
            "score_spread": float(by_group.std(1).mean()),
            "informative": float((by_group.max(1) > by_group.min(1)).mean()),
            "played": float(played.mean()),
        }


def first_episodes(buffer: RolloutBuffer, gamma: float) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Scores of the episodes with which a rollout begins, and where they were played.

    The score of an episode is `sum_t gamma^t r_t`, r_t the mean of its agents' rewards: what MAPPO's critic foretells
    at its first step, so that the two learn for the same end (our choice). An episode that the rollout's end cut off
    is scored as it stands: all of its group had the same number of steps.

    Args:
        buffer: the rollout.
        gamma: discount a step.

    Returns:
        scores float64 `(W,)`; played bool `(T, W)`, the steps that belong to these episodes.

    Raises:
        ValueError: a world was in the midst of an episode when the rollout began.
    """
    if not buffer.begins[0].all():
        raise ValueError("every world must begin an episode with the rollout")
    T = buffer.steps
    played = np.cumsum(buffer.begins[:T], 0) == 1
    worth = buffer.reward.mean(2, dtype=np.float64) * gamma ** np.arange(T)[:, None]
    return (worth * played).sum(0), played
