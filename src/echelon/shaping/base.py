"""What a shaping is (a mixture of terms and how much of it), and what a world must give to have one.

The space of configurations is that of LLM-ALSO's PBRS-v2: `Φ = Σ w_k φ_k` with weights that sum to 1, terms φ_k in
[0, 1], and a strength β in [0, 1]. `potential.py` turns it into rewards; one file a world says what its terms are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from echelon.envs.base import GridEnv
from echelon.errors import EchelonError, unknown_name

__all__ = ["ShapingConfig", "TermSet", "mode_table", "register", "shaped_worlds", "term_set"]

_DIGITS = 6  # what differs by less is the same configuration


@dataclass(frozen=True, eq=False)
class ShapingConfig:
    """One mixture of potential terms and its strength: a point of PBRS-v2.

    Two are equal (and hash alike) if they shape alike: same strength, same weights to six digits. The mode is only a
    name; with a strength of 0 nothing is shaped, so all of those are equal.

    Attributes:
        mode: what the mixture is called; one of the world's modes, or a name of one's own.
        beta: strength β, 0 to 1.
        weights: weight by term, at least 0; normalised to a sum of 1. Terms that aren't named weigh 0.
        active_terms: the terms that may weigh anything: the others' weights become 0 before normalising. Default:
            those that weigh more than 0.

    Raises:
        EchelonError: a number out of range, or no active term that weighs anything.
    """

    mode: str
    beta: float
    weights: Mapping[str, float]
    active_terms: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        where = f"shaping {self.mode!r}"
        if not (_is_number(self.beta) and 0 <= self.beta <= 1):
            raise EchelonError(f"{where}: beta is {self.beta!r}, it must be 0 to 1")
        for name, weight in self.weights.items():
            if not (_is_number(weight) and weight >= 0):
                raise EchelonError(f"{where}: the weight of {name} is {weight!r}, it must be a number of at least 0")
        active = tuple(n for n, w in self.weights.items() if w > 0) if self.active_terms is None else self.active_terms
        if len(set(active)) < len(active):
            raise EchelonError(f"{where}: an active term is named twice")
        kept = {name: float(weight) for name, weight in self.weights.items() if name in active and weight > 0}
        if not kept:
            raise EchelonError(f"{where}: no active term weighs more than 0")
        # What is normalised already stays as it is, bit for bit: a configuration comes back from a file unchanged.
        if any(weight > 1 for weight in kept.values()) or abs(math.fsum(kept.values()) - 1) > 1e-12:
            largest = max(kept.values())  # divided by it first, so that no sum overflows or vanishes
            kept = {name: weight / largest for name, weight in kept.items()}
            total = math.fsum(kept.values())
            kept = {name: weight / total for name, weight in kept.items()}
        object.__setattr__(self, "beta", float(self.beta))
        object.__setattr__(self, "active_terms", tuple(sorted(active)))
        object.__setattr__(self, "weights", {name: kept[name] for name in sorted(kept)})

    def canonical(self) -> tuple[float, tuple[tuple[str, float], ...]]:
        """What it does, as one hashable value: the strength, and the terms that count with their weights."""
        beta = round(self.beta, _DIGITS)
        if beta == 0:
            return 0.0, ()
        weights = ((name, round(weight, _DIGITS)) for name, weight in self.weights.items())
        return beta, tuple((name, weight) for name, weight in weights if weight > 0)

    def __eq__(self, other: object) -> bool:
        return self.canonical() == other.canonical() if isinstance(other, ShapingConfig) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.canonical())

    def vector(self, names: Sequence[str]) -> NDArray[np.float64]:
        """The weights in the order of `names`, float64 `(K,)`.

        Raises:
            EchelonError: it speaks of a term that isn't among them.
        """
        for name in (*self.weights, *(self.active_terms or ())):
            if name not in names:
                raise unknown_name("potential term", name, names)
        return np.array([self.weights.get(name, 0.0) for name in names])

    def to_json(self) -> dict[str, Any]:
        """As plain values for a file."""
        return {
            "mode": self.mode,
            "beta": self.beta,
            "active_terms": list(self.active_terms or ()),
            "weights": dict(self.weights),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ShapingConfig:
        """What `to_json` gave.

        Raises:
            EchelonError: something is missing or out of range.
        """
        try:
            return cls(str(data["mode"]), data["beta"], dict(data["weights"]), tuple(data["active_terms"]))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise EchelonError(f"not a shaping configuration: {error!r}") from None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


Compute = Callable[[Any, NDArray[np.bool_], NDArray[np.float32]], None]


@dataclass(frozen=True)
class TermSet:
    """What a world gives to be shaped: terms, ready mixtures of them, and words for both.

    A term is a function of the world's state and of nothing that lies further back: only then does shaping leave
    the best policies as they are. It is in [0, 1] and grows with progress. Where everything is done each is 1: our
    choice, so that `Φ - 1` is a potential that is 0 at the goal by itself. A term may use what agents don't see,
    since it is of no use to anybody after training; ours use what the team knows.

    Attributes:
        world: the environment's name.
        meaning: what each term says, by its name; their order is the order of the columns (K terms).
        modes: the named mixtures; default: the one that `fixed-pbrs` takes.
        grid: mixtures that a search without any model tries (`pbrs-grid`).
        compute: `(env, which, out)`: writes the terms of the worlds `which` (bool `(W,)`) into `out`, float32
            `(W, K)`, from the environment's state arrays, without a Python loop over worlds.
    """

    world: str
    meaning: Mapping[str, str]
    modes: Mapping[str, ShapingConfig]
    default: str
    grid: Mapping[str, ShapingConfig]
    compute: Compute = field(repr=False)

    def __post_init__(self) -> None:
        for config in (*self.modes.values(), *self.grid.values()):
            config.vector(self.names)
        self.mode(self.default)

    @property
    def names(self) -> tuple[str, ...]:
        """The terms, in the order of the columns."""
        return tuple(self.meaning)

    def mode(self, name: str) -> ShapingConfig:
        """A named mixture.

        Raises:
            EchelonError: there is none of this name.
        """
        if name not in self.modes:
            raise unknown_name(f"shaping mode of {self.world}", name, self.modes)
        return self.modes[name]

    def terms(
        self, env: GridEnv[Any], which: NDArray[np.bool_] | None = None, out: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        """The terms of the worlds as they stand now.

        Between `env.advance` and `env.autoreset` they are those of the true last states of episodes that ended;
        after it, those of the first states of the new ones.

        Args:
            env: the worlds; of this term set's environment.
            which: bool `(W,)`, the worlds wanted; default: all. Other rows of `out` stay as they were.
            out: float32 `(W, K)`, written; default: new, of zeros.

        Returns:
            `out`.

        Raises:
            EchelonError: the worlds are of another kind.
        """
        if env.name != self.world:
            raise EchelonError(f"the potential terms of {self.world} don't fit {env.name}")
        if out is None:
            out = np.zeros((env.num_envs, len(self.meaning)), np.float32)
        self.compute(env, np.ones(env.num_envs, bool) if which is None else which, out)
        return out

    def scale(self, env: GridEnv[Any]) -> float:
        """What β is a share of: six times the most task reward that an episode can bring, at least 10 (our choice).

        LLM-ALSO's worlds are small and pay at most 1 an episode. What a step adds to a potential shrinks with the map
        and with what the world pays; with less than this both MAPPO and QMIX learnt later in pilots
        (docs/results/also.md).
        """
        return max(6.0 * env.goals, 10.0)

    def vocabulary(self) -> str:
        """The terms and modes in words, for prompts."""
        lines = ["Potential terms (each between 0 and 1; all are 1 when the task is done):"]
        lines += [f"- {name}: {words}" for name, words in self.meaning.items()]
        lines.append("Named mixtures (beta; weights):")
        for name, config in self.modes.items():
            weights = ", ".join(f"{n} {config.weights[n]:.2f}" for n in self.names if n in config.weights)
            lines.append(f"- {name}{' (default)' if name == self.default else ''}: {config.beta:.2f}; {weights}")
        return "\n".join(lines)


def mode_table(names: Sequence[str], rows: Mapping[str, tuple[float, ...]]) -> dict[str, ShapingConfig]:
    """Mixtures from a table: each row is β, then the weights in the order of `names`."""
    return {
        mode: ShapingConfig(mode, beta, dict(zip(names, weights, strict=True)))
        for mode, (beta, *weights) in rows.items()
    }


_REGISTRY: dict[str, TermSet] = {}


def register(terms: TermSet) -> None:
    """Make a world's potential terms known: one line a world."""
    _REGISTRY[terms.world] = terms


def shaped_worlds() -> tuple[str, ...]:
    """The environments that have potential terms."""
    return tuple(sorted(_REGISTRY))


def term_set(world: str) -> TermSet:
    """The potential terms of an environment.

    Raises:
        EchelonError: it has none.
    """
    if world not in _REGISTRY:
        raise EchelonError(f"environment {world!r} has no potential terms to shape with: {', '.join(_REGISTRY)} have")
    return _REGISTRY[world]
