"""One plan, laid open: the way to understand a planner."""

from __future__ import annotations

import numpy as np

from echelon.configs import RunConfig
from echelon.envs.base import Scene
from echelon.envs.kernels import UNREACHABLE
from echelon.rollout import PlanTrace
from echelon.training import build_worlds

__all__ = ["draw_scene", "explain_plan"]


def explain_plan(config: RunConfig, *, prompts: bool = True) -> str:
    """The first plan of one world of a run: scene, candidates, prompts, choices and verdicts, as text.

    Args:
        config: the run; its seed decides the world.
        prompts: whether to show what a language model was sent.
    """
    traces: list[PlanTrace] = []
    worlds = build_worlds(config, num_envs=1, seed=config.seed, training=False, on_plan=traces.append, trace_all=True)
    tracker, env = worlds.tracker, worlds.env
    assert tracker is not None
    scene = env.scene(0)
    # Asked before the real request, on a copy of the random state, so that looking changes nothing.
    counters = tracker.counters.copy()
    request = tracker.request(np.zeros(1, np.int64), distance=True)
    tracker.counters[:] = counters
    worlds.start()
    assert request.distance is not None and traces
    out = [draw_scene(scene), "", env.describe(scene)]
    trace = traces[0]
    for agent in trace.agents:
        a = agent["agent"]
        out += ["", f"Robot {a}: {agent['kind']} {tuple(agent['target'])}: {agent['verdict']}"]
        if agent.get("reason"):
            out.append(f"  refused: {agent['reason']} ({agent['tries']} tries)")
        shown = agent.get("options")
        if shown:
            for i, option in enumerate(shown):
                bar = "█" * round(20 * option["probability"])
                mark = "→" if i == agent.get("chosen") else " "
                out.append(f"  {mark} {option['probability']:.3f} {bar:<20} {option['text']}")
        else:
            for c in np.flatnonzero(request.candidates.kind[0, a] >= 0):
                length = int(request.distance[0, a, c])
                way = "no path" if length == UNREACHABLE else f"{length} steps"
                out.append(f"    {request.text(0, a, int(c))}: {way}")
        if prompts and agent.get("prompt"):
            out += ["  prompt:", *(f"  | {line}" for line in agent["prompt"].splitlines())]
    rejected = {k: v for k, v in tracker.counts.rejected.items() if v}
    out += ["", f"planner {trace.planner}, {trace.latency_ms:.1f} ms; refused: {rejected or 'nothing'}; "
            f"sent back: {tracker.counts.retried}; fallback: {tracker.counts.fallback}"]  # fmt: skip
    return "\n".join(out)


def draw_scene(scene: Scene) -> str:
    """A scene as text: `#` walls, `a` to `z` zones, `+` tasks that wait, digits robots, `?` unseen."""
    rows, cols = scene.walls.shape
    grid = [["#" if scene.walls[r, c] else "." for c in range(cols)] for r in range(rows)]
    if scene.seen is not None:
        for r, c in np.argwhere(~scene.seen & ~scene.walls):
            grid[r][c] = "?"
    for zone in scene.zones:
        for r, c in zone.cells:
            grid[r][c] = chr(ord("a") + zone.id % 26)
    for task in scene.tasks:
        if task.cell is not None and task.status not in ("delivered", "carried", "repaired", "explored"):
            grid[task.cell[0]][task.cell[1]] = "+"
    for agent in scene.agents:
        grid[agent.cell[0]][agent.cell[1]] = str(agent.id % 10)
    return "\n".join("".join(row) for row in grid)
