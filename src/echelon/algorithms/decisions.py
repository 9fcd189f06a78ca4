"""Decisions of a planner's policy, and the parts that learning from them is put together from.

A planner decides in two ways: it chooses one of several options, each with a score, by the softmax of the scores; or
it keeps or switches, by the sigmoid of one score. The scores are numbers that a model gives of *items* (questions),
and many decisions share an item. So a learner asks the model once for each distinct item, finds the loss's gradient
in those numbers, and hands the gradient back: thousands of decisions cost one pass over a few hundred questions, and
the gradient is exactly that of the whole batch. Items are never looked into.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from echelon.errors import EchelonError

if TYPE_CHECKING:  # for its protocol alone: a learner needs no language model's library
    from echelon.llm.policy import PolicyModel

__all__ = [
    "Decisions",
    "LearnerConfig",
    "clipped_surrogate",
    "exact_kl",
    "imitate",
    "imitation_loss",
    "improve",
    "learn",
    "log_probabilities",
    "low_var_kl",
    "masked_mean",
]

# Of no decision: options, open, chosen, logp.
_NONE: tuple[tuple[Any, Any], ...] = (((0, 1), np.int64), ((0, 1), bool), (0, np.int64), (0, np.float32))


@dataclass
class Decisions:
    """n decisions of a choice policy: which of some options, whose scores are numbers of distinct items.

    A decision to KEEP or SWITCH has one item, whose score is the log-odds of KEEP: it has two columns, KEEP with the
    item's score and SWITCH with the score 0, so that the softmax of the two is the sigmoid.

    Attributes:
        items: the distinct items; anything that the model takes.
        options: int64 `(n, K)`, places in `items`, -1 past the last option (and for SWITCH).
        open: bool `(n, K)`, which columns could be chosen.
        chosen: int64 `(n,)`, the column that was.
        logp: float32 `(n,)`, its log-probability when it was chosen.
        binary: bool `(n,)`, the decisions to keep (column 0) or switch (column 1); none if not given.

    Raises:
        ValueError: the shapes don't fit, a chosen column isn't open, an open one has no item.
    """

    items: Sequence[Any]
    options: NDArray[np.int64]
    open: NDArray[np.bool_]
    chosen: NDArray[np.int64]
    logp: NDArray[np.float32]
    binary: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, bool))

    def __post_init__(self) -> None:
        n = len(self.options)
        if not len(self.binary):
            self.binary = np.zeros(n, bool)
        if self.options.ndim != 2 or self.open.shape != self.options.shape:
            raise ValueError(f"options {self.options.shape} and open {self.open.shape} must both be (n, K)")
        if not self.chosen.shape == self.logp.shape == self.binary.shape == (n,):
            raise ValueError("chosen, logp and binary must each have one entry a decision")
        if not n:
            return
        if self.options.min() < -1 or self.options.max() >= len(self.items):
            raise ValueError("options must be places in items, or -1")
        if not np.take_along_axis(self.open, self.chosen[:, None], 1).all():
            raise ValueError("a chosen column isn't open")
        has_score = self.options >= 0
        if self.binary.any():
            two = self.options.shape[1] >= 2 and bool((self.options[self.binary, 1:] == -1).all())
            if not two or self.open[self.binary, 2:].any():
                raise ValueError("a decision to keep or switch has two columns, and an item for the first")
            has_score[self.binary, 1] = True
        if (self.open & ~has_score).any():
            raise ValueError("an open column has no item")

    def __len__(self) -> int:
        return len(self.options)

    @classmethod
    def reviews(
        cls,
        items: Sequence[Any],
        item: NDArray[np.int64],
        switch: NDArray[np.bool_],
        logp: NDArray[np.float32],
    ) -> Decisions:
        """Decisions to keep or switch.

        Args:
            items: the distinct items, whose numbers are the log-odds of KEEP.
            item: int64 `(n,)`, each decision's place in `items`.
            switch: bool `(n,)`, what was decided.
            logp: float32 `(n,)`, its log-probability when it was.
        """
        n = len(item)
        options = np.stack([item, np.full(n, -1, np.int64)], 1)
        return cls(items, options, np.ones((n, 2), bool), switch.astype(np.int64), logp, np.ones(n, bool))

    @classmethod
    def join(cls, parts: Sequence[Decisions]) -> Decisions:
        """All decisions of the parts, in their order; equal items (they must be hashable) become one."""
        places: dict[Any, int] = {}
        if not parts:
            return cls([], *(np.zeros(shape, kind) for shape, kind in _NONE))
        width = max(p.options.shape[1] for p in parts)
        options, opens = [], []
        for part in parts:
            # One place more, for -1.
            place = np.array([*(places.setdefault(item, len(places)) for item in part.items), -1], np.int64)
            pad = ((0, 0), (0, width - part.options.shape[1]))
            options.append(np.pad(place[part.options], pad, constant_values=-1))
            opens.append(np.pad(part.open, pad))
        return cls(
            list(places),
            np.concatenate(options),
            np.concatenate(opens),
            *(np.concatenate([getattr(p, name) for p in parts]) for name in ("chosen", "logp", "binary")),
        )

    def take(self, rows: NDArray[np.int64]) -> Decisions:
        """Some of the decisions, with the items that they need and no others."""
        options = self.options[rows]
        used = np.unique(options[options >= 0])
        place = np.full(len(self.items) + 1, -1, np.int64)
        place[used] = np.arange(len(used))
        return Decisions(
            [self.items[i] for i in used],
            place[options],
            self.open[rows],
            self.chosen[rows],
            self.logp[rows],
            self.binary[rows],
        )


@dataclass(frozen=True)
class LearnerConfig:
    """Hyper-parameters that all learners of a planner's policy have (values: HiPER's released scripts, which are
    those of GRPO in verl; HiMAC names no others)."""

    clip: float = 0.2
    """PPO's clip range ε."""
    clip_high: float = 0.0
    """The range upwards, if it is another than downwards (DAPO's "clip higher"); 0: the same."""
    dual_clip: float = 3.0
    """For a bad decision that became more probable, the loss counts at most so many times its advantage."""
    kl: float = 0.01
    """Weight of the divergence from the policy as it was when learning began."""
    kl_kind: Literal["k3", "exact"] = "k3"
    """How the divergence is found: Schulman's k3 from the chosen option, as released, or exactly, over all options."""
    entropy: float = 0.001
    """Weight of the entropy bonus."""
    epochs: int = 1
    """Passes over the decisions of an update."""
    minibatches: int = 1
    """Optimiser steps a pass. 1 takes the whole batch: what costs is a pass over the distinct items, and minibatches
    share most of them."""

    def __post_init__(self) -> None:
        self._check(
            ("clip", 0 < self.clip < 1, "above 0 and below 1"),
            ("clip_high", self.clip_high >= 0, "at least 0"),
            ("dual_clip", self.dual_clip > 1, "above 1"),
            ("kl", self.kl >= 0, "at least 0"),
            ("kl_kind", self.kl_kind in ("k3", "exact"), "k3 or exact"),
            ("entropy", self.entropy >= 0, "at least 0"),
            ("epochs", self.epochs >= 1, "at least 1"),
            ("minibatches", self.minibatches >= 1, "at least 1"),
        )

    def _check(self, *rules: tuple[str, bool, str]) -> None:
        for name, good, need in rules:
            if not good:
                raise EchelonError(f"learner.{name} is {getattr(self, name)}: it must be {need}")


