"""The table `[shaping]` of a run: which mixture shapes its rewards, and how."""

from __future__ import annotations

import dataclasses
import math
import typing
from dataclasses import dataclass
from typing import Any, Literal

from echelon.envs.base import GridEnv
from echelon.errors import EchelonError, unknown_name
from echelon.shaping.base import ShapingConfig, TermSet, term_set
from echelon.shaping.potential import ShapingRules

__all__ = ["OFF", "ShapingSettings"]

OFF = "off"
"""The mode of a run whose rewards are as they are."""


@dataclass(frozen=True)
class ShapingSettings:
    """Extra reward from potentials while a flat method learns. Defaults are our choice, but for what `terminal` says.

    Evaluations are never shaped.
    """

    mode: str = OFF
    """off: rewards as they are; a mixture of the world's, by its name; or a name of your own, with weights and beta."""
    beta: float | None = None
    """Strength of the shaping, 0 to 1, a share of scale; default: the mode's own. With 0 rewards are as they are, but a
    run can later be forked with another mixture and all that its replay memory holds."""
    weights: tuple[str, ...] = ()
    """Weights in the place of the mode's, each as term=weight; terms that aren't named weigh nothing."""
    terminal: Literal["zero", "state"] = "zero"
    """Potential of a state in which the task ended: zero, which leaves the best policies as they are, or the state's
    own. A time limit ends no task."""
    first_step: Literal["shaped", "zero"] = "shaped"
    """The first step of an episode: shaped as any other, or zero: without extra reward."""
    team: Literal["once", "per_agent_sum"] = "once"
    """The team's reward gets the extra reward once, or once for each agent."""
    offset: float | None = None
    """Taken from the potential before it is scaled; default: 0, with a replay memory 1: then a success costs no
    potential."""
    scale: float | None = None
    """What the strength is a share of, above 0; default: six times the most task reward that an episode can bring, at
    least 10."""
    buffer: Literal["relabel", "keep", "clear"] = "relabel"
    """What becomes of a replay memory where a fork changes the shaping: its rewards are computed anew, stay as they
    were, or it is emptied."""

    def __post_init__(self) -> None:
        for name, good, need in (
            ("mode", bool(self.mode), "off, a mixture of the world's or a name of your own"),
            ("beta", self.beta is None or 0 <= self.beta <= 1, "0 to 1"),
            ("offset", self.offset is None or math.isfinite(self.offset), "a finite number"),
            ("scale", self.scale is None or (math.isfinite(self.scale) and self.scale > 0), "a number above 0"),
        ):
            if not good:
                raise EchelonError(f"shaping.{name} is {getattr(self, name)!r}: it must be {need}")
        for name, hint in typing.get_type_hints(ShapingSettings).items():
            if typing.get_origin(hint) is Literal and getattr(self, name) not in typing.get_args(hint):
                raise unknown_name(f"shaping.{name}", str(getattr(self, name)), typing.get_args(hint))
        self._weights()
        if not self.on and (self.beta is not None or self.weights):
            given = "beta" if self.beta is not None else "weights"
            raise EchelonError(f"shaping.{given} is given, but shaping.mode is off: name a mode")

    @property
    def on(self) -> bool:
        """Whether there are potential terms at all (also with a strength of 0)."""
        return self.mode != OFF

    def config(self, world: str) -> ShapingConfig | None:
        """The mixture in the environment `world`; None: rewards as they are.

        Raises:
            EchelonError: the world has no potential terms, or no such mode or term; or a mode of one's own lacks
                weights or strength.
        """
        if not self.on:
            return None
        terms = term_set(world)
        ready = terms.modes.get(self.mode) or terms.grid.get(self.mode)
        weights = self._weights()
        if ready is None and not weights:
            raise unknown_name(f"shaping mode of {world}", self.mode, (OFF, *terms.modes, *terms.grid))
        beta = self.beta if self.beta is not None or ready is None else ready.beta
        if beta is None:
            raise EchelonError(f"shaping.mode {self.mode!r} is none of {world}'s: give shaping.beta too")
        if not weights:
            assert ready is not None
            return dataclasses.replace(ready, beta=beta)
        config = ShapingConfig(self.mode, beta, weights, tuple(weights))
        config.vector(terms.names)
        return config

    def with_config(self, config: ShapingConfig) -> ShapingSettings:
        """These settings with another mixture: `config(world)` gives back `config`, bit for bit.

        Raises:
            EchelonError: the mixture is called "off".
        """
        if config.mode == OFF:
            raise EchelonError(f"shaping.mode is {OFF!r}: a mixture must be called something else")
        named = {**dict.fromkeys(config.active_terms or (), 0.0), **config.weights}
        weights = tuple(f"{name}={weight!r}" for name, weight in sorted(named.items()))
        return dataclasses.replace(self, mode=config.mode, beta=config.beta, weights=weights)

    def rules(self, env: GridEnv[Any], gamma: float, *, replays: bool = False) -> ShapingRules:
        """How a mixture becomes a reward in the worlds `env`, for a learner whose discount is `gamma`.

        Args:
            env: the worlds.
            gamma: the discount.
            replays: whether the learner has a replay memory.
        """
        terms: TermSet = term_set(env.name)
        return ShapingRules(
            gamma=gamma,
            terminal=self.terminal,
            first_step=self.first_step,
            team=self.team,
            num_agents=env.num_agents,
            scale=terms.scale(env) if self.scale is None else self.scale,
            offset=float(replays) if self.offset is None else self.offset,
        )

    def _weights(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for item in self.weights:
            name, _, number = item.partition("=")
            try:
                weight = float(number)
            except ValueError:
                weight = math.nan
            if not name.strip() or not (math.isfinite(weight) and weight >= 0):
                raise EchelonError(f"shaping.weights has {item!r}: it must be term=weight, with a weight of at least 0")
            if name.strip() in found:
                raise EchelonError(f"shaping.weights has {name.strip()!r} twice")
            found[name.strip()] = weight
        if found and not any(found.values()):
            raise EchelonError("shaping.weights has no weight above 0")
        return found
