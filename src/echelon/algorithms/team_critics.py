"""Critics for teams of language models: what they see, how they learn, and the actor-critic that IAC and MAAC are.

A critic is a small network on features that the models show of their prompts or replies (a frozen view: no gradient
goes back into the models), so it costs little beside the models' passes. CoMLRL has critics as large as the models,
or heads on them; this is our choice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from echelon.algorithms.teams import TeamBatch, TeamConfig, TeamLearner, TeamNode
from echelon.errors import EchelonError
from echelon.networks import MLP, ValueNorm
from echelon.rng import spawn_keys

if TYPE_CHECKING:
    from echelon.llm.policy import PolicyModel

__all__ = ["ActorCritic", "Critic", "CriticConfig", "CriticLearner", "ShowsFeatures", "explained", "unit"]

Array32 = NDArray[np.float32]


class ShowsFeatures(Protocol):
    """A policy whose states a critic can see."""

    def features(self, items: Sequence[Any], /, *, replies: bool) -> Array32:
        """What the model makes of each item, float32 `(n, d)`: at the end of its prompt, or of its reply."""
        ...


@dataclass(frozen=True)
class CriticConfig(TeamConfig):
    """Hyper-parameters of the algorithms with critics (CoMLRL 1.4.3's where it has them; the rest our choice)."""

    critic: Literal["v", "q"] = "v"
    """v: what a joint history is worth; q: what a reply is worth there."""
    per_agent_norm: bool = True
    """Bring each agent's advantages to mean 0 and standard deviation 1 over the whole batch."""
    hidden: int = 128
    """Units of each of a critic's two hidden layers."""
    critic_lr: float = 1e-3
    """The critics' step size (Adam); the models' belong to the models."""
    critic_epochs: int = 8
    """Optimiser steps of a critic in an update, each on the whole batch."""
    value_coef: float = 0.6
    """Weight of the critics' loss (with Adam it matters only where gradients are clipped)."""
    max_grad_norm: float = 1.0
    """A critic's gradient is scaled down to this norm."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(
            ("critic", self.critic in ("v", "q"), "v or q"),
            ("hidden", self.hidden >= 1, "at least 1"),
            ("critic_lr", self.critic_lr > 0, "above 0"),
            ("critic_epochs", self.critic_epochs >= 1, "at least 1"),
            ("value_coef", self.value_coef > 0, "above 0"),
            ("max_grad_norm", self.max_grad_norm > 0, "above 0"),
        )

    @property
    def compares(self) -> str | None:
        """As `TeamConfig`'s: a critic q."""
        return "critic q" if self.critic == "q" else None


class Critic:
    """One value of each row of features: two hidden layers, Adam, and targets normalised by `ValueNorm`."""

    def __init__(self, features: int, config: CriticConfig, key: int) -> None:
        """Fresh weights, a function of `key` (at least 0) and the sizes; `features` is D."""
        self.config, self.features = config, features
        generator = torch.Generator().manual_seed(key)
        self.net = MLP(
            (features, config.hidden, config.hidden, 1), np.ones(features, np.float32), last_gain=0.01,
            dtype=torch.float32, generator=generator,
        )  # fmt: skip
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=config.critic_lr, eps=1e-5)
        self.norm = ValueNorm()

    def values(self, x: Array32) -> NDArray[np.float64]:
        """Values `(n,)` of features float32 `(n, D)`."""
        mean, std = self.norm.moments()
        out = self.net.forward(torch.from_numpy(np.ascontiguousarray(x)))[0][:, 0]
        return out.double().numpy() * std + mean

    def fit(self, x: Array32, targets: NDArray[np.float64]) -> float:
        """Learn the targets `(n,)` of features `(n, D)` by their squared error; the mean loss, targets normalised."""
        c, inputs = self.config, torch.from_numpy(np.ascontiguousarray(x))
        self.norm.update(targets.astype(np.float32))
        mean, std = self.norm.moments()
        goal = torch.from_numpy(((targets - mean) / std).astype(np.float32))
        total = 0.0
        for _ in range(c.critic_epochs):
            out, kept = self.net.forward(inputs)
            error = out[:, 0] - goal
            self.net.backward(kept, (2 * c.value_coef / len(error)) * error[:, None])
            self.net.collect()
            torch.nn.utils.clip_grad_norm_(self.net.parameters(), c.max_grad_norm)
            self.optimizer.step()
            total += float(error.square().mean())
        return total / c.critic_epochs

    def state(self, name: str) -> dict[str, Tensor]:
        """Everything, as tensors whose names begin with `name`."""
        found = {
            f"{name}.features": torch.tensor(self.features),
            f"{name}.weights": self.net.flat.data,
            f"{name}.value_norm": self.norm.stats,
        }
        more = {f"{name}.{key}": value for key, value in self.optimizer.state.get(self.net.flat, {}).items()}
        return {key: value.detach().clone() for key, value in (found | more).items()}

    def load(self, name: str, state: dict[str, Tensor]) -> None:
        """Put back what `state` gave.

        Raises:
            EchelonError: the network has another shape.
        """
        if state[f"{name}.weights"].shape != self.net.flat.shape:
            raise EchelonError("the saved critics of the team don't fit: they had other algorithm.hidden")
        self.net.flat.data.copy_(state[f"{name}.weights"])
        self.norm.stats.copy_(state[f"{name}.value_norm"])
        self.optimizer.state.clear()
        if f"{name}.step" in state:
            kept = {k: state[f"{name}.{k}"].clone() for k in ("step", "exp_avg", "exp_avg_sq")}
            self.optimizer.state[self.net.flat] = kept