# -- mathematics, differentiable in the scores ---------------------------------------------------


def log_probabilities(scores: Tensor, decisions: Decisions) -> tuple[Tensor, Tensor, Tensor]:
    """How probable each decision is to a policy that gives the items these scores.

    Args:
        scores: float32 `(items,)`.
        decisions: n of them, with K columns.

    Returns:
        log-probabilities of the chosen columns `(n,)`; the entropies of the decisions `(n,)`, in nats; and the
        log-probabilities of all columns `(n, K)`, -inf where not open.
    """
    options, opened = torch.from_numpy(decisions.options), torch.from_numpy(decisions.open)
    logits = scores[options.clamp(min=0)]
    # -1 is SWITCH here, or a column that isn't open.
    logits = logits.masked_fill(options < 0, 0.0).masked_fill(~opened, -torch.inf)
    full = torch.log_softmax(logits, 1)
    logp = full.gather(1, torch.from_numpy(decisions.chosen)[:, None])[:, 0]
    return logp, -_expectation(full, full), full


def _expectation(full: Tensor, values: Tensor) -> Tensor:
    """The mean of `values` by the probabilities exp(`full`), both `(n, K)`; columns that aren't open count nothing."""
    shut = full == -torch.inf
    return (full.masked_fill(shut, 0.0).exp() * values.masked_fill(shut, 0.0)).sum(1)


def exact_kl(full: Tensor, reference: Tensor) -> Tensor:
    """KL(policy ‖ reference) of each decision, over all its options, `(n,)`.

    Args:
        full, reference: log-probabilities of all columns, `(n, K)`, as `log_probabilities` gives them.
    """
    return _expectation(full, full - reference)


