"""What a planner may see of a world, and what it may say: scenes, subgoals and candidates."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "AgentView",
    "Candidates",
    "Scene",
    "Subgoal",
    "SubgoalKind",
    "TaskView",
    "ZoneView",
    "picture",
    "subgoal_text",
]


class SubgoalKind(IntEnum):
    """What a planner can ask of one agent. `FETCH` and above are about one task of the scene."""

    WAIT = 0
    CELL = 1
    REGION = 2
    DIRECTION = 3
    FETCH = 4
    DELIVER = 5
    REPAIR = 6
    TOOL = 7


@dataclass(frozen=True)
class Subgoal:
    """What a planner hands to one agent.

    Attributes:
        kind: what is asked.
        target: the cell (row, col) to go to; the agent's own cell for `WAIT`.
        task: the id of the task it is about, or None.
        text: the same in words.
        deadline: steps after which it has timed out; None lets the hierarchy's setting decide.
    """

    kind: SubgoalKind
    target: tuple[int, int]
    task: int | None = None
    text: str = ""
    deadline: int | None = None


_SUBGOAL_WORDS = {
    SubgoalKind.WAIT: ("wait", ""),
    SubgoalKind.CELL: ("go", " to {target}"),
    SubgoalKind.REGION: ("search", " around {target}"),
    SubgoalKind.DIRECTION: ("go", " towards {target}"),
    SubgoalKind.FETCH: ("fetch package {task}", " at {target}"),
    SubgoalKind.DELIVER: ("deliver package {task}", " to {target}"),
    SubgoalKind.REPAIR: ("repair machine {task}", " at {target}"),
    SubgoalKind.TOOL: ("take tool {task}", " at {target}"),
}


def subgoal_text(kind: SubgoalKind, target: tuple[int, int], task: int, *, brief: bool = False) -> str:
    """A subgoal in words.

    Args:
        kind: what is asked.
        target: (row, col).
        task: task id, or -1.
        brief: leave out where, if the task's id says it: coordinates are most of a prompt's tokens.
    """
    words, place = _SUBGOAL_WORDS[kind]
    named = "{task}" in words
    return (words if brief and named else words + place).format(target=target, task=task)


@dataclass(frozen=True)
class AgentView:
    """One agent in a scene: its id, cell (row, col), and the task or tool that it carries (or None)."""

    id: int
    cell: tuple[int, int]
    carrying: int | None = None


@dataclass(frozen=True)
class TaskView:
    """One task in a scene, as far as a planner may know it.

    Attributes:
        id: its index.
        kind: what it is in this world: "package", "machine", "tool", "region", "target".
        label: its name in texts.
        cell: where it is, or None while nobody knows.
        goal: where it must be brought, or None.
        status: a word of the world's own ("waiting", "carried", …).
        needs: id of the task or tool without which it can't be done, or None.
        locked_by: id of the task that must be done first, or None.
    """

    id: int
    kind: str
    label: str
    cell: tuple[int, int] | None
    goal: tuple[int, int] | None
    status: str
    needs: int | None = None
    locked_by: int | None = None


@dataclass(frozen=True)
class ZoneView:
    """A named set of cells (row, col)."""

    id: int
    label: str
    cells: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Scene:
    """The structured, readable view of one world that a planner may see.

    Attributes:
        env: the environment's name.
        step, limit: time gone and time limit, in steps.
        walls: bool `(height, width)`, read-only.
        agents, tasks, zones: what is in it.
        seen: bool `(height, width)`, what the team has seen, or None where everything is known.
    """

    env: str
    step: int
    limit: int
    walls: NDArray[np.bool_]
    agents: tuple[AgentView, ...]
    tasks: tuple[TaskView, ...]
    zones: tuple[ZoneView, ...] = ()
    seen: NDArray[np.bool_] | None = None


@dataclass(frozen=True)
class Candidates:
    """The subgoals that make sense now, for some worlds, as arrays `(rows, agents, max_candidates)`.

    Attributes:
        kind: int8, a `SubgoalKind`, or -1 past the last candidate of an agent.
        cell: int32, target as a flat index of the padded grid (`GridEnv.cell_index`).
        task: int16, task id or -1.
    """

    kind: NDArray[np.int8]
    cell: NDArray[np.int32]
    task: NDArray[np.int16]


def picture(scene: Scene) -> str:
    """The scene as text, a character a cell.

    `#` is a wall, `?` unseen, `+` a zone; tasks that have a cell of their own show the first letter of their
    kind unless they are done, robots the last digit of their id.
    """
    rows = np.full(scene.walls.shape, ".", "<U1")
    if any(task.goal is not None for task in scene.tasks):
        for zone in scene.zones:
            for cell in zone.cells:
                rows[cell] = "+"
    if scene.seen is not None:
        rows[~scene.seen] = "?"
    rows[scene.walls] = "#"
    for task in scene.tasks:
        if task.cell is not None and task.kind != "region" and task.status not in ("delivered", "repaired"):
            rows[task.cell] = task.kind[0]
    for agent in scene.agents:
        rows[agent.cell] = str(agent.id % 10)
    return "\n".join("".join(row) for row in rows)
