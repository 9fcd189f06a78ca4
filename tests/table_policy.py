"""Policies without a language model: tables of numbers, trained as `PolicyModel` says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class TablePolicy:
    """A choice policy whose item i (an int) has the number `table[i]`. `passes` counts the items asked for."""

    def __init__(self, rows: int, *, lr: float = 0.1, initial: NDArray[np.float32] | None = None) -> None:
        start = torch.zeros(rows) if initial is None else torch.from_numpy(initial.copy())
        self.table = torch.nn.Parameter(start)
        self.start = start.clone()
        self.optimizer = torch.optim.Adam([self.table], lr=lr)
        self.passes = 0
        self.last_grad = torch.zeros(rows)

    def evaluate(self, items: Sequence[int]) -> list[NDArray[np.float32]]:
        self.passes += len(items)
        return list(self.table.detach().numpy()[list(items)].copy()[:, None, None])

    def reference(self, items: Sequence[int]) -> list[NDArray[np.float32]]:
        return list(self.start.numpy()[list(items)].copy()[:, None, None])

    def backward(self, items: Sequence[int], grads: Sequence[NDArray[np.float32]]) -> None:
        assert len(set(items)) == len(items)
        total = (self.table[list(items)] * torch.from_numpy(np.concatenate(grads)[:, 0])).sum()
        total.backward()  # type: ignore[no-untyped-call]

    def step(self) -> float:
        assert self.table.grad is not None
        self.last_grad = self.table.grad.clone()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(self.last_grad.norm())

    def state_dict(self) -> dict[str, Tensor]:
        moments = self.optimizer.state.get(self.table, {})
        return {"table": self.table.detach().clone()} | {k: v.clone() for k, v in moments.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.table.data.copy_(state["table"])
        self.optimizer.state[self.table] = {k: v.clone() for k, v in state.items() if k != "table"}

    def probabilities(self, items: Sequence[int]) -> NDArray[np.float64]:
        """The softmax of some items' numbers."""
        x = self.table.detach().double()[list(items)]
        return torch.softmax(x, 0).numpy()


class TokenTablePolicy:
    """A token policy: item (row, tokens) is a sampled reply; token j is drawn from the softmax of `table[row, j]`."""

    def __init__(self, rows: int, length: int, words: int, *, lr: float = 0.1) -> None:
        self.table = torch.nn.Parameter(torch.zeros(rows, length, words))
        self.optimizer = torch.optim.Adam([self.table], lr=lr)

    def _numbers(self, items: Sequence[tuple[int, tuple[int, ...]]]) -> Tensor:
        rows = torch.tensor([row for row, _ in items])
        tokens = torch.tensor([tokens for _, tokens in items])
        full = torch.log_softmax(self.table[rows], -1)
        logp = full.gather(-1, tokens[..., None])[..., 0]
        return torch.stack([logp, -(full.exp() * full).sum(-1)], -1)

    def evaluate(self, items: Sequence[Any]) -> list[NDArray[np.float32]]:
        return list(self._numbers(items).detach().numpy())

    def reference(self, items: Sequence[Any]) -> list[NDArray[np.float32]]:
        raise NotImplementedError

    def backward(self, items: Sequence[Any], grads: Sequence[NDArray[np.float32]]) -> None:
        total = (self._numbers(items) * torch.from_numpy(np.stack(grads))).sum()
        total.backward()  # type: ignore[no-untyped-call]

    def step(self) -> float:
        assert self.table.grad is not None
        norm = float(self.table.grad.norm())
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def state_dict(self) -> dict[str, Tensor]:
        return {"table": self.table.detach().clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.table.data.copy_(state["table"])
