"""Credit assignment for teams of language models: returns over trees of joint samples, advantages within a group.

At a node of the tree (a joint history) each of N agents writes G replies. They make joint actions in one of two ways:
"aligned", the g-th of each agent together, G of them; "cross", every reply with every other, G^N of them, one axis an
agent. Each joint action has one reward for the whole team, and a child node where the episode goes on.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["Joint", "TeamMode", "team_advantages", "team_tree_returns"]

TeamMode = Literal["mean", "raw", "max", "rloo"]
Joint = Literal["aligned", "cross"]


def team_tree_returns(rewards_tree: Any, *, discount: float = 1.0) -> Any:
    """What each joint action of a rollout tree was worth: `R = r + discount * mean of the children's R`.

    MAGRPO (arXiv 2508.04652); its released code (CoMLRL 1.4.3) has a `discount` and never uses it. The mean is over
    the joint actions of the child node; what has no child is worth its reward.

    A tree is given in one of two forms. S is the shape of a node's rewards, `(G,)` aligned or `(G,) * N` cross.

    By level: a list of arrays, one a turn. Level 0 has the shape S, level t the shape `S * (t + 1)`: the axes of the
    parent's joint action come first. Rewards of nodes that there aren't are NaN, all of a node.

    By node: a pair (rewards, children), a dict with these two keys, or an object with these two attributes. Children
    is a list with one node for each joint action, row by row, and None where nothing follows; None or empty where
    nothing follows at all. A leaf may be its rewards alone. (Two levels, and a pair whose children are such leaves,
    are the same.)

    Args:
        rewards_tree: the tree, as above.
        discount: γ, 0 to 1, of a turn.

    Returns:
        The returns, float64, in the form given: a list of arrays, with NaN where there were; or nodes like those
        given, with returns for rewards. An object's node becomes a tuple (returns, children).

    Raises:
        ValueError: shapes that don't fit, rewards that aren't finite, a discount out of its range.
    """
    if not 0 <= discount <= 1:
        raise ValueError(f"discount must be 0 to 1, got {discount}")
    if isinstance(rewards_tree, (list, tuple)):
        levels = _levels(rewards_tree)
        if levels is not None:
            return _level_returns(levels, discount)
    return _node_returns(rewards_tree, None, discount)[1]


def _levels(tree: Sequence[Any]) -> list[NDArray[np.float64]] | None:
    """The levels as arrays, if that's what the tree is made of."""
    found = [_array(level) for level in tree]
    levels = [level for level in found if level is not None]
    if len(levels) < len(found) or not levels or not levels[0].ndim:
        return None
    shape = levels[0].shape
    return levels if all(level.shape == shape * (t + 1) for t, level in enumerate(levels)) else None


def _array(x: Any) -> NDArray[np.float64] | None:
    """x as an array of numbers, or None."""
    try:
        return np.array(x, np.float64)
    except (TypeError, ValueError):
        return None


def _level_returns(levels: list[NDArray[np.float64]], discount: float) -> list[NDArray[np.float64]]:
    axes = levels[0].ndim
    if np.isnan(levels[0]).any():
        raise ValueError("the root's rewards aren't finite")
    returns = levels[-1]
    out = [returns]
    for t in range(len(levels) - 1, -1, -1):
        own = tuple(range(t * axes, (t + 1) * axes))
        absent = np.isnan(levels[t])
        none = absent.all(own)
        if np.isinf(levels[t]).any() or (absent.any(own) != none).any():
            raise ValueError(f"level {t} has rewards that aren't finite (a node that there isn't is NaN throughout)")
        if not t:
            break
        if (np.isnan(levels[t - 1]) & ~none).any():
            raise ValueError(f"level {t} has nodes whose parents there aren't")
        ahead = np.where(none, 0.0, returns.mean(own))
        returns = levels[t - 1] + discount * ahead
        out.insert(0, returns)
    return out


def _node_returns(node: Any, shape: tuple[int, ...] | None, discount: float) -> tuple[NDArray[np.float64], Any]:
    """A node's returns, and the node in the form given, with returns for rewards; `shape` is S, None at the root."""
    given, below = _parts(node, shape)
    rewards = _array(given)
    if rewards is None or not rewards.ndim or (shape is not None and rewards.shape != shape):
        raise ValueError(f"a node's rewards must be an array like the root's{'' if shape is None else f', {shape}'}")
    if not np.isfinite(rewards).all():
        raise ValueError(f"a node's rewards aren't finite: {rewards.tolist()}")
    children = [] if below is None else list(below)
    if children and len(children) != rewards.size:
        raise ValueError(f"{len(children)} children for {rewards.size} joint actions")
    ahead = np.zeros(rewards.size)
    kept: list[Any] = []
    for j, child in enumerate(children):
        if child is None:
            kept.append(None)
        else:
            returns, formed = _node_returns(child, rewards.shape, discount)
            ahead[j] = returns.mean()
            kept.append(formed)
    out = rewards + discount * ahead.reshape(rewards.shape)
    after = None if below is None else kept
    if isinstance(node, Mapping):
        return out, {"rewards": out, "children": after} if "children" in node else {"rewards": out}
    if given is node:
        return out, out
    return out, [out, after] if isinstance(node, list) else (out, after)


