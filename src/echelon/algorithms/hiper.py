"""HiPER: a planner's policy that learns which subgoal to choose and when to change it, each from its own advantage.

arXiv 2602.16165: hierarchical advantage estimation gives the choice of a subgoal the worth of its whole segment and
the decision to keep or switch the worth of going on from there; three critics say what was to be expected. Here the
critics are small networks of their own on features of the state (the released code has heads on a second language
model), so a planner's model of any kind can be trained on a processor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from echelon.advantages import KeepPenaltyMode, hae_many, hae_switch_option_critic
from echelon.algorithms.decisions import Decisions, LearnerConfig, improve
from echelon.errors import EchelonError
from echelon.networks import MLP, ValueNorm
from echelon.rng import spawn_keys

if TYPE_CHECKING:
    from echelon.llm.policy import PolicyModel

__all__ = ["Credit", "HiPER", "HiPERConfig", "Turns"]

Head = Literal["high", "low", "term"]
HEADS: tuple[Head, ...] = ("low", "high", "term")


@dataclass(frozen=True)
class HiPERConfig(LearnerConfig):
    """Hyper-parameters of HiPER (those of its released scripts where they name them)."""

    estimator: Literal["hae", "gae"] = "hae"
    """hae: each level has its own advantage. gae: flat PPO over the same turns, the control: one critic, and all
    decisions of a turn get the turn's advantage (its trace decays by lam_turn)."""
    gamma: float = 1.0
    """Discount an environment step."""
    lam_turn: float = 1.0
    """Decay of the low level's trace, a turn."""
    lam_seg: float = 0.95
    """Decay of the high level's trace, a segment."""
    bootstrap: Literal["last", "self", "none"] = "last"
    """What a trajectory that was cut off is worth from there: V^H of its true last observation (our choice), the last
    segment's own values (as released), or nothing."""
    switch_estimator: Literal["termination_head", "option_critic"] = "termination_head"
    """The advantage of KEEP and SWITCH: return minus V^T (as released), or from V^H and V^L (the paper's form)."""
    normalize: bool = True
    """Bring each level's advantages to mean 0 and standard deviation 1 over the batch."""
    keep_penalty: float = 0.0
    """Added to the reward of turns that KEEP (HiPER's scripts: -0.3 to -3.5, with returns of 10)."""
    keep_penalty_mode: KeepPenaltyMode = "normalized"
    """fixed: each such turn gets it; normalized: each gets a share of it, one over the trajectory's turns."""
    consistency_penalty: float = 0.0
    """Added to the reward where KEEP was said and another subgoal written (HiPER's scripts: -0.3)."""
    switch_rate_floor: float = 0.0
    """Share of turns that switch below which a trajectory is penalised."""
    switch_rate_floor_coef: float = 0.0
    """That penalty's weight (HiPER's runs: 0.25 and 5)."""
    collapse_rate: float = 0.02
    """Share of reviews that switch below which options have collapsed…"""
    collapse_updates: int = 3
    """… if it stays there for so many updates."""
    hidden: int = 128
    """Units of each of the critics' two hidden layers."""
    critic_lr: float = 1e-3
    """The critics' step size (Adam); the policy's belongs to the policy."""
    critic_epochs: int = 8
    """Passes of the critics over an update's turns: they are cheap, and what the policy learns hangs on them."""
    critic_minibatches: int = 1
    """Minibatches each."""
    critic_warmup: int = 0
    """Updates in which only the critics learn: a policy that came from imitation is lost to critics that know nothing
    yet."""
    value_clip: float = 0.5
    """How far a critic may move in one update and still gain by it, in standard deviations of its target."""
    value_coef: float = 1.0
    """Weight of the critics' losses (with Adam it matters only where gradients are clipped)."""
    max_grad_norm: float = 1.0
    """Each critic's gradient is scaled down to this norm."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(
            ("estimator", self.estimator in ("hae", "gae"), "hae or gae"),
            ("gamma", 0 <= self.gamma <= 1, "0 to 1"),
            ("lam_turn", 0 <= self.lam_turn <= 1, "0 to 1"),
            ("lam_seg", 0 <= self.lam_seg <= 1, "0 to 1"),
            ("bootstrap", self.bootstrap in ("last", "self", "none"), "last, self or none"),
            (
                "switch_estimator",
                self.switch_estimator in ("termination_head", "option_critic"),
                "termination_head or option_critic",
            ),
            ("keep_penalty_mode", self.keep_penalty_mode in ("normalized", "fixed"), "normalized or fixed"),
            ("switch_rate_floor", 0 <= self.switch_rate_floor <= 1, "0 to 1"),
            ("switch_rate_floor_coef", self.switch_rate_floor_coef >= 0, "at least 0"),
            ("collapse_rate", 0 <= self.collapse_rate <= 1, "0 to 1"),
            ("collapse_updates", self.collapse_updates >= 1, "at least 1"),
            ("hidden", self.hidden >= 1, "at least 1"),
            ("critic_lr", self.critic_lr > 0, "above 0"),
            ("critic_epochs", self.critic_epochs >= 1, "at least 1"),
            ("critic_minibatches", self.critic_minibatches >= 1, "at least 1"),
            ("critic_warmup", self.critic_warmup >= 0, "at least 0"),
            ("value_clip", self.value_clip > 0, "above 0"),
            ("value_coef", self.value_coef > 0, "above 0"),
            ("max_grad_norm", self.max_grad_norm > 0, "above 0"),
        )


@dataclass
class Turns:
    """m turns of some trajectories, one trajectory's turns after another.

    A trajectory is what one agent's planner lived through, up to the end of its episode or to where it was cut off.
    `before`, `after` and `last` show a state in one layout: it says which subgoal is being followed, so V^L of
    `before` is the worth of keeping it.

    Attributes:
        trajectory: int64 `(m,)`, ascending; each one's place in `last`.
        reward: float32 `(m,)`; of a turn that lasted several steps their sum, discounted to its first.
        switch: bool `(m,)`, whether a subgoal was chosen anew (also: had to be); false is KEEP.
        done: bool `(m,)`, where the episode really ended.
        before: float32 `(m, D)`, of about unit size, what the critics see before the turn's decisions.
        after: float32 `(m, D)`, the same with the subgoal that the turn follows.
        last: float32 `(trajectories, D)`, the true last observation of each, where the next decision would have been.
        choice: int64 `(m,)`, the row of the turn's choice of a subgoal, -1 where none was made.
        review: int64 `(m,)`, the row of its decision to keep or switch, -1 where none was made.
        discount_steps: int64 `(m,)`, environment steps that the turn lasted; 1 each if not given.
        consistent: bool `(m,)`, whether the subgoal written is the one kept; no turn is inconsistent if not given.

    Raises:
        ValueError: the shapes don't fit, or a subgoal was chosen where none began.
    """

    trajectory: NDArray[np.int64]
    reward: NDArray[np.float32]
    switch: NDArray[np.bool_]
    done: NDArray[np.bool_]
    before: NDArray[np.float32]
    after: NDArray[np.float32]
    last: NDArray[np.float32]
    choice: NDArray[np.int64]
    review: NDArray[np.int64]
    discount_steps: NDArray[np.int64] | None = None
    consistent: NDArray[np.bool_] | None = None

    def __post_init__(self) -> None:
        m = len(self.trajectory)
        flat = (self.trajectory, self.reward, self.switch, self.done, self.choice, self.review)
        rest = tuple(x for x in (self.discount_steps, self.consistent) if x is not None)
        if any(x.shape != (m,) for x in flat + rest):
            raise ValueError("every array but before, after and last has one entry a turn")
        if self.before.shape != self.after.shape or self.before.shape != (m, self.last.shape[1]):
            raise ValueError("before and after must be (m, D), last (trajectories, D)")
        if m and (
            np.diff(self.trajectory).min(initial=0) < 0
            or not 0 <= self.trajectory[0] <= self.trajectory[-1] < len(self.last)
        ):
            raise ValueError("trajectory must ascend, and name rows of last")
        if (self.choice[~self.boundary] >= 0).any():
            raise ValueError("a subgoal was chosen in a turn that keeps one")

    def __len__(self) -> int:
        return len(self.trajectory)

    @property
    def first(self) -> NDArray[np.bool_]:
        """The first turn of each trajectory, bool `(m,)`."""
        return np.diff(self.trajectory, prepend=-1) > 0

    @property
    def boundary(self) -> NDArray[np.bool_]:
        """Where a segment begins: the first turns, and those that switch, bool `(m,)`."""
        return self.switch | self.first

    @property
    def lengths(self) -> NDArray[np.int64]:
        """How many turns each trajectory has that has any, int64, in their order."""
        return np.diff(np.append(np.flatnonzero(self.first), len(self)))


@dataclass(frozen=True)
class Credit:
    """What the turns of a batch were worth; all arrays float32 `(m,)`.

    Attributes:
        adv_low: advantage of what the turn did towards its subgoal, for a model that acts, too.
        adv_high: of the subgoal chosen, 0 where none was.
        adv_term: of keeping or switching, 0 where that wasn't decided.
        returns: by critic (`high`, `low`, `term`), what it should have said.
        values: by critic, what it said.
        owned: by critic, bool `(m,)`, the turns that it learns from.
        outputs: by critic, what its network gave for that.
        spread: by level, the standard deviation of its advantages before they were normalised.
    """

    adv_low: NDArray[np.float32]
    adv_high: NDArray[np.float32]
    adv_term: NDArray[np.float32]
    returns: dict[Head, NDArray[np.float32]]
    values: dict[Head, NDArray[np.float32]]
    owned: dict[Head, NDArray[np.bool_]]
    outputs: dict[Head, Tensor]
    spread: dict[Head, float]


class HiPER:
    """Critics of a planner's decisions, and how its policy learns from their advantages.

    A single model that plays both levels uses `assess` and `fit_critics` with `option_tokens.token_advantages`; a
    planner over executors that learn by themselves uses `update`.

    Attributes:
        updates: how many there were.
        low_updates: how many of the latest had a switch rate below `collapse_rate`.
    """

    def __init__(self, config: HiPERConfig, policy: PolicyModel, features: int, seed: int) -> None:
        """Fresh critics.

        Args:
            config: hyper-parameters.
            policy: the model whose decisions improve; its own state belongs to its owner.
            features: D, what the critics see of a turn.
            seed: root seed of initial weights and minibatches.
        """
        self.config, self.policy = config, policy
        generator = torch.Generator().manual_seed(int(spawn_keys(seed, (20,), 1)[0] >> np.uint64(1)))
        scale, h = np.ones(features, np.float32), config.hidden
        self.critics: dict[Head, MLP] = {
            head: MLP((features, h, h, 1), scale, last_gain=0.01, dtype=torch.float32, generator=generator)
            for head in HEADS
        }
        self.optimizers = {
            head: torch.optim.Adam(net.parameters(), lr=config.critic_lr, eps=1e-5)
            for head, net in self.critics.items()
        }
        self.norms: dict[Head, ValueNorm] = {head: ValueNorm() for head in HEADS}
        self._key = int(spawn_keys(seed, (21,), 1)[0])
        self.updates = self.low_updates = 0

    # -- what turns were worth -------------------------------------------------------------------

    def values(self, head: Head, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """A critic's values of some states, float32 `(n,)`, for features float32 `(n, D)`."""
        return self._denormalised(head, self._output(head, features))

    def assess(self, turns: Turns, switch_probability: NDArray[np.float32] | None = None) -> Credit:
        """The advantages and returns of a batch of turns.

        Args:
            turns: m of them, at least one.
            switch_probability: float32 `(m,)`, what SWITCH had where it was decided; only `option_critic` asks.
        """
        c = self.config
        rewards = turns.reward.astype(np.float64)
        if turns.consistent is not None:
            rewards += c.consistency_penalty * ~(turns.consistent | turns.switch | turns.first)
        steps = np.ones(len(turns)) if turns.discount_steps is None else turns.discount_steps
        penalties: dict[str, Any] = {
            "keep_penalty": c.keep_penalty,
            "keep_penalty_mode": c.keep_penalty_mode,
            "switch_rate_floor": c.switch_rate_floor,
            "switch_rate_floor_coef": c.switch_rate_floor_coef,
        }
        flat = c.estimator == "gae"
        outputs: dict[Head, Tensor] = {"high": self._output("high", turns.before)}
        if not flat:
            outputs |= {"low": self._output("low", turns.after), "term": self._output("term", turns.before)}
        values = {head: self._denormalised(head, out) for head, out in outputs.items()}
        last = None
        if c.bootstrap == "last":
            last = self.values("high", turns.last[turns.trajectory[turns.first]])
        everywhere = np.ones(len(turns), bool)
        returned: dict[Head, NDArray[np.float64]]
        owned: dict[Head, NDArray[np.bool_]]
        if flat:
            # Where every turn is a segment, the high level's estimate is GAE; penalties go by the real segments
            # (without a future, and with nothing expected, the low level's advantage is the reward and they).
            nothing = np.zeros(len(turns))
            rewards = hae_many(
                turns.lengths, rewards, turns.switch, turns.done, nothing, nothing,
                gamma=0.0, lam_turn=0.0, lam_seg=0.0, **penalties,
            ).adv_low  # fmt: skip
            estimate = hae_many(
                turns.lengths, rewards, everywhere, turns.done, values["high"], values["high"],
                gamma=c.gamma**steps, lam_turn=c.lam_turn, lam_seg=c.lam_turn,
                bootstrap_truncated=c.bootstrap != "none", last_high=last, last_low=last,
            )  # fmt: skip
            levels = [estimate.adv_high] * 3
            returned = {"high": estimate.ret_high}
            owned = {"high": everywhere}
        else:
            estimate = hae_many(
                turns.lengths, rewards, turns.switch, turns.done, values["high"], values["low"], values["term"],
                gamma=c.gamma**steps, lam_turn=c.lam_turn, lam_seg=c.lam_seg,
                bootstrap_truncated=c.bootstrap != "none", last_high=last, last_low=last, **penalties,
            )  # fmt: skip
            levels = [estimate.adv_low, estimate.adv_high, estimate.adv_term]
            returned = {"high": estimate.ret_high, "low": estimate.ret_low, "term": estimate.ret_term}
            owned = {"high": turns.boundary, "low": everywhere, "term": everywhere}
            if c.switch_estimator == "option_critic":
                if switch_probability is None:
                    raise ValueError("option_critic asks for the probabilities of SWITCH")
                levels[2] = hae_switch_option_critic(
                    values["high"], self.values("low", turns.before), turns.switch, switch_probability
                )
        owners = (everywhere, turns.choice >= 0, turns.review >= 0)
        spread: dict[Head, float] = {}
        for i, (head, own) in enumerate(zip(HEADS, owners, strict=True)):
            spread[head] = float(levels[i][own].std()) if own.any() else 0.0
            levels[i] = _whitened(levels[i], own) if c.normalize else np.where(own, levels[i], 0.0)
        low, high, term = (level.astype(np.float32) for level in levels)
        returns = {head: value.astype(np.float32) for head, value in returned.items()}
        return Credit(low, high, term, returns, values, owned, outputs, spread)

    # -- learning --------------------------------------------------------------------------------

    def update(self, turns: Turns, decisions: Decisions) -> dict[str, float]:
        """Learn from a batch of turns; what to log of it.

        Args:
            turns: m of them.
            decisions: those that `turns.choice` and `turns.review` name; others are left alone.

        Returns:
            `improve`'s numbers; of each critic `value_loss_…` and `explained_variance_…` (before it learnt);
            `advantage_std_high` and `advantage_std_term`, before they were normalised; `switch_rate` (of reviews),
            `segment_turns` (mean length of a segment), and `collapsed`, 1 where the planner has stopped switching.
            Nothing if there is no turn.

        Raises:
            ValueError: the turns' rows and the decisions don't fit.
        """
        if not len(turns):
            return {}
        chose, reviewed = turns.choice >= 0, turns.review >= 0
        rows = np.concatenate([turns.choice[chose], turns.review[reviewed]])
        if len(rows) and (rows.max() >= len(decisions) or len(np.unique(rows)) < len(rows)):
            raise ValueError("turns name decisions that there aren't, or name one twice")
        if decisions.binary[turns.choice[chose]].any() or not decisions.binary[turns.review[reviewed]].all():
            raise ValueError("choice must name choices of a subgoal, review decisions to keep or switch")
        switch_probability = np.zeros(len(turns), np.float32)
        taken = np.exp(decisions.logp[turns.review[reviewed]])
        switch_probability[reviewed] = np.where(decisions.chosen[turns.review[reviewed]] == 1, taken, 1 - taken)
        credit = self.assess(turns, switch_probability)
        metrics = self.fit_critics(turns, credit)
        # Adam would go on with its momentum, so a warm-up takes no step at all.
        learns = self.updates >= self.config.critic_warmup
        advantages = np.concatenate([credit.adv_high[chose], credit.adv_term[reviewed]])
        known = decisions.take(rows if learns else rows[:0])
        metrics |= improve(self.policy, known, advantages, self.config, key=self._key, count=2 * self.updates)
        metrics |= {f"advantage_std_{head}": credit.spread[head] for head in ("high", "term")}
        metrics |= self._watch(turns, reviewed)
        self.updates += 1
        return metrics

    def fit_critics(self, turns: Turns, credit: Credit) -> dict[str, float]:
        """Let the critics learn the returns of some turns by PPO's clipped value loss; what to log of it.

        Minibatches depend on `updates`: a caller that doesn't use `update` counts it on by itself.
        """
        c = self.config
        metrics: dict[str, float] = {}
        for head, returns in credit.returns.items():
            rows = np.flatnonzero(credit.owned[head])
            norm = self.norms[head]
            norm.update(np.sort(returns[rows]))
            mean, std = norm.moments()
            targets = torch.from_numpy((returns - np.float32(mean)) / np.float32(std))
            inputs = torch.from_numpy(turns.after if head == "low" else turns.before)
            number = HEADS.index(head)
            shuffle = np.random.Generator(np.random.Philox(key=self._key, counter=[0, 2 * self.updates + 1, number, 0]))
            total, steps = 0.0, 0
            for _ in range(c.critic_epochs):
                order = shuffle.permutation(rows) if c.critic_minibatches > 1 else rows
                for part in np.array_split(order, min(c.critic_minibatches, len(order))):
                    total += self._critic_step(head, inputs[part], targets[part], credit.outputs[head][part])
                    steps += 1
            metrics[f"value_loss_{head}"] = total / steps
            spread = float(np.var(returns[rows]))
            left = float(np.var(returns[rows] - credit.values[head][rows]))
            metrics[f"explained_variance_{head}"] = 1 - left / spread if spread > 0 else 0.0
        return metrics

    def _critic_step(self, head: Head, inputs: Tensor, targets: Tensor, old: Tensor) -> float:
        """One optimiser step of a critic on some rows; the loss."""
        c, net = self.config, self.critics[head]
        out, kept = net.forward(inputs)
        leaf = out[:, 0].clone().requires_grad_()
        bounded = old + (leaf - old).clamp(-c.value_clip, c.value_clip)
        loss = 0.5 * torch.maximum((leaf - targets).square(), (bounded - targets).square()).mean()
        (grad,) = torch.autograd.grad(c.value_coef * loss, leaf)
        net.backward(kept, grad[:, None])
        net.collect()
        torch.nn.utils.clip_grad_norm_(net.parameters(), c.max_grad_norm)
        self.optimizers[head].step()
        return float(loss.detach())

    def _watch(self, turns: Turns, reviewed: NDArray[np.bool_]) -> dict[str, float]:
        """How often the planner switches, and whether it has stopped to."""
        rate = float(turns.switch[reviewed].mean()) if reviewed.any() else 0.0
        if reviewed.any():
            self.low_updates = self.low_updates + 1 if rate < self.config.collapse_rate else 0
        return {
            "switch_rate": rate,
            "segment_turns": len(turns) / float(turns.boundary.sum()),
            "collapsed": float(self.low_updates >= self.config.collapse_updates),
        }

    def _output(self, head: Head, features: NDArray[np.float32]) -> Tensor:
        return self.critics[head].forward(torch.from_numpy(np.ascontiguousarray(features)))[0][:, 0]

    def _denormalised(self, head: Head, out: Tensor) -> NDArray[np.float32]:
        mean, std = self.norms[head].moments()
        return np.asarray((out * std + mean).numpy())

    # -- the whole state, for checkpoints --------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that decides what is learnt next, but for the policy's own, as tensors by name."""
        state = {"updates": torch.tensor(self.updates), "low_updates": torch.tensor(self.low_updates)}
        for head, net in self.critics.items():
            state[f"critic.{head}"] = net.flat.data
            state[f"value_norm.{head}"] = self.norms[head].stats
            for name, value in self.optimizers[head].state.get(net.flat, {}).items():
                state[f"critic.{head}.{name}"] = value
        return {name: value.detach().clone() for name, value in state.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Put back what `state_dict` gave.

        Raises:
            EchelonError: the critics have other shapes.
        """
        for head, net in self.critics.items():
            name = f"critic.{head}"
            if name not in state or state[name].shape != net.flat.shape:
                raise EchelonError(
                    "the saved critics of the planner don't fit: they saw other features or had other learner.hidden"
                )
            net.flat.data.copy_(state[name])
            self.norms[head].stats.copy_(state[f"value_norm.{head}"])
            self.optimizers[head].state.clear()
            if f"{name}.step" in state:
                self.optimizers[head].state[net.flat] = {
                    k: state[f"{name}.{k}"].clone() for k in ("step", "exp_avg", "exp_avg_sq")
                }
        self.updates, self.low_updates = int(state["updates"]), int(state["low_updates"])


def _whitened(level: NDArray[np.float64], own: NDArray[np.bool_]) -> NDArray[np.float64]:
    """(A - mean) / (population standard deviation + 1e-8) over the turns that decide at a level, 0 elsewhere.

    Summed in ascending order, so that it doesn't depend on the order of the trajectories.
    """
    out = np.zeros_like(level)
    if own.any():
        ascending = np.sort(level[own])
        mean = (ascending - ascending[0]).mean() + ascending[0]
        out[own] = (level[own] - mean) / (np.sqrt(np.square(ascending - mean).mean()) + 1e-8)
    return out