def low_var_kl(logp: Tensor, reference: Tensor) -> Tensor:
    """The estimator k3 of KL(policy ‖ reference) from what was chosen (Schulman 2020, "Approximating KL Divergence").

    `r - 1 - log r` with `r = reference / policy`: at least 0, and unbiased under the policy. Log-ratios are cut
    off at ±20, where their exponential would swamp a batch (as released).

    Args:
        logp, reference: log-probabilities of the same choices by the two.
    """
    change = (reference - logp).clamp(-20, 20)
    return change.exp() - 1 - change


def clipped_surrogate(
    logp: Tensor,
    logp_old: Tensor,
    advantage: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float = 3.0,
) -> tuple[Tensor, Tensor]:
    """PPO's clipped loss with dual clip (Schulman et al. 2017, Eq. 7; Ye et al. 2020, Eq. 5), to be made small.

    With ratio ρ: `-min(ρA, clip(ρ, 1 - low, 1 + high) A)`, and where A < 0 at most `-dual_clip * A`.

    Args:
        logp, logp_old: log-probabilities now and when the choice was made; any one shape.
        advantage: of that shape, without gradient.
        clip_low, clip_high: how far the ratio may go below and above 1 and still bring gain.
        dual_clip: c, above 1.

    Returns:
        The loss of each, and where either clip took its gradient away (bool).
    """
    ratio = (logp - logp_old).clamp(-20, 20).exp()
    free, bounded = -advantage * ratio, -advantage * ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = torch.maximum(free, bounded)
    clipped = bounded > free
    most = -advantage * dual_clip
    cut = (advantage < 0) & (loss > most)
    return torch.where(cut, most, loss), clipped | cut


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean of `values` where `mask` is on; 0 where it is nowhere."""
    return (values * mask).sum() / mask.sum().clamp(min=1)


def imitation_loss(full: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each decision with what a teacher would have done, `(n,)`, in nats.

    Args:
        full: log-probabilities of all columns, `(n, K)`.
        targets: the teacher's columns, int64 `(n,)`, or its probabilities, `(n, K)`, 0 where a column isn't open.
    """
    if targets.ndim == 1:
        return -full.gather(1, targets[:, None])[:, 0]
    return -(targets * full.masked_fill(targets == 0, 0.0)).sum(1)


# -- learning -------------------------------------------------------------------------------------


def learn(
    policy: PolicyModel, items: Sequence[Any], loss: Callable[[Tensor], tuple[Tensor, dict[str, float]]]
) -> dict[str, float]:
    """One optimiser step on a loss of the numbers of some distinct items.

    Args:
        policy: the model.
        items: what it is asked; at least one.
        loss: takes the numbers of all items one below the other, float32 `(rows, c)` (of a choice policy one row
            an item, c = 1), and gives the loss and what to log.

    Returns:
        What to log, with `loss` and `grad_norm`.

    Raises:
        EchelonError: the loss isn't finite.
    """
    numbers = policy.evaluate(items)
    leaf = torch.from_numpy(np.concatenate(numbers)).requires_grad_()
    value, stats = loss(leaf)
    if not bool(value.isfinite()):
        raise EchelonError("the planner's loss isn't finite: its policy has gone astray; try a lower learning rate")
    (grad,) = torch.autograd.grad(value, leaf)
    grads = np.split(grad.numpy(), np.cumsum([len(x) for x in numbers])[:-1])
    # What has no gradient needs no pass.
    moved = [i for i, g in enumerate(grads) if g.any()] or list(range(len(items)))
    policy.backward([items[i] for i in moved], [grads[i] for i in moved])
    return {**stats, "loss": float(value.detach()), "grad_norm": policy.step()}


