"""MA-VDN and MA-QMIX: value factorisation for teams of language models (ours; no released library has it).

Each agent has a value head on its model's features, and the heads' values are mixed into the team's value: summed
(VDN, Sunehag et al. 2018), or by a network that increases with each of them and whose weights depend on what all
agents see (QMIX, Rashid et al. 2018). The mixed value learns what the joint action returned. Language models have too
many actions for Q-learning's maximum, so the factors serve a policy gradient, in one of two ways:

q   A head values an agent's reply. A reply's advantage is how much the team's value falls when the agent's own is
    replaced by the mean of its group's, all others as they are: each agent is credited for its own part, where a
    joint return would blame it for its teammates' luck. (In the spirit of COMA's counterfactual baseline, Foerster
    et al. 2018.) What the critic hasn't learnt isn't credited.
v   A head values an agent's prompt, and the advantage is the joint return minus the mixed value: VDAC (Su et al.
    2021, "Value-Decomposition Multi-Agent Actor-Critics"), with Monte Carlo returns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from echelon.algorithms.team_critics import Array32, CriticConfig, CriticLearner, explained
from echelon.algorithms.teams import TeamNode
from echelon.errors import EchelonError
from echelon.mixing import MonotonicMixer, SumMixer
from echelon.networks import MLP, ValueNorm
from echelon.rng import spawn_keys

if TYPE_CHECKING:
    from echelon.llm.policy import PolicyModel

__all__ = ["MAMixing", "MAQMIXConfig", "MAVDNConfig"]


@dataclass(frozen=True)
class MAVDNConfig(CriticConfig):
    """Hyper-parameters of MA-VDN (our choice)."""

    critic: Literal["v", "q"] = "q"
    """q: heads value replies, and each agent is credited for its own; v: they value prompts (VDAC)."""
    mixer: Literal["vdn", "qmix"] = "vdn"
    """How the heads' values become the team's: as their sum, or by a monotonic network that sees all prompts."""
    embed: int = 32
    """Units of the mixing network's hidden layer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(("mixer", self.mixer in ("vdn", "qmix"), "vdn or qmix"), ("embed", self.embed >= 1, "at least 1"))


@dataclass(frozen=True)
class MAQMIXConfig(MAVDNConfig):
    """Hyper-parameters of MA-QMIX: MA-VDN's, with a network for the sum."""

    mixer: Literal["vdn", "qmix"] = "qmix"
    """How the heads' values become the team's: as their sum, or by a monotonic network that sees all prompts."""


