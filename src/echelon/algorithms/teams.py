"""What all algorithms for teams of language models share: trees of samples, the loss of an agent, and learning from it.

A team's agents write replies to prompts of their own and get one joint reward (MAGRPO, arXiv 2508.04652). An algorithm
says how good each reply was for the team; how that changes the models is the same for all, and is here. Nothing looks
into a sample: it is an item of its agent's policy, which gives the log-probability and the entropy of each of its
tokens from one batched pass.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from echelon.advantages import Joint, TeamMode, team_advantages, team_tree_returns
from echelon.algorithms.decisions import clipped_surrogate, low_var_kl
from echelon.errors import EchelonError

if TYPE_CHECKING:  # for its protocol alone: a learner needs no language model's library
    from echelon.llm.policy import PolicyModel

__all__ = [
    "GroupConfig",
    "GroupLearner",
    "TeamAlgorithm",
    "TeamBatch",
    "TeamConfig",
    "TeamLearner",
    "TeamNode",
    "register_team",
    "standardise",
    "team_algorithms",
    "team_loss",
]


@dataclass
class TeamNode:
    """One joint history of a rollout tree: what N agents wrote there, G replies each, and what followed.

    Attributes:
        samples: by agent, its replies: items of that agent's policy, to one prompt.
        rewards: float64, the team's reward for each joint action: `(G,)` where the g-th replies go together
            ("aligned"), `(G,) * N` where every reply goes with every other ("cross").
        children: by joint action, row by row, the node that follows; None where the episode ended. Empty: it ended
            everywhere.
        turn: how many turns came before.
    """

    samples: list[list[Any]]
    rewards: NDArray[np.float64]
    children: list[TeamNode | None] = field(default_factory=list)
    turn: int = 0


@dataclass(frozen=True)
class TeamConfig:
    """Hyper-parameters that all algorithms for teams of language models have (values: CoMLRL 1.4.3's where it has
    them)."""

    discount: float = 1.0
    """Discount a turn."""
    joint: Joint = "aligned"
    """How replies make joint actions: the g-th of each agent together, or (cross) every one with every other."""
    loss: Literal["reinforce", "clip"] = "reinforce"
    """reinforce: -advantage times the sum of the tokens' log-probabilities; clip: PPO's clipped loss of each token."""
    clip: float = 0.2
    """PPO's clip range ε (loss clip)."""
    epochs: int = 1
    """Optimiser steps an update, each on all samples; more than one needs the loss clip."""
    kl: float = 0.0
    """Weight of the divergence (k3) from the model as it was when learning began; 0: it isn't asked."""
    entropy: float = 0.0
    """Weight of the entropy bonus."""
    length_norm: bool = False
    """Divide a reply's loss by its tokens: else long replies move the model more."""
    per_agent_norm: bool = False
    """Bring each agent's advantages to mean 0 and standard deviation 1 over the whole batch (Dr. MAS)."""

    def __post_init__(self) -> None:
        self._check(
            ("discount", 0 <= self.discount <= 1, "0 to 1"),
            ("joint", self.joint in ("aligned", "cross"), "aligned or cross"),
            ("loss", self.loss in ("reinforce", "clip"), "reinforce or clip"),
            ("clip", 0 < self.clip < 1, "above 0 and below 1"),
            ("epochs", self.epochs >= 1, "at least 1"),
            ("epochs", self.epochs == 1 or self.loss == "clip", "1, or loss be clip"),
            ("kl", self.kl >= 0, "at least 0"),
            ("entropy", self.entropy >= 0, "at least 0"),
        )

    @property
    def compares(self) -> str | None:
        """Which setting makes it compare an agent's replies to one prompt, in words; None: it doesn't."""
        return None

    def check_group(self, group: int) -> None:
        """Refuse a number of replies to each prompt with which nothing can be learnt.

        Raises:
            EchelonError: one reply a prompt, and an algorithm that compares replies.
        """
        if group < 2 and self.compares:
            raise EchelonError(f"{self.compares} compares an agent's replies: there must be at least 2 to a prompt")

    def _check(self, *rules: tuple[str, bool, str]) -> None:
        for name, good, need in rules:
            if not good:
                raise EchelonError(f"algorithm.{name} is {getattr(self, name)}: it must be {need}")


