"""What happens in a few worlds, as a replay document (`reports.replay` turns it into a page)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from echelon.configs import RunConfig
from echelon.envs.base import Scene
from echelon.methods import method
from echelon.rollout import PlanTrace, TeamWorlds

__all__ = ["Recorder"]


class Recorder:
    """Collects frames and plans of the first worlds of a batch, one episode each."""

    def __init__(self, config: RunConfig, worlds: int) -> None:
        """Record the first `worlds` worlds of a run's evaluation."""
        self.config, self.count = config, worlds
        self._frames: list[list[dict[str, Any]]] = [[] for _ in range(worlds)]
        self._plans: list[list[dict[str, Any]]] = [[] for _ in range(worlds)]
        self._first: list[Scene] = []

    def frame(self, worlds: TeamWorlds, which: NDArray[np.bool_]) -> None:
        """Take the present state of the recorded ones among the worlds `which` (bool `(W,)`)."""
        env = worlds.env
        if not self._first:
            self._first = [env.scene(i) for i in range(min(self.count, env.num_envs))]
        for i in range(len(self._first)):
            if not which[i]:
                continue
            scene = env.scene(i)
            frame: dict[str, Any] = {
                "agents": [list(agent.cell) for agent in scene.agents],
                "carrying": [-1 if agent.carrying is None else agent.carrying for agent in scene.agents],
                "status": [task.status for task in scene.tasks],
                "subgoals": [self._subgoal(worlds, i, a) for a in range(env.num_agents)],
                "collisions": int(env.collisions[i]) if self._frames[i] else 0,
                "events": self._events(scene, i),
            }
            if scene.seen is not None:
                frame["seen"] = _run_lengths(scene.seen)
            self._frames[i].append(frame)

    @staticmethod
    def _subgoal(worlds: TeamWorlds, i: int, a: int) -> dict[str, Any] | None:
        subgoal = worlds.tracker.subgoal(i, a) if worlds.tracker is not None else None
        if subgoal is None:
            return None
        return {
            "kind": subgoal.kind.name.lower(), "target": list(subgoal.target), "task": subgoal.task,
            "text": subgoal.text,
        }  # fmt: skip

    def _events(self, scene: Scene, i: int) -> list[str]:
        if not self._frames[i]:
            return []
        before = self._frames[i][-1]["status"]
        return [
            f"{task.label}: {task.status}" for task, old in zip(scene.tasks, before, strict=False) if task.status != old
        ]

    def plan(self, trace: PlanTrace) -> None:
        """Take a planning round, if it is about a recorded episode."""
        if trace.world >= self.count:
            return
        choices = [
            {
                "agent": agent["agent"],
                "options": agent.get("options", []),
                "chosen": agent.get("chosen"),
                "verdict": agent["verdict"],
                "reason": agent.get("reason"),
            }
            for agent in trace.agents
        ]
        prompts = [f"[robot {a['agent']}]\n{a['prompt']}" for a in trace.agents if a.get("prompt")]
        replies = [f"[robot {a['agent']}]\n{a['reply']}" for a in trace.agents if a.get("reply")]
        self._plans[trace.world].append(
            {
                "step": trace.step,
                "planner": trace.planner,
                "agents": [agent["agent"] for agent in trace.agents],
                # A team's prompt is the round's, not an agent's.
                "prompt": "\n\n".join(prompts) or trace.note.get("prompt"),
                "reply": "\n\n".join(replies) or trace.note.get("reply"),
                "choices": choices,
                "latency_ms": round(trace.latency_ms, 3),
            }
        )

    def document(self, worlds: TeamWorlds, success: NDArray[np.bool_]) -> dict[str, Any]:
        """The replay document; `success` (bool `(W,)`) says how the episodes ended."""
        env, config = worlds.env, self.config
        planner = worlds.planners[0][0].name if worlds.planners else "none"
        return {
            "format": "echelon-replay",
            "version": 1,
            "title": f"{config.method} on {env.name} {env.height}×{env.width}",
            "env": env.name,
            "method": config.method,
            "planner": planner if method(config.method).executor != "model" else "the model moves",
            "seed": config.seed,
            "height": env.height,
            "width": env.width,
            "num_agents": env.num_agents,
            "limit": env.limit,
            "episodes": [self._episode(i, bool(success[i])) for i in range(len(self._first))],
        }

    def _episode(self, i: int, success: bool) -> dict[str, Any]:
        scene = self._first[i]
        return {
            "world": i,
            "success": success,
            "steps": len(self._frames[i]) - 1,
            "walls": ["".join("#" if wall else "." for wall in row) for row in scene.walls],
            "zones": [{"id": z.id, "label": z.label, "cells": [list(c) for c in z.cells]} for z in scene.zones],
            "tasks": [
                {
                    "id": t.id,
                    "kind": t.kind,
                    "label": t.label,
                    "cell": None if t.cell is None else list(t.cell),
                    "goal": None if t.goal is None else list(t.goal),
                }
                for t in scene.tasks
            ],
            "frames": self._frames[i],
            "plans": self._plans[i],
        }


def _run_lengths(seen: NDArray[np.bool_]) -> str:
    """A mask as run lengths, zeros first: "5,3,…"."""
    flat = seen.reshape(-1).astype(np.int8)
    change = np.flatnonzero(np.diff(flat)) + 1
    edges = np.concatenate([[0], change, [flat.size]])
    runs = np.diff(edges).tolist()
    return ",".join(str(n) for n in ([0, *runs] if flat[0] else runs))