def _parts(node: Any, shape: tuple[int, ...] | None) -> tuple[Any, Any]:
    """A node's rewards and children; of a leaf that is just its rewards, itself and None."""
    if isinstance(node, Mapping) and "rewards" in node:
        return node["rewards"], node.get("children")
    if hasattr(node, "rewards") and hasattr(node, "children"):
        return node.rewards, node.children
    plain = _array(node)
    if plain is not None and shape is None:
        # A list of lists alone is no root: it may be meant as cross rewards, or as levels that don't fit.
        bare = plain.size > 0 and (isinstance(node, np.ndarray) or plain.ndim == 1)
    else:
        bare = plain is not None and plain.shape == shape
    if bare:
        return node, None
    if isinstance(node, (list, tuple)) and len(node) == 2:
        return node[0], node[1]
    raise ValueError("a tree is a list of levels or a node: see team_tree_returns for their shapes")


def team_advantages(
    returns: ArrayLike,
    *,
    mode: TeamMode = "mean",
    normalize: bool = False,
    joint: Joint = "aligned",
    agents: int = 1,
) -> NDArray[np.float64]:
    """How much better each agent's replies at a node were than its others there (MAGRPO's family, as released).

    A reply's score s is the return of its joint action; under "cross" the sum of the returns of all joint actions
    that it is part of. Over the G replies of one agent:

        mean   s - mean(s)                MAGRPO; with one agent, GRPO
        raw    s                          MAREINFORCE
        max    s - max(s)                 MAReMax
        rloo   (G s - sum(s)) / (G - 1)   MARLOO: minus the mean of the others

    **With `normalize`, all four are the same**: `(A - mean(A)) / max(std(A), 1e-6)`, with the population standard
    deviation, takes out what they differ by (a shift and a factor). So that is MAGRPO, whatever the mode's name; a
    UserWarning says so, once a call.

    Args:
        returns: `(G,)` aligned; `(G,) * N` cross, axis i agent i's replies.
        mode: as above.
        normalize: as above.
        joint: how joint actions were made.
        agents: N where `joint` is "aligned", whose returns don't tell; they are all alike.

    Returns:
        float64 `(N, G)`, one row an agent.

    Raises:
        ValueError: another shape, returns that aren't finite, an unknown mode or joint, fewer than two replies with
            "rloo".
    """
    if mode not in get_args(TeamMode):
        raise ValueError(f"mode must be one of {get_args(TeamMode)}, got {mode!r}")
    if joint not in get_args(Joint):
        raise ValueError(f"joint must be one of {get_args(Joint)}, got {joint!r}")
    x = np.asarray(returns, np.float64)
    if x.size < 1 or len(set(x.shape)) != 1 or (joint == "aligned" and x.ndim != 1) or agents < 1:
        raise ValueError(f"{joint} returns must be {'(G,)' if joint == 'aligned' else '(G,) * N'}, got {x.shape}")
    if not np.isfinite(x).all():
        raise ValueError(f"returns aren't finite: {x.tolist()}")
    if normalize and mode != "mean":
        warnings.warn(
            f"with normalize=True the modes mean, raw, max and rloo give the same advantages: mode={mode!r} is 'mean'",
            UserWarning,
            stacklevel=2,
        )
    if joint == "aligned":
        scores = np.tile(x, (agents, 1))
    else:
        scores = np.stack([x.sum(tuple(a for a in range(x.ndim) if a != i)) for i in range(x.ndim)])
    count = scores.shape[1]
    if mode == "rloo" and count < 2:
        raise ValueError("mode 'rloo' compares with the other replies: there must be at least two")
    # Found from differences, so that equal scores have exactly 0.
    apart = scores - scores[:, :1]
    out: NDArray[np.float64] = apart - apart.mean(1, keepdims=True)
    if mode == "raw" and not normalize:
        return scores
    if mode == "max":
        out = apart - apart.max(1, keepdims=True)
    elif mode == "rloo":
        out = out * (count / (count - 1))
    if normalize:
        out = out - out.mean(1, keepdims=True)
        out = out / np.maximum(np.sqrt(np.square(out).mean(1, keepdims=True)), 1e-6)
    return out