def improve(
    policy: PolicyModel,
    decisions: Decisions,
    advantages: NDArray[np.float32],
    config: LearnerConfig,
    *,
    key: int,
    count: int,
) -> dict[str, float]:
    """Make good decisions more probable: PPO's clipped loss, KL to the reference and entropy, each a mean a decision.

    Args:
        policy: the model.
        decisions: n of them, as it made them.
        advantages: float32 `(n,)`.
        config: weights, epochs, minibatches.
        key, count: minibatches are a function of these two.

    Returns:
        Means over the optimiser steps of `policy_loss` (without KL and entropy), `entropy`, `kl` (to the
        reference), `approx_kl` (k3 to the policy that made the decisions), `clipped` (share), `grad_norm`; and
        `logp_gap`, the mean difference between the log-probabilities recorded and those found before the first
        step: about 0, or the decisions weren't this policy's. All 0 if there is no decision.
    """
    n = len(decisions)
    total = dict.fromkeys(("policy_loss", "entropy", "kl", "approx_kl", "clipped", "grad_norm", "logp_gap"), 0.0)
    if not n:
        return total
    reference = None
    if config.kl:
        numbers = np.concatenate(policy.reference(decisions.items))[:, 0]
        reference = log_probabilities(torch.from_numpy(numbers), decisions)[2]
    shuffle = np.random.Generator(np.random.Philox(key=key, counter=[0, count, 0, 0]))
    steps = 0
    for _ in range(config.epochs):
        order = shuffle.permutation(n) if config.minibatches > 1 else np.arange(n)
        for rows in np.array_split(order, min(config.minibatches, n)):
            part = decisions.take(rows) if len(rows) < n else decisions
            weights = torch.from_numpy(advantages[rows])
            known = None if reference is None else reference[rows]

            def loss(
                leaf: Tensor, part: Decisions = part, weights: Tensor = weights, known: Tensor | None = known
            ) -> tuple[Tensor, dict[str, float]]:
                logp, entropy, full = log_probabilities(leaf[:, 0], part)
                old = torch.from_numpy(part.logp)
                surrogate, clipped = clipped_surrogate(
                    logp, old, weights, config.clip, config.clip_high or config.clip, config.dual_clip
                )
                value = surrogate.mean() - config.entropy * entropy.mean()
                means = {
                    "policy_loss": surrogate,
                    "entropy": entropy,
                    "approx_kl": low_var_kl(old, logp),
                    "clipped": clipped.float(),
                    "logp_gap": (logp - old).abs(),
                }
                if known is not None:
                    if config.kl_kind == "exact":
                        kl = exact_kl(full, known)
                    else:
                        kl = low_var_kl(logp, known.gather(1, torch.from_numpy(part.chosen)[:, None])[:, 0])
                    value = value + config.kl * kl.mean()
                    means["kl"] = kl
                return value, {name: float(each.detach().mean()) for name, each in means.items()}

            stats = learn(policy, part.items, loss)
            if steps:
                stats.pop("logp_gap")
            for name in total.keys() & stats.keys():
                total[name] += stats[name]
            steps += 1
    return {name: value if name == "logp_gap" else value / steps for name, value in total.items()}


def imitate(
    policy: PolicyModel,
    decisions: Decisions,
    targets: NDArray[np.int64] | NDArray[np.float32],
    *,
    batch: int,
    epochs: int,
    key: int,
    first: int = 0,
    last: int | None = None,
) -> list[dict[str, float]]:
    """Learn to decide as a teacher did: cross-entropy, in shuffled minibatches.

    Steps are counted over all epochs, `ceil(n / batch)` an epoch, and step s depends on `key`, s and the policy
    alone: imitation that stopped after s steps goes on with `first=s`.

    Args:
        policy: the model.
        decisions: n of them; what was chosen in them doesn't matter.
        targets: the teacher's columns, int64 `(n,)`, or its probabilities, float32 `(n, K)`.
        batch: decisions a step; epochs: passes over all decisions.
        key: minibatches are a function of it.
        first, last: the steps to do, last not included; all, if not given.

    Returns:
        For each step done `loss`, `accuracy` (share of decisions whose most probable column is the teacher's, before
        the step) and `grad_norm`.
    """
    if batch < 1 or epochs < 0:
        raise EchelonError(f"batch is {batch} and epochs {epochs}: they must be at least 1 and 0")
    n = len(decisions)
    each = -(-n // batch)
    end = each * epochs
    history = []
    order, epoch_of_order = np.arange(n), -1
    for step in range(first, end if last is None else min(last, end)):
        epoch, at = divmod(step, each)
        if epoch != epoch_of_order:
            order = np.random.Generator(np.random.Philox(key=key, counter=[0, epoch, 0, 0])).permutation(n)
            epoch_of_order = epoch
        rows = order[at * batch : (at + 1) * batch]
        part, goal = decisions.take(rows), torch.from_numpy(targets[rows])

        def loss(leaf: Tensor, part: Decisions = part, goal: Tensor = goal) -> tuple[Tensor, dict[str, float]]:
            full = log_probabilities(leaf[:, 0], part)[2]
            best = goal if goal.ndim == 1 else goal.argmax(1)
            return imitation_loss(full, goal).mean(), {"accuracy": float((full.argmax(1) == best).float().mean())}

        history.append(learn(policy, part.items, loss))
    return history
