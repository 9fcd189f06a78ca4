"""A language model writes the plan: JSON for a whole team, or for one robot at a time.

Unlike scoring (`planners.llm`) this leaves the model free: it may send a robot to any cell, give two robots one task or
write nonsense, and the feasibility chain says no. Prompts are template files. What they hold, what a reply may look
like and how a refusal is told are our choice; memory of past subgoals and reflection on failed ones follow the idea of
Shinn et al., "Reflexion" (2023), cut down to one sentence.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from echelon.envs.kernels import UNREACHABLE
from echelon.envs.scenes import Scene, SubgoalKind, picture, subgoal_text
from echelon.errors import EchelonError, unknown_name
from echelon.llm.prompts import Block, PromptTemplate, clean, lines
from echelon.llm.text import TextModel, TextPrompt, TextReply
from echelon.planners.base import Asking, ModelPlanner
from echelon.planners.replies import FINDINGS, Proposal, Reading, parse_plan
from echelon.subgoals import PAST, Outcome, Past, Plan, PlanRequest, Sight, Verdict

__all__ = ["FIELDS", "MAX_CHARS", "GeneratingPlanner", "open_candidates"]

MAX_CHARS = 48_000
"""A prompt is never longer than this and what its template says itself, in characters: 64 robots, every field used,
every name as long as it may be. 64 robots with 50 packages and the shipped templates: about 7,500."""

FIELDS: Mapping[str, str] = {
    "robots": "a line for each robot that is asked about: its cell and its options, numbered from 1, the nearest "
    "first, with their path lengths; where a field of the scene is used, what it carries too",
    "feedback": "why the last choices of these robots were refused, or nothing",
    "memory": "how the last subgoals of these robots ended, a line a robot, or nothing",
    "lessons": "what the model said about failures of this episode, a line each, or nothing",
    "others": "where the other robots are and which tasks they have, or nothing",
    "size": "rows and columns of the grid",
    "format": "what a reply must look like",
    "map": "the scene as a picture, up to 4096 cells",
    "tasks": "the scene's tasks, a line each",
    "failures": "what failed, a line a robot; only in the templates of a reflection",
}
"""What stands for what in a template. Each block brings its own line break."""

_SCENE = frozenset({"map", "tasks"})
_FILES = ("plan_system.txt", "plan.txt", "reflect_system.txt", "reflect.txt")
_FORMAT = {
    "team": 'Reply with JSON only: {"plan": [{"robot": 0, "option": 1}, {"robot": 1, "option": 2}]}. '
    'Option 0 is to wait. "cell": [row, column] in place of "option" sends a robot to a free cell.',
    "agent": 'Reply with JSON only: {"option": 1}. Option 0 is to wait. {"cell": [row, column]} goes to a free cell.',
}
_PROMPTS = Path(__file__).parent / "prompts"
_BATCH = 64  # prompts sent at a time, between two looks at whether to stop
_OPTIONS = 256  # options in a prompt, all robots together
_MEMORIES = 128  # past subgoals in a prompt, all robots together
_TASKS = 64  # tasks in a prompt
_CELLS = 4096  # of a map in a prompt
_LABEL, _TASK_LINE, _LESSON, _REPLY, _ERROR = 48, 100, 160, 4000, 300  # characters
_LESSONS = 3
_REFLECTION_TOKENS = 60
_ENTRY_TOKENS = 24  # of one robot in a reply, line breaks and indents included
_ENDED = {
    Outcome.ACTIVE: "replaced",
    Outcome.REACHED: "reached",
    Outcome.FAILED: "failed",
    Outcome.TIMED_OUT: "timed out",
}
_COUNTS = ("asked", "forced", "questions", "failures", "malformed", "waits", "cells", "reflections")


@dataclass
class _Episode:
    """What is remembered of a world's episode: lessons, and the past (a hash) that each robot was last seen with."""

    number: int
    lessons: list[str] = field(default_factory=list)
    seen: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _View:
    """Row `i` of a request, as prompts tell it."""

    request: PlanRequest
    i: int
    scene: Scene | None
    lessons: tuple[str, ...]


