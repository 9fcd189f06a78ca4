"""Mixing networks: from the values of a team's agents to the value of the team.

Each increases with every agent's value, so that the best action of each agent alone is the best joint one.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["MonotonicMixer", "SumMixer"]


class SumMixer(torch.nn.Module):
    """VDN (Sunehag et al. 2018): a team is worth the sum of its agents; has no parameters."""

    def forward(self, values: Tensor, state: Tensor) -> Tensor:
        """Values of teams, float32 `(B,)`, of the agents' float32 `(B, A)`; `state` isn't looked at."""
        return values.sum(-1)


class MonotonicMixer(torch.nn.Module):
    """QMIX (Rashid et al. 2018, section 4): two layers with ELU whose weights the state decides.

    Hypernetworks make the weights, whose absolute values are taken, so that no agent's value lowers the team's, and
    the biases, which are free. Two-layer hypernetworks as in EPyMARL.
    """

    def __init__(
        self,
        num_agents: int,
        state_scale: NDArray[np.float32],
        *,
        embed: int = 32,
        hidden: int = 64,
        generator: torch.Generator,
    ) -> None:
        """PyTorch's default initialisation of linear layers.

        Args:
            num_agents: A.
            state_scale: float32 `(S,)`, multiplied into the state.
            embed: units of the mixing network's hidden layer.
            hidden: units of the hypernetworks' hidden layers.
            generator: where the initial weights come from.
        """
        super().__init__()
        self._scale = torch.from_numpy(state_scale)
        self._parts = (hidden, hidden, embed, embed)
        # The first layers of the four hypernetworks (the inner bias has no other) as one product.
        self.first = torch.nn.Linear(len(state_scale), sum(self._parts))
        self.inner = torch.nn.Linear(hidden, num_agents * embed)
        self.outer = torch.nn.Linear(hidden, embed)
        self.value = torch.nn.Linear(embed, 1)
        for layer in (self.first, self.inner, self.outer, self.value):
            bound = layer.in_features**-0.5
            for p in (layer.weight, layer.bias):
                torch.nn.init.uniform_(p, -bound, bound, generator=generator)

    def forward(self, values: Tensor, state: Tensor) -> Tensor:
        """Values of teams.

        Args:
            values: float32 `(B, A)`, of the agents.
            state: `(B, S)`, unscaled, any type.

        Returns:
            float32 `(B,)`.
        """
        inner, outer, bias, value = self.first(state.float() * self._scale).split(self._parts, -1)
        weights: Tensor = self.inner(inner.relu()).abs().view(*values.shape, -1)
        mixed = torch.nn.functional.elu((values[..., None] * weights).sum(1) + bias)
        weights = self.outer(outer.relu()).abs()
        team: Tensor = (mixed * weights).sum(-1) + self.value(value.relu()).squeeze(-1)
        return team
