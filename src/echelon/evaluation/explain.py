"""One plan, laid open: the way to understand a planner."""

from __future__ import annotations

import numpy as np

from echelon.building import build_worlds
from echelon.configs import RunConfig
from echelon.envs.kernels import UNREACHABLE
from echelon.envs.scenes import picture
from echelon.rollout import PlanTrace

__all__ = ["explain_plan"]


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
    out = [picture(scene), "", env.describe(scene)]
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
        if prompts and agent.get("reply"):
            out += ["  reply:", *(f"  | {line}" for line in agent["reply"].splitlines())]
    for name in ("prompt", "reply") if prompts else ():
        if trace.note.get(name):
            out += ["", f"{name} for the team:", *(f"  | {line}" for line in str(trace.note[name]).splitlines())]
    if trace.note.get("error"):
        out += ["", f"the model gave no answer: {trace.note['error']}"]
    rejected = {k: v for k, v in tracker.counts.rejected.items() if v}
    out += ["", f"planner {trace.planner}, {trace.latency_ms:.1f} ms; refused: {rejected or 'nothing'}; "
            f"sent back: {tracker.counts.retried}; fallback: {tracker.counts.fallback}"]  # fmt: skip
    return "\n".join(out)
