"""Who picks the moves: a learned policy, the language model itself (L2M2's control B), or a classical planner."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from echelon.algorithms import Algorithm
from echelon.envs.base import ACTIONS, SubgoalKind
from echelon.envs.kernels import WALL
from echelon.errors import EchelonError
from echelon.llm.choice import ChoiceModel, ChoicePrompt
from echelon.llm.prompts import PromptTemplate, option_lines
from echelon.networks import sample_actions
from echelon.pibt import parking_fields, pibt_moves, pibt_scratch
from echelon.rng import spawn_keys
from echelon.rollout import TeamWorlds
from echelon.subgoals import Outcome

__all__ = ["Executor", "LearnedExecutor", "ModelExecutor", "PIBTExecutor"]

_PROMPTS = Path(__file__).parent / "planners" / "prompts"
_NEAR = 5  # cells: what the prompt calls near


class Executor(Protocol):
    """Observations (and subgoals) in, actions out."""

    def act(self, worlds: TeamWorlds, *, greedy: bool = False) -> NDArray[np.int8]:
        """Moves for all agents of all worlds, int8 `(W, A)`."""
        ...


class LearnedExecutor:
    """Acts as an algorithm's present policy does."""

    def __init__(self, algorithm: Algorithm) -> None:
        """`algorithm` must have been built for the number of worlds that it will act in."""
        self.algorithm = algorithm

    def act(self, worlds: TeamWorlds, *, greedy: bool = False) -> NDArray[np.int8]:
        """Moves for all agents of all worlds, int8 `(W, A)`."""
        return self.algorithm.act(worlds.obs, worlds.mask, worlds.begins, greedy=greedy)[0]


class ModelExecutor:
    """Lets a language model pick every primitive move.

    Asked afresh for each agent at each step this would cost minutes an episode. The prompt says what a move
    needs and no more (the target's compass direction, near or far, loaded or not, the legal moves), so that
    there are about a thousand different ones, and each is asked once. Our choice; moves are drawn from the
    model's probabilities, since one that can't remember would else run in place for ever.
    """

    def __init__(self, model: ChoiceModel, num_envs: int, seed: int) -> None:
        """Pick moves with `model` in `num_envs` worlds; `seed` decides what is drawn."""
        self.model = model
        self.shared = PromptTemplate.from_file(_PROMPTS / "move_system.txt").render()
        self.template = PromptTemplate.from_file(_PROMPTS / "move.txt")
        self._logits: dict[int, NDArray[np.float32]] = {}
        self.keys, self.counters = spawn_keys(seed, (3,), num_envs), np.zeros(num_envs, np.uint64)

    def act(self, worlds: TeamWorlds, *, greedy: bool = False) -> NDArray[np.int8]:
        """Moves for all agents of all worlds, int8 `(W, A)`."""
        codes = self._codes(worlds)
        unique, inverse = np.unique(codes, return_inverse=True)
        fresh = [int(code) for code in unique if int(code) not in self._logits]
        questions = [self._prompt(code) for code in fresh]
        for code, scores in zip(fresh, self.model.score(questions) if questions else [], strict=True):
            logits = np.full(len(ACTIONS), -np.inf, np.float32)
            logits[self._legal(code)] = scores.logprobs
            self._logits[code] = logits
        table = np.stack([self._logits[int(code)] for code in unique])
        logits = table[inverse.reshape(codes.shape)]
        actions, logp = np.empty(codes.shape, np.int8), np.empty(codes.shape, np.float32)
        sample_actions(logits, worlds.mask, self.keys, self.counters, greedy, actions, logp)
        return actions

    @staticmethod
    def _codes(worlds: TeamWorlds) -> NDArray[np.int64]:
        """What a prompt depends on, as one number an agent, int64 `(W, A)`."""
        env = worlds.env
        goal = env.nearest_goal()
        here = env.pos
        rows = np.where(goal < 0, 0, env.row_of[goal].astype(np.int64) - env.row_of[here])
        cols = np.where(goal < 0, 0, env.col_of[goal].astype(np.int64) - env.col_of[here])
        # Eight compass directions: a way is straight where one side is over twice the other.
        ns = np.where(np.abs(cols) > 2 * np.abs(rows), 0, np.sign(rows)) + 1
        ew = np.where(np.abs(rows) > 2 * np.abs(cols), 0, np.sign(cols)) + 1
        near = (np.abs(rows) + np.abs(cols) <= _NEAR).astype(np.int64)
        legal = (env.action_mask @ (1 << np.arange(len(ACTIONS)))).astype(np.int64)
        loaded = (env.carrying >= 0).astype(np.int64)
        return np.asarray((((loaded * 2 + near) * 3 + ns) * 3 + ew) * 32 + legal)

    @staticmethod
    def _legal(code: int) -> list[int]:
        return [k for k in range(len(ACTIONS)) if code % 32 >> k & 1]

    def _prompt(self, code: int) -> ChoicePrompt:
        rest = code // 32
        ew, rest = rest % 3, rest // 3
        ns, rest = rest % 3, rest // 3
        near, loaded = rest % 2, rest // 2
        compass = "-".join(w for w in (("north", "", "south")[ns], ("west", "", "east")[ew]) if w)
        way = f"{'near' if near else 'far'}, to the {compass}" if compass else "here"
        words = tuple("stay" if k == 0 else f"go {ACTIONS[k]}" for k in self._legal(code))
        load = "carries something" if loaded else "carries nothing"
        text = self.template.render(load=load, way=way, options=option_lines(words))
        return ChoicePrompt(self.shared, text, words)


class PIBTExecutor:
    """Takes every agent to its subgoal on shortest paths without a collision: see `echelon.pibt`.

    It sees what no learned executor does: the whole map and everybody's subgoal. An agent's priority counts the steps
    since its last subgoal was reached or failed; agents that wait, or have no subgoal, make way.
    """

    def __init__(self, worlds: TeamWorlds, seed: int = 0) -> None:
        """Act in `worlds`; `seed` decides between equally good moves.

        Raises:
            EchelonError: nobody sets subgoals in these worlds.
        """
        if worlds.tracker is None:
            raise EchelonError("a classical executor needs a planner that sets subgoals: this team is flat")
        env = worlds.env
        self.tracker = worlds.tracker
        self.waited = np.zeros((env.num_envs, env.num_agents), np.int32)
        self.keys, self.counters = spawn_keys(seed, (5,), env.num_envs), np.zeros(env.num_envs, np.uint64)
        self._parking = np.zeros((env.num_envs, env.num_cells), np.uint16)
        self._scratch = pibt_scratch(env.num_agents, env.num_cells)

    def act(self, worlds: TeamWorlds, *, greedy: bool = False) -> NDArray[np.int8]:
        """Moves for all agents of all worlds, int8 `(W, A)`; `greedy` changes nothing."""
        env, tracker = worlds.env, self.tracker
        if worlds.begins.any():
            parking_fields(worlds.begins, (env.grid & WALL) != 0, env.offsets, self._parking)
        busy = tracker.kind > SubgoalKind.WAIT
        # A deadline that has passed changes nothing: the goal is still to be reached.
        fresh = worlds.begins[:, None] | (tracker.ended & (tracker.outcome != Outcome.TIMED_OUT))
        moves = np.empty(self.waited.shape, np.int8)
        pibt_moves(
            env.pos, worlds.mask, tracker.field, self._parking, busy, fresh, self.waited, env.offsets, self.keys,
            self.counters, moves, self._scratch,
        )  # fmt: skip
        return moves