class CriticLearner(TeamLearner):
    """A `TeamLearner` whose critics see the models' features. Their number decides the critics' sizes, so there are
    none before the first update."""

    config: CriticConfig

    def __init__(self, config: CriticConfig, policies: Sequence[PolicyModel], seed: int) -> None:
        """As `TeamLearner`.

        Raises:
            EchelonError: a policy that shows no features.
        """
        super().__init__(config, policies, seed)
        for i, policy in enumerate(policies):
            if not hasattr(policy, "features"):
                raise EchelonError(f"the model of agent {i} shows no features, which a critic needs: use magrpo")

    def flatten(self, roots: Sequence[TeamNode]) -> TeamBatch:
        """The trees as arrays.

        Raises:
            EchelonError: a critic q, and no replies to compare.
        """
        batch = super().flatten(roots)
        self.config.check_group(batch.group)
        return batch

    def prompts(self, batch: TeamBatch) -> list[Array32]:
        """By agent, the features of its prompt at each node, float32 `(M, d)`."""
        first = [own[:: batch.group] for own in batch.items]
        return self._features(first, replies=False)

    def replies(self, batch: TeamBatch) -> list[Array32]:
        """By agent, the features of its replies, float32 `(M * G, d)`."""
        return self._features(batch.items, replies=True)

    def _features(self, items: Sequence[Sequence[Any]], *, replies: bool) -> list[Array32]:
        out: list[Array32] = [np.zeros((0, 0), np.float32)] * len(items)
        for policy, agents in self.places:
            model = cast(ShowsFeatures, policy)
            found = unit(model.features([item for i in agents for item in items[i]], replies=replies))
            for i, own in zip(agents, np.split(found, len(agents)), strict=True):
                out[i] = own
        return out


class ActorCritic(CriticLearner):
    """One-step actor-critic on a tree's nodes: what IAC and MAAC share.

    With `r + γ V(child)` as target, the advantage of a joint action is, with V critics, target - V (as CoMLRL); with Q
    critics, Q - the mean of Q over the node's joint actions (our choice: target - Q would go to 0 for good actions
    and bad ones alike as Q is learnt), where V(child) is that mean at the child. Each is averaged over what the other
    agents did, where there was more than one (cross). V advantages are from before the critics' step, Q's from after.
    """

    def __init__(self, config: CriticConfig, policies: Sequence[PolicyModel], seed: int) -> None:
        """As `CriticLearner`."""
        super().__init__(config, policies, seed)
        self.critics: list[Critic] = []

    def build(self, sizes: Sequence[int]) -> None:
        """The critics, one for each number of features, if there are none yet.

        Raises:
            EchelonError: there are, and they see other numbers of features.
        """
        if not self.critics:
            keys = spawn_keys(self.seed, (30,), len(sizes)) >> np.uint64(1)
            self.critics = [Critic(n, self.config, int(key)) for n, key in zip(sizes, keys, strict=True)]
        elif [critic.features for critic in self.critics] != list(sizes):
            raise EchelonError("the team's critics saw features of other models than these")

    def state_dict(self) -> dict[str, Tensor]:
        """All that decides what is learnt next, but for the policies' own states, as tensors by name."""
        state: dict[str, Tensor] = {}
        for k, critic in enumerate(self.critics):
            state |= critic.state(f"critic.{k}")
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Put back what `state_dict` gave.

        Raises:
            EchelonError: the critics have other shapes.
        """
        self.critics = []
        count = sum(name.endswith(".features") for name in state)
        if count:
            self.build([int(state[f"critic.{k}.features"]) for k in range(count)])
        for k, critic in enumerate(self.critics):
            critic.load(f"critic.{k}", state)

    def assess(
        self,
        critic: Critic,
        seen: Array32,
        batch: TeamBatch,
        view: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    ) -> tuple[NDArray[np.float64], float, float]:
        """Let a critic judge a batch, and learn from it.

        Args:
            critic: it.
            seen: what it sees: of each node `(M, D)` (V), or of each of the actions that it tells apart `(M * R, D)`
                (Q).
            batch: the nodes.
            view: from numbers of joint actions, `(M, J)`, to those of the actions that it tells apart, `(M, R)`.

        Returns:
            Advantages `(M, R)`, the critic's loss, and the share of its targets' variance that it had explained.
        """
        gamma = self.config.discount
        if self.config.critic == "v":
            value = critic.values(seen)
            target = view(batch.targets(value, gamma))
            explained_before = explained(target.mean(1), value)
            loss = critic.fit(seen, target.mean(1))
            return target - value[:, None], loss, explained_before
        value = critic.values(seen).reshape(len(batch), -1)
        target = view(batch.targets(value.mean(1), gamma))
        explained_before = explained(target, value)
        loss = critic.fit(seen, target.reshape(-1))
        value = critic.values(seen).reshape(len(batch), -1)
        return value - value.mean(1, keepdims=True), loss, explained_before


def unit(x: Array32) -> Array32:
    """Rows divided by their root mean square: a language model's states differ in scale from model to model."""
    size = np.sqrt(np.square(x, dtype=np.float64).mean(1, keepdims=True))
    return np.asarray(x / np.maximum(size, 1e-6), np.float32)


def explained(target: NDArray[np.float64], value: NDArray[np.float64]) -> float:
    """The share of the targets' variance that the values explain; 0 where there is none to explain."""
    spread = float(target.var())
    return 1 - float((target - value).var()) / spread if spread > 0 else 0.0