@dataclass(frozen=True)
class GroupConfig(TeamConfig):
    """Hyper-parameters of the algorithms that compare an agent's replies with each other and need no critic.

    **With `normalize`, all four modes are one and the same**: what they differ by, a shift and a factor, is normalised
    away. CoMLRL normalises in all of them; here only MAGRPO does unless told to.
    """

    mode: TeamMode = "mean"
    """What a reply's return is compared with: the mean of its group, nothing (raw), the best (max), the mean of the
    others (rloo)."""
    normalize: bool = False
    """Divide by the standard deviation in the group. All modes are the same then."""
    kl_in: Literal["loss", "return"] = "loss"
    """Where the divergence counts: as part of the loss, or taken from each reply's return, as CoMLRL does."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(
            ("mode", self.mode in ("mean", "raw", "max", "rloo"), "mean, raw, max or rloo"),
            ("kl_in", self.kl_in in ("loss", "return"), "loss or return"),
        )

    @property
    def compares(self) -> str | None:
        """As `TeamConfig`'s: its mode."""
        return f"mode {self.mode}" if self.mode != "raw" or self.normalize else None


# -- trees as arrays -------------------------------------------------------------------------------


class TeamBatch:
    """The nodes of some rollout trees as arrays: M nodes, N agents, G replies, J joint actions a node.

    Attributes:
        nodes: parents before their children.
        items: by agent, its M * G samples, node by node.
        shape: S, of a node's rewards: `(G,)` aligned, `(G,) * N` cross.
        rewards, returns: float64 `(M, J)`; returns as `team_tree_returns` finds them.
        children: int64 `(M, J)`, the node that follows; -1 where the episode ended.
        replies: int64 `(J, N)`, the reply of each agent in each joint action.
        roots: int64, the places of the roots in `nodes`.
    """

    def __init__(self, roots: Sequence[TeamNode], agents: int, joint: Joint, discount: float) -> None:
        """Flatten the trees.

        Raises:
            ValueError: a node doesn't have G samples an agent, G as everywhere, and rewards of the shape S; or
                rewards that aren't finite.
        """
        if not roots:
            raise ValueError("there is no rollout tree to learn from")
        group = len(roots[0].samples[0]) if roots[0].samples else 0
        axes = 1 if joint == "aligned" else agents
        self.shape = (group,) * axes
        size = group**axes
        self.nodes: list[TeamNode] = []
        children: list[list[int]] = []
        returns: list[NDArray[np.float64]] = []
        self.roots = np.zeros(len(roots), np.int64)

        def add(node: TeamNode, tree: tuple[NDArray[np.float64], list[Any]]) -> int:
            place = len(self.nodes)
            self.nodes.append(node)
            returns.append(tree[0].reshape(-1))
            own = [-1] * size
            children.append(own)
            for j, child in enumerate(node.children):
                if child is not None:
                    own[j] = add(child, tree[1][j])
            return place

        for r, root in enumerate(roots):
            self._check(root, agents, group)
            self.roots[r] = add(root, team_tree_returns(root, discount=discount))
        self.rewards = np.stack([np.asarray(node.rewards, np.float64).reshape(-1) for node in self.nodes])
        self.returns = np.stack(returns)
        self.children = np.array(children, np.int64)
        self.items = [[sample for node in self.nodes for sample in node.samples[i]] for i in range(agents)]
        every = np.indices(self.shape).reshape(axes, -1).T
        self.replies = np.broadcast_to(every, (size, agents))

    def _check(self, root: TeamNode, agents: int, group: int) -> None:
        todo = [root]
        while todo:
            node = todo.pop()
            if len(node.samples) != agents or any(len(own) != group for own in node.samples) or not group:
                counts = [len(own) for own in node.samples]
                raise ValueError(f"a node must have {group} samples of each of {agents} agents, got {counts}")
            if np.shape(node.rewards) != self.shape:
                raise ValueError(f"a node's rewards must be {self.shape}, got {np.shape(node.rewards)}")
            todo += [child for child in node.children if child is not None]

    def __len__(self) -> int:
        return len(self.nodes)

    @property
    def group(self) -> int:
        """G."""
        return self.shape[0]

    def targets(self, values: NDArray[np.float64], discount: float) -> NDArray[np.float64]:
        """One-step targets `r + discount * V(child)`, `(M, J)`, of the nodes' values `(M,)`; no child is worth 0."""
        return self.rewards + discount * np.where(self.children >= 0, values[self.children], 0.0)

    def by_action(self, rows: NDArray[np.float32], agent: int) -> NDArray[np.float32]:
        """From rows of an agent's replies, `(M * G, d)`, to its rows in the joint actions, `(M * J, d)`."""
        grouped = rows.reshape(len(self), self.group, -1)
        return grouped[:, self.replies[:, agent]].reshape(-1, rows.shape[1])

    def own(self, values: NDArray[np.float64], agent: int) -> NDArray[np.float64]:
        """From a value of each joint action, `(M, J)`, to one of each of an agent's replies, `(M, G)`: the mean over
        all that the others did beside it."""
        full = values.reshape(len(self), *self.shape)
        others = tuple(1 + a for a in range(len(self.shape)) if a != agent and len(self.shape) > 1)
        mean: NDArray[np.float64] = full.mean(others) if others else full
        return mean


