"""A game for teams of writers, with policies that are tables: who sees x copies it, or writes its complement."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from echelon.algorithms.teams import TeamNode
from echelon.rng import spawn_keys

Item = tuple[int, tuple[int, ...]]


class TablePolicy:
    """A token policy: item (row, tokens) is a reply to prompt `row`; token j is drawn from `table[row, j]`'s softmax.

    `steps` and `last_grad` tell what was learnt from.
    """

    def __init__(self, rows: int, length: int, words: int, *, lr: float = 0.1, seed: int = 0) -> None:
        start = np.random.Generator(np.random.Philox(seed)).normal(size=(rows, length, words), scale=0.1)
        self.table = torch.nn.Parameter(torch.from_numpy(start.astype(np.float32)))
        self.start = self.table.detach().clone()
        self.optimizer = torch.optim.Adam([self.table], lr=lr)
        self.steps = 0
        self.last_grad = torch.zeros_like(self.start)

    def sample(self, row: int, count: int, key: int) -> list[Item]:
        draws = np.random.Generator(np.random.Philox(key)).gumbel(size=(count, *self.table.shape[1:]))
        tokens = (self.table.detach().numpy()[row] + draws).argmax(-1)
        return [(row, tuple(reply)) for reply in tokens.tolist()]

    def _numbers(self, table: Tensor, items: Sequence[Item]) -> Tensor:
        """Of all tokens, one below the other."""
        flat = [(row, j, token) for row, tokens in items for j, token in enumerate(tokens)]
        row, place, token = torch.tensor(flat, dtype=torch.long).reshape(-1, 3).T
        full = torch.log_softmax(table, -1)[row, place]
        return torch.stack([full.gather(-1, token[:, None])[:, 0], -(full.exp() * full).sum(-1)], -1)

    def _split(self, numbers: Tensor, items: Sequence[Item]) -> list[NDArray[np.float32]]:
        return np.split(numbers.numpy(), np.cumsum([len(tokens) for _, tokens in items])[:-1])

    def evaluate(self, items: Sequence[Item]) -> list[NDArray[np.float32]]:
        return self._split(self._numbers(self.table.detach(), items), items)

    def reference(self, items: Sequence[Item]) -> list[NDArray[np.float32]]:
        return self._split(self._numbers(self.start, items), items)

    def backward(self, items: Sequence[Item], grads: Sequence[NDArray[np.float32]]) -> None:
        numbers = self._numbers(self.table, items)
        (numbers * torch.from_numpy(np.concatenate(grads))).sum().backward()  # type: ignore[no-untyped-call]

    def step(self) -> float:
        assert self.table.grad is not None
        self.last_grad = self.table.grad.clone()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1
        return float(self.last_grad.norm())

    def features(self, items: Sequence[Item], *, replies: bool) -> NDArray[np.float32]:
        """The prompt, one-hot; of a reply also its tokens, each with the prompt."""
        rows, length, words = self.table.shape
        out = np.zeros((len(items), rows, 1 + length * words * replies), np.float32)
        for k, (row, tokens) in enumerate(items):
            out[k, row, 0] = 1
            for j, token in enumerate(tokens if replies else ()):
                out[k, row, 1 + j * words + token] = 1
        return out.reshape(len(items), -1)

    def state_dict(self) -> dict[str, Tensor]:
        moments = self.optimizer.state.get(self.table, {})
        state = {"table": self.table.detach(), "start": self.start} | moments
        return {name: value.clone() for name, value in state.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.table.data.copy_(state["table"])
        self.start = state["start"].clone()
        moments = {k: v.clone() for k, v in state.items() if k not in ("table", "start")}
        if moments:
            self.optimizer.state[self.table] = moments


class CopyGame:
    """Agents see x, one of K numbers, and the turn. In turn t agent i writes x if i + t is even, else K - 1 - x.

    A right token of any agent gives the team its share of 1; a turn where all are right gives 1 more.
    """

    def __init__(self, words: int = 3, length: int = 2, turns: int = 1, agents: int = 2) -> None:
        self.words, self.length, self.turns, self.agents = words, length, turns, agents

    def policies(self, seed: int, *, lr: float = 0.1, shared: bool = False) -> list[TablePolicy]:
        """Fresh ones, one an agent, or one for all, who are told who they are."""
        rows = self.turns * self.words * (self.agents if shared else 1)
        made = [TablePolicy(rows, self.length, self.words, lr=lr, seed=10 * seed + i) for i in range(self.agents)]
        return made[:1] * self.agents if shared else made

    def row(self, policy: TablePolicy, agent: int, turn: int, x: int) -> int:
        shared = len(policy.table) > self.turns * self.words
        return ((agent if shared else 0) * self.turns + turn) * self.words + x

    def reward(self, turn: int, x: int, replies: Sequence[Item]) -> float:
        right = [
            token == (x if (i + turn) % 2 == 0 else self.words - 1 - x)
            for i, (_, tokens) in enumerate(replies)
            for token in tokens
        ]
        return sum(right) / len(right) + all(right)

    def grow(self, policies: Sequence[TablePolicy], group: int, joint: str, update: int, seed: int) -> list[TeamNode]:
        """A tree for each x, fully grown."""
        counter = itertools.count()

        def node(x: int, turn: int) -> TeamNode:
            keys = spawn_keys(seed, (update, next(counter)), self.agents).tolist()
            samples = [p.sample(self.row(p, i, turn, x), group, keys[i]) for i, p in enumerate(policies)]
            every = list(zip(*samples, strict=True)) if joint == "aligned" else list(itertools.product(*samples))
            shape = (group,) if joint == "aligned" else (group,) * self.agents
            rewards = np.array([self.reward(turn, x, replies) for replies in every]).reshape(shape)
            children = [node(x, turn + 1) if turn + 1 < self.turns else None for _ in every]
            return TeamNode(list(samples), rewards, children, turn)

        return [node(x, 0) for x in range(self.words)]

    def best(self, policies: Sequence[TablePolicy]) -> float:
        """The mean reward of the most probable replies; 2 is the optimum."""
        total = []
        for turn, x in itertools.product(range(self.turns), range(self.words)):
            replies = []
            for i, p in enumerate(policies):
                row = self.row(p, i, turn, x)
                replies.append((row, tuple(p.table.detach()[row].argmax(-1).tolist())))
            total.append(self.reward(turn, x, replies))
        return float(np.mean(total))