class MAMixing(CriticLearner):
    """A team whose value is mixed from its agents' value heads.

    Attributes:
        heads: one an agent; none before the first update, as their sizes are those of the models' features.
        mixer: what mixes.
        optimizer: Adam over the mixer's weights and the heads'.
        norm: of the returns.
    """

    config: MAVDNConfig

    def __init__(self, config: MAVDNConfig, policies: Sequence[PolicyModel], seed: int) -> None:
        """As `CriticLearner`."""
        super().__init__(config, policies, seed)
        self.norm = ValueNorm()
        self.mixer: torch.nn.Module = SumMixer()
        self.heads: list[MLP] = []
        self._sizes: list[int] = []

    def _build(self, sizes: Sequence[int]) -> None:
        """The heads for so many features an agent, the last number being that of the state, and the mixer."""
        c, state = self.config, sizes[-1]
        if self.heads:
            if self._sizes != list(sizes):
                raise EchelonError("the team's value heads saw features of other models than these")
            return
        self._sizes = list(sizes)
        keys = (spawn_keys(self.seed, (31,), len(sizes)) >> np.uint64(1)).tolist()
        *drawn, mixing = [torch.Generator().manual_seed(key) for key in keys]
        for n, generator in zip(sizes[:-1], drawn, strict=True):
            scale = np.ones(n, np.float32)
            head = MLP((n, c.hidden, c.hidden, 1), scale, last_gain=0.01, dtype=torch.float32, generator=generator)
            self.heads.append(head)
        if c.mixer == "qmix":
            self.mixer = MonotonicMixer(len(self.heads), np.ones(state, np.float32), embed=c.embed, generator=mixing)
        self.params = [*self.mixer.parameters(), *(head.flat for head in self.heads)]
        self.optimizer = torch.optim.Adam(self.params, lr=c.critic_lr, eps=1e-5)

    def update(self, roots: Sequence[TeamNode]) -> dict[str, float]:
        """Learn from some rollout trees; what to log of it: `improve`'s numbers, and `value_loss` and
        `explained_variance` (before it learnt) of the mixed value."""
        batch = self.flatten(roots)
        agents, nodes = range(len(self.policies)), len(batch)
        prompts = self.prompts(batch)
        state = np.concatenate(prompts, 1)
        of_prompts = self.config.critic == "v"
        seen = prompts if of_prompts else self.replies(batch)
        self._build([*(x.shape[1] for x in seen), state.shape[1]])
        if of_prompts:
            which, targets = np.zeros((1, len(agents)), np.int64), batch.returns.mean(1)
        else:
            which, targets = batch.replies, batch.returns.reshape(-1)
            state = np.repeat(state, len(which), 0)
        before = self._team(self._values(seen, nodes), which, state)
        loss = self._fit(seen, which, state, targets, nodes)
        stats = {"value_loss": loss, "explained_variance": explained(targets, before)}
        if of_prompts:
            joint = batch.returns - before[:, None]
            return self.improve(batch, [batch.own(joint, i) for i in agents]) | stats
        values = self._values(seen, nodes)
        team = self._team(values, which, state)
        advantages = []
        for i in agents:
            without = [x.mean(1, keepdim=True).expand_as(x) if k == i else x for k, x in enumerate(values)]
            fall = team - self._team(without, which, state)
            advantages.append(batch.own(fall.reshape(nodes, -1), i))
        return self.improve(batch, advantages) | stats

    def _values(self, seen: Sequence[Array32], nodes: int) -> list[Tensor]:
        """By agent its head's values, float32 `(M, R)`, of the features of its R prompts or replies a node."""
        return [
            head.forward(torch.from_numpy(np.ascontiguousarray(x)))[0].view(nodes, -1)
            for head, x in zip(self.heads, seen, strict=True)
        ]

    def _mix(self, values: Sequence[Tensor], which: NDArray[np.int64], state: Array32) -> Tensor:
        """The team's normalised values, `(M * J,)`, of joint actions: `which` head value of each agent, `(J, N)`."""
        chosen = [own[:, torch.from_numpy(which[:, i].copy())].reshape(-1) for i, own in enumerate(values)]
        mixed: Tensor = self.mixer(torch.stack(chosen, 1), torch.from_numpy(state))
        return mixed

    def _team(self, values: Sequence[Tensor], which: NDArray[np.int64], state: Array32) -> NDArray[np.float64]:
        """The same in units of returns, float64 `(M * J,)`."""
        mean, std = self.norm.moments()
        with torch.no_grad():
            return self._mix(values, which, state).double().numpy() * std + mean

    def _fit(
        self,
        seen: Sequence[Array32],
        which: NDArray[np.int64],
        state: Array32,
        targets: NDArray[np.float64],
        nodes: int,
    ) -> float:
        """Let heads and mixer learn the targets `(M * J,)`; the mean loss, of normalised targets."""
        c = self.config
        self.norm.update(targets.astype(np.float32))
        mean, std = self.norm.moments()
        goal = torch.from_numpy(((targets - mean) / std).astype(np.float32))
        total = 0.0
        for _ in range(c.critic_epochs):
            kept, leaves = [], []
            for head, x in zip(self.heads, seen, strict=True):
                out, inputs = head.forward(torch.from_numpy(np.ascontiguousarray(x)))
                kept.append(inputs)
                leaves.append(out.view(nodes, -1).requires_grad_())
            loss = torch.nn.functional.mse_loss(self._mix(leaves, which, state), goal)
            own = list(self.mixer.parameters())
            grads = torch.autograd.grad(c.value_coef * loss, [*own, *leaves])
            for p, grad in zip(own, grads, strict=False):
                p.grad = grad
            for head, inputs, grad in zip(self.heads, kept, grads[len(own) :], strict=True):
                head.backward(inputs, grad.reshape(-1, 1))
                head.collect()
            torch.nn.utils.clip_grad_norm_(self.params, c.max_grad_norm)
            self.optimizer.step()
            total += float(loss.detach())
        return total / c.critic_epochs

    def state_dict(self) -> dict[str, Tensor]:
        """All that decides what is learnt next, but for the policies' own states, as tensors by name."""
        if not self.heads:
            return {}
        state = {"sizes": torch.tensor(self._sizes), "value_norm": self.norm.stats}
        for k, p in enumerate(self.params):
            state[f"weights.{k}"] = p.data
            state |= {f"adam.{k}.{key}": value for key, value in self.optimizer.state.get(p, {}).items()}
        return {name: value.detach().clone() for name, value in state.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Put back what `state_dict` gave.

        Raises:
            EchelonError: the heads or the mixer have other shapes.
        """
        self.heads, self.norm = [], ValueNorm()
        if "sizes" not in state:
            return
        self._build(state["sizes"].tolist())
        self.norm.stats.copy_(state["value_norm"])
        saved = [state.get(f"weights.{k}") for k in range(len(self.params))]
        fits = f"weights.{len(saved)}" not in state
        for k, (p, weights) in enumerate(zip(self.params, saved, strict=True)):
            if not fits or weights is None or weights.shape != p.shape:
                raise EchelonError(
                    "the saved value heads of the team don't fit: they had other algorithm.hidden, algorithm.embed or "
                    "algorithm.mixer"
                )
            p.data.copy_(weights)
            if f"adam.{k}.step" in state:
                self.optimizer.state[p] = {
                    key: state[f"adam.{k}.{key}"].clone() for key in ("step", "exp_avg", "exp_avg_sq")
                }