# -- the loss ---------------------------------------------------------------------------------------


def team_loss(
    logp: Tensor,
    entropy: Tensor,
    lengths: Sequence[int],
    advantages: NDArray[np.float64],
    config: TeamConfig,
    *,
    old: Tensor | None = None,
    reference: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """One agent's loss: the mean over its samples of a sum over their tokens.

    Of a token, with the advantage A of its sample: `-A log π` (MAGRPO's, as released: no ratio, no clip), or PPO's
    clipped loss with dual clip 3; plus `kl` times k3, minus `entropy` times the entropy. `length_norm` makes the sum
    a mean. A sample without tokens counts among the samples, with a loss of 0.

    Args:
        logp, entropy: float32 `(tokens,)`, of all samples one behind the other; entropy in nats.
        lengths: n of them, how many tokens each sample has.
        advantages: `(n,)`.
        config: which loss, and weights.
        old: float32 `(tokens,)`, log-probabilities before the first step; only the loss clip asks for it.
        reference: float32 `(tokens,)`, of the model as it was when learning began; None: no divergence.

    Returns:
        The loss, and `policy_loss` (without divergence and entropy), `entropy` (mean a token), `kl` (mean a token, if
        there is a reference), `clipped` (share of tokens, of the loss clip).
    """
    count = torch.tensor(lengths)
    sample = torch.repeat_interleave(torch.arange(len(lengths)), count)
    weight = torch.from_numpy(np.asarray(advantages, np.float32))[sample]
    stats: dict[str, float] = {"entropy": _mean(entropy)}

    def total(each: Tensor) -> Tensor:
        sums = torch.zeros(len(lengths)).index_add(0, sample, each)
        return (sums / count.clamp(min=1) if config.length_norm else sums).mean()

    if config.loss == "clip":
        assert old is not None
        each, clipped = clipped_surrogate(logp, old, weight, config.clip, config.clip)
        stats["clipped"] = _mean(clipped.float())
    else:
        each = -weight * logp
    loss = total(each)
    stats["policy_loss"] = float(loss.detach())
    if reference is not None:
        kl = low_var_kl(logp, reference)
        stats["kl"] = _mean(kl)
        loss = loss + config.kl * total(kl)
    if config.entropy:
        loss = loss - config.entropy * total(entropy)
    return loss, stats


def _mean(values: Tensor) -> float:
    return float(values.detach().mean()) if len(values) else 0.0


# -- learning ----------------------------------------------------------------------------------------


class TeamAlgorithm(Protocol):
    """How a team of language models learns; built as `TeamLearner` is."""

    def update(self, roots: Sequence[TeamNode]) -> dict[str, float]:
        """Learn from some rollout trees, grown by the policies as they are now; what to log of it."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """All that decides what is learnt next, but for the policies' own states, as tensors by name."""
        ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Put back what `state_dict` gave."""
        ...


class _Place(NamedTuple):
    """A policy, and the agents that it plays."""

    policy: PolicyModel
    agents: list[int]


class TeamLearner:
    """How advantages change the models; what an algorithm is made of.

    Agents may share weights: one policy object at several places. It then takes one step on the sum of their losses.
    """

    def __init__(self, config: TeamConfig, policies: Sequence[PolicyModel], seed: int) -> None:
        """A learner for a team.

        Args:
            config: hyper-parameters.
            policies: one an agent, N of them; their own states belong to their owner.
            seed: root seed of whatever the algorithm draws itself (critics' initial weights).
        """
        if not policies:
            raise EchelonError("a team needs at least one agent")
        self.config, self.policies, self.seed = config, list(policies), seed
        self.places: list[_Place] = []
        for i, policy in enumerate(self.policies):
            place = next((place for place in self.places if place.policy is policy), None)
            if place is None:
                self.places.append(_Place(policy, [i]))
            else:
                place.agents.append(i)

    def flatten(self, roots: Sequence[TeamNode]) -> TeamBatch:
        """The trees as arrays."""
        return TeamBatch(roots, len(self.policies), self.config.joint, self.config.discount)

    def improve(
        self, batch: TeamBatch, advantages: Sequence[NDArray[np.float64]], *, diverge: bool = True
    ) -> dict[str, float]:
        """Change the policies: `epochs` optimiser steps each.

        Args:
            batch: what was written.
            advantages: by agent, `(M, G)`.
            diverge: whether the divergence from the reference is part of the loss (if it has a weight).

        Returns:
            `return`, the mean return of the roots' joint actions; and of each agent, with its number at the end of
            the name (`loss_0`, …), `loss` and what else `team_loss` gives, means over the epochs; `grad_norm` of its
            policy; `advantage_std`, before they were normalised over the batch.

        Raises:
            EchelonError: an agent's loss isn't finite.
        """
        stats = {"return": float(batch.returns[batch.roots].mean())}
        weights = []
        for i, own in enumerate(advantages):
            flat = np.asarray(own, np.float64).reshape(-1)
            stats[f"advantage_std_{i}"] = float(flat.std())
            weights.append(standardise(flat, batch.returns) if self.config.per_agent_norm else flat)
        for policy, agents in self.places:
            items = [item for i in agents for item in batch.items[i]]
            known = None
            if diverge and self.config.kl:
                known = torch.from_numpy(np.concatenate(policy.reference(items))[:, 0])
            old = None
            total: dict[str, float] = {}
            for _ in range(self.config.epochs):
                numbers = policy.evaluate(items)
                leaf = torch.from_numpy(np.concatenate(numbers)).requires_grad_()
                old = leaf.detach()[:, 0] if old is None else old
                loss, found = self._loss(leaf, [len(x) for x in numbers], agents, weights, old, known)
                (grad,) = torch.autograd.grad(loss, leaf)
                grads = np.split(grad.numpy(), np.cumsum([len(x) for x in numbers])[:-1])
                # What has no gradient needs no pass.
                moved = [k for k, g in enumerate(grads) if g.any()]
                if moved:
                    policy.backward([items[k] for k in moved], [grads[k] for k in moved])
                norm = policy.step() if moved else 0.0
                found |= {f"grad_norm_{i}": norm for i in agents}
                for name, value in found.items():
                    total[name] = total.get(name, 0.0) + value / self.config.epochs
            stats |= total
        return stats

    def _loss(
        self,
        numbers: Tensor,
        lengths: Sequence[int],
        agents: Sequence[int],
        weights: Sequence[NDArray[np.float64]],
        old: Tensor,
        known: Tensor | None,
    ) -> tuple[Tensor, dict[str, float]]:
        """The sum of the losses of the agents that one policy plays; `numbers` are those of all their samples."""
        loss = torch.zeros(())
        stats: dict[str, float] = {}
        sample = token = 0
        for i in agents:
            own = lengths[sample : sample + len(weights[i])]
            tokens = slice(token, token + sum(own))
            value, found = team_loss(
                numbers[tokens, 0], numbers[tokens, 1], own, weights[i], self.config, old=old[tokens],
                reference=None if known is None else known[tokens],
            )  # fmt: skip
            if not bool(value.isfinite()):
                raise EchelonError(
                    f"the loss of agent {i} isn't finite: its model has gone astray; try a lower learning rate"
                )
            loss = loss + value
            stats |= {f"loss_{i}": float(value.detach())} | {f"{name}_{i}": x for name, x in found.items()}
            sample, token = sample + len(own), tokens.stop
        return loss, stats

    def state_dict(self) -> dict[str, Tensor]:
        """All that decides what is learnt next, but for the policies' own states: nothing, without critics."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Put back what `state_dict` gave."""


class GroupLearner(TeamLearner):
    """Learns by comparing each agent's replies at a node with each other: MAGRPO and its variants, no critic.

    A reply's score is what its joint action returned; in cross mode the sum over all joint actions that it is part
    of. With one agent this is GRPO's setting.
    """

    config: GroupConfig

    def __init__(self, config: GroupConfig, policies: Sequence[PolicyModel], seed: int) -> None:
        """As `TeamLearner`; warns where `normalize` makes the mode meaningless."""
        super().__init__(config, policies, seed)
        if config.normalize and config.mode != "mean":
            warnings.warn(
                f"with algorithm.normalize the modes mean, raw, max and rloo are the same: {config.mode} is mean",
                UserWarning,
                stacklevel=2,
            )

    def update(self, roots: Sequence[TeamNode]) -> dict[str, float]:
        """Learn from some rollout trees; what to log of it: see `improve`.

        Raises:
            EchelonError: one reply a prompt, and a mode that compares replies; a loss that isn't finite.
            ValueError: trees of the wrong shape.
        """
        c, agents = self.config, len(self.policies)
        batch = self.flatten(roots)
        c.check_group(batch.group)
        grid = batch.returns.reshape(len(batch), *batch.shape)
        # By node and agent, (M, N, G).
        scores = np.stack([team_advantages(own, mode="raw", joint=c.joint, agents=agents) for own in grid])
        taken: dict[str, float] = {}
        if c.kl and c.kl_in == "return":
            part_of = batch.returns.shape[1] // batch.group
            for i, spent in enumerate(self._divergence(batch)):
                scores[:, i] -= c.kl * part_of * spent
                taken[f"kl_return_{i}"] = float(spent.mean())
        # Normalised, every mode is the mean.
        mode: TeamMode = "mean" if c.normalize else c.mode
        advantages = [
            np.concatenate([team_advantages(own, mode=mode, normalize=c.normalize) for own in scores[:, i]])
            for i in range(agents)
        ]
        return self.improve(batch, advantages, diverge=c.kl_in == "loss") | taken

    def _divergence(self, batch: TeamBatch) -> list[NDArray[np.float64]]:
        """By agent, the sum of k3 over the tokens of each of its replies, `(M, G)`."""
        out: list[NDArray[np.float64]] = [np.zeros(0)] * len(self.policies)
        for policy, agents in self.places:
            items = [item for i in agents for item in batch.items[i]]
            pairs = zip(policy.evaluate(items), policy.reference(items), strict=True)
            sums = [
                float(low_var_kl(torch.from_numpy(now[:, 0]), torch.from_numpy(then[:, 0])).sum())
                for now, then in pairs
            ]
            for i, own in zip(agents, np.split(np.array(sums), len(agents)), strict=True):
                out[i] = own.reshape(len(batch), batch.group)
        return out


def standardise(flat: NDArray[np.float64], returns: NDArray[np.float64]) -> NDArray[np.float64]:
    """Advantages with mean 0 and standard deviation 1, float64 `(n,)`.

    They are divided by no less than a hundredth of the returns' deviation (our choice): where all went alike, what is
    left of the advantages is a critic's noise, and must not be blown up. Without any spread of the returns they are 0.
    """
    least = 0.01 * float(np.ptp(returns) and returns.std())
    apart = flat - flat[0]  # so that equal ones are 0 exactly
    centred = apart - apart.mean()
    out: NDArray[np.float64] = centred / max(float(centred.std()), least, 1e-6) if least else 0 * centred
    return out


# -- the register -------------------------------------------------------------------------------------

_TEAMS: dict[str, tuple[Callable[..., TeamAlgorithm], type[TeamConfig]]] = {}


def register_team(name: str, build: Callable[..., TeamAlgorithm], config: type[TeamConfig]) -> None:
    """Make an algorithm for teams of language models known: its class (see `TeamLearner`) and that of its settings."""
    _TEAMS[name] = (build, config)


def team_algorithms() -> dict[str, tuple[Callable[..., TeamAlgorithm], type[TeamConfig]]]:
    """All known algorithms for teams of language models: by name its class, built as (config, policies, seed), and
    that of its settings."""
    return dict(_TEAMS)