@dataclass(frozen=True)
class _Question:
    """One prompt: about row `i`, with each robot's options (candidates, int64 `(k,)`); none if it is a reflection."""

    i: int
    options: dict[int, NDArray[np.int64]]
    prompt: TextPrompt


@dataclass(frozen=True)
class _Answer:
    """What came back for a question, and what was made of it."""

    question: _Question
    reply: TextReply
    reading: Reading


class GeneratingPlanner(ModelPlanner):
    """Asks a model that writes text for a plan, and reads what it writes.

    With `ask="team"` there is one prompt a world, about all its robots that need a subgoal, with "agent" one a robot.
    A reply names for each robot one of its options, 0 for waiting, or a free cell (row, col):
    `{"plan": [{"robot": 0, "option": 2}, {"robot": 1, "cell": [4, 7]}]}`; about a single robot
    `{"goal": {"option": 2}}`. It may be anything else, too: see `planners.replies`. A robot without a usable proposal
    gets a plan of bad form (kind -1), so that it is asked about again with the reason, and the fallback decides in the
    end. Two robots with one task are left to the feasibility chain. Options are the nearest open candidates, the
    nearest first: a model that says 1 to everything sends everybody to what is nearest. A robot with one open candidate
    needs no model, and one with none waits.

    With `reflect`, a robot whose newest subgoal failed or came too late gets one more prompt into its world's round
    (all such robots of a world share it): what went wrong? The answer, one cleaned line, is shown in later prompts of
    the same episode, the last three of them.

    Templates are text files: `plan_system.txt`, `plan.txt`, and for reflections `reflect_system.txt`, `reflect.txt`.
    They may use the fields of `FIELDS`.

    Attributes:
        counts: agents `asked` about and `forced` (one open candidate), `questions` (prompts for plans) and
            `reflections` (for lessons), `failures` (replies with an error), `malformed` (replies with nothing usable),
            `waits` and `cells` (proposals to wait and to go to a cell), and each kind of `replies.FINDINGS`.
        needs_scene: whether a template uses the scene.
    """

    def __init__(
        self,
        model: TextModel,
        *,
        ask: Literal["team", "agent"] = "team",
        folder: Path | None = None,
        memory: int = 2,
        reflect: bool = False,
        max_options: int = 8,
        max_tokens: int = 256,
    ) -> None:
        """Plan with `model`.

        Args:
            model: anything that writes text.
            ask: one prompt a world, or one an agent.
            folder: where templates lie; one that isn't there is the shipped one.
            memory: how many of a robot's last subgoals it is told about, 0 to 4; fewer in teams of more than 32.
            reflect: whether to ask what went wrong.
            max_options: most candidates shown for a robot, 2 to 64; fewer where more than 256 would be in a prompt.
            max_tokens: the longest reply, in tokens; 24 for each robot that is asked about, if that is more.

        Raises:
            EchelonError: a number is out of range, or a template can't be used.
        """
        if ask not in _FORMAT:
            raise unknown_name("way to ask", ask, _FORMAT)
        for name, value, low, high in (("memory", memory, 0, PAST), ("max_options", max_options, 2, 64),
                                       ("max_tokens", max_tokens, 1, 1 << 16)):  # fmt: skip
            if not low <= value <= high:
                raise EchelonError(f"{name} is {value}: it must be {low} to {high}")
        self.name = f"llm:{model.name}"
        self.model, self.ask = model, ask
        self.memory, self.reflect, self.max_options, self.max_tokens = memory, reflect, max_options, max_tokens
        shipped = _PROMPTS / ("team" if ask == "team" else "robot")
        self._format = Block(_FORMAT[ask])
        system, self._plan, reflect_system, self._reflect = _templates(folder, shipped)
        self._system, self._reflect_system = (
            template.render(**dict.fromkeys(template.fields, self._format)) for template in (system, reflect_system)
        )
        used = self._plan.fields | (self._reflect.fields if reflect else frozenset())
        self.needs_scene = bool(used & _SCENE)
        # A lesson is of what went before: with them no plan is a function of its request.
        self.sees = None if reflect else _sight(used, memory)
        self.depends_on = (ask, self._system, self._plan.text, *map(str, (memory, max_options, max_tokens)))
        self.counts: Counter[str] = Counter()
        self._episodes: dict[int, _Episode] = {}

    # -- a plan in three parts -----------------------------------------------------------------

    def begin(self, request: PlanRequest, *, split: bool = False, busy: bool = False) -> Asking:
        """Decide what needs no model, and write the prompts, if they will be sent."""
        choice = np.full(request.need.shape, -1, np.int64)
        asked = np.zeros(request.need.shape, bool)
        questions: list[_Question] = []
        for i in np.flatnonzero(request.need.any(1)).tolist():
            options = self._settle(request, i, choice)
            if not options:
                continue
            asked[i, list(options)] = True
            if busy:
                continue
            each = [options] if self.ask == "team" else [{a: options[a]} for a in options]
            questions += self._write(request, i, each)
        self.counts["asked"] += sum(len(q.options) for q in questions)
        self.counts["forced"] += int((choice >= 0).sum())
        self.counts["questions"] += sum(bool(q.options) for q in questions)
        self.counts["reflections"] += sum(not q.options for q in questions)
        prompts = [q.prompt for q in questions]
        size = _size(request) if questions else (0, 0)
        return Asking(request, Plan.chosen(request, choice), asked, lambda: self._ask(prompts), (questions, size))

    def end(self, asking: Asking, answers: Any) -> Plan:
        """What the replies say, read and not yet checked."""
        request = asking.request
        questions, size = asking.memo
        plan = Plan(asking.plan.kind.copy(), asking.plan.cell.copy(), asking.plan.task.copy())
        plan.kind[asking.open] = -1
        plan.probability = np.zeros(request.candidates.kind.shape, np.float32)
        read: dict[int, list[_Answer]] = {}
        for question, reply in zip(questions, _fitting(answers, len(questions)), strict=True):
            answer = _Answer(question, reply, self._read(request, question, reply, size))
            read.setdefault(question.i, []).append(answer)
            for a, proposal in answer.reading.proposals.items():
                self._propose(request, plan, question.i, a, question.options[a], proposal)
        plan.told = np.zeros(len(request.rows), bool)
        plan.told[list(read)] = True
        forced = request.need & ~asking.open & (plan.kind > 0)
        plan.notes = lambda i: self._note(request, np.flatnonzero(forced[i]).tolist(), read.get(i, []))
        return plan

    def _settle(self, request: PlanRequest, i: int, choice: NDArray[np.int64]) -> dict[int, NDArray[np.int64]]:
        """The options of each agent of row `i` that has more than one; a single one is put into `choice`."""
        c, taken = request.candidates, request.taken.copy()
        team = np.flatnonzero(request.need[i]).tolist()
        together = len(team) if self.ask == "team" else 1
        most = max(2, min(self.max_options, _OPTIONS // together))
        while True:
            options: dict[int, NDArray[np.int64]] = {}
            forced = False
            for a in team:
                found = open_candidates(request, taken, i, a, most)
                if len(found) > 1:
                    options[a] = found
                elif len(found):
                    choice[i, a] = found[0]
                    task = int(c.task[i, a, found[0]])
                    if task >= 0 and request.is_exclusive(int(c.kind[i, a, found[0]])):
                        taken[i, task] = forced = True
            if not forced:
                return options
            # What was given away is no option for the others any more.
            team = list(options)

    def _propose(
        self, request: PlanRequest, plan: Plan, i: int, a: int, options: NDArray[np.int64], proposal: Proposal
    ) -> None:
        """Put a proposal into the plan."""
        assert plan.probability is not None
        c = request.candidates
        if proposal.cell is not None:
            self.counts["cells"] += 1
            kind, cell, task = int(SubgoalKind.CELL), request.cell_index(*proposal.cell), -1
        elif proposal.option:
            k = int(options[proposal.option - 1])
            kind, cell, task = int(c.kind[i, a, k]), int(c.cell[i, a, k]), int(c.task[i, a, k])
        else:
            self.counts["waits"] += 1
            kind, cell, task = int(SubgoalKind.WAIT), int(request.pos[i, a]), -1
        plan.kind[i, a], plan.cell[i, a], plan.task[i, a] = kind, cell, task
        same = (c.kind[i, a] == kind) & (c.cell[i, a] == cell) & (c.task[i, a] == task)
        if same.any():
            plan.probability[i, a, int(np.argmax(same))] = 1

    # -- asking --------------------------------------------------------------------------------

    def _ask(self, prompts: list[TextPrompt]) -> list[TextReply]:
        """A reply for each prompt; what goes wrong is its error."""
        replies: list[TextReply] = []
        for at in range(0, len(prompts), _BATCH):
            self.between(at, len(prompts))
            some = prompts[at : at + _BATCH]
            try:
                got: object = list(islice(self.model.generate(some), len(some) + 1))
            except Exception as error:  # whatever a user's model may raise: it must not stop the run
                got = error
            replies += _fitting(got, len(some))
        return replies

    def _read(self, request: PlanRequest, question: _Question, reply: TextReply, size: tuple[int, int]) -> Reading:
        """What a reply proposes, or, of a reflection, teaches; faults are counted."""
        if reply.error is not None:
            self.counts["failures"] += 1
            return Reading({}, [])
        if not question.options:
            self._learn(request, question.i, reply)
            return Reading({}, [])
        options = {a: len(found) for a, found in question.options.items()}
        reading = parse_plan(reply.text, options, request.need.shape[1], size)
        self.counts["malformed"] += not reading.proposals
        self.counts.update(reading.findings)
        return reading

    # -- lessons -------------------------------------------------------------------------------

    def _episode(self, request: PlanRequest, i: int) -> _Episode:
        """What is remembered of the present episode of row `i`."""
        world, number = int(request.rows[i]), int(request.episode[i])
        known = self._episodes.get(world)
        if known is None or known.number != number:
            known = self._episodes[world] = _Episode(number)
        return known

    def _failures(self, request: PlanRequest, i: int) -> list[tuple[int, Past]]:
        """The agents of row `i` whose newest subgoal failed and wasn't looked at, with that subgoal."""
        episode, found = self._episode(request, i), []
        for a in np.flatnonzero(request.need[i]).tolist():
            past = request.past(i, a)
            words = repr([(int(p.kind), p.target, p.task, int(p.outcome), p.steps) for p in past])
            sign = hashlib.blake2b(words.encode(), digest_size=8).hexdigest()
            if past and episode.seen.get(a) != sign and past[-1].outcome in (Outcome.FAILED, Outcome.TIMED_OUT):
                found.append((a, past[-1]))
            episode.seen[a] = sign
        return found

    def _learn(self, request: PlanRequest, i: int, reply: TextReply) -> None:
        """Keep what a reflection says, if its episode is still the present one."""
        lesson, episode = _lesson(reply.text), self._episodes.get(int(request.rows[i]))
        if lesson and episode is not None and episode.number == int(request.episode[i]):
            episode.lessons = [*episode.lessons, lesson][-_LESSONS:]

    # -- prompts -------------------------------------------------------------------------------

    def _write(self, request: PlanRequest, i: int, each: list[dict[int, NDArray[np.int64]]]) -> list[_Question]:
        """The prompts about row `i`, one for each set of options, and one for what failed."""
        lessons = tuple(self._episode(request, i).lessons) if self.reflect else ()
        view = _View(request, i, request.scene(int(request.rows[i])) if self.needs_scene else None, lessons)
        questions = []
        if self.reflect and (failed := self._failures(request, i)):
            failures = _block(f"Robot {a}: {_ending(past)}" for a, past in failed)
            text = self._render(self._reflect, view, {a: None for a, _ in failed}, failures)
            prompt = TextPrompt(self._reflect_system, text, None, _REFLECTION_TOKENS)
            questions.append(_Question(i, {}, prompt))
        for options in each:
            tokens = max(self.max_tokens, _ENTRY_TOKENS * len(options))
            prompt = TextPrompt(self._system, self._render(self._plan, view, options), self._schema(options), tokens)
            questions.append(_Question(i, options, prompt))
        return questions

    def _render(
        self,
        template: PromptTemplate,
        view: _View,
        options: Mapping[int, NDArray[np.int64] | None],
        failures: Block = Block(""),  # noqa: B008 - it is a string
    ) -> str:
        """A message about the agents `options`."""
        request, i, agents = view.request, view.i, list(options)
        # Made only where the template uses it.
        fields: dict[str, Callable[[], object]] = {
            "robots": lambda: _block(self._robot(view, a, found) for a, found in options.items()),
            "feedback": lambda: _feedback(request, i, agents),
            "memory": lambda: self._remembered(request, i, agents),
            "lessons": lambda: _block(f"Lesson: {lesson}" for lesson in view.lessons),
            "others": lambda: _others(request, i, agents),
            "size": lambda: "{} rows, {} columns".format(*_size(request)),
            "format": lambda: self._format,
            "map": lambda: _map(view.scene),
            "tasks": lambda: _tasks(view.scene),
            "failures": lambda: failures,
        }
        return template.render(**{name: fields[name]() for name in template.fields}).strip("\n")

    def _robot(self, view: _View, a: int, options: NDArray[np.int64] | None) -> str:
        """An agent's line: where it is, what it carries, and what it can do."""
        load = ""
        if view.scene is not None:
            carries = next((agent.carrying for agent in view.scene.agents if agent.id == a), None)
            labels = [task.label for task in view.scene.tasks if carries is not None and task.id == carries]
            load = f" with {clean(labels[0])[:_LABEL]}" if labels else ""
        where = f"Robot {a} at {view.request.where(view.i, a)}{load}"
        return where if options is None else f"{where}: " + "; ".join(self._options(view.request, view.i, a, options))

    @staticmethod
    def _options(request: PlanRequest, i: int, a: int, options: NDArray[np.int64]) -> list[str]:
        """An agent's options as they are shown: `1 fetch package 3 (14)`."""
        assert request.distance is not None
        return [
            f"{n} {clean(request.text(i, a, c, brief=True))[:_LABEL]} ({int(request.distance[i, a, c])})"
            for n, c in enumerate(options.tolist(), 1)
        ]

    def _remembered(self, request: PlanRequest, i: int, agents: Sequence[int]) -> Block:
        """How the last subgoals of these agents ended, a line an agent."""
        most = min(self.memory, max(1, _MEMORIES // len(agents)))
        past = {a: request.past(i, a)[-most:] for a in agents} if most else {}
        return _block(f"Robot {a}: {', then '.join(map(_ending, some))}" for a, some in past.items() if some)

    def _schema(self, options: Mapping[int, NDArray[np.int64]]) -> dict[str, Any]:
        """What a reply must look like, as a JSON schema fit for strict servers too: no key is optional."""
        number = {"type": "integer", "enum": list(range(max(map(len, options.values())) + 1))}
        pair = {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 2}
        if self.ask == "agent":
            return _object(goal={"anyOf": [_object(option=number), _object(cell=pair)]})
        robot = {"type": "integer", "enum": list(options)}
        entry = {"anyOf": [_object(robot=robot, option=number), _object(robot=robot, cell=pair)]}
        count = len(options)
        return _object(plan={"type": "array", "items": entry, "minItems": count, "maxItems": count})

    # -- notes ---------------------------------------------------------------------------------

    def _note(self, request: PlanRequest, forced: list[int], answers: list[_Answer]) -> dict[str, Any]:
        """What a person wants to know of a row: of a team's prompt in the note itself, of an agent's with the agent."""
        note: dict[str, Any] = {"model": clean(self.model.name), "agents": {a: {"forced": True} for a in forced}}
        for answer in answers:
            question, reading = answer.question, answer.reading
            told = _told(answer)
            if not question.options:
                note["reflection"] = told | {"lesson": _lesson(answer.reply.text)}
                continue
            note["system"] = question.prompt.system
            entries = {a: self._entry(request, question, a, answer) for a in question.options}
            if self.ask == "team":
                note |= told | {"findings": dict(Counter(reading.findings))}
            else:
                for entry in entries.values():
                    entry |= told | {"findings": dict(Counter(reading.findings))}
            note["agents"] |= entries
        return note

    def _entry(self, request: PlanRequest, question: _Question, a: int, answer: _Answer) -> dict[str, Any]:
        """What was shown and chosen for one agent."""
        if answer.reply.error is not None:
            return {}
        proposal = answer.reading.proposals.get(a, Proposal())
        chosen = proposal.option - 1 if proposal.option else None
        shown = self._options(request, question.i, a, question.options[a])
        entry: dict[str, Any] = {
            # Without their number: they are shown in a list.
            "options": [{"text": t.split(" ", 1)[1], "probability": float(n == chosen)} for n, t in enumerate(shown)],
            "chosen": chosen,
        }
        return entry | ({"why": proposal.why} if proposal.why else {})

    # -- state ---------------------------------------------------------------------------------

    def counters(self) -> dict[str, float]:
        """What it counted since the run began; see `counts`."""
        return {name: self.counts[name] for name in (*_COUNTS, *FINDINGS)}

    def state_dict(self) -> dict[str, Any]:
        """Its counters, and what it has learnt in the present episodes."""
        worlds: dict[str, Any] = {}
        for world, e in self._episodes.items():
            seen = {str(a): sign for a, sign in e.seen.items()}
            worlds[str(world)] = {"episode": e.number, "lessons": list(e.lessons), "seen": seen}
        return self.counters() | {"worlds": worlds}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave; counters that it lacks are 0."""
        self.counts = Counter({name: int(state.get(name, 0)) for name in (*_COUNTS, *FINDINGS)})
        self._episodes = {
            int(world): _Episode(int(e["episode"]), list(e["lessons"]), {int(a): s for a, s in e["seen"].items()})
            for world, e in state.get("worlds", {}).items()
        }


def open_candidates(request: PlanRequest, taken: NDArray[np.bool_], i: int, a: int, most: int) -> NDArray[np.int64]:
    """The candidates that agent `a` of row `i` could be given, the nearest `most` of them, the nearest first.

    Args:
        request: what is asked, with path lengths.
        taken: bool `(n, T)`, tasks that others have.
        i, a: row and agent.
        most: how many at most.

    Returns:
        int64 `(k,)`, indices of candidates, of equals the first first: no wait, none refused, taken or unreachable,
        and no tool for an agent that can finish something now (as for `hungarian`: else robots go from rack to rack).
    """
    assert request.distance is not None
    kind, task, length = request.candidates.kind[i, a], request.candidates.task[i, a], request.distance[i, a]
    usable = (kind > 0) & (length != UNREACHABLE) & ~request.refused[i, a]
    about = task >= 0
    usable[about] &= ~taken[i, task[about]]
    finishing = usable & (kind != SubgoalKind.TOOL)
    found = np.flatnonzero(finishing if finishing.any() else usable)
    return found[np.argsort(length[found], kind="stable")[:most]]


def _sight(fields: frozenset[str], memory: int) -> frozenset[Sight]:
    """What prompts with these fields tell of a scene, as `subgoals.Sight` has it."""
    told: set[Sight] = {"cells"}
    if "others" in fields:
        told.add("others")
    if "memory" in fields and memory:
        told.add("past")
    if fields & _SCENE:
        told |= {"scene", "time"}
    return frozenset(told)


def _templates(folder: Path | None, shipped: Path) -> list[PromptTemplate]:
    """The four templates, each the user's if there is one."""
    if folder is not None and not any((folder / name).exists() for name in _FILES):
        raise EchelonError(f"no prompt template in {folder}: it needs one of {', '.join(_FILES)}")
    templates = []
    for name in _FILES:
        own = folder is not None and (folder / name).exists()
        template = PromptTemplate.from_file((folder if own and folder is not None else shipped) / name)
        known = {"format"} if "system" in name else {*FIELDS} - ({"failures"} if name == "plan.txt" else set())
        for used in sorted(template.fields - known):
            raise unknown_name(f"field of {template.source}", used, known)
        templates.append(template)
    return templates


def _size(request: PlanRequest) -> tuple[int, int]:
    """Rows and columns of the grid."""
    return request.grid.height, request.grid.width


def _block(items: Iterable[object]) -> Block:
    """A cleaned line for each item, each with its line break."""
    found = lines(items)
    return Block(found + "\n") if found else found


def _ending(past: Past) -> str:
    """An earlier subgoal and what became of it: `fetch package 3: reached after 12 steps`."""
    text = subgoal_text(past.kind, past.target, -1 if past.task is None else past.task, brief=True)
    return f"{text}: {_ENDED[past.outcome]} after {past.steps} steps"


def _feedback(request: PlanRequest, i: int, agents: Sequence[int]) -> Block:
    """Why the last choices were refused, a line a reason."""
    verdicts = request.rejected[i]
    told = []
    for verdict in Verdict:
        refused = [str(a) for a in agents if verdict and verdicts[a] == verdict]
        if refused:
            told.append(f"Refused for robot {', '.join(refused)}: {verdict.reason}.")
    return _block(told)


def _others(request: PlanRequest, i: int, agents: Sequence[int]) -> Block:
    """Where the other robots are, and which tasks are taken."""
    rest = sorted(set(range(request.need.shape[1])) - set(agents))
    others = [f"{a} at {request.where(i, a)}" for a in rest]
    taken = [str(task) for task in np.flatnonzero(request.taken[i]).tolist()[:_TASKS]]
    told = [f"Other robots: {'; '.join(others)}."] if others else []
    return _block([*told, f"Tasks that others do: {', '.join(taken)}."] if taken else told)


def _map(scene: Scene | None) -> Block:
    if scene is None or scene.walls.size > _CELLS:
        return Block("")
    return _block(picture(scene).splitlines())


def _tasks(scene: Scene | None) -> Block:
    """The scene's tasks, a line each."""
    told = []
    for task in scene.tasks[:_TASKS] if scene is not None else ():
        place = "" if task.cell is None else f" at {task.cell}"
        goal = "" if task.goal is None else f", belongs at {task.goal}"
        needs = "" if task.needs is None else f", needs {task.needs}"
        locked = "" if task.locked_by is None else f", locked until {task.locked_by} is done"
        told.append(clean(f"{task.label}{place}: {task.status}{goal}{needs}{locked}")[:_TASK_LINE])
    return _block(told)


def _object(**properties: Any) -> dict[str, Any]:
    """The JSON schema of an object with exactly these keys."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _fitting(replies: object, count: int) -> list[TextReply]:
    """`count` replies, whatever a model gave in their place."""
    if isinstance(replies, Exception):
        return [TextReply("", _error(replies))] * count
    if not isinstance(replies, list) or len(replies) != count:
        return [TextReply("", f"the model gave no list of {count} replies")] * count
    return [_sound(reply) for reply in replies]


def _sound(reply: object) -> TextReply:
    """A reply of the right types."""
    if not isinstance(reply, TextReply) or not isinstance(reply.text, str):
        return TextReply("", "the model gave something that is no reply")
    error = None
    if reply.error is not None:
        error = (clean(reply.error[:_ERROR]) if isinstance(reply.error, str) else "") or "an error without a reason"
    counts = (reply.prompt_tokens, reply.completion_tokens, reply.attempts)
    read, written, attempts = (int(x) if isinstance(x, int) and 0 <= x < 1 << 53 else 0 for x in counts)
    seconds = reply.seconds if isinstance(reply.seconds, float) and math.isfinite(reply.seconds) else 0.0
    # Where no JSON was found, a record still tells what was written.
    texts = [text for text in reply.written if isinstance(text, str)] if isinstance(reply.written, tuple) else []
    return TextReply(texts[-1] if texts and error else reply.text, error, read, written, attempts, seconds)


def _error(error: Exception) -> str:
    try:
        return clean(f"{type(error).__name__}: {error}"[:_ERROR])
    except Exception:  # an exception whose words raise one
        return type(error).__name__


def _lesson(text: str) -> str:
    """A lesson in one clean line."""
    return clean(text[:_REPLY].rpartition("</think>")[2][: 4 * _LESSON])[:_LESSON].strip()


def _told(answer: _Answer) -> dict[str, Any]:
    """A prompt, its reply, and what it took, fit for JSON and for eyes."""
    reply = answer.reply
    return {
        "prompt": answer.question.prompt.text,
        # Lines stay lines.
        "reply": "\n".join(clean(line) for line in reply.text[:_REPLY].splitlines()),
        "error": reply.error,
        "prompt_tokens": reply.prompt_tokens,
        "completion_tokens": reply.completion_tokens,
        "attempts": reply.attempts,
        "seconds": round(reply.seconds, 4),
    }
